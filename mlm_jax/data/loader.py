"""Random access to the rows of a prepared corpus, and batches whose only state is the step number.

Host side: `train.loop` puts what comes from here on the devices. Which row an example is follows from its position in
the run, the corpus and the seed, so a run resumes at any step, on any number of processes, at no cost.
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, overload

import grain
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from mlm_jax.data.corpus import rows_directory
from mlm_jax.data.images import draw_others
from mlm_jax.data.pairs import mark_parts
from mlm_jax.errors import MachineError, UserError
from mlm_jax.segments import mark_languages

# Threads read and decode whole steps ahead of the loop. Decoding shares one interpreter, so threads beyond a few help
# only where the disk is slow; what they hold is bounded by the steps buffered.
_THREADS = 4
_STEPS_AHEAD = 8


class Rows:
    """The rows of one length and split, read in any order."""

    def __init__(self, path: str | os.PathLike[str], seq_len: int, split: str = "train", languages: Sequence[int] = ()):
        """Opens the dataset without reading rows.

        Args:
            path: a prepared corpus.
            seq_len: one of its row lengths.
            split: "train" or "validation".
            languages: of its text, or of each part of its pairs, as segment ids have them; none leaves them out.

        Raises:
            UserError: the corpus has no such rows.
        """
        directory = rows_directory(path, seq_len)
        if not directory.is_dir():
            raise UserError(f"{path} has no rows of seq_len={seq_len}: prepare it with a stage of that length")
        builder = tfds.builder_from_directory(directory)
        if split not in builder.info.splits:
            raise UserError(f"{path} has no {split} split: prepare it with data.validation_fraction above 0")
        self.seq_len = seq_len
        self._languages = languages
        self._directory = directory
        self._dtypes = {name: feature.np_dtype for name, feature in builder.info.features.items()}
        self._shapes = {name: feature.shape for name, feature in builder.info.features.items()}
        self._source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Reads rows.

        Returns:
            tokens int32 [n, seq_len], padded with the tokenizer's padding id; segment_ids int32 [n, seq_len], 1, 2, …
            for the segments of a row in order and 0 for padding; with parts and languages (see `mlm_jax.segments`). Where
            texts have images, images uint8 [n, pixels, pixels, 3].

        Raises:
            MachineError: a file of the dataset is missing or damaged.
        """
        try:
            # One by one: the data source's own batches start threads in every call, which costs more than it gains.
            records = [self._source[int(index)] for index in indices]
            # TFDS decodes the same (a test says so) in twice the time, feature by feature and row by row.
            rows = [tf_example_pb2.Example.FromString(record).features.feature for record in records]
        except (RuntimeError, OSError) as error:
            raise MachineError(f"{self._directory} cannot be read: {error}; prepare the corpus again") from error
        tokens, lengths = (self._stacked(rows, name).astype(np.int32) for name in ("tokens", "segment_lengths"))
        segment_ids = mark_parts(tokens, _segment_ids(lengths, self.seq_len))
        read = {"tokens": tokens, "segment_ids": mark_languages(segment_ids, self._languages)}
        return read | ({"images": self._stacked(rows, "images")} if "images" in self._shapes else {})

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """Of a mixture, the ids of each source's examples; there is one source here, without a name."""
        return {}

    def counts(self, examples: int) -> int:
        """How many of the first so many examples of a stage are of this source, which are all."""
        return examples

    def epochs(self, visited: int) -> dict[str, float]:
        """Of a mixture, how often each source has been gone through."""
        return {}

    def visit(self, seen: int, first: int, batch_size: int, offsets: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows and epochs of the examples `offsets` of a batch; see `Examples`."""
        return row_index(seen + first + offsets, len(self), seed)

    def _stacked(self, rows: Sequence[Any], name: str) -> np.ndarray:
        content = b"".join([row[name].bytes_list.value[0] for row in rows])
        return np.frombuffer(content, self._dtypes[name]).reshape(len(rows), *self._shapes[name])


def _segment_ids(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Numbers the segments of each row, int32 [n, seq_len], from their lengths [n, segments], 0 where there is none."""
    num_rows, num_segments = lengths.shape
    padding = seq_len - lengths.sum(axis=1, keepdims=True)
    numbers = np.append(np.arange(1, num_segments + 1, dtype=np.int32), np.int32(0))
    repeats = np.concatenate([lengths, padding], axis=1)
    return np.repeat(np.tile(numbers, num_rows), repeats.ravel()).reshape(num_rows, seq_len)


@functools.lru_cache(maxsize=1024)  # one for each source of a mixture, and small
def _permutation(num_rows: int, seed: int | str) -> grain.MapDataset[int]:
    # Grain adds the epoch to the seed: unhashed, run 1 would visit rows in the orders of run 0, one epoch earlier.
    grain_seed = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest())
    return grain.MapDataset.range(num_rows).shuffle(seed=grain_seed)


@overload
def row_index(position: int, num_rows: int, seed: int | str) -> tuple[int, int]: ...
@overload
def row_index(position: np.ndarray, num_rows: int, seed: int | str) -> tuple[np.ndarray, np.ndarray]: ...
def row_index(position: int | np.ndarray, num_rows: int, seed: int | str) -> tuple[int | np.ndarray, int | np.ndarray]:
    """Which row is visited at a position of a run: each row once per epoch, in an order of that epoch's own.

    Args:
        position: examples visited before, over the whole run; one or an array of them.
        num_rows: of the split.
        seed: of the run; of a source in a mixture, with its name.

    Returns:
        The row and the epoch; int32 arrays of the position's shape where that is an array.
    """
    permutation = _permutation(num_rows, seed)
    if isinstance(position, np.ndarray):
        rows = [permutation[p] for p in position.ravel().tolist()]
        return np.array(rows, np.int32).reshape(position.shape), (position // num_rows).astype(np.int32)
    return permutation[position], position // num_rows


class Examples(Protocol):
    """What batches are made of: the rows of one source (`Rows`) or of a mixture (`data.mixture.Mixture`)."""

    def __len__(self) -> int:
        """How many there are, whose ids begin at 0."""

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """Of a mixture, the ids, from … up to, of each source's examples."""

    def counts(self, examples: int) -> Any:
        """How many of the first so many examples of a stage are of the source, or of each source."""

    def epochs(self, visited: Any) -> dict[str, float]:
        """Of a mixture, how often each source has been gone through after so many examples of it."""

    def visit(self, seen: Any, first: int, batch_size: int, offsets: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids and epochs, int32, of the examples `offsets` of a batch.

        Args:
            seen: examples visited before the stage at this row length, as `counts` counts them.
            first: the stage's examples before the batch.
        """

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Reads examples; see `Rows.read`."""


def batches(
    rows: Examples,
    *,
    batch_size: int,
    start_step: int,
    num_steps: int,
    first_position: Any,
    seed: int,
    local_rows: Sequence[int] | None = None,
    exchanged: float = 0.0,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps start_step … start_step + num_steps - 1, read ahead by threads.

    Example i of step s is at position first_position + s * batch_size + i (see `row_index`; of a mixture, each source has
    such positions of its own).

    Args:
        rows: what to read from.
        batch_size: examples of the global batch.
        start_step: the first step that is wanted, counted from where first_position is.
        num_steps: batches to give.
        first_position: examples visited before step 0, in earlier stages: a number; of a mixture, one for each source, or
            0.
        seed: of the run.
        local_rows: which examples of each global batch this process feeds, all when None.
        exchanged: the share of the examples with images that are given another's.

    Returns:
        An iterator of dictionaries: tokens and segment_ids as `Rows.read` gives them, example_ids int32 [b] (the row's
        number, over all sources) and epochs int32 [b], with b = len(local_rows). Where texts have images, images too, and
        matches int32 [b], 0 where the image is another's.
    """
    offsets = np.arange(batch_size) if local_rows is None else np.asarray(local_rows, np.int64)
    assert ((offsets >= 0) & (offsets < batch_size)).all(), f"local rows {offsets} of a batch of {batch_size}"

    def read(step: int) -> dict[str, np.ndarray]:
        example_ids, epochs = rows.visit(first_position, step * batch_size, batch_size, offsets, seed)
        batch = {**rows.read(example_ids), "example_ids": example_ids, "epochs": epochs}
        if "images" in batch:
            is_other, others = draw_others(example_ids, epochs, len(rows), exchanged, seed)
            batch["matches"] = (~is_other).astype(np.int32)
            if is_other.any():
                batch["images"] = batch["images"].copy()
                batch["images"][is_other] = rows.read(others[is_other])["images"]
        return batch

    steps = grain.MapDataset.range(start_step, start_step + num_steps)
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_STEPS_AHEAD)
    return iter(steps.map(read).to_iter_dataset(options))
