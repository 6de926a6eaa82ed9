"""The update rule (AdamW, StableAdamW, LAMB) and the learning-rate curve over a whole run, put together from optax.

Called by `train.loop`. What decays is decided by a parameter's name: layers are stacked, so ranks do not tell.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlm_jax.config import Config, OptimizerConfig
from mlm_jax.errors import UserError
from mlm_jax.sharding import is_stacked


class Curve(NamedTuple):
    """A learning-rate curve over some stages: where it starts, how long it is, and what it is."""

    start: int
    steps: int
    peak: float
    warmup_steps: int
    schedule: str


def curves(cfg: Config) -> list[Curve]:
    """The curves of a run. One spans the stages up to the next that sets its own `learning_rate`, where a new one begins."""
    found: list[Curve] = []
    current = Curve(0, 0, cfg.optimizer.learning_rate, cfg.optimizer.warmup_steps, cfg.optimizer.schedule)
    for stage in cfg.stages:
        if stage.learning_rate > 0:
            found.append(current)
            schedule = stage.schedule or cfg.optimizer.schedule
            current = Curve(current.start + current.steps, 0, stage.learning_rate, stage.warmup_steps, schedule)
        current = current._replace(steps=current.steps + stage.steps)
    return [curve for curve in (*found, current) if curve.steps]


def learning_rate(cfg: Config) -> optax.Schedule:
    """The learning rate of each update, counted from 0 over all stages.

    Warm-up is linear from 0, so the first update of a curve with warm-up changes nothing but the moments, as in BERT's own
    code.

    Raises:
        UserError: a 'wsd' curve is shorter than its warm-up and decay together.
    """
    return _joined(cfg, lambda curve: _curve(cfg.optimizer, curve))


def _joined(cfg: Config, schedule: Callable[[Curve], optax.Schedule]) -> optax.Schedule:
    pieces = curves(cfg)
    return optax.join_schedules([schedule(curve) for curve in pieces], [curve.start for curve in pieces[1:]])


def _curve(cfg: OptimizerConfig, curve: Curve) -> optax.Schedule:
    """One warm-up and what follows it, counted from 0.

    A warm-up longer than the curve is cut off where the run ends. `end_factor` means nothing to 'constant', which has no
    end, and is a lower bound for 'inverse_sqrt'.
    """
    peak, warmup_steps, steps = curve.peak, curve.warmup_steps, curve.steps
    floor = peak * cfg.end_factor
    rest = max(1, steps - warmup_steps)
    pieces: list[optax.Schedule]
    boundaries: list[int] = []
    if curve.schedule == "constant":
        pieces = [optax.constant_schedule(peak)]
    elif curve.schedule == "linear":
        pieces = [optax.linear_schedule(peak, floor, rest)]
    elif curve.schedule == "cosine":
        pieces = [optax.cosine_decay_schedule(peak, rest, alpha=cfg.end_factor)]
    elif curve.schedule == "inverse_sqrt":
        pieces = [_inverse_sqrt(peak, floor, max(1, warmup_steps))]
    elif curve.schedule == "one_minus_sqrt":
        pieces = [_one_minus_sqrt(peak, floor, rest)]
    else:
        stable_steps = steps - warmup_steps - cfg.decay_steps
        if stable_steps < 0:
            raise UserError(
                f"optimizer.decay_steps={cfg.decay_steps} and {warmup_steps} warm-up steps exceed the {steps} steps of "
                "their stages: shorten one of them or train longer"
            )
        pieces = [optax.constant_schedule(peak), optax.linear_schedule(peak, floor, cfg.decay_steps)]
        boundaries = [stable_steps]
    if warmup_steps > 0:
        pieces = [optax.linear_schedule(0.0, peak, warmup_steps), *pieces]
        boundaries = [warmup_steps, *(warmup_steps + boundary for boundary in boundaries)]
    return optax.join_schedules(pieces, boundaries)


def _inverse_sqrt(peak: float, floor: float, warmup_steps: int) -> optax.Schedule:
    """Continues a warm-up so that the rate falls with the square root of all steps taken."""

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        steps = jnp.asarray(count, jnp.float32) + warmup_steps
        return jnp.maximum(peak * jnp.sqrt(warmup_steps / steps), floor)

    return schedule


def _one_minus_sqrt(peak: float, floor: float, steps: int) -> optax.Schedule:
    """Falls fastest at first (Hägele et al., 2024; the last phase of ModernBERT)."""

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        share = jnp.minimum(jnp.asarray(count, jnp.float32) / steps, 1.0)
        return floor + (peak - floor) * (1.0 - jnp.sqrt(share))

    return schedule


def make_optimizer(cfg: Config) -> optax.GradientTransformationExtraArgs:
    """Clipping, moments, decoupled weight decay, LAMB's trust ratio, layers' shares and the learning rate, in this order.

    Its `update` takes `finite`, which leaves the moments as they are when false, and `grad_norm`, so as not to compute it
    again. The decay is multiplied by the learning rate but not by the moments; with `decay_at_peak` by the rate's share of
    its peak.

    Source: google-research/bert:optimization.py (AdamW, there without bias correction); arXiv:1904.00962, algorithm 2,
    and NVIDIA/apex:apex/optimizers/fused_lamb.py (LAMB: what does not decay is not rescaled either); Wortsman et al., 2023,
    and warner-benjamin/optimi (StableAdamW: the decay of a tensor is slowed down with its update).
    """
    rule = cfg.optimizer

    def mask(params: Any) -> Any:
        return decay_mask(params, embeddings=rule.decay_embeddings, norms_and_biases=rule.decay_norms_and_biases)

    parts: list[optax.GradientTransformation] = []
    if rule.clip_norm > 0:
        parts.append(clip_by_global_norm(rule.clip_norm))
    adam = scale_by_adam(rule.b1, rule.b2, rule.eps, bias_correction=rule.bias_correction)
    decay: optax.GradientTransformation | None = None
    if rule.weight_decay > 0 and rule.decay_at_peak:
        peak = _joined(cfg, lambda curve: optax.constant_schedule(curve.peak))
        decay = optax.add_decayed_weights(lambda count: rule.weight_decay / peak(count), mask)
    elif rule.weight_decay > 0:
        decay = optax.add_decayed_weights(rule.weight_decay, mask)
    if rule.name == "stable_adamw":
        parts.append(stabilise(adam, decay or optax.identity(), rule))
    else:
        parts += [adam, decay] if decay else [adam]
    if rule.name == "lamb":
        parts.append(optax.masked(scale_by_layer_trust_ratio(), mask))
    if rule.layer_decay < 1.0:
        parts.append(scale_by_depth(rule.layer_decay))
    parts.append(optax.scale_by_learning_rate(learning_rate(cfg)))
    return optax.with_extra_args_support(optax.chain(*parts))


def decay_mask(params: Any, *, embeddings: bool = True, norms_and_biases: bool = False) -> Any:
    """True where weight decay applies: everywhere but in norms and biases, as BERT does.

    Args:
        embeddings: whether the tables under `embeddings/` decay. An untied decoder is no embedding and always does.
        norms_and_biases: whether these decay too, as in fairseq's RoBERTa (fairseq:optim/__init__.py has one group).
    """

    def decays(path: Any, _: Any) -> bool:
        *modules, leaf = _names(path)
        if "bias" in leaf.split("_") or any("norm" in module.split("_") for module in modules):
            return norms_and_biases
        return embeddings or "embeddings" not in modules

    return jax.tree_util.tree_map_with_path(decays, params)


def clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """Scales gradients down to a global norm of `limit` where it is larger.

    By one multiplication, which XLA fuses into the moments; optax's division is computed apart and stored.
    """

    def update(
        grads: Any, state: Any, params: Any = None, *, grad_norm: jax.Array | None = None, **_: Any
    ) -> tuple[Any, optax.EmptyState]:
        norm = optax.tree.norm(grads) if grad_norm is None else grad_norm
        scale = jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scale_by_adam(b1: float, b2: float, eps: float, *, bias_correction: bool) -> optax.GradientTransformationExtraArgs:
    """Adam's direction, with or without bias correction, and with a way to skip an update without copying the moments.

    Without correction the first updates are larger: m / √v is (1 - b1) / √(1 - b2) at first. optax's own always corrects;
    and a select between old and new moments around it makes XLA copy both, 8% of a BERT-base step on a CPU.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        return optax.scale_by_adam(b1, b2, eps).init(params)

    def update(
        grads: Any, state: Any, params: Any = None, *, finite: jax.typing.ArrayLike = True, **_: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        def moment(decay: float, order: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
            return lambda g, old: jnp.where(finite, decay * old + (1.0 - decay) * g**order, old)

        mu = jax.tree.map(moment(b1, 1), grads, state.mu)
        nu = jax.tree.map(moment(b2, 2), grads, state.nu)
        # Updates are made from the new moments as they lie in memory. Were they computed from the old ones again, the old
        # ones would have to be kept, and the new ones could not take their place.
        mu, nu = jax.lax.optimization_barrier((mu, nu))
        count = jnp.where(finite, optax.safe_increment(state.count), state.count)
        scale_mu = 1.0 / (1.0 - b1**count) if bias_correction else 1.0
        scale_nu = 1.0 / (1.0 - b2**count) if bias_correction else 1.0
        updates = jax.tree.map(lambda m, v: m * scale_mu / (jnp.sqrt(v * scale_nu) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def stabilise(
    adam: optax.GradientTransformationExtraArgs, decay: optax.GradientTransformation, rule: OptimizerConfig
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction and the decay, tensor by tensor smaller where gradients are larger than their second moment says.

    They are divided by the root mean square of gradient / √v where that is above 1, v no smaller than eps²: Adafactor's
    clipping of updates. Each layer of a stacked parameter is a tensor.
    """

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, adam_state = adam.update(grads, state[0], params, **extra)
        updates, decay_state = decay.update(updates, state[1], params)
        correction = 1.0 - rule.b2**adam_state.count if rule.bias_correction else 1.0

        def slow_down(path: Any, update: jax.Array, grad: jax.Array, v: jax.Array) -> jax.Array:
            squares = jnp.square(grad) / jnp.maximum(v / correction, rule.eps**2)
            ratio = jnp.sqrt(squares.mean(_axes_of_tensor(path, grad), keepdims=True))
            return update / jnp.maximum(1.0, ratio)

        updates = jax.tree_util.tree_map_with_path(slow_down, updates, grads, adam_state.nu)
        return updates, (adam_state, decay_state)

    return optax.GradientTransformationExtraArgs(lambda params: (adam.init(params), decay.init(params)), update)


def scale_by_depth(decay: float) -> optax.GradientTransformation:
    """Multiplies updates by `decay` once for each layer between them and the head, and once more for embeddings.

    Of N layers the last has the factor `decay`, the first decay^N, and what lies before them, as the tables, decay^(N+1).

    Source: google-research/electra:model/optimization.py (_get_layer_lrs).
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        named = jax.tree_util.tree_leaves_with_path(updates)
        layers = {leaf.shape[0] for path, leaf in named if is_stacked(path)}
        count = max(layers, default=0)

        def scale(path: Any, update: jax.Array) -> jax.Array:
            if is_stacked(path):
                powers = decay ** jnp.arange(len(update), 0, -1, dtype=update.dtype)
                return update * powers.reshape(-1, *(1,) * (update.ndim - 1))
            before_layers = "encoder" in _names(path) and "final_norm" not in _names(path)
            return update * decay ** (count + 1) if before_layers else update

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _names(path: Any) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def scale_by_layer_trust_ratio() -> optax.GradientTransformation:
    """Rescales each update to its weights' norm, tensor by tensor: each layer of a stacked parameter has its own ratio.

    The ratio is 1 where either norm is 0.
    """

    def norm(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(array.astype(jnp.float32)), axes, keepdims=True))

    def rescale(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        axes = _axes_of_tensor(path, update)
        param_norm, update_norm = norm(param, axes), norm(update, axes)
        both = (param_norm > 0) & (update_norm > 0)
        ratio = jnp.where(both, param_norm / jnp.where(both, update_norm, 1.0), 1.0)
        return update * ratio.astype(update.dtype)

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        return jax.tree_util.tree_map_with_path(rescale, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _axes_of_tensor(path: Any, array: jax.Array) -> tuple[int, ...]:
    """The axes of one tensor in a parameter, which may be a stack of layers'."""
    return tuple(range(int(is_stacked(path)), array.ndim))
