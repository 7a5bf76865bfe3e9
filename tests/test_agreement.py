"""Judging the judges: statistics by hand and beside scipy's, people's files, and planted faults."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from videorepa.artifacts.scores import Row, Scores, Summary, failing_checks
from videorepa.cli import main
from videorepa.errors import UserError
from videorepa.evaluation import rank_agreement
from videorepa.evaluation.agreement import agreement
from videorepa.evaluation.human_ratings import read_human_ratings
from videorepa.evaluation.rank_agreement import RankAgreement, difference, interval
from videorepa.evaluation.statistics import draws
from videorepa.report.scores import draw_tables


def ranks(x: Sequence[float], y: Sequence[float], captions: Sequence[str] | None = None):
    return RankAgreement(x, y, captions or [str(n) for n in range(len(x))])


def test_statistics_by_hand():
    # Of six pairs five are rated differently. The judge orders three as people do, one the other
    # way round, and ties one.
    found = ranks([1, 2, 2, 4], [1, 1, 3, 2], ["a", "a", "b", "b"])
    assert found.value("auc") == pytest.approx((3 + 1 / 2) / 5)
    assert found.value("kendall") == pytest.approx((3 - 1) / np.sqrt(5 * 5))
    # Midranks 1 2.5 2.5 4 and 1.5 1.5 4 3: from 2.5, (1.5 + 0.75) / sqrt(4.5 * 4.5).
    assert found.value("spearman") == pytest.approx(2.25 / 4.5)
    # Of caption a, people rate both alike; of caption b the judge is wrong.
    assert found.value("same caption") == 0
    # Two good clips and two bad ones: 0.9 above both, 0.4 above one and level with the other.
    assert ranks([0.9, 0.4, 0.4, 0.1], [1, 1, 0, 0]).value("auc") == pytest.approx(3.5 / 4)


@pytest.mark.parametrize("levels", [2, 3, 1000])
def test_statistics_are_those_of_scipy_and_sklearn(levels):
    rng = np.random.default_rng(levels)
    x, y = rng.integers(0, 6, 300), rng.integers(0, levels, 300)
    x[:100] += y[:100]
    found = ranks(list(x), list(y))
    assert found.value("kendall") == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
    assert found.value("spearman") == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    if levels == 2:
        assert found.value("auc") == pytest.approx(roc_auc_score(y, x), abs=1e-12)


def test_a_drawn_value_is_that_of_the_clips_that_were_drawn():
    rng = np.random.default_rng(1)
    captions = [f"c{n}" for n in rng.integers(0, 6, 40)]
    x, y = rng.integers(0, 5, 40), rng.integers(0, 4, 40)
    found = ranks(list(x), list(y), captions)
    names = sorted(set(captions))
    for sample, weights in enumerate(draws(len(names))[:5]):
        # Clip by clip, as often as its caption was drawn.
        drawn = [n for n, c in enumerate(captions) for _ in range(weights[names.index(c)])]
        expected = stats.kendalltau(x[drawn], y[drawn]).statistic
        assert found.drawn("kendall")[sample] == pytest.approx(expected)
        expected = stats.spearmanr(x[drawn], y[drawn]).statistic
        assert found.drawn("spearman")[sample] == pytest.approx(expected)


def test_clips_of_a_caption_are_not_taken_for_independent():
    rng = np.random.default_rng(2)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    low, high = interval(ranks(list(x), list(y)).drawn("spearman"))
    captions = [str(n) for n in range(40) for _ in range(6)]
    same = interval(ranks(list(x.repeat(6)), list(y.repeat(6)), captions).drawn("spearman"))
    assert same == pytest.approx((low, high), abs=1e-12)
    lone = interval(ranks(list(x.repeat(6)), list(y.repeat(6))).drawn("spearman"))
    assert lone[1] - lone[0] < 0.5 * (high - low)


def test_intervals_hold_the_truth_about_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(rank_agreement, "RESAMPLES", 500)
    held = {"kendall": 0, "spearman": 0}
    # Scores are ratings and noise of half their variance; half of the ratings' is the caption's.
    rho = np.sqrt(2 / 3)
    truth = {"kendall": 2 / np.pi * np.arcsin(rho), "spearman": 6 / np.pi * np.arcsin(rho / 2)}
    captions = [str(n) for n in range(60) for _ in range(4)]
    for trial in range(200):
        rng = np.random.default_rng(trial)
        y = rng.normal(size=60).repeat(4) + rng.normal(size=240)
        found = ranks(list(y + rng.normal(size=240)), list(y), captions)
        for name in held:
            low, high = interval(found.drawn(name))
            held[name] += low < truth[name] < high
    assert all(0.88 <= count / 200 <= 0.98 for count in held.values()), held


def test_without_a_value_or_a_width_there_is_no_interval():
    alike = ranks([1, 2, 3], [2, 2, 2])
    assert np.isnan(alike.value("auc")) and np.isnan(alike.value("spearman"))
    assert interval(alike.drawn("kendall")) == (None, None)
    perfect = ranks([1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 0, 1, 1, 1, 1])
    assert perfect.value("auc") == 1 and interval(perfect.drawn("auc")) == (None, None)
    nothing = ranks([], [])
    assert np.isnan(nothing.value("spearman")) and interval(nothing.drawn("auc")) == (None, None)


def test_two_judges_are_compared_in_the_same_samples():
    rng = np.random.default_rng(3)
    truth = rng.normal(size=120)
    better, worse = truth + rng.normal(size=120), truth + 3 * rng.normal(size=120)
    found = difference(
        ranks(list(worse), list(truth)), ranks(list(better), list(truth)), "spearman"
    )
    assert found and found["low"] > 0 and found["p"] < 0.01
    same = difference(ranks(list(worse), list(truth)), ranks(list(worse), list(truth)), "spearman")
    assert same and (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)


# People's files.

MODELS, STEMS = ("cogvideox", "wan"), tuple(f"{n:03d}_ball" for n in range(12))


LAWS = (None, "gravity", "inertia")


def quality(model: str, stem: str) -> float:
    """How good a clip is, between 0 and 1; every caption has a better and a worse one."""
    rng = np.random.default_rng([MODELS.index(model), STEMS.index(stem)])
    return float(0.5 * rng.random() + 0.5 * (model == "wan") * rng.random())


def phyground(folder: Path, change: Callable[[str, dict[str, Any]], None] | None = None) -> Path:
    """Three annotators who rate every clip, each in a way of their own."""
    folder.mkdir(parents=True)
    for number, rater in enumerate(("ada", "bob", "cleo")):
        rng = np.random.default_rng(number)
        annotations = []
        for model in MODELS:
            for stem in STEMS:
                noisy = quality(model, stem) + 0.15 * rng.normal(size=5)
                sa, ptv, persistence, gravity, inertia = np.clip((5 * noisy + 1).round(), 1, 5)
                laws = {"gravity": int(gravity), "inertia": int(inertia)}
                entry = {
                    "model": model,
                    "video": f"{stem}.mp4",
                    "prompt_id": STEMS.index(stem),
                    "physical_laws": ["gravity", "inertia", "shadow"],
                    "na_laws": ["shadow"],
                    "scores": {
                        "general": {
                            "SA": int(sa),
                            "PTV": int(ptv),
                            "persistence": int(persistence),
                        },
                        "physical": laws,
                    },
                }
                annotations.append(entry)
        data = {"annotator_id": rater, "num_annotations": 24, "annotations": annotations}
        if change:
            change(rater, data)
        (folder / f"annotator_{rater}.json").write_text(json.dumps(data))
    return folder


def scored(folder: Path, score: Callable[[str, str], float | None], **more: Any) -> Path:
    """What `evaluate` wrote of all clips, with the judge's pc_expected and pc_rating."""
    rows: list[Row] = []
    for model in MODELS:
        for n, stem in enumerate(STEMS):
            value = score(model, stem)
            rows.append(
                {
                    "prompt_id": f"videos/{model}/{stem}.mp4",
                    "k": 0,
                    "scenario": None,
                    "benchmark": "judge 1",
                    "caption": f"A ball {n}.",
                    "clip": f"{model}{stem}",
                    "pc_expected": value,
                    "pc_rating": None if value is None else round(value),
                    "pc": None if value is None else value > 0.5,
                }
                | {key: give(model, stem) for key, give in more.items()}
            )
    folder.mkdir(parents=True)
    summary = Summary(benchmark="judge", version="1", n=len(rows), metrics={})
    Scores(folder, summary, rows).write()
    return folder


def metrics(scores: Scores) -> dict[str, dict[str, Any]]:
    return {name: metric.model_dump() for name, metric in scores.summary.metrics.items()}


def means(folder: Path, *laws: str) -> dict[tuple[str, str], float]:
    """Each clip's rating, straight from the files."""
    values: dict[tuple[str, str], list[float]] = {}
    for path in sorted(folder.glob("*.json")):
        for entry in json.loads(path.read_text())["annotations"]:
            rated = [entry["scores"]["physical"][law] for law in laws]
            clip = entry["model"], Path(entry["video"]).stem
            values.setdefault(clip, []).append(float(np.mean(rated)))
    return {clip: round(float(np.mean(of)), 9) for clip, of in values.items()}


def test_a_judge_is_compared_with_phygrounds_raters(tmp_path, capsys):
    people = phyground(tmp_path / "annotations")
    judge = scored(tmp_path / "clips" / "scores", quality)
    command = ["evaluate", "agreement", str(tmp_path / "clips"), "--ratings", str(people)]
    assert main([*command, "--set", "threshold=3"]) == 0
    told = capsys.readouterr().out
    assert "pc spearman" in told and "gravity" in told and "clips/scores-agreement" in told
    found = Scores.read(tmp_path / "clips" / "scores-agreement")
    clips = [(model, stem) for model in MODELS for stem in STEMS]
    scores = [quality(*clip) for clip in clips]
    for law, name in ((("gravity", "inertia"), None), (("gravity",), "gravity")):
        ratings = [means(people, *law)[clip] for clip in clips]
        of = found.summary.by_scenario[name] if name else found.summary.metrics
        expected = stats.spearmanr(scores, ratings).statistic
        assert of["pc spearman"].mean == pytest.approx(expected)
        assert of["pc kendall"].mean == pytest.approx(stats.kendalltau(scores, ratings).statistic)
        auc = roc_auc_score([rating >= 3 for rating in ratings], scores)
        assert of["pc auc"].mean == pytest.approx(auc)
        metric = of["pc spearman"]
        assert (metric.n, metric.prompts, metric.invalid) == (24, 12, 0)
        assert metric.low is not None and metric.high is not None
        assert 0 < metric.low < expected < metric.high < 1
    # The judge has no score of the prompt's events, so nothing is said of them.
    assert not any(name.startswith(("sa", "ptv")) for name in found.summary.metrics)
    assert found.summary.model_dump()["empty_ratings"] == 3 * 24  # shadow
    row = next(r for r in found.rows if r["clip"] == "wan003_ball" and r["scenario"] == "gravity")
    assert row["column"] == "pc_expected" and row["score"] == quality("wan", "003_ball")
    assert set(row["raters"]) == {"ada", "bob", "cleo"}
    assert row["rating"] == pytest.approx(means(people, "gravity")["wan", "003_ball"])
    assert row["sources"][0].endswith("annotator_ada.json, annotation 16")
    before = (tmp_path / "clips/scores-agreement/scores.jsonl").read_bytes()
    assert main([*command, "--set", "threshold=3"]) == 0
    assert (tmp_path / "clips/scores-agreement/scores.jsonl").read_bytes() == before
    assert judge.is_dir()


def test_raters_among_themselves_are_the_ceiling(tmp_path):
    people = phyground(tmp_path / "annotations")
    found = metrics(agreement(scored(tmp_path / "scores", quality), [people]))
    by_rater = [[], [], []]
    for n, name in enumerate(("ada", "bob", "cleo")):
        for entry in json.loads((people / f"annotator_{name}.json").read_text())["annotations"]:
            by_rater[n].append(np.mean(list(entry["scores"]["physical"].values())))
    ratings = np.array(by_rater)
    others = (ratings.sum(0) - ratings).round(9) / 2
    expected = stats.spearmanr(ratings.ravel(), others.ravel()).statistic
    assert found["pc spearman, a rater"]["mean"] == pytest.approx(expected)
    assert found["pc spearman, a rater"]["n"] == 72
    scores = [quality(model, stem) for model in MODELS for stem in STEMS]
    expected = stats.spearmanr(scores * 3, others.ravel()).statistic
    assert found["pc spearman, in a rater's place"]["mean"] == pytest.approx(expected)


def test_another_judge_is_compared_on_the_same_clips(tmp_path):
    people = phyground(tmp_path / "annotations")
    good = scored(tmp_path / "good", quality)
    rng = np.random.default_rng(0)
    poor = scored(tmp_path / "poor", lambda model, stem: float(rng.random()))
    found = agreement(good, [people], against=poor).comparison
    assert found is not None and found.against == "poor"
    change = found.metrics["pc spearman"]
    alone = metrics(agreement(poor, [people], tmp_path / "alone"))["pc spearman"]["mean"]
    whole = metrics(agreement(good, [people]))["pc spearman"]["mean"]
    assert change.difference == pytest.approx(whole - alone)
    assert change.low > 0 and change.p is not None and change.p_holm is not None
    # What raters reach is no claim about the judges.
    assert not any("rater" in name for name in found.metrics)
    assert change.p <= change.p_holm and found.by_scenario["gravity"]["pc kendall"].low > 0
    other = scored(tmp_path / "other", quality, clip=lambda model, stem: f"new {model} {stem}")
    with pytest.raises(UserError, match="is another video in"):
        agreement(good, [people], against=other)
    half = [scored(tmp_path / m, lambda m, s: quality(m, s)) for m in MODELS]
    for folder, model in zip(half, MODELS, strict=True):
        rows = [row for row in Scores.read(folder).rows if model in row["prompt_id"]]
        Scores(folder, Summary(benchmark="judge", version="1", n=12, metrics={}), rows).write()
    with pytest.raises(UserError, match="No rated clip is scored in .*wan too"):
        agreement(half[0], [people], against=half[1])


def test_a_report_has_a_table_for_each_judge(tmp_path):
    people = phyground(tmp_path / "annotations")
    found = agreement(scored(tmp_path / "scores", quality), [people])
    [table] = draw_tables({"clips": [found]}, {"clips": 0})
    assert table.title == "agreement of judge, version 1"
    assert "pc spearman" in table.metrics and table.categories == ["gravity", "inertia"]
    # Beside a clip it says nothing of checks, nor of one of the laws.
    row = found.by_clip["videos/wan/003_ball.mp4", 0]
    assert not failing_checks(row) and row["scenario"] is None


def test_a_law_is_never_compared_with_two_columns(tmp_path):
    people = phyground(tmp_path / "annotations")
    # This judge was asked about gravity in the clips of one model alone.
    judge = scored(
        tmp_path / "scores", quality, gravity_rating=lambda m, s: 3 if m == "wan" else None
    )
    found = agreement(judge, [people])
    of = {law: {r["column"] for r in found.rows if r["scenario"] == law} for law in LAWS}
    assert of == {None: {"pc_expected"}, "gravity": {"gravity_rating"}, "inertia": {"pc_expected"}}
    metric = found.summary.by_scenario["gravity"]["pc kendall"]
    assert (metric.n, metric.invalid) == (12, 12)


# Planted faults.


def test_swapped_labels_are_seen(tmp_path, capsys):
    ratings = tmp_path / "ratings.csv"
    rows = [(f"{m}/{s}", quality(m, s) > 0.4) for m in MODELS for s in STEMS]
    ratings.write_text("id,rating\n" + "".join(f"{clip},{int(good)}\n" for clip, good in rows))
    judge = scored(tmp_path / "scores", lambda m, s: quality(m, s) + 0.3 * (hash_of(m, s) - 0.5))
    right = metrics(agreement(judge, [ratings], settings=["column=pc_expected"]))
    assert right["rating auc"]["low"] > 0.5 and "below chance" not in capsys.readouterr().err
    ratings.write_text("id,rating\n" + "".join(f"{clip},{1 - good}\n" for clip, good in rows))
    wrong = metrics(agreement(judge, [ratings], settings=["column=pc_expected"]))
    assert wrong["rating auc"]["mean"] == pytest.approx(1 - right["rating auc"]["mean"])
    assert "rating auc is" in capsys.readouterr().err


def hash_of(model: str, stem: str) -> float:
    return float(np.random.default_rng([7, MODELS.index(model), STEMS.index(stem)]).random())


def test_a_judge_that_reads_only_the_caption_is_at_chance_within_captions(tmp_path):
    people = phyground(tmp_path / "annotations")
    # It knows how hard each caption is.
    judge = scored(
        tmp_path / "scores", lambda m, s: float(np.mean([quality(of, s) for of in MODELS]))
    )
    found = metrics(agreement(judge, [people]))
    assert found["pc spearman"]["mean"] > 0.3
    assert found["pc same caption"]["mean"] == 0.5 and found["pc same caption"]["low"] is None
    seeing = metrics(agreement(scored(tmp_path / "seeing", quality), [people]))
    assert seeing["pc same caption"]["mean"] > 0.8


def test_doubled_rows_and_ratings_are_refused(tmp_path):
    people = phyground(tmp_path / "annotations")
    judge = scored(tmp_path / "scores", quality)
    copy = tmp_path / "annotations" / "annotator_ada (1).json"
    copy.write_bytes((people / "annotator_ada.json").read_bytes())
    with pytest.raises(UserError, match=r"two ratings of SA by ada|two ratings of sa by ada"):
        agreement(judge, [people])
    copy.unlink()
    rows = Scores.read(judge).rows
    Scores(judge, Summary(benchmark="judge", version="1", n=48, metrics={}), [*rows, *rows]).write()
    with pytest.raises(UserError, match="Found 48 rows for 24 clips"):
        agreement(judge, [people])
    assert not (tmp_path / "scores-agreement").exists()


def test_what_is_missing_is_counted_and_never_zero(tmp_path, capsys):
    def change(rater: str, data: dict[str, Any]) -> None:
        first = data["annotations"][0]["scores"]
        first["general"]["SA"] = None
        first["physical"]["gravity"] = float("nan") if rater == "ada" else None
        # A clip that is not scored, and one that nobody rates.
        data["annotations"][1]["model"] = "mochi"

    people = phyground(tmp_path / "annotations", change)
    judge = scored(
        tmp_path / "scores", lambda m, s: None if (m, s) == ("wan", STEMS[2]) else quality(m, s)
    )
    found = agreement(judge, [people])
    told = " ".join(capsys.readouterr().err.split())
    assert "1 clip rated and not scored, and left out; first: mochi/001_ball 0" in told
    assert "1 clip scored and not rated, and left out; first: videos/cogvideox/001_ball" in told
    assert [m["prompt_id"] for m in found.summary.missing] == ["mochi/001_ball"]
    assert [m["prompt_id"] for m in found.summary.left_over] == ["videos/cogvideox/001_ball.mp4"]
    pc, gravity = found.summary.metrics["pc kendall"], found.summary.by_scenario["gravity"]
    assert (pc.n, pc.invalid, gravity["pc kendall"].n) == (22, 1, 21)
    first = next(row for row in found.rows if row["clip"] == "cogvideox000_ball")
    assert first["scenario"] == "inertia" or first["scenario"] is None
    lone = [row for row in found.rows if row["clip"] == "cogvideox000_ball"]
    assert {row["scenario"] for row in lone} == {None, "inertia"}
    assert lone[0]["rating"] == lone[1]["rating"] > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(num_annotations=25), "24 annotations and says 25"),
        (lambda d: d.update(annotations={}), "expected PhyGround's annotator_id"),
        (lambda d: d["annotations"][3]["scores"]["general"].update(SA=0), "SA: the rating is 0;"),
        (lambda d: d["annotations"][3]["scores"].update(general=4), "annotation 4 is"),
        (lambda d: d["annotations"][3]["scores"]["general"].update(PQ=3), "annotation 4 is"),
        (lambda d: d["annotations"][3]["scores"]["physical"].update(buoyancy=3), "annotation 4 is"),
        (lambda d: d["annotations"][3]["scores"]["physical"].update(gravity="good"), "a number"),
        (lambda d: d["annotations"][3].pop("model"), "expected model, video"),
    ],
)
def test_other_layouts_of_annotations_are_refused(tmp_path, change, says):
    people = phyground(tmp_path / "a", lambda rater, data: change(data) if rater == "bob" else None)
    with pytest.raises(UserError, match=says) as error:
        read_human_ratings([people])
    assert "annotator_bob.json" in str(error.value)


def test_clips_of_two_models_are_not_taken_for_one(tmp_path):
    people = phyground(tmp_path / "annotations")
    judge = scored(tmp_path / "scores", quality, prompt_id=lambda m, s: s if m == "wan" else m + s)
    with pytest.raises(UserError, match="fits the ratings of cogvideox/000_ball and of wan/000_"):
        agreement(judge, [people])


# Tables.


def videophy(path: Path, columns: str, value: Callable[[str, str], object]) -> Path:
    lines = [
        f"https://host/test/{m}/{s}.mp4?download=true,A ball.,{m},{value(m, s)},{value(m, s)}\n"
        for m in MODELS
        for s in STEMS
    ]
    path.write_text(f"video_url,caption,source,{columns}\n" + "".join(lines))
    return path


def test_videophys_reference_gives_an_auc_without_a_ceiling(tmp_path):
    table = videophy(
        tmp_path / "reference.csv", "majority_sa,majority_pc", lambda m, s: int(quality(m, s) > 0.4)
    )
    judge = scored(tmp_path / "scores", hash_of, sa=lambda m, s: True, sa_score=quality)
    found = metrics(agreement(judge, [table]))
    labels = [quality(m, s) > 0.4 for m in MODELS for s in STEMS]
    scores = [hash_of(m, s) for m in MODELS for s in STEMS]
    assert set(found) == {f"{d} {s}" for d in ("sa", "pc") for s in ("auc", "same caption")}
    assert found["pc auc"]["mean"] == pytest.approx(roc_auc_score(labels, scores))
    assert found["sa auc"]["mean"] == 1 and found["sa auc"]["low"] is None
    with pytest.raises(UserError, match=r"majority_sa: the rating is 3; expected 0 to 1"):
        read_human_ratings([videophy(table, "majority_sa,majority_pc", lambda m, s: 3)])
    # VideoPhy-2's scale starts at 1, so a 0 there is a missing rating that someone filled in.
    graded = videophy(tmp_path / "2.csv", "sa,pc", lambda m, s: 1 + round(4 * quality(m, s)))
    assert "pc spearman" in metrics(agreement(judge, [graded]))
    with pytest.raises(UserError, match=r"line 14, sa: the rating is 0; expected 1 to 5"):
        read_human_ratings([videophy(graded, "sa,pc", lambda m, s: 0 if m == "wan" else 4)])


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "own.csv"
    lines = "id,dimension,rater,rating\n"
    for rater in ("ada", "bob"):
        for m in MODELS:
            for s in STEMS:
                lines += f"{m}/{s},Fun,{rater},{'' if s == STEMS[0] else 7 * quality(m, s)}\n"
    path.write_text(lines)
    judge = scored(tmp_path / "scores", quality)
    with pytest.raises(
        UserError, match=r"no score of what people rated \(fun\).* it has k, pc_exp"
    ):
        agreement(judge, [path])
    found = agreement(judge, [path], settings=["column=pc_expected"])
    metric = metrics(found)["fun spearman"]
    assert metric["mean"] == pytest.approx(1) and (metric["n"], metric["prompts"]) == (22, 11)
    assert found.summary.model_dump()["empty_ratings"] == 4 and len(found.summary.left_over) == 2
    # By the digest of the video, whatever the clip is called.
    path.write_text(
        "clip,rating\n" + "".join(f"{m}{s},{quality(m, s)}\n" for m in MODELS for s in STEMS)
    )
    by_digest = metrics(agreement(judge, [path], settings=["column=pc_expected"]))
    assert by_digest["rating spearman"]["n"] == 24
    for text, says in (
        ("id,score\na,1\n", r"has the columns id, score\. Expected PhyGround's"),
        ("id,rating\nwan/000_ball,1\nwan/000_ball,1\n", "two ratings of rating by people"),
        ("id,rating\nother,1\n", "None of the ratings is of a clip in"),
        ("id,rating\nwan/000_ball,\n", r"holds no rating \(1 places are empty\)"),
        ("id,rating\n,1\n", "line 2 is .* expected an id or a clip"),
        ("id,rating\nwan/000_ball,good\n", "line 2: the rating is 'good'; expected a number"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            agreement(judge, [path], settings=["column=pc_expected"])


def test_a_clip_on_which_people_are_split_is_neither_good_nor_bad(tmp_path):
    path = tmp_path / "own.csv"
    given = {"wan/000_ball": "11", "wan/001_ball": "10", "wan/002_ball": "00", "wan/003_ball": "00"}
    lines = [f"{c},pc,{r},{of[n]}\n" for c, of in given.items() for n, r in enumerate(("a", "b"))]
    path.write_text("id,dimension,rater,rating\n" + "".join(lines))
    values = dict(zip(STEMS, (0.9, 0.1, 0.2, 0.3), strict=False))
    judge = scored(tmp_path / "scores", lambda m, s: values.get(s, 0.5))
    found = metrics(agreement(judge, [path]))
    assert {k: found["pc auc"][k] for k in ("mean", "n", "split")} == {
        "mean": 1,
        "n": 3,
        "split": 1,
    }
    # Of eight ratings: b called the clip good that a called bad, and the other way round.
    assert found["pc auc, a rater"]["n"] == 8
    assert found["pc auc, a rater"]["mean"] == pytest.approx((2 * 4 + 2 / 2 + 4 / 2) / 15)


def test_samples_of_a_prompt_are_told_apart(tmp_path):
    rows = [
        {"prompt_id": "p", "k": k, "scenario": None, "caption": "P.", "pc_score": float(k)}
        for k in range(4)
    ]
    summary = Summary(benchmark="judge", version="1", n=4, metrics={})
    (tmp_path / "scores").mkdir()
    Scores(tmp_path / "scores", summary, rows).write()
    path = tmp_path / "own.csv"
    for text in (
        "id,k,dimension,rating\n" + "".join(f"p,{k},pc,{2 * k}\n" for k in range(4)),
        "id,dimension,rating\n" + "".join(f"p-{k},pc,{2 * k}\n" for k in range(4)),
    ):
        path.write_text(text)
        found = metrics(agreement(tmp_path / "scores", [path]))["pc kendall"]
        assert (found["mean"], found["n"], found["prompts"]) == (1, 4, 1)


def test_the_command_says_what_it_needs(tmp_path, capsys):
    assert main(["evaluate", "agreement", str(tmp_path)]) == 1
    assert "--ratings is for two benchmarks" in capsys.readouterr().err
    people = phyground(tmp_path / "annotations")
    assert main(["evaluate", "agreement", str(tmp_path), "--ratings", str(people)]) == 1
    assert "is not a score folder" in capsys.readouterr().err
