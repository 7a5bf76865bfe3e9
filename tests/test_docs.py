"""What the documentation says is run: its commands, its Python, its links, its example plugins."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import runpy
import shlex
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic.fields import FieldInfo

from videorepa import cli, encoders, losses
from videorepa.artifacts.run import DIVISION, FREE_TO_CHANGE
from videorepa.backbones import BackboneSpec
from videorepa.encoders import EncoderSpec
from videorepa.inspect import inspect
from videorepa.losses import Loss
from videorepa.recipe import Align, Recipe
from videorepa.settings import plugins
from videorepa.settings.section import Section
from videorepa.train import train
from videorepa.training.cost import Cost

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "dev" / "log.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page: Path) -> list[str]:
    """Calls of videorepa, also by a launcher or in a loop over GPUs."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    calls = (re.search(r"(?:^|\s)videorepa [a-z].*", line.split("  #")[0]) for line in lines)
    return [call[0].strip().removesuffix(" &") for call in calls if call]


ALL_COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(
    ("page", "command"),
    ALL_COMMANDS,
    ids=[f"{p.stem}-{i}" for i, (p, _) in enumerate(ALL_COMMANDS)],
)
def test_commands_parse_and_name_files_that_exist(page: Path, command: str, monkeypatch) -> None:
    called = []

    def recorded(verb):
        @functools.wraps(verb)
        def record(**arguments) -> None:
            called.append(arguments)

        return record

    monkeypatch.setattr(cli, "VERBS", {name: recorded(verb) for name, verb in cli.VERBS.items()})
    assert cli.main(shlex.split(command)[1:]) == 0
    assert len(called) == 1
    for recipe in re.findall(r"recipes/\S+\.yaml", command):
        assert (ROOT / recipe).is_file(), f"{page.name} names {recipe}"


def test_the_studys_tables_follow_from_what_is_kept() -> None:
    spec = importlib.util.spec_from_file_location("results", ROOT / "dev" / "results.py")
    assert spec is not None and spec.loader is not None
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    pages = [page.read_text() for page in results.PAGES]
    assert sum(page.count("<!-- end -->") for page in pages) == len(results.TABLES)
    assert [results.filled(page) for page in pages] == pages
    changed = pages[0].replace("81.0 [78.4", "91.0 [78.4")
    assert changed != pages[0] and results.filled(changed) == pages[0]


def test_there_are_commands_to_test() -> None:
    assert len(ALL_COMMANDS) > 12


def unpredicted(recipe: Recipe, device: torch.device) -> Cost:
    """In place of seconds of prediction, where a page does not speak of memory."""
    return Cost(device, torch.float32, {"weights": 1}, loading=0, validation=0, operations=1.0)


@pytest.mark.parametrize(
    "command", [c for _, c in ALL_COMMANDS if c.startswith("videorepa inspect")]
)
def test_inspect_commands_run(command: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    if "--device" not in command:
        monkeypatch.setattr(importlib.import_module("videorepa.inspect"), "predict", unpredicted)
    assert cli.main(shlex.split(command)[1:]) == 0
    assert "block output" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_python_in_the_docs_runs(page: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    for code in blocks(page, "python"):
        if not code.startswith("# "):  # A named file is a plugin, tested below.
            exec(compile(code, str(page), "exec"), {})


def anchors(page: Path) -> set[str]:
    """The names by which GitHub lets a link lead to the page's headings."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"<img [^>]*src=\"([^\"]+)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_pages_named_in_code_exist() -> None:
    folders = ("src", "tests", "recipes", "experiments", "timings", "dev")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    for path in files:
        if path.suffix in (".py", ".yaml", ".j2"):
            for page in re.findall(r"(?<![\w/])(?:docs|dev)/[\w-]+\.\w+", path.read_text()):
                assert (ROOT / page).is_file(), f"{path.relative_to(ROOT)} names {page}"


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds, also where it may be left out."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, Section) else None
    return next(filter(None, map(section_in, typing.get_args(annotation))), None)


def in_words(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value in (None, "", ()):
        return "none"
    if isinstance(value, Loss):
        return value.name
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value).translate({40: "[", 41: "]"})


def defaults(section: type[Section], elsewhere: set[str], prefix: str = "") -> dict[str, str]:
    """Each key with its default; a section that is always there has none itself.

    elsewhere: Fields whose keys are on another page.
    """
    described = {"backbone": BackboneSpec, "encoder": EncoderSpec}
    keys: dict[str, str] = {}
    for name, field in section.model_fields.items():
        inner = described.get(name) or section_in(field.annotation)
        if inner is None or name in elsewhere or field.default is None:
            keys[prefix + name] = in_words(field)
        if inner is not None and name not in elsewhere:
            keys |= defaults(inner, elsewhere, f"{prefix}{name}.")
    return keys


def listed(page: str) -> dict[str, str]:
    """Keys and defaults in the page's first table of keys."""
    text = (ROOT / "docs" / page).read_text()
    table = text[text.index("| key | default | meaning |") :].partition("\n\n")[0]
    return dict(re.findall(r"^\| `([\w.]+)` \| (.+?) \|", table, re.M))


def test_the_tables_of_keys_are_the_schemas() -> None:
    families: dict[str, str] = {}
    for name in plugins.names("backbones"):
        families |= defaults(plugins.description("backbones", name), set(), "backbone.")
    # One default of `backbone.frame_rate` is in the table and the other in words.
    families |= defaults(plugins.description("backbones", "ltx"), set(), "backbone.")
    assert listed("recipes.md") == families | defaults(Recipe, {"align"})
    assert listed("objectives.md") == defaults(Align, {"loss", "encoder"})


def test_what_may_change_when_a_run_continues_is_listed() -> None:
    text = (ROOT / "docs" / "running.md").read_text()
    paragraph = text[text.index("**What may change.**") :].partition("\n\n")[0]
    keys = [key for key in (*FREE_TO_CHANGE, *DIVISION) if not key.startswith("parallel.")]
    assert not [key for key in keys if f"`{key}`" not in paragraph]


def test_the_extension_guides_plugins_work_from_outside(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    """A loss and an encoder, one file each, in a folder that is not the package's."""
    for code in blocks(ROOT / "docs" / "extending.md", "python"):
        name = code.splitlines()[0].removeprefix("# ")
        path = tmp_path / "plugins" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    monkeypatch.setenv(plugins.SEARCH_PATH, str(tmp_path / "plugins"))
    for kind in (losses, encoders):  # No other test is to find them.
        monkeypatch.setattr(kind, "__path__", [*kind.__path__])
    own = recipe.override(
        "encoder={name: patches, frames: 8, height: 16, width: 16}",
        "align.loss={name: distance, scale: 2.0}",
        "align.teacher=online",
    )
    assert inspect(own).contract.terms["distance"].target.size == (8, 2, 2)
    grid = own.encoder.load(torch.device("cpu"))(torch.full((1, 9, 3, 16, 16), 0.485))
    torch.testing.assert_close(grid.tokens[..., 0], torch.zeros(1, 8, 2, 2), atol=1e-6, rtol=0)
    from videorepa.prepare import prepare

    prepare(own)
    run = train(own, tmp_path / "run")
    assert run.trained().step == own.optim.steps
    assert Recipe.from_yaml(run.path / "recipe.yaml") == own


@pytest.mark.slow
def test_what_trainings_take_on_a_gpu_is_what_the_command_prints(capsys) -> None:
    runpy.run_path(str(ROOT / "timings" / "gpu_memory.py"), run_name="__main__")
    page = (ROOT / "docs" / "running.md").read_text()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) > 10 and not [line for line in lines if line not in page]
