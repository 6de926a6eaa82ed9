"""The optimizer: hand-computed updates, what decays, LAMB's ratio per layer, and the learning-rate curves."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlm_jax import config
from mlm_jax.errors import UserError
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives.mlm import MaskedLM
from mlm_jax.sharding import make_mesh
from mlm_jax.train import optimizer

HUNDRED_STEPS = (config.StageConfig(steps=100),)


def make_config(*, stages=HUNDRED_STEPS, **fields) -> config.Config:
    return config.Config(name="test", optimizer=config.OptimizerConfig(**fields), stages=stages)


def constant(**fields) -> config.Config:
    return make_config(**{"schedule": "constant", "clip_norm": 0.0} | fields)


def run(cfg: config.Config, params, gradients):
    """The parameters after one update for each tree of gradients."""
    transform = optimizer.make_optimizer(cfg)
    state = transform.init(params)

    @jax.jit
    def update(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for grads in gradients:
        params, state = update(params, state, grads)
    return params


def make_tree(seed: int):
    """A small tree with the model's names: two stacked layers, tables, a head."""
    rng = np.random.default_rng(seed)
    shapes = {
        "encoder": {
            "embeddings": {
                "tokens_VD": (16, 8),
                "positions_LD": (4, 8),
                "norm": {"scale_D": (8,), "bias_D": (8,)},
            },
            "layers": {
                "attention": {"query_DHK": (2, 8, 2, 4), "query_bias_HK": (2, 2, 4)},
                "mlp": {"up_DF": (2, 8, 16), "up_bias_F": (2, 16)},
                "mlp_norm": {"scale_D": (2, 8), "bias_D": (2, 8)},
            },
        },
        "head": {"transform_DD": (8, 8), "transform_bias_D": (8,), "decoder_VD": (16, 8), "output_bias_V": (16,)},
    }

    def draw(shape):
        return rng.normal(size=shape).astype(np.float32)

    return jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))


def paths(mask) -> set[str]:
    """The paths of the leaves that are true."""
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, value in leaves if value}


def test_adam_without_bias_correction_by_hand():
    # m = 0.05, v = 0.00025; then m = 0.02, v = 0.00031225. Update m / (√v + 1e-6) + 0.01 w, learning rate 0.1.
    cfg = constant(learning_rate=0.1, bias_correction=False, weight_decay=0.01)
    params = {"kernel": jnp.ones(1)}
    grads = [{"kernel": jnp.array([0.5])}, {"kernel": jnp.array([-0.25])}]
    first = 1 - 0.1 * (0.05 / (math.sqrt(0.00025) + 1e-6) + 0.01 * 1)
    second = first - 0.1 * (0.02 / (math.sqrt(0.00031225) + 1e-6) + 0.01 * first)
    assert first == pytest.approx(0.6827922, abs=1e-7)
    np.testing.assert_allclose(run(cfg, params, grads[:1])["kernel"], first, rtol=1e-6)
    np.testing.assert_allclose(run(cfg, params, grads)["kernel"], second, rtol=1e-6)


def test_adam_with_bias_correction_by_hand():
    # The corrected moments are 0.5 and 0.25; then 0.02 / 0.19 and 0.00031225 / 0.001999.
    cfg = constant(learning_rate=0.1, weight_decay=0.01)
    params = {"kernel": jnp.ones(1)}
    grads = [{"kernel": jnp.array([0.5])}, {"kernel": jnp.array([-0.25])}]
    first = 1 - 0.1 * (0.5 / (0.5 + 1e-6) + 0.01)
    second = first - 0.1 * (0.02 / 0.19 / (math.sqrt(0.00031225 / 0.001999) + 1e-6) + 0.01 * first)
    # float32 holds 1 - b2² with four digits fewer than float64.
    np.testing.assert_allclose(run(cfg, params, grads[:1])["kernel"], first, rtol=1e-5)
    np.testing.assert_allclose(run(cfg, params, grads)["kernel"], second, rtol=1e-5)


def test_corrected_adamw_is_optax_adamw():
    params, gradients = make_tree(0), [make_tree(seed) for seed in range(1, 4)]
    cfg = constant(learning_rate=1e-2, b2=0.98, weight_decay=0.1)
    reference = optax.adamw(1e-2, 0.9, 0.98, 1e-6, weight_decay=0.1, mask=optimizer.decay_mask)
    expected, state = params, reference.init(params)
    for grads in gradients:
        updates, state = reference.update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run(cfg, params, gradients), expected)


def test_norms_and_biases_never_decay():
    expected = {
        "encoder/embeddings/tokens_VD",
        "encoder/embeddings/positions_LD",
        "encoder/layers/attention/query_DHK",
        "encoder/layers/mlp/up_DF",
        "head/transform_DD",
        "head/decoder_VD",
    }
    assert paths(optimizer.decay_mask(make_tree(0))) == expected
    without = {path for path in expected if "embeddings" not in path}
    assert paths(optimizer.decay_mask(make_tree(0), embeddings=False)) == without
    everything = paths(jax.tree.map(lambda _: True, make_tree(0)))
    assert paths(optimizer.decay_mask(make_tree(0), norms_and_biases=True)) == everything


def test_every_matrix_and_table_of_the_model_decays():
    model = config.ModelConfig(num_token_types=2, tie_embeddings=False)
    cfg = config.Config(name="test", model=model)
    with jax.set_mesh(make_mesh(cfg.sharding)):
        params = jax.eval_shape(MaskedLM(cfg, Compute.resolve(cfg.compute)).init, jax.random.key(0))
    decaying = {path.rsplit("/", 1)[1] for path in paths(optimizer.decay_mask(params))}
    attention = {f"{name}_DHK" for name in ("query", "key", "value")} | {"output_HKD"}
    tables = {"tokens_VD", "positions_LD", "token_types_TD", "decoder_VD"}
    assert decaying == attention | tables | {"up_DF", "down_FD", "transform_DD"}


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_only_what_the_mask_names_shrinks(decay_embeddings):
    params = make_tree(0)
    zeros = jax.tree.map(np.zeros_like, params)
    cfg = constant(learning_rate=0.5, weight_decay=0.1, decay_embeddings=decay_embeddings)
    shrunk = jax.tree.map(lambda new, old: bool(np.allclose(new, 0.95 * old)), run(cfg, params, [zeros]), params)
    same = jax.tree.map(lambda new, old: bool((new == old).all()), run(cfg, params, [zeros]), params)
    decaying = paths(optimizer.decay_mask(params, embeddings=decay_embeddings))
    assert paths(shrunk) == decaying
    assert paths(same) == paths(jax.tree.map(lambda _: True, params)) - decaying


def test_clipping_is_by_the_global_norm():
    # SGD-like: without moments (b1 = b2 = 0) the update is g / (|g| + eps), so a large eps leaves it proportional to g.
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = [{"a": jnp.array([3.0]), "b": jnp.array([4.0])}]
    fields = {"learning_rate": 1e6, "b1": 0.0, "b2": 0.0, "eps": 1e6, "weight_decay": 0.0, "bias_correction": False}
    clipped, free = run(constant(**fields | {"clip_norm": 1.0}), params, grads), run(constant(**fields), params, grads)
    np.testing.assert_allclose([clipped["a"][0], clipped["b"][0]], [-0.6, -0.8], rtol=1e-5)
    np.testing.assert_allclose([free["a"][0], free["b"][0]], [-3, -4], rtol=1e-5)


def test_lamb_rescales_each_layer_of_each_decaying_tensor_and_nothing_else():
    params, grads = make_tree(0), make_tree(1)
    params["encoder"]["layers"]["mlp"]["up_DF"][1] *= 100.0  # layers whose norms differ
    params["head"]["decoder_VD"][:] = 0.0  # norm 0: ratio 1
    rate = 0.01
    new = run(constant(name="lamb", learning_rate=rate, weight_decay=0.1), params, [grads])
    decaying = optimizer.decay_mask(params)

    def expected(path, param, grad, decays):
        step = grad / (np.abs(grad) + 1e-6)  # corrected Adam's first update
        if not decays:
            return param - rate * step
        step = step + 0.1 * param
        stacked = "layers" in jax.tree_util.keystr(path)
        out = []
        for weights, update in zip(param, step, strict=True) if stacked else [(param, step)]:
            size = np.linalg.norm(weights.ravel())
            ratio = size / np.linalg.norm(update.ravel()) if size > 0 else 1.0
            out.append(weights - rate * ratio * update)
        return np.stack(out) if stacked else out[0]

    wanted = jax.tree_util.tree_map_with_path(expected, params, grads, decaying)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), new, wanted)


def test_stable_adamw_by_hand():
    # Corrected moments 0.5 and 0.25: the ratio √(0.25 / 0.25) is 1. Then v = 0.1 · 0.25 + 0.9 · 4 over its correction, and
    # the gradient of 2 is larger than that, so that update and decay are divided by the ratio.
    cfg = constant(name="stable_adamw", learning_rate=0.1, b1=0.5, b2=0.9, weight_decay=0.01)
    params, grads = {"kernel": jnp.ones(1)}, [{"kernel": jnp.array([0.5])}, {"kernel": jnp.array([2.0])}]
    first = 1 - 0.1 * (0.5 / (0.5 + 1e-6) + 0.01)
    m, v = (0.5 * 0.25 + 0.5 * 2.0) / (1 - 0.5**2), (0.9 * 0.1 * 0.25 + 0.1 * 4.0) / (1 - 0.9**2)
    ratio = math.sqrt(4.0 / v)
    second = first - 0.1 / ratio * (m / (math.sqrt(v) + 1e-6) + 0.01 * first)
    assert ratio > 1.3
    np.testing.assert_allclose(run(cfg, params, grads[:1])["kernel"], first, rtol=1e-5)
    np.testing.assert_allclose(run(cfg, params, grads)["kernel"], second, rtol=1e-5)


def test_each_layer_is_stabilised_by_itself():
    params = {"layers": {"up_DF": jnp.ones((2, 3, 4))}, "head": jnp.ones((2, 3, 4))}
    small, large = np.full((3, 4), 0.1, np.float32), np.full((3, 4), 5.0, np.float32)
    grads = [
        jax.tree.map(lambda _: np.stack([small, small]), params),
        jax.tree.map(lambda _: np.stack([small, large]), params),
    ]
    fields = {"learning_rate": 0.1, "b1": 0.0, "b2": 0.9, "weight_decay": 0.0}
    stable, plain = (run(constant(name=name, **fields), params, grads) for name in ("stable_adamw", "adamw"))
    layers = np.asarray(stable["layers"]["up_DF"] - plain["layers"]["up_DF"])
    assert np.abs(layers[0]).max() < 1e-6 and np.abs(layers[1]).min() > 1e-3
    # A tensor that is no stack is slowed down as a whole.
    assert np.abs(np.asarray(stable["head"] - plain["head"])).min() > 1e-3


@pytest.mark.parametrize("name", ["adamw", "stable_adamw"])
def test_decay_at_the_peak_is_a_share_of_its_own(name):
    """Where the rate is at its peak a step takes the share, and half of that at half of the rate; of a second peak too."""
    stages = (config.StageConfig(steps=10), config.StageConfig(steps=10, learning_rate=1e-5, warmup_steps=2))
    cfg = make_config(name=name, stages=stages, learning_rate=1e-2, weight_decay=0.1, decay_at_peak=True, clip_norm=0.0)
    params, zeros = {"kernel": jnp.ones(1)}, {"kernel": jnp.zeros(1)}
    values = [float(run(cfg, params, [zeros] * steps)["kernel"][0]) for steps in range(14)]
    # Linear from the peak at update 0 to 0 at 10, then warm-up over two updates.
    shares = [1.0 - step / 10 for step in range(10)] + [0.0, 0.5, 1.0]
    expected = np.cumprod([1.0, *(1.0 - 0.1 * share for share in shares)])
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_a_non_finite_update_leaves_the_moments_of_stable_adamw():
    cfg = constant(name="stable_adamw")
    transform, params = optimizer.make_optimizer(cfg), {"kernel": jnp.ones(2)}
    state = transform.update({"kernel": jnp.ones(2)}, transform.init(params), params)[1]
    _, after = transform.update({"kernel": jnp.full(2, jnp.nan)}, state, params, finite=False)
    adam, same = (jax.tree.leaves(each[0][0]) for each in (state, after))
    assert all((a == b).all() for a, b in zip(adam, same, strict=True))


@pytest.mark.parametrize("name", ["adamw", "stable_adamw", "lamb"])
def test_sharded_updates_equal_replicated_ones(name):
    params, gradients = make_tree(0), [make_tree(1), make_tree(2)]
    cfg = make_config(name=name, learning_rate=0.1, bias_correction=name == "lamb")
    alone = run(cfg, params, gradients)
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=explicit, devices=jax.devices()[:8])

    def place(path, leaf):
        name = jax.tree_util.keystr(path)
        spec = {
            "tokens_VD": ("tensor", "fsdp"),
            "query_DHK": (None, "fsdp", "tensor"),
            "up_DF": (None, "fsdp", "tensor"),
        }
        return jax.device_put(leaf, jax.P(*next((axes for key, axes in spec.items() if key in name), ())))

    with jax.set_mesh(mesh):
        placed = [jax.tree_util.tree_map_with_path(place, tree) for tree in (params, *gradients)]
        sharded = run(cfg, placed[0], placed[1:])
    spec = sharded["encoder"]["layers"]["mlp"]["up_DF"].sharding.spec
    assert tuple(spec) == (None, "fsdp", "tensor")
    # Norms are summed in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), sharded, alone)


def rates(cfg: config.Config, steps: list[int]) -> list[float]:
    schedule = optimizer.learning_rate(cfg)
    return [float(schedule(step)) for step in steps]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"schedule": "constant"}, {5: 0.5, 10: 1.0, 99: 1.0}),
        ({"schedule": "linear"}, {5: 0.5, 10: 1.0, 55: 0.5, 100: 0.0, 120: 0.0}),
        ({"schedule": "linear", "end_factor": 0.2}, {10: 1.0, 55: 0.6, 100: 0.2}),
        ({"schedule": "cosine", "end_factor": 0.1}, {10: 1.0, 55: 0.55, 100: 0.1}),
        ({"schedule": "inverse_sqrt"}, {5: 0.5, 10: 1.0, 40: 0.5, 90: 1 / 3}),
        ({"schedule": "inverse_sqrt", "end_factor": 0.4}, {40: 0.5, 90: 0.4}),
        ({"schedule": "wsd", "decay_steps": 20}, {5: 0.5, 10: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
        ({"schedule": "one_minus_sqrt", "warmup_steps": 0}, {0: 1.0, 25: 0.5, 64: 0.2, 100: 0.0, 120: 0.0}),
        ({"schedule": "one_minus_sqrt", "end_factor": 0.1}, {5: 0.5, 10: 1.0, 32.5: 0.55, 100: 0.1}),
        ({"schedule": "linear", "warmup_steps": 0}, {0: 1.0, 50: 0.5, 100: 0.0}),
    ],
)
def test_curves(fields, expected):
    cfg = make_config(**{"learning_rate": 2e-3, "warmup_steps": 10} | fields)
    np.testing.assert_allclose(rates(cfg, list(expected)), [2e-3 * share for share in expected.values()], atol=1e-9)


def test_a_curve_spans_stages_until_one_restarts_it():
    stages = (
        config.StageConfig(steps=60),
        config.StageConfig(steps=40),
        config.StageConfig(steps=50, learning_rate=3e-4, warmup_steps=5),
    )
    cfg = make_config(stages=stages, learning_rate=1e-3, warmup_steps=10)
    expected = {0: 0.0, 10: 1e-3, 55: 5e-4, 99: 1e-3 / 90, 100: 0.0, 105: 3e-4, 150: 0.0, 1000: 0.0}
    np.testing.assert_allclose(rates(cfg, list(expected)), list(expected.values()), atol=1e-9)


def test_a_stage_that_restarts_the_curve_may_choose_another():
    stages = (
        config.StageConfig(steps=50),
        config.StageConfig(steps=50, learning_rate=4e-4),
        config.StageConfig(steps=100, learning_rate=4e-4, schedule="one_minus_sqrt"),
    )
    cfg = make_config(stages=stages, schedule="constant", learning_rate=1e-3, warmup_steps=10, end_factor=0.25)
    expected = {5: 5e-4, 49: 1e-3, 50: 4e-4, 99: 4e-4, 100: 4e-4, 125: 2.5e-4, 200: 1e-4}
    np.testing.assert_allclose(rates(cfg, list(expected)), list(expected.values()), rtol=1e-5)


def test_a_first_stage_may_set_the_peak():
    cfg = make_config(stages=(config.StageConfig(steps=20, learning_rate=5e-4, warmup_steps=4),), learning_rate=1.0)
    np.testing.assert_allclose(rates(cfg, [2, 4, 12, 20]), [2.5e-4, 5e-4, 2.5e-4, 0.0], atol=1e-9)


def test_the_applied_rate_is_that_of_the_update_counted_from_zero():
    # With eps = 0 corrected Adam moves a lone weight with constant gradient by exactly the learning rate.
    cfg = make_config(learning_rate=1e-2, warmup_steps=2, weight_decay=0.0, eps=0.0)
    params, grads = {"kernel": jnp.zeros(1)}, {"kernel": jnp.ones(1)}
    places = [float(run(cfg, params, [grads] * count)["kernel"][0]) for count in (1, 2, 3)]
    np.testing.assert_allclose(places, [0.0, -0.5e-2, -1.5e-2], atol=1e-7)


def test_a_wsd_curve_that_does_not_fit_is_refused():
    cfg = make_config(schedule="wsd", decay_steps=95, warmup_steps=10)
    with pytest.raises(UserError, match=r"decay_steps=95 and 10 warm-up steps exceed the 100 steps"):
        optimizer.learning_rate(cfg)
    longer = dataclasses.replace(cfg, stages=(config.StageConfig(steps=105),))
    np.testing.assert_allclose(rates(longer, [10, 105]), [1e-4, 0.0], atol=1e-9)
