"""An image as tokens of the encoder: patches projected to its width beside the text, and the head that predicts them.

N counts patches, C the numbers of one (its pixels times three colours).
Source: ViLT section 3 (Kim et al., 2021), whose patches come from Dosovitskiy et al., 2021.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax.config import ModelConfig
from mlm_jax.model.layers import add_bias, along, bias_parameter, dense, dropout, make_norm, parameter, weight_init
from mlm_jax.sharding import ROWS, SHARDING


class Hidden(NamedTuple):
    """Patches that are there and not shown."""

    is_hidden_BN: jax.Array  # bool
    shown_D: jax.Array  # what stands in their place


class Image(NamedTuple):
    """What the encoder sees beside a text."""

    pixels_BHWC: jax.Array  # uint8, [B, image_size, image_size, 3]
    hidden: Hidden | None = None


def cut(pixels_BHWC: jax.Array, patch_size: int) -> jax.Array:
    """Patches from left to right and top to bottom, their numbers from -1 to 1: float32 [B, N, C]."""
    rows, side, _, colours = pixels_BHWC.shape
    count, size = side // patch_size, patch_size
    shape = (rows, count, size, count, size, colours)
    parts = jnp.reshape(pixels_BHWC, shape, out_sharding=jax.P(ROWS, *(None,) * 5)).swapaxes(2, 3)
    patches_BNC = jnp.reshape(parts, (rows, count**2, size**2 * colours), out_sharding=SHARDING.hidden_BLD)
    return patches_BNC.astype(jnp.float32) / 127.5 - 1.0


def normalised(patches_BNC: jax.Array) -> jax.Array:
    """What is predicted of a patch: its numbers without their mean, by their deviation.

    Source: He et al., 2021, section 4 ("reconstruction target"); facebookresearch/mae:models_mae.py has the 1e-6.
    """
    mean_BN1 = patches_BNC.mean(-1, keepdims=True)
    variance_BN1 = jnp.square(patches_BNC - mean_BN1).mean(-1, keepdims=True)
    return (patches_BNC - mean_BN1) * jax.lax.rsqrt(variance_BN1 + 1e-6)


class PatchEmbeddings(nnx.Module):
    """Projected patches with learned positions in two dimensions, beside the text; each modality has a vector of its own.

    Patches are normed and dropped out as the text's embeddings are.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        init, dim, side = weight_init(cfg), cfg.embed_dim, cfg.image_size // cfg.patch_size
        self.patch_CD = parameter(rngs, init, (3 * cfg.patch_size**2, dim), SHARDING.patch_CD)
        self.patch_bias_D = bias_parameter(cfg, rngs, (dim,), SHARDING.vector)
        self.positions_RCD = parameter(rngs, init, (side, side, dim), jax.P(None, None, None))
        self.text_D = parameter(rngs, init, (dim,), SHARDING.vector)
        self.image_D = parameter(rngs, init, (dim,), SHARDING.vector)
        if cfg.embedding_norm:
            self.norm = make_norm(cfg, dim, rngs=rngs)
        self.cfg = cfg

    def __call__(self, text_BLD: jax.Array, image: Image | None, key: jax.Array | None) -> jax.Array:
        """The text's hidden states and behind them the image's: [B, L + N, D], or [B, L, D] without an image."""
        with jax.named_scope("patches"):
            text_BLD += along(self.text_D[...].astype(text_BLD.dtype), text_BLD, 2)
            if image is None:
                return text_BLD
            patches_BNC = cut(image.pixels_BHWC, self.cfg.patch_size).astype(text_BLD.dtype)
            patches_BND = dense(patches_BNC, self.patch_CD[...], SHARDING.hidden_BLD)
            patches_BND = add_bias(patches_BND, self.patch_bias_D, (2,))
            if image.hidden is not None:
                shown_BND = along(image.hidden.shown_D.astype(text_BLD.dtype), patches_BND, 2)
                patches_BND = jnp.where(image.hidden.is_hidden_BN[:, :, None], shown_BND, patches_BND)
            patches_BND += along(_rows_joined(self.positions_RCD[...]).astype(text_BLD.dtype), patches_BND, 1, 2)
            patches_BND += along(self.image_D[...].astype(text_BLD.dtype), patches_BND, 2)
            if self.cfg.embedding_norm:
                patches_BND = self.norm(patches_BND)
            return jnp.concatenate([text_BLD, dropout(patches_BND, self.cfg.dropout, key)], axis=1)


def _rows_joined(table_RCD: jax.Array) -> jax.Array:
    """[rows, columns, D] as [N, D]."""
    rows, columns, dim = table_RCD.shape
    reduced = jax.typeof(table_RCD).sharding.spec.reduced
    return jnp.reshape(table_RCD, (rows * columns, dim), out_sharding=jax.P(None, None, reduced=reduced))


class PatchHead(nnx.Module):
    """A dense layer from hidden states to the numbers of hidden patches, and the vector that is shown in their place."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        count = 3 * cfg.patch_size**2
        self.shown_D = parameter(rngs, weight_init(cfg), (cfg.embed_dim,), SHARDING.vector)
        self.output_CD = parameter(rngs, weight_init(cfg), (count, cfg.embed_dim), SHARDING.patch_CD)
        self.output_bias_C = parameter(rngs, jax.nn.initializers.zeros, (count,), SHARDING.vector)

    def __call__(self, hidden_BMD: jax.Array) -> jax.Array:
        """Float32 [B, M, C]."""
        with jax.named_scope("head"):
            numbers_BMC = jnp.einsum(
                "BMD,CD->BMC",
                hidden_BMD,
                self.output_CD[...],
                out_sharding=SHARDING.hidden_BLD,
                preferred_element_type=jnp.float32,
            )
            return add_bias(numbers_BMC, self.output_bias_C[...], (2,))
