"""Draws data sets of the lab's clips from a recipe: contact to ask about, and PhyWorld's tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

from pydantic import Field

from videorepa.benchmarks._phyworld import FPS as PHYWORLD_FPS
from videorepa.benchmarks._phyworld import Group, drawn, names, render
from videorepa.data.video import write_video
from videorepa.probing.physion import LABELS
from videorepa.settings.section import Section
from videorepa.system import progress
from videorepa.system.files import atomic_write, csv_text
from videorepa.world.contact import contact_clip
from videorepa.world.simulator import FPS


class ContactRecipe(Section):
    """Clips to ask about, as `videorepa probe` reads them.

    out: folder for `train` and `test`. train, test: how many clips of either, half of them with
    contact. seed: of the training clips; the test's is the next.
    """

    out: Path
    train: int = Field(ge=2, multiple_of=2)
    test: int = Field(ge=2, multiple_of=2)
    seed: int = 0


def draw_contact(recipe: ContactRecipe) -> dict[str, float]:
    """Write the clips as videos, with labels as Physion v1.5 has them. Gives their numbers."""
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
    """Clips to be drawn, for training or as what a model is to continue.

    out: folder for the videos, with clips.csv, whose captions are their names. groups: those to
    draw; for training "in" alone. size: of the square frames, even.
    """

    out: Path
    clips: int = Field(ge=1)
    groups: tuple[Group, ...] = Field(get_args(Group), min_length=1)
    size: int = Field(default=256, ge=2, multiple_of=2)
    seed: int = 0


def draw_clips(recipe: PhyWorldRecipe) -> dict[str, float]:
    """Write them; what is there already is kept. Gives their number."""
    wanted = names(recipe.clips, recipe.seed, recipe.groups)
    recipe.out.mkdir(parents=True, exist_ok=True)
    for name in progress.track(wanted, "draw"):
        path = recipe.out / f"{name}.mp4"
        if not path.exists():
            write_video(path, render(drawn(name), recipe.size), PHYWORLD_FPS)
    rows = ({"video": f"{name}.mp4", "caption": name, "id": name} for name in wanted)
    atomic_write(recipe.out / "clips.csv", csv_text(("video", "caption", "id"), rows))
    return {"clips": len(wanted)}
