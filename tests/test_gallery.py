"""The page's clips: where they are kept, how they play in step and are found, and blind ratings."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from scipy import stats

from pages import FPS, FRAMES, Material, Tags, write_generation, write_scores, write_sidecar
from videorepa.artifacts.clips import clip_digest, readable_clips
from videorepa.artifacts.scores import Scores, Summary
from videorepa.benchmarks._vbench import dimension_metric
from videorepa.cli import main
from videorepa.data.video import read_all
from videorepa.errors import UserError
from videorepa.evaluation.pairs import share
from videorepa.evaluation.ratings import FORMAT, rated
from videorepa.evaluation.statistics import wilson
from videorepa.evaluation.tables import table
from videorepa.report import media, report
from videorepa.report.gallery import clip_gallery
from videorepa.report.media import Media

PROMPTS = {
    "fall-0": "A red ball drops to the floor.",
    "fall-1": "A green ball drops & bounces <twice>.",
    "roll-0": "A blue ball rolls to the right.",
    "roll-1": "A gray ball rolls to the left.",
}
PASSING = {"control": "fall-0 roll-0", "aligned": "fall-0 fall-1"}


def make_material(folder: Path) -> Material:
    made = Material()
    for shade, (name, passing) in enumerate(PASSING.items()):
        made.generations[name] = write_generation(folder / name, 120 * shade, PROMPTS)
        made.scores[name] = [write_scores(folder / name / "scores", PROMPTS, 60.0, passing=passing)]
    return made


@pytest.fixture
def material(tmp_path: Path) -> Material:
    return make_material(tmp_path / "clips")


# Where the clips are kept.


def test_large_pages_keep_their_clips_beside_them(material: Material, tmp_path: Path, monkeypatch):
    page = tmp_path / "page.html"
    material.scores.clear()
    assert "and needs no other" in material.write(page) and not (tmp_path / "page-files").exists()

    monkeypatch.setattr(media, "EMBEDDED_BYTES", 0)
    html = material.write(page)
    assert "page-files, and each is loaded" in html and "data:video" not in html
    names = {f"page-files/{path.name}" for path in (tmp_path / "page-files").iterdir()}
    assert {clip["data-src"] for clip in Tags(html).clips()} == names and len(names) == 8
    # The name is of the content and tells nothing of the model.
    clip = material.generations["control"] / "fall-0-0.mp4"
    kept = tmp_path / "page-files" / f"{clip_digest(clip)}.mp4"
    assert kept.samefile(clip)

    # Another page of this name takes its own clips along and leaves others' files alone.
    (tmp_path / "page-files/notes.mp4").write_text("mine")
    shutil.rmtree(material.generations.pop("control"))
    material.write(page)
    assert not kept.exists() and clip_digest(tmp_path / "page-files/notes.mp4")
    assert len(list((tmp_path / "page-files").iterdir())) == 4 + 1
    monkeypatch.undo()
    material.write(page)
    assert [path.name for path in (tmp_path / "page-files").iterdir()] == ["notes.mp4"]


def test_clips_are_copied_where_links_are_impossible(
    material: Material, tmp_path: Path, monkeypatch
):
    def refuse(*_):
        raise OSError("another file system")

    monkeypatch.setattr(media, "EMBEDDED_BYTES", 0)
    monkeypatch.setattr(os, "link", refuse)
    material.scores.clear()
    material.write(tmp_path / "page.html")
    files = list((tmp_path / "page-files").iterdir())
    assert len(files) == 8 and all(clip_digest(path) == path.stem for path in files)


# In the browser.


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Material, Path]:
    folder = tmp_path_factory.mktemp("shown")
    material = make_material(folder)
    material.write(folder / "page.html")
    return material, folder / "page.html"


TIMES = "[...document.querySelectorAll('.row video')].map((video) => video.currentTime)"
READY = "[...document.querySelectorAll('.row .clip')].every((c) => c.firstChild?.readyState >= 2)"


def wait(page, condition: str) -> None:
    """Playwright's own waiting evaluates text within the page, which the page's policy forbids."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"after 30 seconds this is still not so: {condition}")


def prompts_in_sight(page) -> list[str]:
    rows = page.locator("#clips .row").all()
    return [row.get_attribute("data-prompt") for row in rows if row.is_visible()]


def test_clips_play_in_step_and_are_found(shown, browser):
    _, path = shown
    page = browser.new_page(viewport={"width": 1280, "height": 2400})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    wait(page, READY)
    wait(page, f"Math.min(...{TIMES}) > 0.2")
    in_step = f"(times => Math.max(...times) - Math.min(...times) < 1 / {FPS})({TIMES})"
    wait(page, in_step)
    # One that stumbles catches up.
    first = "document.querySelector('.row video')"
    assert not page.evaluate(f"({first}.currentTime = ({first}.currentTime + 1) % 2, {in_step})")
    wait(page, in_step)

    page.keyboard.press(" ")
    assert page.get_by_role("button", name="Play").is_visible()
    said = page.locator(".player output")
    page.keyboard.press("r")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert said.inner_text().startswith(f"frame 3 of {FRAMES},")
    wait(page, f"{TIMES}.every((time) => Math.abs(time - 2.5 / {FPS}) < 0.001)")
    page.get_by_role("button", name="one frame back").click()
    wait(page, f"{TIMES}.every((time) => Math.abs(time - 1.5 / {FPS}) < 0.001)")
    page.locator("[name=time]").fill("1.9")
    wait(page, f"{TIMES}.every((time) => Math.abs(time - 1.9) < 0.001)")
    # Beyond the last frame comes the first.
    page.locator("[name=time]").fill(str((FRAMES - 0.5) / FPS))
    page.locator("h1").click()
    page.locator("[name=time]").blur()
    page.keyboard.press("ArrowRight")
    assert said.inner_text().startswith("frame 1 of")

    assert prompts_in_sight(page) == list(PROMPTS)
    page.keyboard.press("/")
    page.keyboard.type("BALL twice")
    assert prompts_in_sight(page) == ["fall-1"]
    page.get_by_role("button", name="Show all").click()
    wait(page, "document.querySelectorAll('#clips .row[hidden]').length === 0")
    page.locator("[name=category]").select_option("roll")
    assert prompts_in_sight(page) == ["roll-0", "roll-1"]
    page.locator(".of-model").nth(0).select_option("passes")
    assert prompts_in_sight(page) == ["roll-0"]
    assert page.locator("[name=count]").inner_text() == "1 of 4 shown"
    page.get_by_role("button", name="Show all").click()
    page.locator("[name=differ]").check()
    assert prompts_in_sight(page) == ["fall-1", "roll-0"]
    page.locator(".of-model").nth(1).select_option("fails")
    assert prompts_in_sight(page) == ["roll-0"]
    page.get_by_role("button", name="Show all").click()
    page.locator("[name=check]").select_option("permanence")
    assert prompts_in_sight(page) == ["fall-1", "roll-0", "roll-1"]
    page.close()
    assert errors == []


def test_a_number_of_a_clip_is_no_verdict_and_has_the_tables_unit(tmp_path: Path):
    """Also where it is 0 or 1, as those of a clip in which nothing moves."""
    keys = ("temporal_flickering", "subject_consistency", "aesthetic_quality")
    row = {"prompt_id": "a", "k": 0, "caption": "A ball.", "scenario": None, "joint": True}
    row |= {**dict(zip(keys, (1.0, 0.9612, 0.0), strict=True)), "score": 100.0}
    metrics = {key: dimension_metric([row], key, key) for key in keys}
    metrics |= {"score": {"percent": 100.0}, "joint": share([row], "joint")}
    summary = Summary.model_validate(
        {"benchmark": "vbench", "version": "1", "n": 1, "metrics": metrics}
    )
    clips = readable_clips(write_generation(tmp_path / "clips", 60, {"a": "A ball."}))
    scored = {"still": [Scores(tmp_path, summary, [row])]}
    gallery = clip_gallery({"still": clips}, scored, {"still": 0}, None)
    (cell,) = gallery.rows[0].cells
    assert [(badge.text, badge.kind) for badge in cell.badges] == [
        ("joint pass", "pass"),
        ("temporal flickering 100.0", "plain"),
        ("subject consistency 96.1", "plain"),
        ("aesthetic quality 0.0", "plain"),
        ("score 100.0", "plain"),
    ]
    assert gallery.verdicts == ["joint"]


def test_who_wants_less_motion_starts_at_rest(shown, browser):
    page = browser.new_page(reduced_motion="reduce", viewport={"width": 390, "height": 2400})
    page.goto(shown[1].as_uri())
    wait(page, "[...document.querySelectorAll('video')].some((v) => v.duration)")
    assert page.get_by_role("button", name="Play").is_visible()
    assert page.evaluate("[...document.querySelectorAll('video')].every((video) => video.paused)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_a_blind_rating_ends_in_a_file_that_evaluate_reads(shown, browser, tmp_path, capsys):
    material, path = shown
    control, aligned = material.generations.values()
    page = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page.goto(path.as_uri())

    def begin() -> None:
        page.keyboard.press("b")
        page.locator("[name=rater]").fill("Ada D.")
        page.get_by_role("button", name="Begin").click()

    begin()
    dialog = page.locator("#rating")
    known = {clip_digest(clip): clip for clip in [*control.glob("*.mp4"), *aligned.glob("*.mp4")]}
    lefts, asked = [], []
    for number in range(len(PROMPTS)):
        assert dialog.locator(".progress").inner_text() == f"{number + 1} of {len(PROMPTS)}"
        asked.append(dialog.locator(".pair .prompt").inner_text())
        places = dialog.locator(".pair .clip").evaluate_all(
            "places => places.map((place) => document.querySelector("
            "`.row [data-src='${place.dataset.src}']`).dataset.clip)"
        )
        lefts.append(known[places[0]].parent.name)
        # Two for aligned, one for control, one for neither.
        wanted = {0: "aligned", 1: "control", 2: "aligned", 3: ""}[number]
        sides = [known[place].parent.name for place in places]
        page.keyboard.press(str(1 + sides.index(wanted)) if wanted else "0")
    assert set(asked) == set(PROMPTS.values()) and asked != list(PROMPTS.values())
    assert set(lefts) == {"control", "aligned"}
    visible = dialog.inner_text()
    assert "That was the last pair" in visible and "Answers: 4, not saved: 4." in visible
    with page.expect_download() as download:
        page.get_by_role("button", name="Save to a file").click()
    assert download.value.suggested_filename == "ratings-Ada-D-.json"
    saved = tmp_path / "ratings.json"
    download.value.save_as(saved)
    assert "control" not in saved.read_text() and "aligned" not in saved.read_text()

    # The same rater is asked in the same way again; what is in a saved file is not asked again.
    page.reload()
    begin()
    assert dialog.locator(".pair .prompt").inner_text() == asked[0]
    page.keyboard.press("0")
    page.keyboard.press("Backspace")
    assert dialog.locator(".progress").inner_text().startswith("1 of")
    page.reload()
    page.keyboard.press("b")
    page.locator("[name=file]").set_input_files(saved)
    page.get_by_text("Answers of Ada D.: 4.").wait_for()
    page.get_by_role("button", name="Begin").click()
    assert "No pair is left to ask about" in dialog.inner_text()
    page.close()

    command = ["evaluate", "rated", str(aligned), "--against", str(control)]
    assert main([*command, "--ratings", str(saved), "--out", str(tmp_path / "rated")]) == 0
    assert "pc preferred  66.7" in capsys.readouterr().out
    scores = Scores.read(tmp_path / "rated")
    assert scores.comparison and scores.comparison.metrics["pc preferred"].difference == 25.0
    html = report(
        [],
        tmp_path / "rated.html",
        generations=material.generations,
        scores={"aligned": [tmp_path / "rated"]},
    ).read_text()
    assert "PC preferred" in html and "66.7 %" in html and "4 ratings by 1 rater" in html


def test_a_page_of_300_prompts_and_4_models_opens_quickly(tmp_path: Path, browser):
    clip = write_generation(tmp_path / "one", 60, {"p": "p"}) / "p-0.mp4"
    content = clip.read_bytes()
    models = {}
    for model in ("a", "b", "c", "d"):
        models[model] = tmp_path / model
        models[model].mkdir()
        for number in range(300):
            copy = models[model] / f"p-{number:03d}-0.mp4"
            # An empty box makes every file another one, and larger, as real clips are.
            box = f"{model}{number:3d}".encode() * 500
            copy.write_bytes(content + struct.pack(">I4s", 8 + len(box), b"free") + box)
            write_sidecar(copy, f"p-{number:03d}", f"prompt {number}: " + "a ball falls, " * 20)
    page_file = report([], tmp_path / "page.html", generations=models)
    assert page_file.stat().st_size < 1e6
    assert len(list((tmp_path / "page-files").glob("*.mp4"))) == 1200

    page = browser.new_page(viewport={"width": 1280, "height": 900})
    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(page_file.as_uri())
    wait(page, "document.querySelector('video')?.readyState >= 2")
    assert 4 <= page.locator("video").count() <= 24 and len(fetched) <= 25
    page.locator("#clips .row").nth(200).scroll_into_view_if_needed()
    in_sight = (
        "document.querySelectorAll('#clips .row')[200].querySelector('video')?.readyState >= 2"
    )
    wait(page, in_sight)
    assert page.locator("video").count() <= 32 and len(fetched) <= 80
    assert page.locator("#clips .row").first.locator("video").count() == 0
    page.close()


@pytest.mark.slow
def test_the_twelve_real_clips_stand_side_by_side(real_clips: Path, tmp_path: Path, browser):
    models = {}
    for line in (real_clips / "clips.csv").read_text().splitlines()[1:]:
        name, caption = line.split(",")[:2]
        _, model, number = Path(name).stem.split("_")
        folder = models.setdefault(model, tmp_path / model)
        folder.mkdir(exist_ok=True)
        clip = folder / f"ts-{number}-0.mp4"
        shutil.copyfile(real_clips / name, clip)
        frames, fps = read_all(clip)
        n, height, width, _ = frames.shape
        shape = {"fps": fps, "frames": n, "height": height, "width": width}
        write_sidecar(clip, f"ts-{number}", caption, **shape)
    page_file = report([], tmp_path / "page.html", generations=models)
    assert len(list((tmp_path / "page-files").glob("*.mp4"))) == 12
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(page_file.as_uri())
    page.get_by_role("button", name="Pause").click()
    page.keyboard.press("j")
    rows = page.locator("#clips .row")
    assert rows.count() == 4 and rows.first.locator(".clip").count() == 3
    videos = "[...document.querySelectorAll('.row')[0].querySelectorAll('video')]"
    wait(page, f"{videos}.filter((video) => video.readyState >= 2).length === 3")
    sizes = page.evaluate(f"{videos}.map((video) => [video.videoWidth, video.videoHeight])")
    assert sizes == [[720, 480]] * 3
    assert "Leather glove" in rows.first.inner_text()
    page.close()


# Ratings.


def answer(folders: dict[str, Path], prompt_id: str, left: str, right: str, preferred: str, **more):
    digests = {
        side: clip_digest(folders[name] / f"{prompt_id}-0.mp4")
        for side, name in (("left", left), ("right", right))
    }
    about = {"prompt_id": prompt_id, "k": 0, "question": "pc", "preferred": preferred}
    return about | digests | {"seconds": 2.5} | more


def save(path: Path, rater: str, *answers: dict) -> Path:
    path.write_text(json.dumps({"format": FORMAT, "rater": rater, "ratings": answers}))
    return path


def test_a_prompt_counts_once_for_the_side_that_most_prefer(material: Material, tmp_path: Path):
    folders = material.generations
    a, b = "aligned", "control"
    ada = save(
        tmp_path / "ada.json",
        "Ada",
        answer(folders, "fall-0", a, b, "left"),
        answer(folders, "fall-1", b, a, "right"),
        answer(folders, "roll-0", a, b, "right"),
        answer(folders, "roll-1", b, a, "same"),
        answer(folders, "roll-1", b, a, "left", question="sa"),
    )
    bob = save(
        tmp_path / "bob.json",
        "Bob",
        answer(folders, "fall-0", b, a, "right"),
        answer(folders, "fall-1", b, a, "same"),
        answer(folders, "roll-0", a, b, "left"),
        answer(folders, "fall-0", a, b, "left") | {"left": "0" * 16, "prompt_id": "other"},
    )
    found = rated(folders[a], folders[b], [ada, bob])
    # fall-0: 2 to 0; fall-1: 1 to 0; roll-0: 1 to 1; roll-1: even.
    metric, test = found.summary.metrics["pc preferred"], found.comparison.metrics
    low, high = wilson(2, 2)
    interval = {"low": 100 * low, "high": 100 * high}
    assert metric.model_dump(exclude_unset=True) == {"percent": 100.0, "n": 2, "even": 2} | interval
    assert test["pc preferred"].difference == 50.0 and test["pc preferred"].n == 4
    assert test["pc preferred"].p == stats.binomtest(2, 2).pvalue == 0.5
    assert test["pc preferred"].low >= 0.0 and test["pc preferred"].high <= 100.0
    assert found.summary.metrics["sa preferred"].percent == 0.0
    assert found.comparison.unpaired == 1 and found.comparison.against == b
    rows = [json.loads(line) for line in (found.folder / "scores.jsonl").read_text().splitlines()]
    assert found.folder == folders[a] / "rated" and len(rows) == 8
    assert [row["preferred"] for row in rows] == [True, True, False, None, False, True, None, True]
    assert rows[0]["rater"] == "Ada" and rows[0]["file"] == "ada.json"
    assert "pc preferred 100.0" in table({"aligned": found})
    # The page may call the two otherwise; it knows them by their folders.
    called = {"mine": folders[a], "other": folders[b]}
    page = report([], tmp_path / "page.html", generations=called, scores={"mine": [found.folder]})
    assert "all pairs of mine and other differ equally" in page.read_text()
    even = save(tmp_path / "even.json", "Eve", answer(folders, "roll-0", a, b, "same"))
    nothing = rated(folders[a], folders[b], [even], tmp_path / "even")
    assert nothing.summary.metrics["pc preferred"].percent is None
    assert "pc preferred none" in table({"aligned": nothing})
    # From the other side it is the same.
    other = rated(folders[b], folders[a], [ada, bob], tmp_path / "other")
    assert other.summary.metrics["pc preferred"].percent == 0.0
    assert other.comparison.metrics["pc preferred"].difference == -50.0
    # The ratings of two ids are of one prompt if their captions are one.
    for folder in (folders[a], folders[b]):
        for name in ("fall-0-0", "fall-1-0"):
            sidecar = folder / f"{name}.json"
            told = json.loads(sidecar.read_text()) | {"caption": "A ball falls."}
            sidecar.write_text(json.dumps(told))
    fewer = rated(folders[a], folders[b], [ada, bob], tmp_path / "fewer")
    assert fewer.summary.metrics["pc preferred"].n == 1
    assert fewer.comparison.metrics["pc preferred"].n == 3


def test_what_is_no_rating_of_these_clips_is_refused(material: Material, tmp_path: Path, capsys):
    folders = material.generations
    a, b = folders["aligned"], folders["control"]
    good = answer(folders, "fall-0", "aligned", "control", "left")
    ada = save(tmp_path / "ada.json", "Ada", good)
    with pytest.raises(UserError, match="'Ada' has rated prompt 'fall-0', sample 0, twice"):
        rated(a, b, [ada, save(tmp_path / "again.json", "Ada", good)])
    with pytest.raises(UserError, match="None of the 1 ratings are of clips in"):
        rated(a, a, [ada])
    with pytest.raises(UserError, match="There is no"):
        rated(a, b, [tmp_path / "none.json"])
    (tmp_path / "other.json").write_text('{"ratings": []}')
    with pytest.raises(UserError, match=r"other.json is not a file of ratings \(format"):
        rated(a, b, [tmp_path / "other.json"])
    bad = save(tmp_path / "bad.json", "Ada", good | {"preferred": "both"})
    with pytest.raises(UserError, match=r"ratings.0.preferred"):
        rated(a, b, [bad])
    assert not (a / "rated").exists()
    for arguments in (["rated", a, "--against", b], ["rated", a, "--ratings", ada]):
        assert main(["evaluate", *map(str, arguments)]) == 1
        assert "Blind ratings need all three" in capsys.readouterr().err
    assert main(["evaluate", "lab", str(a), "--ratings", str(ada)]) == 1


@pytest.mark.parametrize("name", ["clip.mkv", "clip.txt", "clip", "clip.MP4"])
def test_a_clip_is_shown_whatever_it_is_called(tmp_path: Path, name: str, monkeypatch) -> None:
    clip, image = tmp_path / name, tmp_path / "first.png"
    clip.write_bytes(b"clip")
    image.write_bytes(b"image")
    page = tmp_path / "page.html"
    shown = Media(page, [clip, image])
    assert shown.source(clip) == "data:video/mp4;base64,Y2xpcA=="
    assert shown.source(image).startswith("data:image/png;")
    monkeypatch.setattr(media, "EMBEDDED_BYTES", 0)
    shown = Media(page, [clip, image])
    shown.write()
    assert shown.source(clip).endswith(".mp4") and shown.source(image).endswith(".png")
    assert (tmp_path / shown.source(clip)).read_bytes() == b"clip"
    # Another page of the name does not show it, and takes it away.
    other = Media(page, [image])
    other.write()
    other.sweep()
    assert [path.suffix for path in (tmp_path / "page-files").iterdir()] == [".png"]
