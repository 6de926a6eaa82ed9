"""Where the passes over a source run: the worker processes of this machine here, a Beam pipeline in `data/beam_runner.py`.

`prepare` decides what is done, in which order; a runner only how. Both leave the same files.
"""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from mlm_jax.config import FiltersConfig
from mlm_jax.data import encode, limit, pool, progress, selection, shards, units
from mlm_jax.data.sources import Source

Plan = Callable[[Sequence[units.UnitSummary]], list[shards.Bucket]]


class Runner(Protocol):
    """The passes. Each may be interrupted at any point; what it has finished in the folder `building` is kept."""

    def select(self, source: Source, cfg: FiltersConfig, folder: pathlib.Path) -> None:
        """Applies the filters, and leaves in `folder` what `selection.selected` reads."""

    def find_limit(
        self, source: Source, building: pathlib.Path, max_words: int, *, deduplicate: bool, held_out_below: int
    ) -> str:
        """See `limit.find_limit`."""

    def sample(
        self, source: Source, building: pathlib.Path, sample_bytes: int, held_out_below: int
    ) -> tuple[list[bytes], encode.Totals]:
        """See `encode.sample`."""

    def pack(
        self,
        source: Source,
        building: pathlib.Path,
        tokenizer_directory: pathlib.Path,
        row_format: shards.RowFormat,
        plan: Plan,
        expected: encode.Totals | None,
    ) -> tuple[list[shards.BucketSummary], int, encode.Totals]:
        """Tokenises the source and packs it, bucket by bucket, into shards.

        Args:
            plan: gives the buckets, when it is known what tokenising has found.
            expected: the totals of an earlier pass over the same source.

        Returns:
            The buckets' summaries in the order of hashes, the number of documents without a token, the pass's totals.

        Raises:
            UserError: the source is no longer what it was when the corpus was begun.
        """


@dataclasses.dataclass(frozen=True)
class LocalRunner:
    """One process that reads, and workers for the rest."""

    workers: int

    def __str__(self) -> str:
        return f"{self.workers} worker(s)"

    def select(self, source: Source, cfg: FiltersConfig, folder: pathlib.Path) -> None:
        digests: list[selection.Digest] = []

        def documents() -> Iterator[str]:
            for piece in source.pieces:
                digests.append(selection.Digest())
                yield from digests[-1].through(piece())

        def calls() -> Iterator[Callable[[], tuple[int, selection.Inspected]]]:
            for number, texts in enumerate(encode.grouped(documents())):
                advance(text_bytes=sum(map(len, texts)))
                yield functools.partial(_numbered, number, texts, cfg)

        shown = progress.shown("applying the filters", total_bytes=source.size_bytes)
        with shown as advance, pool.started(self.workers) as executor:
            inspected = sorted(pool.completed(executor, calls(), limit=2 * self.workers + 1))
        found = [one for _, one in inspected]
        selection.drop_near_duplicates(found, cfg)
        codes = np.concatenate([one.codes for one in found])
        counts: collections.Counter[str] = collections.Counter()
        for number, digest in enumerate(digests):
            counts += selection.write_part(folder, number, codes[: digest.documents], digest.hexdigest())
            codes = codes[digest.documents :]
        selection.write_summary(folder, counts)

    def find_limit(
        self, source: Source, building: pathlib.Path, max_words: int, *, deduplicate: bool, held_out_below: int
    ) -> str:
        return limit.find_limit(source, max_words, deduplicate=deduplicate, held_out_below=held_out_below)

    def sample(
        self, source: Source, building: pathlib.Path, sample_bytes: int, held_out_below: int
    ) -> tuple[list[bytes], encode.Totals]:
        return encode.sample(source, sample_bytes, held_out_below)

    def pack(
        self,
        source: Source,
        building: pathlib.Path,
        tokenizer_directory: pathlib.Path,
        row_format: shards.RowFormat,
        plan: Plan,
        expected: encode.Totals | None,
    ) -> tuple[list[shards.BucketSummary], int, encode.Totals]:
        with pool.started(self.workers) as executor:
            paths, found, totals = encode.encode(source, building, tokenizer_directory, executor, self.workers, expected)
            calls = (functools.partial(shards.pack_bucket, bucket, row_format, paths, building) for bucket in plan(found))
            summaries = []
            with progress.shown("packing", total_tokens=sum(unit.tokens for unit in found)) as advance:
                for summary in pool.completed(executor, calls, limit=2 * self.workers):
                    summaries.append(summary)
                    advance(tokens=summary.tokens)
        summaries.sort(key=lambda summary: summary.bucket.lower)
        return summaries, sum(unit.blank for unit in found), totals


def _numbered(number: int, texts: Sequence[bytes], cfg: FiltersConfig) -> tuple[int, selection.Inspected]:
    return number, selection.inspect(texts, cfg)
