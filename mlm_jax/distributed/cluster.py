"""Which processes make up this run: from flags, JAX's variables, or what started them. Host code without JAX.

JAX has such a detection of its own, inside `jax.distributed.initialize`. Here it comes before JAX is imported, so that a
process that does not come is told in bounded time; it needs no kubernetes package, and it knows of Open MPI 5.
"""

import dataclasses
import glob
import importlib.util
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping, Sequence

from mlm_jax.errors import UserError

Environment = Mapping[str, str]
TPU_PORT = 8482  # as in jax:jax/_src/clusters/cloud_tpu_cluster.py


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The place of this process among those of a run."""

    coordinator: str  # HOST:PORT; process 0 listens there
    num_processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None  # GPUs for this process; all that are visible when None


def find_cluster(
    environment: Environment,
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    wanted: bool | None = None,
) -> Cluster | None:
    """The processes of this run, or None when it has this one only.

    What is given comes first, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (in a Kubernetes Job
    JOB_COMPLETION_INDEX), then what Slurm, Open MPI or a TPU slice say.

    Args:
        wanted: True: to have found nothing is a mistake. False: one process, whatever the environment says.

    Raises:
        UserError: an incomplete or impossible description.
    """
    given = (coordinator, num_processes, process_id)
    if wanted is False:
        if given != (None, None, None):
            raise UserError("--no-distributed and --coordinator, --num-processes or --process-id contradict each other")
        return None
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number(environment, "JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = _number(environment, "JAX_PROCESS_ID") if process_id is None else process_id
    if process_id is None and coordinator and num_processes is not None:
        process_id = _number(environment, "JOB_COMPLETION_INDEX")
    found = None
    if coordinator is None or num_processes is None or process_id is None:
        found = next((cluster for detect in DETECTORS if (cluster := detect(environment))), None)
    is_described = not (coordinator is None and num_processes is None and process_id is None)
    if not is_described and (found is None or (found.num_processes == 1 and not wanted)):
        if wanted:
            raise UserError(
                "--distributed: found neither a Slurm step, mpirun, a TPU slice nor JAX_COORDINATOR_ADDRESS; "
                "give --coordinator HOST:PORT --num-processes N --process-id I"
            )
        return None
    if found is not None:
        coordinator = coordinator or found.coordinator
        num_processes = found.num_processes if num_processes is None else num_processes
        process_id = found.process_id if process_id is None else process_id
    return _checked(coordinator, num_processes, process_id, None if found is None else found.local_devices)


def _checked(
    coordinator: str | None, num_processes: int | None, process_id: int | None, local_devices: tuple[int, ...] | None
) -> Cluster:
    if not coordinator or num_processes is None or process_id is None:
        missing = [
            flag
            for flag, value in (
                ("--coordinator HOST:PORT", coordinator or None),
                ("--num-processes N", num_processes),
                ("--process-id I", process_id),
            )
            if value is None
        ]
        raise UserError(f"several processes need to know of each other: also give {', '.join(missing)}")
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"--coordinator={coordinator} is not HOST:PORT, like 10.0.0.2:8482")
    if num_processes < 1:
        raise UserError(f"--num-processes={num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process-id={process_id} must lie between 0 and {num_processes - 1}, of {num_processes} processes"
        )
    return Cluster(coordinator, num_processes, process_id, local_devices)


def _number(environment: Environment, name: str) -> int | None:
    value = environment.get(name)
    if not value:
        return None
    if not value.isdigit():
        raise UserError(f"{name}={value} in the environment is not a number")
    return int(value)


def _open_mpi(environment: Environment) -> Cluster | None:
    """Started by mpirun. Process 0 is taken to run where mpirun does."""
    size, rank = _number(environment, "OMPI_COMM_WORLD_SIZE"), _number(environment, "OMPI_COMM_WORLD_RANK")
    if size is None or rank is None:
        return None
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    address = re.search(r"tcp://([\d.]+)", uri) or re.search(r"tcp6://(\[[0-9a-f:]+)", uri)
    local_size = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")
    if address is not None:
        host = address[1] + "]" * address[1].startswith("[")
    elif local_size == size:
        host = "127.0.0.1"
    else:
        host = ""  # Open MPI 5 does not tell: --coordinator has to
    port = _port(uri or environment.get("PMIX_NAMESPACE", ""))
    local_devices = _local_devices(environment, _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK"), local_size)
    return Cluster(f"{host}:{port}" if host else "", size, rank, local_devices)


def _slurm(environment: Environment) -> Cluster | None:
    """Started by srun, which sets these for a step's tasks and not for the batch script."""
    nodes, rank = environment.get("SLURM_STEP_NODELIST"), _number(environment, "SLURM_PROCID")
    size = _number(environment, "SLURM_STEP_NUM_TASKS") or _number(environment, "SLURM_NTASKS")
    first = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes or "")
    if first is None or size is None or rank is None:
        return None
    host = "".join(part or "" for part in first.groups())
    port = _port(f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}")
    # SLURM_STEP_TASKS_PER_NODE is 1(x4) or 8(x2),4; srun numbers the tasks of a node from 0.
    on_each = re.fullmatch(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    local_size = int(on_each[1]) if on_each else None
    local_devices = _local_devices(environment, _number(environment, "SLURM_LOCALID"), local_size)
    return Cluster(f"{host}:{port}", size, rank, local_devices)


def _local_devices(environment: Environment, local_rank: int | None, local_size: int | None) -> tuple[int, ...] | None:
    """One GPU for each process of a host, unless there is one process or the launcher has divided the GPUs already."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if local_rank is None or local_size == 1 or (visible and "," not in visible):
        return None
    return (local_rank,)


def _tpu(environment: Environment) -> Cluster | None:
    """A TPU slice of several hosts, or several slices: on GKE from variables, on GCE from the metadata server."""
    platforms = environment.get("JAX_PLATFORMS", "tpu")
    if "tpu" not in platforms or importlib.util.find_spec("libtpu") is None:
        return None
    if not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
        return None
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    slices: Mapping[str, str] = environment
    if names:
        hosts, worker = [name.split(":")[0] for name in names.split(",")], int(environment.get("TPU_WORKER_ID", "0"))
    elif "TPU_SKIP_MDS_QUERY" not in environment and (number := _metadata("agent-worker-number")):
        # Each endpoint is a host name or NAME:ID:ADDRESS.
        endpoints = _metadata("worker-network-endpoints") or ""
        hosts = [endpoint.split(":")[-1] for endpoint in endpoints.split(",")]
        if not all(hosts):
            raise UserError(
                f"this is worker {number} of a TPU slice whose metadata does not name its workers: worker-network-endpoints="
                f"{endpoints!r}. Start again when the slice is ready, or describe the processes by --coordinator HOST:PORT "
                "--num-processes N --process-id I; --no-distributed trains on this host alone"
            )
        worker = int(number)
        lines = (line.partition(":") for line in (_metadata("tpu-env") or "").splitlines())
        slices = {name.strip(): value.strip().strip("'") for name, _, value in lines} | dict(environment)
    else:
        return None
    host = slices.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0]).split(":")[0]
    size = len(hosts) * int(slices.get("MEGASCALE_NUM_SLICES", "1"))
    rank = worker + len(hosts) * int(slices.get("MEGASCALE_SLICE_ID", "0"))
    return Cluster(f"{host}:{TPU_PORT}", size, rank)


def _metadata(name: str) -> str | None:
    """An attribute of this instance of Compute Engine, None elsewhere."""
    request = urllib.request.Request(
        f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, TimeoutError):
        return None


def _port(job: str) -> int:
    """A port that all processes of a job agree on without talking, above those that Linux hands out by itself."""
    return 61_440 + zlib.crc32(job.encode()) % 4096


DETECTORS: Sequence[Callable[[Environment], Cluster | None]] = (_open_mpi, _slurm, _tpu)
