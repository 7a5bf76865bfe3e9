"""Video diffusion models to fine-tune: each file adapts one family to the contract below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from videorepa.diffusion import Denoised
from videorepa.errors import UserError
from videorepa.settings.section import Section
from videorepa.settings.sections import ClipSize, Generation, Lora
from videorepa.tokens import TokenGrid

Part = Literal["transformer", "vae", "text_encoder"]

Text = dict[str, Tensor]
"""What captions become, by the names that the transformer's arguments have: embeddings, (B, tokens,
width) or (B, width), and boolean masks, (B, tokens)."""


class BackboneSpec(Section):
    """What a recipe holds of a backbone: cheap to make, loads nothing.

    weights: a diffusers pipeline folder, a Hub id, or "micro" for the lab's own model.
    prepared_with: weights whose autoencoder and text encoders `prepare` uses in place of the
        model's own. Checkpoints whose own differ in how they were rounded alone, as those of
        CogVideoX-2B and 5B do, share a cache so.
    lora_targets: layers that get adapters unless the recipe names others.
    generation: how the model's authors sample; holds for what a recipe's `generation` leaves out.
    """

    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    generation: ClassVar[dict[str, Any]] = {}

    name: str
    weights: str
    prepared_with: str | None = None

    @property
    def preparing(self) -> Self:
        """The description of the model that clips and captions are encoded with."""
        if self.prepared_with is None:
            return self
        return self.model_copy(update={"weights": self.prepared_with, "prepared_with": None})

    @property
    def source(self) -> str:
        """The folder or Hub id that diffusers is given."""
        return self.weights

    def check_clip(self, size: ClipSize) -> None:
        """Raises UserError, naming sizes that would do, if the model cannot take such a clip."""
        raise NotImplementedError

    def check_generation(self, settings: Generation) -> None:
        """Raises UserError for a setting that the model does not have."""
        if settings.dynamic_guidance and not self.generation.get("dynamic_guidance", True):
            raise UserError(
                "generation.dynamic_guidance is CogVideoX's alone; set it to false for "
                f"{self.weights}."
            )

    def shapes(self, size: ClipSize) -> BackboneShapes:
        """What a clip becomes, from configuration files alone."""
        raise NotImplementedError

    @property
    def lora_pipeline(self) -> str:
        """The class of diffusers pipeline that writes and reads LoRA files for the transformer."""
        raise NotImplementedError

    def add_lora(self, transformer: Any, lora: Lora) -> None:
        """Inject adapters. Raises UserError if a target names no layer."""
        from peft import LoraConfig

        # peft's type hint says int, but any number is right.
        alpha: Any = lora.alpha
        targets = list(lora.targets or self.lora_targets)
        config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets)
        try:
            transformer.add_adapter(config)
        except ValueError as error:
            raise UserError(f"LoRA cannot be added: {error} Check train.lora.targets.") from None

    def lora_parameters(self, lora: Lora) -> int:
        """How many weights such adapters would have."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, str]:
        """What stored latents and text embeddings depend on, and nothing more."""
        raise NotImplementedError

    def weights_digest(self) -> str:
        """A digest of the weights that denoise."""
        raise NotImplementedError

    def weight_files(self) -> list[Path]:
        """The files that the transformer is in, in their order, where they are on this machine."""
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

    latents: (frames, channels, height, width). text: one caption's tensors, on the meta device.
    blocks: how many there are.
    """

    model_config = {"arbitrary_types_allowed": True, "frozen": True, "extra": "forbid"}

    latents: tuple[int, int, int, int]
    text: Text
    grid: TokenGrid
    blocks: int
    parameters: int


class Backbone(Protocol):
    """A live video diffusion model. Videos are (B, F, 3, H, W) in [0, 1].

    device, dtype: where the transformer is fed, and in what. part: its folder in the pipeline's.
    """

    transformer: Any
    device: torch.device
    dtype: torch.dtype
    part: str

    def block(self, number: int) -> nn.Module:
        """The transformer block with that number, counted from 1."""
        ...

    def grid(self, output: Any, latents: Float[Tensor, "b f c h w"]) -> TokenGrid:
        """A block's output as a grid of the video's tokens, for the given input latents."""
        ...

    def encode_text(self, captions: Sequence[str]) -> Text: ...

    def encode_video(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b m t h w"]:
        """The posterior's moments (mean and log-variance), unscaled."""
        ...

    def latents(
        self, moments: Float[Tensor, "b m t h w"], generator: torch.Generator
    ) -> Float[Tensor, "b f c h w"]:
        """A sample of the posterior, scaled as this checkpoint wants it."""
        ...

    def sample_timesteps(
        self, latents: Float[Tensor, "b f c h w"], generator: torch.Generator
    ) -> Num[Tensor, " b"]:
        """One for each of the latents, whose size can decide which are likely."""
        ...

    def denoising_loss(
        self,
        latents: Float[Tensor, "b f c h w"],
        text: Text,
        noise: Float[Tensor, "b f c h w"],
        timestep: Num[Tensor, " b"],
    ) -> Denoised:
        """The diffusion loss of each sample, and the latents it predicts; runs the transformer
        once."""
        ...

    def inputs(
        self, noisy: Float[Tensor, "b f c h w"], text: Text, timestep: Num[Tensor, " b"]
    ) -> dict[str, Any]:
        """The transformer's arguments, as the stock pipeline would give them."""
        ...

    def pipeline(self, transformer: Any = None) -> Any:
        """The stock diffusers pipeline around the loaded parts, ready to sample.

        transformer: used in place of the backbone's own, for models in training.
        """
        ...

    def sampling(self, size: ClipSize, settings: Generation) -> dict[str, Any]:
        """The pipeline's arguments for such clips, but for the prompt and the generator.

        Raises UserError as `check_generation` does.
        """
        ...
