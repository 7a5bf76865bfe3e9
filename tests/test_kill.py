"""kill -9 at a random moment, then the same command again: the result is the undisturbed one's."""

from __future__ import annotations

import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import recipe_values, tree
from test_pipeline import assert_equal_bit_for_bit
from videorepa.artifacts.run import Run
from videorepa.cli import main
from videorepa.errors import UserError
from videorepa.export import export
from videorepa.recipe import Recipe
from videorepa.system.files import STALE_SECONDS, _sweep

CLIPS, STEPS, PROMPTS = 80, 30, 24
"""Enough that a kill soon after the first file finds work left."""
PATIENCE = 120.0
"""Seconds until a process must have shown its first file."""


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob(".tmp-*"))


def grow_old(path: Path) -> None:
    long_ago = time.time() - STALE_SECONDS - 60
    os.utime(path, (long_ago, long_ago))


@dataclass(frozen=True)
class Job:
    """A verb that can be told to write into any folder, and how to see how far it is."""

    verb: str
    command: Callable[[Path], list[str]]
    pattern: str
    total: int

    def done(self, out: Path) -> int:
        return sum(not path.name.startswith(".tmp-") for path in out.glob(self.pattern))

    def run(self, out: Path) -> None:
        assert main(self.command(out)) == 0

    def kill(self, out: Path, delay: float, until: Callable[[], bool]) -> bool:
        """Start the verb, wait until something is to be seen and for the delay, and kill it.

        Says whether the kill came before the verb was over by itself, without an error.
        """
        process = subprocess.Popen(
            [sys.executable, "-m", "videorepa", *self.command(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + PATIENCE
        try:
            while not until() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(delay)
        finally:
            process.kill()
            said = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), said
        return process.returncode != 0

    def assert_same(self, out: Path, undisturbed: Path) -> None:
        if self.verb == "train":
            assert_equal_bit_for_bit(Run(out), Run(undisturbed))
            out, undisturbed = out / "checkpoints", undisturbed / "checkpoints"
        assert tree(out) == tree(undisturbed)


@pytest.fixture(scope="module")
def jobs(twins, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    root = tmp_path_factory.mktemp("kill")
    manifest, prompts = root / "clips.csv", root / "prompts.txt"
    # The same few videos under many ids: writing that many would take longer than the test.
    rows = [f"{n},clip{n % 5}.mp4,Clip number {n}." for n in range(CLIPS)]
    manifest.write_text("\n".join(["id,video,caption", *rows]) + "\n")
    prompts.write_text("".join(f"A ball falls {n} times.\n" for n in range(PROMPTS)))
    recipe = Recipe.parse(recipe_values(twins, manifest, root / "few")).override(
        f"data.root={clips.parent}", "generation.steps=1", f"optim.steps={STEPS}"
    )
    many, few = str(root / "many.yaml"), str(root / "few.yaml")
    recipe.to_yaml(many)
    recipe.override(f"data.manifest={clips}").to_yaml(few)
    assert main(["prepare", few]) == 0
    return {
        "prepare": Job(
            "prepare",
            lambda out: ["prepare", many, "--data.cache", str(out)],
            "clips/*",
            CLIPS,
        ),
        "train": Job(
            "train",
            lambda out: ["train", few, "--out", str(out), "--train.keep_checkpoints", "3"],
            "checkpoints/step-*",
            STEPS // 2,
        ),
        "generate": Job(
            "generate",
            lambda out: ["generate", few, "--prompts", str(prompts), "--out", str(out)],
            "*.mp4",
            PROMPTS,
        ),
    }


@pytest.mark.parametrize(
    "verb",
    [
        pytest.param("prepare", marks=pytest.mark.slow),
        "train",
        pytest.param("generate", marks=pytest.mark.slow),
    ],
)
def test_killed_once(jobs: dict[str, Job], tmp_path: Path, verb: str) -> None:
    job, out, undisturbed = jobs[verb], tmp_path / "killed", tmp_path / "undisturbed"
    delay = random.Random(f"once {verb}").uniform(0, 0.3)
    assert job.kill(out, delay, until=lambda: job.done(out) > 0), "it was over before the kill"
    assert 0 < job.done(out) < job.total, "the kill was to hit the middle"
    for path in leftovers(out):
        grow_old(path)
    job.run(out)
    assert not leftovers(out)
    job.run(undisturbed)
    job.assert_same(out, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("verb", ["prepare", "train", "generate"])
def test_killed_five_times(jobs: dict[str, Job], tmp_path: Path, verb: str, seed: int) -> None:
    """Now while it starts, now when it has gone on a little from where the last one stopped."""
    job, out, undisturbed = jobs[verb], tmp_path / "killed", tmp_path / "undisturbed"
    chance = random.Random(f"{seed} {verb}")
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "videorepa", *job.command(undisturbed)], check=True)
    whole = time.monotonic() - began
    hits = 0
    for number in range(5):
        began, before = time.time(), tree(out)

        def has_gone_on(before: dict[str, str] = before) -> bool:
            return tree(out).items() - before.items() != set()

        def has_started(began: float = began) -> bool:
            return out.exists() and any(p.stat().st_mtime > began for p in [out, *out.iterdir()])

        if number % 2:
            hit = job.kill(out, chance.uniform(0, 0.1), until=has_gone_on)
        else:
            wait = chance.uniform(0, 0.5 * whole)
            hit = job.kill(out, wait, until=has_started if number == 0 else lambda: True)
        hits += hit
        if not hit:  # The machine has become faster since the whole was timed.
            shutil.rmtree(out)
            whole /= 2
    assert hits >= 2, "most kills came when the verb was over"
    for path in leftovers(out):
        grow_old(path)
    command = [sys.executable, "-m", "videorepa", *job.command(out)]
    assert subprocess.run(command, check=False).returncode == 0
    assert not leftovers(out)
    job.assert_same(out, undisturbed)


@pytest.mark.parametrize("verb", ["prepare", "train", "generate"])
def test_leftovers_are_no_obstacle_and_do_not_pile_up(
    jobs: dict[str, Job], tmp_path: Path, verb: str
) -> None:
    """Killed while it wrote its very first file; and what others are writing is left alone."""
    job, out = jobs[verb], tmp_path / "out"
    out.mkdir()
    stale, fresh = out / ".tmp-0123456789abcdef.json", out / ".tmp-123456789abcdef0.json"
    foreign = out / ".tmp-notes.txt"
    for path in (stale, fresh, foreign):
        path.write_text('{"half": ')
    grow_old(stale)
    grow_old(foreign)
    # The first few files will do; the rest is the business of the tests above.
    short = {"train": ["--optim.steps", "2"], "prepare": ["--data.manifest"], "generate": []}
    command = [*job.command(out), *short[verb]]
    if verb == "prepare":
        manifest = tmp_path / "one.csv"
        manifest.write_text("video,caption\nclip0.mp4,One.\n")
        command.append(str(manifest))
    if verb == "generate":
        prompts = tmp_path / "one.txt"
        prompts.write_text("One.\n")
        command[command.index("--prompts") + 1] = str(prompts)
    assert main(command) == 0
    assert sorted(leftovers(out)) == [fresh, foreign]
    # Killed once more, in a folder below: another process goes on.
    _sweep.cache_clear()
    below, lacking = {
        "prepare": ("clips", "clips/*.safetensors"),
        "train": (".", "checkpoints/*/*"),
        "generate": (".", "*.mp4"),
    }[verb]
    for path in out.glob(lacking):
        path.unlink()
    (out / below).mkdir(parents=True, exist_ok=True)
    deep = out / below / ".tmp-23456789abcdef01.mp4"
    deep.write_text("half")
    grow_old(deep)
    assert main(command) == 0
    assert sorted(leftovers(out)) == [fresh, foreign]


def test_leftovers_of_a_killed_save_and_export(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch
) -> None:
    run = tmp_path / "run"
    command = [*jobs["train"].command(run), "--optim.steps", "2"]
    assert main(command) == 0
    half = run / "checkpoints" / ".tmp-step-00000004"
    half.mkdir()
    (half / "trained.safetensors").write_text("half")
    assert Run(run).trained().step == 2, "half a checkpoint is none"
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    assert main(command) == 0
    assert not leftovers(run)

    half = tmp_path / ".tmp-out"
    half.mkdir()
    (half / "half").write_text("half")

    def look(product: Path, *_: object) -> None:
        assert product.exists() and not (half / "half").exists()
        raise UserError("Enough.")

    monkeypatch.setattr(importlib.import_module("videorepa.export"), "stock_output", look)
    with pytest.raises(UserError, match="Enough"):
        export(run, tmp_path / "out")
    assert not leftovers(tmp_path) and not (tmp_path / "out").exists()


def test_half_a_line_of_a_killed_process_is_no_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.log == []
    for step in (1, 2, 3):
        run.append({"step": step, "loss": 0.1 * step})
    with run.log_path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in run.log] == [1, 2, 3]
    run.cut_log(2)
    assert run.log == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]
    assert len(run.log_path.read_text().splitlines()) == 2
