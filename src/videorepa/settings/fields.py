"""Fields of a recipe that hold the description of a plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, PlainValidator, SerializeAsAny, ValidationError
from pydantic_core import PydanticCustomError

from videorepa.settings import plugins
from videorepa.settings.section import EXPLAINED, Section, explain


def _described_by(kind: str) -> BeforeValidator:
    """Turn `{name: ..., ...}` into the description that the plugin of that name defines."""

    def build(value: Any) -> Any:
        if not isinstance(value, dict):
            is_named = "name" in getattr(type(value), "model_fields", ())
            # The name counts as set, also that of `Relation()`: nothing is read back without it.
            return value.model_copy(update={"name": value.name}) if is_named else value
        if not isinstance(value.get("name"), str):
            raise ValueError(f"set `name:` to one of {', '.join(plugins.names(kind))}")
        described = plugins.description(kind, value["name"])
        try:
            return described.model_validate(value)
        except ValidationError as error:
            faults = "; ".join(line.strip() for line in explain(error, described))
            raise PydanticCustomError(EXPLAINED, "{faults}", {"faults": faults}) from None

    return BeforeValidator(build)


if TYPE_CHECKING:
    from videorepa.backbones import BackboneSpec as BackboneField
    from videorepa.encoders import EncoderSpec as EncoderField
    from videorepa.losses import Loss as LossField
else:
    BackboneField = Annotated[SerializeAsAny[Section], _described_by("backbones")]
    EncoderField = Annotated[SerializeAsAny[Section], _described_by("encoders")]
    LossField = Annotated[SerializeAsAny[Section], _described_by("losses")]


def block_or(*words: str) -> PlainValidator:
    """Accept a block's number, or one of the words."""

    def check(value: Any) -> int | str:
        is_block = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if is_block or value in words:
            return value
        raise ValueError(f"expected a block's number, an integer from 1, or {' or '.join(words)}")

    return PlainValidator(check)
