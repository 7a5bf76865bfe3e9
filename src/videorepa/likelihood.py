"""Asks models which of two clips they find likelier, the real one or one that breaks a law."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from videorepa.artifacts.clips import clip_digest
from videorepa.artifacts.finished import claim_folder
from videorepa.artifacts.model import Model
from videorepa.artifacts.scores import Row, Scores, Summary, earlier_rows, row_line, write_rows
from videorepa.backbones import Backbone, Text, moved
from videorepa.data.video import READER, to_video
from videorepa.errors import ClipError, UserError, within_memory
from videorepa.evaluation.likelihood import (
    FOLDER,
    NEGATIVE_PROMPT,
    NOISE_LEVELS,
    AsPublished,
    Denoising,
    aggregate,
    compare,
    encode,
    real_opening,
    rows_of,
)
from videorepa.evaluation.paired_clips import (
    Pair,
    PairList,
    groups,
    left_out_note,
    read_clip,
    read_group,
    read_pairs,
)
from videorepa.evaluation.pairs import by_scenario, compared
from videorepa.probing.sources import BASE, UNTRAINED
from videorepa.recipe import Recipe
from videorepa.remedies import in_encoding
from videorepa.settings.sections import ClipSize
from videorepa.system.device import pick_device
from videorepa.system.progress import console, track
from videorepa.system.wording import count

BENCHMARK, VERSION = "likelihood", "1"
"""The version changes whenever the same pair and model could get other losses."""

AS_PUBLISHED = "likelihood-as-published"
"""The name of what LikePhys's released code seems to compute, which is another quantity."""

ABOUT = (
    "“likelier” is the share of pairs in which the model's denoising loss is smaller for the real "
    "clip than for the one that breaks a law, with the same noise and caption. A tie is no "
    "preference and counts as invalid. “smaller” is the share in which the real clip's latents "
    "have the smaller mean square. An untrained model goes by that, so read a share against the "
    "untrained copy's on the same pairs, not against 50 %. “log ratio” is the mean of "
    "ln(loss of the broken clip / loss of the real one). “ppe”, on LikePhys's clips, is its "
    "Plausibility Preference Error: the share in which the real clip has the larger error of the "
    "noise, over each variation's subgroups and then over variations; lower is better."
)

ABOUT_SHOWN = (
    "The model continues an image: it is shown the real clip's first frame for both clips, and the "
    "losses are of the rest. Pairs whose broken clip begins with another frame are left out, among "
    "the failures; so shares are not those of a text-to-video model on all pairs. "
)

ABOUT_PUBLISHED = (
    "These are not denoising losses, but what LikePhys's released code seems to compute, from "
    "reading it: inputs scaled by the noisiest step at all steps, the clean clip in the place of "
    "the noisy one, another schedule. They cannot be compared with likelihoods. "
)


def likelihood(
    recipe: Recipe,
    pairs: Path,
    out: Path,
    *,
    models: Mapping[str, Path] | None = None,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    against: str = BASE,
    straw_man: bool = True,
    as_published: bool = False,
    device: str | None = None,
) -> dict[str, Scores]:
    """Compare the denoising losses of clips that differ in one broken law.

    Each model sees both clips of a pair with the same noise, timesteps and caption, without
    guidance, in its own schedule and prediction type. Every model sees the same noise, so models
    are compared pair by pair. A model that has no text mode is shown the real clip's first frame
    for both, and its losses are of what it is not shown; a pair whose clips begin otherwise cannot
    be scored then. The folder `likelihood` in `out` gets a score folder for each model;
    rows that are there, of the same clips and the same model, are kept.

    Args:
        recipe: Its untouched base model comes first, and sets size, precision and seed.
        pairs: A .csv file with the columns real, broken and caption, and perhaps id, law and
            degree; or a folder in LikePhys's layout.
        out: Folder of the scores.
        models: Further models by name: runs, recipes or diffusers folders.
        noise_levels: The noise's share of the noisy latents' variance, above 0 and up to 1; the
            nearest timestep is taken.
        against: The source that the others are compared with.
        straw_man: Whether to ask an untrained copy of the base model too.
        as_published: Compute what LikePhys's released code seems to, guided, at ten steps of its
            own in place of `noise_levels`; only for models with v-prediction.
        device: Where to compute; by default the first GPU, or the CPU.

    Returns:
        The scores by the model's name.

    Raises:
        UserError: `out` holds something else, a number is out of range, a model cannot be opened,
            or no pair can be scored.
    """
    levels = sorted(set(noise_levels))
    if not levels or not all(0 < level <= 1 for level in levels):
        raise UserError(f"Noise levels are shares above 0 and up to 1, one or more; got {levels}.")
    sources = _sources(recipe, models or {}, straw_man)
    if as_published:
        for model in sources.values():
            model.spec.check_text_mode("LikePhys's code")
    if against not in sources:
        raise UserError(f"There is no source {against!r} to compare with: {', '.join(sources)}.")
    found = read_pairs(pairs)
    if note := left_out_note(found):
        console.print(note)
    claim_folder(out, FOLDER, "likelihood")
    where = pick_device(device)
    results: dict[str, Scores] = {}
    for name, model in sources.items():
        asked = _Asked(
            name, model, recipe, found, out / FOLDER / _folder(name), levels, as_published
        )
        with within_memory(in_encoding(recipe)):
            results[name] = asked.scores(where)
    theirs = results[against]
    labels = theirs.summary.model_dump()["noise_levels"]
    differ = partial(compare, labels=labels, published=found.published)
    for name, scores in results.items():
        if name != against:
            comparison = compared(differ, against, [*theirs.rows], [*scores.rows])
            results[name] = scores.with_comparison(comparison, theirs.folder, theirs.digest)
        results[name].write()
    return results


def _sources(recipe: Recipe, models: Mapping[str, Path], straw_man: bool) -> dict[str, Model]:
    precision = recipe.train.precision
    base = Model(recipe.name, recipe.backbone, recipe.data, recipe.generation, precision)
    sources = {BASE: base}
    for name, path in models.items():
        if name in (BASE, UNTRAINED):
            raise UserError(f"A model cannot be called {name}, which is a source of its own.")
        model = Model.of(path)
        model.spec.check_clip(recipe.data)
        sources[name] = replace(model, precision=precision)
    folders = {name: _folder(name) for name in sources}
    if len(set(folders.values())) < len(folders):
        raise UserError(f"Two models would have one folder: {folders}. Rename a folder of theirs.")
    return sources | ({UNTRAINED: base} if straw_man else {})


def _folder(name: str) -> str:
    """The name of a model's folder: a model may be named by its whole path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-") or "model"


@dataclass(frozen=True)
class _Asked:
    """One model, and the pairs that it is asked about."""

    name: str
    model: Model
    recipe: Recipe
    found: PairList
    folder: Path
    levels: Sequence[float]
    as_published: bool

    @property
    def benchmark(self) -> str:
        return AS_PUBLISHED if self.as_published else BENCHMARK

    @property
    def labels(self) -> list[str]:
        """The names of the noise levels in rows and tables."""
        own = [f"{level:g}" for level in self.levels]
        return list(AsPublished.labels) if self.as_published else own

    def scores(self, where: torch.device) -> Scores:
        """Score all pairs that are not scored yet. Raises UserError if none can be."""
        failures = dict(self.found.failures)
        rows = {row["prompt_id"]: row for row in self._rows(where, failures)}
        # In the order of the list, whichever were scored first.
        ordered = [rows[pair.id] for pair in self.found.pairs if pair.id in rows]
        if not ordered:
            first, reason = next(iter(failures.items()))
            raise UserError(f"None of the pairs can be scored; the first, {first!r}: {reason}.")
        metrics = partial(aggregate, labels=self.labels, published=self.found.published)
        summary = Summary.model_validate(
            {
                "benchmark": self.benchmark,
                "version": VERSION,
                "about": (ABOUT_PUBLISHED if self.as_published else "")
                + (ABOUT_SHOWN if self.model.spec.takes_image else "")
                + ABOUT,
                "noise_levels": self.labels,
                "n": len(ordered),
                "metrics": metrics(ordered),
                "by_scenario": {name: metrics(of) for name, of in by_scenario(ordered).items()},
                "failures": [
                    {"prompt_id": name, "k": 0, "reason": reason}
                    for name, reason in failures.items()
                ],
                "left_out": self.found.left_out,
            }
        )
        return Scores(self.folder, summary, ordered)

    def _rows(self, where: torch.device, failures: dict[str, str]) -> Iterator[Row]:
        """The rows that are kept, then those of the other pairs, each written when it is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        made_with = self._made_with(where)
        begun = {pair.id: _about(pair) | made_with for pair in self.found.pairs}
        earlier = {row["prompt_id"]: row for row in earlier_rows(self.folder)}
        kept = {
            name: row for name, row in earlier.items() if name in begun and row | begun[name] == row
        }
        if others := len(earlier) - len(kept):
            console.print(
                f"{self.name}: {count(others, 'row')} of before dropped: the pair is no longer "
                "listed, or its clips, the model or the settings are others."
            )
        table = self.folder / "scores.jsonl"
        write_rows(table, kept.values())
        yield from kept.values()
        missing = groups([pair for pair in self.found.pairs if pair.id not in kept])
        if not missing:
            return
        ask = self._loaded(where, missing)
        with table.open("a", encoding="utf-8") as file:
            for pairs in track(missing, self.name):
                for pair, columns in ask(pairs, failures):
                    row = begun[pair.id] | columns
                    file.write(row_line(row))
                    yield row
                file.flush()

    @property
    def _guidance(self) -> float:
        return self.model.settings.guidance_scale

    def _made_with(self, where: torch.device) -> Row:
        """What the losses depend on beside the pair."""
        digest = self.model.digest
        size = self.recipe.data
        return {
            "benchmark": f"{self.benchmark} {VERSION}",
            "model_digest": f"untrained copy of {digest}" if self.name == UNTRAINED else digest,
            "size": [size.frames, size.height, size.width],
            "reader": READER,
            "noise_levels": self.labels,
            "seed": self.recipe.seed,
            "precision": str(self.model.dtype(where)),
        } | ({"guidance_scale": self._guidance} if self.as_published else {})

    def _loaded(self, where: torch.device, missing: Sequence[Sequence[Pair]]) -> _Ask:
        dtype = self.model.dtype(where)
        coder = self.model.spec.load(("text_encoder",), where, dtype)
        texts = _texts(coder, missing, self.recipe.data)
        negative = coder.encode_text([NEGATIVE_PROMPT]) if self.as_published else None
        del coder
        backbone = self.model.load(where, dtype, ("transformer", "vae", "image_encoder"))
        if self.name == UNTRAINED:
            # It predicts next to nothing, so it prefers the clip whose latents are smaller, and is
            # at 50 % only where real and broken clips do not differ in that.
            backbone.reinitialise(self.recipe.seed)
        batch = self.recipe.data.prepare_batch
        seed = self.recipe.seed
        denoising = (
            Denoising(backbone, self.levels, seed, batch)
            if negative is None
            else AsPublished(backbone, negative, self._guidance, seed, batch)
        )
        return _Ask(backbone, denoising, texts, self.recipe)


def _about(pair: Pair) -> Row:
    return {
        "prompt_id": pair.id,
        "k": 0,
        "scenario": pair.scenario,
        "law": pair.law,
        "degree": pair.degree,
        "caption": pair.caption,
        "asked": pair.group,
        "clips": [clip_digest(pair.real), clip_digest(pair.broken)],
    }


def _texts(coder: Backbone, missing: Iterable[Sequence[Pair]], size: ClipSize) -> dict[str, Text]:
    """The encoded captions by the names of the real clips, in main memory: one can take 100 MB."""
    cpu = torch.device("cpu")
    encoded: dict[str, Text] = {}
    texts: dict[str, Text] = {}
    for pair, *_ in missing:
        if not coder.spec.text_sees_image:
            if pair.caption not in encoded:
                encoded[pair.caption] = moved(coder.encode_text([pair.caption]), cpu)
            texts[pair.group] = encoded[pair.caption]
            continue
        with suppress(ClipError):  # It is reported when the pairs are read.
            frames, _ = read_clip(pair.real, size)
            text = coder.encode_captions([pair.caption], to_video(frames[:1])[None])
            texts[pair.group] = moved(text, cpu)
    return texts


@dataclass(frozen=True)
class _Ask:
    """A loaded model, which gives the columns of the pairs of one real clip."""

    backbone: Backbone
    denoising: Denoising | AsPublished
    texts: Mapping[str, Text]
    recipe: Recipe

    def __call__(
        self, pairs: Sequence[Pair], failures: dict[str, str]
    ) -> Iterator[tuple[Pair, Row]]:
        size, shows_first = self.recipe.data, self.backbone.spec.takes_image
        readable, frames = read_group(pairs, size, failures, shows_first)
        if readable:
            latents = encode(self.backbone, frames, size.prepare_batch)
            opening = real_opening(self.backbone, frames[0])
            text = moved(self.texts[pairs[0].group], latents.device)
            yield from rows_of(self.denoising, latents, text, readable, failures, opening)
