"""The hybrid: causal rows that see no future, in their exact share, and both predictions from the state before a token."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_step import (
    BATCH,
    CFG,
    LENGTH,
    QUICK,
    Program,
    make_rows,
    mesh_of,
    on_devices,
    parameters_on,
    tables_on,
    with_places,
)

from mlm_jax.config import ComputeConfig, Config, HybridConfig, ModelConfig
from mlm_jax.masking import streams
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import Keys
from mlm_jax.objectives.hybrid import HybridLM
from mlm_jax.objectives.mlm import mask_batch
from mlm_jax.objectives.rates import scheduled_rates
from mlm_jax.objectives.spread import spread_rows

SHARE = 0.25
HYBRID = dataclasses.replace(
    CFG,
    objective="hybrid",
    hybrid=HybridConfig(causal_share=SHARE),
    compute=ComputeConfig(layers="scan", head_chunk=10),
)


@pytest.fixture
def one():
    """A mesh of one device, set."""
    mesh = mesh_of("1")
    with jax.set_mesh(mesh):
        yield mesh


def built(cfg: Config = HYBRID, share: float = SHARE) -> HybridLM:
    cfg = dataclasses.replace(cfg, hybrid=HybridConfig(causal_share=share))
    return HybridLM(cfg, Compute.resolve(cfg.compute))


def test_a_causal_row_sees_no_future_and_a_masked_one_does(one):
    """By the gradient of each hidden state with regard to each token's embedding, exactly zero where nothing is seen."""
    cfg = Config(
        name="tiny",
        model=ModelConfig(vocab_size=40, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=16, max_positions=8),
        compute=ComputeConfig(layers="scan"),
    )
    model = built(cfg)
    params = jax.tree.map(lambda leaf: leaf + 0.1, model.init(jax.random.key(0)))
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8) + 5  # every token once, so that a row of the table is one place
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0]] * 2, np.int32)
    causal = np.array([True, False])

    probes = np.einsum("pq,k->pqk", np.eye(16), np.arange(16.0)).reshape(16, 2, 8, 16).astype(np.float32)

    @jax.jit
    def seen(params):
        embeddings = params["encoder"]["embeddings"]

        def of(probe_BLD):
            def output(table):
                encoder = params["encoder"] | {"embeddings": embeddings | {"tokens_VD": table}}
                bound = model.network.bind(params | {"encoder": encoder})
                return (bound.encoder(tokens, segments, causal_B=causal) * probe_BLD).sum()

            return jax.numpy.abs(jax.grad(output)(embeddings["tokens_VD"])).max(-1)

        return jax.lax.map(of, probes)

    found = np.asarray(seen(params))[:, 5:21].reshape(2, 8, 2, 8)
    for row in range(2):
        for place in range(8):
            same = segments[row] == segments[row, place]
            expected = same & (np.arange(8) <= place) if causal[row] else same
            np.testing.assert_array_equal(found[row, place, row] > 0, expected)
            assert (found[row, place, 1 - row] == 0).all()


@pytest.mark.parametrize(
    ("rows", "share", "counts"), [(32, 0.25, {8}), (32, 0.0625, {2}), (24, 0.0625, {1, 2}), (8, 1.0, {8})]
)
def test_each_batch_has_its_share_of_causal_rows(rows, share, counts):
    places = {"places": np.arange(rows, dtype=np.float32) / rows}
    found = [
        int((spread_rows(places, Keys(jax.random.key(0), None, step), streams.CAUSAL_ROWS) < share).sum())
        for step in range(60)
    ]
    assert set(found) == counts
    # Of 60 batches whose counts lie within one of each other: the mean's deviation is 0.5 / √60 at most.
    assert np.mean(found) == pytest.approx(share * rows, abs=4 * 0.5 / np.sqrt(60))


def cross_entropy(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    top = logits.max(-1)
    return top + np.log(np.exp(logits - top[..., None]).sum(-1)) - np.take_along_axis(logits, tokens[..., None], -1)[..., 0]


def test_the_loss_is_two_means_from_the_states_before_the_tokens(one):
    model, rows = built(), with_places(make_rows())
    batch, vocab, params = on_devices(rows, one), tables_on(one), parameters_on(one)
    keys = Keys(jax.random.key(0), None, jax.numpy.int32(3))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def everything(params, batch, vocab):
        masked = mask_batch(batch, keys.mask, vocab, HYBRID.masking, scheduled_rates(HYBRID, 0, keys.step))
        causal_B = spread_rows(batch, keys, streams.CAUSAL_ROWS) < SHARE
        everywhere = jax.numpy.broadcast_to(jax.numpy.arange(LENGTH), (BATCH, LENGTH))
        given = batch["segment_ids"], everywhere
        left = model.causal_logits(params, batch["tokens"], *given)
        both = model.logits(params, masked.inputs_BL, *given)
        hidden = model.network.bind(params).encoder(masked.inputs_BL, batch["segment_ids"])
        shifted = model.network.bind(params).predict(hidden[:, :-1])
        return causal_B, masked, left, both, shifted, model.loss(params, batch, keys, vocab)

    causal, masked, left, both, shifted, sums = jax.device_get(everything(params, batch, vocab))
    np.testing.assert_allclose(both[:, 1:], shifted, atol=1e-4)
    segments = rows["segment_ids"]
    follows = np.zeros_like(segments, bool)
    follows[:, 1:] = (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
    chosen = np.zeros_like(follows)
    for row, positions, used in zip(chosen, masked.positions_BP, masked.weights_BP, strict=True):
        row[positions[used > 0]] = True
    assert causal.sum() == BATCH * SHARE and (chosen <= follows).all()
    nll = {"masked": cross_entropy(both, rows["tokens"]), "causal": cross_entropy(left, rows["tokens"])}
    weights = {"masked": chosen & ~causal[:, None], "causal": follows & causal[:, None]}
    for name, coefficient in (("masked", 1 - SHARE), ("causal", SHARE)):
        assert sums.losses[name].weight == weights[name].sum() > 20
        assert sums.losses[name].sum == pytest.approx(coefficient * nll[name][weights[name]].sum(), rel=1e-5)
    assert sums.predicted == weights["masked"].sum() + weights["causal"].sum()


@pytest.mark.parametrize("share", [0.0, SHARE, 1.0])
def test_what_is_measured_on_held_out_rows(one, share):
    model, rows = built(share=share), make_rows()
    batch, vocab, params = on_devices(rows, one), tables_on(one), parameters_on(one)
    keys = Keys(jax.random.key(0), None)
    found = jax.jit(lambda p, b: model.evaluate(p, b, keys, vocab), compiler_options=QUICK)(params, batch)
    assert found.keys() == ({"causal_bits_per_token"} if share else set())
    everywhere = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH))
    given = params, rows["tokens"], rows["segment_ids"], everywhere
    left, read = (np.asarray(jax.jit(f, compiler_options=QUICK)(*given)) for f in (model.causal_logits, model.logits))
    # Plain causal models are read from the left, by evaluation, fill-mask and score too.
    assert (np.abs(left - read).max() < 1e-5) == (share == 1.0)
    if share:
        follows = (rows["segment_ids"][:, 1:] > 0) & (rows["segment_ids"][:, 1:] == rows["segment_ids"][:, :-1])
        bits = cross_entropy(left, rows["tokens"])[:, 1:][follows].sum() / np.log(2)
        assert found["causal_bits_per_token"].weight == follows.sum()
        assert found["causal_bits_per_token"].sum == pytest.approx(bits, rel=1e-5)


@functools.cache
def one_step(mesh_name: str, accumulation: int):
    run = Program(mesh_name, accumulation, HybridLM, HYBRID)
    with jax.set_mesh(run.mesh):
        state, vocab = run.state(), tables_on(run.mesh)
        for seed in (0, 1):
            state, metrics = run.step(state, run.batch(seed), vocab)
        assert run.traces == 1
        return jax.device_get((metrics["interval"], metrics["grad_norm"]))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh_name", "accumulation"), [("1", 4), ("2x2x2", 1)])
def test_any_mesh_and_accumulation_take_the_same_steps(mesh_name, accumulation):
    (plain, norm), (other, other_norm) = one_step("1", 1), one_step(mesh_name, accumulation)
    for name in ("masked", "causal"):
        assert plain[name].weight == other[name].weight > 0
        # Float32 sums in another order.
        np.testing.assert_allclose(other[name].sum, plain[name].sum, rtol=1e-5)
    np.testing.assert_allclose(other_norm, norm, rtol=1e-4)
