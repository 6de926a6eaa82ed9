"""Several sources as one stream of examples: which source gives the next one, and which of its rows that is.

Beside `data/loader.py`, whose batches it fills. Like a single source's, an example follows from its place in the run.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlm_jax.config import Config, StageConfig
from mlm_jax.data.corpus import Corpus
from mlm_jax.data.loader import Rows, row_index

# Shares are whole multiples of 1 / PERIOD: over so many examples every source gets exactly its own.
PERIOD = 1 << 20


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The rows of several sources at one length, and the shares at which a stage draws from them.

    Row r of a source is the example `r` plus the rows of all sources before it, so ids are unique over the mixture. Every
    source is visited in a permutation of its own for each of its own epochs, and both go on from one stage to the next.

    Attributes:
        rows: of each source, by its name.
        parts: int64 [sources], the examples of each among PERIOD in a row.
    """

    rows: Mapping[str, Rows]
    parts: np.ndarray

    def __len__(self) -> int:
        return sum(map(len, self.rows.values()))

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """The ids, from … up to, of each source's examples."""
        ends = np.cumsum([len(rows) for rows in self.rows.values()]).tolist()
        return {name: (end - len(rows), end) for end, (name, rows) in zip(ends, self.rows.items(), strict=True)}

    def counts(self, examples: int | np.ndarray) -> np.ndarray:
        """How many of the first so many examples of a stage are of each source: int64 [sources] (behind the argument's).

        At any number they are within 2 of their exact shares, and after every PERIOD they are exact.

        Source: google/grain:grain/_src/python/dataset/transformations/mix.py splits a sequence in this way, source by
        source. It rounds shares to a hundredth of the smallest, and decides element by element in Python.
        """
        left, period = np.asarray(examples, np.int64), PERIOD
        found = []
        for part in self.parts.tolist():
            others = left * (period - part) // period if period else left
            found.append(left - others)
            left, period = others, period - part
        return np.stack(found, -1)

    def visit(self, seen: Any, first: int, batch_size: int, offsets: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of a batch.

        Args:
            seen: examples of each source visited before the stage.
            first: the stage's examples before the batch.
            offsets: which of the batch are wanted.
            seed: of the run.

        Returns:
            Their ids and, of the source that each is from, the epochs; int32.
        """
        counts = self.counts(np.arange(first, first + batch_size + 1))
        sources = np.diff(counts, axis=0).argmax(axis=1)
        # The sources come at even distances, which some objectives' use of a row's place in the batch would not survive.
        order = _permutation(batch_size, f"{seed} {int(np.sum(seen)) + first}")[offsets]
        ids, epochs = np.empty(len(order), np.int32), np.empty(len(order), np.int32)
        ranges = self.ranges
        for source, (name, rows) in enumerate(self.rows.items()):
            mine = np.flatnonzero(sources[order] == source)
            positions = np.broadcast_to(seen, len(self.rows))[source] + counts[order[mine], source]
            found, epochs[mine] = row_index(positions, len(rows), f"{seed} {name}")
            ids[mine] = found + ranges[name][0]
        return ids, epochs

    def read(self, example_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Reads examples, as `Rows.read` does."""
        ranges = self.ranges
        sources = np.searchsorted([end for _, end in ranges.values()], example_ids, "right")
        places, batches = [], []
        for source, (name, rows) in enumerate(self.rows.items()):
            mine = np.flatnonzero(sources == source)
            if len(mine):
                places.append(mine)
                batches.append(rows.read(example_ids[mine] - ranges[name][0]))
        back = np.argsort(np.concatenate(places))
        return {name: np.concatenate([batch[name] for batch in batches])[back] for name in batches[0]}

    def epochs(self, visited: np.ndarray) -> dict[str, float]:
        """How often each source has been gone through after so many examples of it."""
        return {name: float(count) / len(rows) for (name, rows), count in zip(self.rows.items(), visited, strict=True)}


def training_rows(corpus: Corpus, cfg: Config, stage: StageConfig) -> Rows | Mixture:
    """What a stage draws its examples from."""
    if not corpus.parts:
        return Rows(corpus.path, stage.seq_len)
    rows = {
        source.name: Rows(corpus.parts[source.name].path, stage.seq_len, languages=cfg.languages(source.language))
        for source in cfg.data.sources
    }
    return Mixture(rows, whole_parts(example_shares(corpus, cfg, stage)))


def example_shares(corpus: Corpus, cfg: Config, stage: StageConfig) -> np.ndarray:
    """The share of each source in a stage's examples, float64 [sources].

    Its tokens, of rows of the stage's length, are in proportion to weight · tokens^alpha; where rows of a source are less
    full than another's, it takes more of them.
    """
    counts = [part.manifest["rows"][str(stage.seq_len)]["train"] for part in corpus.parts.values()]
    tokens = np.array([count["tokens_and_specials"] for count in counts], float)
    rows = np.array([count["rows"] for count in counts], float)
    # Of the largest, so that a power overflows nothing.
    shares = np.array(cfg.weights(stage)) * (tokens / tokens.max()) ** cfg.data.alpha * rows / tokens
    return shares / shares.sum()


def whole_parts(shares: Sequence[float] | np.ndarray) -> np.ndarray:
    """Shares as whole numbers with the sum PERIOD, the nearest there are; at least 1 where a share is not 0."""
    exact = np.asarray(shares, float) * PERIOD
    parts = np.maximum(np.floor(exact), exact > 0).astype(np.int64)
    missing = PERIOD - int(parts.sum())
    if missing >= 0:
        parts[np.argsort(parts - exact, kind="stable")[:missing]] += 1
    else:
        parts[np.argmax(parts)] += missing
    return parts


def _permutation(count: int, key: str) -> np.ndarray:
    """A permutation from a bit generator's raw output, which NumPy keeps between versions (NEP 19)."""
    bits = np.random.PCG64(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest()))
    return np.argsort(bits.random_raw(count), kind="stable")
