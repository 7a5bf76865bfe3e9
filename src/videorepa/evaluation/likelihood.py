"""Which of two clips does a model find likelier? Compares its denoising losses (arXiv 2510.11512).

Both clips of a pair get the same noise, timesteps and caption. The one that the model denoises with
the smaller loss is the likelier one to it. Nothing is generated and there is no judge.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from videorepa.artifacts.scores import Row
from videorepa.backbones import Backbone, Text, moved, timestep_of_noise
from videorepa.conditioning import Opening
from videorepa.data.video import to_video
from videorepa.diffusion import VPrediction
from videorepa.errors import ClipError, UserError
from videorepa.evaluation.paired_clips import Pair
from videorepa.evaluation.pairs import Pairs, mean, share, subject
from videorepa.evaluation.statistics import bootstrap, clopper_pearson, swap
from videorepa.system.randomness import generator

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""The noise's share of the noisy latents' variance."""


FOLDER = "likelihood"
"""The folder of a measurement that holds each model's scores. By it a measurement is recognised."""


class Losses(NamedTuple):
    """What clips cost at each noise level.

    Args:
      loss: The model's own training loss.
      noise_error: The error of the predicted noise, or of a flow's velocity; LikePhys ranks by it.
    """

    loss: Float[Tensor, "n levels"]
    noise_error: Float[Tensor, "n levels"]


@dataclass
class Denoising:
    """The denoising losses of clips in the model's own schedule and prediction type.

    Attributes:
        backbone: The live model, with its transformer.
        levels: Noise levels: the noise's share of the noisy latents' variance.
        seed: Seed of the noise.
        batch: How many clips go through the model at once.
    """

    backbone: Backbone
    levels: Sequence[float] = NOISE_LEVELS
    seed: int = 0
    batch: int = 1

    @property
    def labels(self) -> list[str]:
        """The names of the noise levels in rows and tables."""
        return [f"{level:g}" for level in self.levels]

    @torch.no_grad()
    def __call__(
        self,
        latents: Float[Tensor, "n f c h w"],
        text: Text,
        group: str,
        opening: Opening | None = None,
    ) -> Losses:
        """The losses of clips that have the caption and the noise in common.

        Args:
            latents: The clips' latents, without noise.
            text: Their caption, encoded: a batch of one.
            group: Its name seeds the noise, so that it is the same for every model.
            opening: What the model is shown of all clips alike: a batch of one. Losses are of the
                rest.
        """
        errors = []
        for level, label in zip(self.levels, self.labels, strict=True):
            timestep = timestep_of_noise(self.backbone, level, latents[0])
            draw = generator(self.seed, "likelihood noise", group, label)
            noise = torch.randn(latents[0].shape, generator=draw).to(latents)
            for clips in latents.split(self.batch):
                n = len(clips)
                denoised = self.backbone.denoising_loss(
                    clips,
                    repeated(text, n),
                    noise.expand_as(clips),
                    timestep.expand(n),
                    opening and opening.repeated(n),
                    of_unseen=True,
                )
                error = self.backbone.diffusion.noise_error(denoised)
                errors.append(torch.stack([denoised.loss, error]).double().cpu())
        by_level = torch.cat(errors, 1).unflatten(1, (len(self.levels), -1))
        return Losses(*by_level.transpose(1, 2))


PUBLISHED_STEPS = tuple(range(0, 1000, 100))
"""The steps of 1,000 at which LikePhys's code takes losses, the noisiest first."""

NEGATIVE_PROMPT = "worst quality, inconsistent motion, blurry, jittery, distorted"
"""LikePhys's negative prompt."""


@dataclass
class AsPublished:
    """What LikePhys's released code seems to compute, from reading it; it was never run beside it.

    It differs from the denoising loss in three ways. Inputs at all steps are divided by the
    noisiest step's scale, so that nearly all are close to zero. The noise is predicted from the
    clean latents, where the noisy ones belong. The schedule is the one before the shift of its
    signal-to-noise ratio. The prediction is guided. Compare it with nothing but itself.

    Attributes:
        backbone: A live model of the diffusion kind, with its transformer.
        negative: The negative prompt, encoded: a batch of one.
        guidance: The guidance scale.
        seed: Seed of the noise.
        batch: How many clips go through the model at once.
    """

    backbone: Backbone
    negative: Text
    guidance: float
    seed: int = 0
    batch: int = 1

    labels = tuple(f"step {step}" for step in PUBLISHED_STEPS)

    def __post_init__(self) -> None:
        from diffusers import EulerDiscreteScheduler

        if not isinstance(self.backbone.diffusion, VPrediction):
            raise UserError(
                f"What LikePhys's code does with {self.backbone.spec.name} is not known: "
                "as-published losses are for models with v-prediction, such as CogVideoX."
            )
        euler: Any = EulerDiscreteScheduler.from_config(self.backbone.scheduler.config)
        euler.set_timesteps(1000)
        chosen = list(PUBLISHED_STEPS)
        self.sigmas, self.timesteps = euler.sigmas[chosen].float(), euler.timesteps[chosen]

    @torch.no_grad()
    def __call__(
        self,
        latents: Float[Tensor, "n f c h w"],
        text: Text,
        group: str,
        opening: Opening | None = None,
    ) -> Losses:
        """As `Denoising`'s. Loss and error are the same here."""
        assert opening is None  # Their code is of text alone.
        errors = []
        scale = (self.sigmas[0] ** 2 + 1).sqrt()
        for label, sigma, timestep in zip(self.labels, self.sigmas, self.timesteps, strict=True):
            draw = generator(self.seed, "likelihood noise", group, label)
            noise = torch.randn(latents[0].shape, generator=draw).to(latents)
            for clips in latents.split(self.batch):
                velocity = self._guided((clips + sigma * noise) / scale, text, timestep)
                predicted = clips * sigma / (sigma**2 + 1) + velocity / (sigma**2 + 1).sqrt()
                errors.append((predicted - noise).square().flatten(1).mean(1).double().cpu())
        error = torch.cat(errors).unflatten(0, (len(self.labels), -1)).T
        return Losses(error, error)

    def _guided(self, shown: Tensor, text: Text, timestep: Tensor) -> Tensor:
        at = timestep.expand(len(shown)).to(shown.device)
        with_text, without = (
            self.backbone.velocity(
                self.backbone.predict(self.backbone.inputs(shown, repeated(each, len(shown)), at)),
                shown,
            ).float()
            for each in (text, self.negative)
        )
        return without + self.guidance * (with_text - without)


def repeated(text: Text, n: int) -> Text:
    """An encoded caption as a batch of n clips that have it in common."""
    return {name: value.expand(n, *value.shape[1:]) for name, value in text.items()}


@torch.no_grad()
def encode(
    backbone: Backbone, frames: Sequence[np.ndarray], batch: int
) -> Float[Tensor, "n f c h w"]:
    """The latents of clips, each the mode of its posterior.

    Args:
        backbone: The live model, with its autoencoder.
        frames: Each (f, h, w, 3) uint8.
        batch: How many to encode at once.
    """
    parts = (np.stack(frames[first : first + batch]) for first in range(0, len(frames), batch))
    latents = [backbone.latents(backbone.encode_video(to_video(part)), None) for part in parts]
    return torch.cat(latents)


@torch.no_grad()
def real_opening(backbone: Backbone, real: np.ndarray) -> Opening | None:
    """What a model that has no text mode is shown of both clips of a pair: the real one's first
    frame. None for others.

    Args:
        backbone: The live model, with its autoencoder and what else encodes images.
        real: The real clip, (f, h, w, 3) uint8.
    """
    if not backbone.spec.takes_image:
        return None
    video = to_video(real)[None]
    return backbone.opening(video, backbone.encode_video(video))


@dataclass(frozen=True)
class EncodedPairs:
    """The pairs of one real clip, in main memory.

    Attributes:
      latents: Those of the real clip, then of each pair's broken one.
      text: Their caption.
      opening: What `real_opening` gives.
    """

    pairs: Sequence[Pair]
    latents: Tensor
    text: Text
    opening: Opening | None


def encode_pairs(
    backbone: Backbone,
    read: Iterable[tuple[Sequence[Pair], Sequence[np.ndarray]]],
    batch: int,
) -> list[EncodedPairs]:
    """Encode pairs into main memory.

    Args:
        backbone: The live model, with all that encodes.
        read: The pairs of each real clip, with the frames that `read_group` gives.
        batch: How many clips to encode at once.
    """
    encoded = []
    for pairs, frames in read:
        text = backbone.encode_captions([pairs[0].caption], to_video(frames[0][:1])[None])
        opening = real_opening(backbone, frames[0])
        encoded.append(
            EncodedPairs(
                pairs,
                encode(backbone, frames, batch).cpu(),
                moved(text, torch.device("cpu")),
                opening and opening.mapped(Tensor.cpu),
            )
        )
    return encoded


def rows_of(
    denoising: Denoising | AsPublished,
    latents: Float[Tensor, "n f c h w"],
    text: Text,
    pairs: Sequence[Pair],
    failures: dict[str, str],
    opening: Opening | None = None,
) -> Iterator[tuple[Pair, Row]]:
    """Score the pairs of one real clip, and yield the columns of each one's row.

    Args:
        denoising: Gives the losses.
        latents: Those of the real clip, then of each pair's broken one.
        text: Their caption, encoded.
        pairs: The pairs.
        failures: Gets the reason why a pair has no score, by its id.
        opening: What the model is shown of all of them; losses and latents count without it.
    """
    losses = denoising(latents, text, pairs[0].group, opening)
    columns = [(a.tolist(), b.tolist()) for a, b in zip(*losses, strict=True)]
    if opening is not None:
        latents = latents[:, denoising.backbone.geometry.steps :]
    energies = latents.double().square().flatten(1).mean(1).tolist()
    for place, pair in enumerate(pairs, 1):
        both = energies[0], energies[place]
        try:
            yield pair, scored(denoising.labels, columns[0], columns[place], both)
        except ClipError as error:
            failures[pair.id] = str(error)


def scored(
    labels: Sequence[str],
    real: tuple[Sequence[float], Sequence[float]],
    broken: tuple[Sequence[float], Sequence[float]],
    energies: tuple[float, float],
) -> Row:
    """The columns of a pair's row.

    At a level, `log_ratio` is ln(loss of the broken clip / loss of the real one), and `likelier`
    says whether it is above 0: whether the real clip is likelier. A tie is no preference: None.
    Over all levels it is the mean of the log ratios, so that each level counts alike. `noise_error`
    is the mean over the levels, as LikePhys takes it. `smaller` asks the same of the mean square of
    the latents alone (`mean_square`): a preference that this gives too is none of the model's.

    Args:
        labels: The names of the noise levels.
        real: Losses and noise errors of the real clip, by level.
        broken: The same of the broken clip.
        energies: The mean square of the real clip's latents and of the broken one's.

    Raises:
        ClipError: A loss is not a finite number above 0.
    """
    for which, values in (("real", (*real[0], *real[1])), ("broken", (*broken[0], *broken[1]))):
        if not all(math.isfinite(value) for value in values):
            raise ClipError(f"the loss of the {which} clip is not a finite number")
    if not all(value > 0 for value in (*real[0], *broken[0])):
        raise ClipError("a loss is 0, so there is no ratio of the two")
    ratios = [math.log(b / a) for a, b in zip(real[0], broken[0], strict=True)]
    compared = {"": float(np.mean(ratios))}
    compared |= {f" at {label}": ratio for label, ratio in zip(labels, ratios, strict=True)}
    row: Row = {f"likelier{at}": _above_0(ratio) for at, ratio in compared.items()}
    row |= {f"log_ratio{at}": ratio for at, ratio in compared.items()}
    row["smaller"] = _above_0(energies[1] - energies[0])
    row["invalid"] = {name: "a tie" for name, value in row.items() if value is None}
    for which, (losses, errors) in (("real", real), ("broken", broken)):
        row |= {f"loss_{which} at {x}": loss for x, loss in zip(labels, losses, strict=True)}
        row[f"noise_error_{which}"] = float(np.mean(errors))
    return row | {"mean_square_real": energies[0], "mean_square_broken": energies[1]}


def _above_0(value: float) -> bool | None:
    return value > 0 if value else None


def aggregate(rows: Sequence[Row], labels: Sequence[str], published: bool) -> dict[str, Any]:
    """Shares of pairs in which the real clip is likelier, and the mean log ratio.

    Args:
        rows: What `scored` returned, with "asked", the real clip that pairs have in common.
        labels: The names of the noise levels.
        published: Whether to add LikePhys's metric, `ppe`.
    """
    ats = ["", *(f" at {label}" for label in labels)]
    metrics = {f"likelier{at}": preference(rows, f"likelier{at}") for at in ats}
    metrics |= {"smaller": preference(rows, "smaller"), "log_ratio": mean(rows, "log_ratio")}
    return metrics | ({"ppe": preference_error(rows)} if published else {})


def preference(rows: Sequence[Row], key: str) -> dict[str, Any]:
    """The share of pairs without a tie in which a flag is set.

    The interval is exact (Clopper and Pearson) where no two pairs have a real clip in common, and
    otherwise that of `share`.
    """
    found = share(rows, key)
    if 0 < found["n"] == found["prompts"]:
        low, high = clopper_pearson(sum(bool(row[key]) for row in rows), found["n"])
        found |= {"low": 100 * low, "high": 100 * high}
    return found


def compare(
    rows_a: Sequence[Row], rows_b: Sequence[Row], labels: Sequence[str], published: bool = False
) -> dict[str, Any]:
    """B minus A over the same pairs and noise. See `Pairs.compare`.

    Args:
        rows_a: A's rows.
        rows_b: B's rows.
        labels: The names of the noise levels.
        published: Whether to compare LikePhys's metric, `ppe`, too: its interval is by bootstrap
            over real clips, and p by exchanging the models' errors on random ones.
    """
    both = Pairs.of(rows_a, rows_b)
    flags = ["likelier", *(f"likelier at {label}" for label in labels)]
    found = both.compare(flags, ["log_ratio"])
    if published:
        # The same pairs in the same order, so the tables' rows and columns are the same.
        a, b = (_errors([pair[side] for pair in both.pairs]) for side in (0, 1))
        width = a.shape[1]

        def change(means: np.ndarray) -> np.ndarray:
            return _mean_error(means[..., width:]) - _mean_error(means[..., :width])

        low, high = bootstrap(np.concatenate([a, b], 1), change)
        found["ppe"] = {
            "difference": float(_mean_error(b.mean(0)) - _mean_error(a.mean(0))),
            "low": low,
            "high": high,
            "p": swap(a, b, lambda before, after: _mean_error(after) - _mean_error(before)),
            "n": len(both.pairs),
            "prompts": len(a),
        }
    return found


def preference_error(rows: Sequence[Row]) -> dict[str, Any]:
    """LikePhys's Plausibility Preference Error: the share of pairs with the larger error when real.

    It is the mean over each law's real clips, then over all laws. 50 % is chance, and lower is
    better. A tie is no error. The interval is by bootstrap over the real clips.
    """
    if not rows:
        return {"percent": None, "n": 0, "prompts": 0}
    errors = _errors(rows)
    low, high = bootstrap(errors, _mean_error)
    value = float(_mean_error(errors.mean(0)))
    return {"percent": value, "low": low, "high": high, "n": len(rows), "prompts": len(errors)}


def _errors(rows: Sequence[Row]) -> np.ndarray:
    """For each real clip and law two columns: the share of errors, and whether there is a pair."""
    laws = sorted({row["law"] for row in rows})
    errors: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        wrong = row["noise_error_real"] > row["noise_error_broken"]
        errors[subject(row)][row["law"]].append(wrong)
    table = [
        [(np.mean(of[law]) if law in of else 0.0, law in of) for law in laws]
        for of in errors.values()
    ]
    return np.array(table, float).reshape(len(errors), -1)


def _mean_error(means: np.ndarray) -> np.ndarray:
    """The mean over laws in percent, of the means of the columns of `_errors`."""
    with np.errstate(invalid="ignore"):  # A law that no drawn clip has.
        return 100 * np.nanmean(means[..., 0::2] / means[..., 1::2], -1)
