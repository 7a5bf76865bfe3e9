"""Draws datasets from a recipe: clips for contact prediction and clips of PhyWorld's tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

from pydantic import Field

from videorepa.benchmarks._phyworld import FPS as PHYWORLD_FPS
from videorepa.benchmarks._phyworld import Group, drawn, names, render
from videorepa.data.video import write_video
from videorepa.probing.physion import LABELS
from videorepa.settings.bounds import Clips, Seed, Side
from videorepa.settings.section import Section
from videorepa.system import progress
from videorepa.system.files import atomic_write, csv_text
from videorepa.world.contact import contact_clip
from videorepa.world.simulator import FPS


class ContactRecipe(Section):
    """Clips for contact prediction, as `videorepa probe` reads them.

    Attributes:
        out: The folder for `train` and `test`.
        train: Number of training clips, half of them with contact.
        test: Number of test clips, half of them with contact.
        seed: Seed of the training clips. The test clips have the next one.
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
        groups: The groups to draw. Training clips are only of "in".
        size: Side of the square frames in pixels.
    """

    out: Path
    clips: Clips
    groups: tuple[Group, ...] = Field(get_args(Group), min_length=1)
    size: Side = Field(default=256, multiple_of=2)
    seed: Seed = 0


def draw_clips(recipe: PhyWorldRecipe) -> dict[str, float]:
    """Write the clips, except those that exist already, and count them."""
    wanted = names(recipe.clips, recipe.seed, recipe.groups)
    recipe.out.mkdir(parents=True, exist_ok=True)
    for name in progress.track(wanted, "draw"):
        path = recipe.out / f"{name}.mp4"
        if not path.exists():
            write_video(path, render(drawn(name), recipe.size), PHYWORLD_FPS)
    rows = ({"video": f"{name}.mp4", "caption": name, "id": name} for name in wanted)
    atomic_write(recipe.out / "clips.csv", csv_text(("video", "caption", "id"), rows))
    return {"clips": len(wanted)}
