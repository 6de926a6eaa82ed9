"""Where a token stands, without a table: rotations of queries and keys (RoPE), or what is added to scores (ALiBi)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rotation(NamedTuple):
    """The angles by which the halves of each head are turned against each other, float32 [B, L, K / 2]."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions_BL: jax.Array, head_dim: int, base: float) -> Rotation:
    """One angle for each position and pair of dimensions i, i + K/2: the position times base^(-2i/K).

    Source: Su et al., 2021, "RoFormer", in the pairing of GPT-NeoX, which ModernBERT has too.
    """
    frequencies_K = base ** (-np.arange(0, head_dim, 2) / head_dim)
    angles_BLK = positions_BL.astype(jnp.float32)[:, :, None] * frequencies_K.astype(np.float32)[None, None]
    return Rotation(jnp.cos(angles_BLK), jnp.sin(angles_BLK))


def rotate(heads_BHLK: jax.Array, by: Rotation, *, length_last: bool = False) -> jax.Array:
    """Queries or keys turned by their positions, computed in float32 and returned in their dtype.

    Args:
        length_last: whether they are [B, H, K, L].
    """
    axis = 2 if length_last else 3
    first, second = jnp.split(heads_BHLK.astype(jnp.float32), 2, axis)
    cos, sin = (x_BLK.swapaxes(1, 2)[:, None] if length_last else x_BLK[:, None] for x_BLK in by)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis).astype(heads_BHLK.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """How much each head's scores fall with every token of distance: float32 [H].

    A geometric series for a power of two; for others every second slope of the next one's is put behind that.

    Source: Press et al., 2022, "Train short, test long"; ofirpress/attention_with_linear_biases.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * power, 2) / power)
    return np.concatenate([slopes, between])[:num_heads].astype(np.float32)
