"""Attention within a window, in blocks of queries that see their own block and a window of keys at either side of it.

So L / b blocks of b queries have b + 2 · window keys each, and time and memory grow with the length, not with its square.
Used by `model.attention`. N is the number of blocks, and L within a block is b, M its keys.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

_SMALLEST_BLOCK = 64  # of queries: smaller ones are no matrix products to speak of
_OUTSIDE, _FILL = -2, -1  # segment ids of keys outside the row, and of what fills its last block


class Attend(Protocol):
    """An attention over whole rows: query and keys and values [B, H, L, K], what sees what [B, L, M]."""

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, sees: jax.Array, /) -> jax.Array: ...


def block_size(window: int) -> int:
    """Queries of a block: as few as the window allows, since each of them pays for b + 2 · window keys."""
    return max(window, _SMALLEST_BLOCK)


def keys_of_block(window: int) -> int:
    """Keys that a block may see."""
    return block_size(window) + 2 * window


def is_shorter(length: int, window: int) -> bool:
    """Whether blocks have fewer scores than the whole row."""
    return length > keys_of_block(window)


def split(
    query_BHLK: jax.Array, key_BHMK: jax.Array, value_BHMK: jax.Array, window: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries in blocks, and the keys and values that each block may see: each [B, H, N, L or M, K]."""
    size = block_size(window)
    query_BHNLK, key_BHNLK, value_BHNLK = (_blocks(x, 2, size) for x in (query_BHLK, key_BHMK, value_BHMK))
    return query_BHNLK, _with_sides(key_BHNLK, 3, window), _with_sides(value_BHNLK, 3, window)


def join(mixed_BHNLK: jax.Array, length: int) -> jax.Array:
    """The inverse of splitting queries: [B, H, L, K]."""
    batch, heads, blocks, size, dim = mixed_BHNLK.shape
    return jnp.reshape(mixed_BHNLK, (batch, heads, blocks * size, dim))[:, :, :length]


def sees(segment_ids_BL: jax.Array, causal_B: jax.Array | None, window: int) -> jax.Array:
    """Which of its keys each query of a block attends to: bool [B, N, L, M]."""
    size = block_size(window)
    query_BNL = _blocks(segment_ids_BL, 1, size, _FILL)
    key_BNM = _with_sides(query_BNL, 2, window, _OUTSIDE)
    places_M = jnp.arange(keys_of_block(window), dtype=jnp.int32) - window
    distance_LM = places_M[None] - jnp.arange(size, dtype=jnp.int32)[:, None]
    sees_BNLM = query_BNL[..., :, None] == key_BNM[..., None, :]
    sees_BNLM &= (jnp.abs(distance_LM) <= window)[None, None]
    if causal_B is None:
        return sees_BNLM
    return sees_BNLM & ((distance_LM <= 0)[None, None] | ~causal_B[:, None, None, None])


def as_rows(
    attend: Attend,
    query_BHNLK: jax.Array,
    key_BHNMK: jax.Array,
    value_BHNMK: jax.Array,
    sees_BNLM: jax.Array,
) -> jax.Array:
    """An attention over [B, H, L, K], given each block as a row of its own."""

    def merge(x: jax.Array) -> jax.Array:
        """[B, N, …] as [B · N, …], spread over devices as the rows were."""
        spec = jax.typeof(x).sharding.spec.partitions
        return jnp.reshape(x, (-1, *x.shape[2:]), out_sharding=jax.P(spec[0], *spec[2:]))

    query, key, value = (merge(x.swapaxes(1, 2)) for x in (query_BHNLK, key_BHNMK, value_BHNMK))
    mixed = attend(query, key, value, merge(sees_BNLM))
    batch, _, blocks = query_BHNLK.shape[:3]
    spec = jax.typeof(mixed).sharding.spec.partitions
    shape = (batch, blocks, *mixed.shape[1:])
    return jnp.reshape(mixed, shape, out_sharding=jax.P(spec[0], None, *spec[1:])).swapaxes(1, 2)


def _blocks(x: jax.Array, axis: int, size: int, fill: int = 0) -> jax.Array:
    """Blocks of an axis, which is filled up to whole ones: that axis becomes two."""
    length = x.shape[axis]
    count = -(-length // size)
    padding = [(0, count * size - length if dimension == axis else 0) for dimension in range(x.ndim)]
    if count * size != length:
        x = jnp.pad(x, padding, constant_values=fill)
    return jnp.reshape(x, (*x.shape[:axis], count, size, *x.shape[axis + 1 :]))


def _with_sides(blocks: jax.Array, axis: int, window: int, fill: int = 0) -> jax.Array:
    """Blocks of an axis, each with the end of the one before it and the start of the one behind it."""

    def shifted(part: jax.Array, first: int, last: int) -> jax.Array:
        """Those blocks' parts, behind or before one of `fill`."""
        padding = [(0, 0)] * part.ndim
        padding[axis - 1] = (1 - first, first)
        return jnp.pad(jax.lax.slice_in_dim(part, first, last, axis=axis - 1), padding, constant_values=fill)

    count = blocks.shape[axis - 1]
    size = blocks.shape[axis]
    before = shifted(jax.lax.slice_in_dim(blocks, size - window, size, axis=axis), 0, count - 1)
    behind = shifted(jax.lax.slice_in_dim(blocks, 0, window, axis=axis), 1, count)
    return jnp.concatenate([before, blocks, behind], axis)
