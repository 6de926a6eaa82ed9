"""A source cut down to a number of words: `data.max_words`.

`prepare` does it before anything else reads the source, so the tokenizer and the held-out split come from what is left.
"""

import dataclasses
import heapq
from collections.abc import Iterator

from mlm_jax.data import progress, units
from mlm_jax.data.sources import Source
from mlm_jax.data.words import count_words
from mlm_jax.errors import UserError


def find_limit(source: Source, max_words: int, *, deduplicate: bool, held_out_below: int) -> str:
    """Finds the documents that are taken, in one pass: see `limited`.

    Documents are taken in the order of their ranks, the highest first, until the next one would bring the training split
    above `max_words`. So the order of reading does not matter, and what is taken is a fair sample of the source.

    Args:
        max_words: of the training split, which documents are not counted for whose hash begins with 64 bits below
            `held_out_below`; nor are repetitions, if `deduplicate` drops them.

    Returns:
        The rank, hexadecimal, of the first document that is not taken; empty when there is none.

    Raises:
        UserError: the first document has more words than that.
    """
    heap: list[str] = []  # the ranks of the documents that are taken of those that were read
    words: dict[str, int] = {}  # by rank
    total, first_left = 0, ""
    with progress.shown("counting words", total_bytes=source.size_bytes) as advance:
        for document in source.documents():
            text = document.encode()
            advance(text_bytes=len(text))
            document_hash = units.document_hash(text)
            rank = _rank(document_hash)
            if int.from_bytes(document_hash[:8]) < held_out_below or rank <= first_left or (deduplicate and rank in words):
                continue
            if rank not in words:
                heapq.heappush(heap, rank)
            count = count_words(document)
            words[rank] = words.get(rank, 0) + count
            total += count
            while total > max_words:
                first_left = heapq.heappop(heap)
                total -= words.pop(first_left)
    if first_left and not heap:
        raise UserError(
            f"data.max_words={max_words} is less than the first document of {source.uri} has: raise it, or cut the "
            "documents smaller (?documents=blank_line for .txt files)"
        )
    return first_left


def limited(source: Source, first_left: str) -> Source:
    """The documents of a source that rank above the one that `find_limit` returned, of both splits."""

    def documents() -> Iterator[str]:
        return (text for text in source.documents() if _rank(units.document_hash(text.encode())) > first_left)

    return dataclasses.replace(source, documents=documents, size_bytes=None)


def _rank(document_hash: bytes) -> str:
    """The hash with its halves exchanged: the first half decides the split, so that each is thinned out alike."""
    return (document_hash[8:] + document_hash[:8]).hex()
