"""Masked diffusion: rates that cover their range in every batch, and a loss whose expectation is the bound itself."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
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

from mlm_jax import masking
from mlm_jax.config import ComputeConfig, Config, DiffusionConfig, ModelConfig, StageConfig
from mlm_jax.model.encoder import Compute
from mlm_jax.model.layers import gather_positions
from mlm_jax.objectives import Keys
from mlm_jax.objectives.diffusion import MaskedDiffusion, mask_counts
from mlm_jax.objectives.scoring import score_in_chunks, score_targets
from mlm_jax.objectives.spread import spread_rows

MASK_ID = 4
# Chunks that do not divide the rows, so that the last is padded.
CHUNKED = dataclasses.replace(CFG, compute=ComputeConfig(layers="scan", head_chunk=10))


@pytest.fixture
def one():
    """A mesh of one device, set."""
    mesh = mesh_of("1")
    with jax.set_mesh(mesh):
        yield mesh


# Rates.


def spread(step: int, stream=masking.streams.ROW_RATES, rows: int = BATCH) -> np.ndarray:
    batch = {"places": jnp.arange(rows, dtype=jnp.float32) / rows}
    return np.asarray(spread_rows(batch, Keys(jax.random.key(3), None, jnp.int32(step)), stream))


def test_in_every_batch_each_stratum_is_hit_once():
    for step in range(20):
        numbers = spread(step)
        assert ((numbers >= 0) & (numbers < 1)).all()
        np.testing.assert_array_equal(np.sort(np.floor(numbers * BATCH)), np.arange(BATCH))


def test_a_rows_numbers_are_uniform_over_the_steps():
    numbers = np.array([spread(step)[5] for step in range(400)])
    counts = np.histogram(numbers, 8, (0, 1))[0]
    assert ((counts - 50) ** 2 / 50).sum() < 24.3  # chi-square with 7 degrees of freedom: exceeded once in a thousand times
    assert (spread(7) != spread(7, masking.streams.CAUSAL_ROWS)).all()


# The bound, of a text of three tokens whose every mask is enumerated.

TEXT = np.array([2, 7, 9, 12, 3, 0, 0, 0], np.int32)  # CLS, three tokens, SEP, padding
SMALL = Config(
    name="small",
    objective="diffusion",
    model=ModelConfig(vocab_size=16, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16, max_positions=8),
    diffusion=DiffusionConfig(min_rate=0.05),
    stages=(StageConfig(seq_len=8, batch_size=512),),
    compute=ComputeConfig(layers="scan"),
)
TABLES = masking.VocabTables.from_arrays(mask_id=4, special_ids=np.arange(5), word_starts=np.ones(16, bool), vocab_size=16)


def small(**knobs) -> MaskedDiffusion:
    cfg = dataclasses.replace(SMALL, diffusion=dataclasses.replace(SMALL.diffusion, **knobs))
    return MaskedDiffusion(cfg, Compute.resolve(cfg.compute), mask_id=MASK_ID)


@functools.cache
def weights():
    """Such that what a token costs depends much on which others are seen."""
    with jax.set_mesh(mesh_of("1")):
        shapes = jax.eval_shape(small().init, jax.random.key(0))
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda leaf: rng.normal(0.0, 0.5, leaf.shape).astype(np.float32), shapes)


@functools.cache
def costs() -> dict[tuple[int, ...], float]:
    """For each set of masked places, the sum of their cross-entropies."""
    sets = [s for size in (1, 2, 3) for s in itertools.combinations((1, 2, 3), size)]
    tokens = np.array([np.where(np.isin(np.arange(8), s), MASK_ID, TEXT) for s in sets], np.int32)
    places = np.broadcast_to(np.arange(1, 4, dtype=np.int32), (len(sets), 3))
    with jax.set_mesh(mesh_of("1")):
        segments = (tokens > 0).astype(np.int32)
        logits = np.asarray(jax.jit(small().logits)(weights(), tokens, segments, places), np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - logits[:, np.arange(3), TEXT[1:4]]
    return {s: sum(nll[index, place - 1] for place in s) for index, s in enumerate(sets)}


def bound_at(rate: float) -> float:
    """The expected loss at one rate, in nats a token."""
    return sum(rate ** len(s) * (1 - rate) ** (3 - len(s)) * cost for s, cost in costs().items()) / rate / 3


def rows_of_text(count: int, first: int = 0) -> dict[str, np.ndarray]:
    tokens = np.broadcast_to(TEXT, (count, 8)).copy()
    ids = np.arange(first, first + count, dtype=np.int32)
    places = np.arange(count, dtype=np.float32) / count
    segments = (tokens > 0).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segments, "example_ids": ids, "epochs": np.zeros_like(ids), "places": places}


@pytest.mark.parametrize("scored_share", [1.0, 1 / 8])
def test_the_losses_expectation_is_the_bound(one, scored_share):
    """Also where one masked token of up to three is scored for all of them."""
    built, vocab = small(scored_share=scored_share), jax.device_put(TABLES, jax.P())

    @jax.jit
    def run(params, step):
        keys = Keys(jax.random.key(1), None, step)
        batch = rows_of_text(512) | {"example_ids": jnp.arange(512, dtype=jnp.int32) + 512 * step}
        sums = built.loss(params, batch, keys, vocab)
        return sums.losses["bound"], sums.predicted

    found = [jax.device_get(run(weights(), jnp.int32(step))) for step in range(60)]
    means = [term.sum / term.weight for term, _ in found]
    assert all(term.weight == 3 * 512 for term, _ in found)  # all tokens of text, masked or not
    expected = np.mean([bound_at(0.05 + 0.95 * (k + 0.5) / 1000) for k in range(1000)])
    assert abs(np.mean(means) - expected) < 4 * np.std(means) / math.sqrt(len(means))
    assert np.std(means) / math.sqrt(len(means)) < 0.01 * expected
    most = max(int(predicted) for _, predicted in found)
    assert most <= 512 if scored_share < 1 else most > 512


def test_the_evaluations_bound_is_that_over_all_rates(one):
    built, vocab = small(), jax.device_put(TABLES, jax.P())
    run = jax.jit(lambda params, batch: built.evaluate(params, batch, Keys(jax.random.key(1), None), vocab))
    found = jax.device_get(run(weights(), rows_of_text(512))["bound_bits_per_token"])
    assert found.weight == 3 * 512
    # The same by orders: the n-th token from the end of a random order is predicted from those before it.
    by_size = [np.mean([cost / size for s, cost in costs().items() if len(s) == size]) for size in (1, 2, 3)]
    expected = np.mean(by_size) / math.log(2)
    assert expected * math.log(2) == pytest.approx(np.mean([bound_at((k + 0.5) / 5000) for k in range(5000)]), rel=1e-4)
    assert found.sum / found.weight == pytest.approx(expected, rel=0.01)
    # A row's share does not depend on the rows beside it.
    parts = [run(weights(), rows_of_text(256, first))["bound_bits_per_token"] for first in (0, 256)]
    assert sum(float(part.sum) for part in parts) == pytest.approx(found.sum, rel=1e-6)
    # Nor on how often a run has seen it.
    later = rows_of_text(512) | {"epochs": np.full(512, 3, np.int32)}
    assert jax.device_get(run(weights(), later)["bound_bits_per_token"]) == found
    nothing = rows_of_text(512) | {"segment_ids": np.zeros((512, 8), np.int32)}
    assert jax.device_get(run(weights(), nothing)["bound_bits_per_token"]) == (0.0, 0.0)


def test_an_evaluations_numbers_of_masks_are_spread_evenly():
    sizes = np.array([3] * 300 + [100] * 100, np.float32)
    counts = np.asarray(mask_counts(jax.random.key(1), np.arange(400, dtype=np.int32), sizes, 4))
    np.testing.assert_allclose(np.bincount(counts[:, :300].astype(int).ravel()), [0, 400, 400, 400], atol=4)
    # One in each quarter for a row, and over a hundred rows nearly every number once in each quarter.
    np.testing.assert_array_equal(np.ceil(counts[:, 300:] / 25), np.broadcast_to([[1], [2], [3], [4]], (4, 100)))
    assert np.bincount(counts[:, 300:].astype(int).ravel(), minlength=101)[1:].max() <= 6
    empty = np.asarray(mask_counts(jax.random.key(1), np.arange(2, dtype=np.int32), np.zeros(2, np.float32), 4))
    assert (empty == 0).all()


# Carried over, and never predicted.


def test_only_masked_tokens_cost_anything_and_the_mask_is_no_candidate(one, monkeypatch):
    built = MaskedDiffusion(CFG, Compute.resolve(CFG.compute), mask_id=MASK_ID)
    rows, keys, step = with_places(make_rows()), jax.random.key(0), jnp.int32(2)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def grads(delta_BLD, params, batch, vocab):
        def loss(delta_BLD, params):
            monkeypatch.setattr(
                "mlm_jax.model.encoder.gather_positions",
                lambda hidden_BLD, at: hidden_BLD if at is None else gather_positions(hidden_BLD + delta_BLD, at),
            )
            return built.loss(params, batch, Keys(keys, None, step), vocab).losses["bound"].mean()

        return jax.grad(loss, argnums=(0, 1))(delta_BLD, params)

    delta = on_devices(np.zeros((BATCH, LENGTH, CFG.model.embed_dim), np.float32), one)
    by_hidden, by_params = jax.device_get(grads(delta, parameters_on(one), on_devices(rows, one), tables_on(one)))
    monkeypatch.undo()

    rates = 1e-3 + (1 - 1e-3) * np.asarray(
        spread_rows({"places": rows["places"]}, Keys(keys, None, step), masking.streams.ROW_RATES)
    )
    masked = np.zeros((BATCH, LENGTH), bool)
    for row in range(BATCH):
        key = jax.random.fold_in(jax.random.fold_in(keys, rows["epochs"][row]), rows["example_ids"][row])
        uniform = np.asarray(jax.random.bits(key, (2, LENGTH))[0] >> 8) * 2.0**-24
        masked[row] = (rows["segment_ids"][row] > 0) & (rows["tokens"][row] >= 5) & (uniform < rates[row])
    assert 100 < masked.sum() < 0.7 * BATCH * LENGTH
    assert (by_hidden[~masked] == 0).all()
    assert (np.abs(by_hidden[masked]).max(-1) > 0).all()
    bias = by_params["head"]["output_bias_V"]
    assert bias[MASK_ID] == 0 and (np.delete(bias, MASK_ID) != 0).all()

    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH))
    given = parameters_on(one), rows["tokens"], rows["segment_ids"], places
    logits = np.asarray(jax.jit(built.logits, compiler_options=QUICK)(*given))
    assert (logits[:, :, MASK_ID] == -np.inf).all() and np.isfinite(np.delete(logits, MASK_ID, axis=2)).all()
    with pytest.raises(AssertionError, match="mask_id"):
        MaskedDiffusion(CFG, Compute.resolve(CFG.compute)).logits(*given)


def test_scores_in_chunks_are_the_scores_and_so_are_their_gradients(one):
    rng = np.random.default_rng(0)
    table, hidden = rng.normal(size=(40, 8)).astype(np.float32), rng.normal(size=(3, 25, 8)).astype(np.float32)
    targets = rng.integers(0, 40, (3, 25)).astype(np.int32)

    def run(size):
        def total(table, hidden):
            nll, correct = score_in_chunks(lambda h, t: score_targets(h @ table.T, t), hidden, targets, size)
            return (nll * np.arange(25, dtype=np.float32)[None]).sum(), (nll, correct)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(table, hidden)

    whole, parts = run(0), run(10)
    assert whole[0][1][0].shape == (3, 25)
    # Sums of 75 float32 terms in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, parts)


# One program, on any mesh.


@functools.cache
def program(mesh_name: str, accumulation: int, cls=MaskedDiffusion) -> Program:
    return Program(mesh_name, accumulation, cls, CHUNKED)


@functools.cache
def two_steps(mesh_name: str, accumulation: int, cls=MaskedDiffusion):
    """Parameters and log line after two steps, the first of which has a learning rate of 0."""
    run = program(mesh_name, accumulation, cls)
    with jax.set_mesh(run.mesh):
        state, vocab = run.state(), tables_on(run.mesh)
        for seed in (0, 1):
            state, metrics = run.step(state, run.batch(seed), vocab)
        assert run.traces == 1
        return jax.device_get((state.params, metrics["interval"], metrics["grad_norm"]))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh_name", "accumulation"), [("1", 4), ("2x2x2", 2)])
def test_any_mesh_and_accumulation_take_the_same_steps(mesh_name, accumulation):
    plain, other = two_steps("1", 1), two_steps(mesh_name, accumulation)
    assert plain[1]["bound"].weight == other[1]["bound"].weight and plain[1]["predicted"].sum == other[1]["predicted"].sum
    # Float32 sums of thousands of terms, some with a weight of hundreds, in another order.
    np.testing.assert_allclose(other[1]["bound"].sum, plain[1]["bound"].sum, rtol=1e-5)
    np.testing.assert_allclose(other[2], plain[2], rtol=1e-4)


def test_a_restored_state_goes_on_bit_for_bit(one):
    """The rates follow the step that the state holds."""
    run, vocab = program("1", 1), tables_on(one)
    state = run.state()
    for seed in (0, 1):
        state, _ = run.step(state, run.batch(seed), vocab)
    host = jax.device_get(state)
    restored = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), host, state)
    ends = []
    for each in (state, restored):
        for seed in (2, 3):
            each, metrics = run.step(each, run.batch(seed), vocab)
        ends.append(jax.device_get((each.params, metrics["interval"]["bound"])))
    jax.tree.map(np.testing.assert_array_equal, *ends)
    again = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), host, run.state())
    other = run.step(dataclasses.replace(again, step=again.step + 1), run.batch(2), vocab)[1]["interval"]["predicted"].sum
    assert float(other) != float(metrics["interval"]["predicted"].sum)
