"""Alignment losses: the published numbers, the properties they must have, and bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from videorepa.align import resample
from videorepa.errors import UserError
from videorepa.losses.cosine import Cosine
from videorepa.losses.relation import Relation
from videorepa.tokens import TokenGrid

PUBLISHED = load_file(Path(__file__).with_name("golden") / "relations.safetensors")
MARGIN = PUBLISHED["margin"].item()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("trd", Relation(margin=MARGIN)),
        ("spatial", Relation(margin=MARGIN, scope="space")),
        ("temporal", Relation(margin=MARGIN, scope="time")),
        ("repa", Cosine()),
    ],
)
def test_value_and_gradient_are_the_published_ones(name: str, loss) -> None:
    conv = torch.nn.Conv2d(24, 24, 3, stride=3)
    conv.load_state_dict({"weight": PUBLISHED["conv.weight"], "bias": PUBLISHED["conv.bias"]})
    tokens = PUBLISHED["student"].clone().requires_grad_()
    teacher = TokenGrid(PUBLISHED["teacher"], start=1, stride=2)
    student = resample(TokenGrid(tokens, start=-3, stride=4), like=teacher, spatial=conv)
    value = loss(student, teacher)
    value.backward()
    assert relative(value.detach(), PUBLISHED[name]) < 1e-5
    assert relative(tokens.grad, PUBLISHED[f"{name}_grad"]) < 1e-5
    if name == "trd":
        assert relative(conv.weight.grad, PUBLISHED["trd_conv_grad"]) < 1e-5


def pair(seed: int, t: int = 3, h: int = 2, w: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(2, t, h, w, 5, generator=draw, dtype=torch.float64)
    return a, torch.randn(2, t, h, w, 7, generator=draw, dtype=torch.float64)


relations = st.builds(
    Relation,
    margin=st.floats(0, 0.5),
    scope=st.sampled_from(["all", "space", "time"]),
    weighting=st.sampled_from(["joint", "equal"]),
    hinge=st.booleans(),
)


@given(loss=relations, seed=st.integers(0, 1000))
def test_rotating_or_rescaling_features_changes_nothing(loss: Relation, seed: int) -> None:
    a, b = pair(seed)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    scale = torch.rand(*a.shape[:4], 1, dtype=torch.float64) + 0.1
    expected = loss(TokenGrid(a), TokenGrid(b))
    torch.testing.assert_close(loss(TokenGrid(a @ turn * scale), TokenGrid(b)), expected)


@given(loss=relations, seed=st.integers(0, 1000))
def test_equal_grids_have_no_loss(loss: Relation, seed: int) -> None:
    a, _ = pair(seed)
    assert loss(TokenGrid(a), TokenGrid(a)).item() == pytest.approx(0, abs=1e-12)


@given(seed=st.integers(0, 1000), margin=st.floats(0, 0.4), t=st.integers(1, 4))
def test_the_forms_are_the_formulas(seed: int, margin: float, t: int) -> None:
    """Against a restatement pair by pair: all = the mean, space and time = means over their own."""
    a, b = pair(seed, t=t)
    frame = torch.arange(t).repeat_interleave(4)
    same = frame[:, None] == frame[None, :]
    unit = [torch.nn.functional.normalize(x.flatten(1, 3), dim=-1) for x in (a, b)]
    distance = (unit[0] @ unit[0].mT - unit[1] @ unit[1].mT).abs()
    hinge, kept = (distance - margin).relu(), torch.where(distance >= margin, distance, 0)
    grids = TokenGrid(a), TokenGrid(b)
    for form, values in ((True, hinge), (False, kept)):
        space = values[:, same].mean()
        time = values[:, ~same].mean() if t > 1 else torch.zeros((), dtype=torch.float64)
        for options, expected in (
            ({}, values.mean()),
            ({"scope": "space"}, space),
            ({"scope": "time"}, time),
            ({"weighting": "equal"}, space + time),
        ):
            loss = Relation(margin=margin, hinge=form, **options)
            torch.testing.assert_close(loss(*grids), expected)


@pytest.mark.parametrize("loss", [Relation(), Relation(scope="time"), Cosine()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fill", [0.0, 1.0, 6e4])
def test_zero_constant_and_half_precision_features_give_no_nan(loss, dtype, fill) -> None:
    tokens = torch.full((1, 2, 2, 2, 5), fill, dtype=dtype, requires_grad=True)
    value = (
        loss(TokenGrid(tokens), TokenGrid(torch.randn(1, 2, 2, 2, 7).to(dtype)))
        if isinstance(loss, Relation)
        else loss(TokenGrid(tokens), TokenGrid(torch.randn_like(tokens)))
    )
    value.backward()
    assert value.isfinite() and tokens.grad is not None and tokens.grad.isfinite().all()


def test_no_gradient_reaches_the_teacher() -> None:
    for loss in (Relation(margin=0.0), Cosine()):
        a = torch.randn(1, 2, 2, 2, 5, requires_grad=True)
        b = torch.randn(1, 2, 2, 2, 5, requires_grad=True)
        loss(TokenGrid(a), TokenGrid(b)).backward()
        assert a.grad is not None and a.grad.abs().sum() > 0 and b.grad is None


def test_grids_that_differ_are_refused_with_both_named() -> None:
    with pytest.raises(UserError, match=r"2x2x2.*3x2x2"):
        Relation()(TokenGrid(torch.randn(1, 2, 2, 2, 5)), TokenGrid(torch.randn(1, 3, 2, 2, 5)))
