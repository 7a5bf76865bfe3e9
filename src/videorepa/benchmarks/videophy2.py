"""VideoPhy-2 (Bansal et al. 2025, arXiv 2503.06800), scored by its judge, VideoPhy-2-AutoEval."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from videorepa.artifacts.scores import Better
from videorepa.benchmarks._judged import DigitAnswer
from videorepa.benchmarks._videophysics import Videophysics
from videorepa.benchmarks.mplug_owl.judge import rate
from videorepa.errors import UserError

PROMPT = (
    "The following is a conversation between a curious human and an AI assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions.\n"
    "Human: <|video|>\nHuman: {question}\nAI: "
)

# Unlike VideoPhy's and unlike its own training, the published scoring does not split at "AI:".
SPLIT = r"<image>|<\|video\|>"

_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class VideoPhy2(Videophysics):
    """A flag says whether the judge's rating, 1 to 5, is 4 or 5. The hard subset is a scenario.

    Attributes:
        compat_parser: Read the judge's answers as the published code does. See
            `mplug_owl.judge.rate`.
    """

    name: Literal["videophy2"] = "videophy2"
    version: ClassVar[str] = "1"
    longer: ClassVar[tuple[str, ...]] = ("upsampled_caption",)
    score_names: ClassVar[tuple[str, ...]] = ("rating",)
    threshold: ClassVar[float] = 4
    thresholds: ClassVar[tuple[float, ...]] = (3, 4, 5)
    judge: str = "videophysics/videophy_2_auto"
    compat_parser: bool = False

    def scenario(self, prompt: str) -> str | None:
        """The scenario "hard" for a prompt that the list marks as `is_hard`."""
        value = self.find(prompt).row.get("is_hard", False)
        hard = _TRUTH.get(str(value).strip().lower())
        if hard is None:
            raise UserError(
                f"{self.captions} has the value {value!r} in is_hard; expected True or False."
            )
        return "hard" if hard else None

    @classmethod
    def ranked_by(cls) -> dict[str, Better]:
        expected: dict[str, Better] = {f"{metric}_expected": "higher" for metric in cls.metrics}
        return super().ranked_by() | expected

    def readout(self) -> dict[str, str]:
        return {"parser": "published" if self.compat_parser else "exactly one digit"}

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        """Ask the judge about one clip.

        Args:
            frames: (32, side, side, 3) uint8.

        Returns:
            joint; and for sa and pc the flag, METRIC_rating, METRIC_answer, METRIC_probabilities
            of the ratings, and METRIC_expected, the mean rating under these.
        """
        caption = self.find(prompt).caption
        questions = {
            "sa": (
                f'Does this video match the description: "{caption}"? Please rate the video on a '
                "scale from 1 to 5, where 5 indicates a perfect match and 1 indicates no relevance."
            ),
            "pc": (
                "Does this video adhere to the physical laws? Rate the video on a scale from 1 to "
                "5, where 5 means full compliance and 1 means significant violations."
            ),
        }
        seen = self.live.see(frames)
        row: dict[str, Any] = {}
        invalid = {}
        for metric, question in questions.items():
            rating = self._rate(seen, question, "12345")
            row |= self.rated(metric, rating) | {f"{metric}_answer": rating.text}
            if rating.value not in range(1, 6):
                invalid[metric] = f"the judge answered {rating.text[:80]!r}"
        return row | {"joint": self.joint(row), "invalid": invalid}

    def follows(self, frames: np.ndarray, rule: str) -> DigitAnswer:
        """Ask whether a clip follows a physical rule: 0 if not, 1 if so, 2 if indeterminate.

        Args:
            frames: What `read` returned.
            rule: The rule, as a sentence.
        """
        question = (
            f'Does the video follow the physical rule: "{rule}"?\n'
            "Choose 0 if not, 1 if valid, or 2 if indeterminate. "
        )
        return self._rate(self.live.see(frames), question, "012")

    def _rate(self, seen: Any, question: str, digits: str) -> DigitAnswer:
        ids = self.live.ids(PROMPT.format(question=question), SPLIT)
        return rate(self.live, seen, ids, digits, self.compat_parser)
