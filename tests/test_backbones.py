"""The contract of backbones, checked on a tiny twin of every one in the package."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import sampled_by_card, write_clips
from test_memory import check_shortcut, deepened, replacing
from twins import TWINS
from videorepa.align.taps import tap
from videorepa.artifacts.model import Model
from videorepa.artifacts.run import Run
from videorepa.backbones import Backbone, BackboneSpec, _spec
from videorepa.backbones._cosmos import NoGuardrail
from videorepa.backbones._sampler import Offload, Sampler, encode_prompts
from videorepa.conditioning import Opening, possible
from videorepa.data.cache import Cache
from videorepa.data.manifest import Prompt
from videorepa.data.source import open_source
from videorepa.data.video import to_video
from videorepa.errors import UserError
from videorepa.evaluation.likelihood import Denoising
from videorepa.exchange import model_card
from videorepa.exchange.lora import COMFYUI_FILE, LORA_FILE, comfyui_names
from videorepa.exchange.stock import inputs, output
from videorepa.exchange.usage import usage
from videorepa.export import export
from videorepa.generate import generate
from videorepa.inspect import Inspection, inspect
from videorepa.losses.relation import Relation
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.settings import plugins
from videorepa.settings.sections import ClipSize, Generation, Lora
from videorepa.tokens import TokenGrid
from videorepa.train import train
from videorepa.training.cost import Cost, predict
from videorepa.training.parallel import Alone
from videorepa.training.student import Student
from videorepa.training.validation import encoded_prompts, validation

CPU = torch.device("cpu")
RECIPE = Path(__file__).parents[1] / "recipes" / "videorepa-2b.yaml"
WHOLE = ("transformer", "vae", "text_encoder", "image_encoder")
CAPTIONS = ["A red ball falls.", 'A sign says "go".', ""]
"""The first two have as many letters: models without a mask of the text take both at once."""


@dataclass
class Twin:
    """A tiny model on disk, and a clip that fits it. The model is loaded on first use."""

    described: dict[str, str]
    folder: Path

    @property
    def kind(self) -> str:
        return self.described["name"]

    @cached_property
    def spec(self) -> Any:
        description = plugins.description("backbones", self.kind)
        return description(**self.described, weights=str(self.folder))

    @cached_property
    def size(self) -> ClipSize:
        """Three tokens in time, or as many as the pipeline needs, two down and two across."""
        geometry = self.spec.geometry()
        side = 2 * geometry.pixels * geometry.patch
        steps = 5 if self.kind == "kandinsky5" else 2
        return ClipSize(frames=1 + steps * geometry.stride, height=side, width=side)

    @cached_property
    def live(self) -> Any:
        return self.spec.load(WHOLE, CPU)

    @cached_property
    def video(self) -> torch.Tensor:
        draw = torch.Generator().manual_seed(1)
        size = self.size
        video = torch.rand(2, size.frames, 3, size.height, size.width, generator=draw)
        return (video * 255.0).round() / 255.0

    @cached_property
    def image(self) -> Image.Image:
        """The first clip's first frame."""
        pixels = (self.video[0, 0] * 255.0).round().to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    @property
    def takes_image(self) -> bool:
        return self.spec.takes_image

    def opening(self, clips: int, seed: int) -> Opening | None:
        """The first frames of clips of the video, for a model that has always been shown one."""
        if not self.takes_image:
            return None
        live, video = self.live, self.video[:clips]
        image = live.image(live.encode_image(video), live.encode_video(video), draw(seed))
        return Opening((1,) * clips, image)

    def text(self, captions: list[str]) -> Any:
        """The text of clips of the video."""
        if self.spec.text_sees_image:
            return self.live.encode_text_of(captions, self.video[: len(captions), 0])
        return self.live.encode_text(captions)

    @property
    def is_held(self) -> bool:
        """The model has no text mode, and is shown its image in place."""
        return self.takes_image and self.spec.conditioning().place == "in place"

    @cached_property
    def latents(self) -> torch.Tensor:
        return self.live.latents(self.live.encode_video(self.video), draw(2))


# 2.3 has all that LTX-2 has, and Wan 2.1 all that SkyReels has; the contract of these takes long.
SLOW = ("ltx2", "skyreels", "skyreels-i2v")
PARAMS = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in TWINS]


@pytest.fixture(scope="module", params=PARAMS)
def twin(request, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    described, make = TWINS[request.param]
    return Twin(described, make(tmp_path_factory.mktemp("twin") / request.param))


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_stock_folder_tells_its_backbone(twin: Twin) -> None:
    assert Model.of(twin.folder).spec.name == twin.kind


def test_a_folder_that_no_backbone_loads_is_refused_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(
        UserError, match="holds a StableDiffusionPipeline, which no .* CogVideoXPipeline, .*Wan"
    ):
        Model.of(tmp_path)


def test_a_folder_of_another_family_is_refused_with_all_that_this_one_loads(
    twin: Twin, tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    spec = twin.spec.model_copy(update={"weights": str(tmp_path)})
    with pytest.raises(UserError, match="holds a StableDiffusionPipeline") as raised:
        spec.folder()
    assert str(raised.value).endswith(f"loads a {' or a '.join(spec.pipelines())}.")
    assert spec.pipelines()[0] == spec.pipeline_class and set(spec.also_of) < {*spec.pipelines()}


def test_a_likelihood_is_the_models_own_loss_under_noise_in_common(twin: Twin) -> None:
    text, moments = twin.text(CAPTIONS[:1]), twin.live.encode_video(twin.video)
    mode = twin.live.latents(moments, None)
    assert mode.shape == twin.latents.shape
    opening = twin.live.opening(twin.video[:1], moments[:1])
    assert (opening is not None) == twin.takes_image
    clips = mode[[0, 1, 0]]
    found = Denoising(twin.live, [0.3, 0.7], batch=3)(clips, text, "a", opening).loss
    assert found.isfinite().all() and (found > 0).all()
    torch.testing.assert_close(found[0], found[2])
    alone = Denoising(twin.live, [0.7])
    one = alone(clips[1:2], text, "a", opening).loss[0, 0]
    torch.testing.assert_close(one, found[1, 1], rtol=1e-4, atol=0)
    if twin.takes_image:  # What is shown, and shown alike, is no part of the loss.
        other = clips[1:2].clone()
        other[:, : twin.spec.geometry().steps] += 1.0
        if twin.is_held:
            torch.testing.assert_close(alone(other, text, "a", opening).loss[0, 0], one)
        blank = opening.mapped(torch.zeros_like)
        assert alone(clips[1:2], text, "a", blank).loss[0, 0] != one


def test_an_untrained_copy_holds_its_weights_as_the_model_does(twin: Twin) -> None:
    half = twin.spec.load(("transformer",), CPU, torch.bfloat16)
    before = {name: x.dtype for name, x in half.transformer.state_dict().items()}
    half.reinitialise(0)
    fresh = half.transformer
    assert {name: x.dtype for name, x in fresh.state_dict().items()} == before
    assert not fresh.training and not any(p.requires_grad for p in fresh.parameters())


def test_every_backbone_has_a_twin() -> None:
    assert {described["name"] for described, _ in TWINS.values()} == set(plugins.names("backbones"))


# What configuration files alone promise.


def test_shapes_are_those_of_the_live_model(twin: Twin) -> None:
    shapes, live = twin.spec.shapes(twin.size), twin.live
    assert live.encode_video(twin.video).shape[1:] == twin.spec.moments(twin.size)
    assert twin.latents.shape[1:] == shapes.latents
    text = live.encode_text(CAPTIONS[:2])
    assert text.keys() == shapes.text.keys()
    for name, like in shapes.text.items():
        assert (text[name].shape[1:], text[name].dtype) == (like.shape, like.dtype), name
    with tap(live.block(shapes.blocks)) as tapped:
        denoise(live, twin.latents, text)
    grid = live.grid(tapped.take(), twin.latents)
    assert grid.tokens.shape[1:] == shapes.grid.tokens.shape[1:]
    assert (grid.start, grid.stride) == (shapes.grid.start, shapes.grid.stride)
    assert shapes.parameters == sum(p.numel() for p in live.transformer.parameters())
    with pytest.raises(UserError, match=f"has {shapes.blocks} blocks"):
        live.block(shapes.blocks + 1)


def test_the_grid_covers_the_frames_that_it_says(twin: Twin, monkeypatch) -> None:
    """The encoders are causal: a frame shows in its own step's latents and in none before, but for
    the norms over a whole clip, which are left out here."""
    monkeypatch.setattr(torch.nn.GroupNorm, "forward", lambda self, x: x)
    grid, steps = twin.spec.shapes(twin.size).grid, twin.spec.geometry().steps

    def latents(video: torch.Tensor) -> torch.Tensor:
        mean, _ = twin.live.encode_video(video).chunk(2, dim=1)
        # Where tokens span several latents, the first is repeated in front.
        return torch.cat([mean[:, :, :1].expand(-1, -1, -mean.shape[2] % steps, -1, -1), mean], 2)

    plain = latents(twin.video)
    for step in range(grid.size[0]):
        for frame in (grid.frames(step)[0], grid.frames(step)[-1]):
            video = twin.video.clone()
            video[:, frame] = 1 - video[:, frame]
            change = (latents(video) - plain).unflatten(2, (-1, steps)).abs().amax((0, 1, 3, 4, 5))
            before, own = change[:step], change[step]
            assert own > 0 and (before < 1e-4 * own).all(), (frame, change)


def test_clips_that_do_not_fit_are_refused_with_sizes_that_do(twin: Twin) -> None:
    for change in ({"frames": twin.size.frames + 1}, {"height": twin.size.height + 2}):
        wrong = twin.size.model_copy(update=change)
        with pytest.raises(UserError, match="Try ") as refused:
            twin.spec.check_clip(wrong)
        near = str(refused.value).rpartition("Try ")[2].rstrip(".").split("x")
        right = {"frames": near[0]} if len(near) == 1 else {"height": near[0], "width": near[1]}
        twin.spec.shapes(wrong.model_copy(update={k: int(v) for k, v in right.items()}))


BILLIONS = {
    "Wan2.1-I2V-14B-480P-Diffusers": 16.4,
    "Wan2.1-I2V-14B-720P-Diffusers": 16.4,
    "Wan2.2-I2V-A14B-Diffusers": 14.29,
    "CogVideoX-5b-I2V": 5.57,
    "CogVideoX1.5-5B-I2V": 5.57,
    "CogVideoX-2b": 1.69,
    "CogVideoX-5b": 5.57,
    "CogVideoX1.5-5B": 5.57,
    "Wan2.1-T2V-1.3B-Diffusers": 1.42,
    "Wan2.1-T2V-14B-Diffusers": 14.29,
    "Wan2.2-T2V-A14B-Diffusers": 14.29,
    "Wan2.2-TI2V-5B-Diffusers": 5.00,
    "LTX-Video": 1.92,
    "LTX-Video-0.9.5": 1.92,
    "LTX-Video-0.9.7-dev": 13.04,
    "HunyuanVideo": 12.82,
    "HunyuanVideo-I2V": 12.82,
    "HunyuanVideo-I2V-33ch": 12.81,
    "HunyuanVideo-1.5-Diffusers-480p_t2v": 8.33,
    "HunyuanVideo-1.5-Diffusers-720p_t2v": 8.33,
    "HunyuanVideo-1.5-Diffusers-480p_i2v": 8.33,
    "HunyuanVideo-1.5-Diffusers-720p_i2v": 8.33,
    "Kandinsky-5.0-T2V-Lite-pretrain-5s-Diffusers": 2.01,
    "Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers": 2.01,
    "Kandinsky-5.0-T2V-Lite-nocfg-5s-Diffusers": 2.01,
    "Kandinsky-5.0-I2V-Lite-5s": 2.01,
    "mochi-1-preview": 10.03,
    "SkyReels-V2-T2V-14B-540P-Diffusers": 14.29,
    "SkyReels-V2-T2V-14B-720P-Diffusers": 14.29,
    "SkyReels-V2-I2V-14B-540P-Diffusers": 16.4,
    "SkyReels-V2-I2V-14B-720P-Diffusers": 16.4,
    "LTX-2": 18.88,
    "LTX-2.3-Diffusers": 18.99,
    "Cosmos-Predict2-2B-Video2World": 1.96,
    "Cosmos-Predict2-14B-Video2World": 14.27,
    "Cosmos-Predict2.5-2B": 2.06,
    "Cosmos-Predict2.5-14B": 14.37,
}


@pytest.mark.parametrize("kind", plugins.names("backbones"))
def test_published_models_can_be_inspected_without_their_files(kind: str) -> None:
    described = plugins.description("backbones", kind)
    for name in described.published:
        spec = described(weights=f"someone/{name}")
        shapes = spec.shapes(spec.default_size())
        assert shapes.parameters / 1e9 == pytest.approx(BILLIONS[name], abs=0.01), name


@pytest.mark.parametrize(
    ("kind", "name", "sampled", "size"),
    [
        ("cogvideox", "CogVideoX-2b", (8, 50, 6.0), (49, 480, 720)),
        ("wan", "Wan2.1-T2V-1.3B-Diffusers", (16, 50, 5.0), (81, 480, 832)),
        ("wan", "Wan2.1-I2V-14B-480P-Diffusers", (16, 50, 5.0), (81, 480, 832)),
        ("wan", "Wan2.2-T2V-A14B-Diffusers", (16, 50, 5.0), (81, 480, 832)),
        ("wan", "Wan2.2-I2V-A14B-Diffusers", (16, 40, 3.5), (81, 480, 832)),
        ("wan", "Wan2.2-TI2V-5B-Diffusers", (24, 50, 5.0), (81, 480, 832)),
        ("skyreels", "SkyReels-V2-I2V-14B-540P-Diffusers", (24, 50, 5.0), (97, 544, 960)),
        ("cosmos", "Cosmos-Predict2-2B-Video2World", (16, 35, 7.0), (93, 704, 1280)),
        ("ltx2", "LTX-2", (24, 30, 3.0), (121, 512, 768)),
    ],
)
def test_a_checkpoint_is_sampled_as_its_authors_do(kind, name, sampled, size) -> None:
    spec = plugins.description("backbones", kind)(weights=f"someone/{name}")
    settings, made_for = Generation(**spec.published_generation()), spec.default_size()
    assert (settings.fps, settings.steps, settings.guidance_scale) == sampled
    assert (made_for.frames, made_for.height, made_for.width) == size


def test_a_checkpoint_is_known_by_its_configuration_and_never_downloaded_for_it(
    tmp_path: Path, monkeypatch
) -> None:
    kind = plugins.description("backbones", "wan")
    folder = tmp_path / "exported"
    folder.mkdir()
    index = folder / "model_index.json"
    index.write_text(json.dumps({"_class_name": "WanPipeline", "expand_timesteps": True}))
    published = Recipe.from_yaml(RECIPE).model_dump(mode="json", exclude={"generation"})
    values = published | {"backbone": {"name": "wan", "weights": str(folder)}}
    recipe = Recipe.parse(values)
    assert (recipe.generation.fps, recipe.generation.guidance_scale) == (24, 5.0)
    monkeypatch.setattr(_spec, "local_copy", None)
    assert kind(weights="someone/else").published_generation() == kind.generation
    # A run's own recipe, which states all, can be read whatever became of the folder.
    of_run = Recipe.parse(recipe.model_dump(mode="json"))
    index.write_text("[}")
    assert of_run.override("seed=1").generation == recipe.generation


# Encoding.


def test_captions_are_encoded_alike_alone_and_in_a_batch(twin: Twin) -> None:
    together = twin.live.encode_text(CAPTIONS)
    for place, caption in enumerate(CAPTIONS):
        for name, alone in twin.live.encode_text([caption]).items():
            torch.testing.assert_close(together[name][place], alone[0], rtol=1e-4, atol=1e-5)
    embeddings = together["encoder_hidden_states"]
    assert not torch.allclose(embeddings[0], embeddings[1])


def test_tokens_are_counted_as_the_text_encoder_sees_them(twin: Twin) -> None:
    limit, live = twin.spec.text_tokens, twin.live
    one, two = live.count_tokens(["a", "a a"])

    def caption(tokens: int) -> str:
        # The tiny tokenizers have a token for each letter, and some one for each space.
        spaces, letters = divmod(tokens - one, two - one)
        return "a" * letters + "a" + " a" * spaces

    whole = caption(limit)
    captions = [caption(limit - 1), whole, f"{whole}a", f"{whole} a a a"]
    assert live.count_tokens(captions)[:3] == [limit - 1, limit, limit + 1]
    note = live.cut_note("captions", dict(zip("abcd", captions, strict=True)))
    assert f"2 of 4 captions are longer than the {limit} tokens" in note
    assert f"The first is 'c', with {limit + 1}" in note
    assert live.cut_note("captions", {"a": captions[1]}) == ""
    text = live.encode_text(captions)
    if twin.spec.text_mask:
        # An image's tokens may stand before the caption's.
        mask = text["encoder_attention_mask"]
        seen = (mask.sum(1) - mask.shape[1] + limit).tolist()
        assert seen == [limit - 1, limit, limit, limit]
    else:
        short, fitting, *cut = text["encoder_hidden_states"]
        assert not torch.allclose(short, fitting)
        # A chat's end is cut off with the rest.
        kept = limit - 1 if twin.kind == "cosmos_25" else limit
        assert all(torch.allclose(fitting[:kept], other[:kept]) for other in cut)


def test_parts_load_alone(twin: Twin) -> None:
    text = twin.spec.load(("text_encoder",), CPU).encode_text(CAPTIONS[:1])
    for name, expected in twin.live.encode_text(CAPTIONS[:1]).items():
        torch.testing.assert_close(text[name], expected)
    moments = twin.spec.load(("vae",), CPU).encode_video(twin.video)
    latents = twin.spec.load(("transformer",), CPU).latents(moments, draw(2))
    torch.testing.assert_close(latents, twin.latents)
    assert twin.spec.fingerprint() == twin.spec.fingerprint()


OTHERWISE = {
    "tiling": True,
    "expert": "low",
    "frame_rate": 8,
    "positions": "causal",
    "guidance": 6.0,
}
"""Another value of each setting that a description may have beside its weights."""


def test_a_models_digest_has_its_weights_and_every_setting_that_is_not_the_default(
    twin: Twin,
) -> None:
    def digest(**changes: Any) -> str:
        spec = plain.model_copy(update=changes)
        return Model(twin.kind, spec, twin.size, Generation(), "auto").digest

    plain = type(twin.spec)(weights=twin.spec.weights)
    assert plain.identity() == plain.fingerprint() | {"transformer": plain.weights_digest()}
    settings = type(plain).model_fields.keys() - {"name", "weights", "prepared_with"}
    if getattr(plain, "parts", ()) == ("transformer",):
        settings -= {"expert"}
    digests = {digest(**{name: OTHERWISE[name]}) for name in settings} | {digest()}
    assert len(digests) == 1 + len(settings)


# The stock pipeline, watched while it samples.


@dataclass
class Watched:
    """The last step of the stock pipeline's sampling of a clip, without guidance, and the latents
    that it ends with, before and after it unscales them."""

    inputs: dict[str, Any]
    output: torch.Tensor
    timestep: torch.Tensor
    sample: torch.Tensor
    final: torch.Tensor
    decoded: torch.Tensor
    scheduler: Any

    def clean(self) -> torch.Tensor:
        """The latents that the stock scheduler takes to lie under the sample's noise."""
        if hasattr(self.scheduler, "alphas_cumprod") and not hasattr(self.scheduler, "sigmas"):
            from diffusers import CogVideoXDDIMScheduler

            plain = CogVideoXDDIMScheduler.from_config(self.scheduler.config)
            plain.set_timesteps(3)
            return plain.step(self.output, self.timestep, self.sample).pred_original_sample
        if hasattr(self.scheduler, "convert_model_output"):
            self.scheduler._step_index -= 1  # It is past the last step by now.
            return self.scheduler.convert_model_output(self.output, sample=self.sample)
        return self.final  # Euler's last step ends without noise.


@pytest.fixture(scope="module")
def watched(twin: Twin) -> Watched:
    if twin.kind in ("cosmos", "ltx2"):
        pytest.skip(f"its pipeline does more than one model's steps: tests/test_{twin.kind}.py")
    return watch(twin, from_image=twin.takes_image)


def watch(twin: Twin, from_image: bool) -> Watched:
    live, settings = twin.live, Generation(**twin.spec.generation)
    settings = settings.changed(steps=3, guidance_scale=1.0, dynamic_guidance=False)
    pipeline = live.pipeline(from_image=from_image)
    pipeline.set_progress_bar_config(disable=True)
    seen: dict[str, Any] = {}

    def watch_transformer(module: Any, args: Any, inputs: dict[str, Any], output: Any) -> None:
        assert not args
        # Kandinsky's pipeline writes into its latents.
        kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        seen.update(inputs=kept, output=output[0])

    real_step, real_decode = pipeline.scheduler.step, pipeline.vae.decode

    def step(output: torch.Tensor, *args: Any, **more: Any) -> Any:
        args = tuple(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)
        answer = real_step(output, *args, **more)
        # CogVideoX's scheduler also takes the step before's prediction and timestep.
        timestep, sample = (args[1], args[3]) if len(args) > 2 else args[:2]
        seen.update(timestep=timestep, sample=sample, final=answer[0])
        return answer

    def decode(latents: torch.Tensor, *args: Any, **more: Any) -> Any:
        seen.update(decoded=latents)
        return real_decode(latents, *args, **more)

    handle = live.transformer.register_forward_hook(watch_transformer, with_kwargs=True)
    pipeline.scheduler.step, pipeline.vae.decode = step, decode
    arguments = live.sampling(twin.size, settings)
    live.guide(settings)
    if from_image:
        arguments["image"] = twin.image
    if from_image and "image_cond_noise_scale" in signature(pipeline.__call__).parameters:
        arguments["image_cond_noise_scale"] = 0.0  # It adds noise to what is shown.
    pipeline(prompt=CAPTIONS[0], generator=draw(3), output_type="np", **arguments)
    handle.remove()
    pipeline.scheduler.step, pipeline.vae.decode = real_step, real_decode
    # The scheduler is at its last step, and another clip would take it on.
    return Watched(**seen, scheduler=deepcopy(pipeline.scheduler))


def as_contract(twin: Twin, sampled: torch.Tensor) -> torch.Tensor:
    """The stock pipeline's latents as (B, F, C, H, W)."""
    frames, channels, height, width = twin.spec.shapes(twin.size).latents
    if twin.kind == "kandinsky5" and sampled.shape[1] != channels:
        return sampled[..., :channels].permute(0, 1, 4, 2, 3)  # It is decoded with channels first.
    if sampled.dim() == 3:  # A sequence of tokens, of one latent each.
        return sampled.unflatten(1, (frames, height, width)).permute(0, 1, 4, 2, 3)
    return sampled if twin.kind == "cogvideox" else sampled.transpose(1, 2)


def timestep_of(twin: Twin, watched: Watched) -> torch.Tensor:
    """Ours, in which 1000 is noise alone."""
    if twin.kind == "cosmos_25":  # Its scheduler rounds, and it tells the transformer exactly.
        return 1000 * watched.inputs["timestep"].flatten()[:1]
    timestep = watched.timestep.reshape(1)
    return 1000 - timestep if twin.kind == "mochi" else timestep


@pytest.fixture(scope="module", autouse=True)
def ftfy() -> Iterator[None]:
    """Some of Wan's pipelines want this package, which leaves our captions as they are."""
    root, names = (
        "diffusers.pipelines",
        ["wan.pipeline_wan_i2v", "skyreels_v2.pipeline_skyreels_v2"],
    )
    with ExitStack() as stack:
        for name in [*names, "skyreels_v2.pipeline_skyreels_v2_i2v"]:
            module = importlib.import_module(f"{root}.{name}")
            fake = Mock(fix_text=lambda text: text)
            stack.enter_context(patch.object(module, "ftfy", fake, create=True))
        yield


def test_inputs_are_those_of_the_stock_pipeline(twin: Twin, watched: Watched) -> None:
    if twin.is_held:
        return  # As those of other models that are shown an image in place are, below.
    noisy = as_contract(twin, watched.sample)
    text = twin.text(CAPTIONS[:1])
    ours = twin.live.inputs(noisy, text, timestep_of(twin, watched))
    if (opening := twin.opening(1, 3)) is not None:
        ours = twin.live.shown(ours, noisy, opening)
    check_inputs(twin, ours, watched)


def check_inputs(twin: Twin, ours: dict[str, Any], watched: Watched) -> None:
    theirs = {
        k: v for k, v in watched.inputs.items() if k not in ("return_dict", "attention_kwargs")
    }
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        value = ours[name]
        if name in twin.spec.raw_text() and expected.shape != value.shape:
            expected = twin.live.transformer.crossattn_proj(expected)
        if isinstance(expected, torch.Tensor) and value.dtype == torch.bool:
            value = value.to(expected.dtype)
        torch.testing.assert_close(value, expected, msg=lambda text, n=name: f"{n}: {text}")


def test_prompts_encoded_before_give_the_stock_pipelines_clip(twin: Twin) -> None:
    settings = Generation(**twin.spec.generation).changed(
        steps=2, guidance_scale=2.0, negative_prompt="Blur." * twin.spec.takes_negative_prompt
    )
    # Not `twin.live`, whose scheduler other tests look at.
    whole = twin.spec.load(WHOLE, CPU)
    pipeline = whole.pipeline()
    whole.guide(settings)
    arguments = whole.sampling(twin.size, settings)
    image = twin.image if twin.takes_image else None
    if image is not None:
        arguments["image"] = image
    stock = pipeline(prompt=CAPTIONS[1], generator=draw(3), output_type="np", **arguments).frames[0]

    coder = twin.spec.load(("text_encoder",), CPU)
    texts = encode_prompts(coder, CAPTIONS[:2], settings, [image, image])
    shown = [] if image is None else [image]
    backbone = twin.spec.load(("transformer", "vae", "image_encoder"), CPU)
    clip = Sampler(backbone, twin.size, settings, texts).sample(CAPTIONS[1], 3, shown)
    assert np.array_equal(clip, (stock * 255.0).round().astype(np.uint8))


MIXED = ["wan-2.2-ti2v", "ltx", "ltx-0.9.5", "cosmos_25", "ltx2.3"]
"""Models that have a text mode, and are shown images in place."""

WATCHED = ["wan-2.2-ti2v", "ltx", "ltx-0.9.5", "hunyuan_video-i2v", "kandinsky5-i2v"]
"""Those shown images in place whose stock pipelines are watched here; tests/test_cosmos.py and
tests/test_ltx2.py watch the others."""

IN_PLACE = [*MIXED, "hunyuan_video-i2v", "kandinsky5-i2v", "cosmos"]


@pytest.mark.parametrize("twin", WATCHED, indirect=True)
def test_what_is_shown_in_place_is_as_in_the_stock_image_pipeline(twin: Twin) -> None:
    """Inputs, predicted latents and loss are."""
    live, watched = twin.live, watch(twin, from_image=True)
    noisy = as_contract(twin, watched.inputs["hidden_states"])
    text, timestep = twin.text(CAPTIONS[:1]), timestep_of(twin, watched)
    generator = draw(3)
    if twin.described.get("positions") == "causal" or twin.kind == "kandinsky5":
        torch.randn(noisy.shape, generator=generator)  # It draws the noise first.
    moments = live.encode_video(twin.video[:1, :1])
    image = live.image(live.encode_image(twin.video[:1]), moments, generator).get("latents")
    if image is None:
        image = live.latents(moments, generator)
    torch.testing.assert_close(image, noisy[:, :1])
    opening = Opening((1,), {"latents": image})
    check_inputs(twin, live.shown(live.inputs(noisy, text, timestep), noisy, opening), watched)

    spread = timestep.item() / 1000
    clean = torch.randn(noisy.shape, generator=draw(4))
    noise = (noisy - (1 - spread) * clean) / spread
    with torch.no_grad():
        denoised = live.denoising_loss(clean, text, noise, timestep, opening)
    expected = as_contract(twin, watched.clean())[:, 1 - noisy.shape[1] :]
    close = (
        {"rtol": 5e-3, "atol": 5e-3}
        if twin.kind in ("wan", "skyreels")
        else {"rtol": 1e-3, "atol": 1e-4}
    )
    torch.testing.assert_close(denoised.clean[:, 1:], expected, **close)
    assert torch.equal(denoised.clean[:, :1], image)
    loss = ((expected - clean[:, 1:]) / spread).square().mean()
    torch.testing.assert_close(denoised.loss, loss[None], rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("twin", IN_PLACE, indirect=True)
def test_no_gradient_reaches_what_is_shown_in_place(twin: Twin) -> None:
    live, latents, text = twin.live, twin.latents[:1], twin.text(CAPTIONS[:1])
    opening = twin.opening(1, 3) or Opening((1,))
    noise, timestep = torch.randn(latents.shape, generator=draw(5)), torch.tensor([500])
    real, predicted = live.velocity, []

    def velocity(*given: Any) -> torch.Tensor:
        predicted.append(real(*given).detach().requires_grad_())
        return predicted[0]

    with patch.object(live, "velocity", velocity):
        denoised = live.denoising_loss(latents, text, noise, timestep, opening)
    (denoised.loss.sum() + denoised.clean.sum()).backward()
    gradient = predicted[0].grad
    assert gradient is not None and not gradient[:, 0].any() and gradient[:, 1:].all()
    assert torch.equal(denoised.clean[:, 0], opening.held(latents)[:, 0])


@pytest.mark.parametrize("twin", MIXED, indirect=True)
def test_clips_that_are_shown_nothing_are_as_in_text_mode(twin: Twin) -> None:
    live, latents, text = twin.live, twin.latents, twin.live.encode_text(CAPTIONS[:2])
    noise, timestep = torch.randn(latents.shape, generator=draw(5)), torch.tensor([300.0, 700.0])
    with torch.no_grad():
        plain = live.denoising_loss(latents, text, noise, timestep)
        nothing = live.denoising_loss(latents, text, noise, timestep, Opening((0, 0)))
        mixed = live.denoising_loss(latents, text, noise, timestep, Opening((0, 1)))
    torch.testing.assert_close(nothing.loss, plain.loss)
    torch.testing.assert_close(mixed.loss[0], plain.loss[0])
    assert not torch.allclose(mixed.clean[1, 1:], plain.clean[1, 1:])


def test_the_loss_is_that_of_the_stock_scheduler(twin: Twin, watched: Watched) -> None:
    """Clean latents and noise are chosen so that they mix to the sample that the pipeline had."""
    if twin.is_held:
        return  # As that of other models that are shown an image in place is, above.
    live, noisy = twin.live, as_contract(twin, watched.sample)
    timestep = timestep_of(twin, watched)
    clean = torch.randn(noisy.shape, generator=draw(4))
    if twin.kind == "cogvideox":
        a = live.scheduler.alphas_cumprod[timestep].float()
        signal, spread = a.sqrt().item(), (1 - a).sqrt().item()
    else:
        spread = timestep.item() / 1000
        signal = 1 - spread
    noise = (noisy - signal * clean) / spread
    with torch.no_grad():
        denoised = live.denoising_loss(
            clean, twin.text(CAPTIONS[:1]), noise, timestep, twin.opening(1, 3)
        )
    expected = as_contract(twin, watched.clean())
    # Wan's pipeline rounds timesteps, so its noise level is not quite ours.
    close = (
        {"rtol": 5e-3, "atol": 5e-3}
        if twin.kind in ("wan", "skyreels")
        else {"rtol": 1e-3, "atol": 1e-4}
    )
    torch.testing.assert_close(denoised.clean, expected, **close)
    loss = ((expected - clean) / spread).square().mean()
    torch.testing.assert_close(denoised.loss, loss[None], rtol=2e-2, atol=1e-4)
    assert denoised.sigma.tolist() == pytest.approx([spread], rel=1e-4)


def test_latents_are_scaled_as_the_stock_pipeline_unscales_them(
    twin: Twin, watched: Watched
) -> None:
    moments = torch.cat([watched.decoded, torch.full_like(watched.decoded, -30.0)], dim=1)
    ours = twin.live.latents(moments, draw(0))
    expected = as_contract(twin, watched.final)
    # What CogVideoX 1.5 has in front for the sake of even tokens is not decoded.
    frames = min(watched.decoded.shape[2], expected.shape[1])
    if twin.kind == "kandinsky5" and twin.is_held:
        frames -= 3  # The first four are brought to the statistics of the rest to decode.
    torch.testing.assert_close(ours[:, -frames:], expected[:, -frames:], rtol=1e-3, atol=1e-4)


# Training.


def denoise(live: Any, latents: torch.Tensor, text: Any) -> Any:
    noise = torch.randn(latents.shape, generator=draw(5))
    timestep = live.sample_timesteps(latents, draw(6))
    return live.denoising_loss(latents, text, noise, timestep)


def test_a_relation_loss_reaches_the_tapped_block_and_none_after_it(twin: Twin) -> None:
    live = twin.live
    transformer = live.transformer.train().requires_grad_(True)
    with tap(live.block(2)) as tapped:
        denoised = denoise(live, twin.latents, live.encode_text(CAPTIONS[:2]))
        grid = live.grid(tapped.take(), twin.latents)
    assert denoised.loss.shape == denoised.sigma.shape == (2,)
    assert denoised.clean.shape == twin.latents.shape
    teacher = TokenGrid(torch.randn(grid.tokens.shape, generator=draw(7)), grid.start, grid.stride)
    Relation(margin=0.0)(grid, teacher).backward()
    reached = [any(p.grad is not None for p in live.block(n).parameters()) for n in (1, 2, 3)]
    strength = sum(p.grad.abs().sum() for p in live.block(2).parameters() if p.grad is not None)
    transformer.zero_grad()
    transformer.eval().requires_grad_(False)
    assert reached == [True, True, False]
    assert strength > 0


def test_weights_without_a_gradient_are_those_that_the_family_names(twin: Twin) -> None:
    live = twin.spec.load(("transformer",), CPU)
    twin.spec.add_lora(live.transformer, Lora(rank=2, alpha=4))
    live.transformer.train().requires_grad_(True)
    latents, text, opening = twin.latents[:1], twin.text(CAPTIONS[:1]), twin.opening(1, 3)
    noise, timestep = torch.randn(latents.shape), live.sample_timesteps(latents, draw(6))
    live.denoising_loss(latents, text, noise, timestep, opening).loss.mean().backward()
    weights = dict(live.transformer.named_parameters())
    idle = {name for name in weights if any(part in name for part in twin.spec.idle)}
    assert idle == {name for name, weight in weights.items() if weight.grad is None}


def test_adapters_go_where_the_backbone_wants_them(twin: Twin) -> None:
    lora = Lora(rank=2, alpha=4)
    transformer = twin.spec.load(("transformer",), CPU).transformer
    twin.spec.add_lora(transformer, lora)
    names = [name for name, p in transformer.named_parameters() if p.requires_grad]
    count = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    assert count == twin.spec.lora_parameters(lora)
    for target in twin.spec.lora_targets:
        assert any(f".{target}.lora_A" in name for name in names), target
    layers = {name.partition(".lora_")[0] for name in names}
    if twin.kind in ("hunyuan_video", "hunyuan_video_15", "mochi", "skyreels"):
        with pytest.raises(UserError, match="does not know ComfyUI's names"):
            comfyui_names(twin.spec.transformer_class, layers)
    else:
        assert comfyui_names(twin.spec.transformer_class, layers).keys() == layers
    with pytest.raises(UserError, match=r"train\.lora\.targets"):
        twin.spec.lora_parameters(Lora(targets=("nowhere",)))


@pytest.fixture
def recipe(twin: Twin, twins: dict[str, Path], tmp_path: Path) -> Recipe:
    size = twin.size
    clips = write_clips(tmp_path / "clips", count=2, size=size.height, frames=size.frames)
    values = yaml.safe_load(
        f"""
        name: tiny
        encoder: {{name: videomae, weights: "{twins["teacher"]}", frames: 8, height: 16, width: 16}}
        align: {{block: 2, hidden: 16}}
        data: {{manifest: "{clips}", cache: "{tmp_path / "cache"}", prepare_batch: 2}}
        optim: {{steps: 2, batch_size: 2, learning_rate: 0.01, warmup_steps: 0}}
        train: {{caption_dropout: 0.3}}
        generation: {{steps: 2}}
        validation: {{every: 2, prompts: [A ball falls.]}}
        """
    )
    values["data"] |= size.model_dump()
    values["backbone"] = twin.spec.model_dump()
    if twin.kind == "kandinsky5":
        values["optim"] |= {"batch_size": 1, "accumulate": 2}
    if twin.takes_image:
        del values["validation"]  # Its prompts have no images.
    return Recipe.parse(values)


def test_inspect_says_what_each_model_is_shown_and_what_is_compared(
    twin: Twin, recipe: Recipe, monkeypatch
) -> None:
    conditioning = twin.spec.conditioning()
    own = recipe.override("align.target=3", "encoder=null", "data.condition={}")
    if conditioning is None:
        with pytest.raises(UserError, match="takes text alone"):
            inspect(own)
        return
    free = Cost(CPU, torch.float32, {"weights": 1}, loading=0, validation=0, operations=1.0)
    monkeypatch.setattr(Inspection, "cost", free)
    text = str(inspect(own))
    trained = conditioning.trained
    assert trained.latents and trained.probability is not None
    shown = "the first 1 latent (frame 0), " if trained.latents == (1,) else "the first 1 or 2 lat"
    place = {"in place": "in place of noisy ones, without a loss", "by channels": "in channels"}
    assert f"  shown            {shown}" in text and place[conditioning.place] in text
    drawn = "batches" if conditioning.is_alike else "samples"
    assert f"; in {100 * trained.probability:g} % of {drawn}" in text
    assert ("taken away again" in text) == bool(trained.dropout)
    *_, left_out = text.partition("left out, by how many latents are shown\n")
    rows = dict(line.split(maxsplit=1) for line in left_out.split("\n\n")[0].splitlines())
    seen = set(map(str, trained.latents)) | ({"0"} if possible(trained)[0] == 0 else set())
    assert rows.keys() == seen
    assert all(("tokens are compared" in row) == (n != "0") for n, row in rows.items())


@pytest.mark.parametrize("twin", ["skyreels"], indirect=True)
def test_weights_for_diffusion_forcing_are_refused(twin: Twin, tmp_path: Path) -> None:
    shutil.copytree(twin.folder, tmp_path / "model")
    path = tmp_path / "model" / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inject_sample_info": True}))
    spec = twin.spec.model_copy(update={"weights": str(tmp_path / "model")})
    with pytest.raises(UserError, match="as weights for diffusion forcing are"):
        spec.shapes(twin.size)


@pytest.mark.parametrize("twin", ["cosmos_25"], indirect=True)
def test_a_model_that_comfyui_cannot_load_gets_no_lora_for_it(recipe: Recipe) -> None:
    module = importlib.import_module("videorepa.export")
    with pytest.raises(UserError, match="ComfyUI's own class of the model lacks layers"):
        module._check_kind(recipe.override("train.lora={rank: 2, alpha: 2}"), "comfyui", False)


def size_of(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.slow
def test_what_training_takes_is_predicted_from_configuration_alone(
    twin: Twin, recipe: Recipe, monkeypatch
) -> None:
    lora = recipe.override("train.lora={rank: 2, alpha: 4}", "memory.frozen=bfloat16")
    plain, held = size_of(twin.live.transformer), size_of(Student(lora, CPU).transformer)

    def refused(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Backbone, "whole", refused)
    meta = lora.backbone.load(("transformer",), torch.device("meta")).transformer
    assert size_of(meta) == plain and all(parameter.is_meta for parameter in meta.parameters())
    cost = predict(lora, CPU)
    assert cost.parts["weights"] == held
    assert cost.parts["activations"] > 0 and cost.operations > 0


@pytest.mark.slow
@pytest.mark.parametrize("changes", [(), ("memory.gradient_checkpointing=true",)])
def test_like_blocks_are_predicted_exactly(
    recipe: Recipe, tmp_path: Path, monkeypatch, changes: tuple[str, ...]
) -> None:
    if recipe.backbone.name == "ltx2":
        pytest.skip("all blocks run, since sound gets no gradient")
    deep = deepened(recipe, tmp_path / "deep", blocks=9)
    check_shortcut(deep.override(*changes), CPU, monkeypatch)


class Ones(TorchDispatchMode):
    """Reads 1 from tensors without content: schedulers ask for their timesteps."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        return func(*args, **(kwargs or {}))


def sampled_on_a_gpu(
    spec: BackboneSpec, size: ClipSize, offload: Offload, is_training: bool
) -> list[set[str]]:
    """Where the transformer and the autoencoder are while a clip is decoded, and the autoencoder
    afterwards."""
    gpu, seen = torch.device("cuda", 0), []
    settings = Generation(**spec.generation).changed(steps=2)

    def whole(self: Backbone, stock_class: str, part: str, dtype: torch.dtype) -> Any:
        model = getattr(diffusers, stock_class)
        model = model.from_config(model.load_config(Path(spec.source) / part))
        return model.to(dtype).to(self.home).eval().requires_grad_(False)

    def places(module: torch.nn.Module) -> set[str]:
        return {parameter.device.type for parameter in module.parameters()}

    with (
        patch.object(Backbone, "whole", whole),
        patch.object(torch.nn.Module, "_apply", replacing),
        FakeTensorMode(allow_non_fake_inputs=True),
        Ones(),
    ):
        one = {
            name: torch.empty(
                1, *like.shape, dtype=torch.bfloat16 if like.is_floating_point() else None
            )
            for name, like in spec.text().items()
        }
        home = gpu if offload == "none" and not is_training else CPU
        backbone = spec.load(("transformer", "vae"), home, torch.bfloat16)
        backbone.device = gpu
        trained = backbone.transformer.to(gpu, torch.float32) if is_training else None
        texts = {prompt: one for prompt in ("a", settings.negative_prompt)}
        sampler = Sampler(backbone, size, settings, texts, trained, offload)

        def decoded(video: torch.Tensor, output_type: str) -> list[np.ndarray]:
            assert video.device == gpu
            seen.extend([places(backbone.transformer), places(backbone.vae)])
            return [np.zeros((1, 8, 8, 3))]

        sampler.pipeline.video_processor.postprocess_video = decoded
        sampler.sample("a", 0)
        return [*seen, places(backbone.vae)]


@pytest.mark.slow
@pytest.mark.parametrize("twin", ["hunyuan_video", "cogvideox", "wan-2.1"], indirect=True)
def test_sampling_has_each_part_on_the_gpu_when_it_runs(twin: Twin, fake_cuda) -> None:
    """Of the others, the stock pipelines ask for the content of tensors."""
    cpu, gpu = {"cpu"}, {"cuda"}
    sampled = partial(fake_cuda, sampled_on_a_gpu, twin.spec, twin.size)
    assert sampled("none", False) == [gpu, gpu, gpu]
    assert sampled("model", False) == [cpu, gpu, cpu]
    assert sampled("group", True) == [gpu, gpu, cpu], "as validation does"


@pytest.mark.parametrize("frozen", ["bfloat16", pytest.param("float8", marks=pytest.mark.slow)])
def test_validation_computes_as_a_training_in_bfloat16(
    twin: Twin, recipe: Recipe, tmp_path: Path, monkeypatch, frozen: str
) -> None:
    if recipe.validation is None:
        pytest.skip("the model has no text mode")
    monkeypatch.setattr("videorepa.system.device.has_fast_bfloat16", lambda device: True)
    loaded: dict[str, torch.dtype] = {}
    real = Backbone.whole

    def whole(self: Backbone, stock_class: str, part: str, dtype: torch.dtype) -> Any:
        loaded[part] = dtype
        return real(self, stock_class, part, dtype)

    monkeypatch.setattr(Backbone, "whole", whole)
    own = recipe.override("train.lora={rank: 2, alpha: 4}", f"memory.frozen={frozen}")
    workers, run = Alone(CPU), Run(tmp_path / "run")
    texts = encoded_prompts(own, workers)
    student = Student(own, CPU)
    outputs = []
    student.backbone.block(2).register_forward_hook(lambda *given: outputs.append(given[-1]))
    validation(own, run, student, workers, texts, resumed=False)
    assert run.sample_path(0, 0).exists()
    assert {out.dtype for o in outputs for out in (o if isinstance(o, tuple) else (o,))} == {
        torch.bfloat16
    }
    is_wans = twin.spec.vae_class == "AutoencoderKLWan"
    assert loaded.pop("vae") == (torch.float32 if is_wans else torch.bfloat16)
    assert set(loaded.values()) == {torch.bfloat16}
    assert not student.backbone.transformer._forward_pre_hooks


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["lora", "all"])
def test_from_clips_to_an_export(
    twin: Twin, recipe: Recipe, tmp_path: Path, monkeypatch, whole: bool
) -> None:
    """Prepare, train, export, generate: as a user would. Models with both modes are trained from
    text with adapters, and from images without."""
    if twin.kind == "ltx2":  # Its many kinds of guidance make much of bfloat16's roundings.
        recipe = recipe.override("train.precision=float32")
    image = None
    if twin.takes_image or (whole and twin.spec.conditioning() is not None):
        twin.image.save(image := tmp_path / "first-frame.png")
        images = "{" + f"every: 2, prompts: [A ball falls.], images: ['{image}']" + "}"
        recipe = recipe.override("data.condition={}", f"validation={images}")
    assert prepare(recipe).made == 2
    item = open_source(recipe.data).items[0]
    _, text = Cache(recipe).read_clip(item)
    own_text = twin.live.encode_text([item.caption])
    if twin.spec.text_sees_image:
        first = to_video(open_source(recipe.data).sample(0).frames[:1])
        own_text = twin.live.encode_text_of([item.caption], first)
    for name, expected in own_text.items():
        stored = text[name].to(expected.dtype)
        torch.testing.assert_close(stored, expected[0], rtol=2e-2, atol=2e-2)

    monkeypatch.setattr(
        importlib.import_module("videorepa.exchange.stock"), "subprocess", InProcess
    )
    own = recipe.override("memory.gradient_checkpointing=true")
    if not whole:
        own = own.override("train.lora={rank: 2, alpha: 4}")
    run = train(own, tmp_path / "run")
    rows = [json.loads(line) for line in run.log_path.read_text().splitlines()]
    assert all(row["grad_align"] > 0 and row["denoise"] > 0 for row in rows)
    # The base model's clip, and the one of step 2.
    assert len(list(run.samples.rglob("*.mp4"))) == 2
    product = export(run.path, tmp_path / "out")
    if not whole:
        stock = type(twin.live.transformer).from_pretrained(twin.folder, subfolder=twin.live.part)
        stock.load_lora_adapter(product.parent, weight_name=product.name, use_safetensors=True)
        assert [adapter.lora_alpha for adapter in stock.peft_config.values()] == [2]
    if image is not None:
        shutil.copy(image, product.parent)
    module, made = importlib.import_module("videorepa.generate"), []

    def keep(path: Path, frames: Any, fps: float) -> None:
        made.append(frames)
        path.touch()

    monkeypatch.setattr(module, "write_video", keep)
    prompt = Prompt("a", "A ball falls.", image=image)
    clips = generate(run.path, [prompt], tmp_path / "generated")
    about = json.loads(clips[0].with_suffix(".json").read_text())
    expected = Generation(**twin.spec.published_generation() | {"steps": 2}).model_dump()
    assert {key: about[key] for key in expected} == expected
    for name in ("pipeline_cosmos2_video2world", "pipeline_cosmos2_5_predict"):
        pipelines = importlib.import_module(f"diffusers.pipelines.cosmos.{name}")
        monkeypatch.setattr(pipelines, "CosmosSafetyChecker", NoGuardrail)
    frames = sampled_by_card(product.parent, clips[0].with_suffix(".json"), monkeypatch)["frames"]
    # The guardrail's part of 2.5's pipeline rounds down, so that a last digit makes a level.
    assert abs(made[0] - frames * 255.0).max() < (1.5 if twin.kind == "cosmos_25" else 1)


def test_an_export_is_compared_on_a_small_clip(twin: Twin, recipe: Recipe) -> None:
    size = twin.spec.default_size()
    published = recipe.override(
        *(f"data.{name}={value}" for name, value in size.model_dump().items())
    )
    arguments = inputs(twin.live, published)
    watched = []
    hook = twin.live.block(1).register_forward_hook(lambda *given: watched.append(given[-1]))
    output(twin.live.transformer, arguments)
    hook.remove()
    tokens = watched[0][0] if isinstance(watched[0], tuple) else watched[0]
    text = arguments["encoder_hidden_states"].shape[1]
    # Two in time, two down and two across; learned positions allow no clip but their own.
    least = 8 if twin.spec.least_size() != size else 12
    assert tokens.shape[1] in (least, least + text)


class InProcess:
    """Runs the check of an export here rather than in a clean process, which takes seconds."""

    @staticmethod
    def run(command: list[Any], **options: Any) -> subprocess.CompletedProcess:
        _, _, code, *arguments = command
        own, sys.argv = sys.argv, ["-c", *map(str, arguments)]
        try:
            exec(code.replace('assert "videorepa" not in sys.modules', ""), {})
        finally:
            sys.argv = own
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [(), ("train.lora={rank: 2, alpha: 4}",)], ids=["all", "lora"])
def test_an_export_loads_in_a_process_that_has_only_diffusers(
    twin: Twin, recipe: Recipe, tmp_path: Path, monkeypatch, changes: tuple[str, ...]
) -> None:
    own = recipe.override(*changes)
    prepare(own)
    if twin.kind in ("cosmos", "cosmos_25") and importlib.util.find_spec("torchvision") is None:
        # A clean process would need it.
        stock = importlib.import_module("videorepa.exchange.stock")
        monkeypatch.setattr(stock, "subprocess", InProcess)
    export(train(own, tmp_path / "run").path, tmp_path / "out")


def test_dynamic_guidance_is_cogvideox_s_alone(twin: Twin, recipe: Recipe) -> None:
    assert recipe.generation.dynamic_guidance == (twin.kind == "cogvideox")
    asked = recipe.override("generation.dynamic_guidance=true")
    if twin.kind == "cogvideox":
        inspect(asked)
        assert twin.live.sampling(twin.size, asked.generation)["use_dynamic_cfg"]
    else:
        for refused in (inspect, lambda r: twin.live.sampling(twin.size, r.generation)):
            with pytest.raises(UserError, match="dynamic_guidance"):
                refused(asked)


def test_a_card_asks_the_stock_pipeline_for_what_it_takes(twin: Twin, recipe: Recipe) -> None:
    import diffusers

    for product in (LORA_FILE, twin.spec.part):
        code = usage(recipe, product, twin.spec.part)
        compile(code, "card", "exec")
        imports = next(line for line in code.splitlines() if line.startswith("from diffusers"))
        exec(imports, {})
        assert (f"from_pretrained({json.dumps(product)}" in code) == (product != LORA_FILE)
    takes = signature(getattr(diffusers, twin.spec.stock_pipeline).__call__).parameters
    arguments = twin.live.sampling(twin.size, recipe.generation)
    assert arguments.keys() <= takes.keys()
    guidance = recipe.generation.guidance_scale
    assert f"guidance_scale={guidance}" in code


def test_the_authors_negative_prompts_are_used_and_refused_where_there_is_no_pass_for_them(
    twin: Twin, recipe: Recipe
) -> None:
    own = recipe.generation.negative_prompt
    assert bool(own) == (twin.kind in ("wan", "ltx", "kandinsky5", "cosmos", "cosmos_25"))
    assert twin.live.sampling(twin.size, recipe.generation).get("negative_prompt", "") == own
    asked = recipe.override("generation.negative_prompt=blurry")
    if not twin.spec.takes_negative_prompt:
        with pytest.raises(UserError, match="no second pass"):
            inspect(asked)
    else:
        assert twin.live.sampling(twin.size, asked.generation)["negative_prompt"] == "blurry"


# Wan's experts.


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BackboneSpec]:
    folder = TWINS["wan-2.2"][1](tmp_path_factory.mktemp("experts") / "wan")
    described = plugins.description("backbones", "wan")
    return {expert: described(weights=str(folder), expert=expert) for expert in ("high", "low")}


def test_each_expert_trains_on_its_side_of_the_boundary(experts) -> None:
    for expert, spec in experts.items():
        live = spec.load(("transformer",), CPU)
        drawn = live.sample_timesteps(torch.zeros(500, 1, 1, 1, 1), draw(0))
        assert (drawn >= 875).all() if expert == "high" else (drawn < 875).all()
        assert drawn.std() > 10
    assert experts["high"].fingerprint() == experts["low"].fingerprint(), "they share a cache"
    with pytest.raises(UserError, match="one transformer"):
        weights = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
        type(experts["low"])(weights=weights, expert="low").shapes(ClipSize(frames=81))


def test_the_card_of_an_expert_s_lora_says_which_model_it_is_for(experts) -> None:
    for expert, part in (("high", "transformer"), ("low", "transformer_2")):
        spec = experts[expert]
        assert (spec.expert_name, spec.part) == (f"{expert}-noise expert", part)
        for product in (COMFYUI_FILE, LORA_FILE):
            said = model_card._in_the_folder(product, spec.part, spec.expert_name)
            assert f"of the {expert}-noise expert (`{part}` in diffusers)" in said
            wants_part = product == LORA_FILE and expert == "low"
            assert ("`load_into_transformer_2=True`" in said) == wants_part


def test_sampling_takes_the_trained_expert_and_the_other_as_published(experts) -> None:
    from diffusers import WanPipeline

    stock = WanPipeline.from_pretrained(experts["low"].source)
    for expert, own, other in (
        ("high", "transformer", "transformer_2"),
        ("low", "transformer_2", "transformer"),
    ):
        live = experts[expert].load(("transformer", "vae", "text_encoder"), CPU)
        pipeline = live.pipeline()
        assert getattr(pipeline, own) is live.transformer
        assert live.part == own
        for name in (own, other):
            theirs = getattr(stock, name).state_dict()
            ours = getattr(pipeline, name).state_dict()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        trained = torch.nn.Identity()
        helper = experts[expert].load(("vae", "text_encoder"), CPU)
        sampler = helper.pipeline(trained)
        assert getattr(sampler, own) is trained
        assert getattr(sampler, other) is not None


def test_a_number_in_quotes_is_refused_when_the_model_loads(twin: Twin, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(twin.spec.folder(), folder)
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    key = next(k for k, v in config.items() if type(v) is float)
    path.write_text(json.dumps(config | {key: str(config[key])}))
    spec = twin.spec.model_copy(update={"weights": str(folder)})
    with pytest.raises(UserError, match=f"{key} is '.*', which is text; expected a number"):
        spec.load(("vae",), CPU)
