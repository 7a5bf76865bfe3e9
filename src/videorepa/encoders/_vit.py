"""What teachers that are vision transformers share: sizes, files, and names of weights."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from videorepa.encoders import Encoder, EncoderSpec
from videorepa.errors import UserError
from videorepa.system.fingerprint import json_digest, weights_digest
from videorepa.system.hub import local_copy, plain_weights, quieten_libraries
from videorepa.system.weights import Misfit
from videorepa.tokens import TokenGrid

# What original files hold besides the encoder. Final norms are among it: see each teacher.
_IGNORED = re.compile(r"(head|norm|fc_norm|decoder|encoder_to_decoder|mask_token)(\.|$)")

# Original files do not say how many heads there are. The published models have 64 channels a head,
# these two excepted.
_HEADS = {1280: 16, 1408: 16}


class Sizes(NamedTuple):
    """What a model's grid follows from: the width of a token, and the pixels along a side of its
    patch and the frames that it covers."""

    width: int
    patch: int
    tubelet: int = 1

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Steps in time, rows, columns."""
        return frames // self.tubelet, height // self.patch, width // self.patch


class ViTSpec(EncoderSpec):
    """A teacher whose tokens are patches. A family says what it loads in the class variables:

    family: its name, in messages. accepts: in words, what its weights may be.
    model_types: what the config.json of its transformers folders may say.
    published: sizes by Hub id or file name, for a look before the weights are on this machine.
    wrappers: keys under which original files may hold the table of weights.
    prefix: pattern that is cut off the names in original files; names without it are not the
        encoder's. None where original files are not loaded.
    patches: name of the patch embedding in original files.
    kernel: dimensions of its kernel, 3 for video and 2 for images.
    ignored: pattern of the other names that are not used.
    """

    family: ClassVar[str]
    accepts: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[Mapping[str, Sizes]] = {}
    wrappers: ClassVar[tuple[str, ...]] = ()
    prefix: ClassVar[str | None] = None
    patches: ClassVar[str] = "patch_embed.proj"
    ignored: ClassVar[re.Pattern[str]] = _IGNORED
    kernel: ClassVar[int]

    @property
    def source(self) -> str:
        """The file, folder or Hub id."""
        if self.weights == "micro":
            from videorepa.system.hub import micro_weights

            return str(micro_weights(self.name))
        return self.weights

    def sizes(self) -> Sizes:
        """From a file's header, a folder's config.json, or else by the published name.

        Raises UserError for files and folders of another model.
        """
        path = Path(self.source)
        if not path.exists():
            for known in (self.source, path.name):
                if known in self.published:
                    return self.published[known]
            path = local_copy(self.source)
        if path.is_file():
            return self.original_sizes(self.original(path))
        config = self.config(path)
        try:
            keys = config["hidden_size"], config["patch_size"], config.get("tubelet_size", 1)
            return Sizes(*map(int, keys))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"The config.json in {path} does not say the model's sizes "
                f"({type(error).__name__}: {error}). Compare it with the one it was copied from."
            ) from None

    def shape(self, clip_frames: int) -> TokenGrid:
        sizes = self.sizes()
        frames, height, width = self.piece
        if frames % sizes.tubelet or height % sizes.patch or width % sizes.patch:
            raise UserError(
                f"{self.weights} takes frames in multiples of {sizes.tubelet} and sizes in "
                f"multiples of {sizes.patch}; the recipe asks for {frames}x{height}x{width}."
            )
        size = sizes.grid(self.frames, self.height, self.width)
        tokens = torch.empty(1, *size, sizes.width, device="meta")
        return TokenGrid(tokens, self.first_frame(clip_frames), sizes.tubelet)

    def fingerprint(self) -> dict[str, str]:
        # Ways to feed a teacher count only where they are used: so features that were stored
        # before there was such a way stay valid. A version tells margins apart, not features.
        unused = {key for key in ("group", "crop") if getattr(self, key) is None}
        values = self.model_dump(exclude={"weights", "version"} | unused)
        weights = weights_digest(local_copy(self.source))
        return {"encoder": json_digest(values), "weights": weights}

    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoder:
        quieten_libraries()
        self.shape(self.frames)  # Refuses what cannot work, before weights are read.
        return self.live(local_copy(self.source), dtype).to(device)

    def live(self, path: Path, dtype: torch.dtype) -> ViT:
        """The live encoder from a file or folder on this machine."""
        raise NotImplementedError

    def config(self, folder: Path) -> dict[str, Any]:
        """A transformers folder's config.json. Raises UserError for another model's."""
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            found = config.get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{folder} holds no readable config.json: {error}. The encoder {self.name} loads "
                f"{self.accepts}."
            ) from None
        if found not in self.model_types:
            raise UserError(
                f"{folder} holds a {found!r} model; the encoder {self.name} loads {self.accepts}."
            )
        return config

    def original(self, path: Path) -> dict[str, Tensor]:
        """The encoder's tensors of an original file, without wrapping and prefixes.

        Nothing is run that a pickle may hold, and tensors are not read before they are used.
        """
        if self.prefix is None:
            raise UserError(f"{path} is a file; the encoder {self.name} loads {self.accepts}.")
        with plain_weights(path):
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        for wrapper in self.wrappers:
            if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
                content = content[wrapper]
        if not isinstance(content, dict) or not all(
            isinstance(value, Tensor) for value in content.values()
        ):
            raise UserError(
                f"{path} holds no table of weights; expected a {self.family} checkpoint: "
                f"{self.accepts}."
            )
        prefixed = ((re.match(self.prefix, str(key)), value) for key, value in content.items())
        weights = {found.string[found.end() :]: value for found, value in prefixed if found}
        patches = weights.get(f"{self.patches}.weight")
        if patches is None or patches.dim() != 2 + self.kernel:
            what = "no" if patches is None else f"a {patches.dim()}-dimensional"
            raise UserError(
                f"{path} has {what} {self.patches}.weight, so it is not a {self.family} "
                f"checkpoint, where that has {2 + self.kernel} dimensions. It begins with: "
                f"{', '.join(map(str, list(content)[:5]))}."
            )
        return {key: value for key, value in weights.items() if not self.ignored.match(key)}

    def original_sizes(self, weights: dict[str, Tensor]) -> Sizes:
        """Sizes of the model that `original` gave."""
        width, _, *tubelet, patch, _ = weights[f"{self.patches}.weight"].shape
        return Sizes(width, patch, *tubelet)


class ViT(Encoder):
    """A live one: a stock model, frozen. size: its grid for one piece of a clip."""

    def __init__(self, spec: ViTSpec, model: Any) -> None:
        sizes = spec.sizes()
        super().__init__(spec, sizes.tubelet)
        self.model: Any = model.eval().requires_grad_(False)
        self.size = sizes.grid(*spec.piece)


def layers_of(weights: dict[str, Tensor]) -> int:
    """How many blocks an original file holds."""
    return len({found[1] for key in weights if (found := re.match(r"blocks\.(\d+)\.", key))})


def heads_of(width: int) -> int:
    """How many attention heads the published models of a width have."""
    # Small files for tests have widths of their own; four heads is the doubtful default.
    return _HEADS.get(width) or (width // 64 if width % 64 == 0 else 4)


def renamed(weights: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights under a stock class's names, joint queries, keys and values taken apart first: the
    three are called q, k and v then. names: patterns at the start of a name, and replacements."""
    apart = {}
    for key, value in weights.items():
        block, joint, rest = key.partition(".qkv.")
        if joint and value.dim():
            for part, rows in zip("qkv", value.tensor_split(3), strict=True):
                apart[f"{block}.{part}.{rest}"] = rows
        else:
            apart[key] = value
    result = {}
    for key, value in apart.items():
        for pattern, name in names.items():
            key = re.sub("^" + pattern, name, key)
        result[key] = value
    return result


def load_stock(
    stock_class: Any,
    spec: ViTSpec,
    path: Path,
    config: Any,
    dtype: torch.dtype,
    weights: dict[str, Tensor] | None = None,
    unused: str = "",
) -> nn.Module:
    """Load a stock transformers model, and check that all of its weights were there.

    Left to itself, transformers makes up those that are missing.

    Args:
      stock_class: The model's class.
      spec: The teacher, for messages.
      path: The folder to load, or the original file that `weights` are from.
      config: The model's configuration.
      dtype: The dtype to load in.
      weights: An original file's weights under the stock class's names.
      unused: Beginning of the names of weights that do not matter.

    Raises:
      UserError: Weights are missing or have another shape, or an original file has extra ones.
        Folders may hold a head or a decoder as well.
    """
    try:
        model, info = stock_class.from_pretrained(
            path if weights is None else None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        raise UserError(
            f"The teacher {path} could not be loaded: {type(error).__name__}: {str(error)[:500]}. "
            "Compare the folder or file with the one it was copied from."
        ) from None
    misfit = Misfit.reported(info, unused)
    if misfit.missing or misfit.misshapen or (weights is not None and misfit.extra):
        raise UserError(
            f"{path} does not fit {spec.family}; {misfit}. The encoder {spec.name} loads "
            f"{spec.accepts}."
        )
    return model
