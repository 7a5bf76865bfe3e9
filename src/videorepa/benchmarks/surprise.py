"""Surprise: how far V-JEPA 2's predictor is from what happens next in a clip.

The measure is that of Garrido et al. 2025 (arXiv 2502.11831), which told possible films from
impossible ones with V-JEPA. There is no caption in it, and no ground truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import av
import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from videorepa.artifacts.scores import Better, Row
from videorepa.benchmarks import Benchmark
from videorepa.data.manifest import Prompt
from videorepa.data.motion import motion
from videorepa.encoders import IMAGENET_MEAN, IMAGENET_STD
from videorepa.errors import ClipError, UserError
from videorepa.evaluation.pairs import Pairs, mean
from videorepa.system.configuration import read_configuration
from videorepa.system.device import Precision, compute_dtype, pick_device
from videorepa.system.fingerprint import file_sample_digest, weights_digest
from videorepa.system.hub import local_copy, stock_loading
from videorepa.system.weights import Misfit

WINDOW = 16
"""Frames of a window."""

CONTEXTS = (2, 4, 6, 8, 10)
"""Numbers of a window's first frames from which the rest is predicted."""

METRICS = ("surprise", "surprise_max", "motion")

NOT_INDEPENDENT = (
    "The judge is V-JEPA 2: not independent where the alignment's teacher is V-JEPA 2 too. A still "
    "clip surprises least: read motion beside it."
)


@dataclass(frozen=True)
class TokenPredictor:
    """V-JEPA 2 with its predictor, as the stock class has it, on square frames.

    Attributes:
        model: A `VJEPA2Model` in which mask token 0 has taken token 1's place.
    """

    model: Any

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> TokenPredictor:
        """Load a transformers folder.

        Raises:
            UserError: The folder does not hold a V-JEPA 2 with its predictor.
        """
        from transformers import VJEPA2Config, VJEPA2Model

        accepted = "Expected a folder such as facebook/vjepa2-vitl-fpc64-256, with the predictor."
        kind: Any = VJEPA2Model
        with stock_loading(f"The judge {folder}", accepted):
            read_configuration(folder / "config.json")  # Raises for sizes without end.
            config = VJEPA2Config.from_pretrained(folder)
            model, info = kind.from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True
            )
        # Otherwise transformers would initialise missing weights at random.
        misfit = Misfit.reported(info)
        if misfit.missing or misfit.misshapen or config.model_type != "vjepa2":
            raise UserError(f"{folder} ({config.model_type}) is no V-JEPA 2; {misfit}. {accepted}")
        tokens = model.predictor.embeddings.mask_tokens
        # The stock class takes token 1, which no training has touched: it is 0 in released files.
        tokens.data = tokens.data.roll(1, 0)
        return cls(model.to(device).eval())

    @property
    def size(self) -> int:
        """Height and width of frames, in pixels."""
        return self.model.config.crop_size

    @torch.no_grad()
    def predicted(self, window: Float[Tensor, "1 f 3 s s"], context: int) -> Float[Tensor, "n d"]:
        """The features of all frames but the first `context`, predicted from those alone.

        The stock class's own forward encodes all frames and leaves some out afterwards, so that
        what it predicts from has seen the future.
        """
        seen = self.model.encoder(window[:, :context]).last_hidden_state
        known = seen.shape[1]
        places = torch.arange(known * window.shape[1] // context, device=seen.device)[None]
        asked = [places[:, known:]]
        return self.model.predictor(seen, [places[:, :known]], asked).last_hidden_state[0]

    @torch.no_grad()
    def observed(self, window: Float[Tensor, "1 f 3 s s"]) -> Float[Tensor, "n d"]:
        """The features of all frames, under layer norm without weights, as in the training."""
        features = self.model.encoder(window).last_hidden_state[0].float()
        return F.layer_norm(features, features.shape[-1:])

    def surprises(
        self, window: Float[Tensor, "1 f 3 s s"], contexts: Sequence[int] = CONTEXTS
    ) -> list[Float[Tensor, " n"]]:
        """The mean distance of predicted and observed features, for each place predicted.

        Args:
            window: Normalised frames.
            contexts: Numbers of frames that are seen, for each of which it is measured.
        """
        observed = self.observed(window)
        predicted = [self.predicted(window, context).float() for context in contexts]
        return [(each - observed[-len(each) :]).abs().mean(-1) for each in predicted]

    def prepared(self, frames: UInt8[np.ndarray, "f h w 3"]) -> Float[Tensor, "1 f 3 s s"]:
        """Frames squashed to the model's square, bilinear and antialiased, and normalised."""
        parameter = next(self.model.parameters())
        video = torch.from_numpy(np.ascontiguousarray(frames)).to(parameter.device)
        video = video.permute(0, 3, 1, 2).float() / 255
        size = (self.size, self.size)
        if video.shape[-2:] != size:
            video = F.interpolate(video, size, mode="bilinear", antialias=True)
        norm = video.new_tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
        return ((video - norm[0]) / norm[1])[None].to(parameter.dtype)


class Surprise(Benchmark):
    """Mean and largest surprise over a clip's windows; and its motion.

    Attributes:
        judge: A transformers folder of V-JEPA 2, or its id on the Hub.
        precision: What the judge computes in.
        every: Every how manieth frame is looked at.
        stride: The frames of the clip between the beginnings of two windows.
    """

    name: Literal["surprise"] = "surprise"
    version: ClassVar[str] = "2"
    judge: str = "facebook/vjepa2-vitl-fpc64-256"
    precision: Precision = "auto"
    every: int = Field(default=2, ge=1)
    stride: int = Field(default=2, ge=1)

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        raise UserError("The benchmark surprise has no prompts of its own; it takes any clips.")

    @classmethod
    def ranked_by(cls) -> dict[str, Better]:
        return {"surprise": "lower", "surprise_max": "lower"}

    def about(self) -> dict[str, Any]:
        return {"about": NOT_INDEPENDENT, "judge": self._identity}

    def load(self) -> None:
        _ = self.live

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        """Measure one clip.

        Returns:
            surprise, the mean over windows, and surprise_max, the largest, where a window's value
            is the least over numbers of frames seen; by_context, the value of each window by that
            number; windows, how many there are; and motion, the mean distance of neighbouring
            frames in levels of 255.

        Raises:
            ClipError: The clip is shorter than a window.
        """
        length = (WINDOW - 1) * self.every + 1
        if len(frames) < length:
            raise ClipError(
                f"the clip has {len(frames)} frames; a window of {WINDOW} takes {length}. Generate "
                "longer clips, or look at more of the frames: --set every=1"
            )
        starts = range(0, len(frames) - length + 1, self.stride)
        by_context: dict[str, list[float]] = {str(context): [] for context in CONTEXTS}
        for start in starts:
            window = self.live.prepared(frames[start : start + length : self.every])
            for values, of in zip(by_context.values(), self.live.surprises(window), strict=True):
                values.append(float(of.mean()))
        table = np.array(list(by_context.values()))
        row: dict[str, Any] = {"windows": len(starts), "motion": motion(frames)}
        if not np.isfinite(table).all():
            reason = "the judge's features are not finite"
            none = {"surprise": None, "surprise_max": None}
            return row | none | {"by_context": {}, "invalid": dict.fromkeys(none, reason)}
        least = table.min(0)
        return row | {
            "surprise": float(least.mean()),
            "surprise_max": float(least.max()),
            "by_context": by_context,
        }

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """Means with bootstrap intervals over captions. Less surprise is better."""
        return {key: mean(rows, key) for key in METRICS}

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        """B minus A, paired by prompt and k. p is that of flipping the signs of whole captions.

        Raises:
            UserError: The two clips of a pair have different numbers of windows.
        """
        paired = Pairs.of(rows_a, rows_b)
        for a, b in paired.pairs:
            if a["windows"] != b["windows"]:
                raise UserError(
                    f"{a['prompt_id']!r} {a['k']} has {b['windows']} windows in one of the two "
                    f"sets and {a['windows']} in the other. Surprise grows with what a clip has "
                    "time for; compare clips of the same length."
                )
        present = [
            key
            for key in METRICS
            if any(a[key] is not None and b[key] is not None for a, b in paired.pairs)
        ]
        return {key: paired.tested(key) for key in present} | {"unpaired": paired.unpaired}

    @cached_property
    def live(self) -> TokenPredictor:
        """The judge, loaded on first use."""
        return TokenPredictor.load(local_copy(self.judge), pick_device(), self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return compute_dtype(self.precision, pick_device())

    @cached_property
    def _identity(self) -> dict[str, Any]:
        folder = local_copy(self.judge)
        return {
            "model": "V-JEPA 2 with mask token 0",
            "weights": weights_digest(folder),
            "config": file_sample_digest(folder / "config.json"),
            "dtype": str(self._dtype).removeprefix("torch."),
            "decoder": f"PyAV {av.__version__}",
            "frames": f"windows of {WINDOW}, every {self.every}, stride {self.stride}",
            "seen": list(CONTEXTS),
            "scaling": "squashed to a square, bilinear, antialiased",
        }
