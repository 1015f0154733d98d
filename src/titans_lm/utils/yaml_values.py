"""Safe YAML, and conversion of its values to the types of settings."""

import contextlib
import math
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 does; PyYAML follows 1.1, where it is a string."""


class Dumper(yaml.SafeDumper):
    """Quotes a string such as "1e-3", so that `Loader` reads a string."""


for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z"), list("-+.0123456789")
    )


def parse_yaml(text: str) -> Any:
    """Parse YAML. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # a date that does not exist
        raise yaml.YAMLError(str(error)) from None


def read_yaml(path: Path, example: str) -> Any:
    """Parse a YAML file. Raises ValueError with its path, and with an `example` if it does not exist."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is not a file; give a YAML file such as {example}")
    try:
        return parse_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


def typed(value: Any, hint: Any, name: str) -> Any:
    """Convert `value` to the type `hint`; a float may be an int or a string such as 1e-3. Raises ValueError with
    `name`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(o for o in options if o is not type(None))
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            if not math.isnan(number := float(value)):
                return number
    elif typing.get_origin(kind) is dict:
        if isinstance(value, dict) and all(isinstance(v, str) for v in value):
            return value
    elif typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        values = value if isinstance(value, list) else [value]
        if all(type(v) is (typing.get_origin(item) or item) for v in values):
            return values
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{name} must be {_NAMES.get(kind) or _NAMES[typing.get_origin(kind)]}, got {value!r}")


_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list[str]: "a list of texts",
    list[int]: "a whole number, or a list of them",
    list[dict[str, Any]]: "a list of keys and values, such as [{until: 1.0, sequence_length: 512}]",
    dict: "keys and values, such as {name: mqar}",
}


def at_least(name: str, value: int | float, least: int) -> None:
    """Raises ValueError with `name` for a value below `least`."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
