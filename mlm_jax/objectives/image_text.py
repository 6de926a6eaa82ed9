"""Masked language modelling of texts that have an image each, and what else is learned of the pair.

Source: ViLT (Kim et al., 2021). It masks the text in one pass and exchanges images in another; here both happen in the same
pass, as in LXMERT and UNITER, so that what is masked counts only where the image is the text's own. Masked patches, which
ViLT tried and left out, are predicted as by He et al., 2021, but stay in the encoder.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax import flops, masking
from mlm_jax.config import Config, TaskConfig
from mlm_jax.model import patches
from mlm_jax.model.encoder import Compute, Encoder
from mlm_jax.model.heads import MaskedLanguageHead
from mlm_jax.model.layers import gather_positions
from mlm_jax.model.patches import Hidden, Image, PatchHead
from mlm_jax.model.task_heads import TextHead
from mlm_jax.objectives.contract import Batch, Keys, LossSums, Params, Term
from mlm_jax.objectives.mlm import mask_batch, mask_held_out
from mlm_jax.objectives.network import Network
from mlm_jax.objectives.rates import scheduled_rates
from mlm_jax.objectives.scoring import score_targets


class ImageTextModel(nnx.Module):
    """The encoder with a head for masked tokens and, where they are learned, for matching pairs and hidden patches."""

    def __init__(self, cfg: Config, compute: Compute, *, rngs: nnx.Rngs):
        self.encoder = Encoder(cfg.model, compute, rngs=rngs)
        self.head = MaskedLanguageHead(cfg.model, rngs=rngs)
        if cfg.image_text.match_weight:
            self.match_head = TextHead(cfg.model, 2, TaskConfig(), rngs=rngs)
        if cfg.image_text.patch_mask_rate:
            self.patch_head = PatchHead(cfg.model, rngs=rngs)

    def logits(self, hidden_BLD: jax.Array, positions_BP: jax.Array) -> jax.Array:
        """Float32 logits [B, P, V] for the tokens at the given positions."""
        table_VD = self.encoder.embeddings.tokens_VD[...].astype(hidden_BLD.dtype)
        return self.head(gather_positions(hidden_BLD, positions_BP), table_VD)


@dataclasses.dataclass(frozen=True)
class ImageText:
    """Masked text given the image; with `match_weight`, whether the image is the text's; and hidden patches."""

    cfg: Config
    compute: Compute
    stage: int = 0

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Of what is learned; see `Trainable`."""
        learned = self.cfg.image_text
        return ("mlm", *["match"] * (learned.match_weight > 0), *["patch"] * (learned.patch_mask_rate > 0))

    @property
    def metric_names(self) -> tuple[str, ...]:
        """See `Trainable`."""
        return ("accuracy", *["match_accuracy"] * (self.cfg.image_text.match_weight > 0))

    @functools.cached_property
    def network(self) -> Network[ImageTextModel]:
        """The encoder and its heads."""
        return Network(lambda rngs: ImageTextModel(self.cfg, self.compute, rngs=rngs), self.compute.dtype)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters; see `Objective`."""
        return self.network.init(key)

    def logits(
        self,
        params: Params,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array,
        positions_BP: jax.Array,
        key: jax.Array | None = None,
        images_BHWC: jax.Array | None = None,
    ) -> jax.Array:
        """Float32 logits [B, P, V] at the given positions, from the text and, where there are any, the images."""
        model = self.network.bind(params)
        image = None if images_BHWC is None else Image(images_BHWC)
        return model.logits(model.encoder(tokens_BL, segment_ids_BL, key, image=image), positions_BP)

    def loss(self, params: Params, batch: Batch, keys: Keys, vocab: masking.VocabTables) -> LossSums:
        """Cross-entropy of masked tokens and error of hidden patches, both of matching pairs, and of the matching itself."""
        learned, segment_ids_BL = self.cfg.image_text, batch["segment_ids"]
        rates = scheduled_rates(self.cfg, self.stage, keys.step)
        masked = mask_batch(batch, keys.mask, vocab, self.cfg.masking, rates)
        places_BM = self._hide_patches(batch, keys.mask)
        model = self.network.bind(params)
        image = self._partly_hidden(model, batch, places_BM)
        hidden_BLD = model.encoder(masked.inputs_BL, segment_ids_BL, keys.dropout, image=image)
        matching_B1 = (_is_real(segment_ids_BL) * batch["matches"])[:, None]
        nll, correct = _sums(model.logits(hidden_BLD, masked.positions_BP), masked, matching_B1)
        losses, metrics = {"mlm": nll}, {"accuracy": correct}
        if learned.match_weight:
            nll, metrics["match_accuracy"] = _matching(model, hidden_BLD, segment_ids_BL, batch["matches"])
            losses["match"] = Term(learned.match_weight * nll.sum, nll.weight)
        if places_BM is not None:
            losses["patch"] = self._patch_error(model, hidden_BLD, batch, places_BM, matching_B1)
        return LossSums(losses, metrics, predicted=correct.weight)

    def _hide_patches(self, batch: Batch, key: jax.Array) -> jax.Array | None:
        """The patches of each image that are hidden, int32 [B, M]; None where none are."""
        count = self.cfg.model.num_patches
        hidden = round(self.cfg.image_text.patch_mask_rate * count)
        if not hidden:
            return None
        keys_B = masking.example_keys(key, batch["epochs"], batch["example_ids"], static=self.cfg.masking.static)

        def choose(key: jax.Array) -> jax.Array:
            own_key = jax.random.fold_in(key, masking.streams.PATCHES)
            return jnp.argsort(jax.random.bits(own_key, (count,)))[:hidden].astype(jnp.int32)

        return jax.vmap(choose)(keys_B)

    def _partly_hidden(self, model: ImageTextModel, batch: Batch, places_BM: jax.Array | None) -> Image:
        if places_BM is None:
            return Image(batch["images"])
        flags_BN = _as_flags(places_BM, self.cfg.model.num_patches)
        return Image(batch["images"], Hidden(flags_BN, model.patch_head.shown_D[...]))

    def _patch_error(
        self, model: ImageTextModel, hidden_BLD: jax.Array, batch: Batch, places_BM: jax.Array, rows_B1: jax.Array
    ) -> Term:
        """The weighed squared error of hidden patches in rows of weight 1."""
        patches_BNC = patches.normalised(patches.cut(batch["images"], self.cfg.model.patch_size))
        found_BMC = model.patch_head(gather_positions(hidden_BLD, places_BM + batch["tokens"].shape[1]))
        errors_BM = jnp.square(found_BMC - gather_positions(patches_BNC, places_BM)).mean(-1)
        weight = rows_B1.sum() * places_BM.shape[1]
        return Term(self.cfg.image_text.patch_weight * (errors_BM * rows_B1).sum(), weight)

    def evaluate(self, params: Params, batch: Batch, keys: Keys, vocab: masking.VocabTables) -> dict[str, Term]:
        """The masked loss and accuracy with another text's image and without one: what is lost is what images tell.

        And how often a text's own image and another's are told apart, and the error of hidden patches.
        """
        masked, segment_ids_BL = mask_held_out(batch, keys.mask, vocab, self.cfg), batch["segment_ids"]
        model, matched = self.network.bind(params), []
        sums: dict[str, Term] = {}
        seen = {"": Image(batch["images"]), "_shuffled_image": Image(batch["other_images"]), "_no_image": None}
        for name, image in seen.items():
            hidden_BLD = model.encoder(masked.inputs_BL, segment_ids_BL, None, image=image)
            if name:
                nll, correct = _sums(
                    model.logits(hidden_BLD, masked.positions_BP), masked, _is_real(segment_ids_BL)[:, None]
                )
                sums |= {f"loss{name}": nll, f"accuracy{name}": correct}
            if image is not None and self.cfg.image_text.match_weight:
                matches_B = jnp.full_like(batch["epochs"], name == "")
                matched.append(_matching(model, hidden_BLD, segment_ids_BL, matches_B)[1])
        if matched:
            sums["match_accuracy"] = jax.tree.map(jnp.add, *matched)
        places_BM = self._hide_patches(batch, keys.mask)
        if places_BM is not None:
            image = self._partly_hidden(model, batch, places_BM)
            hidden_BLD = model.encoder(masked.inputs_BL, segment_ids_BL, None, image=image)
            real_B1 = _is_real(segment_ids_BL)[:, None]
            sums["patch"] = self._patch_error(model, hidden_BLD, batch, places_BM, real_B1)
        return sums

    def flops_per_token(self, segment_length: float, predicted: float) -> float:
        """The encoder's and the head's, for a token of text its part of the image's as well; see `Objective`."""
        model = self.cfg.model
        total = segment_length + model.num_patches
        encoder, head = flops.encoder_flops_per_token(model, total), flops.head_flops_per_token(model, predicted)
        embedding = 6 * 3 * model.patch_size**2 * model.embed_dim
        return encoder + head + (encoder + embedding) * model.num_patches / max(segment_length, 1.0)


def _as_flags(places_BM: jax.Array, count: int) -> jax.Array:
    """Chosen places as flags, bool [B, count]."""
    return (places_BM[:, :, None] == jnp.arange(count, dtype=jnp.int32)[None, None]).any(1)


def _is_real(segment_ids_BL: jax.Array) -> jax.Array:
    """Rows that are not padding: float32 [B]."""
    return (segment_ids_BL > 0).any(1).astype(jnp.float32)


def _sums(logits_BPV: jax.Array, masked: masking.MaskedBatch, rows_B1: jax.Array) -> tuple[Term, Term]:
    """Negative log-likelihood and hits of the masked tokens in rows of weight 1."""
    nll_BP, correct_BP = score_targets(logits_BPV, masked.targets_BP)
    weights_BP = masked.weights_BP * rows_B1
    weight = weights_BP.sum()
    return Term((nll_BP * weights_BP).sum(), weight), Term((correct_BP * weights_BP).sum(), weight)


def _matching(
    model: ImageTextModel, hidden_BLD: jax.Array, segment_ids_BL: jax.Array, matches_B: jax.Array
) -> tuple[Term, Term]:
    """Negative log-likelihood and hits of whether images are the texts' own."""
    nll_B1, correct_B1 = score_targets(model.match_head(hidden_BLD, segment_ids_BL, None), matches_B[:, None])
    real_B1 = _is_real(segment_ids_BL)[:, None]
    weight = real_B1.sum()
    return Term((nll_B1 * real_B1).sum(), weight), Term((correct_B1 * real_B1).sum(), weight)
