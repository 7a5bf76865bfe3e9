"""Teachers: frozen video encoders, each adapted in one file to give a token grid.

An encoder is two classes. Its `EncoderSpec` is the description that a recipe holds, which knows the
grid's shape without loading weights. Its `Encoder` is the live network.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from videorepa.errors import UserError
from videorepa.settings import plugins
from videorepa.settings.bounds import Frames, Side
from videorepa.settings.section import Section, Weights
from videorepa.tokens import TokenGrid

if TYPE_CHECKING:
    from videorepa.world.simulator import Scene

IMAGENET_MEAN = (0.485, 0.456, 0.406)

IMAGENET_STD = (0.229, 0.224, 0.225)


class Sizes(NamedTuple):
    """The sizes that decide an encoder's grid.

    Args:
      width: Channels of a token.
      patch: Pixels along a side that a token covers.
      tubelet: Frames that a token covers.
    """

    width: int
    patch: int
    tubelet: int = 1

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Steps, rows and columns for a video of that size."""
        return frames // self.tubelet, height // self.patch, width // self.patch


class EncoderSpec(Section):
    """The description of an encoder in a recipe; making one loads nothing.

    A teacher made for small, short clips can see a large clip whole but resized to a small one, as
    in VideoREPA. Or it can see the clip at full size, cut into pieces along time (`group`) or space
    (`crop`). Each piece is then encoded by itself, and the tokens are put together again.

    Args:
      name: The encoder: the name of its file.
      weights: A checkpoint in a published layout, a transformers folder, a Hub id, or "micro" for
        the lab's own model.
      frames: Frames that the encoder sees: the last ones of the clip.
      height: Side that each frame is resized to.
      width: Side that each frame is resized to.
      normalized: Whether the video is normalised already, so that the encoder's mean and standard
        deviation are not applied.
      group: Frames in a piece; all by default.
      crop: Height and width of a piece in pixels; the whole frame by default.

    Attributes:
      reads_scenes: Whether it reads the simulator's scenes of clips in place of their pixels.
    """

    reads_scenes: ClassVar[bool] = False

    name: str
    weights: Weights
    frames: Frames = 48
    height: Side = 160
    width: Side = 240
    normalized: bool = False
    group: Frames | None = None
    crop: tuple[Side, Side] | None = None

    @property
    def relation_margin(self) -> float:
        """The published relation margin for this teacher, else the published code's default."""
        return 0.1

    @property
    def piece(self) -> tuple[int, int, int]:
        """Frames, height and width of what is encoded at once.

        Raises:
          UserError: The clip does not divide into such pieces.
        """
        crop = self.crop or (self.height, self.width)
        piece = (self.group or self.frames, *crop)
        whole = (self.frames, self.height, self.width)
        for key, size, part in zip(("frames", "height", "width"), whole, piece, strict=True):
            if size % part:
                cut = "group" if key == "frames" else "crop"
                raise UserError(
                    f"encoder.{key} is {size}, which is no multiple of {part}, the size that "
                    f"encoder.{cut} sets: pieces must fill the clip. Change one of the two."
                )
        return piece

    @abstractmethod
    def shape(self, clip_frames: int) -> TokenGrid:
        """The grid of a clip of `clip_frames` frames, with tokens on the meta device.

        Raises:
          UserError: The encoder cannot see such clips.
        """

    def check_sees(self, has_scenes: bool = False) -> None:
        """Check that the encoder can see clips, which have scenes or frames alone.

        Raises:
          UserError: It reads scenes, and there are none.
        """
        if self.reads_scenes and not has_scenes:
            raise UserError(
                f"The encoder {self.name} reads the simulator's scenes, and here clips are frames "
                "alone. It is for prepare and train with clips of data.lab. Choose another encoder."
            )

    def patch_grid(self, sizes: Sizes, clip_frames: int) -> TokenGrid:
        """What `shape` returns for an encoder with a token for each tubelet and patch.

        Raises:
          UserError: Tubelets and patches do not fill a piece, or the clip is too short.
        """
        if min(sizes) < 1:
            raise UserError(f"{self.weights} has a token of no size: {sizes}. Copy it again.")
        frames, height, width = self.piece
        if frames % sizes.tubelet or height % sizes.patch or width % sizes.patch:
            raise UserError(
                f"The encoder {self.name} ({self.weights}) takes frames in multiples of "
                f"{sizes.tubelet} and sizes in multiples of {sizes.patch}; the recipe asks for "
                f"{frames}x{height}x{width}."
            )
        size = sizes.grid(self.frames, self.height, self.width)
        tokens = torch.empty(1, *size, sizes.width, device="meta")
        return TokenGrid(tokens, self.first_frame(clip_frames), sizes.tubelet)

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Digests of everything that stored features depend on."""

    @abstractmethod
    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoder:
        """Load the live encoder.

        Raises:
          UserError: The weights are missing, damaged or another model's.
        """

    def first_frame(self, clip_frames: int) -> int:
        """The first frame that the encoder sees of a clip of `clip_frames` frames.

        Raises:
          UserError: The clip is too short.
        """
        if clip_frames < self.frames:
            raise UserError(
                f"The encoder {self.name} takes {self.frames} frames and the clip has "
                f"{clip_frames}. Lower encoder.frames or give longer clips."
            )
        return clip_frames - self.frames


class Encoder(nn.Module):
    """A frozen encoder: video (B, F, 3, H, W) in [0, 1] to a grid of tokens.

    It sees the last `spec.frames` frames of a longer clip, as VideoREPA's teacher sees 48 of 49,
    and the grid's start says so. Frames are resized bicubically without antialias, as published,
    and cut into pieces afterwards.

    Args:
      spec: The encoder's description.
      stride: Frames that a step of the grid covers.

    Attributes:
      mean: Mean of the pixels that the model was trained on, by channel.
      std: Their standard deviation.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __init__(self, spec: EncoderSpec, stride: int) -> None:
        super().__init__()
        self.spec, self.stride = spec, stride

    @torch.no_grad()
    def forward(self, video: Float[Tensor, "b f 3 h w"]) -> TokenGrid:
        spec = self.spec
        start = spec.first_frame(video.shape[1])
        parameter = next(self.parameters())
        video = video[:, start:].to(parameter.device, torch.float32)
        size = (spec.height, spec.width)
        if video.shape[-2:] != size:
            resized = F.interpolate(video.flatten(0, 1), size, mode="bicubic", align_corners=False)
            video = resized.unflatten(0, video.shape[:2])
        if not spec.normalized:
            mean = video.new_tensor(self.mean).view(3, 1, 1)
            std = video.new_tensor(self.std).view(3, 1, 1)
            video = (video - mean) / std
        return TokenGrid(self._in_pieces(video.to(parameter.dtype)), start, self.stride)

    def see(self, video: Float[Tensor, "b f 3 h w"], scenes: Sequence[Scene | None]) -> TokenGrid:
        """The grid of clips from a source: by their pixels, unless the encoder reads their scenes.

        Args:
          video: The clips.
          scenes: What the simulator drew each from; None for other clips.
        """
        return self(video)

    def _in_pieces(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b t h w d"]:
        frames, height, width = self.spec.piece
        groups = []
        for group in video.split(frames, 1):
            rows = []
            for row in group.split(height, -2):
                pieces = [self.features(piece) for piece in row.split(width, -1)]
                rows.append(torch.cat(pieces, 3))
            groups.append(torch.cat(rows, 2))
        return torch.cat(groups, 1)

    def features(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b t h w d"]:
        """The tokens of one resized and normalised piece of a clip, of the size `spec.piece`."""
        raise NotImplementedError


def load_encoder(
    name: str,
    weights: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Encoder:
    """Load an encoder; the model's sizes are read from the weights.

    Args:
      name: "videomae" (VideoMAE and VideoMAEv2), "vjepa", "vjepa2", "omnimae", "dinov2" or any
        other file of this folder.
      weights: A checkpoint in any layout that the encoder knows, a folder, or a Hub id.
      device: Where the encoder runs.
      dtype: The dtype of its weights and features.
      **options: `frames`, `height`, `width`, `normalized` and the encoder's own, as in a recipe.

    Raises:
      UserError: The weights are missing, another model's, or a pickle that would run code.
    """
    spec = plugins.description("encoders", name)(name=name, weights=str(weights), **options)
    return spec.load(torch.device(device), dtype)
