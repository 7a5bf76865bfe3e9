"""Likelihood: losses by hand, mirrored labels, chance, pairing, data sets and their faults."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch._subclasses import FakeTensorMode

from conftest import recipe_values
from test_pipeline import assert_equal_bit_for_bit, log_of
from videorepa.artifacts.scores import Scores
from videorepa.cli import main
from videorepa.data.video import read_all, write_video
from videorepa.errors import ClipError, UserError
from videorepa.evaluation.likelihood import (
    NEGATIVE_PROMPT,
    AsPublished,
    Denoising,
    aggregate,
    compare,
    preference,
    preference_error,
    scored,
)
from videorepa.evaluation.paired_clips import Pair, groups, read_clip, read_pairs
from videorepa.lab.datasets import PairsRecipe, PhyWorldRecipe, draw_clips, draw_pairs
from videorepa.likelihood import _Ask, _texts, likelihood
from videorepa.prepare import prepare
from videorepa.probing.blocks import Blocks, EncodedClips, encode_captions
from videorepa.probing.clips import Clips
from videorepa.recipe import Recipe
from videorepa.report import report
from videorepa.report.likelihoods import preferences
from videorepa.settings.sections import ClipSize
from videorepa.system.randomness import generator
from videorepa.train import train

CPU = torch.device("cpu")
LEVELS = (0.2, 0.8)
LABELS = ["0.2", "0.8"]


def film(path: Path, seed: int, frames: int = 9) -> str:
    draw = np.random.default_rng(seed)
    write_video(path, draw.integers(0, 255, (frames, 16, 16, 3), "uint8"), 8)
    return path.name


def listing(folder: Path, lines: list[str]) -> Path:
    path = folder / "pairs.csv"
    path.write_text("\n".join(["id,real,broken,caption,law,degree", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pairs of two real clips, one of them with two broken clips."""
    folder = tmp_path_factory.mktemp("pairs")
    for seed, name in enumerate(("a", "a1", "a2", "b", "b1")):
        film(folder / f"{name}.mp4", seed)
    return listing(
        folder,
        [
            "one,a.mp4,a1.mp4,A ball.,teleporting,2",
            "two,a.mp4,a2.mp4,A ball.,teleporting,8",
            "three,b.mp4,b1.mp4,A box.,frozen,4",
        ],
    )


@pytest.fixture(scope="module")
def tiny(twins: dict[str, Path], clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe.parse(recipe_values(twins, clips, tmp_path_factory.mktemp("likely") / "cache"))


@pytest.fixture(scope="module")
def once(
    tiny: Recipe, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Scores]]:
    out = tmp_path_factory.mktemp("scored")
    return out, likelihood(tiny, pairs, out, noise_levels=LEVELS)


# The core.


def test_losses_are_the_models_own_by_hand(tiny: Recipe) -> None:
    """v-prediction from the schedule's numbers, with the noise that clips have in common."""
    backbone = tiny.backbone.load(("transformer", "text_encoder"), CPU)
    text = backbone.encode_text(["A ball."])
    clips = torch.randn(3, 3, 4, 4, 4)
    found = Denoising(backbone, LEVELS, seed=5, batch=2)(clips, text, "a.mp4")
    for place, level in enumerate(LEVELS):
        share = 1 - backbone.scheduler.alphas_cumprod
        timestep = (share - level).abs().argmin()
        signal, spread = (1 - share[timestep]).sqrt(), share[timestep].sqrt()
        draw = generator(5, "likelihood noise", "a.mp4", f"{level:g}")
        noise = torch.randn(3, 4, 4, 4, generator=draw)
        for number, clip in enumerate(clips):
            noisy = (signal * clip + spread * noise)[None]
            with torch.no_grad():
                v = backbone.transformer(
                    noisy, text["encoder_hidden_states"], timestep[None], return_dict=False
                )[0]
            loss = (v - (signal * noise - spread * clip)).square().mean().item()
            assert found.loss[number, place].item() == pytest.approx(loss, rel=1e-4)
            error = (spread * noisy + signal * v - noise).square().mean().item()
            assert found.noise_error[number, place].item() == pytest.approx(error, rel=1e-4)


def test_a_pairs_columns_by_hand() -> None:
    row = scored(LABELS, ([1, 2], [3, 5]), ([math.e, 2], [1, 1]), (0.5, 0.7))
    assert (row["likelier at 0.2"], row["likelier at 0.8"]) == (True, None)
    assert (row["log_ratio at 0.2"], row["log_ratio"]) == (pytest.approx(1), pytest.approx(0.5))
    assert (row["likelier"], row["smaller"], row["noise_error_real"]) == (True, True, 4)
    assert row["invalid"] == {"likelier at 0.8": "a tie"}
    assert (row["mean_square_real"], row["mean_square_broken"]) == (0.5, 0.7)


def test_a_tie_is_no_preference_and_not_a_loss() -> None:
    same = ([1.0, 2.0], [1.0, 2.0])
    rows = [scored(LABELS, same, same, (1, 1)) | {"asked": str(n), "law": "x"} for n in range(4)]
    found = aggregate(rows, LABELS, published=True)
    assert (found["likelier"]["percent"], found["likelier"]["invalid"]) == (None, 4)
    assert (found["log_ratio"]["mean"], found["ppe"]["percent"]) == (0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_a_loss_that_is_no_number_is_an_error_and_not_a_score(bad: float) -> None:
    with pytest.raises(ClipError, match="loss"):
        scored(["0.2"], ([1.0], [1.0]), ([bad], [bad]), (1, 1))


def random_rows(n: int, seed: int, swapped: bool = False, skew: float = 0.0) -> list[dict]:
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        a, b = (tuple(x) for x in draw.uniform(0.5, 1.5, (2, 2)))
        b = tuple(x + skew for x in b)
        energies = tuple(draw.uniform(size=2))
        real, broken = ((b, b), (a, a)) if swapped else ((a, a), (b, b))
        about = {"prompt_id": str(number), "k": 0, "asked": str(number % 30), "law": "x"}
        rows.append(scored(LABELS, real, broken, energies[::-1] if swapped else energies) | about)
    return rows


def test_swapped_labels_mirror_everything() -> None:
    plain, swapped = (
        aggregate(random_rows(60, 0, way, skew=0.2), LABELS, True) for way in (False, True)
    )
    for name, metric in plain.items():
        mirror, whole = swapped[name], 0 if name == "log_ratio" else 100
        value = "mean" if name == "log_ratio" else "percent"
        assert mirror[value] == pytest.approx(whole - metric[value])
        assert mirror["low"] == pytest.approx(whole - metric["high"], abs=1.5)
    assert plain["likelier"]["percent"] > 60 and plain["ppe"]["percent"] < 40


def test_intervals_are_exact_for_pairs_of_their_own_and_wider_for_shared_clips() -> None:
    rows = [{"asked": str(n), "likelier": n < 9} for n in range(10)]
    found = preference(rows, "likelier")
    assert (found["low"], found["high"]) == (
        pytest.approx(55.50, abs=0.01),
        pytest.approx(99.75, abs=0.01),
    )
    alike = [{"asked": str(n % 4), "likelier": n % 4 > 0} for n in range(20)]
    apart = [{**row, "asked": str(n)} for n, row in enumerate(alike)]
    assert preference(alike, "likelier")["low"] < preference(apart, "likelier")["low"] - 10


def test_the_published_metric_by_hand() -> None:
    """Mean over each variation's subgroups, then over variations: not the mean over files."""

    def row(subgroup: str, law: str, wrong: bool) -> dict[str, Any]:
        return {
            "asked": subgroup,
            "law": law,
            "noise_error_real": 2.0 if wrong else 1.0,
            "noise_error_broken": 1.0 if wrong else 1.0 + (law == "a"),
        }

    rows = [row("0", "a", True), row("0", "a", False), row("1", "a", False), row("1", "b", True)]
    # a: subgroups 1/2 and 0; b: subgroup 1 alone. Equal errors are no error.
    assert preference_error(rows)["percent"] == pytest.approx(100 * (0.25 + 1) / 2)
    assert preference_error([row("0", "b", False)])["percent"] == 0


def test_the_published_metric_of_two_models_is_paired_by_real_clip() -> None:
    def rows(wrong: Sequence[bool]) -> list[dict]:
        return [
            {
                **random_rows(1, 0)[0],
                "prompt_id": str(n),
                "asked": str(n // 2),
                "law": "ab"[n % 2],
                "noise_error_real": 1.0 + is_wrong,
                "noise_error_broken": 1.5,
            }
            for n, is_wrong in enumerate(wrong)
        ]

    a, b = rows([True, False] * 8), rows([False, False] * 8)
    found = compare(a, b, LABELS, published=True)["ppe"]
    assert (found["difference"], found["low"], found["high"]) == (-50, -50, -50)
    assert found["p"] == pytest.approx(2 / 2**8, abs=0.003)
    assert (found["n"], found["prompts"]) == (16, 8)
    assert compare(a, a, LABELS, published=True)["ppe"]["p"] == 1
    assert compare(b, a, LABELS, published=True)["ppe"]["difference"] == 50


def test_models_are_paired_by_pair() -> None:
    ours, theirs = random_rows(60, 0, skew=0.2), random_rows(60, 0)
    found = compare(theirs, ours[:50], LABELS)
    assert found["unpaired"] == 10
    gained = sum(b["likelier"] - a["likelier"] for a, b in zip(theirs, ours[:50], strict=False))
    assert found["likelier"]["difference"] == pytest.approx(100 * gained / 50)
    same = compare(ours, ours, LABELS)
    assert (same["log_ratio"]["difference"], same["likelier"]["p"]) == (0, 1)


def test_an_untrained_copy_does_not_tell_clips_apart(tiny: Recipe) -> None:
    backbone = tiny.backbone.load(("transformer", "text_encoder"), CPU)
    text = backbone.encode_text(["A ball."])
    before = {name: value.clone() for name, value in backbone.transformer.state_dict().items()}
    backbone.reinitialise(0)
    asked = Denoising(backbone, [0.5], batch=64)
    after = backbone.transformer.state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(before["proj_out.weight"], after["proj_out.weight"])
    other = tiny.backbone.load(("transformer",), CPU)
    other.reinitialise(0)
    again = other.transformer.state_dict()
    assert all(torch.equal(again[name], after[name]) for name in after)
    wins = [
        bool(loss[1] > loss[0])
        for n in range(100)
        for loss in [asked(torch.randn(2, 3, 4, 4, 4), text, str(n)).loss]
    ]
    found = preference([{"asked": str(n), "x": win} for n, win in enumerate(wins)], "x")
    assert found["low"] < 50 < found["high"]


def test_a_model_that_predicts_nothing_prefers_smaller_latents(tiny: Recipe) -> None:
    """So the untrained copy is at 50 % only where real and broken clips are of one size."""
    backbone = tiny.backbone.load(("transformer", "text_encoder"), CPU)
    for name in ("proj_out.weight", "proj_out.bias"):
        backbone.transformer.get_parameter(name).data.zero_()
    clips = torch.randn(8, 3, 4, 4, 4) * torch.linspace(0.5, 2, 8).view(-1, 1, 1, 1, 1)
    found = Denoising(backbone, [1.0], batch=8)(clips, backbone.encode_text([""]), "a").loss[:, 0]
    torch.testing.assert_close(found, clips.square().flatten(1).mean(1).double(), rtol=1e-4, atol=0)


# What is published.


def published_layout(root: Path) -> Path:
    """Two subgroups of one scenario and one of another, with a variation that is left out."""
    for seed, name in enumerate(
        (
            "ball_drop_videos/subgroup_000/valid_00",
            "ball_drop_videos/subgroup_000/over_bounce_00",
            "ball_drop_videos/subgroup_000/over_bounce_01",
            "ball_drop_videos/subgroup_001/valid_00",
            "ball_drop_videos/subgroup_001/over_bounce_00",
            "pendulum_videos/subgroup_000/valid_00",
            "pendulum_videos/subgroup_000/reverse_gravity_00",
            "pendulum_videos/subgroup_000/invalid_stop_00",
            "river_videos/subgroup_003/antigravity_fluid_00",
            "flag_videos/subgroup_003/valid_00",
            "juggling_videos/subgroup_000/valid_00",
            "juggling_videos/subgroup_000/slow_00",
        )
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        film(root / f"{name}.mp4", seed, frames=11)
    return root


def test_the_published_layout(tiny: Recipe, tmp_path: Path, capsys) -> None:
    folder = published_layout(tmp_path / "LikePhys")
    found = read_pairs(folder)
    assert [(pair.group, pair.law) for pair in found.pairs] == [
        *[("ball_drop_videos/subgroup_000", "ball_drop/over_bounce")] * 2,
        ("ball_drop_videos/subgroup_001", "ball_drop/over_bounce"),
        ("pendulum_videos/subgroup_000", "pendulum/invalid_stop"),
    ]
    assert found.pairs[0].caption.startswith("ball dropping and colliding")
    assert found.left_out == ["pendulum_videos/subgroup_000/reverse_gravity_00.mp4"]
    reasons = {name.split("_videos")[0]: reason for name, reason in found.failures.items()}
    assert reasons.keys() == {"river", "flag", "juggling"}
    assert "no valid_00" in reasons["river"] and "no partner" in reasons["flag"]
    options: dict[str, Any] = {"noise_levels": [0.5], "straw_man": False}
    scores = likelihood(tiny, folder, tmp_path / "out", **options)["base"]
    assert scores.summary.n == 4 and set(scores.summary.by_scenario) == {"ball_drop", "pendulum"}
    wrong = [row["noise_error_real"] > row["noise_error_broken"] for row in scores.rows]
    by_hand = ((wrong[0] + wrong[1]) / 2 + wrong[2]) / 2, wrong[3]
    assert scores.summary.metrics["ppe"].percent == pytest.approx(100 * sum(by_hand) / 2)
    assert scores.summary.metrics["ppe"].prompts == 3


def test_frames_are_taken_as_published(tmp_path: Path) -> None:
    film(tmp_path / "a.mp4", 0, frames=12)
    frames, total = read_clip(tmp_path / "a.mp4", ClipSize(frames=5, height=16, width=16))
    whole = read_all(tmp_path / "a.mp4")[0]
    assert total == 12
    assert np.array_equal(frames, whole[[0, 3, 6, 8, 11]])  # round(5.5) is 6: to even, as NumPy's.


def test_the_published_steps_of_cogvideox(tiny: Recipe) -> None:
    """The noise of CogVideoX's schedule without its shift, as Euler's scheduler has it."""
    backbone = tiny.backbone.load(("transformer", "text_encoder"), CPU)
    asked = AsPublished(backbone, backbone.encode_text([""]), 6.0)
    expected = [4096, 18.1, 7.4, 4.1, 2.6, 1.8, 1.2, 0.9, 0.6, 0.4]
    assert asked.sigmas.tolist() == pytest.approx(expected, abs=0.06)
    assert asked.timesteps.tolist() == list(range(999, 0, -100))


def test_as_published_by_hand(tiny: Recipe) -> None:
    backbone = tiny.backbone.load(("transformer", "text_encoder"), CPU)
    text, negative = backbone.encode_text(["A ball."]), backbone.encode_text([NEGATIVE_PROMPT])
    asked = AsPublished(backbone, negative, 6.0, seed=5)
    clip = torch.randn(1, 3, 4, 4, 4)
    found = asked(clip, text, "a")
    for place in (0, 1, 9):
        s, t = asked.sigmas[place], asked.timesteps[place]
        noise = torch.randn(
            3, 4, 4, 4, generator=generator(5, "likelihood noise", "a", f"step {100 * place}")
        )
        shown = (clip + s * noise) / (4096**2 + 1) ** 0.5
        with torch.no_grad():
            v, u = (
                backbone.transformer(
                    shown, each["encoder_hidden_states"], t[None], return_dict=False
                )[0]
                for each in (text, negative)
            )
        guided = u + 6 * (v - u)
        predicted = clip * s / (s**2 + 1) + guided / (s**2 + 1) ** 0.5
        error = (predicted - noise).square().mean().item()
        assert found.loss[0, place].item() == pytest.approx(error, rel=1e-4)


def test_as_published_is_said_to_be_that(tiny: Recipe, pairs: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"straw_man": False, "as_published": True}
    found = likelihood(tiny, pairs, tmp_path / "out", **options)["base"]
    assert found.summary.benchmark == "likelihood-as-published"
    assert found.summary.about and "not denoising losses" in found.summary.about
    assert "likelier at step 900" in found.summary.metrics
    assert found.rows[0]["guidance_scale"] == tiny.generation.guidance_scale


# The verb.


def captions_on_a_gpu() -> dict[str, set[str]]:
    """Where the captions of a list of clips lie, and those of the clips whose turn it is."""

    def encode_text(captions: list[str]) -> dict[str, torch.Tensor]:
        return {"text": torch.empty(len(captions), 2, 3, device="cuda")}

    shown: dict[str, str] = {}
    spec = SimpleNamespace(text_sees_image=False, takes_image=False)
    backbone: Any = SimpleNamespace(spec=spec, encode_text=encode_text)
    backbone.noised = lambda latents, text, *rest: (None, text)
    backbone.transformer = lambda text, **rest: shown.update(scan=text.device.type)

    def rows(denoising: Any, latents: Any, text: Any, *rest: Any) -> list[Any]:
        shown["likelihood"] = text["text"].device.type
        return []

    pairs = [Pair(str(n), str(n), "law", None, "", f"{n}", Path(), Path()) for n in range(3)]
    clips = Clips(np.zeros((3, 1, 4, 4, 3), np.uint8), ["a", "b", "a"], ["0", "1", "2"], 2)
    with FakeTensorMode():
        texts = _texts(backbone, [[pair] for pair in pairs], ClipSize(frames=1, height=8, width=8))
        latents = [torch.empty(1, 1, 1, 1, device="cuda")] * 3
        scanned = encode_captions(backbone, clips)
        encoded = EncodedClips(clips, latents, latents, scanned, [])
        list(Blocks(backbone, []).outputs(encoded, torch.empty(1)))
        with mock.patch.multiple(
            "videorepa.likelihood",
            read_group=lambda pairs, *rest: (pairs, [None]),
            encode=lambda *rest: latents[0],
            real_opening=lambda *rest: None,
            rows_of=rows,
        ):
            recipe: Any = SimpleNamespace(data=SimpleNamespace(prepare_batch=1))
            list(_Ask(backbone, None, texts, recipe)(pairs[:1], {}))
    held = {text["text"].device.type for text in [*texts.values(), *scanned]}
    return {"held": held, "shown": set(shown.values())}


def test_captions_wait_in_main_memory(fake_cuda) -> None:
    assert fake_cuda(captions_on_a_gpu) == {"held": {"cpu"}, "shown": {"cuda"}}


def test_rows_hold_what_their_losses_come_from(tiny: Recipe, once, pairs: Path) -> None:
    out, results = once
    assert list(results) == ["base", "untrained"]
    base = Scores.read(out / "likelihood" / "base")
    assert [row["prompt_id"] for row in base.rows] == ["one", "two", "three"]
    backbone = tiny.backbone.load(("transformer", "text_encoder", "vae"), CPU)
    videos = [read_all(pairs.parent / name)[0] for name in ("b.mp4", "b1.mp4")]
    moments = backbone.encode_video(
        torch.from_numpy(np.stack(videos)).permute(0, 1, 4, 2, 3).float() / 255
    )
    latents = backbone.latents(moments, None)
    mean = moments.chunk(2, 1)[0].permute(0, 2, 1, 3, 4) * 0.9
    torch.testing.assert_close(latents, mean)
    ask = Denoising(backbone, LEVELS, tiny.seed, tiny.data.prepare_batch)
    losses = ask(latents, backbone.encode_text(["A box."]), "b.mp4").loss
    row = base.rows[2]
    for place, label in enumerate(LABELS):
        found = row[f"loss_real at {label}"], row[f"loss_broken at {label}"]
        assert found == pytest.approx(tuple(losses[:, place].tolist()), rel=1e-5)
    assert base.summary.metrics["likelier"].n == 3
    assert base.summary.by_scenario["frozen"]["likelier at 0.8"].n == 1
    assert results["untrained"].comparison is not None
    tested = results["untrained"].comparison.tested
    assert tested and all(one.p_holm is not None for one in tested)


def test_a_second_call_keeps_rows_of_the_same_clips_and_model(
    tiny: Recipe, pairs: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    asked: list[str] = []
    whole = Denoising.__call__

    def counted(self: Denoising, latents: Any, text: Any, group: str, *more: Any) -> Any:
        asked.append(group)
        return whole(self, latents, text, group, *more)

    monkeypatch.setattr(Denoising, "__call__", counted)
    options: dict[str, Any] = {"noise_levels": [0.5], "straw_man": False}
    first = likelihood(tiny, pairs, tmp_path / "out", **options)["base"].rows
    table = tmp_path / "out" / "likelihood" / "base" / "scores.jsonl"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[1:]) + lines[0][:40])
    again = likelihood(tiny, pairs, tmp_path / "out", **options)["base"].rows
    assert asked == ["a.mp4", "b.mp4", "a.mp4"]
    assert [row["prompt_id"] for row in again] == [row["prompt_id"] for row in first]
    assert again[0]["log_ratio"] == pytest.approx(first[0]["log_ratio"], abs=1e-5)
    assert "dropped" not in capsys.readouterr().err
    likelihood(tiny.override("seed=4"), pairs, tmp_path / "out", **options)
    assert len(asked) == 5
    assert "base: 3 rows of before dropped" in capsys.readouterr().err
    # Nor is what the videos were before they were read as they are now.
    monkeypatch.setattr(sys.modules["videorepa.likelihood"], "READER", 1)
    likelihood(tiny.override("seed=4"), pairs, tmp_path / "out", **options)
    assert len(asked) == 7


def test_faulty_pairs_are_named_and_counted(tiny: Recipe, tmp_path: Path, capsys) -> None:
    for seed, name in enumerate(("a", "a1", "b", "b1", "c", "c1", "d", "d1", "e", "e1")):
        film(tmp_path / f"{name}.mp4", seed)
    film(tmp_path / "long.mp4", 1, frames=12)
    film(tmp_path / "short.mp4", 1, frames=5)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    path = listing(
        tmp_path,
        [
            "good,a.mp4,a1.mp4,A ball.,x,1",
            "alone,b.mp4,,A ball.,x,1",
            "gone,b.mp4,nowhere.mp4,A ball.,x,1",
            "twice,c.mp4,c1.mp4,A ball.,x,1",
            "thrice,d.mp4,c1.mp4,A ball.,x,1",
            "both,d.mp4,e.mp4,A ball.,x,1",
            "roles,e.mp4,e1.mp4,A ball.,x,1",
            "longer,a.mp4,long.mp4,A ball.,x,1",
            "shorter,a.mp4,short.mp4,A ball.,x,1",
            "damaged,a.mp4,broken.mp4,A ball.,x,1",
            "degree,a.mp4,d1.mp4,A ball.,x,much",
            "good,b.mp4,b1.mp4,A ball.,x,1",
        ],
    )
    result = likelihood(tiny, path, tmp_path / "out", noise_levels=[0.5], straw_man=False)["base"]
    assert [row["prompt_id"] for row in result.rows] == ["good", "roles"]
    reasons = {name: reason for (name, _), reason in result.failures.items()}
    expected = {
        "alone": "no partner",
        "gone": "no partner",
        "twice": "in two pairs",
        "thrice": "in two pairs",
        "both": "real in another",
        "longer": "12 frames and the real one 9",
        "shorter": "5 frames",
        "damaged": "broken.mp4",
        "degree": "much",
        "good, line 13": "another pair's",
    }
    assert reasons.keys() == expected.keys()
    assert all(part in reasons[name] for name, part in expected.items())
    assert result.summary.metrics["likelier"].n == 2


def test_models_of_one_name_do_not_leave_the_folder(
    tiny: Recipe, pairs: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "a" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text(tiny.text())
    options: dict[str, Any] = {"noise_levels": [0.5], "straw_man": False}
    models = {str(recipe): recipe}
    found = likelihood(tiny, pairs, tmp_path / "out", models=models, **options)
    folder = found[str(recipe)].folder
    assert folder.parent == tmp_path / "out" / "likelihood" and folder.name.endswith(
        "a-recipe.yaml"
    )
    assert [path.name for path in recipe.parent.iterdir()] == ["recipe.yaml"]
    comparison = found[str(recipe)].comparison
    assert comparison is not None and comparison.metrics["log_ratio"].difference == 0
    with pytest.raises(UserError, match="one folder"):
        likelihood(tiny, pairs, tmp_path / "o", models={"a b": recipe, "a-b": recipe}, **options)


def test_losses_that_are_not_finite_are_failures(tiny: Recipe, pairs: Path, tmp_path, monkeypatch):
    whole = Denoising.__call__

    def spoilt(self: Denoising, *given: Any) -> Any:
        losses = whole(self, *given)
        losses.loss[1] = math.nan
        return losses

    monkeypatch.setattr(Denoising, "__call__", spoilt)
    options: dict[str, Any] = {"noise_levels": [0.5], "straw_man": False}
    found = likelihood(tiny, pairs, tmp_path / "out", **options)["base"]
    assert [row["prompt_id"] for row in found.rows] == ["two"]
    assert set(found.failures) == {("one", 0), ("three", 0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_levels": [0.0]}, "above 0"),
        ({"noise_levels": []}, "one or more"),
        ({"against": "control"}, "no source 'control'"),
        ({"models": {"base": Path("x")}}, "cannot be called base"),
    ],
)
def test_impossible_requests_are_refused(tiny, pairs, tmp_path, change, message: str) -> None:
    with pytest.raises(UserError, match=message):
        likelihood(tiny, pairs, tmp_path / "out", **change)


def test_the_command_prints_tables_and_fails_for_faulty_pairs(
    tiny: Recipe, pairs: Path, tmp_path: Path, capsys
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny.text())
    listed = pairs.parent / "more.csv"
    listed.write_text(pairs.read_text() + "four,b.mp4,none.mp4,A box.,frozen,4\n")
    arguments = ["likelihood", str(recipe), "--pairs", str(listed), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--noise", "0.5"]) == 1
    printed = capsys.readouterr()
    assert "likelier at 0.5" in printed.out and "untrained" in printed.out
    assert "'four'" in printed.err and "none.mp4" in printed.err


# The lab's pairs.


def test_the_labs_pairs_break_one_law_by_degrees(tmp_path: Path) -> None:
    recipe = PairsRecipe(
        out=tmp_path / "pairs", pairs=2, laws=("teleporting", "sunken", "shuffled")
    )
    assert draw_pairs(recipe) == {"pairs": 2 * (4 + 4 + 3)}
    found = read_pairs(tmp_path / "pairs" / "pairs.csv")
    assert not found.failures and not found.published
    degrees = {(pair.law, pair.degree) for pair in found.pairs}
    assert {degree for law, degree in degrees if law == "teleporting"} == {2, 4, 8, 12}
    by_law = {law: {p.group for p in found.pairs if p.law == law} for law, _ in degrees}
    assert all(len(clips) == 2 for clips in by_law.values())
    assert all(len({p.caption for p in of}) == 1 for of in groups(found.pairs))
    pair = next(pair for pair in found.pairs if (pair.law, pair.degree) == ("shuffled", 17))
    real, broken = (read_all(path)[0].astype(int) for path in (pair.real, pair.broken))
    # The same frames in another order, and no loss beyond that of colours.
    distances = np.abs(real[:, None] - broken[None]).mean((2, 3, 4))
    assert sorted(distances.argmin(0)) == list(range(len(real)))
    assert distances.min(0).max() < 0.5 < np.abs(real - broken).mean()
    before = pair.real.stat().st_mtime_ns
    draw_pairs(recipe)
    assert pair.real.stat().st_mtime_ns == before
    listed = (tmp_path / "pairs" / "pairs.csv").read_bytes()
    for other in (recipe.model_copy(update={"seed": 1}), PhyWorldRecipe(out=recipe.out, clips=2)):
        draw = draw_pairs if isinstance(other, PairsRecipe) else draw_clips
        with pytest.raises(UserError, match="holds clips drawn with .* expected"):
            draw(other)
    assert (tmp_path / "pairs" / "pairs.csv").read_bytes() == listed
    (tmp_path / "pairs" / "drawn.json").unlink()
    with pytest.raises(UserError, match="no readable record of its clips"):
        draw_pairs(recipe)


def test_a_law_that_the_lab_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="no law is called flying"):
        PairsRecipe(out=tmp_path, pairs=2, laws=("flying",))


# During a training.


def test_a_training_asks_about_pairs_and_stays_as_it_is(
    tiny: Recipe, pairs: Path, tmp_path: Path
) -> None:
    prepare(tiny)
    plain = train(tiny, tmp_path / "plain")
    asking = tiny.override(f"validation={{every: 4, pairs: {pairs}}}")
    asked = train(asking, tmp_path / "asked")
    assert_equal_bit_for_bit(asked, plain, but_for=("likelier", "log_ratio"))
    logged = [row for row in log_of(asked) if "likelier" in row]
    assert [row["step"] for row in logged] == [4, 6]
    # The verb finds the same of the same weights and noise: base, and the run's last step.
    models = {"asked": asked.path}
    found = likelihood(asking, pairs, tmp_path / "out", models=models, straw_man=False)
    last, mean = logged[-1], {name: of.summary.metrics["log_ratio"] for name, of in found.items()}
    assert last["likelier"] == found["asked"].summary.metrics["likelier"].percent
    assert last["log_ratio"] == pytest.approx(mean["asked"].mean, rel=1e-3, abs=1e-6)
    assert mean["asked"].mean is not None and mean["base"].mean is not None
    gain = mean["asked"].mean - mean["base"].mean
    assert last["log_ratio_gain"] == pytest.approx(gain, rel=1e-2, abs=1e-6)
    assert last["likelier_failed"] == 0 and not list(asked.samples.glob("*"))
    assert "Likelier: the real clip" in report([asked.path], tmp_path / "r.html").read_text()


def test_a_training_does_not_begin_with_faulty_pairs(
    tiny: Recipe, pairs: Path, tmp_path: Path
) -> None:
    listed = pairs.parent / "faulty.csv"
    listed.write_text(pairs.read_text() + "four,b.mp4,none.mp4,A box.,frozen,4\n")
    prepare(tiny)
    with pytest.raises(UserError, match="1 pair of validation.pairs.*'four'.*none.mp4"):
        train(tiny.override(f"validation={{every: 4, pairs: {listed}}}"), tmp_path / "run")


def test_a_validation_looks_at_something(tiny: Recipe) -> None:
    with pytest.raises(UserError, match="`prompts`, `pairs` or both"):
        tiny.override("validation={every: 4}")


# The page.


def test_the_page_draws_every_law_by_degree_and_by_noise(once, tmp_path: Path) -> None:
    out, results = once
    page = report([], tmp_path / "page.html", likelihoods=[out])
    text = page.read_text()
    for title in ("teleporting, by degree", "frozen, by noise level", "all laws, by noise level"):
        assert title in text
    assert "likelihood, version 1" in text and "likelihood/untrained/comparison.json" in text
    assert report([], tmp_path / "again.html", likelihoods=[out]).read_text() == text
    lines = preferences(results)
    one = next(x for x in lines if (x.law, x.degree, x.model) == ("teleporting", 8, "base"))
    assert one.metric["percent"] == 100 * results["base"].rows[1]["likelier"]
    ends = one.metric["low"], one.metric["high"]
    assert ends in (pytest.approx((2.5, 100)), pytest.approx((0, 97.5)))
    noisy = next(x for x in lines if (x.law, x.noise, x.model) == ("all laws", "0.8", "untrained"))
    flags = [row["likelier at 0.8"] for row in results["untrained"].rows]
    assert noisy.metric["percent"] == pytest.approx(100 * sum(flags) / 3)


def test_a_page_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not what `videorepa likelihood` wrote"):
        report([], tmp_path / "page.html", likelihoods=[tmp_path])


@pytest.fixture(scope="module")
def figures() -> Any:
    path = Path(__file__).parents[1] / "dev" / "plausibility.py"
    spec = importlib.util.spec_from_file_location("plausibility", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_docs_figures_follow_from_what_is_kept(figures: Any) -> None:
    page = figures.PAGE.read_text()
    assert figures.filled(page) == page
    changed = page.replace("| teleporting | all | ", "| teleporting | all | 9")
    assert changed != page and figures.filled(changed) == page


def test_what_the_docs_keep_is_what_the_rows_say(once, figures: Any) -> None:
    out, results = once
    rows = json.loads(figures.kept(out))["rows"]
    place = ["teleporting", 8, None]
    found = {row[3]: row[4] for row in rows if row[:3] == place}
    row = results["base"].rows[1]
    assert (
        found["base"] == 100 * row["likelier"] and found["smaller latents"] == 100 * row["smaller"]
    )
    assert found.keys() == {"base", "untrained", "smaller latents"}


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\xff\xfereal,broken,caption\n", "line 1: byte 1 is 0xff, which is not UTF-8"),
        (b"real;broken;caption\na.mp4;b.mp4\n", "found 2 fields, expected 3"),
        (b'real,broken,caption\n"a.mp4,b.mp4,c\n', "not valid CSV"),
        (b"real,caption\na.mp4,c\n", "lacks the column broken"),
    ],
)
def test_a_list_of_pairs_that_cannot_be_read_is_refused(tmp_path, content, words):
    (tmp_path / "pairs.csv").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(words)):
        read_pairs(tmp_path / "pairs.csv")
