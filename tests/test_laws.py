"""The checks against the simulator: real clips pass, and each broken law fails its own check."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import ndimage

from videorepa.benchmarks import lab
from videorepa.benchmarks.laws import captions
from videorepa.benchmarks.laws import checks as laws
from videorepa.benchmarks.laws.tracking import observe
from videorepa.errors import UserError
from videorepa.lab.calibration import corruptions, detection
from videorepa.lab.calibration import tolerances as calibration
from videorepa.world.render import Clip, make_clip, render
from videorepa.world.scenarios import SCENARIOS, draw_scene
from videorepa.world.simulator import COLOURS, SIZE, Ball, Box

SEED = 77


def blurred(frames: np.ndarray) -> np.ndarray:
    """What an autoencoder does, roughly: blur, paler colours, smooth noise."""
    rng = np.random.default_rng(int(frames.astype(np.int64).sum()))
    noise = rng.normal(0, 4, (len(frames), SIZE // 2, SIZE // 2, 3)).repeat(2, 1).repeat(2, 2)
    video = ndimage.gaussian_filter(frames.astype(np.float32), (0.25, 1.0, 1.0, 0), truncate=3)
    gray = video.mean(-1, keepdims=True)
    return np.clip(gray + 0.9 * (video - gray) + noise + 0.5, 0, 255).astype(np.uint8)


def blurred_batch(clips: np.ndarray) -> np.ndarray:
    return np.stack([blurred(frames) for frames in clips])


@cache
def tolerances() -> dict[str, float]:
    return calibration.calibrate(blurred_batch, clips=50, seed=SEED)["tolerances"]


@cache
def rows() -> dict[str, dict]:
    judged = detection.judge(
        blurred_batch, clips=22, seed=SEED + 1, tolerances=tolerances(), by_degrees=False
    )
    return {row["kind"]: row for row in judged}


def judged(frames: np.ndarray, clip: Clip) -> laws.ClipVerdict:
    return laws.score(blurred(frames), clip.caption, tolerances())


def failing(verdict: laws.ClipVerdict, aspect: str) -> set[str]:
    return {
        name
        for name, check in verdict.checks.items()
        if not check.passed and laws.CHECKS[name].aspect == aspect
    }


# --- tracking


@pytest.mark.parametrize("shown, mean, most", [(lambda f: f, 0.05, 0.3), (blurred, 0.15, 0.8)])
def test_centroids_are_the_simulators_to_a_fraction_of_a_pixel(shown, mean, most):
    errors = []
    for index in range(25):
        clip = make_clip(SEED, index)
        seen = observe(shown(clip.frames))
        for number, ball in enumerate(clip.scene.bodies):
            track = seen.tracks[ball.colour]
            error = track.position - clip.trajectory.positions[:, number]
            errors.extend(np.linalg.norm(error[track.whole], axis=1))
            assert track.size == pytest.approx(np.sqrt(ball.area / np.pi), abs=0.5)
    assert len(errors) > 200
    assert np.mean(errors) < mean and max(errors) < most


def test_only_the_scenes_balls_and_screen_are_seen():
    for index in range(20):
        clip = make_clip(SEED, index)
        seen = observe(blurred(clip.frames))
        assert {track.colour for track in seen.bodies} == {
            ball.colour for ball in clip.scene.bodies
        }
        if clip.scene.screen is None:
            assert seen.screen is None
        else:
            assert seen.screen is not None
            assert seen.screen.left == pytest.approx(clip.scene.screen.left, abs=2)
            assert seen.screen.right == pytest.approx(clip.scene.screen.right, abs=2)
            assert seen.screen.top == pytest.approx(clip.scene.screen.top, abs=2)


def test_edge_and_screen_are_told_from_plain_sight():
    clip = make_clip(SEED, 0, "hide")
    (ball,), screen = clip.scene.bodies, clip.scene.screen
    assert screen is not None
    assert isinstance(ball, Ball)
    track = observe(clip.frames).tracks[ball.colour]
    x = clip.trajectory.positions[:, 0, 0]
    behind = (x > screen.left - ball.radius) & (x < screen.right + ball.radius)
    cut = (x < ball.radius - 0.5) | (x > SIZE - ball.radius + 0.5)
    assert behind.any() and not track.whole[behind].any()
    assert not track.whole[cut].any()
    clear = (x > ball.radius + 1) & (x < screen.left - ball.radius - 3)
    assert track.whole[clear].all()


@pytest.mark.parametrize("frames", [np.zeros((17, 32, 32, 3), np.uint8), np.zeros((17, 64, 64, 3))])
def test_a_clip_of_another_kind_is_refused(frames):
    with pytest.raises(UserError, match="shape"):
        observe(frames)


# --- captions


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_caption_of_the_lab_is_understood(scenario):
    for index in range(30):
        clip = make_clip(SEED, index, scenario)
        request = captions.parse_caption(clip.caption)
        assert request.event == scenario
        assert request.colours == tuple(ball.colour for ball in clip.scene.bodies)
        shapes = tuple("box" if isinstance(b, Box) else "ball" for b in clip.scene.bodies)
        assert request.shapes == shapes
        if request.sign:
            shift = np.diff(clip.trajectory.positions[[0, -1], 0, 0])[0]
            assert request.sign == np.sign(shift)


def test_a_strange_caption_is_refused():
    with pytest.raises(UserError, match="A pink ball"):
        captions.parse_caption("A pink ball rolls to the left.")


# --- laws


def test_real_clips_pass_before_and_after_the_autoencoder():
    for kind in ("real", "reconstructed"):
        assert rows()[kind]["sa"] >= 0.95, rows()[kind]
        assert rows()[kind]["pc"] >= 0.9, rows()[kind]


@pytest.mark.parametrize(
    "kind, aspect, most, reason, at_least",
    [
        ("shuffled", "pc", 0.1, "continuity", 0.8),
        ("reversed", "sa", 0.3, "direction", 0.6),
        ("frozen", "sa", 0.0, "event", 1.0),
        ("frozen", "pc", 0.0, "presence", 1.0),
        ("vanishing", "pc", 0.05, "permanence", 0.95),
        ("swelling", "pc", 0.0, "size", 1.0),
        ("teleporting", "pc", 0.1, "continuity", 0.9),
        ("pushed", "pc", 0.0, "momentum", 0.8),
        ("light", "pc", 0.0, "arc", 1.0),
        ("heavy", "pc", 0.0, "gravity", 1.0),
        ("bouncy", "pc", 0.0, "energy", 1.0),
        ("sunken", "pc", 0.0, "floor", 1.0),
    ],
)
def test_a_broken_clip_fails_for_its_reason(kind, aspect, most, reason, at_least):
    row = rows()[kind]
    assert row["n"] >= 3
    assert row[aspect] <= most, row
    assert row["failing"].get(reason, 0.0) >= at_least, row


@pytest.mark.parametrize("index", range(3))
def test_a_reversed_fall_gains_energy_and_a_reversed_roll_breaks_no_law(index):
    fall = make_clip(SEED, index, "fall")
    assert "energy" in failing(judged(fall.frames[::-1], fall), "pc")
    roll = make_clip(SEED, index, "roll")
    verdict = judged(roll.frames[::-1], roll)
    assert verdict.pc and failing(verdict, "sa") == {"direction"}


def test_a_ball_left_hanging_violates_gravity():
    clip = make_clip(SEED, 0, "fall")
    frozen = clip.frames[:1].repeat(17, axis=0)
    assert {"gravity", "arc"} <= failing(judged(frozen, clip), "pc")


def _redrawn(clip: Clip, change) -> np.ndarray:
    positions = clip.trajectory.positions.copy()
    change(positions)
    return render(clip.scene, replace(clip.trajectory, positions=positions))


def test_a_ball_in_the_floor_and_a_ball_in_a_ball_are_found():
    roll = make_clip(SEED, 1, "roll")

    def sink(positions):
        positions[:, 0, 1] += 4

    assert "floor" in failing(judged(_redrawn(roll, sink), roll), "pc")
    collide = make_clip(SEED, 1, "collide")

    def ghost(positions):
        start, step = positions[0, 0, 0], positions[1, 0, 0] - positions[0, 0, 0]
        positions[:, 0, 0] = start + step * np.arange(17)
        positions[:, 1] = positions[0, 1]

    assert "overlap" in failing(judged(_redrawn(collide, ghost), collide), "pc")


def test_rolling_balls_neither_brake_nor_leap_nor_dally_behind_the_screen():
    roll = make_clip(SEED, 1, "roll")
    time = np.arange(17)

    def brake(positions):
        step = positions[1, 0, 0] - positions[0, 0, 0]
        positions[:, 0, 0] = positions[0, 0, 0] + step * (time - 0.025 * time**2)

    assert failing(judged(_redrawn(roll, brake), roll), "pc") == {"coasting"}

    def turn(positions):
        positions[9:, 0] = positions[7::-1, 0]

    assert "momentum" in failing(judged(_redrawn(roll, turn), roll), "pc")

    hide = make_clip(SEED, 0, "hide")
    x, screen = hide.trajectory.positions[:, 0, 0], hide.scene.screen
    assert screen is not None
    inside = int(np.argmin(np.abs(x - (screen.left + screen.right) / 2)))

    def dally(positions):
        positions[inside + 2 :] = positions[inside:-2].copy()
        positions[inside : inside + 2] = positions[inside]

    assert "coasting" in failing(judged(_redrawn(hide, dally), hide), "pc")


def test_a_collision_that_swallows_the_momentum_is_found():
    collide = make_clip(SEED, 1, "collide")

    def swallow(positions):
        first = int(np.argmax(collide.trajectory.touched[:, 0, 1]))
        positions[first:, 0] = positions[first, 0] - np.sign(positions[1, 0] - positions[0, 0]) * 6
        positions[first:, 1] = positions[first, 1]

    assert "exchange" in failing(judged(_redrawn(collide, swallow), collide), "pc")


def test_a_growing_a_stretched_and_a_split_ball_are_found():
    clip = make_clip(SEED, 2, "fall")
    ball = clip.scene.bodies[0]
    assert isinstance(ball, Ball)
    bigger = replace(clip.scene, bodies=(replace(ball, radius=ball.radius * 1.4),))
    grown = np.concatenate([clip.frames[:9], render(bigger, clip.trajectory)[9:]])
    assert "size" in failing(judged(grown, clip), "pc")

    shifted = _redrawn(clip, lambda positions: np.add(positions, (5, 0), out=positions))
    stretched = clip.frames.copy()
    stretched[8:] = np.minimum(clip.frames, shifted)[8:]
    assert "shape" in failing(judged(stretched, clip), "pc")

    shifted = _redrawn(clip, lambda positions: np.subtract(positions, (22, 0), out=positions))
    twice = clip.frames.copy()
    ball_there = np.abs(shifted.astype(int) - empty_room(clip)).max(-1) > 10
    twice[8:][ball_there[8:]] = shifted[8:][ball_there[8:]]
    verdict = judged(twice, clip)
    assert "one_piece" in failing(verdict, "pc") and "objects" in failing(verdict, "sa")


def empty_room(clip: Clip) -> np.ndarray:
    empty = replace(clip.scene, bodies=())
    return render(empty, clip.trajectory).astype(int)


def test_a_flash_of_something_foreign_is_found():
    clip = make_clip(SEED, 3, "roll")
    frames = clip.frames.copy()
    frames[7, 8:16, 20:28] = (90, 90, 90)
    assert failing(judged(frames, clip), "pc") == {"extras"}


def test_the_wrong_ball_moving_rightly_is_physical_but_not_what_was_asked():
    clip = make_clip(SEED, 4, "roll")
    other = next(c for c in COLOURS if c not in clip.caption)
    caption = clip.caption.replace(clip.scene.bodies[0].colour, other)
    verdict = laws.score(blurred(clip.frames), caption, tolerances())
    assert verdict.pc and not verdict.checks["objects"].passed


def test_an_empty_room_earns_nothing():
    clip = make_clip(SEED, 0, "roll")
    verdict = judged(empty_room(clip).astype(np.uint8), clip)
    assert not verdict.sa and failing(verdict, "pc") == {"presence"}


def test_a_passed_screen_that_hides_forever_is_a_vanished_ball():
    clip = make_clip(SEED, 0, "hide")
    screen = clip.scene.screen
    assert screen is not None
    x = clip.trajectory.positions[:, 0, 0]
    inside = int(np.argmin(np.abs(x - (screen.left + screen.right) / 2)))

    def stay(positions):
        positions[inside:, 0] = (-100, 0)

    assert "permanence" in failing(judged(_redrawn(clip, stay), clip), "pc")


# --- calibration and benchmark


def test_the_packaged_tolerances_fit_the_checks_and_say_where_they_come_from():
    text = Path(laws.__file__).with_name(laws.TOLERANCES).read_text()
    stored = json.loads(text)
    assert stored["tolerances"].keys() == {n for n, d in laws.CHECKS.items() if d.aspect == "pc"}
    assert {"percentile", "clips", "seed", "autoencoder", "share_pc"} <= stored["provenance"].keys()


def test_a_recipe_becomes_tolerances_and_a_page(tmp_path, monkeypatch):
    sizes = set()

    def reconstruct(clips):
        sizes.add(len(clips))
        return clips

    monkeypatch.setattr(calibration, "autoencoder_reconstruct", lambda folder: reconstruct)
    for kind, corruption in corruptions.CORRUPTIONS.items():
        # Two strengths of each make a curve, and judging is what takes time here.
        two = corruption.strengths[:: max(1, len(corruption.strengths) - 1)]
        monkeypatch.setitem(corruptions.CORRUPTIONS, kind, replace(corruption, strengths=two))
    recipe = calibration.LawsRecipe(
        vae=tmp_path,
        out=tmp_path / "new" / "tolerances.json",
        clips=38,
        table_clips=2,
        table_out=tmp_path / "docs" / "law-checks.md",
    )
    with pytest.raises(UserError, match="Train one first"):
        calibration.calibrate_laws(recipe)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    shares = calibration.calibrate_laws(recipe)
    assert shares["share_sa"] == 1 and shares["share_pc"] >= 0.8
    assert max(sizes) == detection.BATCH

    stored = json.loads(recipe.out.read_text())
    packaged = json.loads(calibration.LawsRecipe.model_fields["out"].default.read_text())
    assert stored["tolerances"].keys() == packaged["tolerances"].keys()
    provenance = stored["provenance"]
    assert provenance["tried_on_seed"] != provenance["seed"]
    assert recipe.table_out is not None
    page = recipe.table_out.read_text()
    assert provenance["autoencoder"] in page and "{" not in page
    assert all(f"- **{kind}**" in page for kind in corruptions.CORRUPTIONS)


def test_the_shipped_recipe_is_one():
    path = Path(__file__).parents[1] / "recipes" / "micro" / "laws.yaml"
    recipe = calibration.LawsRecipe.model_validate(yaml.safe_load(path.read_text()))
    assert path.parents[2] / recipe.out == calibration.LawsRecipe.model_fields["out"].default


def test_the_table_can_be_read():
    text = detection.format_table(list(rows().values()))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert cells[0][:3] == ["kind", "n", "SA"]
    assert len(cells) == 2 + 2 + len(corruptions.CORRUPTIONS)
    assert {len(line) for line in cells} == {6}


def test_a_corruption_grows_with_its_strength():
    clips = [make_clip(SEED, index) for index in range(11)]
    for kind, corruption in corruptions.CORRUPTIONS.items():
        if kind == "shuffled":
            continue  # Wherever a frame lands, it is as wrong.
        for clip in clips:
            broken = [
                corruption.apply(clip, np.random.default_rng(0), strength)
                for strength in corruption.strengths
            ]
            off = [np.abs(b - clip.frames.astype(float)).sum() for b in broken if b is not None]
            # A body that is moved by more than its size differs from itself no more.
            assert all(b > 0.9 * a for a, b in pairwise(off)), kind
            assert all(off) and off[:1] <= off[-1:], kind
            assert clip.frames.dtype == np.uint8


def test_the_degrees_are_written_and_drawn_from_the_same_numbers():
    rows = [
        {"kind": "reconstructed", "strength": None, "n": 20, "sa": 1.0, "pc": 0.95, "joint": 0.95},
        {"kind": "sunken", "strength": 1, "n": 20, "sa": 1.0, "pc": 0.5, "joint": 0.4},
        {"kind": "sunken", "strength": 2, "n": 20, "sa": 1.0, "pc": 0.25, "joint": 0.0},
    ]
    assert detection.format_degrees(rows).splitlines()[2:] == [
        "| sunken | 1 px | 20 | 50 [30, 70] | 60 [39, 78] |",
        "| sunken | 2 px | 20 | 75 [53, 89] | 100 [84, 100] |",
    ]
    assert corruptions.CORRUPTIONS["vanishing"].measured(1) == "1 frame"
    (plot,) = [axes for axes in detection.draw_degrees(rows).axes if axes.lines]
    unbroken, curve = plot.lines
    assert curve.get_ydata() == pytest.approx([50, 75])
    assert unbroken.get_ydata() == pytest.approx([5, 5])


def test_prompts_are_balanced_distinct_and_stable():
    benchmark = lab.Lab()
    prompts = benchmark.prompts(55, seed=0)
    assert Counter(benchmark.scenario(p.caption) for p in prompts) == dict.fromkeys(SCENARIOS, 5)
    assert len({prompt.caption for prompt in prompts}) == 55
    assert len({prompt.id for prompt in prompts}) == 55
    assert benchmark.prompts(20, seed=0) == prompts[:20]
    assert benchmark.prompts(20, seed=1) != prompts[:20]
    assert lab.Lab(prompts_made=20).every_prompt() == prompts[:20]  # As `generate --prompts lab`.


def test_prompts_of_two_scenarios_share_no_draw():
    """Else the colours of a turn would be the same, and a model good at red would be lucky or not
    for whole turns at a time, which no interval over captions knows."""
    prompts = [prompt.caption for prompt in lab.Lab().prompts(20 * len(SCENARIOS), seed=0)]
    first = [next(w for w in caption.split() if w in COLOURS) for caption in prompts]
    turns = [first[n : n + len(SCENARIOS)] for n in range(0, len(first), len(SCENARIOS))]
    alike = [a == b for turn in turns for a, b in combinations(turn, 2)]
    assert np.mean(alike) == pytest.approx(1 / len(COLOURS), abs=0.05)


def test_where_a_clip_is_broken_does_not_follow_its_scenario():
    clips = (i for i in range(300) if draw_scene(SEED, i).event == "fall")
    places = set()
    for index in islice(clips, 12):
        clip = make_clip(SEED, index)
        broken = corruptions.CORRUPTIONS["vanishing"].broken(clip, SEED, index, 1)
        if broken is not None:
            places.add(int((broken != clip.frames).any((1, 2, 3)).argmax()))
    assert len(places) > 3


def test_benchmark_scores_become_json_and_a_table():
    benchmark = lab.Lab()
    rows = []
    for prompt, scenario in [("a", "fall"), ("b", "roll")]:
        clip = make_clip(SEED, 1, scenario)
        row = benchmark.score(clip.frames, clip.caption)
        assert json.loads(json.dumps(row)) == row
        rows.append(row | {"prompt_id": prompt, "k": 0, "scenario": scenario})
    table = benchmark.aggregate(rows)
    assert table["sa"]["percent"] == 100 and table["sa"]["n"] == 2
    assert 5 < table["motion"]["mean"] < 200
    assert benchmark.compare(rows, rows)["joint"]["difference"] == 0
