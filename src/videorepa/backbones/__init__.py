"""Video diffusion models to fine-tune: each file adapts one family to the contract below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from videorepa.diffusion import Denoised
from videorepa.errors import UserError
from videorepa.recipe import ClipSize, Lora, Section
from videorepa.tokens import TokenGrid

Part = Literal["transformer", "vae", "text_encoder"]


class BackboneSpec(Section):
    """What a recipe holds of a backbone: cheap to make, loads nothing.

    weights: a diffusers pipeline folder, a Hub id, or "micro" for the lab's own model.
    """

    name: str
    weights: str

    @property
    def source(self) -> str:
        """The folder or Hub id that diffusers is given."""
        return self.weights

    def check_clip(self, size: ClipSize) -> None:
        """Raises UserError, naming sizes that would do, if the model cannot take such a clip."""
        raise NotImplementedError

    def shapes(self, size: ClipSize) -> BackboneShapes:
        """What a clip becomes, from configuration files alone."""
        raise NotImplementedError

    def lora_parameters(self, lora: Lora) -> int:
        """How many weights such adapters would have."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, str]:
        """What stored latents and text embeddings depend on, and nothing more."""
        raise NotImplementedError

    def weights_digest(self) -> str:
        """A digest of the transformer's weights."""
        raise NotImplementedError

    def default_size(self) -> ClipSize:
        """The clip size that the model was made for."""
        raise NotImplementedError

    def load(
        self, parts: Sequence[Part], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Backbone:
        """The live model, with only the parts that are asked for in memory.

        On the meta device nothing is read: the transformer is made from its configuration and has
        shapes alone, and the scheduler is its class's default.
        """
        raise NotImplementedError


class BackboneShapes(Section):
    """The shape contract of a backbone for one clip size.

    latents: (frames, channels, height, width). text: (tokens, width). blocks: how many there are.
    """

    model_config = {"arbitrary_types_allowed": True, "frozen": True, "extra": "forbid"}

    latents: tuple[int, int, int, int]
    text: tuple[int, int]
    grid: TokenGrid
    blocks: int
    parameters: int


class Backbone(Protocol):
    """A live video diffusion model. Videos are (B, F, 3, H, W) in [0, 1].

    device, dtype: where the transformer is fed, and in what.
    """

    transformer: Any
    device: torch.device
    dtype: torch.dtype

    def block(self, number: int) -> nn.Module:
        """The transformer block with that number, counted from 1."""
        ...

    def grid(self, output: Any, latents: Float[Tensor, "b f c h w"]) -> TokenGrid:
        """A block's output as a grid of the video's tokens, for the given input latents."""
        ...

    def encode_text(self, captions: Sequence[str]) -> Float[Tensor, "b l d"]: ...

    def encode_video(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b m t h w"]:
        """The posterior's moments (mean and log-variance), unscaled."""
        ...

    def latents(
        self, moments: Float[Tensor, "b m t h w"], generator: torch.Generator
    ) -> Float[Tensor, "b f c h w"]:
        """A sample of the posterior, scaled as this checkpoint wants it."""
        ...

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Int[Tensor, " b"]: ...

    def denoising_loss(
        self,
        latents: Float[Tensor, "b f c h w"],
        text: Float[Tensor, "b l d"],
        noise: Float[Tensor, "b f c h w"],
        timestep: Int[Tensor, " b"],
    ) -> Denoised:
        """The diffusion loss of each sample and what was predicted; runs the transformer once."""
        ...

    def inputs(
        self,
        noisy: Float[Tensor, "b f c h w"],
        text: Float[Tensor, "b l d"],
        timestep: Int[Tensor, " b"],
    ) -> dict[str, Any]:
        """The transformer's arguments, as the stock pipeline would give them."""
        ...

    def pipeline(self) -> Any:
        """The stock diffusers pipeline around the loaded parts."""
        ...


def add_lora(transformer: Any, lora: Lora) -> None:
    """Inject adapters. Raises UserError if a target names no layer."""
    from peft import LoraConfig

    # peft's type hint says int, but any number is right.
    alpha: Any = lora.alpha
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(lora.targets))
    try:
        transformer.add_adapter(config)
    except ValueError as error:
        raise UserError(f"LoRA cannot be added: {error} Check train.lora.targets.") from None
