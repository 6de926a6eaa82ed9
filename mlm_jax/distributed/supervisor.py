"""One small process beside each worker of a run: it starts it, passes signals on, and ends all when one has failed.

JAX's own answer to the death of a process is that the others hang in a collective until a heartbeat is missed, or abort
with the runtime's stack trace. The supervisors hold a connection to that of process 0, which closes when a machine or
process dies, agree on whose failure was the first, and tell that one.
"""

import logging
import os
import selectors
import signal
import socket
import sys
import time

from mlm_jax.distributed.channel import Channel, Message
from mlm_jax.distributed.cluster import Cluster
from mlm_jax.errors import UNEXPECTED

log = logging.getLogger(__name__)

STOPPED = 128 + signal.SIGTERM  # a worker's status when all have saved and stopped because of a signal
# A failure here makes others fail elsewhere. Reports are collected for so long before one is called the cause: the first of
# those that are surely one, else of those with a message of their own, else of those that may be an answer to another.
SETTLE_SECONDS = 1.5
CAUSE, REPORTED, PERHAPS_ECHO = range(3)


class Supervisor:
    """The loop of one supervisor: messages of its worker and of the others, signals, and the worker's end."""

    def __init__(
        self,
        cluster: Cluster,
        channels: dict[int, Channel],
        hosts: dict[int, str],
        worker: int,
        control: Channel,
        native: int,
    ):
        self.cluster, self.channels, self.hosts, self.worker, self.control = cluster, channels, hosts, worker, control
        self.index, self.native = cluster.process_id, native
        self.own_status: int | None = None
        self.finished: set[int] = set()  # processes that have come to a good end, known to process 0
        self.failures: list[Message] = []
        self.verdict: Message | None = None
        self.decide_at = float("inf")
        self.signals_seen = 0
        self.is_prepared = False
        self.is_stopping = False  # known to process 0, as are the steps that the workers have come to
        self.steps: dict[int, int] = {}
        self.said: list[tuple[float, bytes]] = []  # the runtime's own lines, held back for a moment
        self.unfinished_line = b""
        self.selector = selectors.DefaultSelector()

    def run(self) -> int:
        """Returns the exit status once every process has ended."""
        wakeup, woken = socket.socketpair()
        for end in (wakeup, woken):
            end.setblocking(False)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # the number arrives over the wake-up socket
        self.selector.register(woken, selectors.EVENT_READ, lambda: self._on_signals(woken.recv(64)))
        self.selector.register(self.control, selectors.EVENT_READ, self._on_worker)
        self.selector.register(self.native, selectors.EVENT_READ, self._on_native)
        for process, channel in self.channels.items():
            self.selector.register(channel, selectors.EVENT_READ, lambda process=process: self._on_peer(process))
        while self.verdict is None and not self._is_over():
            for key, _ in self.selector.select(timeout=0.5):
                key.data()
            if not self.failures:
                self._relay(before=time.monotonic() - 2 * SETTLE_SECONDS)
            if time.monotonic() >= self.decide_at:
                self._decide()
        return self._end()

    def _is_over(self) -> bool:
        """All have come to a good end. Process 0 stays until then, because its end would look like a failure."""
        if self.index not in self.finished:
            return False
        return self.index != 0 or len(self.finished) == self.cluster.num_processes

    def _on_signals(self, numbers: bytes) -> None:
        for number in numbers:
            self.signals_seen += 1
            if self.own_status is not None:
                continue
            if self.signals_seen == 1 and self.is_prepared:
                self._on_stop()
            else:
                when = "before the first step" if self.signals_seen == 1 else "twice; what was saved before is kept"
                self._fail(128 + number, f"stopped by signal {number} {when}; the same command continues", CAUSE)

    def _on_native(self) -> None:
        content = os.read(self.native, 65536)
        *lines, self.unfinished_line = (self.unfinished_line + (content or b"\n")).split(b"\n")
        # Gloo greets every peer of every communicator.
        lines = [line + b"\n" for line in lines if line and not line.startswith(b"[Gloo] Rank ")]
        self.said.append((time.monotonic(), b"".join(lines)))
        if not content:
            self.selector.unregister(self.native)

    def _relay(self, before: float) -> None:
        while self.said and self.said[0][0] <= before:
            os.write(2, self.said.pop(0)[1])

    def _relay_all(self) -> None:
        """What an ended worker has said to its last line."""
        while self.native in self.selector.get_map():
            self._on_native()
        self._relay(before=float("inf"))

    def _on_worker(self) -> None:
        messages, is_open = self.control.receive()
        for message in messages:
            if "ready" in message:
                self._on_ready(message)
            elif "stop" in message:
                self._on_stop()
            elif "at" in message:
                self._on_answer(self.index, message["at"])
        if is_open:
            return
        self.selector.unregister(self.control)
        _, status = os.waitpid(self.worker, 0)
        self.own_status = os.waitstatus_to_exitcode(status)
        if self.own_status in (0, STOPPED):
            self._to_all({"finished": self.index})
            self.finished.add(self.index)
        elif self.own_status > 0:
            self._fail(self.own_status, "", {2: CAUSE, 1: REPORTED}.get(self.own_status, PERHAPS_ECHO))
        else:
            number = -self.own_status
            # An abort is how the runtime ends a process whose peers are gone.
            rank = PERHAPS_ECHO if number == signal.SIGABRT else CAUSE
            self._fail(1, f"was killed by signal {number} ({signal.Signals(number).name})", rank)

    def _on_ready(self, message: Message) -> None:
        if self.index == 0:
            self._to_all(message)
        else:
            self.control.send(message)
        self.is_prepared = True

    def _on_stop(self) -> None:
        """Somebody wants to stop: process 0 asks every worker, once, which step it has come to."""
        if self.index != 0:
            self.channels[0].send({"stop": True})
        elif not self.is_stopping:
            self.is_stopping = True
            self._to_workers({"asked": True})

    def _on_answer(self, process: int, step: int) -> None:
        """What a worker has answered; from then on it waits for the step to stop after (see `Peers.agree_to_stop`)."""
        if self.index != 0:
            self.channels[0].send({"at": step, "process": process})
            return
        self.steps[process] = step
        if len(self.steps) == self.cluster.num_processes:
            self._to_workers({"stop_at": max(self.steps.values()) + 1})

    def _to_workers(self, message: Message) -> None:
        self._to_all(message)
        self.control.send(message)

    def _to_all(self, message: Message) -> None:
        for channel in self.channels.values():
            channel.send(message)

    def _on_peer(self, process: int) -> None:
        """A message of another supervisor: process 0 hears all of them, the others hear process 0."""
        messages, is_open = self.channels[process].receive()
        for message in messages:
            if "ready" in message:
                self._on_ready(message)
            elif "stop" in message:
                self._on_stop()
            elif "at" in message:
                self._on_answer(process, message["at"])
            elif "asked" in message or "stop_at" in message:
                self.control.send(message)
            elif "finished" in message:
                self.finished.add(message["finished"])
            elif "failure" in message:
                self._note(message["failure"])
            elif "verdict" in message:
                self.verdict = message["verdict"]
        if not is_open:
            self.selector.unregister(self.channels[process])
            if process not in self.finished and self.verdict is None:
                self._note(self._failure(process, 1, "died, or its machine did", CAUSE))
                if self.index != 0:  # process 0, which decides, is gone
                    self._decide()

    def _failure(self, process: int, status: int, text: str, rank: int) -> Message:
        return {"process": process, "host": self.hosts.get(process), "status": status, "text": text, "rank": rank}

    def _fail(self, status: int, text: str, rank: int) -> None:
        """Reports a failure of this process to process 0, which decides whose was the first."""
        failure = self._failure(self.index, status, text, rank)
        self._note(failure)
        if self.index != 0:
            self.channels[0].send({"failure": failure})

    def _note(self, failure: Message) -> None:
        self.failures.append(failure)
        if self.index == 0:
            self.decide_at = min(self.decide_at, time.monotonic() + SETTLE_SECONDS)

    def _decide(self) -> None:
        self.verdict = min(self.failures, key=lambda failure: failure["rank"])
        self._to_all({"verdict": self.verdict})

    def _end(self) -> int:
        if self.verdict is None:
            self._relay_all()
            assert self.own_status is not None
            return self.own_status
        if self.own_status is None:
            os.kill(self.worker, signal.SIGKILL)
            os.waitpid(self.worker, 0)
        verdict = self.verdict
        is_own, who = verdict["process"] == self.index, f"process {verdict['process']} of {self.cluster.num_processes}"
        if is_own:
            self._relay_all()
        if verdict["status"] > 128:
            _tell(verdict["text"] if is_own else f"{who} was {verdict['text']}")
        elif verdict["text"]:
            host = f" on {verdict['host']}" if verdict["host"] else ""
            _tell(f"{who}{host} {verdict['text']}; all others end. The same command, on any number of processes, continues")
        elif not is_own:
            log.info("%s failed; its message says why", who)
        status: int = verdict["status"]
        return 1 if status == UNEXPECTED else status


def _tell(message: str) -> None:
    print(f"mlm-jax: {message}", file=sys.stderr, flush=True)
