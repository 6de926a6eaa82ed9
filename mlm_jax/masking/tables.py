"""What masking has to know of a vocabulary, as arrays that a step looks up."""

import dataclasses

import jax
import numpy as np

from mlm_jax.masking.ngrams import NgramTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VocabTables:
    """R counts the ids that are not special, V is the model's vocabulary."""

    mask_id: jax.Array | np.ndarray  # int32 scalar
    regular_ids_R: jax.Array | np.ndarray
    is_special_V: jax.Array | np.ndarray
    is_word_start_V: jax.Array | np.ndarray
    tokenizer_size: int = dataclasses.field(metadata={"static": True})
    ngrams: NgramTable | None = None  # for the policy 'pmi'

    @classmethod
    def from_arrays(
        cls,
        *,
        mask_id: int,
        special_ids: np.ndarray,
        word_starts: np.ndarray,
        vocab_size: int,
        ngrams: NgramTable | None = None,
    ) -> "VocabTables":
        """Builds the tables on the host, as NumPy arrays that the caller places on its devices.

        Args:
            mask_id: the id shown for a masked token.
            special_ids: every id that is not text: padding, CLS, SEP, …
            word_starts: bool, one for each id of the tokenizer, True where a piece begins a word.
            vocab_size: the model's, at least the tokenizer's; the ids between the two count as special.
        """
        tokenizer_size = len(word_starts)
        if tokenizer_size > vocab_size:
            raise ValueError(f"a tokenizer of {tokenizer_size} ids does not fit a model vocabulary of {vocab_size}")
        is_special = np.ones(vocab_size, bool)
        is_special[:tokenizer_size] = np.isin(np.arange(tokenizer_size), special_ids)
        regular_ids = np.flatnonzero(~is_special).astype(np.int32)
        if regular_ids.size == 0:
            raise ValueError(f"all {tokenizer_size} ids of the tokenizer are special: nothing is left to predict")
        is_word_start = np.ones(vocab_size, bool)
        is_word_start[:tokenizer_size] = word_starts
        return cls(
            mask_id=np.asarray(mask_id, np.int32),
            regular_ids_R=regular_ids,
            is_special_V=is_special,
            is_word_start_V=is_word_start | is_special,
            tokenizer_size=tokenizer_size,
            ngrams=ngrams,
        )
