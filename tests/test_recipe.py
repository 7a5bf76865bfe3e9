"""Recipes: round trip, overrides, and what is said about mistakes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from videorepa.benchmarks.physics_iq import PhysicsIQ
from videorepa.errors import UserError
from videorepa.inspect import inspect
from videorepa.losses.relation import Relation
from videorepa.recipe import Align, Recipe
from videorepa.settings.reading import MOST_CHARACTERS, parse_yaml
from videorepa.settings.section import Section
from videorepa.system.hub import local_copy

MARGIN = ("align", "loss", "margin")

SHIPPED = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_can_be_inspected(path: Path) -> None:
    inspection = inspect(Recipe.from_yaml(path))
    assert inspection.recipe.name == path.stem
    assert inspection.trained_parameters > 0


def test_the_published_shapes() -> None:
    """The chain of the paper, from configuration alone: nothing is downloaded or loaded."""
    text = str(inspect(Recipe.from_yaml(SHIPPED[0].parent / "videorepa-2b.yaml")))
    chain = ["49x480x720", "13x60x90", "13x30x45 x 1920", "24x10x15 x 768"]
    places = [text.index(part) for part in chain]
    assert places == sorted(places)
    assert "48x160x240" in text and "1.69 billion" in text and "after block 18" in text
    larger = inspect(Recipe.from_yaml(SHIPPED[0].parent / "videorepa-5b.yaml"))
    shapes = larger.contract.shapes
    assert (shapes.grid.width, shapes.blocks) == (3072, 42)
    # Rank 128 on four square layers of 42 blocks: 2 * 128 * 3072 * 4 * 42.
    assert larger.trained_parameters == 2 * 128 * 3072 * 4 * 42


def test_a_recipe_survives_the_round_trip(recipe: Recipe, tmp_path: Path) -> None:
    recipe.to_yaml(tmp_path / "r.yaml")
    assert Recipe.from_yaml(tmp_path / "r.yaml") == recipe


def test_a_tilde_is_the_home_folder(recipe: Recipe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    places = ("data.cache", "data.root", "data.manifest", "encoder.weights", "backbone.weights")
    changed = recipe.override(*(f"{key}=~/{key}" for key in places), "backbone.prepared_with=~/p")
    data = changed.data
    assert (data.cache, data.root) == (tmp_path / "data.cache", tmp_path / "data.root")
    assert data.manifest == tmp_path / "data.manifest"
    assert changed.encoder.weights == str(tmp_path / "encoder.weights")
    assert changed.backbone.weights == str(tmp_path / "backbone.weights")
    assert changed.backbone.prepared_with == str(tmp_path / "p")
    assert PhysicsIQ(data="~").data == tmp_path
    images = recipe.override(
        "validation={every: 1, prompts: [A, B], images: [~/a.png, b.png]}"
    ).validation.images
    assert images == (tmp_path / "a.png", Path("b.png"))
    (tmp_path / "model").mkdir()
    assert local_copy("~/model") == tmp_path / "model"
    # A name that merely begins so stays, as in a shell.
    assert recipe.override("data.cache=~$clips").data.cache == Path("~$clips")


def test_overrides_are_typed_and_reach_plugins(recipe: Recipe) -> None:
    changed = recipe.override("align.weight=0.45", "align.loss.margin=0.2", "train.lora.rank=8")
    assert (changed.align.weight, changed.align.loss.margin) == (0.45, 0.2)
    assert changed.train.lora.rank == 8 and recipe.train.lora is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("align.wieght=1", r"align\.wieght: unknown key; did you mean weight\?"),
        ("align.loss.margn=1", "margn: unknown key; did you mean margin"),
        ("encoder.frames=0", r"encoder: frames: .*greater than or equal to 1 \(found 0\)$"),
        ("align.loss.name=relatoin", "Did you mean relation"),
        ("align.block=eighteen", r"align\.block: .*integer.*eighteen"),
        ("align.weight=-1", r"align\.weight: .*greater than or equal to 0"),
        ("backbone={}", "name"),
        ("data.lab={clips: 3}", "exactly one of"),
        ("encoder=null", "needs `encoder`"),
        ("align=null", "no `align` uses it"),
        ("align.block=0", r"align\.block: expected a block's number"),
        ("align.target=2", "cannot be its own target"),
        ("align.when.decay=linear", "align.when: a linear decay needs `until`"),
        ("align.0.weight=1", "unknown key"),
        ("name=../../etc", "name: "),
        (
            "train.gradient_checkpointing=true",
            r"train\.gradient_checkpointing: unknown key; did you mean keep_checkpoints\?",
        ),
        ("train.precision=bfloat16", r"train\.precision: .*'auto' or 'float32' .*'bfloat16'"),
    ],
)
def test_mistakes_are_named_with_what_was_expected(
    recipe: Recipe, override: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        recipe.override(override)


def test_several_terms_are_a_list_that_overrides_reach_by_number(recipe: Recipe) -> None:
    term = recipe.model_dump(mode="json")["align"]
    listed = json.dumps([term, term | {"block": 3, "name": "deep"}, term])
    several = recipe.override(f"align={listed}")
    assert list(several.terms) == ["relation", "deep", "relation-2"]
    changed = several.override("align.1.weight=0.25")
    assert [term.weight for term in changed.terms.values()] == [0.5, 0.25, 0.5]
    for override, said in (
        ("align.weight=1", "goes through a list of 3"),
        ("align.7.weight=1", "goes through a list of 3"),
        ("align.0.wieght=1", r"align\.0\.wieght: unknown key; did you mean weight\?"),
        ("align=[]", "align: .*at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            several.override(override)


def test_a_margin_left_open_is_the_encoders_own(recipe: Recipe) -> None:
    for given, margin in (("{name: relation}", 0.1), ("{name: relation, margin: 0.3}", 0.3)):
        found = recipe.override(f"align.loss={given}")
        assert found.align.loss.margin == margin
        assert f"margin: {margin}" in found.text()


@pytest.mark.parametrize(
    ("changes", "key", "was", "now"),
    [
        # Published for V-JEPA; for LTX; and what LoRA's frozen weights are held in.
        (["encoder.name=vjepa"], MARGIN, 0.1, 0.05),
        (["encoder=null", "align.encoder={name: vjepa, weights: a}"], MARGIN, 0.1, 0.05),
        (["encoder.version=1"], MARGIN, 0.1, 0),
        (["backbone={name: ltx, weights: Lightricks/LTX-Video}"], ("generation", "fps"), 8, 25),
        (["train.lora={rank: 8}"], ("memory", "frozen"), "float32", "auto"),
        (["align.loss.name=cosine"], ("align", "loss", "name"), "relation", "cosine"),
        (["align.loss.scope=space"], MARGIN, 0.1, 0.1),
        (["optim.steps=9", "seed=4"], ("optim", "steps"), 6, 9),
    ],
    ids=range(8),
)
def test_an_override_fills_in_anew_what_was_left_open(
    recipe: Recipe, tmp_path: Path, changes: list[str], key: tuple, was: Any, now: Any
) -> None:
    values = recipe.model_dump(mode="json", exclude_unset=True)
    values["align"]["loss"] = {"name": "relation"}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(values))
    left_open = Recipe.from_yaml(path)
    changed = left_open.override(*changes)
    assert changed == Recipe.from_yaml(path, changes)
    for of, expected in ((left_open, was), (changed, now)):
        value = of.model_dump()
        for name in key:
            value = value[name]
        assert value == expected
    # A run's recipe states all, and an override leaves what is stated.
    left_open.to_yaml(path)
    stated = Recipe.from_yaml(path)
    assert stated == left_open and stated.override("seed=3") == left_open


def test_an_override_reaches_plugins_that_were_made_in_python(recipe: Recipe) -> None:
    term = Align(loss=Relation(), block=2, hidden=16)
    values = {"align": term, "encoder": recipe.encoder, "backbone": recipe.backbone}
    made = Recipe(**(recipe.model_dump() | values))
    assert made.override("align.loss.margin=0.3").align.loss == Relation(margin=0.3)
    open_loss = Recipe(**(recipe.model_dump() | values | {"align": Align(block=2)}))
    assert open_loss.override("align.loss.margin=0.3").align.loss == Relation(margin=0.3)


def test_inspect_lists_the_prompts_so_that_a_comma_that_split_one_is_seen(recipe: Recipe) -> None:
    split = recipe.override("validation={every: 2, prompts: [A red ball, rolling fast, falls.]}")
    text = str(inspect(split))
    assert "validation, every 2 steps\n  prompts          3\n    'A red ball'\n    'rolling" in text
    whole = recipe.override('validation={every: 1, prompts: ["A red ball, rolling fast, falls."]}')
    text = str(inspect(whole))
    assert "every 1 step\n  prompts          1\n    'A red ball, rolling fast, falls.'\n" in text
    assert "validation" not in str(inspect(recipe))


def test_a_recipe_is_frozen(recipe: Recipe) -> None:
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 4  # pyright: ignore[reportAttributeAccessIssue]


def aliases(levels: int, times: int) -> str:
    """YAML whose last list stands for times ** levels values."""
    lines = [f"a0: &a0 [{', '.join('x' * times)}]"]
    for level in range(1, levels):
        shared = ", ".join([f"*a{level - 1}"] * times)
        lines.append(f"a{level}: &a{level} [{shared}]")
    return "\n".join(lines)


def merges(levels: int, times: int) -> str:
    """YAML whose last section merges the one before so often."""
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels):
        shared = ", ".join([f"*a{level - 1}"] * times)
        lines.append(f"a{level}: &a{level} {{<<: [{shared}]}}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (aliases(9, 9), "in line 6, with aliases written out it is longer than 131,072 characters"),
        (aliases(40, 1), "in line 31, .*more than 32 deep"),
        (merges(20, 5), "in line 8, with aliases written out it is longer"),
        ("a: &a [*a]", r"line 1, \*a is inside the value that it stands for"),
        ("[" * 100_000, "in line 1, .*more than 32 deep"),
        ("- " * 100_000, "longer than 131,072 characters"),
        (f"about: {'x' * MOST_CHARACTERS}", "longer than 131,072 characters"),
        (f"seed: {'9' * 5000}", "in line 1, a number has 5,000 characters"),
        (f"name: x\nseed: 0x{'9' * 5000}", "in line 2, a number has 5,002 characters"),
        ("name: x\nseed: 1\nname: y", "the key 'name' is in line 1 and in line 3; delete one"),
        ("data:\n  frames: 9\n  cache: c\n  frames: 5", "'frames' is in line 2 and in line 4"),
        ("a: {1: x, 0x1: y}", "the key 1 is in line 1 and in line 1"),
        ("about: 2001-99-99", "in line 1, '2001-99-99' is no timestamp"),
        ("seed: !!int ''", "in line 1, '' is no int"),
        ("train: !!bool maybe", "in line 1, 'maybe' is no bool"),
    ],
    ids=range(15),
)
def test_what_is_endless_or_ambiguous_is_refused_at_once(
    text: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    begun = time.process_time()
    with pytest.raises(UserError, match=said) as refused:
        Recipe.from_yaml(path)
    assert time.process_time() - begun < 5
    assert len(str(refused.value)) < 1000


def test_aliases_and_merge_keys_mean_what_they_say() -> None:
    text = "a: &a {x: 1, y: [2]}\nb: {<<: *a, x: 3}\nc: [*a, *a]"
    values = parse_yaml(text)
    assert values == yaml.safe_load(text)
    values["c"][0]["y"].append(4)
    assert values["a"]["y"] == values["c"][1]["y"] == [2]


def test_an_override_of_one_term_leaves_another_that_was_written_as_its_alias(
    recipe: Recipe, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    values = recipe.model_dump(mode="json")
    terms = f"align: [&term {json.dumps(values.pop('align'))}, *term]\n"
    path.write_text(yaml.safe_dump(values) + terms)
    changed = Recipe.from_yaml(path, ["align.0.weight=0.25"])
    assert [term.weight for term in changed.terms.values()] == [0.25, 0.5]


def test_a_recipe_that_could_not_be_read_again_is_not_written(
    recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="characters with its defaults"):
        recipe.override(f"about={'x' * (MOST_CHARACTERS - 50)}").to_yaml(tmp_path / "r.yaml")
    assert not list(tmp_path.iterdir())


def test_messages_show_little_of_a_large_value() -> None:
    class Part(Section):
        number: int = 0

    endless: Any = ["x"]
    for _ in range(60):
        endless = [endless, endless]
    faulty: dict[str, Any] = {f"{number}{'y' * 5000}": 1 for number in range(5000)}
    for values, said in (
        ({"number": endless}, r"number: .*valid integer \(found \[\[\["),
        ({"number": "9" * 100_000}, r"number: .*integer"),
        (faulty, r"(?s)unknown key.*and 4980 more faults"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            Part.checked(values, "No part")
        assert len(str(refused.value)) < 4000
