"""Small operations on a row's arrays that the policies share."""

import jax
import jax.numpy as jnp
import numpy as np

LAST = np.uint32(2**31)  # sorts behind every score, which have 31 random bits


def look_up(table: jax.Array | np.ndarray, indices: jax.Array) -> jax.Array:
    """`table[indices]`, laid out like the indices: on an explicit mesh a gather has to be told."""
    return jnp.asarray(table).at[indices].get(out_sharding=jax.typeof(indices).sharding)


def shifted(values: jax.Array, first: bool | int) -> jax.Array:
    """Each element's predecessor."""
    return jnp.concatenate([jnp.full((1,), first, values.dtype), values[:-1]])


def places_of(array_L: jax.Array) -> jax.Array:
    """0, 1, … up to the length of a row."""
    return jnp.arange(array_L.shape[0], dtype=jnp.int32)


def next_true(flags_L: jax.Array) -> jax.Array:
    """The first position behind each one that has a flag, or the row's length."""
    length = flags_L.shape[0]
    here_or_later_L = jax.lax.cummin(jnp.where(flags_L, places_of(flags_L), length), reverse=True)
    return jnp.concatenate([here_or_later_L[1:], jnp.full((1,), length, jnp.int32)])


def latest_true(flags_L: jax.Array) -> jax.Array:
    """The last position at or before each one that has a flag, or -1."""
    return jax.lax.cummax(jnp.where(flags_L, places_of(flags_L), -1))


def uniform(bits: jax.Array) -> jax.Array:
    """Float32 numbers in [0, 1) from 32 random bits each."""
    return (bits >> 8).astype(jnp.float32) * 2.0**-24
