"""The device mesh and one named PartitionSpec for every weight and activation of the encoder.

Axes: `slice` and `data` hold the same parameters, `fsdp` divides them, `tensor` splits heads, mlp and vocabulary. Rows of
a batch are spread over slice × data × fsdp. Every axis is Explicit: an array's type carries its sharding, and ambiguity
is an error.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from mlm_jax.config import Config, ShardingConfig, StageConfig
from mlm_jax.errors import UserError

AXES = ("slice", "data", "fsdp", "tensor")  # from the slowest network to the fastest
ROWS = ("slice", "data", "fsdp")  # the axes that a batch's rows are spread over
REPLICAS = ("slice", "data")  # of these, the ones on which every device computes with the same parameters


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Specs by name; the suffix is the array's dimensions (see `mlm_jax.model`)."""

    # Activations.
    hidden_BLD: jax.P = jax.P(ROWS, None, None)
    heads_BLHK: jax.P = jax.P(ROWS, None, "tensor", None)
    heads_BHLK: jax.P = jax.P(ROWS, "tensor", None, None)
    mlp_BLF: jax.P = jax.P(ROWS, None, "tensor")
    logits_BPV: jax.P = jax.P(ROWS, None, "tensor")
    # Weights. A stacked layer's leading axis N is never sharded and is added by the stacking.
    vector: jax.P = jax.P(None)
    embedding_VD: jax.P = jax.P("tensor", "fsdp")
    table: jax.P = jax.P(None, None)  # positions and token types
    projection_DHK: jax.P = jax.P("fsdp", "tensor", None)
    projection_bias_HK: jax.P = jax.P("tensor", None)
    output_HKD: jax.P = jax.P("tensor", None, "fsdp")
    up_DF: jax.P = jax.P("fsdp", "tensor")
    up_bias_F: jax.P = jax.P("tensor")
    down_FD: jax.P = jax.P("tensor", "fsdp")
    transform_DD: jax.P = jax.P("fsdp", None)
    patch_CD: jax.P = jax.P(None, "fsdp")  # from and, turned round, to the C numbers of a patch, which need not divide
    output_bias_V: jax.P = jax.P("tensor")


SHARDING = Sharding()


def make_mesh(cfg: ShardingConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh that a config asks for, over all devices unless some are given.

    Raises:
        UserError: the axis sizes do not multiply out to the number of devices, or `slice` is not what the devices form.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {name: getattr(cfg, name) for name in AXES}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    free = [name for name, size in sizes.items() if size == -1]
    if len(devices) % fixed or (not free and fixed != len(devices)):
        wanted = " × ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(f"sharding {wanted} does not multiply out to the {len(devices)} devices here; set one axis to -1")
    for name in free:
        sizes[name] = len(devices) // fixed
    kinds = (jax.sharding.AxisType.Explicit,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    processes = len({device.process_index for device in devices})
    # XLA calls each host of GPUs a slice, and between them any axis may lie, as it may not between slices of TPUs.
    may_join = slices > 1 and getattr(devices[0], "platform", "") == "gpu"
    if slices > 1 and sizes["slice"] != slices and not (may_join and sizes["slice"] == 1):
        advice = f"{slices}, or to 1" if may_join else slices
        raise UserError(f"sharding.slice={sizes['slice']}, but the devices form {slices} slices; set it to {advice}")
    if max(slices, processes) == 1 or (slices == 1 and sizes["slice"] == 1):
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds, devices=devices)
    if slices == 1 and sizes["slice"] != processes:
        raise UserError(
            f"sharding.slice={sizes['slice']}, but the devices belong to {processes} processes: "
            f"set it to {processes}, or to 1"
        )
    between: list[int] = []
    left = processes if slices == 1 else slices
    for size in sizes.values():  # `slice` takes all of them, or else those that move the least do: `data`, then `fsdp`
        between.append(math.gcd(size, left))
        left //= between[-1]
    within = [size // outer for size, outer in zip(sizes.values(), between, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(
        within, between, devices, process_is_granule=slices == 1, allow_split_physical_axes=True
    )
    return jax.sharding.Mesh(grid, AXES, axis_types=kinds)


def gather(params: Any, axes: Sequence[str]) -> Any:
    """Parameters made whole along these axes, for computing with rows that are spread over them.

    Their type says so (`reduced`), and a gradient's type then that it is a partial sum (`unreduced`): partial sums of all
    the uses of a parameter, and of all micro-batches, are added where they arise, and between the devices only once.
    """
    ways = jax.sharding.get_abstract_mesh().shape
    resharded = [axis for axis in axes if ways[axis] == 1 or axis not in ROWS]

    def whole(leaf: jax.Array) -> jax.Array:
        spec = jax.typeof(leaf).sharding.spec
        parts = [axes_of(part, without=resharded) for part in spec.partitions]
        gathered = [tuple(axis for axis in part if axis in axes) for part in parts]
        moved = {axis for part in gathered for axis in part}
        before = jax.P(*parts, reduced=spec.reduced | ((set(axes) & set(ROWS)) - moved))
        leaf = jax.reshard(leaf, before)
        if not moved:
            return leaf

        behind = 1 + max(dimension for dimension, names in enumerate(gathered) if names)

        def collect(shard: jax.Array) -> jax.Array:
            # What lies behind is moved as one dimension: heads of 64 fill half a vector, and XLA:TPU would turn them round.
            trailing = shard.shape[behind:]
            shard = shard.reshape(*shard.shape[:behind], math.prod(trailing))
            for dimension, names in enumerate(gathered):
                if names:
                    shard = jax.lax.all_gather(shard, names, axis=dimension, tiled=True, to="reduced")
            return shard.reshape(*shard.shape[:behind], *trailing)

        # A reshard would do, but its transpose is on a TPU an all-reduce of which each device keeps its part. This one's is
        # a reduce-scatter; only the parts then travel between slices, if there are any.
        after = jax.P(*(axes_of(part, without=axes) for part in parts), reduced=before.reduced | moved)
        collected = jax.shard_map(collect, in_specs=before, out_specs=after)
        return _summed_first(collected, before, after)(leaf) if _on_tpu() and "fsdp" not in moved else collected(leaf)

    return jax.tree.map(whole, params)


def _on_tpu() -> bool:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and "TPU" in device.device_kind


def _summed_first(collected: Callable[[jax.Array], jax.Array], before: jax.P, after: jax.P) -> Any:
    """The same gathering, whose gradient is summed whole and only then divided.

    XLA:TPU scatters along one dimension of a slice's torus; over more it sums and cuts anyway. Left to itself it then lays
    the gradient out for the cut, which for a head dimension of 64 wastes half of every vector in the product before it.
    """

    @jax.custom_vjp
    def whole(leaf: jax.Array) -> jax.Array:
        return collected(leaf)

    def backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
        total = jax.reshard(grad, jax.P(*after.partitions, unreduced=before.reduced))
        return (jax.reshard(jax.lax.optimization_barrier(total), jax.P(*before.partitions, unreduced=before.reduced)),)

    whole.defvjp(lambda leaf: (collected(leaf), None), backward)
    return whole


def divide(params: Any) -> Any:
    """Parameters divided over `data` as well: each by the first of its dimensions that can be, its last one at last.

    The last dimension is the one that a device stores in vectors of a fixed size. What no dimension divides stays whole. A
    stack is not divided by its layers, as each layer is taken out of it on every device.
    """
    ways = jax.sharding.get_abstract_mesh().shape

    def part(path: Any, leaf: jax.Array) -> jax.Array:
        parts = list(jax.typeof(leaf).sharding.spec.partitions)
        for index in range(int(is_stacked(path)), leaf.ndim):
            axes = (*axes_of(parts[index]), "data")
            if leaf.shape[index] % math.prod(ways[axis] for axis in axes) == 0:
                parts[index] = axes
                break
        return jax.reshard(leaf, jax.P(*parts))

    return jax.tree_util.tree_map_with_path(part, params)


def is_stacked(path: Any) -> bool:
    """Whether a parameter holds one tensor for each layer along its first axis."""
    return "layers" in jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def axes_of(part: Any, without: Sequence[str] = ()) -> tuple[str, ...]:
    """One dimension's entry of a spec as a tuple of axes."""
    axes = (part,) if isinstance(part, str) else part or ()
    return tuple(axis for axis in axes if axis not in without)


def row_ways(mesh: jax.sharding.Mesh) -> int:
    """How many parts the rows of a batch are divided into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_networks(cfg: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses networks whose widths the mesh's fsdp axis, possibly the devices that were left, does not divide."""
    ways = mesh.shape["fsdp"]
    for where, model in cfg.networks.items():
        for name, size in (("embed_dim", model.embed_dim), ("table_dim", model.table_dim)):
            if size % ways:
                raise UserError(f"{where}{name}={size} cannot be divided over fsdp={ways} devices; set sharding.fsdp")


def check_batch(stage: StageConfig, mesh: jax.sharding.Mesh, where: str) -> None:
    """Refuses a global batch whose micro-batches the mesh cannot spread evenly."""
    ways = row_ways(mesh)
    micro = stage.batch_size // stage.accumulation
    if micro % ways:
        raise UserError(
            f"{where}: a micro-batch of {micro} rows (batch_size={stage.batch_size} / accumulation={stage.accumulation}) "
            f"cannot be divided over slice × data × fsdp = {ways} devices; use a multiple of {ways}"
        )


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process's devices hold, ascending."""
    slices = jax.NamedSharding(mesh, jax.P(ROWS)).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in slices if index is not None for row in range(*index[0].indices(batch_size))})


def place(tree: Any, spec: jax.P) -> Any:
    """Host arrays, the same in every process, on the current mesh; a process keeps what its own devices hold."""
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), spec)

    def put(array: Any) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree)


def connect(mesh: jax.sharding.Mesh) -> None:
    """One small sum over each group of axes that a step's collectives run over, on the current mesh.

    For several processes that are at the same point: on CPUs the first collective of a group gives up when one of them
    comes 30 seconds late, and as long as that may lie between the ends of their compilations.
    """
    groups = [(axis,) for axis in AXES if mesh.shape[axis] > 1]
    for axes in (*groups, ROWS, AXES):
        ones = place(np.ones(math.prod(mesh.shape[axis] for axis in axes), np.float32), jax.P(axes))
        jax.block_until_ready(jax.jit(lambda x: x.sum())(ones))
