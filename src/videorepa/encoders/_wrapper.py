"""Encoders that wrap another one."""

from __future__ import annotations

from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from videorepa.encoders import EncoderSpec
from videorepa.settings.fields import EncoderField

_FED = ("frames", "height", "width", "normalized", "group", "crop")


class WrapperSpec(EncoderSpec):
    """An encoder around another, with its frames, sizes and pieces.

    Args:
      of: The wrapped encoder. How it is fed is set there alone.
    """

    of: EncoderField

    @model_validator(mode="after")
    def _follows(self) -> WrapperSpec:
        for key in _FED:
            value = getattr(self.of, key)
            if key in self.model_fields_set and getattr(self, key) != value:
                raise ValueError(f"`{key}` is what `of.{key}` says, {value}: set it there")
            object.__setattr__(self, key, value)
        return self

    @model_serializer(mode="wrap")
    def _own_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The keys that follow `of` are left out, so that a changed `of` is followed again.
        return {key: value for key, value in handler(self).items() if key not in _FED}

    @property
    def relation_margin(self) -> float:
        return self.of.relation_margin

    @property
    def piece(self) -> tuple[int, int, int]:
        return self.of.piece
