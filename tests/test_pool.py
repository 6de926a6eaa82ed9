"""Worker processes end with their parent, and what goes wrong in one of them ends the work at once."""

import fcntl
import functools
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from mlm_jax.data import pool
from mlm_jax.errors import MachineError, UserError

_PARENT = """
import sys
from mlm_jax.data import pool
hold = "import fcntl, time; file = open({!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
hold += "file.write('x'); file.flush(); time.sleep(60)"
with pool.started(1) as executor:
    executor.submit(exec, hold.format(sys.argv[1])).result()
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "held by the worker"
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(path)])
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    with open(path) as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        start = time.monotonic()
        fcntl.flock(file, fcntl.LOCK_EX)  # granted when the worker is gone
    assert time.monotonic() - start < 20


def test_what_tokenises_imports_nothing_heavy() -> None:
    heavy = {"jax", "grain", "tensorflow_datasets", "pyarrow", "rich"}
    code = f"import sys, mlm_jax.data.units, mlm_jax.data.pool; sys.exit(str({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "set()"


def test_a_killed_worker_is_a_fault_of_the_machine() -> None:
    with pytest.raises(MachineError, match="a worker process was killed"), pool.started(1) as executor:
        executor.submit(os._exit, 1).result()


def test_a_mistake_found_by_a_worker_stops_the_others_at_once() -> None:
    calls = [functools.partial(time.sleep, 60), functools.partial(_raise, "the third line is bad")]
    start = time.monotonic()
    with pytest.raises(UserError, match="the third line is bad"), pool.started(2) as executor:
        list(pool.completed(executor, calls, limit=1 + len(calls)))
    assert time.monotonic() - start < 20


def _raise(message: str) -> None:
    raise UserError(message)


def test_results_all_come_and_calls_are_drawn_in_bounded_number() -> None:
    drawn = 0

    def calls() -> Iterator[Callable[[], int]]:
        nonlocal drawn
        for number in range(40):
            drawn += 1
            yield functools.partial(abs, -number)

    results = []
    with pool.started(2) as executor:
        for result in pool.completed(executor, calls(), limit=5):
            results.append(result)
            assert drawn - len(results) <= 5
    assert sorted(results) == list(range(40))
