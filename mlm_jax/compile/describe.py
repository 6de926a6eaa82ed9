"""A compiled step described: memory by kind, collectives, and the estimated time, in JSON's types."""

from typing import Any

from mlm_jax import flops
from mlm_jax.compile.estimate import Timeline, estimate_step
from mlm_jax.compile.program import Program, compile_step
from mlm_jax.compile.topology import Topology, open_topology
from mlm_jax.config import Config, StageConfig
from mlm_jax.errors import UserError
from mlm_jax.masking import num_slots
from mlm_jax.model.attention import choose_implementation


def run_compile(cfg: Config, topology_name: str, *, stage_index: int = 0, slices: int = 1) -> dict[str, Any]:
    """Compiles one stage's step and describes it.

    Returns:
        The findings in JSON's types, as `compile.table` shows them.

    Raises:
        UserError: an argument is out of range, or the topology does not exist.
        DoesNotFit: the step needs more memory than a chip has.
    """
    if not 0 <= stage_index < len(cfg.stages):
        raise UserError(f"--stage={stage_index}: {cfg.name} has {len(cfg.stages)} stage(s), counted from 0")
    topology = open_topology(topology_name, slices)
    return describe(cfg, stage_index, topology, compile_step(cfg, stage_index, topology.devices))


def describe(cfg: Config, stage_index: int, topology: Topology, program: Program) -> dict[str, Any]:
    """What `run_compile` returns."""
    stage, compute, memory = cfg.stages[stage_index], program.compute, program.memory()
    device = topology.devices[0]
    attention = choose_implementation(compute.attention, cfg.model, stage.seq_len, compute.platform, compute.dtype)
    return {
        "config": cfg.name,
        "stage": stage_index,
        **{name: getattr(stage, name) for name in ("batch_size", "seq_len", "accumulation")},
        "topology": topology.name,
        "device": device.device_kind,
        "num_devices": len(topology.devices),
        "mesh": dict(program.mesh.shape),
        "parameters": program.num_parameters,
        "dtype": compute.dtype.name,
        "layers": "scan" if compute.scan_layers else "unroll",
        "remat": compute.remat,
        "attention": attention,
        "compile_seconds": program.compile_seconds,
        "memory": {"kinds": memory, "total": sum(memory.values()), "limit": topology.chip.hbm_bytes},
        **_estimate(cfg, stage, topology, program),
    }


def _estimate(cfg: Config, stage: StageConfig, topology: Topology, program: Program) -> dict[str, Any]:
    line = estimate_step(program.compiled.as_text(), program.mesh, topology)
    # Full rows of one segment each, as `bench` makes them up.
    predicted = num_slots(stage.seq_len, cfg.mask_rate(stage)) / stage.seq_len
    per_token = flops.train_flops_per_token(cfg.model, stage.seq_len, predicted)
    tokens = stage.batch_size * stage.seq_len
    devices = topology.devices
    return {
        "tokens": tokens,
        "flops_per_token": per_token,
        "estimate": {
            "method": "estimate" if topology.chip.flops_per_cycle else "roofline",
            "milliseconds": 1e3 * line.seconds,
            "tokens_per_second": tokens / line.seconds,
            "mfu": flops.mfu(tokens / line.seconds, per_token, len(devices), devices[0]),
            "groups": _groups(line),
            "kernel_milliseconds": 1e3 * line.kernels,
            "kernel_fill": topology.chip.fill(cfg.model.head_dim),
            "roofline_milliseconds": 1e3 * line.roofline,
            "unknown": dict(line.unknown),
        },
        "collectives": [
            {
                "kind": found.kind,
                "axes": found.axes,
                "count": count,
                "bytes": found.bytes * count,
                "milliseconds": 1e3 * found.seconds * count,
            }
            for found, count in sorted(line.collectives.items(), key=lambda item: -item[0].seconds * item[1])
        ],
    }


def _groups(line: Timeline) -> dict[str, dict[str, float]]:
    return {
        name: {
            "milliseconds": 1e3 * seconds,
            "backward": 1e3 * line.backward[name],
            "matrix_products": 1e3 * line.products[name],
        }
        for name, seconds in sorted(line.groups.items(), key=lambda item: -item[1])
    }
