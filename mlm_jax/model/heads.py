"""Output heads on the encoder: the masked-language-model head, on gathered positions only."""

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.model.layers import ACTIVATIONS, LayerNorm, add_bias, parameter, weight_init
from mlm_jax.sharding import SHARDING


def gather_positions(hidden_BLD: jax.Array, positions_BP: jax.Array) -> jax.Array:
    """The hidden states at each row's positions: [B, P, D]."""
    return jnp.take_along_axis(hidden_BLD, positions_BP[:, :, None], axis=1)


class MaskedLanguageHead(nnx.Module):
    """Dense, activation, layer norm, then the decoder (the embedding table when tied) and a bias of its own.

    Source: google-research/bert:run_pretraining.py (get_masked_lm_output).
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        init, zeros = weight_init(cfg), jax.nn.initializers.zeros
        self.transform_DD = parameter(rngs, init, (cfg.embed_dim, cfg.embed_dim), SHARDING.transform_DD)
        self.transform_bias_D = parameter(rngs, zeros, (cfg.embed_dim,), SHARDING.vector)
        self.norm = LayerNorm(cfg.embed_dim, cfg.norm_eps, rngs=rngs)
        if not cfg.tie_embeddings:
            self.decoder_VD = parameter(rngs, init, (cfg.vocab_size, cfg.embed_dim), SHARDING.embedding_VD)
        self.output_bias_V = parameter(rngs, zeros, (cfg.vocab_size,), SHARDING.output_bias_V)
        self.cfg = cfg

    def __call__(self, hidden_BPD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
        """Logits [B, P, V] in float32, sharded over the vocabulary where the mesh has a tensor axis."""
        with jax.named_scope("head"):
            x_BPD = jnp.einsum("BPD,DE->BPE", hidden_BPD, self.transform_DD[...], out_sharding=SHARDING.hidden_BLD)
            x_BPD = ACTIVATIONS[self.cfg.activation](add_bias(x_BPD, self.transform_bias_D[...], (2,)))
            x_BPD = self.norm(x_BPD)
            decoder_VD = embedding_VD if self.cfg.tie_embeddings else self.decoder_VD[...]
            logits_BPV = jnp.einsum(
                "BPD,VD->BPV",
                x_BPD,
                decoder_VD,
                out_sharding=SHARDING.logits_BPV,
                preferred_element_type=jnp.float32,
            )
            return add_bias(logits_BPV, self.output_bias_V[...], (2,))
