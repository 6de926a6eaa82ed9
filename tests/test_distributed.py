"""Several processes as one run: found, gathered, ended together, and training what one process would have trained."""

import contextlib
import glob
import importlib.util
import io
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from unittest import mock

import pytest

from mlm_jax.distributed import Cluster, find_cluster
from mlm_jax.distributed.channel import call, gather
from mlm_jax.errors import MachineError, UserError
from mlm_jax.workdir import Workdir

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMOKE = str(ROOT / "configs" / "smoke.py")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# Who takes part.

SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}


def test_a_process_without_a_launcher_is_alone():
    assert find_cluster({}) is None
    assert find_cluster({**SLURM, "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert find_cluster({**SLURM, "SLURM_STEP_NODELIST": "n1"}, wanted=False) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("node7", "node7"), ("a1,b2", "a1"), ("gpu[003-015,20]", "gpu003"), ("gpu[3,7],cpu1", "gpu3"), ("r[1-2]-x", "r1-x")],
)
def test_slurm_names_the_first_node_of_a_step(nodes, host):
    found = find_cluster({**SLURM, "SLURM_STEP_NODELIST": nodes})
    assert (found.coordinator.split(":")[0], found.num_processes, found.process_id) == (host, 16, 5)
    other = find_cluster({**SLURM, "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_ID": "1"})
    assert other.coordinator != found.coordinator  # two steps of a job do not meet


@pytest.mark.parametrize(
    ("more", "devices"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x16)"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, (1,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "3"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (1,)),
        ({}, (1,)),
    ],
)
def test_tasks_that_share_a_node_share_its_gpus(more, devices):
    assert find_cluster({**SLURM, "SLURM_STEP_NODELIST": "n1", **more}).local_devices == devices


def test_open_mpi_names_the_machine_of_mpirun_or_needs_to_be_told():
    found = find_cluster({**OPEN_MPI, **URI})
    assert re.fullmatch(r"10\.96\.0\.1:6\d{4}", found.coordinator) and (found.num_processes, found.process_id) == (4, 3)
    with pytest.raises(UserError, match=r"also give --coordinator HOST:PORT$"):
        find_cluster(OPEN_MPI)
    assert find_cluster(OPEN_MPI, coordinator="h:9").coordinator == "h:9"
    assert find_cluster({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}).coordinator.startswith("127.0.0.1:")


@pytest.fixture
def tpu_vm(monkeypatch):
    """Makes this machine a TPU VM with these attributes in its metadata, which it is asked for over HTTP."""

    def become(**attributes: str) -> list[str]:
        asked = []

        def urlopen(request, timeout):
            base = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
            assert request.full_url.startswith(base) and request.get_header("Metadata-flavor") == "Google" and timeout <= 10
            asked.append(request.full_url.removeprefix(base))
            if asked[-1].replace("-", "_") not in attributes:
                raise urllib.error.HTTPError(request.full_url, 404, "Not Found", None, None)
            return io.BytesIO(attributes[asked[-1].replace("-", "_")].encode())

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or None)
        monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/accel0"] if pattern == "/dev/accel*" else [])
        return asked

    return become


GKE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc"}


def test_gke_tells_a_slice_by_variables(tpu_vm):
    asked = tpu_vm()
    assert find_cluster(GKE) == Cluster("t-0.svc:8482", 2, 1)
    addresses = {"TPU_PROCESS_ADDRESSES": "10.0.0.4:8471,10.0.0.5:8471,10.0.0.6:8471"}  # comes before the names
    assert find_cluster(GKE | addresses) == Cluster("10.0.0.4:8482", 3, 1)
    assert find_cluster({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert not asked


def test_processes_of_several_slices_are_numbered_slice_by_slice(tpu_vm):
    tpu_vm()
    slices = {"MEGASCALE_COORDINATOR_ADDRESS": "job-0.svc:8080", "MEGASCALE_NUM_SLICES": "3"}
    places = [(slice_id, worker) for slice_id in "012" for worker in "01"]
    found = [find_cluster(GKE | slices | {"MEGASCALE_SLICE_ID": s, "TPU_WORKER_ID": worker}) for s, worker in places]
    assert found == [Cluster("job-0.svc:8482", 6, rank) for rank in range(6)]


def test_compute_engine_tells_a_slice_by_metadata(tpu_vm):
    asked = tpu_vm(agent_worker_number="2", worker_network_endpoints="n:7:10.0.0.4,n:8:10.0.0.5,n:9:10.0.0.6")
    assert find_cluster({}) == Cluster("10.0.0.4:8482", 3, 2)
    assert find_cluster({"TPU_SKIP_MDS_QUERY": "1"}) is None
    assert asked == ["agent-worker-number", "worker-network-endpoints", "tpu-env"]
    tpu_vm(agent_worker_number="1", worker_network_endpoints="w-0,w-1")
    assert find_cluster({}) == Cluster("w-0:8482", 2, 1)


def test_several_slices_of_compute_engine_are_in_its_tpu_env(tpu_vm):
    lines = "ZONE: 'z'\nMEGASCALE_COORDINATOR_ADDRESS: '10.1.0.2:8080'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    tpu_vm(agent_worker_number="1", worker_network_endpoints="n:7:10.0.0.4,n:8:10.0.0.5", tpu_env=lines)
    assert find_cluster({}) == Cluster("10.1.0.2:8482", 4, 3)
    assert find_cluster({"MEGASCALE_SLICE_ID": "0"}) == Cluster("10.1.0.2:8482", 4, 1)  # a variable comes first


@pytest.mark.parametrize("endpoints", [{}, {"worker_network_endpoints": ""}, {"worker_network_endpoints": "n:7:10.0.0.4,"}])
def test_a_slice_that_does_not_name_its_workers_is_told_as_that(tpu_vm, endpoints):
    tpu_vm(agent_worker_number="0", **endpoints)
    with pytest.raises(UserError, match=r"worker 0 of a TPU slice whose metadata does not name its workers"):
        find_cluster({})
    assert find_cluster({}, wanted=False) is None
    assert find_cluster({}, coordinator="h:9", num_processes=2, process_id=0) == Cluster("h:9", 2, 0)


def test_a_machine_that_is_no_tpu_vm_is_asked_for_nothing(tpu_vm, monkeypatch):
    asked = tpu_vm(agent_worker_number="1", worker_network_endpoints="w-0,w-1")
    assert find_cluster({"JAX_PLATFORMS": "cpu"}) is None
    monkeypatch.setattr(glob, "glob", lambda pattern: [])
    assert find_cluster({}) is None and not asked


def test_where_nobody_answers_for_the_metadata_a_process_is_alone(tpu_vm, monkeypatch):
    tpu_vm()
    assert find_cluster({}) is None  # no such attribute
    monkeypatch.setattr(urllib.request, "urlopen", mock.Mock(side_effect=urllib.error.URLError("no such host")))
    assert find_cluster({}) is None


def test_what_is_given_comes_before_what_is_found():
    variables = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2", **OPEN_MPI, **URI}
    assert find_cluster(variables) == Cluster("a:1", 3, 2)
    assert find_cluster(variables, coordinator="b:2", num_processes=5, process_id=0) == Cluster("b:2", 5, 0)
    job = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JOB_COMPLETION_INDEX": "1"}
    assert find_cluster(job) == Cluster("a:1", 3, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "h:1"}, "also give --num-processes N, --process-id I"),
        ({"num_processes": 2, "process_id": 0}, "also give --coordinator HOST:PORT"),
        ({"coordinator": "h", "num_processes": 2, "process_id": 0}, "--coordinator=h is not HOST:PORT"),
        ({"coordinator": "h:1", "num_processes": 0, "process_id": 0}, "--num-processes=0 must be at least 1"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "--process-id=2 must lie between 0 and 1"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 1, "wanted": False}, "contradict each other"),
        ({"wanted": True}, "--distributed: found neither"),
    ],
)
def test_a_description_that_cannot_be(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        find_cluster({}, **given)


# The roll call.


def greeting(**changes) -> dict:
    return {"host": "here", "num_processes": 3, "config": {"seed": 0}, "workdir": "w", **changes}


def roll_call(*others: tuple[int, dict], timeout: float = 5.0) -> tuple[BaseException | dict, dict[int, BaseException]]:
    """What process 0 of 3 makes of the calls of others, and what they are told when they are refused."""
    coordinator, told = f"127.0.0.1:{free_port()}", {}

    def other(number: int, process: int, words: dict) -> None:
        try:
            call(Cluster(coordinator, 3, process), words, timeout)[0].close()
        except (UserError, MachineError) as error:
            told[number] = error

    threads = [threading.Thread(target=other, args=(number, *words)) for number, words in enumerate(others)]
    for thread in threads:
        thread.start()
    try:
        result = gather(Cluster(coordinator, 3, 0), greeting(), timeout)
        for channel, _ in result.values():
            channel.send({"port": 1})
            channel.close()
    except (UserError, MachineError) as error:
        result = error
    for thread in threads:
        thread.join()
    return result, told


def test_all_who_were_expected_come():
    result, told = roll_call((2, greeting(host="b")), (1, greeting(host="a")))
    assert {process: words["host"] for process, (_, words) in result.items()} == {1: "a", 2: "b"} and not told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((1, greeting(host="there")), "two processes have --process-id=1, on "),
        ((2, greeting(num_processes=4)), "process 0 and process 2 were started with another --num-processes (3 and 4)"),
        ((2, greeting(workdir="v")), "another --workdir (w and v)"),
        ((2, greeting(config={"seed": 1})), "another config: give all the same command"),
    ],
)
def test_processes_that_do_not_fit_are_refused_and_all_are_told(words, message):
    result, told = roll_call((1, greeting()), words)
    assert isinstance(result, UserError) and message in str(result)
    assert told and all(isinstance(error, UserError) and message in str(error) for error in told.values())


@pytest.mark.parametrize("foreign", [b"", b"GET / HTTP/1.1\r\n\r\n", b"7\n", b"\x16\x03\xff\n"])
def test_a_greeting_may_come_in_pieces_and_after_calls_that_are_none(foreign):
    coordinator, answers = f"127.0.0.1:{free_port()}", []

    def connect() -> socket.socket:
        host, port = coordinator.split(":")
        for _ in range(500):  # until process 0 listens
            with contextlib.suppress(ConnectionRefusedError):
                return socket.create_connection((host, int(port)), timeout=5)
            time.sleep(0.01)
        raise TimeoutError

    def others() -> None:
        with connect() as scanner:
            scanner.sendall(foreign)
        with connect() as other:
            words = json.dumps({"process": 1, **greeting(num_processes=2)}).encode() + b"\n"
            other.sendall(words[:20])
            time.sleep(0.3)
            other.sendall(words[20:])
            answers.append(other.recv(100))

    thread = threading.Thread(target=others)
    thread.start()
    try:
        [(channel, words)] = gather(Cluster(coordinator, 2, 0), greeting(num_processes=2), 5.0).values()
        channel.send({"port": 1})
        channel.close()
    finally:
        thread.join()
    assert (words["process"], words["host"], answers) == (1, "here", [b'{"port": 1}\n'])


def test_what_process_0_says_after_its_welcome_is_not_lost():
    with socket.create_server(("127.0.0.1", 0)) as server:
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"

        def welcome() -> None:
            with server.accept()[0] as connection:
                connection.sendall(b'{"port": 1}\n{"ready": true}\n')

        thread = threading.Thread(target=welcome)
        thread.start()
        channel, answer = call(Cluster(coordinator, 2, 1), greeting(num_processes=2), 5.0)
        thread.join()
        assert (answer, channel.receive()[0]) == ({"port": 1}, [{"ready": True}])
        channel.close()


def test_who_does_not_come_is_named_in_bounded_time():
    began = time.monotonic()
    result, told = roll_call((1, greeting()), timeout=1.0)
    assert isinstance(result, MachineError) and "process 2 of 3 did not come within 1 s" in str(result)
    assert "process 2 of 3" in str(told[0]) and time.monotonic() - began < 5


def test_a_coordinator_that_cannot_be_reached_is_one_message_in_bounded_time():
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"process 1 could not reach process 0 at --coordinator=127.0.0.1:\d+ within 1 s"):
        call(Cluster(f"127.0.0.1:{free_port()}", 2, 1), greeting(num_processes=2), 1.0)
    assert time.monotonic() - began < 5


def test_two_processes_0_on_one_machine():
    port = free_port()
    with socket.create_server(("", port)), pytest.raises(MachineError, match=f"cannot listen on port {port} of"):
        gather(Cluster(f"127.0.0.1:{port}", 2, 0), greeting(num_processes=2), 1.0)


# All end when one fails.


def start(command: list[str], log: pathlib.Path, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, cwd=ROOT
        )


def ends(processes: list[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    """The exit statuses, all within the time."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def messages(log: pathlib.Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("mlm-jax: ")]


def fail(tmp_path: pathlib.Path, behaviour: str, culprit: int, count: int = 3) -> tuple[list[int], list[pathlib.Path]]:
    coordinator = f"127.0.0.1:{free_port()}"
    logs = [tmp_path / f"{process}.log" for process in range(count)]
    program = [sys.executable, str(ROOT / "tests" / "peers_program.py"), coordinator, str(count)]
    began = [start([*program, str(process), behaviour, str(culprit)], log) for process, log in enumerate(logs)]
    return ends(began, 30), logs


def test_processes_that_finish_end_well(tmp_path):
    assert fail(tmp_path, "finish", 0)[0] == [0, 0, 0]


@pytest.mark.parametrize(("behaviour", "culprit"), [("killed", 0), ("echo", 2), ("lost", 0), ("lost", 2)])
def test_the_death_of_one_ends_all_with_one_message_that_names_it(tmp_path, behaviour, culprit):
    statuses, logs = fail(tmp_path, behaviour, culprit)
    lost = {culprit: -signal.SIGKILL} if behaviour == "lost" else {}
    assert statuses == [lost.get(process, 1) for process in range(3)]
    text = "died, or its machine did" if behaviour == "lost" else r"was killed by signal 9 \(SIGKILL\)"
    for process in set(range(3)) - lost.keys():
        (message,) = messages(logs[process])
        assert re.search(rf"process {culprit} of 3 on \S+ {text}; all others end", message)
        assert "stack trace" not in logs[process].read_text()


@pytest.mark.parametrize(("behaviour", "status", "culprit"), [("user", 2, 0), ("user", 2, 1), ("machine", 1, 0)])
def test_an_error_of_one_is_told_once_and_ends_all(tmp_path, behaviour, status, culprit):
    statuses, logs = fail(tmp_path, behaviour, culprit)
    assert statuses == [status] * 3
    assert messages(logs[culprit]) == [f"mlm-jax: the {behaviour} is to blame"]
    for process in {0, 1, 2} - {culprit}:
        assert not messages(logs[process]) and f"process {culprit} of 3 failed" in logs[process].read_text()


def test_a_bug_shows_its_traceback_where_it_is(tmp_path):
    statuses, logs = fail(tmp_path, "bug", 1)
    assert statuses == [1, 1, 1]
    assert ["IndexError: nobody expected this" in log.read_text() for log in logs] == [False, True, False]


def test_a_signal_before_training_ends_all_at_once(tmp_path):
    coordinator = f"127.0.0.1:{free_port()}"
    logs = [tmp_path / f"{process}.log" for process in range(2)]
    command = [
        *(sys.executable, "-m", "mlm_jax", "train", "--config", SMOKE, "--workdir", str(tmp_path / "w"), "--workers=1"),
        *("--coordinator", coordinator, "--num-processes=2"),
    ]
    processes = [start([*command, f"--process-id={process}"], log) for process, log in enumerate(logs)]
    while "preparing" not in logs[0].read_text() and processes[0].poll() is None:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    assert ends(processes, 15) == [143, 143]
    assert "stopped by signal 15 before the first step" in messages(logs[1])[0]
    assert "process 1 of 2 was stopped by signal 15" in messages(logs[0])[0]


# Training over several processes.

TRAINING = (
    "model.num_layers=1",
    "model.embed_dim=32",
    "model.mlp_dim=64",
    "model.vocab_size=512",
    "model.max_positions=48",
    "tokenizer.vocab_size=400",
    "tokenizer.algorithm=bpe",
    "optimizer.warmup_steps=4",
    "stages[0].steps=22",
    "stages[0].seq_len=32",
    "stages[0].batch_size=16",
    "train.log_every=3",
    "train.checkpoint_every=4",
    "evaluation.every=12",
    "evaluation.max_rows=20",
)
STEPS = 22
# Compiling is most of these runs, and how good the machine code is does not matter to them.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
TEXT = "The {0} river rises in the {1} hills and flows past {2} towns before it meets the {3} sea."
WORDS = ["northern", "old", "quiet", "stone", "green", "white", "upper", "lower", "seven", "cold"]


class Runs:
    """Starts the tiny run in any number of processes, all of them recorded (see recorded_train)."""

    def __init__(self, directory: pathlib.Path):
        self.directory, self.serial = directory, 0
        source = directory / "rivers.jsonl"
        with source.open("w") as lines:
            for index in range(400):
                words = (WORDS[(index * step + step) % len(WORDS)] for step in (1, 3, 7, 9))
                lines.write(json.dumps({"text": f"{index}. {TEXT.format(*words)}"}) + "\n")
        self.fields = [f"--config.{field}" for field in (f"data.source=files:{source}?field=text", *TRAINING)]
        self.arguments = ["--config", SMOKE, "--data", str(directory / "data"), "--workers=1", *self.fields]

    def __call__(
        self, workdir: pathlib.Path, processes: int, devices: int, hurt: dict[int, str] | None = None, options: tuple = ()
    ) -> tuple[list[int], list[pathlib.Path], list[pathlib.Path]]:
        """Runs to the end. Returns the statuses, the logs and the records, by process."""
        self.serial += 1
        port, started, logs, records = free_port(), [], [], []
        for process in range(processes):
            record = self.directory / f"{self.serial}-{process}.jsonl"
            logs.append(record.with_suffix(".log"))
            records.append(record)
            several = (f"--coordinator=127.0.0.1:{port}", f"--num-processes={processes}", f"--process-id={process}")
            command = [
                *(sys.executable, str(ROOT / "tests" / "recorded_train.py"), str(record), (hurt or {}).get(process, "-")),
                *("train", "--workdir", str(workdir), *self.arguments, *options, *(several if processes > 1 else ())),
            ]
            started.append(start(command, logs[-1], JAX_NUM_CPU_DEVICES=str(devices), XLA_FLAGS=QUICK))
        return ends(started, 900), logs, records


def examples(records: list[pathlib.Path]) -> dict[int, list[list[int]]]:
    """By step, what each row of the global batch was: epoch, example, checksum of its mask."""
    steps: dict[int, dict[int, list[int]]] = {}
    for record in records:
        for line in record.read_text().splitlines() if record.exists() else ():
            entry = json.loads(line)
            steps.setdefault(entry["step"], {}).update({int(row): content for row, content in entry["rows"].items()})
    return {step: [rows[row] for row in range(16)] for step, rows in sorted(steps.items()) if len(rows) == 16}


def curve(workdir: pathlib.Path) -> dict[tuple[str, int], dict[str, float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clocked = ("tokens_per_second", "mfu", "step", "kind", "probes")
    return {(line["kind"], line["step"]): {k: v for k, v in line.items() if k not in clocked} for line in lines}


def assert_same_curve(workdir: pathlib.Path, alone: pathlib.Path) -> None:
    """Sums in another order differ by a few float32 roundings a step, which 22 steps of training let grow."""
    expected = curve(alone)
    found = curve(workdir)
    assert found.keys() == expected.keys()
    for place, values in expected.items():
        assert found[place] == pytest.approx(values, rel=1e-4, abs=1e-6), place


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone(runs) -> tuple[pathlib.Path, dict[int, list[list[int]]]]:
    """One process of 8 devices, never interrupted: its workdir and its examples."""
    workdir = runs.directory / "alone"
    statuses, logs, records = runs(workdir, 1, 8)
    assert statuses == [0], logs[0].read_text()
    taken = examples(records)
    assert list(taken) == list(range(1, STEPS + 1))
    assert taken[1] != taken[2]
    return workdir, taken


def newest(workdir: pathlib.Path) -> int:
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def test_two_processes_killed_then_one_killed_then_four_are_one_run(runs, alone):
    """The whole chain: elastic, exact, past a damaged checkpoint, onto another layout."""
    workdir, taken = runs.directory / "elastic", {}
    statuses, logs, records = runs(workdir, 2, 4, hurt={1: "kill@11"})
    assert statuses == [1, -signal.SIGKILL]
    (message,) = messages(logs[0])
    assert "process 1 of 2 on" in message and "died, or its machine did" in message
    taken |= examples(records)

    first = newest(workdir)
    assert first in (4, 8)
    statuses, logs, records = runs(workdir, 1, 8, hurt={0: "kill@18"})
    assert statuses == [-signal.SIGKILL] and f"continuing from the checkpoint of step {first}" in logs[0].read_text()
    assert min(examples(records)) == first + 1
    again = examples(records)
    assert all(taken[step] == again[step] for step in taken.keys() & again.keys())
    taken |= again

    second = newest(workdir)
    (arrays,) = (workdir / "checkpoints" / str(second) / "params" / "d").iterdir()
    os.truncate(arrays, arrays.stat().st_size // 2)
    layout = ("--config.sharding.data=2", "--config.sharding.fsdp=2", "--config.sharding.tensor=2")
    statuses, logs, records = runs(workdir, 4, 2, options=layout)
    assert statuses == [0] * 4, logs[0].read_text()
    assert any(f"checkpoint {second} cannot be read" in log.read_text() for log in logs)
    assert (workdir / "damaged_checkpoints" / str(second)).is_dir()
    again = examples(records)
    assert min(again) == second - 4 + 1
    taken |= again
    assert taken == alone[1]
    assert_same_curve(workdir, alone[0])


@pytest.mark.parametrize(
    "hurt",
    [
        pytest.param({1: "term@5"}, id="one"),
        pytest.param({0: "term@5", 1: "term@6"}, id="both", marks=pytest.mark.slow),
    ],
)
def test_sigterm_to_one_of_two_saves_both_and_they_go_on_exactly(runs, alone, hurt):
    workdir = runs.directory / f"stopped_{len(hurt)}"
    statuses, logs, records = runs(workdir, 2, 4, hurt=hurt)
    assert statuses == [143, 143], logs[0].read_text()
    step = newest(workdir)
    assert 5 <= step < STEPS and f"step {step} is saved, the same command continues" in messages(logs[0])[0]
    taken = examples(records)
    assert list(taken) == list(range(1, step + 1))  # not a step beyond what was agreed on
    statuses, logs, records = runs(workdir, 2, 4)
    assert statuses == [0, 0], logs[0].read_text()
    assert taken | examples(records) == alone[1]
    assert_same_curve(workdir, alone[0])


def local_cluster(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "local_cluster.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHON": sys.executable} | environment,
    )


def test_a_local_cluster_says_what_it_would_start():
    done = local_cluster("2", "--devices", "4", "--port", "4321", "--dry-run", "--", "--config", "c.py", "--workdir", "a b")
    first, second = done.stdout.splitlines()
    assert "JAX_NUM_CPU_DEVICES=4" in first and first.replace("--process-id 0", "--process-id 1") == second
    assert "--coordinator 127.0.0.1:4321 --num-processes 2 --process-id 1 --config c.py --workdir a\\ b" in second
    assert local_cluster("two", "--", "x").returncode == 2


def test_a_mesh_that_does_not_fit_all_processes_is_told_once(runs, tmp_path):
    done = local_cluster(
        *("2", "--devices", "4", "--", "--workdir", str(tmp_path / "w"), *runs.arguments, "--config.sharding.data=3")
    )
    assert done.returncode == 2
    (message,) = re.findall(r"^\[\d\] mlm-jax: (.*)", done.stderr, re.M)
    assert "data=3" in message and message.endswith("does not multiply out to the 8 devices here; set one axis to -1")


def test_a_workdir_that_is_taken_is_told_once(runs, alone):
    with Workdir(alone[0]).lock():
        statuses, logs, _ = runs(alone[0], 2, 4)
    assert statuses == [2, 2]
    (message,) = messages(logs[0]) + messages(logs[1])
    assert "another process is training in" in message


def test_a_workdir_of_another_model_is_told_once(runs, alone):
    statuses, logs, _ = runs(alone[0], 2, 4, options=("--config.model.mlp_dim=128",))
    assert statuses == [2, 2]
    (message,) = messages(logs[0]) + messages(logs[1])
    assert "holds a run of another config (model.mlp_dim: 64 -> 128)" in message
