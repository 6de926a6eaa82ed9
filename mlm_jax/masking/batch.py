"""A batch masked by one of the policies: how many tokens, which, and what is shown in their place."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.masking import streams
from mlm_jax.masking.arrays import LAST, latest_true, look_up, places_of, uniform
from mlm_jax.masking.ngrams import join_words
from mlm_jax.masking.spans import choose_spans, run_starts
from mlm_jax.masking.tables import VocabTables
from mlm_jax.masking.words import choose_words, word_starts


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
    rate: jax.typing.ArrayLike,
    num_slots: int,
    policy: str,
    mask_prob: jax.typing.ArrayLike,
    random_prob: jax.typing.ArrayLike,
    random_from: str,
    include_special: bool,
    rate_spread: float = 0.0,
    span_lengths: Sequence[float] = (),
) -> MaskedBatch:
    """Chooses what to predict and hides it.

    A row with T real tokens (CLS and SEP count, padding does not) has a budget of `max(1, round(rate · T))`, at most
    `num_slots`. The policies:

    'token' spends all of it as long as there are candidates, and every set of positions is equally likely.
    'whole_word' visits the words in random order and takes each one that still fits, so that it may spend a little less.
    'span' takes stretches of whole words until the budget is spent; the last one is cut off.
    'pmi' is 'whole_word' with the n-grams of `vocab.ngrams` as words.

    A chosen token shows the mask, a random token, or itself. One number decides that for each token, and with 'span' and
    'pmi' for each stretch or word as a whole; the random tokens of one stretch still differ.

    Args:
        segment_ids_BL: 1, 2, … for each packed segment, 0 for padding.
        rate: a number, or a scalar of the device.
        num_slots: P, from `num_slots` and the largest rate.
        mask_prob: share of the chosen that shows the mask token; a number, or a scalar of the device.
        random_from: 'regular' draws random tokens from those that are not special, 'vocab' from the whole tokenizer.
        include_special: CLS and SEP may be chosen too; padding never is.
        rate_spread: each example has a rate of its own, uniform within this distance of `rate`.
        span_lengths: for 'span', the probabilities of 1, 2, … words.

    Source: google-research/bert:create_pretraining_data.py (budget per row, skipping of words that do not fit, each
    token of a word is replaced on its own).
    """

    def mask_row(key: jax.Array, tokens_L: jax.Array, segment_ids_L: jax.Array) -> MaskedBatch:
        # One draw for all uses: a program compiles each use of the generator anew, half a second on CPU.
        uses = 4 if policy in ("span", "pmi") else 3
        choice_bits_L, outcome_bits_L, random_bits_L, *more_bits = jax.random.bits(key, (uses, *tokens_L.shape))
        real_L = segment_ids_L > 0
        special_L = look_up(vocab.is_special_V, tokens_L)
        eligible_L = real_L if include_special else real_L & ~special_L
        own_rate = jnp.float32(rate)
        if rate_spread:
            own_rate += rate_spread * (2.0 * jax.random.uniform(jax.random.fold_in(key, streams.RATE)) - 1.0)
        budget = jnp.round(own_rate * jnp.sum(real_L).astype(jnp.float32)).astype(jnp.int32)
        budget = jnp.clip(budget, 1, num_slots)

        if policy == "token":
            chosen_L = choose_tokens(choice_bits_L, eligible_L, budget)
        else:
            row = _Row(tokens_L, segment_ids_L, special_L, eligible_L)
            bits = (choice_bits_L, *more_bits)
            chosen_L, units_L = _choose_units(policy, bits, row, vocab, budget, num_slots, span_lengths)
            if units_L is not None:
                outcome_bits_L = look_up(outcome_bits_L, jnp.maximum(latest_true(units_L), 0))
        outcome_L = uniform(outcome_bits_L)
        random_L = _random_ids(random_bits_L, vocab, random_from)
        visible_L = jnp.where(outcome_L < mask_prob + random_prob, random_L, tokens_L)
        shown_L = jnp.where(outcome_L < mask_prob, jnp.asarray(vocab.mask_id), visible_L)

        length = tokens_L.shape[0]
        places_P = jax.lax.sort(jnp.where(chosen_L, places_of(tokens_L), length))[:num_slots]
        used_P = places_P < length
        positions_P = jnp.where(used_P, places_P, 0)
        return MaskedBatch(
            inputs_BL=jnp.where(chosen_L, shown_L, tokens_L),
            positions_BP=positions_P,
            targets_BP=jnp.where(used_P, look_up(tokens_L, positions_P), 0),
            weights_BP=used_P.astype(jnp.float32),
        )

    return jax.vmap(mask_row)(keys_B, tokens_BL, segment_ids_BL)


class _Row(NamedTuple):
    tokens_L: jax.Array
    segment_ids_L: jax.Array
    special_L: jax.Array
    eligible_L: jax.Array


def _choose_units(
    policy: str,
    bits: Sequence[jax.Array],
    row: _Row,
    vocab: VocabTables,
    budget: jax.Array,
    num_slots: int,
    span_lengths: Sequence[float],
) -> tuple[jax.Array, jax.Array | None]:
    """What a policy of words chooses, and where the stretches begin that are shown in one way (None: token by token)."""
    is_start_L = look_up(vocab.is_word_start_V, row.tokens_L)
    starts_L = word_starts(is_start_L, row.eligible_L, row.special_L, row.segment_ids_L)
    if policy == "whole_word":
        return choose_words(bits[0], row.eligible_L, starts_L, budget), None
    if policy == "pmi":
        if vocab.ngrams is not None:
            starts_L = join_words(bits[1], row.tokens_L, starts_L, row.eligible_L, row.segment_ids_L, vocab.ngrams)
        return choose_words(bits[0], row.eligible_L, starts_L, budget), starts_L
    if policy == "span":
        places = (row.eligible_L, starts_L, row.segment_ids_L)
        chosen_L = choose_spans(bits[0], bits[1], *places, budget, lengths=span_lengths, num_slots=num_slots)
        return chosen_L, run_starts(chosen_L, row.segment_ids_L)
    raise ValueError(f"masking policy {policy!r} is none of 'token', 'whole_word', 'span', 'pmi'")


def _random_ids(bits_L: jax.Array, vocab: VocabTables, random_from: str) -> jax.Array:
    """A uniformly random id for each position; the remainder favours the first ids by less than V / 2^32."""
    if random_from == "vocab":
        return (bits_L % np.uint32(vocab.tokenizer_size)).astype(jnp.int32)
    if random_from == "regular":
        return look_up(vocab.regular_ids_R, (bits_L % np.uint32(vocab.regular_ids_R.shape[0])).astype(jnp.int32))
    raise ValueError(f"random_from {random_from!r} is neither 'regular' nor 'vocab'")


def choose_tokens(bits_L: jax.Array, eligible_L: jax.Array, budget: jax.Array) -> jax.Array:
    """A uniformly random subset of `min(budget, candidates)` eligible positions, as bool [L]."""
    scores_L = jnp.where(eligible_L, bits_L >> 1, LAST)
    # The rank is the inverse of the sorting permutation; a threshold on the scores would miscount where two are equal.
    ranks_L = jnp.argsort(jnp.argsort(scores_L))
    return eligible_L & (ranks_L < budget)
