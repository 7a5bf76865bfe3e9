"""The live model of every backbone: parts of a diffusers pipeline, loaded and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn

from videorepa.conditioning import Opening, check_alike, possible
from videorepa.diffusion import Denoised, FlowMatching, VPrediction
from videorepa.errors import UserError
from videorepa.settings.sections import ClipSize, Data, Generation
from videorepa.system.configuration import check_numbers, read_configuration
from videorepa.system.hub import stock_loading
from videorepa.system.randomness import generator
from videorepa.system.weights import Misfit
from videorepa.tokens import TokenGrid

Config = dict[str, Any]

Part = Literal["transformer", "vae", "text_encoder", "image_encoder"]

Text = dict[str, Tensor]
"""Encoded captions, by the names of the transformer's arguments: embeddings, (B, tokens, width) or
(B, width), and boolean masks, (B, tokens)."""


def moved(text: Text, device: torch.device) -> Text:
    """Encoded captions on a device."""
    return {name: tensor.to(device) for name, tensor in text.items()}


ONE_TILE = 256
"""Pixels a side of the largest clips that are never tiled, about as many as the tiles of published
autoencoders have. The lab's small models would else cut clips into pieces of a few pixels."""


Image = dict[str, Tensor]
"""A clip's first frame, encoded as its model takes it, by names that the family chooses."""


class Backbone:
    """A live video diffusion model. Videos are (B, F, 3, H, W) in [0, 1].

    The defaults suit a flow-matching model whose transformer takes one text encoder's embeddings
    and latents (B, C, F, H, W), and predicts the velocity in the same layout. Subclasses override
    what differs.

    Attributes:
      transformer: The stock transformer, or None unless it was requested.
      vae: The stock autoencoder, or None.
      text_parts: Text encoders and tokenizers by their folders, each None unless requested.
      image_parts: Likewise image encoders and processors, where the model has them.
      device: Where the models run, and the transformer's inputs go.
      home: Where the models are loaded, which is `device` unless that is changed afterwards.
      dtype: The dtype of the transformer's inputs.
      part: The transformer's folder within the pipeline's.
    """

    def __init__(
        self, spec: Any, parts: Sequence[Part], device: torch.device, dtype: torch.dtype
    ) -> None:
        import diffusers

        self.spec, self.dtype, self.part = spec, dtype, spec.part
        self.device = self.home = device
        self.vae: Any = None
        self.transformer: Any = None
        self.text_parts: dict[str, Any] = {}
        self.image_parts: dict[str, Any] = {}
        for name in spec.text_encoders:
            self.text_parts |= {name: None, _tokenizer_of(name): None}
        with self.loading():
            self.geometry = spec.geometry()
            self.conditioning = spec.conditioning()
            for name, stock in spec.image_encoders().items():
                self.image_parts |= {name: None, spec.image_processor: None}
                if "image_encoder" in parts:
                    self.image_parts |= self._image_part(name, stock)
            if "vae" in parts:
                self.vae = self.whole(spec.vae_class, "vae", self.vae_dtype)
            if "text_encoder" in parts:
                for name in spec.text_encoders:
                    self.text_parts |= self._text_part(name)
            if "transformer" in parts and device.type == "meta":
                self.transformer = spec.skeleton(dtype)
            elif "transformer" in parts:
                self.transformer = self.whole(spec.transformer_class, self.part, dtype)
            stock_class, options = self.scheduler_class()
            scheduler = getattr(diffusers, stock_class)
            if device.type == "meta":
                with torch.device("cpu"):
                    self.scheduler: Any = scheduler(**options)
            else:
                self.scheduler = scheduler.from_pretrained(
                    spec.folder(), subfolder="scheduler", **options
                )

    @cached_property
    def diffusion(self) -> VPrediction | FlowMatching:
        """How latents are noised, and how the loss follows from the prediction."""
        raise NotImplementedError

    @property
    def vae_dtype(self) -> torch.dtype:
        """The dtype that the autoencoder computes in."""
        return self.dtype

    def scheduler_class(self) -> tuple[str, Config]:
        """The stock scheduler, and arguments that override its own configuration."""
        # The built-in configurations of published models do not name a scheduler.
        default = ("diffusers", "FlowMatchEulerDiscreteScheduler")
        return self.spec.config("model_index").get("scheduler", default)[1], {}

    def scheduler_about(self) -> Config:
        """The scheduler's class, and its settings that are not the class's defaults."""
        defaults, config = type(self.scheduler)().config, self.scheduler.config
        own = {key: value for key, value in config.items() if not key.startswith("_")}
        settings = {key: value for key, value in own.items() if value != defaults.get(key)}
        # As JSON has them, so that they equal what has been written to a file and read again.
        settings = json.loads(json.dumps(settings, default=str))
        return {"scheduler": type(self.scheduler).__name__, "scheduler_settings": settings}

    def loading(self) -> AbstractContextManager[None]:
        """Turn any error of the libraries about the folder into a UserError."""
        return stock_loading(
            f"The model {self.spec.weights}", "Compare the folder with the one it was copied from."
        )

    def whole(self, stock_class: str, part: str, dtype: torch.dtype) -> Any:
        """Load a part of the pipeline, frozen, in evaluation mode.

        Raises:
          UserError: The folder lacks weights, which the libraries would initialise at random.
        """
        import diffusers
        import transformers

        # Text encoders are classes of transformers, where the option has another name.
        option = "torch_dtype" if hasattr(diffusers, stock_class) else "dtype"
        loader = getattr(diffusers, stock_class, None) or getattr(transformers, stock_class)
        source = self.spec.folder()
        # Raises for sizes without end.
        configuration = read_configuration(source / part / "config.json")
        if hasattr(diffusers, stock_class):
            check_numbers(getattr(diffusers, stock_class), configuration)
        model, info = loader.from_pretrained(
            source, subfolder=part, output_loading_info=True, **{option: dtype}
        )
        misfit = Misfit.reported(info)
        if misfit.missing:
            raise UserError(
                f"{source / part} does not fit {stock_class}; {misfit}. Copy or download the "
                "folder again."
            )
        return model.to(self.home).eval().requires_grad_(False)

    def _text_part(self, name: str) -> dict[str, Any]:
        from transformers import AutoTokenizer

        tokenizer = _tokenizer_of(name)
        return {
            name: self.whole(self.spec.text_encoder_classes()[name], name, self.dtype),
            tokenizer: AutoTokenizer.from_pretrained(self.spec.folder(), subfolder=tokenizer),
        }

    def _image_part(self, name: str, stock_class: str) -> dict[str, Any]:
        return {
            name: self.whole(stock_class, name, self.dtype),
            self.spec.image_processor: self.image_processor(),
        }

    def image_processor(self) -> Any:
        """What makes an image into the image encoder's input."""
        from transformers import AutoImageProcessor

        # The one on PIL needs no torchvision.
        return AutoImageProcessor.from_pretrained(
            self.spec.folder(), subfolder=self.spec.image_processor, use_fast=False
        )

    def reinitialise(self, seed: int) -> None:
        """Give the transformer fresh random weights, as its class draws them by itself."""
        model = self.transformer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, "untrained").initial_seed())
            fresh = type(model).from_config(model.config)
        trained = model.state_dict()
        for name, tensor in fresh.state_dict(keep_vars=True).items():
            # Some classes keep some weights in float32.
            tensor.data = tensor.data.to(trained[name].dtype)
        self.transformer = fresh.to(self.home).eval().requires_grad_(False)

    @cached_property
    def stock(self) -> Any:
        """The stock pipeline around the loaded parts."""
        return self._around(self.spec.stock_pipeline)

    @cached_property
    def image_stock(self) -> Any:
        """The stock pipeline that continues an image, around the loaded parts."""
        stock_class = self.spec.stock_image_pipeline
        return self.stock if stock_class == self.spec.stock_pipeline else self._around(stock_class)

    def _around(self, pipeline: str) -> Any:
        import diffusers

        index = self.spec.config("model_index")
        options = {name: index[name] for name in self.spec.options}
        return getattr(diffusers, pipeline)(**self.components(), **options)

    def components(self) -> dict[str, Any]:
        """The parts that the stock pipeline is made of, by their names in it."""
        modules = {"vae": self.vae, "transformer": self.transformer, "scheduler": self.scheduler}
        return modules | self.text_parts | self.image_parts

    def pipeline(self, transformer: Any = None, from_image: bool = False) -> Any:
        """The stock pipeline around the loaded parts, ready to sample.

        Args:
          transformer: Used in place of the backbone's own, for models in training.
          from_image: Take the pipeline that continues an image.
        """
        if transformer is not None:
            # Some pipelines read the transformer's configuration when they are made.
            self.transformer = transformer
            for made in ("stock", "image_stock"):
                self.__dict__.pop(made, None)
        return self.image_stock if from_image else self.stock

    def sampling(self, size: ClipSize, settings: Generation) -> Config:
        """The pipeline's arguments for clips of a size, except the prompt and the generator.

        Raises:
          UserError: A setting is switched on that the pipeline does not have.
        """
        self.spec.check_generation(settings)
        arguments = {
            "height": size.height,
            "width": size.width,
            "num_frames": size.frames,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "max_sequence_length": self.spec.text_tokens,
        }
        if settings.negative_prompt:
            arguments["negative_prompt"] = settings.negative_prompt
        return arguments

    def continuing(self, frames: Sequence[Any]) -> Config:
        """The image pipeline's arguments for a clip's first frames, PIL images: here, for one."""
        (image,) = frames
        return {"image": image}

    def unguided(self) -> Config:
        """The pipeline's arguments by which it ends with what training computes, where it has more
        kinds of guidance than a scale of 1 switches off."""
        return {}

    def tile(self, size: ClipSize) -> None:
        """Let the autoencoder encode and decode clips of a size in overlapping tiles, as stock.

        It takes a fraction of the memory, and what it gives differs a little around the seams.
        Clips of up to `ONE_TILE` pixels a side stay whole.
        """
        if max(size.height, size.width) > ONE_TILE:
            self.vae.enable_tiling()

    def guide(self, settings: Generation) -> None:
        """Put the guidance scale into the stock pipeline, where it is no argument of its call."""

    def blocks(self) -> Sequence[nn.Module]:
        """The transformer's blocks in the order in which they run."""
        return self.transformer.transformer_blocks

    def block(self, number: int) -> nn.Module:
        """The transformer block with a number, counted from 1.

        Raises:
          UserError: There is no such block.
        """
        blocks = self.blocks()
        if not 1 <= number <= len(blocks):
            raise UserError(
                f"align.block is {number}, counted from 1; {self.spec.weights} has {len(blocks)} "
                "blocks."
            )
        return blocks[number - 1]

    def grid(self, output: Any, latents: Float[Tensor, "b f c h w"]) -> TokenGrid:
        """A block's output as a grid of the video's tokens.

        Args:
          output: Tokens (B, N, D), row by row and frame by frame, or a tuple that begins with
            them, as of blocks with a separate text stream.
          latents: The transformer's input.
        """
        tokens = output[0] if isinstance(output, tuple) else output
        b, t, _, h, w = latents.shape
        steps, patch, stride = self.geometry.steps, self.geometry.patch, self.geometry.stride
        tokens = tokens.reshape(b, t // steps, h // patch, w // patch, -1)
        return TokenGrid(tokens, start=1 - stride, stride=stride)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        """The transformer's text arguments for captions."""
        embeddings, _ = self.stock.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=self.spec.text_tokens,
            device=self.device,
        )
        return {"encoder_hidden_states": embeddings}

    def encode_text_of(self, captions: Sequence[str], images: Float[Tensor, "b 3 h w"]) -> Text:
        """As `encode_text`, for text encoders that see the clips' first frames, in [0, 1], beside
        the captions (`spec.text_sees_image`). `encode_text` shows them black images."""
        raise NotImplementedError

    def encode_captions(self, captions: Sequence[str], video: Float[Tensor, "b f 3 h w"]) -> Text:
        """The transformer's text arguments for the captions of clips."""
        if self.spec.text_sees_image:
            return self.encode_text_of(captions, video[:, 0])
        return self.encode_text(captions)

    def prompt(self, text: Text) -> Text:
        """A prompt's tensors by the names of the stock pipeline's arguments."""
        return {self.spec.prompt_arguments[name]: tensor for name, tensor in text.items()}

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Count the tokens of each caption before it is cut to `spec.text_tokens`."""
        return [len(ids) for ids in self.text_parts["tokenizer"](list(captions)).input_ids]

    def cut_note(self, what: str, texts: Mapping[str, str]) -> str:
        """Say as `spec.cut_note` does which of these texts, by their names, are cut."""
        counts = self.count_tokens(list(texts.values()))
        return self.spec.cut_note(what, dict(zip(texts, counts, strict=True)))

    @torch.no_grad()
    def encode_video(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b m t h w"]:
        """The posterior's moments (mean, then log-variance, along the channels), unscaled."""
        if self.spec.tiling:
            self.tile(ClipSize(frames=video.shape[1], height=video.shape[3], width=video.shape[4]))
        pixels = (video.to(self.device, self.vae_dtype) * 2 - 1).permute(0, 2, 1, 3, 4)
        return self.vae.encode(pixels).latent_dist.parameters

    def latents(
        self, moments: Float[Tensor, "b m t h w"], generator: torch.Generator | None
    ) -> Float[Tensor, "b f c h w"]:
        """Draw from the posterior, and scale as this checkpoint's transformer expects.

        Args:
          moments: What `encode_video` returns.
          generator: A generator on the CPU, so that draws do not depend on the device; None takes
            the posterior's mode.
        """
        sample, log_variance = moments.float().chunk(2, dim=1)
        if generator is not None:
            noise = torch.randn(sample.shape, generator=generator).to(sample.device)
            sample = sample + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
        centre, factor = (value.view(1, -1, 1, 1, 1).to(sample.device) for value in self._scaling)
        return ((sample - centre) * factor).permute(0, 2, 1, 3, 4)

    def encode_image(
        self,
        video: Float[Tensor, "b f 3 h w"],
        draws: Sequence[torch.Generator] | None = None,
    ) -> Image:
        """What the model needs of the first frames besides the clips' latents; {} if nothing.

        Args:
          video: The clips.
          draws: A generator on the CPU for each clip, for what its authors add to images in
            training. Without them images are encoded as they are sampled from.
        """
        return {}

    def encode_first_frame(self, video: Float[Tensor, "b f 3 h w"]) -> Image:
        """The first frame's moments; {} for a model that continues no image.

        It is encoded alone, since the norms of a clip's encoding see all of its frames.
        """
        return {} if self.conditioning is None else {"image": self.encode_video(video[:, :1])}

    def image(
        self,
        stored: Image,
        moments: Float[Tensor, "b m t h w"],
        generator: torch.Generator | None,
    ) -> Image:
        """What `Opening.image` holds: images at the scale of this checkpoint's transformer.

        Args:
          stored: What `encode_image` returns.
          moments: What `encode_video` returns of the clips, for models that take their first
            latents otherwise than `latents` draws them.
          generator: As of `latents`.
        """
        return stored

    def opening(
        self, video: Float[Tensor, "b f 3 h w"], moments: Float[Tensor, "b m t h w"]
    ) -> Opening | None:
        """What is shown of clips outside training, to a model that has no text mode: their first
        frame. It is None for all others, which see text alone.

        Args:
          video: The clips.
          moments: What `encode_video` returns of them.
        """
        if not self.spec.takes_image:
            return None
        return self.first_frames(self.encode_image(video), moments)

    def first_frames(
        self,
        stored: Image,
        moments: Float[Tensor, "b m t h w"],
        generator: torch.Generator | None = None,
    ) -> Opening:
        """The opening of clips that are shown their first frame.

        Args:
          stored: What `encode_image` returns of them.
          moments: What `encode_video` returns of them.
          generator: As of `latents`.
        """
        image = self.image(stored, moments, generator)
        if self.shows_in_place and "latents" not in image:
            image = image | {"latents": self.latents(moments, generator)[:, :1]}
        return Opening((1,) * len(moments), image)

    def blank_opening(self, data: Data, count: int) -> Opening | None:
        """The most that is shown of a recipe's clips, of images that are zero throughout: for work
        in which their content does not matter. None where nothing is shown."""
        continuation = self.spec.continuation(data)
        if continuation is None:
            return None
        stored = {
            name: torch.zeros(count, *like.shape, dtype=like.dtype, device=self.device)
            for name, like in self.spec.image(data).items()
        }
        moments = torch.zeros(count, *self.spec.moments(data), device=self.device)
        image = self.image(stored, moments, None)
        return Opening((max(possible(continuation)),) * count, image)

    @cached_property
    def _scaling(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        return self.read_scaling()

    def read_scaling(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Centre and factor such that latents are (z - centre) * factor.

        Each has a value per channel, or one for all channels.
        """
        config = self.spec.config("vae")
        centre = torch.tensor(config.get("latents_mean") or [0.0])
        spread = torch.tensor(config.get("latents_std") or [1.0])
        return centre, config.get("scaling_factor", 1.0) / spread

    def sample_timesteps(
        self, latents: Float[Tensor, "b f c h w"], generator: torch.Generator
    ) -> Num[Tensor, " b"]:
        """Draw a training timestep for each sample; the distribution may depend on its size."""
        return self.diffusion.sample_timesteps(len(latents), generator).to(self.device)

    @property
    def shows_in_place(self) -> bool:
        """Whether what is shown of a clip stands in place of its noisy latents."""
        return self.conditioning is not None and self.conditioning.place == "in place"

    def noised(
        self,
        latents: Float[Tensor, "b f c h w"],
        text: Text,
        noise: Float[Tensor, "b f c h w"],
        timestep: Num[Tensor, " b"],
        opening: Opening | None = None,
    ) -> tuple[Float[Tensor, "b f c h w"], Config]:
        """The noisy latents, and the transformer's arguments for them; see `denoising_loss`."""
        noisy = self.diffusion.add_noise(latents, noise, timestep)
        if opening is None:
            return noisy, self.inputs(noisy, text, timestep)
        if self.conditioning.is_alike:
            check_alike(opening.latents, self.spec.weights)
        if self.shows_in_place:
            noisy = torch.where(opening.mask(latents), opening.held(latents), noisy)
        return noisy, self.shown(self.inputs(noisy, text, timestep), noisy, opening)

    def denoising_loss(
        self,
        latents: Float[Tensor, "b f c h w"],
        text: Text,
        noise: Float[Tensor, "b f c h w"],
        timestep: Num[Tensor, " b"],
        opening: Opening | None = None,
        of_unseen: bool = False,
    ) -> Denoised:
        """Run the transformer once on noisy latents.

        Args:
          latents: The clean latents.
          text: The captions, as `encode_text` returns them.
          noise: The noise to add.
          timestep: Of each sample, 0 to 1000: the higher, the more noise.
          opening: What the model is shown of each clip; by default nothing.
          of_unseen: Leave what is shown out of the loss by channels, too, where it is denoised.

        Returns:
          The loss of each sample, and the clean latents that the model predicts. Latents that are
          shown in their own place are true in both, and have no loss.
        """
        held = None
        if opening is not None and (of_unseen or self.shows_in_place):
            held = opening.mask(latents, repeats=self.geometry.steps - 1)
        if opening is not None and self.shows_in_place:
            latents = opening.held(latents)
        noisy, inputs = self.noised(latents, text, noise, timestep, opening)
        velocity = self.velocity(self.predict(inputs), noisy)
        return self.diffusion.denoised(velocity, latents, noise, timestep, held)

    def inputs(
        self, noisy: Float[Tensor, "b f c h w"], text: Text, timestep: Num[Tensor, " b"]
    ) -> Config:
        """The transformer's arguments, as the stock pipeline would pass them.

        A model that has always been shown an image is shown a blank one.
        """
        embeddings = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in text.items()
        }
        latents = noisy.to(self.dtype).permute(0, 2, 1, 3, 4)
        return {"hidden_states": latents, "timestep": timestep} | embeddings

    def timestep_in(self, inputs: Config) -> Num[Tensor, " 1"]:
        """The first sample's timestep, as `inputs` takes it, from the transformer's arguments."""
        # The last token's, where tokens have their own: it is never shown.
        timestep = torch.atleast_1d(inputs["timestep"])[0].flatten()[-1:]
        return timestep.float() if timestep.is_floating_point() else timestep

    def shown(self, inputs: Config, noisy: Float[Tensor, "b f c h w"], opening: Opening) -> Config:
        """The transformer's arguments with the clips' openings in them.

        Args:
          inputs: What `inputs` returns for the noisy latents.
          noisy: The noisy latents, in which those that are shown in place are clean already.
          opening: What the model is shown.
        """
        raise NotImplementedError

    def shown_tokens(
        self, noisy: Float[Tensor, "b f c h w"], opening: Opening
    ) -> Bool[Tensor, "b n"]:
        """Which of the transformer's tokens are shown, row by row and frame by frame."""
        clips, frames, _, height, width = noisy.shape
        patch = self.geometry.patch
        size = clips, frames, height // patch, width // patch
        return opening.mask(noisy)[:, :, 0].expand(size).flatten(1)

    def predict(self, inputs: Config) -> Tensor:
        """The transformer's output for arguments as `inputs` gives them."""
        return self.transformer(**inputs, return_dict=False)[0]

    def velocity(
        self, output: Tensor, noisy: Float[Tensor, "b f c h w"]
    ) -> Float[Tensor, "b f c h w"]:
        """The transformer's output as the velocity that `diffusion.denoised` takes."""
        return output.permute(0, 2, 1, 3, 4)


def _tokenizer_of(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


def pictures(frames: Float[Tensor, "b 3 h w"]) -> list[Any]:
    """Frames in [0, 1] as the PIL images that stock pipelines take."""
    from PIL.Image import fromarray

    pixels = (frames * 255.0).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [fromarray(frame) for frame in pixels]
