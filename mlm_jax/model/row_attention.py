"""Attention within whole rows of at most 512 tokens: a TPU kernel forward and one backward, in Pallas.

A row's scores for one head fit on the chip, so nothing is computed in blocks and nothing of the softmax is kept: the
backward kernel computes the weights again. Queries, keys, values and the result are [B, L, F] with heads and head dimension
as one, as plain matrix products make and take them; a program has 128 of those lanes, several whole heads, and the others'
lanes are zero in what is multiplied. What tokens see of each other is data: rows are causal or not, and heads of ALiBi have
slopes. Used by `model.attention`.

Scores lie with the keys first, [M, L]: their maximum and sum run along sublanes, and only the narrow arrays are transposed.

Source: the backward pass is that of FlashAttention (Dao et al., 2022, arXiv:2205.14135, appendix B.2), of one block.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LANES = 128
MAX_LENGTH = 512  # a program holds a handful of [L, L] float32 arrays, 1 MB each, of the 16 MB that v4 and v5e let it have

_Kept = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]  # row_attention's arrays


def refusals(head_dim: int, num_heads: int, length: int) -> list[str]:
    """Why the kernels cannot take such heads and rows; `num_heads` are those of one device. Empty where they can."""
    reasons = []
    if length % LANES or length > MAX_LENGTH:
        reasons.append(f"the length {length} is no multiple of {LANES} up to {MAX_LENGTH}")
    if LANES % head_dim or num_heads * head_dim % LANES:
        reasons.append(f"{num_heads} heads of {head_dim} on a device do not fill {LANES} lanes at a time")
    return reasons


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def row_attention(
    query_BLF: jax.Array,
    key_BLF: jax.Array,
    value_BLF: jax.Array,
    segment_ids_BL: jax.Array,
    causal_B: jax.Array,
    slopes_H: jax.Array | None,
    head_dim: int,
) -> jax.Array:
    """Softmax attention of each head over its row: [B, L, F] in the query's dtype.

    Args:
        query_BLF: already scaled.
        segment_ids_BL: int32; equal ids see each other.
        causal_B: int32, 1 for a row in which a token sees itself and what comes before it.
        slopes_H: float32, by how much a head's scores fall with every token of distance; None: they do not.
        head_dim: K; F is H · K.
    """
    return _forward(query_BLF, key_BLF, value_BLF, segment_ids_BL, causal_B, slopes_H, head_dim)[0]


def _forward(
    query_BLF: jax.Array,
    key_BLF: jax.Array,
    value_BLF: jax.Array,
    segment_ids_BL: jax.Array,
    causal_B: jax.Array,
    slopes_H: jax.Array | None,
    head_dim: int,
) -> tuple[jax.Array, _Kept]:
    kept = (query_BLF, key_BLF, value_BLF, segment_ids_BL, causal_B, slopes_H)
    (mixed_BLF,) = _call(_forward_kernel, "forward", kept, (), 1, head_dim)
    return mixed_BLF, kept


def _backward(head_dim: int, kept: _Kept, grad_BLF: jax.Array) -> tuple[Any, ...]:
    grads = _call(_backward_kernel, "backward", kept, (grad_BLF,), 3, head_dim)
    _, _, _, segment_ids_BL, causal_B, slopes_H = kept
    integers = [np.zeros(x.shape, jax.dtypes.float0) for x in (segment_ids_BL, causal_B)]
    return *grads, *integers, None if slopes_H is None else jnp.zeros_like(slopes_H)  # which are constants


row_attention.defvjp(_forward, _backward)


def _call(kernel: Any, name: str, kept: _Kept, more: tuple[jax.Array, ...], results: int, head_dim: int) -> list[jax.Array]:
    """A kernel over a grid of (some rows, a group of heads)."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    query_BLF, key_BLF, value_BLF, segment_ids_BL, causal_B, slopes_H = kept
    batch, length, width = query_BLF.shape
    rows = math.gcd(batch, MAX_LENGTH // length)  # to start a program costs as much as a short row
    heads = pl.BlockSpec((rows, length, LANES), lambda row, group: (row, 0, group))
    segments = pl.BlockSpec((rows, 1, length), lambda row, group: (row, 0, 0))
    scalars = [causal_B] if slopes_H is None else [causal_B, slopes_H]
    call = pl.pallas_call(
        functools.partial(_run, kernel, head_dim, slopes_H is not None),
        grid=(batch // rows, width // LANES),
        in_specs=[*[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(scalars), segments, *[heads] * (3 + len(more))],
        out_specs=[heads] * results,
        out_shape=[jax.ShapeDtypeStruct(query_BLF.shape, query_BLF.dtype)] * results,
        scratch_shapes=[pltpu.VMEM((rows, length, length), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        # The estimate of `mlm_jax.compile` reads the head's dimension here.
        name=f"row_attention_{name}_{head_dim}",
    )
    return call(*scalars, segment_ids_BL[:, None], query_BLF, key_BLF, value_BLF, *more)


def _run(kernel: Any, head_dim: int, sloped: bool, causal: Any, *references: Any) -> None:
    """The body of a program: what its heads have in common, then the kernel."""
    slopes, (segments, *arrays, bias) = (references[0], references[1:]) if sloped else (None, references)
    _prepare_bias(bias, causal, segments)
    kernel(*arrays, bias, slopes, head_dim)


def _forward_kernel(query: Any, key: Any, value: Any, mixed: Any, bias: Any, slopes: Any, head_dim: int) -> None:
    for row in range(query.shape[0]):
        query_LF, key_MF, value_FM = query[row], key[row], value[row].T
        parts = []
        for head in range(LANES // head_dim):
            weights_ML, total_1L = _weights(_only(query_LF, head, head_dim), key_MF, bias[row], slopes, head, head_dim)
            value_KM = value_FM[head * head_dim : (head + 1) * head_dim]
            parts.append(_product(value_KM, weights_ML.astype(value_FM.dtype), 1, 0) / total_1L)
        mixed[row] = jnp.concatenate(parts).T.astype(mixed.dtype)


def _backward_kernel(
    query: Any,
    key: Any,
    value: Any,
    grad: Any,
    query_grad: Any,
    key_grad: Any,
    value_grad: Any,
    bias: Any,
    slopes: Any,
    head_dim: int,
) -> None:
    for row in range(query.shape[0]):
        query_LF, key_MF, value_MF, grad_LF = query[row], key[row], value[row], grad[row]
        key_FM, dtype = key_MF.T, query_LF.dtype
        key_grad_MF = value_grad_MF = jnp.zeros(key_MF.shape, jnp.float32)
        parts = []
        for head in range(LANES // head_dim):
            own_LF, own_grad_LF = _only(query_LF, head, head_dim), _only(grad_LF, head, head_dim)
            weights_ML, total_1L = _weights(own_LF, key_MF, bias[row], slopes, head, head_dim)
            weights_ML /= total_1L
            weights_grad_ML = _product(value_MF, own_grad_LF, 1, 1)
            mean_1L = (weights_ML * weights_grad_ML).sum(0, keepdims=True)
            scores_grad_ML = (weights_ML * (weights_grad_ML - mean_1L)).astype(dtype)
            value_grad_MF += _product(weights_ML.astype(dtype), own_grad_LF, 1, 0)
            key_grad_MF += _product(scores_grad_ML, own_LF, 1, 0)
            key_KM = key_FM[head * head_dim : (head + 1) * head_dim]
            parts.append(_product(key_KM, scores_grad_ML, 1, 0))
        query_grad[row] = jnp.concatenate(parts).T.astype(dtype)
        key_grad[row], value_grad[row] = key_grad_MF.astype(dtype), value_grad_MF.astype(dtype)


def _prepare_bias(bias: Any, causal: Any, segments: Any) -> None:
    """Zero where a query sees a key and -1e30 elsewhere, once for all heads of a row."""
    from jax.experimental import pallas as pl

    rows, length = bias.shape[:2]
    first = pl.program_id(0) * rows

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for row in range(rows):
            query_ML = jnp.broadcast_to(segments[row], (length, length))
            later_ML = _index((length, length), 0) > _index((length, length), 1)
            hidden_ML = (query_ML != query_ML.T) | (later_ML & (causal[first + row] != 0))
            bias[row] = jnp.where(hidden_ML, -1e30, 0.0)


def _weights(
    own_LF: jax.Array, key_MF: jax.Array, bias_ML: jax.Array, slopes: Any, head: int, head_dim: int
) -> tuple[jax.Array, jax.Array]:
    """A head's weights before they are divided by their sums, and those: float32 [M, L] and [1, L]."""
    from jax.experimental import pallas as pl

    scores_ML = _product(key_MF, own_LF, 1, 1) + bias_ML
    if slopes is not None:
        distance_ML = jnp.abs(_index(bias_ML.shape, 0) - _index(bias_ML.shape, 1)).astype(jnp.float32)
        scores_ML -= slopes[pl.program_id(1) * (LANES // head_dim) + head] * distance_ML
    weights_ML = jnp.exp(scores_ML - scores_ML.max(0, keepdims=True))
    return weights_ML, weights_ML.sum(0, keepdims=True)


def _only(heads_LF: jax.Array, head: int, head_dim: int) -> jax.Array:
    """One head's lanes, and zeros."""
    own_LF = _index(heads_LF.shape, 1) // head_dim == head
    return jnp.where(own_LF, heads_LF, jnp.zeros_like(heads_LF))


def _index(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _product(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """Summed over these axes in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)
