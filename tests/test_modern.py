"""What is newer than BERT in the encoder: local layers in blocks, rotated or biased positions, pre-norms, gates."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_step import QUICK, TABLES, tables_on

from mlm_jax import flops
from mlm_jax.config import Config, MaskingConfig, ModelConfig, RtdConfig, ShardingConfig, StageConfig, TokenizerConfig, check
from mlm_jax.model import blocks
from mlm_jax.model.attention import Sight, _xla, attend, choose_implementation
from mlm_jax.model.encoder import Compute
from mlm_jax.model.positions import alibi_slopes, rotate, rotation
from mlm_jax.objectives import Keys, make_objective
from mlm_jax.objectives.mlm import MaskedLM
from mlm_jax.objectives.scoring import score_targets
from mlm_jax.sharding import ROWS, SHARDING, divide, make_mesh
from mlm_jax.train.step import accumulate_gradients

LENGTH, WINDOW = 150, 5
SMALL = {"vocab_size": 64, "num_layers": 4, "embed_dim": 32, "num_heads": 2, "mlp_dim": 48, "max_positions": LENGTH}
MODERN = ModelConfig(
    **SMALL,
    positions="rope",
    rope_base=160.0,
    local_rope_base=20.0,
    local_window=WINDOW,
    activation="gelu_erf",
    gated_mlp=True,
    biases=False,
    pre_norm=True,
    first_norm=False,
    norm_bias=False,
    norm_eps=1e-5,
    init_scaled=True,
)
NEO = dataclasses.replace(
    MODERN,
    local_window=0,
    activation="silu",
    first_norm=True,
    embedding_norm=False,
    norm="rms",
    head_transform=False,
    tie_embeddings=False,
)
MOSAIC = ModelConfig(**SMALL | {"num_heads": 4}, positions="alibi", gated_mlp=True, num_token_types=2)
PLAIN = Compute(jnp.dtype("float32"), scan_layers=False, remat="none", attention="xla", platform="cpu")


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        yield


def replace(model: ModelConfig, **changes) -> ModelConfig:
    return dataclasses.replace(model, **changes)


def objective(model: ModelConfig, compute: Compute = PLAIN) -> MaskedLM:
    return MaskedLM(Config(name="tiny", model=model), compute)


@functools.cache
def init(model: ModelConfig):
    """Random NumPy parameters, with scales and biases that are not what they start from."""
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        shapes = jax.eval_shape(objective(model).init, jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        return rng.normal(float("scale" in name), 0.1 if "norm" in name else 0.2, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_rows(rows: int = 2, length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Rows of three segments and padding, each with its own bounds."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (rows, length)).astype(np.int32)
    segment_ids = np.zeros((rows, length), np.int32)
    for row in range(rows):
        bounds = [0, *sorted(rng.choice(np.arange(1, length - 1), 3, replace=False))]
        for segment in range(3):
            segment_ids[row, bounds[segment] : bounds[segment + 1]] = segment + 1
    return tokens, segment_ids


def make_batch(rows: int) -> dict[str, np.ndarray]:
    """What a step gives to an objective."""
    tokens, segment_ids = make_rows(rows)
    ids = np.arange(rows, dtype=np.int32)
    places = ids / np.float32(rows)
    return {"tokens": tokens, "segment_ids": segment_ids, "example_ids": ids, "epochs": ids, "places": places}


def everywhere(built: MaskedLM):
    """The uncompiled (params, tokens, segment_ids) -> logits at every position."""

    def logits(params, tokens, segment_ids, key=None):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        return built.logits(params, tokens, segment_ids, positions, key)

    return logits


@functools.cache
def gradient(model: ModelConfig, compute: Compute = PLAIN, length: int = LENGTH):
    """The compiled (params, tokens, segment_ids) -> loss of predicting every token, and its gradient."""
    logits = everywhere(objective(model, compute))

    @jax.jit
    def grad(params, tokens, segment_ids):
        return jax.value_and_grad(lambda p: score_targets(logits(p, tokens, segment_ids), tokens)[0].mean())(params)

    return grad.lower(init(model), *make_rows(length=length)).compile(QUICK)


# The architectures, by hand.


def norm(x: np.ndarray, params, model: ModelConfig) -> np.ndarray:
    if model.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + model.norm_eps) * params["scale_D"] + params.get("bias_D", 0)


def turn(x: np.ndarray, base: float) -> np.ndarray:
    """Heads [h, l, k] as complex numbers of the dimensions i and i + k/2, each multiplied by e to the i · angle."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half)[None]
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


def activate(x: np.ndarray, name: str) -> np.ndarray:
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu_erf":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(x: np.ndarray, weights, model: ModelConfig, layer: int) -> np.ndarray:
    heads = [
        np.einsum("ld,dhk->hlk", x, weights[f"{name}_DHK"])
        + np.asarray(weights.get(f"{name}_bias_HK", np.zeros((model.num_heads, model.head_dim))))[:, None]
        for name in ("query", "key", "value")
    ]
    local = model.is_local(layer)
    if model.positions == "rope":
        base = model.local_rope_base if local else model.rope_base
        heads[:2] = [turn(each, base) for each in heads[:2]]
    distance = np.abs(np.arange(len(x))[:, None] - np.arange(len(x))[None])
    scores = heads[0] @ heads[1].transpose(0, 2, 1) / math.sqrt(model.head_dim)
    if model.positions == "alibi":
        scores = scores - np.array([0.25, 0.0625, 0.015625, 0.00390625])[:, None, None] * distance
    if local:
        scores = np.where(distance > model.local_window, -np.inf, scores)
    scores = np.exp(scores)
    mixed = scores / scores.sum(-1, keepdims=True) @ heads[2]
    return np.einsum("hlk,hkd->ld", mixed, weights["output_HKD"]) + weights.get("output_bias_D", 0)


def by_hand(params, tokens: np.ndarray, model: ModelConfig) -> np.ndarray:
    """The logits of one document, in NumPy and float64."""
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    tables, stack = params["encoder"]["embeddings"], params["encoder"]["layers"]
    x = tables["tokens_VD"][tokens]
    if model.num_token_types:
        x = x + tables["token_types_TD"][0]
    x = norm(x, tables["norm"], model) if model.embedding_norm else x
    for index in range(model.num_layers):
        layer = jax.tree.map(lambda leaf: leaf[index - (model.num_layers - len(leaf))], stack)  # noqa: B023

        def mlp(x: np.ndarray) -> np.ndarray:
            weights = layer["mlp"]  # noqa: B023
            gated = activate(x @ weights["gate_DF"], model.activation) * (x @ weights["up_DF"])
            return gated @ weights["down_FD"] + weights.get("down_bias_D", 0)

        if model.pre_norm:
            normed = x if index == 0 and not model.first_norm else norm(x, layer["attention_norm"], model)
            x = x + attention(normed, layer["attention"], model, index)
            x = x + mlp(norm(x, layer["mlp_norm"], model))
        else:
            x = norm(x + attention(x, layer["attention"], model, index), layer["attention_norm"], model)
            x = norm(x + mlp(x), layer["mlp_norm"], model)
    if model.pre_norm:
        x = norm(x, params["encoder"]["final_norm"], model)
    head = params["head"]
    if model.head_transform:
        x = activate(x @ head["transform_DD"] + head.get("transform_bias_D", 0), model.activation)
        x = norm(x, head["norm"], model)
    return x @ head.get("decoder_VD", tables["tokens_VD"]).T + head["output_bias_V"]


@pytest.mark.parametrize("model", [MODERN, NEO, MOSAIC], ids=["ModernBERT", "NeoBERT", "MosaicBERT"])
def test_logits_are_those_of_the_formulas(model):
    tokens, _ = make_rows(1)
    found = jax.jit(everywhere(objective(model)), compiler_options=QUICK)(init(model), tokens, np.ones_like(tokens))
    np.testing.assert_allclose(found[0], by_hand(init(model), tokens[0], model), atol=2e-4)


def test_the_parameters_are_those_of_the_architecture():
    names = {
        model: {jax.tree_util.keystr(path, simple=True) for path, _ in jax.tree_util.tree_leaves_with_path(init(model))}
        for model in (MODERN, NEO, MOSAIC)
    }
    assert not [name for name in names[MODERN] if "bias" in name and name != "headoutput_bias_V"]
    assert not [name for name in names[NEO] if "embeddingsnorm" in name or "transform" in name]
    assert {"encoderlayersmlpdown_bias_D", "headtransform_bias_D"} <= names[MOSAIC]
    assert not [name for name in names[MOSAIC] if "positions" in name or "up_bias" in name or "final_norm" in name]
    # The first layer has no norm before its attention.
    layers = init(MODERN)["encoder"]["layers"]
    assert (len(layers["attention_norm"]["scale_D"]), len(layers["mlp_norm"]["scale_D"])) == (3, 4)


def test_kernels_onto_the_residual_stream_begin_smaller():
    model = replace(MODERN, num_layers=8, init_truncated=False, embed_dim=64, vocab_size=512)
    params = jax.jit(objective(model).init, compiler_options=QUICK)(jax.random.key(0))
    layers, small = params["encoder"]["layers"], 0.02 / math.sqrt(2 * 8)
    for kernel, std in [
        (layers["attention"]["query_DHK"], 0.02),
        (layers["mlp"]["gate_DF"], 0.02),
        (params["encoder"]["embeddings"]["tokens_VD"], 0.02),
        (layers["attention"]["output_HKD"], small),
        (layers["mlp"]["down_FD"], small),
        (params["head"]["transform_DD"], small),
    ]:
        assert np.asarray(kernel).std() == pytest.approx(std, rel=0.05)


# Positions.


def test_rotated_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    query, key = (np.broadcast_to(rng.normal(size=(1, 1, 1, 8)), (1, 1, 40, 8)).astype(np.float32) for _ in range(2))
    positions = np.arange(40, dtype=np.int32)[None]
    turned = [np.asarray(rotate(x, rotation(positions, 8, 100.0)))[0, 0] for x in (query, key)]
    scores = turned[0] @ turned[1].T
    np.testing.assert_allclose(scores[:-1, :-1], scores[1:, 1:], atol=1e-4)
    assert np.std(scores[0]) > 0.1
    length_last = rotate(query.swapaxes(2, 3), rotation(positions, 8, 100.0), length_last=True)
    np.testing.assert_allclose(np.asarray(length_last).swapaxes(2, 3)[0, 0], turned[0], atol=1e-6)


def test_slopes_of_heads_that_are_no_power_of_two():
    # The eight of eight heads, then every second one of sixteen.
    expected = [2.0**-n for n in range(1, 9)] + [2.0 ** -(n / 2) for n in (1, 3, 5, 7)]
    np.testing.assert_allclose(alibi_slopes(12), expected, rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(4), [0.25, 0.0625, 0.015625, 0.00390625])


# Local layers.


def heads(length: int, dim: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.normal(size=(2, 3, length, dim)).astype(np.float32) for _ in range(3)]


def dense(query, key, value, segment_ids, causal, window: int) -> np.ndarray:
    """Attention with a mask of L × L, in NumPy and float64."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    offset = np.arange(query.shape[2])[None, :] - np.arange(query.shape[2])[:, None]
    sees = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (np.abs(offset) <= window)[None]
    if causal is not None:
        sees &= (offset <= 0)[None] | ~causal[:, None, None]
    scores = np.where(sees[:, None], query @ key.swapaxes(2, 3) / math.sqrt(query.shape[3]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value


@pytest.mark.parametrize("causal", [None, np.array([True, False])], ids=["both sides", "a causal row"])
@pytest.mark.parametrize(("length", "window"), [(192, 5), (150, 5), (75, 5), (74, 5), (400, 70), (70, 100)])
def test_blocks_are_exactly_a_window(length, window, causal):
    """Rows that are whole blocks and rows that are not, blocks of the smallest size and of the window's, no blocks."""
    assert blocks.is_shorter(length, window) == (length in (192, 150, 75, 400))
    _, segment_ids = make_rows(length=length)
    sight = Sight("xla", jnp.asarray(segment_ids), None if causal is None else jnp.asarray(causal), window)
    found = jax.jit(lambda *args: attend(*args, sight))(*heads(length))
    np.testing.assert_allclose(found, dense(*heads(length), segment_ids, causal, window), atol=1e-5)


def test_gradients_through_blocks_are_those_of_the_mask():
    _, segment_ids = make_rows()
    outside = np.abs(np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]) > WINDOW

    def masked(query, key, value):
        scores = jnp.einsum("bhlk,bhmk->bhlm", query, key) / math.sqrt(8)
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        weights = jax.nn.softmax(jnp.where(same & ~outside[None, None], scores, -1e30), axis=-1)
        return jnp.square(jnp.einsum("bhlm,bhmk->bhlk", weights, value)).sum()

    sight = Sight("xla", jnp.asarray(segment_ids), None, WINDOW)
    found = jax.jit(jax.grad(lambda *args: jnp.square(attend(*args, sight)).sum(), (0, 1, 2)))(*heads(LENGTH))
    for ours, expected in zip(found, jax.jit(jax.grad(masked, (0, 1, 2)))(*heads(LENGTH)), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_blocks_as_rows_of_their_own_are_the_same():
    """What a kernel for whole rows is given: so cuDNN computes a local layer."""
    _, segment_ids = make_rows()
    sees = blocks.sees(jnp.asarray(segment_ids), None, WINDOW)
    seen = []

    def kernel(query, key, value, sees):
        seen.append((query.shape, key.shape, sees.shape))
        return _xla(query, key, value, sees, None, 0.0, None)

    parts = blocks.split(*map(jnp.asarray, heads(LENGTH)), WINDOW)
    found = blocks.join(blocks.as_rows(kernel, *parts, sees), LENGTH)
    np.testing.assert_allclose(found, dense(*heads(LENGTH), segment_ids, None, WINDOW), atol=1e-5)
    assert seen == [((6, 3, 64, 8), (6, 3, 74, 8), (6, 64, 74))]


def test_a_token_reaches_as_far_as_the_windows_of_its_layers():
    model = replace(MODERN, num_layers=3)  # one global layer, two local ones
    params = jax.tree.map(np.copy, init(model))
    params["encoder"]["layers"]["attention"]["output_HKD"][0] = 0
    tokens, ones = make_rows(1)[0], np.ones((1, LENGTH), np.int32)
    changed = tokens.copy()
    changed[0, 70] = (changed[0, 70] + 1) % 64
    logits = jax.jit(everywhere(objective(model)), compiler_options=QUICK)
    differs = (np.asarray(logits(params, tokens, ones)) != np.asarray(logits(params, changed, ones))).any(-1)[0]
    np.testing.assert_array_equal(np.flatnonzero(differs), np.arange(70 - 2 * WINDOW, 70 + 2 * WINDOW + 1))


def squares(num_layers: int, length: int, **changes) -> int:
    """How many arrays of length² elements or more the program of a gradient has."""
    model = replace(MODERN, num_layers=num_layers, local_window=64, max_positions=length, **changes)
    logits = everywhere(objective(model))

    def loss(params, tokens, segment_ids):
        return score_targets(logits(params, tokens, segment_ids), tokens)[0].mean()

    rows = [jax.ShapeDtypeStruct((1, length), jnp.int32)] * 2
    params = jax.eval_shape(objective(model).init, jax.random.key(0))
    text = jax.jit(jax.grad(loss)).lower(params, *rows).as_text()
    found = re.findall(r"tensor<((?:\d+x)+)[a-z]\w*>", text)
    return sum(math.prod(int(size) for size in shape.split("x") if size) >= length**2 for shape in found)


def test_local_layers_of_8192_tokens_have_no_array_of_their_square():
    local = squares(4, 8192, global_every=4)  # the first of four layers is global
    assert local == squares(2, 8192) > 10
    assert squares(2, 8192, global_every=1) == squares(3, 8192, global_every=2) > 1.8 * local


def test_memory_and_work_of_local_layers_grow_with_the_length():
    """By XLA's own figures for one local layer: eight times the tokens, eight times of both."""
    figures = {}
    for length in (512, 4096):
        sight = functools.partial(Sight, "xla", causal_B=None, window=64)

        def loss(query, key, value, segment_ids, sight=sight):
            return jnp.square(attend(query, key, value, sight(segment_ids))).sum()

        like = jax.ShapeDtypeStruct((1, 2, length, 16), jnp.float32)
        rows = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(like, like, like, rows).compile(QUICK)
        figures[length] = (compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"])
    for short, long in zip(figures[512], figures[4096], strict=True):
        assert long / short == pytest.approx(8, rel=0.15)


# Ways to execute it.


@pytest.mark.parametrize(
    ("num_layers", "first_norm", "remat"),
    [(7, False, "none"), (8, False, "full"), (6, True, "dots"), (5, True, "none"), (2, False, "none")],
)
def test_scanning_groups_of_layers_changes_no_number(num_layers, first_norm, remat):
    """Whole patterns behind a first layer; with layers left at the end; without that layer; no whole pattern at all."""
    model = replace(MODERN, num_layers=num_layers, first_norm=first_norm)
    loss, grads = gradient(model)(init(model), *make_rows())
    scanned = dataclasses.replace(PLAIN, scan_layers=True, remat=remat)
    other_loss, other = gradient(model, scanned)(init(model), *make_rows())
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(a).max()), err_msg=jax.tree_util.keystr(path))


def test_a_scan_keeps_one_body_for_all_groups():
    """So a deep model compiles as fast as a shallow one."""
    scanned = dataclasses.replace(PLAIN, scan_layers=True)
    sizes = []
    for num_layers in (7, 22):
        model = replace(MODERN, num_layers=num_layers)
        shapes = jax.eval_shape(objective(model).init, jax.random.key(0))
        logits = jax.jit(everywhere(objective(model, scanned)))
        sizes.append(len(logits.lower(shapes, *make_rows()).as_text().splitlines()))
    assert sizes[0] == sizes[1]


def test_dropout_in_groups_is_that_of_each_layer():
    model = replace(MODERN, num_layers=7, dropout=0.2)
    rows, key = make_rows(), jax.random.key(5)
    unrolled, scanned = (
        jax.jit(everywhere(objective(model, dataclasses.replace(PLAIN, scan_layers=scan))), compiler_options=QUICK)(
            init(model), *rows, key
        )
        for scan in (False, True)
    )
    np.testing.assert_allclose(unrolled, scanned, atol=1e-4)
    plain = jax.jit(everywhere(objective(model)), compiler_options=QUICK)(init(model), *rows)
    assert np.abs(np.asarray(unrolled) - np.asarray(plain)).max() > 0.1


@pytest.mark.parametrize("model", [MODERN, NEO], ids=["ModernBERT", "NeoBERT"])
def test_bfloat16_computes_what_float32_does(model):
    rough = dataclasses.replace(PLAIN, dtype=jnp.dtype("bfloat16"))
    (loss, grads), (rough_loss, rough_grads) = (gradient(model, c)(init(model), *make_rows()) for c in (PLAIN, rough))
    np.testing.assert_allclose(rough_loss, loss, rtol=0.02)
    flat, other = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (grads, rough_grads))
    assert flat @ other / np.linalg.norm(flat) / np.linalg.norm(other) > 0.99


def test_a_row_of_padding_alone_is_finite_and_so_is_its_gradient():
    tokens = np.zeros((2, LENGTH), np.int32)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(MODERN)(init(MODERN), tokens, tokens)))


@pytest.mark.parametrize("model", [MODERN, MOSAIC], ids=["ModernBERT", "MosaicBERT"])
def test_packed_documents_are_as_if_each_had_a_row_of_its_own(model):
    tokens, segment_ids = make_rows()
    logits = jax.jit(everywhere(objective(model)), compiler_options=QUICK)
    packed = np.asarray(logits(init(model), tokens, segment_ids))
    for segment in (1, 2, 3):
        inside = segment_ids[0] == segment
        alone, marks = np.zeros((2, 2, LENGTH), np.int32)
        alone[0, : inside.sum()], marks[0, : inside.sum()] = tokens[0, inside], 1
        separate = np.asarray(logits(init(model), alone, marks))
        # The same numbers in another order of summation.
        np.testing.assert_allclose(separate[0, : inside.sum()], packed[0, inside], atol=1e-4)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_the_kernel_of_a_tpu_attends_as_xla_does(monkeypatch, remat):
    """Run by Pallas's interpreter, on a row of several blocks: windows and rotated keys, and biases that are rotated too."""
    splash = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel")
    monkeypatch.setattr(splash, "make_splash_mha", functools.partial(splash.make_splash_mha, interpret=True))
    model = replace(MODERN, embed_dim=64, num_layers=2, max_positions=640, local_window=40, biases=remat == "dots")
    kernel = dataclasses.replace(PLAIN, attention="splash", platform="tpu", remat=remat)
    rows = make_rows(length=640)
    (loss, grads), (other_loss, others) = (gradient(model, c, 640)(init(model), *rows) for c in (PLAIN, kernel))
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for (path, grad), other in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(others), strict=True):
        scale = np.abs(grad).max()
        np.testing.assert_allclose(other, grad, atol=3e-5 * scale + 2e-7, rtol=0, err_msg=jax.tree_util.keystr(path))


def test_the_kernels_of_a_tpu_visit_the_blocks_of_a_window():
    """Of 16 blocks of keys each block of queries is at most at three; and no gradient is held once for each of them."""
    pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel")
    like = jax.ShapeDtypeStruct((1, 2, 8192, 64), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    grids = {}
    for window in (0, 64):

        def loss(query, key, value, segment_ids, window=window):
            heads = (jax.reshard(x, SHARDING.heads_BHLK) for x in (query, key, value))
            return attend(*heads, Sight("splash", segment_ids, None, window)).astype(jnp.float32).sum()

        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(like, like, like, row)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        calls = [line.rpartition(" : (")[2] for line in text.splitlines() if "tpu_custom_call" in line]
        grids[window] = [call.partition(",")[0] for call in calls]
        assert ("tensor<16x2x8192x64xbf16>" in "".join(calls)) == (window == 0)
    assert grids[0] == ["tensor<1x16x16xi8>"] * 2
    assert grids[64] == ["tensor<1x16x3xi8>", "tensor<1x3x16xi8>", "tensor<1x16x3xi8>"]


@pytest.mark.parametrize(("platform", "expected"), [("cpu", "xla"), ("gpu", "xla"), ("tpu", "xla")])
def test_alibi_takes_the_path_that_adds_to_scores(caplog, platform, expected):
    caplog.set_level("INFO")
    assert choose_implementation("auto", MOSAIC, 128, platform, jnp.dtype("bfloat16")) == expected
    assert ("ALiBi" in caplog.text) == (platform != "cpu")


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8, "data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "tensor": 2, "zero": True}],
    ids=["fsdp", "all axes", "zero"],
)
@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unroll"])
def test_a_mesh_changes_no_number(sizes, scan):
    model = replace(MODERN, num_layers=5, vocab_size=256)
    cfg = Config(name="tiny", model=model, stages=(StageConfig(seq_len=LENGTH, batch_size=8),))
    built = MaskedLM(cfg, dataclasses.replace(PLAIN, scan_layers=scan))

    def gradients(mesh: jax.sharding.Mesh, zero: bool):
        def of(params, batch, vocab):
            def loss(params, micro, key):
                return built.loss(params, micro, Keys(jax.random.key(0), key, jnp.int32(0)), vocab)

            params = divide(params) if zero else params
            return accumulate_gradients(loss, params, batch, None, 1, jnp.dtype("float32"), layers_at_once=scan)[0]

        with jax.set_mesh(mesh):
            specs = jax.tree.map(lambda leaf: leaf.sharding.spec, jax.eval_shape(built.init, jax.random.key(0)))
            params, batch = jax.device_put((init(model), make_batch(8)), (specs, jax.P(ROWS)))
            return jax.device_get(jax.jit(of, compiler_options=QUICK)(params, batch, tables_on(mesh)))

    alone = gradients(make_mesh(ShardingConfig(), jax.devices()[:1]), zero=False)
    spread = gradients(make_mesh(ShardingConfig(**sizes)), zero="zero" in sizes)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5 * max(np.abs(a).max(), 1e-3), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["mlm", "span", "rtd", "diffusion", "hybrid"])
def test_every_objective_trains_it(name):
    masking = MaskingConfig(policy="span", max_words=3) if name == "span" else MaskingConfig()
    cfg = Config(
        name="tiny",
        objective=name,
        model=replace(MODERN, vocab_size=256),
        masking=masking,
        rtd=RtdConfig(generator_size=0.5),
        tokenizer=TokenizerConfig(vocab_size=200),
    )
    check(cfg)
    built = make_objective(cfg, PLAIN, mask_id=4)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def grads(key, batch, vocab):
        def loss(params):
            sums = built.loss(params, batch, Keys(jax.random.key(0), None, jnp.int32(0)), vocab)
            return sum(term.mean() for term in sums.losses.values())

        return jax.value_and_grad(loss)(built.init(key))

    batch = jax.device_put(make_batch(4), jax.P(ROWS))
    loss, found = grads(jax.random.key(0), batch, TABLES)
    assert np.isfinite(loss)
    for path, grad in jax.tree_util.tree_leaves_with_path(found):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, jax.tree_util.keystr(path)


# Arithmetic.


def test_flops_by_hand():
    # 4·4·4 + 3·4·8 weights; two global layers of 3 keys (2·2·3·4 for scores and mixing), one local of at most 2·1 + 1.
    model = ModelConfig(vocab_size=10, num_layers=3, embed_dim=4, num_heads=1, mlp_dim=8, gated_mlp=True)
    local = replace(model, local_window=1, global_every=2)
    # Behind the last layer's attention half of the tokens need no 4·4 + 3·4·8 weights.
    weights, head = 2 * (64 + 96), 0.5 * 2 * 56 - 0.5 * 2 * 112
    assert flops.train_flops_per_token(model, 9.0, 0.5) == pytest.approx(3 * (3 * (weights + 16 * 9) + head))
    assert flops.train_flops_per_token(local, 9.0, 0.5) == pytest.approx(3 * (3 * weights + 2 * 16 * 9 + 16 * 3 + head))
    bare = replace(model, head_transform=False)
    assert flops.train_flops_per_token(bare, 9.0, 0.5) == pytest.approx(3 * (3 * (weights + 16 * 9) + 0.5 * 2 * (40 - 112)))
