"""Digests of arrays, computed where the arrays are: what was saved is recognised on any mesh, without a file read twice."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def digests(tree: Any) -> dict[str, int]:
    """A 32-bit digest of each array of a tree, by the array's path in it. Every process of a run has to ask.

    It is the sum modulo 2^32, over an array's words, of a hash of the word and its place. For a given place the hash is one
    to one (the finaliser of MurmurHash3), so that no change within a single word is missed; one of several words is with
    probability 2^-32. A sum of integers does not depend on its order, and so neither does a digest on how the array is
    divided over devices.
    """
    found = np.asarray(_digests(jax.tree.leaves(tree)))
    named = jax.tree_util.tree_leaves_with_path(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named]
    return dict(zip(paths, found.tolist(), strict=True))


@jax.jit
def _digests(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_digest(leaf) for leaf in leaves])


def _digest(leaf: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    sharding = jax.typeof(leaf).sharding
    strides = np.cumprod([1, *leaf.shape[:0:-1]], dtype=np.uint64)[::-1].astype(np.uint32)
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.uint32, leaf.shape, out_sharding=sharding)
    place = sum((iota(axis) * strides[axis] for axis in range(leaf.ndim)), jnp.zeros((), jnp.uint32))
    words = words ^ (place * jnp.uint32(0x9E3779B9))
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return (words ^ (words >> 16)).sum()
