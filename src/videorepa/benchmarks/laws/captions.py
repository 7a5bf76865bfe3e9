"""Reads one of the lab's captions back into what it asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from videorepa.errors import UserError
from videorepa.world.scenarios import BYSTANDERS, CAPTIONS
from videorepa.world.simulator import COLOURS


@dataclass(frozen=True)
class Request:
    """What a caption asks for.

    Attributes:
        event: The scenario's name.
        colours: Colours of the named bodies. Those that the event is about come first.
        shapes: "ball" or "box" for each of them.
        sign: +1 for the right, -1 for the left, 0 if no side is named.
    """

    event: str
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    sign: int


_NAMED = re.compile(f"({'|'.join(COLOURS)}) (ball|box)")


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    """For each event, a pattern of its captions with any colours and side."""
    colour, patterns = f"(?:{'|'.join(COLOURS)})", {}
    blanks = dict.fromkeys("abc", colour)
    also = "|".join(text.format(**blanks) for text in BYSTANDERS)
    for event, templates in CAPTIONS.items():
        # Each template needs a group with a name of its own.
        ways = [
            text.format(**blanks, s=f"(?P<s{number}>left|right)")
            for number, text in enumerate(templates)
        ]
        patterns[event] = re.compile(f"(?:{'|'.join(ways)})(?:{also})?".replace(".", r"\."))
    return patterns


def parse_caption(caption: str) -> Request:
    """Read one of the lab's captions.

    Raises:
        UserError: The caption is not one of the lab's.
    """
    for event, pattern in _patterns().items():
        match = pattern.fullmatch(caption.strip())
        if match:
            colours, shapes = zip(*_NAMED.findall(caption), strict=True)
            side = next((side for side in match.groupdict().values() if side), None)
            return Request(event, colours, shapes, {"right": 1, "left": -1, None: 0}[side])
    raise UserError(
        f"{caption!r} is not one of the lab's captions, the only ones that it can judge, such as "
        "'A red ball rolls to the left.' `videorepa generate MODEL --prompts lab` takes them."
    )
