"""Verification: what is right passes, and each thing that is wrong fails by its name."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import recipe_values
from test_encoders import VITS, described
from test_judge import make_judge  # noqa: F401  (the fixture `judge` calls it)
from twins import TWINS
from videorepa import cli
from videorepa.backbones import Backbone
from videorepa.backbones.cogvideox import CogVideoXBackbone
from videorepa.encoders import _video
from videorepa.recipe import Recipe
from videorepa.settings import plugins
from videorepa.system.device import release
from videorepa.system.files import file_digest
from videorepa.verify import verify
from videorepa.verifying import pipeline
from videorepa.verifying.clip import simulated
from videorepa.verifying.judging import compare_judge, named_judge
from videorepa.verifying.record import Verification
from videorepa.verifying.teacher import compare_teacher
from videorepa.verifying.weights import _check_published, check_weights

module = importlib.import_module("videorepa.verify")
CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
ALL_BUT_FILES = ("step", "text", "autoencoder", "transformer", "teacher", "judge", "export")
SLOW = ("ltx2", "skyreels", "skyreels-i2v", "hunyuan_video_15-i2v", "wan-2.2-i2v")
"""Models that compute as others here do, and the one whose image model is the text model."""

ALL_BUT_TRANSFORMER = ("files", "step", "text", "autoencoder", "teacher", "judge", "export")


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "HEIGHT", 16)
    monkeypatch.setattr(pipeline, "WIDTH", 16)
    # Collecting what is in reference cycles takes longer than all else with models so small.
    monkeypatch.setattr(module, "release", lambda device: None)


@pytest.fixture
def folder(twins: dict[str, Path], tmp_path: Path) -> Path:
    """A model with rotary positions that a test may damage."""
    return shutil.copytree(twins["rotary"], tmp_path / "model")


@pytest.fixture
def recipe(folder: Path, twins: dict[str, Path], clips: Path, tmp_path: Path) -> Recipe:
    return Recipe.parse(recipe_values(twins | {"backbone": folder}, clips, tmp_path / "cache"))


def record() -> Verification:
    return Verification("tiny", {}, "cpu", "float32")


def failing(verification: Verification) -> dict[str, str]:
    return {check.name: check.words for check in verification.failed}


def change(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a file of weights or a configuration."""
    if file.suffix == ".json":
        values = json.loads(file.read_text())
        edit(values)
        file.write_text(json.dumps(values))
    else:
        values = load_file(file)
        edit(values)
        plain = {key: value.contiguous() for key, value in values.items()}
        save_file(plain, file.resolve(), {"format": "pt"})


def test_what_is_right_passes_and_is_kept_in_a_small_file(
    recipe: Recipe, tmp_path: Path, monkeypatch, capsys
) -> None:
    from test_backbones import InProcess

    monkeypatch.setattr(
        importlib.import_module("videorepa.exchange.stock"), "subprocess", InProcess
    )
    lora = recipe.override("train.lora={rank: 2, alpha: 2}")
    half = tmp_path / ".tmp-first.json" / "transformer"
    half.mkdir(parents=True)  # A process that exported was killed.
    first = verify(lora, tmp_path / "first.json")
    assert not failing(first)
    assert not half.parent.exists()
    # Random weights neither denoise nor reproduce a clip, which is said.
    doubted = {check.name for check in first.checks if check.status == "doubtful"}
    assert {"autoencoder's round trip", "denoising"} <= doubted
    shown = capsys.readouterr().out
    assert all(str(check) in shown for check in first.checks)
    named = " ".join(check.name for check in first.checks)
    for part in ("files of vae", "step", "memory", "text", "block", "teacher videomae", "export"):
        assert part in named
    assert first.measured["seconds"] > 0 and first.measured["predicted_bytes"] > 0
    assert (tmp_path / "first.json").stat().st_size < 10_000

    again = verify(
        lora, tmp_path / "again.json", against=tmp_path / "first.json", skip=("step", "export")
    )
    assert not failing(again)
    compared = [check.words for check in again.checks if check.name.startswith("reference")]
    assert "every tensor equals the reference's" in compared
    assert any("agree" in words for words in compared)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param(name, torch.float32, marks=[pytest.mark.slow] * (name in SLOW)) for name in TWINS]
    + [(name, torch.bfloat16) for name in ("cogvideox", "wan-2.1", "mochi")],
    ids=str,
)
def test_every_backbone_does_what_its_stock_pipeline_does(
    name: str, dtype: torch.dtype, recipe: Recipe, tmp_path_factory, monkeypatch
) -> None:
    described, make = TWINS[name]
    root = tmp_path_factory.getbasetemp() / "verified" / name
    if not root.exists():
        make(root)
    kept = recipe.model_dump(mode="json", include={"name", "data", "optim"})
    own = Recipe.parse(kept | {"backbone": described | {"weights": str(root)}})
    geometry = own.backbone.geometry()
    unit = geometry.pixels * geometry.patch
    monkeypatch.setattr(pipeline, "HEIGHT", 2 * unit)
    # The twin of 1.5 has a table of two columns.
    monkeypatch.setattr(pipeline, "WIDTH", (2 if geometry.steps > 1 else 3) * unit)
    size = pipeline.clip_size(own.backbone)
    verification = Verification("tiny", {}, "cpu", str(dtype).removeprefix("torch."))
    frames, _ = simulated(size)
    text, image = pipeline.drawn_text(own.backbone, dtype), None
    if own.backbone.takes_image:
        image = pipeline.encoded_image(own, frames, CPU, dtype)
    watched = pipeline.watch(own, frames, size, text, CPU, dtype)
    live = own.backbone.load(("transformer",), CPU, dtype)
    pipeline.compare_with_stock(verification, own, live, watched, size, image)
    assert not failing(verification), verification
    held = {"image's latents"} if image is not None and live.shows_in_place else set()
    assert {check.name for check in verification.checks} == held | {
        *("transformer's argument", "block", "clean latents", "loss", "latents' scale"),
        "tokens' places",
    }


@pytest.mark.slow
def test_one_model_is_in_memory_at_a_time(recipe: Recipe, tmp_path: Path, monkeypatch) -> None:
    import diffusers

    loaded: list[weakref.ref] = []
    for kind in (diffusers.CogVideoXTransformer3DModel, diffusers.AutoencoderKLCogVideoX):

        def load(*arguments: Any, real: Any = kind.from_pretrained, **options: Any) -> Any:
            result = real(*arguments, **options)
            model = result[0] if isinstance(result, tuple) else result
            assert not [ref for ref in loaded if type(ref()) is type(model)]
            loaded.append(weakref.ref(model))
            return result

        monkeypatch.setattr(kind, "from_pretrained", load)
    monkeypatch.setattr(module, "release", release)
    verify(recipe, tmp_path / "record.json", skip=("files", "export"))
    assert len(loaded) >= 5


def test_a_part_that_does_not_fit_the_memory_is_named(
    recipe: Recipe, tmp_path, monkeypatch
) -> None:
    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(module, "measure_step", too_large)
    bad = verify(recipe, tmp_path / "bad.json", skip=("files", "text", "autoencoder", "export"))
    assert "not enough memory: CUDA out of memory" in failing(bad)["step"]
    assert "block" in str(bad)


# What is wrong with the weights, told by an earlier record.


def swap_tensors(folder: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        one, two = (f"transformer_blocks.{n}.attn1.to_q.weight" for n in (0, 2))
        values[one], values[two] = values[two], values[one]

    change(folder / "transformer" / WEIGHTS, edit)


def transpose_square(folder: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        name = "transformer_blocks.2.attn1.to_out.0.weight"
        values[name] = values[name].T

    change(folder / "transformer" / WEIGHTS, edit)


def rescale(folder: Path) -> None:
    change(folder / "vae" / "config.json", lambda values: values.update(scaling_factor=0.7))


def unrotate(folder: Path) -> None:
    change(
        folder / "transformer" / "config.json",
        lambda values: values.update(use_rotary_positional_embeddings=False),
    )


@pytest.mark.parametrize(
    ("damage", "name", "says"),
    [
        (swap_tensors, "transformer", r"transformer_blocks.0.attn1.to_q.weight"),
        (transpose_square, "transformer", r"1 of \d+ .*transformer_blocks.2.attn1.to_out.0.weight"),
        (rescale, "vae scaling_factor", "is 0.7; the reference has 0.9"),
        (unrotate, "transformer use_rotary_positional_embeddings", "is False"),
    ],
)
def test_what_a_reference_tells(
    damage: Callable[[Path], None], name: str, says: str, recipe: Recipe, folder: Path, tmp_path
) -> None:
    verify(recipe, tmp_path / "good.json", skip=ALL_BUT_FILES)
    damage(folder)
    bad = verify(recipe, tmp_path / "bad.json", against=tmp_path / "good.json", skip=ALL_BUT_FILES)
    wrong = failing(bad)
    assert list(wrong) == [f"reference: {name}"]
    assert re.search(says, wrong[f"reference: {name}"])


def test_figures_tell_where_equal_weights_are_used_otherwise(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    verify(recipe, tmp_path / "good.json", skip=ALL_BUT_TRANSFORMER)
    block = torch.nn.functional.scaled_dot_product_attention

    def scaled(*arguments: Any, **options: Any) -> torch.Tensor:
        return block(*arguments, **options | {"scale": 1.0})

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", scaled)
    bad = verify(
        recipe, tmp_path / "bad.json", against=tmp_path / "good.json", skip=ALL_BUT_TRANSFORMER
    )
    assert "reference: block 1" in failing(bad)


# What is wrong with the weights, told without a reference.


def transpose_head(folder: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["proj_out.weight"] = values["proj_out.weight"].T

    change(folder / "transformer" / WEIGHTS, edit)


def make_infinite(folder: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["decoder.conv_in.conv.bias"][0] = torch.inf

    change(folder / "vae" / WEIGHTS, edit)


def cut_short(folder: Path) -> None:
    path = folder / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-8])


def lose_a_shard(folder: Path) -> None:
    weights = load_file(folder / "transformer" / WEIGHTS)
    (folder / "transformer" / WEIGHTS).unlink()
    names = ("a.safetensors", "b.safetensors")
    map_ = {key: names[n % 2] for n, key in enumerate(weights)}
    index = {"metadata": {}, "weight_map": map_}
    (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    half = {key: weights[key] for key in weights if map_[key] == names[0]}
    save_file(half, folder / "transformer" / names[0])


def cut_within_a_value(folder: Path) -> None:
    path = folder / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])


def spoil_index(text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(text)

    return spoil


def spoil_header(**changes: Any) -> Callable[[Path], None]:
    """A file of one tensor, with a header that says otherwise."""

    def spoil(folder: Path) -> None:
        about = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes
        header = json.dumps({"a": {key: x for key, x in about.items() if x}}).encode()
        content = len(header).to_bytes(8, "little") + header + bytes(4)
        (folder / "transformer" / WEIGHTS).write_bytes(content)

    return spoil


def rename_class(folder: Path) -> None:
    change(
        folder / "vae" / "config.json", lambda values: values.update(_class_name="AutoencoderKLWan")
    )


@pytest.mark.parametrize(
    ("damage", "part", "says"),
    [
        (transpose_head, "transformer", "misshapen: proj_out.weight"),
        (make_infinite, "vae", "decoder.conv_in.conv.bias .*not finite"),
        (cut_short, "transformer", "its header describes"),
        (lose_a_shard, "transformer", "b.safetensors is missing"),
        (rename_class, "vae", "AutoencoderKLWan, not AutoencoderKLCogVideoX"),
        (cut_within_a_value, "transformer", "its header describes"),
        (spoil_index("{"), "transformer", r"index\.json is no list of weights \(JSONDecodeError"),
        (spoil_index("{}"), "transformer", "is no list of weights .*'weight_map'"),
        (spoil_index('{"weight_map": {"a": 1}}'), "transformer", "is no list of weights"),
        (spoil_header(shape=None), "transformer", "damaged header: KeyError: 'shape'"),
        (spoil_header(shape=[2]), "transformer", "a has other bytes than its shape takes"),
        (spoil_header(data_offsets=[0, 3]), "transformer", "a has other bytes than its shape"),
        (spoil_header(data_offsets=[0, 4.5]), "transformer", "damaged header: TypeError"),
    ],
)
def test_what_files_tell_alone(
    damage: Callable[[Path], None], part: str, says: str, recipe: Recipe, folder: Path
) -> None:
    damage(folder)
    verification = record()
    check_weights(verification, recipe, None)
    wrong = failing(verification)
    assert list(wrong) == [f"files of {part}"]
    assert re.search(says, wrong[f"files of {part}"])


def test_a_damaged_part_leaves_the_others_in_the_record(
    recipe: Recipe, folder: Path, tmp_path: Path
) -> None:
    cut_within_a_value(folder)
    (folder / "vae" / f"{WEIGHTS}.index.json").write_text("{}")
    verify(recipe, tmp_path / "record.json", skip=ALL_BUT_FILES)
    kept = Verification.read(tmp_path / "record.json")
    assert {"files of transformer", "files of vae"} == set(failing(kept))
    assert {"text_encoder", "transformer"} <= kept.kept.keys()


@pytest.mark.parametrize("way", ["cache", "folder"])
def test_the_hubs_digest_tells_a_swapped_tensor(
    way: str, recipe: Recipe, folder: Path, tmp_path: Path
) -> None:
    path = folder / "transformer" / WEIGHTS
    published = file_digest(path)

    def put_in_place() -> None:
        if way == "folder":
            note = folder / ".cache/huggingface/download/transformer" / f"{WEIGHTS}.metadata"
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{'0' * 40}\n{published}\n1700000000.0\n")
        elif not path.is_symlink():
            blob = tmp_path / "blobs" / published
            blob.parent.mkdir()
            shutil.move(path, blob)
            path.symlink_to(blob)

    put_in_place()
    good = record()
    check_weights(good, recipe, None)
    assert not failing(good) and "known of 1 of 1 file, and equal" in str(good)
    swap_tensors(folder)
    bad = record()
    check_weights(bad, recipe, None)
    assert list(failing(bad)) == ["files of transformer"]
    assert "was published with" in failing(bad)["files of transformer"]


def test_a_published_models_name_tells_its_scale(recipe: Recipe, folder: Path) -> None:
    named = folder.rename(folder.with_name("CogVideoX-5b"))
    verification = record()
    check_weights(verification, recipe.override(f"backbone.weights={named}"), None)
    wrong = failing(verification)
    said = "is 0.9; CogVideoX-5b was published with 0.7"
    assert wrong["configuration of vae: scaling_factor"] == said


@pytest.mark.parametrize("family", plugins.names("backbones"))
def test_what_was_published_is_found_right(family: str, tmp_path: Path) -> None:
    """As JSON has it, where lists stand for the tuples of classes' defaults."""
    kind = plugins.description("backbones", family)
    for name in kind.published:
        folder = tmp_path / name
        index = {"_class_name": kind.pipeline_class}
        index |= kind.published[name].get("model_index", {})
        files = {"model_index.json": index}
        for part, of in (("transformer", kind.transformer_class), ("vae", kind.vae_class)):
            config = kind(weights=f"x/{name}").published_config(name, part)
            files[f"{part}/config.json"] = {"_class_name": of} | config
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(json.dumps(content))
        record = Verification("r", {}, "cpu", "float32")
        for part in ("transformer", "vae"):
            _check_published(record, kind(weights=str(folder)), part)
        assert [check.words for check in record.checks if check.status == "fails"] == []


# What is wrong with our own path.


def other_rotary(backbone: Any, latents: torch.Tensor) -> Any:
    cos, sin = REAL_ROTARY(backbone, latents)
    return sin, cos


REAL_ROTARY = CogVideoXBackbone._rotary
REAL_GRID = Backbone.grid


def turned_grid(backbone: Any, output: Any, latents: torch.Tensor) -> Any:
    grid = REAL_GRID(backbone, output, latents)
    return grid.with_tokens(grid.tokens.flip(3))


@pytest.mark.parametrize(
    ("kind", "method", "wrong", "names"),
    [
        (CogVideoXBackbone, "_rotary", other_rotary, ["transformer's argument image_rotary_emb"]),
        (
            Backbone,
            "read_scaling",
            lambda self: (torch.zeros(1), torch.full((1,), 0.7)),
            ["latents' scale"],
        ),
        (CogVideoXBackbone, "velocity", lambda self, output, _: -output, ["clean latents", "loss"]),
        (Backbone, "grid", turned_grid, ["block 1", "tokens' places"]),
        (Backbone, "block", lambda self, number: self.blocks()[-number], ["block 1", "blocks"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_stock_pipeline_tells(
    kind: type, method: str, wrong: Any, names: list[str], recipe: Recipe, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(kind, method, wrong)
    bad = verify(recipe, tmp_path / "bad.json", skip=ALL_BUT_TRANSFORMER)
    assert set(names) <= failing(bad).keys()
    shown = [check.name for check in bad.checks if check.status == "ok"]
    assert not set(names) & set(shown)


def test_the_stock_autoencoder_tells_another_range_of_pixels(
    recipe: Recipe, tmp_path, monkeypatch
) -> None:
    real = Backbone.encode_video
    monkeypatch.setattr(Backbone, "encode_video", lambda self, video: real(self, video / 2 + 0.5))
    skip = ("files", "step", "text", "transformer", "teacher", "judge", "export")
    bad = verify(recipe, tmp_path / "bad.json", skip=skip)
    assert "autoencoder's moments" in failing(bad)


def test_trained_weights_are_not_doubted_and_damaged_ones_are(
    tmp_path: Path, clips: Path, monkeypatch
) -> None:
    """What the micro models tell without any reference."""
    values = {
        "name": "micro",
        "backbone": {"name": "cogvideox", "weights": "micro"},
        "data": {"manifest": str(clips), "frames": 9, "height": 64, "width": 64, "cache": "cache"},
        "optim": {"steps": 1, "batch_size": 1, "learning_rate": 1e-4},
        "train": {"precision": "float32"},
    }
    monkeypatch.setattr(pipeline, "HEIGHT", 64)
    monkeypatch.setattr(pipeline, "WIDTH", 64)
    recipe = Recipe.parse(values)
    skip = ("files", "step", "teacher", "judge", "export")
    good = verify(recipe, tmp_path / "good.json", skip=skip)
    assert {check.status for check in good.checks} == {"ok"}
    folder = shutil.copytree(recipe.backbone.folder(), tmp_path / "model")
    change(
        folder / "vae" / "config.json", lambda v: v.update(scaling_factor=v["scaling_factor"] * 4)
    )
    bad = verify(recipe.override(f"backbone.weights={folder}"), tmp_path / "bad.json", skip=skip)
    doubted = [check.name for check in bad.checks if check.status != "ok"]
    assert "latents' spread" in doubted


# Teachers and judges.


@pytest.mark.parametrize("name", VITS)
def test_teachers_give_the_stock_features(name: str, teachers: dict[str, Path]) -> None:
    verification = record()
    compare_teacher(verification, described(name, teachers[name]), CPU, torch.float32)
    assert [check.status for check in verification.checks] == ["ok"], verification


def test_an_original_teachers_rows_in_another_order_are_told(teachers, monkeypatch) -> None:
    names = dict(_video._NAMES)
    q, k = (key for key in names if r"attn\.q(" in key or r"attn\.k" in key)
    monkeypatch.setattr(_video, "_NAMES", names | {q: names[k], k: names[q]})
    verification = record()
    compare_teacher(verification, described("vjepa", teachers["vjepa"]), CPU, torch.float32)
    assert list(failing(verification)) == ["teacher vjepa"]


def test_a_judges_logits_are_the_stock_language_models(judge: Path, recipe: Recipe) -> None:
    benchmark = named_judge(f"videophy={judge}")
    verification = record()
    compare_judge(verification, benchmark, CPU, torch.float32)
    assert [check.status for check in verification.checks] == ["ok"]
    check_weights(verification, recipe, benchmark)
    assert "judge" in verification.kept


# The command.


def test_the_command_fails_by_name_and_writes_its_record(
    recipe: Recipe, folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe.to_yaml("recipe.yaml")
    call = ["verify", "recipe.yaml", "--skip", *ALL_BUT_FILES]
    assert cli.main(call) == 0
    assert "record: verified-tiny.json" in capsys.readouterr().out
    cut_short(folder)
    assert cli.main([*call, "--out", "bad.json"]) == 1
    said = capsys.readouterr()
    assert "FAILS     files of transformer" in said.out
    assert "1 check failed.\n  files of transformer: " in said.err
    assert Verification.read(Path("bad.json")).failed
    assert cli.main([*call, "--out", "bad.json", "--against", "bad.json"]) == 1
    assert "would replace bad.json" in capsys.readouterr().err
    assert cli.main([*call, "--against", "recipe.yaml"]) == 1
    assert "recipe.yaml is no record of `videorepa verify`" in capsys.readouterr().err
