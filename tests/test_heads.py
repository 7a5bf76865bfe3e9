"""The heads of MoAlign and SARA: what they learn from, that they learn, and where they are used."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from conftest import make_head
from videorepa import head as heads
from videorepa.cli import main
from videorepa.data.cache import Cache
from videorepa.data.flow import flow_method
from videorepa.data.source import open_source
from videorepa.data.video import write_video
from videorepa.encoders.headed import Headed, read_about
from videorepa.errors import UserError
from videorepa.head import token_motion, train_head
from videorepa.inspect import inspect
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.tokens import TokenGrid
from videorepa.train import train

CPU = torch.device("cpu")


def brightening(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Stands in for optical flow, in no time: how much brighter a pixel gets, twice."""
    return np.stack([10 * (second - first), 5 * (first - second)])


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(heads, "flow_method", lambda: brightening)
    monkeypatch.setattr(heads, "STEPS", 100)


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen clips of a grey frame, a quarter of which is a gradient that slides in a direction
    and at a speed of its own."""
    folder = tmp_path_factory.mktemp("gradients")
    draw = np.random.default_rng(0)
    lines = ["video,caption"]
    for index in range(16):
        t, y, x = np.mgrid[:9, :16, :16]
        speed = draw.uniform(-2, 2, 2)
        ramp = 128 + 90 * np.sin((y - speed[0] * t) / 4) * np.cos((x - speed[1] * t) / 4)
        row, column = divmod(index % 4, 2)
        inside = (y // 8 == row) & (x // 8 == column)
        clip = np.repeat(np.where(inside, ramp, 128)[..., None], 3, -1).astype(np.uint8)
        write_video(folder / f"{index}.mp4", clip, 8)
        lines.append(f"{index}.mp4,Sliding.")
    manifest = folder / "clips.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


@pytest.fixture
def sliding(recipe: Recipe, gradients: Path) -> Recipe:
    return recipe.override(f"data.manifest={gradients}")


def headed(recipe: Recipe, weights: Path, **align) -> Recipe:
    """The recipe with a head on its teacher."""
    values = recipe.model_dump(mode="json")
    values["encoder"] = {"name": "headed", "weights": str(weights), "of": values["encoder"]}
    values["align"] = {"block": 2, "hidden": 16} | align
    return Recipe.parse(values).override("optim.steps=2", "optim.warmup_steps=0")


# What is learnt.


@pytest.mark.parametrize("kind", ["motion", "saliency"])
def test_a_head_predicts_better_than_a_constant(quick, sliding, tmp_path, kind) -> None:
    trained = train_head(sliding, kind, tmp_path / "heads" / "a.safetensors")
    assert (trained.clips, trained.held_out) == (13, 3)
    assert trained.error < 0.8 * trained.mean < trained.zero and trained.has_learnt
    assert "learnt nothing" not in str(trained)
    about = read_about(trained.path)
    assert (about.kind, about.width) == (kind, 24)
    assert about.fingerprint == sliding.encoder.fingerprint()
    assert about.held_out == {"error": trained.error, "mean": trained.mean, "zero": trained.zero}
    again = train_head(sliding, kind, tmp_path / "b.safetensors")
    assert again.path.read_bytes() == trained.path.read_bytes()
    other = train_head(sliding.override("seed=4"), kind, tmp_path / "c.safetensors")
    assert other.path.read_bytes() != trained.path.read_bytes()


def test_a_head_that_learnt_nothing_is_called_so(quick, sliding, tmp_path, monkeypatch) -> None:
    """Flow that has nothing to do with the clip."""
    draw = np.random.default_rng(0)
    monkeypatch.setattr(heads, "flow_method", lambda: lambda a, b: draw.normal(size=(2, *a.shape)))
    trained = train_head(sliding, "motion", tmp_path / "head.safetensors")
    assert not trained.has_learnt
    assert "learnt nothing: a constant predicts as well" in str(trained)


def test_fewer_clips_can_be_asked_for(quick, sliding, tmp_path) -> None:
    trained = train_head(sliding, "motion", tmp_path / "head.safetensors", clips=6)
    assert (trained.clips, trained.held_out) == (5, 1)


# What it is learnt from.


def numbered(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A flow that says which frame it begins at, down, and how many frames it spans, right."""
    return np.stack([first * 255, (second - first) * 255])


@pytest.mark.parametrize(
    ("start", "stride", "steps", "expected"),
    [
        (1, 2, 4, [1.5, 3.5, 5.5, 7.0]),  # Frame 8 has no next one: 7, again 7.
        (-3, 4, 3, [0.0, 2.5, 6.25]),  # The clip's first frame by itself.
        (0, 1, 9, [0, 1, 2, 3, 4, 5, 6, 7, 7]),
    ],
)
def test_a_step_has_the_mean_flow_of_its_frames(start, stride, steps, expected) -> None:
    video = torch.arange(9.0).view(9, 1, 1, 1).expand(9, 3, 8, 12) / 255
    grid = TokenGrid(torch.zeros(1, steps, 2, 3, 5), start, stride)
    motion = token_motion("motion", video, grid, (8, 12), numbered)
    assert motion.shape == (steps, 2, 3, 2)
    torch.testing.assert_close(motion[:, 0, 0, 0], torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(motion[..., 1], torch.ones(steps, 2, 3))


def test_saliency_is_motion_against_the_background() -> None:
    """A camera that pans by 3 pixels, and a quarter of one token that moves by half a pixel."""

    def panned(first: np.ndarray, _: np.ndarray) -> np.ndarray:
        flow = np.stack([np.zeros_like(first), np.full_like(first, 3.0)])
        flow[1, :4, :4] += 0.5
        return flow

    grid = TokenGrid(torch.zeros(1, 1, 2, 2, 5), 0, 2)
    saliency = token_motion("saliency", torch.zeros(2, 3, 16, 16), grid, (16, 16), panned)
    expected = torch.tensor([[0.5 / 4, 0.0], [0.0, 0.0]]).view(1, 2, 2, 1)
    torch.testing.assert_close(saliency, expected, atol=1e-6, rtol=0)


def test_optical_flow_finds_a_square_that_moves() -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed: no optical flow")
    y, x = np.mgrid[:8, :8]
    frames = np.full((2, 32, 32), 0.2, np.float32)
    frames[0, 8:16, 8:16] = frames[1, 9:17, 10:18] = 0.8 + 0.2 * np.sin(y) * np.cos(x / 2)
    video = torch.from_numpy(frames)[:, None].expand(2, 3, 32, 32)
    grid = TokenGrid(torch.zeros(1, 1, 4, 4, 5), 0, 2)
    motion = token_motion("motion", video, grid, (32, 32), flow_method())[0]
    down, right = motion[1, 1].tolist()
    assert 0.4 < down < 1.2 and 0.9 < right < 2.3 and right > 1.5 * down
    assert motion[3, 3].abs().max() < 0.2
    saliency = token_motion("saliency", video, grid, (32, 32), flow_method())[0, ..., 0]
    assert saliency[1, 1] > 0.8 and saliency[3, 3] < 0.1
    assert saliency.argmax() == 5


# Where it is used.


@pytest.mark.parametrize("kind", ["motion", "saliency"])
def test_a_headed_encoder_tells_its_shape(recipe: Recipe, kind) -> None:
    spec = make_head(kind, recipe.encoder, width=24)
    shape = spec.shape(9)
    video = torch.rand(2, 9, 3, 16, 16)
    grid, plain = spec.load(CPU)(video), recipe.encoder.load(CPU)(video)
    assert grid.tokens.shape == (2, *shape.tokens.shape[1:]) and shape.tokens.is_meta
    assert (shape.start, shape.stride) == (grid.start, grid.stride) == (1, 2)
    if kind == "motion":
        assert shape.width == 64 and shape.saliency is None is grid.saliency
        return
    assert shape.saliency.is_meta and grid.saliency.shape == (2, *shape.saliency.shape[1:])
    assert 0 <= grid.saliency.min() < grid.saliency.max() <= 1
    assert torch.equal(grid.tokens, plain.tokens)


def test_the_labs_own_motion_head_fits_its_teacher() -> None:
    teacher = {"name": "videomae", "weights": "micro", "frames": 16, "height": 64, "width": 64}
    spec = Headed.model_validate({"name": "headed", "weights": "micro", "of": teacher})
    assert spec.load(CPU)(torch.rand(1, 17, 3, 64, 64)).width == spec.shape(17).width == 64
    held_out = read_about(spec.path).held_out
    assert held_out["error"] < 0.5 * held_out["mean"]


def test_heads_stack(recipe: Recipe) -> None:
    """A saliency of motion features, and motion features under a saliency."""
    motion = make_head("motion", recipe.encoder, width=24)
    both = make_head("saliency", motion, width=64)
    grid = both.load(CPU)(torch.rand(1, 9, 3, 16, 16))
    assert grid.width == both.shape(9).width == 64 and grid.saliency is not None


def test_how_the_teacher_is_fed_is_said_once(recipe: Recipe, tmp_path: Path) -> None:
    own = headed(recipe, tmp_path / "head.safetensors", loss={"name": "moalign"})
    spec = own.encoder
    assert (spec.frames, spec.height, spec.width, spec.normalized) == (8, 16, 16, False)
    assert spec.relation_margin == recipe.encoder.relation_margin
    assert set(yaml.safe_load(own.text())["encoder"]) == {"name", "weights", "of"}
    assert Recipe.parse(yaml.safe_load(own.text())) == own
    assert own.override("encoder.of.frames=4").encoder.frames == 4
    with pytest.raises(UserError, match="`frames` is what `of.frames` says, 8: set it there"):
        own.override("encoder.frames=4")


@pytest.mark.parametrize(
    ("kind", "loss", "teacher"),
    [
        ("motion", {"name": "moalign"}, "cached"),
        ("saliency", {"name": "sara", "saliency": "teacher"}, "cached"),
        ("saliency", {"name": "sara", "saliency": "teacher"}, "online"),
    ],
)
def test_one_recipe_trains_the_head_and_then_with_it(
    quick, recipe: Recipe, tmp_path: Path, capsys, kind, loss, teacher
) -> None:
    weights, path = tmp_path / "head.safetensors", tmp_path / "recipe.yaml"
    own = headed(recipe, weights, loss=loss, teacher=teacher)
    own.to_yaml(path)
    assert main(["head", str(path), "--kind", kind, "--out", str(weights)]) == 0
    assert f"{kind} head: {weights}, trained on 4 clips" in capsys.readouterr().out
    assert read_about(weights).fingerprint == recipe.encoder.fingerprint()
    prepare(own)
    log = [json.loads(line) for line in train(own, tmp_path / "run").log_path.open()]
    assert len(log) == 2 and log[1]["align"] > 0 and log[1]["grad_align"] > 0
    if teacher == "cached":
        item = open_source(own.data).items[0]
        grid = Cache(own).read_features(item, own.encoder)
        assert grid.width == (64 if kind == "motion" else 24)
        assert (grid.saliency is not None) == (kind == "saliency")
        stored = next(Cache(own).features[own.encoder].glob("*.safetensors"))
        numbers = sum(t.numel() * t.element_size() for t in load_file(stored).values())
        assert inspect(own).feature_bytes_per_clip == numbers


def test_a_saliency_that_the_teacher_lacks_is_refused(recipe: Recipe) -> None:
    spec = make_head("motion", recipe.encoder, width=24)
    own = headed(recipe, Path(spec.weights), loss={"name": "sara", "saliency": "teacher"})
    with pytest.raises(UserError, match="a saliency of each token"):
        inspect(own)


# Bad input.


def test_a_head_of_another_teacher_is_refused(recipe: Recipe, teachers, tmp_path: Path) -> None:
    weights = Path(make_head("motion", recipe.encoder, width=24).weights)
    names = r"head .* was trained on videomae \(.*teacher, fed 8x16x16\); encoder.of is "
    fed = recipe.encoder.model_copy(update={"height": 32})
    for use in (Headed.fingerprint, lambda spec: spec.load(CPU)):
        with pytest.raises(UserError, match=names + r"videomae \(.*teacher, fed 8x32x16\)"):
            use(Headed(weights=str(weights), of=fed))
    image = {"name": "dinov2", "weights": str(teachers["dinov2"]), "frames": 8, "height": 16}
    wider = Headed(weights=str(weights), of=image | {"width": 16})
    with pytest.raises(UserError, match=names + r"dinov2 \(.*dinov2, fed 8x16x16\)"):
        wider.shape(9)
    own = headed(recipe.override("encoder.height=32"), weights, loss={"name": "moalign"})
    with pytest.raises(UserError, match=names):
        prepare(own)
    assert not (own.data.cache / "clips").exists()


def test_files_that_are_no_heads_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    good = Path(make_head("motion", recipe.encoder, width=24).weights)
    tensors, path = load_file(good), tmp_path / "head.safetensors"
    about = {"kind": "motion", "encoder": "one", "fingerprint": {}, "held_out": {}}

    def refused(says: str) -> None:
        spec = Headed(weights=str(path), of=recipe.encoder)
        for use in (lambda: spec.shape(9), spec.fingerprint, lambda: spec.load(CPU)):
            with pytest.raises(UserError, match=f"{path}.*{says}"):
                use()

    refused("videorepa head RECIPE --kind KIND --out")
    for content in (b"", b"\x80\x05junk", good.read_bytes()[:300], good.read_bytes()[:-40]):
        path.write_bytes(content)
        refused("cannot be read as a head")
    save_file(tensors, path)
    refused("KeyError: 'about'")
    for changed, says in (
        (about | {"kind": "depth"}, "kind is 'depth', expected motion or saliency"),
        (about | {"kind": "saliency"}, "its tensors are"),
        (about | {"fingerprint": 3}, "cannot be read as a head"),
        ([], "cannot be read as a head"),
    ):
        save_file(tensors, path, {"about": json.dumps(changed)})
        refused(says)
    save_file({"weight": torch.ones(3)}, path, {"about": json.dumps(about)})
    refused("norm.weight")


def test_what_cannot_train_a_head_is_refused(quick, recipe: Recipe, tmp_path, monkeypatch) -> None:
    out = tmp_path / "head.safetensors"
    with pytest.raises(UserError, match="no 'depth' head; expected motion or saliency"):
        train_head(recipe, "depth", out)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="tiny has no encoder"):
        plain = recipe.model_dump(mode="json") | {"encoder": None, "align": None}
        train_head(Recipe.parse(plain), "motion", out)
    with pytest.raises(UserError, match="sees one frame"):
        train_head(recipe.override("encoder.frames=1"), "motion", out)
    with pytest.raises(UserError, match="two clips at least.*; got 1 of "):
        train_head(recipe, "motion", out, clips=1)
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        train_head(recipe, "motion", out)
    assert out.read_text() == "mine"


def test_without_scikit_image_it_is_said_how_to_have_it(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "skimage.registration", None)
    with pytest.raises(UserError, match=r"scikit-image.*pip install 'videorepa\[flow\]'"):
        train_head(recipe, "motion", tmp_path / "head.safetensors")


def test_clips_that_cannot_be_read(
    quick, recipe: Recipe, clips: Path, tmp_path, capsys, monkeypatch
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "clips.csv").write_text(clips.read_text())
    own, path = recipe.override(f"data.manifest={folder}/clips.csv"), tmp_path / "recipe.yaml"
    own.to_yaml(path)
    out = tmp_path / "head.safetensors"
    command = ["head", str(path), "--kind", "motion", "--out", str(out)]
    assert main(command) == 1
    printed = capsys.readouterr().err
    assert "0 of 5 can be used" in printed and printed.count("does not exist") == 5
    assert not out.exists()
    # One of them costs itself alone.
    for index in range(4):
        (folder / f"clip{index}.mp4").write_bytes((clips.parent / f"clip{index}.mp4").read_bytes())
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "trained on 3 clips" in printed.out and out.exists()
    assert "1 clip could not be used" in printed.err and "'clip4.mp4'" in printed.err
    # A call that was killed once it had finished says the same again, and does nothing.
    before, said = out.read_bytes(), printed.out
    assert main(command) == 1
    printed = capsys.readouterr()
    assert printed.out == said and out.read_bytes() == before
    assert "holds this head already" in printed.err and "'clip4.mp4'" in printed.err
    # Of other clips, or another number or reading of them, it would be another head.
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["videorepa.head"], "READER", 1)
        assert main(command) == 1
        assert "exists already" in capsys.readouterr().err
    assert main([*command, "--clips", "4"]) == 1
    assert "exists already" in capsys.readouterr().err
    (folder / "clip0.mp4").write_bytes((folder / "clip1.mp4").read_bytes())
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err
    assert out.read_bytes() == before
