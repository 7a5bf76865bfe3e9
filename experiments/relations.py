"""Measures what a teacher's relations hold: how much is the same in all clips, and contact.

Run: python experiments/relations.py [--clips 200] [--contact-clips 1000] [--out FILE.csv]

A relation is the cosine of two tokens of a clip. There is a row for each source of tokens and each
form: `whole` tokens; `centred` ones, less the mean of their place over clips, as with
`align.centre: clips`; and `changes`, less the mean of their place over the clip's time, as with
`align.centre: time`. Its columns are:

- shared: the share of the relations' variance, over pairs and clips of the lab, that is the
  variance of the pairs' means over clips
- tokens, relations: the AUC of a linear probe for contact, with its 95 % interval, from the tokens
  that the probe always reads, three steps of 4 x 4, and from their relations alone. Guessing gives
  0.5.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from auc import read_label
from rows import keep
from videorepa.encoders import load_encoder
from videorepa.probing.sources import SLICES, slices
from videorepa.tokens import TokenGrid
from videorepa.world.contact import contact_clip
from videorepa.world.render import make_clip

BATCH = 20
SIDE = 4


def relations(tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n n"]:
    unit = F.normalize(tokens, dim=-1)
    return unit @ unit.transpose(1, 2)


def shared(tokens: Float[Tensor, "b n d"]) -> float:
    """The share of the relations' variance that lies in their means over clips."""
    total = squared = torch.zeros(())
    for batch in tokens.split(BATCH):
        cosines = relations(batch)
        total, squared = total + cosines.sum(0), squared + cosines.square().sum(0)
    mean = total / len(tokens)
    within = (squared / len(tokens) - mean.square()).mean()
    between = mean.var(unbiased=False)
    return (between / (between + within)).item()


def tokens_of(features: Float[np.ndarray, "b f"]) -> Float[Tensor, "b n d"]:
    return torch.from_numpy(features).unflatten(1, (SLICES * SIDE**2, -1))


def pairs(tokens: Float[Tensor, "b n d"]) -> Float[np.ndarray, "b p"]:
    row, column = torch.triu_indices(tokens.shape[1], tokens.shape[1], 1)
    return relations(tokens)[:, row, column].numpy()


def sources() -> Iterator[tuple[str, Callable[[Tensor], TokenGrid]]]:
    """Names, and functions from videos (b, f, 3, h, w) in [0, 1] to tokens."""
    size = {"frames": 16, "height": 64, "width": 64}
    video_teacher = {"name": "videomae", "weights": "micro"} | size
    yield "video teacher", load_encoder(**video_teacher)
    yield "image teacher", load_encoder("dinov2", "micro", **size)
    yield "raw pixels", load_encoder("pixels", "none", patch=8, **size)
    yield "video teacher, untrained", load_encoder("untrained", "none", of=video_teacher)


def measure(clips: int, contact_clips: int) -> Iterator[dict[str, str]]:
    """A row for each source and form of tokens."""
    drawn = [contact_clip(0, index) for index in range(contact_clips)]
    shown = _videos([make_clip(7, index).frames for index in range(clips)])
    asked, label = _videos([clip.frames for clip, _ in drawn]), np.array([c for _, c in drawn])
    forms: dict[str, Callable[[TokenGrid], TokenGrid]] = {
        "whole": lambda grid: grid,
        "centred": TokenGrid.centred,
        "changes": TokenGrid.changes,
    }
    for source, see in sources():
        grid, grid_asked = _seen(see, shown), _seen(see, asked)
        for form, of in forms.items():
            row = {"source": source, "form": form}
            row["shared"] = f"{shared(of(grid).tokens.float().flatten(1, 3)):.4f}"
            tokens = slices(of(grid_asked), SLICES, SIDE)
            features = {"tokens": tokens, "relations": pairs(tokens_of(tokens))}
            for kind, each in features.items():
                readout = read_label(each, label)
                aucs = {"": readout.auc, "_low": readout.low, "_high": readout.high}
                row |= {kind + end: f"{value:.4f}" for end, value in aucs.items()}
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--contact-clips", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    keep(measure(arguments.clips, arguments.contact_clips), arguments.out)


def _videos(clips: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3)


def _seen(see: Callable[[Tensor], TokenGrid], videos: Tensor) -> TokenGrid:
    with torch.no_grad():
        return TokenGrid.batch([see(part / 255.0) for part in videos.split(BATCH)])


if __name__ == "__main__":
    main()
