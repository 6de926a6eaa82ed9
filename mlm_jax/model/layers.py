"""The pieces that every part of the encoder shares: layer norm, dropout, activations, initialisers."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mlm_jax.config import ModelConfig
from mlm_jax.sharding import SHARDING, axes_of

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),  # google-research/bert
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),  # ELECTRA, SpanBERT, Hugging Face's "gelu"
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def parameter(rngs: nnx.Rngs, init: Callable[..., jax.Array], shape: tuple[int, ...], spec: jax.P) -> nnx.Param[jax.Array]:
    """A float32 parameter, created directly in its sharding."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=spec)


def bias_parameter(cfg: ModelConfig, rngs: nnx.Rngs, shape: tuple[int, ...], spec: jax.P) -> nnx.Param[jax.Array] | None:
    """The bias of a dense layer, 0 at first, where the architecture has them."""
    return parameter(rngs, jax.nn.initializers.zeros, shape, spec) if cfg.biases else None


def weight_init(cfg: ModelConfig, *, residual: bool = False) -> Callable[..., jax.Array]:
    """The initialiser of every kernel and table; google-research/bert truncates at two deviations.

    Args:
        residual: whether what the kernel makes is added to the residual stream, as twice in each layer.
    """
    std = cfg.init_std / math.sqrt(2 * cfg.num_layers) if residual and cfg.init_scaled else cfg.init_std
    if cfg.init_truncated:
        # BERT's TensorFlow initialiser is not rescaled for the truncation; JAX's neither: `stddev` is the untruncated one.
        return jax.nn.initializers.truncated_normal(stddev=std)
    return jax.nn.initializers.normal(stddev=std)


def along(param: jax.Array, like: jax.Array, *dimensions: int) -> jax.Array:
    """A parameter repeated over the other dimensions of an activation, and sharded as that one is.

    Plain broadcasting would do for the values, but not for a parameter of type `reduced` (`mlm_jax.sharding.gather`).
    """
    return jax.lax.broadcast_in_dim(param, like.shape, dimensions, out_sharding=jax.typeof(like).sharding.spec)


def sum_onto(grad: jax.Array, param: jax.Array, *dimensions: int) -> jax.Array:
    """The gradient of a parameter that lies along these dimensions of an activation: the sum over all others.

    It has the parameter's dtype and the sharding of its gradient. In bfloat16 it is a product with ones, accumulated in
    float32: by XLA:TPU's estimate for a layer of BERT-base, 15 to 71 thousand cycles where a sum over heads takes 328.
    """
    spec = jax.typeof(param).sharding.spec
    others = tuple(dimension for dimension in range(grad.ndim) if dimension not in dimensions)
    if grad.dtype != jnp.bfloat16:
        summed = jax.P(*spec.partitions, unreduced=spec.reduced)
        return jax.lax.reduce_sum(grad, others, out_sharding=summed).astype(param.dtype)
    rows = [jax.typeof(grad).sharding.spec.partitions[dimension] for dimension in others]
    shape = (*(grad.shape[dimension] for dimension in others), _ROWS_OF_ONES)
    ones = jnp.full(shape, 1 / _ROWS_OF_ONES, grad.dtype, out_sharding=jax.P(*rows, None))
    sums = jax.lax.dot_general(
        ones,
        grad,
        ((tuple(range(len(others))), others), ((), ())),
        preferred_element_type=jnp.float32,
        out_sharding=jax.P(None, *spec.partitions, unreduced=spec.reduced),
    )
    return jax.lax.reduce_sum(sums, (0,)).astype(param.dtype)


_ROWS_OF_ONES = 8  # a power of two, so that its inverse is exact


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _add_bias(x: jax.Array, bias: jax.Array, dimensions: tuple[int, ...]) -> jax.Array:
    return x + along(bias.astype(x.dtype), x, *dimensions)


def _add_bias_forward(x: jax.Array, bias: jax.Array, dimensions: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    return _add_bias(x, bias, dimensions), bias


def _add_bias_backward(dimensions: tuple[int, ...], bias: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    return grad, sum_onto(grad.astype(bias.dtype), bias, *dimensions)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def add_bias(x: jax.Array, bias: nnx.Param[jax.Array] | jax.Array | None, dimensions: tuple[int, ...]) -> jax.Array:
    """An activation, in its dtype, and a bias that lies along these dimensions of it, where there is one."""
    return x if bias is None else _add_bias(x, bias[...], dimensions)


DENSE_RESULTS = "dense"  # what a rematerialisation policy calls them: it does not see a product with its own gradient


def dense(x_BLD: jax.Array, kernel_DF: jax.Array, spec: jax.P) -> jax.Array:
    """The product of an activation's last dimension and a kernel's first, in the sharding `spec`.

    The same as `einsum`, but for the order in which XLA:CPU is to compute the gradient of the kernel.
    """
    return checkpoint_name(_dense(x_BLD, kernel_DF, spec), DENSE_RESULTS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense(x_BLD: jax.Array, kernel_DF: jax.Array, spec: jax.P) -> jax.Array:
    return jnp.einsum("BLD,DF->BLF", x_BLD, kernel_DF, out_sharding=spec)


def _dense_forward(x_BLD: jax.Array, kernel_DF: jax.Array, spec: jax.P) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dense(x_BLD, kernel_DF, spec), (x_BLD, kernel_DF)


def _dense_backward(spec: jax.P, kept: tuple[jax.Array, jax.Array], grad_BLF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BLD, kernel_DF = kept
    kernel = jax.typeof(kernel_DF).sharding.spec
    over_D, over_F = kernel.partitions

    def kernel_grad(x_BLD: jax.Array, grad_BLF: jax.Array) -> jax.Array:
        summed = jax.P(over_D, over_F, unreduced=kernel.reduced)
        return jnp.einsum("BLD,BLF->DF", x_BLD, grad_BLF, out_sharding=summed)

    def kernel_grad_cpu(x_BLD: jax.Array, grad_BLF: jax.Array) -> jax.Array:
        if x_BLD.shape[-1] <= grad_BLF.shape[-1]:
            return kernel_grad(x_BLD, grad_BLF)
        summed = jax.P(over_F, over_D, unreduced=kernel.reduced)
        grad_FD = jnp.einsum("BLF,BLD->FD", grad_BLF, x_BLD, out_sharding=summed)
        return jax.lax.optimization_barrier(grad_FD).T

    # XLA:CPU turns the left operand round first, together with the elementwise work that made it, and slowly: let it be
    # the narrower one. What autodiff writes (the product FD, turned round) is for either width three times as slow.
    kernel_grad_DF = jax.lax.platform_dependent(x_BLD, grad_BLF, cpu=kernel_grad_cpu, default=kernel_grad)
    x_grad_BLD = jnp.einsum("BLF,DF->BLD", grad_BLF, kernel_DF, out_sharding=jax.typeof(x_BLD).sharding.spec)
    return x_grad_BLD, kernel_grad_DF


_dense.defvjp(_dense_forward, _dense_backward)


class LayerNorm(nnx.Module):
    """Layer normalisation with statistics in float32 whatever the input's dtype; RMSNorm is the one that is not centred."""

    def __init__(self, dim: int, eps: float, *, rngs: nnx.Rngs, centred: bool = True, bias: bool = True):
        self.scale_D = parameter(rngs, jax.nn.initializers.ones, (dim,), SHARDING.vector)
        self.bias_D = parameter(rngs, jax.nn.initializers.zeros, (dim,), SHARDING.vector) if bias else None
        self.eps, self.centred = eps, centred

    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        with jax.named_scope("norm"):
            bias_D = None if self.bias_D is None else self.bias_D[...]
            return _layer_norm(hidden_BLD, self.scale_D[...], bias_D, self.eps, self.centred)


def make_norm(cfg: ModelConfig, dim: int, *, rngs: nnx.Rngs) -> LayerNorm:
    """The norm that a config asks for."""
    centred = cfg.norm == "layer"
    return LayerNorm(dim, cfg.norm_eps, rngs=rngs, centred=centred, bias=centred and cfg.norm_bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x_BLD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, eps: float, centred: bool) -> jax.Array:
    return _layer_norm_forward(x_BLD, scale_D, bias_D, eps, centred)[0]


def _layer_norm_forward(
    x_BLD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, eps: float, centred: bool
) -> tuple[jax.Array, Any]:
    """Keeps its input and two numbers a token for the backward pass, where autodiff would keep float32 activations."""
    wide_BLD = x_BLD.astype(jnp.float32)
    mean_BL1 = wide_BLD.mean(-1, keepdims=True) if centred else None
    if mean_BL1 is None:
        variance_BL1 = jnp.square(wide_BLD).mean(-1, keepdims=True)
    elif x_BLD.dtype == jnp.bfloat16:
        # In one pass over the input, whose own rounding is far above that of a difference of float32 squares.
        variance_BL1 = jnp.maximum(jnp.square(wide_BLD).mean(-1, keepdims=True) - jnp.square(mean_BL1), 0.0)
    else:
        variance_BL1 = jnp.square(wide_BLD - mean_BL1).mean(-1, keepdims=True)
    inverse_BL1 = jax.lax.rsqrt(variance_BL1 + eps)
    normed_BLD = (wide_BLD if mean_BL1 is None else wide_BLD - mean_BL1) * inverse_BL1
    out_BLD = normed_BLD * along(scale_D, wide_BLD, 2)
    if bias_D is not None:
        out_BLD = out_BLD + along(bias_D, wide_BLD, 2)
    return out_BLD.astype(x_BLD.dtype), (x_BLD, mean_BL1, inverse_BL1, scale_D, bias_D)


def _layer_norm_backward(
    eps: float, centred: bool, kept: Any, grad_BLD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    with jax.named_scope("norm"):
        x_BLD, mean_BL1, inverse_BL1, scale_D, bias_D = kept
        wide_BLD = x_BLD.astype(jnp.float32)
        normed_BLD = (wide_BLD - mean_BL1 if centred else wide_BLD) * inverse_BL1
        scaled_BLD = grad_BLD.astype(jnp.float32) * along(scale_D, normed_BLD, 2)
        along_normed_BL1 = (scaled_BLD * normed_BLD).mean(-1, keepdims=True)
        rest_BLD = scaled_BLD - scaled_BLD.mean(-1, keepdims=True) if centred else scaled_BLD
        x_grad_BLD = inverse_BL1 * (rest_BLD - normed_BLD * along_normed_BL1)
        scale_grad_D = sum_onto((grad_BLD * normed_BLD).astype(x_BLD.dtype), scale_D, 2)
        x_grad_BLD = x_grad_BLD.astype(x_BLD.dtype)
        return x_grad_BLD, scale_grad_D, None if bias_D is None else sum_onto(grad_BLD, scale_D, 2)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` (to 1/4096) and rescales the rest; no key means no dropout."""
    if key is None or rate == 0.0:
        return x
    with jax.named_scope("dropout"):
        return jnp.where(_dropped(key, x, rate), jnp.zeros_like(x), x / (1.0 - rate))


def _dropped(key: jax.Array, like: jax.Array, rate: float) -> jax.Array:
    """True for each element of an activation with this probability. Threefry's draws are the same on any mesh.

    With the hardware's generator (`rbg`) XLA would draw the whole batch's on every device and keep a part; here each device
    draws its own, from a key of its own, so that they depend on the mesh.
    """
    sharding = jax.typeof(like).sharding
    axes = tuple(axis for part in sharding.spec.partitions for axis in axes_of(part))
    if jax.random.key_impl(key) != "rbg" or not axes:
        return _threefry_bits(key, like) < jnp.uint16(round(rate * 65536))

    def draw(key: jax.Array) -> jax.Array:
        own_key = jax.random.fold_in(key, jax.lax.axis_index(axes))
        return _packed_draws(own_key, sharding.shard_shape(like.shape), rate)

    return jax.shard_map(draw, in_specs=jax.P(), out_specs=sharding.spec)(key)


def _threefry_bits(key: jax.Array, like: jax.Array) -> jax.Array:
    spec = jax.typeof(like).sharding.spec
    if like.shape[-1] % 2 or axes_of(spec.partitions[-1]):
        return jax.random.bits(key, like.shape, jnp.uint16, out_sharding=spec)
    # Threefry makes 32 bits whatever is asked for: two elements' worth.
    words = jax.random.bits(key, (*like.shape[:-1], like.shape[-1] // 2), jnp.uint32, out_sharding=spec)
    return jax.lax.reshape(jax.lax.bitcast_convert_type(words, jnp.uint16), like.shape, out_sharding=spec)


def _packed_draws(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """True with this probability, for as many rows at once as a word has bits, where their number allows.

    A number of 12 random bits is compared with a threshold from its lowest bit up. Bit i of the numbers of several rows is
    one word, so that this takes 12 operations for all of them, and XLA keeps words, not numbers, for the backward pass.
    """
    rows = math.gcd(shape[0], 32)
    if rows < 8:
        return jax.random.bits(key, shape, jnp.uint16) < jnp.uint16(round(rate * 65536))
    word, threshold = jnp.dtype(f"uint{rows}"), round(rate * 2**_DRAWN_BITS)
    bits = jax.random.bits(key, (_DRAWN_BITS, shape[0] // rows, 1, *shape[1:]), word)
    less = jnp.zeros_like(bits[0])
    for index in range(_DRAWN_BITS):
        less = less | bits[index] if threshold >> index & 1 else less & bits[index]
    places = jax.lax.broadcasted_iota(word, (1, rows, *[1] * (len(shape) - 1)), 1)
    return (((less >> places) & 1) != 0).reshape(shape)


_DRAWN_BITS = 12  # 0.1 becomes 0.1001; each more costs a TPU 1.5 microseconds for every dropout of BERT-base


def gather_positions(hidden_BLD: jax.Array, positions_BP: jax.Array | None, axis: int = 1) -> jax.Array:
    """The hidden states at each row's positions: [B, P, D]; all of them where None is given.

    Args:
        axis: the one along which positions lie, with any others before and behind it, as in [B, H, L, K].
    """
    if positions_BP is None:
        return hidden_BLD
    others = tuple(other for other in range(1, hidden_BLD.ndim) if other != axis)
    return jnp.take_along_axis(hidden_BLD, jnp.expand_dims(positions_BP, others), axis=axis)
