"""The TPU kernels for whole rows, run by Pallas's interpreter, against XLA's attention; and when they are chosen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import PLAIN, gradient, init, make_rows, replace

from mlm_jax.compile.cost import kernel_flops
from mlm_jax.compile.hlo import parse_module
from mlm_jax.compile.program import attention_of
from mlm_jax.config import Config, ShardingConfig, StageConfig
from mlm_jax.errors import UserError
from mlm_jax.model.attention import Sight, _row, attend, choose_implementation
from mlm_jax.model.row_attention import refusals
from mlm_jax.sharding import ROWS, SHARDING, make_mesh

BFLOAT16 = jnp.dtype("bfloat16")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    pallas = pytest.importorskip("jax.experimental.pallas")
    pytest.importorskip("jax.experimental.pallas.tpu")
    monkeypatch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        yield


def make_heads(batch, length, heads, head_dim, seed=0):
    """Queries, keys, values and a cotangent [B, L, F], and segment ids with padding."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(batch, length, heads * head_dim)).astype(np.float32) for _ in range(4)]
    return arrays, make_rows(batch, seed, length)[1]


def value_and_gradients(function, arrays):
    *heads, cotangent = map(jnp.asarray, arrays)
    cotangent = jax.reshard(cotangent, SHARDING.mlp_BLF)
    gradients = jax.grad(lambda *heads: (function(*heads) * cotangent).sum(), (0, 1, 2))
    return [np.asarray(x) for x in (jax.jit(function)(*heads), *jax.jit(gradients)(*heads))]


def by_xla(arrays, segment_ids, causal, slopes, heads):
    def attention(*flat):
        shape = (*flat[0].shape[:2], heads, -1)
        apart = (jax.reshard(x.reshape(shape).swapaxes(1, 2), SHARDING.heads_BHLK) for x in flat)
        sight = Sight("xla", jnp.asarray(segment_ids), None if causal is None else jnp.asarray(causal), slopes=slopes)
        mixed = attend(*apart, sight).swapaxes(1, 2)
        return jnp.reshape(mixed, flat[0].shape, out_sharding=SHARDING.mlp_BLF)

    return value_and_gradients(attention, arrays)


def by_row(arrays, segment_ids, causal, slopes, head_dim):
    sight = Sight("row", jnp.asarray(segment_ids), None if causal is None else jnp.asarray(causal), slopes=slopes)

    def attention(query, key, value):
        heads = (jax.reshard(x, SHARDING.mlp_BLF) for x in (query * head_dim**-0.5, key, value))
        return _row(*heads, sight, head_dim)

    return value_and_gradients(attention, arrays)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "head_dim", "causal", "slopes"),
    [
        (4, 128, 4, 64, None, ()),  # four rows and two heads a program
        (3, 256, 4, 32, None, ()),  # a row a program, four heads
        (2, 512, 1, 128, None, ()),
        (2, 128, 2, 64, [True, False], ()),
        (2, 128, 4, 64, None, (0.5, 0.25, 0.1, 0.02)),
    ],
)
def test_attention_and_its_gradients_are_those_of_xla(batch, length, heads, head_dim, causal, slopes):
    arrays, segment_ids = make_heads(batch, length, heads, head_dim)
    causal = None if causal is None else np.array(causal)
    expected = by_xla(arrays, segment_ids, causal, slopes, heads)
    found = by_row(arrays, segment_ids, causal, slopes, head_dim)
    for name, ours, theirs in zip(("mixed", "query", "key", "value"), found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("remat", ["none", "dots"])
@pytest.mark.parametrize("positions", ["learned", "alibi"])
def test_a_model_has_the_same_loss_and_gradient(remat, positions):
    """Though biases of keys and values take another way."""
    model = replace(embed_dim=128, num_heads=2, num_layers=1, max_positions=128, positions=positions)
    rows, key = make_rows(length=128), jax.random.key(0)
    kernel = dataclasses.replace(PLAIN, attention="row", platform="tpu", remat=remat)
    (loss, grads), (other_loss, others) = (gradient(model, c)(init(model), *rows, key) for c in (PLAIN, kernel))
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    assert (np.asarray(others["encoder"]["layers"]["attention"]["key_bias_HK"]) == 0).all()
    for (path, grad), other in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(others), strict=True):
        scale = np.abs(grad).max()
        np.testing.assert_allclose(other, grad, atol=2e-5 * scale + 2e-7, rtol=0, err_msg=jax.tree_util.keystr(path))


def test_each_device_attends_within_its_rows_and_heads():
    """The slopes that a device uses are those of its own heads."""
    arrays, segment_ids = make_heads(4, 128, 8, 64)
    slopes = tuple(2.0**-i for i in range(1, 9))
    expected = by_xla(arrays, segment_ids, None, slopes, 8)[0]
    with jax.set_mesh(make_mesh(ShardingConfig(data=2, fsdp=1, tensor=4))):
        flat = [jax.device_put(x, SHARDING.mlp_BLF) for x in arrays[:3]]
        sight = Sight("row", jax.device_put(segment_ids, jax.P(ROWS, None)), slopes=slopes)
        found = jax.jit(lambda query, key, value: _row(query / 8.0, key, value, sight, 64))(*flat)
        assert jax.typeof(found).sharding.spec == SHARDING.mlp_BLF
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "changes", "expected"),
    [
        (128, {}, "row"),
        (512, {"positions": "alibi"}, "row"),
        (640, {}, "splash"),
        (128, {"positions": "rope"}, "splash"),
        (128, {"local_window": 16, "positions": "rope"}, "splash"),
        (128, {"num_heads": 1, "embed_dim": 64}, "splash"),  # half of the lanes
        (120, {}, "xla"),
        (640, {"positions": "alibi"}, "xla"),
    ],
)
def test_the_first_kernel_that_can_is_chosen(length, changes, expected):
    model = replace(**{"embed_dim": 128, "num_heads": 2, **changes})
    assert choose_implementation("auto", model, length, "tpu", BFLOAT16) == expected


def test_heads_are_those_of_a_device():
    model = replace(embed_dim=128, num_heads=2)
    with jax.set_mesh(make_mesh(ShardingConfig(data=1, fsdp=-1, tensor=2))):
        assert choose_implementation("auto", model, 128, "tpu", BFLOAT16) == "splash"
        with pytest.raises(UserError, match="'row' cannot be used: 1 heads of 64 on a device do not fill 128 lanes"):
            choose_implementation("row", model, 128, "tpu", BFLOAT16)
    assert choose_implementation("auto", model, 128, "tpu", BFLOAT16, causal_rows=True) == "row"
    cfg = Config("tiny", model=model, stages=(StageConfig(steps=1, seq_len=128, batch_size=8),))
    compute = dataclasses.replace(PLAIN, attention="auto", platform="tpu")
    meshes = [make_mesh(ShardingConfig(data=1, fsdp=-1, tensor=tensor)) for tensor in (1, 2)]
    assert [attention_of(cfg, 0, compute, mesh) for mesh in meshes] == ["row", "splash"]
    causal = dataclasses.replace(cfg, objective="hybrid")  # some of its rows are
    assert [attention_of(causal, 0, compute, mesh) for mesh in meshes] == ["row", "xla"]
    assert "no multiple of 128 up to 512" in refusals(64, 2, 1024)[0]


def test_an_estimate_counts_two_products_forward_and_five_backward():
    shape = "bf16[16,512,768]{2,1,0}"
    call = 'custom-call(%c, %s, %q, %k, %v), custom_call_target="tpu_custom_call"'
    module = parse_module(
        "HloModule x, is_scheduled=true\n\nENTRY %main (q: bf16[16,512,768]) -> bf16[16,512,768] {\n"
        f"  %jvp_row_attention_forward_64_.1 = {shape} {call}\n"
        f"  %transpose_jvp_row_attention_backward_64__.1 = ({shape}, {shape}, {shape}) {call}\n}}\n"
    )
    product = 2.0 * 16 * 12 * 512 * 512 * 64
    found = [kernel_flops(one, module) for one in module.computations[module.entry]]
    assert found == [(2 * product, 64), (5 * product, 64)]
