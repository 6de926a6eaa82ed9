"""A source cut down to a number of words: `data.max_words`.

`prepare` does it before anything else reads the source, so the tokenizer and the held-out split come from what is left.
"""

import dataclasses
import functools
import heapq
from collections.abc import Callable, Iterator

from mlm_jax.data import images, progress, units
from mlm_jax.data.sources import Source, in_parts
from mlm_jax.data.words import count_words
from mlm_jax.errors import UserError


class Taken:
    """Of documents that come in any order, those with the highest ranks, up to the first that exceeds `max_words`.

    Documents are not taken whose hash begins with 64 bits below `held_out_below`, nor repetitions, if `deduplicate`.
    """

    def __init__(self, max_words: int, *, deduplicate: bool, held_out_below: int):
        self._most, self._deduplicate, self._held_out_below = max_words, deduplicate, held_out_below
        self._heap: list[str] = []  # the ranks of the documents that are taken of those that were read
        self._words: dict[str, int] = {}  # by rank
        self._total, self._first_left = 0, ""

    def add(self, document: str) -> None:
        document_hash = units.document_hash(document.encode())
        rank = units.rank(document_hash)
        if int.from_bytes(document_hash[:8]) >= self._held_out_below and self._may_take(rank):
            self._take(rank, count_words(images.split(document)[0]))

    def __add__(self, other: "Taken") -> "Taken":
        both = Taken(self._most, deduplicate=self._deduplicate, held_out_below=self._held_out_below)
        both._first_left = max(self._first_left, other._first_left)
        for rank, words in (*self._words.items(), *other._words.items()):
            if both._may_take(rank):
                both._take(rank, words)
        return both

    def _may_take(self, rank: str) -> bool:
        return rank > self._first_left and not (self._deduplicate and rank in self._words)

    def _take(self, rank: str, words: int) -> None:
        if rank not in self._words:
            heapq.heappush(self._heap, rank)
        self._words[rank] = self._words.get(rank, 0) + words
        self._total += words
        while self._total > self._most:
            self._first_left = heapq.heappop(self._heap)
            self._total -= self._words.pop(self._first_left)

    def limit(self, uri: str) -> str:
        """The rank, hexadecimal, of the first document that is not taken; empty when there is none.

        Raises:
            UserError: none is taken.
        """
        if self._first_left and not self._heap:
            raise UserError(
                f"data.max_words={self._most} is less than the first document of {uri} has: raise it, or cut the documents "
                "smaller (?documents=blank_line for .txt files)"
            )
        return self._first_left


def find_limit(source: Source, max_words: int, *, deduplicate: bool, held_out_below: int) -> str:
    """Finds, in one pass, the documents that are taken, for `limited`; see `Taken`.

    So the order of reading does not matter, and what is taken is a fair sample of the source.
    """
    taken = Taken(max_words, deduplicate=deduplicate, held_out_below=held_out_below)
    with progress.shown("counting words", total_bytes=source.size_bytes) as advance:
        for document in source.documents():
            advance(text_bytes=len(document.encode()))
            taken.add(document)
    return taken.limit(source.uri)


def limited(source: Source, first_left: str) -> Source:
    """The documents of a source that rank above the one that `find_limit` returned, of both splits."""

    parts = tuple(functools.partial(_above, part, first_left) for part in source.pieces)
    return dataclasses.replace(in_parts(source.uri, parts, None, source.description), images=source.images)


def _above(documents: Callable[[], Iterator[str]], first_left: str) -> Iterator[str]:
    return (text for text in documents() if units.rank(units.document_hash(text.encode())) > first_left)
