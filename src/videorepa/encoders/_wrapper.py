"""What encoders share that have another one within."""

from __future__ import annotations

from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from videorepa.encoders import EncoderSpec
from videorepa.settings.fields import EncoderField

_FED = ("frames", "height", "width", "normalized", "group", "crop")


class WrapperSpec(EncoderSpec):
    """An encoder around another. of: that one; how it is fed is said there alone, and followed."""

    of: EncoderField

    @model_validator(mode="after")
    def _follows(self) -> WrapperSpec:
        for key in _FED:
            theirs = getattr(self.of, key)
            if key in self.model_fields_set and getattr(self, key) != theirs:
                raise ValueError(f"`{key}` is what `of.{key}` says, {theirs}: set it there")
            object.__setattr__(self, key, theirs)
        return self

    @model_serializer(mode="wrap")
    def _own_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What follows `of` is not written, so that a copy can change it there.
        return {key: value for key, value in handler(self).items() if key not in _FED}

    @property
    def relation_margin(self) -> float:
        return self.of.relation_margin

    @property
    def piece(self) -> tuple[int, int, int]:
        return self.of.piece
