"""Tokenised pieces of a corpus on disk, before packing: one file per few megabytes of text, sorted by document hash.

Workers of `prepare` write units as they tokenise; `data/shards.py` gathers each range of hashes from all of them.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from mlm_jax.data import atomic, pairs
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from mlm_jax.data.words import count_words
from mlm_jax.errors import MachineError

# A unit file is this header, then hashes uint64 [documents, 2], token ends and words int64 [documents], token ids [tokens].
_HEADER = np.dtype([(name, "<i8") for name in ("documents", "tokens", "blank", "text_bytes", "id_bytes")])


@dataclasses.dataclass(frozen=True)
class UnitSummary:
    """What a unit holds. The hashes are the first 64 bits of the smallest and the largest document hash."""

    documents: int
    tokens: int
    blank: int  # documents that the tokenizer leaves nothing of
    text_bytes: int
    smallest_hash: int
    largest_hash: int


@dataclasses.dataclass(frozen=True)
class Documents:
    """Tokenised documents in the order of their hashes.

    Attributes:
        hashes: uint64 [documents, 2], the 128 bits of each document's hash, most significant first.
        starts: int64 [documents], where a document's tokens begin in `tokens`.
        lengths: int64 [documents], in tokens.
        words: int64 [documents], of the text.
        tokens: [all tokens], in no particular order of documents.
    """

    hashes: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    words: np.ndarray
    tokens: np.ndarray

    def take(self, chosen: np.ndarray) -> "Documents":
        return Documents(self.hashes[chosen], self.starts[chosen], self.lengths[chosen], self.words[chosen], self.tokens)


def document_hash(text: bytes) -> bytes:
    """The 128 bits that a document is known by: for its order, its duplicates and its split."""
    return hashlib.blake2b(text, digest_size=16).digest()


def smallest_dtype(limit: int) -> np.dtype:
    """The type for whole numbers in 0 … limit - 1: two bytes wherever that is enough."""
    return np.dtype(np.uint16 if limit <= 1 << 16 else np.int32)


@functools.cache
def _tokenizer(directory: str) -> Tokenizer:
    """Loaded once per worker process."""
    return load_tokenizer(directory)


def encode_unit(texts: Sequence[bytes], path: pathlib.Path, tokenizer_directory: str) -> UnitSummary:
    """Tokenises documents, given as UTF-8, and writes them as one unit. Runs in a worker process.

    Raises:
        MachineError: the file cannot be written.
    """
    tokenizer = _tokenizer(tokenizer_directory)
    hashes = np.frombuffer(b"".join(document_hash(text) for text in texts), ">u8").astype(np.uint64).reshape(-1, 2)
    decoded = [text.decode() for text in texts]
    ids = [pairs.encode(tokenizer, text) for text in decoded]
    lengths = np.array([len(one) for one in ids], np.int64)
    words = np.array([count_words(text) for text in decoded], np.int64)
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    order = order[lengths[order] > 0]
    tokens = np.concatenate([ids[i] for i in order]) if len(order) else np.zeros(0)
    tokens = tokens.astype(smallest_dtype(tokenizer.vocab_size))
    header = np.zeros((), _HEADER)
    header["documents"], header["tokens"], header["blank"] = len(order), len(tokens), len(texts) - len(order)
    header["text_bytes"], header["id_bytes"] = sum(map(len, texts)), tokens.itemsize
    with atomic.replacing(path) as temporary, open(temporary, "wb") as file:
        for part in (header, hashes[order], np.cumsum(lengths[order]), words[order], tokens):
            file.write(part.tobytes())
    return summarise(path)


def summarise(path: pathlib.Path) -> UnitSummary:
    """Reads what a finished unit holds.

    Raises:
        MachineError: the file is not as it was written.
    """
    header, hashes, _, _, _ = _arrays(path)
    numbers = {name: int(header[name]) for name in ("documents", "tokens", "blank", "text_bytes")}
    if not numbers["documents"]:
        return UnitSummary(**numbers, smallest_hash=2**64 - 1, largest_hash=0)
    return UnitSummary(**numbers, smallest_hash=int(hashes[0, 0]), largest_hash=int(hashes[-1, 0]))


def gather(paths: Sequence[pathlib.Path], lower: int, upper: int) -> Documents:
    """The documents of all units whose hash begins with 64 bits in lower … upper - 1, sorted by the whole hash.

    The result does not show which unit a document came from; equal documents follow each other.
    """
    hashes, lengths, words, tokens = [], [], [], []
    for path in paths:
        _, unit_hashes, ends, unit_words, unit_tokens = _arrays(path)
        first = np.searchsorted(unit_hashes[:, 0], np.uint64(lower), "left")
        last = np.searchsorted(unit_hashes[:, 0], np.uint64(upper - 1), "right")
        bounds = np.concatenate((ends[first - 1 : first] if first else [0], ends[first:last]))
        hashes.append(np.array(unit_hashes[first:last]))
        lengths.append(np.diff(bounds))
        words.append(np.array(unit_words[first:last]))
        tokens.append(np.array(unit_tokens[bounds[0] : bounds[-1]]))
    all_lengths = np.concatenate(lengths)
    starts = np.cumsum(all_lengths) - all_lengths
    found = Documents(np.concatenate(hashes), starts, all_lengths, np.concatenate(words), np.concatenate(tokens))
    return found.take(np.lexsort((found.hashes[:, 1], found.hashes[:, 0])))


def _arrays(path: pathlib.Path) -> tuple[np.void, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Maps a unit's header, hashes, token ends, words and tokens into memory, so that only what is used is read."""
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
    if len(content) != tokens_at + id_bytes * tokens:
        raise MachineError(f"{path} is damaged ({len(content)} bytes); delete it and start again")
    return (
        header,
        content[_HEADER.itemsize : ends_at].view("<u8").reshape(-1, 2),
        content[ends_at:words_at].view("<i8"),
        content[words_at:tokens_at].view("<i8"),
        content[tokens_at:].view(np.uint16 if id_bytes == 2 else np.int32),
    )
