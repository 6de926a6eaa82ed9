"""Replaced-token detection: a small masked language model fills masks in, and the model finds where it was wrong.

Source: ELECTRA (Clark et al., 2020) and google-research/electra:run_pretraining.py, but for the masked positions, which
are distinct here and drawn with replacement there. The generator is the masked language model of `objectives.mlm`.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mlm_jax import flops, masking
from mlm_jax.config import Config, MaskingConfig, ModelConfig
from mlm_jax.model.encoder import Compute, Encoder
from mlm_jax.model.heads import DetectionHead
from mlm_jax.objectives.contract import Batch, Keys, LossSums, Params, Term
from mlm_jax.objectives.mlm import MaskedLanguageModel, frozen_masking, mask_batch
from mlm_jax.objectives.network import Network
from mlm_jax.objectives.rates import Rates, constant_rates, scheduled_rates
from mlm_jax.objectives.scoring import score_targets
from mlm_jax.sharding import SHARDING


class Discriminator(nnx.Module):
    """The encoder with a head that says of each token whether it was replaced."""

    def __init__(self, cfg: ModelConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.encoder = Encoder(cfg, compute, rngs=rngs)
        self.head = DetectionHead(cfg, rngs=rngs)

    def __call__(self, tokens_BL: jax.Array, segment_ids_BL: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Float32 logits [B, L], positive where a token looks replaced."""
        return self.head(self.encoder(tokens_BL, segment_ids_BL, key))


@dataclasses.dataclass(frozen=True)
class ReplacedTokenDetection:
    """ELECTRA's objective: `cfg.model` is the discriminator, `cfg.rtd` says what its generator is."""

    cfg: Config
    compute: Compute
    stage: int = 0

    loss_names: ClassVar[tuple[str, ...]] = ("generator", "discriminator")
    # The generator's accuracy at masked positions, then what the discriminator finds among all real tokens.
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "detection_accuracy", "precision", "recall", "auc")

    @functools.cached_property
    def generator(self) -> Network[MaskedLanguageModel]:
        """The generator, embeddings and all."""
        cfg = self.cfg.rtd.generator(self.cfg.model)
        return Network(lambda rngs: MaskedLanguageModel(cfg, self.compute, rngs=rngs), self.compute.dtype)

    @functools.cached_property
    def discriminator(self) -> Network[Discriminator]:
        """The discriminator; its parameters are those of `discriminator_params`."""
        return Network(lambda rngs: Discriminator(self.cfg.model, self.compute, rngs=rngs), self.compute.dtype)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of both networks. The discriminator's embeddings are absent where they are the generator's.

        Disentangled, they are what is added to the generator's tables, 0 at first, and a norm of their own.
        """
        generator_key, discriminator_key = jax.random.split(key)
        discriminator = self.discriminator.init(discriminator_key)
        own = discriminator["encoder"].pop("embeddings")
        if self.cfg.rtd.embedding_sharing == "disentangled":
            zeros = {name: jnp.zeros_like(table) for name, table in own.items() if name != "norm"}
            discriminator["encoder"]["embeddings"] = own | zeros
        return {"generator": self.generator.init(generator_key), "discriminator": discriminator}

    def discriminator_params(self, params: Params) -> Params:
        """The discriminator's own parameters and the embeddings that it shares: all that it computes with.

        Tied, a gradient reaches the shared tables and their norm from both networks. Disentangled, it reaches the
        generator's tables from the generator alone (DeBERTaV3, He et al., 2021; microsoft/DeBERTa:rtd_task.py).
        """
        own, embeddings = params["discriminator"], params["generator"]["encoder"]["embeddings"]
        if self.cfg.rtd.embedding_sharing == "disentangled":
            added = own["encoder"]["embeddings"]
            tables = {name: jax.lax.stop_gradient(table) for name, table in embeddings.items() if name != "norm"}
            embeddings = added | {name: table + added[name] for name, table in tables.items()}
        return own | {"encoder": own["encoder"] | {"embeddings": embeddings}}

    def logits(
        self,
        params: Params,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array,
        positions_BP: jax.Array,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The generator's logits; see `Objective`."""
        return self.generator.bind(params["generator"])(tokens_BL, segment_ids_BL, positions_BP, key)

    def loss(self, params: Params, batch: Batch, keys: Keys, vocab: masking.VocabTables) -> LossSums:
        """The generator's cross-entropy at masked positions and the discriminator's at all real ones, each weighed."""
        rtd = self.cfg.rtd
        rates = scheduled_rates(self.cfg, self.stage, keys.step)
        generator, accuracy, detection = self._run(params, batch, keys, vocab, self.cfg.masking, rates)
        loss = detection.pop("detection_loss")
        return LossSums(
            losses={
                "generator": Term(rtd.generator_weight * generator.sum, generator.weight),
                "discriminator": Term(rtd.discriminator_weight * loss.sum, loss.weight),
            },
            metrics={"accuracy": accuracy, **detection},
            predicted=generator.weight,
        )

    def evaluate(self, params: Params, batch: Batch, keys: Keys, vocab: masking.VocabTables) -> dict[str, Term]:
        """The discriminator's loss and figures, under frozen masks at the evaluation's rate and frozen samples."""
        frozen = frozen_masking(self.cfg)
        return self._run(params, batch, keys, vocab, frozen, constant_rates(frozen))[2]

    def _run(
        self,
        params: Params,
        batch: Batch,
        keys: Keys,
        vocab: masking.VocabTables,
        cfg: MaskingConfig,
        rates: Rates,
    ) -> tuple[Term, Term, dict[str, Term]]:
        """The generator's loss and accuracy, and the discriminator's `detection_terms`."""
        tokens_BL, segment_ids_BL = batch["tokens"], batch["segment_ids"]
        dropout_keys = (None, None) if keys.dropout is None else jax.random.split(keys.dropout)
        masked = mask_batch(batch, keys.mask, vocab, cfg, rates)
        logits_BPV = self.logits(params, masked.inputs_BL, segment_ids_BL, masked.positions_BP, dropout_keys[0])
        nll_BP, correct_BP = score_targets(logits_BPV, masked.targets_BP)
        keys_B = masking.example_keys(keys.mask, batch["epochs"], batch["example_ids"], static=cfg.static)
        own_keys_B = jax.vmap(lambda key: jax.random.fold_in(key, masking.streams.SAMPLES))(keys_B)
        sampled_BP = sample_tokens(own_keys_B, logits_BPV)
        corrupted_BL = insert_tokens(tokens_BL, masked, sampled_BP)
        discriminator = self.discriminator.bind(self.discriminator_params(params))
        flags_BL = discriminator(corrupted_BL, segment_ids_BL, dropout_keys[1])
        weight = masked.weights_BP.sum()
        return (
            Term((nll_BP * masked.weights_BP).sum(), weight),
            Term((correct_BP * masked.weights_BP).sum(), weight),
            detection_terms(flags_BL, corrupted_BL != tokens_BL, segment_ids_BL > 0),
        )

    def flops_per_token(self, segment_length: float, predicted: float) -> float:
        """The generator's and the discriminator's, whose head has one matrix; see `Objective`."""
        model = self.cfg.model
        generator = flops.train_flops_per_token(self.cfg.rtd.generator(model), segment_length, predicted)
        discriminator = flops.encoder_flops_per_token(model, segment_length) + 6 * model.embed_dim * (model.embed_dim + 1)
        return generator + discriminator


def sample_tokens(keys_B: jax.Array, logits_BPV: jax.Array) -> jax.Array:
    """One id for each position from the softmax of its logits: the largest logit after Gumbel noise. No gradient passes."""
    with jax.named_scope("sampling"):
        noise_BPV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BPV.shape[1:]))(keys_B)
        return jnp.argmax(logits_BPV + jax.reshard(noise_BPV, SHARDING.logits_BPV), axis=-1).astype(jnp.int32)


def insert_tokens(tokens_BL: jax.Array, masked: masking.MaskedBatch, sampled_BP: jax.Array) -> jax.Array:
    """The original tokens, of which those at the masked positions are replaced by samples; unused slots replace none."""
    places_11L = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None, None]
    here_BPL = (masked.positions_BP[:, :, None] == places_11L) & (masked.weights_BP > 0)[:, :, None]
    return jnp.where(here_BPL.any(1), (here_BPL * sampled_BP[:, :, None]).sum(1), tokens_BL)


def detection_terms(logits_BL: jax.Array, replaced_BL: jax.Array, real_BL: jax.Array) -> dict[str, Term]:
    """How well logits tell replaced tokens from original ones, over real tokens, CLS and SEP among them.

    'auc' is over the pairs of a replaced and an original token of one row, exactly, so that it is the same in any
    micro-batches: the share in which the replaced one has the higher logit, ties counting half.
    """
    with jax.named_scope("detection"):
        real_BL, replaced_BL = real_BL.astype(jnp.float32), (replaced_BL & real_BL).astype(jnp.float32)
        original_BL = real_BL - replaced_BL
        flagged_BL = (logits_BL > 0).astype(jnp.float32) * real_BL
        found, real = (flagged_BL * replaced_BL).sum(), real_BL.sum()
        nll_BL = optax.sigmoid_binary_cross_entropy(logits_BL, replaced_BL) * real_BL
        # Of each pair 1, ½ or 0, summed over the originals first: a row's count stays exact in float32.
        above_BLM = 0.5 * (jnp.sign(logits_BL[:, :, None] - logits_BL[:, None, :]) + 1.0)
        wins_BL = (above_BLM * original_BL[:, None, :]).sum(-1)
        return {
            "detection_loss": Term(nll_BL.sum(), real),
            "detection_accuracy": Term(real - jnp.abs(flagged_BL - replaced_BL).sum(), real),
            "precision": Term(found, flagged_BL.sum()),
            "recall": Term(found, replaced_BL.sum()),
            "auc": Term((wins_BL * replaced_BL).sum(), (replaced_BL.sum(-1) * original_BL.sum(-1)).sum()),
        }
