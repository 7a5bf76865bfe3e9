"""What makes a training fast changes no result, and how fast it is stands in its log."""

from __future__ import annotations

import gzip
import json
import math
import threading
import time
from functools import partial
from pathlib import Path
from traceback import extract_stack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import recipe_values
from twins import TWINS
from videorepa.artifacts.run import Run
from videorepa.data.batches import Batch, ahead
from videorepa.errors import UserError
from videorepa.inspect import inspect
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.remedies import in_training
from videorepa.system import background
from videorepa.system.device import PEAK_TFLOPS, peak_rate
from videorepa.tokens import TokenGrid
from videorepa.train import _read, train
from videorepa.training.checkpointing import checkpoint_blocks
from videorepa.training.cost import predict
from videorepa.training.memory import make_optimizer
from videorepa.training.parallel import Alone
from videorepa.training.speed import choose_attention, compile_blocks
from videorepa.training.student import Student

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def log_of(run: Run) -> list[dict]:
    return [json.loads(line) for line in run.log_path.read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(twins: dict[str, Path], clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A training of the tiny Wan, whose attention diffusers can exchange."""
    folder = TWINS["wan-2.1"][1](tmp_path_factory.mktemp("wan") / "wan")
    values = recipe_values(twins, clips, folder.parent / "cache")
    values["backbone"] = {"name": "wan", "weights": str(folder)}
    values["data"] |= {"height": 32, "width": 32}
    return Recipe.parse(values)


def drawn(recipe: Recipe, student: Student) -> Batch:
    """A batch of random numbers in place of clips."""
    draw = torch.Generator().manual_seed(5)
    shapes, count = recipe.backbone.shapes(recipe.data), recipe.optim.batch_size
    latents = torch.randn(count, *shapes.latents, generator=draw)
    text = {
        name: torch.randn(count, *one.shape, generator=draw).to(one.dtype)
        for name, one in shapes.text.items()
    }
    teachers = {}
    for encoder in recipe.stored_encoders:
        grid = encoder.shape(recipe.data.frames)
        tokens = torch.randn(count, *grid.tokens.shape[1:], generator=draw)
        teachers[encoder] = TokenGrid(tokens, grid.start, grid.stride)
    noise = torch.randn(latents.shape, generator=draw)
    timestep = student.backbone.sample_timesteps(latents, draw)
    return Batch(latents, text, noise, timestep, teachers)


def gradients(
    recipe: Recipe, calls: list[int] | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The losses of a step, and the gradients of all that is trained, by name.

    calls: gets the number of each block that runs.
    """
    student = Student(recipe, CPU, dtype)
    for number, block in enumerate(student.backbone.blocks(), start=1):
        if calls is not None:
            block.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    with student.tapped():
        denoised, aligned = student(0, drawn(recipe, student))
        (denoised.loss.mean() + aligned.loss).backward()
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert any("terms" in name for name in found) and any("blocks" in name for name in found)
    return {"denoise": denoised.loss.detach(), **aligned.losses, **found}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture
def prepared(recipe: Recipe) -> Recipe:
    prepare(recipe)
    return recipe.override("optim.steps=3")


def test_the_log_has_each_steps_seconds_and_the_share_of_a_known_peak(
    prepared: Recipe, tmp_path: Path
) -> None:
    """On a CPU nobody knows the peak, so that nothing is said of it."""
    plain = log_of(train(prepared, tmp_path / "plain", device="cpu"))
    assert all(row["step_seconds"] > 0 and "mfu" not in row for row in plain)
    told = prepared.override("speed.peak_tflops=0.5", "memory.gradient_checkpointing=true")
    rows = log_of(train(told, tmp_path / "told", device="cpu"))
    # What checkpointing computes again is no use of the device.
    needed = predict(prepared, CPU).operations
    assert needed < predict(told, CPU).operations
    for row in rows:
        assert row["mfu"] == pytest.approx(needed / row["step_seconds"] / 0.5e12)


def test_the_peak_is_the_data_sheets_or_unknown(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert peak_rate(CUDA, torch.bfloat16) == 756e12
    assert peak_rate(CUDA, torch.float32) is peak_rate(CPU, torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe MIG 1g")
    assert peak_rate(CUDA, torch.bfloat16) is None
    assert all(50 < peak < 5000 for peak in PEAK_TFLOPS.values())


def test_a_profile_is_one_whole_file_in_the_run(prepared: Recipe, tmp_path: Path) -> None:
    run = train(prepared, tmp_path / "run", device="cpu", profile=2)
    assert [path.name for path in run.path.glob("*profile*")] == ["profile-2-3.json.gz"]
    events = json.loads(gzip.decompress((run.path / "profile-2-3.json.gz").read_bytes()))
    names = [event.get("name", "") for event in events["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in set(names)) == 2
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    with pytest.raises(UserError, match="--profile 3 .* has 3 left. Profile from 1 to 2"):
        train(prepared, tmp_path / "refused", device="cpu", profile=3)


def test_another_kernel_for_attention_changes_rounding_alone(plain: Recipe) -> None:
    usual = gradients(plain)
    own = gradients(plain.override("speed.attention=_native_math"))
    assert_close(own, usual)
    assert any(not torch.equal(own[name], usual[name]) for name in usual), "it was chosen"
    with pytest.raises(UserError, match="FlexAttention does not support backward on CPU"):
        Student(plain.override("speed.attention=flex"), CPU)
    again = gradients(plain)  # Neither choice stays for what comes after it.
    assert all(torch.equal(again[name], usual[name]) for name in usual)


def without_gradients(query, key, value, attn_mask=None, **rest):
    with torch.no_grad():
        return attend(query, key, value, attn_mask)


def without_mask(query, key, value, attn_mask=None, **rest):
    return attend(query, key, value, None)


def attend(query, key, value, mask):
    sides = (side.transpose(1, 2) for side in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*sides, mask).transpose(1, 2)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("flash_5", "speed.attention is flash_5; diffusers has the backends flash, flash_hub"),
        ("xformers", "cannot be used here: .*install `xformers"),
        ("_native_cudnn", "cannot be used here: No viable backend .* Choose another, or leave"),
        ("flex", "cannot be used here: FlexAttention does not support backward on CPU"),
        ("native", "cannot be used here: it has no backward pass"),
    ],
)
def test_attention_that_cannot_train_here_is_refused(
    plain: Recipe, monkeypatch, backend: str, message: str
) -> None:
    from diffusers.models import attention_dispatch

    if backend == "native":  # As sage has none, where it is installed.
        backends = attention_dispatch._AttentionBackendRegistry._backends
        monkeypatch.setitem(backends, "native", without_gradients)
    with pytest.raises(UserError, match=message):
        Student(plain.override(f"speed.attention={backend}"), CPU)


def test_attention_that_drops_the_texts_mask_is_refused(plain: Recipe, monkeypatch) -> None:
    """diffusers leaves out, in silence, what a backend does not take."""
    from diffusers.models import attention_dispatch

    backends = attention_dispatch._AttentionBackendRegistry._backends
    monkeypatch.setitem(backends, "native", without_mask)
    backbone: Any = Student(plain, CPU).backbone
    choose_attention(backbone, "native", CPU, torch.float32)
    backbone.spec = SimpleNamespace(text_mask=True)
    with pytest.raises(UserError, match="it computes something else than torch does"):
        choose_attention(backbone, "native", CPU, torch.float32)


def test_inspect_says_what_it_does_not_count(plain: Recipe) -> None:
    own = plain.override("speed={attention: flash, compile: true}")
    assert "not counted      what speed.attention, speed.compile changes" in str(inspect(own))
    assert "not counted" not in str(inspect(plain))


def test_attention_that_cannot_be_exchanged_is_refused_by_inspect_too(recipe: Recipe) -> None:
    own = recipe.override("speed.attention=_native_math")
    with pytest.raises(UserError, match="CogVideoXTransformer3DModel always leaves the choice to"):
        predict(own, CPU)


CHECKPOINTED = "memory.gradient_checkpointing=true"
LORA = "train.lora={rank: 2, alpha: 4}"


@pytest.fixture
def compiled_by(monkeypatch):
    """A function that makes a training compile with another backend than inductor, and gives what
    counts the graphs."""

    def choose(backend: str) -> CompileCounterWithBackend:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        compile_with: Any = partial(compile_blocks, backend=counter)
        monkeypatch.setattr("videorepa.training.student.compile_blocks", compile_with)
        return counter

    yield choose
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param((), marks=pytest.mark.slow),
        (LORA, CHECKPOINTED),
        (LORA, CHECKPOINTED, "memory.frozen=bfloat16"),
    ],
    ids=["all-weights", "lora", "bfloat16"],
)
def test_compiled_blocks_train_as_others_do(plain: Recipe, compiled_by, changes) -> None:
    dtype = torch.bfloat16 if "memory.frozen=bfloat16" in changes else torch.float32
    usual = gradients(plain.override(*changes), dtype=dtype)
    counter = compiled_by("eager")
    counters.clear()
    own = gradients(plain.override("speed.compile=true", *changes), dtype=dtype)
    assert_equal(own, usual)
    # The three blocks share their graphs; checkpointed, one with a gradient and one without.
    assert 1 <= counter.frame_count <= 2
    assert not counters["graph_break"], "the tap is outside"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("changes", [(), (LORA, CHECKPOINTED)], ids=["all-weights", "lora"])
def test_differentiated_and_generated_code_trains_nearly_alike(
    plain: Recipe, compiled_by, changes, backend: str
) -> None:
    usual = gradients(plain.override(*changes))
    compiled_by(backend)
    assert_close(gradients(plain.override("speed.compile=true", *changes)), usual)


def test_weights_that_are_exchanged_are_not_compiled(plain: Recipe) -> None:
    own = plain.override("speed.compile=true", LORA, "memory.frozen=float8")
    with pytest.raises(UserError, match="speed.compile does not go with .* memory.frozen float8"):
        Student(own, CPU)


def test_every_nth_block_is_computed_again(plain: Recipe) -> None:
    usual, calls = gradients(plain), []
    own = gradients(plain.override("memory.gradient_checkpointing=2"), calls)
    assert calls == [1, 2, 3, 2]
    assert_equal(own, usual)
    sizes = [
        predict(plain.override(f"memory.gradient_checkpointing={every}"), CPU).parts["activations"]
        for every in ("false", "2", "1", "true")
    ]
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3]


def test_inputs_of_blocks_can_wait_in_main_memory(plain: Recipe, monkeypatch) -> None:
    """There is one kind of memory here, so what is tested is that nothing is lost on the way."""
    moved = []

    def copied(pin_memory: bool) -> saved_tensors_hooks:
        assert pin_memory
        return saved_tensors_hooks(lambda x: moved.append(x.shape) or x.clone(), lambda x: x)

    own = plain.override(CHECKPOINTED, "memory.offload_activations=true")
    with pytest.raises(UserError, match="nowhere else to keep them"):
        Student(own, CPU)
    with monkeypatch.context() as patched:
        patched.setattr("videorepa.training.checkpointing.save_on_cpu", copied)
        patched.setattr(
            "videorepa.training.student.checkpoint_blocks",
            lambda backbone, memory, device: checkpoint_blocks(backbone, memory, CUDA),
        )
        assert_equal(gradients(own), gradients(plain))
    shapes = plain.backbone.shapes(plain.data)
    tokens = (plain.optim.batch_size, *shapes.grid.tokens.flatten(1, 3).shape[1:])
    assert moved.count(tokens) == shapes.blocks
    # A GPU then holds the input of one block at a time.
    kept, usual = (predict(r, CUDA) for r in (own, plain.override(CHECKPOINTED)))
    saved = usual.parts["activations"] - kept.parts["activations"]
    assert saved >= (shapes.blocks - 1) * math.prod(tokens) * 2
    first, second, *_ = in_training(own.override("memory.offload_activations=false"), CUDA, 1)
    assert "batch_size: 1" in first and "offload_activations: true" in second
    with pytest.raises(UserError, match="offload_activations: true needs gradient_checkpointing"):
        plain.override("memory.offload_activations=true")


class Waits(TorchDispatchMode):
    """Notes the operators after which a GPU and the processor wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        aten = torch.ops.aten
        result = 1 if func is aten._local_scalar_dense.default else func(*args, **(kwargs or {}))
        places = {
            value.device.type for value in tree_leaves((args, result)) if isinstance(value, Tensor)
        }
        is_read = func is aten._local_scalar_dense.default and args[0].device == CUDA
        if is_read or (len(places) > 1 and func in (aten._to_copy.default, aten.copy_.default)):
            stack = [frame for frame in extract_stack()[:-1] if "/torch/" not in frame.filename]
            self.found.append(f"{func} in {Path(stack[-1].filename).name}: {stack[-1].line}")
        return result


def waits_in_a_step(recipe: Recipe) -> list[str]:
    """What a second step waits for, up to where its values are read."""
    with torch.device("meta"):
        student = Student(recipe, torch.device("meta"), torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        for module in student.modules():
            module.to_empty(device=CUDA, recurse=False)
        student.device = student.backbone.device = CUDA
        batch = drawn(recipe, student).mapped(lambda tensor: torch.empty_like(tensor, device=CUDA))
        parameters = [p for p in student.parameters() if p.requires_grad]
        optimizer = make_optimizer(recipe, parameters, CUDA)
        for _ in range(2):
            waits.found.clear()
            with student.tapped():
                denoised, aligned = student(0, batch)
                (denoised.loss.mean() + aligned.loss).backward()
            norm = Alone(CUDA).clip_gradients(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            before = list(waits.found)
            measured = {"denoise": denoised.loss.mean(), **aligned.measured()}
            _read(Alone(CUDA), [measured], {"grad_norm": norm})
    (reading,) = set(waits.found[len(before) :])  # FakeTensorMode reads a list one by one.
    assert ".tolist()" in reading
    return before


@pytest.mark.parametrize("model", ["cogvideox", "wan"])
def test_a_step_waits_for_the_gpu_once(
    fake_cuda, plain: Recipe, recipe: Recipe, model: str
) -> None:
    own = plain if model == "wan" else recipe
    assert fake_cuda(waits_in_a_step, own) == []


def test_a_read_that_hangs_does_not_keep_a_training_from_ending(monkeypatch) -> None:
    monkeypatch.setattr(background, "PATIENCE", 0.05)
    goes_on, made = threading.Event(), Batch(torch.zeros(1), {}, torch.zeros(1), torch.zeros(1), {})

    def batches():
        yield made
        goes_on.wait(20)

    began, coming = time.monotonic(), ahead(batches(), CPU)
    try:
        assert next(coming) is made
        with pytest.raises(KeyboardInterrupt):
            coming.throw(KeyboardInterrupt)
        assert time.monotonic() - began < 10
    finally:
        goes_on.set()


def test_batches_come_to_a_gpu_beside_its_work(plain: Recipe, monkeypatch) -> None:
    """No GPU is here: what is tested is who waits for whom."""
    happened: list[str] = []
    where = threading.local()

    class Stream:
        def __init__(self, device: torch.device) -> None:
            happened.append("made")

        def __enter__(self) -> None:
            where.beside = True

        def __exit__(self, *_: object) -> None:
            where.beside = False

        def record_event(self) -> str:
            assert where.beside
            return "event"

        def wait_event(self, event: str) -> None:
            assert not getattr(where, "beside", False)
            happened.append(f"waits for the {event}")

    def sent(tensor: Tensor, device: torch.device, *_: object, **how: bool) -> Tensor:
        if how:  # The others are there, and become float32.
            assert device == CUDA and how == {"non_blocking": True} and where.beside
            happened.append("sent")
        return tensor

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device))
    student = Student(plain, CPU)
    made = drawn(plain, student)
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "pin_memory", lambda tensor: happened.append("pinned") or tensor)
        patched.setattr(Tensor, "to", sent)
        taken = list(ahead((made.to(CUDA) for _ in range(2)), CUDA))
    assert len(taken) == 2 and happened.count("waits for the event") == 2
    assert happened.count("sent") == happened.count("pinned") == 2 * 5
