"""Compares a backbone with the stock pipeline: its arguments, blocks, prediction and latents."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL.Image import fromarray
from torch import Tensor, nn

from videorepa.align.taps import tap
from videorepa.backbones import Backbone, BackboneSpec, Image, Text, moved
from videorepa.conditioning import Opening
from videorepa.data.video import to_video
from videorepa.diffusion import STEPS
from videorepa.recipe import Recipe
from videorepa.settings.sections import ClipSize
from videorepa.verifying.record import Verification, difference

HEIGHT, WIDTH = 128, 192
"""About the size of the clip that models are compared on, in pixels."""

SEED = 3
"""The seed of the stock pipeline's clip."""

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
    size = ClipSize(frames=1 + 2 * geometry.stride, height=rows * unit, width=columns * unit)
    return spec.sampled_size(size)


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
      predicted: Of a model that continues an image, the latents that Euler's scheduler takes to lie
        under the noise: some pipelines change them before they end, or end with a little noise.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, Tensor] = field(default_factory=dict)
    final: Tensor = field(default_factory=lambda: torch.empty(0))
    decoded: Tensor = field(default_factory=lambda: torch.empty(0))
    predicted: Tensor | None = None


class _Listener:
    """Stands for the autoencoder in the stock pipeline, and keeps what it is given to decode."""

    def __init__(self, vae: Any, watched: Watched) -> None:
        self._vae, self._watched = vae, watched

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def decode(self, latents: Tensor, *arguments: Any, **options: Any) -> Any:
        self._watched.decoded = latents
        return self._vae.decode(latents, *arguments, **options)


class _Euler:
    """Stands for Euler's scheduler in the stock pipeline, and keeps what it takes to be clean."""

    def __init__(self, scheduler: Any, watched: Watched) -> None:
        self._scheduler, self._watched = scheduler, watched

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def step(self, velocity: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        sample, answer = sample.clone(), self._scheduler.step(velocity, timestep, sample, **options)
        sigma = self._scheduler.sigmas[self._scheduler.step_index - 1]
        self._watched.predicted = sample - sigma * velocity
        return answer


@torch.no_grad()
def encoded_image(
    recipe: Recipe, frames: UInt8[np.ndarray, "t h w 3"], device: torch.device, dtype: torch.dtype
) -> tuple[Image, Tensor]:
    """What `Backbone.first_frames` wants of a clip, for a model that has no text mode."""
    backbone = recipe.backbone.load(("vae", "image_encoder"), device, dtype)
    video = to_video(frames)[None]
    return backbone.encode_image(video), backbone.encode_video(video)


@torch.no_grad()
def watch(
    recipe: Recipe,
    frames: UInt8[np.ndarray, "t h w 3"],
    size: ClipSize,
    text: Text,
    device: torch.device,
    dtype: torch.dtype,
) -> Watched:
    """Let the stock pipeline, loaded as its users load it, sample a clip from a fixed seed.

    A model that has no text mode continues the first of the frames.
    """
    import diffusers

    spec = recipe.backbone
    ours = spec.load(("image_encoder",), device, dtype)
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
        given = ("safety_checker", "connectors", "image_processor", *ours.image_parts)
        parts |= {name: own[name] for name in given if name in own}
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
    arguments |= moved(ours.prompt(text), device)
    if "decode_noise_scale" in arguments:
        arguments["decode_noise_scale"] = 0.0
    if spec.takes_image:
        arguments["image"] = fromarray(frames[0])
    watched = Watched()
    if spec.takes_image and isinstance(
        pipeline.scheduler, diffusers.FlowMatchEulerDiscreteScheduler
    ):
        pipeline.register_modules(scheduler=_Euler(pipeline.scheduler, watched))

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
            draw = torch.Generator().manual_seed(SEED)
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


def _as_shown(
    record: Verification,
    backbone: Backbone,
    image: tuple[Image, Tensor],
    noisy: Float[Tensor, "b f c h w"],
) -> Opening:
    """The opening that the stock pipeline showed. In place it is compared with the clip's own."""
    opening = backbone.first_frames(*image, torch.Generator().manual_seed(SEED))
    if not backbone.shows_in_place:
        return opening  # It is compared among the transformer's arguments.
    mode = backbone.first_frames(*image).image["latents"]
    theirs = noisy[:, :1]
    # Some pipelines draw from the autoencoder's posterior, from the same seed at another time.
    spread = difference(opening.image["latents"], mode)
    apart, allowed = difference(theirs, mode), 2 * spread + record.tolerance
    record.add(
        "image's latents",
        "ok" if apart <= allowed else "fails",
        f"the stock ones differ by {apart:.1e} from the most likely ones; drawn ones by "
        f"{spread:.1e}",
    )
    return replace(opening, image=opening.image | {"latents": theirs})


@torch.no_grad()
def compare_with_stock(
    record: Verification,
    recipe: Recipe,
    backbone: Backbone,
    watched: Watched,
    size: ClipSize,
    image: tuple[Image, Tensor] | None = None,
) -> None:
    """Compare what the backbone makes of the stock pipeline's latents with what that made.

    Args:
      record: Gets the checks.
      recipe: The recipe.
      backbone: With its transformer.
      watched: What `watch` saw, with the text of `drawn_text`.
      size: The size of the clip.
      image: What `encoded_image` gives, for a model that has no text mode.
    """
    spec, device = recipe.backbone, backbone.device
    shapes = spec.shapes(size)
    noisy = _as_ours(watched.inputs["hidden_states"], spec, size).float()
    timestep = backbone.timestep_in(watched.inputs).to(device)
    text = moved(drawn_text(spec, backbone.dtype), device)

    opening = None if image is None else _as_shown(record, backbone, image, noisy)
    ours = backbone.inputs(noisy, text, timestep)
    if opening is not None:
        ours = backbone.shown(ours, noisy, opening)
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
    predicted = final
    if watched.predicted is not None:
        predicted = _as_ours(watched.predicted, spec, size).float()
    is_held = opening is not None and backbone.shows_in_place
    if is_held:
        predicted = torch.cat([noisy[:, :1], predicted[:, 1 - noisy.shape[1] :]], dim=1)
    clean = (
        predicted / 2
    )  # Any would do; the loss is then far from 0, and from that of other signs.
    spread = add_noise(zero, one, timestep)
    noise = (noisy - add_noise(clean, zero, timestep)) / spread
    outputs: dict[str, Tensor] = {}
    with ExitStack() as taps:
        names = {id(block): name for name, block in _rows(backbone.transformer)}
        blocks = {n: backbone.block(n) for n in range(1, shapes.blocks + 1)}
        tapped = {n: taps.enter_context(tap(block)) for n, block in blocks.items()}
        denoised = backbone.denoising_loss(clean, text, noise, timestep, opening)
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
    # What is shown in place is in no loss.
    loss = ((predicted - clean) / spread)[:, int(is_held) :].square().mean()[None]
    record.compare("clean latents", {"": (denoised.clean, predicted)}, ROUNDED)
    record.compare("loss", {"": (denoised.loss, loss)}, 4 * ROUNDED)
    record.keep("clean latents", denoised.clean)

    moments = torch.cat([watched.decoded, torch.full_like(watched.decoded, -30.0)], dim=1)
    scaled = backbone.latents(moments, torch.Generator())
    # What CogVideoX 1.5 has in front for the sake of even tokens is not decoded. Kandinsky's image
    # pipeline changes the first ones before it decodes.
    decoded = watched.decoded.shape[2] if opening is None else 1
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
def check_denoising(
    record: Verification,
    backbone: Backbone,
    moments: Tensor,
    text: Text,
    image: tuple[Image, Tensor] | None = None,
) -> None:
    """See whether the model finds a clip under noise better than a guess that knows no clips.

    With an image, which is the clip's first frame, what is not shown counts.
    """
    draw = torch.Generator().manual_seed(5)
    device = backbone.device
    latents = backbone.latents(moments.to(device), draw)
    noise = torch.randn(latents.shape, generator=draw).to(device)
    timestep = torch.tensor([STEPS // 2], device=device)
    text = moved(text, device)
    opening = None if image is None else backbone.first_frames(*image)
    denoised = backbone.denoising_loss(latents, text, noise, timestep, opening)
    zero, one = torch.zeros_like(latents), torch.ones_like(latents)
    add_noise = backbone.diffusion.add_noise
    signal, spread = (add_noise(*pair, timestep).mean() for pair in ((one, zero), (zero, one)))
    # The best guess from the noisy value alone, for latents of variance 1.
    guess = add_noise(latents, noise, timestep) * signal / (signal**2 + spread**2)
    unseen = slice(0 if opening is None else backbone.geometry.steps, None)
    found, guessed = (difference(x[:, unseen], latents[:, unseen]) for x in (denoised.clean, guess))
    share = 1 - found**2 / guessed**2
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
    elif sampled.shape[1] != frames or sampled.shape[2] % channels:
        sampled = sampled.transpose(1, 2)
    return sampled[:, :, :channels]
