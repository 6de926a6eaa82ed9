"""The train step: the same gradient on any mesh and accumulation, an exact loss, and a state that nothing spoils."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_step import (
    BAD_GRADIENT,
    BAD_LOSS,
    BATCH,
    CFG,
    LENGTH,
    LOG_EVERY,
    MESHES,
    NAMES,
    QUICK,
    make_rows,
    mesh_of,
    objective,
    on_devices,
    parameters_on,
    spiky,
    tables_on,
)

from mlm_jax import sharding
from mlm_jax.model.layers import gather_positions
from mlm_jax.objectives import Keys
from mlm_jax.objectives.mlm import mask_batch
from mlm_jax.objectives.rates import constant_rates
from mlm_jax.objectives.scoring import score_targets
from mlm_jax.sharding import divide
from mlm_jax.train.optimizer import learning_rate, make_optimizer
from mlm_jax.train.step import accumulate_gradients, make_train_step


@pytest.fixture
def one():
    """A mesh of one device, set."""
    mesh = mesh_of("1")
    with jax.set_mesh(mesh):
        yield mesh


# The state.


def test_the_state_is_donated_and_metrics_outlive_it(one):
    run = spiky()
    state, vocab = run.state(), tables_on(one)
    after, metrics = run.step(state, run.batch(), vocab)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    run.step(after, run.batch(1), vocab)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(metrics)))


def test_an_update_moves_every_parameter_and_the_average_follows(one):
    run = spiky()
    state, vocab = run.state(), tables_on(one)
    state, _ = run.step(state, run.batch(0), vocab)  # the first has a learning rate of 0
    before = jax.device_get((state.params, state.ema))
    state, metrics = run.step(state, run.batch(1), vocab)
    assert float(metrics["learning_rate"]) == pytest.approx(0.5e-2)
    after = jax.device_get((state.params, state.ema))
    for (path, old), new, old_ema, new_ema in zip(
        jax.tree_util.tree_leaves_with_path(before[0]), *map(jax.tree.leaves, (after[0], before[1], after[1])), strict=True
    ):
        assert (old != new).mean() > 0.5, jax.tree_util.keystr(path)
        np.testing.assert_allclose(new_ema, 0.9 * old_ema + 0.1 * new, atol=1e-6)


@pytest.mark.parametrize("bad", [BAD_LOSS, BAD_GRADIENT])
def test_a_step_that_is_not_finite_changes_nothing_but_counts(one, bad):
    run, vocab = spiky(), tables_on(one)
    state, _ = run.step(run.state(), run.batch(3), vocab)
    state, _ = run.step(state, run.batch(0), vocab)  # the first had a learning rate of 0
    kept = jax.tree.map(np.array, (state.params, list(state.opt_state[:-1]), state.ema))
    sums = jax.device_get(state.interval)
    ids = make_rows()["example_ids"]
    ids[0] = bad
    for count in (1, 2):
        state, metrics = run.step(state, run.batch(1, example_ids=ids), vocab)
        assert int(state.step) == 2 + count and int(state.nonfinite) == int(metrics["nonfinite"]) == count
    assert not np.isfinite(metrics["grad_norm"]) or bad == BAD_LOSS
    *moments, last = state.opt_state
    assert isinstance(last, optax.ScaleByScheduleState) and int(last.count) == int(state.step)  # time goes on
    for old, new in zip(*map(jax.tree.leaves, (kept, (state.params, moments, state.ema))), strict=True):
        assert np.asarray(new).tobytes() == old.tobytes()
    # Neither the loss nor its weight entered the means of the log line.
    interval = jax.device_get(metrics["interval"])
    assert (interval["mlm"], interval["accuracy"]) == (sums["mlm"], sums["accuracy"])
    assert interval["skipped"] == (2.0, 4.0)

    state, metrics = run.step(state, run.batch(2), vocab)
    assert int(state.nonfinite) == 0 and np.isfinite(metrics["grad_norm"])
    assert (np.asarray(state.params["head"]["transform_DD"]) != kept[0]["head"]["transform_DD"]).mean() > 0.5


def test_the_rate_that_is_logged_is_the_rate_that_was_used(one):
    """Also after an update was skipped: the logged rate and the optimizer's must not drift apart."""
    run, vocab = spiky(), tables_on(one)
    ids = make_rows()["example_ids"]
    ids[0] = BAD_LOSS
    state, _ = run.step(run.state(), run.batch(1, example_ids=ids), vocab)
    before = np.asarray(state.params["head"]["transform_DD"])
    state, metrics = run.step(state, run.batch(), vocab)
    moved = np.abs(np.asarray(state.params["head"]["transform_DD"]) - before).max()
    # Adam's first update is about as large as the rate, and a rate of 0 moves nothing.
    assert (moved > 0) == (float(metrics["learning_rate"]) > 0)


def test_interval_sums_are_those_of_the_steps_since_the_last_log_line(one):
    run, vocab = spiky(), tables_on(one)
    key = jax.random.key(CFG.seed)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def measure(params, batch):
        return run.objective.loss(params, batch, Keys(key, None), vocab)

    state, expected = run.state(), {name: np.zeros(2) for name in NAMES}
    for step in range(1, 2 * LOG_EVERY + 1):
        sums = measure(state.params, run.batch(step))
        for name, term in (sums.losses | sums.metrics).items():
            expected[name] += np.asarray(term)
        state, metrics = run.step(state, run.batch(step), vocab)
        interval = jax.device_get(metrics["interval"])
        for name in NAMES:
            np.testing.assert_allclose(interval[name], expected[name], rtol=1e-5)
        if step % LOG_EVERY == 0:
            assert interval["skipped"] == (0.0, float(LOG_EVERY))
            expected = {name: np.zeros(2) for name in NAMES}


def test_interval_shapes_are_those_of_the_rows(one):
    run, vocab = spiky(), tables_on(one)
    _, metrics = run.step(run.state(), run.batch(), vocab)
    means = {name: term.sum / term.weight for name, term in jax.device_get(metrics["interval"]).items()}
    segment_ids = make_rows()["segment_ids"]
    lengths = np.concatenate([np.bincount(row, minlength=3)[1:] for row in segment_ids])
    tokens = lengths.sum()
    assert means["tokens"] == tokens
    assert means["row_fill"] == pytest.approx(tokens / segment_ids.size)
    assert means["segment_length"] == pytest.approx((lengths**2).sum() / tokens)  # as a token sees it
    assert means["predicted"] == pytest.approx(metrics["interval"]["mlm"].weight / tokens)


# The gradient.


@functools.cache
def gradient(mesh_name: str, accumulation: int, layers_at_once: bool, as_on_tpu: bool):
    """The compiled (params, batch, vocab) -> gradient and sums."""
    mesh, built = mesh_of(mesh_name), objective()

    @jax.jit
    def grad(params, batch, vocab):
        def loss(params, micro, key):
            return built.loss(params, micro, Keys(jax.random.key(0), key), vocab)

        stored = divide(params) if MESHES[mesh_name].zero else params
        return accumulate_gradients(loss, stored, batch, None, accumulation, jnp.float32, layers_at_once=layers_at_once)

    with jax.set_mesh(mesh), mock.patch.object(sharding, "_on_tpu", return_value=as_on_tpu):
        arguments = parameters_on(mesh), on_devices(make_rows(), mesh), tables_on(mesh)
        return grad.lower(*arguments).compile(QUICK)


def gradient_of(
    rows: dict[str, np.ndarray],
    mesh_name: str = "1",
    accumulation: int = 1,
    *,
    layers_at_once: bool | None = None,
    as_on_tpu: bool = False,
):
    """On the host: the gradient and the sums of a batch; unless it is said, as the step of unrolled layers gathers them."""
    mesh = mesh_of(mesh_name)
    at_once = accumulation > 1 if layers_at_once is None else layers_at_once
    with jax.set_mesh(mesh):
        found = gradient(mesh_name, accumulation, at_once, as_on_tpu)(
            parameters_on(mesh), on_devices(rows, mesh), tables_on(mesh)
        )
        return jax.device_get(found)


@pytest.mark.parametrize(
    ("mesh_name", "accumulation"),
    [
        *(("1", 2), ("1", 4), ("zero", 2), ("2x2x2", 4), ("all", 4)),
        *((name, 1) for name in MESHES if name != "1"),
        *((name, accumulation) for name in ("8", "2x4", "4x2") for accumulation in (2, 4)),
    ],
)
def test_a_batch_has_one_gradient_on_any_mesh_and_accumulation(mesh_name, accumulation):
    found, sums = gradient_of(make_rows(), mesh_name, accumulation)
    assert_gradient_of_one_device(found, sums)


@pytest.mark.parametrize("mesh_name", ["zero", "2x2x2", "all"])
def test_it_is_the_same_where_all_layers_are_gathered_at_once(mesh_name):
    """As a scan over layers needs them."""
    assert_gradient_of_one_device(*gradient_of(make_rows(), mesh_name, layers_at_once=True))


@pytest.mark.parametrize("mesh_name", ["zero", "sliced zero", "all"])
def test_it_is_the_same_where_gradients_are_summed_before_they_are_divided(mesh_name):
    assert_gradient_of_one_device(*gradient_of(make_rows(), mesh_name, as_on_tpu=True))


def assert_gradient_of_one_device(found, sums):
    expected, expected_sums = gradient_of(make_rows())
    assert sums.losses["mlm"].weight == expected_sums.losses["mlm"].weight > 50
    np.testing.assert_allclose(sums.losses["mlm"].sum, expected_sums.losses["mlm"].sum, rtol=1e-6)
    for (path, grad), other in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        # Float32 has 24 bits, of which sums of thousands of terms in another order lose up to 8.
        scale = np.abs(grad).max()
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(other, grad, atol=2e-5 * scale + 1e-8, rtol=0, err_msg=name)


def test_the_gradient_is_that_of_the_mean_over_all_masked_tokens_of_the_batch():
    """Not of a mean of the rows' means: halves of a batch add up by their weights."""
    rows = make_rows()
    halves = []
    for half in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):
        part = {name: array.copy() for name, array in rows.items()}
        part["segment_ids"][:] = 0
        part["segment_ids"][half] = rows["segment_ids"][half]
        halves.append(gradient_of(part))
    whole, sums = gradient_of(rows)
    weights = [part.losses["mlm"].weight for _, part in halves]
    assert sum(weights) == sums.losses["mlm"].weight and weights[1] > 2 * weights[0]
    np.testing.assert_allclose(sum(part.losses["mlm"].sum for _, part in halves), sums.losses["mlm"].sum, rtol=1e-5)
    expected = jax.tree.map(lambda a, b: (weights[0] * a + weights[1] * b) / sum(weights), halves[0][0], halves[1][0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max() + 1e-8), expected, whole)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_padding_rows_count_for_nothing(accumulation):
    rows = make_rows()
    rows["segment_ids"][:] = 0
    grads, sums = gradient_of(rows, "1", accumulation)
    assert (sums.losses["mlm"], sums.metrics["accuracy"]) == ((0.0, 0.0), (0.0, 0.0))
    assert all((grad == 0).all() for grad in jax.tree.leaves(grads))

    rows = make_rows()
    other = {name: array.copy() for name, array in rows.items()}
    empty = rows["segment_ids"].sum(1) == 0
    other["tokens"][empty], other["example_ids"][empty] = 77, 5
    assert 2 <= empty.sum() < BATCH / 2
    a, b = (gradient_of(each, "1", accumulation) for each in (rows, other))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_only_hidden_states_that_are_predicted_from_have_a_gradient(one, monkeypatch):
    built, rows = objective(), on_devices(make_rows(), one)
    key = jax.random.key(0)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def grad(delta_BLD, params, batch, vocab):
        def loss(delta_BLD):
            monkeypatch.setattr(
                "mlm_jax.model.encoder.gather_positions",
                lambda hidden_BLD, at: hidden_BLD if at is None else gather_positions(hidden_BLD + delta_BLD, at),
            )
            return built.loss(params, batch, Keys(key, None), vocab).losses["mlm"].mean()

        return jax.grad(loss)(delta_BLD)

    delta = on_devices(np.zeros((BATCH, LENGTH, CFG.model.embed_dim), np.float32), one)
    found = np.asarray(grad(delta, parameters_on(one), rows, tables_on(one)))
    masked = mask_batch(rows, key, tables_on(one), CFG.masking, constant_rates(CFG.masking))
    chosen = np.zeros((BATCH, LENGTH), bool)
    for row, positions, weights in zip(chosen, *map(np.asarray, (masked.positions_BP, masked.weights_BP)), strict=True):
        row[positions[weights > 0]] = True
    assert 50 < chosen.sum() < 0.15 * BATCH * LENGTH
    assert (found[~chosen] == 0).all()
    assert (np.abs(found[chosen]).max(-1) > 0).all()


# The loss.


def test_cross_entropy_by_hand(one):
    log = np.log(np.array([[1, 2, 5], [1, 2, 5], [1, 2, 5], [3, 3, 2]], np.float32))[None]
    targets = np.array([[0, 1, 2, 1]], np.int32)
    expected = np.log([[8.0, 4.0, 8 / 5, 8 / 3]])
    for shift in (0.0, 1e4, -1e4):
        nll, correct = score_targets(jnp.asarray(log + np.float32(shift)), targets)
        # Float32 keeps three decimals of numbers around 10,000.
        np.testing.assert_allclose(nll, expected, atol=1e-6 if shift == 0 else 2e-3)
        if shift == 0:
            np.testing.assert_array_equal(correct, [[0, 0, 1, 1]])
    nll, _ = score_targets(jnp.asarray([[[0.0, 1e4, -1e4]]]), np.array([[2]], np.int32))
    np.testing.assert_array_equal(nll, [[2e4]])


def test_the_gradient_of_cross_entropy_is_the_softmax_less_the_target(one):
    logits = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32) * 3
    targets = np.array([[0, 1, 6], [3, 3, 2]], np.int32)
    found = jax.jit(jax.grad(lambda x: score_targets(x, targets)[0].sum()))(logits)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found, softmax - np.eye(7)[targets], atol=1e-6)


def test_the_loss_is_the_mean_over_masked_positions_of_logits_everywhere(one):
    built, rows, vocab = objective(), on_devices(make_rows(), one), tables_on(one)
    params, key = parameters_on(one), jax.random.key(0)
    masked = jax.device_get(mask_batch(rows, key, vocab, CFG.masking, constant_rates(CFG.masking)))
    everywhere = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH))
    logits = np.asarray(
        jax.jit(built.logits, compiler_options=QUICK)(params, masked.inputs_BL, rows["segment_ids"], everywhere), np.float64
    )
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = hits = count = 0
    for row in range(BATCH):
        for position, weight in zip(masked.positions_BP[row], masked.weights_BP[row], strict=True):
            target = make_rows()["tokens"][row, position]
            total -= weight * log_softmax[row, position, target]
            hits += weight * (logits[row, position].argmax() == target)
            count += weight
    _, sums = gradient_of(make_rows())
    np.testing.assert_allclose(sums.losses["mlm"], (total, count), rtol=1e-5)
    np.testing.assert_array_equal(sums.metrics["accuracy"], (hits, count))


def test_dropout_is_the_same_on_any_mesh():
    cfg = dataclasses.replace(CFG, model=dataclasses.replace(CFG.model, dropout=0.2, attention_dropout=0.2))
    losses = []
    for name in ("1", "2x2x2"):
        mesh, built = mesh_of(name), objective(cfg)
        with jax.set_mesh(mesh):

            @functools.partial(jax.jit, compiler_options=QUICK)
            def loss(params, batch, vocab, built=built):
                return built.loss(params, batch, Keys(jax.random.key(0), jax.random.key(1)), vocab).losses["mlm"].mean()

            losses.append(float(loss(parameters_on(mesh), on_devices(make_rows(), mesh), tables_on(mesh))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    _, sums = gradient_of(make_rows())
    assert abs(losses[0] - sums.losses["mlm"].sum / sums.losses["mlm"].weight) > 1e-3


def test_a_log_line_never_spans_two_stages(one):
    """A stage that begins between two log lines starts its sums anew."""
    run, vocab = spiky(), tables_on(one)
    state, _ = run.step(run.state(), run.batch(0), vocab)
    state, metrics = run.step(state, run.batch(1), vocab)
    assert float(metrics["interval"]["skipped"].weight) == 2.0
    second = make_train_step(CFG, CFG.stages[0], objective(), make_optimizer(CFG), learning_rate(CFG), first_step=2)
    _, metrics = second(state, run.batch(2), vocab)
    assert float(metrics["interval"]["skipped"].weight) == 1.0
