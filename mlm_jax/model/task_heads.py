"""Heads that are fine-tuned on the encoder: one that reads a whole text, and one that reads every token."""

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig, TaskConfig
from mlm_jax.model.layers import ACTIVATIONS, add_bias, dense, dropout, make_norm, parameter, weight_init
from mlm_jax.sharding import SHARDING

_ACTIVATIONS = ACTIVATIONS | {"tanh": jnp.tanh}


class TextHead(nnx.Module):
    """One row of logits for a text: of its first token, through a dense layer and an activation, or of its tokens' mean.

    With a transform it stands in that dense layer's place, and behind the mean too.

    Source: google-research/bert:modeling.py (the pooler) and run_classifier.py.
    """

    def __init__(self, cfg: ModelConfig, outputs: int, task: TaskConfig, *, rngs: nnx.Rngs):
        self.has_pooler = task.pooling == "cls" and not task.transform
        if self.has_pooler:
            dim = cfg.embed_dim
            self.pooler_DD = parameter(rngs, weight_init(cfg), (dim, dim), SHARDING.transform_DD)
            self.pooler_bias_D = parameter(rngs, jax.nn.initializers.zeros, (dim,), SHARDING.vector)
        self.output = TokenHead(cfg, outputs, task, rngs=rngs)
        self.pooling, self.activation = task.pooling, task.activation

    def __call__(self, hidden_BLD: jax.Array, segment_ids_BL: jax.Array, key: jax.Array | None) -> jax.Array:
        """Float32 logits [B, 1, C]."""
        with jax.named_scope("head"):
            if self.pooling == "mean":
                return self.output(mean_of_tokens(hidden_BLD, segment_ids_BL), key)
            first_B1D = hidden_BLD[:, :1]
            if self.has_pooler:
                first_B1D = dense(first_B1D, self.pooler_DD[...], SHARDING.hidden_BLD)
                first_B1D = _ACTIVATIONS[self.activation](add_bias(first_B1D, self.pooler_bias_D[...], (2,)))
            return self.output(first_B1D, key)


class TokenHead(nnx.Module):
    """Logits for every token: dropout and one dense layer, behind a transform where the task has one."""

    def __init__(self, cfg: ModelConfig, outputs: int, task: TaskConfig, *, rngs: nnx.Rngs):
        self.transform = Transform(cfg, task, rngs=rngs) if task.transform else None
        self.output_DC = parameter(rngs, weight_init(cfg), (cfg.embed_dim, outputs), SHARDING.table)
        self.output_bias_C = parameter(rngs, jax.nn.initializers.zeros, (outputs,), SHARDING.vector)
        self.dropout = cfg.dropout

    def __call__(self, hidden_BLD: jax.Array, key: jax.Array | None) -> jax.Array:
        """Float32 logits [B, L, C]."""
        with jax.named_scope("head"):
            x_BLD = hidden_BLD if self.transform is None else self.transform(hidden_BLD)
            logits_BLC = jnp.einsum(
                "BLD,DC->BLC",
                dropout(x_BLD, self.dropout, key),
                self.output_DC[...],
                out_sharding=SHARDING.hidden_BLD,
                preferred_element_type=jnp.float32,
            )
            return add_bias(logits_BLC, self.output_bias_C[...], (2,))


class Transform(nnx.Module):
    """A dense layer, an activation and a norm, as before the decoder of masked tokens.

    Source: huggingface/transformers:src/transformers/models/modernbert/modeling_modernbert.py (ModernBertPredictionHead).
    """

    def __init__(self, cfg: ModelConfig, task: TaskConfig, *, rngs: nnx.Rngs):
        dim, zeros = cfg.embed_dim, jax.nn.initializers.zeros
        self.dense_DD = parameter(rngs, weight_init(cfg, residual=True), (dim, dim), SHARDING.transform_DD)
        self.dense_bias_D = parameter(rngs, zeros, (dim,), SHARDING.vector) if task.transform_bias else None
        self.norm = make_norm(cfg, dim, rngs=rngs)
        self.activation = task.activation

    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        x_BLD = dense(hidden_BLD, self.dense_DD[...], SHARDING.hidden_BLD)
        return self.norm(_ACTIVATIONS[self.activation](add_bias(x_BLD, self.dense_bias_D, (2,))))


def mean_of_tokens(hidden_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """The mean over a row's tokens without its padding, [B, 1, D]; zeros for a row of padding."""
    real_BL1 = (segment_ids_BL > 0).astype(jnp.float32)[:, :, None]
    sums_B1D = (hidden_BLD.astype(jnp.float32) * real_BL1).sum(1, keepdims=True)
    return (sums_B1D / jnp.maximum(real_BL1.sum(1, keepdims=True), 1.0)).astype(hidden_BLD.dtype)
