"""Between a Flax module and the plain tree of parameters that the training state holds; used by every objective."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.model.encoder import ready
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
        """The module with `params`, as they are stored or `ready`."""
        return nnx.merge(self.graphdef, ready(params, self.dtype))

    @functools.cached_property
    def graphdef(self) -> Any:
        """The module without its parameters."""
        module = jax.eval_shape(lambda key: self.build(nnx.Rngs(key)), jax.random.key(0))
        return nnx.split(module, nnx.Param)[0]
