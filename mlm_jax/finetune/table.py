"""Encoded examples in memory, and batches of rows of similar lengths, whose only state is the step number."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

PADDING = -1  # in place of a row's number


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of any lengths; a long example may have several.

    Attributes:
        tokens: int32 [length] of each row, CLS and SEP included.
        owners: the example that each row belongs to, int32 [rows].
        inputs: what the network reads of each token beside it: arrays like `tokens`, by name.
        token_targets: what it is to say about each token, likewise.
        row_targets: and about each row: arrays [rows].
        marks: what a prediction needs to know of each row and the network does not.
    """

    tokens: list[np.ndarray]
    owners: np.ndarray
    inputs: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    token_targets: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    row_targets: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    marks: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Of the rows, int64 [rows]."""
        return np.asarray([len(row) for row in self.tokens], np.int64)

    def batch(self, rows: np.ndarray, length: int, pad_id: int, *, targets: bool) -> dict[str, np.ndarray]:
        """These rows side by side at one length; `PADDING` gives a row of padding, whose targets, and so weights, are 0."""
        is_row = rows != PADDING
        inside = np.where(is_row, rows, 0)

        def by_token(column: list[np.ndarray], fill: int = 0) -> np.ndarray:
            array = np.full((len(rows), length), fill, column[0].dtype)
            for place in np.flatnonzero(is_row):
                values = column[rows[place]]
                array[place, : len(values)] = values
            return array

        lengths = np.where(is_row, self.lengths[inside], 0)
        batch = {
            "tokens": by_token(self.tokens, pad_id),
            "segment_ids": (np.arange(length) < lengths[:, None]).astype(np.int32),
            "example_ids": inside.astype(np.int32),
            "epochs": np.zeros(len(rows), np.int32),
            **{name: by_token(column) for name, column in self.inputs.items()},
        }
        if targets:
            batch |= {name: by_token(column) for name, column in self.token_targets.items()}
            for name, column in self.row_targets.items():
                batch[name] = np.where(is_row, column[inside], 0).astype(column.dtype)
        return batch


def bucket_lengths(buckets: Sequence[int], longest: int) -> list[int]:
    """The lengths that rows are padded to: those of `buckets` below the longest row, and that one's."""
    return [length for length in buckets if length < longest] + [longest]


class Schedule:
    """Which rows are trained on at which step: each once per epoch, with others of about their length, in a random order.

    The rows that are left over in a bucket go with the next longer ones, so that only an epoch's last rows, in its longest
    bucket, may leave a batch short.
    """

    def __init__(self, lengths: np.ndarray, buckets: Sequence[int], batch_size: int, seed: int):
        """Args:
        lengths: of all rows, none above the last bucket's.
        buckets: ascending lengths.
        seed: of the run, which decides the order with the epoch's number.
        """
        self._buckets = list(buckets)
        self._bucket_of = np.searchsorted(np.asarray(buckets), lengths)
        self._batch_size, self._seed = batch_size, seed
        self.steps_per_epoch = -(-len(lengths) // batch_size)

    def at(self, step: int) -> tuple[np.ndarray, int]:
        """The rows of a step, counted from 0, with `PADDING` where a batch is short, and the length to pad them to."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[index]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (as long-lived as the run)
    def _epoch(self, epoch: int) -> list[tuple[np.ndarray, int]]:
        draw = np.random.default_rng([self._seed, epoch])
        order = draw.permutation(len(self._bucket_of))
        batches: list[tuple[np.ndarray, int]] = []
        rest = np.empty(0, order.dtype)
        for bucket, length in enumerate(self._buckets):
            rows = np.concatenate([rest, order[self._bucket_of[order] == bucket]])
            whole = len(rows) // self._batch_size * self._batch_size
            batches += [(part, length) for part in rows[:whole].reshape(-1, self._batch_size)]
            rest = rows[whole:]
        if len(rest):
            padding = np.full(self._batch_size - len(rest), PADDING)
            batches.append((np.concatenate([rest, padding]), self._buckets[-1]))
        return [batches[index] for index in draw.permutation(len(batches))]


def in_order(lengths: np.ndarray, buckets: Sequence[int], batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Every row once, by bucket, for predictions: batches of rows, with `PADDING` where one is short, and their length."""
    bucket_of = np.searchsorted(np.asarray(buckets), lengths)
    for bucket, length in enumerate(buckets):
        rows = np.flatnonzero(bucket_of == bucket)
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            yield np.concatenate([part, np.full(batch_size - len(part), PADDING)]), length


def windows(lengths: np.ndarray, room: int, stride: int) -> list[tuple[int, int]]:
    """Stretches of items, none longer than `room` tokens, that together hold all of them: first and behind the last.

    Args:
        lengths: tokens of each item, none above `room`.
        stride: tokens between the beginnings of two windows, at most; a window never begins behind the end of another.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    found: list[tuple[int, int]] = []
    first, count = 0, len(lengths)
    while True:
        last = int(np.searchsorted(ends, starts[first] + room, side="right")) if count else 0
        found.append((first, last))
        if last >= count:
            return found
        first = min(last, max(first + 1, int(np.searchsorted(starts, starts[first] + stride, side="right")) - 1))


def counted_items(lengths: np.ndarray, cut: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Of each window, which of its items count there, bool: an item counts in that window where most is around it.

    What is around it is the smaller of the window's tokens before and behind it.
    """
    best, chosen = np.full(len(lengths), -1), np.zeros(len(lengths), np.int64)
    for index, (first, last) in enumerate(cut):
        ends = np.cumsum(lengths[first:last])
        around = np.minimum(ends - lengths[first:last], ends[-1:] - ends)
        better = around > best[first:last]
        best[first:last][better] = around[better]
        chosen[first:last][better] = index
    return [chosen[first:last] == index for index, (first, last) in enumerate(cut)]
