"""The scripts in launch/: what they would run, what they refuse, and the life of a TPU slice against a stand-in cloud."""

import gzip
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Any

import jsonschema
import pytest
import slurm_requeue
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What a shell, a remote shell, YAML and Kubernetes could each spoil.
TRAIN = [
    *("--config", "configs/bert_base.py", "--workdir", "gs://bucket/runs/bert"),
    "--config.stages[0].steps=100",
    '--config.data.source=files:a b/*.txt?field=text&documents="line"\'s $(HOME) ${NAME} \\n',
]
TPU = ["--name", "bert", "--zone", "us-west4-a", "--type", "v5litepod-16"]
JOBSET = ["--name", "bert", "--image", "registry/mlm-jax:tpu", "--claim", "training"]


@pytest.fixture
def recorder(tmp_path: pathlib.Path) -> dict[str, str]:
    """An environment where the programs that change anything write down that they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gcloud", "kubectl", "srun", "sbatch", "scontrol", "scancel"):
        (folder / name).write_text(f'#!/bin/sh\necho "$0 $*" >>{tmp_path}/called\n')
        (folder / name).chmod(0o755)
    without_slurm = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return without_slurm | {"PATH": f"{folder}:{os.environ['PATH']}"}


def launch(environment: dict[str, str], script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def dry_run(environment: dict[str, str], tmp_path: pathlib.Path, script: str, *arguments: str) -> str:
    """What a script prints with --dry-run, having called nothing that changes anything."""
    done = launch(environment, script, *arguments)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "called").exists(), (tmp_path / "called").read_text()
    return done.stdout


def commands(printed: str) -> list[list[str]]:
    return [shlex.split(line) for line in printed.splitlines() if not line.startswith("#")]


def start_on_workers(command: list[str]) -> list[str] | None:
    """Of the ssh command that starts a run: the words that the shell of every worker makes of it."""
    values = dict(word.removeprefix("--").split("=", 1) for word in command[6:] if "=" in word)
    if command[4:5] != ["ssh"] or "worker.sh start" not in values["command"]:
        return None
    assert (values["worker"], values["node"]) == ("all", "all")
    spoken = f"bash() {{ printf '%s\\0' bash \"$@\"; }}; {values['command']}"
    return subprocess.run(["bash", "-c", spoken], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


class TestTpuVm:
    def test_dry_run_of_keep_plays_a_preemption_and_starts_the_same_again(self, recorder, tmp_path):
        printed = dry_run(recorder, tmp_path, "tpu_vm.sh", "keep", *TPU, "--spot", "--delete", "--dry-run", "--", *TRAIN)
        verbs = [command[4] for command in commands(printed) if command[0] == "gcloud" and command[4] != "describe"]
        once = ["create", "ssh", "scp", "ssh", "ssh", "ssh"]  # state, archive, installation, start, state
        assert verbs == [*once, "ssh", "delete", *once, "delete"]
        starts = [words for command in commands(printed) if (words := start_on_workers(command))]
        assert starts == [["bash", "mlm-jax/launch/worker.sh", "start", *TRAIN]] * 2
        creates = [command for command in commands(printed) if command[4] == "create"]
        assert creates[0] == creates[1]
        assert {"--spot", "--node-id=bert", "--runtime-version=v2-alpha-tpuv5-lite"} < set(creates[0])

    @pytest.mark.parametrize(
        ("workdir", "options", "cache"),
        [
            ("gs://bucket/runs/bert", [], "gs://bucket/runs/jax-cache"),
            ("gs://bucket/bert/", [], "gs://bucket/jax-cache"),
            ("gs://bucket", [], "gs://bucket/jax-cache"),
            ("gs://bucket/bert", ["--cache", "gs://other/a b"], "gs://other/a b"),
        ],
    )
    def test_compiled_programs_are_kept_beside_the_workdir(self, recorder, tmp_path, workdir, options, cache):
        arguments = ["start", *TPU, *options, "--dry-run", "--", "--config", "c", "--workdir", workdir]
        [command] = commands(dry_run(recorder, tmp_path, "tpu_vm.sh", *arguments))
        [spoken] = [word.removeprefix("--command=") for word in command if word.startswith("--command=")]
        run = f"bash() {{ printenv JAX_COMPILATION_CACHE_DIR; }}; {spoken}"
        told = subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=True).stdout
        assert told == f"{cache}\n"

    def test_several_slices_are_one_request(self, recorder, tmp_path):
        printed = dry_run(recorder, tmp_path, "tpu_vm.sh", "create", *TPU, "--slices=4", "--project=p", "--dry-run")
        create = commands(printed)[0]
        assert {"--node-count=4", "--node-prefix=bert", "--project=p", "--zone=us-west4-a"} < set(create)
        assert not any(word.startswith(("--node-id", "--spot")) for word in create)

    @pytest.mark.parametrize(
        ("kind", "image"),
        [("v4-16", "tpu-ubuntu2204-base"), ("v5p-128", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e")],
    )
    def test_image_follows_the_generation(self, recorder, tmp_path, kind, image):
        arguments = ("create", "--name", "a", "--zone", "z", "--dry-run", "--type", kind)
        assert f"--runtime-version={image}" in commands(dry_run(recorder, tmp_path, "tpu_vm.sh", *arguments))[0]
        own = commands(dry_run(recorder, tmp_path, "tpu_vm.sh", *arguments, "--runtime", "mine"))[0]
        assert "--runtime-version=mine" in own

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["fly"], "no verb 'fly'; there are keep, create"),
            (["create", "--zone", "z", "--type", "v4-8"], "create needs --name NAME"),
            (["create", "--name", "Bert", "--zone", "z", "--type", "v4-8"], "--name Bert: lower-case letters"),
            (["status", "--name", "bert"], "status needs --zone ZONE"),
            (["create", "--name", "a", "--zone", "z"], "create needs --type TYPE"),
            (["create", "--name", "a", "--zone", "z", "--type", "v5e-16"], "the cloud calls that type v5litepod-16"),
            (["create", "--name", "a", "--zone", "z", "--type", "v5e:4x4"], "a generation and a size, as v4-16"),
            (["create", "--name", "a", "--zone", "z", "--type", "h100-8"], "a generation and a size, as v4-16"),
            (["create", *TPU, "--slices", "0"], "--slices 0: a number of slices"),
            (["create", *TPU, "--slices"], "--slices needs a value"),
            (["create", *TPU, "--spott"], "unknown option '--spott'"),
            (["create", *TPU, "--", "--config", "c"], "create takes no arguments of mlm-jax train"),
            (["keep", *TPU], "keep needs the arguments of mlm-jax train after --"),
            (["keep", *TPU, "--", "--workdir", "runs/bert"], "--workdir 'runs/bert': the VMs' disks go"),
            (["start", *TPU, "--", "--config", "c"], "--workdir '': the VMs' disks go"),
        ],
    )
    def test_misuse_is_told_and_runs_nothing(self, recorder, tmp_path, arguments, message):
        done = launch(recorder, "tpu_vm.sh", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert not (tmp_path / "called").exists()

    @pytest.fixture
    def cloud(self, recorder, tmp_path):
        cloud = tmp_path / "cloud"
        cloud.mkdir()
        gcloud = f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/fake_cloud.py {cloud} "$@"\n'
        (tmp_path / "bin" / "gcloud").write_text(gcloud)
        return cloud

    def test_a_slice_that_is_taken_away_is_made_again_and_the_run_continues(self, recorder, cloud):
        setup = f"pwd >>{cloud}/setup"
        done = launch(recorder | {"POLL_SECONDS": "0"}, "tpu_vm.sh", "keep", *TPU, "--spot", "--setup", setup, "--", *TRAIN)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "bert was pre-empted" in done.stderr
        assert "the run has ended" in done.stderr
        [advice] = [line for line in done.stderr.splitlines() if "the slice is still there: " in line]
        deletion = launch(recorder, *shlex.split(advice.split("bash launch/")[1]))
        assert (deletion.returncode, (cloud / "state").exists()) == (0, False)
        assert "a line of the run's log" in done.stdout
        expected = ["-m", "mlm_jax", "train", *TRAIN, "--distributed"]
        started = {file.name: file.read_text().split("\0")[:-1] for file in cloud.glob("started-*")}
        assert started == {f"started-{number}-{worker}": expected for number in (1, 2) for worker in (0, 1)}
        calls = [line.split()[0] for line in (cloud / "calls").read_text().splitlines()]
        assert (calls.count("create"), calls.count("delete"), calls.count("scp")) == (2, 2, 2)
        assert (cloud / "caches").read_text().split() == ["gs://bucket/runs/jax-cache"] * 4
        assert (cloud / "setup").read_text().split() == [f"{cloud}/home{worker}/mlm-jax" for worker in (0, 1)] * 2

    @pytest.mark.parametrize(
        ("ends", "starts", "message"),
        [
            pytest.param(["1 0"] * 9, 4, "the run ended 1; that was failure 4 in a row", id="it never saves"),
            pytest.param(["1 5"] * 9, 4, "that was failure 4 in a row", id="it never saves again"),
            pytest.param([*(f"1 {step}" for step in range(6)), "0 6"], 7, "the run has ended", id="it saves between"),
            pytest.param(["143 0", "130 0"] * 3 + ["0 0"], 7, "the run has ended", id="it is stopped by signals"),
            pytest.param(["1 0", "143 0"] * 3 + ["1 0"], 7, "that was failure 4 in a row", id="signals save nothing"),
        ],
    )
    def test_failures_without_a_checkpoint_between_them_are_counted(self, recorder, cloud, ends, starts, message):
        done = self.keep(recorder, cloud, ends, ends)
        assert done.returncode == (0 if message == "the run has ended" else 1)
        assert message in done.stderr
        assert len((cloud / "caches").read_text().split()) == 2 * starts

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            (["1 0", "0 0"], ["143 0", "0 0"], "the run ended 1; again, for the 1. time of 3"),
            (["0 0", "0 0"], ["143 0", "0 0"], "the run was stopped by a signal; it continues"),
        ],
    )
    def test_a_failure_of_one_worker_comes_before_a_stop_and_that_before_an_end(
        self, recorder, cloud, first, second, message
    ):
        done = self.keep(recorder, cloud, first, second)
        assert done.returncode == 0 and message in done.stderr

    def keep(self, recorder, cloud, *plans: list[str]) -> subprocess.CompletedProcess[str]:
        """`keep` of a run whose starts end as they are planned for each worker: a status and the step it continued at."""
        for worker, plan in enumerate(plans):
            (cloud / f"plan-{worker}").write_text("\n".join(plan) + "\n")
        return launch(recorder | {"POLL_SECONDS": "0"}, "tpu_vm.sh", "keep", *TPU, "--", *TRAIN)

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("gcloud") is None, reason="no gcloud here")
    def test_gcloud_knows_every_option(self, recorder, tmp_path):
        printed = dry_run(
            *(recorder, tmp_path, "tpu_vm.sh", "keep", *TPU, "--project", "p", "--slices", "2", "--spot"),
            *("--dry-run", "--", *TRAIN),
        )
        nobody = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false"}
        for command in {tuple(command) for command in commands(printed) if command[0] == "gcloud"}:
            done = subprocess.run(command, env=nobody, capture_output=True, text=True, check=False)
            assert "do not currently have an active account" in done.stderr, done.stderr


class TestWorker:
    @pytest.fixture
    def project(self, tmp_path):
        """A worker's copy of the project, with a stand-in for training."""
        project = tmp_path / "mlm-jax"
        (project / "launch").mkdir(parents=True)
        shutil.copy(ROOT / "launch/worker.sh", project / "launch")
        python = project / ".venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text("#!/usr/bin/env bash\ntrap 'echo saved; exit 143' TERM\necho begun\nsleep 30 & wait\n")
        python.chmod(0o755)
        return project

    def give(self, project: pathlib.Path, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(project / "launch/worker.sh"), *words]
        # Each connection is a session of its own, as with ssh.
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20, start_new_session=True)

    def test_one_run_at_a_time_that_a_signal_ends(self, project):
        log = project / "run/log.txt"
        assert self.give(project, "state").stdout == "worker none\n"
        assert self.give(project, "start", "--workdir", "gs://b/r").returncode == 0
        slurm_requeue.wait_for(lambda: "begun" in log.read_text(), 10, "the run")
        assert self.give(project, "state").stdout == "worker running\n"
        second = self.give(project, "start", "--workdir", "gs://b/other")
        assert second.returncode == 1
        assert "a run is going on this worker: mlm-jax train --workdir gs://b/r" in second.stderr
        self.give(project, "stop")
        slurm_requeue.wait_for((project / "run/status").exists, 10, "the status")
        assert self.give(project, "state").stdout == "worker ended 143\n"
        assert "saved" in self.give(project, "logs").stdout
        for step in (40, 80):
            with log.open("a") as lines:
                lines.write(f"12:00:00 mlm_jax.train.loop: continuing from the checkpoint of step {step}\nmore\n")
        assert self.give(project, "state").stdout == "worker ended 143\nbegun 80\n"

    def test_a_run_that_a_restart_of_the_machine_took_is_lost(self, project):
        self.give(project, "start", "--workdir", "gs://b/r")
        slurm_requeue.wait_for(lambda: (project / "run/pid").exists(), 10, "the run")
        os.killpg(os.getpgid(int((project / "run/pid").read_text())), signal.SIGKILL)
        slurm_requeue.wait_for(lambda: self.give(project, "state").stdout == "worker lost\n", 10, "the end")


def closed(schema: Any) -> Any:
    """The schema with unknown fields refused, where Kubernetes would drop them in silence."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        result.setdefault("additionalProperties", False)
    return result


@pytest.fixture(scope="session")
def schema(data_path: pathlib.Path) -> Any:
    """What Kubernetes checks a JobSet by, from its custom resource definition."""
    file = data_path / "schemas" / "jobset.crd.yaml.gz"
    if not file.exists():
        pytest.skip(f"no JobSet definition at {file}")
    [version] = yaml.safe_load(gzip.decompress(file.read_bytes()))["spec"]["versions"]
    assert version["name"] == "v1alpha2"
    return closed(version["schema"]["openAPIV3Schema"])


class TestJobSet:
    def manifest(self, environment, tmp_path, *arguments: str) -> dict[str, Any]:
        return yaml.safe_load(
            dry_run(environment, tmp_path, "gke_jobset.sh", *JOBSET, *arguments, "--dry-run", "--", *TRAIN)
        )

    @pytest.mark.parametrize(
        "arguments", [["--tpu", "v5e:4x4", "--slices", "2"], ["--gpu", "nvidia-h200-141gb:8", "--nodes", "4"]]
    )
    def test_manifest_obeys_the_definition(self, recorder, tmp_path, schema, arguments):
        manifest = self.manifest(recorder, tmp_path, *arguments)
        assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        validate = jsonschema.Draft202012Validator(schema).validate
        validate(manifest)
        manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 0
        with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
            validate(manifest)

    @pytest.mark.parametrize(
        ("tpu", "accelerator", "hosts", "chips"),
        [
            ("v4:2x2x2", "tpu-v4-podslice", 2, 4),
            ("v5e:2x2", "tpu-v5-lite-podslice", 1, 4),
            ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4),
            ("v5p:4x4x4", "tpu-v5p-slice", 16, 4),
            ("v6e:1x1", "tpu-v6e-slice", 1, 1),
        ],
    )
    def test_pods_have_the_chips_of_the_topology(self, recorder, tmp_path, tpu, accelerator, hosts, chips):
        [job] = self.manifest(recorder, tmp_path, "--tpu", tpu, "--slices", "3")["spec"]["replicatedJobs"]
        assert (job["replicas"], job["template"]["spec"]["parallelism"], job["template"]["spec"]["completions"]) == (
            *(3, hosts, hosts),
        )
        pod = job["template"]["spec"]["template"]["spec"]
        assert pod["nodeSelector"] == {
            "cloud.google.com/gke-tpu-accelerator": accelerator,
            "cloud.google.com/gke-tpu-topology": tpu.split(":")[1],
        }
        assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}

    def test_gpu_processes_are_told_of_each_other(self, recorder, tmp_path):
        manifest = self.manifest(recorder, tmp_path, "--gpu", "nvidia-h200-141gb:8", "--nodes", "4")
        [job] = manifest["spec"]["replicatedJobs"]
        container = job["template"]["spec"]["template"]["spec"]["containers"][0]
        variables = {variable["name"]: variable.get("value") for variable in container["env"]}
        # The name that a JobSet gives a pod: JOBSET-REPLICATEDJOB-JOB-POD.SUBDOMAIN, whose subdomain is the JobSet's name.
        assert variables["JAX_COORDINATOR_ADDRESS"] == f"bert-{job['name']}-0-0.bert:8476"
        assert variables["JAX_NUM_PROCESSES"] == str(job["template"]["spec"]["completions"]) == "4"
        assert job["template"]["spec"]["completionMode"] == "Indexed"
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}

    @pytest.mark.parametrize("arguments", [["--tpu", "v5e:4x4"], ["--gpu", "nvidia-h200-141gb:8"]])
    def test_arguments_reach_the_container_as_they_were_given(self, recorder, tmp_path, arguments):
        [job] = self.manifest(recorder, tmp_path, *arguments)["spec"]["replicatedJobs"]
        words = job["template"]["spec"]["template"]["spec"]["containers"][0]["args"]
        # Kubernetes reads $$ as $, and leaves what then looks like a variable.
        assert [word.replace("$$", "$") for word in words] == [*TRAIN, "--distributed"]
        assert not any("$" in word.replace("$$", "") for word in words)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--image", "i", "--claim", "c", "--tpu", "v5e:4x4"], "--name NAME is missing"),
            (["--name", "a", "--claim", "c", "--tpu", "v5e:4x4"], "--image IMAGE is missing"),
            (["--name", "a", "--image", "i", "--tpu", "v5e:4x4"], "--claim CLAIM is missing"),
            (
                ["--name", "a", "--image", "a b", "--claim", "c", "--tpu", "v5e:4x4"],
                "--image a b is not the name of an image",
            ),
            ([*JOBSET], "either --tpu GENERATION:TOPOLOGY or --gpu TYPE:COUNT"),
            ([*JOBSET, "--tpu", "v5e:4x4", "--gpu", "nvidia-l4:1"], "either --tpu"),
            ([*JOBSET, "--tpu", "v5litepod-16"], "a generation and a topology, as v4:2x2x2"),
            ([*JOBSET, "--tpu", "v5e:4x4x4"], "the chips of v5e are wired in 2 dimensions"),
            ([*JOBSET, "--tpu", "v5p:4x4"], "the chips of v5p are wired in 3 dimensions"),
            ([*JOBSET, "--tpu", "v5e:4x4", "--chips-per-host", "3"], "3 does not divide the 16 chips of 4x4"),
            ([*JOBSET, "--tpu", "v5e:4x4", "--nodes", "4"], "--nodes is for --gpu"),
            ([*JOBSET, "--gpu", "nvidia-l4:1", "--slices", "4"], "--slices and --chips-per-host are for --tpu"),
            ([*JOBSET, "--gpu", "h200"], "a type and how many a machine has"),
            ([*JOBSET, "--gpu", "nvidia-l4:1", "--nodes", "many"], "--nodes many: a number, 1 or more"),
            ([*JOBSET, "--tpu", "v5e:4x4"], "the arguments of mlm-jax train are missing, after --"),
            ([*JOBSET, "--tpu", "v5e:4x4", "--", "--workdir", "runs/a"], "--workdir 'runs/a': what is in a pod goes"),
            ([*JOBSET, "--tpu", "v5e:4x4", "--", "--workdir=/shared/a", "a\nb"], "an argument with a line break"),
        ],
    )
    def test_misuse_is_told_and_applies_nothing(self, recorder, tmp_path, arguments, message):
        done = launch(recorder, "gke_jobset.sh", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert not (tmp_path / "called").exists()


class TestSlurm:
    def test_dry_run_shows_one_step_with_the_arguments_as_given(self, recorder, tmp_path):
        printed = dry_run(recorder | {"SLURM_CPUS_PER_TASK": "12"}, tmp_path, "slurm.sbatch", "--dry-run", "--", *TRAIN)
        [step] = [command for command in commands(printed) if command[0] == "srun"]
        python = step.index(".venv/bin/python")
        assert step[python:] == [".venv/bin/python", "-m", "mlm_jax", "train", *TRAIN, "--distributed"]
        assert {"--kill-on-bad-exit=0", "--wait=120", "--cpus-per-task=12"} < set(step[:python])
        assert "JAX_PLATFORMS=cpu" in printed

    def test_a_job_with_gpus_is_left_its_gpus(self, recorder, tmp_path):
        environment = {name: value for name, value in recorder.items() if name != "JAX_PLATFORMS"}
        printed = dry_run(environment | {"SLURM_GPUS_ON_NODE": "8"}, tmp_path, "slurm.sbatch", "--dry-run", "--", *TRAIN)
        assert "JAX_PLATFORMS" not in printed

    def test_the_notice_is_for_the_script_and_the_job_may_be_queued_again(self):
        options = [line for line in (ROOT / "launch/slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
        assert "#SBATCH --requeue" in options
        assert "#SBATCH --signal=B:USR1@300" in options

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "the arguments of mlm-jax train are missing, after --"),
            (["--"], "the arguments of mlm-jax train are missing, after --"),
            (["--config", "c"], "the arguments of mlm-jax train are missing, after --"),
            (["--", "--config", "c"], "outside of a job there is only --dry-run"),
        ],
    )
    def test_misuse_is_told_and_runs_nothing(self, recorder, tmp_path, arguments, message):
        done = launch(recorder, "slurm.sbatch", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert not (tmp_path / "called").exists()

    @pytest.mark.parametrize(
        ("status", "restarts", "again"),
        [(0, 0, False), (1, 0, True), (2, 0, False), (137, 9, True), (1, 10, False), (143, 0, False)],
    )
    def test_faults_are_queued_again_and_nothing_else(self, recorder, tmp_path, status, restarts, again):
        (tmp_path / "bin" / "srun").write_text(f"#!/bin/sh\nexit {status}\n")
        for file in ("launch/slurm.sbatch", ".venv/bin/python"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text("")
            (tmp_path / file).chmod(0o755)
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_SUBMIT_DIR": str(tmp_path)}
        done = launch(recorder | job | {"SLURM_RESTART_COUNT": str(restarts)}, "slurm.sbatch", "--", *TRAIN)
        assert done.returncode == status, done.stderr
        called = tmp_path / "called"
        assert (called.exists() and called.read_text().endswith("scontrol requeue 7\n")) == again

    @pytest.mark.slow
    def test_an_interrupted_job_ends_as_the_one_left_alone(self):
        if reason := slurm_requeue.missing():
            pytest.skip(reason)
        with tempfile.TemporaryDirectory() as folder:  # a short path: munge's socket lies in it
            log = slurm_requeue.slurm_requeue(pathlib.Path(folder))
        assert log.count("slurm.sbatch: start ") == 4
        assert "ended with status 143; job" in log
