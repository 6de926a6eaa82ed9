"""What a segment id says of a token: which packed segment it belongs to, and which part of it.

The two sentences of a pair are parts of one segment: they attend to each other, and each counts its positions from 0. Ids
are int32 [B, L], of NumPy on the host and of JAX on the device; 0 is padding. Tokens whose whole ids are equal are one
stretch of text: no word, span or position reaches beyond it. Where a model has embeddings of languages, an id has its
token's language too.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # the processes that tokenise do without it
    import jax

Ids = TypeVar("Ids", "jax.Array", np.ndarray)

PART = 1 << 16  # added once for each part before a token's own


LANGUAGE = 1 << 24  # times the number of a token's language, counted from 1; 0 where nothing is said of it
MOST_LANGUAGES = 127


def attended(ids: Ids) -> Ids:
    """The segments alone, whose tokens attend to each other."""
    return ids & (PART - 1)


def languages(ids: Ids) -> Ids:
    """The number of each token's language."""
    return ids // LANGUAGE


def mark_languages(ids: np.ndarray, of_parts: Sequence[int]) -> np.ndarray:
    """Ids without languages, with those of the first and the second part; as they are where `of_parts` is empty."""
    if not of_parts:
        return ids
    parts = np.minimum(ids // PART, len(of_parts) - 1)
    return np.where(ids > 0, ids + LANGUAGE * np.asarray(of_parts, np.int32)[parts], 0).astype(np.int32)
