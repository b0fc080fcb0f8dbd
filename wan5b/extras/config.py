"""Options in a dataclass: what a field may be stands at the field; values come from TOML and
key=value.

    @dataclass(frozen=True)
    class Config(Options):
        stage: str = one_of(("teacher", "ar"), "ar")
        batch: int = at_least(1, 64)

    read(Config, ["run.toml", "batch=8"])
"""

import json
import math
import os
import tomllib
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path


def one_of(known, default):
    """A field that takes one of the known values."""
    return field(default=default, metadata={"known": tuple(known)})


def within(low: float, high: float, default):
    """A field with low <= value < high: a number, not a list of them."""
    return field(default=default, metadata={"range": (low, high)})


def at_least(low: float, default):
    return within(low, math.inf, default)


def path():
    """A field that names a file or folder; ~ is the home folder. None, if empty."""
    return field(default="", metadata={"path": True})


@dataclass(frozen=True)
class Options:
    """Checks every field against what it may be. ValueError with the name and the value.

    What is in a tuple has its type checked by `made`, nothing else: its range, or whether it is
    finite, is for the owner to see to.
    """

    def __post_init__(self):
        for option in fields(self):
            value = getattr(self, option.name)
            known = option.metadata.get("known")
            if known and value not in known:
                choices = " ".join(map(str, known))
                raise ValueError(f"{option.name} must be one of {choices}, got {value!r}")
            if option.metadata.get("path"):
                object.__setattr__(self, option.name, os.path.expanduser(value))
            if "range" in option.metadata:
                low, high = option.metadata["range"]
                if not low <= value < high:  # NaN is not, either
                    raise ValueError(
                        f"{option.name} must be at least {low} and below {high}, got {value}"
                    )
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{option.name} must be finite, got {value}")


def read(kind: type, arguments: list[str]):
    """A TOML file and key=value overrides -> an instance of kind, a dataclass.

    A string is given as it is, other values in TOML. ValueError for unknown keys and wrong types.
    """
    if not arguments:
        raise ValueError("usage: train.py CONFIG.toml [key=value ...]")
    kinds = types(kind)
    try:
        values = tomllib.loads(Path(arguments[0]).read_text(encoding="utf-8-sig"))
        for override in arguments[1:]:
            key, given, value = override.partition("=")
            if not given:
                raise ValueError(f"overrides are key=value, got {override!r}")
            if kinds.get(key, str) is str:
                values[key] = value
            else:
                values |= override_of(key, value)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {' '.join(arguments)}: {error}") from error

    return made(kind, values)


def described(kind: type) -> str:
    """The keys of a dataclass, and what they are where nothing else is said."""
    lines = ["Keys, with what they are unless the file or the command line says it:"]
    for option in fields(kind):
        default = list(option.default) if isinstance(option.default, tuple) else option.default
        line = f"    {option.name} = {json.dumps(default, ensure_ascii=False)}"
        if "known" in option.metadata:
            line += f"  # {' '.join(map(str, option.metadata['known']))}"
        lines.append(line)
    return "\n".join(lines)


def override_of(key: str, value: str) -> dict:
    """key=value of a command line, whose value is TOML. ValueError, naming it, if it is not."""
    try:
        return tomllib.loads(f"{key} = {value}")
    except ValueError as error:
        wrong = f"{key}={value} is no TOML ({error}); write true, 3, 1e-3 or [1, 2], say"
        raise ValueError(wrong) from error


def made(kind: type, values: dict):
    """An instance of kind, a dataclass. ValueError for unknown keys and wrong types."""
    kinds = types(kind)
    unknown = values.keys() - kinds.keys()
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)}; known: {list(kinds)}")
    return kind(**{key: _typed(key, value, kinds[key]) for key, value in values.items()})


def types(kind: type) -> dict[str, type]:
    """Of the fields of a dataclass."""
    return {option.name: option.type for option in fields(kind)}


def _typed(key: str, value, kind):
    """A TOML value as a field of this type; an integer will do for a float."""
    many = typing.get_origin(kind) is tuple
    if many:
        kind = typing.get_args(kind)[0]
    items = value if many and isinstance(value, list) else [value]
    if kind is float:
        items = [float(item) if type(item) is int else item for item in items]
    if many != isinstance(value, list) or any(type(item) is not kind for item in items):
        wanted = f"a list of {kind.__name__}" if many else kind.__name__
        raise ValueError(f"{key} must be {wanted}, got {value!r}")
    return tuple(items) if many else items[0]
