"""Choosing the best of N: the estimator against all subsets, what is chosen and what is refused."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape

from pages import write_sidecar
from test_bad_input import lab_clip
from videorepa.artifacts.clips import clip_digest, clips_of, readable_clips
from videorepa.artifacts.scores import Row, Scores, Summary
from videorepa.artifacts.selection import BestOfCurve, Selection
from videorepa.benchmarks.surprise import Surprise
from videorepa.cli import main
from videorepa.data.video import write_video
from videorepa.errors import UserError
from videorepa.evaluate import evaluate
from videorepa.evaluation.best_of import PromptSamples, best_of, chances
from videorepa.evaluation.tables import table
from videorepa.report import report
from videorepa.report.scores import draw_tables
from videorepa.select import select
from videorepa.settings import plugins
from videorepa.system.wording import label, number

# The estimator.

few = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=6).map(np.array)


def brute(goodness: np.ndarray, value: np.ndarray, n: int) -> float:
    """The mean over all subsets of n of the mean value of their best clips."""
    means = []
    for subset in map(list, combinations(range(len(goodness)), n)):
        best = goodness[subset].max()
        means.append(value[[i for i in subset if goodness[i] == best]].mean())
    return float(np.mean(means))


def test_the_best_of_n_by_hand() -> None:
    # Of the six pairs of 1, 2, 4, 8 the best is 2 once, 4 twice and 8 three times.
    scores = np.array([8.0, 1.0, 4.0, 2.0])
    assert chances(scores, 2).tolist() == [3 / 6, 0, 2 / 6, 1 / 6]
    assert chances(scores, 3).tolist() == [3 / 4, 0, 1 / 4, 0]
    assert chances(scores, 2) @ scores == pytest.approx((2 + 2 * 4 + 3 * 8) / 6)
    # Of the three pairs of 5, 5, 1 all have a 5 for their best, each of the two as often.
    assert chances(np.array([5.0, 1.0, 5.0]), 2).tolist() == [1 / 2, 0, 1 / 2]
    # The integers are exact where floats are not.
    assert chances(np.arange(2000.0), 1000).sum() == pytest.approx(1, abs=1e-12)
    for n in (0, 4):
        with pytest.raises(ValueError, match="expected 1 to 3"):
            chances(np.arange(3.0), n)


@given(few, st.data())
def test_it_is_the_mean_over_all_subsets_and_ties(goodness: np.ndarray, data: Any) -> None:
    other = np.array(data.draw(st.lists(st.floats(-9, 9), min_size=6, max_size=6)))
    other = other[: len(goodness)]
    order = data.draw(st.permutations(range(len(goodness))))
    expected = []
    for n in range(1, len(goodness) + 1):
        chance = chances(goodness, n)
        assert chance.sum() == pytest.approx(1) and (chance >= 0).all()
        assert chance @ other == pytest.approx(brute(goodness, other, n), abs=1e-9)
        assert chances(goodness[order], n) == pytest.approx(chance[order])
        expected.append(chance @ goodness)
    assert expected[0] == pytest.approx(goodness.mean())
    assert expected[-1] == pytest.approx(goodness.max())
    assert all(b >= a - 1e-12 for a, b in zip(expected, expected[1:], strict=False))


def test_a_choice_that_knows_nothing_of_the_judge_leaves_the_judge_where_it_is() -> None:
    goodness, judged = np.array([3.0, 1.0, 2.0, 2.0]), np.array([0.0, 1.0, 5.0, 9.0])
    for n in range(1, 5):
        every = [chances(goodness, n) @ np.array(order) for order in permutations(judged)]
        assert np.mean(every) == pytest.approx(judged.mean())
        # Nor does a score that is the same for all clips choose, whatever the judge says of them.
        assert chances(np.ones(4), n) @ judged == pytest.approx(judged.mean())


def test_points_are_means_over_prompts_with_intervals_over_captions() -> None:
    nothing = np.zeros(2)
    prompts = [
        PromptSamples(subject, np.array(scores), np.array(scores), nothing, nothing)
        for subject, scores in (("a", [0.0, 1.0]), ("a", [0.0, 3.0]), ("b", [4.0, 4.0]))
    ]
    one, two = best_of(prompts, lambda prompt: prompt.score, 2, 10.0)
    assert (one.mean, one.change, one.change_low, one.change_high) == (20.0, 0, 0, 0)
    assert two.mean == pytest.approx(10 * (1 + 3 + 4) / 3)
    assert two.change == pytest.approx(10 * (0.5 + 1.5 + 0) / 3)
    # A draw of captions has "a" twice, "b" twice, or both: 10, 0 or 20 / 3 of change.
    assert (two.change_low, two.change_high) == (0.0, 10.0)
    assert (two.low, two.high) == (20.0, 40.0)


# Folders.

Values = Mapping[str, Sequence[Any]]


def shade(folder: Path, prompt: str, k: int, moves: int) -> Path:
    frames = np.full((4, 32, 32, 3), 40, np.uint8)
    frames[:, :8, :8] = 10 * k + sum(map(ord, prompt)) % 200
    frames[1::2] += np.uint8(moves)
    path = folder / f"{prompt}-{k}.mp4"
    write_video(path, frames, 8)
    write_sidecar(path, prompt, f"A {prompt}.", k)
    return path


def made(folder: Path, samples: Mapping[str, int]) -> Path:
    """Clips as `generate` leaves them; sample k moves more than the one before."""
    folder.mkdir()
    about = {"model": "m", "prompts": [*samples], "samples": max(samples.values())}
    (folder / "generation.json").write_text(json.dumps(about))
    for prompt, how_many in samples.items():
        for k in range(how_many):
            shade(folder, prompt, k, 20 * k)
    return folder


def rows_of(clips: Path, column: str, values: Values, **more: Any) -> list[Row]:
    return [
        {
            "prompt_id": prompt,
            "k": k,
            "scenario": None,
            "clip": clip_digest(clips / f"{prompt}-{k}.mp4"),
            "caption": f"A {prompt}.",
            column: value,
        }
        | more
        for prompt, of in values.items()
        for k, value in enumerate(of)
        if value != "absent"
    ]


def scored(clips: Path, name: str, benchmark: str, rows: list[Row], **more: Any) -> Path:
    """Scores as `evaluate` leaves them."""
    version = plugins.description("benchmarks", benchmark).version
    about = {"benchmark": benchmark, "version": version, "n": len(rows), "metrics": {}} | more
    (clips / name).mkdir(exist_ok=True)
    Scores(clips / name, Summary.model_validate(about), rows).write()
    return clips / name


SURPRISE = {"ball": [3.0, 1.0, 2.0], "box": [5.0, 6.0, 4.0]}
JOINT = {"ball": [True, False, True], "box": [False, False, True]}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    return made(tmp_path / "clips", {"ball": 3, "box": 3})


@pytest.fixture
def surprise(clips: Path) -> Path:
    return scored(clips, "surprise", "surprise", rows_of(clips, "surprise", SURPRISE))


@pytest.fixture
def joint(clips: Path) -> Path:
    return scored(clips, "lab", "lab", rows_of(clips, "joint", JOINT))


def chosen(selection: Selection) -> dict[str, int]:
    return {clip.prompt_id: clip.k for clip in selection.chosen}


def means(curve: BestOfCurve) -> list[float]:
    return [point.mean for point in curve.points]


def test_the_least_surprising_is_chosen_and_judged_by_another(
    clips: Path, surprise: Path, joint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "best"
    selection = select(
        clips, out, by=surprise, column="surprise", judged_by=joint, judged_column="joint"
    )
    assert chosen(selection) == {"ball": 1, "box": 2} and selection.tied == 0
    own, judged, motion = selection.curves
    assert (own.role, judged.role, motion.role) == ("chosen by", "judged by", "motion")
    # Least of n: of ball 2, (1 + 1 + 2) / 3, 1; of box 5, (4 + 4 + 5) / 3, 4.
    assert means(own) == pytest.approx([3.5, (4 / 3 + 13 / 3) / 2, 2.5])
    # Judged in percent. Of pairs, ball's best is 1 twice and 2 once; box's is 2 twice and 0 once.
    assert judged.percent and not own.percent
    assert means(judged) == pytest.approx([50.0, 100 * (1 / 3 + 2 / 3) / 2, 50.0])
    by_clip = {(clip.prompt_id, clip.k): clip.motion for clip in selection.clips}
    assert motion.points[0].mean == pytest.approx(np.mean(list(by_clip.values())))
    assert motion.points[-1].mean == pytest.approx((by_clip["ball", 1] + by_clip["box", 2]) / 2)
    assert by_clip["ball", 0] < 1 and by_clip["ball", 2] == pytest.approx(40, abs=2)

    # What is left is a folder as any other, and holds the videos that were chosen.
    there = readable_clips(out)
    assert there.keys() == {("ball", 0), ("box", 0)} and clips_of(out)[1] == []
    digests = {clip.prompt_id: clip_digest(clip.path) for clip in there.values()}
    assert digests == {clip.prompt_id: clip.clip for clip in selection.chosen}
    assert there["ball", 0].seed == 1001 and there["ball", 0].model_dump()["chosen_k"] == 1
    assert Selection.read(out) == selection


def test_given_images_and_filmed_truths_come_with_the_chosen_clips(
    clips: Path, surprise: Path, tmp_path: Path
) -> None:
    for file, text in {
        "images/ab12.png": "i",
        "filmed/ball.mp4": "f",
        "filmed/no.mp4": "x",
    }.items():
        (clips / file).parent.mkdir(exist_ok=True)
        (clips / file).write_text(text)
    for k, image in enumerate(("ab12", "ab12", "../ab12")):
        for prompt in SURPRISE:
            sidecar = clips / f"{prompt}-{k}.json"
            sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"image": image}))
    select(clips, tmp_path / "best", by=surprise, column="surprise")
    ball = readable_clips(tmp_path / "best")["ball", 0]
    assert ball.kept_image is not None and ball.kept_image.read_text() == "i"
    assert ball.kept_film is not None and ball.kept_film.read_text() == "f"
    kept = {
        path.name for path in (tmp_path / "best").rglob("*.*") if path.parent != tmp_path / "best"
    }
    assert kept == {"ab12.png", "ball.mp4"}
    # What is no digest leads nowhere, also if there is a file.
    (clips / "ab12.png").write_text("outside")
    stray = readable_clips(clips)["ball", 2]
    assert stray.model_dump()["image"] == "../ab12" and stray.kept_image is None


def test_more_is_better_where_the_benchmark_says_so(clips: Path, tmp_path: Path) -> None:
    # The same numbers, under columns of which one says less and the other more.
    by_error = scored(clips, "a", "phyworld", rows_of(clips, "velocity_error", SURPRISE))
    by_pc = scored(clips, "b", "videophy", rows_of(clips, "pc_score", SURPRISE))
    less = select(clips, tmp_path / "less", by=by_error)
    more = select(clips, tmp_path / "more", by=by_pc / "scores.jsonl", column="pc_score")
    assert chosen(less) == {"ball": 1, "box": 2} and less.chosen_by.better == "lower"
    assert chosen(more) == {"ball": 0, "box": 1} and more.chosen_by.better == "higher"
    assert means(less.curves[0])[-1] == 2.5 and means(more.curves[0])[-1] == 4.5


def test_every_benchmarks_columns_are_ones_that_its_rows_have() -> None:
    ranked = {
        name: plugins.description("benchmarks", name).ranked_by()
        for name in plugins.names("benchmarks")
    }
    assert ranked["surprise"] == {"surprise": "lower", "surprise_max": "lower"}
    assert ranked["lab"] == dict.fromkeys(["sa", "pc", "joint"], "higher")
    assert ranked["phyworld"] == {"velocity_error": "lower"}
    assert {"pc_score", "sa_score", "joint"} <= ranked["videophy"].keys()
    assert {"pc_rating", "pc_expected"} <= ranked["videophy2"].keys()
    assert {"vq", "vq_rating", "vq_expected"} <= ranked["videoscore2"].keys()
    assert {"pc_expected", "gravity_rating"} <= ranked["phyjudge"].keys()
    assert {"aesthetic_quality", "appearance_style"} <= ranked["vbench"].keys()
    # Neither more motion nor less is better.
    assert not any(
        "motion" in column or "dynamic_degree" in column for of in ranked.values() for column in of
    )
    higher = {name for name, of in ranked.items() if set(of.values()) == {"higher"}}
    assert higher == {"lab", "vbench", "videophy", "videophy2", "videoscore2", "phyjudge"}


def test_the_judge_has_no_part_in_the_choice(
    clips: Path, surprise: Path, joint: Path, tmp_path: Path
) -> None:
    alone = select(clips, tmp_path / "alone", by=surprise, column="surprise")
    fewer = {"ball": [True, False, True], "box": [False, True]}
    seen = scored(clips, "lab", "lab", rows_of(clips, "joint", fewer))
    judged = select(
        clips, tmp_path / "judged", by=surprise, column="surprise", judged_by=seen,
        judged_column="joint",
    )  # fmt: skip
    # A clip that the judge has not seen can be chosen; the curves do without its prompt.
    assert chosen(judged) == chosen(alone) == {"ball": 1, "box": 2}
    assert (judged.prompts, alone.prompts) == (1, 2)
    assert means(judged.curves[0]) == pytest.approx([2, 4 / 3, 1])
    assert "clips without joint, not in the curves: 1, 'box' 2" in " ".join(judged.notes)
    assert "prompts with fewer than 3 clips, not in the curves: 1, 'box'" in " ".join(judged.notes)


def test_the_same_scores_are_no_judge(
    clips: Path, surprise: Path, joint: Path, tmp_path: Path
) -> None:
    copied = scored(clips, "copied", "surprise", rows_of(clips, "surprise", SURPRISE))
    for judge in (surprise, copied):
        with pytest.raises(UserError, match="the very scores that clips are chosen by"):
            select(
                clips, tmp_path / "best", by=surprise, column="surprise", judged_by=judge,
                judged_column="surprise",
            )  # fmt: skip
    assert not (tmp_path / "best").exists()
    rows = rows_of(clips, "joint", JOINT, pc=True)
    both = scored(clips, "lab", "lab", rows)
    selection = select(
        clips, tmp_path / "best", by=both, column="joint", judged_by=both, judged_column="pc"
    )
    assert any("pc is not independent of the choice" in note for note in selection.notes)


def test_ties_are_shared_in_the_curve_and_broken_by_nothing_that_a_number_says(
    clips: Path, joint: Path, tmp_path: Path
) -> None:
    selection = select(clips, tmp_path / "best", by=joint, column="joint")
    own, motion = selection.curves
    assert means(own) == pytest.approx([50.0, 100 * (1 + 2 / 3) / 2, 100.0])
    by_clip = {(clip.prompt_id, clip.k): clip for clip in selection.clips}
    tied = [by_clip["ball", 0], by_clip["ball", 2]]
    expected = (np.mean([clip.motion for clip in tied]) + by_clip["box", 2].motion) / 2
    assert motion.points[-1].mean == pytest.approx(expected)
    assert selection.tied == 1 and "In 1 of 2 prompts several" in " ".join(selection.notes)
    assert chosen(selection)["ball"] == min(tied, key=lambda clip: clip.clip).k

    # Whatever a judge says of clips that are equally good, the same one is chosen.
    for name, liked in (("first", [1.0, 2.0, 3.0]), ("last", [3.0, 2.0, 1.0])):
        values = {"ball": liked, "box": liked}
        judge = scored(clips, name, "surprise", rows_of(clips, "surprise", values))
        judged = select(
            clips, tmp_path / name, by=joint, column="joint", judged_by=judge,
            judged_column="surprise",
        )  # fmt: skip
        assert chosen(judged) == chosen(selection)
        assert means(judged.curves[1])[-1] == pytest.approx((2.0 + liked[2]) / 2)

    # The same clips under other numbers: the same are chosen, and the curves are the same.
    other = made(tmp_path / "other", {"ball": 3, "box": 3})
    for prompt in ("ball", "box"):
        for place, k in enumerate((2, 0, 1)):
            content = (clips / f"{prompt}-{k}.mp4").read_bytes()
            (other / f"{prompt}-{place}.mp4").write_bytes(content)
    moved = {prompt: [of[k] for k in (2, 0, 1)] for prompt, of in JOINT.items()}
    theirs = scored(other, "lab", "lab", rows_of(other, "joint", moved))
    again = select(other, tmp_path / "again", by=theirs, column="joint")
    assert {clip.clip for clip in again.chosen} == {clip.clip for clip in selection.chosen}
    for ours, his in zip(selection.curves, again.curves, strict=True):
        assert means(ours) == pytest.approx(means(his))


def test_what_cannot_be_chosen_is_named(tmp_path: Path) -> None:
    clips = made(tmp_path / "clips", {"ball": 4, "box": 4, "ramp": 4, "wall": 1})
    values = {
        "ball": [1.0, 2.0, 3.0, 4.0],
        "box": [float("nan"), 7.0, "absent", None],
        "ramp": [None, 10**400, "words", float("inf")],
        "wall": [1.0],
    }
    rows = rows_of(clips, "surprise", values)
    rows[6]["invalid"] = {"surprise": "the judge's features are not finite"}
    failures = [{"prompt_id": "box", "k": 2, "reason": "it cannot be read"}]
    by = scored(clips, "surprise", "surprise", rows, failures=failures)
    selection = select(clips, tmp_path / "best", by=by, column="surprise")
    assert chosen(selection) == {"ball": 0, "box": 1, "wall": 0}
    assert (selection.most, selection.prompts) == (4, 1)
    reasons = {(each.prompt_id, each.k): each.reason for each in selection.not_scored}
    assert reasons.keys() == {("box", 0), ("box", 2), ("box", 3), *(("ramp", k) for k in range(4))}
    assert reasons["box", 0] == "its surprise is nan, no finite number"
    assert reasons["box", 2] == "it cannot be read"
    assert reasons["box", 3] == "the judge's features are not finite"
    short = {each.prompt_id: each.reason for each in selection.not_in_curves}
    assert short == {"box": "1 clip", "ramp": "0 clips", "wall": "1 clip"}
    assert [each.prompt_id for each in selection.without_choice] == ["ramp"]
    assert "clips without surprise, not chosen from: 7, 'box' 0" in " ".join(selection.notes)

    # A curve may end earlier, and is then of all of a prompt's clips.
    shorter = select(clips, tmp_path / "shorter", by=by, column="surprise", most=2)
    assert means(shorter.curves[0]) == means(selection.curves[0])[:2]
    for most in (1, 5):
        with pytest.raises(UserError, match=f"--most is {most}; expected 2 to 4"):
            select(clips, tmp_path / "no", by=by, column="surprise", most=most)


def test_samples_that_are_the_same_file_are_told_of(clips: Path, tmp_path: Path) -> None:
    (clips / "ball-2.mp4").write_bytes((clips / "ball-0.mp4").read_bytes())
    by = scored(clips, "surprise", "surprise", rows_of(clips, "surprise", SURPRISE))
    selection = select(clips, tmp_path / "best", by=by, column="surprise")
    assert selection.repeated == 1
    assert "the same file as an earlier one of their prompt: 1." in " ".join(selection.notes)


def test_videos_that_cannot_be_read_and_single_frames_are_not_chosen(tmp_path: Path) -> None:
    clips = made(tmp_path / "clips", {"ball": 4})
    (clips / "ball-0.mp4").write_bytes(b"no video")
    write_video(clips / "ball-1.mp4", np.zeros((1, 32, 32, 3), np.uint8), 8)
    values = {"ball": [0.0, 1.0, 2.0, 3.0]}
    by = scored(clips, "surprise", "surprise", rows_of(clips, "surprise", values))
    selection = select(clips, tmp_path / "best", by=by, column="surprise")
    assert chosen(selection) == {"ball": 2} and selection.captions == 1
    assert [each.reason for each in selection.not_scored][1] == "it has one frame"
    assert any("of one caption" in note for note in selection.notes)


def test_clips_of_prompts_of_before_are_left_over(clips: Path, tmp_path: Path) -> None:
    about = json.loads((clips / "generation.json").read_text())
    (clips / "generation.json").write_text(json.dumps(about | {"prompts": ["ball"]}))
    rows = rows_of(clips, "surprise", {"ball": SURPRISE["ball"]})
    by = scored(clips, "surprise", "surprise", rows)
    selection = select(clips, tmp_path / "best", by=by, column="surprise")
    assert chosen(selection) == {"ball": 1} and len(selection.left_over) == 3
    assert readable_clips(tmp_path / "best").keys() == {("ball", 0)}


# What is refused.


def test_scores_of_other_clips_and_doubled_rows_are_refused(
    clips: Path, surprise: Path, tmp_path: Path
) -> None:
    def refused(says: str, column: str | None = "surprise", by: Path = surprise) -> None:
        with pytest.raises(UserError, match=says):
            select(clips, tmp_path / "best", by=by, column=column)
        assert not (tmp_path / "best").exists()

    refused("ranks clips by these columns: surprise, surprise_max. Name one", None)
    refused("does not rank clips by 'motion'; it does by: surprise, surprise_max", "motion")
    rows = rows_of(clips, "surprise", SURPRISE)
    doubled = scored(clips, "doubled", "surprise", [*rows, rows[0]])
    refused("7 rows for 6 clips", by=doubled)
    table = surprise / "scores.jsonl"
    whole = table.read_text()
    table.write_text(whole + whole.splitlines(keepends=True)[0])
    refused("is of other rows than those")
    table.write_text(whole.replace('"surprise": 3.0', '"surprise": 0.5'))
    refused("its values are not those that were written")
    table.write_text(whole)
    refused("is not a score folder", by=clips)
    nameless = [{key: value for key, value in row.items() if key != "clip"} for row in rows]
    refused("do not say of which video", by=scored(clips, "n", "surprise", nameless))
    refused("none. Name one of them", None, scored(clips, "v", "vbench_results", rows))
    old = scored(clips, "old", "surprise", rows, version="0")
    refused(f"is of version 0 of surprise, which is at version {Surprise.version}", by=old)
    single = made(tmp_path / "single", {"ball": 1, "box": 1})
    values = {"ball": [1.0], "box": [2.0]}
    one = scored(single, "s", "surprise", rows_of(single, "surprise", values))
    with pytest.raises(UserError, match="No prompt of single has two clips"):
        select(single, tmp_path / "best", by=one, column="surprise")
    with pytest.raises(UserError, match="--judged-column is a column of --judged-by"):
        select(clips, tmp_path / "best", by=surprise, column="surprise", judged_column="pc")
    twice = clips / "copy-0.mp4"
    twice.write_bytes((clips / "ball-0.mp4").read_bytes())
    write_sidecar(twice, "ball", "A ball.")
    refused("ball-0.mp4 and copy-0.mp4 are both sample 0 of 'ball'")
    twice.with_suffix(".json").unlink()
    # The content of a clip has changed, then its caption, and then it is gone.
    video = clips / "ball-0.mp4"
    content = video.read_bytes()
    video.write_bytes((clips / "box-0.mp4").read_bytes())
    refused("1 score of clips that are gone or whose video or caption has changed")
    video.write_bytes(content)
    write_sidecar(video, "ball", "Another ball.")
    refused("the first is of 'ball' 0")
    write_sidecar(video, "ball", "A ball.")
    video.unlink()
    refused("the first is of 'ball' 0")


def test_the_same_choice_is_kept_and_another_refused(
    clips: Path, surprise: Path, tmp_path: Path
) -> None:
    out = tmp_path / "best"
    first = select(clips, out, by=surprise, column="surprise")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert select(clips, out, by=surprise, column="surprise") == first
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    other = scored(
        clips, "b", "surprise", rows_of(clips, "surprise", SURPRISE | {"box": [1, 2, 3]})
    )
    with pytest.raises(UserError, match="another choice; it differs in chosen_by, clips. Choose"):
        select(clips, out, by=other, column="surprise")
    with pytest.raises(UserError, match="differs in most"):
        select(clips, out, by=surprise, column="surprise", most=2)
    with pytest.raises(UserError, match="exists already"):
        select(clips, clips, by=surprise, column="surprise")
    (out / "ball-0.mp4").write_bytes((clips / "ball-2.mp4").read_bytes())
    with pytest.raises(UserError, match="does not hold the clip that was chosen of 'ball'"):
        select(clips, out, by=surprise, column="surprise")


def test_a_choice_that_stops_halfway_leaves_no_folder(
    clips: Path, surprise: Path, tmp_path: Path, monkeypatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr(Selection, "write", fails)
    with pytest.raises(OSError, match="the disk is full"):
        select(clips, tmp_path / "best", by=surprise, column="surprise")
    assert not (tmp_path / "best").exists()


def test_the_report_draws_the_curves_and_refuses_clips_that_have_changed(
    clips: Path, surprise: Path, joint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "best"
    selection = select(
        clips, out, by=surprise, column="surprise", judged_by=joint, judged_column="joint"
    )
    page = report([], tmp_path / "page.html", generations={"best": out, "all": clips})
    text = page.read_text()
    assert text.count('<section class="selection">') == 1 and "Best of n: best" in text
    for curve in selection.curves:
        assert f'aria-label="{label(curve.label)}' in text
        for point in curve.points:
            assert f"<td>{number(point.mean, 1 if curve.percent else 3)}</td>" in text
    for note in selection.notes:
        assert str(escape(note)) in text
    assert "best/selection.json" in text
    again = report([], tmp_path / "again.html", generations={"best": out, "all": clips})
    assert again.read_text() == text
    (out / "box-0.mp4").write_bytes((clips / "box-0.mp4").read_bytes())
    with pytest.raises(UserError, match="does not hold the clip that was chosen of 'box'"):
        report([], page, generations={"best": out})


def test_generate_leaves_a_choice_alone(clips: Path, surprise: Path, tmp_path: Path) -> None:
    from videorepa.artifacts.clips import MadeWith, claim

    out = tmp_path / "best"
    select(clips, out, by=surprise, column="surprise")
    shape = {"fps": 8, "frames": 4, "height": 32, "width": 32, "steps": 1, "guidance_scale": 1.0}
    with pytest.raises(UserError, match="holds clips that `videorepa select` chose"):
        claim(out, MadeWith.model_validate({"model": "m"} | shape), [])


def test_scores_of_clips_that_they_chose_say_so(tmp_path: Path) -> None:
    chosen_lab, all_clips = tmp_path / "best", tmp_path / "clips"
    for k in range(2):
        lab_clip(all_clips, 0, k)
    evaluate("lab", all_clips)
    select(all_clips, chosen_lab, by=all_clips / "scores", column="joint")
    says = (
        "The clips of best were chosen by lab's own scores: for them these numbers are optimistic."
    )
    scores = evaluate("lab", chosen_lab)
    assert scores.summary.says == [says] and says in table({"best": scores})
    against = evaluate("lab", all_clips, against=chosen_lab)
    assert against.summary.says == [says] and "about" not in against.rows[0]
    evaluate("lab", all_clips)
    scored = {of.name: [Scores.read(of / "scores")] for of in (all_clips, chosen_lab)}
    assert scored["clips"][0].summary.says == []
    (drawn,) = draw_tables(scored, {"clips": 0, "best": 1})
    assert drawn.notes == [says] and drawn.about is None


def test_the_command_says_what_is_optimistic_and_shows_motion(
    clips: Path, surprise: Path, joint: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "best"
    words = ["select", str(clips), "--by", str(surprise), "--column", "surprise", "--out", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "surprise of surprise, chosen by\n  n=1   3.5000 [" in said
    assert "motion in levels of 255\n  n=1" in said and "against n=1" in said
    assert "this curve is optimistic" in said and "A still clip can win" in said
    assert "another score has to say: --judged-by" in said
    words[-1] = str(tmp_path / "judged")
    assert main([*words, "--judged-by", str(joint), "--judged-column", "joint"]) == 0
    said = capsys.readouterr().out
    assert "joint of lab in %, judged by\n  n=1   50.0 [" in said and "--judged-by" not in said
