"""Between a Flax module and the plain tree of parameters that the training state holds; used by every objective."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.objectives.contract import Params

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Network(Generic[M]):
    """A module that is built anew from parameters wherever it is called, within jit or outside."""

    build: Callable[[nnx.Rngs], M]
    dtype: jnp.dtype  # of the computation

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters as a nested dictionary, each in its sharding on the current mesh."""
        return nnx.to_pure_dict(nnx.split(self.build(nnx.Rngs(key)), nnx.Param)[1])

    def bind(self, params: Params) -> M:
        """The module with `params`, cast once to the compute dtype."""
        return nnx.merge(self.graphdef, cast(params, self.dtype))

    @functools.cached_property
    def graphdef(self) -> Any:
        """The module without its parameters."""
        module = jax.eval_shape(lambda key: self.build(nnx.Rngs(key)), jax.random.key(0))
        return nnx.split(module, nnx.Param)[0]


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """Parameters in the compute dtype; the norms stay in float32. Done once a step, outside the stack of layers."""

    def convert(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf if "norm" in jax.tree_util.keystr(path) else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(convert, params)
