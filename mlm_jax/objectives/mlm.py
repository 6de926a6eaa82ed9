"""Masked language modelling: mask, encode, gather the predicted positions, and score them against the vocabulary."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax import masking
from mlm_jax.config import Config, MaskingConfig
from mlm_jax.model.encoder import Compute, Encoder
from mlm_jax.model.heads import MaskedLanguageHead, gather_positions
from mlm_jax.objectives import Keys, LossSums, Term

Batch = dict[str, jax.Array]
Params = dict[str, Any]


class MaskedLanguageModel(nnx.Module):
    """The encoder with its masked-language-model head."""

    def __init__(self, cfg: Config, compute: Compute, *, rngs: nnx.Rngs):
        self.encoder = Encoder(cfg.model, compute, rngs=rngs)
        self.head = MaskedLanguageHead(cfg.model, rngs=rngs)

    def __call__(
        self, tokens_BL: jax.Array, segment_ids_BL: jax.Array, positions_BP: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """Float32 logits [B, P, V] at the given positions only."""
        hidden_BLD = self.encoder(tokens_BL, segment_ids_BL, key)
        hidden_BPD = gather_positions(hidden_BLD, positions_BP)
        return self.head(hidden_BPD, self.encoder.embeddings.tokens_VD[...].astype(hidden_BPD.dtype))


@dataclasses.dataclass(frozen=True)
class MaskedLM:
    """BERT's objective with RoBERTa's dynamic masking, for rows masked at one rate."""

    cfg: Config
    compute: Compute
    rate: float

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters as a nested dictionary, each in its sharding on the current mesh."""
        model = MaskedLanguageModel(self.cfg, self.compute, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])

    @functools.cached_property
    def _graphdef(self) -> Any:
        def build(key: jax.Array) -> MaskedLanguageModel:
            return MaskedLanguageModel(self.cfg, self.compute, rngs=nnx.Rngs(key))

        return nnx.split(jax.eval_shape(build, jax.random.key(0)), nnx.Param)[0]

    def logits(
        self,
        params: Params,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array,
        positions_BP: jax.Array,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Float32 logits [B, P, V] at the given positions, with `params` cast once to the compute dtype."""
        model = nnx.merge(self._graphdef, cast(params, self.compute.dtype))
        return model(tokens_BL, segment_ids_BL, positions_BP, key)

    def loss(self, params: Params, batch: Batch, keys: Keys, vocab: masking.VocabTables) -> LossSums:
        """Cross-entropy at the masked positions, and the accuracy there."""
        masked = self._mask(batch, keys.mask, vocab, self.cfg.masking, self.rate)
        logits_BPV = self.logits(params, masked.inputs_BL, batch["segment_ids"], masked.positions_BP, keys.dropout)
        nll_BP, correct_BP = score_targets(logits_BPV, masked.targets_BP)
        weight = masked.weights_BP.sum()
        return LossSums(
            losses={"mlm": Term((nll_BP * masked.weights_BP).sum(), weight)},
            metrics={"accuracy": Term((correct_BP * masked.weights_BP).sum(), weight)},
        )

    def evaluate(
        self,
        params: Params,
        batch: Batch,
        keys: Keys,
        vocab: masking.VocabTables,
        log_unigram_V: jax.Array,
    ) -> dict[str, Term]:
        """Loss and accuracy under frozen 80/10/10 masks, beside a unigram model's at the same positions."""
        frozen = MaskingConfig(rate=self.cfg.evaluation.mask_rate, static=True)
        masked = self._mask(batch, keys.mask, vocab, frozen, frozen.rate)
        logits_BPV = self.logits(params, masked.inputs_BL, batch["segment_ids"], masked.positions_BP)
        nll_BP, correct_BP = score_targets(logits_BPV, masked.targets_BP)
        weights_BP = masked.weights_BP
        weight = weights_BP.sum()
        unigram_nll_BP = -log_unigram_V.at[masked.targets_BP].get(out_sharding=jax.typeof(weights_BP).sharding.spec)
        unigram_correct_BP = (masked.targets_BP == jnp.argmax(log_unigram_V)).astype(jnp.float32)
        return {
            "loss": Term((nll_BP * weights_BP).sum(), weight),
            "accuracy": Term((correct_BP * weights_BP).sum(), weight),
            "unigram_loss": Term((unigram_nll_BP * weights_BP).sum(), weight),
            "unigram_accuracy": Term((unigram_correct_BP * weights_BP).sum(), weight),
        }

    @staticmethod
    def _mask(
        batch: Batch, key: jax.Array, vocab: masking.VocabTables, cfg: MaskingConfig, rate: float
    ) -> masking.MaskedBatch:
        with jax.named_scope("masking"):
            keys_B = masking.example_keys(key, batch["epochs"], batch["example_ids"], static=cfg.static)
            return masking.mask_tokens(
                keys_B,
                batch["tokens"],
                batch["segment_ids"],
                vocab,
                rate=rate,
                num_slots=masking.num_slots(batch["tokens"].shape[1], rate),
                policy=cfg.policy,
                mask_prob=cfg.mask_prob,
                random_prob=cfg.random_prob,
                random_from=cfg.random_from,
                include_special=cfg.include_special,
            )


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """Parameters in the compute dtype; the norms stay in float32. Done once a step, outside the stack of layers."""

    def convert(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf if "norm" in jax.tree_util.keystr(path) else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(convert, params)


def score_targets(logits_BPV: jax.Array, targets_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood in nats, and 1.0 where the target has the highest logit: both float32 [B, P].

    The target's logit is picked by comparison, not by index, so that a vocabulary sharded over devices stays sharded.
    """
    with jax.named_scope("head_loss"):
        vocab_11V = jnp.arange(logits_BPV.shape[-1], dtype=jnp.int32)[None, None]
        gold_BP = jnp.where(targets_BP[:, :, None] == vocab_11V, logits_BPV, 0.0).sum(-1)
        top_BP = jax.lax.stop_gradient(logits_BPV.max(-1))
        log_normaliser_BP = top_BP + jnp.log(jnp.exp(logits_BPV - top_BP[:, :, None]).sum(-1))
        return log_normaliser_BP - gold_BP, (gold_BP >= top_BP).astype(jnp.float32)
