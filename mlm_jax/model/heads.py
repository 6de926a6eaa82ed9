"""Output heads on the encoder: for masked tokens, for tokens between a span's ends, and the detector of replaced ones."""

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig, SpanBoundaryConfig
from mlm_jax.model.embeddings import lookup
from mlm_jax.model.layers import ACTIVATIONS, add_bias, bias_parameter, dense, make_norm, parameter, weight_init
from mlm_jax.sharding import SHARDING


class MaskedLanguageHead(nnx.Module):
    """Dense, activation, layer norm, then the decoder (the embedding table when tied) and a bias of its own.

    The dense layer goes to the width of the embedding table. Without a transform (NeoBERT) the decoder is all.

    Source: google-research/bert:run_pretraining.py (get_masked_lm_output).
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        init, zeros, dim = weight_init(cfg), jax.nn.initializers.zeros, cfg.embedding_dim
        if cfg.head_transform:
            # ModernBERT draws it as what is added to the residual stream.
            transform = weight_init(cfg, residual=True)
            self.transform_DD = parameter(rngs, transform, (cfg.embed_dim, dim), SHARDING.transform_DD)
            self.transform_bias_D = bias_parameter(cfg, rngs, (dim,), SHARDING.vector)
            self.norm = make_norm(cfg, dim, rngs=rngs)
        if not cfg.tie_embeddings:
            self.decoder_VD = parameter(rngs, init, (cfg.vocab_size, dim), SHARDING.embedding_VD)
        self.output_bias_V = parameter(rngs, zeros, (cfg.vocab_size,), SHARDING.output_bias_V)
        self.cfg = cfg

    def __call__(self, hidden_BPD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
        """Logits [B, P, V] in float32, sharded over the vocabulary where the mesh has a tensor axis."""
        with jax.named_scope("head"):
            x_BPD = hidden_BPD
            if self.cfg.head_transform:
                x_BPD = dense(x_BPD, self.transform_DD[...], SHARDING.hidden_BLD)
                x_BPD = ACTIVATIONS[self.cfg.activation](add_bias(x_BPD, self.transform_bias_D, (2,)))
                x_BPD = self.norm(x_BPD)
            decoder_VD = embedding_VD if self.cfg.tie_embeddings else self.decoder_VD[...]
            return decode(x_BPD, decoder_VD, self.output_bias_V[...])


class SpanBoundaryHead(nnx.Module):
    """A masked token from the hidden states of its span's ends and its distance from the left one.

    Two layers, each dense, activation and layer norm, then the decoder (the embedding table when tied) and a bias of its
    own. The first layer reads [left; right; position], here as a sum of three products.

    Source: Joshi et al., 2020, section 3.2; facebookresearch/SpanBERT:pretraining/fairseq/models/pair_bert.py.
    """

    def __init__(self, cfg: ModelConfig, span: SpanBoundaryConfig, *, rngs: nnx.Rngs):
        init, zeros, dim = weight_init(cfg), jax.nn.initializers.zeros, cfg.embed_dim
        self.left_DD = parameter(rngs, init, (dim, dim), SHARDING.transform_DD)
        self.right_DD = parameter(rngs, init, (dim, dim), SHARDING.transform_DD)
        self.positions_TE = parameter(rngs, init, (span.max_targets, span.position_dim), SHARDING.table)
        self.position_ED = parameter(rngs, init, (span.position_dim, dim), SHARDING.table)
        self.first_bias_D = bias_parameter(cfg, rngs, (dim,), SHARDING.vector)
        self.first_norm = make_norm(cfg, dim, rngs=rngs)
        table = cfg.embedding_dim
        self.second_DE = parameter(rngs, init, (dim, table), SHARDING.transform_DD)
        self.second_bias_E = bias_parameter(cfg, rngs, (table,), SHARDING.vector)
        self.second_norm = make_norm(cfg, table, rngs=rngs)
        if not cfg.tie_embeddings:
            self.decoder_VD = parameter(rngs, init, (cfg.vocab_size, table), SHARDING.embedding_VD)
        self.output_bias_V = parameter(rngs, zeros, (cfg.vocab_size,), SHARDING.output_bias_V)
        self.cfg = cfg

    def __call__(
        self, left_BPD: jax.Array, right_BPD: jax.Array, offsets_BP: jax.Array, embedding_VD: jax.Array
    ) -> jax.Array:
        """Logits [B, P, V] in float32, sharded as those of masked tokens are.

        Args:
            offsets_BP: int32 in [0, max_targets): 0 for the token next to the left end.
        """
        with jax.named_scope("head"):
            activation = ACTIVATIONS[self.cfg.activation]
            x_BPD = _dense(left_BPD, self.left_DD) + _dense(right_BPD, self.right_DD)
            x_BPD += _dense(lookup(self.positions_TE[...], offsets_BP), self.position_ED)
            x_BPD = self.first_norm(activation(add_bias(x_BPD, self.first_bias_D, (2,))))
            x_BPE = _dense(x_BPD, self.second_DE)
            x_BPE = self.second_norm(activation(add_bias(x_BPE, self.second_bias_E, (2,))))
            decoder_VD = embedding_VD if self.cfg.tie_embeddings else self.decoder_VD[...]
            return decode(x_BPE, decoder_VD, self.output_bias_V[...])


def decode(hidden_BPD: jax.Array, decoder_VD: jax.Array, bias_V: jax.Array) -> jax.Array:
    """Logits [B, P, V] in float32, sharded over the vocabulary where the mesh has a tensor axis."""
    logits_BPV = jnp.einsum(
        "BPD,VD->BPV", hidden_BPD, decoder_VD, out_sharding=SHARDING.logits_BPV, preferred_element_type=jnp.float32
    )
    return add_bias(logits_BPV, bias_V, (2,))


def _dense(input_BPE: jax.Array, kernel_ED: nnx.Param[jax.Array]) -> jax.Array:
    return dense(input_BPE, kernel_ED[...], SHARDING.hidden_BLD)


class DetectionHead(nnx.Module):
    """Dense, activation, then one logit for each position.

    Source: google-research/electra:run_pretraining.py (_get_discriminator_output); the last kernel is drawn as there, by
    TensorFlow's default.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        dim, zeros, glorot = cfg.embed_dim, jax.nn.initializers.zeros, jax.nn.initializers.glorot_uniform()
        self.transform_DD = parameter(rngs, weight_init(cfg), (dim, dim), SHARDING.transform_DD)
        self.transform_bias_D = bias_parameter(cfg, rngs, (dim,), SHARDING.vector)
        self.output_D1 = parameter(rngs, glorot, (dim, 1), SHARDING.table)
        self.output_bias_1 = parameter(rngs, zeros, (1,), SHARDING.vector)
        self.activation = cfg.activation

    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        """Logits [B, L] in float32."""
        with jax.named_scope("head"):
            x_BLD = dense(hidden_BLD, self.transform_DD[...], SHARDING.hidden_BLD)
            x_BLD = ACTIVATIONS[self.activation](add_bias(x_BLD, self.transform_bias_D, (2,)))
            logits_BL1 = jnp.einsum(
                "BLD,DO->BLO",
                x_BLD,
                self.output_D1[...],
                out_sharding=SHARDING.hidden_BLD,
                preferred_element_type=jnp.float32,
            )
            return add_bias(logits_BL1, self.output_bias_1[...], (2,)).squeeze(-1)
