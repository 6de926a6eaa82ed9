"""The encoder: embeddings, then a stack of transformer blocks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ComputeConfig, ModelConfig
from mlm_jax.model.attention import Attention, Sight, choose_implementation
from mlm_jax.model.embeddings import Embeddings, segment_positions
from mlm_jax.model.layers import (
    ACTIVATIONS,
    add_bias,
    bias_parameter,
    dense,
    dropout,
    gather_positions,
    make_norm,
    parameter,
    weight_init,
)
from mlm_jax.model.patches import Image, PatchEmbeddings
from mlm_jax.model.stack import run_layers, scanned_layers
from mlm_jax.segments import attended, languages
from mlm_jax.sharding import REPLICAS, ROWS, SHARDING, gather, is_stacked


@dataclasses.dataclass(frozen=True)
class Compute:
    """`ComputeConfig` with every "auto" resolved for a platform, except attention, which also depends on the length."""

    dtype: jnp.dtype
    scan_layers: bool
    remat: str
    attention: str
    platform: str
    device_kind: str = ""  # as JAX names it: TPU v4

    @classmethod
    def resolve(cls, cfg: ComputeConfig, device: jax.Device | None = None) -> "Compute":
        """For a device, which need not be here; by default one of those that are."""
        device = device or jax.devices()[0]
        platform = device.platform
        dtype = {"auto": "float32" if platform == "cpu" else "bfloat16"}.get(cfg.dtype, cfg.dtype)
        # Unrolled is 30% faster on a CPU; elsewhere a scan compiles in a third of the time and bounds memory. So it does on
        # a CPU that recomputes: unrolled, XLA:CPU keeps most of what rematerialisation is there to free.
        scan = platform != "cpu" or cfg.remat != "none" if cfg.layers == "auto" else cfg.layers == "scan"
        return cls(jnp.dtype(dtype), scan, cfg.remat, cfg.attention, platform, device.device_kind)

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """XLA's, for the train step: on a TPU, that gradients are summed between chips while earlier layers' are computed.

        Sums are merged up to 1 MB: one sum of all gradients could begin only after the last of them, and a merged one never
        goes on within a product. That needs 16 MB on the chip, which is all that TPU v4 has.
        """
        if self.platform != "tpu":
            return None
        return {
            "xla_enable_async_all_reduce": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": self.device_kind != "TPU v4",
            "xla_jf_crs_combiner_threshold_in_bytes": 1_000_000,
        }

    @property
    def dropout_impl(self) -> str | None:
        """The random-bit generator of dropout: the hardware's where there is one, else threefry."""
        return None if self.platform == "cpu" else "rbg"


class Mlp(nnx.Module):
    """Two dense layers with an activation between; or, gated, the activated product times another one (GLU)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        init = weight_init(cfg)
        self.up_DF = parameter(rngs, init, (cfg.embed_dim, cfg.mlp_dim), SHARDING.up_DF)
        if cfg.gated_mlp:
            self.gate_DF = parameter(rngs, init, (cfg.embed_dim, cfg.mlp_dim), SHARDING.up_DF)
        else:
            self.up_bias_F = bias_parameter(cfg, rngs, (cfg.mlp_dim,), SHARDING.up_bias_F)
        residual = weight_init(cfg, residual=True)
        self.down_FD = parameter(rngs, residual, (cfg.mlp_dim, cfg.embed_dim), SHARDING.down_FD)
        self.down_bias_D = bias_parameter(cfg, rngs, (cfg.embed_dim,), SHARDING.vector)
        self.activation, self.gated = cfg.activation, cfg.gated_mlp

    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.activation]
        up_BLF = dense(hidden_BLD, self.up_DF[...], SHARDING.mlp_BLF)
        if self.gated:
            up_BLF *= activation(dense(hidden_BLD, self.gate_DF[...], SHARDING.mlp_BLF))
        else:
            up_BLF = activation(add_bias(up_BLF, self.up_bias_F, (2,)))
        out_BLD = dense(up_BLF, self.down_FD[...], SHARDING.hidden_BLD)
        return add_bias(out_BLD, self.down_bias_D, (2,))


class Block(nnx.Module):
    """A transformer block: each sublayer's output is dropped out and added, and normalised before or behind it.

    Behind it, as BERT does, the sum is; before it, what goes into the sublayer.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(cfg, rngs=rngs)
        self.attention_norm = make_norm(cfg, cfg.embed_dim, rngs=rngs)
        self.mlp = Mlp(cfg, rngs=rngs)
        self.mlp_norm = make_norm(cfg, cfg.embed_dim, rngs=rngs)
        self.dropout, self.pre_norm = cfg.dropout, cfg.pre_norm

    def __call__(
        self,
        hidden_BLD: jax.Array,
        sight: Sight,
        key: jax.Array | None,
        *,
        normed: bool = False,
        positions_BP: jax.Array | None = None,
    ) -> jax.Array:
        """The next hidden states.

        Args:
            normed: whether these need no norm before the attention.
            positions_BP: where they are wanted, [B, P, D]; None for everywhere. Behind attention every L is then a P.
        """
        keys = (None, None, None) if key is None else tuple(jax.random.split(key, 3))
        with jax.named_scope("attention"):
            input_BLD = self.attention_norm(hidden_BLD) if self.pre_norm and not normed else hidden_BLD
            mixed_BLD = dropout(self.attention(input_BLD, sight, keys[0], positions_BP), self.dropout, keys[1])
        hidden_BLD = gather_positions(hidden_BLD, positions_BP) + mixed_BLD
        if not self.pre_norm:
            hidden_BLD = self.attention_norm(hidden_BLD)
        with jax.named_scope("mlp"):
            input_BLD = self.mlp_norm(hidden_BLD) if self.pre_norm else hidden_BLD
            mlp_BLD = dropout(self.mlp(input_BLD), self.dropout, keys[2])
        hidden_BLD = hidden_BLD + mlp_BLD
        return hidden_BLD if self.pre_norm else self.mlp_norm(hidden_BLD)


class Encoder(nnx.Module):
    """BERT (Devlin et al., 2019), RoBERTa (Liu et al., 2019), ModernBERT (Warner et al., 2024), NeoBERT (Le Breton et al.,
    2025) and what lies between them, by the fields of `ModelConfig`.

    Tables of another width than the model's are projected to it after their norm (google-research/electra:modeling.py).
    """

    def __init__(self, cfg: ModelConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.embeddings = Embeddings(cfg, rngs=rngs)
        if cfg.embedding_dim != cfg.embed_dim:
            # TensorFlow's default, which ELECTRA keeps here.
            glorot, shape = jax.nn.initializers.glorot_uniform(), (cfg.embedding_dim, cfg.embed_dim)
            self.projection_ED = parameter(rngs, glorot, shape, SHARDING.transform_DD)
            self.projection_bias_D = bias_parameter(cfg, rngs, shape[1:], SHARDING.vector)
        if cfg.image_size:
            self.patches = PatchEmbeddings(cfg, rngs=rngs)
        keys_N = jax.random.split(rngs.params(), cfg.num_layers)
        self.layers = jax.vmap(lambda key: Block(cfg, rngs=nnx.Rngs(key)))(keys_N)
        if cfg.pre_norm:
            if not cfg.first_norm:
                self.layers.attention_norm = jax.tree.map(lambda leaf: leaf[1:], self.layers.attention_norm)
            self.final_norm = make_norm(cfg, cfg.embed_dim, rngs=rngs)
        self.cfg, self.compute = cfg, compute

    def __call__(
        self,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array,
        key: jax.Array | None = None,
        token_types_BL: jax.Array | None = None,
        causal_B: jax.Array | None = None,
        image: Image | None = None,
        positions_BP: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states.

        Where the last layer is not part of a scan, only the wanted positions are computed with behind its attention. If
        they are 15%, BERT saves five eighths of a layer's products with weights.

        Args:
            tokens_BL: int32 token ids.
            segment_ids_BL: int32, as `mlm_jax.segments` says: what is of one segment attends to each other, and each of its
                parts counts positions from 0; 0 is padding.
            key: dropout key; None evaluates without dropout.
            token_types_BL: int32, or None for type 0 throughout.
            causal_B: bool, the rows in which no token sees a later one; None for no row.
            image: what the first segment of each row sees, where the model has patches; None for the text alone.
            positions_BP: int32, where hidden states are wanted; None for everywhere.

        Returns:
            [B, L, D] in the compute dtype, or with an image [B, L + N, D], its patches behind the text; with positions
            [B, P, D]. Padding positions hold finite values of no meaning.
        """
        cfg, compute = self.cfg, self.compute
        num_patches = 0 if image is None else cfg.num_patches
        implementation = choose_implementation(
            compute.attention,
            cfg,
            tokens_BL.shape[1] + num_patches,
            compute.platform,
            compute.dtype,
            causal_rows=causal_B is not None,
        )
        keys = None if key is None else jax.random.split(key, cfg.num_layers + 1)
        positions_BL = segment_positions(segment_ids_BL)
        languages_BL = languages(segment_ids_BL) if cfg.languages else None
        embedding_key = None if keys is None else keys[-1]
        hidden_BLD = self.embeddings(tokens_BL, positions_BL, token_types_BL, languages_BL, embedding_key, compute.dtype)
        if cfg.embedding_dim != cfg.embed_dim:
            hidden_BLD = dense(hidden_BLD, self.projection_ED[...], SHARDING.hidden_BLD)
            hidden_BLD = add_bias(hidden_BLD, self.projection_bias_D, (2,))
        segments_BL = attended(segment_ids_BL)
        if cfg.image_size:
            hidden_BLD = self.patches(hidden_BLD, image, None if keys is None else jax.random.fold_in(keys[-1], 1))
            segments_BL = jnp.pad(segments_BL, ((0, 0), (0, num_patches)), constant_values=1)
        sees_all, sees_window = (
            Sight.of(cfg, implementation, segments_BL, causal_B, positions_BL, local=local) for local in (False, True)
        )

        last, scan = cfg.num_layers - 1, compute.scan_layers
        # To take the last layer out of a scan, the parameters and gradients of all would be copied once more.
        is_alone = last not in scanned_layers(cfg, scan=scan)
        early = is_alone and positions_BP is not None and positions_BP.shape[1] < hidden_BLD.shape[1]

        def apply(index: int, hidden_BLD: jax.Array, layer: tuple[Block, jax.Array | None]) -> jax.Array:
            block, layer_key = gather(gather(layer[0], REPLICAS), ("fsdp",)), layer[1]
            sight = sees_window if cfg.is_local(index) else sees_all
            wanted_BP = positions_BP if early and index == last else None
            return block(hidden_BLD, sight, layer_key, normed=index == 0 and not cfg.first_norm, positions_BP=wanted_BP)

        stacked = (self.layers, None if keys is None else keys[:-1])
        hidden_BLD = run_layers(apply, hidden_BLD, stacked, cfg, scan=scan, remat=compute.remat)
        hidden_BLD = gather_positions(hidden_BLD, None if early else positions_BP)
        return self.final_norm(hidden_BLD) if cfg.pre_norm else hidden_BLD


def ready(params: Any, dtype: jnp.dtype, *, layers: bool = False) -> Any:
    """Parameters as the model computes with them: in the compute dtype, the norms in float32, and collected.

    Done once a step, outside all loops; and once more, for nothing, by a loss that is given them.
    """

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf if "norm" in jax.tree_util.keystr(path) else leaf.astype(dtype)

    return collect(jax.tree_util.tree_map_with_path(cast, params), layers=layers)


def collect(params: Any, *, layers: bool) -> Any:
    """Parameters whole on every device, but for the layers, each of which is gathered where it is used.

    With `layers` they are gathered here too, once for all their uses, and stay divided over `fsdp` alone.
    """

    def whole(path: Any, leaf: jax.Array) -> jax.Array:
        if not is_stacked(path):
            return gather(leaf, ROWS)
        return gather(leaf, REPLICAS) if layers else leaf

    return jax.tree_util.tree_map_with_path(whole, params)
