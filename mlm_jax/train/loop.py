"""The training loop: restore, then batch after batch into the compiled step, with logs, evaluations and checkpoints."""

import collections
import contextlib
import dataclasses
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax

from mlm_jax import flops
from mlm_jax.config import Config, StageConfig
from mlm_jax.data.corpus import Corpus, open_corpus
from mlm_jax.data.loader import Examples, Rows
from mlm_jax.data.mixture import training_rows
from mlm_jax.data.ngrams import read_ngrams
from mlm_jax.data.prepare import prepare
from mlm_jax.distributed import Peers
from mlm_jax.errors import MachineError, UserError
from mlm_jax.fill_mask import Filler
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import make_objective
from mlm_jax.sharding import check_batch, check_networks, connect, make_mesh, place
from mlm_jax.train.begin import begin
from mlm_jax.train.checkpoint import Checkpoints
from mlm_jax.train.evaluate import HeldOut, described, evaluate_sources, make_eval_step
from mlm_jax.train.feed import check_epochs, device_batches, token_bytes, vocab_tables
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


def train(
    cfg: Config,
    workdir_path: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    profile: Profile | None = None,
    peers: Peers | None = None,
) -> None:
    """Trains to the last stage's last step, continuing from the workdir's newest checkpoint.

    Args:
        data_dir: the prepared corpus; made there when missing. Default: `data/` in the workdir.
        workers: processes for preparation; default one a core.
        peers: the other processes of this run, which call this at the same time with the same arguments; none when None.

    Raises:
        UserError: the config does not fit the machine, the corpus, or the run in the workdir.
        MachineError: the loss stopped being finite, or a file could not be written.
        Stop: SIGTERM or SIGINT arrived, here or at a peer; the state was saved first.
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
        corpus = _open(cfg, workdir, data_dir or workdir.default_data, workers, peers)
        over = "a source at most" if corpus.parts else "the training text"
        logger.info("%d steps pass over %s %.2f times", cfg.total_steps, over, check_epochs(cfg, corpus))
        stack.enter_context(jax.set_mesh(mesh))
        received = stack.enter_context(_signals())
        _Run(cfg, workdir, corpus, mesh, profile, received, peers).train()


def _open(cfg: Config, workdir: Workdir, data_dir: str | os.PathLike[str], workers: int | None, peers: Peers) -> Corpus:
    """The primary makes what is missing of the workdir and the corpus; the others wait for it and open them."""
    if peers.is_primary:
        workdir.open_for_training(cfg)
        corpus = prepare(cfg, data_dir, workers)
        workdir.write_language(
            corpus.tokenizer, corpus.unigrams, {name: part.unigrams for name, part in corpus.parts.items()}
        )
        if cfg.masking.ngrams:
            workdir.keep_ngrams(read_ngrams(cfg.masking.ngrams))
        peers.announce()
        return corpus
    peers.wait_for_primary()
    try:
        workdir.read_config()
        return open_corpus(data_dir, cfg)
    except UserError as error:
        raise UserError(
            f"process {peers.index} does not see what process 0 has prepared ({error}): --workdir and --data must be on a "
            "disk that all processes share"
        ) from error


class _Run:
    """One process's part of a run: what was built once and is used in every step."""

    def __init__(
        self,
        cfg: Config,
        workdir: Workdir,
        corpus: Corpus,
        mesh: jax.sharding.Mesh,
        profile: Profile | None,
        received: list[int],
        peers: Peers,
    ):
        self.cfg, self.workdir, self.corpus, self.mesh = cfg, workdir, corpus, mesh
        self.received, self.peers, self.is_primary = received, peers, peers.is_primary
        self.profile = profile if self.is_primary else None
        self.compute = Compute.resolve(cfg.compute)
        self.optimizer, self.schedule = make_optimizer(cfg), learning_rate(cfg)
        self.vocab = vocab_tables(cfg, corpus.tokenizer, workdir.read_ngrams())
        self.log_unigrams = {
            name: place(workdir.log_unigrams(cfg.model.vocab_size, name), jax.P()) for name in corpus.parts or ("",)
        }
        self.bytes_V = place(token_bytes(corpus.tokenizer, cfg.model.vocab_size), jax.P())
        self.checkpoints = Checkpoints(workdir, keep=cfg.train.keep_checkpoints)
        self._measure_as(0)
        self.last_time, self.last_step, self.tracing = 0.0, 0, False
        self.paused_seconds = 0.0  # evaluation and checkpoints, left out of the throughput

    def _measure_as(self, stage: int) -> None:
        """Evaluates and fills masks with the model as it is in this stage."""
        self.objective = make_objective(self.cfg, self.compute, stage, mask_id=self.corpus.tokenizer.mask_id)
        self.eval_step = make_eval_step(self.cfg, self.objective)
        self.filler = Filler(self.objective, self.corpus.tokenizer)

    def train(self) -> None:
        if jax.process_count() > 1:
            connect(self.mesh)
        state, step = self._restore_or_init()
        if step >= self.cfg.total_steps:
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
            # Examples that the stages so far have seen at each row length; of a mixture, of each source.
            seen: dict[int, Any] = collections.defaultdict(int)
            for index, stage in enumerate(self.cfg.stages):
                rows = training_rows(self.corpus, self.cfg, stage)
                last = self.cfg.first_step(index) + stage.steps
                if step < last:
                    state = self._train_stage(index, stage, rows, state, step, last, seen[stage.seq_len])
                    step = last
                seen[stage.seq_len] = seen[stage.seq_len] + rows.counts(stage.steps * stage.batch_size)
        self.checkpoints.close()

    def _train_stage(
        self, index: int, stage: StageConfig, rows: Examples, state: TrainState, first: int, last: int, seen: Any
    ) -> TrainState:
        cfg, began = self.cfg, self.cfg.first_step(index)
        if cfg.at_stage(index).model != self.objective.cfg.model:
            self._measure_as(index)
        objective = make_objective(cfg, self.compute, index)
        train_step = make_train_step(
            cfg, stage, objective, self.optimizer, self.schedule, first_step=began, sources=rows.ranges
        )
        validation = self._freeze_validation(stage)
        feed = device_batches(
            rows, stage, self.mesh, seed=cfg.seed, start_step=first - began, num_steps=last - first, seen=seen
        )

        def epochs(step: int) -> dict[str, float]:
            return rows.epochs(seen + rows.counts((step - began) * stage.batch_size))

        logger.info("stage %d: steps %d to %d, %d rows of %d tokens", index, first, last, stage.batch_size, stage.seq_len)
        pending: tuple[int, dict[str, Any]] | None = None
        self.last_time, self.last_step, self.paused_seconds = time.perf_counter(), first, 0.0
        # The order within a step is a contract: next batch, dispatch, write the previous metrics, evaluate, save.
        for step in range(first + 1, last + 1):
            batch = next(feed)
            self._trace(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step), jax.transfer_guard("disallow"):
                state, metrics = train_step(state, batch, self.vocab)
            self._trace(step, metrics)
            if pending is not None:
                self._log(index, *pending, epochs(pending[0]))
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
                self._log(index, *pending, epochs(pending[0]))
                pending = None
            with self._pause():
                self._refuse_nonfinite(step, jax.device_get(metrics["nonfinite"]))
                if evaluating:
                    self._evaluate(step, state, validation)
                if saving or stopping:
                    self.checkpoints.save(state, step, wait=stopping or step == cfg.total_steps)
            if stopping and step < cfg.total_steps:
                self.checkpoints.close()
                raise Stop(self.received[0] if self.received else signal.SIGTERM, step)
        return state

    def _restore_or_init(self) -> tuple[TrainState, int]:
        sources = tuple(share_of(name) for name in self.corpus.parts)
        names = self.objective.loss_names + self.objective.metric_names + sources
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
            return begin(create(), self.objective, self.corpus.tokenizer), 0
        logger.info("continuing from the checkpoint of step %d", restored[1])
        return restored

    def _concrete(self, leaf: Any) -> jax.ShapeDtypeStruct:
        spec = jax.P() if leaf.sharding is None else leaf.sharding.spec  # scalars carry none
        sharding = jax.NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def _freeze_validation(self, stage: StageConfig) -> dict[str, HeldOut]:
        parts = self.corpus.parts or {"": self.corpus}
        most = max(1, self.cfg.evaluation.max_rows // len(parts))
        frozen = {}
        for name, part in parts.items():
            rows = Rows(part.path, stage.seq_len, "validation")
            read = rows.read(range(min(len(rows), most)))
            if self.is_primary:
                self.workdir.write_validation(stage.seq_len, read, name)
            frozen[name] = HeldOut(read, self.log_unigrams[name])
        return frozen

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

    def _evaluate(self, step: int, state: TrainState, validation: dict[str, HeldOut]) -> None:
        params = state.params if state.ema is None else state.ema
        values = evaluate_sources(
            self.eval_step, params, validation, self.vocab, self.bytes_V, self.cfg.evaluation.batch_size
        )
        for line in described(values):
            logger.info("step %d %s", step, line)
        probes = self.cfg.evaluation.probes
        if probes:
            fills = self.filler(params, probes, top_k=5)
            values["probes"] = [{"text": text, "fills": fill} for text, fill in zip(probes, fills, strict=True)]
        self.writer.write(step, "eval", values)

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
