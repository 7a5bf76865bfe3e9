"""PhyWorld's tasks: the laws, the published ranges, and the error of clean clips."""

from __future__ import annotations

import numpy as np
import pytest

from videorepa.lab import phyworld
from videorepa.lab.phyworld import FRAMES, INTERVAL, WORLD, draw_motion, read, render

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
            assert x[23] <= WORLD or x[0] == pytest.approx(radii)


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
    for compat, known in ((False, 0.0005), (True, 0.0104)):
        pairs = zip(clips, drawn, strict=True)
        errors = [phyworld.velocity_error(c, m, compat=compat) for c, m in pairs]
        assert np.mean(errors) == pytest.approx(known, rel=0.25)


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
