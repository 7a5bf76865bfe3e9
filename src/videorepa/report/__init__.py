"""Writes one HTML page of runs, clips, scores and measurements, which needs only a browser."""

from __future__ import annotations

import base64
import hashlib
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from videorepa.artifacts.clips import SELECTION, Key, Sidecar, left_over, readable_clips
from videorepa.artifacts.run import Run
from videorepa.artifacts.scores import Scores
from videorepa.artifacts.selection import Selection
from videorepa.errors import UserError
from videorepa.evaluation.likelihood import FOLDER as LIKELIHOOD
from videorepa.evaluation.ratings import FORMAT, QUESTIONS
from videorepa.probing.records import Probe, Scan
from videorepa.report.gallery import clip_gallery, validation_rows
from videorepa.report.likelihoods import draw_likelihood
from videorepa.report.media import Media
from videorepa.report.plots import COLOURS, SHOWN_SHARE, SMOOTHED_SHARE
from videorepa.report.probes import draw_probe
from videorepa.report.scans import draw_scan
from videorepa.report.scores import FEWEST_PROMPTS, BenchmarkTable, draw_tables
from videorepa.report.selections import draw_selection
from videorepa.report.training import draw_training, recipe_differences
from videorepa.system import wording
from videorepa.system.files import atomic_write

__all__ = ["report"]

SMALL_VIDEO = 256
"""Width in pixels below which videos are enlarged, with sharp pixels."""


def report(
    runs: Sequence[Path],
    out: Path,
    *,
    generations: Mapping[str, Path] = {},
    scores: Mapping[str, Sequence[Path]] = {},
    scans: Sequence[Path] = (),
    probes: Sequence[Path] = (),
    likelihoods: Sequence[Path] = (),
    title: str = "VideoREPA report",
    command: str | None = None,
    prompts: int | None = None,
) -> Path:
    """Write one HTML page, whole or not at all.

    Clips of up to 4 MB in all become part of the page. Larger ones are put into the folder
    `NAME-files` beside it, as hard links if possible. The page then needs that folder alone.

    Args:
        runs: Folders that `train` wrote.
        out: The page.
        generations: Folders that `generate` or `select` wrote, or lists of clips from elsewhere as
            `evaluate` takes them, by the model's name.
        scores: Folders that `evaluate` wrote, one per benchmark, by the model's name. A name is the
            same model here and in `generations`.
        scans: Folders that `scan` wrote.
        probes: Folders that `probe` wrote.
        likelihoods: Folders that `likelihood` wrote.
        title: Heading of the page.
        command: The command line that makes the page again, for the page to show.
        prompts: Largest number of prompts whose clips are shown, evenly spaced by id, and of
            validation clips per run. By default all are shown.

    Returns:
        `out`.

    Raises:
        UserError: There is nothing to report on, a folder does not hold what it should, or scores
            are of other clips than those beside them.
    """
    if not (runs or generations or scans or probes or likelihoods):
        raise UserError(
            "There is nothing to report on: no run, no generated clips, no scan, no probe and no "
            "likelihood. Name at least one folder of these."
        )
    if prompts is not None and prompts < 1:
        raise UserError(f"prompts is {prompts}; expected 1 or more.")
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder. Name the HTML file to write, as in {out}/report.html.")

    opened = {name: Run.open(path) for name, path in _by_name(runs).items()}
    clips = {name: readable_clips(Path(folder)) for name, folder in generations.items()}
    not_shown = {name: len(left_over(Path(folder))) for name, folder in generations.items()}
    scored = {
        name: [Scores.read(Path(folder)) for folder in folders] for name, folders in scores.items()
    }
    for name in clips:
        for scores_of_model in scored.get(name, ()):
            scores_of_model.check(clips[name])
    selected = {
        name: Selection.read(Path(folder))
        for name, folder in generations.items()
        if (Path(folder) / SELECTION).is_file()
    }
    likely = {name: _likelihood(folder) for name, folder in _by_name(likelihoods).items()}
    for of_models in likely.values():
        for name, of_model in of_models.items():
            scored.setdefault(name, []).append(of_model)
    scored = _with_names(scored, generations)
    scan_folders, probe_folders = _by_name(scans), _by_name(probes)
    scanned = {name: Scan.read(folder) for name, folder in scan_folders.items()}
    probed = {name: Probe.read(folder) for name, folder in probe_folders.items()}
    sources = [source for probe in probed.values() for source in probe.sources]
    order = dict.fromkeys([*opened, *clips, *scored, *sources])
    colours = {name: index for index, name in enumerate(order)}
    tables = draw_tables(scored, colours)
    gallery = clip_gallery(clips, scored, colours, prompts)
    samples = {
        name: validation_rows(run, prompts) for name, run in opened.items() if run.validation_clips
    }
    rows = [*gallery.rows, *(row for of_run in samples.values() for row in of_run)]
    media = Media(out, [clip for row in rows for clip in row.clips])

    page = Environment(
        loader=PackageLoader("videorepa.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("label", "number", "probability", "count", "listed"):
        page.filters[name] = getattr(wording, name)
    page.filters["numbered"] = lambda items: list(enumerate(items))
    page.filters["with_code"] = _with_code
    style, script = _asset("page.css"), _asset("page.js")
    html = page.get_template("page.html.j2").render(
        title=title,
        sentence=_sentence(opened, clips, tables, scanned, probed),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colours={name: index % COLOURS + 1 for name, index in colours.items()},
        runs=opened,
        clips=clips,
        tables=tables,
        fewest_prompts=FEWEST_PROMPTS,
        curves=draw_training(opened, colours),
        scans={
            name: draw_scan(f"scan-{place}", scan)
            for place, (name, scan) in enumerate(scanned.items())
        },
        probes={
            name: draw_probe(f"probe-{place}", probe, colours)
            for place, (name, probe) in enumerate(probed.items())
        },
        likelihoods={
            name: draw_likelihood(f"likelihood-{place}", of_models, colours)
            for place, (name, of_models) in enumerate(likely.items())
        },
        selections={
            name: draw_selection(f"selection-{place}", selection, colours[name])
            for place, (name, selection) in enumerate(selected.items())
        },
        smoothed=100 * SMOOTHED_SHARE,
        shown=100 * SHOWN_SHARE,
        recipe_differences=recipe_differences(opened),
        gallery=gallery,
        samples=samples,
        media=media,
        media_size=wording.megabytes(media.bytes),
        small=SMALL_VIDEO,
        ratings_format=FORMAT,
        questions=QUESTIONS,
        commands=_commands(opened, command),
        facts={name: _facts(clips[name], not_shown[name]) for name in clips},
        sources=list(_sources(out, opened, generations, tables, scan_folders, probe_folders)),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    # Write the new page's clips first and remove the old page's last, so that a page has its clips.
    media.write()
    atomic_write(out, html.encode("utf-8", errors="replace"))
    media.sweep()
    return out


def _likelihood(folder: Path) -> dict[str, Scores]:
    """What `likelihood` wrote, by the model's name. Raises UserError if it is none."""
    parts = sorted((folder / LIKELIHOOD).glob("*/summary.json"))
    if not parts:
        raise UserError(f"{folder} is not what `videorepa likelihood` wrote.")
    return {path.parent.name: Scores.read(path.parent) for path in parts}


def _with_names(
    scored: Mapping[str, Sequence[Scores]], generations: Mapping[str, Path]
) -> dict[str, list[Scores]]:
    """Scores whose comparisons name the other model as the page does.

    Raises:
        UserError: A model was compared with other scores of another than are there now.
    """
    names = {Path(path).resolve(): name for name, path in generations.items()}
    names |= {item.folder.resolve(): name for name, items in scored.items() for item in items}

    def named(ours: Scores) -> Scores:
        ours.check_comparison()
        if ours.comparison is None or ours.against is None:
            return ours
        other = ours.comparison.against
        if other in scored or other in generations:
            # Here another model has that name, or this one itself.
            other = f"{other} ({ours.comparison.against_path})"
        other = names.get(ours.against.resolve(), other)
        comparison = ours.comparison.model_copy(update={"against": other})
        return replace(ours, comparison=comparison)

    return {name: [named(item) for item in items] for name, items in scored.items()}


def _with_code(sentence: str) -> Markup:
    """Set what stands between backticks as code. All else is escaped."""
    words = sentence.split("`")
    if len(words) % 2 == 0:
        return escape(sentence)
    return Markup("").join(
        Markup("<code>{}</code>").format(word) if place % 2 else word
        for place, word in enumerate(words)
    )


def _asset(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text("utf-8")


def _by_name(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by their names, or by their whole paths if two names are the same."""
    by_name = {Path(folder).resolve().name: Path(folder) for folder in folders}
    if len(by_name) < len(folders):
        by_name = {str(folder): Path(folder) for folder in folders}
    if len(by_name) < len(folders):
        raise UserError(
            f"A folder is named twice among {', '.join(map(str, folders))}. Name each once."
        )
    return by_name


def _sentence(
    runs: Mapping[str, Run],
    clips: Mapping[str, Mapping[Key, Sidecar]],
    tables: Iterable[BenchmarkTable],
    scans: Mapping[str, Scan],
    probes: Mapping[str, Probe],
) -> str:
    """Say in one sentence what the page shows."""
    count, listed = wording.count, wording.listed
    parts = []
    if runs:
        steps = sorted({run.last_step for run in runs.values()})
        span = f"{steps[0]} to {steps[-1]} steps" if len(steps) > 1 else count(steps[0], "step")
        parts.append(f"{count(len(runs), 'training run')} ({listed(runs)}) of {span}")
    if clips:
        prompts = {prompt for of_model in clips.values() for prompt, _ in of_model}
        parts.append(f"clips made by {listed(clips)} for {count(len(prompts), 'prompt')}")
    parts += [f"scores on the benchmark {table.title}" for table in tables]
    for name, scan in scans.items():
        blocks, teachers = count(len(scan.blocks), "block"), listed(scan.teachers)
        parts.append(f"the scan {name} of {blocks} against {teachers}")
    for name, probe in probes.items():
        parts.append(f"the probe {name} of {listed(probe.sources)} on Physion {probe.protocol}")
    return f"This page shows {'; '.join(parts)}."


def _facts(clips: Mapping[Key, Sidecar], not_shown: int) -> list[tuple[str, str]]:
    """The settings with which a folder of clips was generated, each with all values that occur.

    Args:
        not_shown: Number of clips that are left over; see `left_over`.
    """
    every = list(clips.values())
    seeds = sorted({clip.seed for clip in every if clip.seed is not None})
    settings: dict[str, Iterable[str]] = {
        "model": (clip.model for clip in every),
        "sampling steps": (str(clip.steps) for clip in every if clip.steps is not None),
        "guidance scale": (
            f"{clip.guidance_scale:g}" for clip in every if clip.guidance_scale is not None
        ),
        "scheduler": (clip.scheduler for clip in every if clip.scheduler),
        "frames": (f"{clip.frames} at {clip.fps:g} per second" for clip in every),
        "size": (f"{clip.width} × {clip.height} pixels" for clip in every),
        "seeds": [f"{seeds[0]} to {seeds[-1]}"] if len(seeds) > 1 else map(str, seeds),
    }
    facts = [(name, ", ".join(dict.fromkeys(values))) for name, values in settings.items()]
    if not_shown:
        facts.append(("not shown", f"{wording.count(not_shown, 'clip')} of prompts of before"))
    return [("clips", str(len(every))), *((name, value) for name, value in facts if value)]


def _commands(runs: Mapping[str, Run], command: str | None) -> list[str]:
    recipes = [str(run.path / "recipe.yaml") for run in runs.values()]
    train = [shlex.join(["videorepa", "train", recipe]) for recipe in recipes]
    return [*train, *([command] if command else [])]


@dataclass(frozen=True)
class PageSource:
    """A file or folder from which something on the page comes.

    Attributes:
        what: What comes from it.
        of: The model or run that it is about.
        path: Its path relative to the page.
        link: The same path as a URL.
    """

    what: str
    of: str
    path: str
    link: str


def _sources(
    out: Path,
    runs: Mapping[str, Run],
    generations: Mapping[str, Path],
    tables: Sequence[BenchmarkTable],
    scans: Mapping[str, Path],
    probes: Mapping[str, Path],
) -> Iterator[PageSource]:
    def source(what: str, of: str, path: Path) -> PageSource:
        relative = Path(os.path.relpath(path.resolve(), out.parent.resolve())).as_posix()
        return PageSource(what, of, relative, quote(relative, errors="surrogateescape"))

    for table in tables:
        for name, scores in table.scores.items():
            of = f"{name}, {table.benchmark}"
            yield source("table, bars, clips not scored", of, scores.folder / "summary.json")
            yield source("scores of each clip", of, scores.folder / "scores.jsonl")
            if scores.comparison is not None:
                yield source("differences, p", of, scores.folder / "comparison.json")
    for name, run in runs.items():
        yield source("curves", name, run.log_path)
        yield source("recipe", name, run.path / "recipe.yaml")
        if run.environment:
            yield source("environment", name, run.path / "environment.json")
        if run.validation_clips:
            yield source("validation clips", name, run.samples)
    for name, folder in scans.items():
        yield source("scan", name, folder / "scan.json")
    for name, folder in probes.items():
        yield source("probe", name, folder / "probe.json")
        yield source("accuracies of each draw", name, folder / "accuracies.csv")
        yield source("answers about each clip", name, folder / "predictions.csv")
    for name, folder in generations.items():
        yield source("clips, prompts, seeds", name, Path(folder))
        if (Path(folder) / SELECTION).is_file():
            yield source("best of n", name, Path(folder) / SELECTION)
