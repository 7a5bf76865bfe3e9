"""The lab's simulator and renderer: deterministic, and true to the laws they are taken for."""

from __future__ import annotations

import os
import signal

import numpy as np
import pymunk
import pytest

from videorepa.world import contact, scenarios
from videorepa.world.render import make_clip, render
from videorepa.world.scenarios import SCENARIOS, Draw, draw_scene
from videorepa.world.simulator import (
    COLOURS,
    FLOOR,
    FRAMES,
    GRAVITY,
    SIZE,
    Ball,
    Box,
    Look,
    Plank,
    Scene,
    Trajectory,
    simulate,
)


def scene(*bodies, **rest) -> Scene:
    return Scene("", "", bodies, **rest)


def still(*centres: tuple[float, float], angle: float = 0.0) -> Trajectory:
    """One frame of bodies at these places."""
    count = len(centres)
    return Trajectory(
        np.array([centres], np.float32),
        np.full((1, count), angle, np.float32),
        np.zeros((1, count, count), bool),
    )


# The engine.


def test_free_fall_is_the_parabola() -> None:
    ball = Ball(colour="red", radius=5.0, position=(32.0, 10.0), velocity=(1.0, -2.0))
    path = simulate(scene(ball), frames=12).positions[:, 0]
    t = np.arange(12)
    np.testing.assert_allclose(path[:, 0], 32 + t, atol=1e-3)
    # Semi-implicit steps of an eighth of a frame lag the exact parabola by g * t / 16.
    np.testing.assert_allclose(path[:, 1], 10 - 2 * t + GRAVITY * t**2 / 2, atol=GRAVITY * 12 / 15)


def test_a_ball_rolls_without_loss_and_a_box_is_stopped_by_friction() -> None:
    ball = scenarios.rolling("red", 5.0, 8.0, 2.0)
    box = Box(
        colour="blue", width=10, height=6, position=(30.0, FLOOR - 3), velocity=(2.0, 0.0),
        friction=0.4,
    )  # fmt: skip
    path = simulate(scene(box), frames=17).positions[:, 0, 0]
    brake = 0.4 * GRAVITY
    assert path[-1] - path[0] == pytest.approx(2.0**2 / 2 / brake, abs=0.3)
    assert np.diff(path)[-3:] == pytest.approx(0, abs=1e-3)
    assert np.diff(simulate(scene(ball)).positions[:, 0, 0]) == pytest.approx(2.0, abs=0.02)


def test_a_ball_rolls_down_a_ramp_with_two_thirds_of_the_slopes_gravity() -> None:
    slope, foot = np.radians(25), 50.0
    plank = Plank((0.0, FLOOR - foot * np.tan(slope)), (foot, FLOOR))
    ball = scenarios.on_ramp("red", 5.0, scenarios.Side(1), foot, slope, 30.0, 0.5)
    path = simulate(scene(ball, planks=(plank,)), frames=10).positions[:, 0]
    along = np.linalg.norm(path - path[0], axis=1)
    t = np.arange(10)
    gain = 2 / 3 * GRAVITY * np.sin(slope)
    assert along == pytest.approx(0.5 * t + gain * t**2 / 2, abs=0.3)


def test_a_bounce_keeps_the_balls_own_share_of_its_speed() -> None:
    ball = Ball(colour="red", radius=5.0, position=(32.0, FLOOR - 15), elasticity=0.6)
    height = FLOOR - 5 - simulate(scene(ball), frames=30).positions[:, 0, 1]
    hit = int(np.argmax(height < 0.5))
    assert height[hit:].max() == pytest.approx(0.36 * 10, rel=0.15)


# The scenarios.


def test_a_signal_while_bodies_touch_is_not_lost(monkeypatch) -> None:
    """The engine drops what is raised where it says that bodies touch."""
    plain = pymunk.Arbiter.shapes
    assert isinstance(plain, property)

    def interrupted(arbiter: pymunk.Arbiter) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        assert plain.fget is not None
        return plain.fget(arbiter)

    monkeypatch.setattr(pymunk.Arbiter, "shapes", property(interrupted))
    with pytest.raises(KeyboardInterrupt):
        simulate(draw_scene(1, 0, "collide"))


def test_a_seed_names_the_same_clip_for_ever() -> None:
    a, b = make_clip(5, 12), make_clip(5, 12)
    assert a.caption == b.caption == draw_scene(5, 12).caption
    assert np.array_equal(a.frames, b.frames)
    assert not np.array_equal(a.frames, make_clip(5, 13).frames)
    assert a.frames.shape == (17, 64, 64, 3) and a.frames.dtype == np.uint8


@pytest.mark.parametrize("split", ["within", "beyond"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_keeps_the_laws(scenario: str, split) -> None:
    for index in range(30):
        drawn = draw_scene(1, index, scenario, split)
        happened = simulate(drawn)
        path, bodies = happened.positions, drawn.bodies
        assert drawn.event == scenario and all(body.colour in drawn.caption for body in bodies)
        assert len({body.colour for body in bodies}) == len(bodies)
        for number, body in enumerate(bodies):
            if isinstance(body, Ball):
                bottom = path[:, number, 1] + body.radius
                # A ball is stopped up to one engine step past the surface.
                assert bottom.max() < FLOOR + 0.8, "a ball sinks into the floor"
        if scenario in ("roll", "hide"):
            assert np.ptp(np.diff(path[:, 0, 0])) < 0.05
        pairs = {"collide": [(0, 1)], "chain": [(0, 1), (1, 2)], "stack": [(0, 1)]}
        for one in range(len(bodies)):
            for two in range(one):
                meant = (two, one) in pairs.get(scenario, [])
                assert happened.touched[-1, one, two] == meant
        if scenario in ("collide", "chain"):
            mass = np.array([body.area for body in bodies])
            momentum = (np.diff(path[:, :, 0], axis=0) * mass).sum(1)
            # Balls that spin when they meet take some momentum from the floor.
            assert np.ptp(momentum) < 0.2 * np.abs(momentum).max()


def test_what_is_named_is_in_the_frame_at_the_start() -> None:
    for index in range(200):
        drawn = draw_scene(2, index)
        starts = np.array([body.position for body in drawn.bodies])
        assert (starts > 0).all() and (starts < SIZE).all()


def test_beyond_is_past_the_upper_end_of_within() -> None:
    within = [Draw(np.random.default_rng(i)).extent(2, 4) for i in range(50)]
    beyond = [Draw(np.random.default_rng(i), "beyond").extent(2, 4) for i in range(50)]
    assert min(within) >= 2 and max(within) <= 4 <= min(beyond) and max(beyond) <= 5
    speed = {
        split: [abs(draw_scene(3, i, "roll", split).bodies[0].velocity[0]) for i in range(40)]
        for split in ("within", "beyond")
    }
    assert max(speed["within"]) <= min(speed["beyond"])


# The renderer.


def test_a_disc_and_a_turned_box_cover_their_areas_and_are_anti_aliased() -> None:
    ball = Ball(colour="blue", radius=6.0, position=(0, 0))
    box = Box(colour="blue", width=12.0, height=7.0, position=(0, 0))
    for body, angle in ((ball, 0.0), (box, 0.0), (box, 0.6)):
        plain = Look(seed=3)
        trajectory = still((30.3, 25.7), angle=angle)
        frame = render(scene(body, look=plain), trajectory)[0] / 255.0
        empty = render(scene(look=plain), still())[0] / 255.0
        colour = np.array(COLOURS["blue"])
        along = ((frame - empty) * (colour - empty)).sum(-1) / ((colour - empty) ** 2).sum(-1)
        cover = along[: int(FLOOR) - 1]
        assert cover.sum() == pytest.approx(body.area, rel=0.02)
        grid = np.arange(SIZE) + 0.5
        assert (cover.sum(0) @ grid) / cover.sum() == pytest.approx(30.3, abs=0.1)
        edge = (cover > 0.05) & (cover < 0.95)
        assert edge.sum() > 10


def test_only_bodies_have_strong_colours() -> None:
    for index in range(30):
        look = Look(seed=index, clutter=6)
        empty = render(scene(planks=(Plank((5, 30), (40, 20)),), look=look), still())
        assert np.ptp(empty, axis=-1).max() < 30


def test_the_camera_shakes_as_much_as_asked_and_moves_all_alike() -> None:
    ball = Ball(colour="red", radius=5.0, position=(32.0, 20.0))
    shelf = (Plank((20, 26.5), (44, 26.5)),)
    shaken = scene(ball, planks=shelf, look=Look(seed=1, shake=2.0))
    frames = render(shaken, simulate(shaken)).astype(float)
    red = (frames[..., 0] - frames[..., 1]).clip(60) - 60
    dark = (frames.max(-1) < 90) & (np.arange(SIZE)[:, None] < FLOOR - 8)
    grid = np.arange(SIZE) + 0.5
    ball_x = (red.sum(1) @ grid) / red.sum((1, 2))
    shelf_x = (dark.sum(1) @ grid) / dark.sum((1, 2))
    assert ball_x - ball_x.mean() == pytest.approx(shelf_x - shelf_x.mean(), abs=0.5)
    assert 0.5 < ball_x.std() < 2.1


def test_the_screen_hides_the_ball_and_it_comes_out_again() -> None:
    clip = make_clip(3, 0, "hide")
    colour = np.array(COLOURS[clip.scene.bodies[0].colour]) * 255
    near = np.abs(clip.frames.astype(float) - colour).sum(-1) < 40
    seen = near.sum((1, 2))
    assert seen[0] > 40 and seen.min() < 5 and seen[-1] > 40


# What contact is asked about.


@pytest.mark.parametrize("index", range(6))
def test_contact_is_in_the_future_and_as_the_label_says(index: int) -> None:
    clip, answer = contact.contact_clip(4, index)
    assert answer == (index % 2 == 0)
    assert clip.frames.shape == (FRAMES, SIZE, SIZE, 3)
    assert [body.colour for body in clip.scene.bodies[:2]] == ["red", "yellow"]
    assert not clip.trajectory.touched.any()
    red, yellow = clip.trajectory.positions[contact.MIDDLE, :2, 0]
    assert red < yellow + 4.5, "the yellow object is to the right, but where red falls from above"
    later = simulate(clip.scene, FRAMES + contact.HORIZON)
    assert later.touched[-1, contact.RED, contact.YELLOW] == answer
    again, _ = contact.contact_clip(4, index)
    assert np.array_equal(clip.frames, again.frames)


@pytest.mark.parametrize("kind", contact.KINDS)
def test_every_kind_of_setting_can_end_either_way_from_one_middle_frame(kind, monkeypatch) -> None:
    monkeypatch.setattr(contact, "KINDS", {kind: contact.KINDS[kind]})
    with_contact, without = next(contact._scene_pairs(np.random.default_rng(6)))
    paths = [simulate(scene) for scene in (with_contact, without)]
    middles = [path.positions[contact.MIDDLE] for path in paths]
    # A ramp's foot, and the engine's steps, cost a fraction of a pixel.
    np.testing.assert_allclose(*middles, atol=1.5)
    ends = [
        simulate(s, FRAMES + contact.HORIZON).touched[-1, 0, 1] for s in (with_contact, without)
    ]
    assert ends == [True, False]


def test_clips_for_teachers_are_as_long_as_asked() -> None:
    long = contact.unlabelled_clip(1, 2, 33)
    assert long.shape == (33, SIZE, SIZE, 3)
    assert np.array_equal(long, contact.unlabelled_clip(1, 2, 33))
    assert np.abs(np.diff(long.astype(int), axis=0)).max() > 50
