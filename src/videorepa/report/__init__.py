"""Writes one HTML page about runs, their clips and their scores; it needs nothing but a browser."""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from videorepa.data.files import atomic_write
from videorepa.drift import Look
from videorepa.errors import UserError
from videorepa.report.curves import (
    COLOURS,
    SHOWN_SHARE,
    SMOOTHED_SHARE,
    Interval,
    Line,
    draw_curve,
    draw_intervals,
)
from videorepa.report.inputs import (
    Difference,
    Key,
    Metric,
    Run,
    Sample,
    Scan,
    Scores,
    Sidecar,
    read_generation,
    read_run,
    read_scan,
    read_scores,
)
from videorepa.report.scans import draw_scan

__all__ = ["report"]

SMALL_VIDEO = 256
"""Videos narrower than this are enlarged with their pixels kept square."""
SAMPLE_STEPS = 4
"""How many moments of a training its validation clips are shown at."""
NAMES = {"sa": "SA", "pc": "PC"}


@dataclass(frozen=True)
class Panel:
    """A plot of logged quantities; all but the first are drawn dashed.

    band: the key of the recipes' setting that says how far the quantity may be from 1.
    """

    title: str
    y_label: str
    keys: tuple[str, ...]
    note: str
    log: bool = False
    band: str | None = None


def _drift(quantity: str) -> Panel:
    key = f"drift_{quantity}"
    return Panel(
        f"Drift: {quantity}",
        f"{quantity} / the base model's",
        (key, f"{key}_low", f"{key}_high"),
        "Of the validation clips. Dashed: the lowest and highest clip. Dotted: the recipe's band.",
        band="validation.drift",
    )


PANELS = (
    Panel(
        "Denoising loss",
        "denoising loss (squared error)",
        ("denoise",),
        "How well the model still predicts what it was trained to predict. Lower is better.",
    ),
    Panel(
        "Alignment loss",
        "alignment loss (no unit)",
        ("align",),
        "How far the student is from the teacher, unweighted. Weight 0 only measures it.",
    ),
    Panel(
        "Similarity to the teacher",
        "mean-centred cosine (−1 to 1)",
        ("similarity",),
        "Between student and teacher features, each less its mean. Higher is more alike.",
    ),
    Panel(
        "Gradient norm",
        "gradient norm (L2)",
        ("grad_norm",),
        "Of the total loss over all trained weights, before clipping.",
        log=True,
    ),
    Panel(
        "Gradient norm at the tapped block",
        "gradient norm (L2)",
        ("grad_denoise", "grad_align"),
        "Solid: from the denoising loss. Dashed: from the alignment loss.",
        log=True,
    ),
    Panel(
        "Speed", "training speed (clips/s)", ("clips_per_second",), "Clips trained on per second."
    ),
    *(_drift(quantity) for quantity in Look._fields),
)


@dataclass(frozen=True)
class Badge:
    text: str
    kind: str
    title: str


@dataclass(frozen=True)
class Cell:
    """A video in a row of clips, or the reason why there is none. fps is in frames per second."""

    label: str
    colour: int | None
    source: str | None
    width: int
    height: int
    fps: float
    badges: Sequence[Badge] = ()
    note: str = ""


@dataclass(frozen=True)
class Row:
    """Videos to compare with each other."""

    prompt: str
    note: str
    cells: Sequence[Cell]


def report(
    runs: Sequence[Path],
    out: Path,
    *,
    generations: Mapping[str, Path] = {},
    scores: Mapping[str, Path] = {},
    scans: Sequence[Path] = (),
    title: str = "VideoREPA report",
    command: str | None = None,
    prompts: int = 24,
) -> Path:
    """Write one self-contained HTML page to `out`, all at once or not at all, and return its path.

    runs: run folders. generations and scores: display name -> folder; a name stands for the same
    model in both. scans: folders that `scan` wrote. command: the command line that makes this page
    again, shown on it. prompts: at most this many prompts are shown with their videos, evenly
    spaced by id, and likewise of a run's validation clips. Videos are embedded, so the page is a
    third larger than those shown.

    Raises UserError when there is nothing to report on, or a folder is not what it should be.
    """
    if not runs and not generations and not scans:
        raise UserError(
            "There is nothing to report on: no run, no generated clips and no scan were given. "
            "Name at least one run folder, generation folder or scan folder."
        )
    if prompts < 1:
        raise UserError(f"prompts is {prompts}; expected 1 or more.")
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder. Name the HTML file to write, as in {out}/report.html.")

    loaded = [read_run(Path(run), name) for run, name in zip(runs, _names(runs), strict=True)]
    clips = {name: read_generation(Path(folder)) for name, folder in generations.items()}
    scored = {name: read_scores(Path(folder)) for name, folder in scores.items()}
    scanned = {
        name: read_scan(Path(folder)) for name, folder in zip(_names(scans), scans, strict=True)
    }
    benchmarks = {(item.summary.benchmark, item.summary.version) for item in scored.values()}
    if len(benchmarks) > 1:
        found = ", ".join(sorted(f"{name} version {version}" for name, version in benchmarks))
        raise UserError(
            f"The scores come from different benchmarks ({found}) and cannot share a table. "
            "Write a report for each, or evaluate again with one version."
        )

    order = dict.fromkeys([*(run.name for run in loaded), *clips, *scored])
    colours = {name: index for index, name in enumerate(order)}
    rows, left_out = _clip_rows(clips, scored, colours, prompts)
    page = Environment(
        loader=PackageLoader("videorepa.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters["number"] = _number
    page.filters["count"] = _count
    script = _asset("page.js")
    html = page.get_template("page.html.j2").render(
        title=title,
        sentence=_sentence(loaded, clips, benchmarks, scanned),
        style=Markup(_asset("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colours={name: index % COLOURS + 1 for name, index in colours.items()},
        runs=loaded,
        clips=clips,
        scores=scored,
        metrics=_metric_names(scored),
        score_plots=_score_plots(scored, colours),
        difference_plots=_difference_plots(scored, colours),
        verdicts=_verdicts(scored),
        curves=_curves(loaded, colours),
        scans={
            name: draw_scan(f"scan-{place}", found)
            for place, (name, found) in enumerate(scanned.items())
        },
        smoothed=100 * SMOOTHED_SHARE,
        shown=100 * SHOWN_SHARE,
        recipe_differences=_recipe_differences(loaded),
        rows=rows,
        left_out=left_out,
        samples={run.name: _sample_rows(run, prompts) for run in loaded if run.samples},
        commands=_commands(loaded, command),
        small=SMALL_VIDEO,
        label=_label,
        facts=_facts,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, html.encode("utf-8", errors="replace"))
    return out


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text("utf-8")


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names; the whole paths where names would be the same."""
    short = [Path(folder).resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"A folder is named twice among {', '.join(names)}. Name each once.")
    return names


def _label(metric: str) -> str:
    return NAMES.get(metric, metric)


def _number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """The number as text, with a true minus; a dash if there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _sentence(
    runs: Sequence[Run],
    clips: Mapping[str, Mapping[Key, Sidecar]],
    benchmarks: Iterable[tuple[str, str]],
    scans: Mapping[str, Scan],
) -> str:
    """What the page compares, in one sentence."""
    parts = []
    if runs:
        steps = sorted({run.last_step for run in runs})
        span = f"{steps[0]} to {steps[-1]} steps" if len(steps) > 1 else _count(steps[0], "step")
        names = _listed(run.name for run in runs)
        parts.append(f"{_count(len(runs), 'training run')} ({names}) of {span}")
    if clips:
        prompts = {prompt for found in clips.values() for prompt, _ in found}
        parts.append(f"clips made by {_listed(clips)} for {_count(len(prompts), 'prompt')}")
    for name, version in benchmarks:
        parts.append(f"scores on the benchmark {name}, version {version}")
    for name, found in scans.items():
        blocks, teachers = _count(len(found.blocks), "block"), _listed(found.teachers)
        parts.append(f"the scan {name} of {blocks} against {teachers}")
    return f"This page shows {'; '.join(parts)}."


def _metric_names(scores: Mapping[str, Scores]) -> list[str]:
    return list(dict.fromkeys(name for item in scores.values() for name in item.summary.metrics))


def _score_plots(scores: Mapping[str, Scores], colours: Mapping[str, int]) -> list[Markup]:
    plots = []
    for place, metric in enumerate(_metric_names(scores)):
        found: dict[str, Metric] = {}
        for name, item in scores.items():
            value = item.summary.metrics.get(metric)
            if value and value.percent is not None and math.isfinite(value.percent):
                found[name] = value
        if found:
            points = [
                Interval(name, colours[name], value.percent or 0.0, value.low, value.high)
                for name, value in found.items()
            ]
            label = f"{_label(metric)} (%)"
            plots.append(draw_intervals(f"score-{place}", label, points, span=(0.0, 100.0)))
    return [Markup(plot) for plot in plots]


def _unit(scores: Scores, metric: str) -> str:
    value = scores.summary.metrics.get(metric)
    return "points" if value and value.percent is not None else "in its own unit"


def _difference_plots(scores: Mapping[str, Scores], colours: Mapping[str, int]) -> list[Markup]:
    """One plot per metric counted in percent points: the compared models' differences."""
    plots = []
    for place, metric in enumerate(_metric_names(scores)):
        points = []
        for name, item in scores.items():
            change = item.comparison.metrics.get(metric) if item.comparison else None
            if change and item.comparison and _unit(item, metric) == "points":
                label = f"{name} − {item.comparison.against}"
                value = change.difference
                points.append(Interval(label, colours[name], value, change.low, change.high))
        if points:
            label = f"difference in {_label(metric)} (points)"
            plots.append(draw_intervals(f"difference-{place}", label, points, zero=True))
    return [Markup(plot) for plot in plots]


@dataclass(frozen=True)
class Verdict:
    """A paired difference, and what may be said of it."""

    model: str
    against: str
    metric: str
    difference: Difference
    unit: str
    text: str


def _verdicts(scores: Mapping[str, Scores]) -> list[Verdict]:
    verdicts = []
    for name, item in scores.items():
        if item.comparison is None:
            continue
        against = item.comparison.against
        for metric, change in item.comparison.metrics.items():
            if change.low > 0:
                text = f"the interval excludes zero: {name} is above {against}."
            elif change.high < 0:
                text = f"the interval excludes zero: {name} is below {against}."
            else:
                text = f"the interval includes zero: these clips cannot tell {name} from {against}."
            verdicts.append(
                Verdict(name, against, _label(metric), change, _unit(item, metric), text)
            )
    return verdicts


def _curves(runs: Sequence[Run], colours: Mapping[str, int]) -> list[tuple[Panel, Markup]]:
    drawn = []
    for place, panel in enumerate(_panels(runs)):
        lines = [
            Line(colours[run.name], steps, values, dashed=index > 0)
            for run in runs
            for index, key in enumerate(panel.keys)
            for steps, values in [run.series(key)]
            if len(values)
        ]
        if lines:
            edges, said = _band(panel, runs)
            svg = draw_curve(f"curve-{place}", panel.y_label, lines, panel.log, edges)
            drawn.append((replace(panel, note=panel.note + said), Markup(svg)))
    return drawn


def _band(panel: Panel, runs: Sequence[Run]) -> tuple[list[float], str]:
    """Both edges of the panel's band, of each width that the runs' recipes say, and in words which
    runs have left theirs."""
    edges, said = set[float](), ""
    for run in runs:
        steps, values = run.series(panel.keys[0])
        setting = run.settings().get(panel.band or "")
        if setting is None or not len(values):
            continue
        width = float(setting)
        edges |= {1 - width, 1 + width}
        outside = steps[abs(values - 1) > width]
        if len(outside):
            said += f" {run.name} is outside from step {outside[0]:.0f}."
    return sorted(edges), said


def _panels(runs: Sequence[Run]) -> Iterable[Panel]:
    """The plots; where a run has several alignment terms, logged as `align.relation` and so on,
    one for each term."""
    logged = {key for run in runs for row in run.log for key in row}
    for panel in PANELS:
        terms = {key.partition(".")[2] for key in logged if key.partition(".")[0] in panel.keys}
        for term in sorted(terms):
            keys = tuple(f"{key}.{term}" for key in panel.keys) if term else panel.keys
            yield replace(panel, keys=keys, title=panel.title + (f": {term}" if term else ""))


def _recipe_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs, with each run's value."""
    settings = [run.settings() for run in runs]
    names = dict.fromkeys(name for each in settings for name in each)
    table = [(name, [each.get(name, "not set") for each in settings]) for name in names]
    return [(name, values) for name, values in table if len(set(values)) > 1]


def _spread(items: Sequence, most: int) -> list:
    """At most `most` of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _embed(path: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def _badges(scores: Scores | None, key: Key) -> list[Badge]:
    row = scores.rows.get(key) if scores else None
    if row is None:
        return []
    failing = ", ".join(row.failing_checks)
    badges = []
    for metric in ("sa", "pc"):
        value = getattr(row, metric)
        if value in (0, 1):
            title = f"failing checks: {failing}" if failing and not value else ""
            text = f"{_label(metric)} {'pass' if value else 'fail'}"
            badges.append(Badge(text, "pass" if value else "fail", title))
        elif value is not None:
            badges.append(Badge(f"{_label(metric)} {_number(value)}", "plain", ""))
    return badges


def _clip_rows(
    clips: Mapping[str, Mapping[Key, Sidecar]],
    scores: Mapping[str, Scores],
    colours: Mapping[str, int],
    most: int,
) -> tuple[list[Row], str]:
    """A row per prompt, of the first sample that most models have, and what was left out."""
    samples: dict[str, list[int]] = {}
    for found in clips.values():
        for prompt_id, k in found:
            samples.setdefault(prompt_id, []).append(k)
    shown = _spread(sorted(samples), most)
    rows = []
    for prompt_id in shown:
        numbers = samples[prompt_id]
        key = (prompt_id, min(set(numbers), key=lambda k: (-numbers.count(k), k)))
        present = [found[key] for found in clips.values() if key in found]
        same_seed = len({clip.seed for clip in present}) == 1
        note = f"{prompt_id}, sample {key[1]}, "
        note += f"seed {present[0].seed}" if same_seed else "different seeds"
        if len({clip.prompt for clip in present}) > 1:
            note += ", different wordings of the prompt; the first is shown"
        cells = []
        for name, found in clips.items():
            clip, judged = found.get(key), scores.get(name)
            reason = judged.failures.get(key) if judged else None
            remarks = [f"not scored: {reason}"] if reason else []
            if clip and not same_seed:
                remarks.append(f"seed {clip.seed}")
            cells.append(
                Cell(
                    label=name,
                    colour=colours[name],
                    source=_embed(clip.path) if clip else None,
                    width=(clip or present[0]).width,
                    height=(clip or present[0]).height,
                    fps=(clip or present[0]).fps,
                    badges=_badges(judged, key) if clip else (),
                    note="; ".join(remarks),
                )
            )
        rows.append(Row(present[0].prompt, note, cells))
    return rows, _left_out(len(samples) - len(shown), samples)


def _left_out(prompts: int, samples: Mapping[str, Sequence[int]]) -> str:
    parts = []
    if prompts:
        parts.append(
            f"{_count(prompts, 'prompt')} of {len(samples)} left out; those shown are evenly "
            "spaced by id, not chosen by result."
        )
    further = max((len(set(numbers)) - 1 for numbers in samples.values()), default=0)
    if further:
        parts.append(f"Up to {_count(further, 'further sample')} per prompt left out.")
    return " ".join(parts)


def _sample_rows(run: Run, most: int) -> list[Row]:
    """A row per validation clip, at a few moments of the training."""
    names = sorted({name for clips in run.samples.values() for name in clips})
    steps = _spread(list(run.samples), SAMPLE_STEPS)
    rows = []
    for name in _spread(names, most):
        shown: dict[int, Sample | None] = {step: run.samples[step].get(name) for step in steps}
        present = next((sample for sample in shown.values() if sample), None)
        if present is None:
            continue
        cells = [
            Cell(
                label=f"step {step}" if step else "base model",
                colour=None,
                source=_embed(sample.path) if sample else None,
                width=present.width,
                height=present.height,
                fps=present.fps,
            )
            for step, sample in shown.items()
        ]
        rows.append(Row(present.prompt, name if name != present.prompt else "", cells))
    return rows


def _facts(clips: Mapping[Key, Sidecar]) -> list[tuple[str, str]]:
    """How a folder of clips was generated: each setting, with all the values found."""
    found = list(clips.values())
    settings = {
        "model": (clip.model for clip in found),
        "sampling steps": (str(clip.steps) for clip in found),
        "guidance scale": (f"{clip.guidance_scale:g}" for clip in found),
        "frames": (f"{clip.frames} at {clip.fps:g} per second" for clip in found),
        "size": (f"{clip.width} × {clip.height} pixels" for clip in found),
    }
    facts = [(name, ", ".join(dict.fromkeys(values))) for name, values in settings.items()]
    seeds = sorted({clip.seed for clip in found})
    span = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return [("clips", str(len(found))), *facts, ("seeds", span)]


def _commands(runs: Sequence[Run], command: str | None) -> list[str]:
    train = [shlex.join(["videorepa", "train", str(run.folder / "recipe.yaml")]) for run in runs]
    return [*train, *([command] if command else [])]
