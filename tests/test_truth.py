"""The teacher that reads the simulator's scenes: what its tokens say, and where it can be used."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from videorepa.align.contract import check
from videorepa.data.source import open_source
from videorepa.data.video import to_video
from videorepa.encoders.truth import FACTS, SPEED, Tells, Truth
from videorepa.errors import UserError
from videorepa.head import train_head
from videorepa.inspect import inspect
from videorepa.prepare import prepare
from videorepa.probing.sources import all_teachers
from videorepa.recipe import Recipe
from videorepa.settings import plugins
from videorepa.train import train
from videorepa.world import scenarios
from videorepa.world.render import render, visible
from videorepa.world.scenarios import SCENARIOS, draw_scene
from videorepa.world.simulator import (
    COLOURS,
    FLOOR,
    GRAVITY,
    TOUCHED,
    Ball,
    Box,
    Look,
    Plank,
    Scene,
    Screen,
    Trajectory,
    simulate,
    until_contact,
)

SCENE_AND_PLACE: tuple[tuple[Tells, ...], ...] = (("scene", "place"), ("place", "scene"))
SHARE, RIGHT, DOWN, *_ = range(FACTS)
TO_FLOOR, TO_PLANK, TO_BODY = (3 + TOUCHED.index(kind) for kind in ("floor", "plank", "body"))


def scene(*bodies, **rest) -> Scene:
    return Scene("", "", bodies, **rest)


def of_colour(tokens: np.ndarray, colour: str) -> np.ndarray:
    first = FACTS * list(COLOURS).index(colour)
    return tokens[..., first : first + FACTS]


def falling(**changes) -> Scene:
    ball = {"colour": "green", "radius": 3.0, "position": (20.0, 12.0), "velocity": (-0.5, 0.0)}
    return scene(Ball(**ball | changes))


# What it says of bodies.


def test_a_part_of_the_truth_is_those_channels_of_all_of_it() -> None:
    whole = Truth().tokens(falling(), 17)
    motion = Truth(tells=("motion",)).tokens(falling(), 17)
    assert motion.shape[-1] == 2 * len(COLOURS) == Truth(tells=("motion",)).shape(17).width
    green = 2 * list(COLOURS).index("green")
    assert np.array_equal(motion[..., green : green + 2], of_colour(whole, "green")[..., 1:3])
    # In the order of the channels, whichever is named first.
    some = [Truth(tells=tells).tokens(falling(), 17) for tells in SCENE_AND_PLACE]
    assert np.array_equal(*some) and np.array_equal(some[0][..., -3:], whole[..., -3:])
    with pytest.raises(ValidationError, match="told once"):
        Truth(tells=("place", "place"))


def test_a_ball_in_free_fall() -> None:
    """It is within one token at first, and falls as the parabola says until it hits the floor."""
    spec = Truth(frames=17, tubelet=1)
    tokens = of_colour(spec.tokens(falling(), 17), "green")
    area = math.pi * 3**2 / 8**2
    ball = tokens[0, 1, 2]  # Rows 8 to 16, columns 16 to 24.
    assert ball[SHARE] == pytest.approx(area, rel=0.02)
    assert not tokens[0, 2:].any() and not tokens[0, 0].any()
    steps = tokens.sum((1, 2))
    hit = math.sqrt(2 * (FLOOR - 3 - 12) / GRAVITY)
    for frame in range(int(hit)):
        share, right, down = steps[frame, [SHARE, RIGHT, DOWN]]
        assert share == pytest.approx(area, rel=0.05)
        assert right / share == pytest.approx(-0.5 / SPEED, rel=1e-3)
        # From one frame to the next; the engine's steps lag by an eighth of a frame or less.
        assert down / share == pytest.approx(GRAVITY * (frame + 0.5) / SPEED, abs=GRAVITY / 16)
        wait = -spec.tau * math.log(steps[frame, TO_FLOOR] / share)
        assert wait == pytest.approx(hit - frame, abs=0.2)
    assert not steps[:, [TO_PLANK, TO_BODY]].any()


def test_a_token_is_the_mean_over_its_frames_and_the_first_frame_is_left_out() -> None:
    fine = Truth(frames=17, tubelet=1).tokens(falling(), 17)
    tokens = Truth().tokens(falling(), 17)
    assert tokens.shape == Truth().shape(17).tokens.shape[1:] == (8, 8, 8, FACTS * 6 + 3)
    assert (Truth().shape(17).start, Truth().shape(17).stride) == (1, 2)
    np.testing.assert_allclose(tokens, (fine[1::2] + fine[2::2]) / 2, atol=1e-6)
    coarse = Truth(patch=32).tokens(falling(), 17)
    np.testing.assert_allclose(
        coarse, tokens.reshape(8, 2, 4, 2, 4, -1).mean((2, 4)), rtol=1e-5, atol=1e-6
    )


def test_shares_add_up_to_one_and_values_are_of_order_one() -> None:
    for scenario in SCENARIOS:
        tokens = Truth().tokens(draw_scene(2, 0, scenario), 17)
        shares = tokens[..., : FACTS * 6 : FACTS].sum(-1) + tokens[..., -3:].sum(-1)
        np.testing.assert_allclose(shares, 1, atol=1e-5)
        assert 0.5 < np.abs(tokens[..., :-3]).max() < 4, scenario


def test_what_rolls_touches_the_floor_and_nears_the_body_that_it_will_hit() -> None:
    # 40 - 20 - 10 = 10 pixels apart at 2 pixels a frame: five frames.
    balls = scenarios.rolling("red", 5.0, 20.0, 2.0), scenarios.rolling("blue", 5.0, 40.0, 0.0)
    waits = until_contact(scene(*balls), frames=4)
    floor, plank, body = (waits[..., TOUCHED.index(kind)] for kind in ("floor", "plank", "body"))
    assert floor.max() <= 0.25 and np.isinf(plank).all()
    np.testing.assert_allclose(body, (5 - np.arange(4))[:, None].repeat(2, 1), atol=0.2)
    tokens = Truth(frames=4).tokens(scene(*balls), 4).sum((1, 2))
    for colour in ("red", "blue"):
        own = of_colour(tokens, colour)
        np.testing.assert_allclose(own[:, TO_FLOOR], own[:, SHARE], rtol=0.1)
        near = (np.exp(-5 / 4) + np.exp(-4 / 4)) / 2  # Frames 0 and 1.
        assert own[0, TO_BODY] / own[0, SHARE] == pytest.approx(near, rel=0.06)
    assert of_colour(tokens, "red")[0, RIGHT] > 0 == of_colour(tokens, "blue")[0, RIGHT]


def test_a_contact_after_the_clips_end_counts_and_one_beyond_the_horizon_does_not() -> None:
    hit = math.sqrt(2 * (FLOOR - 3 - 12) / GRAVITY)
    waits = until_contact(falling(), frames=5, horizon=11)[:, 0, TOUCHED.index("floor")]
    assert np.isinf(waits[: math.ceil(hit - 11)]).all() and math.ceil(hit - 11) == 3
    np.testing.assert_allclose(waits[3:], hit - np.arange(3, 5), atol=0.2)


def test_a_shelf_is_a_plank_and_no_floor() -> None:
    ball = Ball(colour="cyan", radius=5.0, position=(32.0, 23.0))
    shelf = Plank((24.0, 30.0), (40.0, 30.0))
    waits = until_contact(scene(ball, planks=(shelf,)), frames=5)[:, 0]
    assert waits[:, TOUCHED.index("plank")].max() <= 0.25
    assert np.isinf(waits[:, [TOUCHED.index("floor"), TOUCHED.index("body")]]).all()


# What it says agrees with what is drawn.

CROWD = scene(
    Ball(colour="red", radius=6.0, position=(20.3, 20.0), velocity=(1.0, 0.0)),
    Box(colour="blue", width=12.0, height=7.0, position=(27.0, 24.0), velocity=(-0.5, 0.0)),
    planks=(Plank((4.0, 40.0), (30.0, 34.0)),),
    screen=Screen(29.0, 41.0, 16.0),
    look=Look(seed=3, shake=1.0),
)


def test_the_shares_are_those_of_the_drawn_pixels() -> None:
    """Each thing is drawn over the others: the picture is the mean of their colours, by share."""
    path = simulate(CROWD, 4)
    nothing = Trajectory(np.zeros((4, 0, 2)), np.zeros((4, 0)), np.zeros((4, 0, 0), bool))
    room = render(scene(look=CROWD.look), nothing) / 255.0
    shares = visible(CROWD, path)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)
    assert (shares.max((0, 1, 2)) > 0.99).all()  # All five are seen somewhere.
    colours = np.array([COLOURS["red"], COLOURS["blue"], (0.22,) * 3, (0.5,) * 3])
    picture = shares[..., :-1] @ colours + shares[..., -1:] * room
    above = slice(0, int(FLOOR) - 2)  # Bodies cast shadows on the floor.
    drawn = render(CROWD, path)[:, above] / 255.0
    np.testing.assert_allclose(picture[:, above], drawn, atol=1.5 / 255)


def test_what_is_behind_the_screen_covers_nothing() -> None:
    ball = scenarios.rolling("red", 5.0, 32.0, 0.0)
    bare, hidden = (
        Truth(frames=4).tokens(scene(ball, screen=screen), 4)
        for screen in (None, Screen(20.0, 44.0, 30.0))
    )
    assert of_colour(bare, "red").any() and not of_colour(hidden, "red").any()
    assert hidden[..., -2].max() == pytest.approx(1)


def test_a_colour_has_the_same_channels_in_every_clip() -> None:
    one = Truth().tokens(draw_scene(1, 0, "collide"), 17)
    colours = {body.colour for body in draw_scene(1, 0, "collide").bodies}
    seen = {colour for colour in COLOURS if of_colour(one, colour).any()}
    assert seen == colours and len(seen) == 2
    red, blue = (Truth().tokens(falling(colour=colour), 17) for colour in ("red", "blue"))
    np.testing.assert_array_equal(of_colour(red, "red"), of_colour(blue, "blue"))


# The contract of encoders.


def test_the_live_grid_is_as_described_and_deterministic() -> None:
    spec = plugins.description("encoders", "truth")()
    scenes = [draw_scene(4, index) for index in range(2)]
    video = torch.zeros(2, 17, 3, 64, 64)
    live, shape = spec.load(torch.device("cpu"), torch.bfloat16), spec.shape(17)
    grid = live.see(video, scenes)
    assert grid.tokens.shape == (2, *shape.tokens.shape[1:]) and grid.tokens.dtype == torch.float32
    assert (grid.start, grid.stride) == (shape.start, shape.stride)
    assert torch.equal(grid.tokens, live.see(video + 1, scenes).tokens)
    assert torch.equal(grid.sample(1).tokens, live.see(video[:1], scenes[1:]).tokens)
    for without in (lambda: live(video), lambda: live.see(video, [scenes[0], None])):
        with pytest.raises(UserError, match="truth reads the simulator's scenes.*data.lab"):
            without()
    with pytest.raises(UserError, match="takes 16 frames and the clip has 9"):
        spec.shape(9)
    with pytest.raises(UserError, match="sizes in multiples of 7"):
        Truth(patch=7).load(torch.device("cpu"))


def test_its_fingerprint_covers_settings_format_and_world(monkeypatch) -> None:
    prints = [str(Truth(**own).fingerprint()) for own in ({}, {"tau": 2.0}, {"patch": 16})]
    for name in ("FORMAT", "VERSION"):
        monkeypatch.setattr(f"videorepa.encoders.truth.{name}", 99)
        prints.append(str(Truth().fingerprint()))
    assert len(set(prints)) == 5


TRUTH = "encoder={name: truth, frames: 8}"
LAB = ("data.manifest=null", "data.lab={clips: 3, seed: 5}", "data.height=64", "data.width=64")


def test_its_features_are_prepared_and_taught_like_any_others(
    recipe: Recipe, tmp_path: Path
) -> None:
    own = recipe.override(TRUTH, *LAB, "optim.steps=2")
    prepare(own)
    cached = train(own, tmp_path / "cached")
    online = train(own.override("align.teacher=online"), tmp_path / "online")
    logs = [json.loads(run.log_path.read_text().splitlines()[0]) for run in (cached, online)]
    assert logs[0]["align"] > 0
    # The cache keeps 8 bits.
    assert logs[0]["align"] == pytest.approx(logs[1]["align"], rel=0.01)
    assert "4x8x8 x 39, truth, fed 8x64x64" in str(inspect(own))


@pytest.mark.parametrize(
    "loss",
    [
        "cosine",
        "relation",
        "relation_correlation",
        "u_repa",
        "crepa",
        "moalign",
        "local_gram_flow",
    ],
)
def test_every_loss_can_teach_it(recipe: Recipe, loss: str) -> None:
    sampled = open_source(recipe.override(*LAB).data).sample(0)
    spec = Truth(frames=8)
    grid = spec.load(torch.device("cpu")).see(to_video(sampled.frames)[None], [sampled.scene])
    value = plugins.description("losses", loss)()
    student = grid.with_tokens(torch.randn(grid.tokens.shape).requires_grad_())
    value(student, grid).backward()
    assert student.tokens.grad is not None and student.tokens.grad.isfinite().all()
    assert student.tokens.grad.any()


# Where there are frames alone.


def test_clips_of_a_manifest_are_refused_before_anything_is_made(recipe: Recipe) -> None:
    own = recipe.override("encoder={name: truth, frames: 8}")
    for use in (check, inspect, prepare):
        with pytest.raises(UserError, match="truth reads the simulator's scenes.*data.lab"):
            use(own)
    assert not own.data.cache.exists()


def test_verbs_that_read_frames_alone_refuse_it(recipe: Recipe, tmp_path: Path) -> None:
    own = recipe.override(TRUTH, *LAB)
    for use in (
        lambda: all_teachers(own, {}),
        lambda: train_head(own, "motion", tmp_path / "head"),
    ):
        with pytest.raises(UserError, match="here clips are frames alone"):
            use()
    with pytest.raises(UserError, match="truth is no network"):
        recipe.override("encoder={name: untrained, of: {name: truth}}")


@pytest.mark.parametrize("key", ["height: 32", "group: 4", "crop: [8, 8]", "normalized: true"])
def test_what_has_no_meaning_for_it_is_refused(recipe: Recipe, key: str) -> None:
    with pytest.raises(UserError, match=f"encoder: {key.partition(':')[0]}: Input should be"):
        recipe.override(f"encoder={{name: truth, {key}}}")
