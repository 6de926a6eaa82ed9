"""The encoder: embeddings, then a stack of transformer blocks, scanned or unrolled over stacked parameters."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ComputeConfig, ModelConfig
from mlm_jax.model.attention import KERNEL_RESULTS, Attention, choose_implementation
from mlm_jax.model.embeddings import Embeddings, segment_positions
from mlm_jax.model.layers import ACTIVATIONS, DENSE_RESULTS, LayerNorm, add_bias, dense, dropout, parameter, weight_init
from mlm_jax.segments import attended
from mlm_jax.sharding import REPLICAS, ROWS, SHARDING, gather


@dataclasses.dataclass(frozen=True)
class Compute:
    """`ComputeConfig` with every "auto" resolved for a platform, except attention, which also depends on the length."""

    dtype: jnp.dtype
    scan_layers: bool
    remat: str
    attention: str
    platform: str

    @classmethod
    def resolve(cls, cfg: ComputeConfig, platform: str | None = None) -> "Compute":
        platform = platform or jax.default_backend()
        dtype = {"auto": "float32" if platform == "cpu" else "bfloat16"}.get(cfg.dtype, cfg.dtype)
        # Unrolled is 30% faster on a CPU; elsewhere a scan compiles in a third of the time and bounds memory. So it does on
        # a CPU that recomputes: unrolled, XLA:CPU keeps most of what rematerialisation is there to free.
        scan = platform != "cpu" or cfg.remat != "none" if cfg.layers == "auto" else cfg.layers == "scan"
        return cls(jnp.dtype(dtype), scan, cfg.remat, cfg.attention, platform)

    @property
    def dropout_impl(self) -> str | None:
        """The random-bit generator of dropout: the hardware's where there is one, else threefry."""
        return None if self.platform == "cpu" else "rbg"


class Mlp(nnx.Module):
    """Two dense layers with an activation between."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        init, zeros = weight_init(cfg), jax.nn.initializers.zeros
        self.up_DF = parameter(rngs, init, (cfg.embed_dim, cfg.mlp_dim), SHARDING.up_DF)
        self.up_bias_F = parameter(rngs, zeros, (cfg.mlp_dim,), SHARDING.up_bias_F)
        self.down_FD = parameter(rngs, init, (cfg.mlp_dim, cfg.embed_dim), SHARDING.down_FD)
        self.down_bias_D = parameter(rngs, zeros, (cfg.embed_dim,), SHARDING.vector)
        self.activation = cfg.activation

    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        up_BLF = dense(hidden_BLD, self.up_DF[...], SHARDING.mlp_BLF)
        up_BLF = ACTIVATIONS[self.activation](add_bias(up_BLF, self.up_bias_F[...], (2,)))
        out_BLD = dense(up_BLF, self.down_FD[...], SHARDING.hidden_BLD)
        return add_bias(out_BLD, self.down_bias_D[...], (2,))


class Block(nnx.Module):
    """A post-norm transformer block: each sublayer's output is dropped out, added, then normalised (BERT)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(cfg, rngs=rngs)
        self.attention_norm = LayerNorm(cfg.embed_dim, cfg.norm_eps, rngs=rngs)
        self.mlp = Mlp(cfg, rngs=rngs)
        self.mlp_norm = LayerNorm(cfg.embed_dim, cfg.norm_eps, rngs=rngs)
        self.dropout = cfg.dropout

    def __call__(
        self,
        hidden_BLD: jax.Array,
        segment_ids_BL: jax.Array,
        key: jax.Array | None,
        implementation: str,
        causal_B: jax.Array | None = None,
    ) -> jax.Array:
        keys = (None, None, None) if key is None else tuple(jax.random.split(key, 3))
        with jax.named_scope("attention"):
            mixed_BLD = self.attention(hidden_BLD, segment_ids_BL, keys[0], implementation, causal_B)
            mixed_BLD = dropout(mixed_BLD, self.dropout, keys[1])
        hidden_BLD = self.attention_norm(hidden_BLD + mixed_BLD)
        with jax.named_scope("mlp"):
            mlp_BLD = dropout(self.mlp(hidden_BLD), self.dropout, keys[2])
        return self.mlp_norm(hidden_BLD + mlp_BLD)


class Encoder(nnx.Module):
    """Source: BERT (Devlin et al., 2019) and RoBERTa (Liu et al., 2019), by the fields of `ModelConfig`.

    Tables of another width than the model's are projected to it after their norm (google-research/electra:modeling.py).
    """

    def __init__(self, cfg: ModelConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.embeddings = Embeddings(cfg, rngs=rngs)
        if cfg.embedding_dim != cfg.embed_dim:
            # TensorFlow's default, which ELECTRA keeps here.
            glorot, shape = jax.nn.initializers.glorot_uniform(), (cfg.embedding_dim, cfg.embed_dim)
            self.projection_ED = parameter(rngs, glorot, shape, SHARDING.transform_DD)
            self.projection_bias_D = parameter(rngs, jax.nn.initializers.zeros, shape[1:], SHARDING.vector)
        keys_N = jax.random.split(rngs.params(), cfg.num_layers)
        self.layers = jax.vmap(lambda key: Block(cfg, rngs=nnx.Rngs(key)))(keys_N)
        self.cfg, self.compute = cfg, compute

    def __call__(
        self,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array,
        key: jax.Array | None = None,
        token_types_BL: jax.Array | None = None,
        causal_B: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states.

        Args:
            tokens_BL: int32 token ids.
            segment_ids_BL: int32, as `mlm_jax.segments` says: what is of one segment attends to each other, and each of its
                parts counts positions from 0; 0 is padding.
            key: dropout key; None evaluates without dropout.
            token_types_BL: int32, or None for type 0 throughout.
            causal_B: bool, the rows in which no token sees a later one; None for no row.

        Returns:
            [B, L, D] in the compute dtype. Padding positions hold finite values of no meaning.
        """
        cfg, compute = self.cfg, self.compute
        implementation = choose_implementation(
            compute.attention,
            cfg,
            tokens_BL.shape[1],
            compute.platform,
            compute.dtype,
            causal_rows=causal_B is not None,
        )
        keys = None if key is None else jax.random.split(key, cfg.num_layers + 1)
        hidden_BLD = self.embeddings(
            tokens_BL,
            segment_positions(segment_ids_BL),
            token_types_BL,
            None if keys is None else keys[-1],
            compute.dtype,
        )
        if cfg.embedding_dim != cfg.embed_dim:
            hidden_BLD = dense(hidden_BLD, self.projection_ED[...], SHARDING.hidden_BLD)
            hidden_BLD = add_bias(hidden_BLD, self.projection_bias_D[...], (2,))
        layer_keys_N = None if keys is None else keys[:-1]

        def apply(hidden_BLD: jax.Array, layer: tuple[Block, jax.Array | None]) -> tuple[jax.Array, None]:
            block, layer_key = layer
            block = gather(block, ("fsdp",))
            return block(hidden_BLD, attended(segment_ids_BL), layer_key, implementation, causal_B), None

        # Within a scan nothing can be merged with the forward pass; unrolled, XLA would undo the recomputation.
        apply = _rematerialise(apply, compute.remat, prevent_cse=not compute.scan_layers)
        stacked = (self.layers, layer_keys_N)
        if compute.scan_layers:
            return jax.lax.scan(apply, hidden_BLD, stacked)[0]
        for layer in _unstack(stacked, cfg.num_layers):
            hidden_BLD, _ = apply(hidden_BLD, layer)
        return hidden_BLD


def ready(params: Any, dtype: jnp.dtype) -> Any:
    """Parameters as the model computes with them: in the compute dtype, the norms in float32, and whole on every device.

    Done once a step, outside all loops; and once more, for nothing, by a loss that is given them.
    """

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf if "norm" in jax.tree_util.keystr(path) else leaf.astype(dtype)

    return collect(jax.tree_util.tree_map_with_path(cast, params))


def collect(params: Any) -> Any:
    """Parameters whole on every device. Only the layers stay divided over `fsdp`: each is gathered where it is used."""

    def whole(path: Any, leaf: jax.Array) -> jax.Array:
        return gather(leaf, REPLICAS if "layers" in jax.tree_util.keystr(path) else ROWS)

    return jax.tree_util.tree_map_with_path(whole, params)


def _rematerialise(apply, policy: str, *, prevent_cse: bool):  # type: ignore[no-untyped-def]  # a function to a function of the same type
    if policy == "none":
        return apply
    saveable = {
        # A kernel's results are no dots; recomputing them would cost a third of attention.
        "dots": jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(KERNEL_RESULTS, DENSE_RESULTS),
        ),
        "full": jax.checkpoint_policies.nothing_saveable,
    }[policy]
    return functools.partial(jax.checkpoint, policy=saveable, prevent_cse=prevent_cse)(apply)


def _unstack(stacked, count: int):  # type: ignore[no-untyped-def]  # any pytree
    """The layers of a stacked pytree. Splitting once makes the gradient one concatenation, not `count` padded sums."""
    leaves, structure = jax.tree.flatten(stacked)

    def split(leaf: jax.Array) -> list[jax.Array]:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return [leaf[index] for index in range(count)]
        return [part.squeeze(0) for part in jax.lax.split(leaf, [1] * count)]

    return [jax.tree.unflatten(structure, parts) for parts in zip(*map(split, leaves), strict=True)]
