"""Draws datasets from a recipe: clips for contact prediction, of PhyWorld's tasks, and pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
from pydantic import Field, field_validator, model_validator

from videorepa.benchmarks._phyworld import FPS as PHYWORLD_FPS
from videorepa.benchmarks._phyworld import Group, Split, drawn, names, render
from videorepa.data.video import write_video
from videorepa.errors import UserError
from videorepa.lab.calibration.corruptions import CORRUPTIONS, Corruption
from videorepa.probing.physion import LABELS
from videorepa.settings.bounds import Clips, Seed, Side
from videorepa.settings.section import Section
from videorepa.system import progress
from videorepa.system.files import atomic_write, csv_text, is_vacant, parse_json, read_text
from videorepa.world.contact import contact_clip
from videorepa.world.render import Clip, make_clip
from videorepa.world.scenarios import HELD_OUT_SEED
from videorepa.world.simulator import FPS, VERSION

BREAKS = 2
"""Raised whenever clips would be broken in other ways or places."""

DRAWN = "drawn.json"
"""What the clips of a folder were drawn with."""


class ContactRecipe(Section):
    """Clips for contact prediction, as `videorepa probe` reads them.

    Attributes:
        out: The folder for `train` and `test`.
        train: Number of training clips, half of them with contact.
        test: Number of test clips, half of them with contact.
        seed: Seed of the training clips. The test clips have the next one, so sets that have
            no clip in common need seeds that are two apart.
    """

    out: Path
    train: Clips = Field(multiple_of=2)
    test: Clips = Field(multiple_of=2)
    seed: Seed = 0


def draw_contact(recipe: ContactRecipe) -> dict[str, float]:
    """Write the clips as videos, with labels in the layout of Physion v1.5, and count them."""
    for split, count, seed in (
        ("train", recipe.train, recipe.seed),
        ("test", recipe.test, recipe.seed + 1),
    ):
        folder = recipe.out / split
        folder.mkdir(parents=True, exist_ok=True)
        labels = {}
        for index in progress.track(range(count), split):
            clip, touches = contact_clip(seed, index)
            name = f"{clip.scene.event}-{seed}-{index:05d}"
            labels[name] = {"label": touches}
            write_video(folder / f"{name}.mp4", clip.frames, FPS)
        atomic_write(folder / LABELS, json.dumps(labels))
    return {"train": recipe.train, "test": recipe.test}


class PhyWorldRecipe(Section):
    """Clips of PhyWorld's tasks, to train a model on or to have it continue.

    Attributes:
        out: The folder for the videos and for clips.csv, whose captions are the videos' names.
        clips: Number of clips.
        split: "train" for clips to train on, of which the benchmark has none.
        groups: The groups to draw. Training clips are only of "in".
        size: Side of the square frames in pixels.
    """

    out: Path
    clips: Clips
    split: Split = "test"
    groups: tuple[Group, ...] = Field(get_args(Group), min_length=1)
    size: Side = Field(default=256, multiple_of=2)
    seed: Seed = 0

    @model_validator(mode="after")
    def _trains_within(self) -> Self:
        if self.split == "train" and set(self.groups) != {"in"}:
            raise ValueError("clips to train on are of one group: set groups: [in]")
        return self


def draw_clips(recipe: PhyWorldRecipe) -> dict[str, float]:
    """Write the clips, except those that exist already, and count them."""
    wanted = names(recipe.split, recipe.clips, recipe.seed, recipe.groups)
    _claim(recipe.out, {"task": "phyworld", "split": recipe.split, "size": recipe.size})
    for name in progress.track(wanted, "draw"):
        path = recipe.out / f"{name}.mp4"
        if not path.exists():
            write_video(path, render(drawn(name), recipe.size), PHYWORLD_FPS)
    rows = ({"video": f"{name}.mp4", "caption": name, "id": name} for name in wanted)
    atomic_write(recipe.out / "clips.csv", csv_text(("video", "caption", "id"), rows))
    return {"clips": len(wanted)}


class PairsRecipe(Section):
    """Pairs of a clip and the same clip with one law broken, for `videorepa likelihood`.

    Attributes:
        out: The folder for the videos and for pairs.csv.
        pairs: Number of pairs for each law and degree.
        laws: The ways to break a clip; each is applied by all its degrees.
        seed: Chooses among series of clips that no model was trained on.
    """

    out: Path
    pairs: Clips
    laws: tuple[str, ...] = Field(tuple(CORRUPTIONS), min_length=1)
    seed: Seed = 0

    @field_validator("laws")
    @classmethod
    def _known(cls, laws: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [law for law in laws if law not in CORRUPTIONS]:
            raise ValueError(f"no law is called {', '.join(unknown)}: {', '.join(CORRUPTIONS)}")
        return laws


def draw_pairs(recipe: PairsRecipe) -> dict[str, float]:
    """Write the clips, except those that exist already, and count the pairs.

    The degrees of a law break the same clips in the same places, so that a curve is about the same
    clips. Clips that a law cannot break at every degree are passed over.
    """
    series = HELD_OUT_SEED + 1 + recipe.seed
    _claim(recipe.out, {"task": "pairs", "series": series, "simulator": VERSION, "breaks": BREAKS})
    rows = []
    for law in progress.track(recipe.laws, "draw"):
        corruption, found, index = CORRUPTIONS[law], 0, -1
        while found < recipe.pairs:
            index += 1
            clip = make_clip(series, index)
            broken = _by_degree(clip, corruption, series, index)
            if broken is None:
                continue
            found += 1
            real = f"real/{index:05d}.mp4"
            _write_once(recipe.out / real, clip.frames)
            for degree, frames in broken.items():
                name = f"{law}-{degree:g}/{index:05d}.mp4"
                _write_once(recipe.out / name, frames)
                rows.append(
                    {
                        "id": f"{law}-{degree:g}-{index:05d}",
                        "real": real,
                        "broken": name,
                        "caption": clip.caption,
                        "law": law,
                        "degree": degree,
                    }
                )
    atomic_write(recipe.out / "pairs.csv", csv_text(tuple(rows[0]), rows))
    return {"pairs": len(rows)}


def _by_degree(
    clip: Clip, corruption: Corruption, series: int, index: int
) -> dict[float, np.ndarray] | None:
    """The broken clip by degree; None if a degree does not apply or changes nothing."""
    broken = {}
    for degree in corruption.strengths:
        frames = corruption.broken(clip, series, index, degree)
        if frames is None or np.array_equal(frames, clip.frames):
            return None
        broken[degree] = frames
    return broken


def _claim(out: Path, drawn_with: dict[str, Any]) -> None:
    """Make `out` a folder of clips that are drawn with this, where what is there can be kept.

    Raises:
        UserError: It holds something else, or a damaged record.
    """
    path = out / DRAWN
    if is_vacant(out):
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(drawn_with))
    try:
        before = parse_json(read_text(path))
    except (OSError, ValueError):
        before = None
    if before != drawn_with:
        what = "no readable record of its clips" if before is None else f"clips drawn with {before}"
        raise UserError(
            f"{out} holds {what}; expected {drawn_with}. Choose another `out`, or delete it."
        )


def _write_once(path: Path, frames: np.ndarray) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without loss, so that no pair differs in how well its frames could be compressed.
        write_video(path, frames, FPS, crf=0)
