"""One program: what a step compiles to, read in XLA's own text for one device and for meshes of eight."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_step import (
    BATCH,
    LENGTH,
    MESHES,
    QUICK,
    SLOTS,
    VOCAB,
    Program,
    make_rows,
    mesh_of,
    objective,
    on_devices,
    parameters,
    parameters_on,
    shapes_of,
    spiky,
    tables_on,
)

from mlm_jax.objectives.scoring import score_targets


@pytest.fixture
def one():
    """A mesh of one device, set."""
    mesh = mesh_of("1")
    with jax.set_mesh(mesh):
        yield mesh


@functools.cache
def program(mesh_name: str, accumulation: int) -> Program:
    return Program(mesh_name, accumulation)


def test_steps_are_traced_and_compiled_once_and_need_nothing_from_the_host(one):
    run = spiky()
    state, vocab = run.state(), tables_on(one)
    for step in range(4):
        batch = run.batch(step)
        with jax.transfer_guard("disallow"):
            state, metrics = run.step(state, batch, vocab)
    assert (run.traces, run.step._cache_size()) == (1, 1)
    assert int(state.step) == 4 and np.isfinite(metrics["grad_norm"])
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match=r"[Dd]isallowed host-to-device transfer"):
        jnp.add(make_rows()["tokens"], 1)


@pytest.mark.parametrize(("mesh_name", "accumulation"), [("1", 1), ("1", 2), ("8", 1), ("2x2x2", 1)])
def test_no_array_has_logits_of_every_position(mesh_name, accumulation):
    run, tensor = program(mesh_name, accumulation), MESHES[mesh_name].tensor
    rows = BATCH // accumulation // (run.mesh.size // tensor)  # on one device at a time
    assert rows * SLOTS * VOCAB // tensor in run.sizes  # those of the predicted positions
    assert max(run.sizes) < rows * LENGTH * VOCAB // tensor


def test_that_check_would_find_them(one):
    params, built = parameters_on(one), objective()

    @functools.partial(jax.jit, compiler_options=QUICK)
    def everywhere(params, tokens, segment_ids):
        positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None], tokens.shape)
        return score_targets(built.logits(params, tokens, segment_ids, positions), tokens)[0].mean()

    batch = on_devices(make_rows(), one)
    text = everywhere.lower(params, batch["tokens"], batch["segment_ids"]).compile().as_text()
    assert max(math.prod(shape) for shape in shapes_of(text)) >= BATCH * LENGTH * VOCAB


@pytest.mark.parametrize(("mesh_name", "accumulation"), [("1", 1), ("1", 2), ("8", 1), ("fsdp", 1), ("2x2x2", 1)])
def test_the_program_never_calls_the_host(mesh_name, accumulation):
    instructions = program(mesh_name, accumulation).instructions
    assert len(instructions) > 500
    assert not {each.kind for each in instructions} & {"infeed", "outfeed", "send", "recv"}
    targets = {target for each in instructions for target in re.findall(r'custom_call_target="([^"]*)"', each.rest)}
    assert not [target for target in targets if re.search("python|callback|host", target, re.IGNORECASE)]


# What each mesh has to communicate, and nothing else: gradients and sums over rows; parameters that fsdp or ZeRO has
# divided, and their gradients; partial results of layers that tensor has split.
COLLECTIVES = {
    "1": set(),
    "8": {"all-reduce"},
    "sliced": {"all-reduce"},
    "zero": {"all-reduce", "all-gather", "reduce-scatter"},
    "sliced zero": {"all-reduce", "all-gather", "reduce-scatter"},
    "fsdp": {"all-reduce", "all-gather", "reduce-scatter"},
    "2x2x2": {"all-reduce", "all-gather", "reduce-scatter"},
}
KINDS = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast"}


@pytest.mark.parametrize("mesh_name", COLLECTIVES)
def test_the_collectives_of_each_mesh(mesh_name):
    assert {each.kind for each in program(mesh_name, 1).instructions} & KINDS == COLLECTIVES[mesh_name]


def parameter_sizes(ways: int = 1) -> collections.Counter[int]:
    return collections.Counter(leaf.size // ways for leaf in jax.tree.leaves(parameters()))


def exchanged(kind: str, mesh_name: str, accumulation: int) -> collections.Counter[int]:
    """The sizes of what such collectives result in on each device, but for sums of a few numbers."""
    found = collections.Counter(map(math.prod, program(mesh_name, accumulation).results(kind)))
    assert found.pop(1, 0) < 40  # the loss's, and under ZeRO one for each parameter's part of the norm
    return found


@pytest.mark.parametrize(("mesh_name", "accumulation"), [("8", 1), ("8", 2), ("sliced", 1)])
def test_data_parallel_devices_exchange_each_gradient_once_and_a_few_sums(mesh_name, accumulation):
    """Neither once a layer, nor once a micro-batch, nor once for each use of the tied table."""
    assert exchanged("all-reduce", mesh_name, accumulation) == parameter_sizes()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_zero_gathers_parameters_and_scatters_gradients_once_a_step(accumulation):
    assert exchanged("all-gather", "zero", accumulation) == parameter_sizes()
    assert exchanged("reduce-scatter", "zero", accumulation) == parameter_sizes(8)
    assert not exchanged("all-reduce", "zero", accumulation)


def test_only_parts_of_gradients_travel_between_slices():
    assert exchanged("reduce-scatter", "sliced zero", 1) == parameter_sizes(4)
    assert exchanged("all-reduce", "sliced zero", 1) == parameter_sizes(4)


def test_zero_divides_the_whole_state():
    with jax.set_mesh(mesh_of("zero")):
        state = program("zero", 1).state()
    for leaf in jax.tree.leaves((state.params, state.opt_state, state.ema)):
        assert leaf.ndim == 0 or leaf.addressable_shards[0].data.size == leaf.size / 8, leaf.shape


def test_sharded_parameters_are_gathered_and_activations_are_not():
    shapes = program("fsdp", 1).results("all-gather")
    weights = {leaf.size for leaf in jax.tree.leaves(parameters())}
    weights |= {leaf.size // 2 for leaf in jax.tree.leaves(parameters()["encoder"]["layers"])}  # one layer's
    assert shapes and {math.prod(shape) for shape in shapes} <= weights


def test_micro_batches_are_weighed_by_masking_alone():
    # The pass that counts predictions before the first backward pass must not compute the model a second time.
    dots = [len(program("1", accumulation).results("dot")) for accumulation in (1, 2)]
    assert dots[0] == dots[1] > 10


def test_every_array_of_the_state_is_updated_in_place():
    header = program("1", 1).compiled.as_text().split("\n", 1)[0]
    with jax.set_mesh(mesh_of("1")):
        leaves = jax.tree.leaves(program("1", 1).state())
    assert len(re.findall(r"(?:may|must)-alias", header)) == len(leaves) > 50
