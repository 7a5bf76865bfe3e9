"""The path from video files to an export, on tiny random twins."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import sampled_by_card, tree, write_clips
from videorepa.align.contract import check
from videorepa.artifacts.checkpoint import Checkpoint
from videorepa.artifacts.clips import Sidecar, clips_of, left_over, readable_clips
from videorepa.artifacts.run import Run
from videorepa.backbones import Backbone
from videorepa.backbones._sampler import Sampler
from videorepa.backbones.cogvideox import CogVideoX
from videorepa.data.cache import Cache
from videorepa.data.digests import Digests
from videorepa.data.loader import PreparedClips
from videorepa.data.manifest import Prompt
from videorepa.data.source import ManifestSource, open_source
from videorepa.data.video import write_video
from videorepa.encoders._video import VideoViT
from videorepa.errors import UserError
from videorepa.export import export
from videorepa.generate import generate
from videorepa.inspect import inspect
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.scan import scan
from videorepa.system.stopping import Terminated
from videorepa.train import train
from videorepa.training.parallel import Alone
from videorepa.training.state import Training
from videorepa.training.student import Student
from videorepa.training.trackers import trackers
from videorepa.training.validation import encoded_prompts, validation

CPU = torch.device("cpu")
PROMPTS = [Prompt("a", "A ball falls."), Prompt("b", 'A "quoted"\ncaption 🎈')]


def log_of(run: Run) -> list[dict]:
    return [json.loads(line) for line in run.log_path.read_text().splitlines()]


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    found = run.trained()
    return {**found.trained, **{f"projector.{k}": v for k, v in found.projector.items()}}


def assert_equal_bit_for_bit(a: Run, b: Run, but_for: tuple[str, ...] = ()) -> None:
    """but_for: how the names of logged quantities begin that only one of them has."""
    ours, theirs = weights_of(a), weights_of(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    timing = ("step_seconds", "clips_per_second", "memory_gb")
    logs = [
        [{k: v for k, v in row.items() if not k.startswith((*timing, *but_for))} for row in log]
        for log in (log_of(a), log_of(b))
    ]
    assert logs[0] == logs[1]


@pytest.fixture
def prepared(recipe: Recipe) -> Recipe:
    done = prepare(recipe)
    assert (done.made, done.complete, done.failed) == (5, 0, {})
    return recipe


def test_the_cache_holds_unscaled_moments_text_and_features(prepared: Recipe) -> None:
    cache, source = Cache(prepared), open_source(prepared.data)
    video = torch.from_numpy(source.sample(2).frames).permute(0, 3, 1, 2)[None] / 255.0
    device = torch.device("cpu")
    backbone = prepared.backbone.load(("vae", "text_encoder"), device)
    moments, text = cache.read_clip(source.items[2])
    expected = backbone.encode_video(video)[0]
    torch.testing.assert_close(moments.float(), expected, atol=2e-3, rtol=2e-3)
    captions = [source.items[2].caption]
    expected = backbone.encode_text(captions)["encoder_hidden_states"][0]
    found = text["encoder_hidden_states"].float()
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    grid = cache.read_features(source.items[2], prepared.encoder)
    teacher = prepared.encoder.load(device)(video)
    assert (grid.start, grid.stride, grid.size) == (1, 2, (4, 2, 2))
    torch.testing.assert_close(grid.tokens.float(), teacher.tokens, atol=2e-2, rtol=2e-2)


def test_preparing_again_does_nothing_and_shards_make_the_same(
    prepared: Recipe, tmp_path: Path
) -> None:
    again = prepare(prepared)
    assert (again.made, again.complete) == (0, 5)
    sharded = prepared.override(f"data.cache={tmp_path / 'sharded'}")
    assert [prepare(sharded, shard=(i, 2)).made for i in range(2)] == [3, 2]
    assert tree(prepared.data.cache) == tree(sharded.data.cache)


def watch_loading(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Note which parts of pipelines are loaded, and how many text encoders are there by then."""
    encoders: list[weakref.ref] = []
    loaded: list[tuple[str, int]] = []
    real = Backbone.whole

    def whole(self: Backbone, stock_class: str, part: str, dtype: torch.dtype) -> Any:
        loaded.append((part, sum(encoder() is not None for encoder in encoders)))
        model = real(self, stock_class, part, dtype)
        if part == "text_encoder":
            encoders.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Backbone, "whole", whole)
    return loaded


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


class Spy:
    """Notes which models `prepare` loads and runs; each run is one chunk's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
        self.loaded: list[str] = []
        self.ran: list[str] = []
        for spec in (recipe.backbone, *recipe.stored_encoders):
            monkeypatch.setattr(type(spec), "load", self._watching(type(spec).load))

    def _watching(self, load):
        def watched(spec, *arguments):
            model = load(spec, *arguments)
            if isinstance(model, torch.nn.Module):
                self.loaded.append(spec.name)
                model.register_forward_hook(lambda *_: self.ran.append(spec.name))
                return model
            self.loaded += arguments[0]
            for name in ("encode_video", "encode_text"):
                setattr(model, name, self._noting(name, getattr(model, name)))
            return model

        return watched

    def _noting(self, name: str, encode):
        def noted(given):
            self.ran.append(name)
            return encode(given)

        return noted


def test_only_what_the_cache_lacks_is_made_and_equals_what_is_made_in_one_go(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    pixels = {"name": "pixels", "weights": "none", "frames": 8, "height": 16, "width": 16}
    pixels["patch"] = 8
    term = recipe.model_dump(mode="json")["align"]
    two_terms = json.dumps([term, term | {"name": "colours", "encoder": pixels}])
    recipe = recipe.override("data.prepare_batch=2")  # Chunks of 2, 2 and 1.
    both = recipe.override(f"align={two_terms}")
    undisturbed = both.override(f"data.cache={tmp_path / 'undisturbed'}")
    assert prepare(undisturbed).made == 5
    assert prepare(recipe).made == 5

    def prepared_again() -> tuple[int, int, list[str], list[str]]:
        with monkeypatch.context() as patched:
            spy = Spy(patched, both)
            done = prepare(both)
        assert tree(both.data.cache) == tree(undisturbed.data.cache)
        return done.made, done.complete, spy.loaded, spy.ran

    assert prepared_again() == (5, 0, ["pixels"], ["pixels"] * 3)
    cache, items = Cache(both), open_source(both.data).items
    (_, of_pixels) = cache.features.values()
    cache._file(of_pixels, items[0]).unlink()
    cache._file(cache.clips, items[3]).unlink()
    made, found, loaded, ran = prepared_again()
    assert (made, found) == (2, 3)
    assert loaded == ["text_encoder", "pixels", "vae"]
    # The second chunk's text, the first chunk's colours, and the second chunk's latents.
    assert ran == ["encode_text", "pixels", "encode_video"]
    (both.data.cache / "empty-caption.safetensors").unlink()
    assert prepared_again() == (0, 5, ["text_encoder"], ["encode_text"])
    assert prepared_again() == (0, 5, [], [])


def test_captions_are_encoded_before_the_rest_is_loaded_and_only_once(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    recipe = recipe.override("data.prepare_batch=2")
    with monkeypatch.context() as patched:
        loaded = watch_loading(patched)
        patched.setattr(Backbone, "encode_video", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe)
    assert loaded == [("text_encoder", 0), ("vae", 0)], "the text encoder has been dropped"
    with monkeypatch.context() as patched:
        spy = Spy(patched, recipe)
        assert prepare(recipe).made == 5
    assert spy.loaded == ["videomae", "vae"], "the text has waited for its latents"
    check_as_if_prepared_at_once(recipe, tmp_path / "fresh")


def test_tiling_is_part_of_what_a_cache_is_made_with(prepared: Recipe, monkeypatch) -> None:
    from diffusers import AutoencoderKLCogVideoX

    tiled: list[object] = []
    monkeypatch.setattr(AutoencoderKLCogVideoX, "enable_tiling", lambda vae: tiled.append(vae))
    with pytest.raises(UserError, match=r"was made otherwise.*backbone .*'tiling': True"):
        prepare(prepared.override("backbone.tiling=true"))
    own = prepared.override("backbone.tiling=true", f"data.cache={prepared.data.cache}-tiled")
    prepare(own)
    assert not tiled, "so small a clip is one tile"
    monkeypatch.setattr("videorepa.backbones._live.ONE_TILE", 8)  # As if the clips were large.
    prepare(own.override(f"data.cache={prepared.data.cache}-large"))
    assert tiled
    with pytest.raises(UserError, match="was made otherwise"):
        Cache(prepared.override(f"data.cache={own.data.cache}"))


@pytest.mark.parametrize(
    "change",
    ["data.height=32", "data.frames=5 encoder.frames=4", "backbone.weights={rotary}"],
)
def test_a_cache_of_another_clip_size_or_model_is_refused(
    prepared: Recipe, twins, change: str
) -> None:
    other = shutil.copytree(twins["rotary"], prepared.data.cache.parent / "other")
    vae = next((other / "vae").glob("*.safetensors"))
    vae.write_bytes(vae.read_bytes()[:-1] + b"\x01")
    changes = change.format(rotary=other).split(" ")
    with pytest.raises(UserError, match="was made otherwise"):
        Cache(prepared.override(*changes))


def test_a_cache_of_another_precision_reader_or_format_is_refused(
    recipe: Recipe, monkeypatch
) -> None:
    half = recipe.override("train.precision=auto")
    Cache(half, encoded_in=torch.bfloat16)
    Cache(half)  # What is the fastest may differ where it is trained.
    with pytest.raises(UserError, match=r"precision \(cache bfloat16, recipe float32\)"):
        Cache(recipe)
    with pytest.raises(UserError, match=r"precision \(cache bfloat16, recipe float32\)"):
        Cache(half, encoded_in=torch.float32)
    full = recipe.override(f"data.cache={recipe.data.cache}-full")
    Cache(full, encoded_in=torch.float32)
    with pytest.raises(UserError, match=r"precision \(.* bfloat16\).* --train.precision float32"):
        Cache(full.override("train.precision=auto"), encoded_in=torch.bfloat16)
    with monkeypatch.context() as patched:
        patched.setattr("videorepa.data.cache.READER", 1)
        with pytest.raises(UserError, match=r"reader \(cache 2, recipe 1\)"):
            Cache(half)
    path = recipe.data.cache / "fingerprint.json"
    path.write_text(json.dumps({"format": 2}))
    with pytest.raises(UserError, match=r"its format is 2, expected 3.*prepare again"):
        Cache(half)


def test_checkpoints_that_share_a_vae_share_a_cache(prepared: Recipe, twins) -> None:
    """2B and 5B differ in the scaling factor, which the stored moments do not hold."""
    other = shutil.copytree(twins["rotary"], prepared.data.cache.parent / "other")
    config = other / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.9', '"scaling_factor": 0.5'))
    sibling = prepared.override(f"backbone.weights={other}")
    assert prepare(sibling).complete == 5
    moments = torch.randn(1, 8, 3, 4, 4)
    device = torch.device("cpu")
    ours, theirs = (
        r.backbone.load((), device).latents(moments, torch.Generator().manual_seed(0))
        for r in (prepared, sibling)
    )
    torch.testing.assert_close(ours / 0.9, theirs / 0.5)


def test_a_larger_checkpoint_trains_on_the_smaller_ones_cache(
    prepared: Recipe, twins, tmp_path: Path
) -> None:
    """As published 5B on 2B's latents: the two hold the same autoencoder, rounded differently."""
    other = shutil.copytree(twins["rotary"], tmp_path / "other")
    vae = next((other / "vae").glob("*.safetensors"))
    weights = {key: value.bfloat16().float() for key, value in load_file(vae).items()}
    save_file(weights, vae, metadata={"format": "pt"})
    larger = prepared.override(f"backbone.weights={other}", "train.lora={rank: 2}")
    with pytest.raises(UserError, match="was made otherwise"):
        prepare(larger)
    sharing = larger.override(f"backbone.prepared_with={prepared.backbone.weights}")
    assert prepare(sharing).complete == 5
    assert train(sharing, tmp_path / "run").trained().step == 6
    longer = shutil.copytree(other, tmp_path / "longer")
    config = longer / "transformer" / "config.json"
    values = json.loads(config.read_text()) | {"max_text_seq_length": 24}
    config.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"prepared_with.* are 3x4x4x4, 12x16; .*3x4x4x4, 24x16"):
        prepare(sharing.override(f"backbone.weights={longer}"))


def check_as_if_prepared_at_once(recipe: Recipe, cache: Path) -> None:
    """The recipe's cache holds, to the byte, what one made anew in `cache` does."""
    prepare(recipe.override(f"data.cache={cache}"))
    assert tree(recipe.data.cache) == tree(cache)


def test_captions_that_another_process_has_stored_with_latents_are_read_there(
    recipe: Recipe, monkeypatch
) -> None:
    module = importlib.import_module("videorepa.prepare")
    load = module._load

    def after_another_process(*arguments: Any) -> Any:
        monkeypatch.setattr(module, "_load", load)
        assert prepare(recipe).made == 5
        return load(*arguments)

    monkeypatch.setattr(module, "_load", after_another_process)
    assert prepare(recipe).made == 5
    assert prepare(recipe).complete == 5


def test_a_changed_caption_makes_that_clips_text_alone_again(
    recipe: Recipe, tmp_path: Path, monkeypatch, capsys
) -> None:
    manifest = write_clips(tmp_path / "own", count=3)
    own = recipe.override(f"data.manifest={manifest}", "data.prepare_batch=2")
    prepare(own)
    manifest.write_text(manifest.read_text().replace("number 1", "number one"))
    with pytest.raises(UserError, match=r"1 of 3 clips .*'clip1\.mp4': its caption has changed"):
        train(own, tmp_path / "run")
    capsys.readouterr()
    spy = Spy(monkeypatch, own)
    assert prepare(own).made == 1
    assert (spy.loaded, spy.ran) == (["text_encoder"], ["encode_text"])
    assert "1 clip changed" in capsys.readouterr().err
    check_as_if_prepared_at_once(own, tmp_path / "fresh")


def test_a_replaced_video_is_refused_until_it_is_prepared_again(
    recipe: Recipe, tmp_path: Path, capsys
) -> None:
    manifest = write_clips(tmp_path / "own", count=3)
    pixels = {"name": "pixels", "weights": "none", "frames": 8, "height": 16, "width": 16}
    term = recipe.model_dump(mode="json")["align"]
    two_terms = json.dumps([term, term | {"name": "colours", "encoder": pixels | {"patch": 8}}])
    own = recipe.override(f"data.manifest={manifest}", "optim.steps=1")
    both = own.override(f"align={two_terms}")
    prepare(both)
    one, two = (manifest.with_name(f"clip{number}.mp4") for number in (1, 2))
    one.touch()
    two.rename(tmp_path / "away.mp4")  # Once they are prepared, videos are not needed.
    train(own, tmp_path / "run")
    (tmp_path / "away.mp4").rename(two)
    times = one.stat()
    shutil.copy(two, one)
    os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=r"1 of 3 clips .*'clip1\.mp4': its video has changed"):
        train(own, tmp_path / "other")
    # What another recipe of the same cache needs is stale too, and found to be when it is needed.
    assert [prepare(own).made, prepare(own).made, prepare(both).made] == [1, 0, 1]
    check_as_if_prepared_at_once(both, tmp_path / "fresh")


def test_a_resumed_run_sees_the_clips_that_it_began_with(
    recipe: Recipe, tmp_path: Path, capsys
) -> None:
    manifest = write_clips(tmp_path / "own", count=4)
    four = manifest.read_text()
    three = four.rpartition("clip3")[0]
    own = recipe.override(f"data.manifest={manifest}", "optim.steps=4")
    for text, says in (
        (four, "began with 3 clips, and now there are 4"),
        (three.replace("number 1", "number one"), "began with other captions"),
        (three.replace("clip2.mp4", "clip3.mp4"), "began with other ids and videos"),
    ):
        manifest.write_text(three)
        prepare(own)
        run = train(own, tmp_path / "run")
        shutil.rmtree(run.checkpoints / "step-00000004", ignore_errors=True)
        manifest.write_text(text)
        prepare(own)
        with pytest.raises(UserError, match=says):
            train(own.override("about=Refused."), tmp_path / "run")
        assert run.recipe == own
    (run.path / "clips.json").unlink()
    capsys.readouterr()
    train(own, tmp_path / "run")
    assert "began with an earlier version" in " ".join(capsys.readouterr().err.split())


def test_training_says_which_clips_failed_in_prepare(
    recipe: Recipe, tmp_path: Path, capsys
) -> None:
    manifest = write_clips(tmp_path / "own", count=3)
    for number in (1, 2):
        manifest.with_name(f"clip{number}.mp4").write_bytes(b"")
    own = recipe.override(f"data.manifest={manifest}", "optim.steps=1")
    prepare(own)
    capsys.readouterr()
    train(own, tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert "2 of 3 clips failed in `prepare`. The first is 'clip1.mp4': " in said
    assert "is empty" in said


def break_model(monkeypatch: pytest.MonkeyPatch, model: type, method: str, change) -> None:
    """Change what a method of a model gives."""
    real = getattr(model, method)
    monkeypatch.setattr(model, method, lambda *given: change(real(*given)))


def second_is_nan(given: torch.Tensor) -> torch.Tensor:
    given[1:, ..., 0] = torch.nan  # Not the first of the next chunk, which may be encoded by then.
    return given


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (second_is_nan, r"features that videomae gives of the clip 'clip1\.mp4' are not finite"),
        (lambda tokens: tokens[..., :-1], r"'clip0\.mp4' are not as expected; misshapen: tokens"),
    ],
)
def test_a_broken_teacher_stores_nothing(recipe: Recipe, monkeypatch, change, says: str) -> None:
    own = recipe.override("data.prepare_batch=2")
    break_model(monkeypatch, VideoViT, "features", change)
    with pytest.raises(UserError, match=says):
        prepare(own)
    (folder,) = Cache(own).features.values()
    assert len(list(folder.iterdir())) == ("clip1" in says)


def test_a_broken_autoencoder_stores_nothing(recipe: Recipe, monkeypatch) -> None:
    break_model(monkeypatch, Backbone, "encode_video", lambda moments: 1e30 * moments)
    with pytest.raises(UserError, match=r"latents or .* clip 'clip0\.mp4' are not finite"):
        prepare(recipe)
    assert not list(Cache(recipe).clips.iterdir())


def test_an_online_teacher_that_breaks_is_named(
    prepared: Recipe, tmp_path: Path, monkeypatch
) -> None:
    break_model(monkeypatch, VideoViT, "features", lambda tokens: tokens * torch.nan)
    with pytest.raises(UserError, match=r"videomae gives of the clip 'clip\d\.mp4' are not finite"):
        train(prepared.override("align.teacher=online"), tmp_path / "run")


def swap(one: Path, two: Path) -> None:
    one.rename(one.with_name("away"))
    two.rename(one)
    one.with_name("away").rename(two)


@pytest.mark.parametrize("which", ["clips", "features"])
def test_files_swapped_between_clips_are_named(
    prepared: Recipe, tmp_path: Path, which: str
) -> None:
    cache, clips = Cache(prepared), open_source(prepared.data).items
    folder = cache.clips if which == "clips" else cache.features[prepared.encoder]
    one, two = (cache._file(folder, clip) for clip in clips[:2])
    swap(one, two)
    says = rf"{one.name} is of the clip 'clip1\.mp4', expected 'clip0\.mp4'"
    for verb in (prepare, lambda recipe: train(recipe, tmp_path / "run")):
        with pytest.raises(UserError, match=says):
            verb(prepared)


@pytest.mark.parametrize(
    ("which", "name", "change", "says"),
    [
        ("features", "tokens", lambda t: t[..., :-1], r"misshapen: tokens \(4, 2, 2, 23\), exp"),
        ("features", "scale", lambda t: t * torch.nan, "are not finite"),
        ("features", "tokens", None, "missing: tokens"),
        ("clips", "moments", lambda t: t[:, :1], r"misshapen: moments \(8, 1, 4, 4\), expected"),
        ("clips", "moments", lambda t: t * torch.nan, "are not finite"),
        ("clips", "text.encoder_hidden_states", None, "missing: text.encoder_hidden_states"),
    ],
)
def test_files_that_do_not_fit_are_named_with_their_clip(
    prepared: Recipe, which: str, name: str, change, says: str
) -> None:
    cache, clip = Cache(prepared), open_source(prepared.data).items[1]
    path = cache._file(cache.clips if which == "clips" else cache.features[prepared.encoder], clip)
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    tensors |= {name: change(tensors.pop(name)).contiguous()} if change else {}
    save_file(tensors if change else {k: v for k, v in tensors.items() if k != name}, path, about)
    with pytest.raises(
        UserError, match=rf"'clip1\.mp4' in .*{path.name} .*{says}.*Delete the file"
    ):
        if which == "clips":
            cache.read_clip(clip)
        else:
            cache.read_features(clip, prepared.encoder)


def test_digests_are_remembered_by_size_and_time(recipe: Recipe, tmp_path: Path) -> None:
    manifest = write_clips(tmp_path / "own", count=3)
    own = recipe.override(f"data.manifest={manifest}")

    class Counting(ManifestSource):
        digested: list[int]

        def digest(self, index: int) -> str:
            self.digested.append(index)
            return super().digest(index)

    def digested() -> list[int]:
        source = Counting(own.data)
        source.digested = []
        digests = Digests(source, tmp_path / "digests.json")
        found = [digests.of(number) for number in range(3)]
        digests.keep()
        assert found == [super(Counting, source).digest(number) for number in range(3)]
        return source.digested

    assert digested() == [0, 1, 2]
    assert digested() == []
    manifest.with_name("clip1.mp4").touch()
    assert digested() == [1]
    (tmp_path / "digests.json").write_text('{"clip0.mp4": [1, 2, 3')
    assert digested() == [0, 1, 2]
    (tmp_path / "digests.json").write_text('{"clip0.mp4": 1, "clip1.mp4": []}')
    assert digested() == [0, 1, 2]


def test_writers_of_digests_lose_none_of_each_others(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    """Each has begun with an empty file, and reads it slowly while the others write."""
    own = recipe.override(f"data.manifest={write_clips(tmp_path / 'own', count=4)}")
    source = ManifestSource(own.data)
    real = Digests._read

    def slowly(self: Digests) -> dict[str, list[int | str]]:
        known = real(self)
        time.sleep(0.05)
        return known

    monkeypatch.setattr(Digests, "_read", slowly)
    writers = [Digests(source, tmp_path / "digests.json") for _ in source.items]
    for number, writer in enumerate(writers):
        writer.of(number)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Digests.keep, writers))
    kept = json.loads((tmp_path / "digests.json").read_text())
    assert set(kept) == {item.id for item in source.items}
    assert not list(tmp_path.glob(".digests*"))


def test_training_remembers_the_digests_of_videos_that_were_copied(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    own = recipe.override(f"data.manifest={write_clips(tmp_path / 'own', count=3)}")
    prepare(own)
    for video in (tmp_path / "own").glob("*.mp4"):
        video.touch()
    real, digested = ManifestSource.digest, []
    monkeypatch.setattr(
        ManifestSource, "digest", lambda self, n: digested.append(n) or real(self, n)
    )
    for shown, read in ((False, [0, 1, 2]), (True, [0, 1, 2]), (True, []), (False, [])):
        assert len(PreparedClips(own, shown).clips) == 3 and digested == read
        digested.clear()
    with monkeypatch.context() as patched:  # The cache may belong to somebody else.
        patched.setattr(Digests, "keep", Mock(side_effect=PermissionError))
        PreparedClips(own)


def test_weights_and_configurations_are_looked_at_again_when_they_were_replaced(
    twins: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(twins["backbone"], tmp_path / "model")
    spec = CogVideoX(weights=str(folder))
    before, blocks = spec.weights_digest(), spec.geometry().blocks
    weights = next((folder / "transformer").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert spec.weights_digest() != before
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace(f'"num_layers": {blocks}', '"num_layers": 41'))
    assert spec.geometry().blocks == 41


def test_looking_up_many_clips_is_shown_at_once_and_survives_a_kill(
    recipe: Recipe, tmp_path: Path, monkeypatch, capsys
) -> None:
    manifest = write_clips(tmp_path / "own", count=1)
    rows = "".join(f"{number},clip0.mp4,Number {number}.\n" for number in range(300))
    manifest.write_text("id,video,caption\n" + rows)
    module = importlib.import_module("videorepa.prepare")
    monkeypatch.setattr(module, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr("videorepa.system.progress.PLAIN_FIRST_SECONDS", 0.0)
    real, lines = module.Digests.of, []

    def killed_at_the_200th(self: Digests, number: int) -> str:
        if number == 200:
            lines.append(said(capsys))
            monkeypatch.setattr(Digests, "keep", lambda self, every=0.0: None)
            raise KeyboardInterrupt
        return real(self, number)

    monkeypatch.setattr(Digests, "of", killed_at_the_200th)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe.override(f"data.manifest={manifest}"))
    assert lines[0].startswith("check the clips: 1/300, ")
    assert len(json.loads((recipe.data.cache / "digests.json").read_text())) == 200


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr since the last call, in one line."""
    return " ".join(capsys.readouterr().err.split())


def test_captions_and_prompts_that_are_cut_are_counted(
    recipe: Recipe, tmp_path: Path, capsys
) -> None:
    manifest = write_clips(tmp_path / "own", count=3)
    manifest.write_text("video,caption\nclip0.mp4,Short.\nclip1.mp4,So long\nclip2.mp4,Cut off.\n")
    own = recipe.override(f"data.manifest={manifest}", "optim.steps=1")
    prepare(own)
    assert "longer than" not in said(capsys)
    manifest.write_text(manifest.read_text().replace("long", "much longer"))
    for _ in range(2):
        prepare(own)
        note = said(capsys)
        assert "1 of 3 captions are longer than the 12 tokens that" in note
        assert "The first is 'clip1.mp4', with 16" in note
    own.to_yaml(tmp_path / "base.yaml")
    prompts = [Prompt("a", "Short."), Prompt("b", "Much longer than that.")]
    generate(tmp_path / "base.yaml", prompts, tmp_path / "clips")
    assert "1 of 2 prompts are longer than the 12 tokens" in said(capsys)
    train(
        own.override("validation={every: 1, prompts: [Short., Much longer than that.]}"),
        tmp_path / "run",
    )
    assert "1 of 2 validation prompts are longer than the 12 tokens" in said(capsys)


def test_prepare_and_inspect_say_which_clips_were_filled_up_and_at_which_rates(
    recipe: Recipe, tmp_path: Path, capsys
) -> None:
    manifest = write_clips(tmp_path / "own", count=5)
    for number, (frames, rate) in enumerate([(18, 24), (17, 24), (5, 24), (1, 24)]):
        path = manifest.with_name(f"clip{number}.mp4")
        path.unlink()
        write_video(path, np.zeros((frames, 16, 16, 3), np.uint8), rate)
    own = recipe.override(f"data.manifest={manifest}")
    short = (
        "2 of 5 clips have fewer than 9 frames to show and were filled up by repeating. The first"
    )
    spread = "Rates: 2 clips at 24 fps, every frame; 1 clip at 12 fps, 1 frame in 2; "
    prepare(own)
    first = said(capsys)
    prepare(own)
    for text in (first, said(capsys), " ".join(str(inspect(own)).split())):
        assert f"{short} is 'clip2.mp4', with 5." in text and spread in text
    fixed = own.override("data.fps=24")
    with pytest.raises(UserError, match=r"'fps': None.*'fps': 24"):
        prepare(fixed)
    assert "Rates: 4 clips at 24 fps; 1 clip without a rate." in " ".join(
        str(inspect(fixed)).split()
    )
    prepare(fixed.override(f"data.cache={tmp_path / 'fixed'}"))
    assert "3 of 5 clips have fewer than 9 frames to show" in said(capsys)


def test_a_rate_that_contradicts_what_ltx_is_told_is_refused(
    recipe: Recipe, tmp_path: Path
) -> None:
    ltx = {"name": "ltx", "weights": "someone/LTX-Video"}
    base = recipe.override(f"backbone={json.dumps(ltx)}", "data.frames=9", "data.height=32")
    own = base.override("data.width=32", "align=null", "encoder=null", "generation={steps: 2}")
    check(own.override("data.fps=25"))
    slow = "backbone.frame_rate=24", "generation.fps=24"
    check(own.override(*slow, "data.fps=23.976"))
    with pytest.raises(
        UserError, match="data.fps is 25, and backbone.frame_rate tells .* 24 frames"
    ):
        check(own.override(*slow, "data.fps=25"))
    teacher = f"encoder={json.dumps(recipe.encoder.model_dump())}", "align={block: 2}"
    with pytest.raises(UserError, match="data.fps is 25, and backbone.frame_rate tells"):
        scan(own.override(*slow, "data.fps=25", *teacher), tmp_path / "scan")
    with pytest.raises(UserError, match="generation.fps is 8 and backbone.frame_rate 25"):
        check(own.override("generation.fps=8"))
    with pytest.raises(UserError, match="the lab draws clips at a rate of its own"):
        recipe.override("data.manifest=null", "data.lab={clips: 3}", "data.fps=8")


def test_training_lowers_the_alignment_loss_and_logs_all_of_it(
    prepared: Recipe, tmp_path: Path
) -> None:
    recipe = prepared.override("optim.steps=30", "optim.learning_rate=0.003", "align.loss.margin=0")
    rows = log_of(train(recipe, tmp_path / "run"))
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert sum(r["align"] for r in rows[-5:]) < 0.8 * sum(r["align"] for r in rows[:5])
    keys = {"loss", "denoise", "align", "similarity", "grad_norm", "grad_align", "grad_denoise"}
    assert all(keys | {"lr", "clips_per_second", "memory_gb"} <= row.keys() for row in rows)
    assert all(row["grad_align"] > 0 and row["grad_denoise"] > 0 for row in rows)
    assert rows[3]["loss"] == pytest.approx(rows[3]["denoise"] + 0.5 * rows[3]["align"])


def test_weight_zero_is_plain_fine_tuning(prepared: Recipe, tmp_path: Path) -> None:
    """The control's transformer is that of a recipe without any teacher; only measuring differs."""
    control = train(prepared.override("align.weight=0"), tmp_path / "control")
    plain = train(prepared.override("align=null", "encoder=null"), tmp_path / "plain")
    ours, theirs = control.trained().trained, plain.trained().trained
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert all(row["grad_align"] == 0 and row["align"] > 0 for row in log_of(control))


def test_cached_and_online_teacher_agree(prepared: Recipe, tmp_path: Path) -> None:
    cached = log_of(train(prepared, tmp_path / "cached"))
    online = log_of(train(prepared.override("align.teacher=online"), tmp_path / "online"))
    for a, b in zip(cached, online, strict=True):
        assert a["align"] == pytest.approx(b["align"], rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("train.lora={rank: 2, alpha: 4}", "train.ema=0.9"),
        ("memory.gradient_checkpointing=true", "train.caption_dropout=0.5"),
        ("train.lora={rank: 2, alpha: 4}", "memory.frozen=bfloat16"),
        ("validation={every: 3, prompts: [A ball falls., A ball rolls.]}",),
    ],
    ids=["sft", "lora-ema", "checkpointed", "lora-bfloat16", "validated"],
)
def test_a_resumed_run_equals_an_undisturbed_one(
    prepared: Recipe, tmp_path: Path, changes: tuple[str, ...], monkeypatch
) -> None:
    recipe = prepared.override(*changes)
    undisturbed = train(recipe, tmp_path / "undisturbed")
    real, calls = Run.append, []

    def stop_at_the_fifth(self: Run, values: dict) -> None:
        real(self, values)
        calls.append(values)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "append", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "stopped")
    monkeypatch.undo()
    assert Run.open(tmp_path / "stopped").trained().step == 4
    assert_equal_bit_for_bit(train(recipe, tmp_path / "stopped"), undisturbed)


@pytest.mark.parametrize(
    ("number", "interrupt"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_ends_a_training_after_the_step_with_a_checkpoint(
    prepared: Recipe, tmp_path: Path, number: int, interrupt: type, monkeypatch, capfd
) -> None:
    recipe = prepared.override("train.ema=0.9")
    undisturbed = train(recipe, tmp_path / "undisturbed")
    real = Run.append

    def signalled_at_the_fourth(self: Run, values: dict) -> None:
        real(self, values)
        if values["step"] == 4:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Run, "append", signalled_at_the_fourth)
    with pytest.raises(interrupt):
        train(recipe, tmp_path / "stopped")
    monkeypatch.undo()
    assert "Stopping after this step, with a checkpoint." in capfd.readouterr().err
    stopped = Run.open(tmp_path / "stopped")
    assert stopped.trained().step == stopped.last_step == 5
    assert_equal_bit_for_bit(train(recipe, tmp_path / "stopped"), undisturbed)
    kept = [sorted(p.name for p in run.checkpoints.iterdir()) for run in (stopped, undisturbed)]
    assert kept[0] == kept[1] == ["step-00000004", "step-00000006"]


def test_what_a_kill_before_the_pruning_leaves_goes(
    prepared: Recipe, tmp_path: Path, monkeypatch
) -> None:
    run = train(prepared, tmp_path / "run")
    kept = sorted(path.name for path in run.checkpoints.iterdir())
    shutil.copytree(run.checkpoints / "step-00000004", run.checkpoints / "step-00000002")
    for name in (".tmp-step-00000006", ".tmp-old-step-00000002"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "trained.safetensors").write_text("half")
    monkeypatch.delattr(importlib.import_module("videorepa.train"), "Student")
    train(prepared, tmp_path / "run")  # It has all its steps, so that no model is loaded.
    assert sorted(path.name for path in run.checkpoints.iterdir()) == kept


def test_checkpointing_and_rotary_tables_change_no_loss(
    prepared: Recipe, tmp_path: Path, twins
) -> None:
    rotary = prepared.override(f"backbone.weights={twins['rotary']}")
    a = log_of(train(rotary, tmp_path / "a"))
    b = log_of(train(rotary.override("memory.gradient_checkpointing=true"), tmp_path / "b"))
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
        assert x["grad_align"] == pytest.approx(y["grad_align"], rel=1e-3)


def test_validation_clips_and_trackers_leave_the_training_as_it_is(
    prepared: Recipe, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = train(prepared, tmp_path / "plain")
    watched = train(
        prepared.override(
            "validation={every: 4, prompts: [A ball falls., A ball rolls.]}",
            "train.trackers=[tensorboard]",
        ),
        tmp_path / "watched",
    )
    assert_equal_bit_for_bit(watched, plain, but_for=("drift",))
    clips = sorted(str(p.relative_to(watched.samples)) for p in watched.samples.rglob("*.mp4"))
    assert clips == [f"step-{step:08d}/{n:02d}.mp4" for step in (0, 4, 6) for n in (0, 1)]
    prompts = [clip.prompt for clip in watched.validation_clips[4].values()]
    assert prompts == ["A ball falls.", "A ball rolls."]
    board = EventAccumulator(str(watched.path / "tensorboard")).Reload()
    logged = [(e.step, e.value) for e in board.Scalars("align")]
    assert logged == [(r["step"], pytest.approx(r["align"])) for r in log_of(watched)]


def test_every_run_has_a_wandb_session_of_its_own_to_which_it_comes_back(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    wandb = Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    own, runs = recipe.override("train.trackers=[wandb]"), []
    for name in ("one/aligned", "two/aligned", "one/aligned", "old"):
        runs.append(Run(tmp_path / name))
        runs[-1].path.mkdir(parents=True, exist_ok=True)
        if name == "old":
            (runs[-1].path / "wandb").mkdir()
        (write,) = trackers(own, runs[-1], start=0)
        write({"step": 1, "loss": 2.0})
    one, two, again, old = (call.kwargs["id"] for call in wandb.init.call_args_list)
    assert one == again and old == "old" and len({one, two, old, "aligned"}) == 4
    wandb.init.return_value.log.assert_called_with({"step": 1, "loss": 2.0}, step=1)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_processes_share_the_prompts_and_run_a_sharded_model_equally_often(
    recipe: Recipe, tmp_path: Path, monkeypatch, is_sharded: bool
) -> None:
    own = recipe.override("validation={every: 4, prompts: [a, b, c]}")
    ran: list[tuple[int, str, str]] = []

    class Fellow(Alone):
        count = 2

        def wait(self) -> None:
            pass

    def sample(self: Sampler, prompt: str, seed: int, image: Any = None) -> np.ndarray:
        ran.append((rank, "sample", prompt))
        return np.zeros((9, 16, 16, 3), np.uint8)

    def accompany(self: Sampler, prompt: str, image: Any = None) -> None:
        ran.append((rank, "run", prompt))

    monkeypatch.setattr(Sampler, "sample", sample)
    monkeypatch.setattr(Sampler, "accompany", accompany)
    monkeypatch.setattr("videorepa.training.validation.Drift", lambda *given: None)
    monkeypatch.setattr("videorepa.training.validation.appearance", lambda clip: None)
    student = Student(own, CPU)
    run = Run(tmp_path / "run")
    for rank in (1, 0):  # The first one reads all clips.
        workers = Fellow(CPU)
        workers.rank, workers.is_sharded = rank, is_sharded
        validation(own, run, student, workers, encoded_prompts(own, workers), resumed=False)
    idle = [(1, "run", "c")] if is_sharded else []
    assert ran == [(1, "sample", "b"), *idle, (0, "sample", "a"), (0, "sample", "c")]


def test_a_truncated_checkpoint_is_noticed_and_the_one_before_used(
    prepared: Recipe, tmp_path: Path, capsys
) -> None:
    undisturbed = train(prepared, tmp_path / "undisturbed")
    run = train(prepared.override("train.keep_checkpoints=3"), tmp_path / "run")
    newest = run.checkpoints / "step-00000006" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(UserError, match="step-00000006 is damaged: optimizer.pt has .* bytes"):
        run.trained()
    assert_equal_bit_for_bit(train(prepared, tmp_path / "run"), undisturbed)
    assert "step-00000006 is damaged" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize(
    "lack",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=repr,
)
def test_a_lack_of_memory_is_no_damage_for_which_an_earlier_checkpoint_is_used(
    prepared: Recipe, tmp_path: Path, monkeypatch, lack: Exception
) -> None:
    steps = ["optim.steps=2", "train.checkpoint_every=1", "train.keep_checkpoints=2"]
    run = train(prepared.override(*steps), tmp_path / "run")
    before = tree(run.path)

    def fails(path: Path) -> None:
        raise lack

    monkeypatch.setattr("videorepa.artifacts.checkpoint.load_file", fails)
    with pytest.raises(UserError, match="not enough memory"):
        train(prepared.override(*steps), tmp_path / "run")
    monkeypatch.undo()
    assert tree(run.path) == before


def test_what_was_resumed_does_not_stay_in_memory(
    prepared: Recipe, tmp_path: Path, monkeypatch
) -> None:
    run, append, resume = tmp_path / "run", Run.append, Training.resume
    held: list[weakref.ref] = []

    def stop(self: Run, values: dict) -> None:
        append(self, values)
        if values["step"] == 3:
            raise KeyboardInterrupt

    def noted(self: Training, resumed: Checkpoint) -> None:
        held.append(weakref.ref(resumed))
        resume(self, resumed)

    def checked(self: Run, values: dict) -> None:
        assert held[0]() is None
        append(self, values)

    monkeypatch.setattr(Run, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        train(prepared, run)
    monkeypatch.setattr(Training, "resume", noted)
    monkeypatch.setattr(Run, "append", checked)
    train(prepared, run)
    assert held


def test_a_run_of_another_recipe_or_model_is_refused(
    prepared: Recipe, tmp_path: Path, twins
) -> None:
    train(prepared, tmp_path / "run")
    with pytest.raises(UserError, match=r"another recipe.*align\.weight"):
        train(prepared.override("align.weight=0.3"), tmp_path / "run")
    before = tree(tmp_path / "run")
    with pytest.raises(UserError, match="steps have 4 clips, and 1 processes .* make 6"):
        train(prepared.override("optim.batch_size=3"), tmp_path / "run")
    with pytest.raises(UserError, match="--profile 1 "):
        train(prepared.override("about=Refused."), tmp_path / "run", profile=1)
    assert tree(tmp_path / "run") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not a run"):
        train(prepared, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"
    lora = prepared.override("train.lora={rank: 2}")
    shutil.rmtree(tmp_path / "run" / "recipe.yaml", ignore_errors=True)
    (tmp_path / "run" / "recipe.yaml").write_text(lora.text())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    with pytest.raises(UserError, match="of another model"):
        train(lora, tmp_path / "run")


def test_nan_stops_the_run_with_the_step_named(prepared: Recipe, tmp_path: Path) -> None:
    recipe = prepared.override("optim.learning_rate=1e30", "optim.warmup_steps=0")
    with pytest.raises(UserError, match=r"Step [23]: .*not finite"):
        train(recipe, tmp_path / "run")


def test_generated_files_depend_on_prompt_and_number_alone(
    prepared: Recipe, tmp_path: Path, recipe: Recipe
) -> None:
    base = tmp_path / "base.yaml"
    recipe.override("generation.samples=2").to_yaml(base)
    all_at_once = generate(base, PROMPTS, tmp_path / "all")
    assert [path.name for path in all_at_once] == ["a-0.mp4", "a-1.mp4", "b-0.mp4", "b-1.mp4"]
    for index in range(2):
        generate(base, PROMPTS[::-1], tmp_path / "parts", shard=(index, 2))
    for path in all_at_once:
        for file in (path, path.with_suffix(".json")):
            assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()
    about = json.loads((tmp_path / "all" / "b-1.json").read_text(encoding="utf-8"))
    assert (about["prompt"], about["k"], about["steps"]) == (PROMPTS[1].text, 1, 2)
    with pytest.raises(UserError, match=r"made otherwise.*model_digest"):
        generate(train(prepared, tmp_path / "run").path, PROMPTS, tmp_path / "all")


def test_text_encoders_are_dropped_before_the_rest_is_loaded(
    prepared: Recipe, tmp_path: Path, monkeypatch
) -> None:
    loaded = watch_loading(monkeypatch)
    one_after_the_other = [("text_encoder", 0), ("transformer", 0), ("vae", 0)]
    recipe = prepared.override("optim.steps=1", "validation={every: 1, prompts: [A ball falls.]}")
    run = train(recipe, tmp_path / "run")
    assert loaded == one_after_the_other
    loaded.clear()
    generate(run.path, PROMPTS, tmp_path / "out")
    assert sorted(loaded) == one_after_the_other and loaded[0][0] == "text_encoder"
    loaded.clear()
    generate(run.path, PROMPTS, tmp_path / "out")
    assert loaded == [], "nothing is to be made"
    with pytest.raises(UserError, match="on the CPU, and offload is model"):
        generate(run.path, PROMPTS, tmp_path / "other", offload="model")


def test_clips_say_whether_they_were_tiled_and_in_which_precision(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    from diffusers import AutoencoderKLCogVideoX

    base, out = tmp_path / "base.yaml", tmp_path / "out"
    recipe.override("generation.steps=1").to_yaml(base)
    whole, _ = generate(base, PROMPTS, out)
    about = json.loads(whole.with_suffix(".json").read_text())
    assert (about["tiling"], about["precision"]) == (True, "float32")
    untiled = recipe.generation.changed(steps=1, tiling=False)
    again, _ = generate(base, PROMPTS, tmp_path / "untiled", settings=untiled)
    assert again.read_bytes() == whole.read_bytes(), "so small a clip is one tile"
    with pytest.raises(UserError, match=r"tiling \(True, now False\)"):
        generate(base, PROMPTS, out, settings=untiled)
    tiled = []
    monkeypatch.setattr(AutoencoderKLCogVideoX, "enable_tiling", lambda vae: tiled.append(vae))
    monkeypatch.setattr("videorepa.backbones._live.ONE_TILE", 8)  # As if the clip were large.
    generate(base, PROMPTS, tmp_path / "untiled", settings=untiled.changed(samples=2))
    assert not tiled
    generate(base, PROMPTS, tmp_path / "tiled")
    assert tiled
    monkeypatch.setattr("videorepa.system.device.has_fast_bfloat16", lambda device: True)
    recipe.override("generation.steps=1", "train.precision=auto").to_yaml(base)
    with pytest.raises(UserError, match=r"precision \(float32, now bfloat16\)"):
        generate(base, PROMPTS, out)


def test_equal_prompts_and_other_seeds_get_noise_of_their_own(
    recipe: Recipe, tmp_path: Path
) -> None:
    base = tmp_path / "base.yaml"
    recipe.to_yaml(base)
    twice = [Prompt("a", "A ball falls."), Prompt("b", "A ball falls."), Prompt("c", "A cup.")]
    first, second, _ = (path.read_bytes() for path in generate(base, twice, tmp_path / "twice"))
    assert first != second
    other = generate(base, twice, tmp_path / "other", seed=1)
    assert other[0].read_bytes() not in (first, second)
    with pytest.raises(UserError, match="made otherwise.*noise"):
        generate(base, twice, tmp_path / "twice", seed=1)


def test_clips_of_an_edited_list_are_the_lists_or_refused(
    recipe: Recipe, tmp_path: Path, capsys
) -> None:
    base, out = tmp_path / "base.yaml", tmp_path / "out"
    recipe.override("generation.steps=1").to_yaml(base)
    roll, fall = Prompt("0000", "A ball rolls."), Prompt("0001", "A box falls.", "A box.")
    generate(base, [roll, fall], out)
    before = tree(out)
    # A line in front: the two clips would be counted as other prompts' clips, or twice.
    moved = [Prompt("0000", "A disc hops."), Prompt("0001", roll.text), Prompt("0002", fall.text)]
    says = r"0000-0\.mp4 is another clip.*prompt \(A ball rolls\., now A disc hops\.\).*1 more do"
    with pytest.raises(UserError, match=says):
        generate(base, moved, out)
    # The text of another column, and noise of a prompt that stood once more before this one.
    with pytest.raises(UserError, match=r"0001-0\.mp4 is another clip"):
        generate(base, [roll, Prompt("0001", "A blue box falls down.", "A box.")], out)
    with pytest.raises(UserError, match=r"0000-0\.mp4 is another clip.*seed"):
        generate(base, [Prompt("first", roll.text), roll], out)
    assert tree(out) == before

    # Another caption is another sidecar, and the same video.
    generate(base, [roll, Prompt("0001", fall.text, "A box falls.")], out)
    changed = {name for name, digest in tree(out).items() if before.get(name) != digest}
    assert changed == {"0001-0.json"}
    assert json.loads((out / "0001-0.json").read_text())["caption"] == "A box falls."

    assert "not in the list" not in capsys.readouterr().err
    generate(base, [roll, Prompt("0002", "A cup.")], out)
    said = capsys.readouterr().err.replace("\n", "")
    assert "holds 1 clip of prompts or samples that are not in the list" in said
    assert [clip.prompt_id for clip in clips_of(out)[0]] == ["0000", "0002"]
    assert list(readable_clips(out)) == [("0000", 0), ("0002", 0)]
    assert [clip.prompt_id for clip in left_over(out)] == ["0001"]


def test_a_sidecar_of_another_prompt_never_stands_beside_a_new_video(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    base, out = tmp_path / "base.yaml", tmp_path / "out"
    recipe.override("generation.steps=1").to_yaml(base)
    (clip,) = generate(base, [Prompt("a", "A ball rolls.")], out)
    clip.unlink()

    def killed(self: Sidecar) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Sidecar, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(base, [Prompt("a", "A box falls.")], out)
    assert clip.exists() and not clip.with_suffix(".json").exists()
    monkeypatch.undo()
    generate(base, [Prompt("a", "A box falls.")], out)
    assert json.loads(clip.with_suffix(".json").read_text())["prompt"] == "A box falls."


@pytest.mark.parametrize("twin", ["backbone", pytest.param("rotary", marks=pytest.mark.slow)])
def test_export_of_all_weights_is_what_stock_diffusers_computes(
    prepared: Recipe, tmp_path: Path, twins, twin: str, capsys
) -> None:
    from diffusers import CogVideoXTransformer3DModel

    recipe = prepared.override(f"backbone.weights={twins[twin]}")
    run = train(recipe, tmp_path / "run")
    product = export(run.path, tmp_path / "out")
    stock = CogVideoXTransformer3DModel.from_pretrained(product)
    trained = run.trained().trained
    state = stock.state_dict()
    assert state.keys() == trained.keys(), "nothing of the alignment may be handed out"
    left = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert left == {"README.md", "transformer/config.json", weights}
    assert load_file(tmp_path / "out" / weights).keys() == trained.keys()
    assert all(torch.equal(state[key], trained[key]) for key in state)
    # A call that was killed once it had finished is told so; another export is refused.
    before = tree(tmp_path / "out")
    assert export(run.path, tmp_path / "out") == product
    assert "holds this export already" in capsys.readouterr().err.replace("\n", "")
    assert tree(tmp_path / "out") == before
    with pytest.raises(UserError, match="exists already"):
        export(run.path, tmp_path / "out", dtype=torch.bfloat16)
    shutil.rmtree(product)
    with pytest.raises(UserError, match="exists already"):
        export(run.path, tmp_path / "out")


def test_export_of_a_lora_has_its_strength_in_its_weights(prepared: Recipe, tmp_path: Path) -> None:
    from diffusers import CogVideoXPipeline

    run = train(prepared.override("train.lora={rank: 4, alpha: 2}"), tmp_path / "run")
    product = export(run.path, tmp_path / "out")
    pipeline = CogVideoXPipeline.from_pretrained(prepared.backbone.source)
    given = {
        "hidden_states": torch.randn(1, 3, 4, 4, 4),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "timestep": torch.tensor([100]),
        "return_dict": False,
    }
    ours = run.backbone(("transformer",), torch.device("cpu"), torch.float32).transformer
    with torch.no_grad():
        plain = pipeline.transformer(**given)[0]
        pipeline.load_lora_weights(product)
        torch.testing.assert_close(pipeline.transformer(**given)[0], ours(**given)[0])
        assert not torch.allclose(plain, ours(**given)[0])
    assert pipeline.transformer.peft_config["default_0"].lora_alpha == 4
    assert {path.name for path in product.parent.iterdir()} == {"README.md", product.name}
    layers = {key.partition(".lora_")[0].removeprefix("transformer.") for key in load_file(product)}
    assert layers <= {name for name, _ in ours.named_modules()}


def test_an_export_that_does_not_match_fails_loudly(
    prepared: Recipe, tmp_path: Path, monkeypatch
) -> None:
    module = importlib.import_module("videorepa.exchange.stock")
    run = train(prepared, tmp_path / "run")
    wrong = module._STOCK.replace("return_dict=False)[0]", "return_dict=False)[0] * 1.001")
    monkeypatch.setattr(module, "_STOCK", wrong)
    with pytest.raises(UserError, match="does not give the same output"):
        export(run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "lora",
    [pytest.param(True, id="lora"), pytest.param(False, id="all", marks=pytest.mark.slow)],
)
def test_plain_diffusers_samples_a_clip_by_the_card_of_its_export(
    prepared: Recipe, tmp_path: Path, monkeypatch, lora: bool
) -> None:
    """The base model's own scheduler is another one, as CogVideoX-2b's folder has it."""
    from diffusers import CogVideoXDDIMScheduler

    base = shutil.copytree(prepared.backbone.source, tmp_path / "base")
    CogVideoXDDIMScheduler.from_pretrained(base / "scheduler").save_pretrained(base / "scheduler")
    index = (base / "model_index.json").read_text()
    (base / "model_index.json").write_text(index.replace("DPMScheduler", "DDIMScheduler"))
    changes = [f"backbone.weights={base}", "optim.steps=2", "generation.negative_prompt=blurry"]
    recipe = prepared.override(*changes, *(["train.lora={rank: 4, alpha: 2}"] if lora else []))
    run = train(recipe, tmp_path / "run")
    module, made = importlib.import_module("videorepa.generate"), []

    def keep(path: Path, frames: np.ndarray, fps: float) -> None:
        made.append(frames)
        path.touch()

    monkeypatch.setattr(module, "write_video", keep)
    (clip,) = generate(run.path, [Prompt("a", "A box slides.")], tmp_path / "clips")
    told = json.loads(clip.with_suffix(".json").read_text())
    scheduler = {"scheduler": "CogVideoXDPMScheduler", "negative_prompt": "blurry"}
    assert told.items() >= ({"guidance_scale": 6.0, "dynamic_guidance": True} | scheduler).items()
    assert told["scheduler_settings"]["timestep_spacing"] == "trailing"
    assert json.loads((tmp_path / "clips" / "generation.json").read_text()).items() >= (
        scheduler.items()
    )

    export(run.path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "CogVideoXDPMScheduler (" in card and "guidance 6, growing" in card
    ran = sampled_by_card(tmp_path / "out", clip.with_suffix(".json"), monkeypatch)
    # To a level of 255, by rounding.
    assert abs(made[0] - ran["frames"] * 255.0).max() < 1
    # With the folder's own scheduler it is another clip.
    ran["pipe"].scheduler = CogVideoXDDIMScheduler.from_config(ran["pipe"].scheduler.config)
    exec(ran["code"][ran["code"].index("frames = pipe(") :], ran)
    assert abs(made[0] - ran["frames"] * 255.0).mean() > 5


def test_weights_from_scratch_are_drawn_by_the_seed(prepared: Recipe, tmp_path: Path) -> None:
    def first(recipe: Recipe) -> torch.Tensor:
        return Student(recipe, torch.device("cpu")).transformer.proj_out.weight.detach().clone()

    scratch = prepared.override("train.from_scratch=true")
    assert torch.equal(first(scratch), first(scratch))
    drawn = [first(prepared), first(scratch), first(scratch.override("seed=5"))]
    assert all(not torch.equal(a, b) for a, b in combinations(drawn, 2))
    # What is trained and read again is the run's own, and nothing of the checkpoint's.
    run = train(scratch, tmp_path / "run")
    again = run.backbone(("transformer",), torch.device("cpu"), torch.float32)
    assert not torch.equal(again.transformer.proj_out.weight, drawn[0])
    assert "from random weights" in str(inspect(scratch))
    with pytest.raises(UserError, match="an adapter of random weights"):
        scratch.override("train.lora={rank: 2, alpha: 4}")
