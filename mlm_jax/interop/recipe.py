"""A recipe beside a model, with which `mlm-jax train` goes on with its pre-training in another workdir."""

import dataclasses
import pathlib
import pprint
from typing import Any

from mlm_jax.config import Config

RECIPE = "recipe.py"
_TEXT = '''"""{name}, {origin}: continued pre-training.

Command:
    mlm-jax train --config {recipe} --workdir runs/{name} \\
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
The run begins with its parameters and trains with what is written or overridden here; what is left out has its
default in `mlm_jax/config/sections.py`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe."""
    return ml_collections.ConfigDict(
{literal}
    ).lock()
'''


def write_recipe(file: pathlib.Path, cfg: Config, workdir: pathlib.Path, origin: str) -> None:
    """Writes the recipe of a model whose workdir will be at `workdir`, and which is what `origin` says."""
    sections: dict[str, Any] = {
        "name": cfg.name,
        "objective": cfg.objective,
        "init_from": str(workdir.absolute()),
        "tokenizer": {"algorithm": cfg.tokenizer.algorithm, "path": cfg.tokenizer.path},
        "model": dataclasses.asdict(cfg.model),
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 100},
        "stages": [{"steps": 1000, "seq_len": cfg.stages[0].seq_len, "batch_size": 256}],
    }
    for name in ("masking", "span_boundary", "rtd", "diffusion", "hybrid"):
        section = getattr(cfg, name)
        if section != type(section)() or name == cfg.objective:
            sections[name] = dataclasses.asdict(section)
    literal = pprint.pformat(sections, indent=1, width=100, sort_dicts=False)
    indented = "\n".join(f"        {line}" for line in literal.splitlines())
    text = _TEXT.format(name=cfg.name, origin=origin, recipe=workdir / file.name, literal=indented)
    file.write_text(text, encoding="utf-8")
