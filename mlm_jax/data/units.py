"""Tokenised pieces of a corpus on disk, before packing: one file per few megabytes of text, sorted by document hash.

Workers of `prepare` write units as they tokenise; `data/shards.py` gathers each range of hashes from all of them.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from mlm_jax.data import atomic, images, pairs
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from mlm_jax.data.words import count_words
from mlm_jax.errors import MachineError

# A unit file is this header, then hashes uint64 [documents, 2], token ends and words int64 [documents], token ids [tokens];
# of texts with images, then their names, UTF-8 [documents] of one width.
_HEADER = np.dtype([(name, "<i8") for name in ("documents", "tokens", "blank", "text_bytes", "id_bytes")])
_IMAGE_MARK = images.MARK.encode()


@dataclasses.dataclass(frozen=True)
class UnitSummary:
    """What a unit holds. The hashes are the first 64 bits of the smallest and the largest document hash."""

    documents: int
    tokens: int
    blank: int  # documents that the tokenizer leaves nothing of
    text_bytes: int
    smallest_hash: int
    largest_hash: int

    def __add__(self, other: "UnitSummary") -> "UnitSummary":
        return UnitSummary(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.blank + other.blank,
            self.text_bytes + other.text_bytes,
            min(self.smallest_hash, other.smallest_hash),
            max(self.largest_hash, other.largest_hash),
        )


@dataclasses.dataclass(frozen=True)
class Documents:
    """Tokenised documents in the order of their hashes.

    Attributes:
        hashes: uint64 [documents, 2], the 128 bits of each document's hash, most significant first.
        starts: int64 [documents], where a document's tokens begin in `tokens`.
        lengths: int64 [documents], in tokens.
        words: int64 [documents], of the text.
        tokens: [all tokens], in no particular order of documents.
        images: bytes [documents], the names of their images in UTF-8, empty where they have none.
    """

    hashes: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    words: np.ndarray
    tokens: np.ndarray
    images: np.ndarray

    def take(self, chosen: np.ndarray) -> "Documents":
        of_each = (self.hashes[chosen], self.starts[chosen], self.lengths[chosen], self.words[chosen])
        return Documents(*of_each, self.tokens, self.images[chosen])

    def between(self, lower: int, upper: int) -> "Documents":
        """Those whose hash begins with 64 bits in lower … upper - 1, where tokens are in the order of documents; copies."""
        first = np.searchsorted(self.hashes[:, 0], np.uint64(lower), "left")
        last = np.searchsorted(self.hashes[:, 0], np.uint64(upper - 1), "right")
        lengths = np.array(self.lengths[first:last])
        starts = np.cumsum(lengths) - lengths
        begin = int(self.starts[first]) if len(lengths) else 0
        tokens = np.array(self.tokens[begin : begin + int(lengths.sum())])
        hashes, words, names = (np.array(array[first:last]) for array in (self.hashes, self.words, self.images))
        return Documents(hashes, starts, lengths, words, tokens, names)


def joined(parts: Iterable[Documents]) -> Documents:
    """The documents of all parts, each with its tokens in the order of documents, sorted by the whole hash.

    The result does not show which part a document came from; equal documents follow each other.
    """
    none, no_tokens, no_names = np.zeros(0, np.int64), np.zeros(0, np.uint16), np.zeros(0, "S1")
    empty = Documents(np.zeros((0, 2), np.uint64), none, none, none, no_tokens, no_names)  # for a bucket that has no part
    arrays = [(part.hashes, part.lengths, part.words, part.tokens, part.images) for part in (empty, *parts)]
    hashes, lengths, words, tokens, names = map(np.concatenate, zip(*arrays, strict=True))
    found = Documents(hashes, np.cumsum(lengths) - lengths, lengths, words, tokens, names)
    return found.take(np.lexsort((hashes[:, 1], hashes[:, 0])))


def document_hash(text: bytes) -> bytes:
    """The 128 bits that a document is known by: for its order, its duplicates and its split.

    The first half is of the image alone, where it has one: all texts of an image are in one split.
    """
    if _IMAGE_MARK in text:
        image = text.partition(_IMAGE_MARK)[2]
        return b"".join(hashlib.blake2b(part, digest_size=8).digest() for part in (image, text))
    return hashlib.blake2b(text, digest_size=16).digest()


def rank(document_hash: bytes) -> str:
    """The hash, hexadecimal, with its halves exchanged: what is chosen by it is chosen alike in both splits.

    The first half decides the split.
    """
    return (document_hash[8:] + document_hash[:8]).hex()


def smallest_dtype(limit: int) -> np.dtype:
    """The type for whole numbers in 0 … limit - 1: two bytes wherever that is enough."""
    return np.dtype(np.uint16 if limit <= 1 << 16 else np.int32)


@functools.cache
def _tokenizer(directory: str) -> Tokenizer:
    """Loaded once per worker process."""
    return load_tokenizer(directory)


def tokenise(texts: Sequence[bytes], tokenizer_directory: str) -> Documents:
    """Tokenises documents, given as UTF-8; without those of which nothing is left, and tokens in the order of documents."""
    tokenizer = _tokenizer(tokenizer_directory)
    hashes = np.frombuffer(b"".join(document_hash(text) for text in texts), ">u8").astype(np.uint64).reshape(-1, 2)
    decoded, names = zip(*(images.split(text.decode()) for text in texts), strict=True)
    ids = [pairs.encode(tokenizer, text) for text in decoded]
    lengths = np.array([len(one) for one in ids], np.int64)
    words = np.array([count_words(text) for text in decoded], np.int64)
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    order = order[lengths[order] > 0]
    tokens = np.concatenate([ids[i] for i in order]) if len(order) else np.zeros(0)
    lengths = lengths[order]
    tokens = tokens.astype(smallest_dtype(tokenizer.vocab_size))
    of_each = (hashes[order], np.cumsum(lengths) - lengths, lengths, words[order])
    return Documents(*of_each, tokens, np.array([name.encode() for name in names])[order])


def encode_unit(texts: Sequence[bytes], path: pathlib.Path, tokenizer_directory: str) -> UnitSummary:
    """Tokenises documents, given as UTF-8, and writes them as one unit. Runs in a worker process.

    Raises:
        MachineError: the file cannot be written.
    """
    documents = tokenise(texts, tokenizer_directory)
    header = np.zeros((), _HEADER)
    header["documents"], header["tokens"] = len(documents.lengths), len(documents.tokens)
    header["blank"], header["text_bytes"] = len(texts) - len(documents.lengths), sum(map(len, texts))
    header["id_bytes"] = documents.tokens.itemsize
    with atomic.replacing(path) as temporary, open(temporary, "wb") as file:
        for part in (header, documents.hashes, np.cumsum(documents.lengths), documents.words, documents.tokens):
            file.write(part.tobytes())
        if documents.images.any():
            file.write(documents.images.tobytes())
    return summarise(path)


def summarise(path: pathlib.Path) -> UnitSummary:
    """Reads what a finished unit holds.

    Raises:
        MachineError: the file is not as it was written.
    """
    header, documents = _read(path)
    return summary(documents, blank=int(header["blank"]), text_bytes=int(header["text_bytes"]))


def summary(documents: Documents, *, blank: int, text_bytes: int) -> UnitSummary:
    """Of documents that are sorted by hash."""
    bounds = (int(documents.hashes[0, 0]), int(documents.hashes[-1, 0])) if len(documents.hashes) else (2**64 - 1, 0)
    return UnitSummary(len(documents.lengths), len(documents.tokens), blank, text_bytes, *bounds)


def gather(paths: Sequence[pathlib.Path], lower: int, upper: int) -> Documents:
    """The documents of all units whose hash begins with 64 bits in lower … upper - 1; see `joined`."""
    return joined(_read(path)[1].between(lower, upper) for path in paths)


def _read(path: pathlib.Path) -> tuple[np.void, Documents]:
    """Maps a unit's header and documents into memory, so that only what is used is read."""
    try:
        content = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise MachineError(f"{path} cannot be read: {error}; delete it and start again") from error
    if len(content) < _HEADER.itemsize:
        raise MachineError(f"{path} is damaged ({len(content)} bytes); delete it and start again")
    header = content[: _HEADER.itemsize].view(_HEADER)[0]
    documents, tokens, id_bytes = (int(header[name]) for name in ("documents", "tokens", "id_bytes"))
    ends_at = _HEADER.itemsize + 16 * documents
    words_at = ends_at + 8 * documents
    tokens_at = words_at + 8 * documents
    images_at = tokens_at + id_bytes * tokens
    image_bytes, rest = divmod(len(content) - images_at, max(documents, 1))
    if image_bytes < 0 or rest:
        raise MachineError(f"{path} is damaged ({len(content)} bytes); delete it and start again")
    ends = content[ends_at:words_at].view("<i8")
    lengths = np.diff(ends, prepend=0)
    return header, Documents(
        hashes=content[_HEADER.itemsize : ends_at].view("<u8").reshape(-1, 2),
        starts=ends - lengths,
        lengths=lengths,
        words=content[words_at:tokens_at].view("<i8"),
        tokens=content[tokens_at:images_at].view(np.uint16 if id_bytes == 2 else np.int32),
        images=content[images_at:].view(f"S{image_bytes}") if image_bytes else np.zeros(documents, "S1"),
    )
