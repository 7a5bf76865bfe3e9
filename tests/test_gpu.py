"""What only a GPU can tell: `make test-gpu` takes about ten minutes on one, without a network.

Models have random weights, in the published sizes where size is what is tested. Without a GPU every
test is skipped. The figures go to build/gpu.json, or to where GPU_FIGURES says; timings are written
down and fail nothing. GPU_REHEARSAL=1 goes through the same code on the CPU with tiny models, where
the figures mean nothing, so that the code has been run before a GPU is there.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from conftest import recipe_values, write_clips
from test_backbones import Twin
from test_parallel import free_port
from twins import TWINS
from videorepa.data.batches import Batch
from videorepa.losses.relation import Relation
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.settings import plugins
from videorepa.system.device import peak_rate
from videorepa.system.files import atomic_write
from videorepa.tokens import TokenGrid
from videorepa.train import train
from videorepa.training.cost import predict
from videorepa.training.parallel import Alone
from videorepa.training.state import Training
from videorepa.training.student import Student

pytestmark = pytest.mark.gpu

REHEARSAL = bool(os.environ.get("GPU_REHEARSAL"))
FIGURES = Path(os.environ.get("GPU_FIGURES") or Path(__file__).parents[1] / "build" / "gpu.json")
CPU = torch.device("cpu")
LORA = "train.lora={rank: 128, alpha: 64}"
CHECKPOINTED = "memory.gradient_checkpointing=true"
NEEDS = {"nf4": "bitsandbytes", "adamw8bit": "bitsandbytes", "int8": "torchao"}


@pytest.fixture(scope="module")
def device() -> torch.device:
    if REHEARSAL:
        return CPU
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine; GPU_REHEARSAL=1 goes through the code on the CPU")
    return torch.device("cuda:0")


@pytest.fixture(scope="module")
def figures(device: torch.device) -> Iterator[dict[str, Any]]:
    """The figures by the test that found them, written when all tests are over."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": str(device)}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    yield found
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(FIGURES, json.dumps(found, indent=1) + "\n")


@pytest.fixture(autouse=True)
def _exact_and_empty() -> Iterator[None]:
    """Products in float32 are exact, and nothing of an earlier test is on the device."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def need(change: str) -> None:
    for word, package in NEEDS.items():
        if word in change:
            pytest.importorskip(package)


def draw(*shape: int, device: torch.device = CPU, seed: int = 0) -> Tensor:
    """Normal numbers that are the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def batch(recipe: Recipe, student: Student, device: torch.device) -> Batch:
    """A micro-batch of random content, the same on every device."""
    shapes, count = recipe.backbone.shapes(recipe.data), recipe.optim.batch_size
    text = {
        name: draw(count, *like.shape).to(device)
        if like.is_floating_point()
        else torch.ones(count, *like.shape, dtype=like.dtype, device=device)
        for name, like in shapes.text.items()
    }
    latents = draw(count, *shapes.latents, seed=1)
    timestep = student.backbone.sample_timesteps(latents, torch.Generator().manual_seed(2))
    teachers = {}
    for term in recipe.terms.values():
        if term.encoder is not None:
            grid = term.encoder.shape(recipe.data.frames)
            tokens = draw(count, *grid.tokens.shape[1:], device=device, seed=3)
            teachers[term.encoder] = TokenGrid(tokens, grid.start, grid.stride)
    noise = draw(count, *shapes.latents, device=device, seed=4)
    return Batch(latents.to(device), text, noise, timestep.to(device), teachers)


def tiny(kind: str, root: Path, teacher: Path, *changes: str) -> Recipe:
    described, make = TWINS[kind]
    twin = Twin(described, make(root / kind))
    clips = write_clips(root / "clips", 4, twin.size.height, twin.size.frames)
    folders = {"backbone": twin.folder, "teacher": teacher}
    values = recipe_values(folders, clips, root / "cache")
    values["backbone"] = twin.spec.model_dump()
    values["data"] |= twin.size.model_dump()
    return Recipe.parse(values).override("optim.steps=2", "optim.accumulate=1", *changes)


# Everything runs, and computes what the CPU computes.


@pytest.mark.parametrize("kind", TWINS)
def test_every_backbone_prepares_trains_validates_and_goes_on(
    kind: str, twins: dict[str, Path], tmp_path: Path, device: torch.device
) -> None:
    validated = "validation={every: 2, prompts: [A ball falls.]}"
    recipe = tiny(kind, tmp_path, twins["teacher"], "train.precision=auto", validated)
    assert prepare(recipe, device=str(device)).made == 4
    run = train(recipe, tmp_path / "run", device=str(device))
    assert len(run.log) == 2
    longer = recipe.override("optim.steps=3")
    assert len(train(longer, tmp_path / "longer", device=str(device)).log) == 3


MEMORY = [
    "train.ema=0.9",
    "memory.optimizer=adamw8bit",
    *(f"memory.frozen={kind}" for kind in ("bfloat16", "float8", "int8", "nf4")),
    "memory.offload=group",
]


@pytest.mark.parametrize("kind", ["cogvideox", "wan-2.1", "mochi"])
@pytest.mark.parametrize("change", MEMORY)
def test_every_way_to_save_memory_trains(
    kind: str, change: str, twins: dict[str, Path], tmp_path: Path, device: torch.device
) -> None:
    need(change)
    if REHEARSAL and ("offload" in change or "8bit" in change):
        pytest.skip("needs a GPU")
    adapters = () if change in MEMORY[:2] else ("train.lora={rank: 4, alpha: 4}",)
    changes = ("train.precision=auto", CHECKPOINTED, *adapters, change)
    recipe = tiny(kind, tmp_path, twins["teacher"], *changes)
    prepare(recipe, device=str(device))
    assert len(train(recipe, tmp_path / "run", device=str(device)).log) == 2


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"]
)
@pytest.mark.parametrize("kind", TWINS)
def test_losses_and_gradients_are_those_of_the_cpu(
    kind: str,
    dtype: torch.dtype,
    tolerance: float,
    twins: dict[str, Path],
    tmp_path: Path,
    device: torch.device,
    figures: dict[str, Any],
) -> None:
    recipe = tiny(kind, tmp_path, twins["teacher"])

    def losses_and_gradient(where: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        student = Student(recipe, where, dtype)
        student.terms.load_state_dict(weights(student.terms))
        with student.tapped():
            denoised, aligned = student(0, batch(recipe, student, where))
            (denoised.loss.mean() + aligned.loss).backward()
        gradients = [p.grad.flatten() for p in student.trained.values() if p.grad is not None]
        values = torch.stack([denoised.loss.mean(), aligned.loss])
        return values.detach().cpu().float(), torch.cat(gradients).cpu().float()

    theirs, ours = losses_and_gradient(CPU, torch.float32), losses_and_gradient(device, dtype)
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]
    figures.setdefault("agreement with the CPU", {})[f"{kind} {dtype}"] = apart
    assert apart[0] < tolerance, "losses"
    # A gradient is a sum over all tokens of rounded products.
    assert apart[1] < 10 * tolerance, "gradients"


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """The same values on every device in place of a module's own."""
    return {
        name: 0.1 * draw(*value.shape, seed=number)
        for number, (name, value) in enumerate(module.state_dict().items())
    }


# Published sizes.

SIZES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "2B, all weights": ("cogvideox", "CogVideoX-2b", "videorepa-2b", ()),
    "2B, LoRA, bfloat16": ("cogvideox", "CogVideoX-2b", "videorepa-2b", (LORA, "bfloat16")),
    "5B, LoRA, bfloat16": ("cogvideox", "CogVideoX-5b", "videorepa-5b", ("bfloat16",)),
    "5B, LoRA, nf4": ("cogvideox", "CogVideoX-5b", "videorepa-5b", ("nf4",)),
    "Wan 1.3B, LoRA": ("wan", "Wan2.1-T2V-1.3B-Diffusers", "videorepa-2b", (LORA, "bfloat16")),
}
"""Backbone, published name, recipe and changes; a bare word is the form of the frozen weights."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A function from a backbone and its published name to a folder of random weights."""
    root, made = tmp_path_factory.mktemp("published"), {}

    def make(name: str, model: str) -> Path:
        if model not in made:
            made[model] = write_model(root / model, name, model)
        return made[model]

    return make


def write_model(folder: Path, name: str, model: str) -> Path:
    """The parts of a pipeline's folder that a training reads, with random weights."""
    import diffusers

    spec = plugins.description("backbones", name)(weights=f"published/{model}")
    transformer = spec.skeleton(torch.bfloat16)
    if REHEARSAL:
        small = {"num_layers": 20, "num_attention_heads": 1, "ffn_dim": 64}
        kind, config = type(transformer), dict(transformer.config)
        config |= {key: value for key, value in small.items() if key in config}
        with torch.device("meta"):
            transformer = kind.from_config(config).bfloat16()
    (folder / "transformer").mkdir(parents=True)
    transformer.save_config(folder / "transformer")
    # Small, so that no activation overflows however deep the model is.
    weights = {
        key: torch.empty(like.shape, dtype=torch.bfloat16).normal_(0, 0.02)
        if like.dim() > 1
        else torch.full(like.shape, float("norm" in key and "weight" in key)).bfloat16()
        for key, like in transformer.state_dict().items()
    }
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for part in ("vae", "model_index"):
        path = folder / ("model_index.json" if part == "model_index" else f"{part}/config.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(spec.config(part), default=str))
    index = {"_class_name": spec.pipeline_class, **spec.config("model_index")}
    (folder / "model_index.json").write_text(json.dumps(index, default=str))
    scheduler = "CogVideoXDPMScheduler" if name == "cogvideox" else "UniPCMultistepScheduler"
    options = {} if name == "cogvideox" else {"use_flow_sigmas": True}
    getattr(diffusers, scheduler)(**options).save_pretrained(folder / "scheduler")
    return folder


def sized(case: str, published: Callable[[str, str], Path], *more: str) -> Recipe:
    name, model, recipe, changes = SIZES[case]
    for change in changes:
        need(change)
    words = [c if "=" in c else f"memory.frozen={c}" for c in changes]
    values = Recipe.from_yaml(Path(__file__).parents[1] / "recipes" / f"{recipe}.yaml").model_dump(
        mode="json"
    )
    values["backbone"] = {"name": name, "weights": str(published(name, model))}
    values["optim"] |= {"batch_size": 1, "accumulate": 1}
    if REHEARSAL:
        values["data"] |= {"frames": 9, "height": 64, "width": 96}
        values["encoder"] |= {"frames": 8, "height": 32, "width": 48}
    return Recipe.parse(values).override(*words, CHECKPOINTED, *more)


class Steps:
    """A training of a published size, of which steps can be taken one by one."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        student = Student(recipe, device)
        self.training = Training(recipe, Alone(device), student)
        self.device, self.recipe = device, recipe
        self.batch = batch(recipe, student, device)

    def take(self) -> float:
        """Take a step, and return how many seconds it took."""
        self.wait()
        begun = time.perf_counter()
        with self.training.student.tapped():
            denoised, aligned = self.training.model(0, self.batch)
            (denoised.loss.mean() + aligned.loss).backward()
        self.training.clip_gradients()
        self.training.update(1e-5)
        self.wait()
        return time.perf_counter() - begun

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@pytest.mark.parametrize("case", SIZES)
def test_inspect_knows_what_a_step_takes(
    case: str,
    published: Callable[[str, str], Path],
    device: torch.device,
    figures: dict[str, Any],
) -> None:
    recipe = sized(case, published)
    cost = predict(recipe, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = Steps(recipe, device)
    loading = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    for _ in range(2):  # The optimiser's moments are made in the first.
        steps.take()
    seconds = min(steps.take() for _ in range(3))
    # CUDA's own memory is not among what torch allocates.
    predicted = sum(cost.parts.values()) - cost.parts.get("context", 0)
    rate = cost.operations / seconds
    found: dict[str, float] = {"predicted_gb": predicted / 1e9, "seconds": seconds}
    found |= {"tflops": rate / 1e12}
    if peak := peak_rate(device, cost.dtype):
        found |= {"mfu": rate / peak}
    figures.setdefault("steps of published sizes", {})[case] = found
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        found |= {"measured_gb": peak / 1e9, "loading_gb": loading / 1e9}
        assert predicted == pytest.approx(peak, rel=0.05)


def test_5b_trains_in_24_gb(published: Callable[[str, str], Path], device: torch.device) -> None:
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 24e9 / whole))
    try:
        Steps(sized("5B, LoRA, nf4", published), device).take()
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)


def test_what_alignment_costs(
    published: Callable[[str, str], Path], device: torch.device, figures: dict[str, Any]
) -> None:
    """Teacher features from the cache, beside no alignment."""
    aligned = sized("2B, LoRA, bfloat16", published)
    plain = Recipe.parse(aligned.model_dump(mode="json") | {"encoder": None, "align": None})
    seconds: dict[str, list[float]] = {"none": [], "cached": []}
    trainings = {"none": Steps(plain, device), "cached": Steps(aligned, device)}
    for turn in range(6):
        for name, training in trainings.items():
            taken = training.take()
            if turn:
                seconds[name].append(taken)
    none, cached = min(seconds["none"]), min(seconds["cached"])
    figures["cost of alignment"] = {"none": none, "cached": cached, "ratio": cached / none}


def test_the_relation_loss_beside_the_plain_formula(
    device: torch.device, figures: dict[str, Any]
) -> None:
    """At the published shape: 13 x 30 x 45 tokens of width 768, of which all pairs are compared."""
    size = (4, 6, 6) if REHEARSAL else (12, 30, 45)
    student = draw(1, *size, 768, device=device).requires_grad_()
    teacher = draw(1, *size, 768, device=device, seed=1)
    grids = [TokenGrid(tokens) for tokens in (student, teacher)]

    def plain() -> Tensor:
        a, t = (F.normalize(grid.tokens.flatten(1, 3), dim=-1) for grid in grids)
        return F.relu((a @ a.mT - t @ t.mT).abs() - 0.1).mean()

    found, results = {}, {}
    for name, loss in {"plain": plain, "ours": lambda: Relation(margin=0.1)(*grids)}.items():
        student.grad = None
        times = []
        for _ in range(3):
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            student.grad, begun = None, time.perf_counter()
            value = loss()
            value.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        found[name] = {"seconds": min(times), "peak_gb": peak / 1e9}
        assert student.grad is not None
        results[name] = (value.detach(), student.grad.clone())
    figures["relation loss"] = found
    for ours, theirs in zip(results["ours"], results["plain"], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


# Going on, and several processes.


def test_a_deterministic_training_goes_on_bit_for_bit(
    twins: dict[str, Path], tmp_path: Path, device: torch.device, monkeypatch
) -> None:
    changes = ("optim.steps=4", "train.checkpoint_every=2", "train.deterministic=true")
    recipe = tiny("cogvideox", tmp_path, twins["teacher"], *changes, "train.precision=auto")
    prepare(recipe, device=str(device))
    whole = train(recipe, tmp_path / "whole", device=str(device)).trained()
    shorter = train(recipe, tmp_path / "stopped", device=str(device))
    for newer in sorted(shorter.checkpoints.glob("*4*")):
        newer.rename(tmp_path / newer.name)
    resumed = train(recipe, tmp_path / "stopped", device=str(device)).trained()
    for key, value in whole.trained.items():
        assert torch.equal(value, resumed.trained[key]), key


def test_one_process_of_nccl_trains_what_a_process_alone_does(
    twins: dict[str, Path], tmp_path: Path, device: torch.device, monkeypatch
) -> None:
    from videorepa.training.parallel import ENGINES, make_accelerator

    if REHEARSAL:
        pytest.skip("NCCL needs a GPU")
    recipe = tiny("cogvideox", tmp_path, twins["teacher"])
    prepare(recipe, device=str(device))
    alone = train(recipe, tmp_path / "alone", device=str(device))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", free_port())
    accelerator = make_accelerator(recipe, None)
    monkeypatch.setattr("videorepa.train.join_workers", lambda *_: ENGINES["ddp"](accelerator))
    shared = train(recipe, tmp_path / "shared", device=None)
    assert [row["loss"] for row in shared.log] == pytest.approx(
        [row["loss"] for row in alone.log], rel=1e-5
    )
