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
from mlm_jax.data import atomic, pairs, pool, progress, units
from mlm_jax.data.corpus import check_vocabulary
from mlm_jax.data.sources import Source
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from mlm_jax.errors import UserError

UNIT_BYTES = 4 * 2**20  # text in a unit: a second or two of a worker's time, and what a restart may lose per worker


@dataclasses.dataclass(frozen=True)
class Totals:
    """What one whole pass over a source read."""

    documents: int
    text_bytes: int
    content_hash: str  # of the documents in the source's order


class _Counter:
    """Adds up the totals of a pass."""

    def __init__(self) -> None:
        self._documents, self._text_bytes, self._hash = 0, 0, hashlib.blake2b(digest_size=16)

    def add(self, text: bytes) -> bytes:
        """Returns the document's hash."""
        document_hash = units.document_hash(text)
        self._documents += 1
        self._text_bytes += len(text)
        self._hash.update(document_hash)
        return document_hash

    def totals(self) -> Totals:
        return Totals(self._documents, self._text_bytes, self._hash.hexdigest())


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


def sample(source: Source, sample_bytes: int, held_out_below: int) -> tuple[list[bytes], Totals]:
    """Draws different documents with the largest hashes, just enough of them for `sample_bytes`, in one pass.

    The order of reading does not matter. Documents are held out from the other end of the hashes, and those whose hash
    begins with 64 bits below `held_out_below` are left out here, so the tokenizer does not know the validation split.

    Returns:
        The sample, UTF-8, ordered by hash; and the totals of the pass.
    """
    counter = _Counter()
    kept: list[tuple[bytes, bytes]] = []  # a heap: the smallest hash first
    hashes: set[bytes] = set()
    kept_bytes = 0
    with progress.shown("sampling text for the tokenizer", total_bytes=source.size_bytes) as advance:
        for document in source.documents():
            text = document.encode()
            document_hash = counter.add(text)
            advance(text_bytes=len(text))
            if document_hash in hashes or int.from_bytes(document_hash[:8]) < held_out_below:
                continue
            if kept_bytes >= sample_bytes and document_hash < kept[0][0]:
                continue
            heapq.heappush(kept, (document_hash, text))
            hashes.add(document_hash)
            kept_bytes += len(text)
            while kept_bytes - len(kept[0][1]) >= sample_bytes:
                smallest, dropped = heapq.heappop(kept)
                hashes.remove(smallest)
                kept_bytes -= len(dropped)
    return [text for _, text in sorted(kept)], counter.totals()


def balanced_sample(sources: Sequence[Source], sample_bytes: int, held_out_below: int, alpha: float) -> list[list[bytes]]:
    """`sample` of each source, whose part of `sample_bytes` is in proportion to its bytes of text^alpha.

    A source with less text than that gives what it has.

    Source: XLM-R section 3 (Conneau et al., 2020): the sample of its tokenizer is drawn as its batches are.
    """
    drawn = [sample(source, sample_bytes, held_out_below) for source in sources]
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
    train_tokenizer(cfg, (text.decode().replace(pairs.MARK, "\n") for text in texts)).save(directory)


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
    counter = _Counter()
    paths: list[pathlib.Path] = []
    on_disk = {
        int(path.name.split("-")[1]): path for path in building.glob("unit-*") if path.suffix != atomic.TEMPORARY_SUFFIX
    }
    summaries: list[units.UnitSummary] = []

    def calls() -> Iterator[Callable[[], units.UnitSummary]]:
        for index, (texts, content_hash) in enumerate(_grouped(source.documents(), counter)):
            path = building / f"unit-{index:06d}-{content_hash}"
            paths.append(path)
            finished = on_disk.pop(index, None)
            if finished is not None and finished != path:
                raise changed(source, building)
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
        raise changed(source, building)
    return paths, summaries, totals


def _grouped(documents: Iterator[str], counter: _Counter) -> Iterator[tuple[list[bytes], str]]:
    """Cuts the stream into units, each with a hash of its documents."""
    texts: list[bytes] = []
    size, content_hash = 0, hashlib.blake2b(digest_size=16)
    for document in documents:
        text = document.encode()
        content_hash.update(counter.add(text))
        texts.append(text)
        size += len(text)
        if size >= UNIT_BYTES:
            yield texts, content_hash.hexdigest()
            texts, size, content_hash = [], 0, hashlib.blake2b(digest_size=16)
    if texts:
        yield texts, content_hash.hexdigest()


def changed(source: Source, building: pathlib.Path) -> UserError:
    """What to raise when a later pass over a source does not read what an earlier one did."""
    return UserError(
        f"{source.uri}: the documents have changed since {building.parent} was begun; delete that directory and prepare"
        " it again, or bring the documents back as they were"
    )
