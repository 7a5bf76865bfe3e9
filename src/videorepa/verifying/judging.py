"""Compares a judge's logits with those of the stock language model on the same embedded prompt."""

from __future__ import annotations

import sys
from typing import Any

import torch

from videorepa.benchmarks._judged import Judged
from videorepa.benchmarks._videophysics import Videophysics
from videorepa.benchmarks.mplug_owl.judge import OwlJudge, frame_indices, language_weights
from videorepa.errors import UserError
from videorepa.settings import plugins
from videorepa.settings.sections import ClipSize
from videorepa.system.hub import local_copy
from videorepa.verifying.clip import simulated
from videorepa.verifying.pipeline import HEIGHT, WIDTH
from videorepa.verifying.record import Verification

QUESTION = "Does this video follow the physical laws?"

SEEN = 33
"""Frames of the clip that the judge is shown."""


def named_judge(text: str) -> Judged:
    """The benchmark of NAME or NAME=FOLDER, where the folder has its judge's weights.

    Raises:
      UserError: There is no such benchmark, or it has no judge.
    """
    name, _, folder = text.partition("=")
    kind = plugins.description("benchmarks", name)
    if not issubclass(kind, Judged):
        raise UserError(f"The benchmark {name} is scored without a judge; name one that has one.")
    settings: dict[str, Any] = {"judge": folder} if folder else {}
    return kind(captions="", **settings)


@torch.no_grad()
def compare_judge(
    record: Verification, benchmark: Judged, device: torch.device, dtype: torch.dtype
) -> None:
    """Ask the judge about a simulated clip."""
    folder = local_copy(benchmark.judge)
    if not isinstance(benchmark, Videophysics):
        live = benchmark.live
        frames, caption = simulated(ClipSize(frames=4, height=HEIGHT, width=WIDTH))
        instruction = f"Text: {caption}\nIs the video good?"
        logits = live.model(**live.inputs(frames, instruction), logits_to_keep=1).logits
        record.keep("judge's logits", logits)
        record.add("judge", "open", "is the stock class itself; there is nothing to compare with")
        return
    judge = OwlJudge.load(folder, device, dtype)
    frames, _ = simulated(ClipSize(frames=SEEN, height=judge.side, width=judge.side))
    asked = sys.modules[type(benchmark).__module__]
    seen = judge.see(frames[frame_indices(len(frames))])
    ids = judge.ids(asked.PROMPT.format(question=QUESTION), asked.SPLIT)
    logits = judge.next_logits(seen, ids)
    embedded = judge.model.embed(seen, torch.tensor([ids], device=device))
    record.keep("judge's view of the clip", seen)
    record.keep("judge's logits", logits)
    config = judge.model.language_model.config
    del judge
    stock = stock_language_model(folder, config, dtype).to(device)
    theirs = stock(inputs_embeds=embedded, use_cache=False).logits[0, -1]
    record.compare("judge's logits", {"": (logits, theirs)})


def stock_language_model(folder: Any, config: Any, dtype: torch.dtype) -> Any:
    """LLaMA from the judge's files, loaded by the stock class alone."""
    from transformers import LlamaForCausalLM

    kind: Any = LlamaForCausalLM
    return kind.from_pretrained(
        None, config=config, state_dict=language_weights(folder), dtype=dtype
    ).eval()
