"""Writes the model card that goes with exported weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from videorepa.artifacts import checkpoint
from videorepa.artifacts.model import trained_digest
from videorepa.artifacts.run import Run
from videorepa.artifacts.scores import Metric, MetricDifference, Scores, Summary
from videorepa.evaluation.tables import left_out, notes_on_clips
from videorepa.exchange.lora import COMFYUI_FILE, LORA_FILE
from videorepa.exchange.usage import sampled_with, usage
from videorepa.recipe import Recipe
from videorepa.system.wording import count, listed


def model_card(
    run: Run,
    recipe: Recipe,
    step: int,
    product: str,
    dtype: str,
    evaluations: Sequence[Scores],
) -> str:
    """Write the card of exported weights, as Markdown with the Hub's header.

    It says what was trained from which base model and on which clips, how the result scores, and
    how to use it. The recipe and the environment are in it as a whole.

    Args:
      run: The run that trained the weights.
      recipe: The run's recipe.
      step: The step of the exported checkpoint.
      product: The name of the exported file or folder.
      dtype: The dtype of the exported weights.
      evaluations: The scores of the exported model's clips.
    """
    base, part = recipe.backbone.weights, recipe.backbone.part
    shown = recipe.backbone.shown_in_training(recipe.data)
    task = "image-to-video" if shown else "text-to-video"
    header: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task}
    if base.count("/") == 1 and not Path(base).exists():
        header["base_model"] = base
    header["tags"] = ["videorepa"] if recipe.train.lora is None else ["videorepa", "lora"]
    optim, data = recipe.optim, recipe.data
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {recipe.name}",
        recipe.about or "Fine-tuned with videorepa.",
        "\n".join(
            [
                f"- base model: {base}",
                f"- trained: {_trained(recipe)}, step {step} of {optim.steps}, "
                f"{_clips(run, recipe, step)} a step",
                f"- weights: {dtype}; sidecars of this model's clips call it "
                f"{trained_digest(run, recipe.backbone, step)}",
                f"- alignment: {_alignment(recipe)}",
                f"- data: {data.manifest or data.lab}, "
                f"{data.frames} frames of {data.height}x{data.width}",
                *([f"- shown of each clip in training: {shown}"] if shown else []),
                f"- sampled with: {sampled_with(recipe)}",
                f"- in this folder: {_in_the_folder(product, part, recipe.backbone.expert_name)}",
            ]
        ),
        *_usage(recipe, product, part),
        "## Scores",
        *(map(_scores, evaluations) if evaluations else ["None were measured."]),
        "## License",
        f"These weights are made from {base}, and its license holds for them too. Look up the "
        "license of the clips where they come from.",
        "## Made with",
        f"The whole recipe:\n\n```yaml\n{recipe.text().rstrip()}\n```",
        f"```json\n{json.dumps(run.environment, indent=1)}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _in_the_folder(product: str, part: str, expert: str) -> str:
    of = f" of the {expert} (`{part}` in diffusers)" if expert else ""
    if product == COMFYUI_FILE:
        return f"`{product}`, for ComfyUI's LoRA loader at strength 1" + (
            f", on the model{of} alone" if expert else ""
        )
    if product == LORA_FILE:
        into = "" if part == "transformer" else f", with `load_into_{part}=True`"
        loads = "`load_lora_weights` of the base model's diffusers pipeline"
        return f"`{product}`{of}, for {loads}{into}"
    return (
        f"`{product}`, for the `{part}` of the base model's diffusers pipeline; `from_pretrained` "
        "of its stock class loads it"
    )


def _usage(recipe: Recipe, product: str, part: str) -> list[str]:
    if product == COMFYUI_FILE:
        return []
    return [
        "## Use",
        "Plain diffusers samples as the clips of this model were, with:",
        f"```python\n{usage(recipe, product, part)}\n```",
    ]


def _clips(run: Run, recipe: Recipe, step: int) -> str:
    clips = checkpoint.batch_of(run.checkpoints, step)
    if clips is None:  # An earlier version trained it.
        return f"{count(recipe.optim.clips(1), 'clip')} of each process"
    return count(clips, "clip")


def _trained(recipe: Recipe) -> str:
    lora = recipe.train.lora
    return "all weights" if lora is None else f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}"


def _alignment(recipe: Recipe) -> str:
    return (
        "; ".join(
            f"{name}, weight {term.weight:g}, block {term.block}, target "
            + (term.encoder.name if term.encoder else str(term.target))
            for name, term in recipe.terms.items()
        )
        or "none"
    )


def _scores(scores: Scores) -> str:
    """Write the table of one evaluation, and of its comparison if it has one."""
    summary, comparison = scores.summary, scores.comparison
    folder = scores.folder.resolve()
    notes = [f"{count(summary.n, 'clip')}", *notes_on_clips(summary)]
    if any(row.get("model_digest") is None for row in scores.rows):
        notes.append("made by a model that is not recorded")
    lines = [
        f"{summary.benchmark} {summary.version}, from `{folder.parent.name}/{folder.name}`: "
        f"{', '.join(notes)}.",
        *(["", " ".join(summary.says)] if summary.says else []),
        *(["", asked] if (asked := _asked(summary)) else []),
        "",
        "| metric | value | 95 % interval | clips | invalid |",
        "|---|---|---|---|---|",
        *(f"| {name} | {_metric(metric)} |" for name, metric in summary.metrics.items()),
    ]
    if comparison is not None:
        notes = left_out(comparison)
        without = f"; left out: {', '.join(notes)}" if notes else ""
        lines += [
            "",
            f"Against `{comparison.against}`, clip by clip{without}:",
            "",
            "| metric | difference | 95 % interval | pairs | p | p, as one of a family |",
            "|---|---|---|---|---|---|",
            *(
                f"| {name} | {_difference(difference, summary.metrics.get(name, Metric()))} |"
                for name, difference in comparison.metrics.items()
            ),
        ]
    return "\n".join(lines)


def _asked(summary: Summary) -> str:
    if summary.asked is None:
        return "What else was asked is not recorded."
    settings = [f"{name} `{value}`" for name, value in summary.asked_by_name.items()]
    return f"Asked with {listed(settings)}." if settings else ""


def _metric(metric: Metric) -> str:
    value, form = (metric.percent, ".1f") if metric.is_share else (metric.mean, ".4g")
    unit = " %" if metric.is_share else ""
    shown = "none" if value is None else f"{value:{form}}{unit}"
    return f"{shown} | {_interval(metric, metric)} | {_number(metric.n)} | {metric.invalid}"


def _difference(difference: MetricDifference, metric: Metric) -> str:
    value = f"{difference.difference:+{'.1f' if metric.is_share else '.3g'}}"
    tests = f"{_number(difference.p, '.3f')} | {_number(difference.p_holm, '.3f')}"
    return f"{value} | {_interval(difference, metric)} | {_number(difference.n)} | {tests}"


def _interval(of: Metric | MetricDifference, metric: Metric) -> str:
    form = ".1f" if metric.is_share else ".3g"
    return "" if of.low is None or of.high is None else f"[{of.low:{form}}, {of.high:{form}}]"


def _number(value: float | None, form: str = "") -> str:
    return "" if value is None else f"{value:{form}}"
