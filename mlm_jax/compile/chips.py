"""What is known of the chips that `compile` knows: memory, bandwidths, matrix units.

A device is what JAX calls one: a chip, but for TPU7x, which has two. Peaks are those of `mlm_jax.flops`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        hbm_bytes: what XLA may plan with.
        hbm_bytes_per_second, link_bytes_per_second, dcn_bytes_per_second: of the device's memory; of one link to its
            neighbours in one direction; of the device's part of its host's network.
        flops_per_cycle: of the matrix units of a TPU. With the peak it gives the clock. 0: no cycles are estimated.
        mxu_width: the side of a matrix unit, which a shorter contraction fills in part only.
        wrap: a dimension of the torus is a ring when it has a multiple of so many chips.
    """

    hbm_bytes: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    dcn_bytes_per_second: float
    flops_per_cycle: int
    mxu_width: int
    wrap: int

    def fill(self, contraction: int) -> float:
        """The share of a matrix unit that a product with so short a contraction (or so narrow a result) can use."""
        return min(1.0, contraction / self.mxu_width)


GiB = 2**30
# Sources: HBM bandwidths, docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. Links (one way), network, and where a torus
# closes, jax-ml/scaling-book:tpus.md: v5e and v6e close a dimension of 16 chips, the others every multiple of 4. Half of a
# chip's figures for TPU7x. Matrix units: 4 of 128x128 a core on v4, v5e and v5p (v4 and v5p: two cores to a device); v6e
# and TPU7x do 4·256² products a cycle, which their peaks and the compiler's estimates agree on. HBM sizes: "available HBM"
# in the message of libtpu 0.0.42 when memory runs out.
TPUS = {
    "v4": Chip(30.75 * GiB, 1200e9, 45e9, 6.25e9, 262_144, 128, 4),
    "v5e": Chip(15.75 * GiB, 819e9, 45e9, 3.125e9, 131_072, 128, 16),
    "v5p": Chip(95.74 * GiB, 2765e9, 90e9, 6.25e9, 262_144, 128, 4),
    "v6e": Chip(31.25 * GiB, 1638e9, 90e9, 12.5e9, 524_288, 256, 16),
    "tpu7x": Chip(94.75 * GiB, 3690e9, 45e9, 6.25e9, 524_288, 256, 4),
}

# Sources: NVIDIA's data sheets of the SXM cards (memory, NVLink in both directions together) and of DGX H100 and H200 (one
# network port of 400 Gb/s a GPU). JAX takes three quarters of the memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says else.
GPUS = {
    "h100": Chip(0.75 * 80e9, 3350e9, 450e9, 50e9, 0, 1, 1),
    "h200": Chip(0.75 * 141e9, 4800e9, 450e9, 50e9, 0, 1, 1),
}
CHIPS = TPUS | GPUS


def gpu_target(name: str) -> str:
    """The facts of a Hopper GPU from which XLA's compiler works when there is none, as its text proto."""
    chip = GPUS[name]
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }} core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 l2_cache_size: 52428800
  memory_bandwidth: {int(chip.hbm_bytes_per_second)} device_memory_size: {int(chip.hbm_bytes)}
}}
platform_name: "CUDA" runtime_version {{ major: 13 }} dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {name.upper()}"
"""
