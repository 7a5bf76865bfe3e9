"""The token grid's arithmetic: which frames a step covers, and interpolation between grids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from videorepa.errors import UserError
from videorepa.tokens import TokenGrid


def grid(t: int, h: int = 2, w: int = 3, d: int = 4, start: int = 0, stride: int = 1) -> TokenGrid:
    return TokenGrid(torch.randn(2, t, h, w, d), start, stride)


def test_cogvideox_gives_frame_zero_a_step_of_its_own() -> None:
    student = grid(13, start=-3, stride=4)
    assert list(student.frames(0)) == [0]
    assert list(student.frames(1)) == [1, 2, 3, 4]
    assert list(student.frames(12)) == [45, 46, 47, 48]
    later = student.since(1)
    assert (later.size[0], later.start, later.stride) == (12, 1, 4)
    assert torch.equal(later.tokens, student.tokens[:, 1:])


def test_nothing_is_before_frame_zero() -> None:
    student = grid(13, start=-3, stride=4)
    assert student.since(0) is student and student.since(-2) is student
    assert student.beginning_at(0).start == 1


@pytest.mark.parametrize("frames", [1, 9, 17, 49])
def test_a_causal_grid_gives_frame_zero_a_step_of_its_own(frames: int) -> None:
    steps = 1 + (frames - 1) // 4
    causal = TokenGrid.causal(torch.zeros(1, steps, 1, 1, 1), frames, 4)
    assert (causal.start, causal.stride) == (-3, 4)
    assert list(causal.frames(0)) == [0] and causal.frames(steps - 1)[-1] == frames - 1


def test_a_repeated_first_latent_covers_what_it_repeats() -> None:
    """CogVideoX 1.5: 81 frames are 21 latents, and the first is repeated to make whole tokens."""
    latents = TokenGrid.causal(torch.zeros(1, 22, 1, 1, 1), 81, 4)
    spans = [list(latents.frames(step)) for step in range(22)]
    assert spans[:3] == [[0], [0], [1, 2, 3, 4]] and spans[-1] == [77, 78, 79, 80]
    assert latents.since(0).size[0] == 22
    assert (latents.since(1).size[0], latents.since(1).start) == (20, 1)


def test_since_keeps_what_begins_there_and_refuses_what_is_past_the_end() -> None:
    assert grid(5, start=1, stride=2).since(1).size[0] == 5
    assert grid(5, start=1, stride=2).since(2).start == 3
    with pytest.raises(UserError, match="frame 30"):
        grid(5, start=1, stride=2).since(30)


@given(steps=st.integers(1, 6), start=st.integers(-3, 5), frame=st.integers(-3, 20))
def test_until_keeps_what_is_over_before_the_frame(steps: int, start: int, frame: int) -> None:
    whole = grid(steps, start=start, stride=3)
    over = [step for step in range(steps) if start + 3 * (step + 1) <= frame]
    if not over:
        with pytest.raises(UserError, match=f"is over before frame {frame}"):
            whole.until(frame)
        return
    early = whole.until(frame)
    assert (early.start, early.stride) == (start, 3)
    assert torch.equal(early.tokens, whole.tokens[:, : len(over)])


def test_pooling_keeps_a_first_frame_that_is_left_over() -> None:
    frames = grid(49)
    pooled = frames.pooled(4)
    assert (pooled.size[0], pooled.start, pooled.stride) == (13, -3, 4)
    assert torch.equal(pooled.tokens[:, 0], frames.tokens[:, 0])
    for step in range(13):
        covered = pooled.frames(step)
        mean = frames.tokens[:, covered.start : covered.stop].mean(1)
        torch.testing.assert_close(pooled.tokens[:, step], mean)


@given(steps=st.integers(1, 5), count=st.integers(1, 9), start=st.integers(-3, 5))
def test_pooling_of_whole_groups(steps: int, count: int, start: int) -> None:
    fine = grid(steps * count, start=start, stride=2)
    pooled = fine.pooled(steps)
    assert (pooled.size[0], pooled.start, pooled.stride) == (count, start, 2 * steps)
    torch.testing.assert_close(pooled.tokens[:, 0], fine.tokens[:, :steps].mean(1))
    torch.testing.assert_close(pooled.tokens[:, -1], fine.tokens[:, -steps:].mean(1))


def test_pooling_refuses_what_is_left_over() -> None:
    with pytest.raises(UserError, match="50 steps from frame 0 .* by 4.* 48 would do"):
        grid(50).pooled(4)
    with pytest.raises(UserError, match="49 steps from frame 4 .* 48 would do"):
        grid(49, start=4).pooled(4)


@given(steps=st.integers(1, 9), factor=st.integers(1, 4), start=st.integers(-3, 5))
def test_time_interpolation_is_torchs(steps: int, factor: int, start: int) -> None:
    coarse = grid(steps, start=start, stride=2 * factor)
    fine = grid(steps * factor, start=start, stride=2)
    volume = coarse.tokens.permute(0, 4, 1, 2, 3)
    size = (fine.size[0], *coarse.size[1:])
    expected = F.interpolate(volume, size, mode="trilinear").permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(coarse.at_times_of(fine).tokens, expected)


@given(
    a=st.tuples(st.integers(1, 12), st.integers(-4, 4), st.integers(1, 5)),
    b=st.tuples(st.integers(1, 12), st.integers(-4, 4), st.integers(1, 5)),
)
def test_time_interpolation_reproduces_what_is_linear_in_time(a, b) -> None:
    """Tokens that say when they are must still say so on the other grid, inside the range."""
    (t1, s1, d1), (t2, s2, d2) = a, b
    centres = s1 + (torch.arange(t1) + 0.5) * d1
    source = TokenGrid(centres.view(1, t1, 1, 1, 1), s1, d1)
    target = grid(t2, start=s2, stride=d2)
    if s2 >= s1 + t1 * d1 or s2 + t2 * d2 <= s1:
        with pytest.raises(UserError, match="share no frame"):
            source.at_times_of(target)
        return
    expected = (s2 + (torch.arange(t2) + 0.5) * d2).clamp(centres[0], centres[-1])
    torch.testing.assert_close(source.at_times_of(target).tokens.flatten(), expected)


def test_space_is_interpolated_frame_by_frame() -> None:
    source = grid(3, 4, 6)
    frames = source.tokens.flatten(0, 1).permute(0, 3, 1, 2)
    expected = F.interpolate(frames, (2, 3), mode="bilinear").permute(0, 2, 3, 1)
    torch.testing.assert_close(source.at_size(2, 3).tokens.flatten(0, 1), expected)


def test_a_grid_has_five_dimensions() -> None:
    with pytest.raises(Exception, match=r"token grid|tokens"):
        TokenGrid(torch.zeros(1, 2, 3))


def test_saliency_stays_with_its_tokens() -> None:
    saliency = torch.rand(2, 5, 2, 3)
    source = TokenGrid(torch.randn(2, 5, 2, 3, 4), start=-1, stride=2, saliency=saliency)
    assert source.with_tokens(torch.randn(2, 5, 2, 3, 9)).saliency is saliency
    assert torch.equal(source.since(1).saliency, saliency[:, 1:])
    assert source.at_size(4, 4).saliency is None


def test_each_token_has_a_saliency_or_none_has() -> None:
    with pytest.raises(Exception, match="saliency"):
        TokenGrid(torch.zeros(2, 5, 2, 3, 4), saliency=torch.zeros(2, 5, 2, 2))
