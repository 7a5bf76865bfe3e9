"""PhyWorld's tasks: the laws, the published ranges, and the error of clean clips."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from conftest import recipe_values
from twins import TWINS
from videorepa.artifacts.clips import readable_clips
from videorepa.artifacts.scores import failing_checks
from videorepa.benchmarks import _phyworld as phyworld
from videorepa.benchmarks._phyworld import FRAMES, INTERVAL, WORLD, draw_motion, read, render
from videorepa.benchmarks.phyworld import PhyWorld
from videorepa.data.manifest import read_manifest
from videorepa.data.video import write_video
from videorepa.errors import ClipError, UserError
from videorepa.evaluate import evaluate
from videorepa.evaluation.tables import table
from videorepa.generate import generate
from videorepa.lab import datasets
from videorepa.recipe import Recipe

TASKS = ("uniform", "parabola", "collision")


def motions(task, group, count, seed=0):
    rng = np.random.default_rng(seed)
    return [draw_motion(task, group, rng) for _ in range(count)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("group", ["in", "r_out", "v_out", "rv_out"])
def test_a_motion_is_of_its_group_and_shows_enough(task, group) -> None:
    for motion in motions(task, group, 20):
        assert motion.group == group
        x, radii = motion.centres[..., 0], np.array(motion.radii)
        if task == "collision":
            gap = x[:, 1] - x[:, 0] - radii.sum()
            assert gap.min() > -1e-9 and (gap[:8] > 0).all() and (gap[-8:] > 0).all()
        else:
            assert x[0] >= radii - 1e-9
            assert x[24] + radii <= WORLD + 1e-9 or x[0] - radii <= phyworld.EDGE


def test_collisions_are_drawn_as_published() -> None:
    """At any height, with the first ball's values alone outside the range or both balls', and a
    large ball on the right near its wall."""
    for group, of in (("r_out", "radii"), ("v_out", "speeds")):
        low, high = phyworld.RADII["collision"] if of == "radii" else phyworld.SPEEDS
        second = [getattr(one, of)[1] for one in motions("collision", group, 100)]
        assert 35 < sum(low <= value <= high for value in second) < 75
    fast = [max(one.speeds) > 4 for one in motions("collision", "rv_out", 300) if one.counts]
    assert 0 < sum(fast) < len(fast), "a ball that is large and fast leaves room for few others"
    heights = np.array([one.centres[:, 0, 1] for one in motions("collision", "in", 50)])
    assert (heights == heights[:, :1]).all() and heights.min() < 2 and heights.max() > 8
    for one in motions("collision", "in", 200):
        if one.radii[1] > 2 * one.radii[0]:
            assert WORLD - one.centres[0, 1, 0] <= one.radii[1] + phyworld.EDGE + 1e-9
    low = min(one.centres[0, 0, 1] - one.radii[0] for one in motions("uniform", "in", 100))
    assert low >= phyworld.EDGE


def test_the_laws_hold() -> None:
    for motion in motions("collision", "in", 30):
        velocity = np.diff(motion.centres[..., 0], axis=0) / INTERVAL
        mass = np.array(motion.radii) ** 2
        np.testing.assert_allclose(velocity[0], np.array(motion.speeds) * (1, -1))
        for kept in (velocity @ mass, velocity**2 @ mass):
            assert kept[-1] == pytest.approx(kept[0])
    for motion in motions("parabola", "in", 10):
        fall = np.diff(motion.centres[:, 0, 1], 2) / INTERVAL**2
        np.testing.assert_allclose(fall, -phyworld.GRAVITY)


def test_clean_clips_have_the_known_error_and_the_published_parser_a_larger_one() -> None:
    drawn = motions("uniform", "in", 40)
    clips = [render(motion, 256) for motion in drawn]
    for compat, known, off in ((False, 0.0005, 3e-4), (True, 0.0104, 2e-3)):
        pairs = zip(clips, drawn, strict=True)
        errors = [phyworld.velocity_error(c, m, compat=compat) for c, m in pairs]
        assert np.mean(errors) == pytest.approx(known, abs=off)


@pytest.mark.parametrize("task", ["parabola", "collision"])
def test_clean_clips_of_the_other_tasks_have_next_to_no_error(task) -> None:
    errors = [phyworld.velocity_error(render(m, 128), m) for m in motions(task, "in", 20)]
    assert np.nanmean(errors) < 0.01 and np.isfinite(errors).mean() > 0.9


def test_a_ball_that_goes_on_at_another_speed_is_off_by_the_difference() -> None:
    (motion,) = motions("uniform", "in", 1)
    slow = phyworld.Motion("uniform", motion.radii, (1.0,), motion.centres.copy())
    slow.centres[:, 0, 0] = 2 + 1.0 * INTERVAL * np.arange(FRAMES)
    fast = phyworld.Motion("uniform", motion.radii, (1.5,), slow.centres.copy())
    fast.centres[:, 0, 0] = 2 + 1.5 * INTERVAL * np.arange(FRAMES)
    assert phyworld.velocity_error(render(fast, 128), slow) == pytest.approx(0.5, abs=0.01)


def test_the_step_in_which_balls_meet_is_neither_before_nor_after() -> None:
    """As published. A clip in which they meet half a frame late is off in that step alone."""
    meet, time = 1.26, INTERVAL * np.arange(FRAMES)[:, None]

    def clip(late: float) -> phyworld.Motion:
        speed = np.where(time < meet + late, time, 2 * (meet + late) - time)
        centres = np.stack([4 - 1.26 + speed, 6 + 1.26 - speed], 1)
        heights = np.full_like(centres, WORLD / 2)
        centres = np.concatenate([centres, heights], 2)
        return phyworld.Motion("collision", (1.0, 1.0), (1.0, 1.0), centres)

    assert phyworld.velocity_error(render(clip(0.03)), clip(0)) < 0.01
    assert phyworld.velocity_error(render(clip(0.3)), clip(0)) > 0.1


def test_a_collision_ends_for_both_balls_when_one_leaves() -> None:
    """As published. What the other one does afterwards does not count."""
    motion = next(
        one
        for one in motions("collision", "in", 50)
        if (gone := (one.centres[:, 1, 0] > WORLD - one.radii[1]) & (one.centres[:, 0, 0] > 3))[25]
    )
    clip, first = motion.centres.copy(), int(gone.argmax())
    clip[first:, 0, 0] = 3
    wrong = phyworld.Motion(motion.task, motion.radii, motion.speeds, clip)
    assert phyworld.velocity_error(render(wrong), motion) < 0.02


def test_balls_are_found_where_and_as_large_as_they_are() -> None:
    (motion,) = motions("collision", "in", 1, seed=3)
    for number, sight in enumerate(read(render(motion), 2)):
        true, radius = motion.centres[:, number], motion.radii[number]
        whole = ((true >= radius) & (true <= WORLD - radius)).all(1)
        np.testing.assert_allclose(sight.centre[whole], true[whole], atol=0.03)
        np.testing.assert_allclose(sight.radius[whole], radius, atol=0.03)
    gone = np.full((4, 64, 64, 3), 255, np.uint8)
    assert [sight.centre[0, 0] for sight in read(gone, 2)] == [0, WORLD]


def test_small_balls_are_not_counted() -> None:
    assert all(m.counts for m in motions("uniform", "in", 5))
    small = [m for m in motions("uniform", "r_out", 30) if m.radii[0] < 0.6]
    assert small and not any(m.counts for m in small)


def test_clips_are_drawn_as_files_and_scored_by_their_names(tmp_path) -> None:
    """Clips as the law has them are right, and those that stand still where the model's part begins
    are not; balls too small to be read are counted apart."""
    recipe = datasets.PhyWorldRecipe(out=tmp_path / "true", clips=12, size=64)
    datasets.draw_clips(recipe)
    with pytest.raises(UserError, match="'size': 64.*expected.*'size': 128"):
        datasets.draw_clips(recipe.model_copy(update={"size": 128}))
    entries = read_manifest(recipe.out / "clips.csv", recipe.out)
    assert [entry.id for entry in entries] == phyworld.names("test", 12, 0)
    (tmp_path / "still").mkdir()
    for entry in entries:
        frames = render(phyworld.drawn(entry.id), 64)
        frames[phyworld.SHOWN :] = frames[phyworld.SHOWN - 1]
        write_video(tmp_path / "still" / f"{entry.id}.mp4", frames, phyworld.FPS)
    evaluation = evaluate("phyworld", recipe.out, tmp_path / "scores", against=tmp_path / "still")
    error = evaluation.summary.metrics["velocity_error"]
    small = sum(not phyworld.drawn(entry.id).counts for entry in entries)
    assert error.invalid >= small > 0 and error.n + error.invalid == 12
    assert error.mean < 0.03
    assert not any(map(failing_checks, evaluation.rows)), "a setting that is off is no check"
    assert set(evaluation.summary.by_scenario) == {f"{t} {g}" for t, g in phyworld.SERIES}
    assert evaluation.comparison is not None
    assert evaluation.comparison.metrics["velocity_error"].difference < -0.5
    shown = table({"true": evaluation}, by_scenario=True)
    assert f"velocity_error {error.mean:.4f} [{error.low:.4f}, " in shown
    assert "parabola v_out  velocity_error" in shown and "against" in shown


def test_models_continue_two_latents_and_are_scored_after_them(
    twins: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    values = recipe_values(twins, tmp_path / "clips.csv", tmp_path / "cache")
    folder = TWINS["ltx-0.9.5"][1](tmp_path / "model")
    values["backbone"] = {"name": "ltx", "weights": str(folder), "positions": "causal"}
    values["data"] |= {"frames": 33, "height": 64, "width": 64}
    values["generation"] |= {"dynamic_guidance": False}
    (path := tmp_path / "recipe.yaml").write_text(Recipe.parse(values).text())
    bench = PhyWorld(motions=2)
    prompts, shown = bench.every_prompt(), {}

    class Lawful:
        @staticmethod
        def sample(prompt: str, seed: int, frames: list) -> np.ndarray:
            shown[prompt] = np.stack([np.asarray(frame) for frame in frames])
            clip = render(phyworld.drawn(prompt), 64)
            clip[: len(frames)] = 255  # What is shown is not scored.
            return np.concatenate([clip, clip[-1:]])

    module = importlib.import_module("videorepa.generate")
    monkeypatch.setattr(module, "_sampler", lambda *_: Lawful)
    clips = generate(path, prompts, tmp_path / "made", benchmark=bench)
    assert [len(frames) for frames in shown.values()] == [9, 9]
    assert np.array_equal(shown[prompts[0].id], render(phyworld.drawn(prompts[0].id), 64)[:9])
    done = readable_clips(tmp_path / "made")
    assert all(clip.kept_image and clip.kept_film for clip in done.values()) and len(clips) == 2
    found = evaluate("phyworld", tmp_path / "made", tmp_path / "scores")
    assert [row["shown"] for row in found.rows] == [9, 9]
    assert found.summary.metrics["velocity_error"].mean < 0.03
    sidecar = clips[0].with_suffix(".json")
    sidecar.write_text(sidecar.read_text().replace('"shown_frames": 9', '"shown_frames": 40'))
    with pytest.raises(ClipError, match="says that 40 frames were shown"):
        PhyWorld().read(clips[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "uniform"}, "takes 2 latents here .9 frames.*is shown 1 latent"),
        ({"height": 32}, "world is square, and clips have 32x64"),
    ],
)
def test_models_that_cannot_be_shown_a_motion_are_refused(
    twins: dict[str, Path], tmp_path: Path, changes: dict, message: str
) -> None:
    values = recipe_values(twins, tmp_path / "clips.csv", tmp_path / "cache")
    folder = TWINS["ltx-0.9.5"][1](tmp_path / "model")
    values["backbone"] = {"name": "ltx", "weights": str(folder), "positions": "causal"}
    values["data"] |= {"frames": 33, "height": 64, "width": 64}
    values["generation"] |= {"dynamic_guidance": False}
    for key, value in changes.items():
        values["data" if key in values["data"] else "backbone"][key] = value
    (path := tmp_path / "recipe.yaml").write_text(Recipe.parse(values).text())
    bench = PhyWorld(motions=1)
    with pytest.raises(UserError, match=message):
        generate(path, bench.every_prompt(), tmp_path / "made", benchmark=bench)


def test_what_is_trained_on_is_not_scored(tmp_path) -> None:
    """Of the same seed, clips to train on and the benchmark's have no motion in common."""
    with pytest.raises(ValueError, match="set groups"):
        datasets.PhyWorldRecipe(out=tmp_path, clips=6, split="train")
    recipe = datasets.PhyWorldRecipe(
        out=tmp_path / "train", clips=6, split="train", groups=("in",), size=16
    )
    datasets.draw_clips(recipe)
    trained = [entry.id for entry in read_manifest(recipe.out / "clips.csv", recipe.out)]
    tested = [prompt.id for prompt in PhyWorld().every_prompt()]
    assert not set(trained) & set(tested)
    radii = {name: phyworld.drawn(name).radii for name in trained + tested}
    assert len(set(radii.values())) == len(radii)
    for seen in (lambda: PhyWorld().clips(recipe.out), lambda: PhyWorld().scenario(trained[0])):
        with pytest.raises(UserError, match="is a motion to train on"):
            seen()
    with pytest.raises(UserError, match="'split': 'train'.*expected.*'split': 'test'"):
        datasets.draw_clips(recipe.model_copy(update={"split": "test"}))


def test_groups_can_be_left_out_and_names_that_are_none_are_refused(tmp_path) -> None:
    recipe = datasets.PhyWorldRecipe(out=tmp_path, clips=4, groups=("in",), size=16)
    assert datasets.draw_clips(recipe) == {"clips": 4}
    assert sorted(path.stem for path in tmp_path.glob("*.mp4")) == [
        "test-collision-in-0-0000",
        "test-parabola-in-0-0000",
        "test-uniform-in-0-0000",
        "test-uniform-in-0-0001",
    ]
    for wrong in (
        "uniform",
        "uniform-in-0-0001",
        "test-uniform-out-0-0001",
        "../test-uniform-in-0-0001",
    ):
        with pytest.raises(UserError, match="not the name of a PhyWorld motion"):
            PhyWorld().score(np.zeros((32, 8, 8, 3), np.uint8), wrong)
