"""Encoders that wrap another one."""

from __future__ import annotations

from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from videorepa.encoders import EncoderSpec
from videorepa.settings.fields import EncoderField

_SET_BY_OF = ("frames", "height", "width", "normalized", "group", "crop")


class WrapperSpec(EncoderSpec):
    """An encoder around another one, with the other's frames, sizes and pieces.

    Args:
      of: The wrapped encoder. Frames, sizes and pieces are set there alone.
    """

    of: EncoderField

    @model_validator(mode="after")
    def _wraps_a_network(self) -> WrapperSpec:
        if self.of.reads_scenes:
            raise ValueError(f"{self.of.name} is no network, so `of` cannot be {self.of.name}")
        return self

    @model_validator(mode="after")
    def _copy_from_of(self) -> WrapperSpec:
        for key in _SET_BY_OF:
            value = getattr(self.of, key)
            if key in self.model_fields_set and getattr(self, key) != value:
                raise ValueError(f"`{key}` is what `of.{key}` says, {value}: set it there")
            object.__setattr__(self, key, value)
        return self

    @model_serializer(mode="wrap")
    def _own_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Without the copied keys, a later change of `of` is copied again.
        return {key: value for key, value in handler(self).items() if key not in _SET_BY_OF}

    @property
    def relation_margin(self) -> float:
        return self.of.relation_margin

    @property
    def piece(self) -> tuple[int, int, int]:
        return self.of.piece
