"""Runs Slurm on this machine and launch/slurm.sbatch in it: two tasks, interrupted in three ways, against a job left alone.

python tests/slurm_requeue.py        prints what happens; exit status 1 unless both jobs end with the same losses

Needs Slurm and munge (Debian: apt-get install slurm-wlm munge), a host name that resolves, and .venv (launch/test.sh).
Everything else, keys, daemons' state and ports included, is made in a temporary folder and ends with it.
"""

import contextlib
import getpass
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from kill_resume import OVERRIDES, ROOT, metrics

DAEMONS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
STEPS = 60
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again waits until the credential of its last start has expired, two minutes unless told otherwise.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why this machine cannot run Slurm, None if it can."""
    absent = [name for name in DAEMONS if shutil.which(name, path=search_path()) is None]
    if absent:
        return f"no {', '.join(absent)} here (Debian: apt-get install slurm-wlm munge)"
    if not (ROOT / ".venv/bin/python").exists():
        return "no .venv in the checkout (bash launch/test.sh makes it)"
    try:
        socket.gethostbyname(host())
    except OSError:
        return f"the host name {host()} does not resolve; add it to /etc/hosts"
    return None


def search_path() -> str:
    """PATH with the folders of daemons, which a user's lacks."""
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def host() -> str:
    return socket.gethostname().split(".")[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def one_machine_slurm(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """Starts munged, slurmctld and slurmd in `folder`; yields the environment for Slurm's commands."""
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    configuration = folder / "slurm.conf"
    ports = {"controller_port": free_port(), "daemon_port": free_port()}
    configuration.write_text(CONFIGURATION.format(host=host(), user=getpass.getuser(), folder=folder, **ports))
    environment = os.environ | {"PATH": search_path(), "SLURM_CONF": str(configuration)}
    key = folder / "munge.key"
    subprocess.run(["mungekey", "--create", f"--keyfile={key}"], env=environment, check=True)
    munge_files = [f"--{name}={folder}/munge.{name[:4]}" for name in ("pid-file", "seed-file", "log-file")]
    commands = (
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket", *munge_files],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    )
    daemons = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "wb") as output:
                daemons.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
            wait_for(lambda: (folder / "munge.socket").exists(), 10, "munged's socket")
        wait_for(lambda: "State=IDLE" in ask(environment, "scontrol", "show", "node"), 60, f"an idle node; see {folder}")
        yield environment
    finally:
        ask(environment, "scancel", "--user", getpass.getuser())  # a step outlives slurmd
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not ask(environment, "squeue", "--noheader"), 60, "the end of all jobs")
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)


def ask(environment: dict[str, str], *command: str) -> str:
    """What a command of Slurm's prints; empty while the daemons are not there yet."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.1)


class Job:
    """A job of two CPU tasks that runs launch/slurm.sbatch."""

    def __init__(self, environment: dict[str, str], workdir: pathlib.Path, data: pathlib.Path):
        self.environment = environment
        self.workdir = workdir
        self.output = workdir.with_suffix(".log")
        overrides = [f"--config.{override}" for override in (*OVERRIDES, f"stages[0].steps={STEPS}")]
        printed = subprocess.run(
            [
                *("sbatch", "--parsable", "--ntasks=2", "--time=30", f"--output={self.output}", "launch/slurm.sbatch", "--"),
                *("--config", "configs/smoke.py", "--workdir", str(workdir), "--data", str(data), *overrides),
            ],
            env=environment | {"JAX_NUM_CPU_DEVICES": "1"},
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        self.number = printed.stdout.strip()

    def state(self) -> str:
        for word in ask(self.environment, "scontrol", "show", "job", self.number).split():
            if word.startswith("JobState="):
                return word.removeprefix("JobState=")
        return "UNKNOWN"

    def step(self) -> int:
        """The last step in the metrics."""
        file = self.workdir / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def starts(self) -> int:
        return self.output.read_text().count("slurm.sbatch: start ") if self.output.exists() else 0

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: self.step() >= step or self.state() in FINAL, 600, f"step {step}")
        assert self.state() == "RUNNING", f"{self.state()} before step {step}:\n{self.output.read_text()[-3000:]}"

    def wait_for_start(self, number: int) -> None:
        wait_for(lambda: self.starts() >= number, 300, f"start {number}")

    def wait_for_end(self, state: str = "COMPLETED") -> None:
        wait_for(lambda: self.state() in FINAL, 900, "the end of the job")
        assert self.state() == state, f"{self.state()}:\n{self.output.read_text()[-3000:]}"

    def say_that_time_is_nearly_over(self) -> None:
        """What Slurm does before the time limit, by --signal=B:USR1@300."""
        subprocess.run(["scancel", "--batch", "--signal=USR1", self.number], env=self.environment, check=True)

    def kill_a_task(self) -> None:
        """SIGKILL to the second task, as the kernel does when memory is short."""
        rows = [line.split() for line in ask(self.environment, "scontrol", "listpids", self.number).splitlines()[1:]]
        pids = [int(pid) for pid, _, step, local_id, *_ in rows if step != "batch" and local_id == "1"]
        assert len(pids) == 1, rows
        os.kill(pids[0], signal.SIGKILL)

    def requeue(self) -> None:
        """What an administrator does to empty a node."""
        subprocess.run(["scontrol", "requeue", self.number], env=self.environment, check=True)

    def cancel(self) -> None:
        subprocess.run(["scancel", self.number], env=self.environment, check=True)


def check_equal(alone: list[dict[str, object]], interrupted: list[dict[str, object]]) -> None:
    """Raises AssertionError unless the same steps were logged, each once, with the same losses to float tolerance."""
    assert [line["step"] for line in alone] == [line["step"] for line in interrupted]
    leaves = zip(jax.tree.leaves_with_path(alone), jax.tree.leaves_with_path(interrupted), strict=True)
    for (path, value), (other_path, other) in leaves:
        assert path == other_path
        if isinstance(value, float):
            np.testing.assert_allclose(other, value, rtol=1e-5, err_msg=jax.tree_util.keystr(path))
        else:
            assert other == value, jax.tree_util.keystr(path)


def slurm_requeue(folder: pathlib.Path) -> str:
    """Runs the jobs, compares the losses and returns the interrupted one's log."""
    with one_machine_slurm(folder) as environment:
        alone = Job(environment, folder / "alone", folder / "data")
        alone.wait_for_end()
        job = Job(environment, folder / "interrupted", folder / "data")
        for number, interrupt in enumerate((job.say_that_time_is_nearly_over, job.kill_a_task, job.requeue), start=1):
            job.wait_for_step(STEPS * number // 5)
            print(f"step {job.step()}: {interrupt.__name__}", flush=True)
            interrupt()
            job.wait_for_start(number + 1)
        job.wait_for_end()
        cancelled = Job(environment, folder / "cancelled", folder / "data")
        cancelled.wait_for_step(1)
        cancelled.cancel()
        cancelled.wait_for_end("CANCELLED")
        assert cancelled.starts() == 1, "what its user cancels is not queued again"
    check_equal(metrics(alone.workdir), metrics(job.workdir))
    return job.output.read_text()


def main() -> None:
    if reason := missing():
        raise SystemExit(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the daemons end with this process
    with tempfile.TemporaryDirectory() as folder:
        log = slurm_requeue(pathlib.Path(folder))
    print(*(line for line in log.splitlines() if line.startswith("slurm.sbatch:")), sep="\n")
    print("the interrupted job has the losses of the one left alone, step by step")


if __name__ == "__main__":
    main()
