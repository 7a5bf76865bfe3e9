"""Teachers that are vision transformers: their sizes, files, and names of weights."""

from __future__ import annotations

import re
import zipfile
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from videorepa.encoders import Encoder, EncoderSpec, Sizes
from videorepa.errors import UserError
from videorepa.system.configuration import read_configuration
from videorepa.system.fingerprint import json_digest, weights_digest
from videorepa.system.hub import local_copy, micro_weights, plain_weights, stock_loading
from videorepa.system.weights import Misfit
from videorepa.tokens import TokenGrid

# Weights of original files that the features do not need; see each teacher about final norms.
_IGNORED = re.compile(r"(head|norm|fc_norm|decoder|encoder_to_decoder|mask_token)(\.|$)")

# Original files do not store the number of heads. Published models have 64 channels a head, except
# those of these widths.
_HEADS = {1280: 16, 1408: 16}


class ViT(Encoder):
    """A live vision transformer: a stock model, frozen, in evaluation mode.

    Attributes:
      model: The stock model.
      size: Steps, rows and columns of the tokens of one piece of a clip.
    """

    def __init__(self, spec: ViTSpec, model: Any) -> None:
        sizes = spec.sizes()
        super().__init__(spec, sizes.tubelet)
        self.model: Any = model.eval().requires_grad_(False)
        self.size = sizes.grid(*spec.piece)


class ViTSpec(EncoderSpec):
    """A teacher whose tokens are patches. A family declares what it loads in class variables.

    Attributes:
      live: The class of the live encoder.
      family: The family's name, for messages.
      accepts: The weights that the family loads, in words, for messages.
      model_types: Values of model_type in the config.json of its transformers folders.
      published: Sizes by Hub id or file name, for weights that are not on this machine.
      wrappers: Keys under which original files may hold the table of weights.
      prefix: Pattern to strip from the names in original files; other names are not the
        encoder's. None where original files are not loaded.
      patches: Name of the patch embedding in original files.
      ignored: Pattern of further names in original files that are not used.
      kernel: Dimensions of the patch embedding's kernel: 3 for video, 2 for images.
    """

    live: ClassVar[type[ViT]]
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
        return str(micro_weights(self.name)) if self.weights == "micro" else self.weights

    def sizes(self) -> Sizes:
        """The model's sizes, from its file or config.json, else by its published name.

        Raises:
          UserError: The file or folder is another model's.
        """
        path = Path(self.source)
        if not path.exists():
            for name in (self.source, path.name):
                if name in self.published:
                    return self.published[name]
            path = local_copy(self.source)
        if path.is_file():
            return self.original_sizes(self.original(path))
        config = self.config(path)
        try:
            values = config["hidden_size"], config["patch_size"], config.get("tubelet_size", 1)
            return Sizes(*map(int, values))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"The config.json in {path} does not say the model's sizes "
                f"({type(error).__name__}: {error}). Compare it with the one it was copied from."
            ) from None

    def shape(self, clip_frames: int) -> TokenGrid:
        return self.patch_grid(self.sizes(), clip_frames)

    def fingerprint(self) -> dict[str, str]:
        # Options added later count only where they are used, so that features stored before stay
        # valid. The version decides a margin, not features.
        unused = {key for key in ("group", "crop") if getattr(self, key) is None}
        values = self.model_dump(exclude={"weights", "version"} | unused)
        weights = weights_digest(local_copy(self.source))
        return {"encoder": json_digest(values), "weights": weights}

    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoder:
        self.shape(self.frames)  # Raises for what cannot work, before weights are read.
        return self.live(self, self.stock_model(local_copy(self.source), dtype)).to(device)

    @abstractmethod
    def stock_model(self, path: Path, dtype: torch.dtype) -> Any:
        """Load the stock model from a file or folder on this machine.

        Raises:
          UserError: The weights do not fit.
        """

    def config(self, folder: Path) -> dict[str, Any]:
        """The config.json of a transformers folder.

        Raises:
          UserError: The file cannot be read, or it is another model's.
        """
        try:
            config = read_configuration(folder / "config.json")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder} holds no readable config.json: {error}. The encoder {self.name} loads "
                f"{self.accepts}."
            ) from None
        model_type = config.get("model_type")
        if model_type not in self.model_types:
            raise UserError(
                f"{folder} holds a {model_type!r} model; the encoder {self.name} loads "
                f"{self.accepts}."
            )
        return config

    def original(self, path: Path) -> dict[str, Tensor]:
        """The encoder's tensors in an original file, by their names without the prefix.

        No code in a pickle is run, and tensors are read only when they are used.

        Raises:
          UserError: The file is not a checkpoint of this family.
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
        weights = {match.string[match.end() :]: value for match, value in prefixed if match}
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
        """The sizes of a model from the weights that `original` returned."""
        width, _, *tubelet, patch, _ = weights[f"{self.patches}.weight"].shape
        return Sizes(width, patch, *tubelet)


def layers_of(weights: dict[str, Tensor]) -> int:
    """The number of blocks in an original file."""
    return len({match[1] for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))})


def heads_of(width: int) -> int:
    """The number of attention heads of the published models of a width."""
    # Widths that are no multiple of 64 occur in small test files; four heads is a guess.
    return _HEADS.get(width) or (width // 64 if width % 64 == 0 else 4)


def renamed(weights: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """An original file's weights under a stock class's names.

    Joint projections `*.qkv.*` are first split into `*.q.*`, `*.k.*` and `*.v.*`.

    Args:
      weights: The original weights by name.
      names: Replacements by the pattern that they replace at the start of a name, in order.
    """
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
    """Load a stock transformers model, and check that the file or folder had all its weights.

    transformers would initialise missing ones at random.

    Args:
      stock_class: The model's class.
      spec: The teacher, for messages.
      path: The folder to load, or the original file that `weights` are from.
      config: The model's configuration.
      dtype: The dtype to load in.
      weights: An original file's weights under the stock class's names.
      unused: The prefix of the names of weights that do not matter.

    Raises:
      UserError: Weights are missing or have another shape, or an original file has extra ones.
        Folders may hold a head or a decoder as well.
    """
    advice = "Compare the folder or file with the one it was copied from."
    with stock_loading(f"The teacher {path}", advice):
        model, info = stock_class.from_pretrained(
            path if weights is None else None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    misfit = Misfit.reported(info, unused)
    if misfit.missing or misfit.misshapen or (weights is not None and misfit.extra):
        raise UserError(
            f"{path} does not fit {spec.family}; {misfit}. The encoder {spec.name} loads "
            f"{spec.accepts}."
        )
    return model
