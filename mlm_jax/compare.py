"""The `compare` verb: several configs trained on one corpus under one budget, and one table and page of what each reached.

Each run is a process of its own, by the verbs `bench`, `train` and `score`, so that one that fails leaves the others be.
DIR/compare.json keeps what was asked, measured and finished; the same command continues from it.
"""

import contextlib
import dataclasses
import glob
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from mlm_jax.config import Config, load_config, to_dict
from mlm_jax.data.corpus import open_corpus
from mlm_jax.data.prepare import prepare
from mlm_jax.errors import MachineError, UserError
from mlm_jax.report.comparison import figures_of, write_comparison
from mlm_jax.report.runs import read_runs
from mlm_jax.workdir import write_atomically

MIN_STEPS = 10
COMMON = (
    "step",
    "kind",
    "loss",
    "perplexity",
    "accuracy",
    "unigram_loss",
    "unigram_accuracy",
    "tokens",
    "bits_per_byte",
    "sources",
    "probes",
)


class Interrupted(Exception):
    """A signal arrived; a run under way has saved its state, and what else was under way is begun anew."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}; the same command continues")
        self.number = number


def compare(
    specs: Sequence[str],
    overrides: Sequence[str],
    out: str | os.PathLike[str],
    *,
    budget_flops: float | None = None,
    budget_minutes: float | None = None,
    data_dir: str | None = None,
    pairs: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains what is not finished yet and writes DIR/compare.html.

    Args:
        specs: configs as `load_config` takes them; `overrides` apply to all.
        budget_flops, budget_minutes: one of them, for each config: floating-point operations as its objective counts them,
            or minutes of training steps on this machine, compilation and evaluation not counted.
        data_dir: a prepared corpus; default: made in DIR/data from the first config for the row lengths of all.
        pairs: folders or globs of minimal pairs.

    Returns:
        `budget` and `runs`: the table, by name; a run that failed has its message under `error`.

    Raises:
        UserError: the configs cannot be compared, the budget is too small, or DIR is of another comparison.
        Interrupted: by SIGTERM or SIGINT.
    """
    kind, budget = _budget(budget_flops, budget_minutes)
    configs = _load(specs, overrides)
    for pattern in pairs:
        if not glob.glob(_files(pattern)):
            raise UserError(f"--blimp={pattern}: no file matches {_files(pattern)}")
    directory = pathlib.Path(out)
    asked = {"budget": {kind: budget}, "configs": [to_dict(cfg) for cfg in configs]}
    kept = _Kept(directory, asked)
    data = data_dir or str(directory / "data")
    if data_dir is None:
        lengths = {stage.seq_len: stage for cfg in configs for stage in cfg.stages}
        prepare(dataclasses.replace(configs[0], stages=tuple(lengths.values())), data)
    for cfg in configs:
        open_corpus(data, cfg)
    options = [f"--config.{override}" for override in overrides]
    planned = []
    for spec, cfg in zip(specs, configs, strict=True):
        run = kept.run(cfg.name)
        with _reported(run):
            if "stages" not in run:
                run["stages"] = [_measure([spec, *options], index, data) for index in range(len(cfg.stages))]
                kept.save()
            steps = plan_steps(cfg, run["stages"], kind, budget)
            run["flops"] = sum(n * stage["flops"] for n, stage in zip(steps, run["stages"], strict=True))
            scaled = [f"--config.{field}={value}" for field, value in scaled_fields(cfg, steps).items()]
            planned.append((cfg.name, [spec, *options, *scaled]))
    for name, config in planned:
        run = kept.run(name)
        with _reported(run):
            if not run.get("finished"):
                _train(config, directory, name, data, run, kept)
            for pattern in pairs:
                if pattern not in run["pairs"]:
                    run["pairs"][pattern] = _score(directory / name, pattern)
                    kept.save()
    rows = {cfg.name: _row(cfg, directory, kept, pairs) for cfg in configs}
    table = {"budget": asked["budget"], "runs": rows}
    shown = [directory / name for name, row in rows.items() if "loss" in row]
    if shown:
        write_comparison(table, shown, directory / "compare.html")
    return table


def _budget(flops: float | None, minutes: float | None) -> tuple[str, float]:
    if (flops is None) == (minutes is None):
        raise UserError("give one budget: --budget-flops F or --budget-minutes M")
    kind, value = ("flops", flops) if flops is not None else ("minutes", minutes)
    assert value is not None
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"--budget-{kind}={value} must be positive")
    return kind, value


def _load(specs: Sequence[str], overrides: Sequence[str]) -> list[Config]:
    configs = [load_config(spec, overrides) for spec in specs]
    if not 2 <= len(configs) <= 8:
        raise UserError(f"a comparison is of 2 to 8 configs, not {len(configs)}")
    names = [cfg.name for cfg in configs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two of the configs have the name {name!r}, by which their results are told apart: rename one")
    first = configs[0]
    for cfg in configs[1:]:
        for field in ("mask_rate", "seed", "max_rows"):
            ours, theirs = getattr(first.evaluation, field), getattr(cfg.evaluation, field)
            if ours != theirs:
                raise UserError(
                    f"{first.name} has evaluation.{field}={ours} and {cfg.name} {theirs}: held-out losses would not be of "
                    f"the same masks; set it for all by --config.evaluation.{field}={ours}"
                )
        if cfg.stages[-1].seq_len != first.stages[-1].seq_len:
            raise UserError(
                f"{first.name} ends on rows of {first.stages[-1].seq_len} and {cfg.name} on rows of "
                f"{cfg.stages[-1].seq_len}: held-out losses would not be of the same rows; end all on one seq_len"
            )
    return configs


class _Kept:
    """DIR/compare.json. Until something has been trained, what was asked may be corrected."""

    def __init__(self, directory: pathlib.Path, asked: dict[str, Any]):
        self.path = directory / "compare.json"
        self.content = {**asked, "runs": {}}
        if self.path.exists():
            try:
                found = json.loads(self.path.read_text())
            except ValueError as error:
                raise MachineError(f"{self.path} is damaged: {error}; give another --out") from error
            differing = [name for name, value in asked.items() if found[name] != value]
            if differing and any(run["seconds"] for run in found["runs"].values()):
                raise UserError(f"{directory} holds a comparison with other {differing[0]}: give another --out")
            if not differing:
                self.content = found

    def run(self, name: str) -> dict[str, Any]:
        run: dict[str, Any] = self.content["runs"].setdefault(name, {"seconds": 0.0, "peak_bytes": 0, "pairs": {}})
        run.pop("error", None)
        return run

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(epath.Path(self.path), json.dumps(self.content, indent=2).encode())


@contextlib.contextmanager
def _reported(run: dict[str, Any]) -> Iterator[None]:
    """Keeps what went wrong with one run for the table, so that the others go on."""
    try:
        yield
    except MachineError as error:
        run["error"] = str(error)
        print(f"mlm-jax: {error}", file=sys.stderr)


def _measure(config: Sequence[str], stage: int, data: str) -> dict[str, float]:
    """What a step of a stage costs, at the rates that it begins with."""
    verb = ["bench", "--config", *config, f"--stage={stage}", "--data", data, "--steps=3", "--rounds=3", "--json"]
    found = json.loads(_call(verb).splitlines()[-1])
    step = found["step"]
    return {
        "seconds": step["milliseconds"]["median"] / 1e3,
        "flops": step["flops_per_token"] * step["tokens"],
        "device_peak_bytes": found["memory"]["device_peak"] or 0,
    }


def plan_steps(cfg: Config, stages: Sequence[dict[str, float]], kind: str, budget: float) -> list[int]:
    """Steps of each stage in the config's proportions, which together stay within the budget by less than one step.

    Raises:
        UserError: they are too few.
    """
    costs = [stage["flops" if kind == "flops" else "seconds"] for stage in stages]
    total = budget if kind == "flops" else 60 * budget
    share = total / sum(stage.steps * cost for stage, cost in zip(cfg.stages, costs, strict=True))
    steps = [int(stage.steps * share) for stage in cfg.stages[:-1]]
    left = total - sum(n * cost for n, cost in zip(steps, costs, strict=False))
    steps.append(int(left / costs[-1]))
    if sum(steps) < MIN_STEPS or min(steps) < 1:
        raise UserError(
            f"--budget-{kind}={budget:g} pays {steps} steps of {cfg.name}'s stage(s), and {MIN_STEPS} in all, one or more a "
            f"stage, are needed: give {kind} of {2 * budget * MIN_STEPS / max(sum(steps), 1):.3g} or more"
        )
    return steps


def scaled_fields(cfg: Config, steps: Sequence[int]) -> dict[str, int]:
    """The config's fields that count steps, for so many steps in its stages."""
    share = sum(steps) / cfg.total_steps
    found = {}
    for section, names in (
        ("optimizer", ("warmup_steps", "decay_steps")),
        ("masking", ("schedule_start", "schedule_steps")),
    ):
        for name in names:
            value = getattr(getattr(cfg, section), name)
            if value:
                found[f"{section}.{name}"] = max(1, round(value * share))
    for index, (stage, count) in enumerate(zip(cfg.stages, steps, strict=True)):
        found[f"stages[{index}].steps"] = count
        if stage.warmup_steps:
            found[f"stages[{index}].warmup_steps"] = max(1, round(stage.warmup_steps * count / stage.steps))
    return found


def _train(config: Sequence[str], directory: pathlib.Path, name: str, data: str, run: dict[str, Any], kept: _Kept) -> None:
    log = directory / f"{name}.log"
    print(f"training {name}; log: {log}", flush=True)
    verb = ["train", "--config", *config, "--workdir", str(directory / name), "--data", data]
    began = time.perf_counter()
    with open(log, "a") as file:
        child = subprocess.Popen(_command(verb), stdout=file, stderr=file, start_new_session=True)
        with _forwarding_signals(child) as received:
            _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    run["seconds"] += time.perf_counter() - began
    # In KiB, but for macOS, which counts bytes.
    run["peak_bytes"] = max(run["peak_bytes"], usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    run["finished"] = child.returncode == 0
    kept.save()
    if received:
        raise Interrupted(received[0])
    if child.returncode:
        raise MachineError(f"{name} failed: {_message(log.read_text(), child.returncode)} (log: {log})")


def _score(workdir: pathlib.Path, pattern: str) -> dict[str, float]:
    found = json.loads(_call(["score", "--workdir", str(workdir), "--pairs", _files(pattern), "--json"]).splitlines()[-1])
    return dict(found["accuracy"])


def _files(pattern: str) -> str:
    return os.path.join(pattern, "*.jsonl*") if os.path.isdir(pattern) else pattern


def _command(verb: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "mlm_jax", *verb]


def _call(verb: Sequence[str]) -> str:
    """What another verb prints."""
    pipe = subprocess.PIPE
    child = subprocess.Popen(_command(verb), stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    with _forwarding_signals(child) as received:
        stdout, stderr = child.communicate()
    if received:
        raise Interrupted(received[0])
    if child.returncode:
        raise MachineError(f"{verb[0]} of {verb[2]} failed: {_message(stderr, child.returncode)}")
    return stdout


@contextlib.contextmanager
def _forwarding_signals(child: subprocess.Popen[Any]) -> Iterator[list[int]]:
    """Ends the child by SIGTERM when a signal arrives while it is waited for, and keeps the signals' numbers."""
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        child.terminate()  # a shell's background processes ignore SIGINT

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _message(stderr: str, status: int) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    told = [line.removeprefix("mlm-jax: ") for line in lines if line.startswith("mlm-jax: ")]
    return (told or lines or [""])[-1] or f"status {status}"


def _row(cfg: Config, directory: pathlib.Path, kept: _Kept, pairs: Sequence[str]) -> dict[str, Any]:
    """A line of the table, from the workdir's own metrics and what was kept."""
    run = kept.content["runs"][cfg.name]
    if not run.get("finished"):
        return {"error": run.get("error", "not finished")}
    (read,) = read_runs([directory / cfg.name])
    final = read.evals[-1]
    accuracies = [accuracy for pattern in pairs for accuracy in run["pairs"].get(pattern, {}).values()]
    return {
        **{name: final[name] for name in ("loss", "accuracy", "unigram_loss", "unigram_accuracy")},
        "figures": figures_of(cfg),
        "own": {name: value for name, value in final.items() if name not in COMMON},
        "pairs": sum(accuracies) / len(accuracies) if accuracies else None,
        "tokens_per_second": read.median("tokens_per_second"),
        "flops": run["flops"],
        "steps": read.last_step,
        "tokens": read.tokens_and_seconds()[0],
        "step_seconds": read.tokens_and_seconds()[1],
        "memory_bytes": max(stage["device_peak_bytes"] for stage in run["stages"]) or run["peak_bytes"],
        "wall_seconds": run["seconds"],
        **({"error": run["error"]} if "error" in run else {}),
    }
