"""The lab's clips continued from their first frames, measured against what the simulator has.

A prompt's caption is the name of a clip, such as roll-0-0007, and its text what happens in it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from videorepa.artifacts.scores import Better, Row
from videorepa.benchmarks import Benchmark, ClipForm
from videorepa.benchmarks.laws import checks as laws
from videorepa.benchmarks.laws.tracking import Observation, observe
from videorepa.data.manifest import Prompt
from videorepa.errors import ClipError, UserError
from videorepa.evaluation.pairs import Pairs, mean, share
from videorepa.settings.bounds import Clips
from videorepa.system.files import atomic_path
from videorepa.system.hub import user_cache
from videorepa.world.render import Clip, make_clip, visible
from videorepa.world.scenarios import HELD_OUT_SEED, SCENARIOS
from videorepa.world.simulator import FPS, FRAMES, SIZE, VERSION

ABSENT = 32.0
"""Pixels by which a body that is lost counts as off. No body is more off than that."""

ABSENT_SPEED = 8.0
"""The same of its velocity, in pixels per frame."""

IN_VIEW = 0.9
"""Share of a body that has to be in view in the true clip, for its frame to be compared."""

ERRORS: tuple[str, ...] = ("position_error", "velocity_error")

_NAME = re.compile(f"({'|'.join(SCENARIOS)})-(\\d+)-(\\d{{4,}})")


class TrueMotion(NamedTuple):
    """How bodies move.

    Attributes:
        place: Their centres in pixels; NaN where a body is lost.
        shown: Where a body is in view, so that it can be compared.
    """

    place: Float[np.ndarray, "f n 2"]
    shown: Bool[np.ndarray, "f n"]


class Continuations(Benchmark):
    """Errors of position (pixels) and velocity (pixels per frame), and the lab's law checks.

    The clips are of a series that no model is trained on. A body is found by its colour.

    Attributes:
        prompts_made: How many clips `generate` makes by the benchmark's name.
    """

    name: Literal["continuation"] = "continuation"
    version: ClassVar[str] = laws.with_tolerances("1")
    prompts_made: Clips = 96

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        """The scenarios' clips in turn, each with its first frame."""
        names = list(SCENARIOS)
        return [
            self._prompt(f"{names[number % len(names)]}-{seed}-{number:04d}")
            for number in range(count)
        ]

    def every_prompt(self) -> list[Prompt]:
        return self.prompts(self.prompts_made, 0)

    @staticmethod
    def _prompt(name: str) -> Prompt:
        image = user_cache() / f"lab-{VERSION}" / f"{name}.png"
        clip = true_clip(name)
        if not image.exists():
            image.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(image) as temporary:
                Image.fromarray(clip.frames[0]).save(temporary)
        return Prompt(name, clip.caption, name, image=image)

    def form(self, fps: float) -> ClipForm:
        if fps != FPS:
            raise UserError(
                f"The lab's clips have {FPS} frames a second, and these {fps:g}. Set "
                f"generation.fps to {FPS}."
            )
        return ClipForm(FRAMES, whole_image=True)

    def filmed(self, prompt: str, frames: int, height: int, width: int) -> np.ndarray | None:
        """The true clip; None in another form than the simulator's."""
        is_own = (frames, height, width) == (FRAMES, SIZE, SIZE)
        return true_clip(prompt).frames if is_own else None

    def about_prompt(self, prompt: str) -> dict[str, Any]:
        return super().about_prompt(prompt) | {"simulator": VERSION}

    def scenario(self, prompt: str) -> str | None:
        return _parsed(prompt)[0]

    @classmethod
    def ranked_by(cls) -> dict[str, Better]:
        verdicts: dict[str, Better] = dict.fromkeys(laws.FLAGS, "higher")
        off: dict[str, Better] = dict.fromkeys(ERRORS, "lower")
        return verdicts | off

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        """Compare one clip with what is true.

        Args:
            frames: (17, 64, 64, 3) uint8.

        Returns:
            position_error and velocity_error, means over the bodies and the frames after the first
            in which the true body is in view; the same of a copy of the first frame (static_...);
            lost, the percentage of these in which the body is not seen, whose errors are those of
            an absent body; compared, their number; position_errors and so on, means over bodies by
            frame, None where nothing can be compared; and what the benchmark lab says.

        Raises:
            ClipError: The clip has another length.
        """
        if len(frames) != FRAMES:
            raise ClipError(f"it has {len(frames)} frames; expected {FRAMES}")
        clip = true_clip(prompt)
        truth = motion_of(clip)
        seen = seen_motion(observe(frames), [body.colour for body in clip.scene.bodies])
        still = truth.place[:1].repeat(FRAMES, 0)
        still[:, ~truth.shown[0]] = np.nan
        row: dict[str, Any] = {}
        for of, place in (("", seen), ("static_", still)):
            position, velocity = errors(place, truth)
            for name, error in zip(ERRORS, (position, velocity), strict=True):
                after = error[1:]
                row[of + name] = float(np.nanmean(after)) if np.isfinite(after).any() else None
                row[f"{of}{name}s"] = _by_frame(error)
        after = truth.shown[1:]
        lost = np.isnan(seen[1:, :, 0])[after]
        row |= {"lost": 100 * float(lost.mean()) if len(lost) else None, "compared": len(lost)}
        nothing = [key for key in (*means(), "lost") if row[key] is None]
        if nothing:
            row["invalid"] = dict.fromkeys(nothing, "no body is in view long enough")
        return row | laws.score(frames, clip.caption).row()

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """Mean errors, those of a copy of the first frame, and the law checks' flags."""
        metrics = {key: mean(rows, key) | {"headline": True} for key in means()}
        metrics["lost"] = mean(rows, "lost")
        return metrics | {flag: share(rows, flag) for flag in laws.FLAGS}

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        return Pairs.of(rows_a, rows_b).compare(laws.FLAGS, (*ERRORS, "lost"))


def means() -> list[str]:
    """The columns of mean errors, of the clip and of a copy of its first frame."""
    return [f"{of}{name}" for of in ("", "static_") for name in ERRORS]


@lru_cache(256)
def true_clip(name: str) -> Clip:
    """The clip of a name. Raises UserError if it is not one of the benchmark's."""
    scenario, seed, index = _parsed(name)
    return make_clip(HELD_OUT_SEED + 1 + seed, index, scenario)


def _parsed(name: str) -> tuple[str, int, int]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"{name[:80]!r} names no clip of the benchmark continuation, such as "
            f"{next(iter(SCENARIOS))}-0-0000. Take prompts from the benchmark."
        )
    return match[1], int(match[2]), int(match[3])


def motion_of(clip: Clip) -> TrueMotion:
    """Where the bodies of a clip are, and in which frames they are in view."""
    bodies = clip.scene.bodies
    shares = visible(clip.scene, clip.trajectory)[..., : len(bodies)].sum((1, 2))
    areas = np.array([body.area for body in bodies])
    return TrueMotion(clip.trajectory.positions.astype(float), shares >= IN_VIEW * areas)


def seen_motion(seen: Observation, colours: list[str]) -> Float[np.ndarray, "f n 2"]:
    """The tracked places of bodies of these colours; NaN where a colour is not seen."""
    return np.stack([seen.tracks[colour].position for colour in colours], 1)


def errors(
    place: Float[np.ndarray, "f n 2"], truth: TrueMotion
) -> tuple[Float[np.ndarray, "f n"], Float[np.ndarray, "f n"]]:
    """How far bodies are from where they should be, and their steps from what they should be.

    A body that is lost is as far off as can be, so that to vanish never pays. A step needs two
    frames; the first frame has none.

    Returns:
        Pixels, and pixels per frame; NaN where the true body is not in view.
    """
    position = _capped(place - truth.place, ABSENT)
    position[~truth.shown] = np.nan
    velocity = np.full_like(position, np.nan)
    velocity[1:] = _capped(np.diff(place, axis=0) - np.diff(truth.place, axis=0), ABSENT_SPEED)
    velocity[1:][~(truth.shown[1:] & truth.shown[:-1])] = np.nan
    return position, velocity


def _capped(off: Float[np.ndarray, "f n 2"], most: float) -> Float[np.ndarray, "f n"]:
    return np.minimum(np.nan_to_num(np.linalg.norm(off, axis=-1), nan=most), most)


def _by_frame(error: Float[np.ndarray, "f n"]) -> list[float | None]:
    """Means over bodies, to 4 digits."""
    return [
        round(float(frame[known].mean()), 4) if (known := np.isfinite(frame)).any() else None
        for frame in error
    ]
