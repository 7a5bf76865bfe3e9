"""Scoring folders of clips: what is counted, what is refused, and what the report reads of it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import tree
from pages import write_run
from videorepa.artifacts.scores import Scores, claim_benchmark_folder, score_folders, scored_rows
from videorepa.benchmarks.continuation import Continuations
from videorepa.benchmarks.lab import Lab
from videorepa.benchmarks.laws import checks
from videorepa.cli import main
from videorepa.data.video import write_video
from videorepa.errors import UserError
from videorepa.evaluate import evaluate
from videorepa.evaluation.pairs import Pairs, mean, share
from videorepa.evaluation.tables import table
from videorepa.report import report
from videorepa.world.render import make_clip
from videorepa.world.scenarios import SCENARIOS
from videorepa.world.simulator import FPS

VERDICT = re.compile(r"(?:tell|all pairs of|:) here (?:from|and|is above|is below) (\w+)[ .]")

SEED, N = 77, len(SCENARIOS)
FALL, ROLL = (f"{name}-{[*SCENARIOS].index(name)}" for name in ("fall", "roll"))


def write_clips(folder: Path, *, frozen: int = 0) -> Path:
    """A clip of every scenario as `generate` leaves them; the first `frozen` stand still."""
    folder.mkdir()
    (folder / "generation.json").write_text("{}")
    for number, scenario in enumerate(SCENARIOS):
        clip = make_clip(SEED, number, scenario)
        frames = clip.frames[:1].repeat(17, axis=0) if number < frozen else clip.frames
        about = {
            "prompt_id": f"{scenario}-{number}",
            "prompt": clip.caption,
            "k": 0,
            "seed": number,
            "model_digest": folder.name,
        }
        path = folder / f"{scenario}-{number}-0.json"
        write_video(path.with_suffix(".mp4"), frames, FPS)
        path.write_text(json.dumps(about))
    return folder


def test_two_folders_become_tables_that_the_report_reads(tmp_path):
    good, still = write_clips(tmp_path / "good"), write_clips(tmp_path / "still", frozen=5)
    evaluation = evaluate("lab", good, against=still)

    metrics = evaluation.summary.metrics
    assert evaluation.summary.n == N and evaluation.summary.failures == []
    # What H.264 does to the pixels is no reason to fail.
    assert metrics["sa"].percent == 100 and metrics["sa"].n == N
    assert metrics["pc"].percent >= 90
    assert 5 < metrics["motion"].mean < 200
    assert evaluation.summary.by_scenario.keys() == set(SCENARIOS)
    assert evaluation.summary.by_scenario["fall"]["sa"].n == 1
    assert evaluation.comparison is not None
    assert evaluation.comparison.against == "still" and evaluation.comparison.unpaired == 0
    # Five of the other folder's clips do not move, and none of those shows its event.
    difference = evaluation.comparison.metrics["sa"].difference
    assert difference == pytest.approx(100 * 5 / N)

    scores = Scores.read(evaluation.folder)
    assert scores.summary.metrics.keys() == {"sa", "pc", "joint", "motion"}
    assert scores.summary.metrics["motion"].mean == pytest.approx(metrics["motion"].mean)
    assert len(scores.rows) == N and scores.by_clip[FALL, 0]["scenario"] == "fall"
    assert (
        scores.comparison is not None and scores.comparison.metrics["sa"].difference == difference
    )

    text = table({"good": evaluation}).splitlines()
    assert text[0].startswith("good") and f"n={N}" in text[0] and "against still" in text[1]


def test_a_clip_that_cannot_be_read_is_named_and_not_scored(tmp_path):
    folder = write_clips(tmp_path / "clips")
    (folder / f"{ROLL}-0.mp4").write_bytes(b"not a video")
    evaluation = evaluate("lab", folder)
    assert evaluation.summary.n == N - 1 and evaluation.summary.metrics["sa"].percent == 100
    (failure,) = evaluation.summary.failures
    assert failure.prompt_id == ROLL and f"{ROLL}-0.mp4" in failure.reason
    assert "1 clip could not be scored" in table({"clips": evaluation})
    scores = Scores.read(evaluation.folder)
    assert (ROLL, 0) in scores.failures and (ROLL, 0) not in scores.by_clip


def test_a_second_run_keeps_the_rows_and_scores_what_is_new(tmp_path, monkeypatch):
    from videorepa.benchmarks import lab

    scored = []
    score = lab.Lab.score
    monkeypatch.setattr(
        lab.Lab, "score", lambda *arguments: (scored.append(arguments[2]), score(*arguments))[1]
    )
    folder = write_clips(tmp_path / "clips")
    first = evaluate("lab", folder)
    rows = first.folder / "scores.jsonl"
    complete = rows.read_text()
    assert len(scored) == N

    # A process that was killed while it wrote the last row, and left a sidecar half written.
    rows.write_text(complete[:-40])
    (folder / ".tmp-0123.json").write_text("{")
    again = evaluate("lab", folder)
    assert len(scored) == N + 1
    assert rows.read_text() == complete and again.summary == first.summary

    # The same video of another model, under another name, has the same score.
    sidecar = folder / f"{FALL}-0.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"model_digest": "other"}))
    for path in (sidecar, sidecar.with_suffix(".mp4")):
        path.rename(path.with_stem("another-0"))
    sidecar = folder / "another-0.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"prompt_id": "another"}))
    found = evaluate("lab", folder)
    assert found.summary.n == N and len(scored) == N + 1
    (row,) = (row for row in found.rows if row["prompt_id"] == "another")
    assert (row["model_digest"], row["scenario"]) == ("other", "fall")


def test_a_replaced_video_or_a_changed_caption_is_scored_again(tmp_path, capsys):
    """A list of clips, of which one is replaced by a black one and one gets another's caption."""
    clips = [make_clip(SEED, number, "fall") for number in range(3)]
    for number, clip in enumerate(clips):
        write_video(tmp_path / f"{number}.mp4", clip.frames, FPS)

    def write_list(*captions: str) -> Path:
        path = tmp_path / "list.csv"
        lines = [f'{number}.mp4,"{caption}"' for number, caption in enumerate(captions)]
        path.write_text("\n".join(["video,caption", *lines]))
        return path

    captions = [clip.caption for clip in clips]
    assert evaluate("lab", write_list(*captions)).summary.metrics["sa"].percent == 100
    write_video(tmp_path / "0.mp4", np.zeros_like(clips[0].frames), FPS)
    captions[1] = make_clip(SEED, 0, "roll").caption
    found = evaluate("lab", write_list(*captions))
    assert [row["sa"] for row in found.rows] == [False, False, True]
    assert found.rows[1]["scenario"] == "roll"
    said = capsys.readouterr().err.replace("\n", "")
    assert "2 clips scored again, the first is '0.mp4' 0: the video, its caption" in said
    evaluate("lab", write_list(*captions))
    assert "scored again" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", [Lab, Continuations])
def test_the_tolerances_are_part_of_a_version(kind, monkeypatch):
    number, _, _ = kind.version.partition("-")
    assert kind.version == checks.with_tolerances(number)
    wider = checks.packaged_tolerances() | {"gravity": 1.0}
    monkeypatch.setattr(checks, "packaged_tolerances", lambda: wider)
    assert checks.with_tolerances(number) != kind.version


def test_scores_made_with_other_tolerances_are_made_anew(tmp_path, capsys, monkeypatch):
    clip = make_clip(SEED, 0, "fall")
    write_video(tmp_path / "0.mp4", clip.frames, FPS)
    (path := tmp_path / "list.csv").write_text(f'video,caption\n0.mp4,"{clip.caption}"')
    assert evaluate("lab", path).summary.metrics["pc"].percent == 100
    none = dict.fromkeys(checks.packaged_tolerances(), -1.0)
    monkeypatch.setattr(checks, "packaged_tolerances", lambda: none)
    monkeypatch.setattr(Lab, "version", checks.with_tolerances("2"))
    assert evaluate("lab", path).summary.metrics["pc"].percent == 0
    assert "1 clip scored again" in capsys.readouterr().err


def test_scores_of_videos_read_otherwise_are_made_anew(tmp_path, capsys, monkeypatch):
    clip = make_clip(SEED, 0, "fall")
    write_video(tmp_path / "0.mp4", clip.frames, FPS)
    (path := tmp_path / "list.csv").write_text(f'video,caption\n0.mp4,"{clip.caption}"')
    evaluate("lab", path)
    evaluate("lab", path)
    assert "scored again" not in capsys.readouterr().err
    monkeypatch.setattr(sys.modules["videorepa.evaluate"], "READER", 1)
    evaluate("lab", path)
    assert "1 clip scored again" in capsys.readouterr().err


def test_a_second_benchmark_leaves_the_firsts_scores(tmp_path):
    """Also those of the folder that is compared against, which has no --out."""
    folders = [write_clips(tmp_path / name) for name in ("ours", "theirs")]
    kept = {}
    for folder in folders:
        first = evaluate("lab", folder)
        rows = [row | {"benchmark": "videophy 1"} for row in first.rows]
        Scores(first.folder, first.summary, rows).write()
        kept[folder] = tree(first.folder)
    found = evaluate("lab", folders[0], against=folders[1])
    assert found.folder == folders[0] / "scores-lab" and found.comparison is not None
    for folder in folders:
        assert tree(folder / "scores") == kept[folder]
        assert len(scored_rows(folder / "scores-lab")) == N
    assert score_folders(folders[0]) == [folders[0] / "scores", found.folder]


def test_benchmarks_that_start_together_share_no_folder(tmp_path):
    """Before either has scored a clip, and whichever ends first."""
    folders = [claim_benchmark_folder(tmp_path / "clips", name) for name in ("a", "b", "a", "b")]
    assert [folder.name for folder in folders] == ["scores", "scores-b"] * 2
    assert not list((tmp_path / "clips" / "scores").glob("*.lock"))


def test_clips_of_the_other_side_that_fail_are_told_of(tmp_path, capsys):
    folder, other = write_clips(tmp_path / "clips"), write_clips(tmp_path / "other")
    for name in (FALL, ROLL):
        (other / f"{name}-0.mp4").write_bytes(b"cut off")
    assert main(["evaluate", "lab", str(folder), "--against", str(other)]) == 1
    printed = capsys.readouterr()
    told = "out of the comparison: 2 clips of the two without a partner, 2 clips of other could"
    assert told in printed.out and f"other: {FALL} 0" in printed.err
    kept = Scores.read(folder / "scores").comparison
    assert kept is not None and [failure.prompt_id for failure in kept.failures] == [FALL, ROLL]
    for video in other.glob("*.mp4"):
        video.write_bytes(b"cut off")
    shutil.rmtree(folder / "scores")
    with pytest.raises(UserError, match=f"None of the {N} clips in .*other can be scored"):
        evaluate("lab", folder, against=other)
    assert Scores.read(folder / "scores").summary.n == N, "this side's are kept"


def test_scores_are_written_once_and_kept_where_they_cannot_be_compared(tmp_path, monkeypatch):
    written = []
    write = Scores.write
    monkeypatch.setattr(Scores, "write", lambda scores: (written.append(scores), write(scores))[0])
    ours, theirs = (write_clips(tmp_path / name) for name in ("ours", "theirs"))
    evaluate("lab", ours, against=theirs)
    assert len(written) == 1 and written[0].comparison is not None
    for sidecar in theirs.glob("*.json"):
        sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"k": 9}))
    with pytest.raises(
        UserError, match="no clip in both .* of .*ours are kept in .*ours/scores, w"
    ):
        evaluate("lab", ours, tmp_path / "ours" / "scores", against=theirs)
    assert len(written) == 2 and Scores.read(ours / "scores").summary.n == N


def test_an_interval_does_not_depend_on_the_order_of_clips() -> None:
    draw = np.random.default_rng(0)
    rows = [
        {"prompt_id": f"{n}", "k": 0, "caption": f"{n % 20}", "x": x, "flag": x > 0}
        for n, x in enumerate(draw.normal(size=40))
    ]
    others = [row | {"x": row["x"] + 1} for row in rows]
    for of in (rows, [rows[n] for n in draw.permutation(40)]):
        assert mean(of, "x") == mean(rows, "x") and share(of, "flag") == share(rows, "flag")
        compared = Pairs.of(of, others).compare((), ("x",))
        assert compared == Pairs.of(rows, others).compare((), ("x",))


def test_a_comparison_goes_with_the_rows_that_it_is_of(tmp_path, capsys):
    folder, still = write_clips(tmp_path / "clips"), write_clips(tmp_path / "still", frozen=3)
    evaluate("lab", still)
    compared = evaluate("lab", folder, against=still)
    evaluate("lab", folder)
    kept = Scores.read(compared.folder).comparison
    assert kept is not None and kept.metrics == compared.comparison.metrics

    def page() -> Path:
        names = {"ours": folder, "still": still}
        scores = {name: [path / "scores"] for name, path in names.items()}
        run = write_run(tmp_path / "run", 0.5, steps=5) if not (tmp_path / "run").exists() else None
        return report([run or tmp_path / "run"], tmp_path / "page.html", scores=scores)

    assert page().exists()
    (still / f"{ROLL}-0.mp4").write_bytes((still / f"{FALL}-0.mp4").read_bytes())
    evaluate("lab", still)
    with pytest.raises(
        UserError, match=r"comparison with scores that .*still/scores no longer has"
    ):
        page()
    (folder / f"{FALL}-0.mp4").write_bytes((still / f"{FALL}-0.mp4").read_bytes())
    found = evaluate("lab", folder)
    assert not (found.folder / "comparison.json").exists()
    assert "of other scores and is removed" in capsys.readouterr().err.replace("\n", "")
    # A process that was killed between two files leaves a summary of other rows.
    summary = found.folder / "summary.json"
    before = summary.read_text()
    (folder / f"{FALL}-0.mp4").unlink()
    evaluate("lab", folder)
    summary.write_text(before)
    with pytest.raises(UserError, match=r"summary\.json is of other rows"):
        Scores.read(found.folder)


def test_a_comparison_knows_the_other_model_by_its_folder(tmp_path):
    """Where the two folders have one name, and where the page calls them otherwise."""
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    ours, theirs = (write_clips(tmp_path / name / "clips") for name in ("x", "y"))
    (theirs / f"{ROLL}-0.mp4").write_bytes((theirs / f"{FALL}-0.mp4").read_bytes())
    found = evaluate("lab", ours, against=theirs)
    assert found.comparison.against == "clips"

    run = write_run(tmp_path / "run", 0.5, steps=5)

    def page(**folders: Path) -> str:
        scores = {name: score_folders(path) for name, path in folders.items()}
        return report([run], tmp_path / "page.html", scores=scores).read_text()

    assert "clips (../../../y/clips/scores)" in page(clips=ours)
    evaluate("lab", theirs)
    assert VERDICT.search(page(here=ours, there=theirs))[1] == "there"
    (theirs / f"{FALL}-0.mp4").write_bytes((ours / f"{ROLL}-0.mp4").read_bytes())
    evaluate("lab", theirs)
    for names in ({"clips": ours}, {"here": ours, "there": theirs}):
        with pytest.raises(UserError, match=r"scores that .*y/clips/scores no longer has"):
            page(**names)
    shutil.move(theirs, tmp_path / "elsewhere")
    assert VERDICT.search(page(here=ours))[1] == "clips", "what is not there has not changed"
    path = found.folder / "comparison.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"against_path": None}))
    with pytest.raises(UserError, match="earlier version, which does not tell where the scores of"):
        page(here=ours)


def test_scores_of_what_the_clips_are_no_more_are_not_reported(tmp_path):
    folder = write_clips(tmp_path / "clips")
    for sidecar in folder.glob("*-0.json"):
        about = {"model": "m", "fps": FPS, "frames": 17, "height": 64, "width": 64}
        about |= {"steps": 1, "guidance_scale": 1.0, **json.loads(sidecar.read_text())}
        sidecar.write_text(json.dumps(about))
    scores = {"m": [evaluate("lab", folder).folder]}

    def page() -> Path:
        return report([], tmp_path / "page.html", generations={"m": folder}, scores=scores)

    assert page().exists()
    sidecar = folder / f"{ROLL}-0.json"
    text = sidecar.read_text()
    sidecar.write_text(json.dumps(json.loads(text) | {"caption": "A red ball rolls."}))
    with pytest.raises(UserError, match=f"1 score of clips that are gone.*'{ROLL}' 0"):
        page()
    sidecar.write_text(text)
    (folder / f"{ROLL}-0.mp4").write_bytes((folder / f"{FALL}-0.mp4").read_bytes())
    with pytest.raises(UserError, match=f"1 score of clips that are gone.*'{ROLL}' 0"):
        page()
    (folder / f"{ROLL}-0.mp4").unlink()
    with pytest.raises(UserError, match=f"1 score of clips that are gone.*'{ROLL}' 0"):
        page()


def test_clips_of_prompts_that_are_gone_are_told_of_and_not_counted(tmp_path):
    folder = write_clips(tmp_path / "clips")
    kept = [path.stem.removesuffix("-0") for path in folder.glob("*-0.json")]
    kept.remove(ROLL)
    (folder / "generation.json").write_text(json.dumps({"prompts": kept, "samples": 1}))
    found = evaluate("lab", folder)
    assert found.summary.n == N - 1 and (ROLL, 0) not in found.by_clip
    assert [clip["prompt_id"] for clip in found.summary.left_over] == [ROLL]
    assert "1 clip left over and not counted" in table({"clips": found})
    assert Scores.read(found.folder).summary.left_over == found.summary.left_over


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"prompts": [1]}', '{"prompts": 3}', "[" * 10**5]
)
def test_a_broken_list_of_what_was_generated_is_named(tmp_path, text):
    (tmp_path / "generation.json").write_text(text)
    with pytest.raises(UserError, match=r"generation\.json is damaged"):
        evaluate("lab", tmp_path)


def test_a_damaged_row_is_scored_again_and_not_reported(tmp_path):
    """A flag that was turned round is JSON as before."""
    folder = write_clips(tmp_path / "clips")
    found = evaluate("lab", folder)
    table = found.folder / "scores.jsonl"
    whole = table.read_text()
    table.write_text(whole.replace('"sa": true', '"sa": false', 1))
    with pytest.raises(UserError, match=r"scores\.jsonl has a damaged row: its values are not"):
        Scores.read(found.folder)
    assert evaluate("lab", folder).summary == found.summary
    assert table.read_text() == whole
    assert [*Scores.read(found.folder).rows] == found.rows


@pytest.mark.parametrize(
    "text", ["{", "[]", "[" * 10**5, '{"prompt_id": "a", "prompt": "b"}', "\xff"]
)
def test_a_broken_sidecar_is_named(tmp_path, text):
    (tmp_path / "broken.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"broken\.json"):
        evaluate("lab", tmp_path)


def test_a_folder_without_clips_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no generated clips"):
        evaluate("lab", tmp_path)
