"""Bad input to every verb: a plain error, an exit code, nothing damaged, the other clips done."""

from __future__ import annotations

import csv
import errno
import hashlib
import importlib
import json
import os
import pickle
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from conftest import recipe_values, write_clips
from videorepa.artifacts import checkpoint
from videorepa.cli import VERBS, main
from videorepa.data.manifest import Prompt
from videorepa.data.video import write_video
from videorepa.errors import UserError
from videorepa.evaluate import evaluate
from videorepa.generate import generate
from videorepa.head import train_head
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.scan import scan
from videorepa.settings import plugins
from videorepa.system import environment
from videorepa.system.files import atomic_folder, parse_json
from videorepa.train import train

with tempfile.NamedTemporaryFile() as _locked:
    os.chmod(_locked.name, 0)
    as_root = os.access(_locked.name, os.R_OK)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with the digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@dataclass(frozen=True)
class Ready:
    """A prepared cache, a trained run and generated clips, which no test may change."""

    root: Path

    @property
    def recipe(self) -> str:
        return str(self.root / "recipe.yaml")

    @property
    def prompts(self) -> str:
        return str(self.root / "prompts.txt")

    @property
    def run(self) -> Path:
        return self.root / "run"

    def copy(self, what: str, to: Path) -> Path:
        return shutil.copytree(self.root / what, to / what)


@pytest.fixture(scope="module")
def made(twins: dict[str, Path], clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    ready = Ready(tmp_path_factory.mktemp("ready"))
    recipe = Recipe.parse(recipe_values(twins, clips, ready.root / "cache"))
    recipe.override("optim.steps=4", "generation.steps=1").to_yaml(ready.recipe)
    Path(ready.prompts).write_text("A ball falls.\nA box slides.\n")
    generated = str(ready.root / "generated")
    assert main(["prepare", ready.recipe]) == 0
    assert main(["train", ready.recipe, "--out", str(ready.run)]) == 0
    assert main(["generate", str(ready.run), "--prompts", ready.prompts, "--out", generated]) == 0
    return ready


@pytest.fixture
def ready(made: Ready, clips: Path) -> Iterator[Ready]:
    before = tree(made.root), tree(clips.parent)
    yield made
    assert (tree(made.root), tree(clips.parent)) == before, "what was there has been damaged"


Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path) -> Fails:
    """Runs a verb that must fail plainly; gives what it said, in one line.

    An exception that is not caught would come through here: so there is no traceback either.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any, says: str) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        said = " ".join(capsys.readouterr().err.split())
        assert code == 1, f"exit code {code} with: {said}"
        assert "error: " in said and "Traceback" not in said
        assert re.search(says, said), said
        return said

    return run


def command(verb: str, recipe: Any, ready: Ready, out: Path) -> list[Any]:
    """The verb's command line for a recipe, writing into `out` alone."""
    extra: dict[str, list[Any]] = {
        "train": ["--out", out],
        "generate": ["--prompts", ready.prompts, "--out", out],
    }
    return [verb, recipe, *extra.get(verb, [])]


# The command line itself.


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_given_and_shows_commands_one_a_line(verb: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    assert re.search(rf"^\s*videorepa {verb}\b", said, re.MULTILINE), said
    assert said.index("For example:") < said.index(f"  videorepa {verb}")


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "a.yaml", "--no"]])
def test_a_wrong_command_line_is_refused(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code not in (0, None)
    out, err = capsys.readouterr()
    assert out + err and "Traceback" not in out + err


def test_overrides_arrive_typed_and_in_order(ready: Ready, monkeypatch) -> None:
    seen: list[Recipe] = []
    module = importlib.import_module("videorepa.inspect")
    monkeypatch.setattr(module, "inspect", lambda recipe, device: seen.append(recipe) or "")
    arguments = [
        *["--align.weight", "0.45", "--align.loss.margin=0.2", "--set", "seed=5"],
        *["--optim.betas", "[0.8, 0.99]", "--optim.warmup-steps", "0", "--set", "name=other"],
        *["--data.manifest", "null", "--data.lab.clips=3", "--data.lab.seed", "7"],
        *["--train.lora", "{rank: 2, alpha: 4}", "--train.lora.targets=[to_q]", "--set=seed=6"],
    ]
    assert main(["inspect", ready.recipe, *arguments]) == 0
    assert main(["inspect", *arguments, ready.recipe]) == 0
    assert seen[0] == seen[1]
    found = seen[0]
    assert found.align and found.data.lab and found.train.lora
    assert (found.align.weight, found.align.loss.model_dump()["margin"]) == (0.45, 0.2)
    assert (found.seed, found.name) == (6, "other")
    assert (found.optim.betas, found.optim.warmup_steps) == ((0.8, 0.99), 0)
    assert (found.data.manifest, found.data.lab.clips, found.data.lab.seed) == (None, 3, 7)
    assert (found.train.lora.rank, found.train.lora.targets) == (2, ("to_q",))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--optim.stesp", "3"], "optim.stesp: unknown key; did you mean steps"),
        (["--algin.weight", "3"], "algin: unknown key; did you mean align"),
        (["--align.weight", "-0.5"], r"align.weight: .*greater than or equal to 0.*\(found -0.5\)"),
        (["--align.weight", "heavy"], r"align.weight: .*number.*\(found 'heavy'\)"),
        (["--optim.steps=1.5"], "optim.steps: .*integer"),
        (["--optim.betas", "[0.9, 1.5]"], "optim.betas.1: .*less than 1"),
        (["--align.loss.margin", ".nan"], "margin: .*finite"),
        (["--optim.learning_rate", ".inf"], "optim.learning_rate: .*finite"),
        (["--align.loss.name", "relatoin"], "No losse? is called 'relatoin'.*relation"),
        (["--encoder.name", "videomea"], "No encoder is called 'videomea'. Did you mean videomae"),
        (["--backbone.name", "cogvideo"], "No backbone is called 'cogvideo'.*cogvideox"),
        (["--encoder.fames", "8"], "fames: unknown key; did you mean frames"),
        (["--optim.batch_size", "1000000000"], "batch_size: .*less than or equal to 10000 "),
        (["--data.height", "640000"], r"height: .*less than or equal to 10000 \(found 640000\)"),
        (["--data.height", "7"], r"height: .*greater than or equal to 8 \(found 7\)"),
        (["--data.frames", "1000000001"], "data.frames: .*less than or equal to 10000 "),
        (["--data.lab={clips: 3, seed: -1}"], "data.lab.seed: .*greater than or equal to 0"),
        (["--set", f"seed={2**63}"], "seed: .*less than"),
        (["--set", f"seed={'9' * 5000}"], "a number has 5,000 characters"),
        (["--align.hidden", "1000000000"], "align.hidden: .*less than or equal to 16384 "),
        (["--encoder.frames", "1000000000"], "frames: .*less than or equal to 10000 "),
        (["--train.lora.rank", "1000000000"], "train.lora.rank: .*less than or equal to 16384 "),
        (["--generation.steps", "5000"], "generation.steps: .*less than or equal to 1000 "),
        (["--device", "tpu"], "There is no device 'tpu'; expected cpu, cuda"),
        (["--device", "meta"], "There is no device 'meta'; expected cpu, cuda"),
        (["--align.weight", "[1"], "align.weight=.*not YAML.*quotes"),
        (["--align.weight", "!!python/name:os.system"], "not YAML"),
        (["--align.weight"], "--align.weight needs a value"),
        (["--align.weight", "--out"], "--align.weight needs a value"),
        (["--align.weight.deep", "1"], "goes through a single value, at 'deep'"),
        (["--set", "seed"], "key=value"),
        (["--set", "="], "key=value.*got '='"),
        (["--set", "=3"], "key=value.*got '=3'"),
        (["--set", "align..weight=1"], "key=value"),
        (["--data.manifest", "null"], "exactly one of `manifest` and `lab`"),
        (["--encoder", "null"], "missing|needs `encoder`"),
        (["--set", "encoder=null"], "needs `encoder`"),
    ],
)
def test_a_wrong_override_is_refused(ready: Ready, fails: Fails, given, says: str) -> None:
    if given[0] == "--encoder":
        with pytest.raises(SystemExit):  # Without a dot it is an option, and there is none.
            main(["inspect", ready.recipe, *given])
        return
    fails("inspect", ready.recipe, *given, says=says)


# Recipes.

BROKEN_RECIPES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "There is no recipe .*recipes/"),
    "empty": (b"", "holds NoneType; expected keys and values"),
    "a list": (b"- 1\n- 2\n", "holds list; expected keys and values"),
    "not YAML": (b"name: [tiny\n", "cannot be read as YAML"),
    "not text": (b"\x80\xff\x00\x01", "cannot be read as YAML"),
    "deep": (b"[" * 3000, "cannot be read as YAML"),
    "no keys": (b"name: tiny\n", "(?s)backbone: missing.*data: missing.*optim: missing"),
    "keys that are no text": (b"1: 2\n", "is not a recipe"),
}


def broken_recipe(kind: str, folder: Path) -> tuple[Path, str]:
    """The recipe of a kind, written unless it is the missing one, and what is said of it."""
    content, says = BROKEN_RECIPES[kind]
    path = folder / "broken.yaml"
    if content is not None:
        path.write_bytes(content)
    return path, says


@pytest.mark.parametrize("verb", ["prepare", "train", "inspect", "generate"])
@pytest.mark.parametrize("kind", BROKEN_RECIPES)
def test_a_file_that_is_no_recipe(
    ready: Ready, fails: Fails, tmp_path: Path, verb: str, kind: str
) -> None:
    path, says = broken_recipe(kind, tmp_path)
    if not path.exists() and verb == "generate":
        says = "broken.yaml does not exist; expected a run, a recipe or a diffusers folder"
    fails(*command(verb, path, ready, tmp_path / "out"), says=says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["ship", "study"])
@pytest.mark.parametrize("kind", BROKEN_RECIPES)
def test_a_file_that_is_no_recipe_of_the_lab(
    fails: Fails, tmp_path: Path, part: str, kind: str
) -> None:
    path, says = broken_recipe(kind, tmp_path)
    if kind == "no keys":
        says = "is not a recipe (for ship|of a study): .*(run|recipe): missing"
    out = ("--out", tmp_path / "out") if part == "study" else ()
    fails("lab", part, path, *out, says=says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        ("contact", "train: 4, test: 2, seed: -1", "seed: .*greater than or equal to 0"),
        ("contact", "train: 3, test: 2", "train: .*multiple of 2"),
        ("phyworld", "clips: 1000000000", "clips: .*less than or equal to 1000000 "),
        ("teacher", "layers: 10000000", "layers: .*less than or equal to 1000 "),
        ("image-teacher", "width: 64, heads: 5", "heads must divide width"),
        ("image-teacher", "patch: 5", "patch must divide 64"),
        ("text-encoder", "steps: 0", "steps: .*greater than or equal to 1"),
        ("autoencoder", "stages: [{steps: 1, frames: 99, size: 8, batch: 1}]", "frames: .*less"),
    ],
)
def test_sizes_that_no_part_of_the_lab_can_have(
    fails: Fails, tmp_path: Path, part: str, values: str, says: str
) -> None:
    (tmp_path / "r.yaml").write_text(f"{{out: {tmp_path / 'out'}, {values}}}")
    fails("lab", part, tmp_path / "r.yaml", says=says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["prepare", "train", "inspect"])
def test_a_folder_in_place_of_a_recipe(ready: Ready, fails: Fails, tmp_path: Path, verb) -> None:
    fails(*command(verb, tmp_path, ready, tmp_path / "out"), says="cannot be read: is a folder")


@pytest.mark.parametrize("tag", ["python/object/apply:os.system", "python/object/new:os.system"])
@pytest.mark.parametrize("verb", ["prepare", "train", "inspect", "generate"])
def test_code_in_a_recipe_is_not_run(
    ready: Ready, fails: Fails, tmp_path: Path, verb: str, tag: str
) -> None:
    path, proof = tmp_path / "evil.yaml", tmp_path / "proof"
    path.write_text(Path(ready.recipe).read_text() + f"remark: !!{tag} ['touch {proof}']\n")
    fails(*command(verb, path, ready, tmp_path / "out"), says="cannot be read as YAML.*python")
    assert not proof.exists()


@pytest.mark.skipif(as_root, reason="root may read everything")
@pytest.mark.parametrize("what", ["recipe.yaml", "prompts.txt", "cache/fingerprint.json"])
def test_files_that_may_not_be_read(ready: Ready, fails: Fails, tmp_path: Path, what: str) -> None:
    own = Path(shutil.copytree(ready.root, tmp_path / "own"))
    (own / what).chmod(0)
    verb = "train" if "cache" in what else "generate"
    arguments = command(verb, own / "recipe.yaml", Ready(own), tmp_path / "out")
    if verb == "train":
        arguments += ["--data.cache", own / "cache"]
    fails(*arguments, says="[Pp]ermission denied")


@pytest.mark.skipif(as_root, reason="root may write everywhere")
@pytest.mark.parametrize("verb", ["train", "generate", "prepare"])
def test_folders_that_may_not_be_written(ready: Ready, fails: Fails, tmp_path: Path, verb) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    arguments = command(verb, ready.recipe, ready, locked / "out")
    if verb == "prepare":
        arguments += ["--data.cache", locked / "cache"]
    fails(*arguments, says="Permission denied.*another place")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--data.height", "18"], "multiples of 8; .*18x16. Try 16x16"),
        (["--data.width", "30"], "multiples of 8; .*16x30. Try 16x32"),
        (["--data.frames", "10", "--encoder.frames", "8"], r"1 \+ 4k frames; .*10. Try 9"),
        (["--encoder.height", "20"], "sizes in multiples of 8; .*8x20x16"),
        (["--encoder.frames", "7"], "frames in multiples of 2.*7x16x16"),
        (["--encoder.frames", "12"], "takes 12 frames and the clip has 9. Lower encoder.frames"),
        (["--align.block", "4"], "taps block 4, counted from 1; .* has 3 blocks"),
        (["--backbone.weights", "nowhere/at/all"], "nothing at nowhere/at/all; expected a file"),
        (["--backbone.weights", "org/name"], "org/name is not on this machine"),
        (["--encoder.weights", "./nowhere"], "nothing at ./nowhere|no readable config.json"),
    ],
)
@pytest.mark.parametrize("verb", ["inspect", "prepare", "train"])
def test_sizes_and_models_that_cannot_meet(
    ready: Ready, fails: Fails, tmp_path: Path, verb: str, given: list[str], says: str
) -> None:
    cache = tmp_path / "cache"
    arguments = command(verb, ready.recipe, ready, tmp_path / "run")
    fails(*arguments, "--data.cache", cache, *given, says=says)
    assert not cache.exists() and not (tmp_path / "run").exists(), "refused too late"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os\ndef f(:\n", r"imported: SyntaxError: invalid syntax \(mine.py, line 2\)"),
        ("import os\nx = os.nothing\n", "imported in line 2: AttributeError: .*'nothing'"),
        ("from videorepa.encoders import Nothing\n", "imported in line 1: ImportError: .*Nothing"),
        ("import nothing_of_this_name\n", "imported in line 1: ModuleNotFoundError"),
        ("x = 1\n", "mine.py defines no description"),
    ],
)
def test_a_faulty_plugin_is_named_with_its_line(
    ready: Ready, fails: Fails, tmp_path: Path, monkeypatch, code: str, says: str
) -> None:
    (tmp_path / "encoders").mkdir()
    (tmp_path / "encoders/mine.py").write_text(code)
    path = list(importlib.import_module("videorepa.encoders").__path__)
    monkeypatch.setattr("videorepa.encoders.__path__", path)
    monkeypatch.setenv(plugins.SEARCH_PATH, str(tmp_path))
    monkeypatch.delitem(sys.modules, "videorepa.encoders.mine", raising=False)
    fails("inspect", ready.recipe, "--encoder.name", "mine", says=says)


# Manifests and videos.

BROKEN_MANIFESTS: dict[str, tuple[str | None, str]] = {
    "missing": (None, "clips.csv does not exist"),
    "empty": ("", "holds no rows"),
    "header alone": ("video,caption\n", "holds no rows"),
    "double id": ("video,caption\nclip0.mp4,a\nclip0.mp4,b\n", "lines 2 and 3.*'clip0.mp4'"),
    "no caption": ("video,text\nclip0.mp4,a\n", "expected 'caption'"),
    "empty caption": ("video,caption\nclip0.mp4,\n", "line 2: 'caption' is empty"),
    "open quote": ('video,caption\nclip0.mp4,"a\n', "not valid CSV"),
    "absolute": ("video,caption\n/etc/passwd,a\n", "leads out of the root.*name a root"),
    "upwards": ("video,caption\n../clip0.mp4,a\n", "leads out of the root"),
    "symlink": ("video,caption\nlink/clip0.mp4,a\n", "leads out of the root"),
}


@pytest.mark.parametrize("verb", ["prepare", "train"])
@pytest.mark.parametrize("kind", BROKEN_MANIFESTS)
def test_a_broken_manifest(
    ready: Ready, clips: Path, fails: Fails, tmp_path: Path, verb: str, kind: str
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "link").symlink_to(clips.parent)
    content, says = BROKEN_MANIFESTS[kind]
    if content is not None:
        (own / "clips.csv").write_text(content)
    arguments = command(verb, ready.recipe, ready, tmp_path / "run")
    fails(*arguments, "--data.manifest", own / "clips.csv", says=says)


def test_bad_videos_cost_themselves_alone(ready: Ready, fails: Fails, tmp_path: Path) -> None:
    manifest = write_clips(tmp_path / "own", count=8)
    own = manifest.parent
    sound = (own / "clip6.mp4").read_bytes()
    (own / "clip1.mp4").write_bytes(b"")
    (own / "clip2.mp4").write_bytes((own / "clip2.mp4").read_bytes()[:600])
    (own / "clip3.mp4").unlink()
    (own / "clip4.mp4").unlink()
    (own / "clip4.mp4").mkdir()
    (own / "clip6.mp4").write_text("not a video")
    # A reader would wait for a writer here, for ever.
    (own / "clip5.mp4").unlink()
    os.mkfifo(own / "clip5.mp4")
    changes = ["--data.manifest", manifest, "--data.cache", tmp_path / "cache"]
    for _ in range(2):
        said = fails("prepare", ready.recipe, *changes, says="6 clips cannot be used")
        for name, reason in {
            "clip1": "is empty",
            "clip2": "clip2.mp4",
            "clip3": "does not exist",
            "clip4": "is a folder, not a file",
            "clip5": "is a pipe",
            "clip6": "cannot be opened as a video",
        }.items():
            assert re.search(rf"'{name}.mp4': [^']*({reason})", said), (name, said)
        assert len(list((tmp_path / "cache" / "clips").iterdir())) == 2
    assert main([*map(str, ["train", ready.recipe, "--out", tmp_path / "run", *changes])]) == 0
    # A clip that is mended is taken in, and stays when its video is away.
    (own / "clip6.mp4").write_bytes(sound)
    fails("prepare", ready.recipe, *changes, says="5 clips cannot be used")
    (own / "clip6.mp4").unlink()
    fails("prepare", ready.recipe, *changes, says="5 clips cannot be used")
    assert len(list((tmp_path / "cache" / "clips").iterdir())) == 3
    assert len(list((tmp_path / "cache" / "failures").iterdir())) == 5


def test_no_usable_video_at_all(ready: Ready, fails: Fails, tmp_path: Path) -> None:
    manifest = tmp_path / "clips.csv"
    manifest.write_text("video,caption\nnone.mp4,a\n")
    changes = ["--data.manifest", manifest, "--data.cache", tmp_path / "cache"]
    fails("prepare", ready.recipe, *changes, says="1 clip cannot be used.*'none.mp4'")
    says = "nothing to train on: 1 of 1 clips failed in `prepare`.*'none.mp4'"
    fails("train", ready.recipe, *changes, says=says)


def test_captions_of_any_kind_work_and_name_no_file(ready: Ready, tmp_path: Path) -> None:
    captions = [
        "First line\nsecond line\r\nthird",
        "She said \"fall\", 'roll' and `stop`; $(touch x) && ../../up/and/away",
        "🎈🏀 ein Ball fällt — 球落下 \u2028 \u202e",
        "A very long tale of it. " * 500,
    ]
    assert len(captions[-1]) > 10_000
    write_clips(tmp_path / "own", count=len(captions))
    manifest = tmp_path / "own" / "clips.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "video", "caption"])
        rows.writerows([c, f"clip{i}.mp4", c] for i, c in enumerate(captions))
    changes = ["--data.manifest", manifest, "--data.cache", tmp_path / "cache"]
    out = tmp_path / "generated"
    for arguments in (
        ["prepare", ready.recipe, *changes],
        ["train", ready.recipe, *changes, "--out", tmp_path / "run"],
        ["generate", tmp_path / "run", "--prompts", manifest, "--out", out],
    ):
        assert main([str(argument) for argument in arguments]) == 0
    names = [path.name for path in tmp_path.rglob("*")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,80}", name) for name in names), names
    words = [word for caption in captions for word in re.findall(r"\w{4,}", caption)]
    assert not [name for name in names for word in words if word.lower() in name.lower()]
    told = {json.loads(path.read_text("utf-8"))["prompt"] for path in out.glob("[!g]*.json")}
    told |= {json.loads(path.read_text("utf-8")).get("prompt") for path in out.glob("g*.json")}
    assert set(captions) <= told


# Teachers and base models.


class Evil:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("layout", ["torch", "pickle", "folder"])
@pytest.mark.parametrize("verb", ["inspect", "prepare"])
def test_code_in_a_teacher_is_not_run(
    ready: Ready, twins, fails: Fails, tmp_path: Path, verb: str, layout: str
) -> None:
    proof, teacher = tmp_path / "proof", tmp_path / "teacher.pth"
    if layout == "folder":
        shutil.copytree(twins["teacher"], teacher)
        (teacher / "model.safetensors").unlink()
        torch.save({"weight": Evil(proof)}, teacher / "pytorch_model.bin")
    elif layout == "torch":
        torch.save({"model": {"patch_embed.proj.weight": Evil(proof)}}, teacher)
    else:
        teacher.write_bytes(pickle.dumps(Evil(proof)))
    arguments = [ready.recipe, "--encoder.weights", teacher, "--data.cache", tmp_path / "cache"]
    if (verb, layout) == ("inspect", "folder"):
        assert main(["inspect", *map(str, arguments)]) == 0  # It loads no weights.
    else:
        fails(verb, *arguments, says="cannot be read as plain weights|could not be loaded")
    assert not proof.exists()
    pickle.loads(pickle.dumps(Evil(proof)))
    assert proof.exists(), "the pickle would have left its proof"


def original_weights() -> dict[str, torch.Tensor]:
    """Some of a VideoMAE in the original files' names, not all."""
    return {
        "patch_embed.proj.weight": torch.zeros(24, 3, 2, 8, 8),
        "patch_embed.proj.bias": torch.zeros(24),
        "blocks.0.mlp.fc1.weight": torch.zeros(48, 24),
        "blocks.0.norm1.weight": torch.zeros(25),
        "blocks.0.layer_scale": torch.zeros(24),
    }


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (original_weights(), r"missing: .*fc1|(?=.*missing: .*intermediate.dense.bias)"),
        (original_weights(), r"extra: blocks.0.layer_scale"),
        (original_weights(), r"misshapen: .*layernorm_before.weight \(25,\), expected \(24,\)"),
        ({"conv1.weight": torch.zeros(3)}, "no patch_embed.proj.weight.*conv1.weight"),
        ({"patch_embed.proj.weight": torch.zeros(24, 3, 8, 8)}, "a 4-dimensional patch_embed"),
        ({1: torch.zeros(1)}, "not a VideoMAE checkpoint"),
        ([torch.zeros(1)], "holds no table of weights"),
        (b"", "cannot be read as plain weights"),
        (b"PK\x03\x04 and then nothing", "cannot be read as plain weights"),
    ],
)
def test_a_teacher_file_of_another_model(
    ready: Ready, fails: Fails, tmp_path: Path, content: Any, says: str
) -> None:
    path = tmp_path / "teacher.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    arguments = ["--encoder.weights", path, "--data.cache", tmp_path / "cache"]
    fails("prepare", ready.recipe, *arguments, says=says)


@pytest.mark.parametrize("fault", ["missing", "misshapen", "type", "truncated", "config"])
def test_a_teacher_folder_of_another_model(
    ready: Ready, twins, fails: Fails, tmp_path: Path, fault: str
) -> None:
    folder = shutil.copytree(twins["teacher"], tmp_path / "teacher")
    path, config = folder / "model.safetensors", folder / "config.json"
    weights = load_file(path)
    key = next(key for key in weights if key.endswith("layernorm_before.weight"))
    says = f"{fault}: .*{key}"
    if fault == "missing":
        weights["other.weight"] = weights.pop(key)
        says += ".*extra: other.weight"
    elif fault == "misshapen":
        weights[key] = torch.zeros(25)
        says += r" \(25,\), expected \(24,\)"
    save_file(weights, path, {"format": "pt"})
    if fault == "type":
        config.write_text(config.read_text().replace('"videomae"', '"dinov2"'))
        says = "holds a 'dinov2' model"
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
        says = "could not be loaded.*Compare the folder"
    elif fault == "config":
        config.write_text("{")
        says = "no readable config.json"
    arguments = ["--encoder.weights", folder, "--data.cache", tmp_path / "cache"]
    fails("prepare", ready.recipe, *arguments, says=says)


@pytest.mark.parametrize("fault", ["missing", "truncated", "index", "kind", "config"])
@pytest.mark.parametrize("verb", ["train", "generate"])
def test_a_broken_base_model(
    ready: Ready, twins, fails: Fails, tmp_path: Path, verb: str, fault: str
) -> None:
    folder = shutil.copytree(twins["backbone"], tmp_path / "backbone")
    index, part = folder / "model_index.json", folder / "transformer"
    path = next(part.glob("*.safetensors"))
    if fault == "missing":
        weights = load_file(path)
        del weights["proj_out.weight"]
        save_file(weights, path, {"format": "pt"})
        says = "does not fit CogVideoXTransformer3DModel; missing: proj_out.weight. Copy"
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
        says = "could not be loaded.*Compare the folder"
    elif fault == "index":
        index.unlink()
        says = "no model_index.json"
    elif fault == "kind":
        index.write_text(index.read_text().replace("CogVideoXPipeline", "WanPipeline"))
        says = "holds a WanPipeline; .* CogVideoXPipeline"
    else:
        (part / "config.json").write_text("[}")
        says = "config.json cannot be read as a model's configuration"
    recipe = tmp_path / "own.yaml"
    Recipe.from_yaml(ready.recipe, [f"backbone.weights={folder}"]).to_yaml(recipe)
    fails(*command(verb, recipe, ready, tmp_path / "out"), says=says)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, b"\xff", ""])
def test_json_that_is_none_is_refused_in_one_way(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        ("transformer", {"num_layers": 10_000_000}, "'num_layers' is 10000000; no model .* 1,000"),
        ("transformer", {"num_layers": None}, "describes no CogVideoXPipeline .*TypeError"),
        ("transformer", {"patch_size": 0}, "describes no CogVideoXPipeline .*ZeroDivision"),
        ("transformer", {"in_channels": 10**11}, "'in_channels' is 100000000000; no model"),
        ("transformer", {"attention_head_dim": 10**9}, "describes no CogVideoXPipeline .*overflow"),
        ("transformer", "[" * 100_000, "config.json cannot be read .* nested too deep"),
        ("vae", {"layers_per_block": [600, 600]}, r"'layers_per_block' is \[600, 600\]; no model"),
        ("vae", {"block_out_channels": 7}, "describes no CogVideoXPipeline .*TypeError"),
        ("text_encoder", {"num_layers": 10_000_000}, "'num_layers' is 10000000; no model"),
        ("teacher", {"num_hidden_layers": 10_000_000}, "'num_hidden_layers' is 10000000"),
        ("teacher", {"patch_size": 0}, "a token of no size"),
        ("teacher", "[" * 100_000, "no readable config.json: it is nested too deep"),
    ],
)
def test_configurations_of_no_model_are_refused_at_once(
    ready: Ready, twins, fails: Fails, tmp_path: Path, part: str, values: Any, says: str
) -> None:
    folder = shutil.copytree(twins["teacher" if part == "teacher" else "backbone"], tmp_path / "m")
    path = folder / ("" if part == "teacher" else part) / "config.json"
    if isinstance(values, dict):
        values = json.dumps(json.loads(path.read_text()) | values)
    path.write_text(values)
    key = "encoder" if part == "teacher" else "backbone"
    verb = "prepare" if part == "text_encoder" else "inspect"
    arguments = [f"--{key}.weights", folder, "--data.cache", tmp_path / "cache"]
    begun = time.process_time()
    fails(verb, ready.recipe, *arguments, says=says)
    assert time.process_time() - begun < 10
    assert verb == "prepare" or not (tmp_path / "cache").exists()


# Runs and checkpoints.


def test_a_run_of_another_recipe_is_not_overwritten(ready: Ready, fails: Fails) -> None:
    arguments = ["--out", ready.run, "--optim.learning_rate", "0.5", "--set", "seed=9"]
    says = "another recipe; they differ in optim.learning_rate, seed. Choose another folder"
    fails("train", ready.recipe, *arguments, says=says)


@pytest.mark.parametrize("verb", ["train", "generate"])
def test_a_folder_of_something_else_is_not_written_into(
    ready: Ready, fails: Fails, tmp_path: Path, verb: str
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("x")
    for out in (theirs, theirs / "thesis.tex"):
        says = "exists and (is not a (run|folder)|does not)"
        fails(*command(verb, ready.recipe, ready, out), says=says)
    below = theirs / "thesis.tex" / "below"
    fails(*command(verb, ready.recipe, ready, below), says="(?i)not a directory|file exists")
    assert tree(tmp_path) == {"theirs/thesis.tex": hashlib.sha256(b"x").hexdigest()}


def test_a_cache_folder_of_something_else_is_not_written_into(
    ready: Ready, fails: Fails, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    fails("prepare", ready.recipe, "--data.cache", tmp_path, says="is not a cache. Choose another")
    fails("train", ready.recipe, "--data.cache", tmp_path / "no", says="Run `videorepa prepare`")
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_start_that_fails_does_not_block_the_next(
    ready: Ready, fails: Fails, tmp_path: Path
) -> None:
    arguments = command("train", ready.recipe, ready, tmp_path / "run")
    fails(*arguments, "--data.cache", tmp_path / "wrong", says="There is no cache")
    assert main([str(argument) for argument in arguments]) == 0


def put_other_weights(run: Path) -> None:
    """Leave whole checkpoints of a narrower model in a run."""
    for folder in (run / "checkpoints").iterdir():
        path = folder / "trained.safetensors"
        save_file({key: value[:1].clone() for key, value in load_file(path).items()}, path)
        state = json.loads((folder / "state.json").read_text())
        state["sizes"][path.name] = path.stat().st_size
        del state["digests"], state["digest"]  # As checkpoints were once.
        (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("verb", ["train", "generate", "export"])
def test_a_checkpoint_of_another_model(
    ready: Ready, fails: Fails, tmp_path: Path, verb: str
) -> None:
    run = ready.copy("run", tmp_path)
    put_other_weights(run)
    if verb == "train":  # A finished run is left as it is.
        shutil.rmtree(run / "checkpoints" / "step-00000004")
    before = tree(run / "checkpoints")
    arguments = {
        "train": ["train", ready.recipe, "--out", run],
        "generate": ["generate", run, "--prompts", ready.prompts, "--out", tmp_path / "out"],
        "export": ["export", run, tmp_path / "out"],
    }[verb]
    fails(*arguments, says=r"of another model; misshapen: .*, expected \(")
    assert tree(run / "checkpoints") == before


@pytest.mark.parametrize("fault", ["truncated", "state", "state is a list", "gone"])
def test_no_whole_checkpoint(ready: Ready, fails: Fails, tmp_path: Path, fault: str) -> None:
    run = ready.copy("run", tmp_path)
    for folder in (run / "checkpoints").iterdir():
        if fault == "truncated":
            path = folder / "trained.safetensors"
            path.write_bytes(path.read_bytes()[:-1])
        elif fault == "gone":
            shutil.rmtree(folder)
        else:
            (folder / "state.json").write_text("[]" if fault.endswith("list") else '{"step": ')
    says = (
        "has no checkpoint yet. Train it first" if fault == "gone" else "step-00000004 is damaged"
    )
    fails("export", run, tmp_path / "out", says=says)
    fails("generate", run, "--prompts", ready.prompts, "--out", tmp_path / "out", says=says)
    assert not (tmp_path / "out").exists()
    assert main(["train", ready.recipe, "--out", str(run)]) == 0
    for name in ("trained.safetensors", "projector.safetensors"):
        newest = Path("checkpoints", "step-00000004", name)
        assert (run / newest).read_bytes() == (ready.run / newest).read_bytes()


def test_a_checkpoint_that_would_run_code_is_named_without_advice_to_run_it(
    ready: Ready, tmp_path: Path, capsys
) -> None:
    run, proof = ready.copy("run", tmp_path), tmp_path / "proof"
    for folder in (run / "checkpoints").iterdir():
        torch.save({"step": Evil(proof)}, folder / "optimizer.pt")
        state = json.loads((folder / "state.json").read_text())
        state["sizes"]["optimizer.pt"] = (folder / "optimizer.pt").stat().st_size
        old = {key: value for key, value in state.items() if "digest" not in key}
        (folder / "state.json").write_text(json.dumps(old))
    says = "optimizer.pt cannot be read as plain weights .*a pickle that would run code"
    assert main(["export", str(run), str(tmp_path / "out")]) == 0, "which does not read it"
    assert main(["train", ready.recipe, "--out", str(run)]) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert re.search(says, said) and "weights_only" not in said and not proof.exists()


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("verb", ["export", "generate"])
@pytest.mark.parametrize("name", ["trained.safetensors", "state.json", "swapped"])
def test_a_checkpoint_of_the_right_sizes_and_other_content(
    ready: Ready, fails: Fails, tmp_path: Path, capsys, name: str, verb: str
) -> None:
    run = ready.copy("run", tmp_path)
    earlier, newest = sorted((run / "checkpoints").iterdir())
    if name == "swapped":
        name = "trained.safetensors"
        shutil.copyfile(earlier / name, newest / name)
    elif name == "state.json":
        text = (newest / name).read_text()
        assert '"batch": 4' in text
        (newest / name).write_text(text.replace('"batch": 4', '"batch": 5'))
    else:
        flip(newest / name, (newest / name).stat().st_size // 2)
    arguments = {
        "generate": ["generate", run, "--prompts", ready.prompts, "--out", tmp_path / "out"],
        "export": ["export", run, tmp_path / "out"],
    }[verb]
    said = fails(*arguments, says=f"step-00000004 is damaged: {name} has other content")
    assert f"use the one of step {int(earlier.name[5:])}." in said
    assert not (tmp_path / "out").exists()
    if verb == "export":  # Once will do.
        assert main(["train", ready.recipe, "--out", str(run)]) == 0
        assert "passed over" in capsys.readouterr().err.replace("\n", " ")
        for file in ("trained.safetensors", "projector.safetensors"):
            ours, theirs = (path / "checkpoints" / newest.name / file for path in (run, ready.run))
            assert ours.read_bytes() == theirs.read_bytes()


def test_moments_are_read_by_who_goes_on_alone(tmp_path: Path) -> None:
    state = checkpoint.Checkpoint(6, {"a": torch.zeros(2)}, {"b": torch.zeros(1)}, {"c": [1.0]})
    folder = checkpoint.save(tmp_path, state, keep=1)
    flip(folder / "optimizer.pt", 100)
    found = checkpoint.at(tmp_path, 6, with_moments=False)
    assert found.optimizer == {} and found.trained.keys() == {"a"}
    with pytest.raises(UserError, match=r"damaged: optimizer\.pt has other content"):
        checkpoint.at(tmp_path, 6)


def test_a_checkpoint_under_another_steps_name(tmp_path: Path) -> None:
    state = checkpoint.Checkpoint(6, {"a": torch.zeros(2)}, {"b": torch.zeros(1)}, {})
    checkpoint.save(tmp_path, state, keep=1).rename(tmp_path / "step-00000008")
    with pytest.raises(UserError, match="step-00000008 is damaged: state.json is of step 6"):
        checkpoint.at(tmp_path, 8)


def test_a_damaged_later_checkpoint_does_not_crowd_out_a_new_one(tmp_path: Path) -> None:
    state = checkpoint.Checkpoint(6, {"a": torch.zeros(2)}, {"b": torch.zeros(1)}, {})
    checkpoint.save(tmp_path, state, keep=1)
    (tmp_path / "step-00000006" / "trained.safetensors").write_bytes(b"")
    checkpoint.save(tmp_path, checkpoint.Checkpoint(2, state.trained, {}, {}), keep=1)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 2


@pytest.mark.parametrize("content", [b"name: [", b"\xff\xfe\x00", b"name: tiny\n"])
@pytest.mark.parametrize("verb", ["train", "generate", "export", "report"])
def test_a_damaged_recipe_in_a_run(
    ready: Ready, fails: Fails, tmp_path: Path, verb: str, content: bytes
) -> None:
    run = ready.copy("run", tmp_path)
    (run / "recipe.yaml").write_bytes(content)
    before = tree(run)
    page = tmp_path / "page.html"
    if verb == "report" and content.startswith(b"name: tiny"):
        assert main(["report", str(run), "--out", str(page)]) == 0  # It only shows the recipe.
        return
    arguments = {
        "train": ["train", ready.recipe, "--out", run],
        "generate": ["generate", run, "--prompts", ready.prompts, "--out", tmp_path / "out"],
        "export": ["export", run, tmp_path / "out"],
        "report": ["report", run, "--out", page],
    }[verb]
    fails(*arguments, says="recipe.yaml (cannot be read as YAML|is not YAML|is not a recipe)")
    assert tree(run) == before and not page.exists() and not (tmp_path / "out").exists()


# Caches.


def test_a_stale_cache(ready: Ready, fails: Fails, tmp_path: Path) -> None:
    manifest = write_clips(tmp_path / "own", count=5)
    cache = ready.copy("cache", tmp_path)
    changes = ["--data.manifest", manifest, "--data.cache", cache]
    assert main([*map(str, ["prepare", ready.recipe, *changes])]) == 0
    manifest.write_text(manifest.read_text().replace("number 3", "number three"))
    out = ["--out", tmp_path / "run"]
    says = "'clip3.mp4': its caption has changed. Run `videorepa prepare`"
    fails("train", ready.recipe, *changes, *out, says=says)
    size = ["--data.height", "32", "--encoder.height", "32"]
    says = r"made otherwise.*'height': 16.*'height': 32.*Choose another"
    fails("train", ready.recipe, *changes, *size, says=says)


@pytest.mark.parametrize("size", [0, 5, 200])
@pytest.mark.parametrize("what", ["clips", "features", "empty-caption.safetensors"])
def test_a_truncated_cache_file(
    ready: Ready, fails: Fails, tmp_path: Path, what: str, size: int
) -> None:
    cache = ready.copy("cache", tmp_path)
    path = next(path for path in sorted(cache.rglob("*.safetensors")) if what in str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    changes = ["--data.cache", cache]
    out = ["--out", tmp_path / "run"]
    says = f"{path.name} cannot be read .*Delete it and run `videorepa prepare` again"
    fails("train", ready.recipe, *changes, *out, says=says)
    path.unlink()
    assert main([*map(str, ["prepare", ready.recipe, *changes])]) == 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b'{"format": ', b"[1]", b"\xff", None])
@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_a_damaged_fingerprint(
    ready: Ready, fails: Fails, tmp_path: Path, verb: str, content: bytes | None
) -> None:
    cache = ready.copy("cache", tmp_path)
    path = cache / "fingerprint.json"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    before = tree(cache)
    arguments = command(verb, ready.recipe, ready, tmp_path / "run")
    says = "fingerprint.json is damaged.*Delete .* and prepare again"
    fails(*arguments, "--data.cache", cache, says=says)
    assert tree(cache) == before


# Generating.


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", "", "holds no rows"),
        ("blank.txt", "\n \n", "holds no rows"),
        ("missing.txt", None, "does not exist"),
        ("prompts.pdf", "a", "ends in '.pdf'; expected .txt or .csv or .jsonl"),
        ("latin.txt", b"f\xe4llt", "not UTF-8"),
        ("double.csv", "id,prompt\na,x\na,y\n", "lines 2 and 3.*'a'"),
        ("broken.jsonl", '{"prompt": \n', "line 1: not valid JSON"),
    ],
)
def test_unusable_prompts(
    ready: Ready, fails: Fails, tmp_path: Path, name: str, content: str | bytes | None, says: str
) -> None:
    path, out = tmp_path / name, tmp_path / "out"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    fails("generate", ready.run, "--prompts", path, "--out", out, says=says)
    assert not out.exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--steps", "0"], "steps: .*greater than or equal to 1.*found 0"),
        (["--steps", "5000"], "steps: .*less than or equal to 1000 .*found 5000"),
        (["--samples", "1000000000"], "samples: .*less than or equal to 10000 "),
        (["--samples", "-2"], "samples: .*greater than or equal to 1.*found -2"),
        (["--guidance-scale", "nan"], "guidance_scale: .*finite"),
        (["--shard", "2/2"], "shard 2/2 does not exist"),
        (["--shard", "1"], "--shard is I/N, such as 0/4; got '1'"),
        (["--shard", "²/3"], "--shard is I/N"),
        (["--steps", "3"], r"made otherwise; they differ in steps \(1, now 3\)"),
    ],
)
def test_generation_settings(ready: Ready, fails: Fails, given: list[str], says: str) -> None:
    arguments = ["generate", ready.run, "--prompts", ready.prompts]
    fails(*arguments, "--out", ready.root / "generated", *given, says=says)


def test_models_that_are_none(ready: Ready, twins, fails: Fails, tmp_path: Path) -> None:
    rest = ["--prompts", ready.prompts, "--out", tmp_path / "out"]
    says = "is not a run .*, not a recipe file and not a diff"
    fails("generate", tmp_path, *rest, says=says)
    fails("generate", tmp_path / "missing", *rest, says="missing does not exist; expected a run")
    video = next((ready.root / "generated").glob("*.mp4"))
    fails("generate", video, *rest, says="cannot be read as YAML")
    says = "No backbone is called 'cogvideo'. Did you mean cogvideox"
    fails("generate", twins["backbone"], *rest, "--backbone", "cogvideo", says=says)
    says = "made otherwise.*model_digest"
    fails("generate", ready.recipe, *rest[:-1], ready.root / "generated", says=says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"fps": '])
def test_a_damaged_generation_file(
    ready: Ready, fails: Fails, tmp_path: Path, content: bytes
) -> None:
    folder = ready.copy("generated", tmp_path)
    (folder / "generation.json").write_bytes(content)
    arguments = ["generate", ready.run, "--prompts", ready.prompts, "--out", folder]
    fails(*arguments, says="generation.json is damaged.*another folder with --out")


def test_a_clip_whose_video_is_gone_is_made_again(ready: Ready, tmp_path: Path) -> None:
    folder = ready.copy("generated", tmp_path)
    (folder / "0001-0.mp4").unlink()
    arguments = ["generate", ready.run, "--prompts", ready.prompts, "--out", folder]
    assert main([str(argument) for argument in arguments]) == 0
    assert tree(folder) == tree(ready.root / "generated")


# Scoring, export, report.


def test_evaluating_what_is_not_there(ready: Ready, fails: Fails, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    fails("evaluate", "lab", empty, says="holds no generated clips")
    fails("evaluate", "lab", tmp_path / "missing", says="missing does not exist")
    fails("evaluate", "lab", ready.recipe, says=r"ends in '\.yaml'; expected \.csv or \.jsonl")
    assert not (tmp_path / "missing").exists() and not list(empty.iterdir())
    says = "No benchmark is called 'lap'. Did you mean lab"
    fails("evaluate", "lap", ready.root / "generated", says=says)


def lab_clip(folder: Path, index: int, k: int = 0) -> None:
    """A clip of the lab as `generate` would leave it; a later sample begins later."""
    from videorepa.world.render import make_clip

    folder.mkdir(exist_ok=True)
    clip = make_clip(77, index)
    write_video(folder / f"{index}-{k}.mp4", clip.frames[k:], 8)
    about = {"prompt_id": str(index), "prompt": clip.caption, "k": k, "seed": 1}
    (folder / f"{index}-{k}.json").write_text(json.dumps(about))


def test_clips_that_cannot_be_scored_cost_themselves_alone(
    fails: Fails, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "clips"
    for index in range(5):
        lab_clip(folder, index)
    whole = (folder / "1-0.mp4").read_bytes()
    (folder / "1-0.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "2-0.mp4").unlink()
    import numpy as np

    write_video(folder / "3-0.mp4", np.zeros((9, 16, 16, 3), np.uint8), 8)
    # What a killed process leaves behind is no clip.
    (folder / ".tmp-0123.json").write_text("{")
    said = fails("evaluate", "lab", folder, says="3 clips could not be scored")
    for index, reason in {1: "1-0.mp4", 2: "does not exist", 3: ""}.items():
        assert re.search(rf"'{index} 0': [^']*{reason}", said), said
    summary = json.loads((folder / "scores" / "summary.json").read_text())
    assert [failure["prompt_id"] for failure in summary["failures"]] == ["1", "2", "3"]
    rows = (folder / "scores" / "scores.jsonl").read_text().splitlines()
    assert [json.loads(row)["prompt_id"] for row in rows] == ["0", "4"]
    for index in (0, 4):
        (folder / f"{index}-0.mp4").write_bytes(b"")
    shutil.rmtree(folder / "scores")
    fails("evaluate", "lab", folder, says="None of the 5 clips .* can be scored; .* is empty")
    (folder / "4-0.json").write_text("{}")
    fails("evaluate", "lab", folder, says="4-0.json is not a sidecar.*prompt_id")


def test_exporting_what_is_not_there(ready: Ready, fails: Fails, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for folder in (tmp_path, tmp_path / "missing", Path(ready.recipe)):
        fails("export", folder, out, says="is not a run: it (has no recipe.yaml|does not exist)")
    fails("export", ready.run, tmp_path, says="exists already. Choose another folder")
    says = "(?i)not a directory|file exists"
    fails("export", ready.run, Path(ready.recipe) / "below", says=says)
    assert not out.exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--fuse"], "The run trained all weights, and --fuse folds a LoRA in. Export without"),
        (["--format", "comfyui"], "trained all weights, and the format comfyui is for a LoRA"),
        (["--scores", "nowhere"], "nowhere is not a score folder"),
    ],
)
def test_export_options_that_do_not_fit_the_run(
    ready: Ready, fails: Fails, tmp_path: Path, given: list[str], says: str
) -> None:
    fails("export", ready.run, tmp_path / "out", *given, says=says)
    assert not list(tmp_path.iterdir())


# Published weights.


def published(twins: dict[str, Path], folder: Path) -> Path:
    """A transformer with an alignment's weights inside, as published."""
    shutil.copytree(twins["backbone"] / "transformer", folder)
    path, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    extra = {
        f"projectors.0.{layer}.{part}": torch.zeros(2, 2)
        for layer in (0, 2, 4)
        for part in ("weight", "bias")
    }
    extra |= {f"downsampler_cogvideo_output.{part}": torch.zeros(2) for part in ("weight", "bias")}
    save_file(load_file(path) | extra, path)
    name = "CogVideoXTransformer3DModel"
    config.write_text(config.read_text().replace(f'"{name}"', f'"{name}Align"'))
    return folder


def lora_weights(rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA as published: alpha is not in it."""
    prefix = "transformer.transformer_blocks"
    return {
        f"{prefix}.{block}.attn1.to_q.lora_{part}.weight": torch.ones(size)
        for block in range(2)
        for part, size in (("A", (rank, 8)), ("B", (8, rank)))
    }


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("nothing", "nothing at .*; expected a file, a folder or a Hub id"),
        ("empty folder", "no config.json .*, no pytorch_lora_weights.safetensors .*no zero_to"),
        ("config is a list", "config.json cannot be read as a model's configuration"),
        ("other model", "holds a WanTransformer3DModel; published VideoREPA models are CogVideoXT"),
        (
            "other size",
            r"incomplete or of another model; missing: transformer_blocks.3.* and \d+ more",
        ),
        ("other width", r"misshapen: .* \(.*\), expected \(.* and 64 more"),
        ("no sense", "makes no transformer"),
        ("pickled weights", "holds no .*, but diffusion_pytorch_model.bin. .* not read"),
        ("pickle called safetensors", "cannot be read as safetensors .*or a pickle, which is not"),
        ("truncated", "cannot be read as safetensors .*It is cut short"),
        ("a shard is missing", "missing: proj_out.weight. Copy or download all its files"),
        (
            "two copies",
            "in diffusion_pytorch_model.safetensors and in another file.*Keep the files",
        ),
        ("no alignment", "holds no weights of an alignment, so it is a stock transformer already"),
        ("half an alignment", r"weights of the projector .*; missing: conv.bias\. Was"),
        ("a weight too many", r"; extra: what.is.this\. "),
        ("alpha", "is not a LoRA, so it has no alpha. Leave out --alpha"),
        ("base", "is not a DeepSpeed checkpoint. Leave out --base"),
    ],
)
def test_importing_what_is_no_published_transformer(
    twins, fails: Fails, tmp_path: Path, fault: str, says: str
) -> None:
    source = published(twins, tmp_path / "in" / "published")
    path, config = source / "diffusion_pytorch_model.safetensors", source / "config.json"
    weights, text = load_file(path), config.read_text()
    proof = tmp_path / "in" / "proof"
    given = {"alpha": ["--alpha", 64], "base": ["--base", "zai-org/CogVideoX-2b"]}.get(fault, [])
    configs = {
        "config is a list": "[1]",
        "other model": text.replace("CogVideoXTransformer3DModelAlign", "WanTransformer3DModel"),
        "other size": text.replace('"num_layers": 3', '"num_layers": 4'),
        "other width": text.replace('"num_attention_heads": 2', '"num_attention_heads": 3'),
        "no sense": text.replace('"num_layers": 3', '"num_layers": "many"'),
    }
    config.write_text(configs.get(fault, text))
    if fault == "nothing":
        shutil.rmtree(source)
    elif fault == "empty folder":
        shutil.rmtree(source)
        source.mkdir()
    elif fault == "pickled weights":
        torch.save({"weight": Evil(proof)}, path.with_suffix(".bin"))
        path.unlink()
    elif fault == "pickle called safetensors":
        path.write_bytes(pickle.dumps(Evil(proof)))
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif fault == "two copies":
        shutil.copy(path, source / "diffusion_pytorch_model.fp16.safetensors")
    else:
        dropped = {
            "a shard is missing": ["proj_out.weight"],
            "half an alignment": ["downsampler_cogvideo_output.bias"],
            "no alignment": [key for key in weights if key.startswith(("projectors", "downs"))],
        }
        weights = {
            key: value for key, value in weights.items() if key not in dropped.get(fault, [])
        }
        weights |= {"what.is.this": torch.zeros(1)} if fault == "a weight too many" else {}
        save_file(weights, path)
    before = tree(tmp_path)
    fails("import", source, tmp_path / "out", *given, says=says)
    assert tree(tmp_path) == before and not proof.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("no alpha", r"does not state its alpha.*the rank is 4.*VideoREPA-5B .*with --alpha 64"),
        ("alpha 0", "--alpha is 0.0; expected a number above 0"),
        ("alpha nan", "--alpha is nan; expected"),
        ("mixed ranks", r"mixes ranks \(4, 8\).*expected one rank"),
        ("half a pair", "half of a pair for 1 layers, such as transformer_blocks.0.attn1.to_q"),
        ("other layer", "is not a LoRA as the published trainer writes it: it holds text_encoder"),
        ("scalars", "holds .*lora_A.weight of shape .*expected matrices"),
        ("empty", "holds no weights"),
        ("truncated", "cannot be read as safetensors"),
        ("pickle", "cannot be read as safetensors .*or a pickle, which is not read"),
        ("destination", "out exists already. Choose another folder"),
        ("a file above", "(?i)not a directory|file exists"),
    ],
)
def test_importing_what_is_no_published_lora(
    fails: Fails, tmp_path: Path, fault: str, says: str
) -> None:
    path, out, proof = tmp_path / "lora.safetensors", tmp_path / "out", tmp_path / "proof"
    weights = lora_weights()
    first = next(iter(weights))
    if fault == "mixed ranks":
        weights |= {k: v for k, v in lora_weights(8).items() if ".1." in k}
    elif fault == "half a pair":
        del weights[first]
    elif fault == "other layer":
        weights["text_encoder.layer.lora_A.weight"] = torch.ones(4, 8)
    elif fault == "scalars":
        weights[first] = torch.ones(())
    elif fault == "empty":
        weights = {}
    save_file(weights, path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif fault == "pickle":
        path.write_bytes(pickle.dumps(Evil(proof)))
    elif fault == "destination":
        out.mkdir()
        (out / "thesis.tex").write_text("x")
    elif fault == "a file above":
        out = path / "below"
    alpha = {"no alpha": [], "alpha 0": ["--alpha", 0], "alpha nan": ["--alpha", "nan"]}
    before = tree(tmp_path)
    fails("import", path, out, *alpha.get(fault, ["--alpha", 64]), says=says)
    assert tree(tmp_path) == before and not proof.exists()


def zero_checkpoint(folder: Path) -> Path:
    """What two ranks of DeepSpeed's ZeRO stage 2 leave of one weight of six values."""
    states = folder / "pytorch_model"
    states.mkdir(parents=True)
    (folder / "zero_to_fp32.py").write_text(f"open({str(folder / 'proof')!r}, 'w').close()\n")
    values = torch.arange(6.0)
    shapes = [{"weight": torch.Size((2, 3))}]
    stored = {"weight": values.view(2, 3).bfloat16()}
    model = {"module": stored, "buffer_names": [], "param_shapes": shapes}
    torch.save(model, states / "mp_rank_00_model_states.pt")
    for rank, part in enumerate((values[:4].clone(), values[4:].clone())):
        content = {
            "single_partition_of_fp32_groups": [part],
            "zero_stage": 2,
            "partition_count": [2],
        }
        path = states / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": content}, path)
    return folder


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("sound", "holds no weights of an alignment"),  # Nothing but the model is wrong then.
        ("script alone", r"holds no partitions; .*Was all of it copied\?"),
        ("two checkpoints", r"several checkpoints \(other, pytorch_model\).*Give one of them"),
        (
            "last rank is missing",
            "2 processes wrote the checkpoint, and it has the partitions of 1",
        ),
        ("first rank is missing", "holds the partitions of ranks 1; those between are missing"),
        ("no model states", "has no mp_rank_00_model_states.pt.*stage 3"),
        ("stage 3", "is of ZeRO stage 3; only stages 1 and 2 can be merged"),
        ("tensor parallelism", "is of a model with tensor parallelism"),
        ("other step", "do not agree with .*: 1 of 1 weights differ, such as weight.*same step"),
        ("too few values", "is not laid out as DeepSpeed's ZeRO stage 2"),
        ("too many values", "hold 40 values where the parameters have 6"),
        ("other layout", r"is not laid out as DeepSpeed's .*KeyError: 'zero_stage'"),
        ("a list", "holds a list; expected a table"),
        ("truncated", "cannot be read as plain data"),
        ("code", "cannot be read as plain data .it asks for (posix|os).system.*never loaded"),
        ("code in the model", "mp_rank_00_model_states.pt cannot be read as plain data .*never"),
    ],
)
def test_importing_what_is_no_whole_zero_checkpoint(
    fails: Fails, tmp_path: Path, fault: str, says: str
) -> None:
    source = zero_checkpoint(tmp_path / "in")
    states, proof = source / "pytorch_model", source / "proof"
    first, last = sorted(states.glob("*_optim_states.pt"))
    model = states / "mp_rank_00_model_states.pt"
    content = torch.load(first, weights_only=True)
    inner = content["optimizer_state_dict"]
    if fault == "script alone":
        shutil.rmtree(states)
    elif fault == "two checkpoints":
        shutil.copytree(states, source / "other")
    elif fault.endswith("rank is missing"):
        (last if fault.startswith("last") else first).unlink()
    elif fault == "no model states":
        model.unlink()
    elif fault == "tensor parallelism":
        first.rename(states / first.name.replace("mp_rank_00", "mp_rank_01"))
    elif fault == "truncated":
        first.write_bytes(first.read_bytes()[:-100])
    elif fault == "code in the model":
        torch.save({"module": Evil(proof)}, model)
    elif fault != "sound":
        values = inner["single_partition_of_fp32_groups"]
        if fault == "stage 3":
            inner["zero_stage"] = 3
        elif fault == "other step":
            values[0] = values[0] + 1
        elif fault == "too few values":
            values[0] = values[0][:1]
        elif fault == "too many values":
            values[0] = torch.zeros(38)
        elif fault == "other layout":
            del inner["zero_stage"]
        elif fault == "code":
            inner["loss_scaler"] = Evil(proof)
        torch.save([1] if fault == "a list" else content, first)
    before = tree(tmp_path)
    fails("import", source, tmp_path / "out", says=says)
    assert tree(tmp_path) == before and not proof.exists()


@pytest.mark.parametrize("kind", ["transformer", "lora"])
def test_a_full_disk_while_weights_are_imported(
    twins, fails: Fails, tmp_path: Path, kind: str
) -> None:
    source, given = published(twins, tmp_path / "published"), []
    if kind == "lora":
        source, given = tmp_path / "lora.safetensors", ["--alpha", 64]
        save_file(lora_weights(), source)
    before = tree(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        fails("import", source, tmp_path / "out", *given, says="(?i)too large.* Make room and run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()
    assert main([str(argument) for argument in ("import", source, tmp_path / "out", *given)]) == 0


def test_reporting_what_is_not_there(ready: Ready, fails: Fails, tmp_path: Path) -> None:
    page = ["--out", tmp_path / "page.html"]
    fails("report", *page, says="nothing to report on")
    fails("report", tmp_path, *page, says="is not a run: it has no recipe.yaml")
    fails("report", tmp_path / "missing", *page, says="does not exist")
    fails("report", ready.run, ready.run, *page, says="named twice")
    fails("report", ready.run, "--out", tmp_path, says="is a folder. Name the HTML file")
    fails("report", ready.run, *page, "--clips", tmp_path, says="holds no clip")
    run = ready.copy("run", tmp_path)
    (run / "log.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    fails("report", run, *page, says="log.jsonl, line 1 of 2 is not JSON")
    (run / "log.jsonl").unlink()
    fails("report", run, *page, says="has its training started")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[" * 100_000, "line 2 of 3 is not JSON"),
        ("\0\xff", "line 2 of 3 is not JSON"),
        ("3", "expected a JSON object"),
        ('{"step": -1, "loss": 1}', "a whole number from 1"),
        ('{"step": true, "loss": 1}', "a whole number from 1"),
        (f'{{"step": {10**30}, "loss": 1}}', "a whole number from 1"),
        (f'{{"step": 2, "loss": {10**400}}}', "step 2: loss is '1000.*expected a number"),
        ('{"step": 2, "loss": [1]}', r"loss is '\[1\]'; expected a number"),
    ],
    ids=["brackets", "bytes", "number", "negative", "true", "far", "huge", "list"],
)
def test_a_damaged_log(ready: Ready, fails: Fails, tmp_path: Path, line: str, says: str) -> None:
    run = ready.copy("run", tmp_path)
    step = '{"step": %d, "loss": 0.1}'
    damaged = f"{step % 1}\n{line}\n{step % 3}\n".encode("latin1")
    (run / "log.jsonl").write_bytes(damaged)
    fails("report", run, "--out", tmp_path / "page.html", says=says)
    fails("train", ready.recipe, "--out", run, says=says)
    assert (run / "log.jsonl").read_bytes() == damaged


# What needs no work is refused before any.


def test_clips_to_compare_with_are_asked_for_before_any_is_scored(
    ready: Ready, fails: Fails, tmp_path: Path
) -> None:
    generated, out, none = ready.root / "generated", tmp_path / "scores", tmp_path / "none"
    fails("evaluate", "lab", generated, "--out", out, "--against", none, says="none does not exist")
    none.mkdir()
    fails("evaluate", "lab", generated, "--out", out, "--against", none, says="holds no generated")
    assert not out.exists()


def test_a_head_of_one_clip_is_refused_before_a_teacher_is_loaded(
    ready: Ready, fails: Fails, tmp_path: Path
) -> None:
    head = tmp_path / "folder" / "head.safetensors"
    arguments = ["head", ready.recipe, "--kind", "motion", "--out", head]
    for clips, got in (("1", 1), ("-3", 0)):
        fails(*arguments, "--clips", clips, says=f"two clips at least, .*; got {got} of 5")
    assert not head.parent.exists()


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        ("wandb", ["--train.trackers", "[wandb]"]),
        ("tensorboard", ["--train.trackers", "[tensorboard]"]),
        ("bitsandbytes", ["--memory.optimizer", "adamw8bit"]),
        ("torchao", ["--train.lora", "{rank: 2}", "--memory.frozen", "int8"]),
    ],
)
def test_a_package_that_is_missing_is_named_before_a_model_is_loaded(
    ready: Ready, fails: Fails, tmp_path: Path, monkeypatch, module: str, changes: list[str]
) -> None:
    for name in (module, f"{module}.optim", f"{module}.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = ["train", ready.recipe, "--out", tmp_path / "run", *changes]
    fails(*arguments, says=rf"needs {module}.*pip install 'videorepa\[{module}\]'")
    assert not (tmp_path / "run").exists()


def test_sampling_that_a_model_lacks_is_refused_before_it_is_loaded(
    ready: Ready, fails: Fails, tmp_path: Path, monkeypatch
) -> None:
    kind = plugins.description("backbones", "cogvideox")
    monkeypatch.setattr(kind, "generation", {"dynamic_guidance": False})
    out = tmp_path / "clips"
    arguments = ["generate", ready.run, "--prompts", ready.prompts, "--out", out]
    fails(*arguments, says="Only CogVideoX has generation.dynamic_guidance")
    assert not out.exists()


# The machine.


@pytest.mark.parametrize("git", [None, "exec /bin/sleep 60", "exit 128", "kill -9 $$"])
def test_a_git_that_is_missing_hangs_or_fails_leaves_the_commit_unknown(
    tmp_path: Path, monkeypatch, git: str | None
) -> None:
    if git is not None:
        (tmp_path / "git").write_text(f"#!/bin/sh\n{git}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "GIT_SECONDS", 0.2)
    assert environment.environment()["commit"] == "unknown"


# A full disk.


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for(part: str) -> Callable[..., None]:
    """An os.replace that finds no room for targets with that in their path."""
    real, done = os.replace, []

    def replace(source: Any, target: Any) -> None:
        if part in str(target):
            done.append(target)
            if len(done) > 1:
                full()
        real(source, target)

    return replace


def test_a_full_disk_is_named_with_the_path_that_the_user_knows(
    ready: Ready, fails: Fails, tmp_path: Path, monkeypatch
) -> None:
    page = tmp_path / "page.html"
    monkeypatch.setattr(Path, "write_bytes", full)
    fails("report", ready.run, "--out", page, says=f"error: {page}: No space left on device. Make")
    monkeypatch.undo()
    page = tmp_path / "none" / "page.html"
    for error, says in (
        (SafetensorError("Error while serializing: I/O error: gone (os error 2)"), "No such file"),
        (SafetensorError("Error while serializing: I/O error: full (os error 28)"), "No space"),
    ):
        with pytest.raises(OSError, match=says) as raised, atomic_folder(tmp_path / "folder"):
            raise error
        assert raised.value.filename == str(tmp_path / "folder")


def torch_says_full(*_: Any, **__: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


@pytest.mark.parametrize("way", ["replace", "save", "torch", "safetensors", "limit"])
def test_a_full_disk_while_a_checkpoint_is_saved(
    ready: Ready, fails: Fails, tmp_path: Path, monkeypatch, way: str
) -> None:
    run = tmp_path / "run"
    arguments = ["train", ready.recipe, "--out", run]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    calls: list[int] = []

    def on_the_second(real: Any, fault: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            calls.append(1)
            return (fault if len(calls) > 1 else real)(*given, **options)

        return call

    if way == "replace":
        monkeypatch.setattr(os, "replace", full_for("step-"))
    elif way in ("save", "torch"):
        fault = full if way == "save" else torch_says_full
        monkeypatch.setattr(torch, "save", on_the_second(torch.save, fault))
    else:
        # The system itself refuses: safetensors first, or torch once that has done its part.
        real = checkpoint.save if way == "safetensors" else torch.save

        def limited(*given: Any, **options: Any) -> Any:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
            try:
                return real(*given, **options)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        where = checkpoint if way == "safetensors" else torch
        monkeypatch.setattr(where, "save", on_the_second(real, limited))
    try:
        reason = "File too large" if way == "safetensors" else "No space left on device"
        says = rf"checkpoint at step 4 could not be written to \S+: {reason}. Earlier checkpoints"
        fails(*arguments, says=says)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    step = Path("checkpoints", "step-00000002")
    assert tree(run / step) == tree(ready.run / step)
    assert main([str(argument) for argument in arguments]) == 0
    assert tree(run / "checkpoints") == tree(ready.run / "checkpoints")


@pytest.mark.parametrize(("verb", "part"), [("prepare", "clips"), ("generate", ".json")])
def test_a_full_disk_while_clips_are_written(
    ready: Ready, fails: Fails, tmp_path: Path, monkeypatch, verb: str, part: str
) -> None:
    out = tmp_path / "out"
    if verb == "prepare":
        arguments: list[Any] = ["prepare", ready.recipe, "--data.cache", out]
        whole = ready.root / "cache"
    else:
        arguments = ["generate", ready.run, "--prompts", ready.prompts, "--out", out]
        whole = ready.root / "generated"
    monkeypatch.setattr(os, "replace", full_for(part))
    fails(*arguments, says=r"out/\S+: No space left on device. Make room and run the same")
    monkeypatch.undo()
    left = tree(out)
    assert left.items() < tree(whole).items(), "only whole files may be left"
    assert main([str(argument) for argument in arguments]) == 0
    assert tree(out) == tree(whole)


def test_the_errors_are_for_users_and_bugs_keep_their_traceback(
    ready: Ready, monkeypatch, capsys
) -> None:
    module = importlib.import_module("videorepa.inspect")

    def raising(error: Exception) -> Callable[[Recipe], None]:
        def inspect(recipe: Recipe, device: str | None) -> None:
            raise error

        return inspect

    for bug in (ZeroDivisionError(), RuntimeError("a shape does not fit")):
        monkeypatch.setattr(module, "inspect", raising(bug))
        with pytest.raises(type(bug)):
            main(["inspect", ready.recipe])
    with pytest.raises(RuntimeError) as lacking:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (lacking.value, torch.OutOfMemoryError("CUDA out of memory."), MemoryError()):
        monkeypatch.setattr(module, "inspect", raising(error))
        assert main(["inspect", ready.recipe]) == 1
        assert "error: There is not enough memory (" in capsys.readouterr().err
    monkeypatch.setattr(module, "inspect", raising(KeyboardInterrupt()))  # type: ignore[arg-type]
    assert main(["inspect", ready.recipe]) == 130
    monkeypatch.setattr(module, "inspect", raising(UserError("Do this.")))
    assert main(["inspect", ready.recipe]) == 1
    assert "error: Do this." in capsys.readouterr().err


def test_windows_syncs_files_that_it_may_write_and_no_folders(tmp_path: Path, monkeypatch) -> None:
    module, opened = importlib.import_module("videorepa.system.files"), []

    class Windows:
        """Refuses to open a folder, and to sync what cannot be written."""

        name = "nt"

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def open(self, path: Path, flags: int) -> int:
            assert path.is_file() and flags & os.O_RDWR
            opened.append(path)
            return os.open(path, flags)

    monkeypatch.setattr(module, "os", Windows())
    (tmp_path / "a").write_text("a")
    module.sync(tmp_path / "a")
    module.sync(tmp_path)
    assert opened == [tmp_path / "a"]


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the docs.")


LACKS = (
    r"not enough memory \(CUDA out of memory. Tried to allocate 2.00 GiB\). What helps, .*first: "
)


@pytest.mark.parametrize(
    ("changes", "remedies"),
    [
        ((), ["gradient_checkpointing: true", "batch_size: 1 with optim.accumulate: 4", "8bit"]),
        (
            ("train.lora={rank: 2}", "optim.batch_size=1"),
            ["checkpointing", "float8 or nf4", "8bit"],
        ),
        (
            (
                "train.lora={rank: 2}",
                "memory={gradient_checkpointing: true, frozen: nf4, optimizer: adamw8bit}",
            ),
            ["batch_size: 1", "data.frames: 9"],
        ),
    ],
)
def test_a_training_without_enough_memory_says_what_it_does_not_save_yet(
    recipe: Recipe, tmp_path: Path, monkeypatch, changes: tuple[str, ...], remedies: list[str]
) -> None:
    prepare(recipe)
    module = importlib.import_module("videorepa.train")
    monkeypatch.setattr(module, "check_extras", lambda recipe: None)
    monkeypatch.setattr(module, "Student", out_of_memory)
    listed = ".*".join(rf"\({n}\) [^;]*{remedy}" for n, remedy in enumerate(remedies, 1))
    with pytest.raises(UserError, match=LACKS + listed):
        train(recipe.override(*changes), tmp_path / "run")


def test_every_verb_that_lacks_memory_says_what_to_change(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    # Loading turns all other errors of the libraries into one about the folder.
    monkeypatch.setattr("transformers.T5EncoderModel.from_pretrained", out_of_memory)
    with pytest.raises(UserError, match=LACKS + r"\(1\) backbone.tiling: true.*data.frames: 9"):
        prepare(recipe)
    prompts = [Prompt("a", "A ball falls.")]
    recipe.to_yaml(tmp_path / "base.yaml")
    with pytest.raises(UserError, match=LACKS + r"\(1\) fewer frames or a smaller size"):
        generate(tmp_path / "base.yaml", prompts, tmp_path / "clips")
    with pytest.raises(UserError, match=LACKS + r"\(1\) backbone.tiling: true.*fewer --clips"):
        scan(recipe, tmp_path / "scan", clips=2, noise_levels=[0.5])
    monkeypatch.setattr(importlib.import_module("videorepa.head"), "open_source", out_of_memory)
    with pytest.raises(UserError, match=LACKS + r"\(1\) fewer --clips"):
        train_head(recipe, "motion", tmp_path / "head.safetensors")
    monkeypatch.setattr(importlib.import_module("videorepa.evaluate"), "_score", out_of_memory)
    with pytest.raises(UserError, match=LACKS + r"\(1\) no other process"):
        evaluate("lab", tmp_path / "clips")
