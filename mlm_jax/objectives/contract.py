"""What an objective is to the rest: the step, evaluation, fill-mask and score see nothing else of it.

An objective turns parameters, a batch and keys into (sum, weight) terms. It never divides: the step does, once, by the
weights of the global batch, so that a batch has one gradient on any devices and in any number of micro-batches.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mlm_jax.config import Config
from mlm_jax.masking import VocabTables
from mlm_jax.model.encoder import Compute

# int32 tokens and segment_ids [B, L], example_ids and epochs [B]; in training also float32 places [B], each row's place in
# the global batch from 0 to 1, which stays with the row when the batch is divided. Of texts with images also uint8 images
# [B, pixels, pixels, 3]; in training int32 matches [B], 0 where the image is another text's; in evaluation other_images.
Batch = dict[str, jax.Array]
Params = dict[str, Any]


class Term(NamedTuple):
    """A float32 sum over examples and the float32 weight that it is divided by, once, at the end."""

    sum: jax.Array
    weight: jax.Array

    def mean(self) -> jax.Array:
        """sum / weight, and 0 where nothing was counted."""
        empty = self.weight == 0
        return jnp.where(empty, 0.0, self.sum / jnp.where(empty, 1.0, self.weight))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """What an objective adds up over a batch.

    `losses` are the terms whose means are added to form the loss (scaled by their coefficient before they get here).
    `metrics` are watched only. `predicted` counts the positions that were scored against the vocabulary. The weights of
    `losses` and `predicted` never depend on the parameters: the gradient is divided by them afterwards. A metric's may.
    """

    losses: dict[str, Term]
    metrics: dict[str, Term]
    predicted: jax.Array


class Keys(NamedTuple):
    """Random keys of a step: `mask` is the run's constant key (each example folds in its own identity).

    `step` counts the updates done, for what follows a schedule; it is mixed into no key of a mask.
    """

    mask: jax.Array
    dropout: jax.Array | None
    step: jax.Array | int = 0


def images_of(batch: Batch) -> dict[str, jax.Array]:
    """What `logits` is given beside the text: the batch's images, where it has them and the objective so reads them."""
    return {"images_BHWC": batch["images"]} if "images" in batch else {}


class Trainable(Protocol):
    """What a step trains: an objective of pre-training, or a task that is fine-tuned."""

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The keys of `LossSums.losses`."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The keys of its `metrics`, each a share between 0 and 1."""

    @property
    def cfg(self) -> Config: ...

    @property
    def compute(self) -> Compute: ...

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters as a nested dictionary, each in its sharding on the current mesh."""

    def loss(self, params: Params, batch: Batch, keys: Keys, vocab: VocabTables) -> LossSums:
        """The sums of a batch or of a micro-batch, of which some rows or all may be padding."""

    def flops_per_token(self, segment_length: float, predicted: float) -> float:
        """Forward and backward FLOPs for one real token, as `flops.train_flops_per_token` counts them."""


class Objective(Trainable, Protocol):
    """An objective of one stage of a pre-training run, made by `make_objective`."""

    def logits(
        self,
        params: Params,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array,
        positions_BP: jax.Array,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Float32 logits [B, P, V] for the tokens at the given positions, from everything else in their segment.

        What evaluation, fill-mask and score read a model by: whatever it was trained for, this predicts a masked token. An
        objective that reads images takes them besides (see `images_of`).
        """

    def evaluate(self, params: Params, batch: Batch, keys: Keys, vocab: VocabTables) -> dict[str, Term]:
        """What is measured on held-out rows beside the masked loss and accuracy that every objective is measured by.

        Of a batch with epoch 0 and a key that is the same at every evaluation, so that its masks are frozen. For a term
        "…bits_per_token" the evaluation reports "…perplexity" too.
        """
