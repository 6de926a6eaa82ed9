"""How a stack of layers is run: unrolled, or scanned over groups of layers that repeat one pattern.

Parameters are stacked along their first axis whatever way is taken. Of a parameter that the first layer has not, the stack
begins with the second layer's.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from mlm_jax.config import ModelConfig
from mlm_jax.model.attention import KERNEL_RESULTS
from mlm_jax.model.layers import DENSE_RESULTS


class ApplyLayer(Protocol):
    """One layer: its index, which tells what kind it is, then the hidden states and its part of the stack."""

    def __call__(self, index: int, hidden_BLD: jax.Array, layer: Any, /) -> jax.Array: ...


def scanned_layers(cfg: ModelConfig, *, scan: bool) -> range:
    """The layers of which a scan is made: as many whole repetitions of the pattern as there are.

    The first layer, where it is not as the others, and what is left at the end are not among them. One layer is no scan.
    """
    first = int(cfg.pre_norm and not cfg.first_norm)
    alike = cfg.num_layers - first
    groups = alike // _period(cfg) if scan and alike > 1 else 0
    return range(first, first + groups * _period(cfg))


def _period(cfg: ModelConfig) -> int:
    """The layers after which the pattern of global and local ones repeats."""
    return cfg.global_every if cfg.local_window else 1


def run_layers(
    apply: ApplyLayer, hidden_BLD: jax.Array, stacked: Any, cfg: ModelConfig, *, scan: bool, remat: str
) -> jax.Array:
    """The hidden states behind the last layer.

    What `scanned_layers` leaves is run layer by layer.

    Args:
        stacked: parameters of the layers, and their keys or None.
    """
    scanned, period = scanned_layers(cfg, scan=scan), _period(cfg)
    single, groups = scanned.start, len(scanned) // period

    def layer(index: int, hidden_BLD: jax.Array, part: Any) -> jax.Array:
        # Within a scan nothing can be merged with the forward pass; unrolled, XLA would undo the recomputation.
        step = _rematerialise(functools.partial(apply, index), remat, prevent_cse=index not in scanned)
        return step(hidden_BLD, part)

    def group(hidden_BLD: jax.Array, parts: Any) -> tuple[jax.Array, None]:
        if period == 1:
            return layer(single, hidden_BLD, parts), None
        for index, part in zip(scanned, _unstack(parts, [1] * period), strict=False):
            hidden_BLD = layer(index, hidden_BLD, part)
        return hidden_BLD, None

    if len(scanned) == cfg.num_layers and period == 1:
        return jax.lax.scan(group, hidden_BLD, stacked)[0]
    behind = cfg.num_layers - scanned.stop
    parts = _unstack(stacked, [1] * single + [len(scanned)] * bool(groups) + [1] * behind)
    for index in range(single):
        hidden_BLD = layer(index, hidden_BLD, parts.pop(0))
    if groups:
        hidden_BLD, _ = jax.lax.scan(group, hidden_BLD, _grouped(parts.pop(0), groups, period))
    for index, part in zip(range(scanned.stop, cfg.num_layers), parts, strict=True):
        hidden_BLD = layer(index, hidden_BLD, part)
    return hidden_BLD


def _unstack(stacked: Any, sizes: list[int]) -> list[Any]:
    """The layers of a stacked pytree in parts of these numbers; a part of one layer has no axis of layers.

    Splitting once makes the gradient one concatenation, not as many padded sums.
    """
    leaves, structure = jax.tree.flatten(stacked)
    count = sum(sizes)

    def split(leaf: jax.Array) -> list[jax.Array]:
        if leaf.shape[0] == count - 1:
            # What the first layer gets in its place is not looked at.
            return [jax.lax.index_in_dim(leaf, 0, 0, keepdims=False), *_split(leaf, sizes[1:])]
        return _split(leaf, sizes)

    return [jax.tree.unflatten(structure, parts) for parts in zip(*map(split, leaves), strict=True)]


def _split(leaf: jax.Array, sizes: list[int]) -> list[jax.Array]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        return [leaf[end - 1] if size == 1 else leaf[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    parts = jax.lax.split(leaf, sizes)
    return [part.squeeze(0) if size == 1 else part for part, size in zip(parts, sizes, strict=True)]


def _grouped(stacked: Any, groups: int, period: int) -> Any:
    """[groups · period, …] as [groups, period, …]."""
    if period == 1:
        return stacked

    def group(leaf: jax.Array) -> jax.Array:
        shape = (groups, period, *leaf.shape[1:])
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf.reshape(shape)
        spec = jax.typeof(leaf).sharding.spec
        return jnp.reshape(leaf, shape, out_sharding=jax.P(None, *spec.partitions, reduced=spec.reduced))

    return jax.tree.map(group, stacked)


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
