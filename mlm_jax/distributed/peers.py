"""The worker's side: how it comes to be among the processes of a run, and what it can ask of them."""

import contextlib
import dataclasses
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator

from mlm_jax.config import Config, to_dict
from mlm_jax.distributed.channel import Channel, call, gather
from mlm_jax.distributed.cluster import Cluster
from mlm_jax.distributed.supervisor import Supervisor


class Peers:
    """What a worker knows of the run's processes; of itself alone where there is no cluster."""

    def __init__(self, membership: "_Membership | None" = None):
        self._membership = membership
        self.count = 1 if membership is None else membership.cluster.num_processes
        self.index = 0 if membership is None else membership.cluster.process_id
        self.is_primary = self.index == 0
        self._primary_is_ready = threading.Event()
        # How the processes agree on the step to stop after; see `agree_to_stop`.
        self._agreement = threading.Condition()
        self._step, self._has_asked, self._has_answered, self._stop_at = 0, False, False, sys.maxsize
        if membership is not None:
            threading.Thread(target=self._listen, args=(membership.control,), daemon=True).start()

    def initialize_jax(self) -> None:
        """Connects this process's JAX with the others'; must come before any device is touched."""
        if self._membership is None:
            return
        import jax  # the supervisor does without

        cluster = self._membership.cluster
        jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, and `agree_to_stop` its place
        jax.distributed.initialize(
            self._membership.address,
            cluster.num_processes,
            cluster.process_id,
            local_device_ids=None if "JAX_LOCAL_DEVICE_IDS" in os.environ else cluster.local_devices,
            cluster_detection_method="deactivate",
        )

    def _listen(self, control: Channel) -> None:
        while True:
            messages, is_open = control.receive()
            for message in messages:
                if "ready" in message:
                    self._primary_is_ready.set()
                elif "asked" in message:
                    with self._agreement:
                        self._has_answered = True
                        control.send({"at": self._step})
                elif "stop_at" in message:
                    with self._agreement:
                        self._stop_at, self._has_answered = message["stop_at"], False
                        self._agreement.notify()
            if not is_open:  # the supervisor was killed: without it the others would count this process as dead
                os._exit(1)

    def announce(self) -> None:
        """Tells the other processes that what the primary prepares is there."""
        self._primary_is_ready.set()
        if self._membership is not None:
            self._membership.control.send({"ready": True})

    def wait_for_primary(self) -> None:
        """Waits until the primary has announced, however long that takes: if it fails, this process is ended."""
        self._primary_is_ready.wait()

    def agree_to_stop(self, step: int, wanted: bool) -> bool:
        """Whether all processes are to stop after this step; each asks after every one.

        Process 0's supervisor, once one process wants to stop or was sent a signal, asks each for the step that it came to.
        From its answer on a process waits here, until it is told the step after the latest of all answers: so none can have
        passed it. It takes two messages to and fro, and nothing while nobody wants to stop.

        JAX's own `reached_preemption_sync_point` is meant to work like this too, but was seen to tell one process of two to
        stop at a step that the other had been let through. All that it listens to is SIGTERM.
        """
        if self._membership is None:
            return wanted
        if wanted and not self._has_asked:
            self._has_asked = True
            self._membership.control.send({"stop": True})
        with self._agreement:
            self._agreement.wait_for(lambda: not self._has_answered)
            self._step = step
            return step >= self._stop_at

    @contextlib.contextmanager
    def ending_at_once(self, report: Callable[[BaseException], int]) -> Iterator[None]:
        """Ends this process as soon as the block fails, without waiting for others that will never come.

        What it says goes through its supervisor, which shows it unless another process's failure was the cause.

        Args:
            report: tells an error on sys.stderr and returns the exit status.
        """
        if self._membership is None:
            yield
            return
        try:
            yield
        except BaseException as error:
            with os.fdopen(self._membership.native_stderr, "w") as sys.stderr:
                status = report(error)
            os._exit(status)


@dataclasses.dataclass(frozen=True)
class _Membership:
    """A worker's ends of its connections."""

    cluster: Cluster
    address: str  # HOST:PORT of JAX's own coordination service, which the worker of process 0 starts
    control: Channel  # to the supervisor
    native_stderr: int  # file descriptor; the supervisor reads it


def join(cluster: Cluster, cfg: Config, workdir: str, timeout: float) -> Peers:
    """Meets the other processes, then forks: returns in the worker, and exits in the supervisor when all is over.

    Args:
        cfg: the run's, which must be the same in all processes, as must be `workdir`.
        timeout: seconds to wait for the others.

    Raises:
        UserError: the processes disagree.
        MachineError: they did not all come in time.
        SystemExit: in the supervisor.
    """
    greeting = {
        "host": socket.gethostname(),
        "num_processes": cluster.num_processes,
        "config": to_dict(cfg),
        "workdir": workdir,
    }
    channels: dict[int, Channel] = {}
    hosts = {cluster.process_id: socket.gethostname()}
    if cluster.process_id == 0:
        called = gather(cluster, greeting, timeout)
        port = _free_port()
        for process, (channel, message) in called.items():
            channels[process], hosts[process] = channel, message["host"]
            channel.send({"port": port})
    else:
        channels[0], welcome = call(cluster, greeting, timeout)
        hosts[0] = cluster.coordinator.rpartition(":")[0]
        port = welcome["port"]
    address = f"{cluster.coordinator.rpartition(':')[0]}:{port}"
    ours, theirs = socket.socketpair()
    native, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    worker = os.fork()
    if worker == 0:
        for channel in channels.values():
            channel.close()
        ours.close()
        os.close(native)
        os.setsid()  # a terminal's Ctrl-C reaches the supervisor alone, which tells the worker once
        _divert_native_output(write_end)
        return Peers(_Membership(cluster, address, Channel(theirs), write_end))
    theirs.close()
    os.close(write_end)
    sys.exit(Supervisor(cluster, channels, hosts, worker, Channel(ours), native).run())


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def _divert_native_output(write_end: int) -> None:
    """Gives what libraries write to file descriptors 1 and 2 to the supervisor; Python's own streams stay as they are."""
    out, err = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
            handler.setStream(err)
    sys.stdout, sys.stderr = out, err
    for number in (1, 2):
        os.dup2(write_end, number)
