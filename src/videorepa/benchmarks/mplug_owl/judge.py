"""mPLUG-Owl-Video as a judge: a checkpoint's folder, clips and questions in, logits out."""

from __future__ import annotations

import json
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

from videorepa.benchmarks.mplug_owl import VIDEO, MPlugOwlVideo
from videorepa.errors import UserError
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
    """Which frames of `count` the judge sees: 32, evenly spaced as published. The last is left out,
    and clips of fewer frames repeat some."""
    step = (count - 1) / FRAMES
    # Halves are rounded to even, as published: what round does.
    return [int(step / 2) + round(step * number) for number in range(FRAMES)]


@dataclass(frozen=True)
class OwlJudge:
    """A live judge.

    mean, std: of the colours, 0 to 1. side: pixels along a side of a frame.
    """

    model: MPlugOwlVideo
    tokenizer: SentencePieceProcessor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> OwlJudge:
        """Read a published checkpoint, of which nothing is run. Raises UserError."""
        quieten_libraries()
        config = _json(folder / "config.json")
        colours = _json(folder / "preprocessor_config.json", {})
        try:
            # Not by way of transformers, which wants protobuf to read the same file.
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
        """The id of a token. Raises UserError if the vocabulary lacks it."""
        found = self.tokenizer.piece_to_id(text)
        if found == self.tokenizer.unk_id():
            raise UserError(
                f"The judge's tokenizer has no token {text!r}, so its answer cannot be read; "
                "expected LLaMA's. Compare the folder with the one it was copied from."
            )
        return found

    def ids(self, prompt: str, split: str) -> list[int]:
        """The prompt's ids. Pieces between matches of the pattern `split`, and the matches, are
        encoded each by itself; `VIDEO_TEXT` becomes a place for each of the video's tokens."""
        found = [self.tokenizer.bos_id()]
        for piece in filter(None, re.split(f"({split})", prompt)):
            if piece == VIDEO_TEXT:
                found += [VIDEO] * self.model.video_tokens
            else:
                found += self.tokenizer.encode(piece)
        return found

    @torch.no_grad()
    def see(self, frames: UInt8[np.ndarray, "t h w 3"]) -> Float[Tensor, "1 m d"]:
        """What the judge has seen of a clip, to be asked about."""
        video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 255.0
        mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (self.mean, self.std))
        return self.model.see(((video - mean) / std).to(self.model.query_tokens.device))

    @torch.no_grad()
    def next_logits(self, seen: Float[Tensor, "1 m d"], ids: list[int]) -> Float[Tensor, " vocab"]:
        """Logits of the token after the prompt, in the judge's dtype."""
        embedded = self.model.embed(seen, self._row(ids))
        language = self.model.language_model
        return language(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits[0, -1]

    @torch.no_grad()
    def answer(
        self, seen: Float[Tensor, "1 m d"], ids: list[int], length: int
    ) -> tuple[list[int], Float[Tensor, "l vocab"]]:
        """The likeliest tokens after the prompt, at most `length`, up to the end of the answer; and
        the logits that each of them was chosen by."""
        embedded = self.model.embed(seen, self._row(ids))
        language: Any = self.model.language_model
        found = language.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones_like(embedded[..., 0], dtype=torch.long),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_id(),
            pad_token_id=self.tokenizer.eos_id(),
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = found.sequences[0].tolist()
        if tokens[-1] == self.tokenizer.eos_id():
            del tokens[-1]
        return tokens, torch.cat(found.logits)

    def _row(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.query_tokens.device)


@dataclass(frozen=True)
class DigitAnswer:
    """A digit that the judge answered. value: None if it answered anything else; answer: its words.

    probabilities: of each digit that it may answer, where it answered, as shares of all of them.
    """

    value: int | None
    answer: str
    probabilities: dict[str, float]

    @property
    def expected(self) -> float | None:
        """The mean digit by those probabilities."""
        weighted = [int(digit) * share for digit, share in self.probabilities.items()]
        return sum(weighted) if weighted else None


def rate(
    judge: OwlJudge, seen: Float[Tensor, "1 m d"], ids: list[int], digits: str, compat: bool = False
) -> DigitAnswer:
    """Have the judge answer with one of these digits.

    The answer counts if it holds exactly one digit and that is one of these. compat: as the
    published parser, the first of "zero" to "five" and then "0" to "5" that stands anywhere in a
    long answer, and 0 if none does: so it takes 100000 for 0.
    """
    tokens, logits = judge.answer(seen, ids, PUBLISHED_LENGTH if compat else ANSWER_LENGTH)
    answer = judge.tokenizer.decode(tokens)
    if not logits.isfinite().all():
        return DigitAnswer(None, f"{answer} (its logits are not finite)", {})
    legal = [judge.token(digit) for digit in digits]
    if compat:
        lowered = answer.lower()
        value = next((number for word, number in _SCANNED if word in lowered), 0)
    else:
        found = re.findall("[0-9]", answer)
        value = int(found[0]) if len(found) == 1 and found[0] in digits else None
    # LLaMA says a digit in two tokens, of which the first is an empty word.
    empty = judge.token("▁")
    places = [place for place, token in enumerate(tokens) if token in legal]
    others = [place for place, token in enumerate(tokens) if token != empty]
    place = (places or others or [0])[0]
    shares = logits[place, legal].float().softmax(-1).tolist()
    return DigitAnswer(value, answer, dict(zip(digits, shares, strict=True)))


def digest(folder: Path) -> str:
    """Changes when the weights, the tokenizer or their configuration do. Raises UserError."""
    files = [*_weight_files(folder), folder / "tokenizer.model"]
    configs = [folder / "config.json", folder / "preprocessor_config.json"]
    return json_digest(
        [{file.name: file_sample_digest(file) for file in files if file.exists()}]
        + [_json(config, {}) for config in configs]
    )


def _json(path: Path, missing: Any = None) -> dict[str, Any]:
    if missing is not None and not path.exists():
        return missing
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}. {_ADVICE}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not an object. {_ADVICE}")
    return found


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder} holds no weights. {_ADVICE}")
    return files


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder; they stay on the disk until they are used."""
    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        with plain_weights(file):
            found = (
                load_file(file)
                if file.suffix == ".safetensors"
                else torch.load(
                    file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
                )
            )
        if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
            raise UserError(f"{file} holds no table of weights. {_ADVICE}")
        if both := found.keys() & weights.keys():
            raise UserError(
                f"{folder} holds {min(both)} in {file.name} and in another file: it has several "
                "copies of the model. Keep the files of one."
            )
        weights |= found
    return weights
