"""The training state: everything that a step reads and writes, and that a checkpoint holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlm_jax.objectives import Term
from mlm_jax.sharding import divide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One pytree, donated to each step.

    `interval` holds the sums that the next log line divides; being state, they survive a restart between two log lines.
    `nonfinite` counts the consecutive updates that were skipped because of a non-finite loss or gradient.
    """

    step: jax.Array  # int32, steps done
    params: Any
    opt_state: Any
    ema: Any  # averaged parameters, or None
    nonfinite: jax.Array  # int32
    interval: dict[str, Term]


INTERVAL_METRICS = ("skipped", "tokens", "row_fill", "segment_length", "predicted")


def share_of(source: str) -> str:
    """What a source's share of a mixture's tokens is called in an interval."""
    return f"share of {source}"


def init_state(
    params: Any, optimizer: optax.GradientTransformation, *, ema: bool, names: tuple[str, ...], zero: bool = False
) -> TrainState:
    """A state at step 0; traceable, so that `jax.jit` creates every array in its sharding.

    Args:
        zero: divides parameters, and with them moments and average, over the data axis.
        names: the objective's loss and metric names and the sources' shares, to be averaged beside the loop's own.
    """
    params = divide(params) if zero else params
    # Each leaf is its own buffer: a donated state must not hold one array twice.
    interval = {name: Term(jnp.zeros(()), jnp.zeros(())) for name in (*names, *INTERVAL_METRICS)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        nonfinite=jnp.zeros((), jnp.int32),
        interval=interval,
    )
