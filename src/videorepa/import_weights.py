"""Brings published VideoREPA weights into files that plain diffusers loads."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from videorepa.align.projector import PROJECTOR_FILE, Projector
from videorepa.errors import UserError, as_user_error
from videorepa.exchange import zero_checkpoint as zero
from videorepa.exchange.lora import LORA_FILE, Adapter
from videorepa.settings import plugins
from videorepa.system.configuration import read_configuration
from videorepa.system.files import atomic_folder, check_is_file, to_metadata
from videorepa.system.hub import local_copy, quieten_libraries
from videorepa.system.weights import Misfit, shapes

PUBLISHED_ALPHA = 64

PUBLISHED_BASE = "zai-org/CogVideoX-2b"

_CLASSES = ("CogVideoXTransformer3DModelAlign", "CogVideoXTransformer3DModel")

_ALIGNMENT_SETTINGS = ("align_layer", "align_dims", "projector_dim")

_LORA_KEY = re.compile(r"transformer\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Imported:
    """What `import_weights` wrote.

    Attributes:
        product: A transformer's folder, or a LoRA file.
        projector: File of the alignment's own weights under the names of `videorepa.Projector`;
            None for a LoRA.
    """

    product: Path
    projector: Path | None = None


def import_weights(
    source: str | Path, out: Path, *, alpha: float | None = None, base: str | None = None
) -> Imported:
    """Write published weights into `out`, a folder that must not exist yet.

    A transformer becomes `out/transformer`, of the stock class, and `out/projector.safetensors`. A
    LoRA becomes `out/pytorch_lora_weights.safetensors`, with its strength, alpha / rank, multiplied
    into the weights.

    Args:
        source: A path or a Hub id of one of
            - a transformer's folder with the alignment's weights inside (VideoREPA-2B), or the
              folder of its pipeline;
            - a LoRA file that does not state its alpha (VideoREPA-5B), or its folder;
            - a DeepSpeed ZeRO stage 2 checkpoint of the published trainer.
        out: The folder to write.
        alpha: Alpha of the LoRA; VideoREPA-5B was trained with 64.
        base: The diffusers pipeline that a DeepSpeed checkpoint was trained from, whose
            configuration its weights need; by default CogVideoX-2B.

    Raises:
        UserError: The source is something else or incomplete. Nothing is written then.
    """
    path = local_copy(str(source))
    if out.exists():
        raise UserError(f"{out} exists already. Choose another folder, or delete it.")
    lora = path if path.is_file() else path / LORA_FILE
    is_lora, is_zero = lora.is_file(), path.is_dir() and zero.holds_partitions(path)
    if alpha is not None and not is_lora:
        raise UserError(f"{path} is not a LoRA, so it has no alpha. Leave out --alpha.")
    if base is not None and not is_zero:
        raise UserError(f"{path} is not a DeepSpeed checkpoint. Leave out --base.")
    if is_lora:
        adapter = _read_lora(lora, alpha)
        with atomic_folder(out) as staged:
            adapter.save_for_diffusers(staged / LORA_FILE)
        return Imported(out / LORA_FILE)
    advice = "Copy or download all its files again."
    if is_zero:
        advice = "Name the pipeline that it was trained from with --base."
        config = plugins.description("backbones", "cogvideox")(weights=base or PUBLISHED_BASE)
        config, weights = config.config("transformer"), zero.merge(path)
    else:
        config, weights = _read_transformer(path)
    projector, rest = _split(weights, path)
    transformer = _stock_transformer(config, rest, path, advice)
    about = {"from": path.name, "block": config.get("align_layer")}
    with atomic_folder(out) as staged:
        transformer.save_pretrained(staged / "transformer")
        save_file(projector, staged / PROJECTOR_FILE, to_metadata(about))
    return Imported(out / "transformer", out / PROJECTOR_FILE)


def _read_lora(path: Path, alpha: float | None) -> Adapter:
    weights, header = _read_safetensors(path)
    if "lora_adapter_metadata" in header:
        raise UserError(
            f"{path} has rank and alpha in its header, so `load_lora_weights` of diffusers applies "
            "it at the right strength already, and there is nothing to import."
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        match = _LORA_KEY.fullmatch(key)
        if match is None:
            raise UserError(
                f"{path} is not a LoRA as the published trainer writes it: it holds {key}; expected"
                " transformer.LAYER.lora_A.weight and transformer.LAYER.lora_B.weight alone. If it "
                "is a transformer, give its folder, with the config.json."
            )
        pairs.setdefault(match[1], {})[match[2]] = value
    if not pairs:
        raise UserError(f"{path} holds no weights.")
    if halves := sorted(layer for layer, pair in pairs.items() if len(pair) < 2):
        raise UserError(
            f"{path} holds half of a pair for {len(halves)} layers, such as {halves[0]}; each layer"
            " needs lora_A and lora_B."
        )
    if flat := sorted(key for key, value in weights.items() if value.dim() < 2):
        raise UserError(
            f"{path} holds {flat[0]} of shape {tuple(weights[flat[0]].shape)}; expected matrices."
        )
    layers = {layer: (pair["A"], pair["B"]) for layer, pair in pairs.items()}
    ranks = {size for down, up in layers.values() for size in (down.shape[0], up.shape[1])}
    if len(ranks) > 1:
        raise UserError(
            f"{path} mixes ranks ({', '.join(map(str, sorted(ranks)))}), so one alpha does not "
            "determine its strength; expected one rank."
        )
    if alpha is None:
        raise UserError(
            f"{path} does not state its alpha, without which its strength, alpha / rank, is "
            f"unknown (the rank is {ranks.pop()}). Give it with --alpha; the published "
            f"VideoREPA-5B LoRA, of rank 128, was trained with --alpha {PUBLISHED_ALPHA}."
        )
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"--alpha is {alpha}; expected a number above 0.")
    return Adapter.scaled(layers, alpha / ranks.pop())


def _read_transformer(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a transformer's configuration and weights from its folder or that of its pipeline."""
    if not (folder / "config.json").is_file() and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    path = folder / "config.json"
    try:
        config = read_configuration(path)
    except FileNotFoundError:
        raise UserError(
            f"{folder} cannot be imported: it has no config.json (a transformer), no "
            f"{LORA_FILE} (a LoRA) and no zero_to_fp32.py (a DeepSpeed checkpoint)."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a model's configuration: {error}") from None
    kind = config.get("_class_name")
    if kind not in _CLASSES:
        raise UserError(f"{folder} holds a {kind}; published VideoREPA models are {_CLASSES[0]}.")
    weights: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors, _ = _read_safetensors(shard)
        if both := tensors.keys() & weights.keys():
            raise UserError(
                f"{folder} holds {min(both)} in {shard.name} and in another file: it has several "
                "copies of the model. Keep the files of one."
            )
        weights |= tensors
    if not weights:
        others = sorted(path.name for path in folder.iterdir() if path.name != "config.json")
        raise UserError(
            f"{folder} holds no *.safetensors, but {', '.join(others[:5]) or 'nothing'}. Files of "
            "other kinds are pickles and are not read."
        )
    return config, weights


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file's tensors and the entries of its header."""
    try:
        check_is_file(path)
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}). It is cut short or damaged, or a "
            "pickle, which is not read. Copy or download it again."
        ) from None


def _split(weights: dict[str, Tensor], source: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Separate the projector's weights, under its own names, from the transformer's."""
    names = {"projectors.0.": "mlp.", "downsampler_cogvideo_output.": "conv."}
    projector, rest = {}, {}
    for key, value in weights.items():
        prefix = next((prefix for prefix in names if key.startswith(prefix)), None)
        if prefix is None:
            rest[key] = value
        else:
            projector[names[prefix] + key.removeprefix(prefix)] = value.contiguous()
    if not projector:
        raise UserError(
            f"{source} holds no weights of an alignment, so it is a stock transformer already. "
            "diffusers loads it as it is, and there is nothing to import."
        )
    # Only the names count: the sizes are the published trainer's own.
    misfit = replace(
        Misfit.between(projector, shapes(Projector(1, 1, 1).state_dict())), misshapen=[]
    )
    _check_whole(source, "projector", misfit, "Was it made by the published trainer?")
    return projector, rest


def _stock_transformer(
    config: dict[str, Any], weights: dict[str, Tensor], source: Path, advice: str
) -> Any:
    """Make the stock class with exactly these weights, in their own dtype."""
    from diffusers import CogVideoXTransformer3DModel

    quieten_libraries()
    config = {key: value for key, value in config.items() if key not in _ALIGNMENT_SETTINGS}

    def described(error: Exception) -> str:
        return (
            f"The configuration of {source} makes no transformer: {type(error).__name__}: {error}"
        )

    with as_user_error(described), torch.device("meta"):
        model: Any = CogVideoXTransformer3DModel.from_config(config)
    misfit = Misfit.between(weights, shapes(model.state_dict()))
    _check_whole(source, "transformer", misfit, advice)
    model.load_state_dict(weights, assign=True)
    return model


def _check_whole(source: Path, what: str, misfit: Misfit, advice: str) -> None:
    if misfit:
        raise UserError(
            f"The weights of the {what} in {source} are incomplete or of another model; {misfit}. "
            f"{advice}"
        )
