"""Every verb that writes, as a command that leaves all in the folder in which it is run."""

from __future__ import annotations

from dataclasses import dataclass

from faults.ground import Ground, refining, selecting


@dataclass(frozen=True)
class Job:
    """A command, and how often it is taken among all; slow ones are taken less often."""

    name: str
    arguments: list[str]
    weight: float = 1.0


def jobs(ground: Ground) -> list[Job]:
    recipe, g = ground / "recipe.yaml", ground
    out = ["--out", "out"]
    probing = ["--protocol", "lab", "--timesteps", "0", "--draws", "1", "--pools", "1"]
    seeds = [g / f"seeds/{n}" for n in range(3)]
    return [
        Job("prepare", ["prepare", g / "many.yaml", "--data.cache", "out"]),
        Job("train", ["train", g / "whole.yaml", *out]),
        Job("train (LoRA)", ["train", g / "lora.yaml", *out]),
        Job("train (validated)", ["train", g / "validated.yaml", *out]),
        Job("generate", ["generate", g / "run", "--prompts", g / "prompts.csv", *out]),
        Job("evaluate", ["evaluate", "lab", g / "lab", *out]),
        Job("select", ["select", g / "samples", *selecting(g), *out]),
        Job("scan", ["scan", recipe, "--clips", "3", "--noise", "0.3", "0.7", *out]),
        Job("probe", ["probe", recipe, "--data", g / "contact", *probing, *out]),
        Job(
            "probe (projector)",
            ["probe", recipe, "--data", g / "contact", "--models", g / "run"]
            + ["--through-projector", *probing, *out],
            0.4,
        ),
        Job("likelihood", ["likelihood", recipe, "--pairs", g / "clips/pairs.csv", *out]),
        Job("head", ["head", recipe, "--kind", "motion", "--out", "motion.safetensors"]),
        Job("refine", ["refine", g / "prompts.csv", *refining(g), "--out", "refined.csv"]),
        Job("export", ["export", g / "run", "out"], 0.4),
        Job("export (LoRA)", ["export", g / "lora", "out"], 0.4),
        Job("import", ["import", g / "published", "out"]),
        Job("import (LoRA)", ["import", g / "published-lora.safetensors", "out", "--alpha", "4"]),
        Job(
            "report", ["report", g / "run", "--clips", g / "lab", g / "lab2", "--out", "page.html"]
        ),
        Job("verify", ["verify", recipe, "--skip", "step", "--out", "verified.json"]),
        Job("compare", ["compare", *seeds, "--make", "normal.json"]),
        Job("demo", ["demo", "--quick", *out], 0.2),
        Job("lab study", ["lab", "study", g / "study.yaml", *out], 0.4),
        Job("lab contact", ["lab", "contact", g / "contact-here.yaml"]),
    ]
