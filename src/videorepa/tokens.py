"""The token grid: features of a clip, laid out in time and space. All grid arithmetic is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from videorepa.errors import UserError


@dataclass(frozen=True)
class TokenGrid:
    """Features of a clip, and which source frames each step in time covers.

    Step i covers the source frames `start + i * stride` up to, not including,
    `start + (i + 1) * stride`. A model that gives the first frame a step of its own starts before
    frame 0: CogVideoX's 13 steps have start -3 and stride 4, so that step 0 covers frame 0 alone.
    A teacher with tubelets of 2 that sees frames 1 to 48 has 24 steps, start 1 and stride 2. Steps
    that lie before frame 0 altogether repeat it: CogVideoX 1.5 repeats the first latent of a clip.

    Args:
      tokens: (batch, time, height, width, channels). On the meta device they describe a shape.
      start: The first source frame of step 0; negative where step 0 covers fewer than `stride`.
      stride: Source frames that a step covers.
      saliency: How much each token matters, 0 to 1, if the teacher tells. It is not
        interpolated, so a grid that was brought to other steps, rows or columns has none.
    """

    tokens: Float[Tensor, "b t h w d"]
    start: int = 0
    stride: int = 1
    saliency: Float[Tensor, "b t h w"] | None = None

    def __post_init__(self) -> None:
        if self.tokens.dim() != 5:
            raise ValueError(
                "A token grid is (batch, time, height, width, channels); got "
                f"{tuple(self.tokens.shape)}."
            )
        if self.stride < 1:
            raise ValueError(f"A step covers at least one frame; got a stride of {self.stride}.")
        if self.saliency is not None and self.saliency.shape != self.tokens.shape[:4]:
            raise ValueError(
                f"Each token has a saliency; got {tuple(self.saliency.shape)} for tokens of "
                f"{tuple(self.tokens.shape)}."
            )

    @classmethod
    def causal(cls, tokens: Float[Tensor, "b t h w d"], frames: int, stride: int) -> TokenGrid:
        """The grid of a causal video autoencoder for a clip of `frames` frames.

        The last step covers the last `stride` frames, and so on backwards. The first frame has a
        step of its own, which can be repeated in front.
        """
        return cls(tokens, frames - tokens.shape[1] * stride, stride)

    @classmethod
    def batch(cls, grids: Sequence[TokenGrid]) -> TokenGrid:
        """Grids of the same steps and size, concatenated along the batch."""
        tokens = torch.cat([grid.tokens for grid in grids])
        saliency = [grid.saliency for grid in grids if grid.saliency is not None]
        return replace(grids[0], tokens=tokens, saliency=torch.cat(saliency) if saliency else None)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> TokenGrid:
        """The grid with what `change` makes of its tensors."""
        saliency = None if self.saliency is None else change(self.saliency)
        return replace(self, tokens=change(self.tokens), saliency=saliency)

    def to(self, device: torch.device) -> TokenGrid:
        """The same grid, in float32 on a device."""
        return self.mapped(lambda tensor: tensor.to(device, torch.float32))

    @property
    def size(self) -> tuple[int, int, int]:
        """Steps in time, rows, columns."""
        _, t, h, w, _ = self.tokens.shape
        return t, h, w

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.tokens.shape[-1]

    def frames(self, step: int) -> range:
        """The source frames that a step covers."""
        first = self.start + step * self.stride
        return range(max(first, 0), max(first + self.stride, 1))

    def with_tokens(self, tokens: Float[Tensor, "b t h w d"]) -> TokenGrid:
        """The same places in time and space, with other tokens."""
        return replace(self, tokens=tokens)

    def sample(self, index: int) -> TokenGrid:
        """One clip of the batch, as a batch of one."""
        return self.mapped(lambda tensor: tensor[index : index + 1])

    def samples(self, indices: Sequence[int]) -> TokenGrid:
        """Some clips of the batch."""
        return self.mapped(lambda tensor: torch.stack([tensor[index] for index in indices]))

    def detach(self) -> TokenGrid:
        """The same tokens without a gradient."""
        return self.with_tokens(self.tokens.detach())

    def on_meta(self) -> TokenGrid:
        """The grid's shape alone."""
        return self.with_tokens(self.tokens.to("meta"))

    def since(self, frame: int) -> TokenGrid:
        """The grid without the steps that cover any frame before `frame`: all of it for frame 0.

        Raises:
          UserError: No step remains.
        """
        return self.beginning_at(frame) if frame > 0 else self

    def beginning_at(self, frame: int) -> TokenGrid:
        """The grid without the steps that begin before `frame`. Before frame 0 begins one that
        covers fewer frames than the others.

        Raises:
          UserError: No step remains.
        """
        skip = max(0, -((self.start - frame) // self.stride))
        if skip >= self.tokens.shape[1]:
            raise UserError(
                f"No step of the grid {self} begins at or after frame {frame}. "
                "Give both models the same frames of the clip."
            )
        return self.steps(skip)

    def until(self, frame: int) -> TokenGrid:
        """The grid without the steps that cover `frame` or any frame after it.

        Raises:
          UserError: No step remains.
        """
        keep = (frame - self.start) // self.stride
        if keep < 1:
            raise UserError(
                f"No step of the grid {self} is over before frame {frame}. Lower align.ahead."
            )
        return self.steps(0, keep)

    def steps(self, first: int, end: int | None = None) -> TokenGrid:
        """The grid's steps from `first` up to, not including, `end`; by default up to the last."""
        saliency = None if self.saliency is None else self.saliency[:, first:end]
        start = self.start + first * self.stride
        return TokenGrid(self.tokens[:, first:end], start, self.stride, saliency)

    def pooled(self, steps: int) -> TokenGrid:
        """The grid with every `steps` steps averaged into one.

        A first frame that is left over keeps a step of its own, as in CogVideoX: 49 frames pooled
        by 4 are its 13 steps.

        Raises:
          UserError: Anything else is left over.
        """
        count = self.tokens.shape[1]
        alone = count % steps
        if alone > 1 or (alone and self.start > 0):
            raise UserError(
                f"{count} steps from frame {self.start} cannot be pooled by {steps}: that needs a "
                f"multiple of {steps}, or one more if the first is the clip's first frame. "
                f"{count - alone} would do."
            )
        groups = self.tokens[:, alone:].unflatten(1, (count // steps, steps)).mean(2)
        return TokenGrid(
            torch.cat([self.tokens[:, :alone], groups], 1),
            self.start - alone * (steps - 1) * self.stride,
            self.stride * steps,
        )

    def at_times_of(self, like: TokenGrid) -> TokenGrid:
        """The tokens, interpolated linearly in time to the centres of the steps of `like`.

        They are constant past the ends. Where both grids cover the same frames, this is torch's
        (tri)linear interpolation with align_corners=False.

        Raises:
          UserError: The grids share no frame.
        """
        steps, target = self.tokens.shape[1], like.tokens.shape[1]
        if (self.start, self.stride, steps) == (like.start, like.stride, target):
            return self
        self._check_overlap(like)
        # Made on the device, which would wait for a copy; MPS alone has no float64.
        home = "cpu" if self.tokens.device.type == "mps" else self.tokens.device
        numbers = torch.arange(target, dtype=torch.float64, device=home)
        centres = like.start + (numbers + 0.5) * like.stride
        position = ((centres - self.start) / self.stride - 0.5).clamp(0, steps - 1)
        # A matrix product, since its backward pass is deterministic on CUDA.
        distance = (position[:, None] - torch.arange(steps, device=home)).abs()
        weights = (1 - distance).clamp(min=0).to(self.tokens.device, self.tokens.dtype)
        kind = "cpu" if weights.is_meta else weights.device.type
        with torch.autocast(kind, enabled=False):  # It would round to bfloat16.
            flat = torch.bmm(weights.expand(len(self.tokens), -1, -1), self.tokens.flatten(2))
        mixed = flat.unflatten(2, self.tokens.shape[2:])
        return TokenGrid(mixed, like.start, like.stride)

    def standardised(self, share: float) -> TokenGrid:
        """(y - share * mean) / (std + 1e-6), with mean and std over each frame, per channel.

        With a share of 0.6 this is iREPA's spatial normalisation of a teacher (arXiv 2512.10794).
        """
        tokens = self.tokens.float()
        mean = tokens.mean((2, 3), keepdim=True)
        deviation = tokens.std((2, 3), keepdim=True, unbiased=False)
        return self.with_tokens((tokens - share * mean) / (deviation + 1e-6))

    def centred(self) -> TokenGrid:
        """Each token minus the mean of its place over the batch.

        This removes what all clips share, which is most of a video teacher's relations.
        """
        tokens = self.tokens.float()
        return self.with_tokens(tokens - tokens.mean(0, keepdim=True))

    def changes(self) -> TokenGrid:
        """Each token minus the mean of its place over the clip's time, which removes what is still.

        A grid without a saliency gets one: each token's length, divided by the clip's longest.
        """
        tokens = self.tokens.float()
        tokens = tokens - tokens.mean(1, keepdim=True)
        if self.saliency is not None:
            return self.with_tokens(tokens)
        length = torch.linalg.vector_norm(tokens.detach(), dim=-1)
        longest = length.amax((1, 2, 3), keepdim=True)
        return replace(
            self, tokens=tokens, saliency=length / torch.where(longest > 0, longest, 1.0)
        )

    def at_size(self, height: int, width: int) -> TokenGrid:
        """Each frame, interpolated bilinearly (align_corners=False) to `height` x `width`."""
        if self.size[1:] == (height, width):
            return self
        return self._map_frames(
            lambda frames: F.interpolate(frames, (height, width), mode="bilinear")
        )

    def averaged(self, side: int) -> TokenGrid:
        """Each frame, averaged over equal parts to at most `side` rows and columns."""
        _, height, width = self.size
        size = (min(side, height), min(side, width))
        return self._map_frames(lambda frames: F.adaptive_avg_pool2d(frames, size))

    def convolved(self, conv: torch.nn.Conv2d, height: int, width: int) -> TokenGrid:
        """Each frame, convolved to `height` rows and `width` columns.

        Frames are first interpolated to the size that `conv` maps to this one, so the ratio of the
        two grids need not be a whole number.
        """
        needed = (
            (target - 1) * conv.stride[axis] + conv.kernel_size[axis] - 2 * int(conv.padding[axis])
            for axis, target in enumerate((height, width))
        )
        return self.at_size(*needed)._map_frames(conv)

    def _map_frames(self, function) -> TokenGrid:
        b, t, h, w, d = self.tokens.shape
        frames = self.tokens.reshape(b * t, h, w, d).permute(0, 3, 1, 2)
        frames = function(frames).permute(0, 2, 3, 1)
        return TokenGrid(frames.reshape(b, t, *frames.shape[1:]), self.start, self.stride)

    def _check_overlap(self, like: TokenGrid) -> None:
        end = self.start + self.tokens.shape[1] * self.stride
        like_end = like.start + like.tokens.shape[1] * like.stride
        if like.start >= end or like_end <= self.start:
            raise UserError(
                f"The grids {self} and {like} share no frame. Give both models the same frames."
            )

    def __str__(self) -> str:
        t, h, w = self.size
        end = self.start + t * self.stride
        frames = f"frames {max(self.start, 0)}..{end - 1}, {self.stride} a step"
        return f"{t}x{h}x{w} x {self.width} ({frames})"

    __repr__ = __str__
