"""Heads that are fine-tuned on the encoder: one that reads a whole text, and one that reads every token."""

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.model.layers import ACTIVATIONS, add_bias, dense, dropout, parameter, weight_init
from mlm_jax.sharding import SHARDING


class TextHead(nnx.Module):
    """One row of logits for a text: of its first token, through a dense layer and an activation, or of its tokens' mean.

    Source: google-research/bert:modeling.py (the pooler) and run_classifier.py.
    """

    def __init__(self, cfg: ModelConfig, outputs: int, pooling: str, activation: str, *, rngs: nnx.Rngs):
        if pooling == "cls":
            dim = cfg.embed_dim
            self.pooler_DD = parameter(rngs, weight_init(cfg), (dim, dim), SHARDING.transform_DD)
            self.pooler_bias_D = parameter(rngs, jax.nn.initializers.zeros, (dim,), SHARDING.vector)
        self.output = TokenHead(cfg, outputs, rngs=rngs)
        self.pooling, self.activation = pooling, activation

    def __call__(self, hidden_BLD: jax.Array, segment_ids_BL: jax.Array, key: jax.Array | None) -> jax.Array:
        """Float32 logits [B, 1, C]."""
        with jax.named_scope("head"):
            if self.pooling == "mean":
                return self.output(mean_of_tokens(hidden_BLD, segment_ids_BL), key)
            first_B1D = dense(hidden_BLD[:, :1], self.pooler_DD[...], SHARDING.hidden_BLD)
            activation = jnp.tanh if self.activation == "tanh" else ACTIVATIONS[self.activation]
            return self.output(activation(add_bias(first_B1D, self.pooler_bias_D[...], (2,))), key)


class TokenHead(nnx.Module):
    """Logits for every token: dropout and one dense layer."""

    def __init__(self, cfg: ModelConfig, outputs: int, *, rngs: nnx.Rngs):
        self.output_DC = parameter(rngs, weight_init(cfg), (cfg.embed_dim, outputs), SHARDING.table)
        self.output_bias_C = parameter(rngs, jax.nn.initializers.zeros, (outputs,), SHARDING.vector)
        self.dropout = cfg.dropout

    def __call__(self, hidden_BLD: jax.Array, key: jax.Array | None) -> jax.Array:
        """Float32 logits [B, L, C]."""
        with jax.named_scope("head"):
            logits_BLC = jnp.einsum(
                "BLD,DC->BLC",
                dropout(hidden_BLD, self.dropout, key),
                self.output_DC[...],
                out_sharding=SHARDING.hidden_BLD,
                preferred_element_type=jnp.float32,
            )
            return add_bias(logits_BLC, self.output_bias_C[...], (2,))


def mean_of_tokens(hidden_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """The mean over a row's tokens without its padding, [B, 1, D]; zeros for a row of padding."""
    real_BL1 = (segment_ids_BL > 0).astype(jnp.float32)[:, :, None]
    sums_B1D = (hidden_BLD.astype(jnp.float32) * real_BL1).sum(1, keepdims=True)
    return (sums_B1D / jnp.maximum(real_BL1.sum(1, keepdims=True), 1.0)).astype(hidden_BLD.dtype)
