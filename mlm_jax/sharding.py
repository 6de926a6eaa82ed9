"""The device mesh and one named PartitionSpec for every weight and activation of the encoder.

Axes: `data` replicates parameters, `fsdp` shards them, `tensor` splits heads, mlp and vocabulary. Rows of a batch are
spread over data × fsdp. Every axis is Explicit: an array's type carries its sharding, and ambiguity is an error.
"""

import dataclasses
from collections.abc import Sequence

import jax

from mlm_jax.config import ModelConfig, ShardingConfig, StageConfig
from mlm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that a batch's rows are spread over


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Specs by name; the suffix is the array's dimensions (see `mlm_jax.model`)."""

    # Activations.
    tokens_BL: jax.P = jax.P(ROWS, None)
    hidden_BLD: jax.P = jax.P(ROWS, None, None)
    heads_BLHK: jax.P = jax.P(ROWS, None, "tensor", None)
    heads_BHLK: jax.P = jax.P(ROWS, "tensor", None, None)
    mlp_BLF: jax.P = jax.P(ROWS, None, "tensor")
    logits_BPV: jax.P = jax.P(ROWS, None, "tensor")
    # Weights. A stacked layer's leading axis N is never sharded and is added by the stacking.
    vector: jax.P = jax.P(None)
    embedding_VD: jax.P = jax.P("tensor", "fsdp")
    table: jax.P = jax.P(None, None)  # positions, token types, and the token table while rows are looked up
    projection_DHK: jax.P = jax.P("fsdp", "tensor", None)
    projection_bias_HK: jax.P = jax.P("tensor", None)
    output_HKD: jax.P = jax.P("tensor", None, "fsdp")
    up_DF: jax.P = jax.P("fsdp", "tensor")
    up_bias_F: jax.P = jax.P("tensor")
    down_FD: jax.P = jax.P("tensor", "fsdp")
    transform_DD: jax.P = jax.P("fsdp", None)
    output_bias_V: jax.P = jax.P("tensor")


SHARDING = Sharding()


def make_mesh(cfg: ShardingConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh that a config asks for, over all devices unless some are given.

    Raises:
        UserError: the axis sizes do not multiply out to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {name: getattr(cfg, name) for name in AXES}
    fixed = 1
    for size in sizes.values():
        fixed *= size if size > 0 else 1
    free = [name for name, size in sizes.items() if size == -1]
    if len(devices) % fixed or (not free and fixed != len(devices)):
        wanted = " × ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(f"sharding {wanted} does not multiply out to the {len(devices)} devices here; set one axis to -1")
    for name in free:
        sizes[name] = len(devices) // fixed
    kinds = (jax.sharding.AxisType.Explicit,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds, devices=devices)


def check_model(model: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    """Refuses a model whose width the mesh's fsdp axis, possibly the devices that were left, does not divide."""
    ways = mesh.shape["fsdp"]
    if model.embed_dim % ways:
        raise UserError(f"model.embed_dim={model.embed_dim} cannot be divided over fsdp={ways} devices; set sharding.fsdp")


def check_batch(stage: StageConfig, mesh: jax.sharding.Mesh, where: str) -> None:
    """Refuses a global batch whose micro-batches the mesh cannot spread evenly."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    micro = stage.batch_size // stage.accumulation
    if micro % ways:
        raise UserError(
            f"{where}: a micro-batch of {micro} rows (batch_size={stage.batch_size} / accumulation={stage.accumulation}) "
            f"cannot be divided over data × fsdp = {ways} devices; use a multiple of {ways}"
        )


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process's devices hold, ascending."""
    slices = jax.NamedSharding(mesh, jax.P(ROWS)).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in slices if index is not None for row in range(*index[0].indices(batch_size))})
