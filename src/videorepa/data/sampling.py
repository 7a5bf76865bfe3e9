"""How clips were sampled from their videos, and what a user should know of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from videorepa.settings.bounds import is_same_rate
from videorepa.system.wording import count

NAMED = 4
"""Most rates that a note lists."""


@dataclass(frozen=True)
class Sampling:
    """How a clip was sampled from its video.

    Attributes:
      distinct: How many of the video's frames the clip has; the rest of the clip repeats them.
      stride: It has every stride-th frame of the video; None if it was sampled at a fixed rate.
      fps: Frames per second that it shows; None for a still, and where the video does not tell.
    """

    distinct: int
    stride: int | None
    fps: float | None

    @property
    def rate(self) -> str:
        """The rate and the stride in words."""
        if self.fps is None:
            return "without a rate"
        every = {None: "", 1: ", every frame"}.get(self.stride, f", 1 frame in {self.stride}")
        return f"at {self.fps:.4g} fps{every}"


def sampling_notes(
    samplings: Mapping[str, Sampling], frames: int, told: float | None = None
) -> list[str]:
    """Say at which rates clips show their videos, and how many do not fill their frames.

    Args:
      samplings: How each clip was sampled, by its id.
      frames: Frames of a clip.
      told: Frames per second that the model takes clips to show, if it is told.
    """
    notes = []
    rates = Counter(sampling.rate for sampling in samplings.values()).most_common()
    if rates:
        listed = "; ".join(f"{count(clips, 'clip')} {rate}" for rate, clips in rates[:NAMED])
        more = f"; and {len(rates) - NAMED} other rates" if len(rates) > NAMED else ""
        is_spread = len(rates) > 1 and any(sampling.stride for sampling in samplings.values())
        advice = " With data.fps all show the same." if is_spread else ""
        notes.append(f"Rates: {listed}{more}.{advice}")
    short = {name: s.distinct for name, s in samplings.items() if s.distinct < frames}
    if short:
        name, distinct = next(iter(short.items()))
        notes.append(
            f"{len(short)} of {count(len(samplings), 'clip')} have fewer than {frames} frames to "
            f"show and were filled up by repeating. The first is {name!r}, with {distinct}."
        )
    rated = {name: sampling.fps for name, sampling in samplings.items() if sampling.fps}
    other = {name: fps for name, fps in rated.items() if told and not is_same_rate(fps, told)}
    if other:
        name, fps = next(iter(other.items()))
        notes.append(
            f"{len(other)} of {count(len(samplings), 'clip')} do not show the {told:g} frames per "
            f"second that backbone.frame_rate tells the model. The first is {name!r}, with "
            f"{fps:.4g}. Set data.fps to {told:g}, or backbone.frame_rate to what they show."
        )
    return notes
