"""JSON messages over a socket, one a line, and the roll call that connects the processes of a run through process 0."""

import contextlib
import json
import socket
import time
from typing import Any

from mlm_jax.distributed.cluster import Cluster
from mlm_jax.errors import MachineError, UserError

Message = dict[str, Any]
SILENCE_SECONDS = 30  # after which a host that does not answer any more counts as gone
GREETING_SECONDS = 5  # for a process that has called to say who it is
LONGEST_GREETING = 2**20  # bytes; a config has a few thousand


class Channel:
    """One connection; reading never blocks unless asked to."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self._received = b""
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            # Names of Linux; elsewhere the system's own times apply.
            for option, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
                if hasattr(socket, option):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_SECONDS * 1000)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: Message) -> None:
        """Sends a message; that the other side is gone is seen when reading."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> tuple[list[Message], bool]:
        """What has come since, and whether the other side is still there. Blocks where nothing has come."""
        try:
            content = self.socket.recv(65536)
        except OSError:
            content = b""
        *lines, self._received = (self._received + content).split(b"\n")
        return [json.loads(line) for line in lines], bool(content)

    def receive_first(self, deadline: float) -> Message | None:
        """One message, in however many pieces it comes; what follows it is left for `receive`.

        Returns:
            None when the other side ends, says anything but a message, or takes until the deadline (`time.monotonic`).
        """
        line = b""
        while not line.endswith(b"\n") and len(line) < LONGEST_GREETING and (left := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                ahead = self.socket.recv(65536, socket.MSG_PEEK)
                piece = self.socket.recv(ahead.find(b"\n") + 1 or len(ahead))
            except OSError:
                break
            if not piece:
                break
            line += piece
        self.socket.settimeout(None)
        try:
            message = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        self.socket.close()


def gather(cluster: Cluster, greeting: Message, timeout: float) -> dict[int, tuple[Channel, Message]]:
    """Process 0's side of the roll call: listens until every other process has called.

    Returns:
        By process id: the channel and the greeting that came over it.

    Raises:
        UserError: two processes have the same id or disagree; all are told.
        MachineError: some have not called in time; the others are told.
    """
    port = int(cluster.coordinator.rpartition(":")[2])
    is_v6 = cluster.coordinator.startswith("[")
    try:
        listener = socket.create_server(
            ("", port), family=socket.AF_INET6 if is_v6 else socket.AF_INET, dualstack_ipv6=is_v6, backlog=512
        )
    except OSError as error:
        raise MachineError(
            f"cannot listen on port {port} of --coordinator={cluster.coordinator}: {error.strerror}. Is another run's "
            "or this run's process 0 on this machine? Choose another port for all processes, or another --process-id"
        ) from error
    with listener:
        calls = _listen(listener, cluster.num_processes - 1, {"process", *greeting}, time.monotonic() + timeout)
    try:
        return _checked(cluster, greeting, calls, timeout)
    except (UserError, MachineError) as error:
        for channel, _ in calls:
            channel.send({"refused": str(error), "status": 2 if isinstance(error, UserError) else 1})
            channel.close()
        raise


def _listen(listener: socket.socket, count: int, words: set[str], deadline: float) -> list[tuple[Channel, Message]]:
    """The calls that come in time, `count` at most."""
    calls: list[tuple[Channel, Message]] = []
    while len(calls) < count and (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            break
        channel = Channel(connection)
        message = channel.receive_first(min(deadline, time.monotonic() + GREETING_SECONDS))
        if message is not None and words <= message.keys():
            calls.append((channel, message))
        else:
            channel.close()  # not one of ours: a port scanner, a health check
    return calls


def _checked(
    cluster: Cluster, greeting: Message, calls: list[tuple[Channel, Message]], timeout: float
) -> dict[int, tuple[Channel, Message]]:
    called: dict[int, tuple[Channel, Message]] = {}
    for channel, words in calls:
        process = words["process"]
        for name, text in (("num_processes", "--num-processes"), ("config", "config"), ("workdir", "--workdir")):
            if words[name] != greeting[name]:
                values = "" if name == "config" else f" ({greeting[name]} and {words[name]})"
                raise UserError(
                    f"process 0 and process {process} were started with another {text}{values}: give all the same command, "
                    "but for --process-id"
                )
        if process in called:
            raise UserError(
                f"two processes have --process-id={process}, on {called[process][1]['host']} and {words['host']}: give each "
                f"of the {cluster.num_processes} its own, from 0 to {cluster.num_processes - 1}"
            )
        called[process] = channel, words
    absent = sorted(set(range(1, cluster.num_processes)) - called.keys())
    if absent:
        raise MachineError(
            f"process{'es' * (len(absent) > 1)} {', '.join(map(str, absent))} of {cluster.num_processes} did not come "
            f"within {timeout:g} s: see their logs, and whether they can reach {cluster.coordinator}"
        )
    return called


def call(cluster: Cluster, greeting: Message, timeout: float) -> tuple[Channel, Message]:
    """Another process's side of the roll call: connects to process 0 and waits until all have.

    Returns:
        The channel, and what process 0 says once all have called.

    Raises:
        MachineError: process 0 could not be reached in time, or ended.
        UserError: process 0 refuses this run.
    """
    host, _, port = cluster.coordinator.rpartition(":")
    deadline, reason = time.monotonic() + timeout, "timed out"
    while True:
        try:
            connection = socket.create_connection(
                (host.strip("[]"), int(port)), timeout=max(deadline - time.monotonic(), 0.01)
            )
            break
        except OSError as error:
            reason = error.strerror or str(error) or reason
        if time.monotonic() > deadline:
            raise MachineError(
                f"process {cluster.process_id} could not reach process 0 at --coordinator={cluster.coordinator} within "
                f"{timeout:g} s ({reason}): is it running there, and is the port open?"
            )
        time.sleep(0.2)
    channel = Channel(connection)
    channel.send({"process": cluster.process_id, **greeting})
    # Process 0 gives up by the same time limit, which began at its own start; it is the one to say who is missing.
    answer = channel.receive_first(time.monotonic() + timeout + 10)
    if answer is None or "refused" in answer:
        channel.close()
    if answer is None:
        raise MachineError(f"process 0 at {cluster.coordinator} ended before all {cluster.num_processes} processes had come")
    if "refused" in answer:
        kind = UserError if answer["status"] == 2 else MachineError
        raise kind(f"refused by process 0: {answer['refused']}")
    return channel, answer
