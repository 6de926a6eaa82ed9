"""What a fine-tuning run is made of, before a device is touched: its config completed, its examples read and encoded."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from mlm_jax.config import TASKS, Config, ModelConfig, check
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import UserError
from mlm_jax.finetune.classification import Texts
from mlm_jax.finetune.contract import Kind
from mlm_jax.finetune.question_answering import Questions
from mlm_jax.finetune.table import Table
from mlm_jax.finetune.tagging import Tagging
from mlm_jax.inference import trained_config
from mlm_jax.workdir import Workdir

logger = logging.getLogger(__name__)

_KINDS: dict[str, Callable[[Config, Tokenizer], Kind[Any]]] = {
    "classification": Texts,
    "regression": Texts,
    "tagging": Tagging,
    "question_answering": Questions,
}


def make_kind(cfg: Config, tokenizer: Tokenizer) -> Kind[Any]:
    """The host side of the task that a config names."""
    return _KINDS[cfg.objective](cfg, tokenizer)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run's config with everything that its data decides, and the data.

    Attributes:
        cfg: with the architecture of `init_from`, the labels, the number of steps and the warm-up filled in.
    """

    cfg: Config
    tokenizer: Tokenizer
    kind: Kind[Any]
    train: Table
    dev: Table
    dev_examples: list[Any]


def prepare(cfg: Config) -> Prepared:
    """Reads the run that is begun with and the examples.

    Raises:
        UserError: there is no such run, or examples are not of the form, or too few, for the task.
    """
    cfg, tokenizer = _adopt(cfg)
    kind = make_kind(cfg, tokenizer)
    train, dev, labels = read_examples(cfg, kind)
    train_table, dev_table = (kind.encode(examples, labels, labelled=True) for examples in (train, dev))
    logger.info(
        "%d examples (%d rows, %d tokens) to train on, %d to choose by%s",
        *(len(train), len(train_table.tokens), train_table.lengths.sum(), len(dev)),
        f"; labels {', '.join(labels)}" if labels else "",
    )
    return Prepared(_complete(cfg, labels, len(train_table.tokens)), tokenizer, kind, train_table, dev_table, dev)


def read_examples(cfg: Config, kind: Kind[Any]) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """The examples to train on, those to choose by, and the labels.

    Raises:
        UserError: there are too few of any.
    """
    task = cfg.task
    train = kind.read(task.train, labelled=True)
    if task.dev:
        dev = kind.read(task.dev, labelled=True)
    else:
        train, dev = _divide(kind, train, task.dev_fraction)
        if not train or not dev:
            raise UserError(
                f"{task.train}: of {len(train) + len(dev)} examples, task.dev_fraction={task.dev_fraction} leaves "
                f"{len(train)} to train on and {len(dev)} to choose the best checkpoint by: name a file by task.dev"
            )
        logger.info("no task.dev: %d examples of task.train, by the hash of their texts, are left out of training", len(dev))
    labels = task.labels or kind.found_labels(train)
    if cfg.objective == "classification" and len(labels) < 2:
        raise UserError(f"{task.train} has the label {labels!r} only: task.label={task.label!r} may name another column")
    if cfg.objective == "tagging" and not labels:
        raise UserError(f"{task.train} has no entity: every tag is O; task.label may name another column")
    return train, dev, labels


def _adopt(cfg: Config) -> tuple[Config, Tokenizer]:
    """The config with the architecture and the tokenizer of the run that it begins with."""
    if not cfg.init_from:
        raise UserError(
            "fine-tuning needs --init, the workdir of a pre-trained or an imported run: it gives the architecture and the "
            "tokenizer also where --random-init draws the parameters"
        )
    source = Workdir(cfg.init_from)
    theirs = trained_config(source)
    tokenizer = source.read_tokenizer()
    if tokenizer.vocab_size > theirs.model.vocab_size:
        raise UserError(
            f"{source.path} has a tokenizer of {tokenizer.vocab_size} ids and a model of {theirs.model.vocab_size}: they do "
            "not belong together"
        )
    if cfg.model not in (ModelConfig(), theirs.model):
        raise UserError(f"the architecture is that of --init {cfg.init_from}: leave the section model out")
    dropout = cfg.task.dropout
    model = dataclasses.replace(theirs.model, dropout=dropout, attention_dropout=dropout)
    if cfg.stages[0].seq_len > model.max_positions:
        raise UserError(
            f"stages[0].seq_len={cfg.stages[0].seq_len} exceeds the {model.max_positions} positions of {source.path}"
        )
    return dataclasses.replace(cfg, model=model, tokenizer=theirs.tokenizer), tokenizer


def _complete(cfg: Config, labels: tuple[str, ...], rows: int) -> Config:
    stage, optimizer = cfg.stages[0], cfg.optimizer
    if cfg.task.epochs:
        if optimizer.warmup_steps:
            raise UserError(
                f"optimizer.warmup_steps={optimizer.warmup_steps} with task.epochs={cfg.task.epochs}: give task.warmup, a "
                "share of the steps, or task.epochs=0 with stages[0].steps"
            )
        steps = cfg.task.epochs * -(-rows // stage.batch_size)
        stage = dataclasses.replace(stage, steps=steps)
        optimizer = dataclasses.replace(optimizer, warmup_steps=round(cfg.task.warmup * steps))
    task = dataclasses.replace(cfg.task, labels=labels, metric=cfg.task.metric or TASKS[cfg.objective][0])
    whole = dataclasses.replace(cfg, task=task, stages=(stage,), optimizer=optimizer)
    check(whole)
    return whole


def _divide(kind: Kind[Any], examples: Sequence[Any], fraction: float) -> tuple[list[Any], list[Any]]:
    """Examples to train on, and those to choose by, of which no text occurs among the first."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    for example in examples:
        digest = hashlib.blake2b(kind.group(example).encode(), digest_size=8).digest()
        parts[int.from_bytes(digest) < fraction * 2**64].append(example)
    return parts
