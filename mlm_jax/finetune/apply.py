"""A task's network applied to all rows of a table: what dev evaluations and `predict` read a model by."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mlm_jax.finetune.table import PADDING, Table, bucket_lengths, in_order
from mlm_jax.objectives import Task
from mlm_jax.sharding import ROWS, place, row_ways


class Apply:
    """Called with parameters and a table; jitted once for each bucket."""

    def __init__(self, task: Task, *, pad_id: int, buckets: Sequence[int], batch_size: int):
        """Args:
        batch_size: rounded up to what the current mesh's rows divide.
        """
        ways = row_ways(jax.sharding.get_mesh())
        self._batch_size = -(-batch_size // ways) * ways
        self._pad_id, self._buckets = pad_id, buckets
        # Whole on every process, as each decodes and measures all.
        self._outputs = jax.jit(lambda params, batch: jax.reshard(task.outputs(params, batch), jax.P()))

    def __call__(self, params: Any, table: Table) -> list[np.ndarray]:
        """The logits of each row, float32 [its length, or 1 for a text's, outputs]."""
        found: list[np.ndarray] = [np.empty(0)] * len(table.tokens)
        buckets = bucket_lengths(self._buckets, int(table.lengths.max()))
        pending = []
        for rows, length in in_order(table.lengths, buckets, self._batch_size):
            batch = place(table.batch(rows, length, self._pad_id, targets=False), jax.P(ROWS))
            pending.append((rows, self._outputs(params, batch)))
        for rows, outputs in pending:
            host = np.asarray(outputs)
            for place_in_batch in np.flatnonzero(rows != PADDING):
                row = rows[place_in_batch]
                found[row] = host[place_in_batch, : table.lengths[row]]
        return found
