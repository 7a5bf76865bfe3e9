"""One real training step of CogVideoX-2B's architecture on the CPU, with random weights.

    python benchmarks/real_size.py --clips FOLDER_WITH_clips.csv

Builds the full-size pipeline folder (transformer 1.69 billion weights in bfloat16, the full-size
autoencoder, a text encoder of the right width) and a full-size VideoMAE-base, prepares one 9-frame
clip of 64 x 96 and takes one LoRA step with Token Relation Distillation. Prints seconds and peak
memory of each part, each measured in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from videorepa.data.manifest import read_manifest
from videorepa.recipe import Recipe


def build(root: Path) -> None:
    """The folders `backbone` and `teacher` under `root`."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDPMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel, T5Tokenizer, VideoMAEConfig, VideoMAEModel

    torch.manual_seed(0)
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    t5 = T5Config(
        vocab_size=len(pieces),
        d_model=4096,
        d_ff=64,
        num_layers=1,
        num_heads=1,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    pipeline = CogVideoXPipeline(
        T5Tokenizer(vocab=pieces, extra_ids=0),
        T5EncoderModel(t5),
        AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
        ),
        CogVideoXTransformer3DModel(),
        CogVideoXDPMScheduler(
            rescale_betas_zero_snr=True, prediction_type="v_prediction", snr_shift_scale=3.0
        ),
    )
    pipeline.save_pretrained(root / "backbone")
    VideoMAEModel(VideoMAEConfig()).save_pretrained(root / "teacher")


def recipe(root: Path, clips: Path) -> Recipe:
    entry = read_manifest(clips / "clips.csv")[0]
    manifest = root / "one.csv"
    manifest.write_text(f'video,caption\n{entry.path.name},"{entry.caption}"\n')
    return Recipe.parse(
        {
            "name": "real-size",
            "backbone": {"name": "cogvideox", "weights": str(root / "backbone")},
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
            "memory": {"frozen": "bfloat16"},
        }
    )


def do(part: str, root: Path, clips: Path) -> None:
    from videorepa.prepare import prepare
    from videorepa.train import train

    start = time.perf_counter()
    if part == "build":
        build(root)
    elif part == "prepare":
        prepare(recipe(root, clips))
    else:
        run = train(recipe(root, clips), root / "run")
        print(run.log_path.read_text().strip())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{part}: {time.perf_counter() - start:.0f} s, peak memory {peak:.1f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=Path, required=True, help="folder with clips.csv")
    parser.add_argument("--part", nargs=2, metavar=("PART", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        do(arguments.part[0], Path(arguments.part[1]), arguments.clips.resolve())
        return
    with tempfile.TemporaryDirectory() as root:
        for part in ("build", "prepare", "train"):
            command = [sys.executable, __file__, "--clips", arguments.clips, "--part", part, root]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
