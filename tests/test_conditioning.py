"""Models that are shown the opening of a clip: what is shown, denoised, compared and cached."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from conftest import recipe_values, write_clips
from twins import TWINS
from videorepa.align.contract import check
from videorepa.align.taps import tap
from videorepa.align.terms import Grids, Term
from videorepa.artifacts.model import Model
from videorepa.artifacts.run import Run
from videorepa.backbones import timestep_of_noise
from videorepa.backbones._sampler import Sampler, encode_prompts, told
from videorepa.conditioning import Conditioning, Opening, draw_latents_shown, possible
from videorepa.data.cache import Cache
from videorepa.data.image import read_image
from videorepa.data.loader import Loader, PreparedClips
from videorepa.data.manifest import Prompt, read_prompts
from videorepa.data.source import open_source
from videorepa.data.video import to_video, write_video
from videorepa.diffusion import FlowMatching, VPrediction
from videorepa.errors import ClipError, UserError
from videorepa.evaluation.likelihood import Denoising
from videorepa.generate import generate
from videorepa.inspect import inspect
from videorepa.likelihood import likelihood
from videorepa.prepare import prepare
from videorepa.probing.blocks import Blocks, encode
from videorepa.probing.clips import first_readable_clips
from videorepa.recipe import Align, Recipe
from videorepa.scan import scan
from videorepa.settings import plugins
from videorepa.settings.sections import ClipSize, Continuation, Generation
from videorepa.system.randomness import generator
from videorepa.tokens import TokenGrid
from videorepa.train import train
from videorepa.training.parallel import Alone
from videorepa.training.plausibility import encoded_pairs
from videorepa.training.student import Student

CPU = torch.device("cpu")
WHOLE = ("transformer", "vae", "text_encoder", "image_encoder")


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


# What is shown.


def test_an_opening_is_the_first_latents_and_the_frames_that_they_cover() -> None:
    opening = Opening((0, 1, 2))
    shown = opening.mask(torch.zeros(3, 4, 2, 1, 1)).flatten(1)
    assert shown.tolist() == [[False] * 4, [True] + [False] * 3, [True] * 2 + [False] * 2]
    assert opening.frames(4) == [0, 1, 5] and opening.frames(8) == [0, 1, 9]


def test_shares_of_what_is_shown_are_those_that_were_asked_for() -> None:
    asked = Continuation(latents=(1, 2), probability=0.5, dropout=0.2)
    counts = [draw_latents_shown(asked, generator(0, n)) for n in range(4000)]
    shares = [counts.count(n) / len(counts) for n in range(3)]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.03)
    assert possible(asked) == [0, 1, 2] and possible(None) == [0]
    always = Continuation(latents=(1,), probability=1.0, dropout=0.0)
    assert possible(always) == [1]
    assert {draw_latents_shown(always, generator(0, n)) for n in range(50)} == {1}


TRAINED = Continuation(latents=(1,), probability=0.3, dropout=0.0)


def test_what_a_recipe_leaves_out_is_as_the_authors_train_it() -> None:
    optional = Conditioning("in place", TRAINED, most=2)
    assert optional.completed(None, "m") is None
    assert optional.completed(Continuation(), "m") == TRAINED
    asked = Continuation.model_validate({"latents": 2})
    assert optional.completed(asked, "m") == TRAINED.model_copy(update={"latents": (2,)})
    required = Conditioning("by channels", TRAINED, is_required=True)
    assert required.completed(None, "m") == TRAINED


@pytest.mark.parametrize(
    ("more", "asked", "message"),
    [
        ({}, {"latents": 2}, "at most 1"),
        ({}, {"dropout": 0.1}, "a lower `probability`"),
        ({"is_required": True}, {"probability": 0.5}, "no text mode"),
        ({"is_required": True, "has_blank": True}, {"probability": 0.5}, "`dropout` takes"),
    ],
)
def test_what_a_model_is_not_made_for_is_refused(more: dict, asked: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Conditioning("in place", TRAINED, **more).completed(Continuation(**asked), "m")


# Denoising.


@pytest.mark.parametrize("kind", ["flow", "v"])
def test_latents_shown_in_place_have_no_loss_and_no_gradient(kind: str) -> None:
    diffusion: Any = FlowMatching()
    if kind == "v":
        diffusion = VPrediction(torch.linspace(0.999, 0.01, 1000))
    clean, noise, velocity = (drawn(2, 3, 2, 2, 2, seed=n) for n in range(3))
    held = Opening((1, 0)).mask(clean)
    timestep = torch.tensor([500, 500])
    plain = diffusion.denoised(velocity, clean, noise, timestep)
    velocity.requires_grad_()
    denoised = diffusion.denoised(velocity, clean, noise, timestep, held)
    rest = diffusion.denoised(velocity[:1, 1:], clean[:1, 1:], noise[:1, 1:], timestep[:1])
    torch.testing.assert_close(denoised.loss[0], rest.loss[0])
    torch.testing.assert_close(denoised.loss[1], plain.loss[1])
    assert torch.equal(denoised.clean[0, 0], clean[0, 0])
    assert torch.equal(denoised.clean[1], plain.clean[1])
    (denoised.loss.sum() + denoised.clean.sum()).backward()
    assert velocity.grad is not None and not velocity.grad[0, 0].any()
    assert velocity.grad[0, 1:].all() and velocity.grad[1].all()


# Alignment.

LOSSES = [
    {"name": "relation", "margin": 0.0},
    {"name": "cosine"},
    {"name": "crepa"},
    {"name": "relation_l2"},
    {"name": "relation_correlation"},
    {"name": "sara"},
]


def compared(align: dict, student: TokenGrid, target: TokenGrid) -> Term:
    from videorepa.align.resampling import common_grid

    torch.manual_seed(0)
    described = Align.model_validate({"block": 1, "hidden": 8, "projector": "none"} | align)
    common = common_grid(student.on_meta(), target.on_meta(), described.interpolate)
    return Term(described, Grids(student, target, common))


def pair(clips: int = 3) -> tuple[TokenGrid, TokenGrid]:
    """A student whose first step is the first frame, and a teacher that saw all frames."""
    student = TokenGrid(drawn(clips, 4, 2, 2, 6, seed=1), start=-3, stride=4)
    return student, TokenGrid(drawn(clips, 13, 2, 2, 6, seed=2))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss["name"])
@pytest.mark.parametrize("interpolate", ["student", "teacher"])
def test_tokens_that_were_shown_are_compared_with_none(loss: dict, interpolate: str) -> None:
    student, target = pair()
    term = compared({"loss": loss, "interpolate": interpolate}, student, target)
    sigma, shown = torch.full((3,), 0.5), [1, 1, 1]
    tokens = student.tokens.clone().requires_grad_()
    loss_, similarity = term(student.with_tokens(tokens), target, sigma, shown)
    loss_.backward()
    assert tokens.grad is not None and not tokens.grad[:, 0].any() and tokens.grad[:, 1:].any()
    changed = tokens.detach().clone()
    changed[:, 0] = 9.0
    others = term(student.with_tokens(changed), target, sigma, shown)
    assert torch.equal(others[0], loss_) and torch.equal(others[1], similarity)


def test_each_clip_keeps_what_it_was_not_shown() -> None:
    """The batch's loss is the mean over clips of what each would have alone."""
    student, target = pair()
    term = compared({"interpolate": "teacher", "when": {"gate": "signal"}}, student, target)
    sigma, shown = torch.tensor([0.2, 0.5, 0.8]), [0, 5, 1]
    together = term(student, target, sigma, shown)
    alone = [
        term(student.sample(n), target.sample(n), sigma[n : n + 1], shown[n : n + 1])
        for n in range(3)
    ]
    for value, each in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(value, torch.stack(each).mean())
    rest = student.since(5), target.since(1)
    cut = compared({"interpolate": "teacher", "when": {"gate": "signal"}}, *rest)
    torch.testing.assert_close(
        alone[1][0], cut(rest[0].sample(1), rest[1].sample(1), sigma[1:2])[0]
    )


def test_a_student_that_predicts_ahead_is_not_asked_what_it_was_shown() -> None:
    student, target = pair()
    term = compared({"interpolate": "teacher", "ahead": 1}, student, target)
    sides = term.sides(student, target, 1)
    assert [(side.start, side.size[0]) for side in sides] == [(1, 2), (5, 2)]


def test_a_first_frame_that_is_not_compared_anyway_changes_nothing() -> None:
    """VideoREPA's teacher sees frames from 1 on."""
    student, target = pair()
    target = target.since(1)
    term = compared({}, student, target)
    sigma = torch.full((3,), 0.5)
    plain = term(student, target, sigma)
    shown = term(student, target, sigma, [1, 0, 1])
    assert torch.equal(plain[0], shown[0]) and torch.equal(plain[1], shown[1])
    assert [term.left_out(frames) for frames in (0, 1, 5)] == [0, 0, 5]


# A model that continues an image.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes each twin once, when it is first asked for."""
    root = tmp_path_factory.mktemp("conditioned")
    return cache(lambda name: TWINS[name][1](root / name))


@pytest.fixture
def recipe_of(folders: Callable[[str], Path], twins: dict[str, Path], tmp_path: Path):
    def made(name: str) -> Recipe:
        described = {**TWINS[name][0], "weights": str(folders(name))}
        spec = plugins.description("backbones", described["name"])(**described)
        geometry = spec.geometry()
        side, frames = 2 * geometry.pixels * geometry.patch, 1 + 2 * geometry.stride
        clips = write_clips(tmp_path / f"{name}-clips", count=3, size=side, frames=frames)
        values = recipe_values(twins, clips, tmp_path / f"{name}-cache")
        values["backbone"] = described
        values["data"] |= {"frames": frames, "height": side, "width": side}
        values["generation"] |= {"dynamic_guidance": False}
        return Recipe.parse(values)

    return made


@pytest.fixture
def own(recipe_of: Callable[[str], Recipe]) -> Recipe:
    return recipe_of("cogvideox-i2v")


def test_what_conditions_a_model_of_text_alone_is_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="takes text alone"):
        check(recipe.override("data.condition={latents: 1}"))
    for wrong in ("{latents: 0}", "{latents: []}", "{probability: 2}", "{dropout: a}"):
        with pytest.raises(UserError, match=r"data\.condition"):
            recipe.override(f"data.condition={wrong}")


def test_clips_that_are_shown_whole_are_refused(own: Recipe) -> None:
    one = own.data.model_copy(update={"frames": 1})
    with pytest.raises(UserError, match="Set data.frames to 5 or more"):
        own.backbone.continuation(one)


def test_learned_positions_are_of_one_size(own: Recipe) -> None:
    for change in ("data.frames=13", "data.height=32"):
        with pytest.raises(UserError, match="learned positions"):
            check(own.override(change))


def test_a_mean_over_clips_that_are_compared_on_different_frames_is_refused(own: Recipe) -> None:
    changes = ("align.centre=clips", "align.interpolate=teacher", "optim.batch_size=2")
    centred = own.override(*changes, "align.encoder=null", "align.target=3", "encoder=null")
    with pytest.raises(UserError, match="centre: clips"):
        check(centred)
    check(centred.override("data.condition={dropout: 0.0}"))


def test_inspect_says_what_is_shown_and_what_is_compared(own: Recipe) -> None:
    watched = "validation={every: 1, prompts: [A ball falls.], images: [a.png]}"
    text = str(inspect(own.override("align.target=3", "encoder=null", watched), device="cpu"))
    assert "images           1, which their clips continue" in text
    assert "the first 1 latent (frame 0), in channels of their own; in 100 % of samples, " in text
    assert "taken away again from 5 % of these" in text
    assert "0              nothing" in text and "step 0, 8 tokens are compared" in text


def test_text_alone_is_refused_where_an_image_is_expected(own: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="continues one"):
        generate(Path(own.backbone.source), [Prompt("a", "A ball.")], tmp_path / "clips")
    with pytest.raises(UserError, match=r"`validation` shows it none: name one .* `validation\.im"):
        check(own.override("validation={every: 1, prompts: [A ball falls.]}"))


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in paths}


def test_a_cache_of_text_mode_counts_and_gets_the_images_beside_it(
    own: Recipe, folders: Callable[[str], Path]
) -> None:
    text = own.override(f"backbone.weights={folders('cogvideox')}")
    prepare(text)
    before = files(own.data.cache)
    assert not any("images" in name for name in before)
    with pytest.raises(UserError, match="its first frame's own encoding is not there"):
        PreparedClips(own, shown=False)
    assert prepare(own).made == 3
    after = files(own.data.cache)
    assert all(after[name] == content for name, content in before.items() if "digests" not in name)
    new = after.keys() - before.keys()
    assert len(new) == 3 and all(name.startswith("images-") for name in new)
    assert prepare(own).complete == 3 and prepare(text).complete == 3
    one = Cache(own).read_image(PreparedClips(own, shown=False).clips[0])
    assert one["image"].shape == (8, 1, 4, 4) and one["image"].dtype == torch.float16


def test_batches_are_shown_alike_where_a_model_cannot_mix_them(own: Recipe, monkeypatch) -> None:
    own = own.override("optim.batch_size=3", "data.condition={dropout: 0.5}")
    prepare(own)
    live = own.backbone.load(("transformer",), CPU)
    live.conditioning = replace(live.conditioning, is_alike=True)
    loader = Loader(own, PreparedClips(own, shown=False), live, CPU)
    batches = [loader.batch(range(n, n + 3)) for n in range(0, 24, 3)]
    assert {batch.opening.latents for batch in batches if batch.opening} == {(0,) * 3, (1,) * 3}
    one = batches[0]
    assert one.opening is not None
    mixed = replace(one.opening, latents=(0, 1, 1))
    with pytest.raises(UserError, match="shown 0, 1, 1 latents"):
        live.denoising_loss(one.latents, one.text, one.noise, one.timestep, mixed)


def test_an_image_is_encoded_alone_and_not_as_a_part_of_its_clip(own: Recipe) -> None:
    live = own.backbone.load(("vae",), CPU)
    video = torch.rand(2, 9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    alone = live.encode_image(video)["image"]
    torch.testing.assert_close(alone, live.encode_video(video[:, :1]))
    assert not torch.allclose(alone, live.encode_video(video)[:, :, :1], atol=1e-2)
    noisy = live.encode_image(video, [generator(0, n) for n in range(2)])["image"]
    assert not torch.allclose(noisy, alone)
    again = live.encode_image(video[1:], [generator(0, 1)])["image"]
    torch.testing.assert_close(noisy[1:], again)


def test_training_draws_what_text_mode_does_and_what_is_shown_beside_it(
    own: Recipe, folders: Callable[[str], Path]
) -> None:
    own = own.override("optim.batch_size=3", "data.condition={dropout: 0.5}")
    text = own.override("data.condition=null", f"backbone.weights={folders('cogvideox')}")
    prepare(own)
    batches = []
    for recipe in (text, own):
        live = recipe.backbone.load((), CPU)
        loader = Loader(recipe, PreparedClips(recipe, shown=False), live, CPU)
        batches.append([loader.batch(range(n, n + 3)) for n in (0, 3, 6, 9)])
    for plain, shown in zip(*batches, strict=True):
        for name in ("latents", "noise", "timestep"):
            assert torch.equal(getattr(plain, name), getattr(shown, name))
        assert plain.opening is None and shown.opening.image["image"].shape == (3, 1, 4, 4, 4)
    counts = [count for batch in batches[1] for count in batch.opening.latents]
    assert {*counts} == {0, 1}


@pytest.mark.parametrize(
    ("name", "condition"),
    [
        ("cogvideox-i2v", "null"),
        ("cogvideox-1.5-i2v", "{dropout: 0.5}"),
        pytest.param("wan-2.1-i2v", "null", marks=pytest.mark.slow),
        pytest.param("wan-2.2-i2v", "{}", marks=pytest.mark.slow),
        ("wan-2.2-ti2v", "{}"),
        pytest.param("ltx", "{probability: 0.5}", marks=pytest.mark.slow),
        ("ltx-0.9.5", "{latents: [1, 2], probability: 0.8}"),
    ],
)
def test_a_training_from_images_resumes_to_the_last_bit(
    recipe_of: Callable[[str], Recipe], tmp_path: Path, name: str, condition: str
) -> None:
    changes = ("optim.steps=4", "train.checkpoint_every=2", "optim.warmup_steps=0")
    changes += ("align.target=3", "encoder=null", "optim.accumulate=1")
    own = recipe_of(name).override(*changes, f"data.condition={condition}")
    check(own)
    prepare(own)
    whole, part = (train(own, tmp_path / name) for name in ("whole", "part"))
    shutil.rmtree(part.checkpoints / "step-00000004")
    train(own, part.path)
    losses = [
        [(row["denoise"], row["align"]) for row in map(json.loads, run.log_path.open())]
        for run in (whole, part)
    ]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    a, b = whole.trained().trained, part.trained().trained
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["wan-2.1-i2v", "wan-2.2-ti2v", "ltx"])
def test_a_first_latent_that_is_the_images_is_not_encoded_again(
    recipe_of: Callable[[str], Recipe], name: str
) -> None:
    own = recipe_of(name)
    live = own.backbone.load(("vae", "image_encoder"), CPU)
    data = own.data
    draw = torch.Generator().manual_seed(0)
    video = torch.rand(2, data.frames, 3, data.height, data.width, generator=draw)
    whole, alone = live.encode_video(video), live.encode_video(video[:, :1])
    torch.testing.assert_close(whole[:, :, :1], alone, rtol=1e-4, atol=1e-5)
    made, likes = live.encode_image(video), own.backbone.image(data)
    assert {k: v.shape[1:] for k, v in made.items()} == {k: v.shape for k, v in likes.items()}
    assert bool(made) == (name == "wan-2.1-i2v")


def test_what_is_shown_changes_what_the_model_predicts(own: Recipe) -> None:
    live = own.backbone.load(("transformer", "vae", "text_encoder"), CPU)
    latents, noise = drawn(2, 3, 4, 4, 4, seed=1), drawn(2, 3, 4, 4, 4, seed=2)
    text, timestep = live.encode_text(["a", "b"]), torch.tensor([500, 500])

    def clean(counts: tuple[int, ...], seed: int) -> torch.Tensor:
        opening = Opening(counts, {"image": drawn(2, 1, 4, 4, 4, seed=seed)})
        with torch.no_grad():
            return live.denoising_loss(latents, text, noise, timestep, opening).clean

    a, b, blank = clean((1, 0), 3), clean((1, 0), 4), clean((0, 0), 3)
    assert not torch.allclose(a[0], b[0]) and not torch.allclose(a[0], blank[0])
    assert torch.allclose(a[1], b[1]) and torch.allclose(a[1], blank[1])


# Other work that shows a model without a text mode the first frame.


def test_losses_of_a_pair_are_of_what_is_not_shown(own: Recipe) -> None:
    live = own.backbone.load(("transformer", "vae", "text_encoder"), CPU)
    video = torch.rand(1, 9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    opening = live.opening(video, live.encode_video(video))
    assert opening is not None and opening.latents == (1,)
    text, clips = live.encode_text(["a"]), drawn(2, 3, 4, 4, 4, seed=1)
    found = Denoising(live, [0.5], seed=5, batch=2)(clips, text, "a", opening)
    timestep = timestep_of_noise(live, 0.5, clips[0])
    noise = torch.randn(3, 4, 4, 4, generator=generator(5, "likelihood noise", "a", "0.5"))
    for number, clip in enumerate(clips):
        noisy, inputs = live.noised(clip[None], text, noise[None], timestep, opening)
        assert torch.equal(inputs["hidden_states"][:, :1, 4:], opening.image["image"])
        with torch.no_grad():
            v = live.velocity(live.predict(inputs), noisy)
        share = live.diffusion.alphas_cumprod[timestep].float()
        expected = (v - (share.sqrt() * noise - (1 - share).sqrt() * clip))[:, 1:].square().mean()
        assert found.loss[number, 0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_both_latents_of_a_first_token_are_shown() -> None:
    shown = Opening((0, 1)).mask(torch.zeros(2, 4, 1, 1, 1), repeats=1).flatten(1)
    assert shown.tolist() == [[False] * 4, [True, True, False, False]]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A real clip, one that begins like it and one that does not."""
    draw = np.random.default_rng(0)
    real, other, apart = draw.integers(0, 255, (3, 9, 16, 16, 3), "uint8")
    other[0] = real[0]
    for name, frames in (("real", real), ("other", other), ("apart", apart)):
        write_video(tmp_path / f"{name}.mp4", frames, 8)
    (path := tmp_path / "pairs.csv").write_text(
        "real,broken,caption\nreal.mp4,other.mp4,A ball.\nreal.mp4,apart.mp4,A ball.\n"
    )
    return path


def test_a_pair_that_begins_otherwise_is_not_asked_of_a_model_that_is_shown_the_beginning(
    own: Recipe, pairs: Path, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"noise_levels": [0.5], "straw_man": False}
    found = likelihood(own, pairs, tmp_path / "out", **options)["base"]
    assert [row["prompt_id"] for row in found.rows] == ["other.mp4"]
    assert "begins with another frame" in found.failures["apart.mp4", 0]
    assert "it is shown the real clip's first frame for both" in found.summary.about
    text = own.override(f"backbone.weights={folders('cogvideox')}")
    found = likelihood(text, pairs, tmp_path / "text", **options)["base"]
    assert len(found.rows) == 2 and "is shown" not in found.summary.about
    with pytest.raises(UserError, match="LikePhys's code shows it none"):
        likelihood(own, pairs, tmp_path / "published", as_published=True, **options)
    with pytest.raises(UserError, match=r"1 pair of validation\.pairs.*begins with another"):
        encoded_pairs(own.override(f"validation={{every: 1, pairs: {pairs}}}"), Alone(CPU))


@pytest.mark.parametrize("name", ["cogvideox-i2v", "hunyuan_video-i2v"])
def test_blocks_are_measured_as_training_shows_them_clips(
    recipe_of: Callable[[str], Recipe], tmp_path: Path, name: str
) -> None:
    own = recipe_of(name)
    clips, *_ = first_readable_clips(own, 2)
    live = own.backbone.load(WHOLE, CPU)
    encoded = encode(live, clips, 0)
    assert len(encoded.openings) == 2
    timestep = torch.tensor([500])
    measured = torch.cat([g.tokens for _, _, g in Blocks(live, [1]).outputs(encoded, timestep)])
    for number, opening in enumerate(encoded.openings):
        with tap(live.block(1)) as tapped, torch.no_grad():
            one = encoded.latents[number][None], encoded.text[number], encoded.noise[number][None]
            live.denoising_loss(*one, timestep, opening)
            expected = live.grid(tapped.take(), one[0])
        torch.testing.assert_close(measured[number : number + 1], expected.tokens)
    whole = scan(own, tmp_path / "scan", clips=2, noise_levels=[0.5], blocks=[1])
    sources = {each.source for each in whole.measurements}
    assert sources == {"block", "pixels", "untrained", "teacher"}


def test_validation_continues_its_prompts_images(
    own: Recipe, recipe: Recipe, frame: Path, tmp_path: Path, monkeypatch
) -> None:
    given = f"validation={{every: 1, prompts: [A ball falls.], images: [{frame}]}}"
    with pytest.raises(UserError, match="2 images and 1 prompt;"):
        own.override(given.replace("images: [", f"images: [{frame}, "))
    with pytest.raises(UserError, match="takes text alone"):
        check(recipe.override(given))
    asked = own.override(given, "train.precision=float32")
    check(asked)
    made: list[np.ndarray] = []
    module = importlib.import_module("videorepa.training.validation")
    monkeypatch.setattr(module, "write_video", lambda path, frames, fps: made.append(frames))
    monkeypatch.setattr(module, "read_all", lambda path: (made[-1], 8.0))
    student, workers = Student(asked, CPU), Alone(CPU)

    def sampled() -> None:
        texts = module.encoded_prompts(asked, workers)
        module.validation(asked, Run(tmp_path), student, workers, texts, resumed=False)

    sampled()
    ImageOps.invert(Image.open(frame)).save(frame)
    sampled()
    assert not np.array_equal(*made)


# Generation.


@pytest.fixture
def frame(tmp_path: Path) -> Path:
    pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(0))
    path = tmp_path / "frames" / "a.png"
    path.parent.mkdir()
    Image.fromarray(pixels.byte().numpy()).save(path)
    return path


def test_images_come_in_any_form_that_rgb_of_eight_bits_can_hold(frame: Path) -> None:
    plain = Image.open(frame)
    expected = np.asarray(plain)
    assert np.array_equal(np.asarray(read_image(frame, 16, 16)), expected)
    for name, same in {
        "opaque.png": plain.convert("RGBA"),
        "lossless.webp": plain,
        "plain.bmp": plain,
        "plain.tif": plain,
    }.items():
        same.save(path := frame.with_name(name), **({"lossless": True} if "webp" in name else {}))
        assert np.array_equal(np.asarray(read_image(path, 16, 16)), expected), name
    plain.convert("L").save(grey := frame.with_name("grey.png"))
    assert np.asarray(read_image(grey, 16, 16)).shape == (16, 16, 3)
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # To be shown turned by 90 degrees clockwise.
    turned.save(path := frame.with_name("turned.png"), exif=exif)
    assert np.array_equal(np.asarray(read_image(path, 16, 16)), expected)
    plain.resize((32, 32)).save(large := frame.with_name("large.png"))
    assert read_image(large, 16, 16).size == (16, 16)


def test_images_that_cannot_be_shown_are_refused_with_the_reason(frame: Path, monkeypatch) -> None:
    plain = Image.open(frame)

    def saved(name: str, image: Image.Image) -> Path:
        image.save(path := frame.with_name(name))
        return path

    clear = plain.convert("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    sixteen = Image.fromarray(np.zeros((16, 16), np.uint16))
    (cut := frame.with_name("cut.png")).write_bytes(frame.read_bytes()[:100])
    (text := frame.with_name("text.png")).write_text("no image")
    (empty := frame.with_name("empty.png")).touch()
    plain.save(moving := frame.with_name("moving.webp"), save_all=True, append_images=[clear])
    deep = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 40000, np.uint16), format="rgb48be")
    with av.open(colours := frame.with_name("colours.png"), "w", format="image2") as file:
        stream = file.add_stream("png", width=16, height=16, pix_fmt="rgb48be")
        file.mux([*stream.encode(deep), *stream.encode()])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for path, reason in (
        (saved("clear.png", clear), "transparent in parts"),
        (saved("cmyk.jpg", plain.convert("CMYK")), "of the kind CMYK"),
        (saved("sixteen.png", sixteen), "of 16 bits"),
        (saved("wide.png", plain.resize((32, 16))), "another shape. Crop it to 16:16"),
        (
            saved("huge.png", plain.resize((64, 64))),
            r"too large: .* limit of 2000 pixels\. Scale it down",
        ),
        (moving, "holds 2 pictures"),
        (colours, "colours of 16 bits"),
        (cut, "cannot be read"),
        (text, "is no image"),
        (empty, "is empty"),
        (frame.with_name("absent.png"), "does not exist"),
        (frame.parent, "is a folder"),
    ):
        with pytest.raises(UserError, match=reason):
            read_image(path, 16, 16)


def test_lists_name_images_by_a_column_or_by_ids(frame: Path, tmp_path: Path) -> None:
    table = tmp_path / "prompts.csv"
    table.write_text("id,caption,image\na,A ball.,frames/a.png\n")
    assert read_prompts(table)[0].image is None
    (prompt,) = read_prompts(table, with_images=True)
    assert prompt.image is not None and prompt.image.samefile(frame)
    (prompt,) = read_prompts(table.with_name("prompts.csv"), with_images=True)
    table.write_text("id,caption,image\na,A ball.,a.png\n")
    (prompt,) = read_prompts(table, with_images=True, images=frame.parent)
    assert prompt.image is not None and prompt.image.samefile(frame)
    table.write_text("id,caption\na,A ball.\n")
    (prompt,) = read_prompts(table, with_images=True, images=frame.parent)
    assert prompt.image == frame
    for text, reason in (
        ("id,caption,image\na,A ball.,../a.png\n", "leads out"),
        ("id,caption,image\na,A ball.,\n", "'image' is empty"),
        ("id,caption\nb,A ball.\n", "holds 0 images called 'b'"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=reason):
            read_prompts(table, with_images=True, images=frame.parent)
    frame.with_name("c.png").symlink_to(table)
    table.write_text("id,caption\nc,A ball.\n")
    with pytest.raises(UserError, match="leads out of the root"):
        read_prompts(table, with_images=True, images=frame.parent)
    shutil.copy(frame, frame.with_suffix(".jpg"))
    table.write_text("id,caption\na,A ball.\n")
    with pytest.raises(UserError, match="holds 2 images called 'a'"):
        read_prompts(table, with_images=True, images=frame.parent)


@pytest.mark.parametrize("name", ["cogvideox-i2v", "wan-2.1-i2v", "wan-2.2-ti2v", "ltx-0.9.5"])
def test_clips_continue_their_images_and_are_kept_while_these_are_the_same(
    recipe_of: Callable[[str], Recipe], frame: Path, tmp_path: Path, name: str, monkeypatch
) -> None:
    own = recipe_of(name)
    size = ClipSize(**own.data.model_dump(include=set(ClipSize.model_fields)))
    Image.open(frame).resize((size.width, size.height)).save(frame)
    model, out = Path(own.backbone.source), tmp_path / "made"
    settings = Generation(**own.backbone.generation | {"steps": 1, "dynamic_guidance": False})
    module, made = importlib.import_module("videorepa.generate"), []

    def keep(path: Path, frames: np.ndarray, fps: float) -> None:
        made.append(frames)
        path.touch()

    monkeypatch.setattr(module, "write_video", keep)
    opened = Model.of

    def of(path: Path, *_: Any) -> Model:
        return replace(opened(path, own.backbone.name), spec=own.backbone)

    monkeypatch.setattr(module.Model, "of", of)
    prompt = Prompt("a", "A ball falls.", image=frame)
    options = {"settings": settings, "size": size}
    (clip,) = generate(model, [prompt], out, **options)
    assert "image" in json.loads(clip.with_suffix(".json").read_text())
    assert generate(model, [prompt], out, **options) == [clip] and len(made) == 1
    ImageOps.invert(Image.open(frame)).save(frame)
    with pytest.raises(UserError, match="differs in image"):
        generate(model, [prompt], out, **options)
    generate(model, [prompt], tmp_path / "other", **options)
    assert not np.array_equal(made[0], made[1])
    with pytest.raises(UserError, match="has no image"):
        generate(model, [prompt, Prompt("b", "A cup.")], out, **options)
    if not own.backbone.takes_image:
        with pytest.raises(UserError, match="differs in image"):
            generate(model, [Prompt("a", "A ball falls.")], out, **options)


def test_several_frames_are_continued_by_models_that_can_be_shown_them(
    recipe_of: Callable[[str], Recipe],
) -> None:
    own = recipe_of("ltx-0.9.5")
    size, settings = own.data, own.generation.changed(steps=1, guidance_scale=1.0)
    live = own.backbone.load(WHOLE, CPU)
    texts = encode_prompts(live, ["A ball."], settings)
    sampler = Sampler(live, size, settings, texts, from_image=True)
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 255, (9, size.height, size.width, 3), "uint8")
    other = pixels.copy()
    other[8] = 255 - other[8]
    one, two = (
        sampler.sample("A ball.", 0, [Image.fromarray(frame) for frame in frames])
        for frames in (pixels, other)
    )
    assert not np.array_equal(one[1:9], two[1:9])
    with pytest.raises(ValueError, match="too many values"):
        recipe_of("wan-2.2-ti2v").backbone.load((), CPU).continuing([None, None])


def test_a_model_of_text_alone_says_that_it_is_shown_no_image(
    recipe: Recipe, frame: Path, tmp_path: Path, capsys
) -> None:
    prompt, settings = Prompt("a", "A ball.", image=frame), recipe.generation.changed(steps=1)
    (clip,) = generate(Path(recipe.backbone.source), [prompt], tmp_path / "made", settings=settings)
    assert "image" not in json.loads(clip.with_suffix(".json").read_text())
    assert "it is shown none" in " ".join(capsys.readouterr().err.split())


# Text encoders that see the image, and image encoders.


@pytest.fixture
def seeing(twins: dict[str, Path], tmp_path: Path) -> Recipe:
    folder = TWINS["hunyuan_video-i2v"][1](tmp_path / "model")
    clips = write_clips(tmp_path / "clips", count=2)
    clips.write_text("video,caption\nclip0.mp4,A ball.\nclip1.mp4,A ball.\n")
    values = recipe_values(twins, clips, tmp_path / "cache")
    values["backbone"] = {"name": "hunyuan_video", "weights": str(folder)}
    return Recipe.parse(values)


def stored_text(recipe: Recipe) -> list[torch.Tensor]:
    cache = Cache(recipe)
    clips = PreparedClips(recipe, shown=False).clips
    return [cache.read_clip(clip)[1]["encoder_hidden_states"].float() for clip in clips]


def test_a_caption_is_encoded_with_its_own_clips_first_frame(seeing: Recipe) -> None:
    assert prepare(seeing).made == 2
    text, source = stored_text(seeing), open_source(seeing.data)
    live = seeing.backbone.load(("text_encoder",), CPU)
    for row, stored in enumerate(text):
        frame = to_video(source.sample(row).frames[:1])
        own = live.encode_text_of(["A ball."], frame)["encoder_hidden_states"][0]
        assert torch.equal(stored, own.bfloat16().float())
    blank = live.encode_text(["A ball."])["encoder_hidden_states"][0]
    assert not torch.allclose(*text, atol=1e-4)
    assert not torch.allclose(text[0], blank, rtol=1e-2, atol=1e-4)

    path = Path(seeing.data.manifest)
    path.write_text("video,caption\nclip0.mp4,A ball.\nclip1.mp4,A cube.\n")
    assert prepare(seeing).made == 1
    again = stored_text(seeing)
    assert torch.equal(again[0], text[0]) and not torch.allclose(again[1], text[1])


def test_a_clip_is_read_whole_once_where_its_caption_needs_its_first_frame(
    seeing: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, whole = type(open_source(seeing.data)), []
    real = source.sample
    monkeypatch.setattr(source, "sample", lambda self, n: whole.append(n) or real(self, n))
    assert prepare(seeing).made == 2
    assert sorted(whole) == [0, 1]


def test_a_clip_whose_first_frame_cannot_be_read_fails_and_the_others_do_not(
    seeing: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = type(open_source(seeing.data))
    real = source.first

    def first(self: Any, number: int) -> Any:
        if number == 0:
            raise ClipError("it is torn")
        return real(self, number)

    monkeypatch.setattr(source, "first", first)
    prepared = prepare(seeing)
    assert prepared.made == 1 and prepared.failed == {"clip0.mp4": "it is torn"}


def test_hunyuan_video_15_is_refused_without_embeddings_and_at_sides_it_would_not_choose(
    tmp_path: Path,
) -> None:
    folder = TWINS["hunyuan_video_15-i2v"][1](tmp_path / "model")
    spec = plugins.description("backbones", "hunyuan_video_15")(weights=str(folder))
    live = spec.load(("image_encoder",), CPU)
    video = torch.rand(2, 5, 3, 32, 32, generator=generator(0))
    stored = live.encode_image(video)
    assert {name: tensor.shape[1:] for name, tensor in stored.items()} == {"image_embeds": (4, 8)}
    moments = torch.zeros(2, *spec.moments(ClipSize(frames=5, height=32, width=32)))
    noisy, text = torch.zeros(2, 2, 4, 2, 2), {}
    inputs = live.inputs(noisy, text, torch.tensor([500, 500]))
    shown = live.shown(inputs, noisy, Opening((1, 1), live.image(stored, moments, None)))
    assert torch.equal(shown["image_embeds"], stored["image_embeds"])
    hidden = live.shown(inputs, noisy, Opening((0, 0), live.image(stored, moments, None)))
    assert all(
        torch.equal(hidden[name], inputs[name]) for name in ("hidden_states", "image_embeds")
    )
    with pytest.raises(UserError, match="SigLIP embeddings"):
        live.shown(inputs, noisy, Opening((1, 1)))
    with pytest.raises(UserError, match="32x32 for one of 64x64"):
        live.sampling(ClipSize(frames=5, height=64, width=64), Generation(**spec.generation))


def test_equal_prompts_with_other_images_have_texts_of_their_own(seeing: Recipe) -> None:
    coder = seeing.backbone.load(("text_encoder",), CPU)
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    settings = Generation(**seeing.backbone.generation)
    texts = encode_prompts(coder, ["A ball."] * 3, settings, [red, blue, red])
    assert len(texts) == 2
    one, other = (texts[told(coder, "A ball.", image)] for image in (red, blue))
    name = "encoder_hidden_states"
    assert not torch.allclose(one[name], other[name], atol=1e-4)
