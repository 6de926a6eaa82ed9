"""What every test runs on: eight fake CPU devices, rank promotion an error, a compilation cache that outlives the run.

The environment is set before jax is imported, here and, because they inherit it, in the processes that tests start.
"""

import importlib.util
import os
import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# The size of XLA's thread pool. Collectives of different groups start in any order on each device and hold a thread while
# they wait for each other: with no more threads than devices a mesh of three axes can wait for ever.
os.environ.setdefault("NPROC", "32")
# XLA ends a process whose devices do not all reach a collective within this time: seconds by default, which a machine that
# has other work besides can need for a few steps.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_collective_call_terminate_timeout_seconds=300")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# A limit bounds the folder and makes jax lock it: without one, parallel workers read each other's half-written entries.
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))

import jax  # noqa: E402  (the environment comes first)
import pytest  # noqa: E402

DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="session")
def data_path() -> pathlib.Path:
    """The folder of real text beside the repository; tests that need it are skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no folder of real data at {DATA}")
    return DATA


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("device") and jax.default_backend() == "cpu":
        pytest.skip("needs an accelerator")
    if request.node.get_closest_marker("tpu_compile") and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the extra tpu-compile")
