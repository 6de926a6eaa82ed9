"""Spans of whole words, as SpanBERT draws them, and the tokens at their ends.

Source: Joshi et al., 2020, sections 3.1 and 3.2; facebookresearch/SpanBERT:pretraining/fairseq/data/masking.py.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.masking.arrays import LAST, latest_true, look_up, places_of, shifted, uniform
from mlm_jax.masking.words import runs_end, words_in_order


def choose_spans(
    anchor_bits_L: jax.Array,
    length_bits_L: jax.Array,
    eligible_L: jax.Array,
    starts_L: jax.Array,
    segment_ids_L: jax.Array,
    budget: jax.Array,
    *,
    lengths: Sequence[float],
    num_slots: int,
) -> jax.Array:
    """Random spans of whole words with exactly `budget` tokens together (or all that are eligible), as bool [L].

    Again and again an anchor is drawn among the positions not yet taken, and a number of words; the span runs from the
    start of the anchor's word over so many words, or to the end of its segment. The last one is cut off at the budget.

    Anchors come from one random order of the positions, in which those already taken are passed over: the next one is
    uniform among the others. Each position of that order is taken once it has been passed, so as many of them as there
    are slots always spend the budget, whatever the lengths.

    Args:
        starts_L: where words begin, from `word_starts`.
        lengths: the probabilities of 1, 2, … words.
        num_slots: a bound of the budget.
    """
    places_L = places_of(eligible_L)
    _, anchors_P = jax.lax.sort((jnp.where(eligible_L, anchor_bits_L >> 1, LAST), places_L), num_keys=1)
    anchors_P = anchors_P[:num_slots]
    below_K = jnp.asarray(np.cumsum(lengths)[:-1], jnp.float32)
    words_P = 1 + (uniform(length_bits_L[:num_slots])[:, None] >= below_K[None]).sum(-1, dtype=jnp.int32)
    starts_W, word_L = words_in_order(starts_L, beyond=len(lengths))
    ends_P = look_up(starts_W, look_up(word_L, anchors_P) + words_P)
    spans = {
        "anchor": anchors_P,
        "start": look_up(latest_true(starts_L), anchors_P),
        "end": jnp.minimum(ends_P, look_up(runs_end(eligible_L, segment_ids_L), anchors_P)),
    }

    def take(state: tuple[jax.Array, jax.Array], span: dict[str, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], None]:
        free_L, left = state
        inside_L = (places_L >= span["start"]) & (places_L < span["end"]) & free_L
        is_free = (inside_L & (places_L == span["anchor"])).any()  # false too for a position that is not eligible
        wanted_L = inside_L & is_free
        taken_L = wanted_L & (jnp.cumsum(wanted_L, dtype=jnp.int32) <= left)
        return (free_L & ~taken_L, left - taken_L.sum(dtype=jnp.int32)), None

    (free_L, _), _ = jax.lax.scan(take, (eligible_L, budget), spans)
    return eligible_L & ~free_L


def run_starts(chosen_L: jax.Array, segment_ids_L: jax.Array) -> jax.Array:
    """Where a stretch of chosen positions begins: spans that touch or overlap have become one."""
    return chosen_L & ~(shifted(chosen_L, False) & (segment_ids_L == shifted(segment_ids_L, 0)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpanEnds:
    """For each slot of a masked batch, the tokens next to the stretch of masked tokens that its position lies in."""

    left_BP: jax.Array  # int32 position of the last token before it, 0 where there is none
    right_BP: jax.Array  # int32 position of the first token behind it, 0 where there is none
    offsets_BP: jax.Array  # int32 number of masked tokens between the left end and the slot's position
    weights_BP: jax.Array  # float32: 1 where both ends are text of the same segment and the offset is in range


def span_ends(
    positions_BP: jax.Array,
    weights_BP: jax.Array,
    tokens_BL: jax.Array,
    segment_ids_BL: jax.Array,
    is_special_V: jax.Array | np.ndarray,
    *,
    max_targets: int,
) -> SpanEnds:
    """The ends of masked stretches, for predicting what lies between from them alone.

    A stretch that touches its segment's end has no token there, as the separator is none, and counts for nothing. Of a
    long one the first `max_targets` tokens count.

    Args:
        positions_BP: of a masked batch, ascending in each row; with their weights.
        tokens_BL: before masking.
    """

    def one_row(positions_P: jax.Array, weights_P: jax.Array, tokens_L: jax.Array, segment_ids_L: jax.Array) -> SpanEnds:
        length = tokens_L.shape[0]
        used_P = weights_P > 0
        segments_P = look_up(segment_ids_L, positions_P)
        joined_P = used_P & shifted(used_P, False) & (positions_P == shifted(positions_P, -1) + 1)
        joined_P &= segments_P == shifted(segments_P, 0)
        left_P = jax.lax.cummax(jnp.where(joined_P, -1, positions_P)) - 1
        is_last_P = used_P & ~jnp.concatenate([joined_P[1:], jnp.zeros((1,), bool)])
        right_P = jax.lax.cummin(jnp.where(is_last_P, positions_P, length), reverse=True) + 1
        offsets_P = positions_P - left_P - 1
        is_text_L = ~look_up(is_special_V, tokens_L)

        def is_end(places_P: jax.Array) -> jax.Array:
            inside_P = jnp.clip(places_P, 0, length - 1)
            same_P = look_up(segment_ids_L, inside_P) == segments_P
            return (inside_P == places_P) & same_P & look_up(is_text_L, inside_P)

        counts_P = used_P & is_end(left_P) & is_end(right_P) & (offsets_P < max_targets)
        return SpanEnds(
            left_BP=jnp.where(counts_P, left_P, 0),
            right_BP=jnp.where(counts_P, right_P, 0),
            offsets_BP=jnp.where(counts_P, offsets_P, 0),
            weights_BP=counts_P.astype(jnp.float32),
        )

    return jax.vmap(one_row)(positions_BP, weights_BP, tokens_BL, segment_ids_BL)
