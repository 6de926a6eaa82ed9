"""An objective of your own: masked language modelling with a second term, which keeps the logits' normaliser near 1."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mlm_jax.masking import VocabTables
from mlm_jax.objectives import Batch, Keys, LossSums, Params, Term
from mlm_jax.objectives.mlm import MaskedLM, mask_batch
from mlm_jax.objectives.rates import scheduled_rates
from mlm_jax.objectives.scoring import score_targets


@dataclasses.dataclass(frozen=True)
class MaskedLMWithZLoss(MaskedLM):
    """Parameters, logits and evaluation are those of `mlm`; the loss has a term more."""

    loss_names: ClassVar[tuple[str, ...]] = ("mlm", "z")

    def loss(self, params: Params, batch: Batch, keys: Keys, vocab: VocabTables) -> LossSums:
        """Sums and weights; the step divides them."""
        rates = scheduled_rates(self.cfg, self.stage, keys.step)
        masked = mask_batch(batch, keys.mask, vocab, self.cfg.masking, rates)
        logits_BPV = self.logits(params, masked.inputs_BL, batch["segment_ids"], masked.positions_BP, keys.dropout)
        nll_BP, correct_BP = score_targets(logits_BPV, masked.targets_BP)
        normaliser_BP = jax.nn.logsumexp(logits_BPV, axis=-1)

        def term(values_BP: jax.Array) -> Term:
            return Term((values_BP * masked.weights_BP).sum(), masked.weights_BP.sum())

        return LossSums(
            losses={"mlm": term(nll_BP), "z": term(1e-4 * jnp.square(normaliser_BP))},
            metrics={"accuracy": term(correct_BP)},
            predicted=masked.weights_BP.sum(),
        )
