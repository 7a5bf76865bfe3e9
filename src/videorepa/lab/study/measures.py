"""What a study asks its models without sampling from them: losses on clips that none has seen.

Both questions cost a few passes of the transformer, and tell arms apart that clips cannot: how well
a model denoises, and which of two clips it finds likelier, the real one or one with a law broken.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, field_validator

from videorepa.artifacts.finished import read_finished, write_finished
from videorepa.artifacts.model import Model
from videorepa.artifacts.scores import Row
from videorepa.backbones import Backbone, Text, timestep_of_noise
from videorepa.conditioning import Opening
from videorepa.data.source import LabSource
from videorepa.data.video import READER, to_video
from videorepa.errors import UserError
from videorepa.evaluation.likelihood import (
    Denoising,
    EncodedPairs,
    encode,
    encode_pairs,
    real_opening,
    rows_of,
)
from videorepa.evaluation.paired_clips import Pair, begin_apart, groups, read_group, read_pairs
from videorepa.lab.calibration.corruptions import CORRUPTIONS
from videorepa.lab.datasets import BREAKS, PairsRecipe, draw_pairs
from videorepa.recipe import Recipe
from videorepa.settings.bounds import Clips, Seed
from videorepa.settings.section import Section
from videorepa.settings.sections import LabClips
from videorepa.system.device import autocast
from videorepa.system.progress import track
from videorepa.system.randomness import generator
from videorepa.world.simulator import VERSION

LEVELS = (0.05, 0.2, 0.4, 0.6, 0.75, 0.87, 0.95, 0.99)

LOSS, LIKELIER, LOG_RATIO = "loss", "likelier", "log ratio"

CPU = torch.device("cpu")

_Group = tuple[list[Pair], list[np.ndarray]]

ALL = "all"
"""Names the mean over noise levels, or over laws."""


class Measures(Section):
    """What is asked of every model.

    Attributes:
        clips: Number of clips to denoise. No arm may train on their series.
        seed: Their series.
        pairs: Number of pairs for each law and degree, as `videorepa lab pairs` draws them; 0 asks
            no pairs.
        pairs_seed: Chooses among their series, which no arm trains on.
        laws: The laws that are broken.
        levels: Noise levels at which the clips are denoised: the noise's share of the noisy
            latents' variance. Pairs are compared at those of `videorepa likelihood`.
    """

    clips: Clips = 120
    seed: Seed = 901
    pairs: Annotated[int, Field(ge=0, le=10_000)] = 8
    pairs_seed: Seed = 0
    laws: tuple[str, ...] = Field(tuple(CORRUPTIONS), min_length=1)
    levels: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(LEVELS, min_length=1)

    @field_validator("levels")
    @classmethod
    def _rise(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        if list(levels) != sorted(set(levels)):
            raise ValueError(f"noise levels rise and do not repeat; got {levels}")
        return levels


class Meter:
    """Asks models, one after another, about the same clips under the same noise.

    Clips are encoded once. The models compute in the precision of their training. One that has no
    text mode is shown each clip's first frame, which no loss counts.

    Args:
        recipe: The recipe that all arms share.
        measures: What to ask.
        out: The study's folder; it gets the pairs.

    Raises:
        UserError: The recipe trains on the clips that it would be measured on.
    """

    def __init__(self, recipe: Recipe, measures: Measures, out: Path) -> None:
        self.recipe, self.measures, self.out = recipe, measures, out
        if recipe.data.lab is not None and recipe.data.lab.seed == measures.seed:
            raise UserError(
                f"The arms train on the series {measures.seed}, which `measures.seed` keeps for "
                "measuring. Choose another one."
            )

    def measure(self, model: Model, path: Path) -> list[Row]:
        """A model's rows, kept in the file `path`.

        Returns:
            A row for each measure and part: the measure, the noise level or law ("all" for the mean
            of all), the value, and the number of clips or pairs. "loss" is the model's own
            denoising loss on the clips. "likelier" is the percentage of pairs in which the real
            clip has the smaller loss, and "log ratio" the mean of ln(loss of the broken clip / loss
            of the real one).

        Raises:
            UserError: The file is damaged or about another model, or a loss is not finite.
        """
        made_with = {"model": model.digest, "precision": str(model.dtype(CPU))}
        made_with |= self.measures.model_dump(mode="json")
        data = self.recipe.data
        made_with |= {"clip": [data.frames, data.height, data.width], "simulator": VERSION}
        made_with |= {"breaks": BREAKS, "reader": READER}
        rows = read_finished(path, made_with, list[Row])
        if rows is None:
            rows = self._ask(model, path.stem)
            write_finished(path, made_with, rows)
        return rows

    def _ask(self, model: Model, name: str) -> list[Row]:
        backbone = model.load(CPU, torch.float32, ("transformer",))
        with torch.no_grad(), autocast(CPU, model.dtype(CPU)):
            losses = self._losses(backbone, name)
            pairs, failures = self._compared(backbone, name)
        if not all(np.isfinite(of).all() for of in losses.values()):
            raise UserError(f"A loss of {name} on the clips held out is not a finite number.")
        found = [_row(LOSS, f"{level:g}", of) for level, of in losses.items()]
        found.append(_row(LOSS, ALL, np.mean([*losses.values()], 0)))
        if failures:
            raise UserError(f"A pair cannot be compared by {name}: {failures}.")
        for law in (*dict.fromkeys(pair.law for pair, _ in pairs), *([ALL] if pairs else ())):
            rows = [row for pair, row in pairs if law in (ALL, pair.law)]
            # A tie is half a preference: the model has none.
            likelier = [100.0 * (0.5 if r["likelier"] is None else r["likelier"]) for r in rows]
            found.append(_row(LIKELIER, law, likelier))
            found.append(_row(LOG_RATIO, law, [row["log_ratio"] for row in rows]))
        return found

    def _losses(self, backbone: Backbone, name: str) -> dict[float, np.ndarray]:
        """Each clip's denoising loss by noise level, each clip under noise of its own."""
        latents, text, openings = self._clips
        batch = self.recipe.data.prepare_batch
        losses = {}
        for level in track(self.measures.levels, f"denoise, {name}"):
            timestep = timestep_of_noise(backbone, level, latents[0])
            draw = generator(self.measures.seed, "held-out noise", f"{level:g}")
            noise = torch.randn(latents.shape, generator=draw)
            parts = (slice(first, first + batch) for first in range(0, len(latents), batch))
            losses[level] = np.concatenate(
                [
                    backbone.denoising_loss(
                        latents[part],
                        {key: value[part] for key, value in text.items()},
                        noise[part],
                        timestep.expand(len(latents[part])),
                        Opening.batch(openings[part]) if openings else None,
                        of_unseen=True,
                    ).loss.numpy()
                    for part in parts
                ]
            )
        return losses

    def _compared(
        self, backbone: Backbone, name: str
    ) -> tuple[list[tuple[Pair, Row]], dict[str, str]]:
        ask = Denoising(backbone, batch=self.recipe.data.prepare_batch)
        pairs: list[tuple[Pair, Row]] = []
        failures: dict[str, str] = {}
        for of in track(self._pairs, f"compare, {name}"):
            pairs += rows_of(ask, of.latents, of.text, of.pairs, failures, of.opening)
        return pairs, failures

    @cached_property
    def _coder(self) -> Any:
        parts = ("vae", "text_encoder", "image_encoder")
        return self.recipe.backbone.load(parts, CPU, torch.float32)

    @cached_property
    def _clips(self) -> tuple[torch.Tensor, Text, list[Opening]]:
        """Latents, captions and openings; no openings for a model with a text mode."""
        lab = LabClips(clips=self.measures.clips, seed=self.measures.seed)
        source = LabSource(self.recipe.data.model_copy(update={"lab": lab}))
        frames = [source.sample(number).frames for number in range(len(source.items))]
        latents = encode(self._coder, frames, self.recipe.data.prepare_batch)
        first = to_video(np.stack([of[:1] for of in frames]))
        text = self._coder.encode_captions([clip.caption for clip in source.items], first)
        openings = [real_opening(self._coder, of) for of in frames]
        return latents, text, [opening for opening in openings if opening is not None]

    @cached_property
    def _pairs(self) -> list[EncodedPairs]:
        if not self.measures.pairs:
            return []
        asked, folder = self.measures, self.out / "pairs"
        draw_pairs(
            PairsRecipe(out=folder, pairs=asked.pairs, laws=asked.laws, seed=asked.pairs_seed)
        )
        failures: dict[str, str] = {}
        listed = groups(read_pairs(folder / "pairs.csv").pairs)
        read = [read_group(pairs, self.recipe.data, failures) for pairs in listed]
        if failures:
            raise UserError(f"A pair in {folder} cannot be read: {failures}.")
        if self.recipe.backbone.takes_image:
            read = _beginning_alike(read)
        return encode_pairs(self._coder, read, self.recipe.data.prepare_batch)


def _beginning_alike(read: list[_Group]) -> list[_Group]:
    """The pairs that a model which is shown the real clip's first frame can be asked about."""
    alike: list[_Group] = []
    for pairs, (real, *broken) in read:
        kept = [
            (pair, frames)
            for pair, frames in zip(pairs, broken, strict=True)
            if not begin_apart(real[0], frames[0])
        ]
        if kept:
            alike.append(([pair for pair, _ in kept], [real, *(frames for _, frames in kept)]))
    all_pairs, left = (sum(len(pairs) for pairs, _ in groups) for groups in (read, alike))
    print(
        f"{all_pairs - left} of {all_pairs} pairs are left out: their broken clip begins with "
        "another frame than the real one, whose first frame the model is shown."
    )
    return alike


def _row(measure: str, part: str, values: Any) -> Row:
    return {"measure": measure, "part": part, "value": float(np.mean(values)), "n": len(values)}
