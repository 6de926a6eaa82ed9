"""What a kind of task is to `job` and `predict`: reading, encoding, and what becomes of the network's outputs."""

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from mlm_jax.finetune.table import Table

E = TypeVar("E")  # an example


class Kind(Protocol, Generic[E]):
    """One of `config.TASKS`, on the host, made of a config and a tokenizer."""

    def read(self, uri: str, *, labelled: bool) -> list[E]:
        """The examples of a source, in its order.

        Raises:
            UserError: the source is not of a format that is known, is empty, or, where `labelled`, lacks labels.
        """

    def group(self, example: E) -> str:
        """What must not be divided between train and dev: examples with the same group stay together."""

    def found_labels(self, examples: Sequence[E]) -> tuple[str, ...]:
        """The labels that occur, in the order of their ids; none for tasks without."""

    def encode(self, examples: Sequence[E], labels: tuple[str, ...], *, labelled: bool) -> Table:
        """The rows of the examples, with targets where `labelled`.

        Raises:
            UserError: a label is not among `labels`.
        """

    def decode(
        self, examples: Sequence[E], labels: tuple[str, ...], table: Table, outputs: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """A prediction for each example, in JSON's types.

        Args:
            outputs: the logits of each row of the table, float32 [length or 1, outputs].
        """

    def measure(self, examples: Sequence[E], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The measures of `config.TASKS`; empty where the examples have no labels."""
