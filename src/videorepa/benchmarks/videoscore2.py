"""VideoScore2 (He et al. 2025, arXiv 2509.22799): a Qwen2.5-VL that reasons before it scores."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from videorepa.benchmarks._judged import DigitAnswer, Judged
from videorepa.benchmarks._qwen import PAIR, QwenVL, judge_digest, video_patches
from videorepa.data.manifest import Prompt
from videorepa.data.video import read_all
from videorepa.errors import ClipError, UserError
from videorepa.system.device import pick_device
from videorepa.system.files import read_text
from videorepa.system.fingerprint import json_digest
from videorepa.system.progress import console

# Sampling and scaling as in qwen-vl-utils, which the published code relies on.
FPS = 2.0
"""Frames per second that the judge sees."""

FEWEST_FRAMES, MOST_FRAMES = 4, 768

FEWEST_PIXELS, MOST_PIXELS = 128 * 28**2, 768 * 28**2
"""Pixels of a frame."""

MOST_PIXELS_OF_ALL = 115_200 * 28**2
"""Pixels of every second frame together."""

ANSWER_LENGTH = 1024

PLACE = "{caption}"

MARKERS = {
    "vq": "visual quality",
    "sa": "text-to-video alignment",
    "pc": "physical/common-sense consistency",
}

# The format asked for is the published one; the wording is this project's own.
INSTRUCTION = (
    f"A model made this video from the following text.\n\nText: {PLACE}\n\n"
    "Look at the whole video and think aloud about three things. How good does it look: is it "
    "sharp, steady and free of faults? Does it show what the text says? Do things in it move and "
    "behave as they would in the real world? Then give each of the three a whole number from 1 "
    "(very bad) to 5 (very good), and end your answer in this form:\n"
    "visual quality: <number>; text-to-video alignment: <number>, "
    "physical/common-sense consistency: <number>"
)


def frame_indices(count: int, fps: float) -> list[int]:
    """The frames of a clip that the judge sees, evenly spaced from the first to the last.

    They are two per second, but at least 4, at most 768, and an even number. A clip of one frame
    gives [].

    Args:
        count: Frames of the clip.
        fps: Its frames per second.
    """
    seen = min(max(count / fps * FPS, FEWEST_FRAMES), MOST_FRAMES, count) // PAIR * PAIR
    return torch.linspace(0, count - 1, int(seen)).round().int().tolist()


def patches(
    processor: Any, frames: UInt8[np.ndarray, "t h w 3"]
) -> tuple[Float[Tensor, "n d"], Int[Tensor, "1 3"]]:
    """Prepare frames as the stock video processor does, which needs torchvision.

    Args:
        processor: The stock processor of images.
        frames: An even number of frames.

    Returns:
        Scaled and normalised patches, and their number along time, height and width.
    """
    most = max(min(MOST_PIXELS, MOST_PIXELS_OF_ALL * PAIR // len(frames)), FEWEST_PIXELS * 21 // 20)
    return video_patches(processor, frames, FEWEST_PIXELS, most)


class QwenJudge(QwenVL):
    """VideoScore2, loaded."""

    stock = "Qwen2_5_VLForConditionalGeneration"
    published = "a Qwen2.5-VL folder as VideoScore2 is published"

    def inputs(self, frames: UInt8[np.ndarray, "t h w 3"], instruction: str) -> dict[str, Tensor]:
        """The stock model's inputs: the instruction's ids with the video's tokens, and the video.

        Raises:
            UserError: The chat template and the instruction do not make one place for the video.
        """
        content = [{"type": "video"}, {"type": "text", "text": instruction}]
        text = self.chat([{"role": "user", "content": content}])
        video = self.model.config.video_token_id
        ids = self.tokenizer(text)["input_ids"]
        if ids.count(video) != 1:
            raise UserError(
                f"The judge's chat template and the instruction make {ids.count(video)} places for "
                "the video; expected one. The template has to be Qwen2.5-VL's, and neither caption "
                "nor instruction may contain its marks."
            )
        pixels, grid = patches(self.processor, frames)
        place = ids.index(video)
        tokens = int(grid.prod()) // self.processor.merge_size**2
        row = torch.tensor([ids[:place] + [video] * tokens + ids[place + 1 :]])
        inputs = {
            "input_ids": row,
            "attention_mask": torch.ones_like(row),
            # Without these, a video's tokens get positions as if they were text.
            "mm_token_type_ids": 2 * (row == video).int(),
            "pixel_values_videos": pixels,
            "video_grid_thw": grid,
            # As published, even for clips under 2 seconds, which are sampled more densely.
            "second_per_grid_ts": torch.tensor([PAIR / FPS]),
        }
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def answer(
        self, frames: UInt8[np.ndarray, "t h w 3"], instruction: str
    ) -> tuple[list[int], Float[Tensor, "l 5"]]:
        """Generate an answer greedily; see `generate`."""
        return self.generate(self.inputs(frames, instruction), ANSWER_LENGTH)

    def rate(self, tokens: list[int], logits: Float[Tensor, "l 5"], marker: str) -> DigitAnswer:
        """The score after the marker, and the probability of each digit in its place."""
        return self.digit(tokens, logits, score_after(self.decode(tokens), marker))


def score_after(answer: str, marker: str) -> tuple[str, int] | None:
    """The number right after the last marker and its colon.

    Only the last marker counts, since a model that reasons aloud may have used the words, and a
    number, before. A remark after a dash or in brackets may come between marker and colon: the
    model sometimes repeats those of the published instruction.

    Returns:
        The number and its position in the answer, or None if there is no such number.
    """
    remark = r"(?:[-–—(][^:;\n]*)?"
    markers = list(re.finditer(rf"{re.escape(marker)}[*\s]*{remark}:", answer, re.IGNORECASE))
    if not markers:
        return None
    number = re.compile(r"[*<\s]*(\d+(?:\.\d+)?)").match(answer, markers[-1].end())
    return (number[1], number.start(1)) if number else None


class VideoScore2(Judged):
    """A flag says whether a score, 1 to 5, is 4 or 5.

    Scores are of visual quality (vq), alignment with the text (sa) and physical consistency (pc).

    Attributes:
        captions: See `Listed`. By default a clip is scored against its own prompt.
        instruction: A text file with the published instruction and `{caption}` in the caption's
            place. By default the judge is asked in our own words, and scores do not compare with
            published ones.
    """

    name: Literal["videoscore2"] = "videoscore2"
    version: ClassVar[str] = "1"
    longer: ClassVar[tuple[str, ...]] = ("detailed_caption", "upsampled_caption")
    metrics: ClassVar[tuple[str, ...]] = tuple(MARKERS)
    score_names: ClassVar[tuple[str, ...]] = ("rating", "expected")
    threshold: ClassVar[float] = 4
    thresholds: ClassVar[tuple[float, ...]] = (3, 4, 5)
    captions: str = ""
    judge: str = "TIGER-Lab/VideoScore2"
    instruction: Path | None = None

    def readout(self) -> dict[str, str]:
        whose = "own, not comparable with published scores" if self.instruction is None else "given"
        return {
            "instruction": f"{json_digest(self._instruction)} ({whose})",
            "answer": f"likeliest tokens, at most {ANSWER_LENGTH}",
        }

    def find(self, text: str) -> Prompt:
        return super().find(text) if self.captions else Prompt(text, text)

    def read(self, video: Path) -> np.ndarray:
        """The frames that the judge sees, in their own size.

        Raises:
            ClipError: The video cannot be read or has one frame.
        """
        frames, fps = read_all(video)
        seen = frame_indices(len(frames), fps)
        if not seen:
            raise ClipError(f"{video} has one frame; VideoScore2 needs two or more")
        return frames[seen]

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        """Ask the judge about one clip.

        Args:
            frames: What `read` returned: an even number of frames, (F, H, W, 3) uint8.

        Returns:
            The judge's answer; joint; and for vq, sa and pc the flag, METRIC_rating,
            METRIC_probabilities of the ratings, and METRIC_expected, the mean rating under them.
        """
        instruction = self._instruction.replace(PLACE, self.find(prompt).caption)
        tokens, logits = self.live.answer(frames, instruction)
        row: dict[str, Any] = {}
        invalid = {}
        for metric, marker in MARKERS.items():
            rating = self.live.rate(tokens, logits, marker)
            row |= self.rated(metric, rating)
            if rating.value is None:
                invalid[metric] = f"the judge gave {rating.text} as its {marker}"
        answer = self.live.decode(tokens)
        return row | {"joint": self.joint(row), "answer": answer, "invalid": invalid}

    @cached_property
    def live(self) -> QwenJudge:
        """The judge, loaded on first use."""
        if self.instruction is None:
            console.print(
                "warning: VideoScore2 is asked in our own words; scores do not compare with "
                "published ones. Give its instruction: --set instruction=FILE (docs/judging.md).",
                style="yellow",
            )
        return QwenJudge.load(self._folder, pick_device(), self._dtype)

    @cached_property
    def _instruction(self) -> str:
        if self.instruction is None:
            return INSTRUCTION
        try:
            text = read_text(self.instruction)
        except (OSError, ValueError) as error:
            raise UserError(
                f"The instruction {self.instruction} cannot be read: {error}."
            ) from None
        if PLACE not in text:
            raise UserError(
                f"The instruction {self.instruction} has no place for the caption; write {PLACE} "
                "where the caption belongs."
            )
        return text

    @cached_property
    def _by_text(self) -> dict[str, Prompt]:
        return super()._by_text if self.captions else {}

    @cached_property
    def _identity(self) -> dict[str, str]:
        return {
            "model": "Qwen2.5-VL",
            "weights": judge_digest(self._folder),
            "frames": f"{FPS:g} a second, {FEWEST_FRAMES} to {MOST_FRAMES}",
            "scaling": "to multiples of 28, bicubic, by Pillow",
        }
