"""The training loop: restore, then batch after batch into the compiled step, with logs, evaluations and checkpoints.

What is trained, on what, and how it is judged is a `Job`: pre-training (`train.pretraining`) or a task (`finetune.job`).
"""

import contextlib
import dataclasses
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax

from mlm_jax import flops
from mlm_jax.config import Config, StageConfig
from mlm_jax.distributed import Peers
from mlm_jax.errors import MachineError, UserError
from mlm_jax.masking import VocabTables
from mlm_jax.objectives import Batch, Trainable
from mlm_jax.sharding import check_batch, check_networks, connect, make_mesh
from mlm_jax.train.best import Best
from mlm_jax.train.checkpoint import Checkpoints
from mlm_jax.train.optimizer import learning_rate, make_optimizer
from mlm_jax.train.state import TrainState, init_state, share_of
from mlm_jax.train.step import make_train_step
from mlm_jax.train.writer import MetricWriter, Progress
from mlm_jax.workdir import Workdir

logger = logging.getLogger(__name__)


class Stop(Exception):
    """The run was asked to stop by a signal; its state is saved."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by signal {signal_number} at step {step}")
        self.signal_number, self.step = signal_number, step


@dataclasses.dataclass(frozen=True)
class Profile:
    """Steps whose execution is traced into `workdir/profile`."""

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a run takes place: its workdir, held by this process, the current mesh, and the other processes."""

    workdir: Workdir
    mesh: jax.sharding.Mesh
    peers: Peers


@dataclasses.dataclass(frozen=True)
class Leg:
    """What is left of a stage, as a job gives it to the loop.

    Attributes:
        objective: the stage's.
        batches: of the steps to come.
        ranges: of a mixture, the ids, from … up to, of each source's examples.
        epochs: of a mixture, how often each source has been gone through after so many steps of the whole stage.
    """

    objective: Trainable
    batches: Iterator[Batch]
    ranges: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    epochs: Callable[[int], dict[str, float]] = lambda steps: {}


class Job(Protocol):
    """What a run trains and how it is judged."""

    objective: Trainable  # of any stage: names, parameters and FLOPs are the same in all
    vocab: VocabTables  # on the current mesh
    sources: tuple[str, ...]  # of a mixture, their names

    def begin(self, state: TrainState) -> TrainState:
        """The state at step 0, made of the one that was drawn at random."""

    def enter(self, index: int, done: int) -> Leg:
        """Begins a stage, or goes on with it after `done` of its steps."""

    def evaluate(self, step: int, params: Any) -> dict[str, Any]:
        """What an evaluation writes down."""


@contextlib.contextmanager
def site(cfg: Config, workdir_path: str | os.PathLike[str], peers: Peers | None) -> Iterator[Site]:
    """Checks the config against the devices, holds the workdir and sets the mesh.

    Raises:
        UserError: the config does not fit the devices, or another process trains in the workdir.
    """
    peers = peers or Peers()
    if jax.process_count() != peers.count:
        raise UserError(
            f"JAX has found {jax.process_count()} processes, and this one knows of {peers.count}: start all with "
            "--distributed, or with --coordinator, --num-processes and --process-id"
        )
    mesh = make_mesh(cfg.sharding)
    check_networks(cfg, mesh)
    for index, stage in enumerate(cfg.stages):
        check_batch(stage, mesh, f"stages[{index}]")
    workdir = Workdir(workdir_path)
    with contextlib.ExitStack() as stack:
        if peers.is_primary:
            stack.enter_context(workdir.lock())
        stack.enter_context(jax.set_mesh(mesh))
        yield Site(workdir, mesh, peers)


def run(cfg: Config, here: Site, job: Job, *, best: Best | None = None, profile: Profile | None = None) -> int | None:
    """Trains to the last stage's last step, continuing from the workdir's newest checkpoint.

    Args:
        best: the measure by which evaluations are compared: the best one's checkpoint is kept, and the run may end early.

    Returns:
        A signal that came too late to stop this run, for what would come after it.

    Raises:
        UserError: the config does not fit the run in the workdir.
        MachineError: the loss stopped being finite, or a file could not be written.
        Stop: SIGTERM or SIGINT arrived, here or at a peer; the state was saved first.
    """
    with _signals() as received:
        _Run(cfg, here, job, best, profile, received).train()
    return received[0] if received else None


class _Run:
    """One process's part of a run: what was built once and is used in every step."""

    def __init__(self, cfg: Config, here: Site, job: Job, best: Best | None, profile: Profile | None, received: list[int]):
        self.cfg, self.workdir, self.mesh, self.job, self.best = cfg, here.workdir, here.mesh, job, best
        self.received, self.peers, self.is_primary = received, here.peers, here.peers.is_primary
        self.profile = profile if self.is_primary else None
        self.optimizer, self.schedule = make_optimizer(cfg), learning_rate(cfg)
        self.checkpoints = Checkpoints(here.workdir, keep=cfg.train.keep_checkpoints)
        self.objective = job.objective
        self.last_time, self.last_step, self.tracing = 0.0, 0, False
        self.paused_seconds = 0.0  # evaluation and checkpoints, left out of the throughput

    def train(self) -> None:
        if jax.process_count() > 1:
            connect(self.mesh)
        state, step = self._restore_or_init()
        if self.best is not None and step:
            self.best.recall(self.workdir.path, step)
        if step >= self.cfg.total_steps or self._ends_early():
            logger.info("this run has finished: %s is at step %d of %d", self.workdir.path, step, self.cfg.total_steps)
        if self.cfg.optimizer.warmup_steps >= self.cfg.total_steps:
            logger.warning(
                "optimizer.warmup_steps=%d: the learning rate is still rising when the run ends, at step %d",
                self.cfg.optimizer.warmup_steps,
                self.cfg.total_steps,
            )
        if self.profile and not step < self.profile.start <= self.cfg.total_steps:
            logger.warning("--profile: step %d is not among those to come, so nothing is traced", self.profile.start)
        with (
            MetricWriter(self.workdir.path, self.cfg, step, is_primary=self.is_primary) as self.writer,
            Progress(self.cfg.total_steps, step, self.objective.metric_names, is_primary=self.is_primary) as self.progress,
        ):
            first = 0
            for index, stage in enumerate(self.cfg.stages):
                last = first + stage.steps
                if step < last and not self._ends_early():
                    state = self._train_stage(index, stage, state, step, last)
                    step = last
                first = last
        self.checkpoints.close()

    def _ends_early(self) -> bool:
        return self.best is not None and self.best.is_final

    def _train_stage(self, index: int, stage: StageConfig, state: TrainState, first: int, last: int) -> TrainState:
        cfg, began = self.cfg, self.cfg.first_step(index)
        leg = self.job.enter(index, first - began)
        train_step = make_train_step(
            cfg, stage, leg.objective, self.optimizer, self.schedule, first_step=began, sources=leg.ranges
        )

        def log(step: int, metrics: dict[str, Any]) -> None:
            self._log(index, step, metrics, leg.epochs(step - began))

        logger.info("stage %d: steps %d to %d, %d rows of %d tokens", index, first, last, stage.batch_size, stage.seq_len)
        pending: tuple[int, dict[str, Any]] | None = None
        self.last_time, self.last_step, self.paused_seconds = time.perf_counter(), first, 0.0
        # The order within a step is a contract: next batch, dispatch, write the previous metrics, evaluate, save.
        for step in range(first + 1, last + 1):
            batch = next(leg.batches)
            self._trace(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step), jax.transfer_guard("disallow"):
                state, metrics = train_step(state, batch, self.job.vocab)
            self._trace(step, metrics)
            if pending is not None:
                log(*pending)
                pending = None
            if step % cfg.train.log_every == 0 or step == last:
                pending = (step, metrics)
            evaluating = step == last or (cfg.evaluation.every > 0 and step % cfg.evaluation.every == 0)
            saving = step == last or step % cfg.train.checkpoint_every == 0
            stopping = self.peers.agree_to_stop(step, bool(self.received))
            if not (evaluating or saving or stopping):
                continue
            # What a checkpoint's step has logged must be on disk before the checkpoint is.
            if pending is not None:
                log(*pending)
                pending = None
            with self._pause():
                self._refuse_nonfinite(step, jax.device_get(metrics["nonfinite"]))
                improved = evaluating and self._evaluate(step, state)
                ending = step == cfg.total_steps or self._ends_early()
                if saving or stopping or improved or ending:
                    score = self.best.value if self.best is not None and improved else None
                    self.checkpoints.save(state, step, score=score, wait=stopping or ending)
            if ending:
                break
            if stopping:
                self.checkpoints.close()
                raise Stop(self.received[0] if self.received else signal.SIGTERM, step)
        return state

    def _restore_or_init(self) -> tuple[TrainState, int]:
        names = self.objective.loss_names + self.objective.metric_names + tuple(map(share_of, self.job.sources))
        create = jax.jit(
            lambda: init_state(
                self.objective.init(jax.random.key(self.cfg.seed)),
                self.optimizer,
                ema=self.cfg.optimizer.ema_decay > 0,
                names=names,
                zero=self.cfg.sharding.zero,
            )
        )
        abstract = jax.tree.map(self._concrete, jax.eval_shape(create))
        restored = self.checkpoints.restore(abstract)
        if restored is None:
            return self.job.begin(create()), 0
        logger.info("continuing from the checkpoint of step %d", restored[1])  # launch/worker.sh reads this
        return restored

    def _concrete(self, leaf: Any) -> jax.ShapeDtypeStruct:
        spec = jax.P() if leaf.sharding is None else leaf.sharding.spec  # scalars carry none
        sharding = jax.NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def _log(self, stage_index: int, step: int, metrics: dict[str, Any], epochs: dict[str, float]) -> None:
        metrics = jax.device_get(metrics)
        interval = metrics["interval"]
        # Where every step was skipped there is no loss, which is not a loss of 0.
        means = {name: float(term.sum / term.weight) if term.weight else math.nan for name, term in interval.items()}
        now = time.perf_counter()
        seconds = now - self.last_time - self.paused_seconds
        # After a restart the interval has steps of the process before; this one's clock ran for its own only.
        tokens_per_second = means["tokens"] * (step - self.last_step) / max(seconds, 1e-9)
        self.last_time, self.last_step, self.paused_seconds = now, step, 0.0
        losses = {name: means[name] for name in self.objective.loss_names}
        # A term that nothing was counted in adds nothing to the loss.
        counted = [mean for mean in losses.values() if not math.isnan(mean)]
        values: dict[str, Any] = {
            "loss": sum(counted) if counted else math.nan,
            **(losses if len(losses) > 1 else {}),
            **{name: means[name] for name in self.objective.metric_names},
            "learning_rate": float(metrics["learning_rate"]),
            "grad_norm": float(metrics["grad_norm"]),
            "tokens_per_second": tokens_per_second,
            "fill_rate": means["row_fill"],
            "predicted": means["predicted"],
            "skipped": int(interval["skipped"].sum),
            "stage": stage_index,
        }
        if epochs:
            values |= {"shares": {name: means[share_of(name)] for name in epochs}, "epochs": epochs}
        per_token = self.objective.flops_per_token(means["segment_length"], means["predicted"])
        peak = flops.device_peak_flops(jax.devices()[0])
        if peak is not None:
            values["mfu"] = tokens_per_second * per_token / (peak * jax.device_count())
        self.writer.write(step, "train", values)
        self.progress.update(step, values)
        self._refuse_nonfinite(step, metrics["nonfinite"])

    def _refuse_nonfinite(self, step: int, count: Any) -> None:
        if int(count) >= self.cfg.train.max_nonfinite:
            raise MachineError(
                f"step {step}: {int(count)} updates in a row were skipped because the loss or gradient was not finite. "
                f"{self.checkpoints.newest}. Try a lower optimizer.learning_rate, a "
                "longer warm-up, optimizer.clip_norm=1.0, or compute.dtype=float32"
            )

    def _evaluate(self, step: int, state: TrainState) -> bool:
        """Evaluates, and says whether the result is the best so far, where that is asked for."""
        values = self.job.evaluate(step, state.params if state.ema is None else state.ema)
        self.writer.write(step, "eval", values)
        return self.best is not None and self.best.add(step, values)

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.paused_seconds += time.perf_counter() - began

    def _trace(self, step: int, finished: Any = None) -> None:
        """Starts the profiler before its first step and stops it once its last one has been computed."""
        if self.profile is None:
            return
        if finished is None and step == self.profile.start:
            jax.profiler.start_trace(os.fspath(self.workdir.path / "profile"))
            self.tracing = True
        elif finished is not None and self.tracing and step in (self.profile.stop, self.cfg.total_steps):
            jax.block_until_ready(finished)
            jax.profiler.stop_trace()
            self.tracing = False
            logger.info("steps %d to %d are traced in %s", self.profile.start, step, self.workdir.path / "profile")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the first SIGTERM or SIGINT for the loop to act on between steps; a second one acts at once."""
    received: list[int] = []
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
