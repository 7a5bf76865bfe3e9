"""PhyJudge-9B (PhyGround, arXiv 2605.10806): a Qwen3.5 that rates one thing of a clip at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import yaml
from jaxtyping import UInt8
from safetensors.torch import load_file
from torch import Tensor

from videorepa.artifacts.reading import json_object
from videorepa.artifacts.scores import Better, Row
from videorepa.benchmarks._judged import DigitAnswer, Judged
from videorepa.benchmarks._qwen import PAIR, QwenVL, judge_digest, video_patches
from videorepa.data.manifest import Prompt
from videorepa.data.video import read_all
from videorepa.errors import ClipError, UserError
from videorepa.evaluation.pairs import Pairs, mean
from videorepa.settings.reading import parse_yaml
from videorepa.system.device import pick_device
from videorepa.system.files import parse_json, read_text
from videorepa.system.fingerprint import json_digest
from videorepa.system.hub import local_copy, plain_weights
from videorepa.system.progress import console
from videorepa.system.wording import shown

# Frames as transformers' processor of Qwen3-VL's videos takes them, from whole clips.
FPS = 2.0

FEWEST_FRAMES, MOST_FRAMES = 4, 768

ANSWER_LENGTH = 1024

PATTERNS = ("rank_pattern", "alpha_pattern")
"""What gives single layers of a LoRA a scale of their own."""

PLACE = "{caption}"

SYSTEM = "You are a strict video evaluation model."

VIDEO = "video_preprocessor_config.json"
"""The file that says how large frames are, and how their colours are normalised."""

GENERAL = {
    "SA": "does it show what the text says",
    "PTV": "do events follow each other in a possible order",
    "persistence": "do things stay what they are, and stay there",
}

LAWS = {
    "gravity": "do things fall, or rest on something, as they would",
    "inertia": "does what moves or rests go on so until something acts on it",
    "momentum": "do things move on in the right direction after they meet",
    "impenetrability": "do things keep from passing through each other",
    "collision": "do things bounce, break or bend as hard as they are hit",
    "material": "does each material behave like itself",
    "buoyancy": "does what is lighter than the liquid float, and what is heavier sink",
    "displacement": "does a liquid make room for what goes into it",
    "flow_dynamics": "does a liquid flow, spread and drain as it would",
    "boundary_interaction": "does a liquid stay within its vessel and splash off what it meets",
    "fluid_continuity": "does a liquid stay one, and as much as it was",
    "reflection": "do mirrors and water show what is in front of them",
    "shadow": "do shadows fit the light and the things that throw them",
}

# What is asked for, the scale and the form are the published ones; the wording is this project's.
QUESTION = (
    "A model made this video from a text.\n\nText: {caption}\n\n"
    "Rate one thing about the video: {aspect}? Give a whole number from 1 (not at all) to 5 "
    '(entirely), and answer with JSON alone, such as {{"{key}": 3}}.'
)


class SeenClip(NamedTuple):
    """What the judge sees of a clip.

    Attributes:
        frames: An even number of frames, (F, H, W, 3) uint8.
        seconds: The time of each pair of them, which the judge reads.
    """

    frames: UInt8[np.ndarray, "t h w 3"]
    seconds: list[float]


def sample(frames: UInt8[np.ndarray, "t h w 3"], fps: float) -> SeenClip:
    """Choose two frames a second, 4 to 768, evenly spaced from the first to the last.

    The last is seen twice if their number is odd. A pair's time is the mean of its frames'.
    """
    seen = min(max(int(len(frames) / fps * FPS), FEWEST_FRAMES), MOST_FRAMES, len(frames))
    indices = np.linspace(0, len(frames) - 1, seen).round().astype(int)
    indices = np.append(indices, indices[-1:][: seen % PAIR])
    seconds = (indices.reshape(-1, PAIR) / fps).mean(1)
    return SeenClip(frames[indices], seconds.tolist())


class PhyJudgeModel(QwenVL):
    """PhyJudge, loaded."""

    stock = "Qwen3_5ForConditionalGeneration"
    published = "a Qwen3.5 folder"

    def inputs(self, clip: SeenClip, limits: tuple[int, int], question: str) -> dict[str, Tensor]:
        """The stock model's inputs: ids with the video's tokens in their places, and the video.

        Each pair of frames stands for itself, behind its time in words.

        Args:
            limits: Fewest and most pixels of all frames together.

        Raises:
            UserError: The chat template and the question do not make one place for the video.
        """
        config, tokenizer = self.model.config, self.tokenizer
        names = ("vision_start_token_id", "video_token_id", "vision_end_token_id")
        start, pad, end = tokenizer.convert_ids_to_tokens([getattr(config, n) for n in names])
        content = [{"type": "video"}, {"type": "text", "text": question}]
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        text = self.chat(messages, enable_thinking=False)
        place = f"{start}{pad}{end}"
        if text.count(pad) != 1 or text.count(place) != 1:
            raise UserError(
                f"The judge's chat template and the question make {text.count(place)} places for "
                f"the video and {text.count(pad)} of its marks; expected one. The template has to "
                "be Qwen3.5's, and neither caption nor instruction may contain its marks."
            )
        fewest, most = (limit // len(clip.frames) for limit in limits)
        pixels, grid = video_patches(self.processor, clip.frames, max(fewest, 1), most)
        tokens = int(grid[0, 1:].prod()) // self.processor.merge_size**2
        times = [f"<{second:.1f} seconds>{start}{pad * tokens}{end}" for second in clip.seconds]
        row = torch.tensor([tokenizer(text.replace(place, "".join(times)))["input_ids"]])
        inputs = {
            "input_ids": row,
            "attention_mask": torch.ones_like(row),
            "mm_token_type_ids": 2 * (row == config.video_token_id).int(),
            "pixel_values_videos": pixels,
            "video_grid_thw": grid,
        }
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def merge(self, adapter: Path) -> None:
        """Add a published LoRA to the weights, W += alpha / r B A, in float32 as published.

        Raises:
            UserError: It is incomplete, of another kind or for another model.
        """
        config = json_object(adapter / "adapter_config.json")
        path = adapter / "adapter_model.safetensors"
        with plain_weights(path):
            weights = load_file(path)
        rank, alpha = config.get("r"), config.get("lora_alpha")
        other = [key for key in ("use_dora", "use_rslora", *PATTERNS) if config.get(key)]
        ends = (".lora_A.weight", ".lora_B.weight")
        pairs = {name.removesuffix(ends[0]) for name in weights if name.endswith(ends[0])}
        expected = {pair + end for pair in pairs for end in ends}
        if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)) or other:
            raise UserError(
                f"{adapter} has r {rank!r}, lora_alpha {alpha!r}"
                f"{''.join(f' and {key}' for key in other)}; expected a plain LoRA."
            )
        own = dict(self.model.named_parameters())
        targets = {pair: f"{pair.removeprefix('base_model.model.')}.weight" for pair in pairs}
        unknown = sorted(expected ^ set(weights)) + sorted(set(targets.values()) - set(own))
        if unknown or not pairs:
            raise UserError(
                f"{path} does not fit the judge: {', '.join(unknown[:3]) or 'it is empty'}. "
                "Expected a LoRA of Qwen3.5-9B with lora_A and lora_B for each of its layers."
            )
        for pair, target in targets.items():
            a, b = (weights[pair + end].float() for end in ends)
            weight = own[target]
            if (*b.shape, *a.shape) != (weight.shape[0], rank, rank, *weight.shape[1:]):
                raise UserError(
                    f"{path}: {pair} has the shapes {(*a.shape,)} and {(*b.shape,)}; its weight "
                    f"is {(*weight.shape,)} and r is {rank}. It is of another model, or "
                    "adapter_config.json is of another LoRA."
                )
            delta = (alpha / rank * (b @ a)).to(weight.device)
            weight.data = (weight.data.float() + delta).to(weight.dtype)


def score_of(answer: str, key: str) -> tuple[str, int] | None:
    """The number of a key in the JSON that an answer ends in, and its position, or None."""
    found = list(re.finditer(rf'"{re.escape(key)}"\s*:\s*(-?\d+(?:\.\d+)?)\s*[,}}]', answer))
    return (found[-1][1], found[-1].start(1)) if found else None


def _first_image(prompts: Path, entry: dict[str, Any]) -> Path | None:
    """The image that clips of a prompt continue, where PhyGround's lie beside its prompts."""
    folder = prompts.parent.parent / "first_images"
    return folder / f"{entry['id_stem']}.jpg" if "id_stem" in entry and folder.is_dir() else None


class PhyJudge(Judged):
    """Scores, 1 to 5, of the caption (sa), order (ptv), persistence and laws, one call for each.

    pc is the mean over a clip's laws. There are no flags: PhyGround reports means.

    Attributes:
        captions: PhyGround's phyground.json, which says which laws a prompt is about, or the folder
            of its data set, which has the first frames too. Without it a clip is scored against its
            own prompt, by `laws`.
        laws: Laws to rate in every clip, where `captions` does not say.
        judge: The base model's folder or Hub id, or that of a merged PhyJudge.
        adapter: The LoRA's folder or Hub id; None, `adapter=`, if the judge is merged.
        instruction: A YAML file with a text for each of SA, PTV, persistence and the laws, with
            `{caption}` in the caption's place. By default the judge is asked in our own words, and
            scores do not compare with published ones.
    """

    name: Literal["phyjudge"] = "phyjudge"
    version: ClassVar[str] = "1"
    longer: ClassVar[tuple[str, ...]] = ()
    metrics: ClassVar[tuple[str, ...]] = ("sa", "ptv", "persistence", "pc")
    score_names: ClassVar[tuple[str, ...]] = ("rating", "expected")
    captions: str = ""
    laws: tuple[str, ...] = ()
    judge: str = "Qwen/Qwen3.5-9B"
    adapter: str | None = "NU-World-Model-Embodied-AI/phyjudge-9B"
    instruction: Path | None = None

    @classmethod
    def ranked_by(cls) -> dict[str, Better]:
        scores = [
            f"{metric}_{name}" for name in cls.score_names for metric in (*cls.metrics, *LAWS)
        ]
        return dict.fromkeys(scores, "higher")

    def about(self) -> dict[str, Any]:
        if not (self.captions or self.laws):
            raise UserError(
                "PhyJudge rates the laws that a prompt is about. Name PhyGround's list of them, "
                "--set captions=phyground.json, or laws for all clips, "
                "--set laws=[gravity,collision]."
            )
        if self.captions and self.laws:
            raise UserError(
                f"{self.captions} says which laws a prompt is about, and `laws` are for clips "
                "without such a list. Give one of the two."
            )
        return super().about()

    def about_prompt(self, prompt: str) -> dict[str, Any]:
        """Its entry "laws" are those that are rated."""
        laws = {"laws": list(self._laws(prompt))}
        return (super().about_prompt(prompt) if self.captions else {"caption": prompt}) | laws

    def readout(self) -> dict[str, str]:
        whose = "own, not comparable with published scores" if self.instruction is None else "given"
        return {
            "instruction": f"{json_digest(self._questions)} ({whose})",
            "answer": f"likeliest tokens, at most {ANSWER_LENGTH}; no thinking",
        }

    def find(self, text: str) -> Prompt:
        return super().find(text) if self.captions else Prompt(text, text)

    def read(self, video: Path) -> SeenClip:
        """What the judge sees of a video.

        Raises:
            ClipError: The video cannot be read or has one frame.
        """
        frames, fps = read_all(video)
        if len(frames) < PAIR:
            raise ClipError(f"{video} has one frame; PhyJudge needs two or more")
        return sample(frames, fps)

    def score(self, frames: SeenClip, prompt: str) -> dict[str, Any]:
        """Ask the judge about one clip, once for each score.

        Returns:
            For each score NAME_rating, NAME_probabilities of the ratings, and NAME_expected, the
            mean rating under them; pc_rating and pc_expected, the means over the laws that have
            one, and coverage, their share; and the answers.
        """
        caption = self.find(prompt).caption
        row: dict[str, Any] = {}
        answers, invalid = {}, {}
        laws = self._laws(prompt)
        for key in (*GENERAL, *laws):
            answers[key], rating = self._rate(frames, self._questions[key], caption, key)
            name = key.lower()
            row |= {
                f"{name}_rating": rating.value,
                f"{name}_expected": rating.expected,
                f"{name}_probabilities": rating.probabilities,
            }
            if rating.value is None:
                invalid[name] = f"the judge gave {rating.text} as {key}"
        for kind in self.score_names:
            values = [row[f"{law}_{kind}"] for law in laws if row[f"{law}_{kind}"] is not None]
            row[f"pc_{kind}"] = float(np.mean(values)) if values else None
        coverage = sum(law not in invalid for law in laws) / len(laws) if laws else None
        return row | {"coverage": coverage, "answers": answers, "invalid": invalid}

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """Mean scores, of a law over the clips that are about it."""
        return {
            name: mean([row for row in rows if name in row], name) for name in self._named(rows)
        }

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        """B minus A in mean scores; p is that of flipping the signs of whole captions."""
        both = Pairs.of(rows_a, rows_b)
        result: dict[str, Any] = {"unpaired": both.unpaired}
        for name in self._named(rows_b):
            pairs = [pair for pair in both.pairs if all(row.get(name) is not None for row in pair)]
            if pairs:
                result[name] = Pairs(pairs, 0).tested(name)
        return result

    @cached_property
    def live(self) -> PhyJudgeModel:
        """The judge, loaded on first use."""
        if self.instruction is None:
            console.print(
                "warning: PhyJudge is asked in our own words; scores do not compare with published "
                "ones. Give its instruction: --set instruction=FILE (docs/judging.md).",
                style="yellow",
            )
        # Merged where it is loaded, as the published script does.
        model = PhyJudgeModel.load(
            self._folder, pick_device(), self._dtype, self._video["pictures"]
        )
        if self.adapter:
            model.merge(local_copy(self.adapter))
        return model

    def _rate(
        self, clip: SeenClip, question: str, caption: str, key: str
    ) -> tuple[str, DigitAnswer]:
        """The judge's answer to a question, and the rating in it."""
        inputs = self.live.inputs(clip, self._video["limits"], question.replace(PLACE, caption))
        tokens, logits = self.live.generate(inputs, ANSWER_LENGTH)
        answer = self.live.decode(tokens)
        return answer, self.live.digit(tokens, logits, score_of(answer, key))

    def _named(self, rows: Sequence[Row]) -> list[str]:
        """The scores that rows hold, those of laws last."""
        asked = sorted({law for row in rows for law in row["laws"]})
        return self._scores + [f"{law}_{kind}" for law in asked for kind in self.score_names]

    def _laws(self, prompt: str) -> tuple[str, ...]:
        """The laws to rate in a clip of the prompt.

        Raises:
            UserError: There is no question about one of them.
        """
        laws: Any = self.find(prompt).row.get("physical_laws", self.laws)
        asked = [*self._questions]  # A list may hold what a dict cannot be asked for.
        known = isinstance(laws, list | tuple) and all(law in asked for law in laws)
        if not known or set(laws) & set(GENERAL):
            places = sorted(set(self._questions) - set(GENERAL))
            raise UserError(
                f"The laws of {prompt[:80]!r} are {shown(laws)}; expected some of "
                f"{', '.join(places)}, each with a question in the instruction."
            )
        return tuple(dict.fromkeys(laws))

    @cached_property
    def _questions(self) -> dict[str, str]:
        if self.instruction is None:
            own = GENERAL | LAWS
            return {k: QUESTION.format(caption=PLACE, aspect=own[k], key=k) for k in own}
        try:
            questions = parse_yaml(read_text(self.instruction))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(
                f"The instruction {self.instruction} cannot be read: {error}."
            ) from None
        named = isinstance(questions, dict) and all(isinstance(key, str) for key in questions)
        if not named or not set(GENERAL) <= set(questions):
            raise UserError(
                f"The instruction {self.instruction} is {shown(questions)}; expected a text for "
                f"each of {', '.join(GENERAL)} and the laws (docs/judging.md says how to make it)."
            )
        for key, text in questions.items():
            if not isinstance(text, str) or PLACE not in text:
                raise UserError(
                    f"The instruction {self.instruction} has no place for the caption in {key}; "
                    f"write {PLACE} where the caption belongs."
                )
        return questions

    @cached_property
    def _video(self) -> dict[str, Any]:
        """The fewest and most pixels of a clip, and how its colours are normalised."""
        path = self._folder / VIDEO
        config = json_object(path)
        size = config.get("size")
        limits = [size.get(k) for k in ("shortest_edge", "longest_edge")] if size else ()
        if not limits or not all(isinstance(limit, int) and limit > 0 for limit in limits):
            raise UserError(
                f"{path} has the size {shown(size)}; expected Qwen3.5's, with shortest_edge and "
                "longest_edge in pixels."
            )
        colours = ("image_mean", "image_std")
        return {
            "limits": tuple(limits),
            "pictures": {key: config.get(key) or [0.5] * 3 for key in colours},
        }

    @cached_property
    def _by_text(self) -> dict[str, Prompt]:
        if not self.captions:
            return {}
        path = local_copy(self.captions, "dataset")
        path = path / "prompts" / "phyground.json" if path.is_dir() else path
        expected = "expected PhyGround's phyground.json, a list of id, prompt and physical_laws"
        try:
            entries = parse_json(read_text(path))
            prompts = [
                Prompt(str(e["id"]), e["prompt"], row=e, image=_first_image(path, e))
                for e in entries
            ]
            by_text = {prompt.text.strip(): prompt for prompt in prompts}
            lacking = [prompt.id for prompt in prompts if "physical_laws" not in prompt.row]
            twice = [p.id for p in prompts if by_text[p.text.strip()] is not p]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}: {error}); {expected}."
            ) from None
        if lacking or not by_text:
            where = f"the prompt {lacking[0]} has no laws" if lacking else "it is empty"
            raise UserError(f"{path}: {where}; {expected}.")
        if twice:
            raise UserError(
                f"{path}: the prompt {twice[0]} is also another entry's, so the laws of its clips "
                "cannot be told. Leave one of the two out."
            )
        return by_text

    @cached_property
    def _identity(self) -> dict[str, str]:
        adapter = {"adapter": judge_digest(local_copy(self.adapter))} if self.adapter else {}
        return {
            "model": "Qwen3.5",
            "weights": judge_digest(self._folder),
            **adapter,
            "frames": f"{FPS:g} a second, {FEWEST_FRAMES} to {MOST_FRAMES}",
            "scaling": "to multiples of 32, bicubic, by Pillow",
        }
