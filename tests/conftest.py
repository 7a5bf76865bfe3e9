"""Shared fixtures: tiny random twins of the models, in the published folder layouts."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

# Two busy test processes slow each other fivefold while idle threads spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
from jaxtyping import install_import_hook

install_import_hook(
    [
        "videorepa.tokens",
        "videorepa.align",
        "videorepa.losses",
        "videorepa.diffusion",
    ],
    "beartype.beartype",
)

# A shell starts background jobs with Ctrl-C ignored, and tests send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Timings are never a reason to fail.
hypothesis.settings.register_profile("project", deadline=None, max_examples=30)
hypothesis.settings.load_profile("project")

import yaml  # noqa: E402

from videorepa.recipe import Recipe  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from videorepa.encoders import EncoderSpec

OUTSIDE = Path(__file__).parents[2] / "shared"
"""Data that is not part of the project: tests that want it skip, saying so, where it is not."""


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """A test that failed fails again: projectors and tokens come from torch's global generator."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_clips() -> Path:
    folder = OUTSIDE / "clips"
    if not folder.is_dir():
        pytest.skip("the twelve real clips are not on this machine")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    folder = OUTSIDE / "golden"
    if not folder.is_dir():
        pytest.skip("the golden files are not on this machine")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium. A module's own, since its event loop is in the way of other modules'."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        started = driver.chromium.launch(executable_path=chromium, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="session")
def published_prompts() -> Path:
    folder = OUTSIDE / "prompts"
    if not folder.is_dir():
        pytest.skip("the benchmarks' prompt lists are not on this machine")
    return folder


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Calls functions in a process with a pretended CUDA device: tests/fake_cuda says how."""
    from fake_cuda import built, obstacle, pretended

    if reason := obstacle():
        pytest.skip(reason)
    # Shared by the workers of pytest-xdist.
    with pretended(built(tmp_path_factory.getbasetemp().parent)) as call:
        yield call


def make_backbone(folder: Path, rotary: bool = False, **changes: Any) -> Path:
    """A CogVideoX pipeline of a few thousand weights: 4x in time, 4x in space, patch 2.

    Args:
      folder: Where it goes.
      rotary: Rotary positions, as 5B has.
      changes: Of the transformer's configuration; an input of twice the channels takes an image.
    """
    import torch
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDPMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(pieces),
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            tie_word_embeddings=False,
        )
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=16,
        sample_width=16,
        scaling_factor=0.9,
    )
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 16,
        "text_embed_dim": 16,
        "num_layers": 3,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 9,
        "patch_size": 2,
        "max_text_seq_length": 12,
        "spatial_interpolation_scale": 1.0,
        "use_rotary_positional_embeddings": rotary,
    }
    transformer = CogVideoXTransformer3DModel(**config | changes)
    scheduler = CogVideoXDPMScheduler(
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    takes_image = transformer.config.in_channels != transformer.config.out_channels
    pipeline = CogVideoXImageToVideoPipeline if takes_image else CogVideoXPipeline
    pipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)
    return folder


def make_teacher(folder: Path) -> Path:
    """A VideoMAE of 8 frames of 16 x 16, tubelet 2, patch 8: 4 x 2 x 2 tokens."""
    import torch
    from transformers import VideoMAEConfig, VideoMAEModel

    torch.manual_seed(1)
    config = VideoMAEConfig(
        image_size=16,
        patch_size=8,
        num_frames=8,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    VideoMAEModel(config).save_pretrained(folder)
    return folder


def original_vit(width: int = 24, blocks: int = 2, patch: int = 8, **more: tuple[int, ...]):
    """Random weights of a video transformer under the names that original files share. more:
    shapes of further tensors. Its first tokens are so small that layer norm's epsilon counts."""
    import torch

    torch.manual_seed(2)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, 2, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for block in range(blocks):
        for name, rows in (("norm1", 0), ("attn.qkv", 3), ("attn.proj", 1), ("norm2", 0)):
            shapes[f"blocks.{block}.{name}.weight"] = (rows * width, width) if rows else (width,)
            shapes[f"blocks.{block}.{name}.bias"] = (max(rows, 1) * width,)
        for name, size in (("fc1", (2 * width, width)), ("fc2", (width, 2 * width))):
            shapes[f"blocks.{block}.mlp.{name}.weight"] = size
            shapes[f"blocks.{block}.mlp.{name}.bias"] = size[:1]
    shapes |= more | {"norm.weight": (width,), "norm.bias": (width,)}
    small = ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed")
    return {
        name: torch.randn(shape) * (2e-4 if name in small else 0.2)
        for name, shape in shapes.items()
    }


def make_teachers(root: Path) -> dict[str, Path]:
    """Weights of every encoder at a tiny size, in a published layout: patches of 8 x 8 pixels and,
    for video, tubelets of 2 frames."""
    import torch
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        DINOv3ViTConfig,
        DINOv3ViTModel,
        VJEPA2Config,
        VJEPA2Model,
    )

    torch.manual_seed(3)
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
    }
    stock = {
        "vjepa2": VJEPA2Model(
            VJEPA2Config(
                **size,
                crop_size=16,
                pred_hidden_size=12,
                pred_num_attention_heads=2,
                pred_num_hidden_layers=1,
            )
        ),
        "dinov2": Dinov2Model(Dinov2Config(**size, image_size=24)),
        "dinov3": DINOv3ViTModel(
            DINOv3ViTConfig(**size, image_size=16, intermediate_size=48, num_register_tokens=3)
        ),
    }
    for name, model in stock.items():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        model.save_pretrained(root / name)
    plain = original_vit(pos_embed=(1, 8 * 3 * 3, 24))
    vjepa = {f"module.backbone.{key}": value for key, value in plain.items()}
    torch.save(
        {"target_encoder": vjepa, "encoder": {k: -v for k, v in vjepa.items()}, "epoch": 3},
        root / "vjepa.pth.tar",
    )
    omnimae = {f"trunk.{k.replace('proj.', 'proj.1.', k[0] == 'p')}": v for k, v in plain.items()}
    rest = {"trunk.decoder.norm.weight": torch.ones(3), "head.weight": torch.ones(3)}
    torch.save(omnimae | rest, root / "omnimae.torch")
    return {
        "videomae": make_teacher(root / "videomae"),
        "vjepa": root / "vjepa.pth.tar",
        "omnimae": root / "omnimae.torch",
        **{name: root / name for name in stock},
    }


def make_head(kind: Literal["motion", "saliency"], of: EncoderSpec, width: int) -> EncoderSpec:
    """A `headed` encoder: a random head beside the weights of `of`, whose tokens have a width."""
    import torch

    from videorepa.encoders.headed import Head, Headed, save_head
    from videorepa.system.fingerprint import json_digest

    path = Path(of.weights).with_name(f"{kind}-{json_digest(of.fingerprint())}.safetensors")
    if not path.exists():
        torch.manual_seed(4)
        save_head(path, Head(kind, width), of, held_out={})
    return Headed(weights=str(path), of=of)


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny twin of every encoder's weights, by the encoder's name."""
    return make_teachers(tmp_path_factory.mktemp("teachers"))


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny models: "backbone", "rotary" (as 5B has) and "teacher"."""
    root = tmp_path_factory.mktemp("twins")
    return {
        "backbone": make_backbone(root / "backbone"),
        "rotary": make_backbone(root / "rotary", rotary=True),
        "teacher": make_teacher(root / "teacher"),
    }


def write_clips(folder: Path, count: int = 5, size: int = 16, frames: int = 9) -> Path:
    """Small videos of a moving gradient and their manifest."""
    import numpy as np

    from videorepa.data.video import write_video

    folder.mkdir(parents=True, exist_ok=True)
    lines = ["video,caption"]
    for index in range(count):
        t, y, x = np.mgrid[:frames, :size, :size]
        channels = [(x * 9 + t * (index + 3)) % 256, (y * 11 + t * 5) % 256, (x + y + 40 * index)]
        clip = np.stack(channels, -1).clip(0, 255).astype(np.uint8)
        write_video(folder / f"clip{index}.mp4", clip, 8)
        lines.append(f'clip{index}.mp4,"Clip number {index}, moving."')
    manifest = folder / "clips.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, but what killed processes left, with its content's digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".tmp-")
    }


def sampled_by_card(folder: Path, sidecar: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What is left when the Python in an export's card has run there, for a clip's own prompt and
    seed: its names, and the lines themselves as "code"."""
    import json

    import torch

    from videorepa.system.device import compute_dtype

    about = json.loads(sidecar.read_text(encoding="utf-8"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    lines = card.partition("```python\n")[2].partition("```")[0]
    example = 'prompt, seed = "A ball falls.", 0'
    assert lines.count(example) == 1
    code = lines.replace(example, f"prompt, seed = {about['prompt']!r}, {about['seed']}")
    code = code.replace("torch.bfloat16", str(compute_dtype("auto", torch.device("cpu"))))
    left: dict = {"code": code}
    monkeypatch.chdir(folder)
    exec(code, left)
    return left


@pytest.fixture
def recipe(twins: dict[str, Path], clips: Path, tmp_path: Path) -> Recipe:
    """A recipe of the tiny models that trains in a second, in float32 on every machine."""
    return Recipe.parse(recipe_values(twins, clips, tmp_path / "cache"))


def recipe_values(twins: dict[str, Path], manifest: Path, cache: Path) -> dict:
    return yaml.safe_load(
        f"""
        name: tiny
        seed: 3
        backbone: {{name: cogvideox, weights: "{twins["backbone"]}"}}
        encoder: {{name: videomae, weights: "{twins["teacher"]}", frames: 8, height: 16, width: 16}}
        align: {{loss: {{name: relation, margin: 0.05}}, block: 2, weight: 0.5, hidden: 16}}
        data: {{manifest: "{manifest}", frames: 9, height: 16, width: 16, cache: "{cache}"}}
        optim:
          {{steps: 6, batch_size: 2, accumulate: 2, learning_rate: 1.0e-3, warmup_steps: 2}}
        train: {{checkpoint_every: 2, keep_checkpoints: 2, precision: float32}}
        generation: {{steps: 2}}
        """
    )


@pytest.fixture(scope="module")
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny judge, as the test's module makes it."""
    return request.module.make_judge(tmp_path_factory.mktemp("judge") / "tiny")


@pytest.fixture(scope="module")
def live(request: pytest.FixtureRequest, judge: Path) -> object:
    return request.module.load_judge(judge)
