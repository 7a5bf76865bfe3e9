"""mPLUG-Owl-Video as a judge: answers questions about clips, from a checkpoint's folder."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from videorepa.benchmarks._judged import DigitAnswer
from videorepa.benchmarks.mplug_owl import VIDEO, MPlugOwlVideo
from videorepa.data.video import to_video
from videorepa.errors import UserError
from videorepa.system.configuration import read_configuration
from videorepa.system.fingerprint import file_sample_digest, json_digest
from videorepa.system.hub import plain_weights, quieten_libraries

FRAMES = 32

VIDEO_TEXT = "<|video|>"

ANSWER_LENGTH = 4

PUBLISHED_LENGTH = 256

_WORDS = ("zero", "one", "two", "three", "four", "five")

_SCANNED = [(word, n) for n, word in enumerate(_WORDS)] + [(str(n), n) for n in range(6)]

_ADVICE = (
    "Expected a folder with config.json, tokenizer.model and pytorch_model*.bin or *.safetensors, "
    "as the judges are published."
)


def frame_indices(count: int) -> list[int]:
    """The 32 frames of a clip that the judge sees, evenly spaced as published.

    The last frame is never among them, and a clip of fewer frames repeats some.
    """
    step = (count - 1) / FRAMES
    # As published, halves are rounded to even, which is what round does.
    return [int(step / 2) + round(step * number) for number in range(FRAMES)]


@dataclass(frozen=True)
class OwlJudge:
    """mPLUG-Owl-Video, loaded.

    Attributes:
        mean: Mean of each colour, for normalisation of pixels in [0, 1].
        std: Standard deviation of each colour.
        side: Side of a frame in pixels.
    """

    model: MPlugOwlVideo
    tokenizer: SentencePieceProcessor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> OwlJudge:
        """Load a published checkpoint without running any code in it.

        Raises:
            UserError: The folder is incomplete or does not hold such a model.
        """
        quieten_libraries()
        config = _json(folder / "config.json")
        colours = _json(folder / "preprocessor_config.json", {})
        try:
            # transformers would need protobuf to read the same file.
            tokenizer = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"The tokenizer.model in {folder} cannot be read ({str(error)[:200]}). {_ADVICE}"
            ) from None
        model = MPlugOwlVideo.from_state_dict(config, _weights(folder), dtype)
        return cls(
            model.to(device),
            tokenizer,
            tuple(colours.get("image_mean", OPENAI_CLIP_MEAN)),
            tuple(colours.get("image_std", OPENAI_CLIP_STD)),
            model.side,
        )

    def token(self, text: str) -> int:
        """The id of a token.

        Raises:
            UserError: The vocabulary lacks it.
        """
        token = self.tokenizer.piece_to_id(text)
        if token == self.tokenizer.unk_id():
            raise UserError(
                f"The judge's tokenizer has no token {text!r}, so its answer cannot be read; "
                "expected LLaMA's. Compare the folder with the one it was copied from."
            )
        return token

    def ids(self, prompt: str, split: str) -> list[int]:
        """Encode a prompt.

        Args:
            prompt: `VIDEO_TEXT` in it becomes a `VIDEO` for each of the video's tokens.
            split: A pattern. Its matches, and the pieces between them, are encoded separately.
        """
        ids = [self.tokenizer.bos_id()]
        for piece in filter(None, re.split(f"({split})", prompt)):
            if piece == VIDEO_TEXT:
                ids += [VIDEO] * self.model.video_tokens
            else:
                ids += self.tokenizer.encode(piece)
        return ids

    @torch.no_grad()
    def see(self, frames: UInt8[np.ndarray, "t h w 3"]) -> Float[Tensor, "1 m d"]:
        """The clip as tokens for the language model, which any number of questions can share."""
        video = to_video(frames).movedim(1, 0)[None]
        mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (self.mean, self.std))
        return self.model.see(((video - mean) / std).to(self.model.query_tokens.device))

    @torch.no_grad()
    def next_logits(self, seen: Float[Tensor, "1 m d"], ids: list[int]) -> Float[Tensor, " vocab"]:
        """Logits of the first token after the prompt, in the judge's dtype."""
        embedded = self.model.embed(seen, self._row(ids))
        language = self.model.language_model
        return language(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits[0, -1]

    @torch.no_grad()
    def answer(
        self, seen: Float[Tensor, "1 m d"], ids: list[int], length: int
    ) -> tuple[list[int], Float[Tensor, "l vocab"]]:
        """Generate at most `length` tokens greedily.

        Returns:
            The answer's tokens without the end token, and the logits of every step, the end
            token's included.
        """
        embedded = self.model.embed(seen, self._row(ids))
        language: Any = self.model.language_model
        output = language.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones_like(embedded[..., 0], dtype=torch.long),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_id(),
            pad_token_id=self.tokenizer.eos_id(),
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[0].tolist()
        if tokens[-1] == self.tokenizer.eos_id():
            del tokens[-1]
        return tokens, torch.cat(output.logits)

    def _row(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.query_tokens.device)


def rate(
    judge: OwlJudge, seen: Float[Tensor, "1 m d"], ids: list[int], digits: str, compat: bool = False
) -> DigitAnswer:
    """Ask the judge a question that asks for one of some digits.

    An answer counts if it holds exactly one digit, and that digit is allowed.

    Args:
        judge: The judge.
        seen: The clip. See `OwlJudge.see`.
        ids: The prompt. See `OwlJudge.ids`.
        digits: The digits allowed, such as "12345".
        compat: Parse as the published code does: let the judge answer at length, and take the
            first of "zero" to "five", then of "0" to "5", that occurs anywhere; if none does,
            take 0. This reads "100000" as 0.
    """
    tokens, logits = judge.answer(seen, ids, PUBLISHED_LENGTH if compat else ANSWER_LENGTH)
    answer = judge.tokenizer.decode(tokens)
    if not logits.isfinite().all():
        return DigitAnswer(None, f"{answer} (its logits are not finite)", {})
    allowed = [judge.token(digit) for digit in digits]
    if compat:
        lowered = answer.lower()
        value = next((number for word, number in _SCANNED if word in lowered), 0)
    else:
        answered = re.findall("[0-9]", answer)
        value = int(answered[0]) if len(answered) == 1 and answered[0] in digits else None
    # LLaMA's tokenizer splits a digit into two tokens, of which the first is an empty word.
    empty = judge.token("▁")
    places = [place for place, token in enumerate(tokens) if token in allowed]
    others = [place for place, token in enumerate(tokens) if token != empty]
    place = (places or others or [0])[0]
    shares = logits[place, allowed].float().softmax(-1).tolist()
    return DigitAnswer(value, answer, dict(zip(digits, shares, strict=True)))


def digest(folder: Path) -> str:
    """A digest of the weights, the tokenizer and their configuration.

    Raises:
        UserError: The folder holds no weights.
    """
    files = [*_weight_files(folder), folder / "tokenizer.model"]
    configs = [folder / "config.json", folder / "preprocessor_config.json"]
    return json_digest(
        [{file.name: file_sample_digest(file) for file in files if file.exists()}]
        + [_json(config, {}) for config in configs]
    )


def language_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the language model alone, under LLaMA's own names.

    Raises:
        UserError: The folder holds no weights.
    """
    prefix = "language_model."
    return {
        name.removeprefix(prefix): weight
        for name, weight in _weights(folder).items()
        if name.startswith(prefix)
    }


def _json(path: Path, missing: Any = None) -> dict[str, Any]:
    if missing is not None and not path.exists():
        return missing
    try:
        return read_configuration(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a model's configuration: {error}. {_ADVICE}"
        ) from None


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder} holds no weights. {_ADVICE}")
    return files


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder. They stay on the disk until they are used."""
    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        with plain_weights(file):
            content = (
                load_file(file)
                if file.suffix == ".safetensors"
                else torch.load(
                    file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
                )
            )
        if not isinstance(content, dict) or not all(
            isinstance(value, Tensor) for value in content.values()
        ):
            raise UserError(f"{file} holds no table of weights. {_ADVICE}")
        if both := content.keys() & weights.keys():
            raise UserError(
                f"{folder} holds {min(both)} in {file.name} and in another file: it has several "
                "copies of the model. Keep the files of one."
            )
        weights |= content
    return weights
