"""Sets the tolerances of the law checks: what real clips need after the autoencoder, and a bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pydantic import Field

from videorepa.benchmarks.laws import checks
from videorepa.benchmarks.laws.checks import CHECKS, TOLERANCES
from videorepa.benchmarks.laws.physics import deviations
from videorepa.benchmarks.laws.tracking import observe
from videorepa.data.video import read_all, write_video
from videorepa.errors import UserError
from videorepa.lab.calibration.corruptions import CORRUPTIONS
from videorepa.lab.calibration.detection import (
    Reconstruct,
    draw_degrees,
    format_degrees,
    format_table,
    judge,
    most,
    reconstructed,
    strongest,
)
from videorepa.settings.section import Section
from videorepa.system import progress
from videorepa.system.files import atomic_write, file_digest
from videorepa.world.render import make_clip
from videorepa.world.scenarios import HELD_OUT_SEED
from videorepa.world.simulator import FPS

PASSING, HEADROOM = 0.975, 1.2
"""Of real clips, the share that is to pass all PC checks; the tolerances are then widened by the
headroom, for clips that calibration has not seen."""

TABLE_SEED = HELD_OUT_SEED - 1
"""The table's clips are neither those of training nor those that set the tolerances."""


class LawsRecipe(Section):
    """How the tolerances are set. vae: diffusers folder of an AutoencoderKLCogVideoX.

    clips: real clips that set them. table_clips: other clips, to be broken, for what the checks
    are worth with them. table_out: a Markdown file for that; beside it, of the same name, come its
    numbers (.json) and curves (.svg).
    """

    vae: Path
    out: Path = Path(checks.__file__).with_name(TOLERANCES)
    clips: int = Field(400, ge=1)
    table_clips: int = Field(100, ge=1)
    table_out: Path | None = None


def calibrate_laws(recipe: LawsRecipe) -> dict[str, float]:
    """Set the tolerances and write them with their provenance to `recipe.out`, as JSON; print how
    broken clips are judged. Gives the shares in [0, 1] of real clips, reconstructed, that pass SA,
    PC and both."""
    weights = recipe.vae / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise UserError(
            f"Found no {weights.name} in {recipe.vae}; expected the diffusers folder of an "
            "AutoencoderKLCogVideoX. Train one first."
        )
    reconstruct = as_files(autoencoder_reconstruct(recipe.vae))
    found = calibrate(reconstruct, recipe.clips, HELD_OUT_SEED)
    rows = judge(reconstruct, recipe.table_clips, TABLE_SEED, found["tolerances"])
    real = next(row for row in rows if row["kind"] == "reconstructed")
    shares = {f"share_{key}": real[key] for key in ("sa", "pc", "joint")}
    found["provenance"] |= {
        "autoencoder": f"sha256:{file_digest(weights)}",
        "tried_on_seed": TABLE_SEED,
        "tried_on_clips": recipe.table_clips,
        **shares,
    }
    recipe.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(recipe.out, json.dumps(found, indent=2) + "\n")
    print(format_table(strongest(rows)))
    if (page := recipe.table_out) is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(page, _page(page.with_suffix("").name, found, rows))
        atomic_write(page.with_suffix(".json"), _lines(rows))
        draw_degrees(rows).savefig(page.with_suffix(".svg"), metadata={"Date": None})
    return shares


def calibrate(reconstruct: Reconstruct, clips: int, seed: int) -> dict[str, Any]:
    """Tolerances of the PC checks from clips 0 to `clips` - 1 of `seed`, as the autoencoder shows
    them. Returns {"tolerances": {name: value}, "provenance": {...}}."""
    names = [name for name, check in CHECKS.items() if check.aspect == "pc"]
    values = np.full((clips, len(names)), np.nan)
    real = (make_clip(seed, index).frames for index in range(clips))
    shown = progress.track(reconstructed(real, reconstruct), "measuring real clips", total=clips)
    for index, frames in enumerate(shown):
        found = deviations(observe(frames))
        values[index] = [np.nan if found[name] is None else found[name] for name in names]
    empty = [n for n, column in zip(names, values.T, strict=True) if np.isnan(column).all()]
    if empty:
        raise UserError(
            f"Found no clip among {clips} to which these checks apply: {', '.join(empty)}. "
            "Calibrate with more clips."
        )
    # One percentile for all checks, the lowest that lets enough clips through: a clip that the
    # autoencoder spoils fails several checks at once, and shall not widen each of them.
    percentile, limits = 100.0, np.nanmax(values, axis=0)
    for lower in np.arange(99.9, 90.0, -0.1):
        tighter = np.nanpercentile(values, lower, axis=0)
        if (~(values > tighter)).all(1).mean() < PASSING:
            break
        percentile, limits = float(lower), tighter
    tolerances = {
        name: max(CHECKS[name].resolution, float(f"{HEADROOM * float(limit):.4g}"))
        for name, limit in zip(names, limits, strict=True)
    }
    provenance = {
        "percentile": round(percentile, 1),
        "headroom": HEADROOM,
        "seed": seed,
        "clips": clips,
        "applied_to": dict(zip(names, (~np.isnan(values)).sum(0).tolist(), strict=True)),
    }
    return {"tolerances": tolerances, "provenance": provenance}


def as_files(reconstruct: Reconstruct) -> Reconstruct:
    """The same, then written and read as generated clips are: the video file costs a little too."""

    def through_files(batch: np.ndarray) -> np.ndarray:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            shown = []
            for frames in reconstruct(batch):
                write_video(path, frames, FPS)
                shown.append(read_all(path)[0])
        return np.stack(shown)

    return through_files


def autoencoder_reconstruct(vae_folder: Path) -> Reconstruct:
    """Clips to the latents' mode and back, with a diffusers folder of an AutoencoderKLCogVideoX,
    in float32 on the CPU."""
    import torch
    from diffusers import AutoencoderKLCogVideoX  # pyright: ignore[reportPrivateImportUsage]

    vae: Any = AutoencoderKLCogVideoX.from_pretrained(vae_folder, torch_dtype=torch.float32)
    vae.requires_grad_(False).eval()

    def reconstruct(clips: np.ndarray) -> np.ndarray:
        video = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        with torch.inference_mode():
            decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample
        pixels = (decoded.clamp(-1, 1) + 1) * 127.5
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()

    return reconstruct


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    """JSON with a line for every row, so that a change shows where it is."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def _page(name: str, found: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    about = found["provenance"]
    broken = "\n".join(
        f"- **{kind}** (above: {most(kind):g} {corruption.unit}".rstrip()
        + f"): {corruption.what}. Should be caught by {corruption.caught_by}."
        for kind, corruption in CORRUPTIONS.items()
    )
    limits = "\n".join(
        f"| {name} | {limit:g} | {CHECKS[name].unit} | {CHECKS[name].meaning} "
        f"| {about['applied_to'][name]} |"
        for name, limit in found["tolerances"].items()
    )
    return _PAGE.format(
        **about,
        name=name,
        rows=format_table(strongest(rows)),
        degrees=format_degrees(rows),
        broken=broken,
        limits=limits,
        passing=PASSING,
    )


_PAGE = """\
# What the lab's law checks are worth

Written by

    videorepa lab laws recipes/micro/laws.yaml

with the autoencoder whose weights have the digest

    {autoencoder}

The tolerances were set on {clips} real clips (seed {seed}). The table is of {tried_on_clips} others
(seed {tried_on_seed}). The lab's own models were trained on neither.

{rows}

SA (semantic adherence: does the clip show what its caption says?), PC (physical commonsense: does
it obey the lab's laws?) and joint (both) are the percentage of clips that pass. Then comes, for
each check, the percentage of clips that fail it. "real" is what the simulator drew; every other
row went through the autoencoder and back, the broken ones after they were broken, as badly as they
are here.

## The clips that break one law

{broken}

Not every clip that passes here is a miss:

- A roll has no direction in time. Played backwards, a roll or a collision is physical, so it fails
  SA, by its direction, and not PC.
- A body that comes to rest on the floor is physical. A clip that is frozen from some frame on fails
  PC where that is sudden.
- A body that vanishes, leaps or swells may still do what the caption says: such clips are to fail
  PC, and may pass SA. PC never reads the caption.
- Nothing is asked of a body while it is near a plank or another one, but that it stays what it is.
- Light, texture and the shapes of the screen and the planks are not judged.

And a clip that passes all checks has broken none of these laws by more than the tolerances below,
which are as wide as the autoencoder's blur makes them; it may break them by less.

## By degrees

The share of clips, broken by so much, that fail; in brackets its 95 % interval (Wilson). Of clips
that are not broken, the row "reconstructed" above says how many fail.

![Share of clips that fail PC over how badly they are broken]({name}.svg)

{degrees}

The numbers are in [{name}.json]({name}.json).

## The tolerances

One percentile of what real clips measure after the autoencoder is taken for all checks: the lowest
at which {passing:.1%} of those clips pass them all, here {percentile:g}. Each tolerance is then
widened by a factor of {headroom:g}, and none is smaller than what its check resolves. The last
column counts the clips that a check applied to: where they are few, the tolerance is uncertain.

| check | tolerance | unit | what is measured | clips |
| --- | ---: | --- | --- | ---: |
{limits}
"""
