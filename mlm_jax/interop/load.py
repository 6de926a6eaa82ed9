"""`mlm-jax import`: a Hugging Face folder becomes a workdir that every later verb reads."""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mlm_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RtdConfig,
    ShardingConfig,
    StageConfig,
    TokenizerConfig,
    check,
)
from mlm_jax.data.atomic import new_folder
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import UserError
from mlm_jax.interop.folder import Folder, check_tensors, check_tokenizer, open_folder
from mlm_jax.interop.load_task import read_task, task_config
from mlm_jax.interop.recipe import RECIPE, write_recipe
from mlm_jax.interop.tensors import NAMES, Layout, layout, their_tensors, to_params
from mlm_jax.interop.tokenizer_files import read_tokenizer
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import Objective, Trainable, make_objective, make_task
from mlm_jax.sharding import make_mesh, place
from mlm_jax.train.checkpoint import Checkpoints
from mlm_jax.train.optimizer import make_optimizer
from mlm_jax.train.state import init_state
from mlm_jax.workdir import Workdir

logger = logging.getLogger(__name__)


def import_folder(
    source: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    generator: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Reads a folder and writes a workdir, whole or not at all.

    Args:
        source: the folder, with config.json, weights and a tokenizer.
        workdir: a new or empty folder.
        generator: for a detector of replaced tokens: the folder of the masked language model that it was trained with.
        fresh: draws at random what the folder lacks: the head of a bare encoder, the generator of a detector.
        overrides: of a fine-tuned network, `task.field=value`: what config.json does not say of the files to predict.

    Raises:
        UserError: a folder that cannot be used; the message names the file, field or tensor.
        MachineError: the workdir cannot be written.
    """
    for path in (source, workdir):
        if "://" in os.fspath(path):
            raise UserError(f"{path}: import works on local folders; copy it from or to its bucket")
    folder = open_folder(pathlib.Path(source))
    second = open_folder(pathlib.Path(generator)) if generator else None
    if second and (folder.network, second.network) != ("detection", "masked"):
        raise UserError("--generator is for a detector of replaced tokens, and is a masked language model itself")
    tokenizer = read_tokenizer(folder.path)
    for each in (folder, *([second] if second else [])):
        check_tokenizer(tokenizer, each)
    final = pathlib.Path(workdir)
    path = final.absolute() / "tokenizer" / tokenizer.file_name
    cfg = task_config(folder, path, overrides) if folder.head else _config(folder, second, path)
    if overrides and not folder.head:
        raise UserError(f"--config.{overrides[0]} is for a fine-tuned network, and {folder.path} holds a pre-trained one")
    with new_folder(final) as temporary, jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        compute = Compute.resolve(cfg.compute)
        if folder.head:
            objective: Trainable = make_task(cfg, compute)
            params = read_task(folder, cfg, jax.eval_shape(objective.init, jax.random.key(0)))
        else:
            objective = make_objective(cfg, compute, mask_id=tokenizer.mask_id)
            params = _read(objective, folder, second, fresh=fresh)
            write_recipe(temporary / RECIPE, cfg, final, f"imported from {folder.path.name}")
        write_run(Workdir(temporary), cfg, tokenizer, objective, params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "workdir": str(final),
        "recipe": "" if folder.head else str(final / RECIPE),
        "model_type": folder.model_type,
        "objective": cfg.objective,
        "parameters": count,
    }


def _config(folder: Folder, second: Folder | None, tokenizer: pathlib.Path) -> Config:
    """A config of the imported model, with defaults for all that a model does not say of its training."""
    model = folder.model
    cfg = Config(
        name=folder.path.resolve().name,
        objective="rtd" if folder.network == "detection" else "mlm",
        data=DataConfig(),
        tokenizer=TokenizerConfig(algorithm="pretrained", path=str(tokenizer)),
        model=model,
        rtd=_rtd(folder, second) if second else RtdConfig(),
        stages=(StageConfig(seq_len=min(128, model.max_positions)),),
        evaluation=EvaluationConfig(),
    )
    check(cfg)
    return cfg


def _rtd(detector: Folder, generator: Folder) -> RtdConfig:
    """What makes this generator of this detector's architecture, and whether they have the same tables.

    Raises:
        UserError: the generator is none that follows from the detector's.
    """
    model, other = detector.model, generator.model
    rtd = RtdConfig(
        generator_size=other.embed_dim / model.embed_dim,
        generator_layers=other.num_layers / model.num_layers,
    )
    made = rtd.generator(model)
    for field in dataclasses.fields(ModelConfig):
        name = "embedding_dim" if field.name == "table_dim" else field.name
        theirs, ours = getattr(other, name), getattr(made, name)
        if name not in ("dropout", "attention_dropout", "init_std") and theirs != ours:
            raise UserError(
                f"{generator.path}: its {name} is {theirs}, and that of a generator of {rtd.generator_size:.4g} of the "
                f"detector's width and {rtd.generator_layers:.4g} of its layers is {ours}: they cannot be trained together"
            )
    tables = [name for ours, name in _layout(detector).tensors.items() if ours.startswith("encoder.embeddings.")]
    tied = all(np.array_equal(detector.weights.read(name), generator.weights.read(name)) for name in tables)
    return rtd if tied else dataclasses.replace(rtd, embedding_sharing="disentangled")


def _read(objective: Objective, folder: Folder, second: Folder | None, *, fresh: bool) -> Any:
    """The parameters of an objective, float32, in NumPy."""
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    drawn = jax.device_get(jax.jit(objective.init)(jax.random.key(0))) if fresh else None
    if folder.network == "masked":
        return _read_network(folder, shapes, drawn)
    # By itself a detector has the tables that here are the generator's.
    detector, generator = shapes["discriminator"], shapes["generator"]
    whole = detector | {"encoder": detector["encoder"] | {"embeddings": generator["encoder"]["embeddings"]}}
    found = _read_network(folder, whole, None)
    own = found["encoder"].pop("embeddings")
    if second is not None:
        masked = _read_network(second, generator, None)
        if "embeddings" in detector["encoder"]:
            # Disentangled, a table is the generator's plus a difference, and the norm is by itself.
            tables = masked["encoder"]["embeddings"]
            difference = {name: own[name] - tables[name] for name in own if name != "norm"}
            found["encoder"]["embeddings"] = difference | {"norm": own["norm"]}
        return {"generator": masked, "discriminator": found}
    if drawn is None:
        raise UserError(
            f"{folder.path} is a detector of replaced tokens, which is trained beside a generator: give the generator's "
            "folder with --generator, or draw a new one with --fresh"
        )
    logger.info("the generator is new: fill-mask and score read it, so they tell nothing before it is trained")
    masked = drawn["generator"]
    masked["encoder"]["embeddings"] = own
    return {"generator": masked, "discriminator": found}


def _read_network(folder: Folder, shapes: Any, drawn: Any) -> Any:
    """The parameters of one network, from the folder; its head, where the folder has none, from those drawn."""
    names, found, tied = _layout(folder), folder.weights.shapes, folder.model.tie_embeddings
    tensors = dict(names.tensors)
    if not tied:
        # Of an own decoder's bias a file may have one name or both; only the first is computed with.
        other = {bias: name for name, bias in names.copies.items() if bias not in found}
        tensors = {ours: other.get(theirs, theirs) for ours, theirs in tensors.items()}
    headless = not any(theirs in found for ours, theirs in tensors.items() if ours.startswith("head."))
    wanted = {"encoder": shapes["encoder"]} if headless else shapes
    check_tensors(folder, their_tensors(wanted, tensors), names.copies)
    if headless and drawn is None:
        raise UserError(f"{folder.path} has an encoder and no head for pre-training: --fresh draws a new one")
    params = to_params(wanted, tensors, folder.weights.read)
    if tied:
        _check_copies(folder, names.copies)
    if headless:
        logger.info("%s has no head: a new one is drawn", folder.path)
        params["head"] = drawn["head"]
    return params


def _layout(folder: Folder) -> Layout:
    """The names of a folder's tensors: those of a bare encoder have no prefix."""
    names, prefix = (
        layout(folder.model_type, folder.network, tied=folder.model.tie_embeddings),
        NAMES[folder.model_type].prefix,
    )
    if any(name.startswith(prefix) for name in folder.weights.shapes):
        return names
    return dataclasses.replace(names, tensors={ours: name.removeprefix(prefix) for ours, name in names.tensors.items()})


def _check_copies(folder: Folder, copies: Mapping[str, str]) -> None:
    weights = folder.weights
    for name, original in copies.items():
        present = name in weights.shapes and original in weights.shapes
        if present and not np.array_equal(weights.read(name), weights.read(original)):
            raise UserError(
                f"{folder.path}: config.json ties {name} to {original}, and the two differ: set tie_word_embeddings to "
                "false there if the decoder is its own"
            )


def write_run(workdir: Workdir, cfg: Config, tokenizer: Tokenizer, objective: Trainable, params: Any) -> None:
    """A run at step 0: with nothing known of the text, so that every token counts as equally frequent."""
    workdir.open_for_training(cfg)
    workdir.write_language(tokenizer, np.zeros(tokenizer.vocab_size, np.int64))
    names = objective.loss_names + objective.metric_names
    state = init_state(place(params, jax.P()), make_optimizer(cfg), ema=False, names=names)
    checkpoints = Checkpoints(workdir, keep=cfg.train.keep_checkpoints)
    try:
        checkpoints.save(state, 0, wait=True)
    finally:
        checkpoints.close()
