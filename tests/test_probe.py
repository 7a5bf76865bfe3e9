"""The probe: Physion's layouts and rules, the readout against scikit-learn's, and the whole on
clips that the lab's simulator draws, in the same layout."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_weights
from safetensors.torch import save_file

from conftest import recipe_values, write_clips
from videorepa.align.projector import PROJECTOR_FILE, Projector
from videorepa.align.taps import tap
from videorepa.artifacts import checkpoint
from videorepa.artifacts.model import Model
from videorepa.artifacts.run import Run
from videorepa.backbones.cogvideox import CogVideoX
from videorepa.cli import main
from videorepa.data.video import read_all, read_chosen, write_video
from videorepa.encoders.videomae import VideoMAE
from videorepa.errors import UserError
from videorepa.evaluation import pairs
from videorepa.evaluation.statistics import mcnemar_exact
from videorepa.import_weights import import_weights
from videorepa.lab.datasets import ContactRecipe, draw_contact
from videorepa.prepare import prepare
from videorepa.probe import probe
from videorepa.probing import physion, sources
from videorepa.probing.features import FeatureStore
from videorepa.probing.physion import PROTOCOLS, Stimulus
from videorepa.probing.probe_table import table
from videorepa.probing.projectors import may_have_projector, trained_projectors
from videorepa.probing.readout import PrincipalAxes, decide
from videorepa.probing.records import Probe
from videorepa.probing.sources import slices
from videorepa.recipe import Recipe
from videorepa.report import report
from videorepa.system.files import to_metadata
from videorepa.system.randomness import generator
from videorepa.tokens import TokenGrid
from videorepa.train import train
from videorepa.world.contact import contact_clip

V1_5, V2021 = PROTOCOLS["v1.5"], PROTOCOLS["2021"]
CPU = torch.device("cpu")
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
NAMES = {"contain": "pilot-containment-cone_{:04d}_img", "roll": "it2_rollingSliding_{:04d}_img"}
TIMES = (0, 400)
OPTIONS = {"timesteps": TIMES, "draws": 2, "pools": (1, 2)}


def write_physion(root: Path, train: int = 14, test: int = 6) -> Path:
    """Contact clips in v1.5's layout: so many of each scenario, which touch in turn."""
    for split, seed, count in (("train", 0, train), ("test", 1, test)):
        folder = root / split
        folder.mkdir(parents=True)
        labels = {}
        for place, name in enumerate(NAMES.values()):
            for number in range(count):
                clip, touches = contact_clip(seed, 100 * place + number)
                write_video(folder / f"{name.format(number)}.mp4", clip.frames, 30)
                labels[name.format(number)] = {"label": int(touches), "contact_frame_label": 14}
        (folder / "all_video_labels.json").write_text(json.dumps(labels))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_physion(tmp_path_factory.mktemp("physion") / "physion_mp4s")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Fewer strengths to choose from, and fewer draws of each interval."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS, "v1.5", dataclasses.replace(V1_5, strengths=(0.01, 1.0)))
        patch.setattr(pairs, "paired_bootstrap", lambda _: (-100.0, 100.0))
        yield


@pytest.fixture(scope="module")
def once(
    twins, clips: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Probe]:
    root = tmp_path_factory.mktemp("probed")
    recipe = Recipe.parse(recipe_values(twins, clips, root / "cache"))
    return root / "probe", probe(recipe, data, root / "probe", **OPTIONS)


@pytest.fixture
def folder(once: tuple[Path, Probe], tmp_path: Path) -> Path:
    """A probe's folder that a test may change."""
    return shutil.copytree(once[0], tmp_path / "probe")


@pytest.fixture
def probed(once: tuple[Path, Probe]) -> Probe:
    return once[1]


def test_the_labs_clips_are_read_as_they_are_drawn(tmp_path) -> None:
    drawn = draw_contact(ContactRecipe(out=tmp_path, train=6, test=4, seed=7))
    stimuli, notes = PROTOCOLS["lab"].read(tmp_path)
    assert drawn == {"train": 6, "test": 4} and not notes
    assert [s.is_test for s in stimuli].count(True) == 4
    assert sum(s.touches for s in stimuli if s.is_test) == 2
    first = next(s for s in stimuli if s.stem.endswith("7-00001"))
    clip, touches = contact_clip(7, 1)
    assert (first.scenario, first.touches) == (clip.scene.event, touches)
    shown = read_chosen(first.path, PROTOCOLS["lab"].shown(first.scenario, 17), 64, 64)
    # As a video file has them.
    assert np.abs(shown.astype(int) - clip.frames).mean() < 6


# What is shown.


def test_the_published_extractors_frames() -> None:
    assert V1_5.shown("contain", 4, "published") == [0, 15, 30, 45]
    assert V1_5.shown("collide", 4, "published") == [0, 0, 0, 15]
    assert V2021.shown("collide", 7, "published") == [0, 6, 12, 18, 24, 30, 36]


@pytest.mark.parametrize(
    ("protocol", "scenario", "last"), [(V1_5, "roll", 45), (V1_5, "collide", 15), (V2021, "x", 36)]
)
def test_a_clip_runs_evenly_from_the_first_frame_to_the_last_shown(protocol, scenario, last):
    frames = protocol.shown(scenario, 49)
    assert len(frames) == 49 and frames[0] == 0 and frames[-1] == last
    steps = np.diff(frames)
    assert steps.min() >= 0 and steps.max() - steps.min() <= 1 and set(frames) == {*range(last + 1)}
    assert protocol.shown(scenario, 2) == [0, last]
    # More frames than published extractors get: those are held.
    held = protocol.shown(scenario, 49, "published")
    assert {*held} <= {0, 15, 30, 45} | {*range(0, 42, 6)} and held == sorted(held)


def test_frames_are_chosen_by_number_and_shown_whole(tmp_path: Path) -> None:
    frames = np.zeros((5, 40, 80, 3), np.uint8)
    frames[:] = 40 * np.arange(1, 6)[:, None, None, None]
    frames[:, :, :8] = 0  # A band at the edge, which a centre crop would lose.
    write_video(tmp_path / "a.mp4", frames, 8)
    chosen = read_chosen(tmp_path / "a.mp4", [0, 3, 3, 1, 9], 40, 40)
    assert chosen.shape == (5, 40, 40, 3)
    assert chosen[:, 20, 30, 0] == pytest.approx([40, 160, 160, 80, 200], abs=3)
    assert (chosen[:, :, :3] < 10).all()
    same = read_chosen(tmp_path / "a.mp4", [2], 40, 80)
    assert np.array_equal(same[0], read_all(tmp_path / "a.mp4")[0][2])


def test_tokens_are_averaged_to_a_grid() -> None:
    tokens = torch.randn(2, 5, 4, 6, 3)
    grid = TokenGrid(tokens, start=-3, stride=4)
    found = grid.averaged(2)
    assert found.size == (5, 2, 2) and (found.start, found.stride) == (-3, 4)
    torch.testing.assert_close(found.tokens[:, :, 1, 0], tokens[:, :, 2:, :3].mean((2, 3)))
    assert grid.averaged(5).size == (5, 4, 5), "no finer than the tokens are"
    expected = tokens[:, [1, 3, 4]].mean((2, 3)).flatten(1)  # The first step is frame 0's own.
    assert slices(grid, 3, 1) == pytest.approx(expected.numpy(), abs=1e-6)
    assert slices(grid, 2, 2).shape == (2, 2 * 4 * 3)


def test_a_probe_reads_three_slices_without_the_first_frames_own() -> None:
    tokens = torch.arange(6.0).view(1, 6, 1, 1, 1)
    assert slices(TokenGrid(tokens, start=-3, stride=4), 3, 1).tolist() == [[1, 3, 5]]
    assert slices(TokenGrid(tokens, start=1, stride=2), 3, 1).tolist() == [[0, 2, 5]]


# The folders.


def test_v1_5_is_read_as_it_is_unpacked(data: Path, tmp_path: Path) -> None:
    stimuli, notes = V1_5.read(data)
    assert notes == [] and len(stimuli) == 2 * 14 + 2 * 6
    assert {s.scenario for s in stimuli} == {"contain", "roll"}
    of = {s.id: s for s in stimuli}
    assert of["test/pilot-containment-cone_0001_img"].touches is False
    assert of["train/it2_rollingSliding_0002_img"].touches is True
    assert sum(s.is_test for s in stimuli) == 12

    own = shutil.copytree(data, tmp_path / "own")
    shutil.copy(own / "test" / "it2_rollingSliding_0000_img.mp4", own / "test" / "rolled_1.mp4")
    stimuli, notes = V1_5.read(own)
    assert len(stimuli) == 40 and notes == ["test clip rolled_1 has no label and was left out."]
    labels = own / "test" / "all_video_labels.json"
    labels.write_text(labels.read_text().replace('"label": 1', '"label": "maybe"'))
    with pytest.raises(UserError, match="a label is 'maybe', not true or false"):
        V1_5.read(own)
    labels.unlink()
    with pytest.raises(UserError, match="all_video_labels.json cannot be used"):
        V1_5.read(own)
    shutil.rmtree(own / "train")
    with pytest.raises(UserError, match="has no folder 'train'"):
        V1_5.read(own)


@pytest.mark.parametrize(
    ("stem", "scenario"),
    [
        ("pilot_it2_collision_tdw_1", "collide"),
        ("it2_rollingSliding_collision_3", "roll"),
        ("pilot_it2_drop_simple_1", "drop"),
        ("pilot_towers_nb4_1", "support"),
        ("pilot_linking_nl1_1", "link"),
        ("pilot-containment-bowl_1", "contain"),
        ("pilot_dominoes_1mid_1", "dominoes"),
    ],
)
def test_scenarios_of_v1_5_are_read_from_names(tmp_path: Path, stem: str, scenario: str) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"{stem}.mp4").touch()
        labels = tmp_path / split / "all_video_labels.json"
        labels.write_text(json.dumps({f"{stem}.mp4": {"label": True}}))
    assert {s.scenario for s in V1_5.read(tmp_path)[0]} == {scenario}
    for split in ("train", "test"):
        (tmp_path / split / f"{stem}.mp4").rename(tmp_path / split / "cloth.mp4")
        (tmp_path / split / "all_video_labels.json").write_text('{"cloth": {"label": true}}')
    with pytest.raises(
        UserError, match="cloth.mp4 belongs to no scenario of Physion v1.5; expected one"
    ):
        V1_5.read(tmp_path)


def test_2021_is_read_with_its_coloured_clips(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for scenario in ("Roll", "Drape"):
            for kind, name in (("mp4s", ""), ("mp4s-redyellow", "-redyellow")):
                folder = tmp_path / split / scenario / kind
                folder.mkdir(parents=True)
                for number in range(2):
                    (folder / f"pilot_collision_occ{name}_{number:04d}_img_{scenario}.mp4").touch()
        rows = [
            f"pilot_collision_occ_{number:04d}_img_{scenario},{number == 0}\n"
            for number in range(2)
            for scenario in ("Roll", "Drape")
        ]
        (tmp_path / split / "labels.csv").write_text(",ground truth outcome\n" + "".join(rows))
    stimuli, notes = V2021.read(tmp_path)
    assert notes == [] and len(stimuli) == 8
    assert all(s.path.parent.name == "mp4s-redyellow" for s in stimuli)
    assert {s.scenario for s in stimuli} == {"roll", "drape"}, "the folder counts for more"
    assert all(s.touches == ("_0000_" in s.stem) for s in stimuli)
    (tmp_path / "test" / "labels.csv").write_text("name,outcome\n")
    with pytest.raises(UserError, match='labels.csv cannot be used.*"ground truth outcome"'):
        V2021.read(tmp_path)


# The readout.


@pytest.fixture(scope="module")
def read_label():
    """The probe of the experiments."""
    spec = importlib.util.spec_from_file_location("auc", EXPERIMENTS / "auc.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["auc"] = module  # Where dataclasses look their own module up.
    spec.loader.exec_module(module)
    return module.read_label


def test_the_experiments_probe_finds_a_planted_label_and_no_other(read_label) -> None:
    rng = np.random.default_rng(0)
    label = rng.permutation(np.arange(80) % 2 == 0)
    plain = rng.normal(size=(80, 300))
    planted = plain + 0.5 * np.where(label, 1, -1)[:, None] * rng.normal(size=300)
    found = read_label(planted, label)
    assert found.auc > 0.9 and found.low > 0.8 and found.high <= 1 and found.n == 80
    # Without the planted direction, a probe that had seen the held-out clips would know them.
    for nothing in (read_label(planted, rng.permutation(label)), read_label(plain, label)):
        assert nothing.low < 0.5 < nothing.high


def test_the_experiments_probe_does_not_mind_dead_or_large_features(read_label) -> None:
    rng = np.random.default_rng(1)
    label = np.arange(60) % 3 == 0
    seen = np.stack([1e6 * label + 3e5 * rng.normal(size=60), np.full(60, 7.0)], 1)
    assert read_label(seen.astype(np.float32), label).auc > 0.9
    with pytest.raises(ValueError, match="at least 10 of each"):
        read_label(seen[:12], label[:12])


@pytest.mark.parametrize(("n", "d"), [(60, 200), (60, 12)])
@pytest.mark.parametrize("protocol", [V1_5, V2021], ids=lambda p: p.name)
def test_the_readout_is_scikit_learns_own_pipeline(n: int, d: int, protocol) -> None:
    """On all features, standardised within each fold; ours turns them on fewer axes first."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(d)
    label = rng.random(n) < 0.4
    features = rng.normal(size=(n, d)) * rng.uniform(0.1, 50, d) + rng.uniform(-9, 9, d)
    features += 0.3 * np.where(label, 1, -1)[:, None] * features.std(0) * rng.normal(size=d)
    features[:, 3] = 7.0  # One that tells nothing.
    features = features.astype(np.float32)
    strengths = [c for c in protocol.strengths if 1e-6 <= c <= 100][::2]
    published = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=protocol.iterations)),
        {"logisticregression__C": strengths},
        cv=StratifiedKFold(5, shuffle=True, random_state=protocol.seed),
    ).fit(features[:45], label[:45])
    score, strength = decide(
        features[:45],
        label[:45],
        features[45:],
        strengths,
        seed=protocol.seed,
        iterations=protocol.iterations,
    )
    assert strength == published.best_params_["logisticregression__C"]
    expected = published.decision_function(features[45:])
    assert score == pytest.approx(expected, abs=0.01 * float(np.abs(expected).max()))


def test_turned_axes_keep_all_distances() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20, 9000))  # More than are multiplied at a time.
    axes = PrincipalAxes(features)
    assert axes.fitted.shape == (20, 19)
    plain = (features - features.mean(0)) / features.std(0)
    assert axes.fitted @ axes.fitted.T == pytest.approx(plain @ plain.T, abs=1e-6)
    assert axes(features) == pytest.approx(axes.fitted, abs=1e-6)
    flat = PrincipalAxes(np.ones((5, 9)))
    assert not flat.fitted.any() and not flat(np.ones((2, 9))).any()


def planted(protocol: physion.Protocol, counts: Mapping[str, tuple[int, int]]):
    """Clips of each scenario, so many that touch and do not; the first feature is the label, with
    its sign turned for "roll"."""
    clips, features = [], []
    for scenario, (yes, no) in counts.items():
        for number in range(yes + no):
            touches = number < yes
            clips.append(Stimulus(f"train/{scenario}{number}", Path(), scenario, touches))
            sign = -1 if scenario == "roll" else 1
            features.append([sign * (2 * touches - 1), number * 17 % 41])
    return np.array(features, np.float32), clips


def test_v1_5_has_one_readout_and_2021_one_for_each_scenario() -> None:
    features, clips = planted(V1_5, {"contain": (20, 20), "roll": (8, 8)})
    label = np.array([clip.touches for clip in clips])
    of_roll = np.array([clip.scenario == "roll" for clip in clips])
    score, strengths = V1_5.decide(features, clips, features, clips)
    assert ((score > 0) == label)[~of_roll].all() and not ((score > 0) == label)[of_roll].any()
    assert strengths["contain"] == strengths["roll"] and list(strengths) == sorted(strengths)
    score, strengths = V2021.decide(features, clips, features, clips)
    assert ((score > 0) == label).all() and set(strengths) == {"contain", "roll"}


def test_2021_fits_to_as_many_of_either_answer(monkeypatch) -> None:
    seen = []

    def noted(features, label, *rest, **more):
        seen.append((label.sum(), len(label), sorted(features[:, 1].tolist())))
        return decide(features, label, *rest, **more)

    monkeypatch.setattr(physion, "decide", noted)
    features, clips = planted(V2021, {"contain": (25, 7)})
    V2021.decide(features, clips, features, clips)
    V2021.decide(features, clips, features, clips)
    V1_5.decide(features, clips, features, clips)
    assert [found[:2] for found in seen] == [(7, 14), (7, 14), (25, 32)]
    assert seen[0][2] == seen[1][2] and len(set(seen[0][2])) == 14
    with pytest.raises(UserError, match="few training clips of drop.*Found 3 clips"):
        features, clips = planted(V2021, {"drop": (3, 9)})
        V2021.decide(features, clips, features, clips)


# Through projectors, as VideoREPA's author read them.

AUTHORS = PROTOCOLS["videorepa"]


@pytest.fixture(scope="module")
def long(twins, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """49 frames, of which the teacher sees 48: 13 and 24 steps in time."""
    root = tmp_path_factory.mktemp("long")
    values = recipe_values(twins, write_clips(root / "clips", 3, frames=49), root / "cache")
    recipe = Recipe.parse(values).override("data.frames=49", "encoder.frames=48", "optim.steps=2")
    recipe = recipe.override("optim.learning_rate=0.01", "optim.warmup_steps=0")
    prepare(recipe)
    return recipe


@pytest.fixture(scope="module")
def runs(long: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {
        "aligned": train(long, root / "aligned").path,
        "control": train(long.override("align.weight=0"), root / "control").path,
    }


@pytest.fixture(scope="module")
def authors(
    long: Recipe, runs: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Probe]:
    out = tmp_path_factory.mktemp("authors") / "probe"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS, "videorepa", dataclasses.replace(AUTHORS, strengths=(0.01,)))
        return out, probe(long, data, out, models=runs, **AS_AUTHOR)


AS_AUTHOR: dict[str, Any] = {"protocol": "videorepa", "timesteps": (300,), "draws": 1}
AS_AUTHOR |= {"pools": (2,)}


def projector_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_weights(run / "checkpoints" / "step-00000002" / "projector.safetensors")


def test_the_authors_protocol_reads_3_of_12_latent_steps_and_12_of_24_of_the_teachers() -> None:
    def read(grid: TokenGrid, steps: int) -> list[float]:
        return slices(grid, steps, 1)[0].tolist()

    latent = TokenGrid.causal(torch.arange(13.0).view(1, 13, 1, 1, 1), frames=49, stride=4)
    teacher = TokenGrid(torch.arange(24.0).view(1, 24, 1, 1, 1), start=1, stride=2)
    assert AUTHORS.steps == (3, 12)
    assert read(latent, AUTHORS.steps.models) == [1, 7, 12], "the first is frame 0's own"
    assert read(teacher, AUTHORS.steps.encoders) == [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]


@pytest.mark.parametrize("choice", ["resampled", "published", "padded"])
@pytest.mark.parametrize("count", [2, 17, 49, 81])
def test_no_frame_after_the_last_shown_is_read(choice, count: int) -> None:
    for scenario, last in (("contain", 45), ("roll", 45), ("collide", 15)):
        frames = AUTHORS.shown(scenario, count, choice)
        assert len(frames) == count and frames[-1] == last == max(frames)
        assert frames == sorted(frames) and min(frames) == 0


def test_padding_repeats_the_first_frame_alone() -> None:
    assert V1_5.shown("roll", 49, "padded") == [0, 0, 0, *range(46)]
    assert V1_5.shown("collide", 49, "padded") == [0] * 33 + [*range(16)]
    assert V1_5.shown("roll", 17, "padded") == V1_5.shown("roll", 17)


def test_the_authors_protocol_leaves_other_scenarios_out_and_says_so(tmp_path: Path) -> None:
    write_physion(tmp_path / "p", train=2, test=1)
    for split in ("train", "test"):
        labels = tmp_path / "p" / split / "all_video_labels.json"
        known = json.loads(labels.read_text()) | {"pilot_dominoes_1": {"label": 1}}
        labels.write_text(json.dumps(known))
        (tmp_path / "p" / split / "pilot_dominoes_1.mp4").touch()
    stimuli, notes = AUTHORS.read(tmp_path / "p")
    assert len(stimuli) == 6 and {s.scenario for s in stimuli} == {"contain", "roll"}
    assert len(notes) == 2 and "contain, roll alone: 1 other train clips were left" in notes[0]
    for video in (tmp_path / "p" / "test").glob("*[!s]_*_img.mp4"):
        video.unlink()
    with pytest.raises(UserError, match="no video with a label of the scenarios contain, roll"):
        AUTHORS.read(tmp_path / "p")


def test_features_through_a_projector_are_its_layers_on_the_blocks_tokens(
    authors: tuple[Path, Probe], long: Recipe, runs: dict[str, Path], data: Path
) -> None:
    out, probed = authors
    straw_men = ["videomae", "pixels", "untrained"]
    assert probed.sources == ["base", "aligned+projector", "control+projector", *straw_men]
    stimulus = AUTHORS.read(data)[0][3]
    frames = read_chosen(stimulus.path, AUTHORS.shown(stimulus.scenario, 49), 16, 16)
    video = torch.from_numpy(frames)[None].permute(0, 1, 4, 2, 3).float() / 255
    parts = ("vae", "text_encoder", "transformer")
    weights = {name: projector_weights(path) for name, path in runs.items()}
    for name in ("base", "aligned", "control"):
        backbone = long.backbone.load(parts, CPU)
        if name in runs:
            backbone = Run.open(runs[name]).backbone(parts, CPU, torch.float32)
        latents = backbone.latents(
            backbone.encode_video(video), generator(long.seed, "probe latents", stimulus.id)
        )
        drawn = generator(long.seed, "probe noise", stimulus.id, 0)
        noise = torch.randn(latents.shape[1:], generator=drawn)[None]
        at = torch.tensor([300])
        noisy = backbone.diffusion.add_noise(latents, noise, at)
        with torch.no_grad(), tap(backbone.block(2)) as tapped:
            inputs = backbone.inputs(noisy, backbone.encode_text([""]), at)
            backbone.transformer(**inputs, return_dict=False)
        x = tapped.take()[0].unflatten(1, (13, 2, 2))[0, [1, 7, 12]]
        if name == "base":
            kept = features(out, "base", "t300-draw0")
        else:
            w = {key.removeprefix("each.0.projector."): v for key, v in weights[name].items()}
            for place in (0, 2, 4):
                x = x @ w[f"mlp.{place}.weight"].T + w[f"mlp.{place}.bias"]
                x = x * torch.sigmoid(x) if place < 4 else x
            assert x.shape == (3, 2, 2, 24), "the teacher's width"
            kept = features(out, folder_of(f"{name}+projector"), "t300-draw0")
        assert kept["block 2, pool 2"].shape[1] == x.numel()
        assert kept["block 2, pool 2"][3] == pytest.approx(x.flatten().numpy(), abs=2e-3)
    assert features(out, "videomae", "clean")["pool 2"].shape[1] == 12 * 2 * 2 * 24
    # The control's is trained too: it differs from the aligned run's, with which it began.
    a, b = (w["each.0.projector.mlp.0.weight"] for w in weights.values())
    assert (a - b).abs().max() > 1e-4


def test_the_confounded_comparison_is_named_and_the_fair_one_is_not(
    authors: tuple[Path, Probe], long: Recipe, runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    out, probed = authors
    (remark,) = probed.remarks  # No clip was left out.
    assert remark.startswith("aligned+projector and control+projector are read through a trained ")
    assert "and base is not, so their differences are also what a projector does" in remark
    folder = shutil.copytree(out, tmp_path / "probe")
    fair = probe(long, data, folder, models=runs, against="control+projector", **AS_AUTHOR)
    assert fair.remarks == []
    pairs = {(d.source, d.against) for d in fair.differences}
    assert ("aligned+projector", "control+projector") in pairs


def test_names_that_are_cut_alike_have_folders_of_their_own(tmp_path: Path) -> None:
    source: Any = None
    names = ("模型一", "模型二", "a+b", "a b", "a-b")
    stores = [FeatureStore(tmp_path, name, source, {"model": name}) for name in names]
    for store in stores:
        store.open()
    assert len({store.path for store in stores}) == len(names)
    assert stores[-1].path == tmp_path / "a-b"
    again = [FeatureStore(tmp_path, name, source, {"model": name}) for name in names]
    assert [store.path for store in again] == [store.path for store in stores]
    # An earlier version named the folder by the cut name alone.
    stores[0].path.rename(tmp_path / "-")
    kept, other = (FeatureStore(tmp_path, n, source, {"model": n}) for n in names[:2])
    assert kept.path == tmp_path / "-" and other.path == stores[1].path


def test_features_with_and_without_a_projector_are_never_mixed(
    authors: tuple[Path, Probe], long: Recipe, runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(authors[0], tmp_path / "probe")
    stores = folder / "probe-parts" / "features"
    projected = folder_of("aligned+projector")
    made = {
        name: json.loads((stores / name / "made-with.json").read_text())["made_with"]
        for name in ("base", projected, folder_of("control+projector"), "videomae")
    }
    assert made["base"]["projector"] is None and "projector" not in made["videomae"]
    digests = {made[name]["projector"] for name in made if "-projector" in name}
    assert len(digests) == 2 and None not in digests
    (stores / "base").rename(stores / "kept")
    (stores / projected).rename(stores / "base")
    with pytest.raises(UserError, match="differs in model, projector"):
        probe(long, data, folder, models=runs, **AS_AUTHOR)
    # The same model: nothing but the projector tells the two stores apart.
    (stores / "base").rename(stores / "aligned")
    (stores / "kept").rename(stores / "base")
    source = sources.ModelFeatures(
        runs["aligned"],
        Model.of(runs["aligned"]),
        [2],
        [sources.Condition(300, 0)],
        sources.Pooling(3, [2]),
        long.seed,
    )
    store = FeatureStore(stores, "aligned", source, made[projected] | source.made_with())
    with pytest.raises(UserError, match="measured otherwise; it differs in projector"):
        store.open()


def test_a_run_that_trains_on_is_read_at_the_step_that_is_written_down(
    authors: tuple[Path, Probe], runs: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    assert authors[1].steps == {"aligned+projector": 2, "control+projector": 2}
    run = Run(shutil.copytree(runs["aligned"], tmp_path / "run"))
    conditions, pooling = [sources.Condition(300, 0)], sources.Pooling(3, [2])
    source = sources.ModelFeatures(
        run.path, Model.of(run.path), [2], conditions, pooling, seed=0, through_projector=True
    )
    made_with, first = source.made_with(), run.trained()
    later = {name: value + 1 for name, value in first.trained.items()}
    checkpoint.save(run.checkpoints, dataclasses.replace(first, step=4, trained=later), keep=9)
    assert source.made_with() == made_with
    assert dataclasses.replace(source).made_with()["model"] != made_with["model"]

    def stop(self: Model, *_: Any) -> None:
        raise InterruptedError(self.digest)

    monkeypatch.setattr(Model, "load", stop)
    with pytest.raises(InterruptedError, match=made_with["model"]):
        source.load(CPU, torch.float32)


def test_a_projector_of_another_run_and_an_untrained_one_are_refused(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    def refused(path: Path, says: str, blocks: tuple[int, ...] = (2,)) -> None:
        with pytest.raises(UserError, match=says):
            trained_projectors(Model.of(path), path, blocks)

    swapped = shutil.copytree(runs["aligned"], tmp_path / "swapped")
    other = runs["control"] / "checkpoints" / "step-00000002" / "projector.safetensors"
    shutil.copy(other, swapped / "checkpoints" / "step-00000002")
    refused(swapped, "damaged: projector.safetensors has other content than was written")
    refused(runs["aligned"], r"no projector at block 1: its recipe aligns block 2\.", (1,))

    def planted(name: str, *changes: str, step: int = 2) -> Path:
        """A run whose checkpoint says what its weights do not."""
        run = Run.open(runs["aligned"])
        held = dataclasses.replace(run.trained(), step=step, optimizer={}, stopping=[])
        path = shutil.copytree(runs["aligned"], tmp_path / name)
        shutil.rmtree(path / "checkpoints")
        checkpoint.save(path / "checkpoints", held, keep=2)
        run.recipe.override(*changes).to_yaml(path / "recipe.yaml")
        return path

    refused(planted("untrained", step=0), "untrained at step 0: the alignment relation counted")
    refused(planted("narrow", "align.hidden=8"), r"projector in .* is of another model; .*mlp")
    weights = "The projector in .* is of another model; .*missing"
    refused(planted("conv", "align.projector=conv"), weights)
    text = (runs["aligned"] / "recipe.yaml").read_text()
    align = yaml.safe_load(text)["align"]
    refused(planted("two", f"align={json.dumps([align, align])}"), weights)
    bare = planted("bare", "align=null", "encoder=null")
    held = dataclasses.replace(Run.open(bare).trained(), projector={}, optimizer={})
    checkpoint.save(bare / "checkpoints", held, keep=2)
    refused(bare, "no projector at block 2: its recipe aligns nothing")
    held = dataclasses.replace(
        held,
        projector={
            key.replace("each.0", f"each.{n}"): value.clone()
            for n in range(2)
            for key, value in Run.open(runs["aligned"]).trained().projector.items()
        },
    )
    twice = planted("twice", f"align={json.dumps([align, align])}")
    checkpoint.save(twice / "checkpoints", held, keep=2)
    refused(twice, "has 2 projectors at block 2, of the alignments relation, relation-2")


def test_an_imported_projector_is_read_beside_its_pipeline(
    twins: dict[str, Path], tmp_path: Path
) -> None:
    """As `videorepa import` leaves it, in a folder to which the rest of the pipeline was added."""
    pipeline, folder = twins["backbone"], tmp_path / "imported"
    model = Model.of(pipeline)
    width = model.spec.shapes(model.size).grid.width
    with pytest.raises(UserError, match="neither a run nor a folder with projector.safetensors"):
        trained_projectors(model, pipeline, [2])
    assert not may_have_projector(pipeline)

    expected = Projector(width, 24, 16).half()
    published = shutil.copytree(pipeline / "transformer", tmp_path / "published")
    weights = published / "diffusion_pytorch_model.safetensors"
    names = {"mlp": "projectors.0", "conv": "downsampler_cogvideo_output"}
    extra = {
        names[key.partition(".")[0]] + "." + key.partition(".")[2]: value
        for key, value in expected.state_dict().items()
    }
    save_file(load_weights(weights) | extra, weights)
    config = json.loads((published / "config.json").read_text()) | {"align_layer": 2}
    (published / "config.json").write_text(json.dumps(config))
    import_weights(published, folder)
    for part in pipeline.iterdir():
        if part.is_dir() and part.name != "transformer":
            shutil.copytree(part, folder / part.name)
    shutil.copy(pipeline / "model_index.json", folder)
    model = Model.of(folder)

    def lay(width: int, block: int | None) -> None:
        weights = Projector(width, 24, 16).state_dict()
        about = to_metadata({"from": "VideoREPA-2B", "block": block})
        save_file(weights, folder / PROJECTOR_FILE, about)

    (found,) = trained_projectors(model, folder, [2]).values()
    expected.float()
    grid = TokenGrid(torch.randn(1, 2, 2, 2, width))
    assert torch.equal(found.on_own_grid(grid).tokens, expected.mlp(grid.tokens))
    for blocks in ([1], [1, 2]):
        with pytest.raises(UserError, match="trained at block 2; got 1"):
            trained_projectors(model, folder, blocks)
    lay(width, block=None)
    assert trained_projectors(model, folder, [1]).keys() == {1}
    lay(width + 1, block=2)
    with pytest.raises(UserError, match=f"takes tokens of {width + 1} channels"):
        trained_projectors(model, folder, [2])
    (folder / PROJECTOR_FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a projector as `videorepa import` writes it"):
        trained_projectors(model, folder, [2])


def test_what_cannot_be_read_through_a_projector_is_refused_or_read_without(
    long: Recipe, runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    path, out = save(long, tmp_path / "plain.yaml"), tmp_path / "new"
    options: dict[str, Any] = {"timesteps": (0,), "draws": 1, "pools": (1,)}
    with pytest.raises(UserError, match="plain.yaml is neither a run nor"):
        probe(long, data, out, models={"plain": path}, through_projector=True, **options)
    with pytest.raises(UserError, match="No model is there to be read through a projector"):
        probe(long, data, out, through_projector=True, **options)
    with pytest.raises(UserError, match="no projector at block 1: its recipe aligns block 2"):
        probe(long, data, out, models=runs, through_projector=True, blocks=[1], **options)
    with pytest.raises(UserError, match="reads 3 steps of models and 12 of encoders. Leave out"):
        probe(long, data, out, steps=3, **AS_AUTHOR)
    short = long.override("encoder.frames=8")
    with pytest.raises(UserError, match="reads 12 steps in time of videomae, which has 4"):
        probe(short, data, out, **AS_AUTHOR)
    short = long.override("data.frames=9", "encoder=null", "align=null")
    with pytest.raises(UserError, match="reads 3 steps in time of tiny, which has 2"):
        probe(short, data, out, blocks=[2], **AS_AUTHOR)
    assert not out.exists()
    with pytest.raises(UserError, match="Two sources have the name a[+]projector"):
        twice = {"a": runs["aligned"], "a+projector": path}
        probe(long, data, out, models=twice, **AS_AUTHOR)
    # In the author's protocol an untouched base is read as it is.
    says = "no source 'x' to compare with: base, plain, aligned[+]projector, control[+]projector,"
    with pytest.raises(UserError, match=says):
        probe(long, data, out, models={"plain": path} | runs, against="x", **AS_AUTHOR)


# The whole.


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


@pytest.mark.slow
def test_every_source_is_read_in_every_way(folder: Path, probed: Probe) -> None:
    found = {
        (a.source, a.block, a.timestep, a.draw, a.pool, a.scenario): a for a in probed.accuracies
    }
    models = [("base", 2, t, draw) for t in TIMES for draw in range(2)]
    clean = [(name, None, None, None) for name in ("videomae", "pixels", "untrained")]
    scenarios = ("contain", "roll", "all", "mean")
    assert set(found) == {(*of, p, s) for of in models + clean for p in (1, 2) for s in scenarios}
    assert len(found) == len(probed.accuracies)

    predictions = rows_of(folder / "predictions.csv")
    assert len(predictions) == (4 + 3) * 2 * 12
    for key, accuracy in found.items():
        if key[-1] == "mean":
            parts = [found[(*key[:-1], s)].percent for s in ("contain", "roll")]
            assert accuracy.percent == pytest.approx(np.mean(parts)) and accuracy.low is None
            continue
        own = [
            row
            for row in predictions
            if (row["source"], row["block"], row["timestep"], row["draw"], row["pool"])
            == tuple("" if part is None else str(part) for part in key[:5])
            and key[-1] in ("all", row["scenario"])
        ]
        assert len(own) == accuracy.n == (12 if key[-1] == "all" else 6)
        right = sum((float(row["score"]) > 0) == (row["touches"] == "True") for row in own)
        assert right == accuracy.right == sum(row["right"] == "True" for row in own)
        assert accuracy.touch == accuracy.n / 2 and accuracy.strength != 0
        assert accuracy.percent == pytest.approx(100 * right / len(own))
        assert accuracy.low <= accuracy.percent <= accuracy.high
    kept = rows_of(folder / "accuracies.csv")
    assert [float(row["percent"]) for row in kept] == [a.percent for a in probed.accuracies]


def test_differences_are_paired_by_clip_and_draw(folder: Path, probed: Probe) -> None:
    predictions = rows_of(folder / "predictions.csv")

    def right(source: str, timestep: str, draw: str) -> dict[str, bool]:
        return {
            row["clip"]: row["right"] == "True"
            for row in predictions
            if (row["source"], row["timestep"], row["draw"], row["pool"])
            == (source, timestep, draw, "1")
        }

    (found,) = (
        d
        for d in probed.differences
        if (d.source, d.timestep, d.pool, d.scenario) == ("videomae", 400, 1, "all")
    )
    assert (found.against, found.block) == ("base", 2)
    teacher = right("videomae", "", "")
    ps, only = [], np.zeros(2, int)
    for draw in "01":
        base = right("base", "400", draw)
        assert base.keys() == teacher.keys()
        b = sum(base[clip] and not teacher[clip] for clip in base)
        c = sum(teacher[clip] and not base[clip] for clip in base)
        ps.append(mcnemar_exact(b, c))
        only += (c, b)
    assert (found.only_source, found.only_against) == tuple(only) and found.n == 24
    assert found.difference == pytest.approx(100 * (only[0] - only[1]) / 24)
    assert found.p == pytest.approx(min(1.0, 2 * min(ps)))
    assert found.p <= found.p_holm <= 1
    assert len(probed.differences) == 3 * 2 * 2 * 3


def test_the_table_has_the_shape_of_the_figure(probed: Probe) -> None:
    text = table(probed)
    panels = text.split("\n\n")
    assert panels[0].startswith("contain, 1x1: 6 clips, of which 3 touch\ntimestep ")
    assert panels[3].startswith("mean, 1x1 over scenarios")
    assert panels[0].splitlines()[1].split() == ["timestep", "0", "400", "clean"]
    of = [a for a in probed.accuracies if (a.scenario, a.pool, a.source) == ("contain", 1, "base")]
    means = [np.mean([a.percent for a in of if a.timestep == t]) for t in TIMES]
    line = panels[0].splitlines()[2].split()
    assert line == ["base,", "block", "2", *(f"{mean:.1f}" for mean in means)]
    lines = {line[:24].strip(): line[24:].split() for line in panels[2].splitlines()}
    (clean,) = (
        a.percent
        for a in probed.accuracies
        if (a.scenario, a.pool, a.source) == ("all", 1, "untrained")
    )
    assert lines["untrained"] == [f"{clean:.1f}"]
    of = [a for a in probed.accuracies if (a.scenario, a.pool, a.source) == ("all", 1, "base")]
    less = [clean - np.mean([a.percent for a in of if a.timestep == t]) for t in TIMES]
    assert lines["minus base, block 2"] == [f"{value:+.1f}" for value in less]
    assert "Exact 95 % intervals are up to" in panels[0]


def test_the_report_draws_it(folder: Path, probed: Probe, browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    out = ["--out", str(path)]
    assert main(["report", "--probe", str(folder), *out]) == 0
    html = path.read_text()
    # For each pool a panel of all clips and of each scenario.
    assert html.count("<svg") == 2 * 3 and 'href="probe/probe.json"' in html
    tables = re.findall(r"All \d+ numbers.*?</table>", html, re.S)
    for pool, table_ in zip((1, 2), tables, strict=True):
        shown = re.findall(
            r">([^<>]+)</span></span></td>.*?<td>([\d.]+) %</td><td>(.*?)</td>", table_
        )
        expected = []
        for scenario in ("contain", "roll", "all", "mean"):
            of = [a for a in probed.accuracies if (a.pool, a.scenario) == (pool, scenario)]
            for source, t in dict.fromkeys((a.source, a.timestep) for a in of):
                draws = [a for a in of if (a.source, a.timestep) == (source, t)]
                assert len(draws) == (1 if t is None else 2)
                ends = [(a.low, a.high) for a in draws if a.low is not None]
                low, high = [low for low, _ in ends], [high for _, high in ends]
                interval = f"{min(low):.1f} to {max(high):.1f}" if ends else "–"
                expected.append((source, f"{np.mean([a.percent for a in draws]):.1f}", interval))
        assert shown == expected
    for difference in probed.differences:
        assert f"<td>{difference.p_holm:.3f}</td>" in html
    beyond = [d for d in probed.differences if d.p_holm < 0.05]
    assert not beyond and "videomae minus base: none of 6 differences beyond chance." in html
    page = browser.new_page(viewport={"width": 360, "height": 800}, color_scheme="dark")
    complaints: list[str] = []
    page.on("console", lambda line: complaints.append(line.text))
    page.goto(path.as_uri())
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url("**#probes")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()
    assert complaints == []
    content = json.loads((folder / "probe.json").read_text())
    content["accuracies"][3]["percent"] = "many"
    (folder / "probe.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"probe.json: accuracies.3.percent: Input should be"):
        report([], path, probes=[folder])
    (folder / "probe.json").unlink()
    with pytest.raises(UserError, match="is not a finished probe"):
        report([], path, probes=[folder])


def folder_of(source: str) -> str:
    """The name of the folder of a source's features."""
    return FeatureStore(Path(), source, cast(Any, None), {}).path.name


def features(out: Path, source: str, condition: str) -> dict[str, np.ndarray]:
    """The stored features of a source, of clips in the order of their ids."""
    folder = out / "probe-parts" / "features" / source / condition
    from safetensors import safe_open

    parts = []
    for path in folder.iterdir():
        with safe_open(path, framework="np") as file:
            ids = json.loads(file.metadata()["about"])["ids"]
        parts.append((ids, load_file(path)))
    parts.sort(key=lambda part: part[0])
    return {key: np.concatenate([found[key] for _, found in parts]) for key in parts[0][1]}


def test_features_are_the_blocks_output_for_the_clip_noised_by_hand(
    folder: Path, recipe: Recipe, data: Path
) -> None:
    stimulus = V1_5.read(data)[0][3]
    frames = read_chosen(stimulus.path, V1_5.shown(stimulus.scenario, 9), 16, 16)
    video = torch.from_numpy(frames)[None].permute(0, 1, 4, 2, 3).float() / 255
    assert recipe.encoder is not None
    teacher = recipe.encoder.load(CPU)(video).tokens
    kept = features(folder, "videomae", "clean")
    expected = teacher[:, [0, 2, 3]].mean((2, 3)).flatten()  # 4 steps: those nearest to even.
    assert kept["pool 1"][3] == pytest.approx(expected.numpy(), abs=2e-3)
    assert kept["pool 2"][3] == pytest.approx(teacher[:, [0, 2, 3]].flatten().numpy(), abs=2e-3)

    backbone = recipe.backbone.load(("vae", "text_encoder", "transformer"), CPU)
    latents = backbone.latents(
        backbone.encode_video(video), generator(recipe.seed, "probe latents", stimulus.id)
    )
    text = backbone.encode_text([""])
    for timestep, draw in ((0, 0), (400, 1)):
        drawn = generator(recipe.seed, "probe noise", stimulus.id, draw)
        noise = torch.randn(latents.shape[1:], generator=drawn)[None]
        at = torch.tensor([timestep])
        noisy = backbone.diffusion.add_noise(latents, noise, at)
        with torch.no_grad(), tap(backbone.block(2)) as tapped:
            backbone.transformer(**backbone.inputs(noisy, text, at), return_dict=False)
        # Of 3 steps of 2 x 2 tokens the first, frame 0's own, is not read.
        tokens = tapped.take()[0].unflatten(1, (3, 2, 2))[0, [1, 1, 2]]
        kept = features(folder, "base", f"t{timestep:03d}-draw{draw}")
        assert kept["block 2, pool 2"][3] == pytest.approx(tokens.flatten().numpy(), abs=2e-3)
        means = tokens.mean((1, 2)).flatten().numpy()
        assert kept["block 2, pool 1"][3] == pytest.approx(means, abs=2e-3)
    assert not np.allclose(
        features(folder, "base", "t400-draw0")["block 2, pool 1"],
        features(folder, "base", "t400-draw1")["block 2, pool 1"],
        atol=1e-3,
    )


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in (folder / "probe-parts").rglob("*.*")
    }


def test_a_finished_probe_loads_and_fits_nothing(
    folder: Path, probed: Probe, recipe: Recipe, data: Path, monkeypatch
) -> None:
    def refuse(*_, **__):
        raise AssertionError("not again")

    monkeypatch.setattr(CogVideoX, "load", refuse)
    monkeypatch.setattr(VideoMAE, "load", refuse)
    monkeypatch.setattr(physion, "decide", refuse)
    before = files(folder)
    again = probe(recipe, data, folder, **OPTIONS)
    assert again == Probe.read(folder) == probed.model_copy(update={"recipe": recipe.text()})
    assert files(folder) == before


def test_what_is_lost_is_made_again_alike_and_batches_change_nothing(
    folder: Path, probed: Probe, recipe: Recipe, data: Path
) -> None:
    before = files(folder)
    parts = folder / "probe-parts"
    lost = sorted((parts / "features" / "base" / "t400-draw1").iterdir())[0]
    readout = next((parts / "readouts").glob("base-*t400-draw1.json"))
    lost.unlink()
    readout.unlink()
    again = probe(recipe.override("data.prepare_batch=5"), data, folder, **OPTIONS)
    after = files(folder)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name][0] != before[name][0]}
    assert changed == {str(path.relative_to(folder)) for path in (lost, readout)}
    assert [a.percent for a in again.accuracies] == [a.percent for a in probed.accuracies]


def test_another_timestep_costs_itself_alone(folder: Path, recipe: Recipe, data: Path) -> None:
    before = files(folder)
    more = probe(recipe, data, folder, **OPTIONS | {"timesteps": (0, 200, 400)})
    after = files(folder)
    assert {name: after[name] for name in before} == before
    assert all("t200" in name for name in after.keys() - before.keys())
    kept = json.loads((folder / "probe-parts/features/base/made-with.json").read_text())
    assert list(kept["made_with"]["shown"]) == ["contain", "roll"], "alike in every process"
    assert {a.timestep for a in more.accuracies} == {0, 200, 400, None}


@pytest.mark.slow
def test_an_aligned_run_stands_beside_the_base(
    folder: Path, recipe: Recipe, data: Path, tmp_path: Path
) -> None:
    faster = recipe.override("optim.learning_rate=0.05")
    prepare(faster)
    run = train(faster, tmp_path / "aligned")
    found = probe(
        recipe,
        data,
        folder,
        models={"aligned": run.path, "same": save(recipe, tmp_path / "same.yaml")},
        against="aligned",
        **OPTIONS | {"draws": 1},
    )
    assert found.sources == ["base", "aligned", "same", "videomae", "pixels", "untrained"]
    kept = {
        name: features(folder, name, "t000-draw0")["block 2, pool 2"]
        for name in ("base", "aligned", "same")
    }
    assert np.array_equal(kept["base"], kept["same"])
    assert not np.allclose(kept["base"], kept["aligned"], atol=0.05)
    assert {d.against for d in found.differences} == {"aligned"}
    assert {d.source for d in found.differences} == {*found.sources} - {"aligned"}


def save(recipe: Recipe, path: Path) -> Path:
    recipe.to_yaml(path)
    return path


# Bad input.


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        (["seed=4"], {}, "it differs in seed"),
        (["data.width=32"], {}, "it differs in size"),
        ([], {"blocks": [1]}, "it differs in blocks"),
        ([], {"pools": [1]}, "it differs in pools"),
        ([], {"steps": 2}, "it differs in steps"),
        ([], {"frames": "published"}, "it differs in shown"),
        ([], {"leave_out": ["it2_rollingSliding_0001_img.mp4"]}, "it differs in left out"),
    ],
)
def test_a_stale_store_is_refused(
    folder: Path, recipe: Recipe, data: Path, changes, options, says
) -> None:
    before = files(folder)
    with pytest.raises(UserError, match=f"measured otherwise; {says}"):
        probe(recipe.override(*changes), data, folder, **OPTIONS | options)
    assert files(folder) == before


def test_a_store_of_videos_read_otherwise_is_refused(
    folder: Path, recipe: Recipe, data: Path, monkeypatch
) -> None:
    monkeypatch.setattr(sys.modules["videorepa.probe"], "READER", 1)
    with pytest.raises(UserError, match="measured otherwise; it differs in reader"):
        probe(recipe, data, folder, **OPTIONS)


def test_a_foreign_or_damaged_store_is_refused(
    folder: Path, recipe: Recipe, data: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(data, tmp_path / "own")
    video = own / "test" / "it2_rollingSliding_0003_img.mp4"
    shutil.copy(own / "test" / "it2_rollingSliding_0004_img.mp4", video)
    with pytest.raises(UserError, match="measured otherwise; it differs in clips"):
        probe(recipe, own, folder, **OPTIONS)
    parts = folder / "probe-parts"
    (parts / "readouts" / "base-block2-pool1-t000-draw0.json").unlink()
    broken = next((parts / "features" / "base" / "t000-draw0").iterdir())
    broken.write_bytes(broken.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{broken.name} is damaged"):
        probe(recipe, data, folder, **OPTIONS)
    (parts / "features" / "base" / "made-with.json").unlink()
    with pytest.raises(UserError, match="holds features but not what they were made with"):
        probe(recipe, data, folder, **OPTIONS)


def test_clips_that_cannot_be_read_or_are_left_out_cost_themselves_alone(
    recipe: Recipe, data: Path, tmp_path: Path, capsys
) -> None:
    own = shutil.copytree(data, tmp_path / "own")
    (own / "test" / "it2_rollingSliding_0003_img.mp4").write_bytes(b"no video")
    names = tmp_path / "buggy.txt"
    names.write_text("it2_rollingSliding_0001_img\nit2_rollingSliding_9999_img.mp4\n\n")
    path = save(recipe.override("encoder=null", "align=null"), tmp_path / "recipe.yaml")
    command = ["probe", str(path), "--data", str(own), "--out", str(tmp_path / "probe")]
    command += ["--blocks", "3", "--timesteps", "100", "--draws", "1", "--pools", "1"]
    assert main([*command, "--leave-out", str(names)]) == 1, "a clip was lost"
    said, error = capsys.readouterr()
    assert "1 clip could not be read; the tables are of the others" in error
    assert "'test/it2_rollingSliding_0003_img': " in error
    assert "it2_rollingSliding_0003_img was left out" in said and "cannot be opened" in said
    assert "Not there, though named to be left out: it2_rollingSliding_9999_img." in said
    assert "roll, 1x1: 4 clips" in said and "contain, 1x1: 6 clips" in said
    rows = rows_of(tmp_path / "probe" / "predictions.csv")
    assert len(rows) == 10 and {row["source"] for row in rows} == {"base"}
    assert "it2_rollingSliding_0001_img" not in {row["clip"] for row in rows}


def test_too_few_readable_clips_are_refused_before_a_model_is_loaded(
    recipe: Recipe, data: Path, tmp_path: Path, monkeypatch
) -> None:
    own = shutil.copytree(data, tmp_path / "own")
    for path in (own / "train").glob("*.mp4"):
        path.write_bytes(b"no video")
    monkeypatch.setattr(sources.ModelFeatures, "load", None)
    says = r"too few training clips .*Found 0 .*'train/\S+' could not be read: .* Nor could \d+ m"
    with pytest.raises(UserError, match=says):
        probe(recipe, own, tmp_path / "new", **OPTIONS)


def test_bad_input_is_refused_before_anything_is_loaded(
    recipe: Recipe, data: Path, tmp_path: Path, capsys
) -> None:
    path = save(recipe, tmp_path / "recipe.yaml")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("Mine.")

    def refused(*options: str, says: str, out: Path = tmp_path / "new") -> None:
        given = ["probe", str(path), "--data", str(data), "--out", str(out)]
        given += [*options] if "--pools" in options else ["--pools", "1", *options]
        assert main(given) == 1
        said = capsys.readouterr().err
        assert says in said, said
        assert not (tmp_path / "new").exists()

    refused(out=taken, says="is not a probe")
    assert [file.name for file in taken.iterdir()] == ["thesis.txt"]
    refused("--blocks", "4", says="numbered 1 to 3; got 4")
    refused("--timesteps", "1000", says="Timesteps are 0 to 999")
    refused("--pools", "0", says="one or more draws, steps and pools")
    refused("--draws", "1000000000", says="at most 1,000; got 1000000000")
    refused("--pools", "1", "99", says="2x2 tokens a step, so pools are 1 to 2; got [1, 99]")
    refused("--against", "aligned", says="no source 'aligned' to compare with: base, videomae")
    refused("--data", str(tmp_path), says="has no folder 'train'")
    refused("--models", str(taken), says="is not a run")
    refused("--through-projector", says="No model is there to be read through a projector")
    refused("--protocol", "videorepa", "--steps", "3", says="Leave out --steps")
    refused("--teacher", "videomae=x,frame=8", says="frame: unknown key; did you mean frames")
    refused("--leave-out", str(tmp_path / "none"), says="cannot be read as text")
    few = write_physion(tmp_path / "few", train=2, test=1)
    refused("--data", str(few), says="too few training clips of contain, roll. Found 2 clips")
    every = tmp_path / "every.txt"
    every.write_text("\n".join(path.stem for path in (data / "test").glob("*.mp4")))
    refused("--leave-out", str(every), says="No test clip is left to score")
    with pytest.raises(UserError, match="aligns no block"):
        probe(recipe.override("encoder=null", "align=null"), data, tmp_path / "new")
    with pytest.raises(UserError, match="Two sources have the name base"):
        probe(recipe, data, tmp_path / "new", models={"base": path}, pools=[1])
    assert recipe.encoder is not None
    longer = recipe.encoder.model_copy(update={"frames": 48})
    with pytest.raises(UserError, match="takes 48 frames and the clip has 9"):
        probe(recipe, data, tmp_path / "new", teachers={"longer": longer}, pools=[1])
    with pytest.raises(UserError, match="has the protocols v1.5, 2021"):
        probe(recipe, data, tmp_path / "new", protocol="v1")
