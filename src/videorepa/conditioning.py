"""What a model is shown of a clip that it is to continue: its opening, the first latents.

A family says in its `Conditioning` how its model takes an opening, a recipe says in
`data.condition` what is shown in training, and each batch carries its clips' `Opening`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from videorepa.errors import UserError
from videorepa.settings.sections import Continuation
from videorepa.system.wording import count


@dataclass(frozen=True)
class Conditioning:
    """How a model takes the opening of a clip, and how its authors train it.

    Attributes:
      place: "in place" puts an opening's clean latents where noisy ones would be; their prediction
        is not used, so they have no loss. "by channels" puts them beside the noisy latents, which
        are denoised as all others are.
      trained: What the authors show in training. All of its fields are set.
      most: Most latents that can be shown; None for any number.
      is_required: The model has no text mode: it has always been shown an opening.
      has_blank: The model has been trained without the opening that it expects (`dropout`).
      is_alike: All clips of a batch are shown alike, since the model cannot mix them.
    """

    place: Literal["in place", "by channels"]
    trained: Continuation
    most: int | None = 1
    is_required: bool = False
    has_blank: bool = False
    is_alike: bool = False

    def completed(self, asked: Continuation | None, weights: str) -> Continuation | None:
        """What is shown in training: what a recipe asks for, completed by what the authors show.

        Args:
          asked: The recipe's `data.condition`.
          weights: The model's name, for messages.

        Returns:
          None if clips are never shown.

        Raises:
          UserError: The model cannot be trained so.
        """
        if asked is None:
            return self.trained if self.is_required else None
        chosen = self.trained.model_copy(update=asked.model_dump(exclude_none=True))
        assert chosen.latents and chosen.probability is not None
        if self.most is not None and max(chosen.latents) > self.most:
            raise UserError(
                f"data.condition.latents is {max(chosen.latents)}; {weights} is shown at most "
                f"{self.most}."
            )
        if self.is_required and chosen.probability < 1:
            raise UserError(
                f"data.condition.probability is {chosen.probability:g}, and {weights} has no text "
                "mode: it is always shown an image. Leave the probability out"
                + ("; `dropout` takes the image away." if self.has_blank else ".")
            )
        if chosen.dropout and not self.has_blank:
            raise UserError(
                f"data.condition.dropout is {chosen.dropout:g}; {weights} is not trained without "
                "an image that it expects. Leave the dropout out"
                + ("." if self.is_required else "; a lower `probability` trains it on text alone.")
            )
        return chosen

    def described(self, continuation: Continuation, stride: int) -> str:
        """Say what clips are shown in training, where, and how often.

        Args:
          continuation: What `completed` gave.
          stride: Frames that a latent covers; the first covers one alone.
        """
        assert continuation.latents is not None and continuation.probability is not None
        *fewer, most = map(str, continuation.latents)
        counts = f"{', '.join(fewer)} or {most} latents" if fewer else count(int(most), "latent")
        last = frames_of(max(continuation.latents), stride) - 1
        frames = f"frames 0-{last}" if last else "frame 0"
        place = "in place of noisy ones, without a loss"
        if self.place == "by channels":
            place = "in channels of their own"
        drawn = "batches" if self.is_alike else "samples"
        often = f"in {100 * continuation.probability:.3g} % of {drawn}"
        if continuation.dropout:
            often += f", taken away again from {100 * continuation.dropout:.3g} % of these"
        return f"the first {counts} ({frames}), {place}; {often}"


@dataclass(frozen=True)
class Opening:
    """What a model is shown of each clip of a batch.

    Attributes:
      latents: How many of each clip's first latents; 0 where it sees nothing.
      image: What `Backbone.image` makes of the first frames, one row for each clip. Its "latents"
        stand in place of the clips' own; {} where those are enough.
    """

    latents: tuple[int, ...]
    image: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def batch(cls, openings: Sequence[Opening]) -> Opening:
        """The openings of several batches as those of one."""
        names = openings[0].image
        image = {name: torch.cat([each.image[name] for each in openings]) for name in names}
        return cls(tuple(count for each in openings for count in each.latents), image)

    def repeated(self, clips: int) -> Opening:
        """One clip's opening as that of several."""
        image = {name: x.expand(clips, *x.shape[1:]) for name, x in self.image.items()}
        return Opening(self.latents * clips, image)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Opening:
        """The same with what `change` makes of each tensor."""
        return replace(self, image={name: change(value) for name, value in self.image.items()})

    def mask(
        self, latents: Float[Tensor, "b f c h w"], repeats: int = 0
    ) -> Bool[Tensor, "b f 1 1 1"]:
        """Which of a batch's latents are shown.

        Args:
          latents: The batch.
          repeats: How many latents in front repeat the first one, for the sake of tokens that span
            several; they are shown if it is.
        """
        shown = torch.tensor(self.latents, device=latents.device)
        numbers = torch.arange(latents.shape[1], device=latents.device)
        return (numbers < (shown + repeats * (shown > 0))[:, None])[:, :, None, None, None]

    def held(self, latents: Float[Tensor, "b f c h w"]) -> Float[Tensor, "b f c h w"]:
        """A batch's latents with those in them that are shown in place."""
        if "latents" not in self.image:
            return latents
        image, true = self.image["latents"], latents.clone()
        true[:, : image.shape[1]] = image
        return torch.where(self.mask(latents), true, latents)

    def frames(self, stride: int) -> list[int]:
        """How many first frames each clip's shown latents cover.

        Args:
          stride: Frames that a latent covers; the first covers one alone.
        """
        return [frames_of(count, stride) for count in self.latents]


def frames_of(latents: int, stride: int) -> int:
    """How many first frames these first latents cover, each `stride` but for the first."""
    return 1 + (latents - 1) * stride if latents else 0


def latents_for(frames: int, stride: int) -> int:
    """The fewest first latents that cover so many first frames."""
    return 1 + -(-(frames - 1) // stride) if frames else 0


def possible(continuation: Continuation | None) -> list[int]:
    """The numbers of latents that a clip can be shown in training."""
    if continuation is None:
        return [0]
    assert continuation.latents is not None
    assert continuation.probability is not None and continuation.dropout is not None
    share = continuation.probability * (1 - continuation.dropout)
    shown = set(continuation.latents) if share > 0 else set()
    return sorted(shown | ({0} if share < 1 else set()))


def draw_latents_shown(continuation: Continuation, draw: torch.Generator) -> int:
    """Draw how many latents a sample is shown."""
    assert continuation.latents is not None
    assert continuation.probability is not None and continuation.dropout is not None
    shown, dropped, which = torch.rand(3, generator=draw).tolist()
    if shown >= continuation.probability or dropped < continuation.dropout:
        return 0
    return continuation.latents[int(which * len(continuation.latents))]


def check_alike(shown: Sequence[int], weights: str) -> None:
    """Raise UserError unless all clips of a batch are shown alike."""
    if len(set(shown)) > 1:
        raise UserError(
            f"A batch's clips are shown {', '.join(map(str, shown))} latents; {weights} cannot mix "
            "them. Show all of a batch alike."
        )
