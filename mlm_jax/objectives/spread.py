"""Random numbers that divide the rows of the global batch evenly: rates of diffusion, causal rows of the hybrid."""

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.objectives.contract import Batch, Keys


def spread_rows(batch: Batch, keys: Keys, stream: np.uint32) -> jax.Array:
    """A number in [0, 1) for each row, float32 [B]: its place in the global batch, moved by an offset that all share.

    The offset is drawn anew at each step, so each number is uniform; and however it falls, every interval of length n / B
    holds n of the batch's B rows. Depends on the step and on the row's place alone, not on the mesh or the micro-batches.

    Source: Kingma et al., 2021, "Variational Diffusion Models", appendix I.1 (low-discrepancy sampler). The antithetic
    sampling of kuleshov-group/mdlm:diffusion.py moves each row by an offset of its own instead, within its 1 / B.
    """
    offset = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(keys.mask, stream), keys.step))
    sums_B = batch["places"] + offset
    return sums_B - jnp.floor(sums_B)
