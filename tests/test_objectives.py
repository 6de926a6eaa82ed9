"""The contract, for every objective that a recipe can name: what it declares is what it gives."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_step import CFG, LENGTH, make_rows, mesh_of, on_devices, tables_on

from mlm_jax.config.checks import _CHOICES
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import OBJECTIVES, Keys, make_objective
from mlm_jax.train.evaluate import COMMON


@pytest.fixture(autouse=True)
def one():
    """A mesh of one device, set."""
    mesh = mesh_of("1")
    with jax.set_mesh(mesh):
        yield mesh


def build(name: str):
    cfg = dataclasses.replace(CFG, objective=name)
    return make_objective(cfg, Compute.resolve(cfg.compute))


def test_a_recipe_may_name_every_objective_and_no_other():
    assert set(_CHOICES["objective"]) == OBJECTIVES.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_gives_the_terms_that_it_declares(name, one):
    objective = build(name)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    batch, vocab, keys = on_devices(make_rows(), one), tables_on(one), Keys(jax.random.key(0), None)
    sums = jax.eval_shape(lambda p, *rest: objective.loss(p, *rest), params, batch, keys, vocab)
    assert tuple(sums.losses) == objective.loss_names and tuple(sums.metrics) == objective.metric_names
    own = jax.eval_shape(lambda p, *rest: objective.evaluate(p, *rest), params, batch, keys, vocab)
    assert not own.keys() & set(COMMON)
    assert all(leaf.shape == () and leaf.dtype == np.float32 for leaf in jax.tree.leaves((sums, own)))
    positions = np.zeros((4, 3), np.int32)
    logits = jax.eval_shape(objective.logits, params, *np.zeros((2, 4, LENGTH), np.int32), positions)
    assert (logits.shape, logits.dtype) == ((4, 3, CFG.model.vocab_size), np.float32)
    assert objective.flops_per_token(10.0, 0.2) > objective.flops_per_token(10.0, 0.1) > 0
