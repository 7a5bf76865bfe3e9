"""The report: what it says, what it refuses, and that a browser shows it without the network."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from pages import (
    HOSTILE,
    MODELS,
    Material,
    Tags,
    ball,
    write_generation,
    write_run,
    write_scores,
)
from videorepa.artifacts.clips import filmed_path, image_path
from videorepa.artifacts.run import Run
from videorepa.data.video import write_video
from videorepa.errors import UserError
from videorepa.evaluation.statistics import holm
from videorepa.report import report

NETWORK = re.compile(r"""(?:src|href|action|data|poster)\s*=\s*["']?\s*(?:https?:)?//""", re.I)


def test_each_alignment_term_gets_its_own_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 0.5)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for row in lines:
        for key in ("align", "similarity", "grad_align", "grad_denoise"):
            value = row.pop(key)
            row |= {f"{key}.relation": value, f"{key}.cosine": 2 * value}
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    page = report([run], tmp_path / "page.html").read_text()
    for title in ("Alignment loss: relation", "Alignment loss: cosine", "tapped block: cosine"):
        assert title in page
    assert "Alignment loss<" not in page


def test_drift_is_drawn_with_its_band_and_said(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 0.5) for name in ("gentle", "pushed")]
    for run, last in zip(runs, (1.1, 1.9), strict=True):
        with open(run / "recipe.yaml", "a") as recipe:
            recipe.write("validation: {every: 40, drift: 0.25}\n")
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for index, ratio in ((39, 1.0), (79, (1 + last) / 2), (119, last)):
            low, high = {"drift_motion_low": ratio - 0.1}, {"drift_motion_high": ratio + 0.1}
            rows[index] |= {"drift_motion": ratio, **low, **high}
        (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(runs, tmp_path / "page.html").read_text()
    plot = page.partition("Drift: motion")[2].partition("</figure>")[0]
    assert "pushed is outside from step 80." in plot and "gentle is outside" not in plot
    assert plot.count("stroke-dasharray: 1,") == 2, "both edges of the band"
    assert "Drift: contrast" not in page


def make_material(folder: Path) -> Material:
    prompts = {
        "roll-000": "A red ball rolls along the floor to the right.",
        "roll-001": HOSTILE,
        "roll-002": HOSTILE * 200,
    }
    runs = [write_run(folder / "runs/control", 0.0), write_run(folder / "runs/aligned", 0.5)]
    for run in runs:
        with (run / "recipe.yaml").open("a") as recipe:
            recipe.write("validation: {prompts: [A ball falls.]}\n")
    for step in (40, 80, 120):
        clip = Run(runs[1]).sample_path(step, 0)
        clip.parent.mkdir(parents=True)
        write_video(clip, ball(step, 0), 8)
    generations, scores = {}, {}
    for index, name in enumerate(MODELS):
        generations[name] = write_generation(folder / "clips" / name, 60 * index, prompts)
        against = "control" if name == "aligned" else None
        scores[name] = [write_scores(folder / "scores" / name, prompts, 61.0 + index, against)]
    return Material(runs, generations, scores)


@pytest.fixture
def material(tmp_path: Path) -> Material:
    return make_material(tmp_path)


@dataclass
class Page:
    material: Material
    path: Path
    html: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A page of everything, to be looked at alone."""
    folder = tmp_path_factory.mktemp("whole")
    material, path = make_material(folder), folder / "new/report.html"
    return Page(material, path, material.write(path, title="<b>title</b>", command="redo a b"))


def test_the_whole_page(whole: Page):
    html, tags = whole.html, Tags(whole.html)
    assert len(tags.clips()) == 3 * len(MODELS) + 3
    sources = [clip["data-src"] or "" for clip in tags.clips()]
    assert all(source.startswith("data:video/mp4;base64,") for source in sources)
    assert len(tags.named("svg")) == 6 + 3 + 2 + 1
    for text in ("61.0 %", "47.0 to 73.5", "n = 48", "12.34", "+4.2", "0.300", "&lt; 0.001"):
        assert text in html
    assert "includes zero: these clips cannot tell aligned from control" in html
    assert "excludes zero: aligned is above control" in html
    assert "no &lt;ball&gt; was found" in html
    assert "fails permanence" in html and "fails gravity" not in html
    assert "A ball falls." in html, "the prompt of the training's own clips"
    assert "align.weight" in html and "abc1234" in html and "redo a b" in html
    assert [path.name for path in whole.path.parent.iterdir()] == ["report.html"]


def test_captions_stay_text(whole: Page):
    html = whole.html
    assert len(Tags(html).named("script")) == 1
    assert "<script>alert" not in html and "<b>title" not in html
    assert "🏀" in html
    long = HOSTILE * 200
    assert f"all {len(long)} characters" in html and html.count("alert(1)") > 200


def test_run_names_stay_text(tmp_path: Path):
    name = 'a<i>&"$x$ 🏀'
    html = report([write_run(tmp_path / name, 0.0)], tmp_path / "report.html").read_text("utf-8")
    assert "<i>" not in html and "a&lt;i&gt;&amp;" in html


def test_nothing_outside_is_referenced(whole: Page):
    html = whole.html
    assert not NETWORK.search(html)
    assert "http://" not in html and "https://" not in html
    assert "url(" not in html.replace("url(#", "")
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_every_number_is_in_a_file_that_the_page_names(whole: Page):
    html, material = whole.html, whole.material
    links = [link["href"] or "" for link in Tags(html).named("a")]
    named = [whole.path.parent / unquote(link) for link in links if not link.startswith("#")]
    assert all(path.exists() for path in named)
    files = {path.resolve() for path in named}
    for run in material.runs:
        assert {run / "log.jsonl", run / "recipe.yaml", run / "environment.json"} <= files
    assert set(material.generations.values()) <= files
    for name, (folder,) in material.scores.items():
        assert {folder / "summary.json", folder / "scores.jsonl"} <= files
        assert (folder / "comparison.json" in files) == (name == "aligned")
    table = html.partition("<tbody>")[2].partition("</tbody>")[0]
    shown = {float(text) for text in re.findall(r">\s*([\d.]+)(?: %)?</strong>", table)}
    assert shown == {
        round(metric.get("percent", metric.get("mean")), 2)
        for (folder,) in material.scores.values()
        for metric in json.loads((folder / "summary.json").read_text())["metrics"].values()
    }


def test_categories_have_bars_and_numbers(whole: Page):
    html = whole.html
    numbers = html.partition("The numbers by category")[2].partition("</table>")[0]
    for index in range(len(MODELS)):
        assert f"{62.25 + index:.1f} %" in numbers and f"{59.75 + index:.1f} %" in numbers
    bars = html.partition("By category")[2].partition("</svg>")[0]
    assert bars.count('<g id="table-0-category-0-patch_') >= 2 * len(MODELS)


def test_p_is_adjusted_for_all_tests_of_its_table(material: Material, tmp_path: Path):
    material.runs.clear()
    (control,) = material.scores["control"]
    metrics = {"joint": {"difference": 1.0, "low": -1.0, "high": 3.0, "p": 0.02}}
    (control / "comparison.json").write_text(json.dumps({"against": "base", "metrics": metrics}))
    html = material.write(tmp_path / "report.html")
    assert "for 3 tests in this table" in html
    table = html.partition('class="verdicts"')[2].partition("</table>")[0]
    for p, adjusted in zip((0.02, 0.3, 0.0004), holm([0.02, 0.3, 0.0004]), strict=True):
        cells = ["&lt; 0.001" if x < 0.001 else f"{x:.3f}" for x in (p, adjusted)]
        assert f"<td>{cells[0]}</td><td>{cells[1]}</td>" in table


def test_differences_are_drawn_by_category_where_there_are_enough(
    material: Material, tmp_path: Path
):
    material.runs.clear()
    path = material.scores["aligned"][0] / "comparison.json"
    content = json.loads(path.read_text())
    ps = [0.002, 0.02, 1.0]
    sa = {"difference": 20.0, "low": 8.0, "high": 33.0, "n": 12, "prompts": 12}
    pc = {"difference": -12.5, "low": -30.5, "high": -1.25, "n": 24, "prompts": 12}
    alike = {"difference": 0.0, "low": 0.0, "high": 0.0, "n": 6}
    few = {"difference": 77.5, "low": 50.0, "high": 100.0, "n": 10, "prompts": 5, "p": 0.0001}
    found = [of | {"p": p} for of, p in zip((sa, pc, alike), ps, strict=True)]
    content["by_scenario"] = {
        "fall": {"sa": found[0], "pc": found[1]},
        "roll": {"sa": found[2]},
        "stack": {"sa": few},
    }
    path.write_text(json.dumps(content))
    html = material.write(tmp_path / "report.html")
    part = html.partition("Paired differences by category")[2].partition("</section>")[0]
    assert part.count("<svg") == 2 and "difference in SA (points) by category" in part
    drawn = part.partition('aria-label="difference in SA')[2].partition("</svg>")[0]
    assert ">fall<" in drawn and ">roll<" in drawn and ">stack<" not in drawn
    # Two bars with their ends, and one interval: what all pairs agree on has none.
    assert drawn.count("fill: var(--series-3)") == 2
    assert drawn.count("stroke: var(--series-3)") == 2 + 1
    assert "fewer than 6 prompts: stack (5)" in part and "77.5" not in html
    assert "for 3 tests in this table" in part
    rows = re.findall(r"<tr>.*?</tr>", part.partition("<tbody>")[2], re.S)
    for row, of, p in zip(rows, found, holm(ps), strict=True):
        sign = f"{of['difference']:+.1f}".replace("-", "−")
        assert f"<strong>{sign}</strong>" in row and f"<td>{p:.3f}</td>" in row
        assert f"<td>{of['n']}</td>" in row
    assert "+8.0 to +33.0" in rows[0] and "−30.5 to −1.2" in rows[1] and "<td>–</td>" in rows[2]
    assert "SA, fall: aligned is above control, p = 0.006 by Holm" in part
    assert "PC, fall: aligned is below control, p = 0.040 by Holm" in part
    assert part.count("by Holm's method") == 2


def test_every_benchmark_has_its_table(material: Material, tmp_path: Path):
    material.runs.clear()
    other = tmp_path / "other"
    for name, folders in material.scores.items():
        ids = {"roll-000": ""}
        folders.append(write_scores(other / name, ids, 80.0, benchmark="videophy"))
    html = material.write(tmp_path / "report.html")
    assert "Scores: lab" in html and "Scores: videophy" in html
    assert "videophy PC fail" in html and "lab PC fail" in html
    assert html.count("joint: both at once") == 2
    for _, folder in material.scores.values():
        summary = json.loads((folder / "summary.json").read_text())
        summary["metrics"] = {"static_position_error": {"mean": 0.5}}
        (folder / "summary.json").write_text(json.dumps(summary))
    html = material.write(tmp_path / "report.html")
    assert html.count("joint: both at once") == 1 and "0.50" in html
    assert html.count("static: of a copy of the first frame") == 1
    material.scores["base"].append(material.scores["base"][0])
    with pytest.raises(UserError, match="two score folders of lab"):
        material.write(tmp_path / "report.html")


def test_scores_that_were_asked_otherwise_have_a_table_of_their_own(
    material: Material, tmp_path: Path
):
    def asked(model: str, **settings: object) -> None:
        path = material.scores[model][0] / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"asked": settings}))

    def tables() -> list[str]:
        html = material.write(tmp_path / "report.html")
        return re.findall(r"Benchmark (lab, version 1.*?)\. ", html)

    material.runs.clear()
    assert tables() == ["lab, version 1"]
    for model in material.scores:
        asked(model, judge={"weights": "aa", "dtype": "float32"}, compat=True)
    assert tables() == ["lab, version 1"]
    asked("base", judge={"weights": "bb", "dtype": "float32"}, compat=True)
    assert sorted(tables()) == [f"lab, version 1, judge weights: {of}" for of in ("aa", "bb")]
    path = material.scores["base"][0] / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"asked": None}))
    assert "lab, version 1, settings: not recorded" in tables()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"notes": ["Of <few> clips."]}))
    html = material.write(tmp_path / "report.html")
    assert html.count("Of &lt;few&gt; clips.") == 1 and html.count("joint: both at once") == 2


def test_the_same_input_gives_the_same_page(whole: Page):
    again = whole.path.with_name("again.html")
    assert whole.material.write(again, title="<b>title</b>", command="redo a b") == whole.html
    again.unlink()


def test_a_run_alone(tmp_path: Path):
    run = write_run(tmp_path / "alone", 0.5, steps=1)
    (run / "environment.json").unlink()
    html = report([run], tmp_path / "report.html").read_text("utf-8")
    tags = Tags(html)
    assert len(tags.named("svg")) == 6
    assert not tags.named("video") and not tags.named("script")


def test_generations_alone_are_limited(tmp_path: Path):
    prompts = {f"p-{index:02d}": f"prompt number {index}" for index in range(7)}
    clips = write_generation(tmp_path / "clips", 0, prompts, samples=2)
    html = report([], tmp_path / "report.html", generations={"base": clips}, prompts=3).read_text()
    shown = re.findall(r"prompt number (\d)", html)
    assert shown == ["0", "0", "3", "3", "6", "6"]
    assert "4 prompts of 7 left out" in html


def test_a_missing_clip_leaves_its_place_empty(material: Material, tmp_path: Path):
    material.runs.clear()
    (material.generations["control"] / "roll-001-0.mp4").unlink()
    assert ">no clip</div>" in material.write(tmp_path / "report.html")


@pytest.fixture
def continued(tmp_path: Path) -> Material:
    """Two models' clips that continue an image, of which the first has what happened beside it."""
    generations = {}
    for index, name in enumerate(("base", "aligned")):
        folder = write_generation(tmp_path / name, 60 * index, {"roll-000": "A ball rolls."})
        (sidecar,) = folder.glob("*.json")
        sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"image": "a" * 16}))
        image_path(folder, "a" * 16).parent.mkdir()
        Image.fromarray(ball(0, 0)[0]).save(image_path(folder, "a" * 16))
        generations[name] = folder
    film = filmed_path(generations["base"], "roll-000")
    film.parent.mkdir()
    write_video(film, ball(200, 0), 8)
    return Material([], generations, {})


@pytest.mark.parametrize("embedded", [True, False])
def test_the_given_frame_and_what_happened_stand_before_the_clips(
    continued: Material, tmp_path: Path, monkeypatch, browser, embedded: bool
):
    if not embedded:
        monkeypatch.setattr(sys.modules["videorepa.report.media"], "EMBEDDED_BYTES", 0)
    out = tmp_path / "page" / "report.html"
    tags = Tags(continued.write(out))
    assert len(tags.clips()) == 3 and tags.clips()[0]["data-label"] == "what happened"
    beside = [path.suffix for path in out.parent.glob("*-files/*")]
    assert sorted(beside) == ([] if embedded else [".mp4"] * 3 + [".png"])
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("console", lambda line: complaints.append(line.text))
    page.goto(out.as_uri())
    captions = page.locator("#clips figcaption .name").all_inner_texts()
    assert captions == ["given frame", "what happened", "base", "aligned"]
    page.wait_for_function("document.querySelector('.still').naturalWidth === 64")
    page.wait_for_function("document.querySelectorAll('.row video').length === 3")
    # Blind rating and filters count models alone.
    assert page.evaluate("figures.get(rows[0]).length") == 2
    page.close()
    assert complaints == []


def test_a_clip_from_text_alone_says_so_beside_a_given_frame(continued: Material, tmp_path: Path):
    said = "not shown the given frame"
    assert said not in continued.write(tmp_path / "report.html")
    (sidecar,) = continued.generations["aligned"].glob("*.json")
    values = json.loads(sidecar.read_text())
    del values["image"]
    sidecar.write_text(json.dumps(values))
    assert continued.write(tmp_path / "report.html").count(said) == 1


def test_a_cut_off_last_line_is_left_out(tmp_path: Path):
    run = write_run(tmp_path / "run", 0.5, steps=10)
    with open(run / "log.jsonl", "ab") as log:
        log.write('{"step": 11, "name": "ü'.encode()[:-1])
    assert "10 steps" in report([run], tmp_path / "report.html").read_text("utf-8")


def test_steps_done_twice_count_once(tmp_path: Path):
    run = write_run(tmp_path / "run", 0.5, steps=10)
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 9, "denoise": 0.1}\n{"step": 10, "denoise": NaN}\n')
    assert "10 steps" in report([run], tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda run: (run / "log.jsonl").unlink(), "without log.jsonl"),
        (lambda run: (run / "log.jsonl").write_text(""), "no complete step"),
        (lambda run: (run / "log.jsonl").write_text('{"step": 1}\n{"st\n{"step": 2}\n'), "line 2"),
        (lambda run: (run / "log.jsonl").write_text('{"loss": 1}\n'), "step"),
        (lambda run: (run / "log.jsonl").write_text('{"step": 1, "align": "x"}\n'), "align"),
        (lambda run: (run / "recipe.yaml").unlink(), "not a run: it has no recipe.yaml"),
        (lambda run: (run / "recipe.yaml").write_text("a: [1"), "cannot be read as YAML"),
        (lambda run: shutil.rmtree(run), "does not exist"),
    ],
)
def test_a_damaged_run_is_refused(tmp_path: Path, damage, says: str):
    run = write_run(tmp_path / "run", 0.5, steps=3)
    damage(run)
    with pytest.raises(UserError, match=says):
        report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_what_else_is_refused(material: Material, tmp_path: Path):
    out = tmp_path / "report.html"
    with pytest.raises(UserError, match="nothing to report"):
        report([], out, scores=material.scores)
    with pytest.raises(UserError, match="is a folder"):
        report(material.runs, tmp_path)
    with pytest.raises(UserError, match="named twice"):
        report([material.runs[0]] * 2, out)
    with pytest.raises(UserError, match="does not exist"):
        report([], out, generations={"base": tmp_path / "none"})
    with pytest.raises(UserError, match="not a score folder"):
        report(material.runs, out, scores={"base": [tmp_path]})
    summary = material.scores["base"][0] / "summary.json"
    summary.write_text('{"benchmark": "lab"}')
    with pytest.raises(UserError, match="summary.json: version"):
        material.write(out)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(whole: Page, browser, scheme: str):
    complaints: list[str] = []
    requests: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    page.on("console", lambda line: complaints.append(line.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(whole.path.as_uri())
    curves = page.locator("#curves svg")
    assert curves.count() == 6
    assert all((curves.nth(place).bounding_box() or {})["height"] > 100 for place in range(6))
    table = page.locator("#scores table").first.inner_text()
    for name, (folder,) in whole.material.scores.items():
        assert name in table
        for metric in json.loads((folder / "summary.json").read_text())["metrics"].values():
            if "percent" in metric:
                assert f"{metric['percent']:.1f} %" in table
                assert f"{metric['low']:.1f} to {metric['high']:.1f}" in table
    assert page.evaluate(CONTRAST) == []
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()
    assert complaints == []
    assert {url.partition(":")[0] for url in requests} <= {"file", "data"}


CONTRAST = """
() => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((part) => {
      const value = part / 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const faint = [];
  for (const element of document.querySelectorAll('main *:not(svg *)')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility()) continue;
    const both = [getComputedStyle(element).color, paper(element)].map(luminance);
    const ratio = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    if (ratio < 4.5) faint.push(`${element.outerHTML.slice(0, 80)}: ${ratio.toFixed(2)}`);
  }
  return faint;
}
"""
"""Elements whose text has less contrast than WCAG 2's level AA asks for, 4.5 to 1."""
