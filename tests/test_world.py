"""The lab's simulator and renderer: deterministic, and true to the laws they are taken for."""

from __future__ import annotations

import numpy as np
import pytest

from videorepa.lab.render import BACKGROUND, draw_scene, make_clip, render
from videorepa.lab.scenarios import SCENARIOS
from videorepa.lab.world import COLOURS, FLOOR, GRAVITY, SIZE, Ball, Scene, Trajectory, simulate


def test_a_seed_names_the_same_clip_for_ever() -> None:
    a, b = make_clip(5, 12), make_clip(5, 12)
    assert a.caption == b.caption == draw_scene(5, 12).caption
    assert np.array_equal(a.frames, b.frames)
    assert not np.array_equal(a.frames, make_clip(5, 13).frames)
    assert a.frames.shape == (17, 64, 64, 3) and a.frames.dtype == np.uint8


def test_free_fall_is_the_parabola() -> None:
    scene = Scene("fall", "", (Ball("red", 5.0, (32.0, 10.0), (1.0, -2.0)),))
    path = simulate(scene, frames=8).positions[:, 0]
    t = np.arange(8)
    np.testing.assert_allclose(path[:, 0], 32 + t, atol=1e-3)
    # Semi-implicit steps of a tenth of a frame lag the exact parabola by g * t / 20.
    np.testing.assert_allclose(path[:, 1], 10 - 2 * t + GRAVITY * t**2 / 2, atol=GRAVITY * 8 / 19)


@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_every_scenario_keeps_the_laws(scenario: str) -> None:
    for index in range(40):
        clip = make_clip(1, index, scenario)
        path, radii = clip.trajectory.positions, [ball.radius for ball in clip.scene.balls]
        bottom = path[:, :, 1] + radii
        # A fast ball is stopped up to one engine step, a pixel, past the surface.
        assert (bottom < FLOOR + 1.1).all(), "a ball sinks into the floor"
        assert all(ball.colour in clip.caption for ball in clip.scene.balls)
        assert clip.trajectory.contact.any() == (scenario == "collide")
        if scenario in ("roll", "hide"):
            velocity = np.diff(path[:, 0, 0])
            assert np.ptp(velocity) < 0.05 and np.abs(bottom - FLOOR).max() < 0.3
        if scenario == "collide":
            mass = np.array(radii) ** 2
            momentum = (np.diff(path[:, :, 0], axis=0) * mass).sum(1)
            # Balls that spin when they meet take some momentum from the floor.
            assert np.ptp(momentum) < 0.2 * np.abs(momentum).max()


def test_a_disc_covers_its_area_and_is_anti_aliased() -> None:
    ball = Ball("blue", 6.0, (30.3, 25.7))
    trajectory = Trajectory(np.array([[[30.3, 25.7]]], np.float32), np.zeros(1, bool))
    frame = render(Scene("fall", "", (ball,)), trajectory)[0] / 255.0
    colour = np.array(COLOURS["blue"])
    along = ((frame - BACKGROUND) @ (colour - BACKGROUND)) / ((colour - BACKGROUND) ** 2).sum()
    # Less than 1 % is the rounding of the background to whole numbers.
    cover = np.where((np.arange(SIZE)[:, None] < FLOOR - 1) & (along > 0.01), along, 0)
    assert cover.sum() == pytest.approx(np.pi * 36, rel=0.01)
    grid = np.arange(SIZE) + 0.5
    assert (cover.sum(0) @ grid) / cover.sum() == pytest.approx(30.3, abs=0.05)
    assert (cover.sum(1) @ grid) / cover.sum() == pytest.approx(25.7, abs=0.05)
    edge = (cover > 0.05) & (cover < 0.95)
    assert edge.sum() > 20


def test_the_screen_hides_the_ball_and_it_comes_out_again() -> None:
    clip = make_clip(3, 0, "hide")
    colour = np.array(COLOURS[clip.scene.balls[0].colour]) * 255
    near = np.abs(clip.frames.astype(float) - colour).sum(-1) < 40
    seen = near.sum((1, 2))
    assert seen[0] > 40 and seen.min() < 5 and seen[-1] > 40
