"""Texts, or pairs of them, with a label or a number: reading, encoding, predictions and measures."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlm_jax.config import Config
from mlm_jax.config.conversion import nearest
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import UserError
from mlm_jax.finetune import metrics
from mlm_jax.finetune.records import field, read_records, text_field
from mlm_jax.finetune.table import Table

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Text:
    """An example. `label` is None where it is not known."""

    text: str
    pair: str | None
    label: str | None
    where: str


class Texts:
    """Classification and regression; see `contract.Kind`."""

    def __init__(self, cfg: Config, tokenizer: Tokenizer):
        self.task, self.tokenizer = cfg.task, tokenizer
        self.max_length = cfg.stages[0].seq_len
        self.has_types = cfg.model.num_token_types > 1
        self.is_regression = cfg.objective == "regression"

    def read(self, uri: str, *, labelled: bool) -> list[Text]:
        """See `contract.Kind`."""
        task = self.task
        columns = tuple(column for column in (task.text, task.pair, task.label) if column)
        examples = []
        for where, record in read_records(uri, columns, labels=task.labels):
            pair = text_field(record, task.pair, where, "task.pair") if task.pair else None
            label = None
            if labelled or task.label in record:
                label = self._label(field(record, task.label, where, "task.label"), where)
            examples.append(Text(text_field(record, task.text, where, "task.text"), pair, label, where))
        if not examples:
            raise UserError(f"{uri} holds no examples")
        return examples

    def _label(self, value: Any, where: str) -> str:
        if value is None or value == "":
            raise UserError(f"{where}: the column {self.task.label!r} is empty")
        if self.is_regression:
            try:
                float(value)
            except (TypeError, ValueError):
                raise UserError(f"{where}: {value!r} in column {self.task.label!r} is not a number") from None
        return str(value)

    def group(self, example: Text) -> str:
        """The texts themselves."""
        return example.text if example.pair is None else f"{example.text}\t{example.pair}"

    def found_labels(self, examples: Sequence[Text]) -> tuple[str, ...]:
        """See `contract.Kind`."""
        return () if self.is_regression else tuple(sorted({example.label for example in examples if example.label}))

    def encode(self, examples: Sequence[Text], labels: tuple[str, ...], *, labelled: bool) -> Table:
        """One row an example, cut at its end where it is too long; of a pair the longer text is cut."""
        tokens, types, cut = [], [], 0
        for example in examples:
            parts = [self.tokenizer.encode(text) for text in (example.text, example.pair) if text is not None]
            between = [self.tokenizer.sep_id] * self.tokenizer.model.separators
            room = self.max_length - 2 - len(between) * (len(parts) - 1)
            cut += sum(map(len, parts)) > room
            first = parts[0][: _share(parts, room)]
            row = [self.tokenizer.cls_id, *first]
            for part in parts[1:]:
                row += [*between, *part[: room - len(first)]]
            tokens.append(np.asarray([*row, self.tokenizer.sep_id], np.int32))
            types.append((np.arange(len(row) + 1) >= len(first) + 1 + len(between)).astype(np.int32))
        if cut:
            logger.info("%d of %d examples are longer than %d tokens and were cut", cut, len(examples), self.max_length)
        targets = self._targets(examples, labels) if labelled else {}
        has_types = self.has_types and self.task.pair
        return Table(
            tokens, np.arange(len(examples)), inputs={"token_types": types} if has_types else {}, row_targets=targets
        )

    def _targets(self, examples: Sequence[Text], labels: tuple[str, ...]) -> dict[str, np.ndarray]:
        if self.is_regression:
            values = np.asarray([example.label for example in examples]).astype(np.float32)
            return {"labels": values, "weights": np.ones(len(values), np.float32)}
        ids = np.asarray([label_id(example.label, labels, example.where) for example in examples], np.int32)
        weights = np.asarray(self.task.class_weights or [1.0] * len(labels), np.float32)
        return {"labels": ids, "weights": weights[ids]}

    def decode(
        self, examples: Sequence[Text], labels: tuple[str, ...], table: Table, outputs: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """A label with the probabilities of all, or a number."""
        if self.is_regression:
            return [{"value": float(row[0, 0])} for row in outputs]
        predictions = []
        for row in outputs:
            probabilities = softmax(row[0])
            shown = {label: round(float(share), 6) for label, share in zip(labels, probabilities, strict=True)}
            predictions.append({"label": labels[int(probabilities.argmax())], "probabilities": shown})
        return predictions

    def measure(self, examples: Sequence[Text], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """See `contract.Kind`."""
        wanted = [example.label for example in examples if example.label is not None]
        if len(wanted) < len(examples):
            return {}
        if self.is_regression:
            return metrics.regression([float(label) for label in wanted], [found["value"] for found in predictions])
        labels = list(predictions[0]["probabilities"])
        for example in examples:
            label_id(example.label, tuple(labels), example.where)
        return metrics.classification(labels, wanted, [found["label"] for found in predictions])


def _share(parts: Sequence[np.ndarray], room: int) -> int:
    """How many tokens of the first text are kept, so that both are cut to about the same length."""
    if len(parts) == 1:
        return room
    return max(room - len(parts[1]), room - room // 2)


def label_id(label: str | None, labels: tuple[str, ...], where: str) -> int:
    """The id of a label.

    Raises:
        UserError: it is not among the labels.
    """
    if label not in labels:
        raise UserError(
            f"{where}: the label {label!r} is not among {', '.join(map(repr, labels))}{nearest(str(label), labels)}; "
            "task.labels lists them, else they are those that occur in task.train"
        )
    return labels.index(label)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
