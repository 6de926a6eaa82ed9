"""SpanBERT: masked language modelling of spans, each token also predicted from its span's two ends alone.

Source: Joshi et al., 2020, section 3; facebookresearch/SpanBERT:pretraining/fairseq/criterions/spanbert_loss.py.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
from flax import nnx

from mlm_jax import flops, masking
from mlm_jax.config import Config, MaskingConfig
from mlm_jax.model.encoder import Compute, Encoder
from mlm_jax.model.heads import MaskedLanguageHead, SpanBoundaryHead
from mlm_jax.model.layers import gather_positions
from mlm_jax.objectives.contract import Batch, Keys, LossSums, Params, Term
from mlm_jax.objectives.mlm import frozen_masking, mask_batch
from mlm_jax.objectives.network import Network
from mlm_jax.objectives.rates import Rates, constant_rates, scheduled_rates
from mlm_jax.objectives.scoring import score_targets


class SpanBertModel(nnx.Module):
    """The encoder with a head for masked tokens and one for tokens between two ends."""

    def __init__(self, cfg: Config, compute: Compute, *, rngs: nnx.Rngs):
        self.encoder = Encoder(cfg.model, compute, rngs=rngs)
        self.head = MaskedLanguageHead(cfg.model, rngs=rngs)
        self.span_head = SpanBoundaryHead(cfg.model, cfg.span_boundary, rngs=rngs)

    def logits(self, hidden_BLD: jax.Array, positions_BP: jax.Array) -> jax.Array:
        """Float32 logits [B, P, V] for the tokens at the given positions, from their own hidden states."""
        return self.head(gather_positions(hidden_BLD, positions_BP), self._decoder(hidden_BLD))

    def span_logits(self, hidden_BLD: jax.Array, ends: masking.SpanEnds) -> jax.Array:
        """Float32 logits [B, P, V] for the tokens at some distance from a left end, from the ends' hidden states."""
        left_BPD, right_BPD = (gather_positions(hidden_BLD, places_BP) for places_BP in (ends.left_BP, ends.right_BP))
        return self.span_head(left_BPD, right_BPD, ends.offsets_BP, self._decoder(hidden_BLD))

    def _decoder(self, hidden_BLD: jax.Array) -> jax.Array:
        return self.encoder.embeddings.tokens_VD[...].astype(hidden_BLD.dtype)


@dataclasses.dataclass(frozen=True)
class SpanBert:
    """The sum of both predictions' means."""

    cfg: Config
    compute: Compute
    stage: int = 0

    loss_names: ClassVar[tuple[str, ...]] = ("mlm", "sbo")
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "sbo_accuracy")

    @functools.cached_property
    def network(self) -> Network[SpanBertModel]:
        """The encoder and its two heads."""
        return Network(lambda rngs: SpanBertModel(self.cfg, self.compute, rngs=rngs), self.compute.dtype)

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
    ) -> jax.Array:
        """Float32 logits [B, P, V] at the given positions; see `Objective`."""
        model = self.network.bind(params)
        return model.logits(model.encoder(tokens_BL, segment_ids_BL, key), positions_BP)

    def loss(self, params: Params, batch: Batch, keys: Keys, vocab: masking.VocabTables) -> LossSums:
        """Cross-entropy at the masked positions, and of the same tokens given nothing but their span's ends."""
        return self._sums(params, batch, keys, vocab, self.cfg.masking, scheduled_rates(self.cfg, self.stage, keys.step))

    def evaluate(self, params: Params, batch: Batch, keys: Keys, vocab: masking.VocabTables) -> dict[str, Term]:
        """The loss and accuracy of the prediction from both ends, under frozen spans at the evaluation's rate."""
        frozen = frozen_masking(self.cfg)
        sums = self._sums(params, batch, keys, vocab, frozen, constant_rates(frozen))
        return {"sbo": sums.losses["sbo"], "sbo_accuracy": sums.metrics["sbo_accuracy"]}

    def _sums(
        self,
        params: Params,
        batch: Batch,
        keys: Keys,
        vocab: masking.VocabTables,
        cfg: MaskingConfig,
        rates: Rates,
    ) -> LossSums:
        masked = mask_batch(batch, keys.mask, vocab, cfg, rates)
        with jax.named_scope("masking"):
            ends = masking.span_ends(
                masked.positions_BP,
                masked.weights_BP,
                batch["tokens"],
                batch["segment_ids"],
                vocab.is_special_V,
                max_targets=self.cfg.span_boundary.max_targets,
            )
        model = self.network.bind(params)
        hidden_BLD = model.encoder(masked.inputs_BL, batch["segment_ids"], keys.dropout)
        nll_BP, correct_BP = score_targets(model.logits(hidden_BLD, masked.positions_BP), masked.targets_BP)
        span_nll_BP, span_correct_BP = score_targets(model.span_logits(hidden_BLD, ends), masked.targets_BP)
        weight, span_weight = masked.weights_BP.sum(), ends.weights_BP.sum()
        span_sum = self.cfg.span_boundary.loss_weight * (span_nll_BP * ends.weights_BP).sum()
        return LossSums(
            losses={"mlm": Term((nll_BP * masked.weights_BP).sum(), weight), "sbo": Term(span_sum, span_weight)},
            metrics={
                "accuracy": Term((correct_BP * masked.weights_BP).sum(), weight),
                "sbo_accuracy": Term((span_correct_BP * ends.weights_BP).sum(), span_weight),
            },
            predicted=weight + span_weight,
        )

    def flops_per_token(self, segment_length: float, predicted: float) -> float:
        """The encoder's and the heads'; see `Objective`. A position counts once for each head that predicts it.

        The head between two ends has two matrices of D × D more, and serves at most half of what is predicted.
        """
        extra = 6 * 2 * self.cfg.model.embed_dim**2 * predicted / 2
        encoder = flops.encoder_flops_per_token(self.cfg.model, segment_length)
        return encoder + flops.head_flops_per_token(self.cfg.model, predicted) + extra
