"""Runs the whole pipeline on the lab's micro model, on a CPU, up to a report."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from videorepa.data.simulated import simulate_clips
from videorepa.evaluate import evaluate
from videorepa.evaluation.tables import table
from videorepa.export import export
from videorepa.generate import generate
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.report import report
from videorepa.settings import plugins
from videorepa.system.device import keep_freed_memory
from videorepa.system.lock import sole_user
from videorepa.system.progress import console
from videorepa.train import train


def demo(out: Path, *, quick: bool = False) -> Path:
    """Simulate, prepare, fine-tune with and without TRD, generate, score, export and report.

    The base, control and aligned models generate with the same seeds. A second call resumes where
    the first one stopped.

    Args:
        out: The folder of all results, such as report.html.
        quick: Do only a few steps of each stage.

    Returns:
        The path of the report.

    Raises:
        UserError: Another process works in `out`.
    """
    with sole_user(out):
        return _demo(out, quick)


def _demo(out: Path, quick: bool) -> Path:
    keep_freed_memory()
    with as_file(files("videorepa.lab") / "demo.yaml") as path:
        recipe = Recipe.from_yaml(path)
    clips, prompts_count = (6, 5) if quick else (240, 20)
    changes = [f"data.manifest={out}/clips/clips.csv", f"data.cache={out}/cache"]
    if quick:
        changes += [
            "optim.steps=4",
            "optim.warmup_steps=1",
            "optim.batch_size=2",
            "generation.steps=3",
        ]
    aligned = recipe.override(*changes)
    control = aligned.override("name=micro-control", "align.weight=0")
    base = out / "base.yaml"

    _say("1/6  simulating clips")
    simulate_clips(out / "clips", clips)
    aligned.to_yaml(base)
    _say("2/6  preparing latents, text embeddings and teacher features")
    prepare(aligned)
    _say("3/6  fine-tuning with token relation distillation, then without")
    runs = {
        "aligned": train(aligned, out / "runs" / "aligned"),
        "control": train(control, out / "runs" / "control"),
    }
    _say("4/6  generating with the same seeds from base, control and aligned model")
    prompts = plugins.benchmark("lab").prompts(prompts_count, seed=0)
    models = {"base": base, "control": runs["control"].path, "aligned": runs["aligned"].path}
    folders = {name: out / "generated" / name for name in models}
    for name, model in models.items():
        _say(f"     {name}")
        generate(model, prompts, folders[name])
    _say("5/6  scoring and exporting")
    against = {"base": None, "control": folders["base"], "aligned": folders["control"]}
    evaluations = {
        name: evaluate("lab", folder, against=against[name]) for name, folder in folders.items()
    }
    exported = out / "exported"
    export(runs["aligned"].path, exported)
    _say("6/6  writing the report")
    page = report(
        [run.path for run in runs.values()],
        out / "report.html",
        generations=folders,
        scores={name: [scores.folder] for name, scores in evaluations.items()},
        title="VideoREPA demo: does alignment with a video encoder improve physics?",
        command="videorepa demo",
    )
    print(table(evaluations))
    print(
        f"The demo shows the whole path. It cannot show a gain: {prompts_count} clips of a model "
        "that had learnt all of this before tell nothing apart. What the lab could show, and what "
        "not: docs/answer.md"
    )
    print(f"exported transformer, checked in plain diffusers: {exported / 'transformer'}")
    return page


def _say(message: str) -> None:
    console.print(message, style="bold")
