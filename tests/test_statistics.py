"""Intervals and tests against published numbers, brute force and their own defining properties."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from videorepa.benchmarks import compare_flags, share
from videorepa.errors import UserError
from videorepa.statistics import clopper_pearson, holm, mcnemar_exact, paired_bootstrap, wilson

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
pvalues = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        (248, 344, 67.1, 76.6),
        (138, 344, 35.1, 45.4),
        (111, 344, 27.5, 37.4),
        (102, 344, 25.1, 34.7),
        (40, 143, 21.3, 35.8),
        (41, 55, 61.7, 84.2),
    ],
)
def test_wilson_gives_the_known_intervals(successes, n, low, high):
    found = wilson(successes, n)
    assert [round(100 * edge, 1) for edge in found] == [low, high]


@given(counts)
def test_wilson_holds_its_share_and_mirrors(pair):
    successes, n = pair
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)
    wide = wilson(successes, n, 0.99)
    assert wide[0] <= low and high <= wide[1]


@given(counts)
def test_the_exact_interval_ends_where_the_tails_are_a_fortieth(pair):
    successes, n = pair
    low, high = clopper_pearson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    if successes:
        assert binom.sf(successes - 1, n, low) == pytest.approx(0.025, abs=1e-6)
    if successes < n:
        assert binom.cdf(successes, n, high) == pytest.approx(0.025, abs=1e-6)


def test_wilson_without_trials_knows_nothing_and_refuses_nonsense():
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="5 successes in 4 trials"):
        wilson(5, 4)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_sum(b, c):
    n = b + c
    tail = sum(comb(n, k) for k in range(min(b, c) + 1)) / 2**n
    assert mcnemar_exact(b, c) == pytest.approx(min(1.0, 2 * tail))


@given(pvalues)
def test_holm_lies_between_the_raw_and_bonferroni_and_keeps_the_order(p):
    adjusted = holm(p)
    for raw, new in zip(p, adjusted, strict=True):
        assert raw <= new <= min(1.0, raw * len(p)) + 1e-12
    order = np.argsort(p, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_holm_on_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        # Three seeds of a prompt share most of their difference.
        prompts = rng.normal(0.3, 1.0, (60, 1)) + rng.normal(0, 0.3, (60, 3))
        low, high = paired_bootstrap(list(prompts), resamples=500, seed=trial)
        covered += low <= 0.3 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_bootstrap_does_not_take_a_prompts_seeds_for_independent():
    rng = np.random.default_rng(1)
    prompts = rng.normal(size=50)
    one = paired_bootstrap([[value] for value in prompts])
    copies = paired_bootstrap([[value] * 8 for value in prompts])
    assert copies == pytest.approx(one, abs=1e-12)
    with pytest.raises(ValueError, match="no differences"):
        paired_bootstrap([])


def _rows(flags: np.ndarray) -> list[dict]:
    return [
        {"prompt_id": f"p{prompt}", "k": k, "scenario": None, "pc": bool(flag)}
        for prompt, samples in enumerate(flags)
        for k, flag in enumerate(samples)
    ]


def test_a_share_is_in_percent_and_counts_its_clips():
    found = share(_rows(np.array([[1, 0], [1, 1]])), "pc")
    assert found["percent"] == 75 and found["n"] == 4
    assert found["low"] < 75 < found["high"]


def test_comparison_pairs_by_prompt_and_sample_not_by_order():
    flags = np.random.default_rng(2).random((30, 1)) < 0.5
    better = flags.copy()
    better[np.flatnonzero(~flags[:, 0])[:8]] = True
    found = compare_flags(_rows(flags), _rows(better)[::-1], ["pc"])
    assert found["pc"]["difference"] == pytest.approx(100 * 8 / 30)
    assert (found["pc"]["only_a"], found["pc"]["only_b"]) == (0, 8)
    assert found["pc"]["p"] == pytest.approx(2 * 0.5**8)
    assert found["pc"]["low"] > 0 and found["unpaired"] == 0


def test_comparison_leaves_out_what_has_no_partner_and_refuses_doubles():
    rows = _rows(np.ones((4, 1)))
    assert compare_flags(rows, rows[:3], ["pc"])["unpaired"] == 1
    with pytest.raises(UserError, match="no clip in both"):
        compare_flags(rows[:1], rows[1:], ["pc"])
    with pytest.raises(UserError, match="doubles"):
        compare_flags(rows + rows[:1], rows, ["pc"])
