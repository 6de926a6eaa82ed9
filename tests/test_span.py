"""SpanBERT's second prediction: its head by hand, what it looks at, and its place in the loss."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_step import CFG, QUICK, make_rows, mesh_of, on_devices, tables_on

from mlm_jax import masking
from mlm_jax.config import EvaluationConfig, MaskingConfig, SpanBoundaryConfig
from mlm_jax.model.encoder import Compute
from mlm_jax.model.heads import SpanBoundaryHead
from mlm_jax.objectives import Keys
from mlm_jax.objectives.mlm import mask_batch
from mlm_jax.objectives.rates import constant_rates
from mlm_jax.objectives.span import SpanBert

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


def test_the_loss_is_a_mean_over_masked_tokens_and_one_over_those_between_two_ends():
    span_boundary = SpanBoundaryConfig(max_targets=3, loss_weight=0.5)
    cfg = dataclasses.replace(
        CFG, objective="span", masking=MaskingConfig(policy="span", rate=0.3), span_boundary=span_boundary
    )
    objective, keys, rows = SpanBert(cfg, Compute.resolve(cfg.compute)), Keys(jax.random.key(0), None, 0), make_rows()
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), shapes)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def everything(params, batch, vocab):
        masked = mask_batch(batch, keys.mask, vocab, cfg.masking, constant_rates(cfg.masking))
        places = masked.positions_BP, masked.weights_BP, batch["tokens"], batch["segment_ids"]
        ends = masking.span_ends(*places, vocab.is_special_V, max_targets=3)
        model = objective.network.bind(params)
        hidden_BLD = model.encoder(masked.inputs_BL, batch["segment_ids"])
        table_VD = model.encoder.embeddings.tokens_VD[...]
        left, right, own = (
            jax.numpy.take_along_axis(hidden_BLD, at_BP[:, :, None], axis=1)
            for at_BP in (ends.left_BP, ends.right_BP, masked.positions_BP)
        )
        logits = model.head(own, table_VD), model.span_head(left, right, ends.offsets_BP, table_VD)
        return masked, ends, logits, objective.loss(params, batch, keys, vocab)

    mesh = mesh_of("1")
    masked, ends, logits, sums = jax.device_get(everything(params, on_devices(rows, mesh), tables_on(mesh)))
    weights = masked.weights_BP, ends.weights_BP
    assert 30 < weights[1].sum() < weights[0].sum() == sums.predicted - weights[1].sum()
    for name, logits_BPV, weights_BP, factor in zip(("mlm", "sbo"), logits, weights, (1.0, 0.5), strict=True):
        wide = logits_BPV.astype(np.float64)
        gold = np.take_along_axis(wide, masked.targets_BP[:, :, None], -1)[:, :, 0]
        nll = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1) - gold
        assert sums.losses[name].weight == weights_BP.sum()
        assert sums.losses[name].sum == pytest.approx(factor * (nll * weights_BP).sum(), rel=1e-5)


def test_an_evaluation_is_of_spans_at_its_own_rate():
    """As many as the rate asks for in each row, and their losses those of a run that trains with them."""
    masks = MaskingConfig(policy="span", rate=0.5)
    cfg = dataclasses.replace(CFG, objective="span", masking=masks, evaluation=EvaluationConfig(mask_rate=0.25))
    same = dataclasses.replace(cfg, masking=dataclasses.replace(masks, rate=0.25))
    evaluated, trained = (SpanBert(each, Compute.resolve(each.compute)) for each in (cfg, same))
    mesh, rows, keys = mesh_of("1"), make_rows(), Keys(jax.random.key(0), None)
    rows |= {"epochs": np.zeros_like(rows["epochs"])}
    rng, shapes = np.random.default_rng(0), jax.eval_shape(evaluated.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), shapes)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(params, batch, vocab):
        return evaluated.evaluate(params, batch, keys, vocab), trained.loss(params, batch, keys, vocab)

    found, sums = jax.device_get(both(params, on_devices(rows, mesh), tables_on(mesh)))
    for name, term in (("sbo", sums.losses["sbo"]), ("sbo_accuracy", sums.metrics["sbo_accuracy"])):
        np.testing.assert_allclose(found[name], term, rtol=1e-6)  # two places of one program
    real, special = (rows["segment_ids"] > 0).sum(1), np.isin(rows["tokens"], range(5)) & (rows["segment_ids"] > 0)
    budgets = np.where(real > 0, np.maximum(np.round(0.25 * real), 1), 0)
    assert sums.losses["mlm"].weight == np.minimum(budgets, real - special.sum(1)).sum() > found["sbo"].weight > 20
