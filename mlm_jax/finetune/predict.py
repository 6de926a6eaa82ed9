"""`mlm-jax predict`: labels, tags or answers of a fine-tuned run for the examples of a file."""

import json
import os
from typing import Any

import jax

from mlm_jax.config import TASKS, ShardingConfig
from mlm_jax.errors import UserError
from mlm_jax.finetune import metrics
from mlm_jax.finetune.apply import Apply
from mlm_jax.finetune.prepare import make_kind
from mlm_jax.inference import read_params
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import make_task
from mlm_jax.sharding import make_mesh
from mlm_jax.workdir import Workdir


def predict(
    workdir: str | os.PathLike[str], uri: str, *, batch_size: int | None = None
) -> tuple[list[dict[str, Any]], dict[str, float], int]:
    """Reads a file as the run's own training file is read, and predicts.

    Returns:
        A prediction for each example, the measures where all examples have labels (else none), and the run's step.

    Raises:
        UserError: the run is not fine-tuned, or the file is not of its task's form.
    """
    metrics.require_libraries()
    folder = Workdir(workdir)
    cfg = folder.read_config()
    if cfg.objective not in TASKS:
        raise UserError(
            f"{workdir} is pre-trained with objective={cfg.objective!r} and not fine-tuned: see mlm-jax finetune"
        )
    tokenizer, labels = folder.read_tokenizer(), cfg.task.labels
    kind = make_kind(cfg, tokenizer)
    examples = kind.read(uri, labelled=False)
    table = kind.encode(examples, labels, labelled=False)
    with jax.set_mesh(make_mesh(ShardingConfig())):
        task = make_task(cfg, Compute.resolve(cfg.compute))
        rows = batch_size or cfg.evaluation.batch_size
        apply = Apply(task, pad_id=tokenizer.pad_id, buckets=cfg.task.buckets, batch_size=rows)
        params, step = read_params(folder, task)
        found = kind.decode(examples, labels, table, apply(params, table))
    return found, kind.measure(examples, found), step


def write_jsonl(path: str, records: list[dict[str, Any]]) -> None:
    """A record a line.

    Raises:
        UserError: no file can be made there.
    """
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"--output={path}: no file can be made there ({error.strerror})") from None
