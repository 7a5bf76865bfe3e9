"""Encoders: the contract that all of them keep, and features equal to the published ones."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from conftest import make_head, original_vit
from videorepa.encoders import IMAGENET_MEAN, IMAGENET_STD, Encoder, load_encoder
from videorepa.encoders._image import IMAGES_AT_ONCE
from videorepa.encoders.pixels import Pixels
from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.settings import plugins
from videorepa.system.fingerprint import json_digest

Teachers = dict[str, Path]
RECIPES = Path(__file__).parents[1] / "recipes"
STRAW_MEN = ("pixels", "places", "untrained")
# `truth` sees no pixels: tests/test_truth.py holds it to what the contract can ask of it.
APART = (*STRAW_MEN, "truth")
NAMES = [name for name in plugins.names("encoders") if name not in APART]
VITS = [name for name in NAMES if name != "headed"]
SIZE = {"frames": 8, "height": 16, "width": 32}


def described(name: str, weights: Any, **options: Any) -> Any:
    if name == "headed":
        return make_head("motion", described("videomae", weights, **options), width=24)
    return plugins.description("encoders", name)(weights=str(weights), **SIZE | options)


def weights_of(teachers: Teachers, name: str) -> Path:
    """What a tiny encoder is loaded from; for `headed`, the teacher that it is put on."""
    return teachers["videomae" if name == "headed" else name]


def sees_images(name: str) -> bool:
    return "pool" in plugins.description("encoders", name).model_fields


def live(teachers: Teachers, name: str, dtype: torch.dtype = torch.float32, **options) -> Encoder:
    spec = described(name, weights_of(teachers, name), **options)
    settings = {"of": spec.of} if name == "headed" else SIZE | options
    return load_encoder(name, spec.weights, dtype=dtype, **settings)


def clip(frames: int = 9, height: int = 16, width: int = 32, count: int = 1) -> Tensor:
    torch.manual_seed(frames)
    return torch.rand(count, frames, 3, height, width)


def normalised(video: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (video - mean) / std


def relative(tokens: Tensor, expected: Tensor) -> float:
    return ((tokens - expected).norm() / expected.norm()).item()


# The contract.

FEEDINGS = [
    (name, feeding)
    for name in NAMES
    for feeding in (
        ({}, {"pool": 4}, {"pool": 4, "frames": 9}, {"crop": (8, 16)})
        if sees_images(name)
        else ({}, {"group": 4}, {"crop": (8, 16)}, {"group": 2, "crop": (16, 16)})
    )
]


@pytest.mark.parametrize(("name", "feeding"), FEEDINGS, ids=str)
def test_the_described_shape_is_that_of_the_live_grid(
    teachers: Teachers, name: str, feeding: dict[str, Any]
) -> None:
    spec = described(name, weights_of(teachers, name), **feeding)
    shape, grid = spec.shape(9), spec.load(torch.device("cpu"))(clip(height=20, width=28, count=2))
    assert grid.tokens.shape == (2, *shape.tokens.shape[1:])
    assert (grid.start, grid.stride) == (shape.start, shape.stride)
    assert shape.tokens.is_meta and grid.tokens.isfinite().all()
    assert (shape.frames(shape.size[0] - 1)[-1], shape.size[1:]) == (8, (2, 4))


@pytest.mark.parametrize("name", [name for name in NAMES if not sees_images(name)])
def test_groups_of_frames_are_encoded_by_themselves(teachers: Teachers, name: str) -> None:
    video, alone = clip(8), live(teachers, name, frames=4)
    grouped, whole = live(teachers, name, group=4)(video), live(teachers, name)(video)
    expected = torch.cat([alone(part).tokens for part in video.split(4, 1)], 1)
    torch.testing.assert_close(grouped.tokens, expected)
    assert relative(whole.tokens, expected) > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_crops_are_encoded_by_themselves(teachers: Teachers, name: str) -> None:
    video, alone = clip(8), live(teachers, name, height=8, width=16)
    cropped, whole = live(teachers, name, crop=(8, 16))(video), live(teachers, name)(video)
    rows = [
        torch.cat([alone(part).tokens for part in row.split(16, -1)], 3)
        for row in video.split(8, -2)
    ]
    torch.testing.assert_close(cropped.tokens, torch.cat(rows, 2))
    assert relative(whole.tokens, torch.cat(rows, 2)) > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_features_are_deterministic_and_take_half_precision(teachers: Teachers, name: str) -> None:
    video = clip()
    encoder = live(teachers, name)
    tokens = encoder(video).tokens
    assert torch.equal(encoder(video).tokens, tokens)
    assert torch.equal(live(teachers, name)(video).tokens, tokens)
    coarse = clip(9, 20, 28).half()
    assert torch.equal(encoder(coarse).tokens, encoder(coarse.float()).tokens)
    half = live(teachers, name, dtype=torch.bfloat16)(video).tokens
    assert half.dtype == torch.bfloat16 and relative(half.float(), tokens) < 0.1
    assert not tokens.requires_grad and not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_resized_bicubically_before_they_are_normalised(
    teachers: Teachers, name: str
) -> None:
    video = clip(8, 40, 24)
    small = F.interpolate(video[0], (16, 32), mode="bicubic", align_corners=False)[None]
    tokens = live(teachers, name)(video).tokens
    torch.testing.assert_close(tokens, live(teachers, name)(small).tokens)
    ready = live(teachers, name, normalized=True)
    torch.testing.assert_close(tokens, ready(normalised(small)).tokens)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_a_clip_is_refused(teachers: Teachers, name: str) -> None:
    with pytest.raises(UserError, match="takes 8 frames and the clip has 7"):
        live(teachers, name)(clip(7))
    with pytest.raises(UserError, match="takes 8 frames and the clip has 7"):
        described(name, weights_of(teachers, name)).shape(7)
    for options, says in (
        ({"height": 12}, "sizes in multiples of 8; .*8x12x32"),
        ({"crop": (4, 32)}, "sizes in multiples of 8; .*8x4x32"),
        ({"crop": (16, 24)}, "encoder.width is 32, .*24, the size that encoder.crop"),
        ({"crop": (32, 32)}, "encoder.height is 16, .*32, the size that encoder.crop"),
    ):
        with pytest.raises(UserError, match=says):
            live(teachers, name, **options)
        with pytest.raises(UserError, match=says):
            described(name, weights_of(teachers, name), **options).shape(9)
    says = (
        "leave out encoder.group"
        if sees_images(name)
        else "frames is 8, .*3, the size that encoder.group"
    )
    with pytest.raises(UserError, match=says):
        live(teachers, name, group=3)
    if not sees_images(name):
        with pytest.raises(UserError, match="frames in multiples of 2.*1x16x32"):
            live(teachers, name, group=1)


@pytest.mark.parametrize("name", VITS)
def test_weights_of_another_family_are_refused(teachers: Teachers, name: str) -> None:
    for other, path in teachers.items():
        if other == name:
            continue
        spec = described(name, path)
        names = f"{path}.*" + (f"{name}|{spec.family}")
        if path.is_dir():
            names = f"{path} holds a '{other}(_vit)?' model; the encoder {name} loads"
        for use in (lambda spec=spec: spec.shape(9), lambda spec=spec: spec.load("cpu")):
            with pytest.raises(UserError, match=names):
                use()


@pytest.mark.parametrize("name", ["videomae", "vjepa2", "dinov2", "dinov3"])
@pytest.mark.parametrize("size", [None, "eight", [8, 8]])
def test_a_config_without_sizes_is_refused(
    teachers: Teachers, tmp_path: Path, name: str, size: Any
) -> None:
    config = json.loads((teachers[name] / "config.json").read_text())
    if size is None:
        del config["patch_size"]
    else:
        config["patch_size"] = size
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=f"config.json in {tmp_path} does not say the model's sizes"
    ):
        described(name, tmp_path).shape(9)


def damage(path: Path, target: Path, fault: str) -> None:
    """Copy weights with a bias of the first block missing or misshapen, or with a second one."""
    if path.is_dir():
        shutil.copytree(path, target)
        content: Any = load_file(target / "model.safetensors")
        weights = content
    else:
        content = torch.load(path, weights_only=True)
        weights = content.get("target_encoder", content)
    key = next(key for key in weights if "0" in key and key.endswith(("proj.bias", "dense.bias")))
    if fault == "missing":
        del weights[key]
    elif fault == "misshapen":
        weights[key] = torch.zeros(25)
    else:
        weights[key.replace("bias", "other")] = torch.zeros(1)
    if path.is_dir():
        save_file(content, target / "model.safetensors", {"format": "pt"})
    else:
        torch.save(content, target)


@pytest.mark.parametrize("fault", ["missing", "misshapen", "extra"])
@pytest.mark.parametrize("name", VITS)
def test_weights_that_do_not_fit_are_named(
    teachers: Teachers, tmp_path: Path, name: str, fault: str
) -> None:
    path = tmp_path / "damaged"
    damage(teachers[name], path, fault)
    if fault == "extra" and path.is_dir():
        load_encoder(name, path, **SIZE)  # Folders may hold a head or a decoder as well.
        return
    says = {
        "missing": r"missing: \S+\.0\.\S+\.bias\.",
        "misshapen": r"misshapen: \S+\.0\.\S+\.bias \(25,\), expected \(\d\d,\)",
        "extra": r"extra: \S+\.0\.\S+\.other",
    }[fault]
    family = plugins.description("encoders", name).family
    with pytest.raises(UserError, match=f"{path} does not fit {family}; {says}"):
        load_encoder(name, path, **SIZE)


class Evil:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("name", VITS)
def test_code_in_weights_is_not_run(teachers: Teachers, tmp_path: Path, name: str) -> None:
    proof, path = tmp_path / "proof", tmp_path / "weights"
    if teachers[name].is_dir():
        shutil.copytree(teachers[name], path)
        (path / "model.safetensors").unlink()
        torch.save({"weight": Evil(proof)}, path / "pytorch_model.bin")
    else:
        torch.save({"target_encoder": {"weight": Evil(proof)}}, path)
    with pytest.raises(UserError, match="cannot be read as plain weights|could not be loaded"):
        load_encoder(name, path, **SIZE)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Evil(proof)))
    assert proof.exists(), "the pickle would have left its proof"


@pytest.mark.parametrize("name", VITS)
def test_weights_that_are_nowhere_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is nothing at"):
        load_encoder(name, tmp_path / "nothing", **SIZE)
    with pytest.raises(UserError, match="no readable config.json.*loads"):
        load_encoder(name, tmp_path, **SIZE)


@pytest.mark.parametrize("name", VITS)
def test_published_sizes_need_no_file(name: str) -> None:
    published = plugins.description("encoders", name).published
    assert published
    for weights, sizes in published.items():
        spec = described(name, weights, frames=48, height=224, width=448)
        side = 224 // sizes.patch
        size = (48 // sizes.tubelet, side, 2 * side)
        assert (spec.shape(49).size, spec.shape(49).width) == (size, sizes.width)


@pytest.mark.parametrize("name", NAMES)
def test_a_fingerprint_says_what_features_depend_on(teachers: Teachers, name: str) -> None:
    weights = weights_of(teachers, name)
    changes: list[dict[str, Any]] = [{}, {"frames": 6}, {"height": 8}, {"normalized": True}]
    changes += [{"crop": (8, 16)}, {"pool": 2} if sees_images(name) else {"group": 4}]
    prints = [described(name, weights, **change).fingerprint() for change in changes]
    assert len({str(each) for each in prints}) == len(changes)
    if name == "videomae":
        assert described(name, weights, version=1).fingerprint() == prints[0]


# Margins and published rows.


@pytest.mark.parametrize(
    ("name", "weights", "margin"),
    [
        ("videomae", "vit_b_k710_dl_from_giant.pth", 0.1),
        ("videomae", "checkpoints/VideoMAEv2-Base.pth", 0.1),
        ("videomae", "videomae/checkpoint.pth", 0.1),
        ("videomae", "MCG-NJU/videomae-base", 0.0),
        ("videomae", "micro", 0.0),
        ("vjepa", "vitl16.pth.tar", 0.05),
        ("omnimae", "vitb_pretrain.torch", 0.0),
        ("vjepa2", "facebook/vjepa2-vitl-fpc64-256", 0.1),
        ("dinov2", "facebook/dinov2-base", 0.1),
        ("dinov3", "facebook/dinov3-vitb16-pretrain-lvd1689m", 0.1),
    ],
)
def test_margins_are_the_papers(name: str, weights: str, margin: float) -> None:
    assert described(name, weights).relation_margin == margin


def test_the_version_of_videomae_can_be_set() -> None:
    assert described("videomae", "mine.pth", version=1).relation_margin == 0
    assert described("videomae", "MCG-NJU/videomae-base", version=2).relation_margin == 0.1


@pytest.mark.parametrize(
    ("name", "weights", "size", "expected", "covers"),
    [
        ("videomae", "vit_b_k710_dl_from_giant.pth", (48, 160, 240), (24, 10, 15), (1, 2)),
        ("vjepa", "vitl16.pth.tar", (48, 160, 240), (24, 10, 15), (1, 2)),
        ("dinov2", "facebook/dinov2-base", (49, 420, 630, 4), (13, 30, 45), (-3, 4)),
        ("dinov2", "facebook/dinov2-base", (48, 420, 630, 4), (12, 30, 45), (1, 4)),
    ],
)
def test_grids_of_the_published_rows(name, weights, size, expected, covers) -> None:
    options = dict(zip(("frames", "height", "width", "pool"), size, strict=False))
    grid = described(name, weights, **options).shape(49)
    assert (grid.size, (grid.start, grid.stride)) == (expected, covers)


# Parity.


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("videomae", "videomaev2_tiny.pth"),
        ("vjepa", "vjepa_tiny.pth.tar"),
        ("omnimae", "omnimae_tiny.torch"),
    ],
)
def test_original_files_give_the_published_features(golden: Path, name: str, file: str) -> None:
    published = load_file(golden / f"{file.partition('.')[0]}.io.safetensors")
    size = {"frames": 48, "height": 64, "width": 96, "normalized": True}
    grid = load_encoder(name, weights=golden / file, **size)(published["video"].transpose(1, 2))
    assert (grid.size, grid.start, grid.stride) == ((24, 4, 6), 0, 2)
    assert relative(grid.tokens.flatten(1, 3), published["features"]) < 1e-5


def plain_features(weights: dict[str, Tensor], video: Tensor, table: Tensor) -> Tensor:
    """A video transformer of four heads, written out: the tokens after its last block."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6
        )

    kernel, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    x = F.conv3d(video.transpose(1, 2), kernel, bias, stride=kernel.shape[2:])
    x = x.flatten(2).mT + table.flatten(0, 2)
    for block in (f"blocks.{number}" for number in range(2)):
        joint = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = joint.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{block}.attn.proj")
        inner = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + linear(F.gelu(inner), f"{block}.mlp.fc2")
    return x


def resized(table: Tensor, size: tuple[int, int, int], spatial: str) -> Tensor:
    """(t, h, w, d) on another grid, frame by frame first or by factors of all three at once."""
    if spatial == "trilinear":
        factors = [new / old for new, old in zip(size, table.shape[:3], strict=True)]
        volume = table.permute(3, 0, 1, 2)[None]
        volume = F.interpolate(volume, scale_factor=factors, mode="trilinear")
        return volume[0].permute(1, 2, 3, 0)
    frames = [
        F.interpolate(frame.permute(2, 0, 1)[None], size[1:], mode="bicubic")[0] for frame in table
    ]
    lines = torch.stack(frames, -1).flatten(0, 2)[None]
    lines = F.interpolate(lines, size[0], mode="linear")
    return lines[0].reshape(table.shape[3], *size[1:], size[0]).permute(3, 1, 2, 0)


@pytest.mark.parametrize(("name", "spatial"), [("vjepa", "trilinear"), ("omnimae", "bicubic")])
def test_stored_positions_and_key_biases(teachers: Teachers, name: str, spatial: str) -> None:
    weights = original_vit(pos_embed=(1, 8 * 3 * 3, 24))
    assert weights["blocks.0.attn.qkv.bias"][24:48].abs().mean() > 0.1
    table = resized(weights["pos_embed"].reshape(8, 3, 3, 24), (4, 2, 4), spatial)
    expected = plain_features(weights, normalised(clip(8)), table)
    assert relative(live(teachers, name)(clip(8)).tokens.flatten(1, 3), expected) < 1e-5


@pytest.mark.parametrize(("patch", "side"), [(16, 14), (14, 16)])
@pytest.mark.parametrize("layout", ["module", "model"])
def test_original_files_of_videomae(tmp_path: Path, layout: str, patch: int, side: int) -> None:
    """Fine-tuned ones, and pretrained ones with a decoder; ViT-g has patches of 14 pixels."""
    from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

    weights = original_vit(patch=patch)
    own = dict(weights)
    for block in range(2):
        bias = own.pop(f"blocks.{block}.attn.qkv.bias").clone()
        own[f"blocks.{block}.attn.q_bias"], own[f"blocks.{block}.attn.v_bias"] = (
            bias[:24],
            bias[48:],
        )
        bias[24:48] = 0
        weights[f"blocks.{block}.attn.qkv.bias"] = bias
    if layout == "module":
        content = {f"module.{key}": value for key, value in own.items()}
        content |= {"module.head.weight": torch.ones(3), "module.fc_norm.weight": torch.ones(3)}
    else:
        content = {f"encoder.{key}": value for key, value in own.items()}
        content |= {"decoder.blocks.0.norm1.weight": torch.ones(3), "mask_token": torch.ones(3)}
        content |= {"encoder_to_decoder.weight": torch.ones(3)}
    torch.save({layout: content}, tmp_path / "teacher.pth")
    size = (4, 2, 3)
    options = {"height": 2 * patch, "width": 3 * patch, "normalized": True}
    encoder = load_encoder("videomae", tmp_path / "teacher.pth", **SIZE | options)
    video = clip(8, 2 * patch, 3 * patch)
    table = get_sinusoid_encoding_table(8 * side * side, 24).reshape(8, side, side, 24)
    expected = plain_features(weights, video, resized(table, size, "bicubic"))
    assert relative(encoder(video).tokens.flatten(1, 3), expected) < 1e-5


def test_a_table_of_positions_that_is_no_square_is_refused(
    teachers: Teachers, tmp_path: Path
) -> None:
    content = torch.load(teachers["omnimae"], weights_only=True)
    content["trunk.pos_embed"] = torch.zeros(1, 70, 24)
    torch.save(content, tmp_path / "teacher.torch")
    with pytest.raises(UserError, match=r"does not fit OmniMAE: pos_embed .*\(1, 70, 24\)"):
        load_encoder("omnimae", tmp_path / "teacher.torch", **SIZE)


def test_heads_that_do_not_divide_the_width_are_refused(teachers: Teachers) -> None:
    with pytest.raises(UserError, match="heads is 5, which does not divide the width 24"):
        live(teachers, "vjepa", heads=5)


def test_a_folder_of_videomae_gives_stock_features(teachers: Teachers) -> None:
    from transformers import VideoMAEModel

    stock = VideoMAEModel.from_pretrained(teachers["videomae"])
    stock.layernorm = None
    video = clip(9, 16, 16, count=2)
    with torch.no_grad():
        expected = stock(normalised(video[:, 1:])).last_hidden_state
    grid = live(teachers, "videomae", width=16)(video)
    assert (grid.start, grid.stride, grid.size) == (1, 2, (4, 2, 2))
    torch.testing.assert_close(grid.tokens.flatten(1, 3), expected)


@torch.no_grad()
def stock_vjepa2(folder: Path, video: Tensor, **config: Any) -> Tensor:
    """The stock class's features without its final norm."""
    from transformers import VJEPA2Model

    stock = VJEPA2Model.from_pretrained(folder, **config)
    stock.encoder.layernorm = torch.nn.Identity()
    return stock(normalised(video), skip_predictor=True).last_hidden_state


def test_a_square_clip_gives_stock_features_of_vjepa2(teachers: Teachers) -> None:
    video = clip(8, 16, 16)
    expected = stock_vjepa2(teachers["vjepa2"], video)
    grid = live(teachers, "vjepa2", width=16)(video)
    torch.testing.assert_close(grid.tokens.flatten(1, 3), expected)
    video = clip(8, 32, 32)
    expected = stock_vjepa2(teachers["vjepa2"], video, crop_size=32)
    grid = live(teachers, "vjepa2", height=32, width=32)(video)
    torch.testing.assert_close(grid.tokens.flatten(1, 3), expected)


@pytest.mark.parametrize("size", [(16, 32), (32, 16)])
def test_tokens_of_vjepa2_stand_at_their_own_row_and_column(
    teachers: Teachers, monkeypatch, size: tuple[int, int]
) -> None:
    """The stock class is handed the positions of a frame that is not square."""
    from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2RopeAttention

    rows, columns = size[0] // 8, size[1] // 8
    places = torch.meshgrid(*map(torch.arange, (4, rows, columns)), indexing="ij")
    video = clip(8, *size)
    grid = live(teachers, "vjepa2", height=size[0], width=size[1])(video)
    flat = tuple(place.flatten() for place in places)
    monkeypatch.setattr(VJEPA2RopeAttention, "get_position_ids", lambda *_, **__: flat)
    expected = stock_vjepa2(teachers["vjepa2"], video)
    torch.testing.assert_close(grid.tokens.flatten(1, 3), expected)


def test_vjepa2_needs_no_predictor(teachers: Teachers, tmp_path: Path) -> None:
    folder = shutil.copytree(teachers["vjepa2"], tmp_path / "teacher")
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith("predictor.")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    own = load_encoder("vjepa2", folder, **SIZE)
    assert torch.equal(own(clip()).tokens, live(teachers, "vjepa2")(clip()).tokens)


def dinov2_with_registers(folder: Path, **config: Any) -> Path:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "patch_size": 8}
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**size, image_size=24, **config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["dinov2", "registers", "dinov3"])
def test_image_teachers_give_stock_patch_tokens(
    teachers: Teachers, tmp_path: Path, name: str
) -> None:
    from transformers import AutoModel

    folder = teachers.get(name) or dinov2_with_registers(tmp_path / name)
    stock = AutoModel.from_pretrained(folder)
    others = 1 + getattr(stock.config, "num_register_tokens", 0)
    assert others == {"dinov2": 1, "registers": 5, "dinov3": 4}[name]
    video = clip(9, count=2)
    with torch.no_grad():
        tokens = stock(normalised(video).flatten(0, 1)).last_hidden_state[:, others:]
    expected = tokens.reshape(2, 9, 2, 4, -1)
    encoder = load_encoder("dinov2" if name == "registers" else name, folder, **SIZE)
    batches = []
    encoder.model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    grid = encoder(video)
    assert (grid.start, grid.stride) == (1, 1)
    torch.testing.assert_close(grid.tokens, expected[:, 1:])
    assert max(batches) <= IMAGES_AT_ONCE < sum(batches) == 16

    pooled = load_encoder(encoder.spec.name, folder, **SIZE | {"frames": 9, "pool": 4})(video)
    assert (pooled.start, pooled.stride) == (-3, 4)
    means = [expected[:, :1], *(expected[:, i : i + 4].mean(1, True) for i in (1, 5))]
    torch.testing.assert_close(pooled.tokens, torch.cat(means, 1))


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_original_files_of_dinov2(tmp_path: Path, kind: str) -> None:
    """The names of dinov2_vitb14_reg4_pretrain.pth, and of the giant's gated MLP."""
    folder = dinov2_with_registers(tmp_path / "folder", use_swiglu_ffn=kind == "gated")
    original = {}
    for key, value in load_file(folder / "model.safetensors").items():
        key = key.removeprefix("embeddings.").replace("encoder.layer.", "blocks.")
        for new, old in (
            ("pos_embed", "position_embeddings"),
            ("patch_embed.proj", "patch_embeddings.projection"),
            ("attn.proj", "attention.output.dense"),
            ("ls1.gamma", "layer_scale1.lambda1"),
            ("ls2.gamma", "layer_scale2.lambda1"),
            ("w12", "weights_in"),
            ("w3", "weights_out"),
            ("norm.", "layernorm."),
        ):
            key = key.replace(old, new)
        original[key] = value
    for block in range(2):
        for tensor in ("weight", "bias"):
            parts = ("query", "key", "value")
            names = [f"blocks.{block}.attention.attention.{part}.{tensor}" for part in parts]
            joint = torch.cat([original.pop(name) for name in names])
            original[f"blocks.{block}.attn.qkv.{tensor}"] = joint
    torch.save(original, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    own = load_encoder("dinov2", tmp_path / "dinov2_vits14_reg4_pretrain.pth", **SIZE)
    torch.testing.assert_close(
        own(clip()).tokens, load_encoder("dinov2", folder, **SIZE)(clip()).tokens
    )


def test_a_frame_that_is_left_over_is_the_clips_first_or_refused(teachers: Teachers) -> None:
    for options, frames in (({"frames": 9, "pool": 4}, 10), ({"pool": 3}, 8)):
        with pytest.raises(UserError, match=r"cannot be pooled by \d.* \d would do"):
            described("dinov2", teachers["dinov2"], **options).shape(frames)


# Straw men.


def test_pixels_are_mean_colours(teachers: Teachers) -> None:
    video = clip(9)
    spec = plugins.description("encoders", "pixels")(**SIZE, patch=8)
    grid = spec.load(torch.device("cpu"))(video)
    assert grid.tokens.shape == (1, *spec.shape(9).tokens.shape[1:]) == (1, 4, 2, 4, 3)
    assert (grid.start, grid.stride) == (1, 2)
    first = video[0, 1:3, :, :8, :8].mean((0, 2, 3)) * 2 - 1
    torch.testing.assert_close(grid.tokens[0, 0, 0, 0], first)
    assert spec.fingerprint() != spec.model_copy(update={"patch": 16}).fingerprint()
    with pytest.raises(UserError, match="sizes in multiples of 3; the recipe asks for 8x16x32"):
        plugins.description("encoders", "pixels")(**SIZE, patch=3).shape(9)


@pytest.mark.parametrize(("name", "feeding"), FEEDINGS, ids=str)
def test_pixels_stand_on_every_teachers_grid(
    teachers: Teachers, name: str, feeding: dict[str, Any]
) -> None:
    teacher = described(name, weights_of(teachers, name), **feeding)
    spec, like = Pixels.on_grid_of(teacher), teacher.shape(9)
    for grid in (spec.shape(9), spec.load(torch.device("cpu"))(clip(9))):
        assert (grid.size, grid.start, grid.stride) == (like.size, like.start, like.stride)


def test_pixels_of_a_pooled_teacher_are_the_means_of_its_steps() -> None:
    teacher = Recipe.from_yaml(RECIPES / "videorepa-5b-repa-dinov2.yaml").encoder
    assert teacher is not None and Pixels.on_grid_of(teacher).shape(49).size == (13, 30, 45)
    video = clip(9)
    spec = Pixels(**SIZE | {"frames": 9}, patch=8, tubelet=1, pool=4)
    tokens = spec.load(torch.device("cpu"))(video).tokens
    colours = video.unflatten(3, (2, 8)).unflatten(5, (4, 8)).mean((4, 6)) * 2 - 1
    for step, frames in enumerate((slice(0, 1), slice(1, 5), slice(5, 9))):
        expected = colours[:, frames].mean(1).permute(0, 2, 3, 1)
        torch.testing.assert_close(tokens[:, step], expected)
    unpooled = spec.model_copy(update={"pool": 1})
    assert spec.fingerprint() != unpooled.fingerprint()
    before = json_digest(unpooled.model_dump(exclude={"pool"}))
    assert unpooled.fingerprint() == {"encoder": before}, "what was stored stays valid"


def test_places_say_how_far_tokens_are_apart_and_nothing_of_the_clip() -> None:
    spec = plugins.description("encoders", "places")(frames=12, height=48, width=64, patch=8)
    encoder = spec.load(torch.device("cpu"))
    one, other = (encoder(clip(frames, 48, 64)) for frames in (12, 13))
    assert torch.equal(one.tokens, other.tokens) and (one.start, other.start) == (0, 1)
    assert one.tokens.shape == (1, *spec.shape(12).tokens.shape[1:]) == (1, 6, 6, 8, 192)
    places = F.normalize(one.tokens[0], dim=-1)
    for axis in range(3):
        line = places.movedim(axis, 0)[:, 0, 0]
        alike = line @ line.T
        assert alike.diagonal().sub(1).abs().max() < 1e-5
        apart = alike[0]
        assert (apart.diff()[:3] < 0).all() and apart.min() < apart[1] - 0.02
        torch.testing.assert_close(alike[1, 1:], apart[:-1])  # Of distance alone.
    assert spec.load(torch.device("cpu"), torch.bfloat16)(clip(12)).tokens.dtype == torch.bfloat16
    assert spec.fingerprint() != spec.model_copy(update={"channels": 96}).fingerprint()
    with pytest.raises(ValueError, match="multiple of 6"):
        type(spec)(channels=100)


def test_places_are_more_alike_the_longer_the_longest_wavelength_is() -> None:
    means = []
    for longest in (1, 40, 1e4):
        spec = plugins.description("encoders", "places")(
            frames=16, height=64, width=64, patch=8, longest=longest
        )
        tokens = F.normalize(
            spec.load(torch.device("cpu"))(torch.zeros(1, 16, 3, 64, 64)).tokens, dim=-1
        )
        flat = tokens.flatten(0, 3)
        means.append((flat @ flat.mT).mean().item())
    assert means == sorted(means) and means[2] - means[0] > 0.5


def test_an_untrained_teacher_is_the_network_without_what_it_learnt(teachers: Teachers) -> None:
    video, of = clip(), described("videomae", teachers["videomae"])
    kind = plugins.description("encoders", "untrained")
    spec = kind(of=of)
    assert kind.model_validate(spec.model_dump()) == spec
    assert "frames" not in spec.model_dump() and spec.frames == SIZE["frames"]
    first, again, other = (
        s.load(torch.device("cpu"))(video).tokens for s in (spec, spec, kind(of=of, draw=1))
    )
    assert torch.equal(first, again)
    trained = of.load(torch.device("cpu"))(video).tokens
    assert first.shape == trained.shape == (1, *spec.shape(8).tokens.shape[1:])
    for unlike in (trained, other):
        assert relative(first, unlike) > 0.1
    prints = [of.fingerprint(), spec.fingerprint(), kind(of=of, draw=1).fingerprint()]
    assert len({str(each) for each in prints}) == 3
    with pytest.raises(ValueError, match="`frames` is what `of.frames` says"):
        kind(of=of, frames=4)
