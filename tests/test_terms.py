"""Alignment terms: how they meet, add up, start and stop, and what they are measured to do."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from conftest import make_head
from videorepa.align.gathering import Gathering
from videorepa.align.gradients import Junction
from videorepa.align.resampling import common_grid, resample
from videorepa.align.terms import Grids, Term, grids
from videorepa.artifacts.run import Run
from videorepa.backbones.cogvideox import CogVideoX
from videorepa.conditioning import Conditioning
from videorepa.diffusion import FlowMatching, VPrediction
from videorepa.errors import UserError
from videorepa.inspect import inspect
from videorepa.losses.drift import LatentDrift
from videorepa.prepare import prepare
from videorepa.recipe import Align, Recipe
from videorepa.settings.sections import ClipSize, Continuation, When
from videorepa.tokens import TokenGrid
from videorepa.train import train

OBJECTIVES = Path(__file__).parents[1] / "docs" / "objectives.md"
FRAGMENTS = re.findall(r"^## (.+?)\n.*?```yaml\n(.*?)```", OBJECTIVES.read_text(), re.M | re.S)


def rows(run) -> list[dict]:
    return [json.loads(line) for line in run.log_path.read_text().splitlines()]


def with_align(recipe: Recipe, *terms: dict, **changes) -> Recipe:
    values = recipe.model_dump(mode="json") | changes
    return Recipe.parse(values | {"align": terms[0] if len(terms) == 1 else list(terms)})


RELATION = {"loss": {"name": "relation", "margin": 0.05}, "block": 2, "hidden": 16}
COSINE = {"loss": {"name": "cosine"}, "block": 1, "hidden": 16}


@pytest.mark.parametrize("fragment", [text for _, text in FRAGMENTS], ids=[n for n, _ in FRAGMENTS])
def test_every_documented_objective_trains(recipe: Recipe, fragment: str, tmp_path: Path) -> None:
    """The page's own text, on a small model: only the numbers of blocks are made smaller."""
    given = yaml.safe_load(fragment)
    terms = given["align"] if isinstance(given["align"], list) else [given["align"]]
    encoder = recipe.model_dump(mode="json")["encoder"]
    if (wanted := given.get("encoder", {})).get("name") == "headed":
        kind = Path(wanted["weights"]).stem
        encoder = make_head(kind, recipe.encoder, width=24).model_dump(mode="json")
    uses_encoder = any(term.get("target", "encoder") == "encoder" for term in terms)
    for term in terms:
        term["hidden"] = 16
        if term["block"] != "clean":
            term["block"] = 2
        if isinstance(term.get("target"), int):
            term["target"] = 3
    own = with_align(recipe, *terms, encoder=encoder if uses_encoder else None)
    own = own.override("optim.steps=2", "optim.warmup_steps=0")
    inspect(own)
    prepare(own)
    log = rows(train(own, tmp_path / "run"))
    for name in own.terms:
        suffix = "" if len(own.terms) == 1 else f".{name}"
        assert log[0][f"align_weight{suffix}"] > 0
        # Some of the gradient reaches the backbone: no term is a mere number in the log.
        assert log[1][f"grad_align{suffix}"] > 0, name


def test_several_terms_add_up(recipe: Recipe, tmp_path: Path) -> None:
    prepare(recipe)
    one = recipe.override("optim.steps=1")
    single = rows(train(with_align(one, RELATION), tmp_path / "one"))[0]
    several = rows(train(with_align(one, RELATION, COSINE | {"weight": 0.2}), tmp_path / "two"))[0]
    # The first projector is drawn from the same numbers, so its term is the same.
    assert several["align.relation"] == single["align"]
    assert several["denoise"] == single["denoise"]
    total = several["denoise"] + 0.5 * several["align.relation"] + 0.2 * several["align.cosine"]
    assert several["loss"] == pytest.approx(total)


def test_a_terms_gradient_is_measured_against_the_diffusion_losss_and_no_other_terms(
    recipe: Recipe, tmp_path: Path
) -> None:
    prepare(recipe)
    one = recipe.override("optim.steps=1")
    beside = COSINE | {"block": 2, "weight": 50.0}
    probe = COSINE | {"block": 2, "weight": 0}
    single = rows(train(with_align(one, RELATION), tmp_path / "one"))[0]
    logged = rows(train(with_align(one, RELATION, beside, probe), tmp_path / "several"))[0]
    for name in ("relation", "cosine", "cosine-2"):
        assert logged[f"grad_denoise.{name}"] == pytest.approx(single["grad_denoise"], rel=1e-4)
    assert logged["grad_cosine.relation"] == pytest.approx(single["grad_cosine"], abs=1e-4)
    assert logged["grad_align.relation"] == pytest.approx(single["grad_align"], rel=1e-4)


def test_terms_that_are_only_measured_leave_the_training_alone(
    recipe: Recipe, tmp_path: Path
) -> None:
    prepare(recipe)
    plain = recipe.model_dump(mode="json") | {"encoder": None, "align": None}
    alone = train(Recipe.parse(plain), tmp_path / "plain").trained()
    probes = with_align(recipe, RELATION | {"weight": 0}, COSINE | {"weight": 0})
    measured = train(probes, tmp_path / "measured")
    assert all(
        torch.equal(value, measured.trained().trained[key]) for key, value in alone.trained.items()
    )
    log = rows(measured)
    assert log[-1]["loss"] == log[-1]["denoise"]
    assert log[-1]["grad_align.relation"] == 0
    # Their projectors learn all the same.
    assert log[-1]["align.relation"] < log[0]["align.relation"]


def test_a_training_that_stops_a_term_resumes_bit_for_bit(recipe: Recipe, tmp_path: Path) -> None:
    prepare(recipe)
    own = with_align(
        recipe,
        RELATION | {"when": {"until": 3, "decay": "linear"}},
        COSINE | {"when": {"opposed": 2}, "weight": 5.0},
    )
    whole = train(own, tmp_path / "whole")
    part = train(own, tmp_path / "part")
    for step in (4, 6):
        folder = part.checkpoints / f"step-{step:08d}"
        for file in sorted(folder.iterdir()):
            file.unlink()
        folder.rmdir()
    resumed = train(own, tmp_path / "part")
    keep = ("step_seconds", "clips_per_second", "memory_gb")
    logs = [
        [{k: v for k, v in r.items() if k not in keep} for r in rows(x)] for x in (whole, resumed)
    ]
    assert logs[0] == logs[1]
    a, b = whole.trained(), resumed.trained()
    assert a.stopping == b.stopping and len(a.stopping[1]["cosines"]) == 2
    assert all(torch.equal(a.trained[key], b.trained[key]) for key in a.trained)
    weights = [row.get("align_weight.relation") for row in logs[0]]
    assert weights == pytest.approx([0.5, 0.5 * 2 / 3, 0.5 / 3, None, None, None])


@pytest.mark.parametrize(
    ("when", "shares"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"until": 2}, [1, 1, 0, 0, 0]),
        ({"until": 4, "decay": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"until": 4, "decay": "cosine"}, [1, 0.853553, 0.5, 0.146447, 0]),
    ],
)
def test_a_weights_course(when: dict, shares: list[float]) -> None:
    assert [When(**when).share(step) for step in range(5)] == pytest.approx(shares, abs=1e-6)


def grid(*size: int, start: int = 0, stride: int = 1, seed: int = 0) -> TokenGrid:
    draw = torch.Generator().manual_seed(seed)
    return TokenGrid(torch.randn(*size, generator=draw), start, stride)


def term(recipe: Recipe, align: dict, student: TokenGrid, target: TokenGrid) -> Term:
    own = with_align(recipe, align).terms[align["loss"]["name"]]
    return Term(own, Grids(student, target, common_grid(student, target, own.interpolate)))


def test_a_term_stops_for_good_once_its_gradient_opposed_long_enough(recipe: Recipe) -> None:
    student, teacher = grid(1, 3, 4, 4, 8), grid(1, 3, 2, 2, 6)
    live = term(recipe, COSINE | {"when": {"opposed": 3}}, student, teacher)
    for cosine in (0.5, -0.3, -0.1):
        live.watch(cosine)
    assert live.runs(3) and not live.stopped  # Opposed twice, and not yet on the whole.
    live.watch(-0.3)
    assert not live.runs(4) and live.weight(4) == 0
    for _ in range(5):
        live.watch(1.0)
    assert not live.runs(9)


def test_the_gate_scales_each_sample_by_its_share_of_signal(recipe: Recipe) -> None:
    student, teacher = grid(2, 3, 4, 4, 8), grid(2, 3, 2, 2, 6, seed=1)
    torch.manual_seed(0)
    gated = term(recipe, COSINE | {"when": {"gate": "signal"}}, student, teacher)
    plain = term(recipe, COSINE, student, teacher)
    plain.load_state_dict(gated.state_dict())
    sigma = torch.tensor([0.6, 1.0])
    expected = (1 - 0.36) * plain(student.sample(0), teacher.sample(0), sigma[:1])[0] / 2
    torch.testing.assert_close(gated(student, teacher, sigma)[0], expected)


CURVE = [[0.2, 0.0], [0.6, 1.0], [0.8, 2.0], [0.9, 0.0]]


@pytest.mark.parametrize(
    ("sigma", "factor"),
    [(0.0, 0), (0.2, 0), (0.3, 0.25), (0.6, 1), (0.65, 1.25), (0.8, 2), (0.9, 0), (1.0, 0)],
)
def test_a_curve_over_the_noise_scales_each_sample(recipe: Recipe, sigma, factor) -> None:
    student, teacher = grid(2, 3, 4, 4, 8), grid(2, 3, 2, 2, 6, seed=1)
    curved = term(recipe, COSINE | {"when": {"gate": CURVE}}, student, teacher)
    plain = term(recipe, COSINE, student, teacher)
    plain.load_state_dict(curved.state_dict())
    levels = torch.tensor([sigma, 1.0])  # The second sample counts for nothing.
    expected = factor * plain(student.sample(0), teacher.sample(0), levels[:1])[0] / 2
    torch.testing.assert_close(curved(student, teacher, levels)[0], expected, rtol=1e-5, atol=1e-7)


def test_a_curve_over_the_noise_is_written_out_and_read_back(recipe: Recipe) -> None:
    shorter = recipe.override("align.when.gate=[[0, 0.5], [0.6, 1]]")
    assert Recipe.parse(yaml.safe_load(shorter.text())) == shorter
    line = "by noise         times 0.5 up to sigma 0, 1 from 0.6 on, linear between"
    assert line in str(inspect(shorter))
    whole = str(inspect(with_align(recipe, RELATION | {"when": {"gate": CURVE}})))
    assert "times 0 up to sigma 0.2, 1 at 0.6, 2 at 0.8, 0 from 0.9 on" in whole
    assert "1 - sigma^2" in str(inspect(recipe.override("align.when.gate=signal")))
    assert "by noise" not in str(inspect(recipe))


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ("often", r"align\.when\.gate: .*'none' or 'signal' \(found 'often'\)"),
        ("[[0, 1]]", r"align\.when\.gate: .*at least 2 items"),
        ("[[0, 1], [1.5, 1]]", r"align\.when\.gate\.1\.0: .*less than or equal to 1"),
        ("[[0, 1], [1, -1]]", r"align\.when\.gate\.1\.1: .*greater than or equal to 0"),
        ("[[0, 1], [1, .inf]]", r"align\.when\.gate\.1\.1: .*finite"),
        ("[[0, 1], [1]]", r"align\.when\.gate\.1\.1: missing"),
        ("[[0.5, 1], [0.5, 0]]", r"align\.when\.gate: list the points \[sigma, factor\] by rising"),
        ("[[0, 0], [1, 0]]", r"align\.when\.gate: a curve that is 0 everywhere"),
    ],
)
def test_a_curve_that_is_none_is_refused(recipe: Recipe, gate: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe.override(f"align.when.gate={gate}")


@pytest.mark.parametrize(
    ("interpolate", "size", "start"),
    [
        ("student", (24, 10, 15), 1),
        ("teacher", (12, 30, 45), 1),
        ("teacher_in_space", (24, 30, 45), 1),
        ("teacher_in_time", (12, 10, 15), 1),
    ],
)
def test_the_four_ways_to_meet(interpolate, size, start) -> None:
    """The published grids: which side is brought over, in time and in space."""
    student = TokenGrid(torch.empty(1, 13, 30, 45, 8, device="meta"), start=-3, stride=4)
    teacher = TokenGrid(torch.empty(1, 24, 10, 15, 6, device="meta"), start=1, stride=2)
    common = common_grid(student, teacher, interpolate)
    assert (common.size, common.start, common.stride) == (size, start, 2 if size[0] == 24 else 4)
    assert resample(teacher, like=common).size == size


def test_a_teacher_brought_to_the_student_is_interpolated_linearly(recipe: Recipe) -> None:
    student, teacher = (
        grid(1, 4, 4, 6, 5, start=1, stride=4),
        grid(1, 8, 2, 3, 5, start=1, stride=2),
    )
    common = common_grid(student, teacher, "teacher")
    expected = nn.functional.interpolate(
        teacher.tokens.permute(0, 4, 1, 2, 3), (4, 4, 6), mode="trilinear"
    )
    found = resample(teacher, like=common).tokens.permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(found, expected)
    live = term(recipe, RELATION | {"interpolate": "teacher"}, student, teacher)
    loss, _ = live(student, teacher, torch.ones(1))
    assert loss > 0


def test_a_standardised_target_has_no_mean_over_a_frame() -> None:
    tokens = grid(2, 3, 4, 4, 5).tokens * 3 + 7
    whole = TokenGrid(tokens).standardised(1.0).tokens
    torch.testing.assert_close(whole.mean((2, 3)), torch.zeros(2, 3, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.std((2, 3), unbiased=False), torch.ones(2, 3, 5))
    part = TokenGrid(tokens).standardised(0.6).tokens
    mean, deviation = tokens.mean((2, 3)), tokens.std((2, 3), unbiased=False)
    torch.testing.assert_close(part.mean((2, 3)), 0.4 * mean / deviation)


def test_centred_grids_hold_nothing_that_all_clips_share() -> None:
    tokens, shared = grid(4, 3, 2, 2, 5).tokens, torch.randn(1, 3, 2, 2, 5)
    found = TokenGrid(tokens + shared).centred().tokens
    torch.testing.assert_close(found, TokenGrid(tokens).centred().tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.mean(0), torch.zeros(3, 2, 2, 5), atol=1e-5, rtol=0)


def test_a_centred_term_does_not_see_what_all_clips_share(recipe) -> None:
    student, teacher = (
        grid(4, 4, 2, 3, 6, start=1, stride=4),
        grid(4, 8, 2, 3, 5, start=1, stride=2),
    )
    moved = teacher.with_tokens(teacher.tokens + 100)  # All its tokens point one way.
    sigma = torch.ones(4)
    centred = term(recipe, RELATION | {"centre": "clips"}, student, teacher)
    (one, _), (other, _) = centred(student, teacher, sigma), centred(student, moved, sigma)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    plain = term(recipe, RELATION, student, teacher)
    assert (plain(student, teacher, sigma)[0] - plain(student, moved, sigma)[0]).abs() > 0.1


def test_a_teacher_that_sees_frame_zero_is_compared_with_the_students_first_step() -> None:
    student = grid(1, 13, 2, 2, 3, start=-3, stride=4)
    tokens = student.tokens.requires_grad_()
    resample(student, grid(1, 49, 2, 2, 3)).tokens.sum().backward()
    assert tokens.grad is not None and tokens.grad[:, 0].abs().min() > 0
    tokens.grad = None
    resample(student, grid(1, 24, 2, 2, 3, start=1, stride=2)).tokens.sum().backward()
    assert not tokens.grad[:, 0].any()  # As published.


def test_changes_hold_nothing_that_stands_still() -> None:
    tokens, still = grid(2, 4, 2, 3, 5).tokens, torch.randn(2, 1, 2, 3, 5)
    found = TokenGrid(tokens + still).changes()
    torch.testing.assert_close(found.tokens, TokenGrid(tokens).changes().tokens)
    torch.testing.assert_close(found.tokens.mean(1), torch.zeros(2, 2, 3, 5), atol=1e-6, rtol=0)
    length = found.tokens.norm(dim=-1)
    torch.testing.assert_close(found.saliency, length / length.amax((1, 2, 3), keepdim=True))
    nothing = TokenGrid(still.expand(2, 4, 2, 3, 5)).changes()
    assert nothing.saliency is not None and not nothing.saliency.any()
    own = torch.rand(2, 4, 2, 3)
    assert torch.equal(TokenGrid(tokens, saliency=own).changes().saliency, own)


@pytest.mark.parametrize("loss", [{"name": "relation"}, {"name": "sara", "saliency": "teacher"}])
def test_a_term_of_changes_does_not_see_what_stands_still(recipe, loss: dict) -> None:
    student, teacher = (
        grid(1, 4, 2, 3, 6, start=1, stride=4),
        grid(1, 8, 2, 3, 5, start=1, stride=2),
    )
    moved = teacher.with_tokens(teacher.tokens + torch.randn(1, 1, 2, 3, 5))
    changes = term(recipe, RELATION | {"centre": "time", "loss": loss}, student, teacher)
    (one, _), (other, _) = (changes(student, each, torch.ones(1)) for each in (teacher, moved))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert one > 0


def test_changes_want_two_steps(recipe) -> None:
    align = RELATION | {"block": 1, "centre": "time", "interpolate": "teacher_in_time"}
    with pytest.raises(UserError, match="one step in time"):
        inspect(with_align(recipe.override("data.frames=5", "encoder.frames=4"), align))


@pytest.mark.parametrize("interpolate", ["student", "teacher", "teacher_in_time"])
def test_a_term_that_predicts_compares_early_steps_with_later_ones(recipe, interpolate) -> None:
    student, teacher = (
        grid(2, 5, 2, 3, 6, start=-3, stride=4),
        grid(2, 8, 2, 3, 5, start=1, stride=2, seed=1),
    )
    student.tokens.requires_grad_()
    ahead = 2 if interpolate == "student" else 1  # Four frames.
    live = term(recipe, COSINE | {"ahead": ahead, "interpolate": interpolate}, student, teacher)
    loss, _ = live(student, teacher, torch.ones(2))
    loss.backward()
    assert student.tokens.grad is not None
    reached = student.tokens.grad.abs().amax((0, 2, 3, 4)) > 0
    assert reached.tolist() == [False, True, True, True, False]
    # Of the teacher, the steps before frame 5 do not matter, and all after it do.
    for step in range(8):
        changed = teacher.tokens.clone()
        changed[:, step] = torch.randn_like(changed[:, step])
        other, _ = live(student, teacher.with_tokens(changed), torch.ones(2))
        assert (other != loss).item() == (teacher.start + 2 * step >= 5), step
    if interpolate == "student":
        early = student.steps(1, 4)
        projected = live.projector(early, TokenGrid(teacher.tokens[:, :6].detach(), 1, 2))
        expected = live.align.loss(projected, teacher.steps(2).with_tokens(teacher.tokens[:, 2:]))
        torch.testing.assert_close(loss, expected)


def test_without_ahead_nothing_is_left_out(recipe) -> None:
    student, teacher = (
        grid(2, 5, 4, 6, 6, start=-3, stride=4),
        grid(2, 6, 2, 3, 5, start=3, stride=2, seed=1),  # It ends before the student does.
    )
    live = term(recipe, RELATION | {"ahead": 0}, student, teacher)
    projected = live.projector(student, like=live.common)
    loss, _ = live(student, teacher, torch.ones(2))
    assert torch.equal(loss, live.align.loss(projected, teacher))


def test_a_saliency_is_that_of_the_later_steps(recipe) -> None:
    tokens, saliency = torch.randn(1, 4, 2, 2, 5), torch.zeros(1, 4, 2, 2)
    saliency[:, 0] = 1  # The first step alone is salient, and it is not predicted.
    teacher = TokenGrid(tokens, saliency=saliency)
    align = RELATION | {"loss": {"name": "sara", "saliency": "teacher"}}
    now, later = (
        term(recipe, align | {"ahead": ahead}, grid(1, 4, 2, 2, 6), teacher) for ahead in (0, 1)
    )
    assert now(grid(1, 4, 2, 2, 6), teacher, torch.ones(1))[0] > 0
    assert later(grid(1, 4, 2, 2, 6), teacher, torch.ones(1))[0] == 0


def test_what_cannot_be_predicted_is_refused(recipe) -> None:
    """The student has steps for frames 1-4 and 5-8, the teacher four of two frames."""
    assert "the target at frames 5-8 by the student at 1-4, 2 steps ahead" in str(
        inspect(recipe.override("align.ahead=2"))
    )
    assert "predicted ahead" not in str(inspect(recipe))
    for changes, said in (
        (["align.ahead=4"], r"align\.ahead is 4, .*4x2x2 .*Give 3 or less"),
        (["align.ahead=3"], r"is over before frame 3\. Lower align\.ahead"),
        (["align.ahead=1", "align.centre=time", "align.interpolate=teacher"], "with another 1"),
        (["align.ahead=2", "align.loss={name: drift, lag: 2}"], r"loss\.lag"),
        (["align.ahead=-1"], "greater than or equal to 0"),
    ):
        with pytest.raises(UserError, match=said):
            inspect(recipe.override(*changes))


def test_centring_a_batch_of_one_is_refused(recipe) -> None:
    with pytest.raises(UserError, match=r"optim\.batch_size 1 leaves nothing"):
        recipe.override("align.centre=clips", "optim.batch_size=1")


def test_the_measured_gradients_are_those_of_each_loss_alone() -> None:
    tokens = torch.randn(2, 6, requires_grad=True)
    block = nn.Linear(6, 6)

    def losses(output):
        branch, gradients = Junction(output, Gathering()).branch(detach=False)
        return output.square().sum(), (branch**3).sum(), gradients

    output = block(tokens)
    denoise, align, gradients = losses(output)
    (denoise + 0.5 * align).backward()
    ours, theirs = 1.5 * output.detach() ** 2, 2 * output.detach()
    found = {name: value.item() for name, value in gradients.measured().items()}
    assert found == pytest.approx(
        {
            "grad_align": ours.norm().item(),
            "grad_denoise": theirs.norm().item(),
            "grad_cosine": nn.functional.cosine_similarity(
                ours.flatten(), theirs.flatten(), dim=0
            ).item(),
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize(
    "diffusion", [FlowMatching(), VPrediction(torch.linspace(0.99, 0.1, 1000))], ids=["flow", "v"]
)
def test_a_term_on_the_predicted_latents_meets_the_loss_that_they_share_a_source_with(
    diffusion: FlowMatching | VPrediction, shown: bool
) -> None:
    """Each gradient is measured in one pass, and once more with a pass of its own."""
    clean, noise, other = torch.randn(3, 2, 3, 4, 5, 5)
    output = torch.randn(2, 3, 4, 5, 5, requires_grad=True)
    timestep = torch.tensor([300, 700])
    held = torch.zeros(2, 3, 1, 1, 1, dtype=torch.bool)
    held[:, 0] = shown

    def losses() -> tuple:
        result = diffusion.denoised(output, clean, noise, timestep, held if shown else None)
        parts = (result.clean, Gathering(), result.source, result.slope)
        branch, gradients = Junction(*parts).branch(detach=False)
        return result.loss.mean(), (branch - other).square().mean(), gradients, result.source

    loss, term, gradients, _ = losses()
    (loss + term).backward()
    found = {name: value.item() for name, value in gradients.measured().items()}
    loss, term, _, source = losses()
    theirs, ours = (torch.autograd.grad(x, source, retain_graph=True)[0] for x in (loss, term))
    expected = {
        "grad_align": ours.norm().item(),
        "grad_denoise": theirs.norm().item(),
        "grad_cosine": nn.functional.cosine_similarity(ours.ravel(), theirs.ravel(), 0).item(),
    }
    assert found == pytest.approx(expected, rel=1e-4) and found["grad_denoise"] > 0


def test_a_term_that_opposes_a_flow_is_seen_to() -> None:
    clean, noise = torch.randn(2, 2, 3, 4, 5, 5)
    velocity = torch.randn(2, 3, 4, 5, 5, requires_grad=True)
    result = FlowMatching().denoised(velocity, clean, noise, torch.tensor([500.0, 500.0]))
    junction = Junction(result.clean, Gathering(), result.source, result.slope)
    branch, gradients = junction.branch(detach=False)
    (result.loss.mean() - 0.1 * (branch - clean).square().mean()).backward()
    assert gradients.measured()["grad_cosine"].item() == pytest.approx(-1, abs=1e-5)


def test_the_drift_sees_the_whole_frame_move_and_nothing_else() -> None:
    still = grid(1, 5, 4, 4, 3)
    shuffled = still.with_tokens(still.tokens[:, :, torch.randperm(4)])
    assert LatentDrift()(still, shuffled).item() == pytest.approx(0, abs=1e-10)
    # A ramp of 0.5 a step in one of three channels: 1 over two steps.
    ramp = torch.zeros(1, 5, 4, 4, 3)
    ramp[..., 0] = 0.5 * torch.arange(5.0).view(1, 5, 1, 1)
    moved = still.with_tokens(still.tokens + ramp)
    assert LatentDrift()(moved, still).item() == pytest.approx(1 / 3, rel=1e-5)
    with pytest.raises(UserError, match=r"loss\.lag"):
        LatentDrift(lag=5)(still, still)


@pytest.mark.parametrize(
    ("align", "said"),
    [
        (COSINE | {"block": 9}, "taps block 9, counted from 1"),
        (COSINE | {"target": 4}, "taps block 4, counted from 1"),
        (COSINE | {"projector": "none"}, "tokens of one width"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_made(
    recipe: Recipe, align: dict, said: str
) -> None:
    encoder = None if "target" in align else recipe.model_dump(mode="json")["encoder"]
    with pytest.raises(UserError, match=said):
        inspect(with_align(recipe, align, encoder=encoder))


def test_latents_of_cogvideox_15_cover_the_frames_that_they_were_made_from() -> None:
    size = ClipSize(frames=81, height=768, width=1360)
    shapes = CogVideoX(weights="zai-org/CogVideoX1.5-5B").shapes(size)
    align = Align.model_validate(
        {"block": "clean", "target": "latents", "loss": {"name": "drift"}, "projector": "none"}
    )
    student = grids(align, shapes, 81).student
    assert [list(student.frames(step)) for step in (0, 1, 2)] == [[0], [0], [1, 2, 3, 4]]
    assert list(student.frames(21)) == [77, 78, 79, 80]
    assert student.frames(20)[-1] == shapes.grid.frames(9)[-1] + 4 == 76


def test_a_run_whose_terms_see_the_batch_keeps_its_size(recipe: Recipe, tmp_path: Path) -> None:
    own = recipe.override("align.centre=clips")
    for each, out in ((recipe, tmp_path / "plain"), (own, tmp_path / "centred")):
        run = Run.of(out, each)
        run.begin(each, {}, resumed=False)
        run.append({"step": 1})
    Run.of(tmp_path / "plain", recipe.override("optim.batch_size=4", "optim.accumulate=1"))
    Run.of(tmp_path / "centred", own.override("optim.accumulate=1"))  # On two processes.
    other = own.override("optim.batch_size=4", "optim.accumulate=1")
    with pytest.raises(UserError, match=r"optim\.batch_size is 4, and the run in .* has 2"):
        Run.of(tmp_path / "centred", other)
    assert Run.open(tmp_path / "centred").recipe.optim.batch_size == 2


def test_a_model_that_is_shown_a_batch_alike_keeps_its_size(recipe: Recipe, monkeypatch) -> None:
    trained = Continuation(latents=(1,), probability=1.0, dropout=0.1)
    alike = Conditioning("by channels", trained, is_required=True, has_blank=True, is_alike=True)
    monkeypatch.setattr(CogVideoX, "conditioning", lambda self: alike)
    assert recipe.mixes_samples
    assert not recipe.override("data.condition={dropout: 0}").mixes_samples
    monkeypatch.setattr(CogVideoX, "conditioning", lambda self: replace(alike, is_alike=False))
    assert not recipe.mixes_samples
