"""Five of VBench's dimensions (Huang et al. 2024, arXiv 2311.17982), those that stock classes give.

They are restated here. Beside them stands a measure of motion by another flow than VBench's, since
a still clip is best at three of the five.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import av
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from videorepa.artifacts.scores import Better, Row
from videorepa.benchmarks import Benchmark
from videorepa.benchmarks._vbench import clip_of, dimension_metric
from videorepa.data.flow import flow_method
from videorepa.data.manifest import Prompt
from videorepa.data.video import read_all
from videorepa.encoders import IMAGENET_MEAN, IMAGENET_STD
from videorepa.errors import ClipError, UserError, as_user_error
from videorepa.evaluation.pairs import Pairs, share
from videorepa.system.configuration import read_configuration
from videorepa.system.device import Precision, compute_dtype, pick_device
from videorepa.system.files import check_is_file, parse_json, read_bytes
from videorepa.system.fingerprint import file_sample_digest, json_digest, weights_digest
from videorepa.system.hub import local_copy, stock_loading
from videorepa.system.weights import Misfit

ALWAYS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "aesthetic_quality",
)
"""Dimensions that need no list of prompts."""

MEASURED = (*ALWAYS, "appearance_style")

MOTION = "dynamic_by_tvl1"
"""Our dynamic degree. VBench's own takes RAFT, so that the two are not comparable."""

SIDE = 224
"""What the models see: the short side, in pixels."""

FLOW_SIDE = 64
"""The short side of frames whose flow is computed, in pixels."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

BATCH = 32

Frames = UInt8[np.ndarray, "f h w 3"]


# The five dimensions, from features.


def consistency(features: Float[Tensor, "f d"]) -> float:
    """The mean over frames but the first of their likeness to the one before and to the first.

    A likeness is a cosine, or 0 if it is negative; the two are averaged.
    """
    unit = F.normalize(features.float(), dim=-1)
    to_last = (unit[1:] * unit[:-1]).sum(-1).clamp(min=0)
    to_first = (unit[1:] * unit[:1]).sum(-1).clamp(min=0)
    return float(((to_last + to_first) / 2).mean())


def flickering(frames: Frames) -> float:
    """255 less the mean distance of neighbouring frames, over 255. A still clip has 1."""
    pairs = zip(frames[:-1], frames[1:], strict=True)
    distances = [np.abs(a.astype(np.int16) - b).mean() for a, b in pairs]
    return float((255 - np.mean(distances)) / 255)


def is_dynamic(frames: Frames) -> bool:
    """Whether a clip moves, by VBench's rule for its dynamic degree and the flow of TV-L1.

    Of a clip's n frames, or about 40 of them, a pair of neighbours moves if the mean of the longest
    5 % of its flow exceeds 6 pixels at a short side of 256. round(n / 4) pairs have to.
    """
    flow = flow_method()
    taken = frames[:: max(1, len(frames) // 40)]
    grey = torch.from_numpy(taken.astype(np.float32)).mean(-1)[:, None] / 255
    small = F.interpolate(grey, _short_side(grey, FLOW_SIDE), mode="area")[:, 0].numpy()
    moving = 0
    for first, second in zip(small[:-1], small[1:], strict=True):
        lengths = np.sort(np.linalg.norm(flow(first, second), axis=0).ravel())
        moving += lengths[-max(1, len(lengths) // 20) :].mean() > 6 * FLOW_SIDE / 256
    return bool(moving >= round(len(taken) / 4))


# What the models see.


def for_dino(frames: Frames) -> Float[Tensor, "f 3 h w"]:
    """Short side 224, bilinear without antialias, whole."""
    video = _pixels(frames)
    video = F.interpolate(video, _short_side(video, SIDE), mode="bilinear", align_corners=False)
    return _normalised(video / 255, IMAGENET_MEAN, IMAGENET_STD)


def for_clip(frames: Frames) -> Float[Tensor, "f 3 s s"]:
    """Short side 224, bicubic without antialias, and the square in the middle."""
    video = _pixels(frames)
    video = F.interpolate(video, _short_side(video, SIDE), mode="bicubic", align_corners=False)
    return _middle(video)


def for_style(frames: Frames) -> Float[Tensor, "f 3 s s"]:
    """As `for_clip`, with antialias and in whole grey levels.

    For appearance style alone VBench makes images of frames, which Pillow resizes. Its request for
    no antialias has no effect on those.
    """
    height, width = _short_side(_pixels(frames[:1]), SIDE)
    images = (Image.fromarray(frame) for frame in frames)
    small = [
        np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) for image in images
    ]
    return _middle(_pixels(np.stack(small)))


def _middle(video: Float[Tensor, "f 3 h w"]) -> Float[Tensor, "f 3 s s"]:
    top, left = (round((size - SIDE) / 2) for size in video.shape[-2:])
    video = video[..., top : top + SIDE, left : left + SIDE]
    return _normalised(video / 255, CLIP_MEAN, CLIP_STD)


def _pixels(frames: Frames) -> Float[Tensor, "f 3 h w"]:
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()


def _short_side(video: Tensor, side: int) -> tuple[int, int]:
    height, width = video.shape[-2:]
    short = min(height, width)
    return int(side * height / short), int(side * width / short)


def _normalised(video: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    norm = video.new_tensor([mean, std]).view(2, 3, 1, 1)
    return (video - norm[0]) / norm[1]


# The models.


def dino_features(model: Any, video: Float[Tensor, "f 3 h w"]) -> Float[Tensor, "f d"]:
    """The class token of DINO, after the last norm.

    The position table is stretched as in the original code, by (patches + 0.1) / 14, which the
    stock class does a little otherwise.
    """
    embeddings = model.embeddings
    tokens = embeddings.patch_embeddings(video)
    grid = [size // model.config.patch_size for size in video.shape[-2:]]
    places = embeddings.position_embeddings
    side = round((places.shape[1] - 1) ** 0.5)
    if grid != [side, side]:
        table = places[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        factors = [(size + 0.1) / side for size in grid]
        table = F.interpolate(table.float(), scale_factor=factors, mode="bicubic").to(table.dtype)
        places = torch.cat([places[:, :1], table.flatten(2).transpose(1, 2)], 1)
    tokens = torch.cat([embeddings.cls_token.expand(len(tokens), -1, -1), tokens], 1) + places
    for layer in model.layers:
        tokens = layer(tokens, None)
    return model.layernorm(tokens)[:, 0]


def load(kind: Any, config_kind: Any, source: str, dtype: torch.dtype, **changes: float) -> Any:
    """Load a stock model. Raises UserError unless the folder has all of its weights."""
    folder = local_copy(source)
    expected = f"Expected a transformers folder of a {config_kind.model_type} model."
    with stock_loading(str(folder), expected):
        read_configuration(folder / "config.json")  # Raises for sizes without end.
        config = config_kind.from_pretrained(folder)
        for name, value in changes.items():
            setattr(config, name, value)
        model, info = kind.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True
        )
    misfit = Misfit.reported(info, unused="pooler.")
    if misfit.missing or misfit.misshapen:
        raise UserError(f"{folder} is no whole {config_kind.model_type} model; {misfit}.")
    return model.to(pick_device()).eval()


@dataclass(frozen=True)
class PromptEntry:
    """What VBench's list says of a prompt: its dimensions that are measured here, and its style."""

    dimensions: tuple[str, ...]
    style: str | None


class VBench(Benchmark):
    """VBench's stock dimensions and our dynamic degree.

    Attributes:
        prompt_list: VBench_full_info.json: each clip is scored in its prompt's dimensions. By
            default each is scored in all dimensions that need no list, as in VBench's custom mode.
        dino: DINO ViT-B/16, for subject consistency.
        clip_b: CLIP ViT-B/32, for background consistency and appearance style.
        clip_l: CLIP ViT-L/14, for aesthetic quality.
        aesthetic: sa_0_4_vit_l_14_linear.pth. Without it aesthetic quality is not measured.
        precision: What the models compute in.
    """

    name: Literal["vbench"] = "vbench"
    version: ClassVar[str] = "2"
    prompt_list: Path | None = None
    dino: str = "facebook/dino-vitb16"
    clip_b: str = "openai/clip-vit-base-patch32"
    clip_l: str = "openai/clip-vit-large-patch14"
    aesthetic: Path | None = None
    precision: Precision = "auto"

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        """The list's prompts that have a dimension measured here, in the list's order."""
        return [Prompt(text, text) for text, of in self._listed.items() if of.dimensions][:count]

    def missing(self, prompts: Collection[str]) -> list[Prompt]:
        return [p for p in self.prompts(len(self._listed), 0) if p.caption not in prompts]

    def clips(self, videos: Path) -> list[tuple[Path, dict[str, Any]]]:
        """Clips named as VBench names them, {prompt}-{k}.mp4, in a folder without sidecars."""
        paths = sorted(videos.glob("*.mp4"))
        if any(path.with_suffix(".json").exists() for path in paths):
            return []
        named = [(path, *clip_of(path.stem)) for path in paths]
        return [(path, {"prompt_id": text, "caption": text, "k": k}) for path, text, k in named]

    @classmethod
    def ranked_by(cls) -> dict[str, Better]:
        return dict.fromkeys(MEASURED, "higher")

    def about(self) -> dict[str, Any]:
        return {"judge": self._identity}

    def about_prompt(self, prompt: str) -> dict[str, Any]:
        """Its "dimensions" are those that the clip is scored in, and "style" the style's words."""
        of = self._of(prompt)
        about = {"dimensions": list(of.dimensions), "style": of.style}
        return super().about_prompt(prompt) | about

    def load(self) -> None:
        _ = self._dino, self._clip_b, self._tokenizer
        if self.aesthetic is not None:
            _ = self._clip_l, self._linear

    def read(self, video: Path) -> np.ndarray:
        frames, _ = read_all(video)
        if len(frames) < 2:
            raise ClipError(f"{video} has one frame; VBench compares frames")
        return frames

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        """Measure one clip.

        Returns:
            The value of each of its prompt's dimensions, and whether it moves (`MOTION`).
        """
        of = self._of(prompt)
        row: dict[str, Any] = {MOTION: is_dynamic(frames)}
        for dimension in of.dimensions:
            value = self._measured(dimension, frames, of.style)
            row[dimension] = value if np.isfinite(value) else None
        missing = [key for key in of.dimensions if row[key] is None]
        return row | {"invalid": dict.fromkeys(missing, "it is no finite number")}

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """Dimensions in percent, each over the clips that it is measured of, and the share of all
        clips that move. Five dimensions make no total."""
        metrics = {
            key: dimension_metric(of, key, key)
            for key in MEASURED
            if (of := [row for row in rows if key in row])
        }
        return metrics | {MOTION: share(rows, MOTION)}

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        """B minus A in points. p is that of flipping the signs of whole prompts."""
        paired = Pairs.of(rows_a, rows_b)
        result: dict[str, Any] = {}
        for key in MEASURED:
            both = [pair for pair in paired.pairs if all(row.get(key) is not None for row in pair)]
            if both:
                result[key] = Pairs(both, 0).tested(key, 100.0)
        return result | paired.compare([MOTION])

    def _measured(self, dimension: str, frames: Frames, style: str | None) -> float:
        if dimension == "temporal_flickering":
            return flickering(frames)
        if dimension == "subject_consistency":
            return consistency(
                self._seen(lambda video: dino_features(self._dino, video), for_dino(frames))
            )
        if dimension == "aesthetic_quality":
            seen = self._seen(self._clip_l.get_image_features, for_clip(frames))
            return float(self._linear(F.normalize(seen, dim=-1)).mean() / 10)
        if dimension == "background_consistency":
            return consistency(self._seen(self._clip_b.get_image_features, for_clip(frames)))
        seen = self._seen(self._clip_b.get_image_features, for_style(frames))
        words = self._tokenizer(style, return_tensors="pt", truncation=True, max_length=77)
        with torch.no_grad():
            text = self._clip_b.get_text_features(**words.to(self._clip_b.device)).pooler_output
        return float((F.normalize(seen, dim=-1) @ F.normalize(text.float(), dim=-1)[0]).mean())

    def _seen(
        self, model: Callable[[Tensor], Any], video: Float[Tensor, "f 3 h w"]
    ) -> Float[Tensor, "f d"]:
        """The features of frames, a batch at a time."""
        device, dtype = pick_device(), self._dtype
        with torch.no_grad():
            every = [model(part.to(device, dtype)) for part in video.split(BATCH)]
        return torch.cat([getattr(part, "pooler_output", part).float() for part in every])

    def _of(self, prompt: str) -> PromptEntry:
        if self.prompt_list is None:
            return PromptEntry(self._possible(ALWAYS), None)
        if prompt not in self._listed:
            raise UserError(
                f"The prompt {prompt[:80]!r} is none of {self.prompt_list}. Without prompt_list "
                "any clip is scored, as in VBench's custom mode."
            )
        return self._listed[prompt]

    def _possible(self, dimensions: Collection[str]) -> tuple[str, ...]:
        return tuple(
            key
            for key in MEASURED
            if key in dimensions and (key != "aesthetic_quality" or self.aesthetic is not None)
        )

    @cached_property
    def _listed(self) -> dict[str, PromptEntry]:
        """What the list says of each prompt. A prompt that comes twice has both entries'."""
        if self.prompt_list is None:
            return {}
        check_is_file(self.prompt_list)
        listed: dict[str, PromptEntry] = {}
        try:
            for entry in parse_json(read_bytes(self.prompt_list)):
                text, dimensions = entry["prompt_en"], set(entry["dimension"])
                style = (entry.get("auxiliary_info") or {}).get("appearance_style")
                if (earlier := listed.get(text)) is not None:
                    dimensions |= set(earlier.dimensions)
                    style = style or earlier.style
                if "appearance_style" in dimensions and not isinstance(style, str):
                    raise ValueError(f"{text[:60]!r} has no auxiliary_info.appearance_style")
                listed[text] = PromptEntry(self._possible(dimensions), style)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{self.prompt_list} is no VBench_full_info.json ({type(error).__name__}: {error})"
                ". Expected VBench's list of prompt_en, dimension and auxiliary_info."
            ) from None
        return listed

    @property
    def _dtype(self) -> torch.dtype:
        return compute_dtype(self.precision, pick_device())

    @cached_property
    def _dino(self) -> Any:
        from transformers import ViTConfig, ViTModel

        # The original's epsilon; folders may have the stock class's default.
        return load(ViTModel, ViTConfig, self.dino, self._dtype, layer_norm_eps=1e-6)

    @cached_property
    def _clip_b(self) -> Any:
        from transformers import CLIPConfig, CLIPModel

        return load(CLIPModel, CLIPConfig, self.clip_b, self._dtype)

    @cached_property
    def _clip_l(self) -> Any:
        from transformers import CLIPConfig, CLIPModel

        return load(CLIPModel, CLIPConfig, self.clip_l, self._dtype)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(local_copy(self.clip_b))

    @cached_property
    def _linear(self) -> torch.nn.Linear:
        """LAION's predictor, on CLIP's projected embedding at unit length."""
        assert self.aesthetic is not None
        check_is_file(self.aesthetic)
        width = self._clip_l.config.projection_dim
        linear = torch.nn.Linear(width, 1)
        with as_user_error(
            lambda error: (
                f"{self.aesthetic} is no sa_0_4_vit_l_14_linear.pth ({type(error).__name__}: "
                f"{str(error)[:200]}). Expected weight (1, {width}) and bias (1)."
            )
        ):
            weights = torch.load(self.aesthetic, map_location="cpu", weights_only=True)
            linear.load_state_dict(weights)
        return linear.to(pick_device()).requires_grad_(False)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        sources = {"dino": self.dino, "clip_b": self.clip_b}
        weights = {key: weights_digest(local_copy(of)) for key, of in sources.items()}
        if self.aesthetic is not None:
            weights["clip_l"] = weights_digest(local_copy(self.clip_l))
            weights["aesthetic"] = file_sample_digest(self.aesthetic)
        return {
            "weights": json_digest(weights),
            "dtype": str(self._dtype).removeprefix("torch."),
            "decoder": f"PyAV {av.__version__}",
            "flow": f"TV-L1, short side {FLOW_SIDE}",
            "prompts": "custom" if self.prompt_list is None else "list",
        }
