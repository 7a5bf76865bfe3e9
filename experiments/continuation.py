"""Collects how far a study's continuations are off, frame by frame, and what else they scored.

Run: python experiments/continuation.py STUDY [--out docs/study/continuation.csv]

There is a row for every clip, with its mean errors, the percentage of frames in which a body is
lost, and the law checks' verdicts; then the errors of position (p0 to p16, pixels) and of velocity
(v1 to v16, pixels per frame) at each frame, as means over its bodies, empty where none is in view:

- base and the study's arms, by seed, where they are done
- copy: the true first frame, repeated
- autoencoder: the true clip, encoded and decoded by the lab's autoencoder
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from videorepa.artifacts.scores import Row, scored_rows
from videorepa.benchmarks.continuation import ERRORS, Continuations, true_clip
from videorepa.benchmarks.laws.checks import FLAGS
from videorepa.lab.calibration.tolerances import autoencoder_reconstruct, through_files
from videorepa.lab.study.arms import clips_folder
from videorepa.lab.study.recipe import BASE, StudyRecipe
from videorepa.system.files import atomic_write, csv_text
from videorepa.system.hub import micro_weights

RECIPE = Path(__file__).parents[1] / "recipes" / "micro" / "continuation.yaml"


def rows(study: StudyRecipe, out: Path) -> Iterator[dict[str, object]]:
    done = ((*job, clips_folder(out, *job) / "scores") for job in study.jobs())
    for arm, seed, scores in sorted(done, key=lambda job: [BASE, *study.arms].index(job[0])):
        for row in scored_rows(scores) if (scores / "summary.json").exists() else ():
            yield {"arm": arm, "seed": seed, "clip": row["prompt_id"]} | kept(row)
    bench = Continuations()
    reconstruct = through_files(autoencoder_reconstruct(micro_weights("cogvideox") / "vae"))
    for prompt in bench.prompts(study.prompts, 0):
        name = prompt.caption
        shown = reconstruct(true_clip(name).frames[None])[0]
        row = bench.score(shown, name)
        yield {"arm": "autoencoder", "clip": name} | kept(row)
        yield {"arm": "copy", "clip": name} | kept(row, "static_")


def kept(row: Row, of: str = "") -> dict[str, object]:
    values = {name: row[of + name] for name in ERRORS}
    if not of:
        values |= {"lost": row["lost"]} | {flag: int(row[flag]) for flag in FLAGS}
    for letter, name in zip("pv", ERRORS, strict=True):
        values |= {f"{letter}{frame}": error for frame, error in enumerate(row[f"{of}{name}s"])}
    return {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/study/continuation.csv"))
    arguments = parser.parse_args()
    found = list(rows(StudyRecipe.from_yaml(RECIPE), arguments.study))
    atomic_write(arguments.out, csv_text(list(found[0]), found))


if __name__ == "__main__":
    main()
