"""Writes one HTML page of runs, clips, scores and measurements; it needs nothing but a browser."""

from __future__ import annotations

import base64
import hashlib
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from videorepa.artifacts.clips import Key, Sidecar, read_generation
from videorepa.artifacts.run import LoggedRun, read_run
from videorepa.artifacts.scores import read_scores
from videorepa.errors import UserError
from videorepa.evaluation.ratings import FORMAT, QUESTIONS
from videorepa.probing.records import Probe, Scan
from videorepa.report.gallery import clip_gallery, sample_rows
from videorepa.report.media import Media
from videorepa.report.plots import COLOURS, SHOWN_SHARE, SMOOTHED_SHARE
from videorepa.report.probes import draw_probe
from videorepa.report.scans import draw_scan
from videorepa.report.scores import FEWEST_PROMPTS, Table, draw_tables
from videorepa.report.training import draw_training, recipe_differences
from videorepa.system import wording
from videorepa.system.files import atomic_write

__all__ = ["report"]

SMALL_VIDEO = 256
"""Videos narrower than this are enlarged with their pixels kept square."""


def report(
    runs: Sequence[Path],
    out: Path,
    *,
    generations: Mapping[str, Path] = {},
    scores: Mapping[str, Sequence[Path]] = {},
    scans: Sequence[Path] = (),
    probes: Sequence[Path] = (),
    title: str = "VideoREPA report",
    command: str | None = None,
    prompts: int | None = None,
) -> Path:
    """Write one HTML page to `out`, all at once or not at all, and return its path.

    runs: run folders. generations: display name -> folder, or list
    of clips from elsewhere as `evaluate` takes it. scores: display name -> folders, one
    for each benchmark; a name stands for the same model in both. scans, probes: folders that `scan`
    and `probe` wrote.
    command: the command line that makes this page again, shown on it. prompts: at most so many
    prompts are shown with their clips, evenly spaced by id, and likewise of a run's validation
    clips; by default all.

    Clips of 4 MB in all are put into the page. More are put beside it, into `NAME-files`, as hard
    links where that is possible; the page needs that folder then, and nothing else.

    Raises UserError when there is nothing to report on, or a folder is not what it should be.
    """
    if not (runs or generations or scans or probes):
        raise UserError(
            "There is nothing to report on: no run, no generated clips, no scan and no probe were "
            "given. Name at least one folder of these."
        )
    if prompts is not None and prompts < 1:
        raise UserError(f"prompts is {prompts}; expected 1 or more.")
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder. Name the HTML file to write, as in {out}/report.html.")

    loaded = [read_run(Path(run), name) for run, name in zip(runs, _names(runs), strict=True)]
    clips = {name: read_generation(Path(folder)) for name, folder in generations.items()}
    scored = {
        name: [read_scores(Path(folder)) for folder in folders] for name, folders in scores.items()
    }
    scan_folders = dict(zip(_names(scans), map(Path, scans), strict=True))
    scanned = {name: Scan.read(folder) for name, folder in scan_folders.items()}
    probe_folders = dict(zip(_names(probes), map(Path, probes), strict=True))
    probed = {name: Probe.read(folder) for name, folder in probe_folders.items()}
    sources = [source for found in probed.values() for source in found.sources]
    order = dict.fromkeys([*(run.name for run in loaded), *clips, *scored, *sources])
    colours = {name: index for index, name in enumerate(order)}
    tables = draw_tables(scored, colours)
    gallery = clip_gallery(clips, scored, colours, prompts)
    samples = {run.name: sample_rows(run, prompts) for run in loaded if run.samples}
    rows = [*gallery.rows, *(row for found in samples.values() for row in found)]
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
    style, script = _asset("page.css"), _asset("page.js")
    html = page.get_template("page.html.j2").render(
        title=title,
        sentence=_sentence(loaded, clips, tables, scanned, probed),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colours={name: index % COLOURS + 1 for name, index in colours.items()},
        runs=loaded,
        clips=clips,
        tables=tables,
        fewest_prompts=FEWEST_PROMPTS,
        curves=draw_training(loaded, colours),
        scans={
            name: draw_scan(f"scan-{place}", found)
            for place, (name, found) in enumerate(scanned.items())
        },
        probes={
            name: draw_probe(f"probe-{place}", found, colours)
            for place, (name, found) in enumerate(probed.items())
        },
        smoothed=100 * SMOOTHED_SHARE,
        shown=100 * SHOWN_SHARE,
        recipe_differences=recipe_differences(loaded),
        gallery=gallery,
        samples=samples,
        media=media,
        media_size=wording.megabytes(media.bytes),
        small=SMALL_VIDEO,
        ratings_format=FORMAT,
        questions=QUESTIONS,
        commands=_commands(loaded, command),
        facts=_facts,
        sources=list(_sources(out, loaded, generations, tables, scan_folders, probe_folders)),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    # The page comes after the clips it needs and before those of the one it replaces are removed.
    media.write()
    atomic_write(out, html.encode("utf-8", errors="replace"))
    media.sweep()
    return out


def _asset(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text("utf-8")


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names; the whole paths where names would be the same."""
    short = [Path(folder).resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"A folder is named twice among {', '.join(names)}. Name each once.")
    return names


def _sentence(
    runs: Sequence[LoggedRun],
    clips: Mapping[str, Mapping[Key, Sidecar]],
    tables: Iterable[Table],
    scans: Mapping[str, Scan],
    probes: Mapping[str, Probe],
) -> str:
    """What the page compares, in one sentence."""
    count, listed = wording.count, wording.listed
    parts = []
    if runs:
        steps = sorted({run.last_step for run in runs})
        span = f"{steps[0]} to {steps[-1]} steps" if len(steps) > 1 else count(steps[0], "step")
        names = listed(run.name for run in runs)
        parts.append(f"{count(len(runs), 'training run')} ({names}) of {span}")
    if clips:
        prompts = {prompt for found in clips.values() for prompt, _ in found}
        parts.append(f"clips made by {listed(clips)} for {count(len(prompts), 'prompt')}")
    parts += [f"scores on the benchmark {table.title}" for table in tables]
    for name, found in scans.items():
        blocks, teachers = count(len(found.blocks), "block"), listed(found.teachers)
        parts.append(f"the scan {name} of {blocks} against {teachers}")
    for name, found in probes.items():
        parts.append(f"the probe {name} of {listed(found.sources)} on Physion {found.protocol}")
    return f"This page shows {'; '.join(parts)}."


def _facts(clips: Mapping[Key, Sidecar]) -> list[tuple[str, str]]:
    """How a folder of clips was generated: each setting, with all the values found."""
    found = list(clips.values())
    seeds = sorted({clip.seed for clip in found if clip.seed is not None})
    settings: dict[str, Iterable[str]] = {
        "model": (clip.model for clip in found),
        "sampling steps": (str(clip.steps) for clip in found if clip.steps is not None),
        "guidance scale": (
            f"{clip.guidance_scale:g}" for clip in found if clip.guidance_scale is not None
        ),
        "frames": (f"{clip.frames} at {clip.fps:g} per second" for clip in found),
        "size": (f"{clip.width} × {clip.height} pixels" for clip in found),
        "seeds": [f"{seeds[0]} to {seeds[-1]}"] if len(seeds) > 1 else map(str, seeds),
    }
    facts = [(name, ", ".join(dict.fromkeys(values))) for name, values in settings.items()]
    return [("clips", str(len(found))), *((name, said) for name, said in facts if said)]


def _commands(runs: Sequence[LoggedRun], command: str | None) -> list[str]:
    train = [shlex.join(["videorepa", "train", str(run.folder / "recipe.yaml")]) for run in runs]
    return [*train, *([command] if command else [])]


@dataclass(frozen=True)
class Source:
    """A file or folder that something on the page comes from. path, link: as seen from the page."""

    what: str
    of: str
    path: str
    link: str


def _sources(
    out: Path,
    runs: Sequence[LoggedRun],
    generations: Mapping[str, Path],
    tables: Sequence[Table],
    scans: Mapping[str, Path],
    probes: Mapping[str, Path],
) -> Iterator[Source]:
    def source(what: str, of: str, path: Path) -> Source:
        seen = Path(os.path.relpath(path.resolve(), out.parent.resolve())).as_posix()
        return Source(what, of, seen, quote(seen, errors="surrogateescape"))

    for table in tables:
        for name, scores in table.scores.items():
            of = f"{name}, {table.benchmark}"
            yield source("table, bars, clips not scored", of, scores.folder / "summary.json")
            yield source("scores of each clip", of, scores.folder / "scores.jsonl")
            if scores.comparison is not None:
                yield source("differences, p", of, scores.folder / "comparison.json")
    for run in runs:
        yield source("curves", run.name, run.folder / "log.jsonl")
        yield source("recipe", run.name, run.folder / "recipe.yaml")
        if run.environment:
            yield source("environment", run.name, run.folder / "environment.json")
        if run.samples:
            yield source("validation clips", run.name, run.folder / "samples")
    for name, folder in scans.items():
        yield source("scan", name, folder / "scan.json")
    for name, folder in probes.items():
        yield source("probe", name, folder / "probe.json")
        yield source("accuracies of each draw", name, folder / "accuracies.csv")
        yield source("answers about each clip", name, folder / "predictions.csv")
    for name, folder in generations.items():
        yield source("clips, prompts, seeds", name, Path(folder))
