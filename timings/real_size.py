"""One real training step at a published architecture's size on the CPU, with random weights.

    python timings/real_size.py --model cogvideox-2b --clips FOLDER_WITH_clips.csv

Builds the full-size pipeline folder (the transformer in bfloat16, the full-size autoencoder, a text
encoder of the right width) and a full-size VideoMAE-base, prepares one 9-frame clip of 64 x 96,
predicts what training takes, and takes one LoRA step with Token Relation Distillation and gradient
checkpointing. Prints seconds and peak memory of each part, each measured in a process of its own.
For the training, glibc is set to give memory back at once, as in memory.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from videorepa.data.manifest import read_manifest
from videorepa.recipe import Recipe
from videorepa.system.device import peak_memory

# Hub id without its owner, and how the frozen weights are held: 5 billion take 11 GB in bfloat16.
MODELS = {
    "cogvideox-2b": ("cogvideox", "CogVideoX-2b", "bfloat16"),
    "cogvideox-5b": ("cogvideox", "CogVideoX-5b", "float8"),
    "wan-1.3b": ("wan", "Wan2.1-T2V-1.3B-Diffusers", "bfloat16"),
}
SHARD = 2e9


def build(model: str, root: Path) -> None:
    """The folders `backbone` and `teacher` under `root`."""
    import diffusers
    from transformers import (
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
        UMT5Config,
        UMT5EncoderModel,
        VideoMAEConfig,
        VideoMAEModel,
    )

    from videorepa.settings.plugins import description

    name, published, _ = MODELS[model]
    spec = description("backbones", name)(weights=f"published/{published}")
    torch.manual_seed(0)
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    size: dict[str, Any] = {"vocab_size": len(pieces), "d_model": 4096, "d_ff": 64}
    size |= {"num_layers": 1, "num_heads": 1, "tie_word_embeddings": False}
    blocks: dict[str, Any] = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    }
    torch.set_default_dtype(torch.bfloat16)
    parts: dict[str, Any] = {"tokenizer": T5Tokenizer(vocab=pieces, extra_ids=0)}
    # The full-size transformer replaces this one below.
    kind = getattr(diffusers, spec.transformer_class)
    parts["transformer"] = kind(num_layers=1, num_attention_heads=1)
    if name == "wan":
        parts |= {
            "text_encoder": UMT5EncoderModel(UMT5Config(**size)),
            "vae": diffusers.AutoencoderKLWan(),
            "scheduler": diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        }
    else:
        parts |= {
            "text_encoder": T5EncoderModel(T5Config(**size)),
            "vae": diffusers.AutoencoderKLCogVideoX(
                **blocks, scaling_factor=spec.config("vae")["scaling_factor"]
            ),
            "scheduler": diffusers.CogVideoXDPMScheduler(
                rescale_betas_zero_snr=True, prediction_type="v_prediction", snr_shift_scale=3.0
            ),
        }
    getattr(diffusers, spec.pipeline_class)(**parts).save_pretrained(root / "backbone")
    folder = root / "backbone" / "transformer"
    for path in folder.iterdir():
        path.unlink()
    transformer = spec.skeleton(torch.bfloat16)
    transformer.save_config(folder)
    write_random(transformer.state_dict(), folder)
    VideoMAEModel(VideoMAEConfig()).save_pretrained(root / "teacher")


def write_random(shapes: dict[str, torch.Tensor], folder: Path) -> None:
    """Write random weights in files of 2 GB.

    All are cut from one row of random numbers, since drawing billions takes minutes. Norms and
    biases do nothing.
    """
    row = torch.randn(2**24, dtype=torch.float32).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, like in shapes.items():
        if sum(t.nbytes for t in shards[-1].values()) > SHARD:
            shards.append({})
        shards[-1][name] = like

    def values(like: torch.Tensor) -> torch.Tensor:
        if like.dim() == 1:
            return torch.zeros(like.shape)
        return row.repeat(-(-like.numel() // len(row)))[: like.numel()].view(like.shape).clone()

    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {name: values(like) for name, like in shard.items()}
        for name in weights:
            if "norm" in name and name.endswith("weight") and weights[name].dim() == 1:
                weights[name].fill_(1)
        save_file(weights, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in shapes.values())}}
    index["weight_map"] = places
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def recipe(model: str, root: Path, clips: Path) -> Recipe:
    name, _, frozen = MODELS[model]
    entry = read_manifest(clips / "clips.csv")[0]
    manifest = root / "one.csv"
    manifest.write_text(f'video,caption\n{entry.path.name},"{entry.caption}"\n')
    return Recipe.parse(
        {
            "name": "real-size",
            "backbone": {"name": name, "weights": str(root / "backbone")},
            "encoder": {
                "name": "videomae",
                "weights": str(root / "teacher"),
                "frames": 8,
                "height": 32,
                "width": 48,
            },
            "align": {"block": 18, "weight": 0.5},
            "data": {
                "manifest": str(manifest),
                "root": str(clips),
                "frames": 9,
                "height": 64,
                "width": 96,
                "cache": str(root / "cache"),
            },
            "optim": {"steps": 1, "learning_rate": 1e-4},
            "train": {"lora": {"rank": 128, "alpha": 64}},
            "memory": {"frozen": frozen, "gradient_checkpointing": True},
        }
    )


def do(part: str, model: str, root: Path, clips: Path) -> None:
    from videorepa.inspect import inspect
    from videorepa.prepare import prepare
    from videorepa.train import train

    start = time.perf_counter()
    if part == "build":
        build(model, root)
    elif part == "prepare":
        prepare(recipe(model, root, clips))
    elif part == "predict":
        print(inspect(recipe(model, root, clips), device="cpu"))
    else:
        run = train(recipe(model, root, clips), root / "run", device="cpu")
        print(run.log_path.read_text().strip())
    peak = peak_memory(torch.device("cpu")) / 1e9
    print(f"{part}: {time.perf_counter() - start:.0f} s, peak memory {peak:.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="cogvideox-2b")
    parser.add_argument("--clips", type=Path, required=True, help="folder with clips.csv")
    parser.add_argument("--part", nargs=2, metavar=("PART", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part, root = arguments.part
        do(part, arguments.model, Path(root), arguments.clips.resolve())
        return
    with tempfile.TemporaryDirectory() as root:
        same = ["--model", arguments.model, "--clips", str(arguments.clips)]
        for part in ("build", "prepare", "predict", "train"):
            given_back = {"MALLOC_MMAP_THRESHOLD_": "65536"} if part == "train" else {}
            command = [sys.executable, __file__, *same, "--part", part, root]
            subprocess.run(command, check=True, env=os.environ | given_back)


if __name__ == "__main__":
    main()
