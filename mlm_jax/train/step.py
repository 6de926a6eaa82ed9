"""The train step: masking, forward, masked-only loss, backward and update, compiled as one XLA program."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlm_jax.config import Config, StageConfig
from mlm_jax.masking import VocabTables
from mlm_jax.model.embeddings import segment_positions
from mlm_jax.model.encoder import collect, ready
from mlm_jax.objectives import Batch, Keys, LossSums, Term, Trainable
from mlm_jax.segments import attended
from mlm_jax.sharding import ROWS
from mlm_jax.train.state import TrainState, share_of

StepMetrics = dict[str, Any]
TrainStep = Callable[[TrainState, Batch, VocabTables], tuple[TrainState, StepMetrics]]


def make_train_step(
    cfg: Config,
    stage: StageConfig,
    objective: Trainable,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    first_step: int = 0,
    sources: Mapping[str, tuple[int, int]] | None = None,
) -> TrainStep:
    """The jitted step of one stage: (state, batch, vocab) -> (state, device scalars). The state is donated.

    Args:
        batch: int32 `tokens` and `segment_ids` [B, L], `example_ids` and `epochs` [B], rows over slice × data × fsdp.
        first_step: the steps done before this stage; a log line's means never span two stages.
        sources: of a mixture, the example ids, from … up to, of each source; its share of the tokens is measured.
    """
    uses_dropout = cfg.model.dropout > 0 or cfg.model.attention_dropout > 0
    compute = objective.compute

    @functools.partial(jax.jit, donate_argnames=("state",), compiler_options=compute.compiler_options)
    def train_step(state: TrainState, batch: Batch, vocab: VocabTables) -> tuple[TrainState, StepMetrics]:
        mask_key = jax.random.key(cfg.seed)
        batch = batch | {"places": _places(batch["tokens"])}
        dropout_key = None
        if uses_dropout:
            dropout_key = jax.random.fold_in(jax.random.key(cfg.seed + 1, impl=objective.compute.dropout_impl), state.step)
        grads, sums = accumulate_gradients(
            lambda params, micro, key: objective.loss(params, micro, Keys(mask_key, key, state.step), vocab),
            state.params,
            batch,
            dropout_key,
            stage.accumulation,
            compute.dtype,
            layers_at_once=stage.accumulation > 1 or compute.scan_layers,
        )
        loss = total_loss(sums)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            # A non-finite step is gated inside each update and not undone afterwards: undoing would copy the state.
            extra = {"finite": finite, "grad_norm": grad_norm}
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra)
            params = jax.tree.map(lambda old, update: jnp.where(finite, old + update, old), state.params, updates)
            ema = state.ema
            if ema is not None:
                ema_rate = jnp.where(finite, 1.0 - cfg.optimizer.ema_decay, 0.0)
                ema = jax.tree.map(lambda old, new: old + ema_rate * (new - old), ema, params)
        fresh = (state.step % cfg.train.log_every == 0) | (state.step == first_step)
        interval = _add_to_interval(state.interval, fresh, sums, batch, finite, sources or {})
        nonfinite = jnp.where(finite, 0, state.nonfinite + 1)
        metrics = {
            "interval": interval,
            "learning_rate": schedule(state.step),
            "grad_norm": grad_norm,
            "nonfinite": nonfinite,
        }
        return TrainState(state.step + 1, params, opt_state, ema, nonfinite, interval), metrics

    return train_step


def accumulate_gradients(
    loss_sums: Callable[[Any, Batch, jax.Array | None], LossSums],
    params: Any,
    batch: Batch,
    dropout_key: jax.Array | None,
    count: int,
    dtype: jnp.dtype,
    *,
    layers_at_once: bool,
) -> tuple[Any, LossSums]:
    """The gradient of the global batch's loss, in `count` micro-batches, and the batch's sums.

    Parameters are cast to `dtype` and gathered once. Each device adds up its own share of the gradient, over all micro-
    batches in float32, and only then is it reduced, onto the devices that hold the parameter: scattered where ZeRO has
    divided it. Without `layers_at_once` each layer is gathered where it is used, and its gradient reduced where it arises,
    beside the backward pass of the layers before it.

    Each loss term is divided by its weight over the whole batch, so the result does not depend on `count`. The weights are
    needed before the first backward pass; as they do not depend on the parameters, the compiler reduces that first pass to
    the masking alone.
    """

    stored = params
    params = ready(stored, dtype, layers=layers_at_once)

    def reduced(grads: Any) -> Any:
        """The transpose of what `collect` has done to the parameters; its forward pass is never computed."""
        again = functools.partial(collect, layers=layers_at_once)
        _, transpose = jax.vjp(again, jax.tree.map(lambda param, grad: param.astype(grad.dtype), stored, grads))
        return jax.tree.map(lambda grad, param: grad.astype(param.dtype), *transpose(grads), stored)

    def scaled(params: Any, micro: Batch, key: jax.Array | None, weights: dict[str, jax.Array]) -> Any:
        sums = loss_sums(params, micro, key)
        return sum(Term(term.sum, weights[name]).mean() for name, term in sums.losses.items()), sums

    if count == 1:

        def whole(params: Any) -> Any:
            sums = loss_sums(params, batch, dropout_key)
            return total_loss(sums), sums

        (_, sums), grads = jax.value_and_grad(whole, has_aux=True)(params)
        return reduced(grads), sums

    micro_batches = {name: _split_rows(array, count) for name, array in batch.items()}
    keys = None if dropout_key is None else jax.random.split(dropout_key, count)

    def weigh(micro: Batch) -> dict[str, jax.Array]:
        return {name: term.weight for name, term in loss_sums(params, micro, None).losses.items()}

    weights = jax.tree.map(lambda x: x.sum(0), jax.lax.map(weigh, micro_batches))

    def body(carry: Any, inputs: Any) -> Any:
        micro, key = inputs
        (_, sums), grads = jax.value_and_grad(scaled, has_aux=True)(params, micro, key, weights)
        return jax.tree.map(jnp.add, carry, (grads, sums)), None

    one = jax.tree.map(lambda x: x[0], (micro_batches, keys))
    shapes = jax.eval_shape(lambda p: loss_sums(p, *one), params)
    start = jax.tree.map(_zero_gradient, params), jax.tree.map(jnp.zeros_like, shapes)
    (grads, sums), _ = jax.lax.scan(body, start, (micro_batches, keys))
    return reduced(grads), sums


def _zero_gradient(param: jax.Array) -> jax.Array:
    """Where a parameter's gradient starts to be added up: in float32, and a partial sum on each device."""
    spec = jax.typeof(param).sharding.spec
    return jnp.zeros(param.shape, jnp.float32, out_sharding=jax.P(*spec.partitions, unreduced=spec.reduced))


def _places(tokens_BL: jax.Array) -> jax.Array:
    """Each row's place in the global batch, from 0 to 1: float32 [B]."""
    rows = tokens_BL.shape[0]
    return jnp.arange(rows, dtype=jnp.float32, out_sharding=jax.P(ROWS)) / rows


def total_loss(sums: LossSums) -> jax.Array:
    """The sum of the terms' means."""
    return sum((term.mean() for term in sums.losses.values()), start=jnp.zeros(()))


def _split_rows(array: jax.Array, count: int) -> jax.Array:
    """[B, …] to [count, B / count, …], every micro-batch spread over all devices without moving a row."""
    rows, rest = array.shape[0] // count, array.shape[1:]
    spec = jax.P(ROWS, *(None,) * (1 + len(rest)))
    return jnp.reshape(array, (rows, count, *rest), out_sharding=spec).swapaxes(0, 1)


def _add_to_interval(
    interval: dict[str, Term],
    fresh: jax.Array,
    sums: LossSums,
    batch: Batch,
    finite: jax.Array,
    sources: Mapping[str, tuple[int, int]],
) -> dict[str, Term]:
    """This step's sums added to those since the last log line. A skipped step counts only as skipped."""
    segment_ids_BL = batch["segment_ids"]
    real_BL = (segment_ids_BL > 0).astype(jnp.float32)
    tokens = real_BL.sum()
    # A segment of s tokens has positions 0 … s-1, and the sum of 2p+1 over them is s².
    squares = ((2 * segment_positions(attended(segment_ids_BL)) + 1) * real_BL).sum()
    one = jnp.ones(())
    current = sums.losses | sums.metrics
    current = jax.tree.map(lambda x: jnp.where(finite, x, 0.0), current)
    current |= {
        "skipped": Term(1.0 - finite.astype(jnp.float32), one),
        "tokens": Term(tokens, one),
        "row_fill": Term(tokens, one * segment_ids_BL.size),
        "segment_length": Term(squares, tokens),
        "predicted": Term(sums.predicted, tokens),
    }
    ids_B1 = batch["example_ids"][:, None]
    for name, (first, end) in sources.items():
        current[share_of(name)] = Term((real_BL * ((ids_B1 >= first) & (ids_B1 < end))).sum(), tokens)
    return jax.tree.map(lambda old, new: jnp.where(fresh, new, old + new), interval, current)
