"""What a forward pass tells of every block: how close it is to teachers, and what it knows of
contact."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor
from torch.nn import functional as F

from videorepa.align import resample, tap
from videorepa.backbones import Backbone, Text
from videorepa.data.batches import generator
from videorepa.encoders import Encoder
from videorepa.encoders.untrained import forget
from videorepa.errors import UserError
from videorepa.losses.relation import Relation
from videorepa.progress import track
from videorepa.readings import Reading
from videorepa.readout import read_label
from videorepa.statistics import paired_bootstrap
from videorepa.tokens import TokenGrid

SMALLEST_SHARE = 1e-6
"""What float32 leaves of features that do not vary, as a share of their norm, is below this."""
TIMESTEPS_TRIED = 4096
LEVEL_TOLERANCE = 0.02
SLICES = 3
"""Steps in time whose tokens the probe reads, evenly spaced, as for VideoREPA's figure 1."""

See = Callable[[Float[Tensor, "b f 3 h w"]], TokenGrid]


@dataclass(frozen=True)
class Clips:
    """Clips in memory.

    frames: (n, F, H, W, 3) uint8. digest: changes when the clips do. batch: how many go through a
    model at once. label: what the probe is to read.
    """

    frames: np.ndarray
    captions: Sequence[str]
    digest: str
    batch: int
    label: Bool[np.ndarray, " n"] | None = None

    def batches(self) -> list[slice]:
        count = len(self.frames)
        return [slice(first, first + self.batch) for first in range(0, count, self.batch)]

    def video(self, which: slice) -> Float[Tensor, "b f 3 h w"]:
        return torch.from_numpy(self.frames[which]).permute(0, 1, 4, 2, 3).float() / 255.0


@dataclass(frozen=True)
class Encoded:
    """Clips as the base model takes them: latents (f, c, h, w), noise alike, and what each
    caption became."""

    clips: Clips
    latents: list[Tensor]
    noise: list[Tensor]
    text: list[Text]


# Two grids.


def linear_cka(x: Float[Tensor, "n p"], y: Float[Tensor, "n q"]) -> Float[Tensor, ""]:
    """Linear CKA of the same n tokens in two models, 0 to 1 (Kornblith et al. 2019,
    arXiv 1905.00414): |Y'X|^2 / (|X'X| |Y'Y|), with X and Y centred over the tokens.

    It is 1 for features that are equal up to a rotation, a scale and an offset, and 0 where either
    does not vary. Unrelated features of a width near the number of tokens are well above 0, so a
    straw man has to stand beside it. Computed in float32 or wider.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = _centred(x), _centred(y)
        if len(x) <= max(x.shape[1], y.shape[1]):
            # The same three numbers from n x n products: |Y'X|^2 is the inner product of XX', YY'.
            ours, theirs = x @ x.mT, y @ y.mT
            shared = (ours * theirs).sum()
        else:
            ours, theirs = x.mT @ x, y.mT @ y
            shared = (y.mT @ x).square().sum()
        norms = ours.norm() * theirs.norm()
        return torch.where(norms > 0, shared / torch.where(norms > 0, norms, 1.0), 0.0)


def _centred(x: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
    """Without the mean token, at norm 1: the fourth powers in CKA must not overflow. Zero if no
    more than rounding is left."""
    x = x if x.dtype == torch.float64 else x.float()
    varying = x - x.mean(0)
    length = varying.norm()
    return torch.where(length > SMALLEST_SHARE * x.norm(), varying / length, 0.0)


def closeness(student: TokenGrid, teacher: TokenGrid) -> dict[str, list[float]]:
    """Relation error and CKA of each clip, on the teacher's grid; there is no projector, since
    neither depends on the width.

    The relation error is TRD with margin 0: the mean, over all pairs of a clip's tokens, of how far
    apart the two cosine similarities are; 0 to 2.
    """
    found: dict[str, list[float]] = {"relation_error": [], "cka": []}
    # Clip by clip: relations of the published grid take 52 MB for each.
    for ours, theirs in zip(student.tokens.split(1), teacher.tokens.split(1), strict=True):
        like = teacher.with_tokens(theirs.to(ours.device, torch.float32))
        met = resample(student.with_tokens(ours.float()), like=like)
        found["relation_error"].append(Relation(margin=0.0)(met, like).item())
        found["cka"].append(linear_cka(met.tokens.flatten(0, 3), like.tokens.flatten(0, 3)).item())
    return found


def slices(
    grid: TokenGrid, count: int = SLICES, side: int | None = None
) -> Float[np.ndarray, "b d"]:
    """The tokens of so many evenly spaced steps in time, of those that begin in the clip:
    CogVideoX's first step, which is frame 0 alone, is not among them.

    side: rows and columns that each frame's tokens are averaged to; by default all are given.
    """
    grid = grid.since(0)
    if side is not None:
        grid = grid.averaged(side)
    steps = np.linspace(0, grid.size[0] - 1, count).round().astype(int)
    return grid.tokens[:, steps].flatten(1).float().cpu().numpy()


# Teachers and straw men.


def look(see: See, clips: Clips, what: str) -> TokenGrid:
    """The grid of all clips, in float32 on the CPU."""
    grids = [see(clips.video(which)) for which in track(clips.batches(), what)]
    return grids[0].with_tokens(torch.cat([grid.tokens.float().cpu() for grid in grids]))


def mean_colours(video: Float[Tensor, "b f 3 h w"], like: TokenGrid) -> TokenGrid:
    """Raw pixels, -1 to 1, averaged over what each token of `like` covers."""
    seen = video[:, max(0, like.start) :].transpose(1, 2) * 2 - 1
    return like.with_tokens(F.adaptive_avg_pool3d(seen, like.size).permute(0, 2, 3, 4, 1))


def straw_men(
    encoder: Encoder, features: TokenGrid, shown: Clips, balls: Clips | None
) -> list[Reading]:
    """How close raw pixels and the untrained teacher are to the teacher's features of `shown`; how
    well contact in `balls` is read from them and from the teacher. The encoder is untrained after.
    """

    def sources() -> Iterator[tuple[str, See]]:
        yield "teacher", encoder
        yield "pixels", lambda video: mean_colours(video, features)
        forget(encoder)
        yield "untrained", encoder

    readings = []
    for source, see in sources():
        if source != "teacher":
            near = closeness(look(see, shown, source), features)
            readings += [_mean_over_clips(m, values, source) for m, values in near.items()]
        if balls is not None:
            readings.append(_contact(slices(look(see, balls, f"{source}, contact")), balls, source))
    return readings


# The base model.


def encode(backbone: Backbone, clips: Clips, seed: int) -> Encoded:
    """Latents and text of clips, and the noise for them, which is the same at every level."""
    latents = draw_latents(backbone, clips, lambda n: generator(seed, "scan latents", n), "encode")
    noise = draw_noise(latents, lambda n: generator(seed, "scan noise", n))
    text = {caption: backbone.encode_text([caption]) for caption in set(clips.captions)}
    return Encoded(clips, latents, noise, [text[caption] for caption in clips.captions])


def draw_latents(
    backbone: Backbone, clips: Clips, by: Callable[[int], torch.Generator], what: str = ""
) -> list[Tensor]:
    """A sample of each clip's posterior, (f, c, h, w), drawn by the clip's own generator.

    what: its progress is shown under that name; without one it is not.
    """
    latents: list[Tensor] = []
    for which in track(clips.batches(), what, shown=bool(what)):
        for moments in backbone.encode_video(clips.video(which)).split(1):
            latents += backbone.latents(moments, by(len(latents)))
    return latents


def draw_noise(latents: Sequence[Tensor], by: Callable[[int], torch.Generator]) -> list[Tensor]:
    """Noise for each clip's latents, drawn by the clip's own generator."""
    return [torch.randn(x.shape, generator=by(number)).to(x) for number, x in enumerate(latents)]


class Student:
    """A base model whose transformer is loaded, and the blocks of it that are measured."""

    def __init__(self, backbone: Any, blocks: Sequence[int]) -> None:
        self.backbone, self.blocks = backbone, blocks

    def distances(
        self, encoded: Encoded, level: float, teachers: Mapping[str, TokenGrid]
    ) -> dict[str, list[Reading]]:
        """Relation error and CKA of every block, for every teacher's features of these clips."""
        found: dict[tuple[str, int, str], list[float]] = defaultdict(list)
        for which, block, grid in self._at_level(encoded, level):
            for name, features in teachers.items():
                theirs = features.with_tokens(features.tokens[which])
                for measure, values in closeness(grid, theirs).items():
                    found[name, block, measure] += values
        readings: dict[str, list[Reading]] = defaultdict(list)
        for (name, block, measure), values in found.items():
            readings[name].append(_mean_over_clips(measure, values, "block", block, level))
        return readings

    def contact(self, encoded: Encoded, level: float) -> list[Reading]:
        """How well contact is read from every block."""
        found: dict[int, list[np.ndarray]] = defaultdict(list)
        for _, block, grid in self._at_level(encoded, level):
            found[block].append(slices(grid))
        return [
            _contact(np.concatenate(rows), encoded.clips, "block", block, level)
            for block, rows in found.items()
        ]

    def _at_level(self, encoded: Encoded, level: float) -> Iterator[tuple[slice, int, TokenGrid]]:
        return self.outputs(encoded, self._timestep(level, encoded.latents[0]), f"noise {level:g}")

    @torch.no_grad()
    def outputs(
        self, encoded: Encoded, timestep: Num[Tensor, " 1"], what: str = ""
    ) -> Iterator[tuple[slice, int, TokenGrid]]:
        """Which clips, a block's number and its grid of them: one pass per batch of clips, with all
        blocks tapped; what is taken is let go at once.

        what: its progress is shown under that name; without one it is not.
        """
        with ExitStack() as stack:
            taps = {n: stack.enter_context(tap(self.backbone.block(n))) for n in self.blocks}
            for which in track(encoded.clips.batches(), what, shown=bool(what)):
                latents = torch.stack(encoded.latents[which])
                noise = torch.stack(encoded.noise[which])
                captions = encoded.text[which]
                text = {name: torch.cat([t[name] for t in captions]) for name in captions[0]}
                at = timestep.expand(len(latents))
                noisy = self.backbone.diffusion.add_noise(latents, noise, at)
                inputs = self.backbone.inputs(noisy, text, at)
                self.backbone.transformer(**inputs, return_dict=False)
                for number, tapped in taps.items():
                    yield which, number, self.backbone.grid(tapped.take(), latents)

    def _timestep(self, level: float, latents: Float[Tensor, "f c h w"]) -> Num[Tensor, " 1"]:
        """The timestep at which the noise's share of the variance is nearest to the level.

        Found by noising zeros and ones, so that it holds for any kind of diffusion.
        """
        many = latents.expand(TIMESTEPS_TRIED, *latents.shape)
        drawn = self.backbone.sample_timesteps(many, generator(0, "scan timesteps")).unique()
        one = torch.ones(len(drawn), 1, device=drawn.device)
        add_noise = self.backbone.diffusion.add_noise
        signal, spread = add_noise(one, 0 * one, drawn), add_noise(0 * one, one, drawn)
        share = (spread**2 / (signal**2 + spread**2))[:, 0]
        best = (share - level).abs().argmin()
        if abs(share[best] - level) > LEVEL_TOLERANCE:
            raise UserError(
                f"The base model is never at the noise level {level:g}; the nearest is "
                f"{share[best]:.3f}, of {share.min():.3f} to {share.max():.3f}."
            )
        return drawn[best][None]


def _mean_over_clips(
    measure: str,
    values: Sequence[float],
    source: str,
    block: int | None = None,
    noise: float | None = None,
) -> Reading:
    check_finite(values, source if block is None else f"block {block} at noise {noise:g}")
    low, high = paired_bootstrap([[value] for value in values])
    value, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    return Reading(measure, source, value, low, high, len(values), sd, block, noise)


def _contact(
    features: Float[np.ndarray, "n d"],
    clips: Clips,
    source: str,
    block: int | None = None,
    noise: float | None = None,
) -> Reading:
    assert clips.label is not None
    check_finite(features, source if block is None else f"block {block} at noise {noise:g}")
    found = read_label(features, clips.label)
    return Reading(
        "contact_auc", source, found.auc, found.low, found.high, found.n, None, block, noise
    )


def check_finite(values: Sequence[float] | np.ndarray, whose: str) -> None:
    """Raises UserError if any is not."""
    if not np.isfinite(values).all():
        raise UserError(
            f"The features of {whose} are not finite. The weights are damaged, or the precision is "
            "too low: try --train.precision float32."
        )
