"""The device mesh: its shape, what is refused, and where slices lie."""

import dataclasses

import jax
import numpy as np
import pytest

from mlm_jax.config import Config, ModelConfig, ShardingConfig, StageConfig
from mlm_jax.errors import UserError
from mlm_jax.sharding import AXES, check_batch, check_networks, divide, gather, local_rows, make_mesh


@pytest.mark.parametrize(
    ("cfg", "shape"),
    [
        (ShardingConfig(), (1, 8, 1, 1)),
        (ShardingConfig(zero=True), (1, 8, 1, 1)),
        (ShardingConfig(data=1, fsdp=-1), (1, 1, 8, 1)),
        (ShardingConfig(data=1, fsdp=-1, tensor=4), (1, 1, 2, 4)),
        (ShardingConfig(slice=2), (2, 4, 1, 1)),
        (ShardingConfig(slice=-1, data=2, tensor=2), (2, 2, 1, 2)),
    ],
)
def test_one_axis_takes_the_devices_that_are_left(cfg, shape):
    mesh = make_mesh(cfg)
    assert mesh.axis_names == AXES and tuple(mesh.shape.values()) == shape
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    assert len({device.id for device in mesh.devices.flat}) == 8


@pytest.mark.parametrize("cfg", [ShardingConfig(data=3), ShardingConfig(data=4), ShardingConfig(data=-1, tensor=16)])
def test_sizes_that_do_not_multiply_out_are_refused(cfg):
    with pytest.raises(UserError, match="does not multiply out to the 8 devices here; set one axis to -1"):
        make_mesh(cfg)


@dataclasses.dataclass(frozen=True)
class Described:
    """What a mesh is laid out by."""

    id: int
    slice_index: int
    process_index: int
    platform: str
    device_kind: str = "any"


def described(slices: int, processes: int, platform: str = "tpu") -> list[Described]:
    """Eight devices of so many slices and processes."""
    return [Described(i, i * slices // 8, i * processes // 8, platform) for i in range(8)]


@pytest.mark.parametrize(
    ("cfg", "devices", "message"),
    [
        (ShardingConfig(slice=2), described(4, 4), "sharding.slice=2, but the devices form 4 slices; set it to 4"),
        (ShardingConfig(), described(4, 4), "sharding.slice=1, but the devices form 4 slices; set it to 4$"),
        (ShardingConfig(slice=2), described(4, 4, "gpu"), "slice=2, but the devices form 4 slices; set it to 4, or to 1"),
        (ShardingConfig(slice=2), described(1, 4), "slice=2, but the devices belong to 4 processes: set it to 4, or to 1"),
    ],
)
def test_slices_are_what_the_devices_form(cfg, devices, message):
    with pytest.raises(UserError, match=message):
        make_mesh(cfg, devices)


@pytest.mark.parametrize("processes", [4, 8])
@pytest.mark.parametrize(
    ("cfg", "rows"),
    [
        (ShardingConfig(), [[0], [0], [1], [1], [2], [2], [3], [3]]),
        (ShardingConfig(slice=4), [[0], [0], [1], [1], [2], [2], [3], [3]]),
        (ShardingConfig(data=1, fsdp=-1), [[0], [0], [1], [1], [2], [2], [3], [3]]),
        (ShardingConfig(data=2, fsdp=4), [[0], [0], [1], [1], [2], [2], [3], [3]]),
        (ShardingConfig(fsdp=2), [[0], [0], [1], [1], [2], [2], [3], [3]]),
        (ShardingConfig(data=1, fsdp=-1, tensor=2), [[0, 0], [1, 1], [2, 2], [3, 3]]),
        (ShardingConfig(data=2, fsdp=1, tensor=4), [[0, 0, 1, 1], [2, 2, 3, 3]]),
    ],
)
def test_hosts_of_gpus_are_blocks_of_whatever_axes_there_are(cfg, rows, processes):
    """XLA calls each host of GPUs a slice; `rows` are those of the devices that compute with each part of a batch."""
    devices = described(4, processes, "gpu")
    mesh = make_mesh(cfg, list(reversed(devices)))
    assert {device.id for device in mesh.devices.flat} == set(range(8))
    hosts = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    np.testing.assert_array_equal(hosts.reshape(len(rows), -1), rows)
    assert mesh.shape["slice"] == cfg.slice


def test_each_slice_of_tpus_is_one_block_of_the_mesh(monkeypatch):
    """The layout of two slices of four chips, by their description alone."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
    mesh = make_mesh(ShardingConfig(slice=2, tensor=2), devices)
    assert tuple(mesh.shape.values()) == (2, 2, 1, 2)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]


def test_a_model_and_a_batch_that_the_mesh_cannot_divide_are_refused():
    mesh = make_mesh(ShardingConfig(slice=2, data=2, fsdp=2))
    with pytest.raises(UserError, match="embed_dim=65 cannot be divided over fsdp=2 devices"):
        check_networks(Config(name="x", model=ModelConfig(embed_dim=65)), mesh)
    rtd = Config(name="x", objective="rtd", model=ModelConfig(embed_dim=20, num_heads=4))
    with pytest.raises(UserError, match="the generator's embed_dim=5 cannot be divided over fsdp=2 devices"):
        check_networks(rtd, mesh)
    check_batch(StageConfig(batch_size=16, accumulation=2), mesh, "stages[0]")
    with pytest.raises(UserError, match=r"of 4 rows .* cannot be divided over slice × data × fsdp = 8 devices"):
        check_batch(StageConfig(batch_size=16, accumulation=4), mesh, "stages[0]")
    assert local_rows(mesh, 16) == list(range(16))


def test_zero_divides_the_first_dimension_that_it_can_and_gathering_undoes_it():
    """Also on top of fsdp; what no dimension divides stays whole on every device, and a stack is not divided by layers."""
    mesh = make_mesh(ShardingConfig(data=4, fsdp=2))
    arrays = {"a": np.arange(96.0).reshape(3, 8, 4), "b": np.arange(6.0), "c": np.arange(16.0).reshape(2, 8)}
    arrays["layers"] = np.arange(32.0).reshape(4, 8)
    specs = {"a": jax.P(None, "fsdp", None), "b": jax.P(None), "c": jax.P(None, None), "layers": jax.P(None, None)}
    expected = {
        "a": jax.P(None, ("fsdp", "data"), None),
        "b": jax.P(None),
        "c": jax.P(None, "data"),
        "layers": jax.P(None, "data"),
    }
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(array, specs[name]) for name, array in arrays.items()}
        divided = jax.jit(divide)(placed)
        assert {name: array.sharding.spec for name, array in divided.items()} == expected
        whole = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 1, gather(x, ("data", "fsdp"))))
        types_of = jax.eval_shape(lambda x: gather(x, ("data", "fsdp")), divided)
        assert all(leaf.sharding.spec.reduced == {"data", "fsdp"} for leaf in types_of.values())
        for name, array in jax.device_get(whole(divided)).items():
            np.testing.assert_array_equal(array, arrays[name])
