"""Checks the text encoder and the autoencoder, which make what a training reads."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from videorepa.backbones import Text
from videorepa.data.video import to_video
from videorepa.recipe import Recipe
from videorepa.verifying.record import Verification, difference

FAITHFUL = 20.0
"""Decibels of the peak signal-to-noise ratio that a trained autoencoder reaches easily."""

NARROWEST, WIDEST = 1 / 3, 3.0
"""Standard deviation of a clip's scaled latents. It is about 1 over the clips that the transformer
was trained on."""


@torch.no_grad()
def check_text(
    record: Verification, recipe: Recipe, caption: str, device: torch.device, dtype: torch.dtype
) -> Text:
    """Encode two captions as `prepare` does, and give the first one's tensors."""
    backbone = recipe.backbone.preparing.load(("text_encoder",), device, dtype)
    texts = backbone.encode_text([caption, "Something else."])
    embeddings = texts["encoder_hidden_states"]
    record.keep("text", embeddings)
    apart = difference(embeddings[:1], embeddings[1:])
    tokens = backbone.count_tokens([caption])[0]
    record.add(
        "text",
        "ok" if apart > record.tolerance else "doubtful",
        f"a caption of {tokens} tokens differs from another by {apart:.1e}",
    )
    return {name: value[:1].cpu() for name, value in texts.items()}


@torch.no_grad()
def check_autoencoder(
    record: Verification,
    recipe: Recipe,
    frames: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Encode a clip as `prepare` does and as stock classes do, decode it, and give the moments."""
    import diffusers
    from diffusers.video_processor import VideoProcessor

    backbone = recipe.backbone.preparing.load(("vae",), device, dtype)
    vae, spec = backbone.vae, recipe.backbone
    video = to_video(frames)[None]
    moments = backbone.encode_video(video)
    record.keep("autoencoder's moments", moments)
    mean = moments.chunk(2, dim=1)[0]
    # Some decoders are told how much noise is left.
    more = (torch.zeros(1, device=device),) if vae.config.get("timestep_conditioning") else ()
    decoded = vae.decode(mean, *more, return_dict=False)[0]
    decoded = (decoded.float().cpu() / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    record.keep("autoencoder's frames", decoded)
    error = (decoded - video).square().mean().clamp_min(1e-12)
    decibels = -10 * error.log10().item()
    record.measured["psnr"] = round(decibels, 2)
    record.add(
        "autoencoder's round trip",
        "ok" if decibels >= FAITHFUL else "doubtful",
        f"{decibels:.1f} dB on a simulated clip"
        + ("" if decibels >= FAITHFUL else f"; trained weights reach {FAITHFUL:.0f}"),
    )
    latents = spec.load((), device, dtype).latents(moments, torch.Generator().manual_seed(7))
    spread = latents.float().std().item()
    record.measured["latents_std"] = round(spread, 4)
    is_usual = NARROWEST < spread < WIDEST
    record.add(
        "latents' spread",
        "ok" if is_usual else "doubtful",
        f"the standard deviation is {spread:.2f} after scaling"
        + ("" if is_usual else "; it should be about 1: is the scaling factor the model's?"),
    )
    del backbone, vae
    stock = getattr(diffusers, spec.vae_class).from_pretrained(
        spec.preparing.folder(), subfolder="vae", torch_dtype=moments.dtype
    )
    height, width = frames.shape[1:3]
    processor = VideoProcessor(vae_scale_factor=spec.geometry().pixels)
    pixels = processor.preprocess_video(list(frames / 255.0), height, width)
    posterior = stock.to(device).encode(pixels.to(device, moments.dtype)).latent_dist
    record.compare("autoencoder's moments", {"": (moments, posterior.parameters)})
    return moments.cpu()
