"""Compares a backbone with the stock pipeline: its arguments, blocks, prediction and latents."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from videorepa.align.taps import tap
from videorepa.backbones import Backbone, BackboneSpec, Text
from videorepa.diffusion import STEPS
from videorepa.recipe import Recipe
from videorepa.settings.sections import ClipSize
from videorepa.verifying.record import Verification, difference

HEIGHT, WIDTH = 128, 192
"""About the size of the clip that models are compared on, in pixels."""

ROUNDED = 5e-3
"""The relative difference that is allowed where a stock scheduler rounds its timesteps."""

INDIFFERENT = {
    *("return_dict", "attention_kwargs", "spatio_temporal_guidance_blocks", "perturbation_mask"),
    # The video of LTX-2 does not depend on sound here.
    *("audio_coords", "audio_hidden_states", "audio_num_frames"),
}
"""Arguments of transformers that do not change what they compute here."""


def clip_size(spec: BackboneSpec) -> ClipSize:
    """The size of a small clip of three tokens in time that is wider than high."""
    geometry, largest = spec.geometry(), spec.default_size()
    unit = geometry.pixels * geometry.patch
    rows = max(2, min(HEIGHT, largest.height) // unit)
    columns = max(2, min(WIDTH, largest.width) // unit)
    return ClipSize(frames=1 + 2 * geometry.stride, height=rows * unit, width=columns * unit)


def drawn_text(spec: BackboneSpec, dtype: torch.dtype) -> Text:
    """Text tensors of one caption, drawn from a fixed seed."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(1, *like.shape, generator=draw).to(dtype)
        if like.is_floating_point()
        else torch.ones(1, *like.shape, dtype=like.dtype)
        for name, like in spec.raw_text().items()
    }


@dataclass
class Watched:
    """The last of two steps of the stock pipeline without guidance, in its own layouts.

    Attributes:
      inputs: The transformer's arguments.
      blocks: The video tokens after each block, by the block's name, in the order of the blocks.
      final: The latents after the step, which ends without noise.
      decoded: The same as they are given to the autoencoder.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, Tensor] = field(default_factory=dict)
    final: Tensor = field(default_factory=lambda: torch.empty(0))
    decoded: Tensor = field(default_factory=lambda: torch.empty(0))


class _Listener:
    """Stands for the autoencoder in the stock pipeline, and keeps what it is given to decode."""

    def __init__(self, vae: Any, watched: Watched) -> None:
        self._vae, self._watched = vae, watched

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def decode(self, latents: Tensor, *arguments: Any, **options: Any) -> Any:
        self._watched.decoded = latents
        return self._vae.decode(latents, *arguments, **options)


@torch.no_grad()
def watch(
    recipe: Recipe, size: ClipSize, text: Text, device: torch.device, dtype: torch.dtype
) -> Watched:
    """Let the stock pipeline, loaded as its users load it, sample a clip from a fixed seed."""
    import diffusers

    spec = recipe.backbone
    ours = spec.load((), device, dtype)
    with ours.loading():
        parts: dict[str, Any] = dict.fromkeys(ours.text_parts)
        for part, stock_class, own in (
            ("transformer", spec.transformer_class, spec.part),
            ("vae", spec.vae_class, "vae"),
        ):
            loader = getattr(diffusers, stock_class)
            precision = ours.vae_dtype if part == "vae" else dtype
            parts[part] = loader.from_pretrained(
                spec.folder(), subfolder=own, torch_dtype=precision
            ).to(device)
        own = ours.components()
        parts |= {name: own[name] for name in ("safety_checker", "connectors") if name in own}
        if "boundary_ratio" in spec.options:
            # With two experts the pipeline would change between them.
            parts |= {"transformer_2": None, "boundary_ratio": None}
        pipeline: Any = getattr(diffusers, spec.stock_pipeline).from_pretrained(
            spec.folder(), **parts
        )
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "guider"):
        pipeline.guider = pipeline.guider.new(guidance_scale=1.0)
    settings = recipe.generation.changed(
        steps=2,
        guidance_scale=getattr(spec, "guidance", 1.0),
        dynamic_guidance=False,
        negative_prompt="",
    )
    arguments = ours.sampling(size, settings) | ours.unguided()
    arguments |= {name: value.to(device) for name, value in ours.prompt(text).items()}
    if "decode_noise_scale" in arguments:
        arguments["decode_noise_scale"] = 0.0
    watched = Watched()

    def begin(transformer: nn.Module, _: Any, inputs: dict[str, Any]) -> None:
        # Some pipelines write into their latents.
        watched.inputs = {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in inputs.items()
            if key not in INDIFFERENT
        }
        watched.blocks = {}

    def keep(name: str, output: Any) -> None:
        tokens = output[0] if isinstance(output, tuple) else output
        watched.blocks[name] = tokens.float().cpu()

    with ExitStack() as hooks:
        transformer = pipeline.transformer
        handles = [transformer.register_forward_pre_hook(begin, with_kwargs=True)]
        for name, block in _rows(transformer):
            handles.append(
                block.register_forward_hook(lambda *seen, name=name: keep(name, seen[2]))
            )
        for handle in handles:
            hooks.callback(handle.remove)

        def sample(output_type: str) -> Any:
            draw = torch.Generator().manual_seed(3)
            return pipeline(generator=draw, output_type=output_type, **arguments).frames

        watched.final = sample("latent")
        pipeline.register_modules(vae=_Listener(pipeline.vae, watched))
        sample("pt")
    final, decoded = watched.final, watched.decoded
    if final.shape == decoded.shape and torch.allclose(final, decoded.to(final), 1e-2, 1e-2):
        # Some pipelines return latents unscaled.
        watched.final = ours.latents(torch.cat([final, torch.full_like(final, -30.0)], 1), None)
    return watched


def _rows(transformer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules in the transformer's own lists, which are its blocks, by name."""
    return [
        (f"{name}.{number}", block)
        for name, child in transformer.named_children()
        if isinstance(child, nn.ModuleList)
        for number, block in enumerate(child)
    ]


@torch.no_grad()
def compare_with_stock(
    record: Verification, recipe: Recipe, backbone: Backbone, watched: Watched, size: ClipSize
) -> None:
    """Compare what the backbone makes of the stock pipeline's latents with what that made.

    Args:
      record: Gets the checks.
      recipe: The recipe.
      backbone: With its transformer.
      watched: What `watch` saw, with the text of `drawn_text`.
      size: The size of the clip.
    """
    spec, device = recipe.backbone, backbone.device
    shapes = spec.shapes(size)
    noisy = _as_ours(watched.inputs["hidden_states"], spec, size).float()
    timestep = backbone.timestep_in(watched.inputs).to(device)
    text = {name: value.to(device) for name, value in drawn_text(spec, backbone.dtype).items()}

    ours = backbone.inputs(noisy, text, timestep)
    ours = {name: value for name, value in ours.items() if name not in INDIFFERENT}
    missing = sorted(ours.keys() ^ watched.inputs.keys())
    if missing:
        record.add(
            "transformer's arguments",
            "fails",
            f"{', '.join(missing)}: given by one of the stock pipeline and ours alone",
        )
    record.compare(
        "transformer's argument",
        {name: (ours[name], watched.inputs[name]) for name in ours.keys() & watched.inputs.keys()},
    )

    zero, one = torch.zeros_like(noisy), torch.ones_like(noisy)
    add_noise = backbone.diffusion.add_noise
    final = _as_ours(watched.final, spec, size).float()
    clean = final / 2  # Any would do; the loss is then far from 0, and from that of other signs.
    spread = add_noise(zero, one, timestep)
    noise = (noisy - add_noise(clean, zero, timestep)) / spread
    outputs: dict[str, Tensor] = {}
    with ExitStack() as taps:
        names = {id(block): name for name, block in _rows(backbone.transformer)}
        blocks = {n: backbone.block(n) for n in range(1, shapes.blocks + 1)}
        tapped = {n: taps.enter_context(tap(block)) for n, block in blocks.items()}
        denoised = backbone.denoising_loss(clean, text, noise, timestep)
        for number, block in blocks.items():
            grid = backbone.grid(tapped[number].take(), noisy)
            outputs[names[id(block)]] = grid.tokens.flatten(1, 3)
            record.keep(f"block {number}", grid.tokens)
    lists = {name.rpartition(".")[0] for name in outputs}
    theirs = {
        name: tokens
        for name, tokens in watched.blocks.items()
        if name.rpartition(".")[0] in lists  # Others are of the text alone.
    }
    if list(outputs) != list(theirs):
        record.add("blocks", "fails", f"stock ones run in the order {', '.join(theirs)}")
    pairs = zip_longest(outputs.values(), theirs.values())
    record.compare("block", {str(number): pair for number, pair in enumerate(pairs, start=1)})
    loss = ((final - clean) / spread).square().mean()[None]
    record.compare("clean latents", {"": (denoised.clean, final)}, ROUNDED)
    record.compare("loss", {"": (denoised.loss, loss)}, 4 * ROUNDED)
    record.keep("clean latents", denoised.clean)

    moments = torch.cat([watched.decoded, torch.full_like(watched.decoded, -30.0)], dim=1)
    scaled = backbone.latents(moments, torch.Generator())
    # What CogVideoX 1.5 has in front for the sake of even tokens is not decoded.
    decoded = watched.decoded.shape[2]
    record.compare("latents' scale", {"": (scaled[:, -decoded:], final[:, -decoded:])}, ROUNDED)
    _check_places(record, backbone, noisy, text, timestep)


def _check_places(
    record: Verification,
    backbone: Backbone,
    noisy: Float[Tensor, "b f c h w"],
    text: Text,
    timestep: Tensor,
) -> None:
    """Check that a change in one place of the latents shows most in that place of the grid."""
    patch, steps = backbone.geometry.patch, backbone.geometry.steps
    place = (1, 0, noisy.shape[-1] // patch - 1)
    changed = noisy.clone()
    t, h, w = place[0] * steps, place[1] * patch, place[2] * patch
    changed[:, t : t + steps, :, h : h + patch, w : w + patch] += 2.0
    grids = []
    for latents in (noisy, changed):
        with tap(backbone.block(1)) as tapped:
            backbone.transformer(**backbone.inputs(latents, text, timestep), return_dict=False)
            grids.append(backbone.grid(tapped.take(), latents).tokens.float())
    change = (grids[1] - grids[0])[0].norm(dim=-1)
    most = tuple(int(n) for n in torch.unravel_index(change.argmax(), change.shape))
    record.add(
        "tokens' places",
        "ok" if most == place else "fails",
        f"latents were changed at step, row and column {place}; block 1 shows it at {most}",
    )


@torch.no_grad()
def check_denoising(record: Verification, backbone: Backbone, moments: Tensor, text: Text) -> None:
    """See whether the model finds a clip under noise better than a guess that knows no clips."""
    draw = torch.Generator().manual_seed(5)
    device = backbone.device
    latents = backbone.latents(moments.to(device), draw)
    noise = torch.randn(latents.shape, generator=draw).to(device)
    timestep = torch.tensor([STEPS // 2], device=device)
    text = {name: value.to(device) for name, value in text.items()}
    denoised = backbone.denoising_loss(latents, text, noise, timestep)
    zero, one = torch.zeros_like(latents), torch.ones_like(latents)
    add_noise = backbone.diffusion.add_noise
    signal, spread = (add_noise(*pair, timestep).mean() for pair in ((one, zero), (zero, one)))
    # The best guess from the noisy value alone, for latents of variance 1.
    guess = add_noise(latents, noise, timestep) * signal / (signal**2 + spread**2)
    share = 1 - difference(denoised.clean, latents) ** 2 / difference(guess, latents) ** 2
    record.measured["denoised"] = round(share, 4)
    record.add(
        "denoising",
        "ok" if share > 0 else "doubtful",
        f"{share:.0%} of what noise hides of a simulated clip is recovered"
        + ("" if share > 0 else "; trained weights recover some"),
    )


def _as_ours(sampled: Tensor, spec: BackboneSpec, size: ClipSize) -> Float[Tensor, "b f c h w"]:
    """The stock pipeline's latents in our layout; more channels than the latents' are cut."""
    frames, channels, height, width = spec.shapes(size).latents
    if spec.has_channels_last:
        sampled = sampled.permute(0, 1, 4, 2, 3)
    elif sampled.dim() == 3:  # A sequence of tokens, of one latent each.
        sampled = sampled.unflatten(1, (frames, height, width)).permute(0, 1, 4, 2, 3)
    elif sampled.shape[1] == frames and sampled.shape[2] == channels:
        return sampled
    else:
        sampled = sampled.transpose(1, 2)
    return sampled[:, :, :channels]
