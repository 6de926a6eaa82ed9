"""Masking: which tokens of a row are predicted, and what the encoder sees in their place.

Pure functions of per-example keys, called inside the jitted step by `objectives/`; imports nothing of ours.

Everything is computed for one row and mapped over the batch, with static shapes and no communication. As a row's key
depends on the row alone, its mask does not depend on its neighbours, the mesh, or the number of processes.

`batch` masks a batch by one of the policies: single tokens (here too), `words`, `spans`, and `ngrams` from a list.
`streams` names what else is drawn from the same keys.
"""

from mlm_jax.masking import streams
from mlm_jax.masking.batch import MaskedBatch, choose_tokens, example_keys, mask_tokens, num_slots
from mlm_jax.masking.ngrams import NgramTable
from mlm_jax.masking.spans import SpanEnds, span_ends
from mlm_jax.masking.tables import VocabTables

__all__ = [
    "MaskedBatch",
    "NgramTable",
    "SpanEnds",
    "VocabTables",
    "choose_tokens",
    "example_keys",
    "mask_tokens",
    "num_slots",
    "span_ends",
    "streams",
]
