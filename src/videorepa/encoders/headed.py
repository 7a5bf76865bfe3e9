"""Any teacher with a small trained head: motion features, or a saliency of each token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from videorepa.encoders import Encoder, EncoderSpec
from videorepa.encoders._wrapper import WrapperSpec
from videorepa.errors import UserError
from videorepa.system.files import atomic_write, check_is_file, from_metadata, to_metadata
from videorepa.system.fingerprint import json_digest, weights_digest
from videorepa.system.hub import micro_weights
from videorepa.tokens import TokenGrid

Kind = Literal["motion", "saliency"]

MOTION_WIDTH = 64
"""Channels of MoAlign's motion features (arXiv 2510.19022)."""


class Headed(WrapperSpec):
    """A teacher and a head that `videorepa head` trained on it.

    A motion head replaces the teacher's channels with 64 that predict optical flow (MoAlign,
    arXiv 2510.19022). A saliency head keeps them and adds a saliency for the loss `sara` (SARA,
    arXiv 2605.07800): how much of each token moves against the background, 0 to 1.

    Args:
      weights: The head's file, or "micro" for the lab's motion head on the lab's video teacher.
      of: The teacher. Its frames, sizes and pieces are set there alone.
    """

    name: Literal["headed"] = "headed"

    @property
    def path(self) -> Path:
        """The head's file."""
        return (
            micro_weights("motion.safetensors") if self.weights == "micro" else Path(self.weights)
        )

    def shape(self, clip_frames: int) -> TokenGrid:
        grid, about = self.of.shape(clip_frames), self._about()
        if about.width != grid.width:
            raise UserError(self._misfit(about))
        if about.kind == "motion":
            return grid.with_tokens(torch.empty(1, *grid.size, MOTION_WIDTH, device="meta"))
        return replace(grid, saliency=torch.empty(1, *grid.size, device="meta"))

    def fingerprint(self) -> dict[str, str]:
        of = self.of.fingerprint()
        about = self._about()
        if about.fingerprint != of:
            raise UserError(self._misfit(about))
        return {"encoder": json_digest(of), "weights": weights_digest(self.path)}

    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoder:
        # Both raise for what does not fit, before weights are read.
        self.shape(self.frames)
        self.fingerprint()
        head = load_head(self.path).to(device)
        return HeadedEncoder(self, self.of.load(device, dtype), head)

    def _about(self) -> About:
        return read_about(self.path)

    def _misfit(self, about: About) -> str:
        return (
            f"The head {self.weights} was trained on {about.encoder}; encoder.of is "
            f"{described(self.of)}, whose weights, frames or sizes differ. Train a head for it "
            "with `videorepa head`, or give the encoder that the head was trained on."
        )


class Head(nn.Module):
    """The trained part: a layer norm and a linear layer, and for a saliency a sigmoid.

    Args:
      kind: "motion" or "saliency".
      width: Channels of the teacher's tokens.
    """

    def __init__(self, kind: Kind, width: int) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, MOTION_WIDTH if kind == "motion" else 1)

    def forward(self, grid: TokenGrid) -> TokenGrid:
        """The teacher's grid with motion features for its tokens, or with a saliency added."""
        values = self.linear(self.norm(grid.tokens.float()))
        if self.kind == "motion":
            return grid.with_tokens(values.to(grid.tokens.dtype))
        return replace(grid, saliency=values.sigmoid().squeeze(-1))


class HeadedEncoder(Encoder):
    """The live teacher, followed by the head."""

    def __init__(self, spec: Headed, of: Encoder, head: Head) -> None:
        super().__init__(spec, of.stride)
        self.of, self.head = of, head.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, video: Float[Tensor, "b f 3 h w"]) -> TokenGrid:
        return self.head(self.of(video))


@dataclass(frozen=True)
class About:
    """The header of a head's file.

    Args:
      kind: "motion" or "saliency".
      width: Channels of the tokens that the head takes.
      encoder: The encoder that the head was trained on, in words.
      fingerprint: That encoder's fingerprint.
      held_out: Errors on clips that the head was not trained on, by name.
      training: What else `videorepa head` has to say of the training.
    """

    kind: Kind
    width: int
    encoder: str
    fingerprint: dict[str, str]
    held_out: dict[str, float]
    training: dict[str, Any]


def described(spec: EncoderSpec) -> str:
    """An encoder in a few words, for messages."""
    return f"{spec.name} ({spec.weights}, fed {spec.frames}x{spec.height}x{spec.width})"


def save_head(
    path: Path,
    head: Head,
    of: EncoderSpec,
    held_out: dict[str, float],
    training: dict[str, Any] | None = None,
) -> None:
    """Write a head's file, whole or not at all.

    Args:
      path: The file to write.
      head: The trained head.
      of: The encoder that it was trained on.
      held_out: Errors on clips that it was not trained on, by name.
      training: Whatever else the file is to say of the training, as JSON has it.
    """
    about = {
        "kind": head.kind,
        "encoder": described(of),
        "fingerprint": of.fingerprint(),
        "held_out": held_out,
        "training": training or {},
    }
    tensors = {key: value.cpu().contiguous() for key, value in head.state_dict().items()}
    atomic_write(path, save(tensors, metadata=to_metadata(about)))


def read_about(path: Path) -> About:
    """Read the header of a head's file.

    Raises:
      UserError: There is no such file, or it does not hold a head.
    """
    if not path.exists():
        raise UserError(
            f"There is no head {path}. Train it: `videorepa head RECIPE --kind KIND --out {path}`."
        )
    try:
        check_is_file(path)
        with safe_open(path, framework="pt") as file:
            about = from_metadata(file.metadata())
            sizes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        kind = about["kind"]
        if kind not in get_args(Kind):
            raise ValueError(f"its kind is {kind!r}, expected {' or '.join(get_args(Kind))}")
        width = sizes["norm.weight"][0]
        with torch.device("meta"):
            expected = Head(kind, width).state_dict()
        if sizes != {key: list(value.shape) for key, value in expected.items()}:
            raise ValueError(f"its tensors are {sizes}")
        return About(
            kind,
            width,
            about["encoder"],
            dict(about["fingerprint"]),
            dict(about["held_out"]),
            dict(about.get("training", {})),
        )
    except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a head ({type(error).__name__}: {error}). Train it anew "
            "with `videorepa head`, or copy it again."
        ) from None


def load_head(path: Path) -> Head:
    """Load a head.

    Raises:
      UserError: There is no such file, or it does not hold a head.
    """
    about = read_about(path)
    head = Head(about.kind, about.width)
    head.load_state_dict(load_file(path))
    return head
