"""SpanBERT's second prediction: its head by hand, and what it may look at."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_step import CFG, QUICK, mesh_of

from mlm_jax.config import SpanBoundaryConfig
from mlm_jax.model.heads import SpanBoundaryHead

DIM, VOCAB, SPAN = CFG.model.embed_dim, CFG.model.vocab_size, SpanBoundaryConfig(max_targets=6, position_dim=10)


@pytest.fixture(autouse=True)
def one():
    """A mesh of one device, set."""
    with jax.set_mesh(mesh_of("1")):
        yield


@functools.cache
def parameters():
    built = jax.eval_shape(lambda: SpanBoundaryHead(CFG.model, SPAN, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(built, nnx.Param)
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda leaf: rng.normal(0.0, 0.5, leaf.shape).astype(np.float32), nnx.to_pure_dict(state))


def inputs():
    rng = np.random.default_rng(1)
    left, right = rng.normal(size=(2, 2, 5, DIM)).astype(np.float32)
    return (
        left,
        right,
        rng.integers(0, SPAN.max_targets, (2, 5)).astype(np.int32),
        rng.normal(size=(VOCAB, DIM)).astype(np.float32),
    )


def normed(x: np.ndarray, norm: dict) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + CFG.model.norm_eps)
    return scaled * norm["scale_D"] + norm["bias_D"]


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_the_head_is_two_layers_over_both_ends_and_the_distance():
    graphdef, params = parameters()
    left, right, offsets, table = inputs()
    head = jax.jit(lambda params, *rest: nnx.merge(graphdef, params)(*rest), compiler_options=QUICK)
    found = head(params, left, right, offsets, table)
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    joined = np.concatenate([left, right, wide["positions_TE"][offsets]], -1)
    kernel = np.concatenate([wide["left_DD"], wide["right_DD"], wide["position_ED"]])
    hidden = normed(gelu_tanh(joined @ kernel + wide["first_bias_D"]), wide["first_norm"])
    hidden = normed(gelu_tanh(hidden @ wide["second_DE"] + wide["second_bias_E"]), wide["second_norm"])
    # Float32 through two layers; the logits reach 20.
    np.testing.assert_allclose(found, hidden @ table.T + wide["output_bias_V"], atol=2e-4)


def test_its_parameters():
    _, params = parameters()
    assert params["positions_TE"].shape == (6, 10)
    assert params["left_DD"].shape == params["right_DD"].shape == params["second_DE"].shape == (DIM, DIM)
    assert "decoder_VD" not in params  # tied
    assert params["output_bias_V"].shape == (VOCAB,)  # and a bias of its own
