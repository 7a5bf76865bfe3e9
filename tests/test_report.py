"""The report: what it says, what it refuses, and that a browser shows it without the network."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from videorepa.data.video import write_video
from videorepa.errors import UserError
from videorepa.report import report

FRAMES, SIZE, FPS = 17, 64, 8
STEPS = 120
MODELS = ("base", "control", "aligned")
HOSTILE = "</details><script>alert(1)</script>\n\"quoted\" & 'single' 🏀 "
NETWORK = re.compile(r"""(?:src|href|action|data|poster)\s*=\s*["']?\s*(?:https?:)?//""", re.I)


@dataclass
class Material:
    """Everything a report can be made from."""

    runs: list[Path]
    generations: dict[str, Path]
    scores: dict[str, Path]

    def write(self, out: Path, **more) -> str:
        report(self.runs, out, generations=self.generations, scores=self.scores, **more)
        return out.read_text("utf-8")


def _ball(shade: int, shift: int) -> np.ndarray:
    frames = np.full((FRAMES, SIZE, SIZE, 3), 230, np.uint8)
    frames[:, 54:] = (115, 102, 92)
    for time in range(FRAMES):
        left = 4 + (3 * time + shift) % 48
        frames[time, 42:54, left : left + 12] = (220, shade, 40)
    return frames


def test_each_alignment_term_gets_its_own_curves(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 0.5)
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
    runs = [_run(tmp_path / name, 0.5) for name in ("gentle", "pushed")]
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


def _run(folder: Path, weight: float, steps: int = STEPS) -> Path:
    folder.mkdir(parents=True)
    recipe = f"align:\n  weight: {weight}\n  margin: 0.1\ntrain:\n  seed: 0\n"
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "commit": "abc1234"}))
    rng = np.random.default_rng(round(1000 * weight))
    with open(folder / "log.jsonl", "w") as log:
        for step in range(1, steps + 1):
            fade, noise = np.exp(-3 * step / steps), rng.normal(0, 0.02)
            row = {
                "step": step,
                "loss": 0.4,
                "denoise": 0.15 + 0.1 * fade + noise,
                "align": 0.5 - 0.4 * weight * (1 - fade) + noise,
                "similarity": 0.3 + 0.8 * weight * (1 - fade) + noise,
                "grad_norm": 0.5 + fade + abs(noise),
                "grad_denoise": 0.02 + 0.02 * fade + abs(noise),
                "lr": 1e-4,
                "clips_per_second": 6.5 + 10 * noise,
                "memory_gb": 1.2,
            }
            if weight:
                row["grad_align"] = 0.01 + abs(noise)
            log.write(json.dumps(row) + "\n")
    return folder


def _generation(folder: Path, shade: int, prompts: Mapping[str, str], samples: int = 1) -> Path:
    folder.mkdir(parents=True)
    for number, (prompt_id, prompt) in enumerate(prompts.items()):
        for k in range(samples):
            name = f"{prompt_id}-{k}"
            write_video(folder / f"{name}.mp4", _ball(shade, 5 * number), FPS)
            sidecar = {
                "prompt_id": prompt_id,
                "prompt": prompt,
                "k": k,
                "seed": 1000 + k,
                "fps": FPS,
                "frames": FRAMES,
                "height": SIZE,
                "width": SIZE,
                "steps": 20,
                "guidance_scale": 3.0,
                "model": folder.name,
            }
            (folder / f"{name}.json").write_text(json.dumps(sidecar))
    return folder


def _scores(folder: Path, prompts: Mapping[str, str], sa: float, against: str | None) -> Path:
    folder.mkdir(parents=True)
    with open(folder / "scores.jsonl", "w") as table:
        for number, prompt_id in enumerate(prompts):
            row = {
                "prompt_id": prompt_id,
                "k": 0,
                "scenario": "roll",
                "sa": 1,
                "pc": number % 2,
                "joint": number % 2,
                "motion": 3.0,
                "gravity": True,
                "checks": {"permanence": bool(number % 2)},
            }
            table.write(json.dumps(row) + "\n")
    metrics = {
        "sa": {"percent": sa, "n": 48, "low": sa - 14.0, "high": sa + 12.5},
        "pc": {"percent": sa - 20, "n": 48, "low": sa - 33.1, "high": sa - 6.2},
        "joint": {"percent": sa - 24, "n": 48, "low": sa - 37.0, "high": sa - 11.0},
        "motion": {"mean": 12.34},
    }
    failures = [{"prompt_id": "gone", "k": 0, "reason": "no <ball> was found"}]
    summary = {"benchmark": "lab", "version": "1", "metrics": metrics, "failures": failures}
    (folder / "summary.json").write_text(json.dumps(summary))
    if against:
        differences = {
            "sa": {"difference": 4.2, "low": -3.0, "high": 11.0, "p": 0.3},
            "pc": {"difference": 9.1, "low": 2.5, "high": 15.5, "p": 0.0004},
        }
        comparison = {"against": against, "metrics": differences}
        (folder / "comparison.json").write_text(json.dumps(comparison))
    return folder


@pytest.fixture
def material(tmp_path: Path) -> Material:
    prompts = {
        "roll-000": "A red ball rolls along the floor to the right.",
        "roll-001": HOSTILE,
        "roll-002": HOSTILE * 200,
    }
    runs = [_run(tmp_path / "runs/control", 0.0), _run(tmp_path / "runs/aligned", 0.5)]
    for step in (40, 80, 120):
        folder = runs[1] / f"samples/step-{step:06d}"
        folder.mkdir(parents=True)
        write_video(folder / "first.mp4", _ball(step, 0), FPS)
    generations, scores = {}, {}
    for index, name in enumerate(MODELS):
        generations[name] = _generation(tmp_path / "clips" / name, 60 * index, prompts)
        against = "control" if name == "aligned" else None
        scores[name] = _scores(tmp_path / "scores" / name, prompts, 61.0 + index, against)
    return Material(runs, generations, scores)


class _Tags(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag == name]


def test_the_whole_page(material: Material, tmp_path: Path):
    html = material.write(tmp_path / "new/report.html", command="videorepa report a b")
    tags = _Tags(html)
    assert len(tags.named("video")) == 3 * len(MODELS) + 3
    assert all((v["src"] or "").startswith("data:video/mp4;base64,") for v in tags.named("video"))
    assert len(tags.named("svg")) == 6 + 3 + 2
    for text in ("61.0 %", "47.0 to 73.5", "n = 48", "12.34", "+4.2", "0.300", "&lt; 0.001"):
        assert text in html
    assert "includes zero: these clips cannot tell aligned from control" in html
    assert "excludes zero: aligned is above control" in html
    assert "no &lt;ball&gt; was found" in html
    assert "failing checks: checks.permanence" in html
    assert "align.weight" in html and "abc1234" in html and "videorepa report a b" in html
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_captions_stay_text(material: Material, tmp_path: Path):
    html = material.write(tmp_path / "report.html", title="<b>title</b>")
    assert len(_Tags(html).named("script")) == 1
    assert "<script>alert" not in html and "<b>title" not in html
    assert "🏀" in html
    long = HOSTILE * 200
    assert f"all {len(long)} characters" in html and html.count("alert(1)") > 200


def test_run_names_stay_text(tmp_path: Path):
    name = 'a<i>&"$x$ 🏀'
    html = report([_run(tmp_path / name, 0.0)], tmp_path / "report.html").read_text("utf-8")
    assert "<i>" not in html and "a&lt;i&gt;&amp;" in html


def test_nothing_outside_is_referenced(material: Material, tmp_path: Path):
    html = material.write(tmp_path / "report.html")
    assert not NETWORK.search(html)
    assert "http://" not in html and "https://" not in html
    assert "url(" not in html.replace("url(#", "")
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_the_same_input_gives_the_same_page(material: Material, tmp_path: Path):
    assert material.write(tmp_path / "a.html") == material.write(tmp_path / "b.html")


def test_a_run_alone(tmp_path: Path):
    run = _run(tmp_path / "alone", 0.5, steps=1)
    (run / "environment.json").unlink()
    html = report([run], tmp_path / "report.html").read_text("utf-8")
    tags = _Tags(html)
    assert len(tags.named("svg")) == 6
    assert not tags.named("video") and not tags.named("script")


def test_generations_alone_are_limited(tmp_path: Path):
    prompts = {f"p-{index:02d}": f"prompt number {index}" for index in range(7)}
    clips = _generation(tmp_path / "clips", 0, prompts, samples=2)
    html = report([], tmp_path / "report.html", generations={"base": clips}, prompts=3).read_text()
    shown = re.findall(r"prompt number (\d)", html)
    assert shown == ["0", "3", "6"]
    assert "4 prompts of 7 left out" in html and "1 further sample per prompt" in html


def test_a_missing_clip_leaves_its_place_empty(material: Material, tmp_path: Path):
    (material.generations["control"] / "roll-001-0.mp4").unlink()
    assert ">no clip</div>" in material.write(tmp_path / "report.html")


def test_a_cut_off_last_line_is_left_out(tmp_path: Path):
    run = _run(tmp_path / "run", 0.5, steps=10)
    with open(run / "log.jsonl", "ab") as log:
        log.write('{"step": 11, "name": "ü'.encode()[:-1])
    assert "10 steps" in report([run], tmp_path / "report.html").read_text("utf-8")


def test_steps_done_twice_count_once(tmp_path: Path):
    run = _run(tmp_path / "run", 0.5, steps=10)
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
        (lambda run: (run / "recipe.yaml").unlink(), "not a run folder"),
        (lambda run: (run / "recipe.yaml").write_text("a: [1"), "not YAML"),
        (lambda run: shutil.rmtree(run), "does not exist"),
    ],
)
def test_a_damaged_run_is_refused(tmp_path: Path, damage, says: str):
    run = _run(tmp_path / "run", 0.5, steps=3)
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
        report(material.runs, out, scores={"base": tmp_path})
    summary = material.scores["base"] / "summary.json"
    summary.write_text(summary.read_text().replace('"version": "1"', '"version": "2"'))
    with pytest.raises(UserError, match="different benchmarks"):
        material.write(out)
    summary.write_text('{"benchmark": "lab"}')
    with pytest.raises(UserError, match="summary.json: version"):
        material.write(out)


def test_a_browser_shows_it(material: Material, tmp_path: Path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    out = tmp_path / "report.html"
    material.write(out)
    complaints: list[str] = []
    requests: list[str] = []
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda line: complaints.append(line.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(out.as_uri())
        count = page.locator("video").count()
        assert count == 3 * len(MODELS) + 3
        ready = "[...document.querySelectorAll('video')].every(v => v.readyState >= 2)"
        page.wait_for_function(ready)
        page.evaluate(
            "document.querySelectorAll('video').forEach(v => v.dataset.seen = v.currentTime)"
        )
        page.wait_for_function(
            "[...document.querySelectorAll('video')].every(v => v.currentTime != v.dataset.seen)"
        )

        page.get_by_role("button", name="Restart all").click()
        page.get_by_role("button", name="+ 1 frame").click()
        assert page.evaluate("[...document.querySelectorAll('video')].every(v => v.paused)")
        times = "[...document.querySelectorAll('video')].map(v => v.currentTime)"
        before = page.evaluate(times)
        page.get_by_role("button", name="+ 1 frame").click()
        assert page.evaluate(times) == pytest.approx([time + 1 / FPS for time in before])
        page.get_by_role("button", name="− 1 frame").click()
        assert page.evaluate(times) == pytest.approx(before)
        page.get_by_role("button", name="Play all").click()
        assert not page.evaluate("[...document.querySelectorAll('video')].some(v => v.paused)")

        curves = page.locator("#curves svg")
        assert curves.count() == 6
        assert all((curves.nth(place).bounding_box() or {})["height"] > 100 for place in range(6))
        table = page.locator("#scores table").inner_text()
        for name, folder in material.scores.items():
            assert name in table
            for metric in json.loads((folder / "summary.json").read_text())["metrics"].values():
                if "percent" in metric:
                    assert f"{metric['percent']:.1f} %" in table
                    assert f"{metric['low']:.1f} to {metric['high']:.1f}" in table
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        browser.close()
    assert complaints == []
    assert {url.partition(":")[0] for url in requests} <= {"file", "data"}
