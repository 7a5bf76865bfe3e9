"""Any teacher with a small trained head on top: features of motion, or a saliency of each token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from videorepa.encoders import Encoder, EncoderSpec
from videorepa.encoders._wrapper import WrapperSpec
from videorepa.errors import UserError
from videorepa.system.files import atomic_write, from_metadata, to_metadata
from videorepa.system.fingerprint import json_digest, weights_digest
from videorepa.system.hub import micro_weights
from videorepa.tokens import TokenGrid

Kind = Literal["motion", "saliency"]

MOTION_WIDTH = 64
"""Channels of MoAlign's motion features (arXiv 2510.19022)."""


class Headed(WrapperSpec):
    """A teacher and a head that `videorepa head` trained on it.

    weights: the head's file, or "micro" for the lab's own motion head on its own video teacher.
    of: the teacher. How it is fed is said there alone; the rest of the keys follow.

    A motion head puts 64 channels in place of the teacher's, from which optical flow can be told
    (MoAlign, arXiv 2510.19022). A saliency head leaves them and adds how much of each token moves
    against the background, 0 to 1, for the loss `sara` (SARA, arXiv 2605.07800).
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
        self.shape(self.frames)
        self.fingerprint()  # The two refuse what does not fit, before weights are read.
        head = load_head(self.path).to(device)
        return HeadedEncoder(self, self.of.load(device, dtype), head)

    def _about(self) -> About:
        return read_about(self.path)

    def _misfit(self, about: About) -> str:
        return (
            f"The head {self.weights} was trained on {about.encoder}; encoder.of is "
            f"{described(self.of)}, and its weights or the way it is fed are others. Train a head "
            "for it with `videorepa head`, or give the encoder that the head was trained on."
        )


class Head(nn.Module):
    """The trained part: layer norm and a linear layer, with a sigmoid for a saliency."""

    def __init__(self, kind: Kind, width: int) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, MOTION_WIDTH if kind == "motion" else 1)

    def forward(self, grid: TokenGrid) -> TokenGrid:
        """A teacher's grid with motion features in place of its own, or with a saliency."""
        values = self.linear(self.norm(grid.tokens.float()))
        if self.kind == "motion":
            return grid.with_tokens(values.to(grid.tokens.dtype))
        return replace(grid, saliency=values.sigmoid().squeeze(-1))


class HeadedEncoder(Encoder):
    """The live one."""

    def __init__(self, spec: Headed, of: Encoder, head: Head) -> None:
        super().__init__(spec, of.stride)
        self.of, self.head = of, head.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, video: Float[Tensor, "b f 3 h w"]) -> TokenGrid:
        return self.head(self.of(video))


@dataclass(frozen=True)
class About:
    """What a head's file says of itself without its weights being read.

    width: of the tokens it takes. encoder, fingerprint: the encoder it was trained on, in words
    and exactly. held_out: errors on clips that it was not trained on.
    """

    kind: Kind
    width: int
    encoder: str
    fingerprint: dict[str, str]
    held_out: dict[str, float]


def described(spec: EncoderSpec) -> str:
    """An encoder in a few words, for messages."""
    return f"{spec.name} ({spec.weights}, fed {spec.frames}x{spec.height}x{spec.width})"


def save_head(path: Path, head: Head, of: EncoderSpec, held_out: dict[str, float]) -> None:
    """Write a head that was trained on the encoder `of`, whole or not at all."""
    about = {
        "kind": head.kind,
        "encoder": described(of),
        "fingerprint": of.fingerprint(),
        "held_out": held_out,
    }
    tensors = {key: value.cpu().contiguous() for key, value in head.state_dict().items()}
    atomic_write(path, save(tensors, metadata=to_metadata(about)))


def read_about(path: Path) -> About:
    """A head's file, its header alone. Raises UserError for what is no such file."""
    if not path.exists():
        raise UserError(
            f"There is no head {path}. Train it: `videorepa head RECIPE --kind KIND --out {path}`."
        )
    try:
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
        found = about["encoder"], dict(about["fingerprint"]), dict(about["held_out"])
        return About(kind, width, *found)
    except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no head that can be read ({type(error).__name__}: {error}). Train it anew "
            "with `videorepa head`, or copy it again."
        ) from None


def load_head(path: Path) -> Head:
    """The head of a file. Raises UserError for what is no such file."""
    about = read_about(path)
    head = Head(about.kind, about.width)
    with safe_open(path, framework="pt") as file:
        head.load_state_dict({key: file.get_tensor(key) for key in head.state_dict()})
    return head
