"""BERT and RoBERTa are reproduced exactly: logits and gradients of Hugging Face models of the same weights.

The reference is frozen in golden/*.npz, written by golden/make_bert_golden.py, so that no test needs torch.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax.config import Config, ModelConfig, ShardingConfig
from mlm_jax.interop.tensors import layout, to_params
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives.mlm import MaskedLM
from mlm_jax.objectives.scoring import score_targets
from mlm_jax.sharding import make_mesh

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
NUM_LAYERS, NUM_HEADS = 2, 4
PLAIN = Compute(jnp.dtype("float32"), scan_layers=False, remat="none", attention="xla", platform="cpu")
CASES = pytest.mark.parametrize(
    ("name", "activation"), [("bert", "gelu_erf"), ("bert", "gelu_tanh"), ("roberta", "gelu_erf")]
)


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def objective(name: str, activation: str) -> MaskedLM:
    weights = {key.removeprefix("weight/"): array for key, array in golden(name).items()}
    vocab_size, embed_dim = weights["embeddings.word_embeddings.weight"].shape
    offset = {"bert": 0, "roberta": 2}[name]
    model = ModelConfig(
        vocab_size=vocab_size,
        num_layers=NUM_LAYERS,
        embed_dim=embed_dim,
        num_heads=NUM_HEADS,
        mlp_dim=len(weights["encoder.layer.0.intermediate.dense.bias"]),
        max_positions=len(weights["embeddings.position_embeddings.weight"]) - offset,
        position_offset=offset,
        num_token_types=len(weights["embeddings.token_type_embeddings.weight"]),
        activation=activation,
        norm_eps={"bert": 1e-12, "roberta": 1e-5}[name],
        dropout=0.1,  # no key is given, so nothing is dropped
        attention_dropout=0.1,
    )
    return MaskedLM(Config(name=name, model=model), PLAIN)


def shapes_of(built) -> dict:
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        return jax.eval_shape(built.init, jax.random.key(0))


def tree_of(name: str, weight) -> dict:
    """Our parameters from Hugging Face's, where `weight(name)` is one of theirs or a gradient of one."""
    tensors = layout(name, "masked", tied=True).tensors
    return to_params(shapes_of(objective(name, "gelu_erf")), tensors, lambda theirs: weight(theirs.removeprefix(f"{name}.")))


def parameters(name: str) -> dict:
    return tree_of(name, lambda weight: golden(name)[f"weight/{weight}"])


@functools.cache
def result(name: str, activation: str):
    """Our logits at every position, the loss, and its gradient: NumPy arrays."""
    built, arrays = objective(name, activation), golden(name)
    tokens, types, labels = (arrays[f"input/{key}"] for key in ("input_ids", "token_type_ids", "labels"))
    segment_ids = arrays["input/attention_mask"]

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params):
        def loss(params):
            model = built.network.bind(params)
            hidden = model.encoder(tokens, segment_ids, None, types)
            logits = model.head(hidden, model.encoder.embeddings.tokens_VD[...])
            nll, _ = score_targets(logits, np.maximum(labels, 0))
            return (nll * (labels >= 0)).sum() / (labels >= 0).sum(), logits

        (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return logits, value, grads

    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        return jax.device_get(run(parameters(name)))


@CASES
def test_logits_and_loss(name, activation):
    logits, loss, _ = result(name, activation)
    real = golden(name)["input/attention_mask"] == 1
    expected = golden(name)[f"{activation}/logits"]
    # Float32 through two layers, in two orders of summation; the logits reach 4.
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4, rtol=0)
    np.testing.assert_allclose(loss, golden(name)[f"{activation}/loss"], rtol=1e-5)


def test_the_tolerance_tells_the_activations_apart():
    exact, approximate = (golden("bert")[f"{activation}/logits"] for activation in ("gelu_erf", "gelu_tanh"))
    assert np.abs(exact - approximate).max() > 1e-3


@CASES
def test_gradients(name, activation):
    _, _, grads = result(name, activation)
    prefix = f"{activation}/gradient/"
    kept = {key.removeprefix(prefix) for key in golden(name) if key.startswith(prefix)}
    assert len(kept) == 15
    # Where no gradient was kept, NaN stands in for it.
    expected = tree_of(
        name, lambda weight: golden(name).get(prefix + weight, golden(name)[f"weight/{weight}"] * np.float32(np.nan))
    )
    compared = 0
    for (path, grad), other in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        known = ~np.isnan(other)
        compared += known.any()
        np.testing.assert_allclose(
            grad[known], other[known], atol=1e-4 * np.abs(grad).max(), rtol=0, err_msg=jax.tree_util.keystr(path)
        )
    assert compared == len(kept)
