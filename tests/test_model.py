"""The encoder: packing and padding are inert, every way to execute it agrees, and its parts are where BERT has them."""

import dataclasses
import functools
import math
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlm_jax.config import ComputeConfig, Config, ModelConfig, ShardingConfig, load_config
from mlm_jax.errors import UserError
from mlm_jax.model.attention import choose_implementation
from mlm_jax.model.embeddings import segment_positions
from mlm_jax.model.encoder import Compute, ready
from mlm_jax.model.layers import LayerNorm, _packed_draws, add_bias, dropout, gather_positions, weight_init
from mlm_jax.objectives.mlm import MaskedLM
from mlm_jax.objectives.scoring import score_targets
from mlm_jax.sharding import ROWS, make_mesh

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
TINY = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    mlp_dim=48,
    max_positions=24,
    num_token_types=2,
    init_std=0.3,
)
PLAIN = Compute(jnp.dtype("float32"), scan_layers=False, remat="none", attention="xla", platform="cpu")
BFLOAT16 = dataclasses.replace(PLAIN, dtype=jnp.dtype("bfloat16"))
DROPPED = dataclasses.replace(TINY, dropout=0.2)
LENGTH = 24
# Compiles in a fifth of the time, for speed that nothing here needs. jax 0.12 has no fusion emitters to turn off.
QUICK = {"xla_backend_optimization_level": 0}
QUICK |= {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 12) else {}


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        yield


def objective(model: ModelConfig = TINY, compute: Compute = PLAIN) -> MaskedLM:
    return MaskedLM(Config(name="tiny", model=model), compute)


@functools.cache
def init(model: ModelConfig = TINY, seed: int = 0):
    """Random NumPy parameters, with biases and norms that are not what they start from."""
    shapes = jax.eval_shape(objective(model).init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        return rng.normal(float("scale" in name), 0.1 if "norm" in name else 0.3, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def encoder(model: ModelConfig = TINY, compute: Compute = PLAIN):
    """(params, tokens, segment_ids, key, token_types) -> hidden states of every position, as a NumPy array."""
    return _encoder(model, compute)


@functools.cache
def _encoder(model: ModelConfig, compute: Compute):
    network = objective(model, compute).network

    @functools.partial(jax.jit, compiler_options=QUICK)
    def encode(params, tokens, segment_ids, key=None, token_types=None):
        return network.bind(params).encoder(tokens, segment_ids, key, token_types)

    return lambda *args, **options: jax.device_get(encode(*args, **options))


def gradient(model: ModelConfig = TINY, compute: Compute = PLAIN):
    """The compiled (params, tokens, segment_ids, key) -> loss of predicting every token but the first, and its gradient."""
    return _gradient(model, compute)


@functools.cache
def _gradient(model: ModelConfig, compute: Compute):
    built = objective(model, compute)

    @jax.jit
    def grad(params, tokens, segment_ids, key):
        def loss(params):
            # Not in their order: kernels have a gather of their own.
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :0:-1], tokens[:, 1:].shape)
            return score_targets(built.logits(params, tokens, segment_ids, positions, key), tokens[:, :0:-1])[0].mean()

        return jax.value_and_grad(loss)(params)

    rows = make_rows(length=model.max_positions)
    return grad.lower(init(model), *rows, jax.random.key(0)).compile(QUICK)


def make_rows(rows: int = 2, seed: int = 0, length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Rows of three segments and padding, each with its own bounds."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (rows, length)).astype(np.int32)
    segment_ids = np.zeros((rows, length), np.int32)
    for row in range(rows):
        bounds = [0, *sorted(rng.choice(np.arange(1, length - 1), 3, replace=False))]
        for segment in range(3):
            segment_ids[row, bounds[segment] : bounds[segment + 1]] = segment + 1
    return tokens, segment_ids


def replace(model: ModelConfig = TINY, **changes) -> ModelConfig:
    return dataclasses.replace(model, **changes)


def assert_trees_close(a, b, atol: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=0), a, b)


# Packing and padding.


def test_packed_documents_are_as_if_each_had_a_row_of_its_own():
    tokens, segment_ids = make_rows()
    packed = encoder()(init(), tokens, segment_ids)
    for row in range(len(tokens)):
        for segment in (1, 2, 3):
            inside = segment_ids[row] == segment
            alone, marks = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), np.int32)
            alone[0, : inside.sum()], marks[0, : inside.sum()] = tokens[row, inside], 1
            separate = encoder()(init(), alone, marks)
            # The same numbers in another order of summation.
            np.testing.assert_allclose(separate[0, : inside.sum()], packed[row, inside], atol=2e-5)


def test_what_stands_in_padding_changes_nothing():
    tokens, segment_ids = make_rows()
    real = segment_ids > 0
    other = np.where(real, tokens, 63 - tokens)
    a, b = (np.asarray(encoder()(init(), t, segment_ids)) for t in (tokens, other))
    np.testing.assert_array_equal(a[real], b[real])
    assert not np.array_equal(a[~real], b[~real])


def test_a_document_sees_both_ways_and_no_other_document():
    tokens, segment_ids = make_rows(1)
    _, bounds = np.unique(segment_ids[0], return_index=True)
    last_of_second = bounds[3] - 1
    changed = tokens.copy()
    changed[0, last_of_second] = (tokens[0, last_of_second] + 1) % 64
    a, b = (np.asarray(encoder()(init(), np.repeat(t, 2, 0), np.repeat(segment_ids, 2, 0)))[0] for t in (tokens, changed))
    differs = (a != b).any(-1)
    np.testing.assert_array_equal(differs, segment_ids[0] == 2)


@pytest.mark.parametrize("compute", [PLAIN, BFLOAT16], ids=["float32", "bfloat16"])
def test_a_row_of_padding_alone_is_finite_and_so_is_its_gradient(compute):
    tokens, segment_ids = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), np.int32)
    found = gradient(TINY, compute)(init(), tokens, segment_ids, jax.random.key(3))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_positions_restart_in_every_segment():
    segment_ids = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2], [0] * 8, [1] * 8], np.int32)
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6], list(range(8)), list(range(8))]
    np.testing.assert_array_equal(segment_positions(jnp.asarray(segment_ids)), expected)


# Ways to execute it.


def assert_as(plain: Compute, compute: Compute, model: ModelConfig) -> None:
    loss, grads = gradient(model, compute)(init(), *make_rows(), jax.random.key(3))
    expected_loss, expected = gradient(model, plain)(init(), *make_rows(), jax.random.key(3))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert_trees_close(grads, expected, atol=1e-5)  # other orders of summation; gradients are around 0.1


@pytest.mark.parametrize(("scan_layers", "remat"), [(False, "full"), (True, "none"), (True, "dots"), (True, "full")])
def test_scan_and_remat_change_no_number(scan_layers, remat):
    assert_as(PLAIN, dataclasses.replace(PLAIN, scan_layers=scan_layers, remat=remat), TINY)


MODERN = replace(
    num_layers=4, pre_norm=True, first_norm=False, positions="rope", local_window=4, global_every=2, gated_mlp=True
)


@pytest.mark.parametrize(
    ("model", "scan", "sizes"),
    [
        (TINY, False, (1, 1, 1)),
        (replace(num_layers=3), True, (1, 1, 1)),
        (replace(num_layers=1), True, (1, 1, 1)),
        (MODERN, False, (1, 1, 1)),
        (MODERN, True, (1, 1, 1)),
        (TINY, False, (2, 2, 2)),
    ],
)
def test_what_is_wanted_of_a_few_positions_is_as_if_all_were_computed(model, scan, sizes):
    data, fsdp, tensor = sizes
    sharding = ShardingConfig(data=data, fsdp=fsdp, tensor=tensor)
    compute = dataclasses.replace(PLAIN, scan_layers=scan)
    tokens, segment_ids = make_rows(4)
    positions = np.random.default_rng(1).integers(0, LENGTH, (4, 5)).astype(np.int32)
    wanted = np.random.default_rng(2).normal(size=(4, 5, model.embed_dim)).astype(np.float32)

    mesh = make_mesh(sharding, jax.devices()[: math.prod(sizes)])
    with jax.set_mesh(mesh):
        network = objective(model, compute).network
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        placed = jax.tree.map(lambda shape: jax.NamedSharding(mesh, shape.sharding.spec), shapes)
        params = jax.device_put(init(model), placed)
        rows = jax.device_put((tokens, segment_ids, positions, wanted), jax.NamedSharding(mesh, jax.P(ROWS)))

        @functools.partial(jax.jit, compiler_options=QUICK)
        def both(params, tokens, segment_ids, positions, wanted):
            def product(params, few):
                encode = network.bind(params).encoder
                if few:
                    return (encode(tokens, segment_ids, positions_BP=positions) * wanted).sum()
                return (gather_positions(encode(tokens, segment_ids), positions) * wanted).sum()

            return [jax.value_and_grad(product)(params, few) for few in (True, False)]

        few, all_of_them = jax.device_get(both(params, *rows))
    assert_trees_close(few, all_of_them, atol=2e-4)  # sums of other orders


@pytest.mark.parametrize("scan_layers", [False, True])  # in the last layer one drops other elements than the other
def test_dropout_is_recomputed_as_it_was(scan_layers):
    plain = dataclasses.replace(PLAIN, scan_layers=scan_layers)
    assert_as(plain, dataclasses.replace(plain, remat="full"), DROPPED)


def test_remat_computes_again_what_it_does_not_keep():
    flops = {}
    for remat in ("none", "dots", "full"):
        compute = dataclasses.replace(PLAIN, scan_layers=True, remat=remat)
        flops[remat] = gradient(TINY, compute).cost_analysis()["flops"]
    assert flops["none"] < flops["dots"] < flops["full"]


@functools.cache
def temporary_bytes(layers: str, remat: str) -> int:
    model = replace(num_layers=4)
    tokens = np.zeros((32, LENGTH), np.int32)
    positions = np.zeros((32, 1), np.int32)
    built = objective(model, Compute.resolve(ComputeConfig(layers=layers, remat=remat)))

    def loss(params):
        return score_targets(built.logits(params, tokens, tokens + 1, positions), positions)[0].mean()

    return jax.jit(jax.grad(loss)).lower(init(model)).compile(QUICK).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("layers", ["auto", "scan"])
def test_remat_saves_memory(layers):
    assert temporary_bytes(layers, "full") < 0.5 * temporary_bytes("scan", "none")


# The parts of the architecture.


def layer_norm(x: np.ndarray, params) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(-1, keepdims=True) + TINY.norm_eps)
    return centred / deviation * params["scale_D"] + params["bias_D"]


def by_hand(params, tokens: np.ndarray, token_types: np.ndarray, offset: int = 0) -> np.ndarray:
    """The encoder on one document, in NumPy and float64; the activation is relu."""
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params["encoder"])
    tables = params["embeddings"]
    x = tables["tokens_VD"][tokens] + tables["positions_LD"][offset + np.arange(len(tokens))]
    x = layer_norm(x + tables["token_types_TD"][token_types], tables["norm"])
    for index in range(TINY.num_layers):
        layer = jax.tree.map(lambda leaf: leaf[index], params["layers"])  # noqa: B023
        weights = layer["attention"]
        query, key, value = (
            np.einsum("ld,dhk->hlk", x, weights[f"{name}_DHK"]) + weights[f"{name}_bias_HK"][:, None]
            for name in ("query", "key", "value")
        )
        scores = np.exp(query @ key.transpose(0, 2, 1) / math.sqrt(TINY.head_dim))
        mixed = scores / scores.sum(-1, keepdims=True) @ value
        attended = np.einsum("hlk,hkd->ld", mixed, weights["output_HKD"]) + weights["output_bias_D"]
        x = layer_norm(x + attended, layer["attention_norm"])
        up = np.maximum(x @ layer["mlp"]["up_DF"] + layer["mlp"]["up_bias_F"], 0)
        x = layer_norm(x + up @ layer["mlp"]["down_FD"] + layer["mlp"]["down_bias_D"], layer["mlp_norm"])
    return x


@pytest.mark.parametrize("offset", [0, 2])
def test_the_encoder_is_berts_by_hand(offset):
    model = replace(activation="relu", position_offset=offset)
    tokens, _ = make_rows()
    token_types = (np.arange(LENGTH) > 9).astype(np.int32)
    params = init(model)
    assert params["encoder"]["embeddings"]["positions_LD"].shape == (TINY.max_positions + offset, TINY.embed_dim)
    found = encoder(model)(params, tokens, np.ones_like(tokens), None, np.stack([0 * token_types, token_types]))
    np.testing.assert_allclose(found[0], by_hand(params, tokens[0], 0 * token_types, offset), atol=1e-4)
    np.testing.assert_allclose(found[1], by_hand(params, tokens[1], token_types, offset), atol=1e-4)


def test_token_types_are_0_unless_given_and_absent_unless_configured():
    tokens, segment_ids = make_rows()
    default = encoder()(init(), tokens, segment_ids)
    np.testing.assert_array_equal(default, encoder()(init(), tokens, segment_ids, None, np.zeros_like(tokens)))
    assert not np.allclose(default, encoder()(init(), tokens, segment_ids, None, np.ones_like(tokens)), atol=0.1)
    assert "token_types_TD" not in init(replace(num_token_types=0))["encoder"]["embeddings"]


def test_a_tied_table_has_the_gradient_of_both_its_uses():
    rows, key = make_rows(), jax.random.key(0)
    params = init()
    untied = init(replace(tie_embeddings=False))
    untied["encoder"], untied["head"] = (
        params["encoder"],
        params["head"] | {"decoder_VD": params["encoder"]["embeddings"]["tokens_VD"]},
    )
    loss, tied_grads = gradient()(params, *rows, key)
    untied_loss, untied_grads = gradient(replace(tie_embeddings=False))(untied, *rows, key)
    np.testing.assert_allclose(loss, untied_loss, rtol=1e-6)
    read, written = untied_grads["encoder"]["embeddings"]["tokens_VD"], untied_grads["head"]["decoder_VD"]
    assert min(np.abs(np.asarray(grad)).max() for grad in (read, written)) > 1e-3
    tied = tied_grads["encoder"]["embeddings"]["tokens_VD"]
    np.testing.assert_allclose(tied, np.asarray(read) + np.asarray(written), atol=1e-6)


# Dropout.


@jax.jit
def dropped(x, key):
    return dropout(x, 0.3, key)


def test_dropout_zeroes_at_its_rate_and_rescales_the_rest():
    x = np.full((2000, 2000), 2.0, np.float32)
    found = np.asarray(dropped(x, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(found), [0.0, 2.0 / 0.7], rtol=1e-6)
    deviation = math.sqrt(0.3 * 0.7 / x.size)
    assert abs((found == 0).mean() - 0.3) < 5 * deviation
    # Neither rows nor columns share their mask.
    part = found[:300, :300] == 0
    assert len(np.unique(part, axis=0)) == len(np.unique(part.T, axis=0)) == 300


def test_dropout_is_a_function_of_its_key():
    x = np.ones((40, 50), np.float32)
    first, again, other = (np.asarray(dropped(x, jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert 0.3 < (first != other).mean() < 0.55  # 2 · 0.3 · 0.7 of them
    np.testing.assert_array_equal(dropout(x, 0.3, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(0)), x)


def test_each_dropout_of_a_step_has_a_key_of_its_own(monkeypatch):
    used = []

    def note(x, rate, key):
        used.append(key)
        return x

    for module in ("embeddings", "encoder", "attention"):
        monkeypatch.setattr(f"mlm_jax.model.{module}.dropout", note)

    @jax.jit
    def keys(params, key):
        used.clear()
        objective(DROPPED).logits(params, *make_rows(), np.zeros((2, 1), np.int32), key)
        return [jax.random.key_data(key) for key in used]

    found = np.stack(keys(init(), jax.random.key(0)))
    assert len(np.unique(found, axis=0)) == len(found) == 1 + 3 * TINY.num_layers


def test_without_a_key_nothing_is_dropped():
    rows, layer = make_rows(), replace(num_layers=1)
    plain = encoder(layer)(init(layer), *rows)
    for field in ("dropout", "attention_dropout"):
        model = replace(layer, **{field: 0.5})
        np.testing.assert_array_equal(encoder(model)(init(layer), *rows), plain)
        assert not np.allclose(encoder(model)(init(layer), *rows, jax.random.key(0)), plain, atol=0.1)


# Precision.


def test_bfloat16_leaves_the_norms_in_float32():
    dtypes = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (jax.tree_util.keystr(path), leaf.dtype), jax.eval_shape(lambda: ready(init(), jnp.bfloat16))
    )
    for name, dtype in jax.tree.leaves(dtypes, is_leaf=lambda x: isinstance(x, tuple)):
        assert dtype == (jnp.float32 if "norm" in name else jnp.bfloat16), name
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(jax.eval_shape(objective().init, jax.random.key(0))))


def test_a_norm_of_bfloat16_has_statistics_in_float32():
    x = (100 + np.random.default_rng(0).normal(size=(4, 8, 32))).astype(jnp.bfloat16)

    @jax.jit
    def norm(x):
        return LayerNorm(32, 1e-12, rngs=nnx.Rngs(0))(x)

    found = norm(x)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    assert found.dtype == jnp.bfloat16
    # The result is rounded once, to 8 bits.
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-3)


def test_bfloat16_computes_what_float32_does_and_ends_in_float32():
    rows, key = make_rows(), jax.random.key(0)
    (loss, grads), (rough_loss, rough_grads) = (gradient(TINY, c)(init(), *rows, key) for c in (PLAIN, BFLOAT16))
    assert rough_loss.dtype == jnp.float32 and encoder(TINY, BFLOAT16)(init(), *rows).dtype == jnp.bfloat16
    np.testing.assert_allclose(rough_loss, loss, rtol=0.02)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(rough_grads))
    flat, rough = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (grads, rough_grads))
    assert flat @ rough / np.linalg.norm(flat) / np.linalg.norm(rough) > 0.99


@pytest.mark.parametrize(
    ("platform", "dtype", "expected"),
    [
        ("cpu", "float32", (jnp.float32, False)),
        ("tpu", "bfloat16", (jnp.bfloat16, True)),
        ("gpu", "bfloat16", (jnp.bfloat16, True)),
    ],
)
def test_auto_is_resolved_by_platform(platform, dtype, expected):
    device = types.SimpleNamespace(platform=platform, device_kind="")
    compute = Compute.resolve(ComputeConfig(), device)
    assert (compute.dtype, compute.scan_layers) == (jnp.dtype(expected[0]), expected[1])
    named = Compute.resolve(ComputeConfig(dtype="float32", layers="scan"), device)
    assert (named.dtype, named.scan_layers) == (jnp.dtype("float32"), True)


def test_gradients_are_summed_within_products_where_a_chip_has_room_for_both():
    def fused(kind):
        compute = Compute.resolve(ComputeConfig(), types.SimpleNamespace(platform="tpu", device_kind=kind))
        return compute.compiler_options["xla_tpu_enable_async_collective_fusion_fuse_all_reduce"]

    assert fused("TPU v5 lite") and fused("TPU v5") and not fused("TPU v4")
    assert Compute.resolve(ComputeConfig()).compiler_options is None  # on this CPU


@pytest.mark.parametrize(
    ("platform", "length", "dtype", "changes", "expected"),
    [
        ("cpu", 128, "float32", {}, "xla"),
        ("gpu", 128, "bfloat16", {}, "cudnn"),
        ("gpu", 128, "float32", {}, "xla"),
        ("gpu", 128, "bfloat16", {"attention_dropout": 0.1}, "xla"),
        ("gpu", 128, "bfloat16", {"num_heads": 8}, "xla"),
        ("tpu", 128, "bfloat16", {}, "splash"),  # see test_row_attention for the other kernel
        ("tpu", 120, "bfloat16", {}, "xla"),
        ("tpu", 128, "bfloat16", {"attention_dropout": 0.1}, "xla"),
    ],
)
def test_attention_is_chosen_by_platform_and_a_slower_one_is_explained(caplog, platform, length, dtype, changes, expected):
    caplog.set_level("INFO")
    assert choose_implementation("auto", replace(**changes), length, platform, jnp.dtype(dtype)) == expected
    assert bool(caplog.records) == (expected == "xla" and platform != "cpu")
    assert choose_implementation("xla", replace(**changes), length, platform, jnp.dtype(dtype)) == "xla"


def test_attention_asked_for_by_name_is_never_replaced():
    with pytest.raises(UserError, match="='splash' cannot be used: it is a TPU kernel"):
        choose_implementation("splash", TINY, 128, "cpu", jnp.dtype("bfloat16"))
    with pytest.raises(UserError, match="it does not take float32"):
        choose_implementation("cudnn", TINY, 128, "gpu", jnp.dtype("float32"))


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_the_kernel_of_a_tpu_attends_as_xla_does(monkeypatch, remat):
    """Run by Pallas's interpreter: the same loss and gradient though biases of keys and values take another way."""
    splash = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel")
    monkeypatch.setattr(splash, "make_splash_mha", functools.partial(splash.make_splash_mha, interpret=True))
    model = replace(embed_dim=64, num_layers=1, max_positions=128)
    rows, key = make_rows(length=128), jax.random.key(0)
    kernel = dataclasses.replace(PLAIN, attention="splash", platform="tpu", remat=remat)
    (loss, grads), (other_loss, other_grads) = (gradient(model, c)(init(model), *rows, key) for c in (PLAIN, kernel))
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    assert (np.asarray(other_grads["encoder"]["layers"]["attention"]["key_bias_HK"]) == 0).all()
    for (path, grad), other in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(other_grads), strict=True):
        scale = np.abs(grad).max()
        np.testing.assert_allclose(other, grad, atol=2e-5 * scale + 2e-7, rtol=0, err_msg=jax.tree_util.keystr(path))


# Layers whose gradients are written by hand.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_norm_is_that_of_its_formula(dtype):
    rng = np.random.default_rng(0)
    x, weights = (rng.normal(size=(4, 6, 32)).astype(jnp.dtype(dtype)) for _ in range(2))
    scale, bias = (rng.normal(1, 0.3, 32).astype(np.float32) for _ in range(2))

    def formula(x, scale, bias):
        x = x.astype(jnp.float32)
        normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return normed * scale[None, None] + bias[None, None]

    def of(function):
        return jax.jit(jax.grad(lambda *args: (function(*args) * weights).astype(jnp.float32).sum(), (0, 1, 2)))(
            x, scale, bias
        )

    norm = LayerNorm(32, 1e-12, rngs=nnx.Rngs(0))
    graphdef, _ = nnx.split(norm)
    ours = of(lambda x, scale, bias: nnx.merge(graphdef, nnx.State({"scale_D": scale, "bias_D": bias}))(x))
    for found, expected in zip(ours, of(formula), strict=True):
        tolerance = 1e-5 if dtype == "float32" else 2**-6  # a few roundings to 8 bits
        assert found.dtype == expected.dtype
        found, expected = (np.asarray(each, np.float64) for each in (found, expected))
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dimensions", [(2,), (1, 3)])
def test_the_gradient_of_a_bias_is_a_sum(dtype, dimensions):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8, 16, 4)[: 4 if len(dimensions) == 2 else 3]).astype(jnp.dtype(dtype))
    bias = rng.normal(size=[x.shape[dimension] for dimension in dimensions]).astype(jnp.dtype(dtype))
    weights = rng.normal(size=x.shape).astype(jnp.dtype(dtype))
    found, value = jax.jit(jax.value_and_grad(lambda bias: (add_bias(x, bias, dimensions) * weights).sum()))(bias)[::-1]
    others = tuple(set(range(x.ndim)) - set(dimensions))
    expected = weights.astype(np.float64).sum(others)
    assert found.dtype == bias.dtype and np.isfinite(value)
    # Added up in float32, of bfloat16 too, and rounded once.
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected, atol=1e-5, rtol=2**-8 if dtype == "bfloat16" else 1e-5
    )


@pytest.mark.parametrize("rows", [16, 64, 256])  # 2 of each of the eight devices, whose elements are drawn one by one; 8; 32
def test_the_hardware_generator_gives_each_device_bits_of_its_own(rows):
    with jax.set_mesh(make_mesh(ShardingConfig())):
        x = jax.device_put(np.ones((rows, 64, 64), np.float32), jax.P(ROWS))
        step = jax.jit(lambda x, key: dropout(x, 0.3, key)).lower(x, jax.random.key(0, impl="rbg")).compile()
        kept = np.asarray(step(x, jax.random.key(0, impl="rbg"))) > 0
    drawn = re.findall(r"u(\d+)\[([\d,]*)\]\S* (?:rng-bit-generator|get-tuple-element)\(", step.as_text())
    sizes = [int(bits) * math.prod(map(int, shape.split(","))) for bits, shape in drawn if shape]
    assert sizes and max(sizes) <= 16 * rows // 8 * 64 * 64  # 16 bits an element at most, of a device's own
    assert abs(kept.mean() - 0.7) < 5 * math.sqrt(0.3 * 0.7 / kept.size)
    flat = kept.reshape(rows, -1)
    assert len(np.unique(flat, axis=0)) == rows
    # Nor do rows that share a word depend on each other, or on their place in it.
    both = np.corrcoef(flat)[np.triu_indices(rows, 1)]
    assert np.abs(both).max() < 6 / 64
    assert np.abs(flat.mean(1) - 0.7).max() < 5 * math.sqrt(0.3 * 0.7 / 64**2)


def test_packed_draws_have_their_probability():
    draw = jax.jit(_packed_draws, static_argnums=(1, 2))
    for expected in (1 / 4096, 410 / 4096, 0.5, 4095 / 4096):
        drawn = np.asarray(draw(jax.random.key(0), (32, 500, 500), expected))
        assert abs(drawn.mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / drawn.size)


@pytest.mark.parametrize(("platform", "expected"), [("cpu", "xla"), ("gpu", "cudnn"), ("tpu", "xla")])
def test_rows_that_are_causal_take_the_paths_whose_mask_is_data(caplog, platform, expected):
    caplog.set_level("INFO")
    bfloat16 = jnp.dtype("bfloat16")
    assert choose_implementation("auto", TINY, 128, platform, bfloat16, causal_rows=True) == expected
    assert ("which rows are causal is not" in caplog.text) == (platform == "tpu")
    with pytest.raises(UserError, match="='splash' cannot be used"):
        choose_implementation("splash", TINY, 128, platform, bfloat16, causal_rows=True)


# Parameters.


@pytest.mark.parametrize(
    ("recipe", "count"),
    [("bert_base", 109_514_298), ("roberta_base", 124_696_665), ("smoke", 958_336), ("mdlm_small", 162_965_376)],
)
def test_parameter_counts_of_recipes(recipe, count):
    cfg = load_config(str(CONFIGS / f"{recipe}.py"))
    built = MaskedLM(cfg, Compute.resolve(cfg.compute))
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("truncated", [True, False])
def test_initial_weights_have_the_published_distribution(truncated):
    draw = jax.jit(lambda key: weight_init(replace(init_std=0.02, init_truncated=truncated))(key, (300, 300), jnp.float32))
    weights = np.asarray(draw(jax.random.key(0)))
    # Cut off at two deviations, a normal distribution keeps 0.8796 of its deviation.
    assert weights.std() == pytest.approx(0.02 * (0.8796 if truncated else 1.0), rel=0.02)
    assert (np.abs(weights).max() <= 0.04) == truncated
    assert abs(weights.mean()) < 5 * 0.02 / 300


def test_initial_parameters_are_a_function_of_the_key_and_differ_between_layers():
    create = jax.jit(objective().init, compiler_options=QUICK)
    params, again, other = (jax.device_get(create(jax.random.key(seed))) for seed in (0, 0, 1))
    for (path, leaf), same, different in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(again), jax.tree.leaves(other), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(leaf, same)
        if "bias" in name or "scale" in name:
            assert (leaf == float("scale" in name)).all(), name
            continue
        assert (leaf != different).mean() > 0.99, name
        if "layers" in name:
            assert (leaf[0] != leaf[1]).mean() > 0.99, name


@pytest.mark.parametrize(("sizes", "ways"), [((8, 1, 1), 1), ((1, 8, 1), 8), ((2, 2, 2), 4)])
def test_each_matrix_is_split_over_the_axes_that_are_not_data(sizes, ways):
    model = ModelConfig(vocab_size=128, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=64)
    mesh = make_mesh(ShardingConfig(*sizes))
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(objective(model).init, jax.random.key(0))
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            name = jax.tree_util.keystr(path)
            sharding = jax.NamedSharding(mesh, leaf.sharding.spec)
            share = math.prod(leaf.shape) / math.prod(sharding.shard_shape(leaf.shape))
            if "bias" in name or "scale" in name or "positions" in name:
                assert share <= sizes[2], name
            else:
                assert share == (sizes[1] if "transform" in name else ways), name
