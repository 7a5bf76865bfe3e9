"""Makes training batches from the cache and from online teachers."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from videorepa.backbones import Backbone
from videorepa.conditioning import Opening, draw_latents_shown
from videorepa.data.batches import Batch, ahead
from videorepa.data.cache import Cache
from videorepa.data.digests import Digests
from videorepa.data.order import clip_index, sample_numbers
from videorepa.data.source import SourceClip, open_source
from videorepa.data.video import to_video
from videorepa.encoders import EncoderSpec
from videorepa.errors import ClipError, UserError
from videorepa.recipe import Recipe
from videorepa.system.checks import check_finite
from videorepa.system.device import compute_dtype
from videorepa.system.fingerprint import json_digest
from videorepa.system.progress import track
from videorepa.system.randomness import generator
from videorepa.tokens import TokenGrid


class PreparedClips:
    """The clips of a recipe's source that are in its cache, made from what the source has now.

    A video that is gone is not missed: what was made from it cannot be another's.

    Args:
      recipe: Names the source and the cache.
      shown: Whether this process shows progress, and keeps new digests for the next training.

    Attributes:
      clips: Those to train on, in the source's order.
      indices: Where each is in the source, by its id.
      failed: Why `prepare` could not use the others, by their ids.
      contents: What a resumed run must find again: how many clips there are, and digests of their
        ids, captions and videos.

    Raises:
      UserError: A clip is not in the cache, or was made from another video or caption; or all
        clips have failed.
    """

    def __init__(self, recipe: Recipe, shown: bool = True) -> None:
        self.source, self.cache = open_source(recipe.data), Cache(recipe)
        self.clips: list[SourceClip] = []
        self.indices: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        digests = Digests(self.source, self.cache.digests)
        lacking: dict[str, str] = {}
        videos: list[str] = []
        for index, clip in enumerate(track(self.source.items, "check the cache", shown=shown)):
            if reason := self.cache.failure(clip):
                self.failed[clip.id] = reason
                continue
            try:
                digest = digests.of(index)
            except ClipError:
                digest = None
            record, lacks = self.cache.look_up(clip, digest)
            if record is None or lacks:
                lacking[clip.id] = lacks.first
                continue
            self.clips.append(clip)
            self.indices[clip.id] = index
            videos.append(record.source)
        if shown:
            with suppress(OSError):  # The cache may be another user's, and this only saves time.
                digests.keep()
        count = len(self.source.items)
        if lacking:
            name, reason = next(iter(lacking.items()))
            raise UserError(
                f"{len(lacking)} of {count} clips are not in the cache {self.cache.root} as they "
                f"are now. The first is {name!r}: {reason}. Run `videorepa prepare` with this "
                "recipe; it makes what is missing or has changed, and nothing else."
            )
        if not self.clips:
            raise UserError(f"There is nothing to train on: {self.failures}")
        self.contents = {
            "count": len(self.clips),
            "ids": json_digest([clip.id for clip in self.clips]),
            "captions": json_digest([clip.caption for clip in self.clips]),
            "videos": json_digest(videos),
        }

    @property
    def failures(self) -> str:
        """How many clips failed in `prepare`, with the first one's name and reason; "" if none."""
        if not self.failed:
            return ""
        name, reason = next(iter(self.failed.items()))
        of_all = f"{len(self.failed)} of {len(self.source.items)} clips"
        return f"{of_all} failed in `prepare`. The first is {name!r}: {reason}"


class Loader:
    """Makes the batches of prepared clips, and runs the recipe's online teachers.

    Args:
      recipe: Describes the training.
      prepared: The recipe's clips.
      backbone: Scales the latents and samples timesteps.
      device: Where batches go and teachers run.
    """

    def __init__(
        self, recipe: Recipe, prepared: PreparedClips, backbone: Backbone, device: torch.device
    ) -> None:
        self.recipe, self.backbone, self.device = recipe, backbone, device
        self.source, self.cache = prepared.source, prepared.cache
        self.clips, self.indices = prepared.clips, prepared.indices
        dtype = compute_dtype(recipe.train.precision, device)
        self.online = {
            term.encoder: term.encoder.load(device, dtype)
            for term in recipe.terms.values()
            if term.encoder and term.encoder not in recipe.stored_encoders
        }
        self.empty_caption = self.cache.read_empty_caption()
        self.continuation = recipe.backbone.continuation(recipe.data)

    def batches(self, start: int, rank: int, count: int) -> Generator[Batch]:
        """Give the micro-batches of process `rank` of `count`, from step `start` to the last.

        A thread reads the next one while the caller trains on the latest.
        """
        optim = self.recipe.optim
        batches = (
            self.batch(sample_numbers(step, micro, rank, count, optim.batch_size, optim.accumulate))
            for step in range(start, optim.steps)
            for micro in range(optim.accumulate)
        )
        yield from ahead(batches, self.device)

    def batch(self, numbers: range) -> Batch:
        """Make a batch of the samples with these numbers, which count over the whole training."""
        seed = self.recipe.seed
        latents, noises, texts, times, grids, clips = [], [], [], [], [], []
        for number in numbers:
            clip = self.clips[clip_index(seed, number, len(self.clips))]
            draw = generator(seed, "sample", number)
            moments, text = self.cache.read_clip(clip)
            clean = self.backbone.latents(moments[None], draw)
            noises.append(torch.randn(clean.shape, generator=draw))
            times.append(self.backbone.sample_timesteps(clean, draw))
            dropped = torch.rand((), generator=draw).item() < self.recipe.train.caption_dropout
            latents.append(clean)
            clips.append((clip, moments[None]))
            texts.append(self.empty_caption if dropped else text)
            grids.append(self._features(clip))
        teachers = {
            encoder: TokenGrid.batch([grid[encoder] for grid in grids]) for encoder in grids[0]
        }
        text = {name: torch.stack([t[name] for t in texts]) for name in texts[0]}
        batch = Batch(
            torch.cat(latents),
            text,
            torch.cat(noises),
            torch.cat(times),
            teachers,
            self._opening(numbers, clips),
        )
        return batch.to(self.device)

    def _opening(
        self, numbers: range, clips: Sequence[tuple[SourceClip, Tensor]]
    ) -> Opening | None:
        """Draw what is shown of the samples' clips, apart from all other draws.

        Args:
          numbers: The samples.
          clips: Their clips, with the moments of their latents.
        """
        if self.continuation is None:
            return None
        seed, openings = self.recipe.seed, []
        is_alike = self.backbone.conditioning.is_alike
        for number, (clip, moments) in zip(numbers, clips, strict=True):
            of = numbers.start if is_alike else number
            count = draw_latents_shown(self.continuation, generator(seed, "opening", of))
            stored = {name: t[None] for name, t in self.cache.read_image(clip).items()}
            draw = generator(seed, "image", number)
            openings.append(Opening((count,), self.backbone.image(stored, moments, draw)))
        return Opening.batch(openings)

    def _features(self, clip: SourceClip) -> dict[EncoderSpec, TokenGrid]:
        """Read or compute each teacher's features of a clip."""
        stored = {
            encoder: self.cache.read_features(clip, encoder) for encoder in self.cache.features
        }
        if not self.online:
            return stored
        try:
            sampled = self.source.sample(self.indices[clip.id])
        except ClipError as error:
            raise UserError(
                f"The clip {clip.id!r} can no longer be read ({error}), and the teacher is online. "
                "Run `videorepa prepare` again, or set align.teacher to cached."
            ) from None
        video = to_video(sampled.frames)[None]
        for spec, encoder in self.online.items():
            stored[spec] = grid = encoder.see(video, [sampled.scene])
            values = [grid.tokens] if grid.saliency is None else [grid.tokens, grid.saliency]
            check_finite(f"The features that {spec.name} gives of the clip {clip.id!r}", *values)
        return stored
