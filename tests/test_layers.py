"""The rooms rest only on those below them, and the linter that says so would notice if not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the package's modules, in which a test may plant an import."""
    package = ROOT / "src" / "videorepa"
    for module in package.rglob("*.py"):
        target = tmp_path / "videorepa" / module.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, target)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def lint(sources: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    return subprocess.run(
        [*command, "--no-cache"],
        cwd=sources,
        env=os.environ | {"PYTHONPATH": str(sources)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_layers_hold(sources: Path) -> None:
    found = lint(sources)
    assert found.returncode == 0, found.stdout
    assert "1 kept, 0 broken" in found.stdout


@pytest.mark.parametrize(
    ("module", "planted"),
    [
        ("system/files.py", "import videorepa.recipe"),
        ("benchmarks/lab.py", "from videorepa.lab import datasets"),
        ("encoders/dinov2.py", "from videorepa.losses.cosine import Cosine"),
        ("train.py", "from videorepa.generate import generate"),
    ],
    ids=["upward", "lab", "sideways", "verb"],
)
def test_a_forbidden_import_is_found(sources: Path, module: str, planted: str) -> None:
    path = sources / "videorepa" / module
    path.write_text(f"{path.read_text()}\n\n{planted}\n")
    found = lint(sources)
    assert found.returncode == 1
    name = f"videorepa.{module.removesuffix('.py').replace('/', '.')}"
    assert f"{name} -> {planted.split()[1]}" in found.stdout


def test_a_room_without_a_place_is_found(sources: Path) -> None:
    room = sources / "videorepa" / "utils"
    room.mkdir()
    (room / "__init__.py").write_text("")
    found = lint(sources)
    assert found.returncode == 1 and "utils" in found.stdout
