"""Samples clips from prompts through the stock diffusers pipeline, one stage after the other.

The prompts are encoded first. The text encoders are then dropped, before the transformer and the
autoencoder are loaded, and the autoencoder decodes in tiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from itertools import chain, repeat
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from videorepa.backbones import Backbone, Text
from videorepa.errors import UserError
from videorepa.settings.sections import ClipSize, Generation
from videorepa.system.device import autocast
from videorepa.system.randomness import stable_seed

Offload = Literal["none", "model", "group"]
"""What waits in main memory while it does not run: nothing, each model as a whole, or each layer of
the transformers."""


def noise_seed(prompt: str, k: int, nth: int = 0, seed: int = 0) -> int:
    """The seed of a clip's noise.

    Args:
      prompt: The prompt's text.
      k: The clip's number among those of one prompt.
      nth: How many earlier prompts have the same text.
      seed: The seed of the whole set of clips.
    """
    return stable_seed("generate", prompt, k, nth, seed)


def told(backbone: Backbone, prompt: str, image: Any) -> str:
    """What a prompt's text is called: by its image too, where a text encoder sees that."""
    if image is None or not backbone.spec.text_sees_image:
        return prompt
    return f"{sha256(image.tobytes()).hexdigest()} {prompt}"


def encode_prompts(
    backbone: Backbone,
    prompts: Iterable[str],
    settings: Generation,
    images: Iterable[Any] = (),
) -> dict[str, Text]:
    """Encode prompts and the negative prompt, each once and alone, into main memory.

    Args:
      backbone: With its text encoders; it is not needed any more afterwards.
      prompts: What will be sampled.
      settings: The sampling settings.
      images: The prompts' first frames, PIL images, for text encoders that see them.

    Returns:
      The texts by what `told` calls them.
    """
    negative = [settings.negative_prompt] if backbone.spec.takes_negative_prompt else []
    texts: dict[str, Text] = {}
    shown = zip(prompts, chain(images, repeat(None)), strict=False)
    for prompt, image in chain(shown, ((prompt, None) for prompt in negative)):
        name = told(backbone, prompt, image)
        if name in texts:
            continue
        if name == prompt:
            text = backbone.encode_text([prompt])
        else:
            frame = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255.0
            text = backbone.encode_text_of([prompt], frame[None])
        texts[name] = {key: tensor.cpu() for key, tensor in text.items()}
    return texts


def offload_layers(transformer: Any, device: torch.device) -> None:
    """Keep each layer in main memory and bring it to the device when it runs.

    Layers move one by one. A LoRA adapter is a layer beside the one that it adapts, so adapters
    that are added afterwards stay where they are.
    """
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        transformer,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )


class Sampler:
    """A stock pipeline with its settings. It samples clips one by one, so none depends on another.

    The autoencoder and the image encoder are brought to the device for each clip, and back to where
    they were loaded.

    Args:
      backbone: The model without its text encoders. What is offloaded has to be in main memory.
      size: The clips' size.
      settings: The sampling settings.
      texts: What `encode_prompts` gives.
      transformer: Used in place of the backbone's own, for models in training. It stays where it
        is, and computes in the backbone's dtype, whatever its weights have.
      offload: What waits in main memory.
      from_image: Take the pipeline that continues an image.
    """

    def __init__(
        self,
        backbone: Backbone,
        size: ClipSize,
        settings: Generation,
        texts: Mapping[str, Text],
        transformer: Any = None,
        offload: Offload = "none",
        from_image: bool = False,
    ) -> None:
        self.backbone, self.texts = backbone, texts
        self.negative = texts.get(settings.negative_prompt)
        self.arguments = backbone.sampling(size, settings)
        self.arguments.pop("negative_prompt", None)
        self.pipeline = backbone.pipeline(transformer, from_image)
        self.pipeline.set_progress_bar_config(disable=True)
        backbone.guide(settings)
        if settings.tiling:
            backbone.tile(size)
        transformers = [
            module
            for name, module in self.pipeline.components.items()
            if name.startswith("transformer") and module is not None
        ]
        self.autocast = transformers if transformer is not None else []
        # Modules that turn pixels into latents or embeddings, and latents into pixels.
        images = (part for part in backbone.image_parts.values() if isinstance(part, nn.Module))
        self.visual = (backbone.vae, *images)
        if offload == "model":
            self.pipeline.enable_model_cpu_offload(device=backbone.device)
        elif offload == "group":
            for module in transformers:
                if module is not transformer:
                    offload_layers(module, backbone.device)

    def sample(self, prompt: str, seed: int, shown: Sequence[Any] = ()) -> np.ndarray:
        """Sample a clip, (frames, height, width, 3) uint8, from the noise of a seed.

        Args:
          prompt: One of the texts that were encoded.
          seed: The noise's.
          shown: The clip's first frame or frames, PIL images of the clip's size, for a model that
            takes them.

        Raises:
          UserError: The model gives values that are not finite.
        """
        frames = self._run(prompt, seed, "np", shown)
        if not np.isfinite(frames).all():
            raise UserError(
                f"The model gives values that are not finite for {prompt[:80]!r}. Its weights are "
                "damaged, or the precision is too low for it: try float32."
            )
        return (frames * 255.0).round().clip(0, 255).astype(np.uint8)

    def accompany(self, prompt: str, shown: Sequence[Any] = ()) -> None:
        """Run the transformer as often as `sample` does, for processes that hold shards of it."""
        self._run(prompt, 0, "latent", shown)

    def _run(
        self, prompt: str, seed: int, output: Literal["np", "latent"], shown: Sequence[Any]
    ) -> Any:
        image = shown[0] if shown else None
        text = self.backbone.prompt(self.texts[told(self.backbone, prompt, image)])
        if self.negative is not None:
            negative = self.backbone.prompt(self.negative)
            text |= {f"negative_{name}": value for name, value in negative.items()}
        brought = self.visual if output == "np" or shown else ()
        for module in brought:
            module.to(self.backbone.device)
        with ExitStack() as stack:
            for module in self.autocast:
                stack.enter_context(self._autocast(module))
            frames = self.pipeline(
                generator=torch.Generator().manual_seed(seed),
                output_type=output,
                **{key: tensor.to(self.backbone.device) for key, tensor in text.items()},
                **self.arguments,
                **(self.backbone.continuing(shown) if shown else {}),
            ).frames[0]
        for module in brought:
            module.to(self.backbone.home)
        return frames

    @contextmanager
    def _autocast(self, module: nn.Module) -> Iterator[None]:
        """Run a module's forward passes under autocast, and nothing else of the pipeline: it would
        undo the choice of the autoencoder's dtype."""
        entered: list[torch.autocast] = []

        def enter(*_: Any) -> None:
            entered.append(autocast(self.backbone.device, self.backbone.dtype))
            entered[-1].__enter__()

        def leave(*_: Any) -> None:
            entered.pop().__exit__(None, None, None)

        hooks = [
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
