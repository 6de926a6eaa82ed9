"""Stands in for `gcloud compute tpus queued-resources`: a folder is the cloud, folders in it are the workers' homes.

python tests/fake_cloud.py FOLDER compute tpus queued-resources VERB …

What a worker is asked by ssh is really run, in bash. The slice is taken away while its log is followed for the first
time. What is installed is a stand-in for training: it writes down its arguments, and ends only on the second slice.
Where FOLDER/plan-WORKER is, no slice is taken away, and each start ends as the next line says: a status and the step that
it continued at.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys

WORKERS = 2
INSTALL = r"""mkdir -p .venv/bin && cat >.venv/bin/python <<'END'
#!/usr/bin/env bash
echo "a line of the run's log"
printf '%s\0' "$@" >"$CLOUD/started-$SLICE-$WORKER"
echo "$JAX_COMPILATION_CACHE_DIR" >>"$CLOUD/caches"
if [[ -f $CLOUD/plan-$WORKER ]]; then
  read -r status step < <(sed -n "$(grep -c '^mlm-jax train' run/log.txt)p" "$CLOUD/plan-$WORKER")
  ((step == 0)) || echo "12:00:00 mlm_jax.train.loop: continuing from the checkpoint of step $step"
  exit "$status"
fi
[[ $SLICE != 1 ]] || exec sleep 600
END
chmod +x .venv/bin/python"""


def main(cloud: pathlib.Path, verb: str, name: str, *options: str) -> int:
    with (cloud / "calls").open("a") as calls:
        print(verb, *options, file=calls)
    state = cloud / "state"
    if verb == "create":
        assert not state.exists()
        state.write_text("ACTIVE")
        for worker in range(WORKERS):
            (cloud / f"home{worker}").mkdir()
        return 0
    if not state.exists():
        print("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found", file=sys.stderr)
        return 1
    if verb == "describe":
        print(state.read_text())
    elif verb == "delete":
        assert {"--force", "--quiet"} < set(options)  # the nodes go too, and nobody is asked
        state.unlink()
    elif verb == "scp":
        _, target = options[0].split(":")
        for worker in range(WORKERS):
            shutil.copy(name, cloud / f"home{worker}" / target)
    elif verb == "ssh":
        values = dict(option.removeprefix("--").split("=", 1) for option in options)
        workers = range(WORKERS) if values["worker"] == "all" else [int(values["worker"])]
        return max(ssh(cloud, worker, values["command"]) for worker in workers)
    return 0


def ssh(cloud: pathlib.Path, worker: int, command: str) -> int:
    """Runs a command at a worker's home; the connection of the first slice's log breaks with the slice."""
    slices = (cloud / "calls").read_text().count("create ")
    home = cloud / f"home{worker}"
    environment = os.environ | {"HOME": str(home), "CLOUD": str(cloud), "WORKER": str(worker), "SLICE": str(slices)}
    command = command.replace("bash launch/install.sh tpu,gcs", INSTALL)
    is_lost = slices == 1 and command.endswith(" logs") and not (cloud / "plan-0").exists()
    with contextlib.suppress(subprocess.TimeoutExpired):
        limit = 2 if is_lost else None
        status = subprocess.run(["bash", "-c", command], cwd=home, env=environment, timeout=limit, check=False).returncode
    if is_lost:
        preempt(cloud)
        return 255
    return status


def preempt(cloud: pathlib.Path) -> None:
    for home in cloud.glob("home*"):
        os.kill(int((home / "mlm-jax/run/pid").read_text()), signal.SIGKILL)
        home.rename(cloud / f"gone-{home.name}")
    (cloud / "state").write_text("SUSPENDED")


if __name__ == "__main__":
    folder, *words = sys.argv[1:]
    assert words[:3] == ["compute", "tpus", "queued-resources"], words
    sys.exit(main(pathlib.Path(folder), *words[3:]))
