"""Sets the tolerances of the law checks so that real clips pass after the autoencoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

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
    greatest_strength,
    judge,
    reconstructed,
    strongest,
)
from videorepa.settings.bounds import Clips
from videorepa.settings.section import Section
from videorepa.system import progress
from videorepa.system.files import atomic_write, file_digest
from videorepa.world.render import make_clip
from videorepa.world.scenarios import HELD_OUT_SEED
from videorepa.world.simulator import FPS

PASSING_SHARE, HEADROOM = 0.975, 1.2
"""Share of real clips that has to pass all PC checks, and the factor by which tolerances are then
widened for clips that the calibration has not seen."""

TABLE_SEED = HELD_OUT_SEED - 1
"""Seed of the table's clips, on which no model was trained and no tolerance was set."""


class LawsRecipe(Section):
    """The recipe of the tolerances.

    Attributes:
        vae: The diffusers folder of an AutoencoderKLCogVideoX.
        out: The JSON file to write.
        clips: Number of real clips that set the tolerances.
        table_clips: Number of other clips to break, to see what the checks detect.
        table_out: The Markdown page to write about those. Its numbers (.json) and curves (.svg) go
            beside it under the same name.
    """

    vae: Path
    out: Path = Path(checks.__file__).with_name(TOLERANCES)
    clips: Clips = 400
    table_clips: Clips = 100
    table_out: Path | None = None


def calibrate_laws(recipe: LawsRecipe) -> dict[str, float]:
    """Set the tolerances, write them with their provenance, and print how broken clips are judged.

    Returns:
        The shares of real clips, reconstructed, that pass SA, PC and both, in [0, 1].

    Raises:
        UserError: There is no autoencoder.
    """
    weights = recipe.vae / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise UserError(
            f"Found no {weights.name} in {recipe.vae}; expected the diffusers folder of an "
            "AutoencoderKLCogVideoX. Train one first."
        )
    reconstruct = through_files(autoencoder_reconstruct(recipe.vae))
    calibrated = calibrate(reconstruct, recipe.clips, HELD_OUT_SEED)
    rows = judge(reconstruct, recipe.table_clips, TABLE_SEED, calibrated["tolerances"])
    real = next(row for row in rows if row["kind"] == "reconstructed")
    shares = {f"share_{key}": real[key] for key in ("sa", "pc", "joint")}
    calibrated["provenance"] |= {
        "autoencoder": f"sha256:{file_digest(weights)}",
        "tried_on_seed": TABLE_SEED,
        "tried_on_clips": recipe.table_clips,
        **shares,
    }
    recipe.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(recipe.out, json.dumps(calibrated, indent=2) + "\n")
    print(format_table(strongest(rows)))
    if (page := recipe.table_out) is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(page, _page(page.with_suffix("").name, calibrated, rows))
        atomic_write(page.with_suffix(".json"), _lines(rows))
        draw_degrees(rows).savefig(page.with_suffix(".svg"), metadata={"Date": None})
    return shares


def calibrate(reconstruct: Reconstruct, clips: int, seed: int) -> dict[str, Any]:
    """Compute the tolerances of the PC checks from reconstructed clips.

    Args:
        clips: Number of clips of the series.
        seed: Seed of the series.

    Returns:
        {"tolerances": {check: value}, "provenance": {...}}.

    Raises:
        UserError: A check applies to none of the clips.
    """
    names = [name for name, check in CHECKS.items() if check.aspect == "pc"]
    values = np.full((clips, len(names)), np.nan)
    real = (make_clip(seed, index).frames for index in range(clips))
    shown = progress.track(reconstructed(real, reconstruct), "measuring real clips", total=clips)
    for index, frames in enumerate(shown):
        measured = deviations(observe(frames))
        values[index] = [np.nan if measured[name] is None else measured[name] for name in names]
    empty = [n for n, column in zip(names, values.T, strict=True) if np.isnan(column).all()]
    if empty:
        raise UserError(
            f"Found no clip among {clips} to which these checks apply: {', '.join(empty)}. "
            "Calibrate with more clips."
        )
    # Use the same percentile for all checks, the lowest at which enough clips pass. A clip that
    # the autoencoder spoils fails several checks at once and should not widen each of them.
    percentile, limits = 100.0, np.nanmax(values, axis=0)
    for lower in np.arange(99.9, 90.0, -0.1):
        tighter = np.nanpercentile(values, lower, axis=0)
        if (~(values > tighter)).all(1).mean() < PASSING_SHARE:
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


def through_files(reconstruct: Reconstruct) -> Reconstruct:
    """Add writing and reading a video file, through which generated clips go too."""

    def reconstruct_and_read(batch: np.ndarray) -> np.ndarray:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            shown = []
            for frames in reconstruct(batch):
                write_video(path, frames, FPS)
                shown.append(read_all(path)[0])
        return np.stack(shown)

    return reconstruct_and_read


def autoencoder_reconstruct(vae_folder: Path) -> Reconstruct:
    """Load an autoencoder that reconstructs clips from their latents' mode, in float32 on the CPU.

    Args:
        vae_folder: The diffusers folder of an AutoencoderKLCogVideoX.
    """
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
    """Rows as JSON, one per line, so that a diff shows which rows changed."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def _page(name: str, calibrated: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    about = calibrated["provenance"]
    broken = "\n".join(
        f"- **{kind}** (strength in the table above: "
        f"{corruption.measured(greatest_strength(kind))}): {corruption.what}. It should be caught "
        f"by {corruption.caught_by}."
        for kind, corruption in CORRUPTIONS.items()
    )
    limits = "\n".join(
        f"| {name} | {limit:g} | {CHECKS[name].unit} | {CHECKS[name].meaning} "
        f"| {about['applied_to'][name]} |"
        for name, limit in calibrated["tolerances"].items()
    )
    return _PAGE.format(
        **about,
        name=name,
        rows=format_table(strongest(rows)),
        degrees=format_degrees(rows),
        broken=broken,
        limits=limits,
        share=PASSING_SHARE,
    )


_PAGE = """\
# How well the lab's law checks work

Written by

    videorepa lab laws recipes/micro/laws.yaml

with the autoencoder whose weights have the digest

    {autoencoder}

The tolerances were set on {clips} real clips (seed {seed}). The table below shows
{tried_on_clips} other clips (seed {tried_on_seed}). The lab's own models were trained on neither.

{rows}

SA (semantic adherence: does the clip show what its caption says?), PC (physical commonsense: does
it obey the lab's laws?) and joint (both) are the percentages of clips that pass. The last column
has, for each check, the percentage of clips that fail it. The row "real" is what the simulator
drew. All other clips were encoded and decoded by the autoencoder. Broken ones were broken before
that, with the greatest strength.

## The clips that break one law

{broken}

Not every clip that passes here is a miss:

- A roll has no direction in time. Played backwards, a roll or a collision is physical. It fails SA,
  because of its direction, and not PC.
- A body that comes to rest on the floor is physical. A clip that freezes fails PC only if the stop
  is sudden.
- A body that vanishes, leaps or swells may still do what the caption says. Such clips should fail
  PC, but may pass SA. PC never reads the caption.
- While a body is near a plank or another body, the checks ask only that it stays what it is.
- Light, texture and the shapes of the screen and the planks are not judged.

A clip that passes all checks breaks none of these laws by more than the tolerances below, which are
as wide as the autoencoder's blur makes them. It may break them by less.

## By degrees

The percentage of clips that fail, by the strength with which they are broken, with its 95 %
interval (Wilson). The row "reconstructed" above says how many clips fail that are not broken.

![Share of clips that fail PC, by strength]({name}.svg)

{degrees}

The numbers are in [{name}.json]({name}.json).

## The tolerances

All tolerances are the same percentile of what reconstructed real clips measure: the lowest at which
{share:.1%} of those clips pass all checks, here {percentile:g}. Each tolerance is then widened by
a factor of {headroom:g}, and none is smaller than what its check can resolve. The last column
counts the clips that a check applied to. Where they are few, the tolerance is uncertain.

| check | tolerance | unit | what is measured | clips |
| --- | ---: | --- | --- | ---: |
{limits}
"""
