"""Topologies by name, as devices to compile for on a machine that has none.

`v5e:4x4` is one slice of TPU v5e, `2x v5e:16x16` two of them, and `h200:2x8` two hosts of eight GPUs.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from mlm_jax.compile.chips import CHIPS, GPUS, Chip, gpu_target
from mlm_jax.errors import UserError, install

# Set before JAX is imported: no accelerator of this machine is touched and none is looked for in the network; two
# processes may load libtpu at once; and as JAX can write what it compiles for absent devices into its compilation cache but
# not read it from there, it does neither.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",  # of a host that is not asked for; without one libtpu warns
    "TPU_WORKER_HOSTNAMES": "localhost",
}
EXAMPLES = "v4:2x2x2, v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1, h200:1x8, or 2x v5e:16x16 for two slices"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind.

    Attributes:
        torus: a slice of TPUs in chips; empty for GPUs, each of which reaches all others of its host at once.
        num_slices: of TPUs, or hosts of GPUs.
    """

    name: str
    generation: str
    torus: tuple[int, ...]
    num_slices: int
    devices: tuple[Any, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    def slice_of(self, device: Any) -> int:
        """Which slice or host a device belongs to."""
        if self.torus:
            return getattr(device, "slice_index", None) or 0
        return device.id * self.num_slices // len(self.devices)


def parse_topology(text: str, slices: int = 1) -> tuple[str, tuple[int, ...], int]:
    """The generation, the shape and the number of slices that a name stands for.

    Raises:
        UserError: with examples of names.
    """
    match = re.fullmatch(r"(?:(\d+)\s*x\s+)?(\w+):(\d+(?:x\d+)*)", text.strip())
    if not match:
        raise UserError(f"--topology={text} is not GENERATION:SHAPE; examples: {EXAMPLES}")
    generation, shape = match[2], tuple(map(int, match[3].split("x")))
    if generation not in CHIPS:
        raise UserError(f"--topology={text}: {generation} is none of {', '.join(CHIPS)}; examples: {EXAMPLES}")
    if match[1] and slices > 1:
        raise UserError(f"--topology={text} and --slices={slices} both give a number of slices; leave one out")
    count = int(match[1] or slices)
    if count < 1 or math.prod(shape) < 1:
        raise UserError(f"--topology={text} with {count} slice(s) has no chips; examples: {EXAMPLES}")
    if generation in GPUS and (len(shape) != 2 or count > 1):
        raise UserError(
            f"--topology={text}: GPUs are named by hosts and GPUs a host, as {generation}:1x8 or {generation}:2x8"
        )
    return generation, shape, count


def open_topology(text: str, slices: int = 1) -> Topology:
    """The devices to compile for.

    Raises:
        UserError: the name stands for nothing that exists, or the compiler is not installed.
    """
    generation, shape, count = parse_topology(text, slices)
    is_gpu = generation in GPUS
    if is_gpu and not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        raise UserError(f"GPU topologies need XLA's compiler for CUDA, a plugin of jax: {install('cuda')}")
    if not is_gpu and importlib.util.find_spec("libtpu") is None:
        raise UserError(f"TPU topologies need XLA's compiler for TPUs, libtpu: {install('tpu-compile')}")
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if "TPU" in name})
    import jax

    name = f"{generation}:{'x'.join(map(str, shape))}"
    try:
        devices = _gpus(generation, shape) if is_gpu else _tpus(name, shape, count)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={text}: {str(error).splitlines()[0][:200]}; examples: {EXAMPLES}") from error
    full_name = name if count == 1 else f"{count}x {name}"
    if is_gpu:
        return Topology(full_name, generation, (), shape[0], devices)
    return Topology(full_name, generation, shape, count, devices)


def _tpus(name: str, shape: tuple[int, ...], slices: int) -> tuple[Any, ...]:
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # the two cores of a chip are one device, as on a real host
    if math.prod(shape) < 4:
        options["chips_per_host_bounds"] = [*shape, *[1] * (3 - len(shape))]
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def _gpus(generation: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
    from jax.experimental import topologies

    hosts, count = shape
    target = gpu_target(generation)
    found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x{hosts}x{count}")
    return tuple(found.devices)
