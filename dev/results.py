"""Makes the tables and figures of pages in docs/ from docs/study/.

Run: python dev/results.py [STUDY ...]

Given the folder of a study of recipes/micro, it first copies its scores and measurements into
docs/study/, of the study with most arms its costs, and of the finished model's the picture of some
arms' clips.
"""

from __future__ import annotations

import csv
import math
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from videorepa.data.video import read_all
from videorepa.evaluation.pairs import share
from videorepa.evaluation.statistics import holm, mean_of_few, paired_bootstrap, sign_flip
from videorepa.lab.study.arms import MEASURED, ROWS, clips_folder, cost
from videorepa.lab.study.measures import ALL, LIKELIER, LOG_RATIO, LOSS
from videorepa.lab.study.recipe import BASE, StudyRecipe
from videorepa.lab.study.rows import VIOLATION, Row, read_rows
from videorepa.lab.study.seeds import (
    OF_CLIPS,
    Gain,
    Measured,
    change_text,
    in_markdown,
    read_measured,
)
from videorepa.lab.study.tables import ERROR_TITLES, by_table, on_the_way, tables
from videorepa.settings.section import read_values

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (DOCS / "study.md", DOCS / "evidence.md", DOCS / "lab.md")
KEPT = DOCS / "study"
RECIPE = ROOT / "recipes" / "micro" / "study.yaml"
MAP = ROOT / "recipes" / "micro" / "map.yaml"
SHAPES = ROOT / "recipes" / "micro" / "shapes.yaml"
CONFIRMATION = ROOT / "recipes" / "micro" / "confirmation.yaml"
BARE = ROOT / "recipes" / "micro" / "bare.yaml"
FREE = ROOT / "recipes" / "micro" / "free.yaml"
FAMILIES = {
    "near": (("bare-near", "bare-untrained"), ("bare-near", "bare-places")),
    "both": (("both-truth", "free-truth"), ("both-truth", "bare-near")),
    "image": (
        ("free-image", "free-image-untrained"),
        ("free-image", "free-video"),
        ("both-image", "bare-near"),
    ),
    "free-places": (
        ("free-truth", "free-places"),
        ("free-image", "free-places"),
        ("free-places", "bare-near"),
    ),
}
"""Further recipes of recipes/micro, each of one table of arms of its name, and what its arms are
compared with. These and the two above go on in the confirmation's folder, and have its arms too."""
FINISHED = ("finished", "finished-trd")
"""The studies of the finished model."""
NAMES_KEPT = {
    "full": {ROWS: ROWS},
    "calibration": {MEASURED: MEASURED},
    "map": {MEASURED: MEASURED},
    "shapes": {MEASURED: "shapes.csv"},
    "confirmation": {MEASURED: "confirmation.csv"},
    "bare": {MEASURED: "confirmation.csv"},
    "free": {MEASURED: "free.csv"},
    "lasting": {MEASURED: "lasting.csv"},
    "plausible": {MEASURED: "plausible.csv"},
} | {name: {MEASURED: f"{name}.csv"} for name in (*FAMILIES, *FINISHED)}
"""The files that are kept of each study, and what they are called in docs/study/."""
TICKS = (-10, -3, -1, -0.5, 0, 0.5, 1, 3)
POOL = "4"
"""Rows and columns of places in the probe's figure; the table has all poolings."""
NAMES = {
    "videomae": "teacher",
    "untrained": "teacher, untrained",
    "pixels": "raw pixels",
    "control-0": "control",
    "trd-0": "TRD",
}
CONTINUATIONS = {
    "trd": "TRD",
    "copy": "the first frame, copied",
    "autoencoder": "the true clip, autoencoded",
}
BY_LEVEL, FREE_BY_LEVEL = ("trd-truth", "trd-video", "bare-untrained"), ("free-truth", "free-video")
"""Arms that are drawn by noise level."""
BARE_AGAINST = (
    ("bare-video", "trd-video"),
    ("bare-untrained", "bare-video"),
    ("bare-untrained", "trd-truth"),
    ("bare-places", "bare-untrained"),
)
"""Arms without a projector, and what each is compared with."""
FREE_AGAINST = (
    ("free-truth", "trd-truth"),
    ("free-video", "trd-truth"),
    ("free-untrained", "trd-truth"),
    ("free-truth", "free-video"),
    ("free-truth", "free-untrained"),
)
"""The same of the arms with free mean and spread."""
LASTING_AGAINST = (("both-truth", "bare-near"), ("both-image", "bare-near"))
"""The same of the arms that were trained for longer."""
PLAUSIBLE_AGAINST = (("both-truth", "bare-near"),)
"""The same of the arms that were asked what they find likelier."""
CONFIRMED = ("confirmation", "free", *FAMILIES)
"""The studies of the confirmation's folder whose numbers are kept in files of their own."""
SPREAD_AT = "0.75"
"""The noise's share at which students' relations are tabulated."""
TOLD = {
    "truth": ("free", "free-truth"),
    "image teacher": ("image", "free-image"),
    "image teacher, untrained": ("image", "free-image-untrained"),
    "video teacher, untrained": ("free", "free-untrained"),
    "video teacher": ("free", "free-video"),
    "raw pixels": ("map", "free-pixels"),
    "places": ("free-places", "free-places"),
}
"""The study and the arm of each teacher whose relations were correlated with, by its name in
spread.csv."""
READ = ("place", "motion", "contact")
"""What of the truth is read from tokens."""
SHEET_ARMS = (BASE, "control", "trd", "both")
SHEET_SCENARIOS = ("catch", "drop", "ramp")
SHEET_FRAMES = range(0, 17, 2)


def probe_table() -> str:
    """Contact foreseen, with a line for each source and timestep and a column for each pooling."""
    percents: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in _probed():
        percent, low, high = (float(row[key]) for key in ("percent", "low", "high"))
        percents[row["source"], row["timestep"]][row["pool"]] = (
            f"{percent:.1f} [{low:.1f}, {high:.1f}]"
        )
    pools = list(dict.fromkeys(row["pool"] for row in _probed()))
    heads = [f"{pool} x {pool}" for pool in pools]
    lines = [f"| source | timestep | {' | '.join(heads)} |", "|---" * (2 + len(pools)) + "|"]
    for (source, timestep), cells in percents.items():
        named = [NAMES.get(source, source), timestep or "clean", *(cells[pool] for pool in pools)]
        lines.append(f"| {' | '.join(named)} |")
    return "\n".join(lines)


@cache
def study_table() -> str:
    """The main table: SA, PC and both of each arm, and how PC and SA differ from the control's."""
    return by_table(*_study())["main"].scores()


def further_table() -> str:
    """The arms of all tables after the main one, each compared with its own control."""
    left_out = {"checks", "violation", "motion, px"}
    rows = []
    for name, table in by_table(*_study()).items():
        for arm in table.names if name != "main" else ():
            cells = {"table": name, **table.scores_of(arm)}
            rows.append({key: cell for key, cell in cells.items() if key not in left_out})
    return in_markdown(rows)


def relations_table() -> str:
    """The results of experiments/relations.py: a line for each teacher."""
    forms: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    with (KEPT / "relations.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            forms[row["source"]][row["form"]] = row

    def auc(row: dict[str, str], of: str) -> str:
        value, low, high = (float(row[of + end]) for end in ("", "_low", "_high"))
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"

    return in_markdown(
        [
            {
                "teacher": source,
                "shared": f"{100 * float(of['whole']['shared']):.0f} %",
                "tokens": auc(of["whole"], "tokens"),
                "relations": auc(of["whole"], "relations"),
                "relations, centred": auc(of["centred"], "relations"),
                "relations of changes": auc(of["changes"], "relations"),
            }
            for source, of in forms.items()
        ]
    )


def arms_table() -> str:
    """The results of experiments/arms.py: how alignment went in training, and what it changed."""
    with (KEPT / "arms.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| arm | seeds | alignment loss, first and last steps | its gradient, of denoising's "
        "| cosine of the two | held-out denoising less control's | pixels from control's |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        loss, share, cosine, less, apart = [""] * 5
        if row["align_first"]:
            loss = f"{float(row['align_first']):.3f}, {float(row['align_last']):.3f}"
        if row["gradient_ratio"] and float(row["gradient_ratio"]):
            share = f"{100 * float(row['gradient_ratio']):.0f} %"
            cosine = f"{float(row['gradient_cosine']):+.3f}"
        if row["less_control"]:
            less = f"{float(row['less_control']):+.5f} ± {1.96 * float(row['error']):.5f}"
        if row["apart"]:
            apart = f"{float(row['apart']):.1f}"
        cells = [row["arm"], row["seeds"], loss, share, cosine, less, apart]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@cache
def _measured() -> Measured:
    return Measured(StudyRecipe.from_yaml(MAP), read_measured(KEPT / MEASURED))


@cache
def _confirmed(path: Path = CONFIRMATION) -> Measured:
    """What was measured in the confirmation's folder, as one of its studies."""
    kept = (NAMES_KEPT[name][MEASURED] for name in CONFIRMED)
    rows = [row for name in kept for row in read_measured(KEPT / name)]
    return Measured(StudyRecipe.from_yaml(path), rows)


def controls_table() -> str:
    """The positive controls and the control's steps, as they were measured."""
    groups = _measured().groups()
    return _measured().table([*groups["main"], *groups.get("steps", [])])


def map_table() -> str:
    """What was changed around one cell: a line for each arm, with its table of arms."""
    measured, rows = _measured(), []
    controls = {measured.recipe.control_of(name) for name in measured.recipe.arms}
    for group, names in measured.groups().items():
        if group in ("main", "steps"):
            continue
        gains = measured.gains(names, LOSS)
        for name in names:
            if name in gains and name not in controls:
                rows.append({"changed": group, **measured.cells(name, {LOSS: gains[name]})})
    return in_markdown(rows)


def shapes_table() -> str:
    """Other shapes of the base model's transformer, beside the shipped one."""
    kept = read_measured(KEPT / NAMES_KEPT["shapes"][MEASURED])
    measured = Measured(StudyRecipe.from_yaml(SHAPES), kept)
    return measured.table(measured.groups()["shape"], [LOSS])


def readout_table() -> str:
    """What experiments/readout.py found of the truth in the aligned block.

    Trainings of one arm, which end in their seed, are one line: their mean and their range.
    """
    values: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    with (KEPT / "readout.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["at"] == "block 4":
                for part in READ:
                    value = float(row[part])
                    values[row["model"].rstrip("-0123456789")][part, row["noise"]].append(value)

    def cell(of: list[float]) -> str:
        span = f" [{min(of):.3f}, {max(of):.3f}]" if len(of) > 1 else ""
        return f"{np.mean(of):.3f}{span}"

    return in_markdown(
        [
            {"model": name, "trainings": str(len(next(iter(of.values()))))}
            | {f"{p}, noise {n}": cell(of[p, n]) for p in READ for n in ("0.1", "0.9")}
            for name, of in values.items()
        ]
    )


def spread_table() -> str:
    """What experiments/spread.py found of relations: their mean and spread, and what is alike."""
    titles = {
        "source": "relations of",
        "mean": "mean",
        "places": "vary over places",
        "clips": "vary between clips",
        "like_places": "like base's, places",
        "like_clips": "like base's, clips",
        "like_truth": "like the truth's",
    }
    return in_markdown([{title: row[key] for key, title in titles.items()} for row in _spread()])


def _spread() -> list[dict[str, str]]:
    with (KEPT / "spread.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["noise"] == SPREAD_AT]


def told_table() -> str:
    """How much of each teacher's relations is about the clip, beside what it gained."""
    rows = {row["source"]: row for row in _spread()}
    lines = []
    for teacher, (study, arm) in TOLD.items():
        places, clips = (float(rows[teacher][key]) ** 2 for key in ("places", "clips"))
        measured = _measured() if study == "map" else _further(study)
        gain = measured.gain(arm, measured.recipe.control, LOSS)
        assert gain is not None
        lines.append(
            {
                "relations of": teacher,
                "about the clip": f"{clips / (places + clips):.0%}".replace("%", " %"),
                "like the truth's": rows[teacher]["like_truth"],
                "loss: gain": change_text(LOSS, gain.of.value),
                "by seed": _by_seed(gain),
            }
        )
    return in_markdown(lines)


def confirmed_table() -> str:
    """The arms that were to be confirmed, as they were measured."""
    return _confirmed().table(list(_confirmed().recipe.arms))


def bare_table() -> str:
    """The arms without a projector, beside those with one."""
    return _by_family(_confirmed(BARE))


def bare_against_table() -> str:
    """How these arms differ from one another."""
    return _against(_confirmed(BARE), BARE_AGAINST)


def free_table() -> str:
    """The arms with free mean and spread, beside TRD."""
    return _by_family(_confirmed(FREE))


def free_against_table() -> str:
    """How these arms differ from one another."""
    return _against(_confirmed(FREE), FREE_AGAINST)


def lasting_table() -> str:
    """The arms that were trained for longer, what they have beside places, and their pairs."""
    measured = _of_its_own("lasting")
    arms = [name for group in measured.groups().values() for name in group]
    pairs = measured.table(arms, [LIKELIER, LOG_RATIO])
    return "\n\n".join(
        [_by_family(measured, control=True), _against(measured, LASTING_AGAINST), pairs]
    )


def plausible_table() -> str:
    """The arms that were asked what they find likelier, and what is more than their loss brings."""
    measured = _of_its_own("plausible")
    names = [name for name in measured.groups()["main"] if name != measured.recipe.control]
    against = _against(measured, PLAUSIBLE_AGAINST, LOG_RATIO)
    return "\n\n".join([measured.table(names), against, _beyond_loss(measured, names)])


def finished_table(name: str) -> str:
    """The arms that began from the finished model, and their differences in PC by seed."""
    measured = _of_its_own(name)
    control = measured.recipe.control
    arms = [arm for arm in measured.recipe.arms if arm != control]
    against = [[(arm, control) for arm in arms], [(control, BASE)]]
    differences = [_against(measured, pairs, "pc") for pairs in against]
    return "\n\n".join([measured.table(arms, [LOSS, *OF_CLIPS]), *filter(None, differences)])


def finished_together_table() -> str:
    """TRD's gains over the trainings of all studies of the finished model."""
    studies = [_of_its_own(name) for name in FINISHED]
    cells = {"difference": "trd less control"}
    for measure in (LOSS, *OF_CLIPS):
        found = [study.gain("trd", study.recipe.control, measure) for study in studies]
        gain = _alone([value for of in found if of is not None for value in of.by_seed])
        cells["trainings"] = str(len(gain.by_seed))
        cells[f"{measure}: gain"] = studies[0].cell(gain, measure)
    return in_markdown([cells])


def _beyond_loss(measured: Measured, names: Sequence[str]) -> str:
    """What is left of gains in log ratio less what the gains in loss bring.

    The control's longer training tells how much log ratio a unit of loss brings.
    """
    control = measured.recipe.control
    (longer,) = set(measured.recipe.scale) - {control}
    brought = [measured.gain(longer, control, measure) for measure in (LOG_RATIO, LOSS)]
    ratio, loss = (gain.of.value for gain in brought if gain is not None)
    rows = []
    for name in names:
        both = [measured.gain(name, control, measure) for measure in (LOG_RATIO, LOSS)]
        by_seed = [gain.by_seed for gain in both if gain is not None]
        left = [ours - ratio / loss * of_loss for ours, of_loss in zip(*by_seed, strict=True)]
        gain = _alone(left)
        rows.append(
            {
                "arm": name,
                "log ratio: gain beyond the loss's": measured.cell(gain, LOG_RATIO),
                "by seed": _by_seed(gain, LOG_RATIO),
            }
        )
    return in_markdown(rows)


def _alone(by_seed: Sequence[float]) -> Gain:
    """A gain that is the only one of its family, and has no worth in steps."""
    of = mean_of_few(by_seed)
    return Gain(of, tuple(by_seed), (math.nan, math.nan, math.nan), of.p)


@cache
def _of_its_own(name: str) -> Measured:
    """What was measured in the folder of a study that has a control of its own."""
    kept = read_measured(KEPT / NAMES_KEPT[name][MEASURED])
    return Measured(StudyRecipe.from_yaml(_recipe(name)), kept)


def family_table(name: str) -> str:
    """The arms of a further recipe, and how they differ from others."""
    measured = _further(name)
    return _by_family(measured, name) + "\n\n" + _against(measured, FAMILIES[name])


def _further(name: str) -> Measured:
    return _confirmed(_recipe(name))


def _recipe(name: str) -> Path:
    return CONFIRMATION.with_name(f"{name}.yaml")


def _by_family(measured: Measured, only: str = "", *, control: bool = False) -> str:
    """A line for each arm, of one table or of all, with its gain by seed. Each family is adjusted
    for itself. The study's control has a line if it is asked for."""
    rows = [measured.cells(measured.recipe.control, {LOSS: None})] if control else []
    for names in _groups(measured, only).values():
        for name, gain in measured.gains(names, LOSS).items():
            rows.append({**measured.cells(name, {LOSS: gain}), "by seed": _by_seed(gain)})
    return in_markdown(rows)


def _groups(measured: Measured, only: str) -> dict[str, list[str]]:
    """The measured arms of one table, or of all for ""."""
    return {name: arms for name, arms in measured.groups().items() if only in ("", name)}


def _against(measured: Measured, pairs: Sequence[tuple[str, str]], measure: str = LOSS) -> str:
    """A line for each pair of arms; the pairs are one family."""
    found = {f"{arm} less {other}": measured.gain(arm, other, measure) for arm, other in pairs}
    gains = {name: gain for name, gain in found.items() if gain is not None}
    adjusted = holm([gain.of.p for gain in gains.values()])
    return in_markdown(
        [
            {
                "difference": name,
                f"{measure}: gain": measured.cell(replace(gain, p_holm=p), measure),
                "by seed": _by_seed(gain, measure),
            }
            for (name, gain), p in zip(gains.items(), adjusted, strict=True)
        ]
    )


def _by_seed(gain: Gain, measure: str = LOSS) -> str:
    """The gains of single trainings; of the loss in units of 1e-5."""
    return ", ".join(change_text(measure, value).removesuffix("e-5") for value in gain.by_seed)


def confirmed_clips_table() -> str:
    """The mean scores of the clips that these arms generated."""
    return _confirmed().table(list(_confirmed().recipe.arms), OF_CLIPS)


def calibration_table() -> str:
    """Which measure orders what is known to differ; of the laws the mean alone."""
    lines = _measured().calibration().splitlines()
    by_law = (f"| {LIKELIER}, ", f"| {LOG_RATIO}, ")
    return "\n".join(x for x in lines if not x.startswith(by_law) or f", {ALL} |" in x)


def gains() -> Figure:
    """Draw the gains in held-out loss: of all arms, by seed, and of some by noise level."""
    screened, confirmed = _measured(), _confirmed(BARE)
    lasting, plausible = _of_its_own("lasting"), _of_its_own("plausible")
    longer = f", fresh, {lasting.recipe.recipe.optim.steps:,} steps"
    ordered = ("both", "image", "free", "free-places", "near")
    families = ((_further(name), name, ", fresh") for name in ordered)
    drawn = []
    for measured, only, remark in (
        (lasting, "", longer),
        (plausible, "main", f", again{longer}"),
        *families,
        (confirmed, "", ", fresh"),
        (screened, "", ""),
    ):
        for name in _treated(measured, only):
            control = measured.recipe.control_of(name)
            gain = measured.gain(name, control, LOSS)
            if gain is not None and len(gain.by_seed) > 1:
                mean = float(np.mean([*measured.of(control, LOSS).values()]))
                drawn.append((name + remark, "C1" if remark else "C0", gain, 100 / mean))
    figure = Figure(figsize=(9, max(3.2, 1.2 + 0.17 * len(drawn))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    for place, (_, colour, gain, percent) in enumerate(drawn):
        reach = [[gain.of.value - gain.of.low], [gain.of.high - gain.of.value]]
        left.errorbar(
            percent * gain.of.value, place, xerr=percent * np.array(reach), fmt="o", color=colour
        )
        of_seeds = percent * np.array(gain.by_seed)
        left.plot(of_seeds, [place] * len(of_seeds), "|", color=colour, ms=9)
    left.axvline(0, color="gray", linestyle=":")
    left.set_xscale("symlog", linthresh=1)
    left.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    left.margins(y=0.5 / len(drawn))
    left.set_yticks(range(len(drawn)), [label for label, *_ in drawn])
    left.invert_yaxis()
    left.set_xlabel("less held-out loss than the control, %\n(dots with 95 %, lines by seed)")
    levels = [part for part in screened.parts[LOSS] if part != ALL]
    by_level = [(confirmed, name) for name in BY_LEVEL]
    by_level += [(_confirmed(FREE), name) for name in FREE_BY_LEVEL]
    by_level.append((screened, "clips-120"))
    for number, (measured, name) in enumerate(by_level):
        control = measured.recipe.control_of(name)
        of = [measured.gain(name, control, LOSS, x) for x in levels]
        base = [float(np.mean([*measured.of(control, LOSS, x).values()])) for x in levels]
        value, low, high = (
            np.array([100 * getattr(g.of, k) / b for g, b in zip(of, base, strict=True) if g])
            for k in ("value", "low", "high")
        )
        where = np.arange(len(levels)) + 0.08 * number
        right.errorbar(where, value, (value - low, high - value), marker="o", label=name)
    right.axhline(0, color="gray", linestyle=":")
    right.set_yscale("symlog", linthresh=1)
    right.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
    right.set_xticks(range(len(levels)), levels, rotation=45)
    right.set_xlabel("the same, by the noise's share\nof the variance")
    labelled = right.get_legend_handles_labels()
    figure.legend(*labelled, frameon=False, fontsize=8, ncol=3, loc="outside upper right")
    return figure


def _treated(measured: Measured, only: str) -> Iterator[str]:
    """The arms, of one table or of all, that are neither a control nor one of its scale."""
    recipe = measured.recipe
    plain = {*recipe.scale, *map(recipe.control_of, recipe.arms)}
    for names in _groups(measured, only).values():
        yield from (name for name in names if name not in plain)


@cache
def _continued() -> dict[str, list[Row]]:
    """What experiments/continuation.py kept, by arm."""
    arms: dict[str, list[Row]] = defaultdict(list)
    with (KEPT / "continuation.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            arms[row["arm"]].append(row)
    return arms


def _by_clip(rows: Sequence[Row], column: str) -> dict[str, list[float]]:
    """A column's values of each clip, of all seeds."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row[column]:
            values[row["clip"]].append(float(row[column]))
    return values


def _mean(rows: Sequence[Row], column: str) -> tuple[float, float, float]:
    """The mean over clips, each a mean over seeds, and its 95 % interval over clips."""
    means = [float(np.mean(values)) for values in _by_clip(rows, column).values()]
    return float(np.mean(means)), *paired_bootstrap([[value] for value in means])


def continued_table() -> str:
    """How far the continuations of each arm are off, and how TRD differs from the control."""
    lines = []
    for arm, rows in _continued().items():
        cells = {"arm": CONTINUATIONS.get(arm, arm), "clips": str(len(rows))}
        for column, title in ERROR_TITLES.items():
            value, low, high = _mean(rows, column)
            cells[title] = f"{value:.2f} [{low:.2f}, {high:.2f}]"
        if rows[0]["sa"]:
            cells["lost, %"] = f"{_mean(rows, 'lost')[0]:.1f}"
            for flag, title in {"sa": "SA, %", "pc": "PC, %", "joint": "joint, %"}.items():
                cells[title] = f"{100 * _mean(rows, flag)[0]:.0f}"
        lines.append(cells)
    return in_markdown(lines)


def continued_less_table() -> str:
    """TRD less the control in each error, of the same clips and noise."""
    arms, lines = _continued(), []
    for column, title in ERROR_TITLES.items():
        theirs = {(row["clip"], row["seed"]): float(row[column]) for row in arms["control"]}
        of_clips: dict[str, list[float]] = defaultdict(list)
        of_seeds: dict[str, list[float]] = defaultdict(list)
        for row in arms["trd"]:
            difference = float(row[column]) - theirs[row["clip"], row["seed"]]
            of_clips[row["clip"]].append(difference)
            of_seeds[row["seed"]].append(difference)
        clips, seeds = list(of_clips.values()), [float(np.mean(d)) for d in of_seeds.values()]
        of_few, (low, high) = mean_of_few(seeds), paired_bootstrap(clips)
        lines.append(
            {
                "TRD less control": title,
                "difference": f"{of_few.value:+.3f}",
                "95 % over clips": f"[{low:+.3f}, {high:+.3f}], p {sign_flip(clips):.2f}",
                "by seed": ", ".join(f"{value:+.3f}" for value in seeds),
                "95 % over seeds": f"[{of_few.low:+.3f}, {of_few.high:+.3f}], p {of_few.p:.2f}",
            }
        )
    return in_markdown(lines)


def continued() -> Figure:
    """Draw how far continuations are off over time, with 95 % intervals over clips."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = {"p": "position off, pixels", "v": "velocity off, pixels per frame"}
    for axes, (letter, label) in zip(panels, labels.items(), strict=True):
        frames = np.arange(letter == "v", 17)
        for number, (arm, rows) in enumerate(_continued().items()):
            value, low, high = np.array([_mean(rows, f"{letter}{n}") for n in frames]).T
            style = ":" if arm in ("copy", "autoencoder") else "-"
            name = CONTINUATIONS.get(arm, arm)
            axes.plot(frames, value, style, color=f"C{number}", label=name)
            axes.fill_between(frames, low, high, color=f"C{number}", alpha=0.12, linewidth=0)
        axes.set_xlabel("frame")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    return figure


def filled(text: str) -> str:
    """The page's text with its tables made anew from docs/study/."""
    for name, table in TABLES.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if mark:
            text = before + mark + table() + "\n" + end + after
    return text


def probe() -> Figure:
    """Draw the models' accuracy over the noise, and what is read from clean clips as lines."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in _probed() if row["pool"] == POOL]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    for colour, source in enumerate(sources):
        of = [row for row in rows if row["source"] == source]
        percent, low, high = (
            np.array([float(r[key]) for r in of]) for key in ("percent", "low", "high")
        )
        style = {"color": f"C{colour}", "label": NAMES.get(source, source)}
        if of[0]["timestep"]:
            # Apart by a little, so that no interval hides another.
            where = np.array([float(r["timestep"]) for r in of]) + 6 * colour
            axes.errorbar(where, percent, (percent - low, high - percent), marker="o", **style)
        else:
            axes.axhline(percent[0], linestyle="--", **style)
            axes.axhspan(low[0], high[0], alpha=0.08, color=f"C{colour}")
    axes.axhline(50, color="gray", linestyle=":")
    axes.set_xlabel("timestep of the noise that a model is given, of 1,000")
    axes.set_ylabel("contact foreseen, %")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def curves() -> Figure:
    """Draw SA and PC over the training steps, with 95 % intervals, of the same captions."""
    recipe, rows = _study()
    figure = Figure(figsize=(7, 3), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (score, title) in zip(panels, {"sa": "SA", "pc": "PC"}.items(), strict=True):
        for number, (arm, by_step) in enumerate(on_the_way(recipe, rows).items()):
            shares = [share(clips, score) for clips in by_step.values()]
            percent, low, high = (
                np.array([of[key] for of in shares]) for key in ("percent", "low", "high")
            )
            # Apart by a little, so that no interval hides another.
            where = np.array(list(by_step)) + 4 * number
            axes.errorbar(where, percent, (percent - low, high - percent), marker="o", label=arm)
        axes.set_title(title, fontsize=10)
    panels[0].set_ylabel("clips that pass, %")
    figure.supxlabel("step", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    return figure


def differences() -> Figure:
    """Draw each arm of the main table less the control, in points with 95 % intervals."""
    table = by_table(*_study())["main"]
    arms = list(table.against("pc"))
    figure = Figure(figsize=(9, 0.6 + 0.32 * len(arms)), layout="constrained")
    titles = {"sa": "SA", "pc": "PC", "joint": "joint", "checks": "checks passed"}
    titles[VIOLATION] = "violation"
    panels = figure.subplots(1, len(titles), sharey=True)
    for axes, (score, title) in zip(panels, titles.items(), strict=True):
        compared = list(table.against(score).values())
        value, low, high = (
            np.array([getattr(d, k) for d in compared]) for k in ("value", "low", "high")
        )
        axes.axvline(0, color="gray", linestyle=":")
        axes.errorbar(value, range(len(arms)), xerr=(value - low, high - value), fmt="o", ms=4)
        axes.set_title(title, fontsize=10)
        axes.locator_params(axis="x", nbins=3)
        axes.set_yticks(range(len(arms)), arms)
    panels[0].invert_yaxis()
    figure.supxlabel("points more than the control; of violations log2 of tolerances", fontsize=10)
    return figure


def sheet(study: Path) -> Image.Image:
    """Show some arms' clips of the same captions and noise: an arm a row, every second frame."""
    first = StudyRecipe.from_yaml(study / "study.yaml").seeds[0]
    of_base = [
        row for row in read_rows(study / ROWS) if row["arm"] == BASE and row["seed"] == first
    ]
    by_scenario = {row["scenario"]: row for row in reversed(of_base)}
    shown = [by_scenario[name] for name in SHEET_SCENARIOS]
    blocks = []
    for row in shown:
        strips = [
            _strip(clips_folder(study, arm, first) / f"{row['prompt_id']}-0.mp4")
            for arm in SHEET_ARMS
        ]
        head = Image.new("RGB", (strips[0].shape[1], 18), "white")
        ImageDraw.Draw(head).text((4, 3), row["caption"], fill="black")
        blocks += [head, Image.fromarray(np.concatenate(strips))]
    return _labelled(blocks).quantize(128)


def _strip(path: Path) -> np.ndarray:
    frames = read_all(path)[0][list(SHEET_FRAMES)]
    return np.pad(np.concatenate(list(frames), 1), ((0, 2), (0, 0), (0, 0)), constant_values=255)


def _labelled(blocks: Sequence[Image.Image]) -> Image.Image:
    margin = 90
    page = Image.new(
        "RGB", (blocks[0].width + margin, sum(block.height for block in blocks)), "white"
    )
    draw, top = ImageDraw.Draw(page), 0
    for number, block in enumerate(blocks):
        page.paste(block, (margin, top))
        if number % 2:
            each = block.height / len(SHEET_ARMS)
            for place, arm in enumerate(SHEET_ARMS):
                draw.text((6, top + (place + 0.45) * each), arm, fill="black")
        top += block.height
    return page


def _study() -> tuple[StudyRecipe, list[Row]]:
    return StudyRecipe.from_yaml(RECIPE), read_rows(KEPT / ROWS)


def _probed() -> list[dict[str, str]]:
    with (KEPT / "probe.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["scenario"] == "all"]


TABLES = {
    "probe": probe_table,
    "relations": relations_table,
    "study": study_table,
    "further": further_table,
    "arms": arms_table,
    "controls": controls_table,
    "map": map_table,
    "shapes": shapes_table,
    "readout": readout_table,
    "confirmed": confirmed_table,
    "confirmed clips": confirmed_clips_table,
    "bare": bare_table,
    "bare against": bare_against_table,
    "free": free_table,
    "free against": free_against_table,
    "lasting": lasting_table,
    "plausible": plausible_table,
    "spread": spread_table,
    "told": told_table,
    "calibration": calibration_table,
    "continuation": continued_table,
    "continuation-less": continued_less_table,
    "finished together": finished_together_table,
    **{name: partial(finished_table, name) for name in FINISHED},
    **{name: partial(family_table, name) for name in FAMILIES},
}
"""The tables that stand on the pages between marks of these names."""


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        name = read_values(folder / "study.yaml")["name"]
        for made, kept in NAMES_KEPT[name].items():
            shutil.copy(folder / made, KEPT / kept)
        if name == "full":
            (KEPT / "cost.md").write_text(cost(_study()[0], folder) + "\n")
        if name == "finished":
            sheet(folder).save(DOCS / "lab-clips.png", optimize=True)
    matplotlib.rcParams["svg.hashsalt"] = "the same ids each time"
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    (KEPT / "tables.md").write_text(tables(*_study()))
    probe().savefig(DOCS / "lab-probe.svg", metadata={"Date": None})
    differences().savefig(DOCS / "lab-differences.svg", metadata={"Date": None})
    gains().savefig(DOCS / "lab-gains.svg", metadata={"Date": None})
    curves().savefig(DOCS / "lab-curves.svg", metadata={"Date": None})
    continued().savefig(DOCS / "lab-continuation.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
