"""Pre-training objectives: each turns parameters, a batch and keys into (sum, weight) terms.

An objective has `init(key) -> params`, `loss(params, batch, keys, vocab) -> LossSums` and
`evaluate(params, batch, keys, vocab, log_unigram_V) -> sums`. It never divides: the step does, once, by global weights.
"""

import dataclasses
from typing import NamedTuple

import jax


class Term(NamedTuple):
    """A float32 sum over examples and the float32 weight that it is divided by, once, at the end."""

    sum: jax.Array
    weight: jax.Array

    def mean(self) -> jax.Array:
        """sum / weight, and 0 where nothing was counted."""
        empty = self.weight == 0
        return jax.numpy.where(empty, 0.0, self.sum / jax.numpy.where(empty, 1.0, self.weight))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """What an objective adds up over a batch.

    `losses` are the terms whose means are added to form the loss (scaled by their coefficient before they get here).
    `metrics` are watched only. Weights never depend on the parameters.
    """

    losses: dict[str, Term]
    metrics: dict[str, Term]


class Keys(NamedTuple):
    """Random keys of a step: `mask` is the run's constant key (each example folds in its own identity)."""

    mask: jax.Array
    dropout: jax.Array | None
