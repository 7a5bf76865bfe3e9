"""The study: its statistics against known cases, its order and resuming, and its tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from videorepa.artifacts.model import Model
from videorepa.backbones import timestep_of_noise
from videorepa.benchmarks.continuation import Continuations
from videorepa.benchmarks.laws.checks import packaged_tolerances
from videorepa.cli import main
from videorepa.data.source import LabSource
from videorepa.data.video import to_video
from videorepa.errors import UserError
from videorepa.evaluation.statistics import sign_flip
from videorepa.lab.study import arms as module
from videorepa.lab.study.arms import cost, study
from videorepa.lab.study.measures import Measures, Meter
from videorepa.lab.study.recipe import SHORT, StudyRecipe
from videorepa.lab.study.rows import means_of_clips, read_rows, rows_text
from videorepa.lab.study.seeds import Measured, measured_tables, read_measured
from videorepa.lab.study.tables import by_table, compare, tables
from videorepa.recipe import Recipe
from videorepa.settings.sections import LabClips
from videorepa.system.randomness import generator

FULL = Path(__file__).parents[1] / "recipes" / "micro" / "study.yaml"
CONTINUATION = FULL.with_name("continuation.yaml")
SMALL = (
    *("prompts=4", "seeds=[0, 1]", "recipe.data.lab.clips=4", "recipe.optim.steps=2"),
    "recipe.train.checkpoint_every=1",
)


def row(arm: str, prompt: int, seed: int = 0, step: int | None = None, **values: Any) -> dict:
    scores = {"sa": True, "pc": False, "joint": False, "checks": 0.5, "violation": 0.5}
    scores |= {"motion": 5.0} | values
    caption = f"caption {prompt // 2}"
    return {
        "arm": arm,
        "prompt_id": str(prompt),
        "seed": seed,
        "step": step,
        "caption": caption,
    } | (scores)


def test_signs_are_flipped_by_clusters() -> None:
    # All of n clusters agree: two of the 2^n ways to flip them are as far from 0.
    found = sign_flip([[1.0, 1.0]] * 8, resamples=20_000)
    assert found == pytest.approx(2 / 2**8, rel=0.3)
    assert sign_flip([[0.0]] * 5) == 1
    # A prompt's clips do not count as so many prompts.
    assert sign_flip([[1.0] * 50, [1.0] * 50]) == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="no differences"):
        sign_flip([[]])


def test_p_values_of_equal_models_are_even() -> None:
    rng = np.random.default_rng(0)
    found = [
        sign_flip(list(rng.normal(0, 1, (25, 1)) + rng.normal(0, 0.2, (25, 3))), 400, seed=n)
        for n in range(300)
    ]
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.09
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)


def test_a_difference_is_paired_by_prompt_and_seed() -> None:
    control = [row("control", n, seed) for seed in (0, 1) for n in range(10)]
    better = [row("trd", n, seed, pc=n < 6 and seed == 0) for seed in (1, 0) for n in range(10)]
    found = compare(better, control, "pc")
    assert found.value == pytest.approx(30) and found.by_seed == (60, 0)
    assert (found.won, found.lost) == (6, 0)
    assert found.low >= 0 and found.high > 30
    assert compare(control, control, "pc").p == 1
    with pytest.raises(UserError, match="share no clip"):
        compare(better[:1], control[:1], "pc")


@pytest.fixture
def pretended(monkeypatch) -> list[tuple[str, ...]]:
    """The verbs, doing nothing but leaving what is read of them."""
    done: list[tuple[str, ...]] = []

    def generate(model: Path, prompts, out: Path, *, seed: int, step=None, benchmark) -> None:
        done.append(("generate", out.name))
        (out / "scores").mkdir(parents=True, exist_ok=True)
        path = out / "scores" / "scores.jsonl"
        lines = [
            {"prompt_id": p.id, "k": 0, "model_digest": "x"}
            | {"sa": True, "pc": out.name.startswith("trd-0"), "joint": False, "motion": 1.0}
            | {"gravity_passed": True, "gravity_value": 0.123456}
            | {"size_passed": False, "size_value": 2.0}
            for p in prompts
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def evaluate(name: str, clips: Path) -> None:
        scores = clips / "scores"
        summary = {"n": len((scores / "scores.jsonl").read_text().splitlines()), "failures": []}
        summary |= {"benchmark": "lab", "version": "2", "metrics": {}}
        (scores / "summary.json").write_text(json.dumps(summary))

    def train(recipe, out: Path):
        done.append(("train", out.name))
        assert recipe.seed == int(out.name.rpartition("-")[2])
        return type("Trained", (), {"path": out})

    monkeypatch.setattr(module, "prepare", lambda recipe, shard: done.append(("prepare",)))
    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "generate", generate)
    monkeypatch.setattr(module, "evaluate", evaluate)
    return done


def test_shards_share_a_study_and_the_last_one_has_the_tables(tmp_path: Path, pretended) -> None:
    fewer = ("arms.trd-pixels.seeds=1", "arms.trd-pixels.prompts=3")
    recipe = StudyRecipe.from_yaml(
        SHORT, (*SMALL, *fewer, "curve={steps: [1], arms: [trd], prompts: 2}")
    )
    first = study(recipe, tmp_path / "study", shard=(0, 2))
    assert first.missing and not (tmp_path / "study" / "tables.md").exists()
    second = study(recipe, tmp_path / "study", shard=(1, 2))
    assert not second.missing
    trained = [name for verb, *name in pretended if verb == "train"]
    # Ten arms with two seeds, but for the one that has one.
    assert len(trained) == len({tuple(name) for name in trained}) == 19
    assert read_rows(tmp_path / "study" / "rows.csv") == second.rows
    text = (tmp_path / "study" / "tables.md").read_text()
    assert text == tables(recipe, second.rows) == second.tables
    # Base, ten arms: 4 clips with each seed, but for one arm; the curve: 2 clips at 1 step.
    assert len(second.rows) == 4 * (2 + 18) + 3 + 2
    assert second.rows[0]["checks"] == 0.5 and second.rows[0]["gravity_value"] == 0.1235
    assert "| trd | TRD from the video teacher | 8 | 100.0" in text
    assert "| trd | control | pc | +50.0 |" in text and "+100.0, +0.0" in text
    # The same two clips of the base model, on the way and at the end.
    assert "| trd | 0 | 2 | 100.0 [34, 100] | 0.0 [0, 66] | 0.0 [0, 66] |" in text
    assert "| trd | 1 | 2 | 100.0 [34, 100] | 100.0 [34, 100] | 0.0 [0, 66] |" in text
    assert "| trd | 2 | 2 |" in text


def test_a_shard_prepares_the_clips_of_its_own_arms_alone(
    tmp_path: Path, pretended, monkeypatch
) -> None:
    recipe = StudyRecipe.from_yaml(SHORT, SMALL)
    jobs = recipe.jobs()
    prepared: list[tuple[Recipe, tuple[int, int]]] = []
    monkeypatch.setattr(module, "prepare", lambda recipe, shard: prepared.append((recipe, shard)))
    for job in (("trd", 1), ("base", 0)):
        study(recipe, tmp_path / "study", shard=(jobs.index(job), len(jobs)))
    trd = recipe.trained("trd", 0).override(f"data.cache={tmp_path / 'study' / 'cache'}")
    assert prepared == [(trd, (jobs.index(("trd", 1)), len(jobs))), (trd, (0, 1))]


def test_a_curve_has_no_more_prompts_than_the_study(tmp_path: Path, pretended) -> None:
    curve = "curve={steps: [1], arms: [control], prompts: 200}"
    recipe = StudyRecipe.from_yaml(SHORT, (*SMALL, "arms={control: {about: x}}", curve))
    found = study(recipe, tmp_path / "study")
    assert not found.missing
    assert sum(row["step"] == 1 for row in found.rows) == 4


def test_a_study_takes_its_own_clips_from_a_folder_that_has_more(
    tmp_path, pretended, monkeypatch
) -> None:
    study(StudyRecipe.from_yaml(SHORT, SMALL), tmp_path / "study")
    fewer = StudyRecipe.from_yaml(SHORT, (*SMALL, "prompts=2"))
    monkeypatch.setattr(module, "generate", lambda *args, **settings: None)  # All are there.
    assert len(study(fewer, tmp_path / "study").rows) == 2 * (2 + 2 * len(fewer.arms))


def test_time_left_goes_by_the_steps_and_clips_that_are_left(
    tmp_path, pretended, monkeypatch, capsys
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    do = module._run

    def a_minute_each(recipe, out, arm, seed, meter) -> None:
        left = module._steps_left(recipe, out, arm, seed)
        clock[0] += 60 * (left + module._clips_left(recipe, out, arm, seed))
        do(recipe, out, arm, seed, meter)

    def said(prompts: int) -> list[str]:
        change = (*SMALL, "arms={control: {about: x}}", f"prompts={prompts}")
        study(StudyRecipe.from_yaml(SHORT, change), tmp_path / "study")
        lines = capsys.readouterr().err.splitlines()
        return [line.partition(", about ")[2] for line in lines if ", seed " in line]

    monkeypatch.setattr(module, "_run", a_minute_each)
    # Base and control, each twice: 4 clips, and for the control 2 steps.
    assert said(prompts=4) == ["", "16 min left", "10 min left", "6 min left"]
    # Two more clips each; what pretends to train leaves no steps behind.
    assert said(prompts=6) == ["", "10 min left", "6 min left", "4 min left"]


def test_an_arm_is_missing_until_it_has_all_its_clips(tmp_path, pretended, monkeypatch) -> None:
    study(StudyRecipe.from_yaml(SHORT, SMALL), tmp_path / "study")
    more = StudyRecipe.from_yaml(SHORT, (*SMALL, "prompts=5"))
    found = study(more, tmp_path / "study", shard=(0, 2))
    assert "control, seed 0" in found.missing and "base, seed 0" not in found.missing
    assert not study(more, tmp_path / "study", shard=(1, 2)).missing


def test_rows_become_tables_again(tmp_path: Path, pretended, capsys) -> None:
    changes = [f"--set={change}" for change in SMALL]
    assert main(["lab", "study", "--out", str(tmp_path / "study"), *changes]) == 0
    once = capsys.readouterr().out
    rows = str(tmp_path / "study" / "rows.csv")
    assert main(["lab", "study", "--rows", rows, *changes]) == 0
    assert capsys.readouterr().out.strip() in once


def test_arms_that_the_recipe_does_not_have_are_named() -> None:
    recipe = StudyRecipe.from_yaml(SHORT, SMALL)
    rows = [row(arm, n, 0) for arm in ("base", "control", "trd") for n in range(3)]
    assert "Left out" not in tables(recipe, rows)
    renamed = [one | {"arm": "trd-old"} if one["arm"] == "trd" else one for one in rows]
    text = tables(recipe, [*renamed, row("repo", 0, 0)])
    assert "the recipe has no such arms (rows of each): trd-old (3), repo (1)." in text


@pytest.mark.parametrize("name", ["summary.json", "scores.jsonl", "seconds.json"])
def test_a_damaged_file_of_scores_is_named(tmp_path: Path, pretended, name: str) -> None:
    recipe = StudyRecipe.from_yaml(SHORT, SMALL)
    study(recipe, tmp_path / "study")
    path = tmp_path / "study" / "clips" / "control-0" / "scores" / name
    path.write_bytes(b"{}\n{}\n")
    with pytest.raises(UserError, match=name):
        cost(recipe, tmp_path / "study")
        list(module._rows(recipe, tmp_path / "study", [("control", 0)]))


def test_the_full_study_goes_on_from_the_short_one() -> None:
    full, short = StudyRecipe.from_yaml(FULL), StudyRecipe.from_yaml(SHORT)
    assert (full.recipe, full.control) == (short.recipe, short.control)
    assert full.prompts > short.prompts and full.seeds[: len(short.seeds)] == short.seeds
    assert {name: full.arms[name] for name in short.arms} == short.arms
    assert len(full.arms) > len(short.arms)
    changed = StudyRecipe.from_yaml(FULL, ("arms.trd.seeds=1",))
    assert changed.arms["trd"].seeds == 1 and changed.arms["trd"].about == short.arms["trd"].about


def test_a_study_is_done_table_by_table_and_seed_by_seed() -> None:
    full = StudyRecipe.from_yaml(FULL)
    jobs = full.jobs()
    main = [name for name, arm in full.arms.items() if arm.table == "main"]
    first = [(arm, seed) for seed in full.seeds for arm in ("base", *main)]
    assert jobs[: len(first)] == first and len(jobs) == len(set(jobs))
    assert {arm for arm, _ in jobs} == {"base", *full.arms}
    assert [job for job in jobs if job[0] == "block-2"] == [("block-2", full.seeds[0])]


def test_some_arms_get_more_seeds_after_all_have_had_theirs() -> None:
    more = "more={seeds: [5, 7], arms: [control, trd]}"
    recipe = StudyRecipe.from_yaml(SHORT, [*SMALL, more])
    assert recipe.seeds_of("trd") == (0, 1, 5, 7)
    assert recipe.seeds_of("repa") == recipe.seeds_of("base") == (0, 1)
    assert recipe.jobs()[-4:] == [("control", 5), ("trd", 5), ("control", 7), ("trd", 7)]


def test_the_shipped_study_or_one_beside_can_be_extended(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("extends: /etc/passwd\nname: own\n")
    with pytest.raises(UserError, match="extends can be `short` or the name of a file beside it"):
        StudyRecipe.from_yaml(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("extends: own.yaml\n")
    with pytest.raises(UserError, match="names the file itself"):
        StudyRecipe.from_yaml(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("extends: short\narms: 3\n")
    with pytest.raises(UserError, match="arms: Input should be keys and values"):
        StudyRecipe.from_yaml(tmp_path / "own.yaml")


def test_the_map_goes_on_where_the_calibration_was() -> None:
    """It shares the controls, so the recipes of these have to be the same."""
    calibration, screen = (
        StudyRecipe.from_yaml(FULL.with_name(f"{name}.yaml")) for name in ("calibration", "map")
    )
    assert set(calibration.jobs()) < set(screen.jobs())
    assert all(screen.trained(arm, 0) == calibration.trained(arm, 0) for arm in calibration.arms)
    assert screen.measures == calibration.measures


@pytest.mark.parametrize("text", ["", "arm,seed\n", "arm,seed\ncontrol,0\n", "{", "a\0b\n1\n"])
def test_rows_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(UserError, match="holds no rows"):
        read_rows(tmp_path / "rows.csv")


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    rows = [row("control", 0, gravity_passed=True), row("trd", 1, 1, step=100, size_value=0.25)]
    rows[1]["caption"] = 'a "red" ball,\nand more'
    (tmp_path / "rows.csv").write_text(rows_text(rows))
    assert read_rows(tmp_path / "rows.csv") == rows


def test_a_violation_is_counted_in_tolerances() -> None:
    limits = packaged_tolerances()
    assert limits["permanence"] == 0 and limits["gravity"] > 0

    def found(**values: float) -> float:
        passed = {f"{name}_passed": True for name in values}
        return module._violation({f"{name}_value": v for name, v in values.items()} | passed)

    assert found(gravity=limits["gravity"]) == 0
    assert found(gravity=2 * limits["gravity"], size=limits["size"] / 2) == 0
    assert found(gravity=2 * limits["gravity"], size=limits["size"]) == pytest.approx(0.5)
    assert found(gravity=0.0) == -2 and found(gravity=1e9) == 3
    assert found(permanence=0.0) == -2 and found(permanence=1.0) == 3
    assert found(gravity=limits["gravity"], objects=1e9) == 0  # Of SA.


def test_violations_are_compared_in_their_own_unit() -> None:
    control = [row("control", n, violation=0.5) for n in range(8)]
    better = [row("trd", n, violation=0.25) for n in range(8)]
    found = compare(better, control, "violation")
    assert found.value == pytest.approx(-0.25) and (found.won, found.lost) == (0, 8)
    text = tables(StudyRecipe.from_yaml(SHORT), control + better)
    assert "| trd | control | violation | -0.250 | [-0.250, -0.250] |" in text


def test_laws_count_the_clips_that_they_apply_to() -> None:
    rows = [row("control", n, gravity_passed=n < 3) for n in range(4)]
    rows += [row("control", n) for n in range(4, 8)]
    recipe = StudyRecipe.from_yaml(SHORT)
    assert "| control | 75 |" in tables(recipe, rows)


def test_a_further_table_is_of_its_own_clips_and_controls() -> None:
    changes = ("again=[trd]", "arms.long={about: x, table: length}")
    longer = "arms.longer={about: y, table: length, control: long}"
    recipe = StudyRecipe.from_yaml(SHORT, (*changes, longer))
    rows = [row("control", n) for n in range(20)]
    rows += [row("trd", n, pc=n < 6 or n > 9) for n in range(20)]
    rows += [row("long", n, pc=n < 5) for n in range(10)]
    rows += [row("longer", n, pc=n < 7) for n in range(10)]
    found = by_table(recipe, rows)["length"]
    lines = {line.split(" | ")[0]: line for line in found.scores().splitlines()}
    # Of 20 clips, only the ten that this table's arms have too: 6 of these pass.
    assert lines["| trd"].startswith("| trd | TRD from the video teacher | 10 | 100.0")
    assert "| +60.0 [" in lines["| trd"] and " p " not in lines["| trd"]
    assert list(lines)[2:] == ["| control", "| trd", "| long", "| longer"]
    assert "| longer | long | pc | +20.0 |" in found.differences()
    assert "| long | control | pc | +50.0 |" in found.differences()
    assert "| trd |" not in found.differences()  # It was tested in the first table.


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("arms.base={about: x}", "no arm can have its name"),
        ("control=trdd", "there is no arm trdd"),
        ("arms.trd.set=[align.weigth=0]", "weigth: unknown key"),
        ("prompts=1", "prompts: one clip has no spread"),
        ("arms=3", "arms: Input should be keys and values"),
        ("colour=red", "colour: unknown key"),
        ("arms.trd.control=nobody", "there is no arm nobody"),
        ("again=[nobody]", "there is no arm nobody"),
        ("scale=[nobody, control]", "there is no arm nobody"),
        ("known=[[nobody, trd]]", "there is no arm nobody"),
        ("scale=[control, trd]", "which rise; got control 300, trd 300"),
        ("scale=[trd]", "scale lists the control"),
        ("prompts=0", "nothing is asked of the arms"),
        ("measures={levels: [0.5, 0.2]}", "noise levels rise"),
        ("measures={levels: [0]}", "measures.levels"),
        ("curve={steps: [1], arms: [nobody], prompts: 2}", "there is no arm nobody"),
        ("curve={steps: [150], arms: [trd], prompts: 2}", "wants step 150, of which the arm trd"),
        ("curve={steps: [400], arms: [trd], prompts: 2}", "wants step 400, of which the arm trd"),
        ("more={seeds: [5], arms: [nobody]}", "there is no arm nobody"),
        ("more={seeds: [1], arms: [trd]}", "repeat one"),
    ],
)
def test_a_recipe_that_is_no_study_is_refused(change: str, says: str, capsys) -> None:
    assert main(["lab", "study", f"--set={change}"]) == 1
    assert says in capsys.readouterr().err


def test_a_curve_asks_for_checkpoints_that_are_kept() -> None:
    curve = "curve={steps: [100, 300], arms: [trd], prompts: 2}"
    assert StudyRecipe.from_yaml(SHORT, [curve]).curve
    for fewer in ("recipe.train.keep_checkpoints=2", "recipe.optim.steps=350"):
        with pytest.raises(UserError, match="step 100, of which the arm trd keeps no checkpoint"):
            StudyRecipe.from_yaml(SHORT, [curve, fewer])


# What is measured without sampling.


MEASURED = (
    *("prompts=0", "seeds=[0, 1]", "recipe.data.lab.clips=8", "recipe.optim.steps=2"),
    *("recipe.optim.batch_size=2", "recipe.train.from_scratch=true"),
    "measures={clips: 3, pairs: 1, laws: [frozen, sunken], levels: [0.2, 0.9]}",
    "arms={control: {about: plain, set: [align.weight=0]}, trd: {about: TRD}}",
)


@pytest.mark.slow
def test_models_are_measured_once_and_on_the_same_clips(tmp_path: Path, capsys) -> None:
    recipe = StudyRecipe.from_yaml(SHORT, MEASURED)
    first = study(recipe, tmp_path / "study")
    assert not first.missing and not first.rows
    # Base, which is the same with both seeds, and two arms with two seeds: 2 noise levels and their
    # mean, and 2 laws and their mean in two measures.
    assert len(first.measured) == 5 * (3 + 2 * 3)
    assert all(math.isfinite(row["value"]) for row in first.measured)
    counts = {(row["measure"], row["part"]): row["n"] for row in first.measured}
    assert counts["loss", "0.2"] == 3 and counts["likelier", "frozen"] == 4
    before = {path: path.read_bytes() for path in (tmp_path / "study" / "measured").iterdir()}
    again = study(recipe, tmp_path / "study")
    assert again.measured == first.measured and again.tables == first.tables
    assert {path: path.read_bytes() for path in before} == before
    assert "| trd | TRD | 2 |" in first.tables
    rows = str(tmp_path / "study" / "measured.csv")
    assert main(["lab", "study", "--rows", rows, *(f"--set={x}" for x in MEASURED)]) == 0
    assert capsys.readouterr().out.strip() == first.tables.strip()
    # What was measured on other models, or otherwise, does not count.
    more = StudyRecipe.from_yaml(SHORT, (*MEASURED, "measures.clips=4"))
    with pytest.raises(UserError, match="was measured otherwise; it differs in clips"):
        study(more, tmp_path / "study")
    fresh = StudyRecipe.from_yaml(SHORT, (*MEASURED, "measures.pairs_seed=1"))
    with pytest.raises(UserError, match="was measured otherwise; it differs in pairs_seed"):
        study(fresh, tmp_path / "study")
    pairs = tmp_path / "fresh" / "pairs"
    study(fresh, tmp_path / "fresh")
    assert (pairs / "pairs.csv").read_bytes() != (
        tmp_path / "study" / "pairs" / "pairs.csv"
    ).read_bytes()
    taught = StudyRecipe.from_yaml(SHORT, (*MEASURED, "measures.seed=77"))
    with pytest.raises(UserError, match="train on the series 77"):
        study(taught, tmp_path / "study")


def measured(arm: str, seed: int, value: float, measure: str = "loss", part: str = "all") -> dict:
    about = {"arm": arm, "seed": seed, "measure": measure, "part": part}
    return about | {"value": value, "n": 3}


STEPS = {"short": 100, "control": 200, "long": 400}


def scaled() -> StudyRecipe:
    arms = {name: {"about": name, "set": [f"optim.steps={n}"]} for name, n in STEPS.items()}
    arms["trd"] = {"about": "TRD", "set": ["optim.steps=200"]}
    changes = [f"arms={json.dumps(arms)}", "scale=[short, control, long]", "measures={}"]
    return StudyRecipe.from_yaml(SHORT, [*changes, "known=[[trd, long]]"])


def test_a_gain_is_paired_by_seed_and_worth_steps() -> None:
    # Doubling the steps takes 0.1 off the loss; seeds differ by much more.
    losses = {"short": 1.1, "control": 1.0, "long": 0.9, "trd": 0.95}
    jitter = [0.0, 0.01, -0.01]
    rows = [
        measured(arm, seed, loss + 5 * seed + (jitter[seed] if arm == "trd" else 0))
        for arm, loss in losses.items()
        for seed in range(3)
    ]
    found = Measured(scaled(), rows)
    gain = found.gains(["control", "trd"], "loss")["trd"]
    assert gain.of.value == pytest.approx(0.05)
    assert gain.by_seed == pytest.approx((0.05, 0.04, 0.06))
    assert gain.of.low == pytest.approx(0.05 - 4.303 * 0.01 / 3**0.5, rel=1e-3)
    assert gain.steps[0] == pytest.approx(200 * 2**0.5 - 200)
    assert gain.p_holm == gain.of.p < 0.05
    # Exchanged labels mirror it.
    assert (mirrored := found.gain("control", "trd", "loss")) is not None
    assert mirrored.of.value == pytest.approx(-0.05)
    # More is better in the other measures.
    likelier = [row | {"measure": "likelier"} for row in rows]
    assert Measured(scaled(), likelier).gains(["trd"], "likelier")["trd"].of.value < 0
    text = measured_tables(scaled(), rows)
    assert "+5000e-5 [+2516e-5, +7484e-5], p 0.013, steps +83 [+38, +136]" in text
    assert "| loss, all | 3/3, +10000e-5 | 3/3, +10000e-5 | 3/3, +5000e-5 |" in text
    # Beyond either end of the scale no number of steps is read off.
    for loss, worth in ((1.2, -math.inf), (0.8, math.inf)):
        beyond = [measured("trd", s, loss + 5 * s + jitter[s]) for s in range(3)]
        rows_beyond = [row for row in rows if row["arm"] != "trd"] + beyond
        far = Measured(scaled(), rows_beyond).gains(["trd"], "loss")["trd"]
        assert far.steps == (worth,) * 3
        said = "fewer" if worth < 0 else "more"
        assert f"steps {said} than the scale has" in measured_tables(scaled(), rows_beyond)
    # The scale is of the study's control: a gain over another is worth no number of its steps.
    over_another = Measured(scaled(), rows).gain("trd", "short", "loss")
    assert over_another is not None and math.isnan(over_another.steps[0])


def test_means_of_generated_clips_are_compared_by_training() -> None:
    def clip(arm: str, seed: int, number: int, sa: bool, violation: float) -> dict[str, Any]:
        scores = {"sa": sa, "pc": False, "joint": False, "checks": 0.5, "motion": 3.0}
        about = {"arm": arm, "seed": seed, "step": None, "prompt_id": str(number), "caption": "A"}
        return about | scores | {"violation": violation}

    rows = [
        clip(arm, seed, number, number < passed + seed, 1.0 - gain * seed)
        for arm, passed, gain in (("control", 1, 0.0), ("trd", 2, 0.5))
        for seed in (0, 1)
        for number in range(4)
    ]
    on_the_way = rows[0] | {"step": 3, "sa": False}
    means = list(means_of_clips([*rows, on_the_way]))
    assert {m["measure"] for m in means} == {"sa", "pc", "joint", "checks", "violation", "motion"}
    found = Measured(scaled(), means)
    assert found.of("control", "sa") == {0: 25.0, 1: 50.0} and found.of("trd", "pc")[1] == 0
    gained = found.gain("trd", "control", "sa"), found.gain("trd", "control", "violation")
    assert [gain and gain.by_seed for gain in gained] == [(25, 25), (0, 0.5)]
    losses = [measured(arm, seed, 0.1) for arm in ("control", "trd") for seed in (0, 1)]
    text = measured_tables(scaled(), [*losses, *means])
    assert "with trainings as the unit" in text
    assert "| 62.50 | +25.00, the same in each seed" in text
    # An arm of fewer prompts is compared over these alone.
    fewer = [row for row in rows if row["arm"] == "control" or row["prompt_id"] in "01"]
    found = Measured(scaled(), list(means_of_clips(fewer)))
    assert found.of("control", "sa") == {0: 50.0, 1: 100.0}
    assert found.gain("trd", "control", "sa").by_seed == (50, 0)
    assert "with trainings as the unit" not in measured_tables(scaled(), losses)


def test_a_measure_that_does_not_order_the_scale_says_nothing_in_steps() -> None:
    losses = {"short": 1.0, "control": 1.0, "long": 0.9, "trd": 0.95}
    rows = [measured(arm, seed, loss) for arm, loss in losses.items() for seed in (0, 1)]
    assert math.isnan(Measured(scaled(), rows).gains(["trd"], "loss")["trd"].steps[0])
    assert "steps +" not in measured_tables(scaled(), rows)
    # Beyond the longest training it says so, and one seed has no interval.
    far = [measured(arm, 0, loss) for arm, loss in (losses | {"trd": 0.1, "short": 1.1}).items()]
    gain = Measured(scaled(), far).gains(["trd"], "loss")["trd"]
    assert gain.steps[0] == math.inf and gain.of.p == 1 and math.isnan(gain.p_holm)
    assert "+90000e-5, one seed" in measured_tables(scaled(), far)
    # A gain that rounds to zero has no minus.
    close = [measured(arm, 0, loss) for arm, loss in (losses | {"trd": 1 + 1e-9}).items()]
    assert "+0e-5, one seed" in measured_tables(scaled(), close)


@pytest.mark.parametrize(
    "content", [b"", b"arm,seed\n", b"arm,seed,measure,part,value,n\na,0,loss,all,x,1\n", b"\xff"]
)
def test_what_no_study_measured_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "measured.csv").write_bytes(content)
    with pytest.raises(UserError, match="not what a study measured"):
        read_measured(tmp_path / "measured.csv")


def test_a_folder_of_something_else_is_refused(tmp_path: Path, pretended) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a study"):
        study(StudyRecipe.from_yaml(SHORT), tmp_path)


@pytest.mark.slow
def test_a_tiny_study_runs_and_goes_on(tmp_path: Path, capsys) -> None:
    changes = [*SMALL, "recipe.optim.batch_size=2", "recipe.generation.steps=1", "seeds=[0]"]
    command = ["lab", "study", "--out", str(tmp_path / "study"), *(f"--set={c}" for c in changes)]
    assert main(command) == 0
    first = capsys.readouterr().out
    rows = read_rows(tmp_path / "study" / "rows.csv")
    assert len(rows) == 4 * (1 + len(StudyRecipe.from_yaml(SHORT).arms))
    assert all(math.isfinite(row["motion"]) for row in rows)
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(first[: first.index("| arm | training")])


# Continuations.


def test_a_study_of_continuations_has_errors_in_its_tables(tmp_path: Path) -> None:
    recipe = StudyRecipe.from_yaml(CONTINUATION)
    rows = []
    for arm, error in (("base", 5.0), ("control", 4.0), ("trd", 3.0)):
        for prompt in range(4):
            off = {"position_error": error + prompt, "velocity_error": error / 10}
            off |= {"static_position_error": 9.0, "static_velocity_error": 1.0}
            rows.append(row(arm, prompt, **off, lost=0.0, compared=16))
    path = tmp_path / "rows.csv"
    path.write_text(rows_text(rows))
    table = by_table(recipe, read_rows(path))["main"]
    assert "| position off, px | position off, px, a copy |" in table.scores()
    assert "4.50 [" in table.scores() and "9.00" in table.scores()
    assert table.against("position_error")["trd"].value == pytest.approx(-1)
    assert "| trd | control | velocity_error | -0.100 |" in table.differences()
    assert "position" not in by_table(recipe, [row("trd", 1)])["main"].scores()


def test_a_study_asks_its_benchmark(tmp_path: Path, pretended) -> None:
    small = ("prompts=2", "seeds=[0]", "recipe.data.lab.clips=4", "recipe.optim.steps=2")
    recipe = StudyRecipe.from_yaml(CONTINUATION, (*small, "recipe.train.checkpoint_every=1"))
    done = study(recipe, tmp_path / "study")
    assert {row["prompt_id"] for row in done.rows} == {p.id for p in Continuations().prompts(2, 0)}


@torch.no_grad()
def test_a_model_without_a_text_mode_is_shown_first_frames(tmp_path: Path, capsys) -> None:
    recipe = StudyRecipe.from_yaml(CONTINUATION).recipe
    asked = Measures(clips=2, pairs=1, laws=("frozen", "sunken"), levels=(0.5,))
    model = Model.of(Path(recipe.backbone.folder()))
    rows = Meter(recipe, asked, tmp_path).measure(model, tmp_path / "base-0.json")
    found = {(row["measure"], row["part"]): row for row in rows}
    # Sunken bodies are so from the first frame on, which is then none of the real clip's.
    assert "4 of 8 pairs are left out" in capsys.readouterr().out
    assert found["likelier", "all"]["n"] == 4 and ("likelier", "sunken") not in found

    lab = LabClips(clips=2, seed=asked.seed)
    clips = LabSource(recipe.data.model_copy(update={"lab": lab}))
    video = to_video(np.stack([clips.sample(number).frames for number in range(2)]))
    backbone = recipe.backbone.load(("vae", "text_encoder", "transformer"), torch.device("cpu"))
    moments = backbone.encode_video(video)
    latents, opening = backbone.latents(moments, None), backbone.opening(video, moments)
    noise = torch.randn(latents.shape, generator=generator(asked.seed, "held-out noise", "0.5"))
    timestep = timestep_of_noise(backbone, 0.5, latents[0]).expand(2)
    text = backbone.encode_text([clip.caption for clip in clips.items])
    denoised = backbone.denoising_loss(latents, text, noise, timestep, opening, of_unseen=True)
    assert opening is not None
    # The study asks in bfloat16.
    assert found["loss", "0.5"]["value"] == pytest.approx(denoised.loss.mean().item(), rel=0.01)
    without = backbone.denoising_loss(latents, text, noise, timestep)
    assert abs(without.loss - denoised.loss).mean() > 0.02 * denoised.loss.mean()
