"""VideoPhy (Bansal et al. 2024, arXiv 2406.03520), scored by its own judge, VideoCon-Physics."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch

from videorepa.benchmarks._videophysics import Videophysics

PROMPT = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.\n"
    "Human: <|video|>\nHuman: {question}\nAI: "
)

# Matches, and the text between them, are encoded separately. Encoded whole, the ids differ.
SPLIT = r"<image>|<\|video\|>|AI: |\nHuman: "


class VideoPhy(Videophysics):
    """A flag says whether the judge finds "Yes" at least as likely as "No".

    Attributes:
        caption: "cut" asks about the caption up to its first period, as VideoREPA does. "whole"
            keeps the period, as VideoPhy's own examples do.
        compat_bf16: Round the probabilities to bfloat16, as the published code does. Scores near
            0.5 then become exactly 0.5, which counts as "Yes".
    """

    name: Literal["videophy"] = "videophy"
    version: ClassVar[str] = "1"
    longer: ClassVar[tuple[str, ...]] = ("detailed_caption",)
    score_names: ClassVar[tuple[str, ...]] = ("score",)
    threshold: ClassVar[float] = 0.5
    thresholds: ClassVar[tuple[float, ...]] = (0.3, 0.4, 0.5, 0.6, 0.7)
    judge: str = "videophysics/videocon_physics"
    caption: Literal["cut", "whole"] = "cut"
    compat_bf16: bool = False

    def scenario(self, prompt: str) -> str | None:
        """The states of matter that interact, if the list names them."""
        state = self.find(prompt).row.get("states_of_matter")
        return str(state) if state else None

    def readout(self) -> dict[str, str]:
        probabilities = "bfloat16" if self.compat_bf16 else "float32"
        return {"caption": self.caption, "probabilities": probabilities}

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        """Ask the judge about one clip.

        Args:
            frames: (32, side, side, 3) uint8.

        Returns:
            joint; and for sa and pc the flag, METRIC_score, which is p(Yes) / (p(Yes) + p(No)) in
            [0, 1], and METRIC_logits.
        """
        caption = self.find(prompt).caption
        if self.caption == "cut":
            caption = caption.split(".")[0]
        questions = {
            "sa": f'Does this video entail the description: "{caption}"?',
            "pc": "Does this video follow the physical laws?",
        }
        yes, no = self.live.token("▁Yes"), self.live.token("▁No")
        seen = self.live.see(frames)
        row: dict[str, Any] = {}
        invalid = {}
        for metric, question in questions.items():
            ids = self.live.ids(PROMPT.format(question=question), SPLIT)
            logits = self.live.next_logits(seen, ids)
            if not logits.isfinite().all():
                invalid[metric] = "the judge's logits are not finite"
                row |= {metric: None, f"{metric}_score": None}
                continue
            if self.compat_bf16:
                likely = logits.bfloat16().softmax(-1)
                value = (likely[yes] / (likely[yes] + likely[no])).item()
            else:
                value = torch.sigmoid(logits[yes].float() - logits[no].float()).item()
            row |= {metric: value >= self.threshold, f"{metric}_score": value}
            row[f"{metric}_logits"] = {"yes": logits[yes].item(), "no": logits[no].item()}
        return row | {"joint": self.joint(row), "invalid": invalid}
