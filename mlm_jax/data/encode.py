"""The two passes over a source: a sample that the tokenizer is trained on, then every document tokenised into units.

The parent process streams the text, worker processes train and tokenise. `prepare` then packs what they leave.
"""

import dataclasses
import functools
import hashlib
import heapq
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from mlm_jax.config import Config, TokenizerConfig
from mlm_jax.data import atomic, images, pairs, pool, progress, units
from mlm_jax.data.corpus import check_vocabulary
from mlm_jax.data.sources import Source, changed
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

UNIT_BYTES = 4 * 2**20  # text in a unit: a second or two of a worker's time, and what a restart may lose per worker


@dataclasses.dataclass(frozen=True)
class Totals:
    """What a pass over a source, or over a part of one, has read."""

    documents: int
    text_bytes: int
    hash_sum: int  # of the documents' hashes, modulo 2^128: whatever their order

    def __add__(self, other: "Totals") -> "Totals":
        hash_sum = (self.hash_sum + other.hash_sum) % 2**128
        return Totals(self.documents + other.documents, self.text_bytes + other.text_bytes, hash_sum)


class Counter:
    """Adds up the totals of a pass."""

    def __init__(self) -> None:
        self._totals = Totals(0, 0, 0)

    def add(self, text: bytes) -> bytes:
        """Returns the document's hash."""
        document_hash = units.document_hash(text)
        self._totals += Totals(1, len(text), int.from_bytes(document_hash))
        return document_hash

    def totals(self) -> Totals:
        return self._totals


def remembering(source: Source, limit_bytes: int) -> Source:
    """The same source, read only once if all of its text fits into `limit_bytes`: some sources are slow to stream."""
    whole: list[str] | None = None

    def documents() -> Iterator[str]:
        nonlocal whole
        if whole is not None:
            yield from whole
            return
        kept: list[str] = []
        size = 0
        for document in source.documents():
            size += len(document.encode())
            if size <= limit_bytes:
                kept.append(document)
            else:
                kept.clear()
            yield document
        if size <= limit_bytes:
            whole = kept

    return dataclasses.replace(source, documents=documents)


class Sample:
    """Of documents that come in any order, the different ones with the largest hashes: just enough for `sample_bytes`.

    Documents are held out from the other end of the hashes, and those whose hash begins with 64 bits below `held_out_below`
    are left out here, so that the tokenizer does not know the validation split.
    """

    def __init__(self, sample_bytes: int, held_out_below: int):
        self._most, self._held_out_below = sample_bytes, held_out_below
        self._kept: list[tuple[bytes, bytes]] = []  # a heap: the smallest hash first
        self._hashes: set[bytes] = set()
        self._bytes = 0

    def add(self, document_hash: bytes, text: bytes) -> None:
        if document_hash in self._hashes or int.from_bytes(document_hash[:8]) < self._held_out_below:
            return
        if self._bytes >= self._most and document_hash < self._kept[0][0]:
            return
        heapq.heappush(self._kept, (document_hash, text))
        self._hashes.add(document_hash)
        self._bytes += len(text)
        while self._bytes - len(self._kept[0][1]) >= self._most:
            smallest, dropped = heapq.heappop(self._kept)
            self._hashes.remove(smallest)
            self._bytes -= len(dropped)

    def __add__(self, other: "Sample") -> "Sample":
        both = Sample(self._most, self._held_out_below)
        for document_hash, text in (*self._kept, *other._kept):
            both.add(document_hash, text)
        return both

    def texts(self) -> list[bytes]:
        """What is in the sample, ordered by hash."""
        return [text for _, text in sorted(self._kept)]


def sample(source: Source, sample_bytes: int, held_out_below: int) -> tuple[list[bytes], Totals]:
    """Draws a `Sample` in one pass; returns its texts, UTF-8, and the totals of the pass."""
    counter, drawn = Counter(), Sample(sample_bytes, held_out_below)
    with progress.shown("sampling text for the tokenizer", total_bytes=source.size_bytes) as advance:
        for document in source.documents():
            text = document.encode()
            drawn.add(counter.add(text), text)
            advance(text_bytes=len(text))
    return drawn.texts(), counter.totals()


def balanced(drawn: Sequence[tuple[list[bytes], Totals]], sample_bytes: int, alpha: float) -> list[list[bytes]]:
    """Of the samples of several sources, as much that a source's part is in proportion to its bytes of text^alpha.

    All together have `sample_bytes`, as each sample has; a source with less text than its part gives what it has.

    Source: XLM-R section 3 (Conneau et al., 2020): the sample of its tokenizer is drawn as its batches are.
    """
    sizes = np.array([totals.text_bytes for _, totals in drawn], float) ** alpha
    parts = sample_bytes * sizes / sizes.sum()
    # From the largest hash on, as `sample` chooses, and as many as reach the source's part.
    kept = []
    for (texts, _), part in zip(drawn, parts, strict=True):
        before = np.cumsum([0, *(len(text) for text in reversed(texts))])[:-1]
        kept.append(texts[len(texts) - int((before < part).sum()) :])
    return kept


def make_tokenizer(
    cfg: Config,
    directory: pathlib.Path,
    building: pathlib.Path,
    draw: Callable[[], list[bytes]],
    given: Tokenizer | None,
) -> Tokenizer:
    """Copies a corpus's tokenizer to `directory`, or trains it on texts, unless an earlier run has; returns it.

    Args:
        building: the folder for unfinished work.
        draw: gives the texts, and is called only if it is to be trained.
        given: the tokenizer, where it is known.
    """
    if not directory.exists():
        partial = building / "tokenizer"
        shutil.rmtree(partial, ignore_errors=True)
        if given is not None:
            given.save(partial)
        elif cfg.tokenizer.algorithm == "pretrained":
            pretrained = load_tokenizer(cfg.tokenizer.path)
            check_vocabulary(pretrained, cfg)
            pretrained.save(partial)
        else:
            texts = draw()
            stage = f"training the {cfg.tokenizer.algorithm} tokenizer on {sum(map(len, texts)) / 1e6:.1f} MB"
            with progress.shown(stage), pool.started(1) as executor:
                executor.submit(train, cfg.tokenizer, texts, str(partial)).result()
        with atomic.telling_faults(directory):
            for path in partial.iterdir():
                atomic.flush(path)
            os.replace(partial, directory)
    return load_tokenizer(directory)


def train(cfg: TokenizerConfig, texts: Sequence[bytes], directory: str) -> None:
    """Trains a tokenizer and saves it. Runs in a worker process, which gives its memory back and can be stopped."""
    documents = (images.split(text.decode())[0] for text in texts)
    train_tokenizer(cfg, (document.replace(pairs.MARK, "\n") for document in documents)).save(directory)


def encode(
    source: Source,
    building: pathlib.Path,
    tokenizer_directory: pathlib.Path,
    executor: ProcessPoolExecutor,
    workers: int,
    expected: Totals | None,
) -> tuple[list[pathlib.Path], list[units.UnitSummary], Totals]:
    """Tokenises every document into unit files; units that an interrupted run has finished are kept.

    Args:
        expected: the totals of an earlier pass over the same source.

    Returns:
        The units' paths, their summaries in no fixed order, and the totals of the pass.

    Raises:
        UserError: the source is no longer what it was when the corpus was begun.
    """
    counter = Counter()
    paths: list[pathlib.Path] = []
    on_disk = {
        int(path.name.split("-")[1]): path for path in building.glob("unit-*") if path.suffix != atomic.TEMPORARY_SUFFIX
    }
    summaries: list[units.UnitSummary] = []

    def calls() -> Iterator[Callable[[], units.UnitSummary]]:
        for index, texts in enumerate(grouped(source.documents())):
            content_hash = hashlib.blake2b(b"".join(map(counter.add, texts)), digest_size=16).hexdigest()
            path = building / f"unit-{index:06d}-{content_hash}"
            paths.append(path)
            finished = on_disk.pop(index, None)
            if finished is not None and finished != path:
                raise changed(source.uri, building)
            if finished is not None:
                report(units.summarise(path))
            else:
                yield functools.partial(units.encode_unit, texts, path, str(tokenizer_directory))

    total_bytes = source.size_bytes if expected is None else expected.text_bytes
    with progress.shown("tokenising", total_bytes=total_bytes) as advance:

        def report(summary: units.UnitSummary) -> None:
            summaries.append(summary)
            advance(text_bytes=summary.text_bytes, tokens=summary.tokens)

        for summary in pool.completed(executor, calls(), limit=2 * workers + 1):
            report(summary)
    totals = counter.totals()
    if on_disk or (expected is not None and totals != expected):
        raise changed(source.uri, building)
    return paths, summaries, totals


def grouped(documents: Iterator[str]) -> Iterator[list[bytes]]:
    """Cuts a stream into units of `UNIT_BYTES` or a little more, UTF-8."""
    texts: list[bytes] = []
    size = 0
    for document in documents:
        texts.append(document.encode())
        size += len(texts[-1])
        if size >= UNIT_BYTES:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts
