"""Makes the lab's text encoder: a tokenizer with its own vocabulary, and a very small T5.

CogVideoX keeps its text encoder frozen, so the micro one is trained first. It learns to classify
the content of a caption: the event, the colours, the side. The transformer needs no more.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from videorepa.settings.bounds import AtOnce, Layers, Number, Seed, Width
from videorepa.settings.section import Section
from videorepa.world.scenarios import SCENARIOS, draw_scene
from videorepa.world.simulator import COLOURS, Box

TEXT_TOKENS = 24

MOST_BODIES = 3

_PRINTABLE = "".join(chr(code) for code in range(33, 127))


class TextEncoderRecipe(Section):
    """The recipe of the text encoder. `out` gets the folders `tokenizer` and `text_encoder`."""

    out: Path
    width: Width = 96
    layers: Layers = 2
    heads: Layers = 4
    steps: Number = 900
    batch: AtOnce = 64
    learning_rate: float = Field(default=2e-3, gt=0)
    seed: Seed = 0


def train_text_encoder(recipe: TextEncoderRecipe) -> dict[str, float]:
    """Train the text encoder and write both folders.

    Returns:
        read_without_fault, the share in [0, 1] of held-out captions of which every class is
        right, and minutes, the time that the training took.
    """
    from transformers import T5Config, T5EncoderModel

    start = time.monotonic()
    torch.manual_seed(recipe.seed)
    tokenizer = _tokenizer(recipe.seed)
    tokenizer.save_pretrained(recipe.out / "tokenizer")
    kind: Any = T5Config
    config = kind(
        vocab_size=len(tokenizer),
        d_model=recipe.width,
        d_kv=recipe.width // recipe.heads,
        d_ff=2 * recipe.width,
        num_layers=recipe.layers,
        num_heads=recipe.heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    model: Any = T5EncoderModel(config)
    heads = nn.ModuleList(nn.Linear(recipe.width, count) for count in _class_counts())
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *heads.parameters()], recipe.learning_rate, weight_decay=0.01
    )

    def read(first: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        scenes = [draw_scene(seed, first + i) for i in range(recipe.batch)]
        tokens = tokenizer(
            [scene.caption for scene in scenes],
            padding="max_length",
            max_length=TEXT_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        # Without an attention mask and with a mean over all places, as the transformer sees it.
        pooled = model(tokens)[0].mean(1)
        return [head(pooled) for head in heads], torch.tensor([_classes(s) for s in scenes])

    for step in range(recipe.steps):
        logits, target = read(step * recipe.batch, recipe.seed)
        losses = [nn.functional.cross_entropy(row, target[:, i]) for i, row in enumerate(logits)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        logits, target = read(0, recipe.seed + 1)
        right = torch.stack([row.argmax(1) for row in logits], 1) == target
    model.to(torch.bfloat16).save_pretrained(recipe.out / "text_encoder")
    return {
        "read_without_fault": right.all(1).float().mean().item(),
        "minutes": (time.monotonic() - start) / 60,
    }


def _classes(scene) -> list[int]:
    """Event; each body's colour (after the last one for none); whether each is a box; side."""
    colours, boxes = [len(COLOURS)] * MOST_BODIES, [0] * MOST_BODIES
    for number, body in enumerate(scene.bodies):
        colours[number] = list(COLOURS).index(body.colour)
        boxes[number] = int(isinstance(body, Box))
    side = ("left" in scene.caption) + 2 * ("right" in scene.caption)
    return [list(SCENARIOS).index(scene.event), *colours, *boxes, side]


def _class_counts() -> list[int]:
    return [len(SCENARIOS), *[len(COLOURS) + 1] * MOST_BODIES, *[2] * MOST_BODIES, 3]


def _tokenizer(seed: int):
    """A T5 tokenizer with pieces for the lab's words and for printable ASCII characters.

    Any other character is <unk>.
    """
    from transformers import T5Tokenizer

    captions = (draw_scene(seed, index).caption for index in range(4000))
    words = sorted({word for caption in captions for word in re.findall(r"\w+", caption)})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in words]
    pieces += [(piece, -10.0) for piece in ("▁", *_PRINTABLE)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)
