"""The contract, for every objective that a recipe can name: what it declares is what it gives, anywhere it runs."""

import dataclasses
import functools
import inspect
import pathlib

import jax
import numpy as np
import pytest
from example_objective import MaskedLMWithZLoss
from tiny_step import CFG, LENGTH, QUICK, make_rows, mesh_of, on_devices, tables_on, with_places

from mlm_jax.config import TASKS, Config, HybridConfig, ImageTextConfig, MaskingConfig, RtdConfig
from mlm_jax.config.limits import CHOICES
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import OBJECTIVES, Keys, make_objective
from mlm_jax.train.checkpoint import Checkpoints
from mlm_jax.train.evaluate import COMMON
from mlm_jax.train.optimizer import learning_rate, make_optimizer
from mlm_jax.train.state import init_state
from mlm_jax.train.step import accumulate_gradients, make_train_step
from mlm_jax.workdir import Workdir

SCHEDULED = {"rate": 0.4, "schedule": "linear", "final_rate": 0.2, "rate_spread": 0.1, "final_mask_prob": 0.5}
# What each is trained with here; `scheduled` is `mlm` with everything that masking can vary by step and example.
VARIANTS = {
    "mlm": CFG,
    "scheduled": dataclasses.replace(CFG, masking=MaskingConfig(policy="ngram", max_words=3, **SCHEDULED)),
    "span": dataclasses.replace(CFG, objective="span", masking=MaskingConfig(policy="span", rate=0.3)),
    "rtd": dataclasses.replace(
        CFG, objective="rtd", model=dataclasses.replace(CFG.model, num_heads=4), rtd=RtdConfig(generator_size=0.5)
    ),
    "diffusion": dataclasses.replace(CFG, objective="diffusion"),
    "hybrid": dataclasses.replace(CFG, objective="hybrid", hybrid=HybridConfig(causal_share=0.25)),
    "image_text": dataclasses.replace(
        CFG,
        objective="image_text",
        model=dataclasses.replace(CFG.model, image_size=12, patch_size=4),
        image_text=ImageTextConfig(patch_mask_rate=0.5),
    ),
}
EXAMPLE = "mlm_z"
NEW = [name for name in VARIANTS if name != "mlm"]  # test_step.py and test_one_program.py are about `mlm`


@pytest.fixture(autouse=True)
def example(monkeypatch):
    """The objective of the README's page, registered as it says."""
    monkeypatch.setitem(OBJECTIVES, EXAMPLE, MaskedLMWithZLoss)


@pytest.fixture
def one():
    """A mesh of one device, set."""
    mesh = mesh_of("1")
    with jax.set_mesh(mesh):
        yield mesh


def config(name: str) -> Config:
    return VARIANTS[name] if name in VARIANTS else dataclasses.replace(CFG, objective=name)


def build(name: str):
    cfg = config(name)
    return make_objective(cfg, Compute.resolve(cfg.compute), mask_id=4)


def rows_of(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows as the objective takes them."""
    rows, side = make_rows(seed), config(name).model.image_size
    if side:
        images = np.random.default_rng(seed).integers(0, 256, (2, len(rows["tokens"]), side, side, 3), dtype=np.uint8)
        matches = np.arange(len(rows["tokens"]), dtype=np.int32) % 4 != 1
        rows |= {"images": images[0], "other_images": images[1], "matches": matches.astype(np.int32)}
    return rows


@functools.cache
def weights(name: str):
    """The same parameters for every mesh, on the host, larger than initial ones so that every gradient matters."""
    with jax.set_mesh(mesh_of("1")):
        shapes = jax.eval_shape(build(name).init, jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return rng.normal(float("scale" in jax.tree_util.keystr(path)), 0.1, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def gradient(name: str, mesh_name: str, accumulation: int):
    """The gradient of a batch, and its sums, on the host."""
    objective, mesh = build(name), mesh_of(mesh_name)

    @jax.jit
    def grad(params, batch, vocab):
        def loss(params, micro, key):
            return objective.loss(params, micro, Keys(jax.random.key(0), key, 7), vocab)

        return accumulate_gradients(
            loss, params, batch, None, accumulation, np.dtype(np.float32), layers_at_once=accumulation > 1
        )

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(objective.init, jax.random.key(0))
        params = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, jax.NamedSharding(mesh, like.sharding.spec)), weights(name), shapes
        )
        arguments = params, on_devices(with_places(rows_of(name)), mesh), tables_on(mesh)
        return jax.device_get(grad.lower(*arguments).compile(QUICK)(*arguments))


def test_a_recipe_may_name_every_objective_and_no_other():
    assert set(CHOICES["objective"]) == (OBJECTIVES.keys() - {EXAMPLE}) | TASKS.keys()
    assert OBJECTIVES.keys() - {EXAMPLE} <= {cfg.objective for cfg in VARIANTS.values()}


def test_the_example_of_the_readme_is_the_one_that_is_trained_here():
    assert inspect.getsource(MaskedLMWithZLoss) in (pathlib.Path(__file__).resolve().parent.parent / "README.md").read_text()


@dataclasses.dataclass(frozen=True)
class NamesTheMask(MaskedLMWithZLoss):
    mask_id: int | None = None


def test_an_objective_that_has_a_field_for_it_is_given_the_tokenizers_mask(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, EXAMPLE, NamesTheMask)
    assert build(EXAMPLE).mask_id == build("diffusion").mask_id == 4
    assert all(not hasattr(build(name), "mask_id") for name in VARIANTS if name != "diffusion")


@pytest.mark.parametrize("name", [*VARIANTS, EXAMPLE])
def test_an_objective_gives_the_terms_that_it_declares(name, one):
    objective = build(name)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    batch, vocab, keys = on_devices(with_places(rows_of(name)), one), tables_on(one), Keys(jax.random.key(0), None)
    sums = jax.eval_shape(lambda p, *rest: objective.loss(p, *rest), params, batch, keys, vocab)
    # As sets: a pytree's dictionaries come back sorted.
    assert sums.losses.keys() == set(objective.loss_names) and sums.metrics.keys() == set(objective.metric_names)
    own = jax.eval_shape(lambda p, *rest: objective.evaluate(p, *rest), params, batch, keys, vocab)
    assert not own.keys() & set(COMMON)
    assert all(leaf.shape == () and leaf.dtype == np.float32 for leaf in jax.tree.leaves((sums, own)))
    positions = np.zeros((4, 3), np.int32)
    logits = jax.eval_shape(objective.logits, params, *np.zeros((2, 4, LENGTH), np.int32), positions)
    assert (logits.shape, logits.dtype) == ((4, 3, CFG.model.vocab_size), np.float32)
    assert objective.flops_per_token(10.0, 0.2) > objective.flops_per_token(10.0, 0.1) > 0


@pytest.mark.parametrize("name", ["span", "rtd", "hybrid", "image_text"])
def test_how_a_run_trains_does_not_change_what_an_objective_measures(name, one):
    """Whichever stage the objective was made for, at whatever rate it trains."""
    plain, found = config(name), []
    stages = (*plain.stages, dataclasses.replace(plain.stages[0], mask_rate=0.6))
    other = dataclasses.replace(plain, stages=stages, masking=dataclasses.replace(plain.masking, **SCHEDULED, static=True))
    rows = rows_of(name) | {"epochs": np.zeros(len(make_rows()["tokens"]), np.int32)}
    given = weights(name), on_devices(rows, one), Keys(jax.random.key(0), None), tables_on(one)
    for cfg, stage in ((plain, 0), (other, 1)):
        objective = make_objective(cfg, Compute.resolve(cfg.compute), stage)
        found.append(jax.device_get(jax.jit(objective.evaluate, compiler_options=QUICK)(*given)))
    assert found[0] == found[1] and all(term.weight > 20 for term in found[0].values())


@pytest.mark.parametrize("name", VARIANTS)
def test_tables_may_have_a_width_of_their_own(name, one):
    cfg = config(name)
    objective = make_objective(
        dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, table_dim=24)), Compute.resolve(cfg.compute)
    )
    params = jax.eval_shape(objective.init, jax.random.key(0))
    batch, vocab, keys = on_devices(with_places(rows_of(name)), one), tables_on(one), Keys(jax.random.key(0), None)
    sums = jax.eval_shape(lambda p, *rest: objective.loss(p, *rest), params, batch, keys, vocab)
    assert sums.losses.keys() == set(objective.loss_names)


@pytest.mark.parametrize("name", NEW)
def test_a_batch_has_one_finite_gradient_on_any_mesh_and_accumulation(name):
    expected, expected_sums = gradient(name, "1", 1)
    assert all(np.isfinite(grad).all() and np.abs(grad).max() > 0 for grad in jax.tree.leaves(expected))
    found, sums = gradient(name, "2x2x2", 2)
    for term, other in zip(expected_sums.losses.values(), sums.losses.values(), strict=True):
        assert term.weight == other.weight > 20
        np.testing.assert_allclose(other.sum, term.sum, rtol=1e-6)
    for (path, grad), other in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        # Float32 has 24 bits, of which sums of thousands of terms in another order lose up to 8.
        atol = 2e-5 * np.abs(grad).max() + 1e-8
        np.testing.assert_allclose(other, grad, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


class Training:
    """A run's step on one device, on rows that repeat; for as many steps as asked for."""

    def __init__(self, name: str):
        self.name = name
        self.cfg, self.objective, self.traces = config(name), build(name), 0
        self.optimizer, schedule = make_optimizer(self.cfg), learning_rate(self.cfg)

        def counted(step):
            self.traces += 1
            return schedule(step)

        self.step = make_train_step(self.cfg, self.cfg.stages[0], self.objective, self.optimizer, counted)

    def start(self):
        names = self.objective.loss_names + self.objective.metric_names

        def create():
            return init_state(self.objective.init(jax.random.key(0)), self.optimizer, ema=True, names=names)

        return jax.jit(create, compiler_options=QUICK)()

    def run(self, state, first: int, last: int, mesh):
        losses = []
        for step in range(first, last):
            batch, vocab = on_devices(rows_of(self.name, step % 2), mesh), tables_on(mesh)
            with jax.transfer_guard("disallow"):
                state, metrics = self.step(state, batch, vocab)
            interval = jax.device_get(metrics["interval"])
            losses.append(sum(float(interval[name].sum / interval[name].weight) for name in self.objective.loss_names))
        return state, losses


@pytest.mark.parametrize("name", [*NEW, EXAMPLE])
def test_one_trace_a_falling_loss_and_a_continuation_that_is_exact(name, one, tmp_path):
    training = Training(name)
    whole, losses = training.run(training.start(), 0, 40, one)
    assert training.traces == 1 and training.step._cache_size() == 1
    assert np.isfinite(losses).all() and np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])

    half, _ = training.run(training.start(), 0, 20, one)
    with_checkpoints = Checkpoints(Workdir(tmp_path), keep=1)
    with_checkpoints.save(half, 20, wait=True)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), half)
    restored, step = with_checkpoints.restore(abstract)
    with_checkpoints.close()
    assert step == 20
    resumed, rest = training.run(restored, 20, 40, one)
    assert rest == losses[20:]
    for left, right in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_rows_without_spans_count_for_nothing(one):
    """Where no stretch has two ends, the second loss is 0 and not NaN."""
    objective = build("span")
    rows = make_rows()
    rows["segment_ids"][:] = 0
    rows["tokens"][:, :3], rows["segment_ids"][:, :3] = (2, 50, 3), 1  # a stretch of one token touches both ends

    @functools.partial(jax.jit, compiler_options=QUICK)
    def grad(params, batch, vocab):
        def loss(params):
            sums = objective.loss(params, batch, Keys(jax.random.key(0), None), vocab)
            return sum(term.mean() for term in sums.losses.values()), sums

        return jax.grad(loss, has_aux=True)(params)

    grads, sums = jax.device_get(grad(weights("span"), on_devices(rows, one), tables_on(one)))
    assert sums.losses["sbo"] == (0.0, 0.0) and sums.losses["mlm"].weight == len(rows["tokens"])
    assert all((grad == 0).all() for grad in jax.tree.leaves(grads["span_head"]))
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))
