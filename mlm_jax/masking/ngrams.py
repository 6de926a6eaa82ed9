"""Words of a row joined into the n-grams of a given list, so that they are masked together.

The list is a hash table on the device; a row is matched against it in the step, after any tokenizer. The work for a row is
bounded: for each word and each number of words, one bucket of eight numbers is read.

Source: Levine et al., 2021, "PMI-Masking", and AI21Labs/pmi-masking:README.md (a longer entry beats those within it; of
entries that overlap, one is chosen at random).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.masking.arrays import look_up
from mlm_jax.masking.words import runs_end, words_in_order

BUCKET_SIZE = 8
# Rounds in which overlapping matches are decided. In each, every match that beats all of its neighbours is taken, so that
# a few rounds settle any chain of random scores; what would still be undecided stays single words.
ROUNDS = 6

# Two hashes of a sequence: one says the bucket, the other is stored in it. Odd factors, so that their powers have inverses
# modulo 2^32, and a number mixed into each token first.
_FACTORS = (0x9E3779B1, 0x85EBCA77)
_SALTS = (0x1B873593, 0xCC9E2D51)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NgramTable:
    """The hashes of token sequences, H buckets of `BUCKET_SIZE`. An empty place is 0."""

    buckets_HC: jax.Array | np.ndarray  # uint32
    max_words: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_sequences(cls, sequences: Sequence[np.ndarray], max_words: int) -> "NgramTable":
        """Builds the table on the host, with as few buckets as no sequence is left out of.

        Args:
            sequences: token ids of each n-gram.
            max_words: the most words that one of them has.
        """
        where, what = _hash_sequences(sequences)
        found = np.unique(np.stack([where, what], axis=1), axis=0)
        size = 1
        while True:
            bucket = (found[:, 0] & np.uint32(size - 1)).astype(np.int64)
            order = np.argsort(bucket, kind="stable")
            first = np.searchsorted(bucket[order], bucket[order])
            place = np.arange(len(order)) - first  # within its bucket
            if len(order) == 0 or place.max() < BUCKET_SIZE:
                break
            size *= 2
        buckets = np.zeros((size, BUCKET_SIZE), np.uint32)
        buckets[bucket[order], place] = found[order, 1]
        return cls(buckets_HC=buckets, max_words=max_words)


def join_words(
    bits_L: jax.Array,
    tokens_L: jax.Array,
    starts_L: jax.Array,
    eligible_L: jax.Array,
    segment_ids_L: jax.Array,
    table: NgramTable,
) -> jax.Array:
    """Where units begin: words, less those that continue an n-gram of the table. Bool [L].

    Args:
        bits_L: random bits, which choose among matches that overlap.
        starts_L: where words begin, from `word_starts`.
    """
    starts_W, word_L = words_in_order(starts_L, beyond=table.max_words)
    ends_L = runs_end(eligible_L, segment_ids_L)
    length = tokens_L.shape[0]
    firsts_W = jnp.clip(starts_W[:length], 0, length - 1)
    limits_W = jnp.where(starts_W[:length] < length, look_up(ends_L, firsts_W), 0)
    prefixes = [_prefix(tokens_L, lane) for lane in range(2)]
    sizes_W = jnp.zeros(length, jnp.int32)  # words in the longest n-gram that begins with each word
    for words in range(2, table.max_words + 1):
        is_whole_W = starts_W[words - 1 : words - 1 + length] < limits_W
        lasts_W = jnp.minimum(starts_W[words : words + length], limits_W)
        where_W, what_W = (_window(prefix, firsts_W, lasts_W, lane) for lane, prefix in enumerate(prefixes))
        size = table.buckets_HC.shape[0]
        bucket_WC = _rows(table.buckets_HC, (_mix(where_W) & np.uint32(size - 1)).astype(jnp.int32))
        is_listed_W = (bucket_WC == _nonzero(_mix(what_W))[:, None]).any(-1)
        sizes_W = jnp.where(is_whole_W & is_listed_W, words, sizes_W)
    continues_W = _continued(_choose(_outermost(sizes_W, table.max_words), bits_L >> 1, table.max_words), table.max_words)
    return starts_L & ~look_up(continues_W, jnp.maximum(word_L, 0))


def _outermost(sizes_W: jax.Array, max_words: int) -> jax.Array:
    """Sizes without those of n-grams that lie within a longer one that begins before them."""
    within_W = jnp.zeros(sizes_W.shape, bool)
    for distance in range(1, max_words):
        within_W |= (_earlier(sizes_W, distance) >= distance + sizes_W) & (sizes_W > 0)
    return jnp.where(within_W, 0, sizes_W)


def _choose(sizes_W: jax.Array, scores_W: jax.Array, max_words: int) -> jax.Array:
    """Sizes of n-grams that do not overlap: of neighbours, the one with the highest score is taken first."""
    taken_W, left_W = jnp.zeros_like(sizes_W), sizes_W
    for _ in range(ROUNDS):
        # Equal scores are possible, if rare: then the earlier one is taken.
        best_W = left_W > 0
        for distance in range(1, max_words):
            before_W, after_W = _earlier(left_W, distance), _later(left_W, distance)
            best_W &= ~((before_W > distance) & (_earlier(scores_W, distance) >= scores_W))
            best_W &= ~((left_W > distance) & (after_W > 0) & (_later(scores_W, distance) > scores_W))
        taken_W = jnp.where(best_W, left_W, taken_W)
        blocked_W = best_W | _continued(taken_W, max_words)
        for distance in range(1, max_words):
            blocked_W |= (left_W > distance) & (_later(taken_W, distance) > 0)
        left_W = jnp.where(blocked_W, 0, left_W)
    return taken_W


def _continued(sizes_W: jax.Array, max_words: int) -> jax.Array:
    """Which words are the second or a later one of an n-gram."""
    continued_W = jnp.zeros(sizes_W.shape, bool)
    for distance in range(1, max_words):
        continued_W |= _earlier(sizes_W, distance) > distance
    return continued_W


def _earlier(values_W: jax.Array, distance: int) -> jax.Array:
    return jnp.concatenate([jnp.zeros((distance,), values_W.dtype), values_W[:-distance]])


def _later(values_W: jax.Array, distance: int) -> jax.Array:
    return jnp.concatenate([values_W[distance:], jnp.zeros((distance,), values_W.dtype)])


def _rows(table_HC: jax.Array | np.ndarray, indices_W: jax.Array) -> jax.Array:
    """Whole rows of a table, laid out like the indices."""
    sharding = jax.typeof(indices_W).sharding
    wider = jax.NamedSharding(sharding.mesh, jax.P(*sharding.spec, None))
    return jnp.asarray(table_HC).at[indices_W].get(out_sharding=wider)


def _prefix(tokens_L: jax.Array, lane: int) -> jax.Array:
    """Sums over the tokens before each position of (mixed token · factor^position), modulo 2^32: [L + 1]."""
    terms_L = _mix(tokens_L.astype(jnp.uint32) + np.uint32(_SALTS[lane])) * _powers(lane, tokens_L.shape[0])
    return jnp.concatenate([jnp.zeros((1,), jnp.uint32), jnp.cumsum(terms_L, dtype=jnp.uint32)])


def _window(prefix: jax.Array, firsts_W: jax.Array, lasts_W: jax.Array, lane: int) -> jax.Array:
    """The hash of the tokens from each first position up to, without it, each last one."""
    inverse = _powers(lane, prefix.shape[0], inverse=True)
    return (look_up(prefix, lasts_W) - look_up(prefix, firsts_W)) * look_up(inverse, firsts_W)


def _hash_sequences(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What `_window` gives for each whole sequence, mixed, in NumPy: (bucket's hash, stored hash)."""
    hashes = np.zeros((2, len(sequences)), np.uint32)
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        tokens = np.stack([sequences[int(index)] for index in members]).astype(np.uint32)
        for lane in range(2):
            terms = _mix(tokens + np.uint32(_SALTS[lane])) * _powers(lane, int(length))
            hashes[lane, members] = _mix(terms.sum(axis=1, dtype=np.uint32))
    return hashes[0], _nonzero(hashes[1])


def _powers(lane: int, count: int, *, inverse: bool = False) -> np.ndarray:
    factor = _FACTORS[lane]
    if inverse:
        factor = pow(factor, -1, 2**32)
    return np.cumprod(np.array([1, *[factor] * (count - 1)], np.uint32), dtype=np.uint32)


def _mix(values: Any) -> Any:
    """Spreads every bit of a uint32 over all of them (the last steps of MurmurHash3, by Austin Appleby, public domain)."""
    values = (values ^ (values >> 16)) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> 13)) * np.uint32(0xC2B2AE35)
    return values ^ (values >> 16)


def _nonzero(values: Any) -> Any:
    """0 stands for an empty place, so that it becomes 1."""
    return values + (values == 0).astype(np.uint32)
