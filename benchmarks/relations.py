"""How much of a teacher's relations sets a clip apart, and how much is the same in every clip.

Run: python benchmarks/relations.py [--clips 200]

Clips of the lab. A relation is the cosine of two of a clip's tokens; its variance, over pairs and
clips, is shared where it is that of the pair's mean over the clips. `centred`: each token less the
mean of its place over the clips, as `align.centre` does.
"""

from __future__ import annotations

import argparse

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from videorepa.encoders import load_encoder
from videorepa.encoders.untrained import forget
from videorepa.lab.render import make_clip
from videorepa.measure import mean_colours
from videorepa.tokens import TokenGrid

BATCH = 20


def shared(grid: TokenGrid) -> tuple[float, float, float]:
    """Shares that are the same in every clip: of the tokens' variance, what their place says; of
    the relations' variance, as they are and centred."""
    tokens = grid.tokens.float()
    around = tokens - tokens.mean((0, 1, 2, 3))
    place = around.mean(0).square().sum() / around.square().sum(-1).mean(0).sum()
    return place.item(), _of_relations(tokens), _of_relations(grid.centred().tokens)


def _of_relations(tokens: Float[Tensor, "n t h w d"]) -> float:
    count = tokens.shape[1] * tokens.shape[2] * tokens.shape[3]
    total, squared = torch.zeros(count, count), torch.zeros(count, count)
    for batch in tokens.split(BATCH):
        flat = F.normalize(batch.flatten(1, 3), dim=-1)
        relations = flat @ flat.transpose(1, 2)
        total += relations.sum(0)
        squared += relations.square().sum(0)
    mean = total / len(tokens)
    within = (squared / len(tokens) - mean.square()).mean()
    between = mean.var(unbiased=False)
    return (between / (between + within)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=200)
    count = parser.parse_args().clips
    frames = torch.stack([torch.from_numpy(make_clip(7, n).frames) for n in range(count)])
    video = frames.permute(0, 1, 4, 2, 3)
    size = {"weights": "micro", "frames": 16, "height": 64, "width": 64}
    teacher, image = load_encoder("videomae", **size), load_encoder("dinov2", **size)

    def seen(encoder) -> TokenGrid:
        return TokenGrid.batch([encoder(part / 255.0) for part in video.split(BATCH)])

    grids = {"video teacher": seen(teacher), "image teacher": seen(image)}
    like = grids["video teacher"]
    grids["raw pixels"] = mean_colours(video / 255.0, like)
    forget(teacher)
    grids["video teacher, untrained"] = seen(teacher)
    print("| teacher | tokens: place | relations, as they are | relations, centred |")
    print("|---|---|---|---|")
    for name, grid in grids.items():
        print(f"| {name} | " + " | ".join(f"{100 * each:.0f} %" for each in shared(grid)) + " |")


if __name__ == "__main__":
    main()
