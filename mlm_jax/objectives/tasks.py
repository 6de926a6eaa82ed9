"""What is fine-tuned: the encoder under a head for texts, for tokens, or for the two ends of an answer.

Each is a `Trainable` whose batches bring their targets along. Every target has a weight, 0 where there is none, so that
padding counts for nothing.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mlm_jax import flops
from mlm_jax.config import Config
from mlm_jax.masking import VocabTables
from mlm_jax.model.encoder import Compute, Encoder
from mlm_jax.model.task_heads import TextHead, TokenHead
from mlm_jax.objectives.contract import Batch, Keys, LossSums, Params, Term
from mlm_jax.objectives.network import Network
from mlm_jax.objectives.scoring import score_targets

_EXCLUDED = -1e9  # the logit of a position at which no answer can begin or end


def num_outputs(cfg: Config) -> int:
    """How many logits the task's head has: for a label each, a number, or an answer's two ends.

    Tags are O, and B- and I- of each label.
    """
    labels = len(cfg.task.labels)
    return {"classification": labels, "regression": 1, "tagging": 1 + 2 * labels, "question_answering": 2}[cfg.objective]


class TaskModel(nnx.Module):
    """The encoder under a task's head."""

    def __init__(self, cfg: Config, compute: Compute, *, rngs: nnx.Rngs):
        self.encoder = Encoder(cfg.model, compute, rngs=rngs)
        self.reads_text = cfg.objective in ("classification", "regression")
        if self.reads_text:
            self.head: TextHead | TokenHead = TextHead(cfg.model, num_outputs(cfg), cfg.task, rngs=rngs)
        else:
            self.head = TokenHead(cfg.model, num_outputs(cfg), cfg.task, rngs=rngs)

    def __call__(self, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Float32 logits [B, 1, C] of texts, or [B, L, C] of tokens."""
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        segment_ids_BL = batch["segment_ids"]
        hidden_BLD = self.encoder(batch["tokens"], segment_ids_BL, keys[0], batch.get("token_types"))
        if isinstance(self.head, TextHead):
            return self.head(hidden_BLD, segment_ids_BL, keys[1])
        return self.head(hidden_BLD, keys[1])


@dataclasses.dataclass(frozen=True)
class Task:
    """What all tasks have in common."""

    cfg: Config
    compute: Compute

    loss_names: ClassVar[tuple[str, ...]]
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy",)

    @functools.cached_property
    def network(self) -> Network[TaskModel]:
        """The encoder and the task's head."""
        return Network(lambda rngs: TaskModel(self.cfg, self.compute, rngs=rngs), self.compute.dtype)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters; see `Trainable`."""
        return self.network.init(key)

    def outputs(self, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Float32 logits: [B, 1, C] of texts, [B, L, C] of tokens."""
        return self.network.bind(params)(batch, key)

    def loss(self, params: Params, batch: Batch, keys: Keys, vocab: VocabTables) -> LossSums:
        """The sums over a batch's targets; see `Trainable`."""
        raise NotImplementedError

    def flops_per_token(self, segment_length: float, predicted: float) -> float:
        """The encoder's, beside which a head costs nothing; see `Trainable`."""
        return flops.encoder_flops_per_token(self.cfg.model, segment_length)


@dataclasses.dataclass(frozen=True)
class Labelling(Task):
    """One of the labels for each text, or of the tags for each of its tokens.

    Batches have `labels`, int32, and `weights`, float32: [B] of texts, [B, L] of tokens.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("label",)

    def loss(self, params: Params, batch: Batch, keys: Keys, vocab: VocabTables) -> LossSums:
        """Cross-entropy, and the share of targets that have the highest logit."""
        logits_BPC = self.outputs(params, batch, keys.dropout)
        labels_BP, weights_BP = (
            array if array.ndim == 2 else array[:, None] for array in (batch["labels"], batch["weights"])
        )
        nll_BP, correct_BP = score_targets(logits_BPC, labels_BP)
        counted_BP = (weights_BP > 0).astype(jnp.float32)
        return LossSums(
            losses={"label": Term((nll_BP * weights_BP).sum(), weights_BP.sum())},
            metrics={"accuracy": Term((correct_BP * counted_BP).sum(), counted_BP.sum())},
            predicted=jnp.zeros(()),
        )


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """A number for each text. Batches have `labels` and `weights`, float32 [B]."""

    loss_names: ClassVar[tuple[str, ...]] = ("squared_error",)
    metric_names: ClassVar[tuple[str, ...]] = ()

    def loss(self, params: Params, batch: Batch, keys: Keys, vocab: VocabTables) -> LossSums:
        """The squared error."""
        error_B = self.outputs(params, batch, keys.dropout).squeeze((1, 2)) - batch["labels"]
        weights_B = batch["weights"]
        term = Term((jnp.square(error_B) * weights_B).sum(), weights_B.sum())
        return LossSums(losses={"squared_error": term}, metrics={}, predicted=jnp.zeros(()))


@dataclasses.dataclass(frozen=True)
class SpanExtraction(Task):
    """An answer's first and last token; both are the row's first where it holds no answer.

    Batches have `starts` and `ends`, int32 [B], `weights`, float32 [B], and `allowed`, int32 [B, L], 1 where an answer can
    begin or end.

    Source: google-research/bert:run_squad.py, where padding and the question are not excluded.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("span",)

    def outputs(self, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Float32 logits [B, L, 2] of beginnings and ends."""
        logits_BL2 = super().outputs(params, batch, key)
        return jnp.where(batch["allowed"][:, :, None] > 0, logits_BL2, _EXCLUDED)

    def loss(self, params: Params, batch: Batch, keys: Keys, vocab: VocabTables) -> LossSums:
        """The mean cross-entropy of the two ends, and the share of rows in which both are right."""
        logits_B2L = self.outputs(params, batch, keys.dropout).swapaxes(1, 2)
        ends_B2 = jnp.stack([batch["starts"], batch["ends"]], axis=1)
        nll_B2, correct_B2 = score_targets(logits_B2L, ends_B2)
        weights_B = batch["weights"]
        weight = weights_B.sum()
        return LossSums(
            losses={"span": Term((nll_B2.mean(1) * weights_B).sum(), weight)},
            metrics={"accuracy": Term((correct_B2.min(1) * weights_B).sum(), weight)},
            predicted=jnp.zeros(()),
        )
