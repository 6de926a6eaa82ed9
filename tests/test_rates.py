"""Masking rates that follow a schedule: by hand, in one program, and drawn anew for each example."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_masking import LENGTH, ROWS, assert_binomial, shares
from test_masking_units import mask
from tiny_step import BATCH, CFG, QUICK, make_rows, mesh_of, on_devices, tables_on

from mlm_jax.config import Config, MaskingConfig, StageConfig
from mlm_jax.masking import num_slots
from mlm_jax.objectives import Keys
from mlm_jax.objectives.mlm import mask_batch
from mlm_jax.objectives.rates import constant_rates, scheduled_rates

STAGES = (StageConfig(steps=60), StageConfig(steps=40))


def config(schedule: str, *, stages=STAGES, **masking) -> Config:
    masking = {"rate": 0.3, "final_rate": 0.15} | masking
    return Config(name="rates", stages=stages, masking=MaskingConfig(schedule=schedule, **masking))


@pytest.mark.parametrize(
    ("schedule", "options", "rates"),
    [
        ("linear", {}, {0: 0.3, 50: 0.225, 99: 0.1515, 100: 0.15}),
        ("linear", {"schedule_start": 20, "schedule_steps": 40}, {20: 0.3, 40: 0.225, 60: 0.15, 99: 0.15}),
        ("linear", {"final_rate": 0.6}, {0: 0.3, 50: 0.45, 100: 0.6}),
        ("cosine", {}, {0: 0.3, 25: 0.3 - 0.15 * (0.5 - 0.5 * np.cos(np.pi / 4)), 50: 0.225, 100: 0.15}),
        ("step", {"schedule_start": 70}, {0: 0.3, 69: 0.3, 70: 0.15, 99: 0.15}),
    ],
)
def test_rates_at_named_steps(schedule, options, rates):
    cfg = config(schedule, **options)
    on_device = jax.jit(lambda step: scheduled_rates(cfg, 0, step).rate)
    for step, rate in rates.items():
        assert float(on_device(np.int32(step))) == pytest.approx(rate, rel=1e-6)


def test_what_is_shown_moves_with_the_rate_or_stays():
    cfg = config("linear", mask_prob=1.0, random_prob=0.0, final_mask_prob=0.8)
    rates = scheduled_rates(cfg, 0, 50)
    assert (float(rates.mask_prob), rates.random_prob) == (pytest.approx(0.9), 0.0)
    constant = Config(name="constant", masking=MaskingConfig(rate=0.2, rate_spread=0.1))
    assert scheduled_rates(constant, 0, 5) == constant_rates(constant.masking) == (0.2, 0.8, 0.1, pytest.approx(0.3))


def test_the_slots_of_a_stage_are_those_of_its_own_largest_rate():
    falling, rising = config("linear"), config("linear", rate=0.1, final_rate=0.2)
    assert [scheduled_rates(falling, stage, 0).largest for stage in (0, 1)] == [pytest.approx(0.3), pytest.approx(0.21)]
    assert [scheduled_rates(rising, stage, 0).largest for stage in (0, 1)] == [pytest.approx(0.159), pytest.approx(0.199)]
    spread = config("linear", rate_spread=0.05)
    assert scheduled_rates(spread, 0, 0).largest == pytest.approx(0.35)
    own = config("linear", stages=(STAGES[0], dataclasses.replace(STAGES[1], mask_rate=0.5)))
    assert scheduled_rates(own, 1, 80)[::3] == (0.5, 0.5)


def test_one_program_masks_as_much_as_each_step_asks_for_and_shows_it_as_asked():
    cfg = dataclasses.replace(
        config("linear", rate=0.5, final_rate=0.1, mask_prob=1.0, random_prob=0.0, final_mask_prob=0.0), model=CFG.model
    )
    mesh, traces = mesh_of("1"), []
    rows = make_rows()
    lengths = (rows["segment_ids"] > 0).sum(1)
    special = np.isin(rows["tokens"], np.arange(5)) & (rows["segment_ids"] > 0)
    candidates = lengths - special.sum(1)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def masked(batch, vocab, step):
        traces.append(step)
        keys = Keys(jax.random.key(0), None, step)
        return mask_batch(batch, keys.mask, vocab, cfg.masking, scheduled_rates(cfg, 0, keys.step))

    with jax.set_mesh(mesh):
        for step in (0, 30, 59):
            found = jax.device_get(masked(on_devices(rows, mesh), tables_on(mesh), np.int32(step)))
            rate = np.float32(0.5 - 0.4 * step / 100)
            budgets = np.minimum(np.maximum(np.round(rate * lengths), 1), candidates)
            assert found.weights_BP.shape == (BATCH, num_slots(rows["tokens"].shape[1], 0.5))
            np.testing.assert_array_equal(found.weights_BP.sum(1), budgets)
            hidden = (found.inputs_BL == 4).sum()
            assert_binomial(hidden, int(budgets.sum()), 1.0 - step / 100)
    assert len(traces) == 1


def test_a_mask_depends_on_the_step_through_the_rate_alone():
    """Where the rate is the same, so is the mask; and a lower rate hides fewer of the same tokens."""
    cfg = dataclasses.replace(config("step", rate=0.4, final_rate=0.2, schedule_start=50), model=CFG.model)
    mesh = mesh_of("1")
    with jax.set_mesh(mesh):
        batch, vocab = on_devices(make_rows(), mesh), tables_on(mesh)

        @functools.partial(jax.jit, compiler_options=QUICK)
        def masked(step):
            return mask_batch(batch, jax.random.key(0), vocab, cfg.masking, scheduled_rates(cfg, 0, step))

        early, later, last = (jax.device_get(masked(np.int32(step))) for step in (0, 49, 50))
    jax.tree.map(np.testing.assert_array_equal, early, later)
    for row in range(BATCH):
        few, many = (set(each.positions_BP[row, each.weights_BP[row] > 0].tolist()) for each in (last, early))
        assert few <= many
    assert last.weights_BP.sum() < 0.6 * early.weights_BP.sum()


def test_each_example_draws_its_rate():
    tokens = np.full((ROWS, LENGTH), 30, np.int32)
    batch = mask(tokens, np.ones_like(tokens), policy="token", rate=0.5, rate_spread=0.25)
    counts = batch.weights_BP.sum(1).astype(int)
    assert (counts.min(), counts.max()) == (16, 48)  # of 64
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 0), row))(np.arange(ROWS))
    own = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys)
    np.testing.assert_array_equal(counts, np.round((0.5 + 0.25 * (2 * np.asarray(own) - 1)) * LENGTH))
    inner = np.bincount(counts, minlength=49)[17:48]
    expected = ROWS / 32
    # The statistic of 31 of 33 cells, the outer two being half as wide, has about the mean and variance of 31 freedoms.
    statistic = ((inner - expected) ** 2 / expected).sum()
    assert abs(statistic - 31) < 4.5 * np.sqrt(2 * 31)
    trials, (masked, _, _) = shares(batch, tokens)
    assert_binomial(masked, trials, 0.8)
