"""What judges that are Qwen-VLs share: loading a stock class, cutting a video, reading a digit."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from videorepa.benchmarks._judged import DigitAnswer
from videorepa.errors import ClipError, UserError
from videorepa.system.configuration import read_configuration
from videorepa.system.files import parse_json, read_text
from videorepa.system.fingerprint import file_sample_digest, json_digest
from videorepa.system.hub import stock_loading
from videorepa.system.weights import Misfit

PAIR = 2
"""Frames that a token covers."""

LONGEST = 200
"""Most times that a frame's long side is its short side; the stock processor takes no others."""

DIGITS = ("1", "2", "3", "4", "5")


def video_patches(
    processor: Any, frames: UInt8[np.ndarray, "t h w 3"], fewest: int, most: int
) -> tuple[Float[Tensor, "n d"], Int[Tensor, "1 3"]]:
    """Prepare frames as the stock video processor does, which needs torchvision.

    Args:
        processor: The stock processor of images.
        frames: An even number of frames.
        fewest: Pixels of a frame, at least.
        most: Pixels of a frame, at most.

    Returns:
        Scaled and normalised patches, and their number along time, height and width.

    Raises:
        ClipError: The frames are too narrow for their length.
    """
    height, width = frames.shape[1:3]
    if max(height, width) > LONGEST * min(height, width):
        raise ClipError(
            f"the clip's frames are {height}x{width}; the judge takes frames whose long side is at "
            f"most {LONGEST} times the short one. Crop or scale the clip"
        )
    prepared = processor(
        list(frames),
        size={"shortest_edge": fewest, "longest_edge": most},
        input_data_format="channels_last",
        return_tensors="pt",
    )
    # It turns an image into a video of PAIR equal frames: (frame, patch, colour, copy, pixel).
    stills = prepared["pixel_values"].unflatten(0, (len(frames), -1)).unflatten(2, (3, PAIR, -1))
    pairs = torch.stack([stills[0::2, :, :, 0], stills[1::2, :, :, 1]], 3)
    _, height, width = prepared["image_grid_thw"][0].tolist()
    return pairs.flatten(2).flatten(0, 1), torch.tensor([[len(pairs), height, width]])


@dataclass(frozen=True)
class QwenVL:
    """A judge, loaded.

    Attributes:
        template: The chat template, where a file of its own holds it.
        processor: The stock processor of images.
        digits: The ids of "1" to "5".
        stock: Name of the model's class in transformers.
        published: What the judge's folder is, for messages.
    """

    model: Any
    tokenizer: Any
    template: str | None
    processor: Any
    digits: list[int]
    stock: ClassVar[str]
    published: ClassVar[str]

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        pictures: Mapping[str, Any] | None = None,
    ) -> Self:
        """Load a published folder without running any code in it.

        Args:
            pictures: Settings of the processor of images other than its own.

        Raises:
            UserError: The folder is incomplete or does not hold such a model.
        """
        import transformers

        kind: Any = getattr(transformers, cls.stock)
        pictured: Any = transformers.Qwen2VLImageProcessorPil
        # Older folders hold the template in this file, which a tokenizer does not read.
        chat = folder / "chat_template.json"
        expected = (
            f"Expected {cls.published}: config.json, *.safetensors and the tokenizer's files."
        )
        with stock_loading(f"The judge {folder}", expected):
            template = parse_json(read_text(chat))["chat_template"] if chat.exists() else None
            read_configuration(folder / "config.json")  # Raises for sizes without end.
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
            model, info = kind.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        # Otherwise transformers would initialise missing weights at random.
        misfit = Misfit.reported(info)
        if misfit.missing:
            raise UserError(
                f"{folder} does not fit the judge; {misfit}. Copy or download the folder again."
            )
        encoded = [tokenizer.encode(digit, add_special_tokens=False) for digit in DIGITS]
        if any(len(ids) != 1 for ids in encoded):
            raise UserError(
                f"The tokenizer in {folder} has no token of its own for each digit, so the judge's "
                "scores cannot be read; expected Qwen's."
            )
        vision = model.config.vision_config
        processor = pictured(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=PAIR,
            **(pictures or {}),
        )
        return cls(
            model.to(device).eval(), tokenizer, template, processor, [ids[0] for ids in encoded]
        )

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Write messages as the model was trained on them, up to where it answers."""
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=True,
            **options,
        )

    @torch.no_grad()
    def generate(
        self, inputs: dict[str, Tensor], length: int
    ) -> tuple[list[int], Float[Tensor, "l 5"]]:
        """Generate an answer greedily.

        Args:
            length: Most tokens of the answer.

        Returns:
            The answer's tokens, and for each token the logits of the five digits, before any
            penalty that generation_config.json asks for.
        """
        output = self.model.generate(
            **inputs,
            max_new_tokens=length,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens, torch.cat([logits[:, self.digits] for logits in output.logits])

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def digit(
        self, tokens: list[int], logits: Float[Tensor, "l 5"], score: tuple[str, int] | None
    ) -> DigitAnswer:
        """A score in an answer, and the probability of each digit in its place.

        Args:
            score: The number and its position in the decoded answer; None if there is none.
        """
        if score is None:
            return DigitAnswer(None, "nothing", {})
        number, start = score
        if number not in DIGITS:
            return DigitAnswer(None, number, {})
        ends = range(len(tokens) + 1)
        token = bisect_right(ends, start, key=lambda end: len(self.decode(tokens[:end]))) - 1
        if not logits[token].isfinite().all():
            return DigitAnswer(None, f"{number} (its logits are not finite)", {})
        shares = logits[token].softmax(-1).tolist()
        return DigitAnswer(int(number), number, dict(zip(DIGITS, shares, strict=True)))


def judge_digest(folder: Path) -> str:
    """A digest of all that loading a judge takes from its folder."""
    suffixes = (".safetensors", ".json", ".jinja", ".txt")
    files = sorted(file for file in folder.glob("*.*") if file.suffix in suffixes)
    return json_digest({file.name: file_sample_digest(file) for file in files})
