"""What a segment id says of a token: which packed segment it belongs to, and which part of it.

The two sentences of a pair are parts of one segment: they attend to each other, and each counts its positions from 0. Ids
are int32 [B, L], of NumPy on the host and of JAX on the device; 0 is padding. Tokens whose whole ids are equal are one
stretch of text: no word, span or position reaches beyond it.
"""

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # the processes that tokenise do without it
    import jax

Ids = TypeVar("Ids", "jax.Array", np.ndarray)

PART = 1 << 16  # added once for each part before a token's own


def attended(ids: Ids) -> Ids:
    """The segments alone, whose tokens attend to each other."""
    return ids & (PART - 1)
