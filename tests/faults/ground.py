"""What every part of the campaign starts from: tiny models, clips, and what each verb leaves."""

from __future__ import annotations

import json
import multiprocessing
import signal
from dataclasses import dataclass
from pathlib import Path

from faults import child  # isort: skip  (before conftest: see there)

import yaml
from safetensors.torch import save_file

from conftest import make_backbone, make_teacher, recipe_values, write_clips
from test_bad_input import lab_clip, lora_weights, published
from test_refine import Scripted
from videorepa.recipe import Recipe

CLIPS, STEPS, PROMPTS = 12, 8, 4


@dataclass(frozen=True)
class Ground:
    """A folder that no part may change. url: of a server that refines prompts."""

    root: Path
    url: str

    def __truediv__(self, name: str) -> str:
        return str(self.root / name)


def serve() -> tuple[multiprocessing.process.BaseProcess, str]:
    """Start the tests' server in a process of its own, as children are forked from this one."""
    server = Scripted()
    # Not in a thread: locks that a thread holds are never released in a forked process.
    process = multiprocessing.get_context("fork").Process(
        target=_serve, args=(server,), daemon=True
    )
    process.start()
    return process, server.url


def _serve(server: Scripted) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    server.serve_forever()


def lay(root: Path, url: str) -> Ground:
    """Make everything, with the verbs themselves."""
    ground = Ground(root, url)
    process = multiprocessing.get_context("fork").Process(target=_by_hand, args=(root,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("The campaign's models and clips could not be made.")
    recipe, log = ground / "recipe.yaml", root / "log"
    probing = ["--protocol", "lab", "--timesteps", "0", "--draws", "1", "--pools", "1"]
    for arguments in (
        ["prepare", recipe],
        ["train", recipe, "--out", ground / "run"],
        ["train", ground / "lora.yaml", "--out", ground / "lora"],
        ["generate", ground / "run", "--prompts", ground / "prompts.csv", "--out", ground / "made"],
        ["evaluate", "lab", ground / "lab"],
        ["evaluate", "lab", ground / "lab2"],
        ["evaluate", "lab", ground / "samples"],
        ["select", ground / "samples", *selecting(ground), "--out", ground / "best"],
        ["scan", recipe, "--out", ground / "scan", "--clips", "3", "--noise", "0.3", "0.7"],
        ["lab", "contact", ground / "contact.yaml"],
        ["probe", recipe, "--data", ground / "contact", "--out", ground / "probe", *probing],
        ["head", recipe, "--kind", "motion", "--out", ground / "head.safetensors"],
        ["export", ground / "lora", ground / "exported"],
        ["refine", ground / "prompts.csv", "--out", ground / "refined.csv", *refining(ground)],
        ["compare", *(ground / f"seeds/{n}" for n in range(3)), "--make", ground / "normal.json"],
    ):
        if arguments[0] == "compare":
            for seed in range(3):
                out = ["--out", ground / f"seeds/{seed}", "--set", f"seed={seed}"]
                _do(["train", recipe, *out], root, log)
        _do(arguments, root, log)
    return ground


def selecting(ground: Ground) -> list[str]:
    return ["--by", ground / "samples/scores", "--column", "joint"]


def refining(ground: Ground) -> list[str]:
    return ["--model", "m", "--endpoint", ground.url]


def _do(arguments: list[str], folder: Path, log: Path) -> None:
    ended = child.run(arguments, folder, log, patience=600)
    if ended.code:
        raise SystemExit(f"videorepa {' '.join(arguments)}\n{ended.said}")


def _by_hand(root: Path) -> None:
    twins = {
        "backbone": make_backbone(root / "backbone"),
        "teacher": make_teacher(root / "teacher"),
    }
    manifest = write_clips(root / "clips", count=6)
    pairs = [f"clip{n}.mp4,clip{n + 3}.mp4,A clip.,law{n % 2}" for n in range(3)]
    text = "\n".join(["real,broken,caption,law", *pairs]) + "\n"
    (root / "clips" / "pairs.csv").write_text(text)
    many = root / "clips" / "many.csv"
    rows = [f"{n},clip{n % 6}.mp4,Clip number {n}." for n in range(CLIPS)]
    many.write_text("\n".join(["id,video,caption", *rows]) + "\n")
    prompts = [f"{n},A ball falls {n} times." for n in range(PROMPTS)]
    (root / "prompts.csv").write_text("\n".join(["id,prompt", *prompts]) + "\n")
    whole = Recipe.parse(recipe_values(twins, manifest, root / "cache"))
    whole = whole.override("generation.steps=1", "optim.steps=4")
    whole.to_yaml(root / "recipe.yaml")
    lora = whole.override("train.lora={rank: 2, alpha: 4}", f"optim.steps={STEPS}")
    lora.to_yaml(root / "lora.yaml")
    shown = "validation={every: 4, prompts: ['A ball falls.']}"
    whole.override(shown, f"optim.steps={STEPS}").to_yaml(root / "validated.yaml")
    whole.override(f"optim.steps={STEPS}").to_yaml(root / "whole.yaml")
    whole.override(f"data.manifest={many}").to_yaml(root / "many.yaml")
    made_with = {"model": "lab", "model_digest": "0", "fps": 8, "frames": 17, "height": 64}
    made_with |= {"width": 64, "steps": 1, "guidance_scale": 1.0, "dynamic_guidance": False}
    made_with |= {"samples": 1, "noise": 0}
    for folder in ("lab", "lab2"):
        for index in range(4):
            lab_clip(root / folder, index)
            sidecar = root / folder / f"{index}-0.json"
            about = json.loads(sidecar.read_text())
            sidecar.write_text(json.dumps(made_with | about | {"caption": about["prompt"]}))
    for index in range(2):
        for k in range(3):
            lab_clip(root / "samples", index, k)
    contact = {"out": str(root / "contact"), "train": 12, "test": 6}
    (root / "contact.yaml").write_text(yaml.safe_dump(contact))
    here = {"out": "out", "train": 12, "test": 6}
    (root / "contact-here.yaml").write_text(yaml.safe_dump(here))
    published(twins, root / "published")
    save_file(lora_weights(), root / "published-lora.safetensors")
    answer = {"prompt_id": "0", "k": 0, "question": "pc", "preferred": "left", "seconds": 1.0}
    answer |= {"left": "0", "right": "1"}
    ratings = {"format": "videorepa ratings 1", "rater": "ada", "ratings": [answer]}
    (root / "ratings.json").write_text(json.dumps(ratings))
    people = [
        {"model": "lab", "video": f"{n}.mp4", "physical_laws": ["gravity"], "na_laws": []}
        | {"scores": {"general": {"SA": n + 1}, "physical": {"gravity": 4 - n}}}
        for n in range(4)
    ]
    (root / "annotations").mkdir()
    text = json.dumps({"annotator_id": 1, "num_annotations": 4, "annotations": people})
    (root / "annotations" / "annotator_1.json").write_text(text)
    study = {
        "name": "tiny",
        "about": "Two arms.",
        "prompts": 2,
        "seeds": [0],
        "recipe": {
            **whole.override("optim.steps=2").model_dump(mode="json"),
            "data": {
                **{"lab": {"clips": 4, "seed": 7}, "frames": 17, "height": 64, "width": 64},
                "cache": "study/cache",
            },
        },
        "arms": {"control": {"about": "none", "set": ["align.weight=0"]}, "trd": {"about": "TRD"}},
    }
    (root / "study.yaml").write_text(yaml.safe_dump(study))
