"""Fine-tuning as a job of the loop, and `mlm-jax finetune`: one run, or one for each of several seeds."""

import dataclasses
import logging
import os
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mlm_jax.config import Config
from mlm_jax.distributed import Peers
from mlm_jax.errors import UserError
from mlm_jax.finetune import metrics
from mlm_jax.finetune.apply import Apply
from mlm_jax.finetune.prepare import Prepared, prepare
from mlm_jax.finetune.table import Schedule, bucket_lengths
from mlm_jax.inference import read_network
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import Batch, Trainable, make_task
from mlm_jax.sharding import ROWS, place
from mlm_jax.train import loop
from mlm_jax.train.best import Best
from mlm_jax.train.feed import vocab_tables
from mlm_jax.train.state import TrainState
from mlm_jax.workdir import Workdir

logger = logging.getLogger(__name__)


def finetune(cfg: Config, workdir: str | os.PathLike[str], *, seeds: int = 1, peers: Peers | None = None) -> dict[str, Any]:
    """Fine-tunes, or goes on with it, once for each seed from the config's on.

    Args:
        workdir: of the run; with several seeds the runs are in seed0, seed1, … there.

    Returns:
        `runs`, each with its workdir, seed and the measures of its best evaluation, and of several their `mean` and
        `deviation` (of a sample).

    Raises:
        UserError, MachineError, Stop: as `loop.run`.
    """
    metrics.require_libraries()
    if seeds < 1:
        raise UserError(f"--seeds={seeds} must be positive")
    prepared = prepare(cfg)
    runs = []
    for index in range(seeds):
        path = os.path.join(workdir, f"seed{index}") if seeds > 1 else os.fspath(workdir)
        seeded = dataclasses.replace(prepared.cfg, seed=cfg.seed + index)
        best, late_signal = _run_one(dataclasses.replace(prepared, cfg=seeded), path, peers)
        runs.append({"workdir": path, "seed": seeded.seed, "step": best.step, **best.values})
        if late_signal and index + 1 < seeds:
            raise loop.Stop(late_signal, seeded.total_steps)
    measured = {name: [run[name] for run in runs] for name in _measures(runs[0])}
    result: dict[str, Any] = {"objective": cfg.objective, "metric": prepared.cfg.task.metric, "runs": runs}
    if seeds > 1:
        result["mean"] = {name: statistics.fmean(values) for name, values in measured.items()}
        result["deviation"] = {name: statistics.stdev(values) for name, values in measured.items()}
    return result


def _run_one(prepared: Prepared, path: str, peers: Peers | None) -> tuple[Best, int | None]:
    cfg = prepared.cfg
    best = Best(cfg.task.metric, cfg.task.patience)
    with loop.site(cfg, path, peers) as here:
        if here.peers.is_primary:
            here.workdir.open_for_training(cfg)
            prepared.tokenizer.save(here.workdir.path / "tokenizer")
            here.peers.announce()
        else:
            here.peers.wait_for_primary()
        late_signal = loop.run(cfg, here, Finetuning(prepared), best=best)
    if not best.step:
        raise UserError(f"{path}: no evaluation gave a finite {best.metric}: nothing was learned; try another learning rate")
    return best, late_signal


class Finetuning:
    """A run over a table of examples; see `loop.Job`."""

    sources: tuple[str, ...] = ()

    def __init__(self, prepared: Prepared):
        self.prepared, self.cfg = prepared, prepared.cfg
        task = make_task(self.cfg, Compute.resolve(self.cfg.compute))
        self.objective: Trainable = task
        self.vocab = vocab_tables(self.cfg, prepared.tokenizer)
        self.pad_id = prepared.tokenizer.pad_id
        buckets, rows = self.cfg.task.buckets, self.cfg.evaluation.batch_size
        self.apply = Apply(task, pad_id=self.pad_id, buckets=buckets, batch_size=rows)

    def begin(self, state: TrainState) -> TrainState:
        """The encoder of `init_from` under a head that was drawn, or all as it was drawn; see `loop.Job`.

        Of the head a transform is the one before the decoder of masked tokens, if there is one that computes the same: so
        begin transformers' models of ModernBERT.
        """
        if self.cfg.task.random_init:
            return state
        network, step = read_network(Workdir(self.cfg.init_from), self.objective.compute)
        logger.info("beginning with the encoder of %s at step %d", self.cfg.init_from, step)
        params = state.params | {"encoder": _place_like(network["encoder"], state.params["encoder"])}
        if self.cfg.task.transform:
            params["head"] = self._with_transform(state.params["head"], network["head"])
        # Each leaf is its own buffer: a donated state must not hold one array twice.
        return dataclasses.replace(state, params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))

    def _with_transform(self, drawn: Any, pretrained: Any) -> Any:
        """A head with the transform of another; the two name its parts differently."""
        inner = drawn.get("output", drawn)  # of a head for texts, that for tokens
        own = inner["transform"]
        names = {"transform_DD": "dense_DD", "transform_bias_D": "dense_bias_D", "norm": "norm"}
        found = {ours: pretrained[name] for name, ours in names.items() if name in pretrained}
        same_shapes = jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, own)
        if not same_shapes or self.cfg.task.activation != self.cfg.model.activation:
            logger.info("the head's transform is drawn: the run to begin with has none of its shapes and activation")
            return drawn
        inner = inner | {"transform": _place_like(found, own)}
        return drawn | {"output": inner} if "output" in drawn else inner

    def enter(self, index: int, done: int) -> loop.Leg:
        """The task, and batches of rows of similar lengths."""
        stage, table = self.cfg.stages[index], self.prepared.train
        buckets = bucket_lengths(self.cfg.task.buckets, int(table.lengths.max()))
        schedule = Schedule(table.lengths, buckets, stage.batch_size, self.cfg.seed)

        def batches() -> Iterator[Batch]:
            for step in range(done, stage.steps):
                batch: Batch = place(table.batch(*schedule.at(step), self.pad_id, targets=True), jax.P(ROWS))
                yield batch

        return loop.Leg(self.objective, batches())

    def evaluate(self, step: int, params: Any) -> dict[str, Any]:
        """The task's measures on the dev examples."""
        prepared, labels = self.prepared, self.cfg.task.labels
        outputs = self.apply(params, prepared.dev)
        found = prepared.kind.decode(prepared.dev_examples, labels, prepared.dev, outputs)
        values = prepared.kind.measure(prepared.dev_examples, found)
        logger.info("step %d dev: %s", step, ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        return dict(values)


def _place_like(new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), new, old)


def _measures(run: dict[str, Any]) -> list[str]:
    """The names of what was measured of a run."""
    return [name for name in run if name not in ("workdir", "seed", "step")]


def format_result(result: dict[str, Any]) -> str:
    """The runs as a table, and of several their mean and deviation."""
    names = _measures(result["runs"][0])
    lines = [f"{'seed':<12}{'best step':>10}" + "".join(f"{name:>14}" for name in names)]
    for run in result["runs"]:
        lines.append(f"{run['seed']:<12}{run['step']:>10}" + "".join(f"{run[name]:>14.4f}" for name in names))
    for part in ("mean", "deviation"):
        if part in result:
            lines.append(f"{part:<22}" + "".join(f"{result[part][name]:>14.4f}" for name in names))
    return "\n".join(lines)
