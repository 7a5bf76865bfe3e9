"""Physics-IQ Verified (arXiv 2606.18943): refined films, a score by sample, and several runs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from videorepa.artifacts.scores import Row
from videorepa.benchmarks._physics_iq import METRICS, VERIFIED, Filmed, experiment
from videorepa.errors import UserError
from videorepa.evaluation.pairs import Pairs
from videorepa.evaluation.statistics import paired_bootstrap, sign_flip
from videorepa.system.files import check_is_file, check_is_folder
from videorepa.system.fingerprint import file_sample_digest

_RUN = re.compile(r"(?P<of>.*?)-?run_(?P<number>\d+)")


def sample_scores(metrics: dict[str, float], of: str = "") -> dict[str, float]:
    """The score of one clip, 0 to 100, and its four equal parts.

    A part is the clip's metric over that of the two takes, clipped to [0, 1]; for the MSE, the
    takes' over the clip's. As published, 1e-8 is added to the takes' metric.

    Args:
        metrics: METRIC and METRIC_takes for each of METRICS.
        of: "_static" for the score of repeating the first frame.
    """
    parts = {}
    for key in METRICS:
        takes, value = metrics[f"{key}_takes"] + 1e-8, metrics[f"{key}{of}"]
        share = value / takes if key != "mse" else takes / value if value else 1.0
        parts[f"score_{key}{of}"] = 100.0 * min(max(share, 0.0), 1.0)
    return {f"score{of}": sum(parts.values()) / len(parts)} | parts


class PhysicsIQVerified(Filmed):
    """Continuations of filmed experiments, compared with what happened, by the refined benchmark.

    The folder to score holds one run's videos, named as for Physics-IQ, or a folder for each run:
    run_01 to run_04, or MODEL-bpp-run_01 and so on. The run is the clip's sample number, from 0.

    Attributes:
        data: The folder that the files were downloaded to: physics-IQ-benchmark-verified, or the
            one that it lies in. Masks are those of the files; none is computed.
        descriptions: One of the published descriptions_*.csv, to generate from and for tables by
            category.
    """

    name: Literal["physics_iq_verified"] = "physics_iq_verified"
    version: ClassVar[str] = "3"
    makes_masks: ClassVar[bool] = False
    describing: ClassVar[str] = "; name its list, --set descriptions=descriptions_base.csv"
    samples: ClassVar[int | None] = 4
    descriptions: Path | None = None

    @property
    def root(self) -> Path:
        check_is_folder(self.data, "the folder of Physics-IQ Verified's files")
        for folder in (self.data / VERIFIED, self.data):
            if folder.resolve().name == VERIFIED and folder.is_dir():
                return folder
        raise UserError(
            f"{self.data} is no {VERIFIED} and holds none. The files of the first Physics-IQ have "
            "the same names and give other scores; give the folder as it was downloaded."
        )

    @property
    def described(self) -> Path | None:
        if self.descriptions is not None:
            check_is_file(self.descriptions)
        return self.descriptions

    def clips(self, videos: Path) -> list[tuple[Path, dict[str, Any]]]:
        """The clips of all runs.

        Raises:
            UserError: A run is there twice, runs are of several models, clips lie beside the runs,
                or two runs hold the same file.
        """
        runs = _runs(videos)
        if not runs:
            return super().clips(videos)
        clips = [
            (path, about | {"k": number - 1})
            for number, folder in sorted(runs.items())
            for path, about in super(PhysicsIQVerified, self).clips(folder)
        ]
        _check_runs_differ(clips)
        return clips

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        """Compare one clip with the filmed takes.

        Returns:
            What `Filmed.score` returns; score, 0 to 100, and its parts score_METRIC; and the same
            of repeating the first frame, with _static behind it.
        """
        metrics = super().score(frames, prompt)
        return metrics | sample_scores(metrics) | sample_scores(metrics, "_static")

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """The score of the clips and of repeating the first frame (static_score), with bootstrap
        intervals over experiments; and the means of the score's four parts.

        n counts clips, prompts experiments. The score has "runs", each with its own score, and
        "deviation", their standard deviation: None for a single run, or if the runs are not of the
        same samples.
        """
        metrics: dict[str, dict[str, Any]] = {}
        for name, key in (("score", "score"), ("static_score", "score_static")):
            samples = _by_experiment(rows, [row[key] for row in rows])
            low, high = paired_bootstrap(samples)
            percent = float(np.mean(np.concatenate(samples)))
            metrics[name] = {"percent": percent, "low": low, "high": high, "n": len(rows)}
            metrics[name]["prompts"] = len(samples)
        runs: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            runs[row["k"]].append(row)
        by_run = [float(np.mean([row["score"] for row in run])) for run in runs.values()]
        captions = [sorted(row["caption"] for row in run) for run in runs.values()]
        alike = len(runs) > 1 and all(of_run == captions[0] for of_run in captions)
        metrics["score"]["runs"] = [
            {"k": k, "score": score, "n": len(runs[k])}
            for k, score in zip(runs, by_run, strict=True)
        ]
        metrics["score"]["deviation"] = float(np.std(by_run, ddof=1)) if alike else None
        for metric in METRICS:
            key = f"score_{metric}"
            parts = np.concatenate(_by_experiment(rows, [row[key] for row in rows]))
            metrics[key] = {"mean": float(parts.mean()), "n": len(rows)}
        return metrics

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        """B's score minus A's over the samples and runs that both have.

        The interval is a bootstrap's over experiments, and p is that of flipping the signs of whole
        experiments.
        """
        paired = Pairs.of(rows_a, rows_b)
        theirs = [b for _, b in paired.pairs]
        samples = _by_experiment(theirs, [b["score"] - a["score"] for a, b in paired.pairs])
        low, high = paired_bootstrap(samples)
        difference = {
            "difference": float(np.mean(np.concatenate(samples))),
            "low": low,
            "high": high,
            "n": len(theirs),
            "prompts": len(samples),
            "p": sign_flip(samples),
        }
        return {"score": difference, "unpaired": paired.unpaired}


def _by_experiment(rows: Sequence[Row], values: Sequence[float]) -> list[list[float]]:
    """A value for each sample, a view of an experiment, as its mean over runs; by experiment."""
    samples: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        samples[row["caption"]].append(value)
    experiments: dict[str, list[float]] = defaultdict(list)
    for caption, of_runs in sorted(samples.items()):
        experiments[experiment(caption)].append(float(np.mean(of_runs)))
    return [experiments[name] for name in sorted(experiments)]


def _runs(videos: Path) -> dict[int, Path]:
    """The folders of runs, by their numbers from 1."""
    found = {
        folder: match
        for folder in sorted(videos.iterdir())
        if folder.is_dir() and (match := _RUN.fullmatch(folder.name))
    }
    if not found:
        return {}
    if len({match["of"] for match in found.values()}) > 1:
        raise UserError(
            f"{videos} holds runs of several models or prompts ({', '.join(f.name for f in found)})"
            ". Expected one model's runs of the same prompts; put the others elsewhere."
        )
    if loose := sorted(videos.glob("*.mp4")):
        raise UserError(
            f"{loose[0]} lies beside the runs of {videos}. Move it into its run, or take it away."
        )
    runs = {int(match["number"]): folder for folder, match in found.items()}
    if len(runs) < len(found) or 0 in runs:
        raise UserError(
            f"{videos} holds the runs {', '.join(f.name for f in found)}; expected each number "
            "once, from 1."
        )
    return runs


def _check_runs_differ(clips: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Runs are drawn anew. A copy of one would make the deviation too small."""
    seen: dict[tuple[str, str], Path] = {}
    for path, about in clips:
        key = (about["prompt_id"], file_sample_digest(path))
        if key in seen:
            raise UserError(
                f"{seen[key]} and {path} are the same file. Expected runs with different seeds; "
                "take the copy away."
            )
        seen[key] = path
