"""Masked diffusion: a rate drawn for each row, the variational bound on its text as the loss, and as a held-out measure.

Sources: Sahoo et al., 2024, "Simple and Effective Masked Diffusion Language Models" (kuleshov-group/mdlm:diffusion.py), and
Nie et al., 2025, "Large Language Diffusion Models" (LLaDA).

A row's text is masked token by token with probability t, its rate, uniform in [min_rate, 1). The loss is the sum over masked
tokens of cross-entropy / t, divided by the number of all tokens of text, masked or not: in expectation over t a bound on
the text's negative log-likelihood per token. Visible tokens are carried over and cost nothing; [MASK] is never predicted.

CLS and SEP are never masked and never counted. Segments see only themselves, so where one ends is visible, and a SEP that
costs nothing to predict would only flatter the bits per token. The bound is therefore that of a text of known length.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax import masking
from mlm_jax.objectives.contract import Batch, Keys, LossSums, Params, Term
from mlm_jax.objectives.mlm import MaskedLM
from mlm_jax.objectives.scoring import score_in_chunks, score_targets
from mlm_jax.objectives.spread import spread_rows

GOLDEN = np.uint32(2654435769)  # 2^32 / the golden ratio: its multiples, modulo 2^32, are evenly spread


@dataclasses.dataclass(frozen=True)
class MaskedDiffusion(MaskedLM):
    """The network of `MaskedLM`, trained at all rates. Time is not among its inputs: the number of masks tells it."""

    mask_id: int | None = None  # what the tokenizer calls [MASK]; `logits` needs it

    loss_names: ClassVar[tuple[str, ...]] = ("bound",)
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy",)

    def logits(
        self,
        params: Params,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array,
        positions_BP: jax.Array,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Float32 logits [B, P, V] at the given positions, minus infinity for [MASK]; see `Objective`."""
        assert self.mask_id is not None, "make_objective needs the tokenizer's mask_id"
        return _without(self.mask_id, super().logits(params, tokens_BL, segment_ids_BL, positions_BP, key))

    def loss(self, params: Params, batch: Batch, keys: Keys, vocab: masking.VocabTables) -> LossSums:
        """The bound, estimated at one rate for each row, and the accuracy at masked tokens."""
        knobs = self.cfg.diffusion
        length = batch["tokens"].shape[1]
        text_BL = _is_text(batch, vocab)
        with jax.named_scope("masking"):
            rates_B = knobs.min_rate + (1.0 - knobs.min_rate) * spread_rows(batch, keys, masking.streams.ROW_RATES)
            keys_B = masking.example_keys(keys.mask, batch["epochs"], batch["example_ids"], static=False)
            bits_B2L = jax.vmap(lambda key: jax.random.bits(key, (2, length)))(keys_B)
            uniform_BL = (bits_B2L[:, 0] >> 8).astype(jnp.float32) * 2.0**-24
            masked_BL = text_BL & (uniform_BL < rates_B[:, None])
            # Where a row has more masked tokens than slots, a random subset stands for all of them.
            slots = math.ceil(knobs.scored_share * length)
            scored_BL = masked_BL if slots == length else _choose(bits_B2L[:, 1], masked_BL, jnp.full_like(rates_B, slots))
            each_stands_for_B = masked_BL.sum(1) / jnp.maximum(scored_BL.sum(1), 1)
        nll_BP, correct_BP, used_BP = self._score(params, batch, vocab, masked_BL, scored_BL, slots, keys.dropout)
        scored = used_BP.sum()
        bound_B = nll_BP.sum(1) * each_stands_for_B / rates_B
        return LossSums(
            losses={"bound": Term(bound_B.sum(), text_BL.sum(dtype=jnp.float32))},
            metrics={"accuracy": Term(correct_BP.sum(), scored)},
            predicted=scored,
        )

    def evaluate(self, params: Params, batch: Batch, keys: Keys, vocab: masking.VocabTables) -> dict[str, Term]:
        """The bound in bits a token, without bias: `draws` numbers of masked tokens for each row, fixed and evenly spread.

        A rate t and then each token with probability t are replaced by a number n, uniform from 1 to the row's T tokens, and
        n tokens that each weigh T / n: the same bound over all rates from 0 to 1, with less variance (LLaDA, appendix on
        likelihood evaluation), so that a row needs few draws.
        """
        draws, length = self.cfg.diffusion.draws, batch["tokens"].shape[1]
        text_BL = _is_text(batch, vocab)
        sizes_B = text_BL.sum(1, dtype=jnp.float32)
        keys_B = masking.example_keys(keys.mask, batch["epochs"], batch["example_ids"], static=True)
        bits_BRL = jax.vmap(lambda key: jax.random.bits(key, (draws, length)))(keys_B)
        counts_RB = mask_counts(keys.mask, batch["example_ids"], sizes_B, draws)

        def draw(bits_BL: jax.Array, counts_B: jax.Array) -> jax.Array:
            masked_BL = _choose(bits_BL, text_BL, counts_B)
            nll_BP, _, _ = self._score(params, batch, vocab, masked_BL, masked_BL, length, None)
            return (nll_BP.sum(1) * sizes_B / jnp.maximum(counts_B, 1.0)).sum()

        nats = jax.lax.map(lambda each: draw(*each), (bits_BRL.swapaxes(0, 1), counts_RB)).mean()
        return {"bound_bits_per_token": Term(nats / math.log(2), sizes_B.sum())}

    def _score(
        self,
        params: Params,
        batch: Batch,
        vocab: masking.VocabTables,
        masked_BL: jax.Array,
        scored_BL: jax.Array,
        slots: int,
        key: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Cross-entropy and hits of up to `slots` tokens a row, 0 in unused slots, and which slots are used: float32."""
        tokens_BL, length = batch["tokens"], batch["tokens"].shape[1]
        model = self.network.bind(params)
        places_1L = jnp.arange(length, dtype=jnp.int32)[None]
        places_BP = jax.lax.sort(jnp.where(scored_BL, places_1L, length))[:, :slots]
        used_BP = places_BP < length
        places_BP = jnp.where(used_BP, places_BP, 0)
        inputs_BL = jnp.where(masked_BL, vocab.mask_id, tokens_BL)
        hidden_BPD = model.encoder(inputs_BL, batch["segment_ids"], key, positions_BP=places_BP)
        targets_BP = jnp.take_along_axis(tokens_BL, places_BP, axis=1)

        def score(hidden_BPD: jax.Array, targets_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
            return score_targets(_without(vocab.mask_id, model.predict(hidden_BPD)), targets_BP)

        found = score_in_chunks(score, hidden_BPD, targets_BP, self.cfg.compute.head_chunk)
        nll_BP, correct_BP = (jnp.where(used_BP, x_BP, 0.0) for x_BP in found)
        return nll_BP, correct_BP, used_BP.astype(jnp.float32)


def mask_counts(key: jax.Array, example_ids_B: jax.Array, sizes_B: jax.Array, draws: int) -> jax.Array:
    """How many of each row's tokens an evaluation masks in each of its draws: float32 [draws, B].

    From 1 to the row's size, one in each of `draws` equal parts of that range; where in its part differs by the example.
    """
    turns_B = example_ids_B.astype(jnp.uint32) * GOLDEN + jax.random.bits(jax.random.fold_in(key, masking.streams.DRAWS))
    fractions_B = (turns_B >> 8).astype(jnp.float32) * 2.0**-24
    counts = [jnp.floor((draw + fractions_B) / draws * sizes_B) + 1.0 for draw in range(draws)]
    return jnp.minimum(jnp.stack(counts), sizes_B[None])


def _is_text(batch: Batch, vocab: masking.VocabTables) -> jax.Array:
    """The tokens that the bound is about: all but padding and special ones. Bool [B, L]."""
    tokens_BL = batch["tokens"]
    special_BL = jnp.asarray(vocab.is_special_V).at[tokens_BL].get(out_sharding=jax.typeof(tokens_BL).sharding)
    return (batch["segment_ids"] > 0) & ~special_BL


def _choose(bits_BL: jax.Array, eligible_BL: jax.Array, counts_B: jax.Array) -> jax.Array:
    return jax.vmap(masking.choose_tokens)(bits_BL, eligible_BL, counts_B)


def _without(mask_id: int | jax.Array | np.ndarray, logits_BPV: jax.Array) -> jax.Array:
    """Logits that give [MASK] no probability."""
    vocab_11V = jnp.arange(logits_BPV.shape[-1], dtype=jnp.int32)[None, None]
    return jnp.where(vocab_11V == mask_id, -jnp.inf, logits_BPV)
