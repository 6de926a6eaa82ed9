"""Which documents of a source are kept: `data.filters` applied in one pass, before anything else reads the source.

A pass leaves one file for each part of the source, with a number for each document: 0, or the rule that dropped it. Every
later pass reads the source through these files (`selected`), so what the rules cost is paid once.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlm_jax.config import FiltersConfig
from mlm_jax.data import atomic, filters, near_duplicates, units
from mlm_jax.data.sources import Source, changed, in_parts
from mlm_jax.errors import MachineError, UserError

_log = logging.getLogger(__name__)

_SUMMARY = "summary.json"
OF_RULE = {"": 0} | {rule: number for number, rule in enumerate(filters.RULES, start=1)}


@dataclasses.dataclass(frozen=True)
class Inspected:
    """What the rules say of documents, and what comparing them needs.

    Attributes:
        codes: uint8 [documents], 0 or the number of the rule that drops it.
        ranks: of each document (see `units.rank`).
        signatures: uint32 [documents that are kept, minhashes]; none unless near duplicates are looked for.
    """

    codes: np.ndarray
    ranks: tuple[str, ...]
    signatures: np.ndarray

    def signed(self) -> Iterator[tuple[int, str, np.ndarray]]:
        """The place, rank and signature of each document that has one."""
        kept = np.flatnonzero(self.codes == 0).tolist()
        return ((place, self.ranks[place], row) for place, row in zip(kept, self.signatures, strict=False))


def inspect(texts: Sequence[bytes], cfg: FiltersConfig) -> Inspected:
    """Applies the rules to documents, given as UTF-8. Runs in a worker process."""
    decoded = [text.decode() for text in texts]
    codes = np.array([OF_RULE[filters.dropping_rule(text, cfg)] for text in decoded], np.uint8)
    kept = [text for text, code in zip(decoded, codes, strict=True) if not code] if cfg.near_duplicates else []
    signatures = [near_duplicates.signature(text, cfg) for text in kept]
    ranks = tuple(units.rank(units.document_hash(text)) for text in texts)
    return Inspected(codes, ranks, np.array(signatures, np.uint32).reshape(len(kept), cfg.minhashes))


def drop_near_duplicates(found: Sequence[Inspected], cfg: FiltersConfig) -> None:
    """Sets the codes of near duplicates among all documents, of which half a kilobyte each is held in memory."""
    signatures = {rank: signature for part in found for _, rank, signature in part.signed()}
    left_out = near_duplicates.near_duplicates(signatures, cfg)
    for part in found:
        for place, rank, _ in part.signed():
            if rank in left_out:
                part.codes[place] = OF_RULE[filters.NEAR_DUPLICATES]


class Digest:
    """How many documents of a part were read, and a hash of them in their order."""

    def __init__(self) -> None:
        self.documents, self._hash = 0, hashlib.blake2b(digest_size=16)

    def through(self, documents: Iterator[str]) -> Iterator[str]:
        """The documents, each counted before it is given."""
        for text in documents:
            self.documents += 1
            self._hash.update(units.document_hash(text.encode()))
            yield text

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def write_part(folder: pathlib.Path, number: int, codes: np.ndarray, digest: str) -> collections.Counter[str]:
    """Writes what was decided of a part's documents, and counts it by rule ("" is kept)."""
    with atomic.replacing(_part_path(folder, number)) as temporary, open(temporary, "wb") as file:
        np.savez(file, codes=codes, digest=np.array(digest))
    counts = np.bincount(codes, minlength=len(OF_RULE)).tolist()
    return collections.Counter(dict(zip(OF_RULE, counts, strict=True)))


def write_summary(folder: pathlib.Path, counts: Mapping[str, int]) -> None:
    """Marks the pass as done."""
    dropped = {rule: counts[rule] for rule in filters.RULES if counts.get(rule)}
    with atomic.replacing(folder / _SUMMARY) as temporary:
        temporary.write_text(json.dumps({"documents": sum(counts.values()), "dropped": dropped}))


def read_summary(folder: pathlib.Path) -> dict[str, Any] | None:
    """How many documents there were, and how many each rule dropped; None where there was no (whole) pass."""
    path = folder / _SUMMARY
    return json.loads(path.read_bytes()) if path.exists() else None


def selected(source: Source, folder: pathlib.Path) -> Source:
    """The documents that are kept.

    Raises:
        UserError: none are.
    """
    summary = read_summary(folder)
    assert summary is not None, "no pass over the source was finished"
    dropped = ", ".join(f"{rule} {count}" for rule, count in summary["dropped"].items())
    if sum(summary["dropped"].values()) == summary["documents"]:
        raise UserError(
            f"{source.uri} is empty after the filters: of {summary['documents']} document(s) data.filters dropped all"
            f" ({dropped}); loosen them"
        )
    _log.info("of %d documents the filters dropped: %s", summary["documents"], dropped or "none")
    parts = tuple(
        functools.partial(_kept, piece, _part_path(folder, number), source.uri) for number, piece in enumerate(source.pieces)
    )
    kept = in_parts(source.uri, parts, source.size_bytes, source.description)
    return dataclasses.replace(kept, images=source.images)


def _kept(piece: Callable[[], Iterator[str]], path: pathlib.Path, uri: str) -> Iterator[str]:
    try:
        with np.load(path) as decided:
            codes, wanted = decided["codes"], str(decided["digest"])
    except (OSError, ValueError) as error:
        raise MachineError(f"{path} cannot be read: {error}; delete {path.parent} and prepare the corpus again") from error
    digest = Digest()
    for text in digest.through(piece()):
        if digest.documents > len(codes):
            break
        if codes[digest.documents - 1] == 0:
            yield text
    if digest.documents != len(codes) or digest.hexdigest() != wanted:
        raise changed(uri, path.parent.parent)


def _part_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"{number:05d}.npz"
