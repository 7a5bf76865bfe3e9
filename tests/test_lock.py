"""Two processes on one folder: the second says who works there, and a killed one is no obstacle."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file

from faults.pairs import SAYS_WHO
from test_bad_input import lora_weights
from videorepa.artifacts.run import Run
from videorepa.cli import main
from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.system import lock
from videorepa.system.files import atomic_folder, is_vacant
from videorepa.system.lock import locked, sole_user

HOLD = """
import sys, time
from pathlib import Path
from videorepa.system.lock import sole_user
with sole_user(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_second_is_told_who_works_there_and_a_kill_frees_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(
                UserError, match=rf"{out} is in use by process {holder.pid} on \S+ since"
            ),
            sole_user(out),
        ):
            pass
        with sole_user(out, ".shard-1-of-2.lock"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert [path.name for path in out.iterdir()] == [".lock"] and is_vacant(out)
    with sole_user(out):
        pass
    assert not list(out.iterdir())


def test_of_many_at_once_one_is_in_at_a_time(tmp_path: Path) -> None:
    """Also while each removes the file that the next may have opened already."""
    inside, most, entries = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, entries
        own = 0
        while own < 10:
            try:
                with locked(tmp_path / ".lock", tmp_path):
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0.0002)
                    inside -= 1
                    own += 1
                    entries += 1
            except UserError as error:
                assert SAYS_WHO.search(str(error))
                time.sleep(0.0001)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, entries) == (1, 40) and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has locks everywhere")
def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch, capsys) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with sole_user(tmp_path / "out"):
        pass
    assert "has no locks" in " ".join(capsys.readouterr().err.split())
    with locked(tmp_path / ".lock", tmp_path, wait=True):  # Work that is then only slower.
        pass
    assert not capsys.readouterr().err


def test_of_two_that_make_a_folder_the_second_refuses(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as staged:
        (staged / "a").write_text("a")
        with pytest.raises(UserError, match=r"out is in use by process"), atomic_folder(out):
            pass
        assert (staged / "a").exists()
    with pytest.raises(UserError, match="exists already"), atomic_folder(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("held", "arguments"),
    [
        ("out/.lock", ["train", "recipe.yaml", "--out", "out"]),
        ("out/.lock", ["demo", "--quick", "--out", "out"]),
        ("out/.shard-0-of-1.lock", ["lab", "study", "--out", "out"]),
        (".out.lock", ["export", "run", "out"]),
        (".out.lock", ["import", "lora.safetensors", "out", "--alpha", "4"]),
    ],
    ids=["train", "demo", "study", "export", "import"],
)
def test_a_verb_refuses_a_folder_that_is_in_use(
    held: str, arguments: list[str], recipe: Recipe, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe.to_yaml(Path("recipe.yaml"))
    save_file(lora_weights(), "lora.safetensors")
    Run(Path("run")).begin(recipe, {}, resumed=False)
    Path(held).parent.mkdir(exist_ok=True)
    with locked(Path(held), Path("out")):
        before = sorted(tmp_path.rglob("*"))
        assert main(arguments) == 1
        assert sorted(tmp_path.rglob("*")) == before, "it leaves all to the other process"
    said = capsys.readouterr().err
    assert f"out is in use by process {os.getpid()} on" in said and SAYS_WHO.search(said)


def test_two_shards_of_a_study_may_work_at_once(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    (out / "thesis.txt").parent.mkdir()
    (out / "thesis.txt").write_text("precious")
    with sole_user(out, ".shard-0-of-2.lock"):
        assert main(["lab", "study", "--out", str(out), "--shard", "1/2"]) == 1
    assert "is not a study" in capsys.readouterr().err, "the lock lets it come that far"
