"""The relation distance in tiles against the formula, and what it promises of memory and work."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from videorepa.losses import _relations as relations
from videorepa.losses._relations import every_pair, pairs_in_space, pairs_in_time, relation_distance

DISTANCES = ["hinge", "threshold", "squared"]


def plain(student, teacher, pairs, distance="hinge", margin=0.0, saliency=None) -> torch.Tensor:
    """All pairs at once, as the docstring says it."""

    def cosines(tokens):
        flat = tokens.flatten(1, -2)
        norm = flat.norm(dim=-1, keepdim=True)
        flat = torch.where(norm > 1e-6, flat / norm.clamp_min(1e-6), 0)
        return flat @ flat.mT

    d = (cosines(student) - cosines(teacher)).abs()
    rho = {
        "hinge": (d - margin).relu(),
        "threshold": torch.where(d >= margin, d, 0),
        "squared": d.square(),
    }[distance]
    frame = torch.arange(len(pairs)).repeat_interleave(d.shape[1] // len(pairs))
    rho = rho * pairs[frame][:, frame]
    if saliency is not None:
        w = saliency.flatten(1)
        rho = rho * (w[:, :, None] + w[:, None] - w[:, :, None] * w[:, None])
    return rho.sum((1, 2))


@dataclass
class Case:
    """Two random grids, random weights of frames, a saliency, and how large a tile may be."""

    student: torch.Tensor
    teacher: torch.Tensor
    pairs: torch.Tensor
    saliency: torch.Tensor
    tile: int


@st.composite
def cases(draw) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    frames, height, width = (draw(st.integers(1, most)) for most in (5, 3, 3))
    size = (draw(st.integers(1, 3)), frames, height, width)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = random(frames, frames)
    pairs = draw(
        st.sampled_from(
            [
                every_pair(frames, height * width),
                pairs_in_space(frames, height * width),
                pairs_in_time(frames, height * width),
                pairs + pairs.T,
                (pairs + pairs.T) * (pairs * pairs.T > 0.3),
            ]
        )
    )
    case = Case(random(*size, 5), random(*size, 7), pairs, random(*size).sigmoid(), 640)
    if draw(st.booleans()):
        case.student[0, 0, 0, 0] = case.teacher[-1, -1, -1, -1] = 0
    case.tile = draw(st.sampled_from([1, 3, 8, 640]))
    return case


@given(
    case=cases(),
    distance=st.sampled_from(DISTANCES),
    margin=st.sampled_from([0.0, 0.1, 0.5]),
    weighted=st.booleans(),
)
def test_value_and_gradient_are_the_formulas(case, distance, margin, weighted) -> None:
    saliency = case.saliency if weighted else None
    found, expected = [], []
    for function, results in ((relation_distance, found), (plain, expected)):
        student = case.student.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(relations.TILE, "cpu", case.tile)
            values = function(student, case.teacher, case.pairs, distance, margin, saliency)
        # Clips that count differently, so that a mix-up of clips shows.
        (values * torch.arange(1, len(values) + 1)).sum().backward()
        results += [values.detach(), student.grad]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(distance: str, weighted: bool, monkeypatch) -> None:
    monkeypatch.setitem(relations.TILE, "cpu", 5)
    torch.manual_seed(0)
    student = torch.randn(1, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 4, 2, dtype=torch.float64)
    saliency = torch.rand(1, 3, 4, dtype=torch.float64) if weighted else None
    pairs = torch.tensor([[1.0, 2, 0], [2, 0, 3], [0, 3, 1]], dtype=torch.float64)

    def function(tokens: torch.Tensor) -> torch.Tensor:
        return relation_distance(tokens, teacher, pairs, distance, 0.1, saliency)

    assert torch.autograd.gradcheck(function, student)


def test_a_difference_of_exactly_the_margin_counts_past_the_threshold_alone() -> None:
    student = torch.eye(2).view(1, 1, 2, 2)
    teacher = torch.tensor([[1.0, 0], [1, 0]]).view(1, 1, 2, 2)
    pairs = torch.ones(1, 1, dtype=torch.float64)
    assert relation_distance(student, teacher, pairs, "threshold", 1.0).item() == pytest.approx(2)
    assert relation_distance(student, teacher, pairs, "hinge", 1.0).item() == 0


# Enough tokens for several tiles of the usual size.
LARGE = (2, 6, 150, 16)


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_features_have_no_gradient_not_even_rounding(distance: str) -> None:
    student = torch.randn(LARGE, requires_grad=True)
    value = relation_distance(student, student.detach().clone(), every_pair(6, 150), distance)
    value.sum().backward()
    assert value.abs().max() == 0 and student.grad is not None and student.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    student = torch.randn(LARGE).to(dtype).requires_grad_()
    teacher = torch.randn(LARGE).to(dtype)
    values = relation_distance(student, teacher, every_pair(6, 150))
    expected = relation_distance(student.float(), teacher.float(), every_pair(6, 150))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected)
    # Single entries of the gradient are below what float16 can hold.
    (values.sum() * 1e5).backward()
    reference = student.detach().float().requires_grad_()
    relation_distance(reference, teacher.float(), every_pair(6, 150)).sum().backward()
    assert student.grad is not None and student.grad.dtype == dtype
    torch.testing.assert_close(student.grad.float() / 1e5, reference.grad, rtol=1e-2, atol=1e-9)


def test_autocast_changes_nothing() -> None:
    student, teacher = torch.randn(LARGE, requires_grad=True), torch.randn(LARGE)
    expected = relation_distance(student, teacher, every_pair(6, 150)).mean()
    (gradient,) = torch.autograd.grad(expected, student)
    with torch.autocast("cpu", torch.bfloat16):
        value = relation_distance(student, teacher, every_pair(6, 150)).mean()
    assert torch.equal(value, expected)
    assert torch.equal(torch.autograd.grad(value, student)[0], gradient)


def test_layout_in_memory_changes_nothing() -> None:
    student, teacher = torch.randn(LARGE), torch.randn(LARGE)
    strided = student.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    student.requires_grad_()
    for tokens in (student, strided):
        relation_distance(tokens, teacher, every_pair(6, 150)).sum().backward()
    torch.testing.assert_close(strided.grad, student.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    student, teacher = torch.randn(LARGE, requires_grad=True), torch.randn(LARGE)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return relation_distance(tokens.tanh(), teacher, every_pair(6, 150)).mean()

    (expected,) = torch.autograd.grad(loss(student), student)
    checkpoint(loss, student, use_reentrant=reentrant).backward()
    assert student.grad is not None and torch.equal(student.grad, expected)


def test_backward_can_be_repeated_but_not_differentiated() -> None:
    student, teacher = torch.randn(LARGE, requires_grad=True), torch.randn(LARGE)
    value = relation_distance(student, teacher, every_pair(6, 150), "squared").sum()
    (first,) = torch.autograd.grad(value, student, retain_graph=True)
    (again,) = torch.autograd.grad(value, student, create_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="differentiated again"):
        again.square().sum().backward(retain_graph=True)
    (last,) = torch.autograd.grad(2 * value, student)
    assert torch.equal(2 * first, last)


def test_weights_that_are_not_symmetric_are_refused() -> None:
    pairs = torch.rand(6, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="symmetric 6 x 6 matrix"):
        relation_distance(torch.randn(LARGE), torch.randn(LARGE), pairs)


def test_a_token_that_is_not_finite_shows() -> None:
    student = torch.randn(LARGE)
    student[1, 2, 3, 4] = torch.nan
    values = relation_distance(student, torch.randn(LARGE), every_pair(6, 150))
    assert values[0].isfinite() and values[1].isnan()


def products(scope, student: torch.Tensor) -> dict[str, list]:
    """The shapes that matrix products were called with, by name."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        relation_distance(student, torch.randn(LARGE), scope(6, 150))
    events = recorded.events() or []
    return {
        name: [event.input_shapes[:2] for event in events if event.name == f"aten::{name}"]
        for name in ("bmm", "baddbmm_")
    }


def test_frames_that_count_nothing_together_cost_nothing() -> None:
    called = products(pairs_in_space, torch.randn(LARGE, requires_grad=True))
    clips, frames, places, width = LARGE
    within = [[1, places, width], [1, width, places]]
    assert called["bmm"] == [within] * (clips * frames * 2)
    assert len(called["baddbmm_"]) == clips * frames


def test_a_teacher_that_wants_a_gradient_gets_none() -> None:
    teacher = torch.randn(LARGE, requires_grad=True)
    assert not relation_distance(torch.randn(LARGE), teacher, every_pair(6, 150)).requires_grad


def test_without_a_gradient_none_is_computed() -> None:
    with torch.no_grad():
        assert not products(every_pair, torch.randn(LARGE, requires_grad=True))["baddbmm_"]
    assert not products(every_pair, torch.randn(LARGE))["baddbmm_"]


def peak_bytes(frames: int) -> int:
    """The most memory that value and gradient of such a clip hold at once."""
    shape = (1, frames, 64, 8)
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        relation_distance(student, teacher, every_pair(frames, 64)).sum().backward()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = recorded.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


def test_memory_grows_with_the_tokens_not_with_their_pairs(monkeypatch) -> None:
    monkeypatch.setitem(relations.TILE, "cpu", 64)
    small, large = peak_bytes(8), peak_bytes(32)
    assert 0 < small < large < 4 * small
    assert large < (32 * 64) ** 2 * 4 / 10
