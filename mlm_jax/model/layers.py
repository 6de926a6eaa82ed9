"""The pieces that every part of the encoder shares: layer norm, dropout, activations, initialisers."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.sharding import SHARDING

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),  # google-research/bert
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),  # ELECTRA, SpanBERT, Hugging Face's "gelu"
    "relu": jax.nn.relu,
}


def parameter(rngs: nnx.Rngs, init: Callable[..., jax.Array], shape: tuple[int, ...], spec: jax.P) -> nnx.Param[jax.Array]:
    """A float32 parameter, created directly in its sharding."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=spec)


def weight_init(cfg: ModelConfig) -> Callable[..., jax.Array]:
    """The initialiser of every kernel and table; google-research/bert truncates at two deviations."""
    if cfg.init_truncated:
        # BERT's TensorFlow initialiser is not rescaled for the truncation; JAX's neither: `stddev` is the untruncated one.
        return jax.nn.initializers.truncated_normal(stddev=cfg.init_std)
    return jax.nn.initializers.normal(stddev=cfg.init_std)


def along(param: jax.Array, like: jax.Array, *dimensions: int) -> jax.Array:
    """A parameter repeated over the other dimensions of an activation, and sharded as that one is.

    Plain broadcasting would do for the values, but not for a parameter of type `reduced` (`mlm_jax.sharding.gather`).
    """
    return jax.lax.broadcast_in_dim(param, like.shape, dimensions, out_sharding=jax.typeof(like).sharding.spec)


class LayerNorm(nnx.Module):
    """Layer normalisation with statistics in float32 whatever the input's dtype."""

    def __init__(self, dim: int, eps: float, *, rngs: nnx.Rngs):
        self.scale_D = parameter(rngs, jax.nn.initializers.ones, (dim,), SHARDING.vector)
        self.bias_D = parameter(rngs, jax.nn.initializers.zeros, (dim,), SHARDING.vector)
        self.eps = eps

    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        with jax.named_scope("norm"):
            x_BLD = hidden_BLD.astype(jnp.float32)
            centred_BLD = x_BLD - x_BLD.mean(-1, keepdims=True)
            variance_BL1 = jnp.square(centred_BLD).mean(-1, keepdims=True)
            normed_BLD = centred_BLD * jax.lax.rsqrt(variance_BL1 + self.eps)
            scale_BLD, bias_BLD = (along(p[...].astype(jnp.float32), x_BLD, 2) for p in (self.scale_D, self.bias_D))
            return (normed_BLD * scale_BLD + bias_BLD).astype(hidden_BLD.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` (to 1/65536) and rescales the rest; no key means no dropout."""
    if key is None or rate == 0.0:
        return x
    with jax.named_scope("dropout"):
        bits = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=jax.typeof(x).sharding.spec)
        keep = bits >= jnp.uint16(round(rate * 65536))
        return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
