"""Masking: which tokens of a row are predicted, and what the encoder sees in their place.

Pure functions of per-example keys, called inside the jitted step by `objectives/`; imports nothing of ours.

Everything is computed for one row and mapped over the batch, with static shapes and no communication. As a row's key
depends on the row alone, its mask does not depend on its neighbours, the mesh, or the number of processes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

# Passes over a row's words in which the whole-word policy settles what fits. A pass more is needed only where a word
# that had fitted at the beginning of a pass does not fit at its turn, which soon runs out: see `_take_in_order`.
WORD_PASSES = 8

LAST = np.uint32(2**31)  # sorts behind every score, which have 31 random bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VocabTables:
    """What masking has to know of a vocabulary. R counts the ids that are not special, V is the model's vocabulary."""

    mask_id: jax.Array | np.ndarray  # int32 scalar
    regular_ids_R: jax.Array | np.ndarray
    is_special_V: jax.Array | np.ndarray
    is_word_start_V: jax.Array | np.ndarray
    tokenizer_size: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_arrays(
        cls, *, mask_id: int, special_ids: np.ndarray, word_starts: np.ndarray, vocab_size: int
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
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedBatch:
    """A batch as the encoder sees it, and the tokens to predict. Used slots come first, with ascending positions."""

    inputs_BL: jax.Array  # int32
    positions_BP: jax.Array  # int32, 0 in an unused slot
    targets_BP: jax.Array  # int32, 0 in an unused slot
    weights_BP: jax.Array  # float32: 1 in a used slot, 0 in an unused one


def num_slots(seq_len: int, rate: float) -> int:
    """The static number of predictions P that a row of this length has room for.

    It is what a full row needs, `round(rate · seq_len)` (halves to even) and at least 1, so no slot is idle in a full
    row. Computed in float32 like the count on the device, so that the two never differ by their rounding.
    """
    return max(1, int(np.round(np.float32(rate) * np.float32(seq_len))))


def example_keys(seed_key: jax.Array, epochs_B: jax.Array, example_ids_B: jax.Array, *, static: bool) -> jax.Array:
    """One key per example, from what identifies the example and nothing else.

    Args:
        seed_key: a typed threefry key.
        static: an example has the same mask in every epoch: the one that it has in epoch 0.
    """

    def one(epoch: jax.Array, example_id: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(seed_key, epoch), example_id)

    return jax.vmap(one)(jnp.zeros_like(epochs_B) if static else epochs_B, example_ids_B)


def mask_tokens(
    keys_B: jax.Array,
    tokens_BL: jax.Array,
    segment_ids_BL: jax.Array,
    vocab: VocabTables,
    *,
    rate: float,
    num_slots: int,
    policy: str,
    mask_prob: float,
    random_prob: float,
    random_from: str,
    include_special: bool,
) -> MaskedBatch:
    """Chooses what to predict and hides it.

    A row with T real tokens (CLS and SEP count, padding does not) has a budget of `max(1, round(rate · T))`, at most
    `num_slots`. The policy 'token' spends all of it as long as there are candidates, and every set of positions is
    equally likely. 'whole_word' visits the words in random order and takes each one that still fits, so that it may
    spend a little less.

    Args:
        segment_ids_BL: 1, 2, … for each packed segment, 0 for padding.
        num_slots: P, from `num_slots`.
        mask_prob: share of the chosen positions that show the mask token; one uniform number per position decides
            between mask, random and unchanged.
        random_from: 'regular' draws random tokens from those that are not special, 'vocab' from the whole tokenizer.
        include_special: CLS and SEP may be chosen too; padding never is.

    Source: google-research/bert:create_pretraining_data.py (budget per row, skipping of words that do not fit, each
    token of a word is replaced on its own).
    """
    mask_one = functools.partial(
        _mask_row,
        vocab=vocab,
        rate=rate,
        num_slots=num_slots,
        policy=policy,
        mask_prob=mask_prob,
        random_prob=random_prob,
        random_from=random_from,
        include_special=include_special,
    )
    return jax.vmap(mask_one)(keys_B, tokens_BL, segment_ids_BL)


def _mask_row(
    key: jax.Array,
    tokens_L: jax.Array,
    segment_ids_L: jax.Array,
    *,
    vocab: VocabTables,
    rate: float,
    num_slots: int,
    policy: str,
    mask_prob: float,
    random_prob: float,
    random_from: str,
    include_special: bool,
) -> MaskedBatch:
    """`mask_tokens` of one row; the fields of its result have no batch dimension yet."""
    # One draw for all three uses: a program compiles each use of the generator anew, half a second on CPU.
    choice_bits_L, outcome_bits_L, random_bits_L = jax.random.bits(key, (3, *tokens_L.shape))
    real_L = segment_ids_L > 0
    special_L = _look_up(vocab.is_special_V, tokens_L)
    eligible_L = real_L if include_special else real_L & ~special_L
    budget = jnp.round(jnp.float32(rate) * jnp.sum(real_L).astype(jnp.float32)).astype(jnp.int32)
    budget = jnp.clip(budget, 1, num_slots)
    if policy == "whole_word":
        begins_L = _look_up(vocab.is_word_start_V, tokens_L) | _follows_a_break(segment_ids_L, special_L)
        chosen_L = choose_words(choice_bits_L, eligible_L, begins_L, budget)
    elif policy == "token":
        chosen_L = choose_tokens(choice_bits_L, eligible_L, budget)
    else:
        raise ValueError(f"masking policy {policy!r} is neither 'token' nor 'whole_word'")

    outcome_L = (outcome_bits_L >> 8).astype(jnp.float32) * 2.0**-24  # uniform in [0, 1)
    visible_L = jnp.where(outcome_L < mask_prob + random_prob, _random_ids(random_bits_L, vocab, random_from), tokens_L)
    shown_L = jnp.where(outcome_L < mask_prob, jnp.asarray(vocab.mask_id), visible_L)

    length = tokens_L.shape[0]
    places_L = jnp.arange(length, dtype=jnp.int32)
    places_P = jax.lax.sort(jnp.where(chosen_L, places_L, length))[:num_slots]
    used_P = places_P < length
    positions_P = jnp.where(used_P, places_P, 0)
    return MaskedBatch(
        inputs_BL=jnp.where(chosen_L, shown_L, tokens_L),
        positions_BP=positions_P,
        targets_BP=jnp.where(used_P, _look_up(tokens_L, positions_P), 0),
        weights_BP=used_P.astype(jnp.float32),
    )


def _random_ids(bits_L: jax.Array, vocab: VocabTables, random_from: str) -> jax.Array:
    """A uniformly random id for each position; the remainder favours the first ids by less than V / 2^32."""
    if random_from == "vocab":
        return (bits_L % np.uint32(vocab.tokenizer_size)).astype(jnp.int32)
    if random_from == "regular":
        return _look_up(vocab.regular_ids_R, (bits_L % np.uint32(vocab.regular_ids_R.shape[0])).astype(jnp.int32))
    raise ValueError(f"random_from {random_from!r} is neither 'regular' nor 'vocab'")


def choose_tokens(bits_L: jax.Array, eligible_L: jax.Array, budget: jax.Array) -> jax.Array:
    """A uniformly random subset of `min(budget, candidates)` eligible positions, as bool [L]."""
    scores_L = jnp.where(eligible_L, bits_L >> 1, LAST)
    # The rank is the inverse of the sorting permutation; a threshold on the scores would miscount where two are equal.
    ranks_L = jnp.argsort(jnp.argsort(scores_L))
    return eligible_L & (ranks_L < budget)


def choose_words(bits_L: jax.Array, eligible_L: jax.Array, begins_L: jax.Array, budget: jax.Array) -> jax.Array:
    """A random set of whole words with at most `budget` tokens together, as bool [L].

    A word runs from an eligible position that begins one (or follows an ineligible position) up to the next.
    """
    length = eligible_L.shape[0]
    places_L = jnp.arange(length, dtype=jnp.int32)
    starts_L = eligible_L & (begins_L | ~_shifted(eligible_L, False))
    stops_L = starts_L | ~eligible_L
    next_stop_L = jax.lax.cummin(jnp.where(stops_L, places_L, length), reverse=True)
    next_stop_L = jnp.concatenate([next_stop_L[1:], jnp.full((1,), length, jnp.int32)])
    sizes_L = jnp.where(starts_L, next_stop_L - places_L, 0)  # of the word that starts here

    scores_L = jnp.where(starts_L, bits_L >> 1, LAST)
    _, ordered_sizes_L, ordered_places_L = jax.lax.sort((scores_L, sizes_L, places_L), num_keys=1)
    ordered_taken_L = _take_in_order(ordered_sizes_L, budget)
    _, taken_L = jax.lax.sort((ordered_places_L, ordered_taken_L.astype(jnp.int32)), num_keys=1)
    # Each position looks up its word's start: the running maximum of (place, taken) packed into one number.
    latest_L = jax.lax.cummax(jnp.where(starts_L, 2 * places_L + taken_L, -1))
    return eligible_L & (latest_L % 2 == 1) & (latest_L >= 0)


def _take_in_order(sizes_W: jax.Array, budget: jax.Array) -> jax.Array:
    """Which words a greedy walk takes that skips every word larger than what is left of the budget; size 0 is no word.

    Each pass takes, of the words that fit now, the longest prefix whose sum fits. That is what the walk does until it
    meets a word that no longer fits, and whatever does not fit now never will. The words in question shrink with every
    pass, so a few passes equal the walk; where a contrived order needs more than `WORD_PASSES`, the rest is left out.
    """
    taken_W = jnp.zeros(sizes_W.shape, bool)
    left = budget
    for _ in range(WORD_PASSES):
        fits_W = (sizes_W > 0) & (sizes_W <= left) & ~taken_W
        sums_W = jnp.cumsum(jnp.where(fits_W, sizes_W, 0))
        now_W = fits_W & (sums_W <= left)
        left = left - jnp.sum(jnp.where(now_W, sizes_W, 0))
        taken_W = taken_W | now_W
    return taken_W


def _follows_a_break(segment_ids_L: jax.Array, special_L: jax.Array) -> jax.Array:
    """Where the position before belongs to another segment or holds a special token: no word reaches across."""
    return (segment_ids_L != _shifted(segment_ids_L, 0)) | _shifted(special_L, True)


def _shifted(values_L: jax.Array, first: bool | int) -> jax.Array:
    """Each position's predecessor."""
    return jnp.concatenate([jnp.full((1,), first, values_L.dtype), values_L[:-1]])


def _look_up(table: jax.Array | np.ndarray, indices: jax.Array) -> jax.Array:
    """`table[indices]`, laid out like the indices: on an explicit mesh a gather has to be told."""
    return jnp.asarray(table).at[indices].get(out_sharding=jax.typeof(indices).sharding)
