"""Whole words: where they begin, and a random set of them within a budget."""

import jax
import jax.numpy as jnp

from mlm_jax.masking.arrays import LAST, next_true, places_of, shifted

# Passes over a row's words in which it is settled what fits. A pass more is needed only where a word that had fitted at
# the beginning of a pass does not fit at its turn, which soon runs out: see `take_in_order`.
WORD_PASSES = 8


def word_starts(is_start_L: jax.Array, eligible_L: jax.Array, special_L: jax.Array, segment_ids_L: jax.Array) -> jax.Array:
    """Where words of eligible positions begin, as bool [L].

    Args:
        is_start_L: where a piece stands that begins a word. No word reaches across a special token or a segment's end.
    """
    follows_a_break_L = (segment_ids_L != shifted(segment_ids_L, 0)) | shifted(special_L, True)
    return eligible_L & (is_start_L | follows_a_break_L | ~shifted(eligible_L, False))


def choose_words(bits_L: jax.Array, eligible_L: jax.Array, starts_L: jax.Array, budget: jax.Array) -> jax.Array:
    """A random set of whole words with at most `budget` tokens together, as bool [L].

    A word runs from its start up to the next one, or to a position that is not eligible.
    """
    places_L = places_of(eligible_L)
    sizes_L = jnp.where(starts_L, next_true(starts_L | ~eligible_L) - places_L, 0)  # of the word that starts here

    scores_L = jnp.where(starts_L, bits_L >> 1, LAST)
    _, ordered_sizes_L, ordered_places_L = jax.lax.sort((scores_L, sizes_L, places_L), num_keys=1)
    ordered_taken_L = take_in_order(ordered_sizes_L, budget)
    _, taken_L = jax.lax.sort((ordered_places_L, ordered_taken_L.astype(jnp.int32)), num_keys=1)
    # Each position looks up its word's start: the running maximum of (place, taken) packed into one number.
    latest_L = jax.lax.cummax(jnp.where(starts_L, 2 * places_L + taken_L, -1))
    return eligible_L & (latest_L % 2 == 1) & (latest_L >= 0)


def take_in_order(sizes_W: jax.Array, budget: jax.Array) -> jax.Array:
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


def runs_end(eligible_L: jax.Array, segment_ids_L: jax.Array) -> jax.Array:
    """The end, exclusive, of the stretch of eligible positions of one segment that each position lies in."""
    return next_true(~eligible_L | (segment_ids_L != shifted(segment_ids_L, 0)))


def words_in_order(starts_L: jax.Array, beyond: int) -> tuple[jax.Array, jax.Array]:
    """The places where words start, ascending, followed by the row's length `beyond` times or more; each place's word."""
    length = starts_L.shape[0]
    starts_W = jax.lax.sort(jnp.where(starts_L, places_of(starts_L), length))
    starts_W = jnp.concatenate([starts_W, jnp.full((beyond,), length, jnp.int32)])
    return starts_W, jnp.cumsum(starts_L, dtype=jnp.int32) - 1
