"""`mlm-jax export`: the network of a workdir becomes a folder that `transformers` loads."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from mlm_jax.config import TASKS, ModelConfig, ShardingConfig
from mlm_jax.data.atomic import new_folder
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import UserError
from mlm_jax.inference import TrainedRun, open_run, read_params
from mlm_jax.interop.families import FAMILIES
from mlm_jax.interop.fields import choose_family, write_model
from mlm_jax.interop.onnx_file import require_onnx, write_onnx
from mlm_jax.interop.task_heads import task_fields, task_layout
from mlm_jax.interop.tensors import layout, to_tensors
from mlm_jax.interop.tokenizer_files import write_tokenizer
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import make_task
from mlm_jax.objectives.rtd import ReplacedTokenDetection
from mlm_jax.sharding import make_mesh
from mlm_jax.workdir import Workdir

# What stays behind of an objective that trains more than is written.
_LEFT_BEHIND = {"span": "the head between a span's ends is left out: no class of transformers has it"}


def export_run(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    network: str | None = None,
    model_type: str | None = None,
    onnx: bool = False,
) -> dict[str, Any]:
    """Writes a folder, whole or not at all.

    Args:
        workdir: a trained or an imported run.
        out: a new or empty folder.
        network: of replaced-token detection: "discriminator" (default) or "generator".
        model_type: which of `FAMILIES`; by default the one that fits.
        onnx: whether the folder gets a model.onnx too.

    Raises:
        UserError: the run, or its tokenizer, has no counterpart in `transformers`; `out` is not empty.
        MachineError: the folder cannot be written.
    """
    if "://" in os.fspath(out):
        raise UserError(f"{out}: export writes a local folder; copy it to its bucket afterwards")
    cfg = Workdir(workdir).read_config()
    if cfg.model.image_size:
        raise UserError(
            f"{workdir} reads images and cannot be exported: no class of transformers computes what its model does (ViLT's "
            "has a class token of the image and no norm of patches)"
        )
    if cfg.objective in TASKS:
        return export_task(workdir, out, network=network, model_type=model_type, onnx=onnx)
    with open_run(workdir) as run:
        head, model, params = _network(run, network)
        params = jax.device_get(params)
    chosen = choose_family(model, head, model_type)
    tokenizer = run.tokenizer
    model, params = _as_theirs(model, params, chosen, tokenizer.pad_id)
    names = layout(chosen, head, tied=model.tie_embeddings)
    tensors = to_tensors(params, names.tensors)
    if not model.tie_embeddings:
        tensors |= {copy: tensors[original] for copy, original in names.copies.items()}
    config = write_model(model, chosen, head, tokenizer.model.special)
    result = _write(out, config, tensors, tokenizer, model, onnx=onnx)
    return result | {"model_type": chosen, "step": run.step, "note": _LEFT_BEHIND.get(run.cfg.objective, "")}


def export_task(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    network: str | None = None,
    model_type: str | None = None,
    onnx: bool = False,
) -> dict[str, Any]:
    """`export_run` of a fine-tuned run: its best checkpoint, with the task's head and its labels.

    Raises:
        UserError: no class of `transformers` has such a head; or as `export_run`.
    """
    if network:
        raise UserError(f"--network={network} is for objective='rtd', and this run is fine-tuned: leave it out")
    source = Workdir(workdir)
    cfg, tokenizer = source.read_config(), source.read_tokenizer()
    chosen = choose_family(cfg.model, "task", model_type)
    names = task_layout(cfg, chosen)
    with jax.set_mesh(make_mesh(ShardingConfig())):
        params, step = read_params(source, make_task(cfg, Compute.resolve(cfg.compute)))
        params = jax.device_get(params)
    model, params = _as_theirs(cfg.model, params, chosen, tokenizer.pad_id)
    config = write_model(model, chosen, "masked", tokenizer.model.special) | task_fields(cfg, chosen)
    result = _write(out, config, to_tensors(params, names), tokenizer, model, onnx=onnx)
    return result | {"model_type": chosen, "step": step, "note": ""}


def _write(
    out: str | os.PathLike[str],
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    model: ModelConfig,
    *,
    onnx: bool,
) -> dict[str, Any]:
    if onnx:
        require_onnx(config["model_type"])
    difference = None
    with new_folder(pathlib.Path(out)) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = folder / "model.safetensors"
        save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod((folder / "config.json").stat().st_mode & 0o777)  # the package lets nobody else read it
        write_tokenizer(tokenizer, folder, max_length=model.max_positions, num_token_types=model.num_token_types)
        if onnx:
            difference = write_onnx(folder, config["architectures"][0], token_types=model.num_token_types > 1)
    parameters = sum(array.size for array in tensors.values())
    result = {"out": str(out), "class": config["architectures"][0], "parameters": parameters}
    return result | ({} if difference is None else {"onnx_difference": difference})


def _network(run: TrainedRun, wanted: str | None) -> tuple[str, ModelConfig, Any]:
    """Which head it has, its architecture and parameters."""
    cfg, objective = run.cfg, run.objective
    if wanted not in (None, "discriminator", "generator"):
        raise UserError(f"--network={wanted} is none of discriminator, generator")
    if isinstance(objective, ReplacedTokenDetection):
        if wanted == "generator":
            return "masked", cfg.rtd.generator(cfg.model), run.params["generator"]
        return "detection", cfg.model, objective.discriminator_params(run.params)
    if wanted:
        raise UserError(f"--network={wanted} is for objective='rtd', and this run's is {cfg.objective!r}: leave it out")
    if cfg.objective not in ("mlm", "span"):
        raise UserError(
            f"objective={cfg.objective!r} cannot be exported: no class of transformers computes what it was trained for; "
            "mlm, span and rtd can"
        )
    return "masked", cfg.model, {name: run.params[name] for name in ("encoder", "head")}


def _as_theirs(model: ModelConfig, params: Any, model_type: str, pad_id: int) -> tuple[ModelConfig, Any]:
    """The same function with the tables that a family has: of token types, and of positions with its rows of no use."""
    if model.positions != "learned":
        return model, params
    embeddings = dict(params["encoder"]["embeddings"])
    table = embeddings["positions_LD"]
    offset = pad_id + 1 if FAMILIES[model_type].positions_follow_padding else 0
    unused = np.zeros((max(0, offset - model.position_offset), table.shape[1]), np.float32)
    embeddings["positions_LD"] = np.concatenate([unused, table[max(0, model.position_offset - offset) :]])
    types = model.num_token_types
    if not types and "type_vocab_size" in FAMILIES[model_type].fields:
        embeddings["token_types_TD"], types = np.zeros((1, table.shape[1]), np.float32), 1
    changed = dataclasses.replace(model, position_offset=offset, num_token_types=types)
    return changed, params | {"encoder": params["encoder"] | {"embeddings": embeddings}}
