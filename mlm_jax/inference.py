"""A trained run, loaded from its workdir alone: for evaluation, filled masks, scores and everything after training."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mlm_jax.config import TASKS, Config, ShardingConfig
from mlm_jax.data import images
from mlm_jax.data.packing import pack
from mlm_jax.data.pairs import encode, mark_parts
from mlm_jax.data.sources import open_source
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import UserError
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import Objective, Trainable, make_objective, make_task
from mlm_jax.objectives.rtd import ReplacedTokenDetection
from mlm_jax.segments import mark_languages
from mlm_jax.sharding import make_mesh
from mlm_jax.train.checkpoint import load_params, saved_step
from mlm_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """What a verb needs of a run that has been trained, on the current mesh, at the stage that it has come to."""

    workdir: Workdir
    cfg: Config
    tokenizer: Tokenizer
    objective: Objective
    params: Any
    step: int


@contextlib.contextmanager
def open_run(path: str | os.PathLike[str]) -> Iterator[TrainedRun]:
    """Loads a run's newest parameters onto a mesh over all devices here, whatever mesh it was trained on.

    Raises:
        UserError: the path is no workdir, or nothing was saved in it yet.
        MachineError: its files are damaged.
    """
    workdir = Workdir(path)
    cfg = workdir.read_config()
    if cfg.objective in TASKS:
        raise UserError(f"{path} is fine-tuned for {cfg.objective} and predicts no tokens: see mlm-jax predict and embed")
    tokenizer = workdir.read_tokenizer()
    with jax.set_mesh(make_mesh(ShardingConfig())):
        objective = make_objective(cfg, Compute.resolve(cfg.compute), mask_id=tokenizer.mask_id)
        params, step = read_params(workdir, objective)
        stage = cfg.stage_of(step)
        objective = make_objective(cfg, objective.compute, stage, mask_id=tokenizer.mask_id)
        yield TrainedRun(workdir, cfg.at_stage(stage), tokenizer, objective, params, step)


def trained_config(workdir: Workdir) -> Config:
    """A run's config with the model as its saved parameters were trained: positions are rotated as in their stage.

    Raises:
        UserError: nothing was saved yet.
    """
    cfg = workdir.read_config()
    return cfg.at_stage(cfg.stage_of(saved_step(workdir))) if any(stage.rope_base for stage in cfg.stages) else cfg


def read_params(workdir: Workdir, objective: Trainable) -> tuple[Any, int]:
    """The parameters that a run of this objective has saved, whole on every device of the current mesh, and their step.

    Raises:
        UserError: nothing was saved yet.
        MachineError: the checkpoint is damaged.
    """
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    replicated = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), shapes)
    return load_params(workdir, abstract, ema=objective.cfg.optimizer.ema_decay > 0)


def read_encoder(workdir: Workdir, compute: Compute) -> tuple[Any, int]:
    """The parameters of a run's encoder, of ELECTRA the discriminator's, whatever the run was trained for; and their step.

    Raises:
        UserError, MachineError: as `read_params`.
    """
    params, step = read_network(workdir, compute)
    return params["encoder"], step


def read_network(workdir: Workdir, compute: Compute) -> tuple[Any, int]:
    """`read_encoder` with the head on it: {"encoder": …, "head": …}."""
    cfg = workdir.read_config()
    if cfg.objective in TASKS:
        return read_params(workdir, make_task(cfg, compute))
    objective = make_objective(cfg, compute)
    params, step = read_params(workdir, objective)
    if isinstance(objective, ReplacedTokenDetection):
        params = objective.discriminator_params(params)
    return params, step


def pack_source(run: TrainedRun, uri: str, seq_len: int, languages: Sequence[int] = ()) -> dict[str, np.ndarray]:
    """The first documents of a source as packed rows of the run's tokenizer: `tokens` and `segment_ids`, int32 [rows, L].

    As many documents are read as fill `evaluation.max_rows` rows. Of a run that reads images, with `images` uint8.

    Args:
        languages: of the text, or of each part of its pairs (see `Config.languages`).

    Raises:
        UserError: the source holds no text, or no images where they are read.
    """
    tokenizer, limit, source = run.tokenizer, run.cfg.evaluation.max_rows, open_source(uri)
    read_image = images.decoder(run.cfg, source.images, uri)
    documents, names, total = [], [], 0
    for document in source.documents():
        text, name = images.split(document)
        ids = encode(tokenizer, text)
        if len(ids):
            documents.append(ids)
            names.append(name)
            total += len(ids) + 2
        if total >= limit * seq_len or (read_image is not None and len(documents) == limit):
            break
    if not documents:
        raise UserError(f"{uri} holds no text to evaluate on")
    layout = pack(np.asarray([len(ids) for ids in documents]), seq_len, run.cfg.data.max_segments)
    count = min(layout.num_rows, limit)
    rows = {
        "tokens": np.full((count, seq_len), tokenizer.pad_id, np.int32),
        "segment_ids": np.zeros((count, seq_len), np.int32),
    }
    for row in range(count):
        place = 0
        for segment, piece in enumerate(range(*layout.row_bounds[row : row + 2]), start=1):
            start, length = layout.starts[piece], layout.lengths[piece]
            ids = documents[layout.documents[piece]][start : start + length]
            end = place + len(ids) + 2
            rows["tokens"][row, place:end] = [tokenizer.cls_id, *ids, tokenizer.sep_id]
            rows["segment_ids"][row, place:end] = segment
            place = end
    rows["segment_ids"] = mark_languages(mark_parts(**rows), languages)
    if read_image is not None:  # a row has one text
        of_rows = layout.documents[layout.row_bounds[:count]]
        rows["images"] = np.stack([read_image(names[document]) for document in of_rows])
    return rows
