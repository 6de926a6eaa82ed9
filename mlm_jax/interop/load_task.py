"""Fine-tuned networks of Hugging Face: the config of a run that `predict` reads, and its parameters. A part of `load`."""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlm_jax.config import TASKS, Config, StageConfig, TaskConfig, TokenizerConfig, check, override
from mlm_jax.errors import UserError
from mlm_jax.finetune.tagging import tags_of
from mlm_jax.interop.folder import Folder, check_tensors
from mlm_jax.interop.task_heads import Head, task_layout
from mlm_jax.interop.tensors import their_tensors, to_params

_NEVER = -1e4  # the bias of a tag that the network does not have
_ROW = 384  # tokens of a row, as of SQuAD's with google-research/bert:run_squad.py, where positions reach so far


def task_config(folder: Folder, tokenizer: pathlib.Path, overrides: Sequence[str]) -> Config:
    """A config of the imported network, as if it had been fine-tuned here.

    Raises:
        UserError: labels that are not of a form that is known here; an override of what the folder decides.
    """
    head = folder.head
    assert head is not None
    labels = _entity_labels(head) if head.objective == "tagging" else head.labels
    task = TaskConfig(
        train=str(folder.path),
        labels=labels,
        null_answers=head.objective == "question_answering",
        metric=TASKS[head.objective][0],
        **head.fields,
    )
    cfg = Config(
        name=folder.path.resolve().name,
        objective=head.objective,
        tokenizer=TokenizerConfig(algorithm="pretrained", path=str(tokenizer)),
        model=folder.model,
        task=task,
        stages=(StageConfig(seq_len=min(_ROW, folder.model.max_positions)),),
    )
    for each in overrides:
        name = each.partition("=")[0]
        if not re.fullmatch(r"task\.(text|pair|label|stride|max_answer_tokens|null_\w+|buckets)|stages\[0\]\.seq_len", name):
            raise UserError(
                f"--config.{name} cannot be set here: of an imported network these can, task.text, task.pair, task.label, "
                "task.stride, task.max_answer_tokens, task.null_answers, task.null_threshold, task.buckets and "
                "stages[0].seq_len"
            )
    cfg = override(cfg, overrides)
    check(cfg)
    return cfg


def _entity_labels(head: Head) -> tuple[str, ...]:
    for tag in head.labels:
        if tag != "O" and not re.fullmatch(r"[BI]-.+", tag):
            raise UserError(f"config.json has the tag {tag!r} in id2label, and tags here are O, B-… and I-…")
    if "O" not in head.labels:
        raise UserError(f"config.json has id2label={list(head.labels)}, which lacks the tag O")
    return tuple(dict.fromkeys(tag[2:] for tag in head.labels if tag != "O"))


def read_task(folder: Folder, cfg: Config, shapes: Any) -> Any:
    """The parameters, float32, in NumPy.

    Args:
        shapes: their tree.
    """
    assert folder.head is not None
    tensors = task_layout(cfg, folder.model_type)
    expected = their_tensors(shapes, tensors)
    if cfg.objective != "tagging":
        check_tensors(folder, expected, {})
        return to_params(shapes, tensors, folder.weights.read)
    theirs = folder.head.labels
    changed = {name: (len(theirs), *shape[1:]) for name, shape in expected.items() if name.startswith("classifier.")}
    check_tensors(folder, expected | changed, {})
    places = [theirs.index(tag) if tag in theirs else -1 for tag in tags_of(cfg.task.labels)]

    def read(name: str) -> np.ndarray:
        """Rows of tags in our order; one that the network lacks, as B- of those trained on IOB, is never the best."""
        array = folder.weights.read(name)
        if name not in changed:
            return array
        absent = np.full_like(array[:1], _NEVER if name.endswith(".bias") else 0.0)
        return np.concatenate([array, absent])[places]

    return to_params(shapes, tensors, read)
