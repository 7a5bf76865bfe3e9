"""Intervals and tests against published numbers, brute force and their own defining properties."""

from __future__ import annotations

import math
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from videorepa.errors import UserError
from videorepa.evaluation.pairs import Pairs, mean, share, sweep
from videorepa.evaluation.statistics import (
    bootstrap,
    clopper_pearson,
    holm,
    mcnemar_exact,
    mean_of_few,
    paired_bootstrap,
    swap,
    wilson,
    wilson_of_clusters,
)

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
        assert stats.binom.sf(successes - 1, n, low) == pytest.approx(0.025, abs=1e-6)
    if successes < n:
        assert stats.binom.cdf(successes, n, high) == pytest.approx(0.025, abs=1e-6)


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


def test_a_share_of_alike_clips_is_no_surer_than_of_one_each():
    flags = np.random.default_rng(3).random((60, 1)) < 0.4
    one = share(_rows(flags), "pc")
    four = share(_rows(flags.repeat(4, 1)), "pc")
    assert four["percent"] == one["percent"] and four["n"] == 240
    # Of independent clips it would be half as wide.
    wide = four["high"] - four["low"]
    assert 0.85 * (one["high"] - one["low"]) < wide < 1.1 * (one["high"] - one["low"])


@given(counts)
def test_clusters_are_worth_their_trials_if_those_differ_and_one_if_all_are_alike(pair):
    successes, n = pair
    outcomes = [1] * successes + [0] * (n - successes)
    for times in (1, 3):
        clusters = [[outcome] * times for outcome in outcomes]
        assert wilson_of_clusters(clusters) == pytest.approx(wilson(successes, n), abs=1e-9)
    assert wilson_of_clusters([outcomes]) == pytest.approx(wilson(successes / n > 0, 1)) or (
        0 < successes < n
    )
    assert wilson_of_clusters([[], []]) == (0.0, 1.0)


def test_the_interval_of_clusters_covers_the_share_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        # Ten clips of each of 12 captions, which pass with a probability of their own.
        share_of_each = rng.beta(0.6, 1.4, 12)
        clusters = [(rng.random(10) < share).astype(int) for share in share_of_each]
        low, high = wilson_of_clusters(clusters)
        covered += low <= 0.3 <= high
    assert 0.9 <= covered / 400 <= 0.99


def test_ids_make_no_prompts_of_repeated_captions():
    """Two captions, each in ten rows with an id of its own, as in published tables of ratings."""
    flags = [True] * 10 + [False] * 10
    rows = [
        {"prompt_id": str(n), "k": 0, "caption": f"Caption {n // 10}.", "pc": flag, "score": n}
        for n, flag in enumerate(flags)
    ]
    found = share(rows, "pc")
    assert (found["n"], found["prompts"]) == (20, 2)
    assert [found["low"], found["high"]] == pytest.approx([100 * end for end in wilson(1, 2)])
    every = share([row | {"pc": True} for row in rows], "pc")
    assert every["low"] == pytest.approx(100 * wilson(2, 2)[0])
    of_means = mean(rows, "score")
    assert of_means["low"] == 4.5 and of_means["high"] == 14.5 and of_means["prompts"] == 2

    better = Pairs.of(rows, [row | {"pc": True} for row in rows]).flag("pc")
    assert (better["n"], better["prompts"], better["only_b"]) == (20, 2, 10)
    # One of two captions is better, by chance as often as not. McNemar's p would be 0.002.
    assert better["p"] == 1 and better["low"] == 0 and better["high"] == 100
    # A benchmark that asks about a list's caption knows clips of its longer versions for alike.
    asked = [row | {"caption": str(n), "asked": row["caption"]} for n, row in enumerate(rows)]
    assert share(asked, "pc") == found


def test_clips_of_one_name_and_other_captions_are_not_compared():
    rows = [{"prompt_id": "0", "k": 0, "caption": "A ball falls.", "pc": True}]
    with pytest.raises(
        UserError, match=r"'0' is 'A cup\.' in one of .*'A ball falls\.' in the other"
    ):
        Pairs.of(rows, [rows[0] | {"caption": "A cup."}])


def test_invalid_rows_are_counted_and_never_scored():
    rows = _rows(np.array([[1], [1], [0], [0]]))
    rows[3]["pc"] = None
    found = share(rows, "pc")
    assert found["percent"] == pytest.approx(200 / 3)
    assert (found["n"], found["invalid"]) == (3, 1)
    assert mean(rows, "pc")["mean"] == pytest.approx(2 / 3)
    none = [row | {"pc": None} for row in rows]
    assert share(none, "pc") == {"percent": None, "low": 0, "high": 100, "n": 0} | {
        "prompts": 0,
        "invalid": 4,
    }
    assert mean(none, "pc")["mean"] is None and sweep(none, "pc", [0.5]) == {}
    found = Pairs.of(rows, _rows(np.ones((4, 1)))).flag("pc")
    assert (found["n"], found["invalid"], found["only_b"]) == (3, 1, 1)
    assert Pairs.of(rows, none).compare(["pc"]) == {"unpaired": 0}


def test_a_sweep_counts_ties_as_reached():
    rows = [{"score": score} for score in (0.2, 0.5, 0.7, None)]
    found = sweep(rows, "score", [0.2, 0.5, 0.6])
    assert found == pytest.approx({"0.2": 100, "0.5": 200 / 3, "0.6": 100 / 3})


def test_a_comparison_of_means_keeps_their_unit():
    rows = [{"prompt_id": str(n), "k": 0, "score": n / 10} for n in range(8)]
    found = Pairs.of(rows, [row | {"score": row["score"] + 0.1} for row in rows]).mean("score")
    assert found["difference"] == pytest.approx(0.1)
    assert found["low"] == pytest.approx(0.1) and "p" not in found


def test_comparison_pairs_by_prompt_and_sample_not_by_order():
    flags = np.random.default_rng(2).random((30, 1)) < 0.5
    better = flags.copy()
    better[np.flatnonzero(~flags[:, 0])[:8]] = True
    found = Pairs.of(_rows(flags), _rows(better)[::-1]).compare(["pc"])
    assert found["pc"]["difference"] == pytest.approx(100 * 8 / 30)
    assert (found["pc"]["only_a"], found["pc"]["only_b"]) == (0, 8)
    assert found["pc"]["p"] == pytest.approx(2 * 0.5**8)
    assert found["pc"]["low"] > 0 and found["unpaired"] == 0


def test_comparison_leaves_out_what_has_no_partner_and_refuses_duplicates():
    rows = _rows(np.ones((4, 1)))
    assert Pairs.of(rows, rows[:3]).unpaired == 1
    with pytest.raises(UserError, match="no clip in both"):
        Pairs.of(rows[:1], rows[1:])
    with pytest.raises(UserError, match="duplicates"):
        Pairs.of(rows + rows[:1], rows)


def test_the_bootstrap_of_a_mean_is_the_paired_one_and_takes_any_function():
    values = np.random.default_rng(3).normal(size=(40, 2)) + 4
    own = bootstrap(values, lambda means: means[..., 0])
    assert own == pytest.approx(paired_bootstrap([[value] for value in values[:, 0]]))
    low, high = bootstrap(values, lambda means: means[..., 0] / means[..., 1])
    assert low < values[:, 0].mean() / values[:, 1].mean() < high
    with pytest.raises(ValueError, match="no rows"):
        bootstrap(values[:0], lambda means: means[..., 0])


def test_swapping_counts_the_exchanges_that_differ_as_much():
    """Of the 2^4 ways to exchange four pairs, two are as far apart as the one found."""
    a, b = np.zeros((4, 1)), np.array([[1.0], [2.0], [3.0], [4.0]])

    def difference(x, y):
        return (y - x)[..., 0]

    assert swap(a, b, difference) == pytest.approx(2 / 16, abs=0.01)
    assert swap(a, a, difference) == 1


def test_the_mean_of_a_few_has_students_interval() -> None:
    values = [0.3, 0.1, 0.2, 0.4, 0.0]
    found = mean_of_few(values)
    expected = stats.ttest_1samp(values, 0)
    interval = expected.confidence_interval(0.95)
    assert found.value == pytest.approx(0.2)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    # Of means of that size, about four in five are told from 0.
    rng = np.random.default_rng(0)
    spread = float(np.std(values, ddof=1))
    drawn = [mean_of_few(list(rng.normal(found.smallest, spread, 5))) for _ in range(400)]
    assert 0.7 < np.mean([mean.p < 0.05 for mean in drawn]) < 0.9
    assert mean_of_few([1.0]).p == 1 and mean_of_few([1.0]).low == -math.inf
    for alike in ([1.0, 1.0], [2.5, 2.5, 2.5], [0.0, 0.0]):
        found = mean_of_few(alike)
        assert (found.p, found.low, found.smallest) == (1, -math.inf, math.inf)
    with pytest.raises(ValueError, match="no values"):
        mean_of_few([])
