"""Tapping a block, and bringing its tokens to the teacher's grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from videorepa.align.projector import Projector
from videorepa.align.resampling import centred_similarity, resample
from videorepa.align.taps import tap
from videorepa.tokens import TokenGrid


def test_resample_is_the_published_chain() -> None:
    """Drop the first latent frame, stretch time by two, then a strided convolution per frame."""
    conv = torch.nn.Conv2d(6, 6, 3, stride=3).double()
    tokens = torch.randn(2, 4, 6, 9, 6, dtype=torch.float64)
    teacher = TokenGrid(torch.zeros(2, 6, 2, 3, 6, dtype=torch.float64), start=1, stride=2)
    found = resample(TokenGrid(tokens, start=-3, stride=4), like=teacher, spatial=conv)
    volume = tokens[:, 1:].permute(0, 4, 1, 2, 3)
    stretched = F.interpolate(volume, (6, 6, 9), mode="trilinear")
    frames = conv(stretched.permute(0, 2, 1, 3, 4).flatten(0, 1))
    expected = frames.unflatten(0, (2, 6)).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(found.tokens, expected)
    assert (found.start, found.stride) == (1, 2)


@given(
    student=st.tuples(st.integers(2, 5), st.integers(1, 8), st.integers(1, 8)),
    teacher=st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(1, 8)),
    spatial=st.booleans(),
)
def test_any_two_grids_that_share_frames_meet(student, teacher, spatial: bool) -> None:
    ours = TokenGrid(torch.randn(1, *student, 4), start=-3, stride=4)
    theirs = TokenGrid(torch.zeros(1, *teacher, 5), start=1, stride=2)
    if spatial:
        found = Projector.between(ours, theirs, hidden=8)(ours, like=theirs)
        assert found.tokens.shape == theirs.tokens.shape
    else:
        found = resample(ours, like=theirs)
        assert found.size == theirs.size


def test_a_tap_takes_each_output_once_and_lets_go() -> None:
    layer = torch.nn.Linear(2, 2)
    with tap(layer) as tapped:
        out = layer(torch.ones(1, 2))
        assert tapped.take() is out
        with pytest.raises(RuntimeError, match="has not run"):
            tapped.take()
    layer(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="has not run"):
        tapped.take()


def test_a_tap_gives_the_same_gradients_under_activation_checkpointing() -> None:
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())
    x = torch.randn(4, 3)
    found = []
    for recompute in (False, True):
        block.zero_grad()
        with tap(block) as tapped:
            y = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            (y.square().sum() + tapped.take().sin().sum()).backward()
            # The recomputation in the backward pass must not be mistaken for a new output.
            with pytest.raises(RuntimeError, match="has not run"):
                tapped.take()
        found.append([p.grad.clone() for p in block.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("size", [(8, 8, 8), (16, 16, 16), (12, 30, 45)])
def test_centred_similarity_sees_the_whole_grid(size: tuple[int, int, int]) -> None:
    teacher, other = (TokenGrid(torch.randn(1, *size, 16)) for _ in range(2))
    left = torch.zeros(size[2], 1)
    left[0] = 1
    agrees_left = TokenGrid(left * teacher.tokens + (1 - left) * other.tokens)
    agrees_else = TokenGrid((1 - left) * teacher.tokens + left * other.tokens)
    assert centred_similarity(agrees_left, teacher).item() < 0.3
    assert centred_similarity(agrees_else, teacher).item() > 0.7


def test_centred_similarity_is_one_for_the_same_geometry_and_low_for_a_constant() -> None:
    tokens = torch.randn(1, 4, 2, 2, 8)
    turn, _ = torch.linalg.qr(torch.randn(8, 8))
    teacher = TokenGrid(tokens + 50.0)
    assert centred_similarity(TokenGrid(tokens @ turn), teacher).item() == pytest.approx(
        1, abs=1e-4
    )
    noise = TokenGrid(1.0 + 1e-3 * torch.randn(1, 4, 2, 2, 8))
    assert centred_similarity(noise, teacher).item() < 0.8
