"""metrics.jsonl survives kills and holds JSON only; TensorBoard and Weights & Biases get the same numbers."""

import dataclasses
import glob
import io
import json
import logging
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mlm_jax.config import Config, TrainConfig
from mlm_jax.errors import MachineError, UserError
from mlm_jax.train.writer import METRICS_FILE, MetricWriter, Progress, read_metrics

CFG = Config(name="test")
PROBE = {"text": "a [MASK]", "fills": [[{"token": "▁cat", "probability": 0.5}]]}


def run(workdir, start_step, last_step, *, every=10, evaluate=50, cfg=CFG):
    """What the loop does with a writer, from a restored step on."""
    with MetricWriter(workdir, cfg, start_step, is_primary=True) as writer:
        for step in range(start_step + every, last_step + 1, every):
            writer.write(step, "train", {"loss": 9.0 - step / 100, "accuracy": step / 1000, "skipped": 0})
            if step % evaluate == 0:
                writer.write(step, "eval", {"loss": 8.0, "tokens": step * 7, "probes": [PROBE]})


def lines(workdir):
    return (workdir / METRICS_FILE).read_text(encoding="utf-8").splitlines()


def events(workdir):
    """Every event of every file, in the order in which TensorBoard reads them."""
    found = []
    for path in sorted(glob.glob(f"{workdir}/tensorboard/*"), key=os.path.getmtime):
        with open(path, "rb") as file:
            while header := file.read(12):
                found.append(event_pb2.Event.FromString(file.read(int.from_bytes(header[:8], "little"))))
                file.read(4)
    return found


def scalars(workdir):
    return [
        (event.step, value.tag, round(value.simple_value, 4))
        for event in events(workdir)
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    ]


def test_each_measurement_is_one_line_of_json(tmp_path):
    run(tmp_path, 0, 50)
    records = [json.loads(line) for line in lines(tmp_path)]
    assert [(r["step"], r["kind"]) for r in records] == [(s, "train") for s in (10, 20, 30, 40, 50)] + [(50, "eval")]
    assert records[0] == {"step": 10, "kind": "train", "loss": 8.9, "accuracy": 0.01, "skipped": 0}
    assert records[-1]["probes"] == [PROBE]


@pytest.mark.parametrize("torn", ["", '{"step": 90, "ki', '{"step": 90, "kind": "train", "text": "\xe2', "\x00\x00\n"])
def test_a_run_killed_and_continued_ends_with_the_file_of_one_never_interrupted(tmp_path, torn):
    run(tmp_path / "whole", 0, 150)
    run(tmp_path / "killed", 0, 80)
    with open(tmp_path / "killed" / METRICS_FILE, "ab") as file:
        file.write(torn.encode("latin-1"))
    run(tmp_path / "killed", 60, 150)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_a_run_that_starts_anew_takes_back_all_lines(tmp_path):
    writer = MetricWriter(tmp_path, CFG, 0, is_primary=True)
    writer.write(0, "eval", {"loss": 9.0})
    writer.close()
    run(tmp_path, 0, 20)
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [10, 20]


def test_a_written_line_outlives_a_killed_process(tmp_path):
    code = (
        "import os, signal, sys; from mlm_jax.config import Config; from mlm_jax.train.writer import MetricWriter\n"
        "writer = MetricWriter(sys.argv[1], Config(name='x'), 0, is_primary=True)\n"
        "writer.write(10, 'train', {'loss': 1.5})\n"
        "assert 'jax' not in sys.modules\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert read_metrics(tmp_path) == ([{"step": 10, "kind": "train", "loss": 1.5}], 0)
    assert scalars(tmp_path) == [(10, "train/loss", 1.5)]


def test_the_file_is_whole_when_taking_lines_back_fails(tmp_path, monkeypatch):
    run(tmp_path, 0, 50)
    before = lines(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MachineError, match=r"cannot be written to .*: No space left on device; make room"):
        MetricWriter(tmp_path, CFG, 20, is_primary=True)
    assert lines(tmp_path) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_a_fault_of_the_machine(tmp_path):
    writer = MetricWriter(tmp_path, CFG, 0, is_primary=True)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._sinks[0]._file.fileno())
    os.close(full)
    with pytest.raises(MachineError, match="No space left on device"):
        writer.write(10, "train", {"loss": 1.0})
    with pytest.raises(MachineError, match="No space left on device"):  # the line is still to be written
        writer.close()
    writer.close()


def test_numbers_that_json_cannot_say_become_null_and_numpy_scalars_numbers(tmp_path):
    writer = MetricWriter(tmp_path, CFG, 0, is_primary=True)
    writer.write(
        np.int32(1), "train", {"loss": float("nan"), "grad_norm": np.float32("inf"), "skipped": np.int64(3), "mfu": 0.5}
    )
    writer.close()
    assert lines(tmp_path) == ['{"step": 1, "kind": "train", "loss": null, "grad_norm": null, "skipped": 3, "mfu": 0.5}']


def test_tensorboard_gets_the_scalars_and_forgets_what_a_killed_process_wrote_later(tmp_path):
    run(tmp_path, 0, 50)
    run(tmp_path, 20, 30)
    assert (50, "eval/loss", 8.0) in scalars(tmp_path)
    assert (50, "train/accuracy", 0.05) in scalars(tmp_path)
    restarts = [event.step for event in events(tmp_path) if event.WhichOneof("what") == "session_log"]
    assert restarts == [0, 21]  # TensorBoard drops steps >= that of a START
    texts = [value for event in events(tmp_path) for value in event.summary.value if value.tag == "probes/text_summary"]
    assert texts[0].tensor.string_val[0].decode() == "**a [MASK]** ▁cat 50.0%"


def test_a_bucket_is_written_whole_each_time(tmp_path, monkeypatch):
    """An object store cannot append; a local folder stands in for it, because its URL decides and nothing else."""
    run(tmp_path / "local", 0, 50)
    monkeypatch.setattr("mlm_jax.train.writer._is_bucket", lambda path: True)
    run(tmp_path / "bucket", 0, 40)
    run(tmp_path / "bucket", 20, 50)
    assert lines(tmp_path / "bucket") == lines(tmp_path / "local")


def test_only_the_primary_process_writes(tmp_path):
    writer = MetricWriter(tmp_path / "workdir", CFG, 0, is_primary=False)
    writer.write(1, "train", {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_without_wandb_its_extra_is_named_and_nothing_is_taken_back(tmp_path, monkeypatch):
    run(tmp_path, 0, 50)
    before = lines(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    cfg = dataclasses.replace(CFG, train=TrainConfig(wandb_project="mine"))
    with pytest.raises(UserError, match=r"train.wandb_project='mine' .* pip install '.\[wandb\]'"):
        MetricWriter(tmp_path, cfg, 20, is_primary=True)
    assert lines(tmp_path) == before


def test_a_continued_run_is_the_same_run_of_wandb(tmp_path, monkeypatch):
    logged, opened = [], []

    class Run:
        def define_metric(self, name, step_metric=None):
            opened[-1].setdefault("axes", []).append((name, step_metric))

        def log(self, values):
            logged.append(values)

        def finish(self):
            opened[-1]["finished"] = True

    def init(**options):
        opened.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    cfg = dataclasses.replace(CFG, train=TrainConfig(wandb_project="mine"))
    for start, last in ((0, 20), (10, 20), (0, 10)):
        run(tmp_path, start, last, cfg=cfg)
    ids = [options["id"] for options in opened]
    assert ids[0] == ids[1] != ids[2]
    assert all(options["project"] == "mine" and options["finished"] for options in opened)
    assert opened[0]["config"]["optimizer"]["name"] == "adamw"
    assert logged[0] == {"step": 10, "train/loss": 8.9, "train/accuracy": 0.01, "train/skipped": 0}
    assert ("*", "step") in opened[0]["axes"]


def test_read_metrics_counts_what_it_cannot_read(tmp_path):
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 1, "kind": "train"}\n[1]\n{"step": 2}\n{"step": 3, "kind": "tr')
    assert read_metrics(tmp_path) == ([{"step": 1, "kind": "train"}], 3)
    with pytest.raises(UserError, match=r"has no metrics.jsonl"):
        read_metrics(tmp_path / "elsewhere")


VALUES = {"loss": 3.21, "accuracy": 0.4, "tokens_per_second": 12345.6, "mfu": 0.231, "fill_rate": 0.985}


def test_progress_off_a_terminal_is_a_line_of_the_log_per_update(caplog, monkeypatch):
    now = iter((0.0, 10.0, 10.0, 20.0, 20.0))
    monkeypatch.setattr("mlm_jax.train.writer.time.monotonic", lambda: next(now))
    caplog.set_level(logging.INFO)
    with Progress(400, 50, is_primary=True) as progress:
        progress.update(100, VALUES)
        progress.update(150, {"loss": 3.0, "accuracy": float("nan"), "mfu": None})
    assert caplog.messages == [
        "step 100/400 loss 3.210 acc 40.0% 12,346 tok/s MFU 23.1% fill 98.5% ETA ?",
        "step 150/400 loss 3.000 ETA 0:00:50",
    ]
    with Progress(400, 50, is_primary=False) as progress:
        progress.update(100, VALUES)
    assert len(caplog.messages) == 2


def test_progress_shows_the_shares_of_a_mixture_of_few_sources(caplog):
    caplog.set_level(logging.INFO)
    with Progress(400, is_primary=True) as progress:
        progress.update(100, {"loss": 3.0, "shares": {"en": 0.55, "de": 0.45}})
        progress.update(200, {"loss": 3.0, "shares": {f"l{index}": 0.05 for index in range(20)}})
    assert "loss 3.000 en 55% de 45% ETA" in caplog.messages[0]
    assert "l1" not in caplog.messages[1]


def test_tensorboard_gets_the_numbers_of_every_source(tmp_path):
    with MetricWriter(tmp_path, CFG, 0, is_primary=True) as writer:
        writer.write(5, "eval", {"loss": 3.0, "sources": {"de": {"loss": 4.0}}, "shares": {"de": 0.5}})
    found = [(5, "eval/loss", 3.0), (5, "eval/sources/de/loss", 4.0), (5, "eval/shares/de", 0.5)]
    assert scalars(tmp_path) == found


def test_progress_on_a_terminal_is_one_bar_with_the_log_above_it(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        with Progress(400, 50, is_primary=True) as progress:
            progress.update(100, VALUES)
            logging.getLogger().warning("a line of the log")
            progress.update(400, VALUES)
        assert handler.stream is terminal
    finally:
        logging.getLogger().removeHandler(handler)
    shown = terminal.getvalue()
    last = shown.rstrip().splitlines()[-2]  # the very last thing is the cursor's return
    assert "400/400" in last
    assert "loss 3.210 acc 40.0% 12,346 tok/s MFU 23.1% fill 98.5% ETA 0:00:00" in last
    # The bar was wiped before the line of the log was written, and drawn again below it.
    assert "\x1b[2Ka line of the log" in shown
