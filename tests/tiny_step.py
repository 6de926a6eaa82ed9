"""A tiny model and its train step on meshes of fake devices, for test_step.py and test_one_program.py.

Layers are scanned, as each program here takes seconds to compile and none to run.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax import masking
from mlm_jax.config import (
    ComputeConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    ShardingConfig,
    StageConfig,
    TrainConfig,
)
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import LossSums, Term
from mlm_jax.objectives.mlm import MaskedLM
from mlm_jax.sharding import ROWS, make_mesh
from mlm_jax.train.optimizer import learning_rate, make_optimizer
from mlm_jax.train.state import init_state
from mlm_jax.train.step import make_train_step

BATCH, LENGTH, VOCAB, LOG_EVERY = 32, 24, 256, 4
SLOTS = masking.num_slots(LENGTH, 0.15)
CFG = Config(
    name="tiny",
    model=ModelConfig(vocab_size=VOCAB, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=64, max_positions=LENGTH),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, ema_decay=0.9),
    stages=(StageConfig(steps=100, seq_len=LENGTH, batch_size=BATCH),),
    compute=ComputeConfig(layers="scan"),
    train=TrainConfig(log_every=LOG_EVERY),
)
TABLES = masking.VocabTables.from_arrays(
    mask_id=4, special_ids=np.arange(5), word_starts=np.ones(VOCAB - 6, bool), vocab_size=VOCAB
)
MESHES = {
    "1": ShardingConfig(data=1),
    "8": ShardingConfig(),
    "zero": ShardingConfig(zero=True),
    "fsdp": ShardingConfig(data=1, fsdp=8),
    "2x4": ShardingConfig(data=2, fsdp=4),
    "4x2": ShardingConfig(data=4, fsdp=2),
    "2x2x2": ShardingConfig(data=2, fsdp=2, tensor=2),
    "sliced": ShardingConfig(slice=2),  # × data=4
    "sliced zero": ShardingConfig(slice=2, zero=True),
    "all": ShardingConfig(slice=1, data=2, fsdp=2, tensor=2, zero=True),
}
# Compiles in a fifth of the time, for speed that nothing here needs. jax 0.12 has no fusion emitters to turn off.
QUICK = {"xla_backend_optimization_level": 0}
QUICK |= {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 12) else {}
NAMES = MaskedLM.loss_names + MaskedLM.metric_names
BAD_LOSS, BAD_GRADIENT = 10_000, 20_000  # example ids at which `Spiky` breaks


@dataclasses.dataclass(frozen=True)
class Spiky(MaskedLM):
    """The objective, but for a loss that is NaN, or a gradient whose norm overflows, in batches with certain examples."""

    def loss(self, params, batch, keys, vocab) -> LossSums:
        sums = super().loss(params, batch, keys, vocab)
        is_bad_loss, is_bad_gradient = (batch["example_ids"][0] == bad for bad in (BAD_LOSS, BAD_GRADIENT))
        bias = jax.reshard(params["head"]["output_bias_V"], jax.P(None)).sum()
        extra = jnp.where(is_bad_loss, jnp.nan, 0.0) + jnp.where(is_bad_gradient, 3e38, 0.0) * (
            bias - jax.lax.stop_gradient(bias)
        )
        term = sums.losses["mlm"]
        return dataclasses.replace(sums, losses={"mlm": Term(term.sum + extra, term.weight)})


def make_rows(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of two segments with fills from none to all, so that no two devices have as much to predict."""
    rng = np.random.default_rng(seed)
    tokens, segment_ids = np.zeros((2, BATCH, LENGTH), np.int32)
    for row in range(BATCH):
        end = round(row * LENGTH / (BATCH - 1))
        if end < 4:
            continue
        middle = rng.integers(2, end - 1)
        for segment, (first, last) in enumerate([(0, middle), (middle, end)], start=1):
            tokens[row, first:last] = [2, *rng.integers(5, VOCAB - 6, last - first - 2), 3]
            segment_ids[row, first:last] = segment
    ids = rng.integers(0, 1000, BATCH).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segment_ids, "example_ids": ids, "epochs": np.full(BATCH, 2, np.int32)}


def with_places(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows as a step gives them to an objective."""
    return rows | {"places": np.arange(BATCH, dtype=np.float32) / BATCH}


def mesh_of(name: str) -> jax.sharding.Mesh:
    return make_mesh(MESHES[name], jax.devices()[: 1 if name == "1" else 8])


def on_devices(rows: dict[str, np.ndarray], mesh: jax.sharding.Mesh):
    return jax.device_put(rows, jax.NamedSharding(mesh, jax.P(ROWS)))


def tables_on(mesh: jax.sharding.Mesh):
    return jax.device_put(TABLES, jax.NamedSharding(mesh, jax.P()))


def objective(cfg: Config = CFG, cls=MaskedLM) -> MaskedLM:
    return cls(cfg, Compute.resolve(cfg.compute))


@functools.cache
def parameters():
    """The same parameters for every mesh, on the host, larger than initial ones so that every gradient matters."""
    with jax.set_mesh(mesh_of("1")):
        shapes = jax.eval_shape(objective().init, jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        mean = float("scale" in jax.tree_util.keystr(path))
        return rng.normal(mean, 0.1, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def parameters_on(mesh: jax.sharding.Mesh):
    shapes = jax.eval_shape(objective().init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf, like: jax.device_put(leaf, jax.NamedSharding(mesh, like.sharding.spec)), parameters(), shapes
    )


class Instruction(NamedTuple):
    """A line of HLO: `result = kind(operands), attributes`."""

    result: str
    kind: str
    rest: str


INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([a-z][\w-]*?)(?:-start)?\((.*)")


def shapes_of(text: str) -> list[tuple[int, ...]]:
    """The shapes of all arrays that are named in a piece of HLO."""
    found = re.findall(r"\b(?:pred|[suf]\d+|bf16)\[([\d,]*)\]", text)
    return [tuple(int(size) for size in shape.split(",") if size) for shape in found]


class Program:
    """A jitted step and what it is called with."""

    def __init__(self, mesh_name: str, accumulation: int = 1, cls=MaskedLM, cfg: Config = CFG):
        self.mesh_name, self.mesh, self.traces = mesh_name, mesh_of(mesh_name), 0
        self.optimizer, schedule = make_optimizer(cfg), learning_rate(cfg)
        self.objective = objective(cfg, cls)

        def counted(step):
            self.traces += 1
            return schedule(step)

        stage = dataclasses.replace(cfg.stages[0], accumulation=accumulation)
        self.step = make_train_step(cfg, stage, self.objective, self.optimizer, counted)

    @functools.cached_property
    def _create(self):
        def create(params):
            names = self.objective.loss_names + self.objective.metric_names
            return init_state(params, self.optimizer, ema=True, names=names, zero=MESHES[self.mesh_name].zero)

        return jax.jit(create, compiler_options=QUICK)

    def state(self):
        return self._create(parameters_on(self.mesh))

    def batch(self, seed: int = 0, **changes):
        return on_devices(make_rows(seed) | changes, self.mesh)

    @functools.cached_property
    def compiled(self):
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.state(), self.batch(), tables_on(self.mesh)).compile(QUICK)

    @functools.cached_property
    def instructions(self) -> list[Instruction]:
        """What the compiled program consists of."""
        lines = self.compiled.as_text().splitlines()
        return [Instruction(*match.groups()) for match in map(INSTRUCTION.match, lines) if match]

    def results(self, kind: str) -> list[tuple[int, ...]]:
        """The shapes of everything that instructions of this kind result in."""
        return [shape for each in self.instructions if each.kind == kind for shape in shapes_of(each.result)]

    @functools.cached_property
    def sizes(self) -> set[int]:
        """The numbers of elements that its arrays have."""
        return {math.prod(shape) for each in self.instructions for shape in shapes_of(each.result)}


@functools.cache
def spiky() -> Program:
    """A program on one device, with losses that can be broken."""
    return Program("1", cls=Spiky)
