"""Masked language modelling: mask, encode, gather the predicted positions, and score them against the vocabulary."""

import dataclasses
import functools
from typing import ClassVar

import jax
from flax import nnx

from mlm_jax import flops, masking
from mlm_jax.config import Config, MaskingConfig, ModelConfig
from mlm_jax.model.encoder import Compute, Encoder
from mlm_jax.model.heads import MaskedLanguageHead
from mlm_jax.objectives.contract import Batch, Keys, LossSums, Params, Term
from mlm_jax.objectives.network import Network
from mlm_jax.objectives.rates import Rates, constant_rates, scheduled_rates
from mlm_jax.objectives.scoring import score_targets


class MaskedLanguageModel(nnx.Module):
    """The encoder with its masked-language-model head."""

    def __init__(self, cfg: ModelConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.encoder = Encoder(cfg, compute, rngs=rngs)
        self.head = MaskedLanguageHead(cfg, rngs=rngs)

    def __call__(
        self, tokens_BL: jax.Array, segment_ids_BL: jax.Array, positions_BP: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """Float32 logits [B, P, V] at the given positions only."""
        return self.predict(self.encoder(tokens_BL, segment_ids_BL, key, positions_BP=positions_BP))

    def predict(self, hidden_BPD: jax.Array) -> jax.Array:
        """Float32 logits [B, P, V] from the encoder's hidden states."""
        return self.head(hidden_BPD, self.encoder.embeddings.tokens_VD[...].astype(hidden_BPD.dtype))


@dataclasses.dataclass(frozen=True)
class MaskedLM:
    """BERT's objective with RoBERTa's dynamic masking."""

    cfg: Config
    compute: Compute
    stage: int = 0

    loss_names: ClassVar[tuple[str, ...]] = ("mlm",)
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy",)

    @functools.cached_property
    def network(self) -> Network[MaskedLanguageModel]:
        """The encoder and its head."""
        return Network(lambda rngs: MaskedLanguageModel(self.cfg.model, self.compute, rngs=rngs), self.compute.dtype)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters; see `Objective`."""
        return self.network.init(key)

    def logits(
        self,
        params: Params,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array,
        positions_BP: jax.Array,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Float32 logits [B, P, V] at the given positions; see `Objective`."""
        return self.network.bind(params)(tokens_BL, segment_ids_BL, positions_BP, key)

    def loss(self, params: Params, batch: Batch, keys: Keys, vocab: masking.VocabTables) -> LossSums:
        """Cross-entropy at the masked positions, and the accuracy there."""
        rates = scheduled_rates(self.cfg, self.stage, keys.step)
        masked = mask_batch(batch, keys.mask, vocab, self.cfg.masking, rates)
        logits_BPV = self.logits(params, masked.inputs_BL, batch["segment_ids"], masked.positions_BP, keys.dropout)
        nll_BP, correct_BP = score_targets(logits_BPV, masked.targets_BP)
        weight = masked.weights_BP.sum()
        return LossSums(
            losses={"mlm": Term((nll_BP * masked.weights_BP).sum(), weight)},
            metrics={"accuracy": Term((correct_BP * masked.weights_BP).sum(), weight)},
            predicted=weight,
        )

    def evaluate(self, params: Params, batch: Batch, keys: Keys, vocab: masking.VocabTables) -> dict[str, Term]:
        """Nothing beside what every objective is measured by."""
        return {}

    def flops_per_token(self, segment_length: float, predicted: float) -> float:
        """The encoder's and the head's; see `Objective`."""
        return flops.train_flops_per_token(self.cfg.model, segment_length, predicted)


def mask_held_out(batch: Batch, key: jax.Array, vocab: masking.VocabTables, cfg: Config) -> masking.MaskedBatch:
    """A batch under the frozen masks that any two runs are compared by: 80/10/10 of single tokens."""
    frozen = MaskingConfig(rate=cfg.evaluation.mask_rate, static=True)
    return mask_batch(batch, key, vocab, frozen, constant_rates(frozen))


def frozen_masking(cfg: Config) -> MaskingConfig:
    """A run's own policy, with the same masks in every evaluation and at its rate, for what only its objective measures."""
    return dataclasses.replace(cfg.masking, static=True, rate=cfg.evaluation.mask_rate, rate_spread=0.0)


def mask_batch(
    batch: Batch, key: jax.Array, vocab: masking.VocabTables, cfg: MaskingConfig, rates: Rates
) -> masking.MaskedBatch:
    """A batch masked by a config's policy, each example by its own key, with room for what a full row needs."""
    with jax.named_scope("masking"):
        keys_B = masking.example_keys(key, batch["epochs"], batch["example_ids"], static=cfg.static)
        return masking.mask_tokens(
            keys_B,
            batch["tokens"],
            batch["segment_ids"],
            vocab,
            rate=rates.rate,
            num_slots=masking.num_slots(batch["tokens"].shape[1], rates.largest),
            policy="span" if cfg.policy == "ngram" else cfg.policy,
            mask_prob=rates.mask_prob,
            random_prob=rates.random_prob,
            random_from=cfg.random_from,
            include_special=cfg.include_special,
            rate_spread=cfg.rate_spread,
            span_lengths=cfg.span_lengths,
        )
