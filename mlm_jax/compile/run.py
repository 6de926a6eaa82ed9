"""One run of the `compile` verb: a stage on a topology, a plan for it, or a table of recipes."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from mlm_jax.compile.describe import describe
from mlm_jax.compile.plan import run_plan
from mlm_jax.compile.program import compile_step
from mlm_jax.compile.topology import EXAMPLES, open_topology
from mlm_jax.config import Config
from mlm_jax.errors import UserError

logger = logging.getLogger(__name__)


def run_compile(
    cfg: Config,
    topology_name: str = "",
    *,
    stage_index: int = 0,
    slices: int = 1,
    rows_per_device: int | None = None,
    max_candidates: int = 0,
) -> dict[str, Any]:
    """Compiles one stage's step and describes it.

    Args:
        topology_name: default: the recipe's own.
        rows_per_device: of a micro-batch, in place of the stage's own global batch.
        max_candidates: above 0: plans, with so many ways to execute the stage beside the config's own.

    Returns:
        The findings in JSON's types, as `compile.table` shows them; of a plan, what `plan.run_plan` returns.

    Raises:
        UserError: an argument is out of range, or the topology does not exist.
        DoesNotFit: the step needs more memory than a chip has.
    """
    if not 0 <= stage_index < len(cfg.stages):
        raise UserError(f"--stage={stage_index}: {cfg.name} has {len(cfg.stages)} stage(s), counted from 0")
    if not topology_name and not cfg.reference_topology:
        raise UserError(f"{cfg.name} names no reference_topology; give --topology: {EXAMPLES}")
    topology = open_topology(topology_name or cfg.reference_topology, slices)
    if rows_per_device is not None:
        if rows_per_device < 1:
            raise UserError(f"--rows-per-device={rows_per_device} must be positive")
        stages = list(cfg.stages)
        rows = rows_per_device * len(topology.devices) // cfg.sharding.tensor * stages[stage_index].accumulation
        stages[stage_index] = dataclasses.replace(stages[stage_index], batch_size=rows)
        cfg = dataclasses.replace(cfg, stages=tuple(stages))
    if max_candidates:
        return run_plan(cfg, stage_index, topology, max_candidates)
    return describe(cfg, stage_index, topology, compile_step(cfg, stage_index, topology.devices))


def run_table(
    recipes: Sequence[Config],
    topologies: Sequence[str],
    stage_index: int | None = None,
    *,
    rows_per_device: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Every stage of every recipe, or one of each, on each topology or on the recipe's own; what cannot be has a `reason`.

    Recipes that name no topology are left out.
    """
    for cfg in recipes:
        if not topologies and not cfg.reference_topology:
            logger.info("%s names no reference_topology and is left out", cfg.name)
            continue
        for topology in topologies or [cfg.reference_topology]:
            for index in range(len(cfg.stages)) if stage_index is None else [stage_index]:
                try:
                    yield run_compile(cfg, topology, stage_index=index, rows_per_device=rows_per_device)
                except UserError as error:
                    yield {"config": cfg.name, "stage": index, "topology": topology, "reason": str(error)}
