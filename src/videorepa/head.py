"""Trains the small heads of MoAlign and SARA, on any teacher, from the optical flow of clips."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from videorepa.data.flow import Flow, flow_method
from videorepa.data.source import ClipSource, open_source
from videorepa.data.video import READER, to_video
from videorepa.encoders import EncoderSpec
from videorepa.encoders.headed import MOTION_WIDTH, Head, Headed, Kind, read_about, save_head
from videorepa.errors import ClipError, UserError, within_memory
from videorepa.recipe import Recipe
from videorepa.remedies import in_teaching
from videorepa.system.checks import check_finite
from videorepa.system.device import compute_dtype, pick_device
from videorepa.system.fingerprint import json_digest
from videorepa.system.progress import console, track
from videorepa.system.randomness import generator, stable_seed
from videorepa.tokens import TokenGrid

HALF_MOVING = 0.5
"""Speed against the background, in pixels a frame, at which a pixel counts as half moving."""

HELD_OUT = 0.2
"""Share of the clips that the error is measured on."""

STEPS, BATCH, LEARNING_RATE = 600, 8, 5e-3

DAMPING = 1e-2
"""Share of the mean variance that is added to the variance of each direction before whitening."""

LEARNT = 0.95
"""A head has learnt something if its error is below this share of the best constant's."""


@dataclass(frozen=True)
class TrainedHead:
    """A trained head, and how well it predicts clips that were held out of its training.

    Errors are root mean squares: of motion in pixels of the encoder's input a frame, of saliency
    from 0 to 1.

    Attributes:
      path: The head's file.
      clips: How many clips it was trained on.
      held_out: How many clips the errors were measured on.
      error: Error of the head.
      mean: Error of always predicting the mean of the training clips.
      zero: Error of always predicting zero.
      failed: Why a clip could not be used, by its id.
    """

    path: Path
    kind: Kind
    clips: int
    held_out: int
    error: float
    mean: float
    zero: float
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def has_learnt(self) -> bool:
        """Whether its error is at least 5 % below that of both constant predictions."""
        return self.error < LEARNT * min(self.mean, self.zero)

    def __str__(self) -> str:
        unit = " pixels a frame" if self.kind == "motion" else ""
        text = (
            f"{self.kind} head: {self.path}, trained on {self.clips} clips\n"
            f"held-out error, {self.held_out} clips: {self.error:.3g}{unit}; "
            f"always the mean {self.mean:.3g}, always zero {self.zero:.3g}"
        )
        if not self.has_learnt:
            text += (
                "\nThe head has learnt nothing: a constant predicts as well. Give it more clips, "
                "clips that move more, or another teacher."
            )
        return text


@within_memory(in_teaching())
def train_head(
    recipe: Recipe, kind: Kind, out: Path, *, clips: int = 200, device: str | None = None
) -> TrainedHead:
    """Train a head on the recipe's teacher and clips, and write it to `out`.

    The teacher is the encoder of the recipe's first term that has one. If that is a `headed`
    encoder whose head is `out`, the teacher is the encoder that it wraps, so that one recipe
    describes both trainings. A clip that cannot be used is left out.

    Args:
      recipe: Names the teacher and the clips.
      kind: "motion" learns features that predict each token's optical flow, and keeps the features
        (MoAlign, arXiv 2510.19022). "saliency" learns how much of a token moves against the
        background (instead of SARA's text-conditioned saliency, arXiv 2605.07800).
      out: The file to write, which must not exist yet. If it holds this very head, nothing is done.
      clips: The most clips to use, drawn by the recipe's seed. Their features are held in memory,
        two bytes a channel.
      device: Where to compute; by default the first GPU, or the CPU.

    Raises:
      UserError: `out` exists, scikit-image is not installed, or fewer than two clips can be used.
    """
    if kind not in get_args(Kind):
        raise UserError(f"There is no {kind!r} head; expected {' or '.join(get_args(Kind))}.")
    spec = _teacher(recipe, out)
    spec.check_sees()
    if spec.frames < 2:
        raise UserError("The teacher sees one frame, which has no motion. Raise encoder.frames.")
    spec.shape(recipe.data.frames)  # Refuses what cannot work, before anything is computed.
    source, where = open_source(recipe.data), pick_device(device)
    drawn = generator(recipe.seed, "head")
    chosen = torch.randperm(len(source.items), generator=drawn)[: max(clips, 0)].tolist()
    if len(chosen) < 2:
        raise UserError(
            "A head needs two clips at least, one of them to measure its error on; got "
            f"{len(chosen)} of {len(source.items)}. Raise --clips, or list more."
        )
    made_with = _made_with(recipe, kind, spec, source, chosen)
    if out.exists():
        if finished := _finished(out, made_with):
            console.print(f"{out} holds this head already; nothing was done.")
            return finished
        raise UserError(f"{out} exists already. Delete it, or choose another file.")
    flow = flow_method()
    out.parent.mkdir(parents=True, exist_ok=True)
    encoder = spec.load(where, compute_dtype(recipe.train.precision, where))
    examples: list[_Example] = []
    failed: dict[str, str] = {}
    for number in track(chosen, "features and flow"):
        try:
            frames = source.sample(number).frames
        except ClipError as error:
            failed[source.items[number].id] = str(error)
            continue
        video = to_video(frames)[None]
        grid = encoder(video)
        what = f"The features that {spec.name} gives of the clip {source.items[number].id!r}"
        check_finite(what, grid.tokens)
        target = token_motion(kind, video[0], grid, (spec.height, spec.width), flow)
        kept = grid.with_tokens(grid.tokens.to("cpu", torch.bfloat16))
        examples.append(_Example(kept, target))
    if len(examples) < 2:
        reasons = "".join(f"\n  {name!r}: {reason}" for name, reason in failed.items())
        raise UserError(
            f"A head needs two clips at least, one of them to measure its error on; "
            f"{len(examples)} of {len(chosen)} can be used.{reasons}"
        )
    held_out = max(1, round(HELD_OUT * len(examples)))
    head, errors = _fit(kind, examples[held_out:], examples[:held_out], recipe.seed, where)
    used = len(examples) - held_out
    counts = {"clips": used, "held_out": held_out}
    training = {"made_with": made_with, "counts": counts, "failed": failed}
    save_head(out, head, spec, errors, training)
    return TrainedHead(out, kind, used, held_out, **errors, failed=failed)


def _made_with(
    recipe: Recipe, kind: Kind, spec: EncoderSpec, source: ClipSource, chosen: list[int]
) -> str:
    """A digest of all that a head depends on."""
    clips = []
    for number in chosen:
        with suppress(ClipError):  # A clip that cannot be read has no part in the head.
            clips.append(source.digest(number))
    places = {"cache", "manifest", "root", "lab", "prepare_batch"}
    size = recipe.data.model_dump(mode="json", exclude=places)
    made_with = [kind, recipe.seed, recipe.train.precision, spec.fingerprint(), size, clips, READER]
    return json_digest(made_with)


def _finished(path: Path, made_with: str) -> TrainedHead | None:
    """What an earlier call returned, if the file is its head and was made with the same."""
    try:
        about = read_about(path)
        if about.training["made_with"] != made_with:
            return None
        counts, failed = about.training["counts"], about.training["failed"]
        clips, held_out = counts["clips"], counts["held_out"]
        return TrainedHead(path, about.kind, clips, held_out, **about.held_out, failed=failed)
    except (UserError, KeyError, TypeError):
        return None


def token_motion(
    kind: Kind,
    video: Float[Tensor, "f 3 h w"],
    grid: TokenGrid,
    size: tuple[int, int],
    flow: Flow,
) -> Float[Tensor, "t h w c"]:
    """Compute what a head has to predict of each token of a grid.

    For "motion" it is the mean flow over the token's footprint and the frames of its step, in
    pixels a frame: down, and right. For "saliency" it is the mean over the same pixels of
    d^2 / (d^2 + 0.5^2), where d is the distance of a pixel's flow from the frame's median flow,
    which stands for the background. This is about the share of the footprint that moves.

    A frame's flow is that to the next frame. The last frame takes the flow of the one before.

    Args:
      video: The clip, 0 to 1.
      grid: The encoder's grid of the clip.
      size: Height and width at which the encoder sees the clip; pixels are of this size.
    """
    first = max(grid.start, 0)
    seen = F.interpolate(video[first:], size, mode="bicubic", align_corners=False)
    grey = seen.mean(1).numpy()
    pairs = [flow(grey[i], grey[i + 1]) for i in range(len(grey) - 1)]
    pixels = torch.from_numpy(np.stack([*pairs, pairs[-1]])).float()
    if kind == "saliency":
        background = pixels.flatten(2).median(-1).values[..., None, None]
        square = (pixels - background).square().sum(1, keepdim=True)
        pixels = square / (square + HALF_MOVING**2)
    steps, rows, columns = grid.size
    tokens = F.adaptive_avg_pool2d(pixels, (rows, columns)).permute(0, 2, 3, 1)
    spans = [[frame - first for frame in grid.frames(step)] for step in range(steps)]
    return torch.stack([tokens[span].mean(0) for span in spans])


class _Example(NamedTuple):
    """A clip: the teacher's grid, and what the head has to predict."""

    grid: TokenGrid
    target: Float[Tensor, "t h w c"]


class _Whitened(nn.Module):
    """Parametrises a weight (out, width) by the directions in which tokens vary, scaled to 1.

    A teacher's tokens vary a hundred times more in some directions than in others, and motion is in
    the small ones. Without whitening, gradient descent does not learn those (dev/log.md).
    """

    def __init__(self, covariance: Float[Tensor, "d d"]) -> None:
        super().__init__()
        variance, directions = torch.linalg.eigh(covariance)
        damped = variance.clamp(min=0) + DAMPING * variance.mean()
        self.register_buffer("directions", (directions / damped.sqrt()).float())

    def forward(self, weight: Float[Tensor, "o d"]) -> Float[Tensor, "o d"]:
        return weight @ self.get_buffer("directions").T


class _Predictor(nn.Module):
    """A head in training; for motion with a convolution on each frame that predicts the flow.

    The convolution is not kept.
    """

    def __init__(self, kind: Kind, examples: list[_Example]) -> None:
        super().__init__()
        targets = torch.stack([example.target for example in examples])
        self.mean = targets.mean((0, 1, 2, 3))
        self.scale = targets.std(unbiased=False).clamp(min=1e-6).item()
        self.head = Head(kind, examples[0].grid.width)
        self.conv = nn.Conv2d(MOTION_WIDTH, 2, 3, padding=1) if kind == "motion" else None
        self._start([example.grid.tokens for example in examples])

    def _start(self, tokens: list[Float[Tensor, "1 t h w d"]]) -> None:
        norm, linear = self.head.norm.requires_grad_(False), self.head.linear
        with torch.no_grad():
            count, total, products = 0, torch.zeros(()), torch.zeros(())
            for clip in tokens:
                rows = norm(clip.float()).flatten(0, 3).double()
                count, total = count + len(rows), total + rows.sum(0)
                products = products + rows.T @ rows
            mean = total / count
            norm.bias.copy_(-mean)
            # A linear layer that starts from noise keeps it in all directions that the flow does
            # not need, and the relations of the features would be those of the noise.
            linear.weight.zero_()
            linear.bias.zero_()
            if self.head.kind == "saliency":
                linear.bias.copy_(torch.logit(self.mean, eps=1e-4))
        whitened = _Whitened(products / count - mean.outer(mean))
        parametrize.register_parametrization(linear, "weight", whitened)

    def forward(self, grid: TokenGrid) -> Float[Tensor, "b t h w c"]:
        headed = self.head(grid)
        if self.conv is None:
            assert headed.saliency is not None
            return headed.saliency[..., None]
        activated = headed.with_tokens(F.gelu(headed.tokens))
        return activated.convolved(self.conv, *grid.size[1:]).tokens * self.scale

    def finished(self) -> Head:
        """Return the head without the parametrisation."""
        parametrize.remove_parametrizations(self.head.linear, "weight")
        return self.head


def _fit(
    kind: Kind, train: list[_Example], held_out: list[_Example], seed: int, device: torch.device
) -> tuple[Head, dict[str, float]]:
    """Train by squared error, and return the head and its errors on the held-out clips."""
    torch.manual_seed(stable_seed(seed, "head", kind))
    model = _Predictor(kind, train).to(device)
    mean = model.mean.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    drawn = generator(seed, "head", "batches")
    for _ in track(range(STEPS), f"train the {kind} head"):
        batch = [train[i] for i in torch.randperm(len(train), generator=drawn)[:BATCH].tolist()]
        grid, target = _batch(batch, device)
        loss = (model(grid) - target).square().mean() / model.scale**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    squares = {"error": 0.0, "mean": 0.0, "zero": 0.0}
    with torch.no_grad():
        for example in held_out:
            grid, target = _batch([example], device)
            guesses = {"error": model(grid), "mean": mean, "zero": torch.zeros_like(mean)}
            for name, guess in guesses.items():
                # The sum over both directions is the squared length of a flow's error.
                squares[name] += (target - guess).square().sum(-1).mean().item()
    errors = {name: math.sqrt(square / len(held_out)) for name, square in squares.items()}
    return model.finished(), errors


def _batch(examples: list[_Example], device: torch.device) -> tuple[TokenGrid, Tensor]:
    grid = TokenGrid.batch([example.grid for example in examples]).to(device)
    return grid, torch.stack([example.target for example in examples]).to(device)


def _teacher(recipe: Recipe, out: Path) -> EncoderSpec:
    spec = next((term.encoder for term in recipe.terms.values() if term.encoder), None)
    if spec is None:
        raise UserError(f"The recipe {recipe.name} has no encoder to train a head on.")
    within = spec
    while isinstance(within, Headed):
        if within.path.absolute() == out.absolute():
            return within.of
        within = within.of
    return spec
