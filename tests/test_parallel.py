"""Several processes train what one does, however the model is shared between them."""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from conftest import recipe_values, tree
from test_memory import CHECKPOINTED, LORA
from test_pipeline import assert_equal_bit_for_bit
from test_speed import drawn
from twins import TWINS
from videorepa.artifacts import checkpoint
from videorepa.artifacts.run import Run
from videorepa.data.loader import Loader, PreparedClips
from videorepa.errors import UserError
from videorepa.inspect import inspect
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.settings.sections import Parallel
from videorepa.train import train
from videorepa.training.parallel import (
    ENGINES,
    Alone,
    Sharing,
    State,
    _engine,
    join_workers,
    make_accelerator,
)
from videorepa.training.state import Training
from videorepa.training.student import Student

CPU = torch.device("cpu")
# The whole batch is the same 4 clips: 2 in each of two processes, or 4 in one.

ONE = ("optim.batch_size=4", "optim.accumulate=2")
TWO = ("optim.batch_size=2", "optim.accumulate=2")
LIMIT = 5.0
"""To which norm gradients are clipped here."""
PATIENCE = 900.0
"""Seconds until processes must have got to where a test waits for them."""

DDP, FSDP2 = "parallel={engine: ddp}", "parallel={engine: fsdp2}"
GATHERED = "parallel={engine: fsdp2, reshard_after_forward: false}"
engines = pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(DDP, id="ddp"),
        pytest.param(FSDP2, id="fsdp2"),
        pytest.param(GATHERED, id="fsdp2-gathered", marks=pytest.mark.slow),
    ],
)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


def ranks(count: int = 2) -> list[dict[str, str]]:
    """What a launcher tells each of its processes, here of CPUs that talk over gloo."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    common |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


class Together:
    """A function in two processes that have all that this one has imported.

    folder: where what they write to stderr goes.
    """

    def __init__(self, folder: Path, function: Callable[..., object], *given: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"stderr-{number}.txt" for number in range(2)]
        # FFmpeg waits for its threads where it frees frames, and they are not forked.
        gc.collect()
        forked = multiprocessing.get_context("fork")
        self.processes = [
            forked.Process(target=self._run, args=(rank, output, function, *given))
            for rank, output in zip(ranks(), self.outputs, strict=True)
        ]
        for process in self.processes:
            process.start()

    @staticmethod
    def _run(
        rank: dict[str, str], output: Path, function: Callable[..., object], *given: Any
    ) -> None:
        sys.stderr = output.open("w", buffering=1)
        try:
            os.environ.update(rank)
            torch.set_num_threads(1)  # More would wait for threads that were not forked.
            function(*given)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # Nothing of pytest's is to be cleared up here.

    def said(self) -> list[str]:
        """What each process wrote to stderr."""
        return [output.read_text() for output in self.outputs]

    def finish(self) -> None:
        for process in self.processes:
            process.join(PATIENCE)
        codes = [process.exitcode for process in self.processes]
        assert codes == [0, 0], "\n".join(text[-3000:] for text in self.said())

    def kill(self, until: Callable[[], bool]) -> None:
        """kill -9 of both as soon as something is to be seen."""
        deadline = time.monotonic() + PATIENCE
        while not until():
            assert all(process.is_alive() for process in self.processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.005)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        assert [process.exitcode for process in self.processes] == [-9, -9], "over before the kill"


def start(recipe: Recipe, out: Path) -> Together:
    return Together(out.with_suffix(".stderr"), train, recipe, out)


def launch(recipe: Recipe, out: Path) -> Run:
    start(recipe, out).finish()
    return Run.open(out)


def losses(run: Run) -> list[float]:
    return [json.loads(line)["loss"] for line in run.log_path.read_text().splitlines()]


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    one, two = (torch.cat([x[key].flatten() for key in sorted(ours)]) for x in (ours, theirs))
    # Adam makes whole steps of rounding errors where a gradient is nearly 0.
    assert (one - two).norm() < 1e-3 * one.norm()


@pytest.fixture
def prepared(recipe: Recipe) -> Recipe:
    prepare(recipe)
    return recipe.override("train.ema=0.9")


def test_two_ddp_processes_train_what_one_does(prepared: Recipe, tmp_path: Path) -> None:
    alone = train(prepared.override(*ONE), tmp_path / "alone", device="cpu")
    found = launch(prepared.override(*TWO, "parallel={engine: ddp}"), tmp_path / "shared")
    assert losses(found) == pytest.approx(losses(alone), rel=1e-5)
    assert_close(alone.trained().trained, found.trained().trained)
    # One process goes on where two stopped, as long as its steps have the same clips.
    shutil.rmtree(found.checkpoints / "step-00000006")
    with pytest.raises(UserError, match="steps have 8 clips, and 1 processes .* make 4"):
        train(prepared.override(*TWO), tmp_path / "shared", device="cpu")
    assert train(prepared.override(*ONE), tmp_path / "shared", device="cpu").trained().step == 6
    assert_close(alone.trained().trained, found.trained().trained)


def prepare_a_half(recipe: Recipe) -> None:
    shard = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    prepare(recipe, shard=shard, device="cpu")


def test_processes_that_start_together_fill_one_cache(prepared: Recipe, tmp_path: Path) -> None:
    own = prepared.override(f"data.cache={tmp_path / 'together'}")
    Together(tmp_path, prepare_a_half, own).finish()
    assert tree(own.data.cache) == tree(prepared.data.cache)


class Small(nn.Module):
    """Tensors of sizes that no two processes share evenly, and one that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(7, 5), nn.Linear(5, 3)
        self.apart, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.b(self.a(x).tanh()).square().mean() + self.apart(x[:, :3]).square().mean()) * 9


class SmallTraining:
    """Steps with two micro-batches and two clips of gradients; each sees its share of 8 samples."""

    def __init__(self, workers: Alone, weights: dict[str, Tensor], state: State | None) -> None:
        self.workers, self.model = workers, Small()
        self.model.load_state_dict(weights)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        sharing = Sharing({"Linear", "Small"}, lacks_gradients=True)
        self.shared = workers.share(self.model, self.optimizer, sharing)
        if state is not None:
            workers.load_optimizer_state(self.optimizer, state)

    def run(self, steps: range) -> list[float]:
        workers, model, norms = self.workers, self.model, []
        together = [*model.a.parameters(), *model.b.parameters(), *model.unused.parameters()]
        for step in steps:
            x = torch.randn(2, 8, 7, generator=torch.Generator().manual_seed(step))
            for micro in range(2):
                with workers.accumulating(self.shared, is_last=micro == 1):
                    loss = self.shared(x[micro, workers.rank :: workers.count])
                    self.is_gathered = not isinstance(next(model.a.parameters()), DTensor)
                    (loss / 2).backward()
            for parameters in (list(model.apart.parameters()), together):
                norms.append(workers.clip_gradients(parameters, LIMIT).item())
            self.optimizer.step()
            self.optimizer.zero_grad()
        return norms

    def state(self) -> tuple[dict[str, Tensor], State]:
        """Copies, since one process alone hands out the very tensors."""
        found = self.workers.optimizer_state(self.optimizer)
        weights = self.workers.collected(dict(self.model.named_parameters()))
        return copy.deepcopy((weights, found))


def check_engine(recipe: Recipe) -> None:
    """A training goes from one process to the engine's two and back, as if nothing had been."""
    alone = SmallTraining(Alone(torch.device("cpu")), Small().state_dict(), None)
    alone.run(range(2))
    begun = alone.state()
    wanted = alone.run(range(2, 6))
    assert max(wanted) > LIMIT > min(wanted), "some steps are clipped, and some are not"

    workers = join_workers(recipe, "cpu")
    assert recipe.parallel is not None and type(workers) is ENGINES[recipe.parallel.engine]
    shared = SmallTraining(workers, *begun)
    is_sharded = isinstance(next(shared.model.parameters()), DTensor)
    assert is_sharded == workers.is_sharded == (recipe.parallel.engine == "fsdp2")
    found = shared.run(range(2, 4))
    assert shared.is_gathered != (is_sharded and recipe.parallel.reshard_after_forward)
    handed_on = shared.state()
    if workers.is_first:
        again = SmallTraining(Alone(torch.device("cpu")), *handed_on)
        assert found + again.run(range(4, 6)) == pytest.approx(wanted, rel=1e-5)
        assert_close(again.state()[0], alone.state()[0])
    else:
        assert handed_on[0] == {}
    workers.wait()


class Adapted(nn.Module):
    """A layer that is trained beside one that is not, and that no process may touch."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3, device="meta")
        self.frozen.requires_grad_(False)
        self.register_buffer("table", torch.empty(3, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return self.trained(x).square().mean()


def check_left_alone(recipe: Recipe) -> None:
    workers, model = join_workers(recipe, "cpu"), Adapted()
    optimizer = torch.optim.AdamW(model.trained.parameters())
    shared = workers.share(model, optimizer, Sharing({"Linear"}))
    for _ in range(2):
        shared(torch.randn(2, 3)).backward()
    assert model.frozen.weight.is_meta and model.trained.weight.grad is not None


def test_ddp_leaves_frozen_weights_where_they_are_offloaded(recipe: Recipe, tmp_path: Path) -> None:
    Together(tmp_path, check_left_alone, recipe.override(DDP)).finish()


@engines
def test_an_engine_takes_a_training_over_and_hands_it_back(
    recipe: Recipe, tmp_path: Path, parallel: str
) -> None:
    Together(tmp_path, check_engine, recipe.override(parallel)).finish()


def check_second_steps(recipe: Recipe) -> None:
    workers, student = join_workers(recipe, "cpu"), Student(recipe, CPU)
    training, batch = Training(recipe, workers, student), drawn(recipe, student)
    with student.tapped():
        for step in range(2):
            denoised, aligned = training.model(step, batch)
            (denoised.loss.mean() + aligned.loss).backward()
            training.update(1e-3)
    workers.wait()


@pytest.mark.parametrize("model", ["hunyuan_video_15", "cosmos_25"])
def test_ddp_trains_models_with_weights_that_get_no_gradient(
    twins: dict[str, Path], clips: Path, tmp_path: Path, model: str
) -> None:
    described, make = TWINS[model]
    values = recipe_values(twins, clips, tmp_path / "cache")
    values["backbone"] = described | {"weights": str(make(tmp_path / model))}
    values["data"] |= {"height": 32, "width": 32}
    own = Recipe.parse(values).override(DDP, *([LORA] if model == "hunyuan_video_15" else []))
    Together(tmp_path / "err", check_second_steps, own).finish()


@pytest.fixture
def wan(twins: dict[str, Path], clips: Path, tmp_path: Path) -> Recipe:
    """A training of the one family whose tokens diffusers shares: clips of 12 tokens, 2 heads."""
    values = recipe_values(twins, clips, tmp_path / "cache")
    folder = TWINS["wan-2.1"][1](tmp_path / "wan")
    values["backbone"] = {"name": "wan", "weights": str(folder)}
    values["data"] |= {"height": 32, "width": 32}
    values["align"] = [values["align"], {"block": 3, "target": 1, "weight": 0.2, "name": "self"}]
    return Recipe.parse(values)


def gradients_and_values(recipe: Recipe, workers: Alone) -> tuple[dict[str, Tensor], dict]:
    student = Student(recipe, CPU)
    training = Training(recipe, workers, student)
    batch = drawn(recipe, student)
    with student.tapped():
        denoised, aligned = training.model(0, batch)
        (denoised.loss.mean() + aligned.loss).backward()
    values = {"denoise": denoised.loss.mean(), **aligned.measured()}
    parameters = {name: p for name, p in student.named_parameters() if p.grad is not None}
    return (
        {
            name: workers.whole(p.grad).clone()
            for name, p in parameters.items()
            if p.grad is not None
        },
        {name: value.item() for name, value in values.items()},
    )


def check_shared_tokens(recipe: Recipe, gradients: dict[str, Tensor], values: dict) -> None:
    """Two processes with half of the tokens each compute what one with all of them does."""
    torch.accelerator.device_count = lambda: 1  # Of CPUs, diffusers says that there are none.
    workers = join_workers(recipe, "cpu")
    assert (workers.context, workers.part, workers.parts) == (2, 0, 1)
    ours, found = gradients_and_values(recipe, workers)
    assert found == pytest.approx(values, rel=1e-4, abs=1e-6)
    assert ours.keys() == gradients.keys()
    for name, expected in gradients.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-6, msg=name)
    workers.wait()


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("changes", [(), (LORA, CHECKPOINTED)], ids=["all-weights", "lora"])
def test_two_processes_that_share_tokens_compute_what_one_does(
    wan: Recipe, tmp_path: Path, engine: str, changes: tuple[str, ...]
) -> None:
    wan = wan.override(*changes)
    alone = gradients_and_values(wan, Alone(CPU))
    assert alone[1]["grad_align.relation"] > 0 and alone[1]["grad_cosine.relation"] != 0
    own = wan.override(f"parallel={{engine: {engine}, context: 2}}")
    Together(tmp_path, check_shared_tokens, own, *alone).finish()


def train_sharing(recipe: Recipe, out: Path) -> None:
    torch.accelerator.device_count = lambda: 1
    train(recipe, out, device="cpu")


@pytest.mark.slow
def test_a_run_with_shared_tokens_is_one_processs_run(wan: Recipe, tmp_path: Path) -> None:
    prepare(wan)
    own = wan.override("optim.steps=4", "validation={every: 4, prompts: [A ball falls., A cup.]}")
    alone = train(own, tmp_path / "alone", device="cpu")
    shared = own.override("parallel={engine: ddp, context: 2}", "optim.steps=4")
    Together(tmp_path / "err", train_sharing, shared, tmp_path / "shared").finish()
    found = Run.open(tmp_path / "shared")
    assert losses(found) == pytest.approx(losses(alone), rel=1e-5)
    assert_close(alone.trained().trained, found.trained().trained)
    assert len(list(found.samples.rglob("*.mp4"))) == 4
    # One process goes on where two stopped.
    shutil.rmtree(found.checkpoints / "step-00000004")
    assert train(own, found.path, device="cpu").trained().step == 4


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("cogvideox", (), "cannot share the tokens of CogVideoXTransformer3DModel .* those of Wan"),
        ("wan", ("parallel.context=5",), "must divide the 12 tokens of a clip and the 2 heads"),
        ("wan", ("parallel.context=4",), "must divide the 12 tokens of a clip and the 2 heads"),
    ],
)
def test_tokens_that_cannot_be_shared_are_refused(
    recipe: Recipe, wan: Recipe, tmp_path: Path, model: str, changes: tuple[str, ...], message: str
) -> None:
    own = (recipe if model == "cogvideox" else wan).override("parallel={engine: ddp, context: 2}")
    for refusing in (partial(train, out=tmp_path / "run"), inspect):
        with pytest.raises(UserError, match=message):
            refusing(own.override(*changes))
    with pytest.raises(UserError, match=r"speed\.compile does not go with a parallel\.context"):
        own.override("speed.compile=true")


def test_one_process_refuses_what_needs_several(prepared: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="accelerate launch"):
        train(prepared.override("parallel={engine: ddp}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["offload: true", "reshard_after_forward: false"])
def test_what_is_for_shards_is_refused_without(recipe: Recipe, setting: str) -> None:
    with pytest.raises(UserError, match="ddp has none"):
        recipe.override(f"parallel={{engine: ddp, {setting}}}")


@engines
@pytest.mark.parametrize(
    "lora",
    [pytest.param(False, id="all-weights"), pytest.param(True, id="lora", marks=pytest.mark.slow)],
)
def test_two_processes_train_what_one_does(
    prepared: Recipe, tmp_path: Path, parallel: str, lora: bool
) -> None:
    if lora:
        prepared = prepared.override("train.lora={rank: 2, alpha: 4}")
    alone = train(prepared.override(*ONE), tmp_path / "alone", device="cpu")
    own = prepared.override(*TWO, parallel)
    shared = launch(own, tmp_path / "shared")
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-5)
    ours, theirs = alone.trained(), shared.trained()
    assert_close(ours.trained, theirs.trained)
    assert_close(ours.projector, theirs.projector)


def check_shards(recipe: Recipe) -> None:
    """Weights are gathered in bfloat16, and gradients are shards between micro-batches."""
    workers = join_workers(recipe, "cpu")
    student = Student(recipe, workers.device)
    training = Training(recipe, workers, student)
    batch = next(
        Loader(recipe, PreparedClips(recipe), student.backbone, workers.device).batches(0, 0, 1)
    )
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    block = student.backbone.block(1)
    block.register_forward_pre_hook(
        lambda part, _: seen.append((part.attn1.to_q.weight.dtype, part.norm1.norm.weight.dtype))
    )
    with student.tapped(), workers.accumulating(training.model, is_last=False):
        denoised, aligned = training.model(0, batch)
        (denoised.loss.mean() + aligned.loss).backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    for name, parameter in student.trained.items():
        gradient = parameter.grad
        assert isinstance(gradient, DTensor) and gradient.dtype == torch.float32, name
    workers.wait()


def test_shards_are_gathered_in_bfloat16_and_gradients_stay_shards(
    prepared: Recipe, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("videorepa.system.device.has_fast_bfloat16", lambda device: True)
    low = prepared.override(*TWO, FSDP2, "train.precision=auto")
    Together(tmp_path, check_shards, low).finish()


@pytest.mark.slow
@engines
def test_killed_while_it_saves_and_with_a_damaged_checkpoint(
    prepared: Recipe, tmp_path: Path, parallel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of both processes, twice; then the newest checkpoint that is left is cut short."""
    own = prepared.override(*TWO, parallel)
    undisturbed = launch(own, tmp_path / "undisturbed")
    out = tmp_path / "killed"
    run = Run(out)
    delay = random.Random(parallel).uniform(0, 0.3)

    def has_begun() -> bool:
        if not run.log_path.exists():
            return False
        time.sleep(delay)
        return True

    def save_slowly(*given: Any) -> None:
        save_file(*given)
        time.sleep(0.4)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", save_slowly)
        start(own, out).kill(has_begun)
        half = run.checkpoints / ".tmp-step-00000006"
        start(own, out).kill((half / "trained.safetensors").exists)
    assert half.exists() and not (half / "state.json").exists(), "the kill hit the writing"
    assert run.trained().step == 4
    newest = run.checkpoints / "step-00000004" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = start(own, out)
    resumed.finish()
    first, second = resumed.said()
    assert first.count("is damaged") == 1 and "Going on from step 2 of 6." in first
    assert "damaged" not in second
    assert_equal_bit_for_bit(run, undisturbed)
    ours, theirs = run.trained().ema, undisturbed.trained().ema
    assert ours is not None and theirs is not None
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.slow
@engines
def test_sigterm_to_one_process_ends_both_after_the_same_step(
    prepared: Recipe, tmp_path: Path, parallel: str
) -> None:
    own = prepared.override(*TWO, parallel, "train.checkpoint_every=100", "optim.steps=40")
    undisturbed = launch(own, tmp_path / "undisturbed")
    run, together = Run(tmp_path / "stopped"), start(own, tmp_path / "stopped")
    deadline = time.monotonic() + PATIENCE
    while not run.log_path.exists():
        assert time.monotonic() < deadline, together.said()
        time.sleep(0.005)
    together.processes[1].terminate()
    for process in together.processes:
        process.join(PATIENCE)
    assert all("stopping.Terminated" in said.splitlines()[-1] for said in together.said())
    assert run.trained().step == run.last_step < 40
    assert_equal_bit_for_bit(launch(own, run.path), undisturbed)


@pytest.mark.slow
@engines
def test_validation_clips_of_two_processes(prepared: Recipe, tmp_path: Path, parallel: str) -> None:
    """Of a whole model each process makes its own clips, of a sharded one all make all."""
    own = prepared.override(*TWO, parallel)
    prompts = "[A ball falls., A ball rolls., A glass breaks.]"
    watching = own.override(f"validation={{every: 4, prompts: {prompts}}}")
    plain = launch(own, tmp_path / "plain")
    watched = launch(watching, tmp_path / "watched")
    assert_equal_bit_for_bit(watched, plain, but_for=("drift",))
    clips = sorted(str(p.relative_to(watched.samples)) for p in watched.samples.rglob("*.mp4"))
    assert clips == [f"step-{step:08d}/{n:02d}.mp4" for step in (0, 4, 6) for n in range(3)]
    rows = [json.loads(line) for line in watched.log_path.read_text().splitlines()]
    assert ["drift_outside" in row for row in rows] == [False, False, False, True, False, True]
    # The same model, sampled by one process: the clips are the same.
    alone = train(
        watching.override("parallel=null", *ONE, "optim.learning_rate=1e-30"),
        tmp_path / "alone",
        device="cpu",
    )
    for number in range(3):
        name = f"step-00000000/{number:02d}.mp4"
        assert (alone.samples / name).read_bytes() == (watched.samples / name).read_bytes()
    # A resumed run makes the base model's clips again if they are gone, and only then.
    shutil.rmtree(watched.checkpoints / "step-00000006")
    base = watched.samples / "step-00000000"
    (base / "01.mp4").unlink()
    launch(watching, tmp_path / "watched")
    assert_equal_bit_for_bit(watched, plain, but_for=("drift",))
    assert (base / "01.mp4").exists()


@pytest.mark.slow
@engines
def test_two_processes_ask_about_the_same_pairs(
    prepared: Recipe, clips: Path, tmp_path: Path, parallel: str
) -> None:
    """Both ask about all of them: a sharded model needs both."""
    real, *broken = (clips.parent / f"clip{number}.mp4" for number in range(4))
    lines = [f"{real},{clip},A clip." for clip in broken]
    (tmp_path / "pairs.csv").write_text("\n".join(["real,broken,caption", *lines]) + "\n")
    own = prepared.override(*TWO, parallel)
    asking = own.override(f"validation={{every: 4, pairs: {tmp_path / 'pairs.csv'}}}")
    asked = launch(asking, tmp_path / "asked")
    mine = ("likelier", "log_ratio")
    assert_equal_bit_for_bit(asked, launch(own, tmp_path / "plain"), but_for=mine)
    alone = train(asking.override("parallel=null", *ONE), tmp_path / "alone", device="cpu")
    for ours, theirs in zip(asked.log, alone.log, strict=True):
        assert ("likelier" in ours) == (ours["step"] in (4, 6))
        for key in ("log_ratio", "log_ratio_gain", "likelier_failed"):
            if key in ours:
                assert ours[key] == pytest.approx(theirs[key], rel=0.05, abs=1e-5)


CONFIGS: dict[str, dict[str, Any]] = {
    "ddp": {"distributed_type": "MULTI_GPU"},
    "fsdp2": {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_cpu_ram_efficient_loading": True,
            "fsdp_activation_checkpointing": True,
        },
    },
    "fsdp1": {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 1,
            "fsdp_sync_module_states": False,
            "fsdp_cpu_ram_efficient_loading": False,
        },
    },
}
COMMON = {"compute_environment": "LOCAL_MACHINE", "num_processes": 2, "num_machines": 1}


def launch_command(recipe: Recipe, out: Path, config: str) -> list[str]:
    """`accelerate launch` with the user's own configuration, precision and all."""
    path, recipe_path = out.with_suffix(".accelerate.yaml"), out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(COMMON | {"mixed_precision": "bf16"} | CONFIGS[config]))
    recipe.to_yaml(recipe_path)
    command = ["-m", "accelerate.commands.launch", "--config_file", str(path)]
    command += ["--main_process_port", free_port(), "-m", "videorepa"]
    return [sys.executable, *command, "train", str(recipe_path), "--out", str(out)]


LAUNCHED = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def accelerate_launch(recipe: Recipe, out: Path, config: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        launch_command(recipe, out, config),
        env=os.environ | LAUNCHED,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


@pytest.mark.slow
def test_slurm_sends_sigterm_to_the_launcher_too(prepared: Recipe, tmp_path: Path) -> None:
    """So each process gets it twice: the launcher passes its own on."""
    own = prepared.override(*TWO, "train.checkpoint_every=100", "optim.steps=60")
    run = Run(tmp_path / "run")
    command = launch_command(own, run.path, "ddp")
    with subprocess.Popen(command, env=os.environ | LAUNCHED, stderr=subprocess.DEVNULL) as started:
        deadline = time.monotonic() + PATIENCE
        while not run.log_path.exists():
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        launcher = psutil.Process(started.pid)
        for process in [*launcher.children(recursive=True), launcher]:
            process.terminate()
    assert run.trained().step == run.last_step < 60


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_users_own_accelerate_configuration(
    prepared: Recipe, tmp_path: Path, engine: str
) -> None:
    """It says how the model is shared, and nothing else: the rest is the recipe's."""
    done = accelerate_launch(prepared.override(*TWO), tmp_path / "own", engine)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"2 processes share the training with {ENGINES[engine].label}." in done.stderr
    alone = train(prepared.override(*ONE), tmp_path / "alone", device="cpu")
    found = Run.open(tmp_path / "own")
    assert losses(found) == pytest.approx(losses(alone), rel=1e-5)
    assert_close(alone.trained().trained, found.trained().trained)


def check_configured(recipe: Recipe) -> None:
    """The launcher's word on resharding counts where the recipe has no `parallel`."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ["FSDP_RESHARD_AFTER_FORWARD"] = "false"
    workers: Any = join_workers(recipe, "cpu")
    expected = recipe.parallel is not None and recipe.parallel.reshard_after_forward
    assert workers._accelerator.state.fsdp_plugin.reshard_after_forward == expected
    workers.wait()  # The first process holds what the other needs to join.


@pytest.mark.parametrize("parallel", ["parallel=null", FSDP2, GATHERED])
def test_who_decides_on_resharding(recipe: Recipe, tmp_path: Path, parallel: str) -> None:
    Together(tmp_path, check_configured, recipe.override(parallel)).finish()


def test_processes_wait_for_one_another_longer_than_nccl_s_ten_minutes(
    recipe: Recipe, monkeypatch
) -> None:
    class Stop(Exception):
        pass

    def accelerator(**options: Any) -> None:
        timeouts = [vars(handler).get("timeout") for handler in options["kwargs_handlers"]]
        raise Stop(max(filter(None, timeouts), default=None))

    monkeypatch.setattr("accelerate.Accelerator", accelerator)
    with pytest.raises(Stop, match="1 day"):
        make_accelerator(recipe, "cpu")


def test_deepspeed_is_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where it is not installed, and before the processes meet."""
    for name, value in {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="asks for DeepSpeed; train runs with DDP or FSDP2"):
        train(recipe, tmp_path / "run")
    with pytest.raises(UserError, match=r"parallel.engine: .*reshard_after_forward: false .*zero2"):
        recipe.override("parallel={engine: zero2}")


@pytest.mark.slow
def test_another_accelerate_configuration_is_refused(prepared: Recipe, tmp_path: Path) -> None:
    done = accelerate_launch(prepared, tmp_path / "own", "fsdp1")
    assert done.returncode != 0 and "asks for FSDP1" in done.stderr, done.stderr[-3000:]
    assert "train runs with DDP or FSDP2" in " ".join(done.stderr.split())
    assert not (tmp_path / "own").exists()


def accelerated(kind: str, **state: Any) -> Any:
    """What `_engine` looks at."""
    state = {"dynamo_plugin": SimpleNamespace(backend=SimpleNamespace(value="NO"))} | state
    return SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind),
        parallelism_config=state.pop("parallelism_config", None),
        state=SimpleNamespace(**state),
    )


@pytest.mark.parametrize(
    ("found", "wanted", "said"),
    [
        (accelerated("MEGATRON_LM"), None, "asks for MEGATRON_LM; train runs with DDP or"),
        (accelerated("MULTI_GPU", parallelism_config=1), None, "DDP with a parallelism_config"),
        (
            accelerated(
                "MULTI_GPU", dynamo_plugin=SimpleNamespace(backend=SimpleNamespace(value="EAGER"))
            ),
            None,
            "DDP with torch.compile",
        ),
        (
            accelerated("FSDP", fsdp_plugin=SimpleNamespace(fsdp_version=2)),
            Parallel(engine="ddp"),
            "parallel.engine ddp, the accelerate configuration for FSDP2. Leave one",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    found: Any, wanted: Parallel | None, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        _engine(found, wanted)
