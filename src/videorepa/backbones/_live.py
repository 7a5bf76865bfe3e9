"""What all backbones from diffusers share: a folder, its configuration and the live parts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from videorepa.backbones import Backbone, Part, Text
from videorepa.backbones._spec import Config
from videorepa.diffusion import Denoised, FlowMatching, VPrediction
from videorepa.errors import UserError
from videorepa.settings.sections import ClipSize, Generation
from videorepa.system.hub import quieten_libraries
from videorepa.tokens import TokenGrid


class DiffusersBackbone(Backbone):
    """The live model; parts that were not asked for are None.

    A subclass says what differs. As it stands, the model is one of flow matching that is given one
    text encoder's embeddings, takes (B, C, F, H, W) and gives the velocity alike.
    """

    diffusion: VPrediction | FlowMatching

    def __init__(
        self, spec: Any, parts: Sequence[Part], device: torch.device, dtype: torch.dtype
    ) -> None:
        import diffusers

        quieten_libraries()
        self.spec, self.device, self.dtype, self.part = spec, device, dtype, spec.part
        self.geometry = spec.geometry()
        self.vae: Any = None
        self.transformer: Any = None
        self.text_parts: dict[str, Any] = {}
        for name in spec.text_encoders:
            self.text_parts |= {name: None, _tokenizer_of(name): None}
        with self.loading():
            if "vae" in parts:
                self.vae = self.whole(spec.vae_class, "vae", self.vae_dtype)
            if "text_encoder" in parts:
                for name in spec.text_encoders:
                    self.text_parts |= self._text_part(name)
            if "transformer" in parts and device.type == "meta":
                self.transformer = spec.skeleton(dtype)
            elif "transformer" in parts:
                self.transformer = self.whole(spec.transformer_class, self.part, dtype)
            kind, options = self.scheduler_class()
            scheduler = getattr(diffusers, kind)
            if device.type == "meta":
                with torch.device("cpu"):
                    self.scheduler: Any = scheduler(**options)
            else:
                self.scheduler = scheduler.from_pretrained(
                    spec.folder(), subfolder="scheduler", **options
                )

    @property
    def vae_dtype(self) -> torch.dtype:
        return self.dtype

    def scheduler_class(self) -> tuple[str, Config]:
        """The scheduler's class and what it is told beside its own configuration."""
        # Of a published model that is not on this machine nothing is known but that it is a flow's.
        unknown = ("diffusers", "FlowMatchEulerDiscreteScheduler")
        return self.spec.config("model_index").get("scheduler", unknown)[1], {}

    @contextmanager
    def loading(self):
        """Turns what libraries say of a folder that they cannot load into a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"The model {self.spec.weights} could not be loaded: {type(error).__name__}: "
                f"{str(error)[:500]}. Compare the folder with the one it was copied from."
            ) from None

    def whole(self, kind: str, part: str, dtype: torch.dtype) -> Any:
        """A part of the pipeline, frozen, with every weight found in its folder: left to
        themselves, diffusers and transformers make up those that are missing."""
        import diffusers
        import transformers

        # A text encoder is a class of transformers, whose option has another name.
        option = "torch_dtype" if hasattr(diffusers, kind) else "dtype"
        loader = getattr(diffusers, kind, None) or getattr(transformers, kind)
        source = self.spec.folder()
        model, found = loader.from_pretrained(
            source, subfolder=part, output_loading_info=True, **{option: dtype}
        )
        if missing := sorted(found["missing_keys"]):
            raise UserError(
                f"{source / part} lacks {len(missing)} of the model's weights, such as "
                f"{', '.join(missing[:4])}. Copy or download the folder again."
            )
        return model.to(self.device).eval().requires_grad_(False)

    def _text_part(self, name: str) -> dict[str, Any]:
        from transformers import AutoTokenizer

        tokenizer = _tokenizer_of(name)
        return {
            name: self.whole(self.spec.text_encoders[name], name, self.dtype),
            tokenizer: AutoTokenizer.from_pretrained(self.spec.folder(), subfolder=tokenizer),
        }

    @cached_property
    def stock(self) -> Any:
        """The stock pipeline around the parts that are loaded."""
        import diffusers

        index = self.spec.config("model_index")
        options = {name: index[name] for name in self.spec.options}
        return getattr(diffusers, self.spec.pipeline_class)(**self.components(), **options)

    def components(self) -> dict[str, Any]:
        """What the stock pipeline is made of."""
        modules = {"vae": self.vae, "transformer": self.transformer, "scheduler": self.scheduler}
        return modules | self.text_parts

    def pipeline(self, transformer: Any = None) -> Any:
        if transformer is not None:
            # Some pipelines read the transformer's configuration when they are made.
            self.transformer = transformer
            self.__dict__.pop("stock", None)
        return self.stock

    def sampling(self, size: ClipSize, settings: Generation) -> Config:
        self.spec.check_generation(settings)
        return {
            "height": size.height,
            "width": size.width,
            "num_frames": size.frames,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "max_sequence_length": self.spec.text_tokens,
        }

    def blocks(self) -> Sequence[nn.Module]:
        """The transformer's blocks in the order in which they run."""
        return self.transformer.transformer_blocks

    def block(self, number: int) -> nn.Module:
        blocks = self.blocks()
        if not 1 <= number <= len(blocks):
            raise UserError(
                f"align.block is {number}, counted from 1; {self.spec.weights} has {len(blocks)} "
                "blocks."
            )
        return blocks[number - 1]

    def grid(self, output: Any, latents: Float[Tensor, "b f c h w"]) -> TokenGrid:
        # Blocks with a stream of text give (video, text). Video tokens lie row by row, frame by
        # frame, in all models here.
        tokens = output[0] if isinstance(output, tuple) else output
        b, t, _, h, w = latents.shape
        steps, patch, stride = self.geometry.steps, self.geometry.patch, self.geometry.stride
        tokens = tokens.reshape(b, t // steps, h // patch, w // patch, -1)
        return TokenGrid(tokens, start=1 - stride, stride=stride)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        embeddings, _ = self.stock.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=self.spec.text_tokens,
            device=self.device,
        )
        return {"encoder_hidden_states": embeddings}

    @torch.no_grad()
    def encode_video(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b m t h w"]:
        pixels = (video.to(self.device, self.vae_dtype) * 2 - 1).permute(0, 2, 1, 3, 4)
        return self.vae.encode(pixels).latent_dist.parameters

    def latents(
        self, moments: Float[Tensor, "b m t h w"], generator: torch.Generator
    ) -> Float[Tensor, "b f c h w"]:
        mean, log_variance = moments.float().chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        sample = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
        centre, factor = (value.view(1, -1, 1, 1, 1).to(mean.device) for value in self._scaling)
        return ((sample - centre) * factor).permute(0, 2, 1, 3, 4)

    @cached_property
    def _scaling(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        return self.read_scaling()

    def read_scaling(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """What is taken from a sample of the posterior, and what the rest is multiplied by, for
        each channel or for all."""
        config = self.spec.config("vae")
        centre = torch.tensor(config.get("latents_mean") or [0.0])
        spread = torch.tensor(config.get("latents_std") or [1.0])
        return centre, config.get("scaling_factor", 1.0) / spread

    def sample_timesteps(
        self, latents: Float[Tensor, "b f c h w"], generator: torch.Generator
    ) -> Num[Tensor, " b"]:
        return self.diffusion.sample_timesteps(len(latents), generator).to(self.device)

    def denoising_loss(
        self,
        latents: Float[Tensor, "b f c h w"],
        text: Text,
        noise: Float[Tensor, "b f c h w"],
        timestep: Num[Tensor, " b"],
    ) -> Denoised:
        noisy = self.diffusion.add_noise(latents, noise, timestep)
        output = self.transformer(**self.inputs(noisy, text, timestep), return_dict=False)[0]
        return self.diffusion.denoised(self.velocity(output, noisy), latents, noise, timestep)

    def inputs(
        self, noisy: Float[Tensor, "b f c h w"], text: Text, timestep: Num[Tensor, " b"]
    ) -> Config:
        embeddings = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in text.items()
        }
        latents = noisy.to(self.dtype).permute(0, 2, 1, 3, 4)
        return {"hidden_states": latents, "timestep": timestep} | embeddings

    def velocity(
        self, output: Tensor, noisy: Float[Tensor, "b f c h w"]
    ) -> Float[Tensor, "b f c h w"]:
        """The transformer's output as the velocity of a flow from latents to noise."""
        return output.permute(0, 2, 1, 3, 4)


def _tokenizer_of(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")
