"""A head with a transform by its formulas in NumPy, for texts and for tokens."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from interop_runs import SMALL

from mlm_jax.config import ModelConfig, ShardingConfig, TaskConfig
from mlm_jax.model.task_heads import TextHead, TokenHead
from mlm_jax.sharding import make_mesh

ACTIVATIONS = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_erf": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}
LENGTHS = (7, 4, 1)


def transformed(x, kernel, bias, scale, activation, eps):
    """The norm of the activated dense layer, in float64."""
    x = ACTIVATIONS[activation](x @ kernel + bias)
    centred = x - x.mean(-1, keepdims=True)
    return scale * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


@pytest.mark.parametrize(
    ("pooling", "activation", "bias"),
    [
        ("cls", "gelu_erf", False),
        ("mean", "tanh", True),
        ("", "relu", False),
        ("", "silu", True),
        ("mean", "gelu_tanh", False),
    ],
)
def test_a_transform_stands_before_the_output(pooling, activation, bias):
    """Of a text behind the pooling, which leaves out padding; of tokens at each of them."""
    cfg = ModelConfig(**SMALL, norm_bias=False, norm_eps=1e-2)
    task = TaskConfig(pooling=pooling or "cls", activation=activation, transform=True, transform_bias=bias)
    rng = np.random.default_rng(0)
    hidden_BLD = rng.normal(size=(3, 7, 32)).astype(np.float32)
    segment_ids_BL = (np.arange(7) < np.array(LENGTHS)[:, None]).astype(np.int32)
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        head = (TextHead if pooling else TokenHead)(cfg, 3, task, rngs=nnx.Rngs(0))
        inner = head.output if pooling else head
        parts = [inner.transform.dense_DD, inner.transform.dense_bias_D, inner.transform.norm.scale_D]
        parts += [inner.output_DC, inner.output_bias_C]
        assert (parts[1] is not None) is bias and not hasattr(head, "pooler_DD")
        for part in filter(None, parts):
            part[...] = jnp.asarray(rng.normal(size=part.shape), jnp.float32)
        arguments = (hidden_BLD, segment_ids_BL, None) if pooling else (hidden_BLD, None)
        found = np.asarray(head(*(None if a is None else jnp.asarray(a) for a in arguments)))
    kernel, own_bias, scale, output, output_bias = (
        0.0 if part is None else np.asarray(part[...], np.float64) for part in parts
    )
    x = hidden_BLD.astype(np.float64)
    if pooling == "cls":
        x = x[:, :1]
    elif pooling == "mean":
        x = np.stack([row[:length].mean(0, keepdims=True) for row, length in zip(x, LENGTHS, strict=True)])
    expected = transformed(x, kernel, own_bias, scale, activation, 1e-2) @ output + output_bias
    np.testing.assert_allclose(found, expected, atol=1e-4)
