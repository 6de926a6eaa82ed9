"""Between plain dictionaries and the sections, every field checked by type; and what differs between two configs."""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from mlm_jax.config.sections import Config
from mlm_jax.errors import UserError

# What may differ when a workdir is continued: it changes how a run is executed and watched, not what it computes.
FREE_ON_RESUME = ("compute", "sharding", "train", "evaluation", "reference_topology")


def from_dict(raw: Mapping[str, Any]) -> Config:
    """Builds the dataclasses from plain dictionaries, as read from a recipe or from a workdir's config.json."""
    return typing.cast(Config, build(Config, raw, ""))


def to_dict(cfg: Config) -> dict[str, Any]:
    """The inverse of `from_dict`, in JSON's types (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def differences(old: Config, new: Config) -> list[str]:
    """The fields, as `section.field: old -> new`, that differ and must not when a run is continued."""
    found: list[str] = []

    def walk(a: Any, b: Any, path: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(a.keys() | b.keys()):
                if path or key not in FREE_ON_RESUME:
                    walk(a.get(key), b.get(key), f"{path}.{key}".lstrip("."))
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for index, (x, y) in enumerate(zip(a, b, strict=True)):
                walk(x, y, f"{path}[{index}]")
        elif a != b:
            found.append(f"{path}: {a} -> {b}")

    walk(to_dict(old), to_dict(new), "")
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is most like this one, or nothing."""
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def build(cls: Any, raw: Any, path: str) -> Any:
    """A dataclass from a dictionary, every field checked by type."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{path or 'config'} must be a section of fields, not {raw!r}")
    kinds = typing.get_type_hints(cls)
    unknown = [name for name in raw if name not in kinds]
    if unknown:
        where = f"{path}.{unknown[0]}".lstrip(".")
        raise UserError(f"no config field {where!r}{nearest(unknown[0], kinds)}")
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in raw]
    if required:
        raise UserError(f"config field {f'{path}.{required[0]}'.lstrip('.')!r} is missing")
    return cls(**{name: _convert(value, kinds[name], f"{path}.{name}".lstrip(".")) for name, value in raw.items()})


def _convert(value: Any, kind: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path)
    if isinstance(kind, types.GenericAlias):  # tuple[X, ...]
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{path}={value!r} is not {describe(kind)}")
        inner = typing.get_args(kind)[0]
        return tuple(_convert(item, inner, f"{path}[{index}]") for index, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{path}={value!r} is not {describe(kind)}")
    return value


def describe(kind: Any) -> str:
    """A field's type in words, for messages."""
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
    return names.get(kind, "a list like ('a', 'b')")
