"""A stage's train step compiled ahead of time for devices that are not here, from the functions that training uses."""

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mlm_jax.config import Config, ShardingConfig, StageConfig
from mlm_jax.errors import UserError
from mlm_jax.masking import VocabTables
from mlm_jax.model.attention import choose_implementation
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import Objective, make_objective
from mlm_jax.sharding import ROWS, check_batch, check_networks, make_mesh
from mlm_jax.train.optimizer import learning_rate, make_optimizer
from mlm_jax.train.state import TrainState, init_state
from mlm_jax.train.step import make_train_step


class DoesNotFit(UserError):
    """The compiler found no plan within the device's memory. `needed_bytes` is its figure, where it gave one."""

    def __init__(self, message: str, needed_bytes: float | None):
        super().__init__(message)
        self.needed_bytes = needed_bytes


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step and the shapes of its state."""

    mesh: jax.sharding.Mesh
    objective: Objective
    state: TrainState  # of ShapeDtypeStruct, each with its sharding
    compiled: Any
    compile_seconds: float

    def memory(self) -> dict[str, int]:
        """Bytes of one device by kind. They add up to what the program needs at its peak."""
        planned = self.compiled.memory_analysis()
        kinds = {
            "parameters": device_bytes(self.state.params),
            "optimizer": device_bytes(self.state.opt_state),
            "ema": device_bytes(self.state.ema),
        }
        # With what the tiles of the arguments' layouts leave empty.
        kinds["batch and padding"] = max(0, planned.argument_size_in_bytes - sum(kinds.values()))
        kinds["results"] = planned.output_size_in_bytes - planned.alias_size_in_bytes
        kinds["activations and temporaries"] = planned.temp_size_in_bytes
        kinds["program"] = planned.generated_code_size_in_bytes
        return kinds

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))


def compile_step(cfg: Config, stage_index: int, devices: Sequence[jax.Device]) -> Program:
    """Compiles for the platform that the devices are of.

    Raises:
        UserError: the config does not fit the devices' number.
        DoesNotFit: it does not fit their memory.
    """
    stage = cfg.stages[stage_index]
    mesh = make_mesh(cfg.sharding, devices)
    check_networks(cfg, mesh)
    check_batch(stage, mesh, f"stages[{stage_index}]")
    with jax.set_mesh(mesh):
        compute = Compute.resolve(cfg.compute, devices[0])
        objective = make_objective(cfg, compute, stage_index)
        optimizer = make_optimizer(cfg)
        state = abstract_state(cfg, objective, optimizer)
        batch, vocab = abstract_batch(cfg, stage), abstract_vocab(cfg.model.vocab_size)
        step: Any = make_train_step(cfg, stage, objective, optimizer, learning_rate(cfg))
        began = time.perf_counter()
        try:
            compiled = step.lower(state, batch, vocab).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise out_of_memory(str(error)) from error
    return Program(mesh, objective, state, compiled, time.perf_counter() - began)


def count_parameters(cfg: Config, stage_index: int, devices: Sequence[jax.Device]) -> tuple[int, str]:
    """The model's size, and the attention that a stage of it takes on these devices, without compiling anything."""
    compute = Compute.resolve(cfg.compute, devices[0])
    objective = make_objective(cfg, compute, stage_index)
    mesh = make_mesh(ShardingConfig(), devices[:1])
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: objective.init(jax.random.key(0)))  # no key is made: these devices cannot compute
    return sum(leaf.size for leaf in jax.tree.leaves(shapes)), attention_of(cfg, stage_index, compute, mesh)


def attention_of(cfg: Config, stage_index: int, compute: Compute, mesh: jax.sharding.Mesh) -> str:
    """The implementation of attention that a stage takes on a mesh, which decides how many heads a device has."""
    length = cfg.stages[stage_index].seq_len + cfg.model.num_patches
    causal = cfg.objective == "hybrid"
    with jax.set_mesh(mesh):
        return choose_implementation(
            compute.attention, cfg.model, length, compute.platform, compute.dtype, causal_rows=causal
        )


def abstract_state(cfg: Config, objective: Objective, optimizer: Any) -> TrainState:
    """The state's shapes on the current mesh."""

    def create() -> TrainState:
        params = objective.init(jax.random.key(cfg.seed))
        names = (*objective.loss_names, *objective.metric_names)
        return init_state(params, optimizer, ema=cfg.optimizer.ema_decay > 0, names=names, zero=cfg.sharding.zero)

    return jax.tree.map(_placed, jax.eval_shape(jax.jit(create)))


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    spec = jax.P() if leaf.sharding is None else leaf.sharding.spec  # scalars carry none
    return _struct(leaf.shape, leaf.dtype, spec)


def _struct(shape: tuple[int, ...], dtype: Any, spec: jax.P) -> jax.ShapeDtypeStruct:
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def abstract_batch(cfg: Config, stage: StageConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch of the stage."""
    rows, side = (stage.batch_size,), cfg.model.image_size
    shapes = {"tokens": (*rows, stage.seq_len), "segment_ids": (*rows, stage.seq_len), "example_ids": rows, "epochs": rows}
    if side:
        shapes |= {"matches": rows, "images": (*rows, side, side, 3)}
    dtypes = {name: np.uint8 if name == "images" else np.int32 for name in shapes}
    return {name: _struct(shape, dtypes[name], jax.P(ROWS)) for name, shape in shapes.items()}


def abstract_vocab(vocab_size: int, special_ids: int = 5) -> VocabTables:
    """The tables of a vocabulary with so many special ids, as our own tokenizers have them."""
    tables = VocabTables.from_arrays(
        mask_id=special_ids - 1,
        special_ids=np.arange(special_ids),
        word_starts=np.ones(vocab_size, bool),
        vocab_size=vocab_size,
    )
    return jax.tree.map(lambda array: _struct(array.shape, array.dtype, jax.P()), tables)


def device_bytes(tree: Any) -> int:
    """Bytes of one device's shards of a pytree of arrays or their shapes."""
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


ADVICE = "more stages[…].accumulation, compute.remat=dots, fewer rows, sharding.zero or fsdp, or more chips"


def does_not_fit(needed: float, limit: float) -> DoesNotFit:
    """The refusal of a step that needs more bytes than there are."""
    return DoesNotFit(
        f"the step does not fit: it needs {needed / 2**30:.2f} GiB and a chip has {limit / 2**30:.2f} GiB. Try {ADVICE}",
        needed,
    )


def out_of_memory(message: str) -> DoesNotFit:
    """The compiler's lack of memory, with its own figures."""
    used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message)
    total = re.search(r"total memory required[^(]*\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", message)
    figures = used or total
    if not figures:
        return DoesNotFit(f"the step does not fit a chip's memory: {message.splitlines()[0][:300]}. Try {ADVICE}", None)
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    needed, limit = (float(figures[index]) * scale[figures[index + 1]] for index in (1, 3))
    return does_not_fit(needed, limit)
