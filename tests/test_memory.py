"""Trainings that take less memory train as they should, and what they take is known before."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import diffusers
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from videorepa.artifacts.run import Run
from videorepa.backbones import Backbone
from videorepa.errors import UserError
from videorepa.export import export
from videorepa.inspect import inspect
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.remedies import in_sampling, in_training
from videorepa.settings import plugins
from videorepa.system.device import peak_memory
from videorepa.train import train
from videorepa.training import cost as cost_module
from videorepa.training import memory
from videorepa.training.cost import CONTEXT_BYTES, predict
from videorepa.training.ledger import Ledger
from videorepa.training.parallel import ENGINES

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
RECIPES = Path(__file__).parents[1] / "recipes"
LORA = "train.lora={rank: 2, alpha: 4}"
CHECKPOINTED = "memory.gradient_checkpointing=true"
SETTING = re.compile(
    r"(?P<key>\w+\.\w+): (?P<values>\w+(?: or \w+)?)(?: with (?P<key2>\S+): (?P<value2>\d+))?,"
)
"""A remedy that is a setting, perhaps with another one."""

NEEDS = {"adamw8bit": "bitsandbytes", "nf4": "bitsandbytes", "int8": "torchao"}


def losses(run: Run) -> list[float]:
    return [json.loads(line)["loss"] for line in run.log_path.read_text().splitlines()]


def need(choice: str) -> None:
    if choice in NEEDS:
        pytest.importorskip(NEEDS[choice])


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        (("optim.batch_size=4", "align.centre=clips"), "batch_size"),
        ((LORA,), "offload: group"),
        ((LORA, "memory.frozen=int8"), "fsdp2"),
        ((LORA, CHECKPOINTED, "memory.offload=group"), "nf4"),
        ((LORA, CHECKPOINTED, "speed.compile=true"), "float8"),
        (("memory.optimizer=adamw8bit",), "fsdp2"),
        (("parallel={engine: fsdp2, context: 2}", CHECKPOINTED, LORA), "adamw8bit"),
        (("parallel={engine: ddp}", "optim.batch_size=2"), "frozen"),
        (("optim.batch_size=2", "optim.accumulate=10000"), "batch_size"),
    ],
)
def test_what_is_advised_can_be_followed(
    recipe: Recipe, changes: tuple[str, ...], absent: str
) -> None:
    recipe = recipe.override(*changes)
    remedies = in_training(recipe, CUDA, 2)
    assert not any(absent in remedy for remedy in remedies)
    advised = [match for remedy in remedies if (match := SETTING.match(remedy))]
    assert advised
    for match in advised:
        for value in match["values"].split(" or "):
            more = [f"{match['key2']}={match['value2']}"] if match["key2"] else []
            recipe.override(f"{match['key']}={value}", *more)


def test_nothing_is_moved_off_a_cpu(recipe: Recipe) -> None:
    advised = in_sampling(recipe.generation.changed(tiling=False), "none", CPU)
    assert [remedy.split(",")[0] for remedy in advised] == [
        "generation.tiling: true",
        "fewer frames or a smaller size",
    ]
    first, second, *_ = in_sampling(recipe.generation, "none", CUDA)
    assert "--offload model" in first and "--offload group" in second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("memory.frozen=int8",), r"frozen weights under `train\.lora`"),
        ((LORA, "memory.offload=group"), "needs gradient_checkpointing"),
        ((LORA, CHECKPOINTED, "memory.frozen=nf4", "memory.offload=group"), "does not go with"),
        (
            ("memory.optimizer=adamw8bit", "parallel={engine: fsdp2}"),
            "fsdp2 shards plain tensors alone",
        ),
        ((LORA, "memory.frozen=int4"), r"memory\.frozen"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe: Recipe, changes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe.override(*changes)


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        ("memory.frozen=bfloat16", 0.01),
        ("memory.frozen=float8", 0.05),
        ("memory.frozen=int8", 0.01),
        ("memory.frozen=nf4", 0.1),
        ("memory.optimizer=adamw8bit", 0.01),
    ],
)
def test_what_is_held_in_less_trains_nearly_alike_and_resumes_exactly(
    recipe: Recipe, tmp_path: Path, monkeypatch, change: str, tolerance: float
) -> None:
    need(change.partition("=")[2])
    prepare(recipe)
    # Of this rank, adapters are large enough for their moments to be held in 8 bits.
    lora = "train.lora={rank: 128, alpha: 128, targets: [to_q, to_k, to_v, to_out.0, proj]}"
    plain = recipe.override("optim.steps=3", "train.checkpoint_every=1", lora)
    less = plain.override(change)
    whole, usual = train(less, tmp_path / "whole"), train(plain, tmp_path / "plain")
    expected = losses(usual)
    forms = [{k: v.dtype for k, v in run.trained().trained.items()} for run in (whole, usual)]
    assert forms[0] == forms[1], "the adapters are those of any training"
    assert losses(whole) == pytest.approx(expected, rel=tolerance)
    assert losses(whole) != expected
    real = Run.append

    def stop(self: Run, values: dict) -> None:
        real(self, values)
        if values["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        train(less, tmp_path / "stopped")
    monkeypatch.undo()
    resumed = train(less, tmp_path / "stopped").trained()
    for key, value in whole.trained().trained.items():
        assert torch.equal(value, resumed.trained[key]), key


def test_offloaded_layers_train_as_others_do(recipe: Recipe, tmp_path: Path, monkeypatch) -> None:
    """There is one kind of memory here, so what is tested is that nothing is lost on the way."""
    prepare(recipe)
    plain = recipe.override("optim.steps=2", LORA, CHECKPOINTED)
    expected = train(plain, tmp_path / "plain")
    with pytest.raises(UserError, match="nowhere else"):
        train(plain.override("memory.offload=group"), tmp_path / "refused")
    real = memory.load_transformer

    def offloaded(*arguments):
        backbone = real(*arguments)
        memory.offload_layers(backbone.transformer, CPU)
        return backbone

    monkeypatch.setattr("videorepa.training.student.load_transformer", offloaded)
    found = train(plain, tmp_path / "offloaded").trained().trained
    for key, value in expected.trained().trained.items():
        assert torch.equal(value, found[key]), key


class OnTheDevice(TorchDispatchMode):
    """Counts the bytes of tensors on the pretended device, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[int, Any]] = {}
        self.most = 0

    @property
    def now(self) -> int:
        return sum(size for size, _ in self.live.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "cuda":
                storage = value.untyped_storage()
                gone = weakref.ref(storage, lambda _, key=storage._cdata: self.live.pop(key, None))
                self.live.setdefault(storage._cdata, (storage.nbytes(), gone))
        self.most = max(self.most, self.now)
        return result


def replacing(module: torch.nn.Module, convert: Any, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply` for tensors without content, which torch cannot swap."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and (found := convert(tensor)) is not tensor:
                    is_buffer = tensors is part._buffers
                    tensors[name] = found if is_buffer else torch.nn.Parameter(found, False)
    return module


def quantised_where_they_are(block: torch.nn.Module, form: None) -> None:
    """Takes the place of torchao's: 8 bits a weight, made on the device."""
    for layer in block.modules():
        if isinstance(layer, torch.nn.Linear):
            assert layer.weight.device.type == "cuda"
            layer.weight.data = layer.weight.data.to(torch.int8)


class FourBits:
    """Takes the place of bitsandbytes': 4 bits a weight, made when they come to the device."""

    def __init__(self, data: torch.Tensor, **_: Any) -> None:
        self.data = data

    def to(self, device: torch.device) -> torch.nn.Parameter:
        packed = self.data.to(device).flatten()[::2].to(torch.uint8)
        return torch.nn.Parameter(packed, requires_grad=False)


PACKAGES = SimpleNamespace(
    quantize_=quantised_where_they_are,
    Int8WeightOnlyConfig=lambda: None,
    Params4bit=FourBits,
    Linear4bit=lambda rows, columns, compute_dtype, device: torch.nn.Linear(
        rows, columns, device=device
    ),
)


def loaded_onto_the_device(recipe: Recipe, home: torch.device) -> tuple[int, int, int]:
    """The bytes there afterwards, at most meanwhile, and of the first block in bfloat16."""

    def whole(self: Backbone, stock_class: str, part: str, dtype: torch.dtype) -> Any:
        model = getattr(diffusers, stock_class).from_config(self.spec.config(part))
        return model.to(dtype).to(self.home).requires_grad_(False)

    with (
        patch.object(Backbone, "whole", whole),
        patch.object(torch.nn.Module, "_apply", replacing),
        patch.object(memory, "extra_for", lambda setting: PACKAGES),
        FakeTensorMode(allow_non_fake_inputs=True),
        OnTheDevice() as counted,
    ):
        backbone = memory.load_transformer(recipe, CUDA, torch.bfloat16, home)
        assert {p.device for p in backbone.transformer.parameters()} == {home}
        block = 2 * sum(p.numel() for p in plain_block(backbone).parameters())
        return counted.now, counted.most, block


def plain_block(backbone: Backbone) -> torch.nn.Module:
    """A block as it was before it was converted."""
    with torch.device("meta"):
        plain = type(backbone.transformer).from_config(backbone.transformer.config)
    return plain.transformer_blocks[0]


@pytest.mark.parametrize("frozen", ["float8", "int8", "nf4"])
def test_the_device_never_holds_more_than_a_block_in_full_precision(
    recipe: Recipe, tmp_path: Path, fake_cuda, frozen: str
) -> None:
    own = deepened(recipe, tmp_path / "deep", blocks=12).override(LORA, f"memory.frozen={frozen}")
    held, most, block = fake_cuda(loaded_onto_the_device, own, CUDA)
    assert 0 < held <= most <= held + block


def test_what_becomes_shards_waits_in_main_memory(recipe: Recipe, fake_cuda) -> None:
    accelerator = SimpleNamespace(device=CUDA, process_index=0, num_processes=2)
    homes = {engine(accelerator).label: engine(accelerator).home for engine in ENGINES.values()}
    assert homes == {"DDP": CUDA, "FSDP2": CPU}
    own = recipe.override(LORA, "memory.frozen=bfloat16")
    assert fake_cuda(loaded_onto_the_device, own, CPU)[:2] == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["float8", "int8", "nf4"])
def test_a_lora_trained_over_held_weights_is_exported_as_any(
    recipe: Recipe, tmp_path: Path, frozen: str
) -> None:
    need(frozen)
    prepare(recipe)
    run = train(recipe.override("optim.steps=2", LORA, f"memory.frozen={frozen}"), tmp_path / "run")
    assert export(run.path, tmp_path / "out").name == "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("choice", ["memory.frozen=int8", "memory.optimizer=adamw8bit"])
def test_a_missing_package_is_named(
    recipe: Recipe, tmp_path: Path, monkeypatch, choice: str
) -> None:
    package, real = NEEDS[choice.partition("=")[2]], importlib.import_module

    def without(name: str, *rest):
        if name.startswith(f"{package}."):
            raise ImportError(f"No module named {package!r}")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    prepare(recipe)
    with pytest.raises(UserError, match=rf"pip install 'videorepa\[{package}\]'"):
        train(recipe.override(LORA, choice), tmp_path / "run")


def test_the_prediction_counts_what_there_is(recipe: Recipe) -> None:
    cost = predict(recipe.override("train.ema=0.9"), CPU)
    assert cost.peak == sum(cost.parts.values()) >= cost.loading > cost.parts["process"] > 1e8
    parameters = inspect(recipe).contract.shapes.parameters
    # The positions are a buffer beside the parameters.
    assert 4 * parameters <= cost.parts["weights"] < 4.5 * parameters
    assert cost.parts["averages"] == 4 * parameters
    assert cost.parts["optimiser"] == 8 * parameters
    assert 0 < cost.parts["gradients"] <= 4 * parameters


@pytest.mark.slow
def test_the_prediction_knows_how_much_loading_takes(recipe: Recipe) -> None:
    plain = predict(recipe, CPU)
    held = 4 * inspect(recipe).contract.shapes.parameters
    assert plain.loading - plain.parts["process"] == held, "they stay in the file, mapped"
    less = predict(recipe.override(LORA, "memory.frozen=bfloat16"), CPU)
    (file,) = recipe.backbone.weight_files()
    taken_out = less.loading - less.parts["process"] - file.stat().st_size
    assert held / 2 < taken_out < less.parts["weights"]
    published = recipe.override("backbone.weights=zai-org/CogVideoX-2b")
    assert predict(published, CPU).loading == 0, "its files are not here"


DEPTHS = ("num_layers", "num_single_layers", "num_visual_blocks")


def deepened(recipe: Recipe, folder: Path, blocks: int) -> Recipe:
    """The recipe with a model of more blocks, of which there is the configuration alone."""
    source = Path(recipe.backbone.source)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in folder.glob("transformer*/config.json"):
        config = json.loads(path.read_text())
        config |= {key: blocks for key in DEPTHS if key in config}
        path.write_text(json.dumps(config))
    return recipe.override(f"backbone.weights={folder}")


@pytest.mark.parametrize(
    ("device", "changes"),
    [
        ("cpu", (LORA, CHECKPOINTED, "memory.frozen=bfloat16")),
        ("cpu", ("memory.gradient_checkpointing=6",)),
        ("cuda", (LORA, CHECKPOINTED, "memory.offload_activations=true")),
        ("cuda", (CHECKPOINTED, "optim.accumulate=3", "train.ema=0.9", "align.block=6")),
    ],
    ids=["lora", "partial", "offloaded", "cuda"],
)
@pytest.mark.slow
def test_entering_like_blocks_again_equals_running_them(
    recipe: Recipe, tmp_path: Path, monkeypatch, device: str, changes: tuple[str, ...]
) -> None:
    deep = deepened(recipe, tmp_path / "deep", blocks=12).override(*changes)
    check_shortcut(deep, torch.device(device), monkeypatch)


def check_shortcut(recipe: Recipe, device: torch.device, monkeypatch) -> None:
    skipped = []
    real = cost_module._skip_repeats
    monkeypatch.setattr(
        cost_module, "_skip_repeats", lambda *given: skipped.extend(found := real(*given)) or found
    )
    short = predict(recipe, device)
    monkeypatch.setattr(cost_module, "_skip_repeats", lambda *given: [])
    whole = predict(recipe, device)
    assert skipped
    for cost in (short, whole):
        cost.parts.pop("process", None)  # It has grown in between.
    assert (short.parts, short.operations) == (whole.parts, whole.operations)


def test_the_prediction_scales_as_it_must(recipe: Recipe) -> None:
    one, two = (predict(recipe.override(f"optim.batch_size={n}"), CPU) for n in (2, 4))
    assert two.parts["activations"] == pytest.approx(2 * one.parts["activations"], rel=0.1)
    assert two.operations == pytest.approx(2 * one.operations, rel=0.02)
    assert two.parts["weights"] == one.parts["weights"]
    accumulated = predict(recipe.override("optim.accumulate=6"), CPU)
    assert accumulated.operations == 3 * one.operations
    saved = predict(recipe.override(CHECKPOINTED), CPU)
    assert saved.parts["activations"] < 0.7 * one.parts["activations"]
    # One forward pass more, of the blocks, beside a forward pass and a backward pass twice that.
    assert 1.2 < saved.operations / one.operations < 4 / 3
    lora = predict(recipe.override(LORA), CPU)
    few = inspect(recipe.override(LORA)).trained_parameters
    assert lora.parts["optimiser"] == 8 * few
    assert lora.parts.get("gradients", 0) <= 4 * few
    assert lora.operations < one.operations


def test_frozen_weights_are_held_in_the_precision_of_the_training(recipe: Recipe) -> None:
    assert recipe.memory.frozen == "float32", "nothing is frozen"
    values = recipe.model_dump(mode="json")
    values["train"] |= {"lora": {"rank": 2, "alpha": 4}, "precision": "auto"}
    named = Recipe.parse(values)
    del values["memory"]["frozen"]
    usual = Recipe.parse(values)
    assert (named.memory.frozen, usual.memory.frozen) == ("float32", "auto")
    low = usual.override("memory.frozen=bfloat16")

    def held(recipe: Recipe, device: torch.device) -> int:
        return predict(recipe, device).parts["weights"]

    assert held(usual, CUDA) == held(low, CUDA) < held(named, CUDA)
    usual, named = (each.override("train.precision=float32") for each in (usual, named))
    assert held(usual, CUDA) == held(named, CUDA)


def test_held_weights_take_what_their_form_takes(recipe: Recipe) -> None:
    sizes = {
        frozen: predict(recipe.override(LORA, f"memory.frozen={frozen}"), CPU).parts["weights"]
        for frozen in ("float32", "bfloat16", "float8", "int8", "nf4")
    }
    assert sizes["float32"] > sizes["bfloat16"] > sizes["float8"] > sizes["nf4"]
    # Adapters, norms and embeddings stay as they are; linear layers go from 4 bytes to 2 and 1.
    # The table of positions, which is made in float64, is computed with in float32 then.
    table = sum(buffer.nbytes for buffer in recipe.backbone.skeleton(torch.float32).buffers())
    saved = [sizes["float32"] - table // 2 - sizes[held] for held in ("bfloat16", "float8")]
    assert 2 * saved[1] == 3 * saved[0] > 0


def test_a_gpu_need_not_be_here_for_its_prediction(recipe: Recipe) -> None:
    recipe = recipe.override("train.precision=auto")
    cost = predict(recipe, CUDA)
    assert cost.dtype == torch.bfloat16 and "process" not in cost.parts
    assert cost.parts["context"] == CONTEXT_BYTES
    text = str(inspect(recipe, device="cuda"))
    assert "peak memory, on one cuda in bfloat16" in text and "all 5 " in text
    assert "fits             24 GB: yes, 48 GB: yes, 80 GB: yes" in text
    assert "fits" not in str(inspect(recipe, device="cpu"))


def on_the_device(recipe: Recipe) -> tuple[dict[str, int], float]:
    """What the ledger counts of a step whose tensors are on the pretended device."""
    cost = predict(recipe, CUDA, torch.device("cuda:0"))
    return cost.parts, cost.operations


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (CHECKPOINTED, "optim.accumulate=3", "train.ema=0.9"),
        (LORA, "memory.frozen=float32"),
        (LORA, CHECKPOINTED, "memory.frozen=bfloat16"),
        (LORA, CHECKPOINTED, "memory.frozen=float8"),
        (LORA, CHECKPOINTED, "memory.frozen=nf4"),
    ],
    ids=["all weights", "saved", "lora", "bfloat16", "float8", "nf4"],
)
def test_the_prediction_for_a_gpu_follows_its_rules(recipe: Recipe, fake_cuda, changes) -> None:
    recipe = recipe.override("train.precision=auto", *changes)
    predicted = predict(recipe, CUDA)
    parts, operations = fake_cuda(on_the_device, recipe)
    # Some operators of CUDA keep the state of a random generator.
    assert predicted.parts == pytest.approx(parts, rel=1e-4, abs=500)
    assert predicted.operations == operations


@pytest.mark.parametrize(
    ("name", "changes", "gigabytes", "fits"),
    [
        ("5b", ("memory.frozen=nf4",), 13.33, "24 GB: yes, 48 GB: yes, 80 GB: yes"),
        ("2b", (), 33.01, "24 GB: no, 48 GB: yes, 80 GB: yes"),
    ],
)
def test_published_sizes_take_what_the_device_counts(
    fake_cuda, name: str, changes, gigabytes: float, fits: str
) -> None:
    recipe = Recipe.from_yaml(RECIPES / f"videorepa-{name}.yaml")
    recipe = recipe.override("optim.batch_size=1", "optim.accumulate=32", *changes)
    parts, _ = fake_cuda(on_the_device, recipe)
    inspection = inspect(recipe, device="cuda")
    assert inspection.cost.parts == pytest.approx(parts, abs=1000)
    assert sum(parts.values()) / 1e9 == pytest.approx(gigabytes, abs=0.01)
    assert f"fits             {fits}" in str(inspection)


@pytest.mark.slow
@pytest.mark.parametrize("name", plugins.names("backbones"))
def test_every_published_model_takes_a_step_on_the_device(fake_cuda, name: str) -> None:
    if name in ("cosmos", "cosmos_25") and importlib.util.find_spec("torchvision") is None:
        pytest.skip("the transformer of Cosmos in diffusers needs torchvision")
    kind = plugins.description("backbones", name)
    weights = next(iter(kind.published))
    size = kind(weights=weights).default_size()
    height, width = (side // 64 * 32 for side in (size.height, size.width))
    recipe = Recipe.parse(
        {
            "name": "step",
            "backbone": {"name": name, "weights": weights},
            "align": {"block": 2, "target": "latents"},
            "data": {"manifest": "clips.csv", "cache": "cache"}
            | {"frames": 25, "height": height, "width": width},
            "optim": {"steps": 1, "learning_rate": 1e-3},
            "train": {"lora": {"rank": 8}},
            "memory": {"gradient_checkpointing": True},
        }
    )
    parts, operations = fake_cuda(on_the_device, recipe)
    predicted = predict(recipe, CUDA)
    assert predicted.parts == pytest.approx(parts, abs=5000)
    assert predicted.operations == operations


def while_validating(recipe: Recipe, place: torch.device) -> int:
    return predict(recipe, CUDA, place).validation


def test_what_a_validation_takes_is_predicted(recipe: Recipe, fake_cuda) -> None:
    recipe = recipe.override(LORA, "train.precision=auto", "train.ema=0.9")
    assert while_validating(recipe, CPU) == 0
    sampled = recipe.override("validation={every: 2, prompts: [A ball rolls.]}")
    predicted = while_validating(sampled, CPU)
    found = fake_cuda(while_validating, sampled, torch.device("cuda:0"))
    assert predicted == pytest.approx(found, abs=500)
    cost = predict(sampled, CUDA)
    held = sum(cost.parts[part] for part in ("weights", "optimiser", "averages", "context"))
    decoded = 2 * 9 * 3 * 16 * 16  # A clip in bfloat16.
    assert cost.validation > held + decoded
    assert f"in a validation  {cost.validation / 1e6:.2f} MB" in str(
        inspect(sampled, device="cuda")
    )


def test_an_update_takes_what_is_said(recipe: Recipe) -> None:
    for device, expected in ((CPU, 2 * 400), (CUDA, 0)):
        with FakeTensorMode(), Ledger() as ledger:
            parameters = [torch.empty(size) for size in (100, 40)]
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            optimizer = memory.make_optimizer(recipe, parameters, device)
            optimizer.step()
            ledger.start()
            before = ledger.at_peak.total()
            optimizer.step()
        assert ledger.at_peak.total() - before == pytest.approx(expected, abs=20)
        assert memory.update_bytes(recipe, parameters, device) == expected


@pytest.mark.slow
@pytest.mark.parametrize("changes", [(), (LORA, CHECKPOINTED)], ids=["all-weights", "lora"])
def test_the_micro_models_prediction_is_what_is_measured(tmp_path: Path, changes) -> None:
    script = Path(__file__).parents[1] / "timings" / "memory.py"
    spec = importlib.util.spec_from_file_location("memory_benchmark", script)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    recipe = benchmark.micro_recipe(tmp_path).override(*changes)
    prepare(recipe)
    path = tmp_path / "recipe.yaml"
    recipe.to_yaml(path)
    predicted, _ = json.loads(benchmark.run(benchmark.PREDICT, str(path)))
    peak = benchmark.measured(path, tmp_path / "run", **benchmark.GIVE_BACK)
    assert predicted == pytest.approx(peak, rel=0.15)


def test_peak_memory_is_counted_in_bytes_on_macos(monkeypatch) -> None:
    usage = SimpleNamespace(ru_maxrss=2**20)
    monkeypatch.setattr("resource.getrusage", lambda who: usage)
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_memory(CPU) == 2**30
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory(CPU) == 2**20


def test_peak_memory_is_known_where_there_is_no_resource_module(monkeypatch) -> None:
    assert 1e8 < peak_memory(CPU) < 1e11
    monkeypatch.setitem(sys.modules, "resource", None)  # As on Windows.
    windows = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123))
    monkeypatch.setattr("psutil.Process", lambda: windows)
    assert peak_memory(CPU) == 123
