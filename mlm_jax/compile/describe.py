"""A compiled step described: memory by kind, collectives, and the estimated time, in JSON's types."""

from typing import Any

from mlm_jax import flops
from mlm_jax.compile.estimate import Timeline, estimate_step
from mlm_jax.compile.program import Program, attention_of, does_not_fit
from mlm_jax.compile.topology import Topology
from mlm_jax.config import Config, StageConfig
from mlm_jax.masking import num_slots


def describe(cfg: Config, stage_index: int, topology: Topology, program: Program) -> dict[str, Any]:
    """The findings in JSON's types, as `compile.table` shows them.

    Raises:
        DoesNotFit: the program needs more memory than there is, which XLA's compiler for GPUs does not mind.
    """
    stage, compute, memory = cfg.stages[stage_index], program.objective.compute, program.memory()
    data = sum(memory.values()) - memory["program"]
    if data > topology.chip.hbm_bytes:
        raise does_not_fit(data, topology.chip.hbm_bytes)
    device = topology.devices[0]
    return {
        "config": cfg.name,
        "stage": stage_index,
        **{name: getattr(stage, name) for name in ("batch_size", "seq_len", "accumulation")},
        "topology": topology.name,
        "device": device.device_kind,
        "num_devices": len(topology.devices),
        "mesh": dict(program.mesh.shape),
        "zero": cfg.sharding.zero,
        "parameters": program.num_parameters,
        "dtype": compute.dtype.name,
        "layers": "scan" if compute.scan_layers else "unroll",
        "remat": compute.remat,
        "attention": attention_of(cfg, stage_index, compute, program.mesh),
        "compile_seconds": program.compile_seconds,
        "memory": {"kinds": memory, "total": sum(memory.values()), "limit": topology.chip.hbm_bytes},
        **_estimate(cfg, stage, topology, program),
    }


def _estimate(cfg: Config, stage: StageConfig, topology: Topology, program: Program) -> dict[str, Any]:
    line = estimate_step(program.compiled.as_text(), program.mesh, topology)
    # Full rows of one segment each, as `bench` makes them up.
    per_token = program.objective.flops_per_token(stage.seq_len, predicted_share(cfg, stage))
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


def predicted_share(cfg: Config, stage: StageConfig) -> float:
    """The share of its tokens that a row predicts."""
    if cfg.objective == "diffusion":
        most = cfg.diffusion.scored_share
        return most - most**2 / 2  # the mean of rates from 0 to 1, each at most `scored_share`
    masked = num_slots(stage.seq_len, cfg.mask_rate(stage)) / stage.seq_len
    causal = cfg.hybrid.causal_share if cfg.objective == "hybrid" else 0.0
    return causal + (1.0 - causal) * masked


def _groups(line: Timeline) -> dict[str, dict[str, float]]:
    return {
        name: {
            "milliseconds": 1e3 * seconds,
            "backward": 1e3 * line.backward[name],
            "matrix_products": 1e3 * line.products[name],
        }
        for name, seconds in sorted(line.groups.items(), key=lambda item: -item[1])
    }
