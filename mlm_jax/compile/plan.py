"""`compile --plan`: the sensible ways to execute a stage on a topology, compiled, ranked by their estimate.

Mesh, micro-batches, rematerialisation and scan change how a step is computed, not what; so a plan is a list of overrides.
Compiling takes minutes, so arithmetic first drops what cannot fit and puts what promises most at the head of the list.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from mlm_jax.compile.describe import describe, predicted_share
from mlm_jax.compile.program import DoesNotFit, compile_step, count_parameters
from mlm_jax.compile.topology import Topology
from mlm_jax.config import Config, ModelConfig, ShardingConfig, StageConfig
from mlm_jax.errors import UserError
from mlm_jax.model.blocks import keys_of_block
from mlm_jax.model.encoder import Compute
from mlm_jax.sharding import make_mesh

logger = logging.getLogger(__name__)

# Bytes that a layer keeps of a token for the backward pass, as multiples of its width, where a kernel attends; by the
# compiler's own plans of BERT-base, RoBERTa-large and NeoBERT. Without a kernel about ten bytes more are kept for each pair
# of a head's positions.
KEPT = {
    ("none", "scan"): 65,
    ("none", "unroll"): 30,
    ("dots", "scan"): 28,
    ("dots", "unroll"): 24,
    ("full", "scan"): 4,
    ("full", "unroll"): 4,
}
LOGIT_BYTES = 8  # of each word at each predicted position, with its gradient
SCORE_BYTES = 10
# How much longer a step takes, guessed, for the order in which candidates are compiled; no more hangs on these.
REMAT_COST = {"none": 1.0, "dots": 1.1, "full": 1.3}
LAYERS_COST = {"unroll": 1.0, "scan": 1.15}
MICRO_BATCH_COST = 1.02  # for each doubling of their number
ZERO_GAIN, FSDP_COST, TENSOR_COST = 0.98, 1.05, 1.2
TOLERANCE = 1.2  # arithmetic that is over the limit by so much is believed


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to execute a stage."""

    sharding: ShardingConfig
    accumulation: int
    remat: str
    layers: str

    def apply(self, cfg: Config, stage_index: int) -> Config:
        """The config that executes the stage like this."""
        stages = list(cfg.stages)
        stages[stage_index] = dataclasses.replace(stages[stage_index], accumulation=self.accumulation)
        compute = dataclasses.replace(cfg.compute, remat=self.remat, layers=self.layers)
        return dataclasses.replace(cfg, stages=tuple(stages), compute=compute, sharding=self.sharding)

    def overrides(self, stage_index: int) -> list[str]:
        """The command line's flags for it."""
        fields = {f"sharding.{name}": value for name, value in dataclasses.asdict(self.sharding).items()}
        fields |= {f"stages[{stage_index}].accumulation": self.accumulation}
        fields |= {"compute.remat": self.remat, "compute.layers": self.layers}
        return [f"--config.{name}={value}" for name, value in fields.items()]


def own_candidate(cfg: Config, stage_index: int, devices: Sequence[jax.Device]) -> Candidate | None:
    """How the config itself executes the stage; None where its mesh does not suit the devices."""
    try:
        sizes = make_mesh(cfg.sharding, devices).shape
    except UserError:
        return None
    compute = Compute.resolve(cfg.compute, devices[0])
    sharding = ShardingConfig(**sizes, zero=cfg.sharding.zero)
    layers = "scan" if compute.scan_layers else "unroll"
    return Candidate(sharding, cfg.stages[stage_index].accumulation, compute.remat, layers)


def enumerate_candidates(cfg: Config, stage_index: int, num_devices: int, num_slices: int) -> Iterator[Candidate]:
    """All combinations that divide the devices and the batch evenly."""
    stage = cfg.stages[stage_index]
    for sharding in _shardings(list(cfg.networks.values()), num_devices, num_slices):
        rows, rest = divmod(stage.batch_size, num_devices // sharding.tensor)
        if rest:
            continue
        for accumulation in (count for count in range(1, rows + 1) if rows % count == 0):
            for remat, layers in KEPT:
                yield Candidate(sharding, accumulation, remat, layers)


def _shardings(models: Sequence[ModelConfig], num_devices: int, num_slices: int) -> Iterator[ShardingConfig]:
    """Those that divide every network. Sizes are written out, so that a plan means the same wherever it is read."""
    inside = num_devices // num_slices
    widths = [size for model in models for size in (model.embed_dim, model.table_dim)]
    for tensor in (size for size in (1, 2, 4, 8) if inside % size == 0):
        if any(size % tensor for model in models for size in (model.num_heads, model.mlp_dim, model.vocab_size)):
            continue
        for fsdp in sorted({1, min(8, inside // tensor), inside // tensor}):
            if (inside // tensor) % fsdp or any(width % fsdp for width in widths):
                continue
            data = inside // tensor // fsdp
            yield ShardingConfig(slice=num_slices, data=data, fsdp=fsdp, tensor=tensor)
            if data > 1:
                yield ShardingConfig(slice=num_slices, data=data, fsdp=fsdp, tensor=tensor, zero=True)


def needed_bytes(
    candidate: Candidate, cfg: Config, stage: StageConfig, parameters: int, devices: int, attention: str
) -> float:
    """About what a device needs: parameters, moments and average, their gradient and copy, what is kept of rows, logits."""
    sharding, model = candidate.sharding, cfg.model
    divided = sharding.fsdp * sharding.tensor
    held = 4 * (3 + (cfg.optimizer.ema_decay > 0)) / (divided * (sharding.data if sharding.zero else 1))
    # Whole along the rows' axes: the copy in the compute dtype and the gradient's sum.
    state = parameters * (held + (2 + 4) / (divided if sharding.fsdp > 1 else sharding.tensor))
    tokens = stage.batch_size * stage.seq_len * sharding.tensor / (devices * candidate.accumulation)
    width = model.embed_dim + (2 if model.gated_mlp else 1) * model.mlp_dim
    kept = KEPT[candidate.remat, candidate.layers] * width / 5 / sharding.tensor
    if attention == "xla" and candidate.remat == "none":
        local = sum(map(model.is_local, range(model.num_layers))) / model.num_layers
        keys = (1 - local) * stage.seq_len + local * min(stage.seq_len, keys_of_block(model.local_window))
        kept += SCORE_BYTES * model.num_heads * keys / sharding.tensor
    one_layer = KEPT["none", "unroll"] * model.embed_dim
    share = predicted_share(cfg, stage)
    if cfg.objective in ("diffusion", "hybrid") and cfg.compute.head_chunk:
        share = min(share, cfg.compute.head_chunk / stage.seq_len)
    logits = LOGIT_BYTES * share * model.vocab_size / sharding.tensor
    return state + tokens * (model.num_layers * kept + one_layer + logits)


def guessed_cost(candidate: Candidate) -> float:
    """Relative to others: what promises most comes first."""
    sharding = candidate.sharding
    cost = REMAT_COST[candidate.remat] * LAYERS_COST[candidate.layers]
    cost *= MICRO_BATCH_COST ** math.log2(candidate.accumulation)
    cost *= ZERO_GAIN if sharding.zero else 1.0
    cost *= FSDP_COST if sharding.fsdp > 1 else 1.0
    return cost * TENSOR_COST ** math.log2(sharding.tensor)


def shortlist(
    cfg: Config,
    stage_index: int,
    topology: Topology,
    parameters: int,
    attention: str,
    limit: int,
    *,
    without: Candidate | None = None,
) -> list[tuple[Candidate, float]]:
    """The candidates worth compiling, the most promising first, each with the bytes that arithmetic gives it."""
    devices, stage = len(topology.devices), cfg.stages[stage_index]
    found = []
    for candidate in enumerate_candidates(cfg, stage_index, devices, topology.num_slices):
        needed = needed_bytes(candidate, cfg, stage, parameters, devices, attention)
        if needed <= TOLERANCE * topology.chip.hbm_bytes and candidate != without:
            found.append((candidate, needed))
    return sorted(found, key=lambda pair: (guessed_cost(pair[0]), pair[1]))[:limit]


def run_plan(cfg: Config, stage_index: int, topology: Topology, max_candidates: int) -> dict[str, Any]:
    """Compiles the config as it is and the shortlist, and ranks them by estimated time.

    Raises:
        UserError: nothing fits.
    """
    parameters, attention = count_parameters(cfg, stage_index, topology.devices)
    own = own_candidate(cfg, stage_index, topology.devices)
    chosen = shortlist(cfg, stage_index, topology, parameters, attention, max_candidates, without=own)
    tried = explore(cfg, stage_index, chosen, lambda cfg: _attempt(cfg, stage_index, topology))
    if not tried[0]["fits"]:
        raise UserError(
            f"{cfg.name} fits {topology.name} in none of {len(tried)} ways: {tried[0]['reason']}; or try more than "
            f"--max-candidates={max_candidates}"
        )
    return {
        "config": cfg.name,
        "stage": stage_index,
        "topology": topology.name,
        "overrides": tried[0]["overrides"],
        "best": tried[0]["result"],
        "candidates": [{name: value for name, value in one.items() if name != "result"} for one in tried],
    }


def explore(
    cfg: Config, stage_index: int, chosen: list[tuple[Candidate, float]], attempt: Callable[[Config], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Attempts the config as it is and each chosen candidate: the fastest first, what does not fit last.

    A candidate that needs more, by arithmetic, than one that did not fit is left out.

    Args:
        attempt: says whether a config `fits`, and then in how many `milliseconds`; and whether it is `too_large`.
    """
    tried: list[dict[str, Any]] = [{"overrides": []} | attempt(cfg)]
    too_large = math.inf
    for number, (candidate, needed) in enumerate(chosen, 1):
        overrides = candidate.overrides(stage_index)
        if needed >= too_large:
            logger.info("candidate %d of %d left out: it needs more than one that did not fit", number, len(chosen))
            continue
        logger.info("candidate %d of %d: %s", number, len(chosen), " ".join(overrides))
        tried.append({"overrides": overrides} | attempt(candidate.apply(cfg, stage_index)))
        if tried[-1]["too_large"]:
            too_large = min(too_large, needed)
    return sorted(tried, key=lambda one: one["milliseconds"] if one["fits"] else math.inf)


def _attempt(cfg: Config, stage_index: int, topology: Topology) -> dict[str, Any]:
    """Compiles one config."""
    try:
        result = describe(cfg, stage_index, topology, compile_step(cfg, stage_index, topology.devices))
    except (UserError, jax.errors.JaxRuntimeError) as error:  # the compiler's own failures cost one candidate, not the plan
        logger.info("  %s", error)
        return {"fits": False, "too_large": isinstance(error, DoesNotFit), "reason": str(error).splitlines()[0]}
    estimate = result["estimate"]
    logger.info("  estimate %.2f ms, %.2f GiB", estimate["milliseconds"], result["memory"]["total"] / 2**30)
    return {
        "fits": True,
        "too_large": False,
        "milliseconds": estimate["milliseconds"],
        "mfu": estimate["mfu"],
        "memory": result["memory"]["total"],
        "compile_seconds": result["compile_seconds"],
        "result": result,
    }
