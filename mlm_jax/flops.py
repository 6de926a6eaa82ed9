"""What a training step costs by arithmetic, and what share of the device's peak a measured speed is (MFU).

One function for the training log and for `bench`, so that their numbers are comparable.
"""

import jax

from mlm_jax.config import ModelConfig

# Dense bfloat16 peak, in FLOP/s, of what jax calls one device, by a part of its `device_kind`; the first match counts.
# Sources: for TPU, jax-ml/jax:jax/_src/pallas/mosaic/tpu_info.py, whose names and figures these are; for NVIDIA, the
# data sheets of the named products, where figures are given with sparsity and are halved here.
PEAK_FLOPS = (
    ("TPU v4 lite", 137e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p, under both of its names
    ("TPU v6", 920e12),
    ("TPU7x", 1155e12),  # half a chip
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
)


def train_flops_per_token(cfg: ModelConfig, mean_segment_len: float, predicted_fraction: float) -> float:
    """Forward and backward FLOPs for one real token: matrix products only, nothing rematerialised, no padding.

    Args:
        mean_segment_len: as a token sees it, Σs² / Σs over the segments' lengths s: what attention costs per token.
        predicted_fraction: predicted positions per real token, the share that passes through all of the last layer and
            reaches the vocabulary.
    """
    encoder = encoder_flops_per_token(cfg, mean_segment_len, predicted_fraction)
    return encoder + head_flops_per_token(cfg, predicted_fraction)


def head_flops_per_token(cfg: ModelConfig, predicted_fraction: float) -> float:
    """`train_flops_per_token` of the head for masked tokens alone."""
    transform = cfg.embed_dim if cfg.head_transform else 0
    return 6 * predicted_fraction * cfg.embedding_dim * (transform + cfg.vocab_size)


def encoder_flops_per_token(cfg: ModelConfig, mean_segment_len: float, wanted_fraction: float = 1.0) -> float:
    """`train_flops_per_token` of an encoder without a head. A local layer's token sees a whole window, or its segment.

    Args:
        wanted_fraction: the share of tokens whose hidden states are wanted, for which the last layer has an output
            projection and an mlp.
    """
    behind_attention = cfg.embed_dim**2 + (3 if cfg.gated_mlp else 2) * cfg.embed_dim * cfg.mlp_dim
    projections = 3 * cfg.embed_dim**2 + behind_attention
    local = sum(map(cfg.is_local, range(cfg.num_layers)))
    seen = (cfg.num_layers - local) * mean_segment_len + local * min(mean_segment_len, 2 * cfg.local_window + 1)
    layers = 6 * (cfg.num_layers * projections - (1 - wanted_fraction) * behind_attention) + 12 * cfg.embed_dim * seen
    return layers + (6 * cfg.embedding_dim * cfg.embed_dim if cfg.embedding_dim != cfg.embed_dim else 0)


def device_peak_flops(device: jax.Device) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s, or None for a CPU or a kind that is not in the table."""
    kind = device.device_kind
    if device.platform == "cpu" or "MIG" in kind:  # a slice of a GPU has a share of the peak that its name does not tell
        return None
    return next((peak for part, peak in PEAK_FLOPS if part in kind), None)


def mfu(tokens_per_second: float, flops_per_token: float, num_devices: int, device: jax.Device) -> float | None:
    """Model FLOPs utilisation, from 0 to 1, or None where the device's peak is not known.

    Args:
        tokens_per_second: real tokens, over all devices.
    """
    peak = device_peak_flops(device)
    return None if peak is None else tokens_per_second * flops_per_token / (num_devices * peak)
