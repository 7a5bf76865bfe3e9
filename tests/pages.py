"""Runs, clips and scores as the verbs leave them, for tests of pages: made up, and soon written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from videorepa.data.video import write_video
from videorepa.report import report

FRAMES, SIZE, FPS = 17, 64, 8
STEPS = 120
MODELS = ("base", "control", "aligned")
HOSTILE = "</details><script>alert(1)</script>\n\"quoted\" & 'single' 🏀 "


@dataclass
class Material:
    """Everything a report can be made from."""

    runs: list[Path] = field(default_factory=list)
    generations: dict[str, Path] = field(default_factory=dict)
    scores: dict[str, list[Path]] = field(default_factory=dict)

    def write(self, out: Path, **more) -> str:
        report(self.runs, out, generations=self.generations, scores=self.scores, **more)
        return out.read_text("utf-8")


class Tags(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag == name]

    def clips(self) -> list[dict[str, str | None]]:
        return [attributes for attributes in self.named("div") if "data-clip" in attributes]


def ball(shade: int, shift: int) -> np.ndarray:
    frames = np.full((FRAMES, SIZE, SIZE, 3), 230, np.uint8)
    frames[:, 54:] = (115, 102, 92)
    for time in range(FRAMES):
        left = 4 + (3 * time + shift) % 48
        frames[time, 42:54, left : left + 12] = (220, shade, 40)
    return frames


def write_run(folder: Path, weight: float, steps: int = STEPS) -> Path:
    folder.mkdir(parents=True)
    recipe = f"align:\n  weight: {weight}\n  margin: 0.1\ntrain:\n  seed: 0\n"
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "commit": "abc1234"}))
    rng = np.random.default_rng(round(1000 * weight))
    with open(folder / "log.jsonl", "w") as log:
        for step in range(1, steps + 1):
            fade, noise = np.exp(-3 * step / steps), rng.normal(0, 0.02)
            row = {
                "step": step,
                "loss": 0.4,
                "denoise": 0.15 + 0.1 * fade + noise,
                "align": 0.5 - 0.4 * weight * (1 - fade) + noise,
                "similarity": 0.3 + 0.8 * weight * (1 - fade) + noise,
                "grad_norm": 0.5 + fade + abs(noise),
                "grad_denoise": 0.02 + 0.02 * fade + abs(noise),
                "lr": 1e-4,
                "clips_per_second": 6.5 + 10 * noise,
                "memory_gb": 1.2,
            }
            if weight:
                row["grad_align"] = 0.01 + abs(noise)
            log.write(json.dumps(row) + "\n")
    return folder


def write_sidecar(clip: Path, prompt_id: str, prompt: str, k: int = 0, **more) -> None:
    """As `generate` writes it, beside the clip."""
    about = {"prompt_id": prompt_id, "prompt": prompt, "k": k, "seed": 1000 + k}
    about |= {"fps": FPS, "frames": FRAMES, "height": SIZE, "width": SIZE}
    about |= {"steps": 20, "guidance_scale": 3.0, "model": clip.parent.name}
    clip.with_suffix(".json").write_text(json.dumps(about | more))


def write_generation(
    folder: Path, shade: int, prompts: Mapping[str, str], samples: int = 1
) -> Path:
    folder.mkdir(parents=True)
    for number, (prompt_id, prompt) in enumerate(prompts.items()):
        for k in range(samples):
            clip = folder / f"{prompt_id}-{k}.mp4"
            write_video(clip, ball(shade, 5 * number + k), FPS)
            write_sidecar(clip, prompt_id, prompt, k)
    return folder


def write_scores(
    folder: Path,
    prompts: Mapping[str, str],
    sa: float,
    against: str | None = None,
    *,
    benchmark: str = "lab",
    passing: str = "",
) -> Path:
    """passing: the ids that obey physics; by default every second one."""
    folder.mkdir(parents=True)
    with open(folder / "scores.jsonl", "w") as table:
        for number, prompt_id in enumerate(prompts):
            pc = prompt_id in passing.split() if passing else bool(number % 2)
            row = {
                "prompt_id": prompt_id,
                "k": 0,
                "scenario": prompt_id.partition("-")[0],
                "sa": True,
                "pc": pc,
                "joint": pc,
                "motion": 3.0,
                "gravity_passed": True,
                "permanence_passed": pc,
            }
            table.write(json.dumps(row) + "\n")
    metrics = {
        "sa": {"percent": sa, "n": 48, "low": sa - 14.0, "high": sa + 12.5},
        "pc": {"percent": sa - 20, "n": 48, "low": sa - 33.1, "high": sa - 6.2},
        "joint": {"percent": sa - 24, "n": 48, "low": sa - 37.0, "high": sa - 11.0},
        "motion": {"mean": 12.34},
    }
    categories = {
        name: {"sa": metrics["sa"] | {"percent": sa + shift, "n": 24}}
        for name, shift in (("fall", 1.25), ("roll", -1.25))
    }
    failures = [{"prompt_id": "gone", "k": 0, "reason": "no <ball> was found"}]
    summary = {"benchmark": benchmark, "version": "1", "n": len(prompts), "metrics": metrics}
    summary |= {"by_scenario": categories, "failures": failures}
    (folder / "summary.json").write_text(json.dumps(summary))
    if against:
        differences = {
            "sa": {"difference": 4.2, "low": -3.0, "high": 11.0, "p": 0.3},
            "pc": {"difference": 9.1, "low": 2.5, "high": 15.5, "p": 0.0004},
        }
        comparison = {"against": against, "metrics": differences}
        (folder / "comparison.json").write_text(json.dumps(comparison))
    return folder
