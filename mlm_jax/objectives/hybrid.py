"""Masked and causal language modelling in one model, so that one checkpoint fills masks and continues text.

Source: Charpentier and Samuel, 2024, "GPT or BERT: why not both?" (GPT-BERT).

Both predict the token at i from the hidden state at i - 1. The rows of a batch are divided: a share of them is causal, where
no token sees a later one and every token is predicted; in the others some tokens are masked and predicted from both sides.
A share of 1 is plain causal language modelling.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from mlm_jax import flops, masking
from mlm_jax.objectives.contract import Batch, Keys, LossSums, Params, Term
from mlm_jax.objectives.mlm import MaskedLM, mask_batch
from mlm_jax.objectives.rates import scheduled_rates
from mlm_jax.objectives.scoring import score_in_chunks, score_targets
from mlm_jax.objectives.spread import spread_rows


@dataclasses.dataclass(frozen=True)
class HybridLM(MaskedLM):
    """The network of `MaskedLM` with GPT-BERT's objective."""

    loss_names: ClassVar[tuple[str, ...]] = ("masked", "causal")
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "causal_accuracy")

    def logits(
        self,
        params: Params,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array,
        positions_BP: jax.Array,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Float32 logits [B, P, V] for the tokens at the given positions; see `Objective`.

        From both sides, unless the model has been trained on causal rows alone: then from what comes before.
        """
        causal = self.cfg.hybrid.causal_share == 1
        return self._logits(params, tokens_BL, segment_ids_BL, positions_BP, key, causal=causal)

    def causal_logits(
        self, params: Params, tokens_BL: jax.Array, segment_ids_BL: jax.Array, positions_BP: jax.Array
    ) -> jax.Array:
        """Float32 logits [B, P, V] for the tokens at the given positions, from what comes before them in their segment."""
        return self._logits(params, tokens_BL, segment_ids_BL, positions_BP, None, causal=True)

    def _logits(
        self,
        params: Params,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array,
        positions_BP: jax.Array,
        key: jax.Array | None,
        *,
        causal: bool,
    ) -> jax.Array:
        model = self.network.bind(params)
        causal_B = jnp.ones_like(tokens_BL[:, 0], bool) if causal else None
        # Nothing comes before a row's first token, CLS; whoever asks for it has what is asked for the second.
        before_BP = jnp.maximum(positions_BP - 1, 0)
        return model.predict(model.encoder(tokens_BL, segment_ids_BL, key, causal_B=causal_B, positions_BP=before_BP))

    def loss(self, params: Params, batch: Batch, keys: Keys, vocab: masking.VocabTables) -> LossSums:
        """The two cross-entropies, each a mean over its own tokens, added in proportion to their rows."""
        share, tokens_BL = self.cfg.hybrid.causal_share, batch["tokens"]
        causal_B1 = (spread_rows(batch, keys, masking.streams.CAUSAL_ROWS) < share)[:, None]
        rates = scheduled_rates(self.cfg, self.stage, keys.step)
        masked = mask_batch(batch, keys.mask, vocab, self.cfg.masking, rates)
        inputs_BL = jnp.where(causal_B1, tokens_BL, masked.inputs_BL)
        predicted_BL = _has_predecessor(batch["segment_ids"]) & (causal_B1 | _is_chosen(masked, tokens_BL.shape[1]))
        nll_BP, correct_BP = self._score(params, inputs_BL, batch, causal_B1[:, 0], keys.dropout)
        losses, metrics = {}, {}
        kinds = (("masked", "accuracy", ~causal_B1, 1.0 - share), ("causal", "causal_accuracy", causal_B1, share))
        for loss, accuracy, rows_B1, coefficient in kinds:
            weights_BP = (predicted_BL & rows_B1)[:, 1:].astype(jnp.float32)
            weight = weights_BP.sum()
            losses[loss] = Term(coefficient * (nll_BP * weights_BP).sum(), weight)
            metrics[accuracy] = Term((correct_BP * weights_BP).sum(), weight)
        return LossSums(losses, metrics, predicted=predicted_BL.sum(dtype=jnp.float32))

    def evaluate(self, params: Params, batch: Batch, keys: Keys, vocab: masking.VocabTables) -> dict[str, Term]:
        """What the text costs from left to right, in bits for each token after CLS, SEP included."""
        if self.cfg.hybrid.causal_share == 0:
            return {}
        tokens_BL = batch["tokens"]
        nll_BP, _ = self._score(params, tokens_BL, batch, jnp.ones_like(tokens_BL[:, 0], bool), None)
        weights_BP = _has_predecessor(batch["segment_ids"])[:, 1:].astype(jnp.float32)
        return {"causal_bits_per_token": Term((nll_BP * weights_BP).sum() / math.log(2), weights_BP.sum())}

    def flops_per_token(self, segment_length: float, predicted: float) -> float:
        """The encoder's and the head's; see `Objective`."""
        model = self.cfg.model
        return flops.encoder_flops_per_token(model, segment_length) + flops.head_flops_per_token(model, predicted)

    def _score(
        self, params: Params, inputs_BL: jax.Array, batch: Batch, causal_B: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy and hits of every token but the row's first: float32 [B, L - 1]."""
        model = self.network.bind(params)
        hidden_BLD = model.encoder(inputs_BL, batch["segment_ids"], key, causal_B=causal_B)

        def score(hidden_BPD: jax.Array, targets_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
            return score_targets(model.predict(hidden_BPD), targets_BP)

        return score_in_chunks(score, hidden_BLD[:, :-1], batch["tokens"][:, 1:], self.cfg.compute.head_chunk)


def _has_predecessor(segment_ids_BL: jax.Array) -> jax.Array:
    """Real tokens that are not their segment's first: bool [B, L]."""
    previous_BL = jnp.pad(segment_ids_BL[:, :-1], ((0, 0), (1, 0)))
    return (segment_ids_BL > 0) & (segment_ids_BL == previous_BL)


def _is_chosen(masked: masking.MaskedBatch, length: int) -> jax.Array:
    """The masked positions as flags, bool [B, L]; and a row's first one, which unused slots name and nothing predicts."""
    places_11L = jnp.arange(length, dtype=jnp.int32)[None, None]
    return (masked.positions_BP[:, :, None] == places_11L).any(1)
