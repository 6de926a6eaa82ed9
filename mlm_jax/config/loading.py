"""A recipe file and command-line overrides, read into a checked config."""

import ast
import dataclasses
import importlib.util
import inspect
import pathlib
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from mlm_jax.config.checks import check
from mlm_jax.config.conversion import describe, from_dict, nearest, to_dict
from mlm_jax.config.sections import TASKS, Config
from mlm_jax.errors import UserError


def load_config(path: str, overrides: Iterable[str] = (), *, for_task: bool = False) -> Config:
    """Reads a recipe file, applies `section.field=value` overrides, and checks the whole.

    Args:
        path: a Python file with `get_config() -> ml_collections.ConfigDict`, or `FILE.py:VARIANT`, whose `get_config` is
            given the variant's name.
        overrides: `optimizer.learning_rate=1e-3`, `stages[0].steps=100`, as the command line's `--config.` flags.
        for_task: whether it is to fine-tune a task, not to pre-train.

    Raises:
        UserError: the file cannot be used, or a field is unknown, missing, of a wrong type or inconsistent.
    """
    raw = _run_recipe(path)
    for override in overrides:
        _apply_override(raw, override)
    cfg = from_dict(raw)
    check(cfg)
    if (cfg.objective in TASKS) != for_task:
        use = "pre-trains: mlm-jax train" if for_task else "fine-tunes: mlm-jax finetune"
        raise UserError(f"{path} is a recipe of objective={cfg.objective!r}, which {use}")
    return cfg


def override(cfg: Config, overrides: Iterable[str]) -> Config:
    """A config with `section.field=value` overrides; relations between fields are not checked.

    Raises:
        UserError: a field is unknown or of a wrong type.
    """
    raw = to_dict(cfg)
    for each in overrides:
        _apply_override(raw, each)
    return from_dict(raw)


def _run_recipe(path: str) -> dict[str, Any]:
    name, _, variant = path.partition(".py:")
    file = pathlib.Path(f"{name}.py" if variant else path)
    if file.is_dir():
        raise UserError(f"{path} is a directory: name one of its .py files")
    if not file.is_file():
        siblings = sorted(f.name for f in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise UserError(f"no config file {path}{nearest(file.name, siblings)}")
    spec = importlib.util.spec_from_file_location(f"mlm_jax_recipe_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError("it has no function get_config()")
        takes_variant = bool(inspect.signature(module.get_config).parameters)
        if takes_variant != bool(variant):
            raise ValueError("it needs a variant, as in FILE.py:VARIANT" if takes_variant else "it has no variants")
        made = module.get_config(variant) if variant else module.get_config()
        if not isinstance(made, ml_collections.ConfigDict):
            raise ValueError(f"get_config() returned a {type(made).__name__} and must return an ml_collections.ConfigDict")
        raw = made.to_dict()
    except Exception as error:
        raise UserError(f"{path} could not be read as a config: {type(error).__name__}: {error}") from error
    raw["stages"] = _entries(path, "stages", raw.get("stages", ({},)))
    if isinstance(raw.get("data"), dict) and "sources" in raw["data"]:
        raw["data"]["sources"] = _entries(path, "data.sources", raw["data"]["sources"])
    return raw


def _entries(path: str, field: str, value: Any) -> list[dict[str, Any]]:
    """A list of sections, which an override may change one by one."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in value):
        raise UserError(f"{path}: {field}={value!r} must be a list of sections, as [{{'field': value}}, …]")
    return [dict(entry) for entry in value]


def _lists_sections(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple and dataclasses.is_dataclass(typing.get_args(kind)[0])


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets one field, walking the dataclasses to know its type and to name the nearest field when there is none."""
    path, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"--config.{path} needs a value: --config.{path}=…")
    kind: Any = Config
    node: Any = raw
    walked: list[str] = []
    *sections, last = path.split(".")
    for part in sections:
        name, bracket, index = part.partition("[")
        kind = _field_type(kind, name, [*walked, name])
        walked.append(part)
        if bracket:
            if not _lists_sections(kind):
                raise UserError(f"{name} is no list of sections, so there is no {part!r}")
            kind, entries = typing.get_args(kind)[0], node.get(name, ())
            position = index.rstrip("]")
            if not position.isdigit() or int(position) >= len(entries):
                there = f"the last one is {name}[{len(entries) - 1}]" if entries else f"{name} is empty"
                raise UserError(f"{part}: {there}")
            node = entries[int(position)]
        elif dataclasses.is_dataclass(kind):
            node = node.setdefault(name, {})
        else:
            shape = "is a list; name an entry, as in stages[0]," if typing.get_origin(kind) is tuple else "is a single value"
            raise UserError(f"{'.'.join(walked)} {shape} and has no field {path.split('.')[len(walked)]!r}")
    name = last.partition("[")[0]
    kind = _field_type(kind, name, [*walked, last])
    if name != last and typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    if dataclasses.is_dataclass(kind):
        raise UserError(f"{path} is a section; set one of its fields: {', '.join(typing.get_type_hints(kind))}")
    if name != last:
        raise UserError(f"{name} is set as a whole, so there is no {last!r}")
    value = _parse(text, kind, path)
    node[last] = _entries("the command line", path, value) if _lists_sections(kind) else value


def _field_type(section: Any, name: str, path: list[str]) -> Any:
    kinds = typing.get_type_hints(section)
    if name not in kinds:
        raise UserError(f"no config field {'.'.join(path)!r}{nearest(name, kinds)}")
    return kinds[name]


def _parse(text: str, kind: Any, path: str) -> Any:
    """A flag's text as a value of the field's type."""
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise UserError(f"{path}={text!r} is not {describe(kind)}") from None
