"""Video diffusion models to fine-tune: each file adapts one family of diffusers pipelines.

A family is two classes. Its `BackboneSpec` is the description that a recipe holds: it reads
configuration files and loads no weights. Its `Backbone` is the live model.
"""

from videorepa.backbones._live import (
    ONE_TILE,
    Backbone,
    Config,
    Image,
    Part,
    Text,
    moved,
    pictures,
)
from videorepa.backbones._noise import timestep_of_noise
from videorepa.backbones._spec import (
    TWO_STREAMS,
    BackboneShapes,
    BackboneSpec,
    Geometry,
    pipeline_of,
)

__all__ = [
    "ONE_TILE",
    "TWO_STREAMS",
    "Backbone",
    "BackboneShapes",
    "BackboneSpec",
    "Config",
    "Geometry",
    "Image",
    "Part",
    "Text",
    "moved",
    "pictures",
    "pipeline_of",
    "timestep_of_noise",
]
