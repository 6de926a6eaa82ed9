"""Worker processes that end with their parent, however it ends.

`prepare` tokenises and packs in them. Started by 'spawn', so that no thread or device state of the parent is inherited.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import TypeVar

from mlm_jax.errors import MachineError

T = TypeVar("T")


def available_cores() -> int:
    """The cores that this process may use, which in a container or under a batch system can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def started(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `count` processes. When the block fails they are stopped at once, in the middle of what they do.

    Raises:
        MachineError: a worker died.
    """
    context = multiprocessing.get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent, initargs=(watched,))
    try:
        yield executor
    except concurrent.futures.BrokenExecutor as error:
        raise MachineError(
            "a worker process was killed, most often because memory ran out; finished work is kept: start again, with"
            " fewer workers if it happens again"
        ) from error
    except BaseException:
        held.close()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        held.close()
        watched.close()


def completed(executor: ProcessPoolExecutor, calls: Iterable[Callable[[], T]], limit: int) -> Iterator[T]:
    """Runs calls in the pool and yields their results as they finish, in no fixed order.

    Args:
        executor: from `started`.
        calls: picklable; drawn only when fewer than `limit` are under way, which bounds what they hold in memory.
        limit: calls under way.
    """
    running: set[Future[T]] = set()
    for call in calls:
        running.add(executor.submit(call))
        while len(running) >= limit:
            done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            yield from (future.result() for future in done)
    for future in concurrent.futures.as_completed(running):
        yield future.result()


def _end_with_parent(watched: Connection) -> None:
    """Lets a worker's thread wait for the closing of the parent's end of a pipe, which a killed parent does too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means

    def wait() -> None:
        with contextlib.suppress(EOFError, OSError):
            watched.recv_bytes()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
