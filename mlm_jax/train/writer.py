"""What a run writes down while it trains: metrics.jsonl, TensorBoard, Weights & Biases, and the progress people watch.

The loop hands over numbers that have left the device already; nothing here imports jax. One process of a run writes.
"""

import collections
import contextlib
import datetime
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TextIO

import tensorboardX.event_file_writer
import tensorboardX.summary
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from tensorboardX.proto import event_pb2

from mlm_jax.config import Config, to_dict
from mlm_jax.errors import MachineError, UserError, install
from mlm_jax.workdir import write_atomically

_SHOWN_SOURCES = 8  # of a mixture, on a line of the log; metrics.jsonl has the shares of any number
METRICS_FILE = "metrics.jsonl"

log = logging.getLogger(__name__)


def read_metrics(workdir: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], int]:
    """The lines of a workdir's metrics.jsonl in their order, and how many could not be read.

    A process that was killed while it wrote leaves a torn line; it is counted, not returned.

    Raises:
        UserError: there is no such file.
    """
    path = epath.Path(workdir) / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{workdir} has no {METRICS_FILE}: name the --workdir of a run that `mlm-jax train` has started")
    lines = path.read_bytes().splitlines()
    records = [record for record in map(_parse, lines) if record is not None]
    return records, len(lines) - len(records)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # torn, also in the middle of a character
        return None
    return record if isinstance(record, dict) and {"step", "kind"} <= record.keys() else None


class MetricWriter:
    """Writes each measurement to metrics.jsonl, TensorBoard and, when the config names a project, Weights & Biases.

    A line has reached the operating system when `write` returns, so it outlives a killed process. A run that continues
    takes back what it had written after its checkpoint, so that the file ends as that of a run never interrupted.
    A context manager, which closes it.
    """

    def __init__(self, workdir: str | os.PathLike[str], cfg: Config, start_step: int, *, is_primary: bool) -> None:
        """Takes back what was written after `start_step` and opens the files.

        Args:
            workdir: a local folder, made where absent, or a bucket's URL.
            cfg: the run; `train.wandb_project` decides about Weights & Biases.
            start_step: updates in the restored state. Later lines are dropped; at 0 all are, as the run starts anew.
            is_primary: whether this process writes; where it does not, every method does nothing.

        Raises:
            UserError: `train.wandb_project` is set and wandb is not installed.
            MachineError: the workdir cannot be written.
        """
        self._sinks: list[_JsonLines | _TensorBoard | _WandB] = []
        self._workdir = epath.Path(workdir)
        if not is_primary:
            return
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            # First, because it may refuse: nothing has been taken back then.
            wandb = [_WandB(self._workdir, cfg, start_step)] if cfg.train.wandb_project else []
            self._sinks = [_JsonLines(self._workdir, start_step), _TensorBoard(self._workdir, start_step), *wandb]
        except OSError as error:
            raise self._fault(error) from error

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Writes one measurement.

        Args:
            step: updates done.
            kind: `train` or `eval`.
            values: what JSON can hold, or NumPy scalars; a number that is not finite is written as null.

        Raises:
            MachineError: the disk is full or refuses.
        """
        record = {"step": int(step), "kind": kind, **{name: _plain(value) for name, value in values.items()}}
        try:
            for sink in self._sinks:
                sink.write(record)
        except OSError as error:
            raise self._fault(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes what is open; a second call does nothing."""
        try:
            with contextlib.ExitStack() as closing:  # closes all, also when one of them raises
                while self._sinks:
                    closing.callback(self._sinks.pop().close)
        except OSError as error:
            raise self._fault(error) from error

    def _fault(self, error: OSError) -> MachineError:
        return MachineError(
            f"metrics cannot be written to {self._workdir}: {error.strerror or error}; make room or mend the "
            "permissions, then start the same command again: it continues from the last checkpoint"
        )


class _JsonLines:
    """metrics.jsonl: appended line by line, or on a bucket, which cannot append, written whole each time."""

    def __init__(self, workdir: epath.Path, start_step: int) -> None:
        self._path = workdir / METRICS_FILE
        self._lines = self._keep(start_step) if self._path.exists() else []
        write_atomically(self._path, "".join(self._lines).encode())
        self._file: TextIO | None = None
        if not _is_bucket(workdir):
            self._lines = []
            self._file = open(self._path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (close() closes it)

    def _keep(self, start_step: int) -> list[str]:
        kept = []
        unreadable = 0
        for line in self._path.read_bytes().splitlines():
            record = _parse(line)
            unreadable += record is None
            if start_step and record and record["step"] <= start_step:
                kept.append(line.decode() + "\n")
        if unreadable > 1:  # one is what a killed process leaves
            log.warning("%s: %d lines could not be read and were dropped", self._path, unreadable)
        return kept

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        if self._file:
            self._file.write(line)
        else:
            self._lines.append(line)
            self._path.write_bytes("".join(self._lines).encode())

    def close(self) -> None:
        if self._file:
            self._file.close()


class _TensorBoard:
    """An event file, written in this thread: that of tensorboardX's SummaryWriter dies of a full disk, and then the
    queue in front of it blocks the run for ever.
    """

    def __init__(self, workdir: epath.Path, start_step: int) -> None:
        directory = workdir / "tensorboard"
        directory.mkdir(parents=True, exist_ok=True)
        # A random end of the name: two starts within a second are two files.
        self._writer = tensorboardX.event_file_writer.EventsWriter(
            os.fspath(directory / "events"), f".{os.getpid()}.{secrets.token_hex(4)}"
        )
        # Tells TensorBoard to forget what an earlier process wrote from this step on.
        first = start_step + 1 if start_step else 0
        self._add(first, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        self._writer.flush()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))

    def write(self, record: Mapping[str, Any]) -> None:
        for tag, value in _scalars(record):
            self._add(record["step"], summary=tensorboardX.summary.scalar(tag, value))
        if record.get("probes"):
            text = "\n\n".join(_probe_text(probe) for probe in record["probes"])
            self._add(record["step"], summary=tensorboardX.summary.text("probes", text))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """One run of Weights & Biases for a workdir, however often the process behind it is restarted."""

    def __init__(self, workdir: epath.Path, cfg: Config, start_step: int) -> None:
        try:
            import wandb  # an optional extra
        except ImportError as error:
            raise UserError(
                f"train.wandb_project={cfg.train.wandb_project!r} needs the package wandb: "
                f"{install('wandb')}, or set train.wandb_project=''"
            ) from error
        id_file = workdir / "wandb_id.txt"
        if not start_step or not id_file.is_file():
            id_file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=cfg.train.wandb_project,
            name=cfg.name,
            id=id_file.read_text(),
            resume="allow",
            config=to_dict(cfg),
            dir=None if _is_bucket(workdir) else os.fspath(workdir),
        )
        # Its own counter cannot go back to a checkpoint, so the step is a value like the others and the axis of all.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log({"step": record["step"], **dict(_scalars(record))})

    def close(self) -> None:
        self._run.finish()


def _is_bucket(path: epath.Path) -> bool:
    return "://" in os.fspath(path)


def _plain(value: Any) -> Any:
    """A value in JSON's types; null for what is not finite, which JSON cannot say."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(record: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    values = {name: value for name, value in record.items() if name != "step"}
    yield from _named(record["kind"], values)


def _named(path: str, values: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """Numbers by their path, as train/loss or, of a mixture's sources, eval/sources/de/loss."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _named(f"{path}/{name}", value)
        elif isinstance(value, (int, float)):
            yield f"{path}/{name}", value


def _probe_text(probe: Mapping[str, Any]) -> str:
    guesses = [", ".join(f"{fill['token']} {fill['probability']:.1%}" for fill in mask) for mask in probe["fills"]]
    return f"**{probe['text']}** " + " | ".join(guesses)


class Progress:
    """What a person sees of a run: one bar that redraws itself on a terminal, one line of the log per update elsewhere.

    A context manager. While the bar is shown, lines of the log go above it.
    """

    def __init__(
        self, total_steps: int, start_step: int = 0, metrics: Sequence[str] = ("accuracy",), *, is_primary: bool
    ) -> None:
        """Args:
        metrics: the objective's names of shares, to be shown as percentages.
        """
        self._total, self._metrics = total_steps, metrics
        self._is_primary = is_primary
        # The speed of the last updates: a stage of longer rows changes it. The first entry comes with the first update,
        # because what lies before it is mostly compilation.
        self._times: collections.deque[tuple[int, float]] = collections.deque(maxlen=20)
        self._redirected: list[logging.StreamHandler[Any]] = []
        self._bar: Bar | None = None
        if is_primary and sys.stderr.isatty():
            columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Bar(*columns, console=Console(stderr=True), auto_refresh=False, expand=True)
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, text="first steps: compiling")

    def __enter__(self) -> Self:
        if self._bar:
            terminal = sys.stderr
            self._bar.start()  # puts a proxy in the place of sys.stderr, which a handler made earlier does not know
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is terminal:
                    handler.setStream(sys.stderr)
                    self._redirected.append(handler)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
            for handler in self._redirected:
                handler.setStream(sys.stderr)

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows a measurement.

        Args:
            step: updates done.
            values: of a `train` line of metrics.jsonl; what is absent is left out.
        """
        if not self._is_primary:
            return
        self._times.append((step, time.monotonic()))
        text = " ".join([*_describe(values, self._metrics), f"ETA {self._remaining(step)}"])
        if self._bar:
            self._bar.update(self._task, completed=step, text=text, refresh=True)
        else:
            log.info("step %d/%d %s", step, self._total, text)

    def _remaining(self, step: int) -> str:
        first_step, first_time = self._times[0]
        if step == first_step:
            return "?"
        seconds = (time.monotonic() - first_time) / (step - first_step) * (self._total - step)
        return str(datetime.timedelta(seconds=round(seconds)))


def _describe(values: Mapping[str, Any], metrics: Sequence[str]) -> Iterable[str]:
    """The numbers of a training line, short enough to stand beside a bar on a terminal of 80 columns."""
    forms = {
        "loss": "loss {:.3f}",
        **{name: f"{name.replace('accuracy', 'acc').replace('_', ' ')} {{:.1%}}" for name in metrics},
        "tokens_per_second": "{:,.0f} tok/s",
        "mfu": "MFU {:.1%}",
        "fill_rate": "fill {:.1%}",
    }
    # A share of nothing is left out: the precision of a discriminator that has flagged no token.
    counted = {name for name in forms if values.get(name) is not None and not (name in metrics and math.isnan(values[name]))}
    yield from (form.format(values[name]) for name, form in forms.items() if name in counted)
    shares = values.get("shares", {})
    if 0 < len(shares) <= _SHOWN_SOURCES:
        yield " ".join(f"{name} {share:.0%}" for name, share in shares.items())
