"""Digests: the same on every mesh, another for any change of the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax.config import ShardingConfig
from mlm_jax.sharding import make_mesh
from mlm_jax.train.digest import digests

RNG = np.random.default_rng(0)
TREE = {
    "table": RNG.normal(size=(16, 8, 4)).astype(np.float32),
    "half": RNG.normal(size=(8, 6)).astype(jnp.bfloat16),
    "count": np.int32(7),
}


def on_mesh(sizes: tuple[int, int, int], spec: jax.P) -> dict[str, int]:
    mesh = make_mesh(ShardingConfig(*sizes), jax.devices()[: sizes[0] * sizes[1] * sizes[2]])
    specs = {"table": spec, "half": jax.P(spec[0] if spec else None), "count": jax.P()}
    with jax.set_mesh(mesh):
        return digests(jax.tree.map(lambda leaf, spec: jax.device_put(leaf, jax.NamedSharding(mesh, spec)), TREE, specs))


def test_a_digest_does_not_depend_on_the_mesh():
    one = on_mesh((1, 1, 1), jax.P())
    assert one == on_mesh((2, 2, 2), jax.P("data", "fsdp", "tensor")) == on_mesh((8, 1, 1), jax.P(None, "data"))
    assert set(one) == {"table", "half", "count"} and len(set(one.values())) == 3


@pytest.mark.parametrize("name", TREE)
def test_every_bit_counts(name):
    before = digests(TREE)
    leaf = np.ascontiguousarray(TREE[name])
    flat = leaf.reshape(-1).view(np.uint8)
    for bit in RNG.permutation(8 * flat.size)[:64]:
        changed = flat.copy()
        changed[bit // 8] ^= 1 << (bit % 8)
        tree = TREE | {name: changed.view(leaf.dtype).reshape(np.shape(TREE[name]))}
        after = digests(tree)
        assert [other for other in TREE if after[other] != before[other]] == [name]


def test_the_place_counts():
    table = TREE["table"]
    for moved in (np.roll(table, 1, axis=0), np.roll(table, 1, axis=1), np.roll(table, 1, axis=2), table[::-1]):
        assert digests({"table": moved}) != digests({"table": table})
    assert digests({"zeros": np.zeros((4, 4), np.float32)}) != digests({"zeros": np.full((4, 4), -0.0, np.float32)})
