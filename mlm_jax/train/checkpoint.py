"""Checkpoints: asynchronous, atomic and exact, by Orbax. The only file that imports it.

A checkpoint holds three parts that can be read on their own: `params`, `ema` where the run keeps one, and `rest` (step,
optimizer state, counters). The data position is the step, so there is nothing else to save. Its metadata holds a digest of
every array, because Orbax's own checks cover the directory of a file and not the numbers in it.
"""

import contextlib
import gc
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental.multihost_utils import process_allgather
from orbax.checkpoint import v1 as ocp

from mlm_jax.errors import MachineError, UserError
from mlm_jax.train.digest import digests
from mlm_jax.train.state import TrainState
from mlm_jax.workdir import Workdir

logger = logging.getLogger(__name__)

DIGESTS = "digests"
SCORE = "score"


class Checkpoints:
    """The checkpoint stream of one run."""

    def __init__(self, workdir: Workdir, *, keep: int):
        self._workdir = workdir
        policies = ocp.training.preservation_policies
        best = policies.BestN(n=1, get_metric_fn=lambda metrics: metrics[SCORE], keep_checkpoints_without_metrics=False)
        self._checkpointer = ocp.training.Checkpointer(
            epath.Path(workdir.checkpoints).resolve(),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )

    @property
    def last_step(self) -> int | None:
        """The newest whole checkpoint's step."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    @property
    def newest(self) -> str:
        """The same, for a message."""
        return (
            "No checkpoint is there yet" if self.last_step is None else f"The last whole checkpoint is step {self.last_step}"
        )

    def save(self, state: TrainState, step: int, *, score: float | None = None, wait: bool = False) -> None:
        """Begins writing; returns once the state has been copied, or, with `wait`, once it is on disk.

        Args:
            score: where it is the best so far, by how much: the one of the highest score is kept beside the newest.

        Raises:
            MachineError: this checkpoint, or the one begun before it, could not be written.
        """
        try:
            parts = _split(state)
            kept = {name: digests(part) for name, part in parts.items()}
            metrics = None if score is None else {SCORE: score}
            self._checkpointer.save_checkpointables_async(
                step, parts, force=True, metrics=metrics, custom_metadata={DIGESTS: kept}
            )
            if wait:
                self.wait()
        except MachineError:
            raise
        except Exception as error:
            raise self._failure(error) from error

    def wait(self) -> None:
        """Blocks until the checkpoint being written is on disk."""
        try:
            self._checkpointer.wait()
        except Exception as error:
            raise self._failure(error) from error

    def restore(self, abstract: TrainState) -> tuple[TrainState, int] | None:
        """The newest checkpoint that can be read, onto the shardings of `abstract`, with its step; None if there is none.

        A damaged one is reported and, once an older one has been read, moved to `damaged_checkpoints/`.

        Raises:
            MachineError: there are checkpoints and none can be read; all are left where they are.
        """
        steps = sorted((checkpoint.step for checkpoint in self._checkpointer.checkpoints), reverse=True)
        damaged: list[str] = []
        for step in steps:
            parts, kept, reason = self._read(step, abstract)
            whole = _all_processes(parts is not None)
            reason = _difference(parts, kept) if whole else reason
            if not whole or reason:
                damaged.append(f"checkpoint {step} cannot be read: {reason or 'by another process'}")
                if reason:
                    logger.error(damaged[-1])
                continue
            for unreadable in steps[: len(damaged)]:
                self._set_aside(unreadable)
            return _join(parts), step
        if steps:
            raise MachineError(
                f"no checkpoint in {self._workdir.checkpoints} can be read ({damaged[0]}); nothing was changed. "
                "Mend or remove them, or start in another --workdir"
            )
        return None

    def _read(self, step: int, abstract: TrainState) -> tuple[Any, Any, str]:
        """A checkpoint's parts, of which this process reads what its devices hold, and its digests; else the reason."""
        # No barriers within: where one process finds damage, the others would wait in them for it.
        alone, index = ocp.Context(), ocp.multihost.process_index()
        alone.multiprocessing.primary_host = index
        alone.multiprocessing.active_processes = {index}
        try:
            with alone, _dropping_abandoned_reads():
                checkpoint = epath.Path(self._workdir.checkpoints).resolve() / str(step)
                parts = ocp.load_checkpointables(checkpoint, _split(abstract))
                kept = _kept_digests(checkpoint)
            return jax.block_until_ready(parts), kept, ""
        except Exception as error:
            return None, None, _first_line(error)

    def close(self) -> None:
        """Waits for what is being written and releases the files."""
        try:
            self._checkpointer.close()
        except Exception as error:
            raise self._failure(error) from error

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            source = epath.Path(self._workdir.checkpoints) / str(step)
            self._workdir.damaged.mkdir(parents=True, exist_ok=True)
            target = self._workdir.damaged / str(step)
            if target.exists():
                target.rmtree()
            source.rename(target)
        _all_processes(True)  # none looks before it is gone
        self._checkpointer.reload()

    def _failure(self, error: Exception) -> MachineError:
        return MachineError(
            f"a checkpoint could not be written to {self._workdir.checkpoints}: {_first_line(error)}. "
            f"{self.newest}; free some space or mend the disk, then run the same command again"
        )


@contextlib.contextmanager
def _dropping_abandoned_reads() -> Iterator[None]:
    """Keeps quiet those reads that Orbax leaves behind when one array cannot be read: each would print a complaint."""
    told = sys.unraisablehook

    def tell(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            told(unraisable)

    sys.unraisablehook = tell
    try:
        yield
    except Exception as error:
        # The coroutines are held by the frames of what failed within; collected here, they are not complained of later.
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
            gc.collect()
        raise
    finally:
        sys.unraisablehook = told


def _all_processes(holds: bool) -> bool:
    """Whether something holds for every process of the run; each has to ask."""
    return bool(process_allgather(np.asarray(holds)).all())


@contextlib.contextmanager
def _chosen(workdir: Workdir) -> Iterator[tuple[Any, Any]]:
    """The checkpointer of a run, and its checkpoint of the highest score, else the newest."""
    if not workdir.checkpoints.exists():
        raise UserError(f"{workdir.path} has no checkpoint yet; train first")
    with ocp.training.Checkpointer(epath.Path(workdir.checkpoints).resolve()) as checkpointer:
        found = list(checkpointer.checkpoints)
        if not found:
            raise UserError(f"{workdir.path} has no checkpoint yet; train first")
        scored = [checkpoint for checkpoint in found if checkpoint.metrics]
        yield checkpointer, (scored or found)[-1]  # each scored one was the best when it was saved


def saved_step(workdir: Workdir) -> int:
    """The step of the parameters that `load_params` gives.

    Raises:
        UserError: the run has not saved anything yet.
    """
    with _chosen(workdir) as (_, chosen):
        return int(chosen.step)


def load_params(workdir: Workdir, abstract_params: Any, *, ema: bool) -> tuple[Any, int]:
    """The parameters of the checkpoint of the highest score, else of the newest, or their moving average, and its step.

    Raises:
        UserError: the run has not saved anything yet.
        MachineError: the checkpoint cannot be read.
    """
    with _chosen(workdir) as (checkpointer, chosen):
        part = "ema" if ema else "params"
        try:
            with _dropping_abandoned_reads():
                parts = checkpointer.load_checkpointables(chosen.step, {part: abstract_params})
            reason = _difference(parts, _kept_digests(epath.Path(workdir.checkpoints) / str(chosen.step)))
        except Exception as error:
            reason = _first_line(error)
        if not reason:
            return parts[part], chosen.step
        others = [checkpoint.step for checkpoint in checkpointer.checkpoints if checkpoint.step != chosen.step]
        hint = f"; to use that of step {max(others)}, move {chosen.path} away" if others else ""
        raise MachineError(f"checkpoint {chosen.step} of {workdir.path} cannot be read: {reason}{hint}")


def _kept_digests(checkpoint: epath.Path) -> dict[str, dict[str, int]]:
    # Of a relative path Orbax reads no more than this part, and warns of the others.
    metadata = ocp.checkpointables_metadata(checkpoint.resolve()).custom_metadata
    return metadata.get(DIGESTS, {}) if isinstance(metadata, dict) else {}


def _difference(parts: dict[str, Any], kept: dict[str, dict[str, int]]) -> str:
    """Which array is not the one that was saved, by its digest; empty where none differs."""
    for name, part in parts.items():
        for path, digest in digests(part).items():
            if digest != kept.get(name, {}).get(path, digest):
                return f"the numbers in {name}/{path} are not those that were saved"
    return ""


def _split(state: TrainState) -> dict[str, Any]:
    rest = {
        "step": state.step,
        "opt_state": state.opt_state,
        "nonfinite": state.nonfinite,
        "interval": state.interval,
    }
    parts = {"params": state.params, "rest": rest}
    return parts if state.ema is None else parts | {"ema": state.ema}


def _join(parts: dict[str, Any]) -> TrainState:
    return TrainState(params=parts["params"], ema=parts.get("ema"), **parts["rest"])


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # Orbax tells of its handlers first, and of the file last
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
