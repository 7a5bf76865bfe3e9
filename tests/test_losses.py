"""Alignment losses: the published numbers, the properties they must have, and bad input."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from videorepa.align.resampling import resample
from videorepa.errors import UserError
from videorepa.losses.cosine import Cosine
from videorepa.losses.crepa import Crepa
from videorepa.losses.drift import LatentDrift
from videorepa.losses.local_gram_flow import LocalGramFlow
from videorepa.losses.moalign import MoAlign
from videorepa.losses.relation import Relation
from videorepa.losses.relation_correlation import RelationCorrelation
from videorepa.losses.relation_l2 import RelationL2
from videorepa.losses.sara import Sara
from videorepa.losses.u_repa import URepa
from videorepa.settings import plugins
from videorepa.tokens import TokenGrid

PUBLISHED = load_file(Path(__file__).with_name("golden") / "relations.safetensors")
MARGIN = PUBLISHED["margin"].item()


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


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


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """S(a) - S(b) for all pairs of tokens of each clip."""
    unit = [torch.nn.functional.normalize(x.flatten(1, 3), dim=-1) for x in (a, b)]
    return unit[0] @ unit[0].mT - unit[1] @ unit[1].mT


def change(teacher: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(teacher, dim=-1)
    far = torch.stack([(step - unit.mean(1)).norm(dim=-1) for step in unit.unbind(1)], 1)
    return torch.stack([clip / clip.max() if clip.max() > 0 else clip for clip in far])


grids = st.builds(pair, st.integers(0, 1000), t=st.integers(1, 4))


@given(grids=grids)
def test_relation_l2_is_the_mean_over_pairs_of_different_tokens(grids) -> None:
    squares = difference(*grids).square()
    different = ~torch.eye(squares.shape[1], dtype=torch.bool)
    loss = RelationL2()(*map(TokenGrid, grids))
    torch.testing.assert_close(loss, squares[:, different].mean())


@given(grids=grids)
def test_relation_correlation_is_pearsons_over_pairs_of_different_tokens(grids) -> None:
    unit = [torch.nn.functional.normalize(x.flatten(1, 3), dim=-1) for x in grids]
    row, column = torch.triu_indices(unit[0].shape[1], unit[0].shape[1], 1)
    ours, theirs = ((x @ x.mT)[:, row, column] for x in unit)
    expected = [torch.corrcoef(torch.stack(clip))[0, 1] for clip in zip(ours, theirs, strict=True)]
    loss = RelationCorrelation()(*map(TokenGrid, grids))
    torch.testing.assert_close(loss, 1 - torch.stack(expected).mean())


@given(grids=grids, shared=st.floats(0, 3))
def test_relation_correlation_leaves_mean_and_spread_free(grids, shared: float) -> None:
    """A channel that all tokens share brings all cosines nearer to 1, in proportion."""
    a, b = grids
    unit = torch.nn.functional.normalize(b, dim=-1)
    nearer = torch.cat([unit, torch.full_like(unit[..., :1], shared)], -1)
    losses = [RelationCorrelation()(TokenGrid(a), TokenGrid(teacher)) for teacher in (b, nearer)]
    torch.testing.assert_close(*losses)


def test_relation_correlation_has_the_gradient_of_its_value() -> None:
    a, b = pair(0)
    loss = RelationCorrelation()
    torch.autograd.gradcheck(lambda x: loss(TokenGrid(x), TokenGrid(b)), a.requires_grad_())


def test_relation_correlation_keeps_its_digits_where_relations_hardly_vary() -> None:
    """In float32, with cosines that differ by a thousandth."""
    drawn = torch.Generator().manual_seed(0)
    tokens = 1 + 0.03 * torch.randn(1, 4, 4, 4, 64, generator=drawn)
    other = tokens + 0.01 * torch.randn(tokens.shape, generator=drawn)
    loss = RelationCorrelation()
    exact = loss(TokenGrid(tokens.double()), TokenGrid(other.double())).item()
    assert loss(TokenGrid(tokens), TokenGrid(other)).item() == pytest.approx(exact, abs=1e-3)


@given(seed=st.integers(0, 1000), weight=st.floats(0, 5))
def test_u_repa_is_repa_and_the_squares(seed: int, weight: float) -> None:
    a, b = pair(seed)
    b = b[..., :5]
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()
    expected = -cosine + weight * difference(a, b).square().mean()
    loss = URepa(relations=weight)(TokenGrid(a), TokenGrid(b))
    torch.testing.assert_close(loss, expected)
    assert URepa() == URepa(relations=3)


@given(grids=grids, margin=st.floats(0, 0.3), decay=st.floats(0.5, 20))
def test_moalign_counts_pairs_across_time_less_the_further_apart(grids, margin, decay) -> None:
    a, b = grids
    steps = a.shape[1]
    past = (
        (difference(a, b).abs() - margin).relu().unflatten(1, (steps, 4)).unflatten(3, (steps, 4))
    )
    block = past.mean((0, 2, 4))
    expected = block.diagonal().mean()
    if steps > 1:
        across = [(f, g) for f in range(steps) for g in range(steps) if f != g]
        weighted = [math.exp(-abs(f - g) / decay) * block[f, g] for f, g in across]
        expected = expected + sum(weighted) / len(weighted)
    loss = MoAlign(margin=margin, decay=decay)(TokenGrid(a), TokenGrid(b))
    torch.testing.assert_close(loss, expected)


@given(grids=grids, given_by=st.sampled_from(["teacher", "change"]))
def test_sara_is_the_mean_weighted_by_saliency(grids, given_by: str) -> None:
    a, b = grids
    saliency = torch.rand(b.shape[:4], dtype=b.dtype) if given_by == "teacher" else change(b)
    w = saliency.flatten(1)
    weight = w[:, :, None] + w[:, None] - w[:, :, None] * w[:, None]
    weighted = (weight * difference(a, b).abs()).sum((1, 2))
    total = weight.sum((1, 2))
    expected = torch.where(total > 1e-9, weighted / total, 0).mean()
    teacher = TokenGrid(b, saliency=saliency if given_by == "teacher" else None)
    torch.testing.assert_close(Sara(saliency=given_by)(TokenGrid(a), teacher), expected)


def test_sara_without_a_saliency_says_what_to_do() -> None:
    a, b = map(TokenGrid, pair(0))
    with pytest.raises(UserError, match="saliency: change"):
        Sara(saliency="teacher")(a, b)


@given(
    seed=st.integers(0, 1000),
    t=st.integers(1, 5),
    stride=st.sampled_from([1, 2, 4]),
    distance=st.floats(0.01, 1.5),
    tau=st.floats(0.1, 2),
)
def test_crepa_adds_both_neighbours_in_seconds(seed, t, stride, distance, tau) -> None:
    a, b = pair(seed, t=t)
    b = b[..., :5]
    away = max(1, round(distance * 8 / stride))
    total = torch.zeros((), dtype=a.dtype)
    for f in range(t):
        for k in {f - away, f, f + away} & set(range(t)):
            weight = math.exp(-abs(k - f) * stride / 8 / tau)
            total += weight * torch.nn.functional.cosine_similarity(a[:, f], b[:, k], dim=-1).sum()
    loss = Crepa(distance=distance, tau=tau)
    value = loss(TokenGrid(a, stride=stride), TokenGrid(b, stride=stride))
    torch.testing.assert_close(value, -total / a[..., 0].numel())


@given(
    seed=st.integers(0, 1000),
    size=st.tuples(st.integers(2, 4), st.integers(1, 4), st.integers(1, 4)),
    window=st.sampled_from([3, 5]),
    temperature=st.floats(0.05, 2),
)
def test_local_gram_flow_is_the_divergence_of_moves(seed, size, window, temperature) -> None:
    """Against a restatement with all places of a frame, of which those too far away are masked."""
    t, h, w = size
    a, b = pair(seed, t=t, h=h, w=w)
    places = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2)
    near = (places[:, None] - places).abs().amax(-1) <= window // 2
    moves = []
    for tokens in (a, b):
        unit = torch.nn.functional.normalize(tokens.flatten(2, 3), dim=-1)
        alike = unit[:, :-1] @ unit[:, 1:].mT / temperature
        moves.append(torch.where(near, alike, -torch.inf).softmax(-1))
    ours, theirs = moves
    divergence = torch.where(near, theirs * (theirs / ours).log(), 0).sum(-1)
    value = LocalGramFlow(window=window, temperature=temperature)(TokenGrid(a), TokenGrid(b))
    torch.testing.assert_close(value, divergence.mean())


def test_local_gram_flow_sees_which_way_a_pattern_moves() -> None:
    """Three different tokens in a row. The teacher's move one place to the right."""
    one, two, three = torch.eye(4)[:3]
    still = torch.stack([one, two, three])
    moved = torch.stack([torch.eye(4)[3], one, two])
    teacher = TokenGrid(torch.stack([still, moved])[None, :, None])
    student = TokenGrid(torch.stack([still, still])[None, :, None])
    loss = LocalGramFlow(window=3)
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    # The first token has two places, its own and the one to its right; the second has three. Where
    # it went is certain but for exp(-10), and the third went out of sight: its places are alike.
    e = math.exp(-10)
    first = 10 * (1 - e) / (1 + e)
    second = 10 * (1 - e) / (1 + 2 * e)
    third = math.log(1 + e) - math.log(2) + 5
    expected = (first + second + third) / 3
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-4)
    turn, _ = torch.linalg.qr(torch.randn(4, 4))
    turned = student.with_tokens(student.tokens @ turn)
    assert loss(turned, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_local_gram_flow_wants_a_next_step_and_a_centre() -> None:
    one = TokenGrid(torch.randn(1, 1, 2, 2, 5))
    with pytest.raises(UserError, match="compares a step with the next one.*1x2x2"):
        LocalGramFlow()(one, one)
    with pytest.raises(ValueError, match="an odd number of rows"):
        LocalGramFlow(window=4)


FOLLOWS_RELATIONS = [
    RelationL2(),
    RelationCorrelation(),
    MoAlign(),
    MoAlign(margin=0.05),
    Sara(),
    Sara(saliency="teacher"),
]
LOSSES = [
    *FOLLOWS_RELATIONS,
    URepa(),
    Crepa(),
    Crepa(distance=0.1),
    Cosine(),
    Relation(),
    LocalGramFlow(),
]
OF_LATENTS = [LatentDrift(lag=1)]


def named(loss) -> str:
    return repr(loss)


@pytest.mark.parametrize("loss", FOLLOWS_RELATIONS, ids=named)
@given(seed=st.integers(0, 1000), t=st.integers(1, 4))
def test_what_follows_relations_knows_no_direction_and_ends_at_zero(
    loss, seed: int, t: int
) -> None:
    a, b = pair(seed, t=t)
    saliency = torch.rand(b.shape[:4], dtype=b.dtype)
    student, teacher = TokenGrid(a), TokenGrid(b, saliency=saliency)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    torch.testing.assert_close(loss(student.with_tokens(a @ turn), teacher), loss(student, teacher))
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=named)
@given(seed=st.integers(0, 1000))
def test_the_length_of_tokens_does_not_matter(loss, seed: int) -> None:
    a, b = pair(seed)
    b = b[..., :5]
    saliency = torch.rand(b.shape[:4], dtype=b.dtype)
    stretch = torch.rand(2, *a.shape[:4], 1, dtype=a.dtype) + 0.1
    expected = loss(TokenGrid(a), TokenGrid(b, saliency=saliency))
    value = loss(TokenGrid(a * stretch[0]), TokenGrid(b * stretch[1], saliency=saliency))
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("loss", LOSSES + OF_LATENTS, ids=named)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fill", [0.0, 1.0, 6e4])
def test_the_gradient_is_finite_and_the_students_alone(loss, dtype, fill) -> None:
    student = torch.full((1, 2, 2, 2, 5), fill, dtype=dtype, requires_grad=True)
    for tokens in (torch.randn(1, 2, 2, 2, 5), torch.ones(1, 2, 2, 2, 5)):
        tokens = tokens.to(dtype).requires_grad_()
        saliency = torch.zeros(1, 2, 2, 2, dtype=dtype).requires_grad_()
        value = loss(TokenGrid(student), TokenGrid(tokens, saliency=saliency))
        value.backward()
        assert value.isfinite() and tokens.grad is None and saliency.grad is None
        assert student.grad is not None and student.grad.isfinite().all()


def test_every_loss_is_tested_here() -> None:
    assert {loss.name for loss in LOSSES + OF_LATENTS} == set(plugins.names("losses"))


COMPILE = """
import torch
from videorepa.losses.relation import Relation
from videorepa.tokens import TokenGrid

relation = Relation()

def loss(student, teacher):
    return relation(TokenGrid(student * 2), TokenGrid(teacher))

student, teacher = torch.randn(2, 3, 2, 2, 5, requires_grad=True), torch.randn(2, 3, 2, 2, 5)
compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
values = [each(student, teacher) for each in (loss, compiled)]
gradients = [torch.autograd.grad(value, student)[0] for value in values]
torch.testing.assert_close(values[1], values[0])
torch.testing.assert_close(gradients[1], gradients[0])
"""


def test_the_loss_compiles_as_one_graph() -> None:
    """In a process of its own, without the shape checks that torch.compile cannot look through."""
    subprocess.run([sys.executable, "-c", COMPILE], check=True)
