"""Normal curves: a run among its like is inside, one that is not is outside, others are refused."""

from __future__ import annotations

import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from videorepa.artifacts.run import Run
from videorepa.cli import main
from videorepa.compare import Reference, compare, make_reference
from videorepa.errors import UserError
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.train import train

STEPS = 40


def write_run(
    folder: Path, recipe: Recipe, seed: int, steps: int = STEPS, shift: float = 0.0
) -> Path:
    """A run as `train` leaves it, with curves that are drawn by chance around a falling line."""
    folder.mkdir(parents=True)
    recipe.override(f"seed={seed}", f"name=run-{seed}", f"optim.steps={STEPS}").to_yaml(
        folder / "recipe.yaml"
    )
    (folder / "environment.json").write_text('{"torch": "2.13.0"}')
    rng = np.random.default_rng(seed)
    rows = [
        {
            "step": step,
            "denoise": 1.2 - step / STEPS + rng.normal(0, 0.02) + shift,
            "align": 0.5 + rng.normal(0, 0.02),
            "similarity": rng.normal(0, 0.1),
            "lr": 1e-4,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(recipe: Recipe, tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / f"seed-{seed}", recipe, seed) for seed in range(4)]


@pytest.fixture
def reference(runs: list[Path], tmp_path: Path) -> Path:
    make_reference(runs, tmp_path / "normal.json")
    return tmp_path / "normal.json"


def test_the_band_is_the_prediction_interval_of_one_more_run(
    runs: list[Path], reference: Path
) -> None:
    found = Reference.read(reference)
    assert found.seeds == [0, 1, 2, 3] and set(found.bands) == {"denoise", "align", "similarity"}
    logs = [[json.loads(line) for line in (run / "log.jsonl").open()] for run in runs]

    def expected(quantity: str, rows: slice) -> tuple[float, ...]:
        values = [np.mean([row[quantity] for row in log[rows]]) for log in logs]
        values = np.log(values) if quantity == "denoise" else np.array(values)
        scale = np.std(values, ddof=1) * np.sqrt(5 / 4)
        bounds = (np.mean(values), *stats.t.interval(0.99, 3, np.mean(values), scale))
        return tuple(np.exp(bounds) if quantity == "denoise" else bounds)

    for quantity in ("denoise", "similarity"):
        band = found.bands[quantity]
        assert band.steps == list(range(2, STEPS + 1, 2))
        # The first is over what there is so far, the last over a tenth of the steps.
        for point, rows in ((0, slice(0, 2)), (-1, slice(-4, None))):
            given = (band.mean[point], band.low[point], band.high[point])
            assert given == pytest.approx(expected(quantity, rows), rel=1e-3, abs=1e-4)


def test_points_of_new_runs_are_inside_as_often_as_promised(
    recipe: Recipe, reference: Path, tmp_path: Path
) -> None:
    shares = []
    for seed in range(100, 120):
        found = compare(write_run(tmp_path / f"new-{seed}", recipe, seed), reference)
        shares += [verdict.inside for verdict in found.verdicts]
    assert 0.97 < np.mean(shares) <= 1


def test_a_run_that_is_elsewhere_is_outside(
    recipe: Recipe, reference: Path, tmp_path: Path, capsys
) -> None:
    run = write_run(tmp_path / "high", recipe, 9, shift=0.3)
    found = compare(run, reference)
    normal = {v.quantity: v.is_normal for v in found.verdicts}
    assert normal == {"denoise": False, "align": True, "similarity": True}
    assert found.verdicts[0].outside[0] == 2 and not found.is_normal
    assert main(["compare", str(run), "--reference", str(reference)]) == 1
    out, err = capsys.readouterr()
    assert "outside" in out and "is not like 4 runs of normal" in err
    assert "denoise first at step 2" in err and "align" not in err
    assert main(["compare", str(tmp_path / "seed-1"), "--reference", str(reference)]) == 0
    assert "is like 4 runs of normal, up to step 40" in capsys.readouterr().out


def test_a_run_on_its_way_is_compared_as_far_as_it_is(
    recipe: Recipe, reference: Path, tmp_path: Path
) -> None:
    short = write_run(tmp_path / "short", recipe, 9, steps=11)
    found = compare(short, reference)
    assert found.is_normal and found.step == 11
    assert {verdict.points for verdict in found.verdicts} == {5}
    begun = write_run(tmp_path / "begun", recipe, 9, steps=1)
    with pytest.raises(UserError, match="logged 1 steps; normal begins at step 2"):
        compare(begun, reference)


def test_a_quantity_that_was_not_logged_is_outside(
    recipe: Recipe, reference: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", recipe, 9)
    log = run / "log.jsonl"
    log.write_text(log.read_text().replace('"align"', '"other"'))
    verdicts = {verdict.quantity: verdict for verdict in compare(run, reference).verdicts}
    assert verdicts["denoise"].is_normal and verdicts["align"].inside == 0


def test_logs_of_killed_runs_are_read_and_damaged_ones_refused(
    recipe: Recipe, reference: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", recipe, 9)
    log = run / "log.jsonl"
    whole = log.read_text()
    expected = compare(run, reference).verdicts
    log.write_text(whole + whole.splitlines()[-1] + '\n{"step": 41, "den')
    assert compare(run, reference).verdicts == expected
    log.write_text(whole.replace('"step": 7', '"step: 7'))
    with pytest.raises(UserError, match="line 7 of 40 is not JSON"):
        compare(run, reference)
    log.unlink()
    with pytest.raises(UserError, match=r"without log\.jsonl"):
        compare(run, reference)


def test_without_a_reference_for_the_recipe_those_there_are_are_named(
    runs: list[Path], reference: Path, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"micro-aligned: differs in .*optim\.steps") as error:
        compare(runs[0])
    assert "micro-control" in str(error.value) and "--make" in str(error.value)
    other = write_run(tmp_path / "other", recipe.override("optim.learning_rate=0.5"), 9)
    found = compare(other, reference)
    assert found.differing == ["optim.learning_rate"]
    assert "differs in optim.learning_rate" in found.sentence


@pytest.mark.parametrize(
    ("text", "says"), [("", "is not a reference"), ('{"seeds": [1]}', "is not a reference")]
)
def test_a_damaged_reference_is_refused(
    runs: list[Path], tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        compare(runs[0], path)
    with pytest.raises(UserError, match="There is no reference"):
        compare(runs[0], tmp_path / "nowhere.json")


def test_what_makes_no_reference_is_refused(
    runs: list[Path], recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    with pytest.raises(UserError, match="from 3 runs or more"):
        make_reference(runs[:2], out)
    with pytest.raises(UserError, match=r"the seeds \[0, 1, 1\]"):
        make_reference([*runs[:2], shutil.copytree(runs[1], tmp_path / "twice")], out)
    short = write_run(tmp_path / "short", recipe, 9, steps=11)
    with pytest.raises(UserError, match="at step 11 of 40"):
        make_reference([*runs, short], out)
    other = write_run(tmp_path / "other", recipe.override("align.weight=0.1"), 9)
    with pytest.raises(UserError, match=r"another recipe .*align\.weight"):
        make_reference([*runs, other], out)
    assert not out.exists()


def test_names_seeds_and_paths_do_not_count_and_are_not_handed_out(
    runs: list[Path], reference: Path, tmp_path: Path
) -> None:
    recipe = Run.open(runs[0]).recipe
    moved = recipe.override("data.cache=/elsewhere", "generation.steps=9", "about=moved")
    moved.to_yaml(runs[0] / "recipe.yaml")
    assert compare(runs[0], reference).differing == []
    kept = Reference.read(reference).recipe
    assert (str(kept.data.manifest), str(kept.data.cache)) == ("clips.csv", "cache")


def test_trainings_of_other_seeds_are_inside_and_a_tenfold_learning_rate_is_outside(
    recipe: Recipe, tmp_path: Path
) -> None:
    prepare(recipe)
    recipe = recipe.override(
        "optim.steps=20", "optim.batch_size=1", "optim.accumulate=1", "train.checkpoint_every=20"
    )
    *trained, other = [
        train(recipe.override(f"seed={seed}"), tmp_path / f"run-{seed}").path for seed in range(5)
    ]
    make_reference(trained, tmp_path / "normal.json")
    assert compare(other, tmp_path / "normal.json").is_normal
    wild = train(recipe.override("optim.learning_rate=0.01"), tmp_path / "wild").path
    assert not compare(wild, tmp_path / "normal.json").is_normal


@pytest.mark.parametrize("weight", [0.5, 0])
def test_references_of_the_demos_runs_are_shipped(tmp_path: Path, weight: float) -> None:
    """They belong to one recipe and one set of micro weights: where either is changed, train five
    seeds of each again and run `compare --make`, as docs/running.md says."""
    with as_file(files("videorepa.lab") / "demo.yaml") as path:
        recipe = Recipe.from_yaml(path, [f"align.weight={weight}", "seed=77", "name=mine"])
    run = write_run(tmp_path / "run", recipe, 0)
    recipe.to_yaml(run / "recipe.yaml")
    found = compare(run)
    assert found.name == ("micro-aligned" if weight else "micro-control")
    assert not found.is_normal, "these curves were made up"
    assert {"denoise", "align", "similarity", "grad_norm"} == found.reference.bands.keys()
