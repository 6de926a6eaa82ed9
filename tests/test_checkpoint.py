"""Checkpoints: exact, readable on any mesh, and never the end of a run because the newest one is damaged."""

import functools
import gc
import logging
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlm_jax.config import ShardingConfig
from mlm_jax.errors import MachineError, UserError
from mlm_jax.sharding import make_mesh
from mlm_jax.train.checkpoint import Checkpoints, load_params
from mlm_jax.train.state import init_state
from mlm_jax.workdir import Workdir

OPTIMIZER = optax.adamw(1e-3)
SPECS = {"table_VD": jax.P("tensor", "fsdp"), "layers": {"kernel_NDF": jax.P(None, "fsdp", "tensor"), "bias_NF": jax.P()}}


# Reads that Orbax abandons when one array cannot be read may end, with an error that nobody awaits, after the test has.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(ShardingConfig(2, 2, 2))):
        yield
    gc.collect()


@functools.partial(jax.jit, static_argnames=("ema", "size"))
def create(*, ema: bool, size: int):
    shapes = {"table_VD": (size, 8), "layers": {"kernel_NDF": (3, 8, 4), "bias_NF": (3, 4)}}
    params = jax.tree.map(
        lambda shape, spec: jnp.zeros(shape, jnp.float32, out_sharding=spec),
        shapes,
        SPECS,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return init_state(params, OPTIMIZER, ema=ema, names=("mlm", "accuracy"))


def make_state(step: int = 0, *, ema: bool = True, size: int = 64):
    """A state in its shardings on the current mesh, with other numbers at every step, none of which is a round one."""
    rng = np.random.default_rng(step)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jax.device_put(np.full(leaf.shape, step, leaf.dtype), leaf.sharding)
        return jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, create(ema=ema, size=size))


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype and np.asarray(left).tobytes() == np.asarray(right).tobytes()


def save(workdir: Workdir, steps, *, keep: int = 5, **options) -> None:
    checkpoints = Checkpoints(workdir, keep=keep)
    for step in steps:
        checkpoints.save(make_state(step, **options), step)
    checkpoints.close()


def restore(workdir: Workdir, *, keep: int = 5, **options):
    checkpoints = Checkpoints(workdir, keep=keep)
    try:
        return checkpoints.restore(abstract(make_state(**options)))
    finally:
        checkpoints.close()


def steps_in(workdir: Workdir) -> list[int]:
    return sorted(int(path.name) for path in pathlib.Path(workdir.checkpoints).iterdir() if path.name.isdigit())


@pytest.fixture
def workdir(tmp_path) -> Workdir:
    return Workdir(tmp_path / "run")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> pathlib.Path:
    """A workdir with checkpoints of steps 1 and 2, to be copied."""
    path = tmp_path_factory.mktemp("written") / "run"
    with jax.set_mesh(make_mesh(ShardingConfig(2, 2, 2))):
        save(Workdir(path), [1, 2])
    return path


@pytest.fixture
def two(written, tmp_path) -> Workdir:
    shutil.copytree(written, tmp_path / "two")
    return Workdir(tmp_path / "two")


@pytest.mark.parametrize("ema", [True, False])
def test_a_state_comes_back_bit_for_bit_with_its_step(workdir, ema):
    save(workdir, [7], ema=ema)
    state, step = restore(workdir, ema=ema)
    assert step == 7 and int(state.step) == 7 and (state.ema is not None) == ema
    assert_same(state, make_state(7, ema=ema))
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(ema=ema)), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


def test_special_numbers_survive(workdir):
    state = make_state(1)
    odd = np.array([np.nan, -0.0, np.inf, 1e-45, np.finfo(np.float32).max, 0.1, -1.0, 2.0], np.float32)
    table = jax.device_put(np.tile(odd, (64, 1)), state.params["table_VD"].sharding)
    state.params["table_VD"] = table
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(state, 1, wait=True)
    checkpoints.close()
    assert np.asarray(restore(workdir)[0].params["table_VD"]).tobytes() == np.asarray(table).tobytes()


def test_what_is_saved_is_the_state_at_that_moment(workdir):
    """Though it is written later: the step that follows may take the state's memory."""
    checkpoints, state = Checkpoints(workdir, keep=2), make_state(1)
    overwrite = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    checkpoints.save(state, 1)
    overwrite(state)
    checkpoints.close()
    assert_same(restore(workdir)[0], make_state(1))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 1)])
def test_a_checkpoint_is_read_onto_another_mesh(two, sizes):
    devices = jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
    expected = jax.device_get(make_state(2))
    with jax.set_mesh(make_mesh(ShardingConfig(*sizes), devices)):
        state, step = restore(two)
        assert step == 2
        assert_same(jax.device_get(state), expected)
        for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(make_state()), strict=True):
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


def test_without_a_checkpoint_there_is_nothing_to_restore(workdir):
    checkpoints = Checkpoints(workdir, keep=2)
    assert checkpoints.last_step is None
    assert checkpoints.restore(abstract(make_state())) is None
    checkpoints.close()


def test_the_newest_are_kept_and_the_rest_deleted(workdir):
    save(workdir, [1, 2, 3, 10, 20], keep=2)
    assert steps_in(workdir) == [10, 20]
    assert restore(workdir, keep=2)[1] == 20


def test_a_checkpoint_that_was_not_finished_does_not_count(two):
    newest = pathlib.Path(two.checkpoints) / "2"
    shutil.copytree(newest, newest.parent / "3.orbax-checkpoint-tmp")
    state, step = restore(two)
    assert step == 2 and steps_in(two) == [1, 2]
    assert_same(state, make_state(2))


# Damage.


def files_of(checkpoint: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


DAMAGES = {"truncated": truncate, "deleted": pathlib.Path.unlink, "flipped": flip}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_harmless_or_noticed(written, tmp_path, damage, caplog):
    """Each file in turn: the state that comes back is the newest one, whole, or the one before it."""
    noticed = []
    for number, name in enumerate(files_of(written / "checkpoints" / "2")):
        workdir = Workdir(tmp_path / f"{number}")
        shutil.copytree(written, workdir.path)
        DAMAGES[damage](pathlib.Path(workdir.checkpoints) / "2" / name)
        state, step = restore(workdir)
        assert_same(state, make_state(step))
        assert steps_in(workdir) == [1, 2][:step]
        assert pathlib.Path(workdir.damaged, "2").exists() == (step == 1)
        noticed.append(step == 1)
    assert any(noticed) and sum("checkpoint 2 cannot be read" in message for message in caplog.messages) == sum(noticed)


def data_of(workdir: Workdir, step: int, part: str = "params") -> pathlib.Path:
    """The file with the arrays of one part."""
    (file,) = (pathlib.Path(workdir.checkpoints) / str(step) / part / "d").iterdir()
    return file


def test_a_damaged_checkpoint_is_reported_and_set_aside_and_the_run_goes_on(two, caplog):
    caplog.set_level(logging.ERROR)
    truncate(data_of(two, 2))
    checkpoints = Checkpoints(two, keep=5)
    state, step = checkpoints.restore(abstract(make_state()))
    assert step == 1 == checkpoints.last_step
    assert_same(state, make_state(1))
    (record,) = [record for record in caplog.records if record.name.startswith("mlm_jax")]
    assert "checkpoint 2 cannot be read" in record.message
    assert (pathlib.Path(two.damaged) / "2").is_dir() and steps_in(two) == [1]
    # The step is reached again, and damaged again: the one set aside before makes room.
    checkpoints.save(make_state(2), 2)
    checkpoints.close()
    assert restore(two)[1] == 2
    truncate(data_of(two, 2))
    assert restore(two)[1] == 1


@pytest.mark.parametrize(
    "make", [pathlib.Path.mkdir, lambda path: (path / "params").mkdir(parents=True), pathlib.Path.touch]
)
def test_what_is_no_checkpoint_is_in_nobodys_way(two, make):
    make(pathlib.Path(two.checkpoints) / "3")
    checkpoints = Checkpoints(two, keep=5)
    assert checkpoints.restore(abstract(make_state()))[1] == 2
    checkpoints.save(make_state(3), 3)
    checkpoints.close()
    assert restore(two)[1] == 3


@pytest.mark.parametrize("part", ["params", "ema", "rest"])
def test_one_flipped_bit_among_the_numbers_is_noticed(workdir, part):
    """Of arrays too large to be compressed, where neither Orbax nor the file's format notices."""
    save(workdir, [1, 2], size=1 << 14)
    checkpoint = pathlib.Path(workdir.checkpoints) / "2" / part
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    if part == "ema":
        message = (
            r"checkpoint 2 of .* cannot be read: the numbers in ema/table_VD are not those.*to use that of step 1, move"
        )
        with pytest.raises(MachineError, match=message):
            load_params(workdir, abstract(make_state(size=1 << 14)).params, ema=True)
    state, step = restore(workdir, size=1 << 14)
    assert step == 1
    assert_same(state, make_state(1, size=1 << 14))


def test_a_checkpoint_without_digests_is_read(two, monkeypatch):
    """As releases before 0.1 wrote them."""
    monkeypatch.setattr("mlm_jax.train.checkpoint.DIGESTS", "another name")
    assert restore(two)[1] == 2


def test_a_missing_part_is_damage(two):
    shutil.rmtree(pathlib.Path(two.checkpoints) / "2" / "rest")
    assert restore(two)[1] == 1


def test_when_every_checkpoint_is_damaged_the_machine_is_to_blame(two):
    for step in (1, 2):
        truncate(data_of(two, step))
    with pytest.raises(MachineError, match=r"no checkpoint in .*checkpoints can be read \(checkpoint 2 cannot be read"):
        restore(two)
    assert steps_in(two) == [1, 2]  # left to their owner


def test_a_checkpoint_of_another_model_is_not_damaged(two):
    """Nothing must be moved away because a config was changed."""
    with pytest.raises((UserError, MachineError)):
        restore(two, size=32)
    assert steps_in(two) == [1, 2]


def test_a_disk_that_is_full(two):
    """A limit on the size of files stands for it: writing fails in the middle."""
    checkpoints = Checkpoints(two, keep=5)
    state = make_state(3, size=1 << 16)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(MachineError, match=r"not be written to .*The last whole checkpoint is step 2; free some space"):
            checkpoints.save(state, 3, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert restore(two)[1] == 2


# Parameters alone.


def abstract_params():
    return abstract(make_state()).params


def test_the_average_is_loaded_where_it_is_asked_for(two, workdir):
    params, step = load_params(two, abstract_params(), ema=True)
    assert step == 2
    assert_same(params, make_state(2).ema)
    save(workdir, [4, 5], ema=False)
    params, step = load_params(workdir, abstract_params(), ema=False)
    assert step == 5
    assert_same(params, make_state(5, ema=False).params)


def test_parameters_are_loaded_onto_any_mesh(two):
    expected = jax.device_get(make_state(2).ema)
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        params, _ = load_params(two, abstract_params(), ema=True)
        assert_same(jax.device_get(params), expected)


def test_loading_from_a_run_without_checkpoints_is_a_users_mistake(workdir):
    with pytest.raises(UserError, match="has no checkpoint yet; train first"):
        load_params(workdir, abstract_params(), ema=True)
    Checkpoints(workdir, keep=1).close()
    with pytest.raises(UserError, match="has no checkpoint yet; train first"):
        load_params(workdir, abstract_params(), ema=True)


def test_loading_damaged_parameters_is_a_fault_of_the_machine(two):
    truncate(data_of(two, 2, "ema"))
    with pytest.raises(MachineError, match=r"checkpoint 2 of .* cannot be read"):
        load_params(two, abstract_params(), ema=True)
    assert steps_in(two) == [1, 2]  # looking at a run moves nothing
