"""Self-attention within packed segments, of chosen rows causal, dispatched to the fastest path of the platform.

Segments attend only to themselves. Padding is segment 0 and attends to padding, so no row of scores is fully masked and
nothing becomes NaN. A local layer attends to a window: in blocks (`model.blocks`), so that nothing grows with L × L.
"""

import dataclasses
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mlm_jax.config import ModelConfig
from mlm_jax.errors import UserError
from mlm_jax.model import blocks, row_attention
from mlm_jax.model.layers import add_bias, bias_parameter, dense, dropout, gather_positions, parameter, weight_init
from mlm_jax.model.positions import Rotation, alibi_slopes, rotate, rotation
from mlm_jax.sharding import ROWS, SHARDING

logger = logging.getLogger(__name__)


KERNEL_RESULTS = "attention"  # the name under which rematerialisation may keep them


@dataclasses.dataclass(frozen=True)
class Sight:
    """What the tokens of a batch see of each other in a layer, and how that is computed.

    Attributes:
        implementation: "xla", "row" or "splash" (TPU) or "cudnn" (GPU), as `choose_implementation` names it.
        segment_ids_BL: int32; equal ids see each other.
        causal_B: bool, the rows in which a token sees itself and what comes before it in its segment; None for no row.
        window: how many tokens to either side are seen at most; 0 for the whole segment.
        rotation: by which queries and keys are turned, where positions are.
        slopes: of each head, how much scores fall with every token of distance; empty where they do not.
    """

    implementation: str
    segment_ids_BL: jax.Array
    causal_B: jax.Array | None = None
    window: int = 0
    rotation: Rotation | None = None
    slopes: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        cfg: ModelConfig,
        implementation: str,
        segment_ids_BL: jax.Array,
        causal_B: jax.Array | None,
        positions_BL: jax.Array,
        *,
        local: bool,
    ) -> "Sight":
        """What a global or a local layer of this architecture sees."""
        slopes = tuple(map(float, alibi_slopes(cfg.num_heads))) if cfg.positions == "alibi" else ()
        turns = None
        if cfg.positions == "rope":
            turns = rotation(positions_BL, cfg.head_dim, cfg.local_rope_base if local else cfg.rope_base)
        return cls(implementation, segment_ids_BL, causal_B, cfg.local_window if local else 0, turns, slopes)


class Attention(nnx.Module):
    """Multi-head self-attention.

    For a kernel the projections go straight into its layout. For XLA's own attention they are plain matrix products with
    heads and head dimension as one: XLA:CPU otherwise transposes every weight before it multiplies.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        init = weight_init(cfg)
        shape_DHK = (cfg.embed_dim, cfg.num_heads, cfg.head_dim)
        shape_HK = shape_DHK[1:]
        self.query_DHK = parameter(rngs, init, shape_DHK, SHARDING.projection_DHK)
        self.key_DHK = parameter(rngs, init, shape_DHK, SHARDING.projection_DHK)
        self.value_DHK = parameter(rngs, init, shape_DHK, SHARDING.projection_DHK)
        self.query_bias_HK = bias_parameter(cfg, rngs, shape_HK, SHARDING.projection_bias_HK)
        self.key_bias_HK = bias_parameter(cfg, rngs, shape_HK, SHARDING.projection_bias_HK)
        self.value_bias_HK = bias_parameter(cfg, rngs, shape_HK, SHARDING.projection_bias_HK)
        output_init = weight_init(cfg, residual=True)
        self.output_HKD = parameter(rngs, output_init, (*shape_HK, cfg.embed_dim), SHARDING.output_HKD)
        self.output_bias_D = bias_parameter(cfg, rngs, (cfg.embed_dim,), SHARDING.vector)
        self.cfg = cfg

    def __call__(
        self, hidden_BLD: jax.Array, sight: Sight, key: jax.Array | None, positions_BP: jax.Array | None = None
    ) -> jax.Array:
        """What each position takes from those that it sees: [B, L, D].

        With positions, [B, P, D] of these alone; behind the weighted mean of values every L is then a P.
        """
        if sight.implementation == "row":
            return self._by_row(hidden_BLD, sight, positions_BP)
        if sight.implementation == "splash":
            return self._by_splash(hidden_BLD, sight, positions_BP)

        def project(kernel: nnx.Param[jax.Array], bias: nnx.Param[jax.Array] | None) -> jax.Array:
            kernel_DHK = kernel[...]
            if sight.implementation == "cudnn":
                heads_BHLK = jnp.einsum("BLD,DHK->BHLK", hidden_BLD, kernel_DHK, out_sharding=SHARDING.heads_BHLK)
                return add_bias(heads_BHLK, bias, (1, 3))
            flat_DF = _merge_heads(kernel_DHK, 1)
            flat_BLF = dense(hidden_BLD, flat_DF, SHARDING.mlp_BLF)
            flat_BLF = add_bias(flat_BLF, None if bias is None else _merge_heads(bias[...], 0), (2,))
            shape_BLHK = (*hidden_BLD.shape[:2], *kernel_DHK.shape[1:])
            return jnp.reshape(flat_BLF, shape_BLHK, out_sharding=SHARDING.heads_BLHK).swapaxes(1, 2)

        query_BHLK = project(self.query_DHK, self.query_bias_HK)
        key_BHLK = project(self.key_DHK, self.key_bias_HK)
        value_BHLK = project(self.value_DHK, self.value_bias_HK)
        if sight.rotation is not None:
            query_BHLK, key_BHLK = rotate(query_BHLK, sight.rotation), rotate(key_BHLK, sight.rotation)
        dropout_rate = self.cfg.attention_dropout
        mixed_BHLK = attend(query_BHLK, key_BHLK, value_BHLK, sight, dropout_rate=dropout_rate, dropout_key=key)
        output_HKD = self.output_HKD[...]
        if sight.implementation == "cudnn":
            mixed_BHLK = gather_positions(mixed_BHLK, positions_BP, axis=2)
            out_BLD = jnp.einsum("BHLK,HKD->BLD", mixed_BHLK, output_HKD, out_sharding=SHARDING.hidden_BLD)
        else:
            flat_FD = _merge_heads(output_HKD, 0)
            shape_BLF = (*hidden_BLD.shape[:2], flat_FD.shape[0])
            flat_BLF = jnp.reshape(mixed_BHLK.swapaxes(1, 2), shape_BLF, out_sharding=SHARDING.mlp_BLF)
            out_BLD = dense(gather_positions(flat_BLF, positions_BP), flat_FD, SHARDING.hidden_BLD)
        return add_bias(out_BLD, self.output_bias_D, (2,))

    def _by_row(self, hidden_BLD: jax.Array, sight: Sight, positions_BP: jax.Array | None) -> jax.Array:
        """The same with fewer passes over activations, as a TPU needs it: the kernel takes what matrix products make.

        The bias of keys adds the same to all scores of a query, which softmax takes away again, and is left out. That of
        values passes through the weights, which sum to one, and is added after the output projection.
        """
        scale = self.cfg.head_dim**-0.5
        query_BLF, key_BLF, value_BLF = (
            dense(hidden_BLD, _merge_heads(kernel_DHK, 1), SHARDING.mlp_BLF)
            for kernel_DHK in (self.query_DHK[...] * scale, self.key_DHK[...], self.value_DHK[...])
        )
        if self.query_bias_HK is not None:
            query_BLF = add_bias(query_BLF, _merge_heads(self.query_bias_HK[...] * scale, 0), (2,))
        with jax.named_scope("attention_core"):
            mixed_BLF = checkpoint_name(_row(query_BLF, key_BLF, value_BLF, sight, self.cfg.head_dim), KERNEL_RESULTS)
        mixed_BLF = gather_positions(mixed_BLF, positions_BP)
        out_BLD = dense(mixed_BLF, _merge_heads(self.output_HKD[...], 0), SHARDING.hidden_BLD)
        return add_bias(out_BLD, self._output_and_value_bias(), (2,))

    def _by_splash(self, hidden_BLD: jax.Array, sight: Sight, positions_BP: jax.Array | None) -> jax.Array:
        """As `_by_row`, but heads are projected with the length as the last dimension: of 128 lanes, a head of 64 would
        leave half idle. The bias of keys is left out only where they are not turned.
        """

        def project(kernel_DHK: jax.Array) -> jax.Array:
            return jnp.einsum("BLD,DHK->BHKL", hidden_BLD, kernel_DHK, out_sharding=SHARDING.heads_BHLK)

        scale = self.cfg.head_dim**-0.5
        query_bias_HK = None if self.query_bias_HK is None else self.query_bias_HK[...] * scale
        query_BHKL = add_bias(project(self.query_DHK[...] * scale), query_bias_HK, (1, 2))
        key_BHKL, value_BHKL = project(self.key_DHK[...]), project(self.value_DHK[...])
        if sight.rotation is not None:
            key_BHKL = add_bias(key_BHKL, self.key_bias_HK, (1, 2))
            query_BHKL, key_BHKL = (rotate(x, sight.rotation, length_last=True) for x in (query_BHKL, key_BHKL))
        query_BHLK, key_BHMK, value_BHMK = (x.swapaxes(2, 3) for x in (query_BHKL, key_BHKL, value_BHKL))
        with jax.named_scope("attention_core"):
            mixed_BHLK = _splash(query_BHLK, key_BHMK, value_BHMK, sight)
        mixed_BHLK = gather_positions(mixed_BHLK, positions_BP, axis=2)
        output_HKD = self.output_HKD[...]
        out_BLD = jnp.einsum("BHLK,HKD->BLD", mixed_BHLK, output_HKD, out_sharding=SHARDING.hidden_BLD)
        return add_bias(out_BLD, self._output_and_value_bias(), (2,))

    def _output_and_value_bias(self) -> jax.Array | None:
        """What both biases add behind the output projection: [D]."""
        if self.value_bias_HK is None or self.output_bias_D is None:
            return None
        output_HKD = self.output_HKD[...]
        value_bias_HKD = jax.lax.broadcast_in_dim(self.value_bias_HK[...], output_HKD.shape, (0, 1))
        return self.output_bias_D[...] + (value_bias_HKD * output_HKD).sum((0, 1))


def _merge_heads(param: jax.Array, axis: int) -> jax.Array:
    """A parameter with its heads, at this axis, and their dimension as one axis."""
    spec, shape = jax.typeof(param).sharding.spec, param.shape
    parts = (*spec.partitions[: axis + 1], *spec.partitions[axis + 2 :])
    merged = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
    return jnp.reshape(param, merged, out_sharding=jax.P(*parts, reduced=spec.reduced))


def attend(
    query_BHLK: jax.Array,
    key_BHMK: jax.Array,
    value_BHMK: jax.Array,
    sight: Sight,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of each segment, or of what a layer sees of it, over itself: [B, H, L, K], in the query's dtype."""
    with jax.named_scope("attention_core"):
        if sight.implementation == "splash":
            return _splash(query_BHLK * query_BHLK.shape[-1] ** -0.5, key_BHMK, value_BHMK, sight)
        segment_ids_BL, causal_B, window = sight.segment_ids_BL, sight.causal_B, sight.window
        if window and blocks.is_shorter(query_BHLK.shape[2], window):
            sees_BNLM = blocks.sees(segment_ids_BL, causal_B, window)
            parts = blocks.split(query_BHLK, key_BHMK, value_BHMK, window)
            if sight.implementation == "cudnn":
                mixed_BHNLK = blocks.as_rows(_cudnn, *parts, sees_BNLM)
            else:
                mixed_BHNLK = _xla(*parts, sees_BNLM, None, dropout_rate, dropout_key)
            return blocks.join(mixed_BHNLK, query_BHLK.shape[2])
        sees_BLM = _sees(segment_ids_BL, causal_B, window)
        if sight.implementation == "cudnn":
            return _cudnn(query_BHLK, key_BHMK, value_BHMK, sees_BLM)
        bias_HLM = _distance_bias(sight.slopes, query_BHLK.shape[2])
        return _xla(query_BHLK, key_BHMK, value_BHMK, sees_BLM, bias_HLM, dropout_rate, dropout_key)


def _sees(segment_ids_BL: jax.Array, causal_B: jax.Array | None, window: int) -> jax.Array:
    """Which keys M each query L attends to: bool [B, L, M]."""
    sees_BLM = segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :]
    index_L = jnp.arange(segment_ids_BL.shape[1], dtype=jnp.int32)
    if window:
        sees_BLM &= (jnp.abs(index_L[:, None] - index_L[None, :]) <= window)[None]
    if causal_B is None:
        return sees_BLM
    earlier_1LM = (index_L[:, None] >= index_L[None, :])[None]
    return sees_BLM & (earlier_1LM | ~causal_B[:, None, None])


def _distance_bias(slopes: tuple[float, ...], length: int) -> jax.Array | None:
    """What ALiBi adds to the scores: float32 [H, L, M], or None where it is not used."""
    if not slopes:
        return None
    index_L = jnp.arange(length, dtype=jnp.int32)
    distance_LM = jnp.abs(index_L[:, None] - index_L[None, :]).astype(jnp.float32)
    return -jnp.asarray(slopes, jnp.float32)[:, None, None] * distance_LM[None]


def choose_implementation(
    requested: str, cfg: ModelConfig, length: int, platform: str, dtype: jnp.dtype, *, causal_rows: bool = False
) -> str:
    """Resolves "auto" for a platform and says why whenever the fast path cannot be taken.

    Args:
        causal_rows: whether some rows are causal, which is known only when the program runs.

    Raises:
        UserError: a path was asked for by name and cannot run this configuration.
    """
    ways = {"tpu": ("row", "splash"), "gpu": ("cudnn",), "cuda": ("cudnn",)}.get(platform, ())
    num_heads = cfg.num_heads // jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    no_alibi = (cfg.positions != "alibi", "it adds nothing to scores, as ALiBi does")
    no_dropout = (cfg.attention_dropout == 0, "it has no attention dropout")
    conditions = {
        "row": [
            (platform == "tpu", "it is a TPU kernel"),
            no_dropout,
            (cfg.positions != "rope", "it turns no heads by their positions"),
            (not cfg.local_window, "it has no window"),
            *((False, reason) for reason in row_attention.refusals(cfg.head_dim, num_heads, length)),
        ],
        "splash": [
            (platform == "tpu", "it is a TPU kernel"),
            (length % 128 == 0, f"the length {length} is no multiple of 128"),
            no_dropout,
            (not causal_rows, "its mask is fixed when it is compiled, and which rows are causal is not"),
            no_alibi,
        ],
        "cudnn": [
            (platform in ("gpu", "cuda"), "it is a GPU kernel"),
            (dtype in (jnp.bfloat16, jnp.float16), f"it does not take {jnp.dtype(dtype).name}"),
            (
                cfg.head_dim % 8 == 0 and cfg.head_dim <= 128,
                f"head dimension {cfg.head_dim} is no multiple of 8 up to 128",
            ),
            no_dropout,
            no_alibi,
        ],
        "xla": [],
    }
    reasons = {way: [reason for holds, reason in conditions[way] if not holds] for way in conditions}
    if requested != "auto":
        if reasons[requested]:
            raise UserError(f"compute.attention={requested!r} cannot be used: {reasons[requested][0]}; use auto or xla")
        return requested
    chosen = next((way for way in ways if not reasons[way]), "xla")
    if ways and chosen == "xla":
        logger.info("attention: XLA instead of %s, because %s", ways[-1], reasons[ways[-1]][0])
    return chosen


def _xla(
    query_BHLK: jax.Array,
    key_BHMK: jax.Array,
    value_BHMK: jax.Array,
    sees_BLM: jax.Array,
    bias_HLM: jax.Array | None,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """In blocks, all arrays have one more dimension behind the heads'."""
    scale = query_BHLK.shape[-1] ** -0.5
    scores_BHLM = jnp.einsum("BH...LK,BH...MK->BH...LM", query_BHLK * scale, key_BHMK, preferred_element_type=jnp.float32)
    if bias_HLM is not None:
        scores_BHLM += jax.reshard(bias_HLM, jax.P("tensor", None, None))[None]
    scores_BHLM += jnp.where(sees_BLM, 0.0, -1e30)[:, None]
    # Normalised after the values are mixed: K numbers a query are divided instead of L.
    weights_BHLM = jnp.exp(scores_BHLM - jax.lax.stop_gradient(scores_BHLM.max(-1, keepdims=True)))
    total_BHL1 = weights_BHLM.sum(-1, keepdims=True)
    weights_BHLM = dropout(weights_BHLM.astype(value_BHMK.dtype), dropout_rate, dropout_key)
    mixed_BHLK = jnp.einsum("BH...LM,BH...MK->BH...LK", weights_BHLM, value_BHMK, preferred_element_type=jnp.float32)
    return (mixed_BHLK / total_BHL1).astype(value_BHMK.dtype)


def _cudnn(query_BHLK: jax.Array, key_BHMK: jax.Array, value_BHMK: jax.Array, sees_BLM: jax.Array) -> jax.Array:
    # The public interface takes packing as a boolean mask only; the packed form is private to jax.
    def rows(query_BHLK: jax.Array, key_BHMK: jax.Array, value_BHMK: jax.Array, sees_BLM: jax.Array) -> jax.Array:
        query_BLHK, key_BMHK, value_BMHK = (x.swapaxes(1, 2) for x in (query_BHLK, key_BHMK, value_BHMK))
        mixed_BLHK = jax.nn.dot_product_attention(
            query_BLHK, key_BMHK, value_BMHK, mask=sees_BLM[:, None], implementation="cudnn"
        )
        return mixed_BLHK.swapaxes(1, 2)

    return _by_rows_and_heads(rows, query_BHLK, key_BHMK, value_BHMK, sees_BLM)


def _row(query_BLF: jax.Array, key_BLF: jax.Array, value_BLF: jax.Array, sight: Sight, head_dim: int) -> jax.Array:
    """Each device's rows and heads by the kernel, which is opaque to JAX."""
    heads, segments, rows, slopes = SHARDING.mlp_BLF, jax.P(ROWS, None), jax.P(ROWS), jax.P("tensor")
    segment_ids_BL = jax.reshard(sight.segment_ids_BL, segments)
    causal_B = jnp.zeros_like(segment_ids_BL[:, 0]) if sight.causal_B is None else sight.causal_B.astype(jnp.int32)
    slopes_H = jax.reshard(jnp.asarray(sight.slopes, jnp.float32), slopes) if sight.slopes else None
    sharded = jax.shard_map(
        lambda *args: row_attention.row_attention(*args, head_dim),
        in_specs=(heads, heads, heads, segments, rows, slopes),
        out_specs=heads,
        check_vma=False,
    )
    return sharded(query_BLF, key_BLF, value_BLF, segment_ids_BL, jax.reshard(causal_B, rows), slopes_H)


def _by_rows_and_heads(
    kernel: Callable[..., jax.Array], query_BHLK: jax.Array, key_BHMK: jax.Array, value_BHMK: jax.Array, by_row: jax.Array
) -> jax.Array:
    """A kernel on each device's rows and heads: it is opaque to JAX, which cannot divide it. `by_row` is [B, L, …]."""
    heads = SHARDING.heads_BHLK
    rows = jax.P(ROWS, *[None] * (by_row.ndim - 1))
    sharded = jax.shard_map(kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return sharded(query_BHLK, key_BHMK, value_BHMK, jax.reshard(by_row, rows))


def _splash(query_BHLK: jax.Array, key_BHMK: jax.Array, value_BHMK: jax.Array, sight: Sight) -> jax.Array:
    """A local layer skips the blocks outside its window.

    Its blocks are as large as others': by arithmetic, smaller ones would cost more in steps of the grid than they skip.
    """
    assert sight.causal_B is None, "choose_implementation refuses causal rows"
    # Imported here because Pallas for TPU is of no use, and slow to import, elsewhere.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, window = query_BHLK.shape[2], sight.window
    block = next(size for size in (512, 384, 256, 128) if length % size == 0)
    by_length = splash.QKVLayout.SEQ_MINOR
    names = ["q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute"]
    # The fused backward kernel computes the scores once for all three gradients, but holds a query's gradient once for every
    # block of keys, seen or not.
    names += ["q_dq", "kv_dq"] if window else []
    blocks = splash.BlockSizes(
        **{f"block_{name}": block for name in names},
        use_fused_bwd_kernel=not window,
        q_layout=by_length,
        k_layout=by_length,
        v_layout=by_length,
    )

    def rows(query_BHLK: jax.Array, key_BHMK: jax.Array, value_BHMK: jax.Array, segments_BL: jax.Array) -> jax.Array:
        shape = (length, length)
        mask = masks.LocalMask(shape, (window, window), 0) if window else masks.FullMask(shape)
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * query_BHLK.shape[1]),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=blocks,
            residual_checkpoint_name=KERNEL_RESULTS,
        )

        def row(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
            return kernel(query, key, value, segment_ids=splash.SegmentIds(q=segments, kv=segments))

        return jax.vmap(row)(query_BHLK, key_BHMK, value_BHMK, segments_BL)

    return _by_rows_and_heads(rows, query_BHLK, key_BHMK, value_BHMK, sight.segment_ids_BL)
