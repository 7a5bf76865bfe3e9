"""How far storing teacher features in fewer bits moves the relation loss and its gradient.

Run: python timings/feature_storage.py [--clips 8]

The features are those of the micro teacher on simulated clips, the same with a few channels made 50
times larger (as large video encoders have them), and random tokens. The student is a random linear
map of the teacher's features, with noise added so that the loss is as large as in training.
"""

from __future__ import annotations

import argparse

import torch

from videorepa.data.cache import dequantised, quantised
from videorepa.encoders import load_encoder
from videorepa.losses.relation import Relation
from videorepa.tokens import TokenGrid
from videorepa.world.render import make_clip


def features(clips: int) -> dict[str, TokenGrid]:
    """Teacher grids by the name that the table has for them."""
    encoder = load_encoder("videomae", "micro", frames=16, height=32, width=32)
    frames = [torch.from_numpy(make_clip(7, index).frames) for index in range(clips)]
    grid = encoder(torch.stack(frames).permute(0, 1, 4, 2, 3) / 255.0)
    spiky = grid.tokens.clone()
    spiky[..., :3] *= 50
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(grid.tokens.shape, generator=draw)
    return {
        "micro teacher": grid,
        "with 3 channels 50 times larger": grid.with_tokens(spiky),
        "random tokens": grid.with_tokens(noise),
    }


def loss_and_gradient(student: TokenGrid, teacher: TokenGrid) -> tuple[float, torch.Tensor]:
    tokens = student.tokens.clone().requires_grad_()
    loss = Relation(margin=0.1)(student.with_tokens(tokens), teacher)
    loss.backward()
    assert tokens.grad is not None
    return loss.item(), tokens.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=8)
    clips = parser.parse_args().clips
    draw = torch.Generator().manual_seed(1)
    print(f"{'features':34} {'stored as':10} {'loss':>8} {'moves by':>10} {'gradient by':>12}")
    for name, teacher in features(clips).items():
        width = teacher.width
        turn = torch.randn(width, width, generator=draw) / width**0.5
        noise = torch.randn(teacher.tokens.shape, generator=draw)
        student = teacher.with_tokens(teacher.tokens @ turn + teacher.tokens.std() * noise)
        value, gradient = loss_and_gradient(student, teacher)
        rounded = teacher.with_tokens(teacher.tokens.to(torch.bfloat16).float())
        in_8_bits = teacher.with_tokens(dequantised(*quantised(teacher.tokens)))
        for kind, stored in (("bfloat16", rounded), ("8 bits", in_8_bits)):
            stored_value, stored_gradient = loss_and_gradient(student, stored)
            moved = abs(stored_value - value) / value
            turned = ((stored_gradient - gradient).norm() / gradient.norm()).item()
            print(f"{name:34} {kind:10} {value:8.4f} {moved:10.4%} {turned:12.4%}")


if __name__ == "__main__":
    main()
