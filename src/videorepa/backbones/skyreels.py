"""SkyReels V2 (arXiv 2504.13074), text or image to video, on unmodified diffusers classes.

It is Wan 2.1 with weights and a transformer class of its own. The diffusion-forcing weights, whose
latents each have a timestep, are trained otherwise and are not for this family.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from videorepa.backbones import Config
from videorepa.backbones.wan import Wan, WanBackbone
from videorepa.errors import UserError
from videorepa.settings.sections import ClipSize

_FOURTEEN_BILLION = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}

_FROM_IMAGE = _FOURTEEN_BILLION | {
    "in_channels": 36,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}


class SkyReelsBackbone(WanBackbone):
    """The live model: the stock pipelines have one transformer."""

    def components(self) -> Config:
        modules = super().components()
        del modules["transformer_2"]
        return modules


class SkyReels(Wan):
    """A SkyReels V2 pipeline, as a diffusers folder or a Hub id."""

    live: ClassVar = SkyReelsBackbone
    pipeline_class = "SkyReelsV2Pipeline"
    image_pipeline = "SkyReelsV2ImageToVideoPipeline"
    transformer_class = "SkyReelsV2Transformer3DModel"
    options: ClassVar = ()
    generation: ClassVar = {"guidance_scale": 5.0, "dynamic_guidance": False, "fps": 24}
    published: ClassVar = {
        "SkyReels-V2-T2V-14B-540P-Diffusers": {"transformer": _FOURTEEN_BILLION},
        "SkyReels-V2-T2V-14B-720P-Diffusers": {"transformer": _FOURTEEN_BILLION},
        "SkyReels-V2-I2V-14B-540P-Diffusers": {"transformer": _FROM_IMAGE},
        "SkyReels-V2-I2V-14B-720P-Diffusers": {"transformer": _FROM_IMAGE},
    }
    size: ClassVar = ClipSize(frames=97, height=544, width=960)

    name: Literal["skyreels"] = "skyreels"  # pyright: ignore[reportIncompatibleVariableOverride]

    def config(self, part: str) -> Config:
        config = super().config(part)
        if part != "model_index":
            return config
        # What Wan's pipelines have, and these do not.
        return config | {"boundary_ratio": None, "expand_timesteps": False}

    def image_encoders(self) -> dict[str, str]:
        if not super().image_encoders():
            return {}
        default = ("transformers", "CLIPVisionModelWithProjection")
        return {"image_encoder": self.config("model_index").get("image_encoder", default)[1]}

    def check_clip(self, size: ClipSize) -> None:
        super().check_clip(size)
        if self.config("transformer")["inject_sample_info"]:
            raise UserError(
                f"{self.weights} is told a frame rate, as weights for diffusion forcing are, whose "
                "latents each have a noise level of their own. They are not trained here: take "
                "the text or image weights of SkyReels V2."
            )
