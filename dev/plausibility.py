"""Makes docs/likelihood.md's table and figure: python dev/plausibility.py [LIKELIHOOD]

Given the folder that `videorepa likelihood` wrote, it first copies its numbers into
docs/likelihood.json.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from videorepa.artifacts.scores import Scores
from videorepa.evaluation.likelihood import FOLDER, preference
from videorepa.report.likelihoods import ALL, preferences
from videorepa.system.environment import environment

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "likelihood.md"
KEPT = DOCS / "likelihood.json"
SMALLER = "smaller latents"
MODELS = ("base", "untrained", SMALLER)
ENDS = ("percent", "low", "high")
COLUMNS = ("law", "degree", "noise", "model", "percent", "low", "high", "pairs", "ties")


def kept(folder: Path) -> str:
    """The numbers of a measurement as JSON, a line for each."""
    scored = {path.name: Scores.read(path) for path in sorted((folder / FOLDER).iterdir())}
    lines = []
    for each in preferences(scored):
        place = (each.law, each.degree, each.noise, each.model)
        lines.append(_line(place, each.metric))
        if each.model == "base" and each.noise is None:
            rows = [
                row
                for row in scored["base"].rows
                if each.law in (ALL, row["law"]) and each.degree in (None, row["degree"])
            ]
            lines.append(_line((*place[:3], SMALLER), preference(rows, "smaller")))
    head = {"environment": environment(), "columns": COLUMNS}
    body = ",\n".join(json.dumps(line) for line in lines)
    return f'{json.dumps(head)[:-1]},\n"rows": [\n{body}\n]}}\n'


def _line(place: tuple[Any, ...], metric: Any) -> list[Any]:
    shares = [metric[key] and round(metric[key], 1) for key in ENDS]
    return [*place, *shares, metric["n"], metric["invalid"]]


def _rows() -> Iterator[dict[str, Any]]:
    for row in json.loads(KEPT.read_text())["rows"]:
        yield dict(zip(COLUMNS, row, strict=True))


def table() -> str:
    """The share of each law over all degrees and noise shares, and of all laws by noise share."""
    cells: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in _rows():
        if row["degree"] is not None or (row["law"] != ALL and row["noise"] is not None):
            continue
        place = row["law"], "all" if row["noise"] is None else row["noise"]
        interval = f"[{row['low']:.0f}, {row['high']:.0f}]"
        cells[place][row["model"]] = f"{row['percent']:.0f} {interval}"
    lines = [f"| law | noise | {' | '.join(MODELS)} |", "|---|---|---|---|---|"]
    for (law, noise), of in cells.items():
        lines.append(f"| {law} | {noise} | {' | '.join(of.get(m, '') for m in MODELS)} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """The page's text with its table made anew."""
    before, mark, rest = text.partition("<!-- likelihood -->\n")
    _, end, after = rest.partition("<!-- end -->")
    return before + mark + table() + "\n" + end + after


def curves() -> Figure:
    """For each law the shares over the degrees, over all noise levels and at each."""
    by_curve: dict[str, dict[tuple[str, str | None], list[dict[str, Any]]]] = {}
    for row in _rows():
        if row["degree"] is not None and row["model"] != SMALLER:
            curve = by_curve.setdefault(row["law"], {})
            curve.setdefault((row["model"], row["noise"]), []).append(row)
    levels = sorted({row["noise"] for row in _rows() if row["noise"] is not None})
    figure = Figure(figsize=(9, 8.5), layout="constrained")
    handles: Any = ()
    for axes, (law, of_law) in zip(figure.subplots(3, 4).flat, by_curve.items(), strict=True):
        for (model, noise), rows in of_law.items():
            y, low, high = (np.array([row[key] for row in rows]) for key in ENDS)
            if noise is None:
                colour = "black" if model == "base" else "tab:red"
                span = y - low, high - y
                axes.errorbar(range(len(y)), y, span, color=colour, marker="o", ms=4, label=model)
            elif model == "base":
                colour = matplotlib.colormaps["viridis"](levels.index(noise) / len(levels))
                axes.plot(y, color=colour, marker=".", alpha=0.7, label=f"base, noise {noise}")
            axes.set_xticks(range(len(y)), [f"{row['degree']:g}" for row in rows])
        axes.axhline(50, color="gray", linestyle=":")
        axes.set_title(law, fontsize=10)
        axes.set_ylim(-3, 103)
        handles = axes.get_legend_handles_labels()
    figure.supylabel("real clip likelier, %, over degrees")
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def main() -> None:
    for folder in sys.argv[1:]:
        KEPT.write_text(kept(Path(folder)))
    PAGE.write_text(filled(PAGE.read_text()))
    matplotlib.rcParams["svg.hashsalt"] = "the same ids each time"
    curves().savefig(DOCS / "lab-likelihood.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
