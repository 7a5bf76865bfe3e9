"""What alignment adds to a training step, in four ways, and its parts at published shapes.

Run: python timings/training_step.py            the micro model, whole training steps
     python timings/training_step.py --published the parts at CogVideoX-2B's published shapes

The four ways: no alignment; teacher features from the cache; the teacher in the loop; and the way
the published trainer works, re-stated: every step decodes its clips and runs the teacher on them,
one after the other, and forms all pairs of tokens.

Each way runs in a process of its own, in turns; the table shows the least of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any
from unittest import mock

# Idle threads that spin slow a busy machine fivefold. Set before anything starts them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.nn import functional as F

from videorepa.align.projector import Projector
from videorepa.losses.relation import Relation
from videorepa.recipe import Recipe
from videorepa.system.device import peak_memory
from videorepa.tokens import TokenGrid

WAYS = ("none", "cached", "online", "published")
CLIPS, BATCH, STEPS, WARM_UP = 24, 12, 9, 3


def plain_trd(student: TokenGrid, teacher: TokenGrid, margin: float) -> torch.Tensor:
    """The published formula with its matrices: mean over all pairs of relu(|S - T| - margin)."""
    a, t = (F.normalize(grid.tokens.float().flatten(1, 3), dim=-1) for grid in (student, teacher))
    return F.relu((a @ a.mT - t.detach() @ t.detach().mT).abs() - margin).mean()


class Inline(Executor):
    """Runs every task in the thread that submits it, so that no batch is read ahead."""

    def __init__(self, threads: int) -> None:
        pass

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def micro_recipe(folder: Path) -> Recipe:
    with as_file(files("videorepa.lab") / "demo.yaml") as path:
        recipe = Recipe.from_yaml(path)
    return recipe.override(
        f"data.manifest={folder / 'clips' / 'clips.csv'}",
        f"data.cache={folder / 'cache'}",
        f"optim.steps={STEPS}",
        f"optim.batch_size={BATCH}",
        "train.checkpoint_every=1000",
    )


def prepare_micro(folder: Path) -> None:
    from videorepa.data.video import write_video
    from videorepa.prepare import prepare
    from videorepa.world.render import make_clip
    from videorepa.world.simulator import FPS

    (folder / "clips").mkdir(parents=True)
    rows = ["video,caption"]
    for index in range(CLIPS):
        clip = make_clip(5, index)
        write_video(folder / "clips" / f"{index}.mp4", clip.frames, FPS)
        rows.append(f'{index}.mp4,"{clip.caption}"')
    (folder / "clips" / "clips.csv").write_text("\n".join(rows) + "\n")
    prepare(micro_recipe(folder))


def train_one_way(folder: Path, way: str) -> dict[str, float]:
    """Seconds a step after the warm-up, and the process's peak memory."""
    from videorepa.train import train

    recipe = micro_recipe(folder)
    if way == "none":
        recipe = Recipe.parse(recipe.model_dump(mode="json") | {"encoder": None, "align": None})
    elif way != "cached":
        recipe = recipe.override("align.teacher=online")
    with tempfile.TemporaryDirectory() as out, ExitStack() as stack:
        if way == "published":
            stack.enter_context(mock.patch("videorepa.data.loader.ThreadPoolExecutor", Inline))
            plain = lambda loss, student, teacher: plain_trd(student, teacher, loss.margin)  # noqa: E731
            stack.enter_context(mock.patch.object(Relation, "__call__", plain))
        run = train(recipe, Path(out) / "run", device="cpu")
        rows = run.log
    elapsed = [BATCH * row["step"] / row["clips_per_second"] for row in rows]
    seconds = (elapsed[-1] - elapsed[WARM_UP - 1]) / (STEPS - WARM_UP)
    peak = peak_memory(torch.device("cpu"))
    return {"seconds": seconds, "gigabytes": peak / 1e9}


def micro(repeats: int) -> None:
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--prepare", folder], check=True)
        for _ in range(repeats):
            for way in WAYS:
                command = [sys.executable, __file__, "--way", way, "--folder", folder]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                measured[way].append(json.loads(done.stdout.splitlines()[-1]))
    floor = min(row["seconds"] for row in measured["none"])
    print(f"micro model, {BATCH} clips a step, {repeats} repeats of {STEPS - WARM_UP} steps")
    print(
        f"{'alignment':12} {'s/step: least':>14} {'median':>8} {'most':>8} {'against none':>13} GB"
    )
    for way, rows in measured.items():
        seconds = sorted(row["seconds"] for row in rows)
        memory = max(row["gigabytes"] for row in rows)
        print(
            f"{way:12} {seconds[0]:14.3f} {seconds[len(seconds) // 2]:8.3f} {seconds[-1]:8.3f} "
            f"{seconds[0] / floor:12.2f}x {memory:.2f}"
        )


def published(repeats: int) -> None:
    """One sample at 49 x 480 x 720: a block of the transformer, and all that alignment adds."""
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
    from transformers import VideoMAEConfig, VideoMAEModel

    block = CogVideoXBlock(1920, 30, 64, 512)
    video, text = torch.randn(1, 13 * 30 * 45, 1920), torch.randn(1, 226, 1920)
    time_embedding = torch.randn(1, 512)
    projector = Projector(1920, 768)
    tapped = torch.randn(1, 13, 30, 45, 1920)
    teacher = TokenGrid(torch.randn(1, 24, 10, 15, 768), start=1, stride=2)
    config = VideoMAEConfig(image_size=[160, 240], num_frames=48)  # pyright: ignore[reportArgumentType]
    encoder = VideoMAEModel(config).eval()
    clip = torch.rand(1, 49, 3, 480, 720)

    def one_block() -> None:
        inputs = video.clone().requires_grad_(), text.clone().requires_grad_()
        ours, theirs = block(*inputs, time_embedding)
        (ours.sum() + theirs.sum()).backward()

    def alignment(loss: Callable[[TokenGrid, TokenGrid], torch.Tensor]) -> None:
        student = TokenGrid(tapped.clone().requires_grad_(), start=-3, stride=4)
        loss(projector(student, like=teacher), teacher).backward()

    @torch.no_grad()
    def online_teacher() -> None:
        small = F.interpolate(clip[0, 1:], (160, 240), mode="bicubic")
        encoder(small[None])

    parts: dict[str, Callable[[], Any]] = {
        "one of 30 blocks, forward and backward": one_block,
        "projector and relations": lambda: alignment(Relation()),
        "projector and plain relations": lambda: alignment(lambda a, b: plain_trd(a, b, 0.1)),
        "teacher (ViT-B) on 48 frames": online_teacher,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            begun = time.monotonic()
            part()
            seconds[name].append(time.monotonic() - begun)
            print(f"{name:42} {seconds[name][-1]:8.2f} s", flush=True)
    least = {name: min(times) for name, times in seconds.items()}
    whole, ours, plain, vit = (least[name] * (30 if "blocks" in name else 1) for name in parts)
    print(f"a step of 30 blocks and no alignment takes {whole:.0f} s a clip; added to it:")
    for name, extra in (("cached", ours), ("online", ours + vit), ("published", plain + vit)):
        print(f"  {name:10} {extra:7.2f} s  {extra / whole:.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--published", action="store_true", help="time the parts, minutes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare_micro(arguments.prepare)
    elif arguments.way:
        print(json.dumps(train_one_way(arguments.folder, arguments.way)))
    elif arguments.published:
        published(arguments.repeats)
    else:
        micro(arguments.repeats)


if __name__ == "__main__":
    main()
