"""What recipes are made of: typed, frozen sections, and messages for values that do not fit."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, field_validator

from videorepa.errors import UserError
from videorepa.settings.reading import MOST_CHARACTERS, parse_yaml
from videorepa.system.files import check_is_file, from_home
from videorepa.system.wording import SHOWN, count, shown

EXPLAINED = "explained"
"""Type of a fault whose message says already what was found."""

_KEYS, _LIST = "Input should be keys and values", "Input should be a list"
IN_YAML = {"dict_type": _KEYS, "model_type": _KEYS, "tuple_type": _LIST, "list_type": _LIST}
"""How faults of a type are put into words where pydantic names Python's own types."""

MOST_FAULTS = 20
"""Most faults that a message lists."""

SPELLINGS = ("one", "many")
"""Tags of values that are one thing or a list of them. They are no keys, so no message names
them."""


def spelling(value: Any) -> str:
    """Tell which of SPELLINGS a value has."""
    return SPELLINGS[isinstance(value, (list, tuple))]


Weights = Annotated[str, AfterValidator(from_home)]
"""A path of weights, or a Hub id."""


class Section(BaseModel):
    """A part of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _from_home(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(from_home(of) if isinstance(of, Path) else of for of in value)
        return from_home(value) if isinstance(value, Path) else value

    def derived(self, **values: Any) -> Self:
        """Make a copy with values that follow from others.

        They count as left open, so that another one of those others gives other values.
        """
        copy = self.model_copy(update=values)
        copy.model_fields_set.difference_update(values)
        return copy

    @classmethod
    def from_settings(cls, settings: Sequence[str], what: str) -> Self:
        """Make the section with these keys.

        Args:
          settings: The keys to set, each `dotted.key=value` with the value in YAML.
          what: The section's name in messages.

        Raises:
          UserError: A key or value does not fit; each fault has a line of its own.
        """
        values: dict[str, Any] = {}
        for setting in settings:
            change(values, setting)
        return cls.checked(values, f"These settings do not make {what}")

    @classmethod
    def checked(cls, values: Any, complaint: str) -> Self:
        """Make the section from plain values.

        Raises:
          UserError: A key or value does not fit. Below the complaint, each fault has a line of its
            own.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            faults = "\n".join(explain(error, cls))
            raise UserError(f"{complaint}:\n{faults}") from None


def read_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read the keys and values of a recipe's file and change some of them, without checking them.

    Args:
      path: The YAML file.
      overrides: The changes, each `dotted.key=value`.

    Raises:
      UserError: The file or an override cannot be read.
    """
    try:
        check_is_file(path)
        with path.open(encoding="utf-8") as file:
            values = parse_yaml(file.read(MOST_CHARACTERS + 1))
    except FileNotFoundError:
        raise UserError(f"There is no recipe {path}. The shipped ones are in recipes/.") from None
    except OSError as error:
        raise UserError(f"The recipe {path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"The recipe {path} cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"The recipe {path} holds {type(values).__name__}; expected keys and values."
        )
    for override in overrides:
        change(values, override)
    return values


def change(values: dict[str, Any], override: str) -> None:
    """Set one key of plain values, written `dotted.key=value`. Raises UserError."""
    key, separator, text = override.partition("=")
    if not (separator and all(key.split("."))):
        raise UserError(f"An override is written key=value or --key value; got {shown(override)}.")
    *parents, last = key.split(".")
    within: Any = values
    for parent in parents:
        within = _part(within, parent, key)
    _part(within, last, key)
    try:
        within[int(last) if isinstance(within, list) else last] = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"The override {shown(override)} has a value that is not YAML ({error}). Put the "
            "whole in quotes if the shell splits it."
        ) from None


def _part(values: Any, name: str, key: str) -> Any:
    """Give a section's value by its name, or a list's by its number. Makes missing sections."""
    if isinstance(values, list):
        if name not in map(str, range(len(values))):
            raise UserError(
                f"The override {shown(key)} goes through a list of {len(values)}: name one by its "
                f"number, counted from 0, such as 0 in align.0.weight; got {shown(name)}."
            )
        return values[int(name)]
    if not isinstance(values, dict):
        raise UserError(f"The override {shown(key)} goes through a single value, at {shown(name)}.")
    if values.get(name) is None:
        values[name] = {}
    return values[name]


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Describe each fault in a line: its place, the value there, and the key that may be meant."""
    lines = []
    faults = error.errors()
    for fault in faults[:MOST_FAULTS]:
        loc = [part for part in fault["loc"] if part not in SPELLINGS]
        where = ".".join(str(part)[:SHOWN] for part in loc) or "recipe"
        if fault["type"] == "extra_forbidden":
            keys = _keys(model, loc[:-1])
            close = difflib.get_close_matches(str(loc[-1])[:SHOWN], keys, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(keys)}"
            lines.append(f"  {where}: unknown key{hint}")
        elif fault["type"] == "missing":
            lines.append(f"  {where}: missing")
        elif fault["type"] == EXPLAINED:
            lines.append(f"  {where}: {fault['msg']}")
        else:
            message = IN_YAML.get(fault["type"], fault["msg"]).removeprefix("Value error, ").strip()
            lines.append(f"  {where}: {message} (found {shown(fault['input'])})")
    if len(faults) > MOST_FAULTS:
        lines.append(f"  and {count(len(faults) - MOST_FAULTS, 'more fault')}")
    return lines


def _keys(model: type[BaseModel], path: list[Any]) -> list[str]:
    """List the keys at a place in the recipe, or none inside a plugin's own description."""
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part))
        inner = _types(field.annotation) if field else []
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _types(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _types(inner)]
