"""VideoMAE and VideoMAEv2, on the stock transformers class: Hub folders and the original files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from videorepa.data.fingerprint import json_digest, weights_digest
from videorepa.encoders import Encoder, EncoderSpec
from videorepa.errors import UserError
from videorepa.hub import local_copy, quieten_libraries
from videorepa.tokens import TokenGrid

# Sizes that inspect needs when the file itself is not on this machine.
PUBLISHED = {
    "vit_b_k710_dl_from_giant.pth": {"hidden_size": 768, "patch_size": 16, "tubelet_size": 2},
    "MCG-NJU/videomae-base": {"hidden_size": 768, "patch_size": 16, "tubelet_size": 2},
}
# Original files do not say how many heads there are; these are the published widths.
HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
TRAINED_GRID = (8, 14, 14)
"""The grid of the original files' position table: 16 frames of 224 x 224, tubelet 2, patch 16."""

_RENAMED = {
    r"patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"blocks\.(\d+)\.norm1\.": r"encoder.layer.\1.layernorm_before.",
    r"blocks\.(\d+)\.norm2\.": r"encoder.layer.\1.layernorm_after.",
    r"blocks\.(\d+)\.attn\.proj\.": r"encoder.layer.\1.attention.output.dense.",
    r"blocks\.(\d+)\.attn\.q_bias": r"encoder.layer.\1.attention.attention.query.bias",
    r"blocks\.(\d+)\.attn\.v_bias": r"encoder.layer.\1.attention.attention.value.bias",
    r"blocks\.(\d+)\.mlp\.fc1\.": r"encoder.layer.\1.intermediate.dense.",
    r"blocks\.(\d+)\.mlp\.fc2\.": r"encoder.layer.\1.output.dense.",
}
_IGNORED = re.compile(r"(head|norm|fc_norm|decoder|encoder_to_decoder|mask_token|pos_embed)(\.|$)")


class VideoMAE(EncoderSpec):
    """VideoMAE or VideoMAEv2, any size. heads: read from the weights where they say so."""

    name: Literal["videomae"] = "videomae"
    heads: int | None = None

    @property
    def source(self) -> str:
        """The file, folder or Hub id."""
        if self.weights == "micro":
            from videorepa.lab import micro_weights

            return str(micro_weights("videomae"))
        return self.weights

    def shape(self, clip_frames: int) -> TokenGrid:
        config = self._sizes()
        tubelet, patch = config["tubelet_size"], config["patch_size"]
        if self.frames % tubelet or self.height % patch or self.width % patch:
            raise UserError(
                f"{self.weights} takes frames in multiples of {tubelet} and sizes in multiples of "
                f"{patch}; the recipe asks for {self.frames}x{self.height}x{self.width}."
            )
        tokens = torch.empty(
            1,
            self.frames // tubelet,
            self.height // patch,
            self.width // patch,
            config["hidden_size"],
            device="meta",
        )
        return TokenGrid(tokens, self.first_frame(clip_frames), tubelet)

    def _sizes(self) -> dict[str, Any]:
        path = Path(self.source)
        if path.is_dir():
            return _folder_config(path)
        if path.is_file():
            return _sizes_of(_original_weights(path))
        for known in (self.source, path.name):
            if known in PUBLISHED:
                return PUBLISHED[known]
        return _folder_config(local_copy(self.source))

    def fingerprint(self) -> dict[str, str]:
        values = self.model_dump(exclude={"weights"})
        weights = weights_digest(local_copy(self.source))
        return {"encoder": json_digest(values), "weights": weights}

    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> VideoMAEEncoder:
        from transformers import VideoMAEConfig, VideoMAEModel

        quieten_libraries()
        path = local_copy(self.source)
        weights: dict[str, Tensor] | None = None
        if path.is_file():
            original = _original_weights(path)
            sizes = _sizes_of(original)
            width = sizes["hidden_size"]
            # Small files for tests have widths of their own; four heads is the doubtful default.
            heads = self.heads or HEADS.get(width) or (width // 64 if width % 64 == 0 else 4)
            config: Any = VideoMAEConfig(
                **sizes,
                num_attention_heads=heads,
                layer_norm_eps=1e-6,
                use_mean_pooling=True,
            )
            trained = TRAINED_GRID
            weights = _renamed(original)
        else:
            _folder_config(path)
            config = VideoMAEConfig.from_pretrained(path)
            side = config.image_size // config.patch_size
            trained = (config.num_frames // config.tubelet_size, side, side)
        grid = self.shape(self.frames)
        config.image_size = [self.height, self.width]
        config.num_frames = self.frames
        # Features are the residual stream after the last block: no final norm.
        config.use_mean_pooling = True
        if weights is None:
            model: Any = _from_folder(path, config)
        else:
            if config.hidden_size % config.num_attention_heads:
                raise UserError(
                    f"encoder.heads is {config.num_attention_heads}, which does not divide the "
                    f"width {config.hidden_size} of {path}. Set it to what the model was made with."
                )
            model = VideoMAEModel(config)
            _load_strictly(model, weights, path)
        model.embeddings.position_embeddings = _positions(config.hidden_size, trained, grid.size)
        return VideoMAEEncoder(self, model.to(device, dtype), grid)


class VideoMAEEncoder(Encoder):
    """The live VideoMAE."""

    def __init__(self, spec: VideoMAE, model: Any, grid: TokenGrid) -> None:
        super().__init__(spec, grid.stride)
        self.model = model.eval().requires_grad_(False)
        self.grid_size = grid.size

    def features(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b t h w d"]:
        tokens = self.model(video).last_hidden_state
        return tokens.unflatten(1, self.grid_size)


def _positions(
    width: int, trained: tuple[int, int, int], size: tuple[int, int, int]
) -> Float[Tensor, "1 n d"]:
    """The fixed sinusoid table of the trained grid, resized: bicubic in space, linear in time."""
    from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

    t, h, w = trained
    table = get_sinusoid_encoding_table(t * h * w, width).reshape(t, h, w, width)
    frames = table.permute(0, 3, 1, 2)
    if (h, w) != size[1:]:
        frames = F.interpolate(frames, size[1:], mode="bicubic", align_corners=False)
    volume = frames.permute(1, 0, 2, 3)[None]
    if t != size[0]:
        volume = F.interpolate(volume, size, mode="trilinear", align_corners=False)
    return volume[0].permute(1, 2, 3, 0).reshape(1, -1, width)


def _original_weights(path: Path) -> dict[str, Tensor]:
    """The encoder's tensors of an original file, without wrapping and prefixes."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as plain weights ({type(error).__name__}). It is damaged, or a "
            "pickle that would run code, which is never loaded."
        ) from None
    for wrapper in ("module", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} holds no table of weights; expected a VideoMAE checkpoint.")
    stripped = {
        re.sub(r"^(module\.)?(encoder\.)?", "", str(key)): value for key, value in content.items()
    }
    kept = {key: value for key, value in stripped.items() if not _IGNORED.match(key)}
    patches = kept.get("patch_embed.proj.weight")
    if patches is None or patches.dim() != 5:
        what = "no" if patches is None else f"a {patches.dim()}-dimensional"
        raise UserError(
            f"{path} has {what} patch_embed.proj.weight, so it is not a VideoMAE checkpoint, where "
            f"that has 5 dimensions. It begins with: {', '.join(map(str, list(content)[:5]))}."
        )
    return kept


def _sizes_of(weights: dict[str, Tensor]) -> dict[str, Any]:
    width, _, tubelet, patch, _ = weights["patch_embed.proj.weight"].shape
    layers = {int(m[1]) for key in weights if (m := re.match(r"blocks\.(\d+)\.", key))}
    inner = weights.get("blocks.0.mlp.fc1.weight")
    return {
        "hidden_size": width,
        "tubelet_size": tubelet,
        "patch_size": patch,
        "num_hidden_layers": len(layers),
        "intermediate_size": 4 * width if inner is None else inner.shape[0],
    }


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in weights.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.weight", key):
            prefix = f"encoder.layer.{match[1]}.attention.attention."
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{prefix}{part}.weight"] = rows
            continue
        for pattern, name in _RENAMED.items():
            key = re.sub("^" + pattern, name, key)
        renamed[key] = value
    return renamed


def _from_folder(path: Path, config: Any) -> Any:
    """The model of a transformers folder, with every weight found there: left to itself,
    transformers makes up those that are missing."""
    from transformers import VideoMAEModel

    try:
        loaded: Any = VideoMAEModel.from_pretrained(
            path, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:
        raise UserError(
            f"The teacher {path} could not be loaded: {type(error).__name__}: {str(error)[:500]}. "
            "Compare the folder with the one it was copied from."
        ) from None
    model, found = loaded
    misshapen = [
        f"{key} {tuple(there)}, expected {tuple(here)}"
        for key, there, here in found["mismatched_keys"]
    ]
    _check_fit(path, found["missing_keys"], found["unexpected_keys"], misshapen)
    return model


def _load_strictly(model: Any, weights: dict[str, Tensor], path: Path) -> None:
    expected = model.state_dict()
    misshapen = [
        f"{key} {tuple(weights[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected.keys() & weights.keys()
        if expected[key].shape != weights[key].shape
    ]
    extra = weights.keys() - expected.keys()
    _check_fit(path, expected.keys() - weights.keys(), extra, misshapen, strict=True)
    model.load_state_dict({key: value.float() for key, value in weights.items()})


def _check_fit(
    path: Path,
    missing: Iterable[str],
    extra: Iterable[str],
    misshapen: Iterable[str],
    strict: bool = False,
) -> None:
    """Raises UserError that names the weights that do not fit. Extra ones are a fault by
    themselves only if strict: folders may hold a head or a decoder as well."""
    faults = {"missing": missing, "extra": extra, "misshapen": misshapen}
    named = {what: sorted(names) for what, names in faults.items()}
    if named["missing"] or named["misshapen"] or (strict and named["extra"]):
        said = [f"{what}: {', '.join(names[:8])}" for what, names in named.items() if names]
        raise UserError(
            f"{path} does not fit VideoMAE; {'; '.join(said)}. Give a checkpoint of VideoMAE or "
            "VideoMAEv2."
        )


def _folder_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no readable config.json: {error}") from None
    if config.get("model_type") != "videomae":
        raise UserError(
            f"{folder} holds a {config.get('model_type')!r} model; the encoder videomae loads "
            "model_type 'videomae'."
        )
    return config
