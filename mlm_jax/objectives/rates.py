"""How much of a row is masked, and how it is shown, as a function of the step: one compiled program for a whole schedule."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.config import Config, MaskingConfig


class Rates(NamedTuple):
    """What a step masks with: numbers where they are constant, else float32 scalars of the device."""

    rate: jax.typing.ArrayLike
    mask_prob: jax.typing.ArrayLike
    random_prob: jax.typing.ArrayLike
    largest: float  # a bound of every example's rate, which decides the static number of predictions


def constant_rates(masking: MaskingConfig) -> Rates:
    """The rates that a config begins with."""
    return Rates(masking.rate, masking.mask_prob, masking.random_prob, masking.rate + masking.rate_spread)


def scheduled_rates(cfg: Config, stage: int, step: jax.typing.ArrayLike) -> Rates:
    """The rates of a step.

    Args:
        stage: one with a `mask_rate` of its own keeps to that; the shares of what is shown follow the schedule still.
        step: updates done before it, a number or an int32 scalar of the device.
    """
    masking = cfg.masking
    first, own = cfg.first_step(stage), cfg.stages[stage].mask_rate
    done = progress(cfg, step, jnp) if masking.schedule != "constant" else 0.0
    # Schedules are monotone, so a stage's largest rate is that of its first or its last step.
    ends = [progress(cfg, end, np) for end in (first, first + cfg.stages[stage].steps - 1)]
    largest = own or max(float(_between(masking.rate, masking.final_rate, end)) for end in ends)
    return Rates(
        rate=own or _between(masking.rate, masking.final_rate, done),
        mask_prob=_between(masking.mask_prob, masking.final_mask_prob, done),
        random_prob=_between(masking.random_prob, masking.final_random_prob, done),
        largest=largest + masking.rate_spread,
    )


def progress(cfg: Config, step: Any, xp: Any) -> Any:
    """How far the schedule of masking has come, from 0 to 1.

    Args:
        xp: `numpy` for a number, `jax.numpy` for a scalar of the device.
    """
    masking = cfg.masking
    start = masking.schedule_start
    length = masking.schedule_steps or cfg.total_steps - start
    if masking.schedule == "constant":
        return xp.float32(0.0)
    if masking.schedule == "step":
        return xp.where(step >= start, xp.float32(1.0), xp.float32(0.0))
    share = xp.clip((xp.float32(step) - start) / xp.float32(length), 0.0, 1.0)
    return share if masking.schedule == "linear" else 0.5 - 0.5 * xp.cos(np.float32(np.pi) * share)


def _between(first: float, last: float, done: Any) -> Any:
    """A value on its way; -1 as the last says that it stays."""
    return first if last == -1 else first + (last - first) * done
