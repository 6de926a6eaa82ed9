"""The runs of a report: what their workdirs hold, read and summed up."""

import dataclasses
import itertools
import logging
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from mlm_jax.config import TASKS, Config
from mlm_jax.errors import UserError
from mlm_jax.train.writer import read_metrics
from mlm_jax.workdir import Workdir

log = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds about one run."""

    label: str
    cfg: Config
    train: list[Record]
    evals: list[Record]

    @property
    def last_step(self) -> int:
        return max(record["step"] for record in self.train + self.evals)

    def tokens_and_seconds(self) -> tuple[float, float]:
        """Real tokens trained on, and the time that took: evaluation, checkpoints and interruptions are not in it.

        Both are 0 where a task is fine-tuned, whose rows have any length.
        """
        tokens = seconds = 0.0
        if self.cfg.objective in TASKS:
            return tokens, seconds
        last_step = 0
        for record in self.train:
            stage = self.cfg.stages[record["stage"]]
            new = (record["step"] - last_step) * stage.batch_size * stage.seq_len * record["fill_rate"]
            tokens += new
            seconds += new / record["tokens_per_second"] if record["tokens_per_second"] else 0.0
            last_step = record["step"]
        return tokens, seconds

    def median(self, metric: str) -> float | None:
        """Of a metric of the training lines, over those that carry it."""
        known = [record[metric] for record in self.train if record.get(metric) is not None]
        return statistics.median(known) if known else None

    def probes(self) -> Iterator[tuple[Record, Record]]:
        """Each filled text with the evaluation that filled it."""
        for record in self.evals:
            for probe in record.get("probes", ()):
                yield record, probe

    def boundaries(self) -> list[int]:
        """Steps at which a stage gave way to the next."""
        ends = list(itertools.accumulate(stage.steps for stage in self.cfg.stages))
        return [end for end in ends[:-1] if end < self.last_step]


def read_runs(workdirs: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Reads each workdir; runs of one config's name are told apart by their folders' names.

    Raises:
        UserError: a folder is no workdir, or holds no measurement yet.
        MachineError: a workdir's config is damaged.
    """
    runs = []
    for workdir in workdirs:
        cfg = Workdir(workdir).read_config()
        records, unreadable = read_metrics(workdir)
        if unreadable:
            log.warning("%s: %d unreadable lines of metrics.jsonl are left out", workdir, unreadable)
        train, evals = ([record for record in records if record["kind"] == kind] for kind in ("train", "eval"))
        if not train + evals:
            raise UserError(f"{workdir} holds no measurement yet: wait for the first after train.log_every steps")
        runs.append(Run(cfg.name, cfg, train, evals))
    if len({run.label for run in runs}) < len(runs):
        names = [os.path.normpath(os.fspath(workdir)) for workdir in workdirs]
        short = [os.path.basename(name) for name in names]
        labels = short if len(set(short)) == len(short) else names
        runs = [dataclasses.replace(run, label=label) for run, label in zip(runs, labels, strict=True)]
    return runs
