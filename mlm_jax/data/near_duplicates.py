"""Near duplicates: which of the documents that share most of their word n-grams is kept.

A document is left out if another that ranks higher is as similar as `data.filters.near_duplicates`. Similarity is estimated
by MinHash, and only documents are compared that agree in one band of their signatures at least. All of this is a function of
the set of documents, so that order, workers and machines do not matter.

Source: Broder, "On the resemblance and containment of documents", 1997; bands: Leskovec, Rajaraman and Ullman, "Mining of
    massive datasets", section 3.4. The signatures are rensa's.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from mlm_jax.config import FiltersConfig
from mlm_jax.data import images, pairs
from mlm_jax.data.words import split_words
from mlm_jax.errors import UserError, install

_FOUND = 0.95  # the share of pairs exactly as similar as the limit that agree in some band
_COMPARED = 256  # signatures at a time: most near duplicates are so of the first one


def signature(text: str, cfg: FiltersConfig) -> np.ndarray:
    """The MinHash signature of a document's n-grams, lower-cased; uint32 [minhashes]. A short one is its only n-gram."""
    try:
        from rensa import RMinHash  # an optional extra
    except ImportError:
        raise UserError(f"data.filters.near_duplicates needs the extra 'filters': {install('filters')}") from None
    words = split_words(images.split(text)[0].replace(pairs.MARK, "\n").lower())
    minhash = RMinHash(num_perm=cfg.minhashes, seed=0)
    count = max(1, len(words) - cfg.ngram_words + 1)
    minhash.update([" ".join(words[start : start + cfg.ngram_words]) for start in range(count)])
    return np.array(minhash.digest(), np.uint32)


def bands(cfg: FiltersConfig) -> list[slice]:
    """The parts of a signature that agree as wholes: as long as they may be for `_FOUND`, since long ones agree seldom."""
    hashes, similarity = cfg.minhashes, cfg.near_duplicates

    def found(length: int) -> float:
        return 1.0 - (1.0 - similarity**length) ** (hashes // length)

    length = max((length for length in range(1, hashes + 1) if found(length) >= _FOUND), default=1)
    return [slice(start, start + length) for start in range(0, hashes - length + 1, length)]


def lower_ranked(signatures: Mapping[str, np.ndarray], similarity: float) -> Iterator[str]:
    """Of documents that agree in a band, by their ranks: those that have as similar a one above themselves."""
    ranks = sorted(signatures, reverse=True)
    matrix = np.stack([signatures[rank] for rank in ranks])
    for place in range(1, len(ranks)):
        for start in range(0, place, _COMPARED):
            above = matrix[start : min(start + _COMPARED, place)]
            if ((above == matrix[place]).mean(axis=1) >= similarity).any():
                yield ranks[place]
                break


def near_duplicates(signatures: Mapping[str, np.ndarray], cfg: FiltersConfig) -> set[str]:
    """The ranks of all documents that are left out, by comparing within every band."""
    ranks = list(signatures)
    left_out: set[str] = set()
    if len(ranks) < 2:
        return left_out
    matrix = np.stack(list(signatures.values()))
    for band in bands(cfg):
        keys = np.ascontiguousarray(matrix[:, band])
        keys = keys.view(f"V{keys.itemsize * keys.shape[1]}").ravel()
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.append(True, keys[order][1:] != keys[order][:-1]))
        for group in np.split(order, starts[1:]):
            if len(group) > 1:
                left_out.update(lower_ranked({ranks[index]: matrix[index] for index in group}, cfg.near_duplicates))
    return left_out
