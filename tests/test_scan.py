"""The scan: its measures against plain restatements, its straw men, its folder and its page."""

from __future__ import annotations

import csv
import gc
import itertools
import json
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import recipe_values, write_clips
from videorepa.backbones import Backbone, timestep_of_noise
from videorepa.backbones.cogvideox import CogVideoX
from videorepa.cli import main
from videorepa.encoders._video import VideoViT
from videorepa.encoders.pixels import Pixels
from videorepa.encoders.videomae import VideoMAE
from videorepa.errors import UserError
from videorepa.losses import Relations
from videorepa.probing.blocks import Blocks, encode
from videorepa.probing.clips import Clips
from videorepa.probing.closeness import closeness, linear_cka, next_clips, own, spread
from videorepa.probing.records import Measurement, Scan
from videorepa.probing.scan_table import sentences, table
from videorepa.probing.sources import (
    Condition,
    Pooling,
    all_teachers,
    probed_sources,
    straw_men,
    teachers_from,
)
from videorepa.recipe import Recipe
from videorepa.report import report
from videorepa.scan import scan
from videorepa.tokens import TokenGrid

CPU = torch.device("cpu")
LEVELS = (0.2, 0.8)


@pytest.fixture(scope="module")
def once(
    twins: dict[str, Path], clips: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Scan]:
    root = tmp_path_factory.mktemp("scanned")
    recipe = Recipe.parse(recipe_values(twins, clips, root / "cache"))
    return root / "scan", scan(recipe, root / "scan", clips=4, noise_levels=LEVELS)


@pytest.fixture
def folder(once: tuple[Path, Scan], tmp_path: Path) -> Path:
    """A scan's folder that a test may change."""
    return shutil.copytree(once[0], tmp_path / "scan")


@pytest.fixture
def scanned(once: tuple[Path, Scan]) -> Scan:
    return once[1]


@pytest.fixture
def no_page(monkeypatch) -> None:
    """Drawing takes half of a tiny scan's time."""
    monkeypatch.setattr(sys.modules["videorepa.scan"], "report", lambda *_, **__: None)


# The measures.


def plain_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """HSIC of the linear kernels with an explicit centring matrix, as the paper writes it."""
    centre = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    k, o = x @ x.T, y @ y.T

    def hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.trace(a @ centre @ b @ centre)

    return (hsic(k, o) / (hsic(k, k) * hsic(o, o)).sqrt()).item()


features = st.tuples(
    st.integers(3, 12), st.integers(1, 16), st.integers(1, 16), st.integers(0, 2**32)
)


@given(features)
def test_cka_is_the_published_formula_by_either_way(sizes) -> None:
    n, p, q, seed = sizes
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, w, generator=draw, dtype=torch.float64) for w in (p, q))
    assert linear_cka(x, y).item() == pytest.approx(plain_cka(x, y), abs=1e-9)


@given(features, st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_cka_does_not_see_rotation_scale_and_offset(sizes, scale: float, offset: float) -> None:
    n, p, q, seed = sizes
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, w, generator=draw, dtype=torch.float64) for w in (p, q))
    turn, _ = torch.linalg.qr(torch.randn(p, p, generator=draw, dtype=torch.float64))
    moved = scale * (x @ turn) + offset
    assert linear_cka(moved, y).item() == pytest.approx(linear_cka(x, y).item(), abs=1e-6)
    assert linear_cka(moved, x).item() == pytest.approx(1, abs=1e-6)


def test_cka_of_features_that_do_not_vary_is_0() -> None:
    flat = torch.full((50, 7), 0.1)
    assert linear_cka(flat, torch.randn(50, 3)) == linear_cka(flat, flat) == 0


def test_equal_relations_have_no_error_whatever_the_width() -> None:
    tokens = torch.randn(2, 4, 3, 3, 6)
    turn, _ = torch.linalg.qr(torch.randn(9, 9))
    student = TokenGrid(tokens @ turn[:6] * 7, start=1, stride=2)
    teacher = TokenGrid(tokens, start=1, stride=2)
    found = closeness(student, teacher, teacher)
    assert found["relation_error"] == pytest.approx([0, 0], abs=1e-5)
    assert found["cka"] == pytest.approx([1, 1], abs=1e-5)


def test_relation_error_is_the_mean_over_all_pairs_of_each_clip() -> None:
    """Tokens that are all alike against tokens at right angles: all but the pairs with oneself."""
    alike, apart = torch.ones(1, 2, 2, 2, 3), torch.eye(8).reshape(1, 2, 2, 2, 8)
    student = TokenGrid(torch.cat([alike, alike]))
    teacher = TokenGrid(torch.cat([apart, torch.ones_like(apart)]))
    assert closeness(student, teacher, teacher)["relation_error"] == pytest.approx(
        [56 / 64, 0], abs=1e-6
    )


@given(seed=st.integers(0, 1000), shared=st.floats(0, 2))
def test_mean_and_spread_are_those_of_all_pairs_of_different_tokens(
    seed: int, shared: float
) -> None:
    tokens = torch.randn(2, 2, 2, 2, 5, generator=torch.Generator().manual_seed(seed)) + shared
    grid = TokenGrid(tokens)
    unit = torch.nn.functional.normalize(tokens.flatten(1, 3), dim=-1)
    row, column = torch.triu_indices(8, 8, 1)
    relations = (unit @ unit.mT)[:, row, column]
    found = spread(Relations(grid))
    assert found["relation_mean"] == pytest.approx(relations.mean(1).tolist(), abs=1e-5)
    expected = relations.std(1, unbiased=False).tolist()
    assert found["relation_spread"] == pytest.approx(expected, abs=1e-4)
    assert closeness(grid, grid, grid)["relation_correlation"] == pytest.approx([1, 1], abs=1e-4)


def test_what_is_the_same_in_every_clip_says_nothing_about_one() -> None:
    draw = torch.Generator().manual_seed(0)
    places = torch.randn(1, 4, 3, 3, 8, generator=draw).expand(6, -1, -1, -1, -1)
    clips = torch.randn(6, 4, 3, 3, 8, generator=draw)
    for share, most in ((0.0, 1e-6), (0.5, 0.6), (2.0, 1.1)):
        teacher = TokenGrid(places + share * clips)
        others = next_clips(teacher, slice(None))
        told = own(teacher, others)["clip_correlation"]
        found = closeness(TokenGrid(places), teacher, others)
        assert np.mean(told) <= most and np.mean(told) >= most - 0.3
        # The teacher itself has all of it, and places none, however well they go with it.
        assert closeness(teacher, teacher, others)["clip_correlation"] == pytest.approx(told)
        assert abs(np.mean(found["clip_correlation"])) < 0.05
        if share < 1:
            assert np.mean(found["relation_correlation"]) > 0.7
    rows = [1, 2, 0]
    assert torch.equal(next_clips(teacher, slice(3, 6)).tokens[:2], teacher.tokens[4:])
    three = TokenGrid(clips[:3])
    assert torch.equal(next_clips(three, slice(None)).tokens, clips[:3][rows])


def measured(mean: float, spread: float, **of: object) -> list[Measurement]:
    values = {
        "relation_error": 0.2,
        "clip_correlation": 0.1,
        "relation_mean": mean,
        "relation_spread": spread,
    }
    about = {"teacher": "t", "low": 0.0, "high": 1.0, "n": 2, "sd": 0.1, "block": None} | of
    about = {"noise": None if about["block"] is None else 0.5} | about
    return [Measurement(measure=m, value=v, **about) for m, v in values.items()]


@pytest.mark.parametrize(
    ("mean", "wide", "said"),
    [
        (0.65, 0.16, "spreads from 0.16 to 0.16."),
        (0.93, 0.16, "TRD without a projector would bring every block"),
        (0.68, 0.40, "TRD without a projector would bring every block"),
        (0.68, 0.08, "TRD without a projector would bring every block"),
    ],
)
def test_a_scan_says_where_trd_would_change_mean_and_spread(mean, wide, said) -> None:
    straw = [m for name in ("pixels", "untrained") for m in measured(0.5, 0.5, source=name)]
    teacher = measured(mean, wide, source="teacher")
    blocks = [m for b in (1, 2) for m in measured(0.65, 0.16, source="block", block=b)]
    line = sentences(["t"], [*straw, *teacher, *blocks])[2]
    assert f"Relations of t have a mean of {mean:.2f} and a spread of {wide:.2f}" in line
    assert said in line
    # Of two blocks, one of which is like the teacher.
    other = measured(mean, wide, source="block", block=2)
    line = sentences(["t"], [*straw, *teacher, *blocks[:4], *other])[2]
    assert ("bring block 1 to" in line) == (said.startswith("TRD"))


def test_raw_pixels_are_averaged_over_what_the_teachers_tokens_cover(recipe: Recipe) -> None:
    assert recipe.encoder is not None
    spec = straw_men(recipe.encoder)["pixels"]
    assert spec == Pixels(frames=8, height=16, width=16, patch=8, tubelet=2)
    assert spec.shape(9).size == recipe.encoder.shape(9).size
    video = torch.zeros(1, 9, 3, 16, 16)
    video[:, 1:3, 0, :8, 8:] = 1.0
    found = spec.load(CPU)(video)
    assert (found.start, found.stride, found.tokens.shape) == (1, 2, (1, 4, 2, 2, 3))
    assert found.tokens[0, 0, 0, 1].tolist() == [1, -1, -1]
    assert (found.tokens == 1).sum() == 1


def test_an_untrained_teacher_keeps_nothing_but_its_sizes(recipe: Recipe) -> None:
    assert recipe.encoder is not None
    video = torch.rand(1, 9, 3, 16, 16)
    spec = straw_men(recipe.encoder)["untrained"]
    encoders = [recipe.encoder.load(CPU), spec.load(CPU), spec.load(CPU)]
    trained, untrained, again = (encoder(video).tokens for encoder in encoders)
    assert torch.equal(untrained, again) and not torch.allclose(trained, untrained, atol=0.1)
    before = dict(encoders[0].named_parameters())
    after = {name.removeprefix("of."): value for name, value in encoders[1].named_parameters()}
    weights = [name for name, value in before.items() if value.dim() > 1]
    assert weights and not any(torch.equal(before[name], after[name]) for name in weights)


# Noise levels.

LATENTS = torch.zeros(3, 4, 4, 4)


@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_noise_level_is_a_share_of_variance(recipe: Recipe, level: float) -> None:
    backbone = recipe.backbone.load((), CPU)
    timestep = timestep_of_noise(backbone, level, LATENTS)
    assert 1 - backbone.diffusion.alphas_cumprod[timestep] == pytest.approx(level, abs=0.01)


class _Straight:
    """A diffusion that goes straight from clip to noise, with times of its own."""

    def add_noise(self, clean, noise, timestep):
        return (1 - timestep[:, None]) * clean + timestep[:, None] * noise


class _Flow:
    diffusion = _Straight()

    def sample_timesteps(self, latents, generator: torch.Generator) -> torch.Tensor:
        return 0.6 * torch.rand(len(latents), generator=generator)


def test_noise_levels_hold_for_other_diffusions_and_may_be_out_of_reach() -> None:
    assert timestep_of_noise(_Flow(), 0.5, LATENTS).item() == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(UserError, match=r"nearest is 0\.69"):
        timestep_of_noise(_Flow(), 0.9, LATENTS)


# The blocks.


def test_each_blocks_reading_is_of_that_block(recipe: Recipe) -> None:
    """By hand: the timestep from the schedule, hooks of our own, the grids' meeting as a matrix."""
    frames = np.random.default_rng(0).integers(0, 255, (2, 9, 16, 16, 3), "uint8")
    clips = Clips(frames, ["A ball.", "Another."], ["0", "1"], batch=1)
    assert recipe.encoder is not None
    teacher = recipe.encoder.load(CPU)(clips.video(slice(0, 2)))
    backbone = recipe.backbone.load(("vae", "text_encoder", "transformer"), CPU)
    with torch.no_grad():  # Fresh weights are so small that all blocks give nearly the same.
        for parameter in backbone.transformer.transformer_blocks.parameters():
            parameter.mul_(3)
    encoded = encode(backbone, clips, seed=3)
    found = Blocks(backbone, [1, 2, 3]).distances(encoded, 0.5, {"videomae": teacher})
    errors = [r for r in found["videomae"] if r.measure == "relation_error"]

    outputs: list[torch.Tensor] = []
    for block in backbone.transformer.transformer_blocks:
        block.register_forward_hook(lambda *passed: outputs.append(passed[2][0]))
    alphas = backbone.diffusion.alphas_cumprod
    timestep = (1 - alphas - 0.5).abs().argmin().expand(2)
    alpha = alphas[timestep[0]].float()
    noisy = alpha.sqrt() * torch.stack(encoded.latents)
    noisy = noisy + (1 - alpha).sqrt() * torch.stack(encoded.noise)
    with torch.no_grad():
        text = backbone.encode_text(clips.captions)["encoder_hidden_states"]
        backbone.transformer(noisy, text, timestep)
    # Of 3 steps of 2 x 2 tokens the first is dropped, and time is stretched by two.
    stretch = torch.tensor([[0, 1, 0], [0, 0.75, 0.25], [0, 0.25, 0.75], [0, 0, 1]])
    theirs = torch.nn.functional.normalize(teacher.tokens.flatten(1, 3), dim=-1)
    expected = []
    for output in outputs:
        ours = torch.einsum("ts,bsnd->btnd", stretch, output.unflatten(1, (3, 4))).flatten(1, 2)
        ours = torch.nn.functional.normalize(ours, dim=-1)
        expected.append((ours @ ours.mT - theirs @ theirs.mT).abs().mean().item())
    assert [r.block for r in errors] == [1, 2, 3]
    # The nearest of the drawn timesteps may be a neighbour of the nearest of all.
    assert [r.value for r in errors] == pytest.approx(expected, abs=2e-3)
    assert min(abs(a - b) for a, b in itertools.combinations(expected, 2)) > 4e-3


def test_a_scan_finds_every_block_at_every_level(folder: Path, scanned: Scan) -> None:
    found = {(r.measure, r.source, r.block, r.noise): r for r in scanned.measurements}
    blocks = [("block", block, level) for block in (1, 2, 3) for level in LEVELS]
    straw = [("pixels", None, None), ("untrained", None, None)]
    near = {
        (m, *of)
        for m in ("relation_error", "relation_correlation", "clip_correlation", "cka")
        for of in blocks + straw
    }
    teacher = ("teacher", None, None)
    spreads = {
        (f"relation_{m}", *of) for m in ("mean", "spread") for of in [*blocks, *straw, teacher]
    }
    assert set(found) == near | spreads | {("clip_correlation", *teacher)}
    for each in scanned.measurements:
        assert each.n == 4 and each.teacher == "videomae" and each.sd is not None
        assert each.low <= each.value <= each.high
    assert len({r.value for r in scanned.measurements}) == len(scanned.measurements)
    assert scanned.notes == []
    said = table(scanned)
    shown = [r for r in scanned.measurements if (r.measure, r.source, r.block, r.noise) in near]
    assert all(f"{r.value:.3f}" in said for r in shown)
    assert said.index("block 1") < said.index("block 3") < said.index("raw pixels")
    errors = {
        block: np.mean([found["relation_error", "block", block, level].value for level in LEVELS])
        for block in (1, 2, 3)
    }
    assert f"block {max(errors, key=errors.__getitem__)} is farthest" in scanned.says[0]
    assert f"block {min(errors, key=errors.__getitem__)} nearest" in scanned.says[0]
    rows = list(csv.DictReader((folder / "scan.csv").open()))
    kept = json.loads((folder / "scan.json").read_text())["measurements"]
    assert [float(row["value"]) for row in rows] == [row["value"] for row in kept]
    assert [r.value for r in scanned.measurements] == [row["value"] for row in kept]


@pytest.mark.usefixtures("no_page")
def test_batches_and_other_teachers_change_nothing(
    scanned: Scan, recipe: Recipe, tmp_path: Path
) -> None:
    other = VideoMAE(weights=recipe.encoder.weights, frames=4, height=16, width=16)
    again = scan(
        recipe.override("data.prepare_batch=3"),
        tmp_path / "again",
        teachers={"short": other},
        clips=4,
        noise_levels=LEVELS,
    )
    ours = [r.value for r in again.measurements if r.teacher == "videomae"]
    assert ours == pytest.approx([r.value for r in scanned.measurements], abs=1e-4)
    theirs = [r.value for r in again.measurements if r.teacher == "short"]
    assert len(theirs) == len(ours) and theirs != pytest.approx(ours, abs=1e-2)
    assert again.says[3].startswith("Over all noise levels") and "short" in again.says[3]


# The folder.


def parts(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in (folder / "scan-parts").iterdir()
    }


@pytest.mark.usefixtures("no_page")
def test_a_finished_scan_loads_nothing_and_says_the_same(
    folder: Path, scanned: Scan, recipe: Recipe, monkeypatch
) -> None:
    def refuse(*_):
        raise AssertionError("a model was loaded")

    for kind in (CogVideoX, VideoMAE):
        monkeypatch.setattr(kind, "load", refuse)
    before = parts(folder)
    again = scan(recipe, folder, clips=4, noise_levels=LEVELS)
    assert again == Scan.read(folder) == scanned.model_copy(update={"recipe": recipe.text()})
    assert parts(folder) == before


@pytest.mark.usefixtures("no_page")
def test_what_is_finished_is_kept_and_the_rest_is_measured_alike(
    folder: Path, scanned: Scan, recipe: Recipe, monkeypatch
) -> None:
    before = parts(folder)
    lost = next(name for name in before if name.endswith("noise-0.8.json"))
    (folder / "scan-parts" / lost).unlink()
    levels = []
    plain = Blocks.distances

    def noted(self, encoded, level, teachers):
        levels.append(level)
        return plain(self, encoded, level, teachers)

    monkeypatch.setattr(Blocks, "distances", noted)
    again = scan(recipe, folder, clips=4, noise_levels=LEVELS)
    assert again == scanned.model_copy(update={"recipe": recipe.text()}) and levels == [0.8]
    after = parts(folder)
    assert {k: v for k, v in after.items() if k != lost} == {
        k: v for k, v in before.items() if k != lost
    }
    assert after[lost][1] == before[lost][1]
    scan(recipe, folder, clips=4, noise_levels=(*LEVELS, 0.5))
    assert levels == [0.8, 0.5]


@pytest.mark.usefixtures("no_page")
def test_a_stopped_scan_keeps_its_levels(recipe: Recipe, tmp_path: Path, monkeypatch) -> None:
    plain = Blocks.distances

    def stopped(self, encoded, level, teachers):
        if level > 0.5:
            raise KeyboardInterrupt
        return plain(self, encoded, level, teachers)

    monkeypatch.setattr(Blocks, "distances", stopped)
    with pytest.raises(KeyboardInterrupt):
        scan(recipe, tmp_path / "scan", clips=4, noise_levels=LEVELS)
    kept = sorted(path.name[-14:] for path in (tmp_path / "scan" / "scan-parts").iterdir())
    assert kept == ["noise-0.2.json", "straw-men.json"]
    monkeypatch.setattr(Blocks, "distances", plain)
    assert len(scan(recipe, tmp_path / "scan", clips=4, noise_levels=LEVELS).measurements) == 51


# Bad input.


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        (["seed=4"], {}, "it differs in seed"),
        (["backbone.tiling=true"], {}, "it differs in backbone"),
        (["data.fps=4"], {}, "it differs in fps"),
        ([], {"clips": 3}, "it differs in clips"),
        ([], {"blocks": [1]}, "it differs in blocks"),
    ],
)
def test_a_stale_part_is_refused(folder: Path, recipe: Recipe, changes, options, says) -> None:
    before = parts(folder)
    with pytest.raises(UserError, match=f"measured otherwise; {says}"):
        scan(
            recipe.override(*changes),
            folder,
            **{"clips": 4, "noise_levels": LEVELS, **options},
        )
    assert parts(folder) == before


def test_a_part_of_videos_read_otherwise_is_refused(
    folder: Path, recipe: Recipe, monkeypatch
) -> None:
    monkeypatch.setattr(sys.modules["videorepa.scan"], "READER", 1)
    with pytest.raises(UserError, match="measured otherwise; it differs in reader"):
        scan(recipe, folder, clips=4, noise_levels=LEVELS)


def test_a_damaged_part_is_named(folder: Path, recipe: Recipe) -> None:
    part = next((folder / "scan-parts").glob("*noise-0.2.json"))
    part.write_text(part.read_text()[:-20])
    with pytest.raises(UserError, match=f"{part.name} is damaged"):
        scan(recipe, folder, clips=4, noise_levels=LEVELS)


@pytest.mark.usefixtures("no_page")
def test_clips_that_cannot_be_read_cost_themselves_alone(
    twins, recipe: Recipe, tmp_path: Path
) -> None:
    manifest = write_clips(tmp_path / "own", count=3)
    own = recipe.override(f"data.manifest={manifest}")
    (tmp_path / "own" / "clip1.mp4").write_bytes(b"no video")
    found = scan(own, tmp_path / "scan", noise_levels=[0.5], blocks=[1])
    assert {r.n for r in found.measurements} == {2}
    assert any("'clip1.mp4' was left out" in note for note in found.notes)
    assert any("Only 2 of the 12 clips" in note for note in found.notes)
    assert "was left out" in table(found)
    (tmp_path / "own" / "clip0.mp4").unlink()
    with pytest.raises(UserError, match="1 of 3 clips can be read"):
        scan(own, tmp_path / "other")


def test_bad_input_is_refused_before_anything_is_loaded(
    recipe: Recipe, tmp_path: Path, monkeypatch, capsys
) -> None:
    path = tmp_path / "recipe.yaml"
    recipe.to_yaml(path)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("Mine.")

    def refused(*options: str, says: str, out: Path = tmp_path / "new") -> None:
        assert main(["scan", str(path), "--out", str(out), *options]) == 1
        said = capsys.readouterr().err
        assert says in said, said
        assert not (tmp_path / "new").exists()

    refused(out=taken, says="is not a scan")
    assert [file.name for file in taken.iterdir()] == ["thesis.txt"]
    refused("--blocks", "3", "4", says="numbered 1 to 3; got 3, 4")
    refused("--blocks", "0", says="numbered 1 to 3; got 0")
    refused("--noise", "0.5", "1.5", says="from 0 to 1")
    refused("--clips", "1", says="2 clips or more")
    refused("--teacher", "videomea=x", says="Did you mean videomae")
    refused("--teacher", "videomae", says="NAME=WEIGHTS")
    refused("--teacher", "videomae=x,frames", says="NAME=WEIGHTS")
    refused("--teacher", "videomae=x,frame=8", says="frame: unknown key; did you mean frames")
    refused("--teacher", "videomae=/nowhere", says="nothing at /nowhere")
    refused("--teacher", f"videomae={recipe.encoder.weights},frames=10", says="takes 10 frames")
    lone = recipe.override("encoder=null", "align=null")
    with pytest.raises(UserError, match="has no encoder"):
        scan(lone, tmp_path / "new")
    with pytest.raises(UserError, match="Two teachers have the name videomae"):
        scan(recipe, tmp_path / "new", teachers={"videomae": recipe.encoder})


def test_a_teacher_of_the_recipes_kind_has_its_settings_and_others_their_own(
    recipe: Recipe,
) -> None:
    text = "videomae=other.pth,height=32"
    spec = teachers_from([text], recipe)[text]
    assert (spec.weights, spec.frames, spec.height, spec.width) == ("other.pth", 8, 32, 16)
    lone = recipe.override("encoder=null", "align=null")
    spec = teachers_from(["videomae=x"], lone)["videomae"]
    assert (spec.frames, spec.height, spec.width) == (48, 160, 240)
    assert set(teachers_from(["videomae=x", "videomae=y"], lone)) == {"videomae=x", "videomae=y"}


def test_teachers_that_terms_name_themselves_are_the_recipes_too(recipe: Recipe) -> None:
    spec = recipe.encoder
    small, large = (spec.model_dump(mode="json") | {"frames": frames} for frames in (4, 8))
    block = {"block": 1, "loss": {"name": "cosine"}}
    own = recipe.override(
        "encoder=null", f"align={json.dumps([{**block, 'encoder': of} for of in (large, small)])}"
    )
    assert all_teachers(own, {}) == {"videomae": spec, "videomae-2": own.teachers[1]}
    assert own.teachers[1].frames == 4
    assert teachers_from(["videomae=x"], own)["videomae=x"].frames == 8
    pooling = Pooling(1, [1])
    sources = [
        [*probed_sources(of, {}, {}, [1], [Condition(0, 0)], pooling, pooling, [])]
        for of in (recipe, own)
    ]
    assert sources[0] == ["base", "videomae", "pixels", "untrained"]
    assert sources[1] == ["base", "videomae", "videomae-2", "pixels", "untrained"]


# The page.


def test_the_page_shows_it(folder: Path, scanned: Scan, tmp_path: Path) -> None:
    html = (folder / "report.html").read_text()
    assert html.count("<svg") == 4 and "Where to align: scan" in html
    assert all(f"{r.value:.3f}".replace("-", "−") in html for r in scanned.measurements)
    assert "aligns: block 2" in html and "noise 0.2" in html
    with pytest.raises(UserError, match="not a finished scan"):
        report([], tmp_path / "report.html", scans=[tmp_path])
    assert main(["report", "--scan", str(folder), "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text().count("<svg") == 4


def test_the_page_sets_names_of_settings_as_code(scanned: Scan, tmp_path: Path) -> None:
    says = ["<b> has the loss `relation<x>`.", "A stray ` stays <so>."]
    (tmp_path / "scan").mkdir()
    scanned.model_copy(update={"says": says}).write(tmp_path / "scan")
    html = report([], tmp_path / "report.html", scans=[tmp_path / "scan"]).read_text()
    assert "<li>&lt;b&gt; has the loss <code>relation&lt;x&gt;</code>.</li>" in html
    assert "<li>A stray ` stays &lt;so&gt;.</li>" in html


def test_a_browser_shows_it_in_light_dark_and_on_a_phone(folder: Path, browser) -> None:
    complaints: list[str] = []
    page = browser.new_page(color_scheme="light", viewport={"width": 1280, "height": 900})
    page.on("console", lambda line: complaints.append(line.text))
    page.goto((folder / "report.html").as_uri())
    plots = page.locator(".scan svg")
    assert plots.count() == 4
    ink = "getComputedStyle(document.querySelector('.scan svg text')).fill"
    light = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(ink) != light
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert all((plots.nth(place).bounding_box() or {})["height"] > 100 for place in range(4))
    page.close()
    assert complaints == []


def test_one_model_is_in_memory_at_once(recipe: Recipe, tmp_path: Path, monkeypatch) -> None:
    """No model is part of a cycle, which would keep it until the collector comes by."""
    models: list[weakref.ref] = []

    def watched(kind: type) -> None:
        begin = kind.__init__

        def __init__(self: Any, *given: Any, **named: Any) -> None:
            assert not [each for each in models if each() is not None]
            begin(self, *given, **named)
            parts = [vars(self).get("vae"), vars(self).get("transformer")]
            parts += vars(self).get("text_parts", {}).values()
            models.extend(weakref.ref(each) for each in (self, *parts) if each is not None)

        monkeypatch.setattr(kind, "__init__", __init__)

    watched(Backbone)
    watched(VideoViT)
    gc.collect()
    gc.disable()
    try:
        scan(recipe, tmp_path / "scan", clips=2, noise_levels=(0.5,), blocks=(1,))
    finally:
        gc.enable()
    assert len(models) >= 5
