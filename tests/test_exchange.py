"""Import and export: published weights become plain diffusers files, and runs are handed out so."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from conftest import recipe_values
from videorepa.align.projector import Projector
from videorepa.align.taps import tap
from videorepa.artifacts import checkpoint
from videorepa.artifacts.model import trained_digest
from videorepa.artifacts.run import Run
from videorepa.artifacts.scores import Metric, Scores, Summary
from videorepa.errors import UserError
from videorepa.exchange import zero_checkpoint as zero
from videorepa.exchange.lora import LORA_FILE, Adapter, comfyui_names
from videorepa.exchange.model_card import model_card
from videorepa.export import export
from videorepa.import_weights import import_weights
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.train import train

TOLERANCE = 1e-4


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture
def published(golden: Path) -> Path:
    return golden / "videorepa_transformer_tiny"


@pytest.fixture
def given(published: Path) -> dict[str, Any]:
    io = load_file(published / "io.safetensors")
    names = ("hidden_states", "encoder_hidden_states", "timestep")
    return {name: io[name] for name in names} | {"return_dict": False}


def as_shards_of_the_plain_class(source: Path, folder: Path) -> Path:
    """The same weights in two files, by a config that knows nothing of the alignment."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    for key in ("align_layer", "align_dims", "projector_dim"):
        del config[key]
    config["_class_name"] = "CogVideoXTransformer3DModel"
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "diffusion_pytorch_model.safetensors")
    for shard in (0, 1):
        name = f"diffusion_pytorch_model-{shard + 1:05d}-of-00002.safetensors"
        save_file({key: weights[key] for key in sorted(weights)[shard::2]}, folder / name)
    return folder


# In.


@pytest.mark.parametrize("layout", ["as published", "sharded and plain", "in a pipeline"])
def test_a_published_transformer_becomes_stock_and_gives_the_published_answers(
    published: Path, given: dict[str, Any], tmp_path: Path, layout: str
) -> None:
    source = published / "transformer"
    if layout == "sharded and plain":
        source = as_shards_of_the_plain_class(source, tmp_path / "source")
    elif layout == "in a pipeline":
        source = shutil.copytree(source, tmp_path / "source" / "transformer").parent
    imported = import_weights(source, tmp_path / "out")
    assert files(tmp_path / "out") == [
        "projector.safetensors",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    config = json.loads((imported.product / "config.json").read_text())
    assert config["_class_name"] == "CogVideoXTransformer3DModel"
    assert not [key for key in config if "align" in key or "projector" in key]
    stock, found = CogVideoXTransformer3DModel.from_pretrained(
        imported.product, output_loading_info=True
    )
    assert not any(found.values())

    assert imported.projector is not None
    with safe_open(imported.projector, "pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about["block"] == (None if layout == "sharded and plain" else 3)
    projector = Projector(student_width=48, teacher_width=24, hidden=40)
    projector.load_state_dict(load_file(imported.projector))
    io = load_file(published / "io.safetensors")
    with torch.no_grad(), tap(stock.transformer_blocks[2]) as tapped:
        sample = stock(**given)[0]
        aligned = projector.mlp(tapped.take()[0].unflatten(1, (4, 4, 6)))
    assert error(sample, io["sample"]) < TOLERANCE
    assert error(aligned, io["aligned_features"]) < TOLERANCE
    conv = load_file(published / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(projector.conv.weight, conv["downsampler_cogvideo_output.weight"])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_published_lora_is_applied_at_its_strength_by_stock_diffusers(
    published: Path, given: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    name = "pytorch_lora_weights.safetensors"
    source = published / name if kind == "file" else tmp_path / "lora"
    if kind == "folder":
        source.mkdir()
        shutil.copy(published / name, source)
    imported = import_weights(source, tmp_path / "out", alpha=4)
    assert files(tmp_path / "out") == [name] and imported.projector is None
    stock = CogVideoXTransformer3DModel.from_pretrained(
        import_weights(published / "transformer", tmp_path / "base").product
    )
    weights, metadata = CogVideoXPipeline.lora_state_dict(
        imported.product, return_lora_metadata=True
    )
    CogVideoXPipeline.load_lora_into_transformer(weights, stock, metadata=metadata)
    io = load_file(published / "lora_io.safetensors")
    with torch.no_grad():
        assert error(stock(**given)[0], io["sample_with_lora_alpha4_rank8"]) < TOLERANCE
    assert [(c.r, c.lora_alpha) for c in stock.peft_config.values()] == [(8, 8)]
    with pytest.raises(UserError, match="there is nothing to import"):
        import_weights(imported.product, tmp_path / "again", alpha=4)


def pose_as_deepspeed(monkeypatch) -> list[type]:
    """Classes that are pickled under the names of those that lie in DeepSpeed's files."""
    kinds = []
    for place in (
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.utils.tensor_fragment.fragment_address",
    ):
        home, _, name = place.rpartition(".")
        kind: Any = type(name, (int,) if name.endswith("Enum") else (), {"__module__": home})
        if name.endswith("Enum"):
            kind.__reduce__ = lambda self: (type(self), (int(self),))
        module: Any = types.ModuleType(home)
        setattr(module, name, kind)
        parts = home.split(".")
        for end in range(1, len(parts)):
            parent = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, home, module)
        kinds.append(kind)
    return kinds


def write_zero(folder: Path, weights: dict[str, Tensor], ranks: int, monkeypatch) -> Path:
    """A checkpoint of float32 `weights` as DeepSpeed's ZeRO stage 2 leaves it, made by hand: two
    groups of parameters, each one flat vector with gaps between them that is filled up, parted
    among the ranks, and saved without the filling."""

    stage, scaler, address = pose_as_deepspeed(monkeypatch)
    states = folder / "pytorch_model"
    states.mkdir(parents=True)
    (folder / "latest").write_text("pytorch_model")
    proof = folder / "proof"
    (folder / "zero_to_fp32.py").write_text(f"open({str(proof)!r}, 'w').close()\n")
    groups = [
        {k: v for k, v in weights.items() if v.dim() > 1},
        {k: v for k, v in weights.items() if v.dim() == 1},
    ]
    model = {
        "module": {key: value.bfloat16() for key, value in weights.items()},
        "buffer_names": [],
        "param_shapes": [{key: value.shape for key, value in group.items()} for group in groups],
        "frozen_param_fragments": {},
        "shared_params": {},
        "ds_version": "0.16.4",
    }
    torch.save(model, states / "mp_rank_00_model_states.pt")
    gaps = [[index % 3 for index in range(len(group))] for group in groups]
    flat = [
        torch.cat(
            [F.pad(value.flatten(), (0, gap)) for value, gap in zip(g.values(), gaps_, strict=True)]
        )
        for g, gaps_ in zip(groups, gaps, strict=True)
    ]
    fill = [-vector.numel() % (2 * ranks) for vector in flat]
    assert max(fill) > 0, "the partitions are to be uneven"
    filled = [torch.cat([v, torch.zeros(n)]) for v, n in zip(flat, fill, strict=True)]
    for rank in range(ranks):
        parts = [vector.chunk(ranks)[rank].clone() for vector in filled]
        if rank == ranks - 1:
            parts = [part[: len(part) - n].clone() for part, n in zip(parts, fill, strict=True)]
        content = {
            "loss_scaler": scaler(),
            "base_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(3)}}},
            "single_partition_of_fp32_groups": parts,
            "zero_stage": stage(2),
            "param_alignment_paddings": gaps,
            "partition_count": [ranks] * 2,
            "param_slice_mappings": [{"a": address()}],
        }
        torch.save(
            {"optimizer_state_dict": content, "ds_version": "0.16.4"},
            states / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    return folder


@pytest.fixture
def base(published: Path, tmp_path: Path) -> str:
    """What the published trainer started from: a pipeline whose transformer is configured so."""
    folder = tmp_path / "base"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    config = json.loads((published / "transformer" / "config.json").read_text())
    for key in ("align_layer", "align_dims", "projector_dim"):
        del config[key]
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_buffers_frozen_and_shared_weights_are_taken_along(tmp_path: Path, monkeypatch) -> None:
    source = write_zero(
        tmp_path / "zero", {"a": torch.randn(3, 3), "b": torch.randn(5)}, 2, monkeypatch
    )
    path = source / "pytorch_model" / "mp_rank_00_model_states.pt"
    model = torch.load(path, weights_only=True)
    model["module"]["table"] = torch.arange(3.0)
    frozen = {"frozen": torch.randn(2)}
    model |= {"buffer_names": ["table"], "frozen_param_fragments": frozen}
    torch.save(model | {"shared_params": {"tied": "a"}}, path)
    merged = zero.merge(source)
    assert merged.keys() == {"a", "b", "table", "frozen", "tied"}
    expected = {"tied": merged["a"], "table": torch.arange(3.0), **frozen}
    assert all(torch.equal(merged[name], value) for name, value in expected.items())


@pytest.mark.parametrize("ranks", [2, 11])
def test_a_zero_checkpoint_gives_the_published_files_without_its_script(
    published: Path, base: str, tmp_path: Path, monkeypatch, ranks: int
) -> None:
    whole = load_file(published / "transformer" / "diffusion_pytorch_model.safetensors")
    source = write_zero(tmp_path / "zero", whole, ranks, monkeypatch)
    imported = import_weights(source, tmp_path / "out", base=base)
    direct = import_weights(published / "transformer", tmp_path / "direct")
    assert files(tmp_path / "out") == files(tmp_path / "direct")
    for name in files(tmp_path / "out"):
        if name.endswith(".safetensors"):
            ours, theirs = (load_file(tmp_path / folder / name) for folder in ("out", "direct"))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    configs = [(found.product / "config.json").read_text() for found in (imported, direct)]
    assert configs[0] == configs[1]
    assert not (source / "proof").exists()
    with pytest.raises(UserError, match=r"missing: .*trained from with --base"):
        import_weights(source, tmp_path / "2b")  # Its configuration is the default.


# Out.


@pytest.fixture(scope="module")
def lora_run(twins: dict[str, Path], clips: Path, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("lora")
    recipe = Recipe.parse(recipe_values(twins, clips, folder / "cache")).override(
        "train.lora={rank: 4, alpha: 2, targets: [to_q, to_out.0, ff.net.0.proj, ff.net.2]}",
        "optim.learning_rate=0.02",
    )
    prepare(recipe)
    return train(recipe, folder / "run")


@pytest.fixture
def arguments() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(5)
    return {
        "hidden_states": torch.randn(1, 3, 4, 4, 4, generator=draw),
        "encoder_hidden_states": torch.randn(1, 12, 16, generator=draw),
        "timestep": torch.tensor([100]),
        "return_dict": False,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_lora_is_a_stock_transformer_and_nothing_else(
    lora_run: Run, arguments: dict[str, Any], tmp_path: Path, monkeypatch, dtype: torch.dtype
) -> None:
    # In this process, which is quicker; that the real check finds faults is tested elsewhere.
    def stock_output(product: Path, classes: Any, base: str, names: Any, given: Any) -> Tensor:
        with torch.no_grad():
            return CogVideoXTransformer3DModel.from_pretrained(product)(**given).sample

    monkeypatch.setattr(importlib.import_module("videorepa.export"), "stock_output", stock_output)
    product = export(lora_run.path, tmp_path / "out", fuse=True, dtype=dtype)
    assert files(tmp_path / "out") == [
        "README.md",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    base = Path(lora_run.recipe.backbone.source) / "transformer"
    held, plain = (
        load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (product, base)
    )
    assert held.keys() == plain.keys() and {value.dtype for value in held.values()} == {dtype}
    stock = CogVideoXTransformer3DModel.from_pretrained(product)
    ours = lora_run.backbone(("transformer",), torch.device("cpu"), torch.float32).transformer
    with torch.no_grad():
        difference = error(stock(**arguments)[0], ours(**arguments)[0])
        assert difference < (1e-5 if dtype == torch.float32 else 3e-2)


def test_a_lora_is_rounded_as_it_is_written_whatever_its_strength(
    lora_run: Run, tmp_path: Path, monkeypatch
) -> None:
    run = shutil.copytree(lora_run.path, tmp_path / "run")
    lora_run.recipe.override("train.lora.alpha=3").to_yaml(run / "recipe.yaml")

    def stock_output(product: Path, classes: Any, base: Any, names: Any, given: Any) -> Tensor:
        stock = CogVideoXTransformer3DModel.from_pretrained(base[0], subfolder=base[1])
        stock.load_lora_adapter(load_file(product), prefix="transformer")
        with torch.no_grad():
            return stock(**given).sample

    monkeypatch.setattr(importlib.import_module("videorepa.export"), "stock_output", stock_output)
    product = export(run, tmp_path / "out", dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(product).values()} == {torch.bfloat16}


def test_the_card_says_what_was_trained_on_what_and_how_it_scores(
    lora_run: Run, tmp_path: Path, monkeypatch
) -> None:
    folder = tmp_path / "clips" / "scores"
    folder.mkdir(parents=True)
    share = {"percent": 12.5, "low": 3.1, "high": 30.2, "n": 15, "invalid": 1, "prompts": 4}
    metrics = {"pc": share, "motion": {"mean": 4.25}}
    summary = {"benchmark": "lab", "version": "1", "n": 16, "metrics": metrics, "failures": []}
    summary |= {"about": "They were chosen.", "missing": [{"prompt_id": "a", "k": 0}]}
    summary |= {"asked": {"judge": {"dtype": "float32"}, "compat": True}}
    difference = {"difference": 4.0, "low": -1.0, "high": 9.0, "p": 0.25, "p_holm": 0.5, "n": 14}
    small = {"difference": 0.031, "low": 0.02, "high": 0.04, "p": 0.01, "p_holm": 0.02, "n": 15}
    comparison = {"against": "control", "metrics": {"pc": difference, "motion": small}}
    comparison["unpaired"] = 2
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "comparison.json").write_text(json.dumps(comparison))
    (folder / "scores.jsonl").write_text("")
    recipe, product = lora_run.recipe, "pytorch_lora_weights.safetensors"
    card = model_card(lora_run, recipe, 6, product, "float32", [Scores.read(folder)])
    about = "16 clips, of 4 different prompts, 1 clip missing.\n\nThey were chosen.\n\n"
    about += "Asked with judge dtype `float32` and compat `True`.\n\n"
    assert f"lab 1, from `clips/scores`: {about}| metric" in card
    for asked, says in ({}, "16 clips"), (None, "What else was asked is not recorded.\n\n| metric"):
        (folder / "summary.json").write_text(json.dumps(summary | {"asked": asked}))
        other = model_card(lora_run, recipe, 6, product, "float32", [Scores.read(folder)])
        assert says in other and "Asked with" not in other
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "| pc | 12.5 % | [3.1, 30.2] | 15 | 1 |\n| motion | 4.25 |  |  | 0 |\n" in card
    assert "Against `control`, clip by clip; left out: 2 clips of the two without a partner" in card
    assert "| pc | +4.0 | [-1.0, 9.0] | 14 | 0.250 | 0.500 |\n" in card
    assert "| motion | +0.031 | [0.02, 0.04] | 15 | 0.010 | 0.020 |\n" in card
    assert "LoRA, rank 4, alpha 2, step 6 of 6" in card and "relation, weight 0.5, block 2" in card
    assert f"base model: {recipe.backbone.weights}" in card and "its license holds" in card
    assert recipe.text().rstrip() in card and product in card
    assert "base_model:" not in card, "a folder is no Hub id"
    assert "pipeline_tag: text-to-video" in card and "shown of each clip" not in card
    from_image = recipe.override("backbone.weights=micro-i2v", "data.condition={dropout: 0.1}")
    card = model_card(lora_run, from_image, 6, product, "float32", [])
    assert "pipeline_tag: image-to-video" in card and 'load_image("first-frame.png")' in card
    assert "- shown of each clip in training: the first 1 latent (frame 0), in channels" in card
    run = Run(shutil.copytree(lora_run.path, tmp_path / "run"))
    checkpoint.save(run.checkpoints, replace(run.trained(), batch=32), keep=1)
    assert "step 6 of 6, 32 clips a step\n" in model_card(run, recipe, 6, product, "float32", [])
    state = run.checkpoints / "step-00000006" / checkpoint.STATE
    state.write_text(json.dumps(json.loads(state.read_text()) | {"batch": None}))
    earlier = model_card(run, recipe, 6, product, "float32", [])
    assert "step 6 of 6, 4 clips of each process a step\n" in earlier
    twin = Path(recipe.backbone.weights)
    hub = recipe.override("backbone.weights=zai-org/CogVideoX-2b")
    monkeypatch.setattr("videorepa.backbones._spec.local_copy", lambda *_: twin)
    card = model_card(lora_run, hub, 6, product, "float32", [])
    assert "load_into" not in card
    assert 'CogVideoXPipeline.from_pretrained(\n    "zai-org/CogVideoX-2b",' in card
    assert "base_model: zai-org/CogVideoX-2b" in card and "None were measured" in card


def test_scores_that_lie_in_the_run_are_found(lora_run: Run, tmp_path: Path) -> None:
    run = shutil.copytree(lora_run.path, tmp_path / "run")
    (run / "clips" / "scores").mkdir(parents=True)
    (run / "clips" / "scores" / "summary.json").write_text("{")
    for scores in ((), [tmp_path]):
        with pytest.raises(UserError, match="not a score folder"):
            export(run, tmp_path / "out", scores=scores)


def test_a_card_has_the_scores_of_the_exported_step_alone(
    lora_run: Run, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(importlib.import_module("videorepa.export"), "_write", lambda *_: None)
    run = Run(Path(shutil.copytree(lora_run.path, tmp_path / "run")))
    digests = {s: trained_digest(run, run.recipe.backbone, s) for s in (4, 6)}

    def scored(folder: Path, benchmark: str, digest: str | None) -> Path:
        folder.mkdir(parents=True)
        row = {"prompt_id": "a", "k": 0, "scenario": "", "model_digest": digest}
        metrics = {"pc": Metric(percent=50.0, n=1)}
        Scores(
            folder, Summary(benchmark=benchmark, version="7", n=1, metrics=metrics), [row]
        ).write()
        return folder

    scored(run.path / "clips" / "scores", "lab", digests[6])
    scored(run.path / "clips" / "scores-videophy", "videophy", digests[6])
    scored(run.path / "clips" / "rated", "rated", None)
    early = scored(run.path / "early" / "scores", "physics_iq", digests[4])
    monkeypatch.setenv("COLUMNS", "1000")
    export(run.path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nlab 7, from `clips/scores`: 1 clip.\n" in card
    assert "\nvideophy 7, from `clips/scores-videophy`: 1 clip.\n" in card
    assert "rated 7, from `clips/rated`: 1 clip, made by a model that is not recorded." in card
    assert "physics_iq" not in card
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "has 1 score of another model, or of another step, than the exported one of step 6" in said
    )
    with pytest.raises(UserError, match="another step, than .* step 6. Leave it out of --scores"):
        export(run.path, tmp_path / "other", scores=[early])
    assert not (tmp_path / "other").exists()


def by_path(pipeline: Any, product: Path) -> None:
    pipeline.load_lora_weights(product)


def by_folder(pipeline: Any, product: Path) -> None:
    pipeline.load_lora_weights(product.parent)


def by_dict(pipeline: Any, product: Path) -> None:
    pipeline.load_lora_weights(load_file(product))


def into_the_transformer(pipeline: Any, product: Path) -> None:
    pipeline.transformer.load_lora_adapter(str(product))


def into_the_transformer_by_dict(pipeline: Any, product: Path) -> None:
    pipeline.transformer.load_lora_adapter(load_file(product))


def saved_again(pipeline: Any, product: Path) -> None:
    pipeline.load_lora_weights(product, adapter_name="default")
    again = product.parent / "again"
    pipeline.transformer.save_lora_adapter(again, adapter_name="default")
    pipeline.unload_lora_weights()
    pipeline.transformer.load_lora_adapter(str(again / LORA_FILE), prefix=None)


def saved_again_without_metadata(pipeline: Any, product: Path) -> None:
    pipeline.load_lora_weights(product, adapter_name="default")
    again = product.parent / "again"
    state = get_peft_model_state_dict(pipeline.transformer)
    pipeline.save_lora_weights(again, transformer_lora_layers=state)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(again)


def fused(pipeline: Any, product: Path) -> None:
    by_path(pipeline, product)
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()


WAYS = [
    by_path,
    by_folder,
    by_dict,
    into_the_transformer,
    into_the_transformer_by_dict,
    saved_again,
    saved_again_without_metadata,
    fused,
]


@pytest.fixture(scope="module")
def exported_lora(lora_run: Run, tmp_path_factory) -> Path:
    return export(lora_run.path, tmp_path_factory.mktemp("exported") / "out")


@pytest.mark.parametrize("load", WAYS, ids=lambda way: way.__name__)
def test_an_exported_lora_is_as_strong_however_it_is_loaded(
    lora_run: Run, exported_lora: Path, arguments: dict[str, Any], tmp_path: Path, load: Any
) -> None:
    product = shutil.copytree(exported_lora.parent, tmp_path / "lora") / exported_lora.name
    pipeline = CogVideoXPipeline.from_pretrained(lora_run.recipe.backbone.source)
    load(pipeline, product)
    ours = lora_run.backbone(("transformer",), torch.device("cpu"), torch.float32).transformer
    with torch.no_grad():
        expected = ours(**arguments)[0]
        assert error(pipeline.transformer(**arguments)[0], expected) < TOLERANCE


@pytest.mark.parametrize("load", [into_the_transformer, into_the_transformer_by_dict])
def test_a_published_lora_is_as_strong_however_it_is_loaded(
    published: Path, given: dict[str, Any], tmp_path: Path, load: Any
) -> None:
    name = "pytorch_lora_weights.safetensors"
    imported = import_weights(published / name, tmp_path / "out", alpha=4)
    base = import_weights(published / "transformer", tmp_path / "base").product
    stock = CogVideoXTransformer3DModel.from_pretrained(base)
    load(SimpleNamespace(transformer=stock), imported.product)
    io = load_file(published / "lora_io.safetensors")
    with torch.no_grad():
        assert error(stock(**given)[0], io["sample_with_lora_alpha4_rank8"]) < TOLERANCE


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0, 0.3])
def test_a_scale_is_multiplied_into_short_weights_without_rounding_them(scale: float) -> None:
    up = torch.randn(6, 4).bfloat16()
    (_, scaled) = Adapter.scaled({"layer": (torch.randn(4, 5), up)}, scale).layers["layer"]
    assert torch.equal(scaled.double(), (up.float() * scale).double())
    assert scaled.dtype == (torch.float32 if scale == 0.3 else torch.bfloat16)


def test_a_lora_for_comfyui_holds_its_names_and_alpha(
    lora_run: Run, arguments: dict[str, Any], tmp_path: Path
) -> None:
    product = export(lora_run.path, tmp_path / "out", format="comfyui", dtype=torch.bfloat16)
    assert files(tmp_path / "out") == ["README.md", "comfyui_lora.safetensors"]
    held = load_file(product)
    # ComfyUI's CogVideoX spells its layers so; what follows is its rule, weight by weight.
    layers = {
        "q": "attn1.to_q",
        "attn_out": "attn1.to_out.0",
        "ff_proj": "ff.net.0.proj",
        "ff_out": "ff.net.2",
    }
    stock = CogVideoXTransformer3DModel.from_pretrained(
        lora_run.recipe.backbone.source, subfolder="transformer"
    )
    for block in range(3):
        for name, layer in layers.items():
            prefix = f"diffusion_model.blocks.{block}.{name}"
            up, down = (held.pop(f"{prefix}.lora_{part}.weight") for part in ("up", "down"))
            assert up.dtype == down.dtype == torch.bfloat16 and down.shape[0] == 4
            alpha = held.pop(f"{prefix}.alpha").item()
            assert alpha == 4
            weight = stock.get_submodule(f"transformer_blocks.{block}.{layer}").weight
            weight.data += alpha / down.shape[0] * (up.float() @ down.float())
    assert not held
    ours = lora_run.backbone(("transformer",), torch.device("cpu"), torch.float32).transformer
    with torch.no_grad():
        expected = ours(**arguments)[0]
        assert error(stock(**arguments)[0], expected) < 1e-3
        ours.disable_lora()
        assert error(ours(**arguments)[0], expected) > 1e-2, "the LoRA is to make a difference"


def test_comfyui_names_are_those_that_diffusers_reads_back(tmp_path: Path) -> None:
    """Diffusers has converters of its own for ComfyUI's layouts of these models."""
    from diffusers import LTXPipeline, WanPipeline
    from diffusers.loaders import lora_conversion_utils as converters

    def saved(
        kind: str, blocks: str, ff: str, *further: str
    ) -> tuple[Path, dict[str, tuple[Tensor, Tensor]]]:
        names = [f"attn{n}.to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out.0")]
        layers = {
            f"{blocks}.{block}.{name}": (torch.randn(4, 6), torch.randn(6, 4))
            for block in range(2)
            for name in [*names, f"{ff}.net.0.proj", f"{ff}.net.2", *further]
        }
        path = tmp_path / f"{kind}.safetensors"
        Adapter.scaled(layers, 2.0 / 4).save_for_comfyui(path, comfyui_names(kind, layers))
        return path, layers

    # Those of Wan's image models too, which see CLIP's tokens.
    image = ("attn2.add_k_proj", "attn2.add_v_proj")
    path, layers = saved("WanTransformer3DModel", "blocks", "ffn", *image)
    read = WanPipeline.lora_state_dict(path)
    assert len(read) == 2 * len(layers)
    for name, (down, up) in layers.items():
        pair = [read[f"transformer.{name}.lora_{part}.weight"] for part in "BA"]
        torch.testing.assert_close(pair[0] @ pair[1], 2.0 / 4 * up @ down)

    # For LTX it changes the prefix alone. Of Cosmos it knows the layout by a model built on it.
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    for kind, reader in (("LTXVideo", LTXPipeline.lora_state_dict), ("LTX2Video", None)):
        path, layers = saved(f"{kind}Transformer3DModel", "transformer_blocks", "ff")
        convert = converters._convert_non_diffusers_ltx2_lora_to_diffusers
        read = reader(path) if reader else convert(load_file(path))
        assert read.keys() == {f"transformer.{name}.{part}" for name in layers for part in parts}
    path, layers = saved("CosmosTransformer3DModel", "transformer_blocks", "ff")
    read = converters._convert_non_diffusers_anima_lora_to_diffusers(load_file(path))
    assert read.keys() == {f"transformer.{name}.{part}" for name in layers for part in parts}
    # ComfyUI has Kandinsky 5 with its authors' names, as diffusers has.
    names = [
        f"visual_transformer_blocks.3.{x}"
        for x in ("cross_attention.to_key", "self_attention.out_layer", "feed_forward.in_layer")
    ]
    names.append("text_transformer_blocks.0.self_attention.to_query")
    assert comfyui_names("Kandinsky5Transformer3DModel", names) == {n: n for n in names}


@pytest.mark.parametrize(
    ("kind", "layer", "says"),
    [
        (
            "MochiTransformer3DModel",
            "transformer_blocks.0.attn1.to_q",
            "not know ComfyUI's names.*Cog",
        ),
        ("WanTransformer3DModel", "proj_out", "name for the layer proj_out"),
        ("CogVideoXTransformer3DModel", "transformer_blocks.0.norm1.linear", "norm1.linear"),
        ("HunyuanVideo15Transformer3DModel", "transformer_blocks.0.attn.to_q", "not know ComfyUI"),
        ("LTX2VideoTransformer3DModel", "transformer_blocks.0.audio_attn1.to_q", "name for the"),
    ],
)
def test_a_name_that_is_not_known_is_not_made_up(kind: str, layer: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        comfyui_names(kind, [layer])
