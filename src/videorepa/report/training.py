"""Draws training curves, and lists the settings in which the runs' recipes differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from markupsafe import Markup

from videorepa.artifacts.run import Run
from videorepa.report.plots import Line, draw_curve
from videorepa.training.drift import Appearance


@dataclass(frozen=True)
class Panel:
    """A plot of logged quantities.

    Attributes:
        keys: Names of the quantities in the log. All but the first are drawn dashed.
        log: Whether the vertical axis is logarithmic.
        band: Key of the recipe's setting for how far the first quantity may be from 1.
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
        "Mean of the validation clips. Dashed: lowest and highest clip. Dotted: the recipe's band.",
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
        "How far the student is from the teacher, unweighted. With weight 0 it is only measured.",
    ),
    Panel(
        "Similarity to the teacher",
        "mean-centred cosine (−1 to 1)",
        ("similarity",),
        "Between student and teacher features, each minus its mean. Higher is more alike.",
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
    Panel(
        "Use of the device",
        "share of the peak rate (0 to 1)",
        ("mfu",),
        "Of the device's peak rate, without what checkpointing computes again (MFU).",
    ),
    Panel(
        "Likelier: the real clip",
        "pairs with the real clip likelier (%)",
        ("likelier", "likelier_low", "likelier_high"),
        "Share of the validation pairs in which the real clip has the smaller denoising loss under "
        "the same noise; 50 % is chance. Dashed: the 95 % interval.",
    ),
    *(_drift(quantity) for quantity in Appearance._fields),
)


def draw_training(
    runs: Mapping[str, Run], colours: Mapping[str, int]
) -> list[tuple[Panel, Markup]]:
    """The panels for which any run has logged something, each with its plot."""
    drawn = []
    for place, panel in enumerate(_panels(runs)):
        lines = [
            Line(colours[name], steps, values, dashed=index > 0)
            for name, run in runs.items()
            for index, key in enumerate(panel.keys)
            for steps, values in [run.series(key)]
            if len(values)
        ]
        if lines:
            edges, remark = _band(panel, runs)
            svg = draw_curve(f"curve-{place}", panel.y_label, lines, panel.log, edges)
            drawn.append((replace(panel, note=panel.note + remark), svg))
    return drawn


def _band(panel: Panel, runs: Mapping[str, Run]) -> tuple[list[float], str]:
    """The edges of the bands that the runs' recipes set, and a remark on which runs left theirs."""
    edges, remark = set[float](), ""
    for name, run in runs.items():
        steps, values = run.series(panel.keys[0])
        setting = run.settings().get(panel.band or "")
        if setting is None or not len(values):
            continue
        width = float(setting)
        edges |= {1 - width, 1 + width}
        outside = steps[abs(values - 1) > width]
        if len(outside):
            remark += f" {name} is outside from step {outside[0]:.0f}."
    return sorted(edges), remark


def _panels(runs: Mapping[str, Run]) -> Iterable[Panel]:
    """All panels, with separate ones for each alignment term.

    A run with several terms logs them under keys such as `align.relation`.
    """
    logged = {key for run in runs.values() for row in run.log for key in row}
    for panel in PANELS:
        terms = {key.partition(".")[2] for key in logged if key.partition(".")[0] in panel.keys}
        for term in sorted(terms):
            keys = tuple(f"{key}.{term}" for key in panel.keys) if term else panel.keys
            yield replace(panel, keys=keys, title=panel.title + (f": {term}" if term else ""))


def recipe_differences(runs: Mapping[str, Run]) -> list[tuple[str, list[str]]]:
    """The settings in which the runs differ, with each run's value."""
    settings = [run.settings() for run in runs.values()]
    names = dict.fromkeys(name for each in settings for name in each)
    table = [(name, [each.get(name, "not set") for each in settings]) for name in names]
    return [(name, values) for name, values in table if len(set(values)) > 1]
