"""Input embeddings: a token table and optional ones of positions, token types and languages, then norm and dropout."""

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.model.layers import dropout, make_norm, parameter, weight_init
from mlm_jax.sharding import SHARDING, gather


def segment_positions(segment_ids_BL: jax.Array) -> jax.Array:
    """Positions that restart at 0 wherever the id changes, in every part of a packed segment: int32 [B, L]."""
    length = segment_ids_BL.shape[1]
    index_1L = jnp.arange(length, dtype=jnp.int32)[None]
    previous_BL = jnp.pad(segment_ids_BL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts_BL = jnp.where(segment_ids_BL != previous_BL, index_1L, 0)
    return index_1L - jax.lax.cummax(starts_BL, axis=1)


def lookup(table_VD: jax.Array, ids_BL: jax.Array) -> jax.Array:
    """Rows of a table, sharded as activations. A vocabulary divided over `tensor` is gathered first."""
    return gather(table_VD, ("tensor",)).at[ids_BL].get(out_sharding=SHARDING.hidden_BLD)


class Embeddings(nnx.Module):
    """Source: BERT section 3 (Devlin et al., 2019); RoBERTa's tables start after the padding id (fairseq).

    Language embeddings: XLM section 3 (Conneau and Lample, 2019). Text of no language is embedded without one.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        init, dim = weight_init(cfg), cfg.embedding_dim
        self.tokens_VD = parameter(rngs, init, (cfg.vocab_size, dim), SHARDING.embedding_VD)
        if cfg.positions == "learned":
            positions = cfg.max_positions + cfg.position_offset
            self.positions_LD = parameter(rngs, init, (positions, dim), SHARDING.table)
        if cfg.num_token_types:
            self.token_types_TD = parameter(rngs, init, (cfg.num_token_types, dim), SHARDING.table)
        if cfg.languages:
            self.languages_GD = parameter(rngs, init, (len(cfg.languages), dim), SHARDING.table)
        if cfg.embedding_norm:
            self.norm = make_norm(cfg, dim, rngs=rngs)
        self.cfg = cfg

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        token_types_BL: jax.Array | None,
        languages_BL: jax.Array | None,
        key: jax.Array | None,
        dtype: jnp.dtype,
    ) -> jax.Array:
        """Hidden states [B, L, D] in the compute dtype; token types default to 0. Languages count from 1; 0 is none."""
        with jax.named_scope("embedding"):
            hidden_BLD = lookup(self.tokens_VD[...], tokens_BL)
            if self.cfg.positions == "learned":
                hidden_BLD += lookup(self.positions_LD[...], positions_BL + self.cfg.position_offset)
            if self.cfg.num_token_types:
                types_BL = jnp.zeros_like(tokens_BL) if token_types_BL is None else token_types_BL
                hidden_BLD += lookup(self.token_types_TD[...], types_BL)
            if languages_BL is not None:
                with_none_GD = jnp.pad(self.languages_GD[...], ((1, 0), (0, 0)))
                hidden_BLD += lookup(with_none_GD, languages_BL)
            hidden_BLD = hidden_BLD.astype(dtype)
            return dropout(self.norm(hidden_BLD) if self.cfg.embedding_norm else hidden_BLD, self.cfg.dropout, key)
