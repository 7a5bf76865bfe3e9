"""Reads YAML that anybody may have written: plain values, of bounded size, and no key twice."""

from __future__ import annotations

from typing import Any, NamedTuple

import yaml
from yaml.events import AliasEvent, Event
from yaml.nodes import MappingNode, Node, ScalarNode

from videorepa.system.wording import shown

MOST_CHARACTERS = 1 << 17
"""The longest recipe, with each alias counted as what it stands for. The longest shipped one has a
fiftieth of this."""

DEEPEST = 32
"""Most lists and sections inside each other."""

MOST_DIGITS = 40
"""Length of the longest number, in characters."""


def parse_yaml(text: str) -> Any:
    """Parse YAML into plain values, none of which is in two places.

    Raises:
      yaml.YAMLError: The text is no YAML, names Python objects, sets a key twice, or is too deep or
        too long. The message says where.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"it is longer than {MOST_CHARACTERS:,} characters")
    return _apart(yaml.load(text, _BoundedLoader))


def _apart(value: Any) -> Any:
    """Copy what aliases share, so that an override of one place leaves the others."""
    if isinstance(value, dict):
        return {key: _apart(inner) for key, inner in value.items()}
    return [_apart(inner) for inner in value] if isinstance(value, list) else value


class _Extent(NamedTuple):
    """How much a node stands for, with aliases written out: characters, and levels of nesting."""

    characters: int
    levels: int


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses what would be ambiguous or endless too.

    Ten lines of aliases to lists of aliases stand for billions of values. They are one object in
    memory, but whoever copies, checks or prints the values meets each of them.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.level = 0
        self.extents: dict[Node, _Extent] = {}

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        self._check(event, _Extent(0, 1))
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        assert node is not None
        if not isinstance(event, AliasEvent):
            self.extents[node] = self._extent(node)
        elif node not in self.extents:
            raise _refusal(event, f"*{event.anchor} is inside the value that it stands for")
        self._check(event, self.extents[node])
        return node

    def _extent(self, node: Node) -> _Extent:
        if isinstance(node, ScalarNode):
            return _Extent(1 + len(node.value), 1)
        pairs = node.value if isinstance(node, MappingNode) else zip(node.value)
        extents = [self.extents[inner] for pair in pairs for inner in pair]
        return _Extent(
            1 + sum(extent.characters for extent in extents),
            1 + max((extent.levels for extent in extents), default=0),
        )

    def _check(self, event: Event, extent: _Extent) -> None:
        if self.level + extent.levels > DEEPEST:
            raise _refusal(event, f"lists and sections are nested more than {DEEPEST} deep")
        if extent.characters > MOST_CHARACTERS:
            raise _refusal(
                event, f"with aliases written out it is longer than {MOST_CHARACTERS:,} characters"
            )

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                continue
            line = key.start_mark.line + 1
            # A merge key has no value. Others are compared by theirs: 1 and 0x1 are one key.
            name = key.value if key.tag == "tag:yaml.org,2002:merge" else self.construct_object(key)
            if name in lines:
                raise yaml.YAMLError(
                    f"the key {shown(name)} is in line {lines[name]} and in line {line}; delete "
                    "one of the two"
                )
            lines[name] = line
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        kind = node.tag.rpartition(":")[2]
        if kind in ("int", "float") and len(node.value) > MOST_DIGITS:
            raise _refusal(node, f"a number has {len(node.value):,} characters")
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError):
            raise _refusal(node, f"{shown(node.value)} is no {kind}") from None


def _refusal(at: Any, what: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"in line {at.start_mark.line + 1}, {what}")
