"""The comparison's runs spend one budget, its table is what their workdirs say, and it continues where it stopped."""

import dataclasses
import html
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mlm_jax import compare
from mlm_jax.cli import main
from mlm_jax.compare import plan_steps, scaled_fields
from mlm_jax.config import Config, HybridConfig, MaskingConfig, OptimizerConfig, RtdConfig, StageConfig
from mlm_jax.errors import UserError
from mlm_jax.report.comparison import HEAD, figures_of, format_comparison, lead, notes_of

RECIPE = """import ml_collections


def get_config(variant):
    return ml_collections.ConfigDict(
        {
            "name": variant.partition("-")[0],
            "objective": "hybrid" if variant == "hybrid" else "mlm",
            "hybrid": {"causal_share": 0.5},
            "tokenizer": {"algorithm": "bpe", "vocab_size": 400 + 8 * variant.endswith("-vocabulary")},
            "model": {"vocab_size": 512, "num_layers": 1, "embed_dim": 32, "num_heads": 2, "mlp_dim": 64},
            "optimizer": {"warmup_steps": 10, "learning_rate": 1e30 if variant == "diverges" else 1e-3, "clip_norm": 0.0},
            "stages": (
                {"steps": 60, "seq_len": 16, "batch_size": 8},
                {"steps": 40, "seq_len": 64 if variant == "long" else 32, "batch_size": 8},
            )[variant == "diverges" :],
            "train": {"log_every": 5, "checkpoint_every": 1000, "max_nonfinite": 2},
            "evaluation": {"every": 0, "max_rows": 16, "mask_rate": 0.3 if variant == "masks" else 0.15},
        }
    )
"""
BUDGET = 1.5e10


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A recipe of variants, text, and minimal pairs."""
    path = tmp_path_factory.mktemp("compare")
    (path / "tiny.py").write_text(RECIPE)
    texts = (f"{i}. The river {i % 7} flows past {i % 11} towns to the {('old', 'cold')[i % 2]} sea." for i in range(400))
    (path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sentence = "The river {} flows past {} towns to the {} sea."
    words = [(i % 7, i * i % 11, ("old", "cold")[i % 3 == 0]) for i in range(42)]  # no better than those of the next one
    both = itertools.pairwise(words)
    pairs = [{"sentence_good": sentence.format(*one), "sentence_bad": sentence.format(*other)} for one, other in both]
    (path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def run(folder: pathlib.Path, *variants: str, out: str = "out", budget: tuple[str, ...] = (), more: tuple[str, ...] = ()):
    specs = [f"{folder}/tiny.py:{variant}" for variant in variants]
    budget = budget or (f"--budget-flops={BUDGET}",)
    source = f"--config.data.source=files:{folder}/text.jsonl?field=text"
    return main(["compare", "--configs", *specs, "--out", str(folder / out), *budget, source, *more])


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")
        yield


@pytest.mark.slow
def test_a_comparison_of_which_one_run_fails_and_its_continuation(folder, capsys):
    more = ("--blimp", str(folder / "pairs.jsonl"), "--json")
    names = ("mlm", "diverges", "hybrid")
    assert run(folder, *names, more=more) == 1
    streams = capsys.readouterr()
    printed, page = streams.out, (folder / "out" / "compare.html").read_text()
    table = json.loads(printed.splitlines()[-1])
    kept = json.loads((folder / "out" / "compare.json").read_text())["runs"]
    assert tuple(table["runs"]) == names
    assert set(table["runs"]["diverges"]) == {"error"}
    assert "1 of 3 failed: diverges: diverges failed: step" in streams.err and "not finite" in page
    for name in ("mlm", "hybrid"):
        row = table["runs"][name]
        cfg = json.loads((folder / "out" / name / "config.json").read_text())
        steps = [stage["steps"] for stage in cfg["stages"]]
        last = kept[name]["stages"][-1]["flops"]
        spent = sum(n * stage["flops"] for n, stage in zip(steps, kept[name]["stages"], strict=True))
        assert BUDGET - last < spent <= BUDGET and row["flops"] == spent
        lines = [json.loads(line) for line in (folder / "out" / name / "metrics.jsonl").read_text().splitlines()]
        final = lines[-1]
        assert final["kind"] == "eval" and final["step"] == row["steps"] == sum(steps)
        assert cfg["optimizer"]["warmup_steps"] == round(10 * sum(steps) / 100)
        rates = [line["learning_rate"] for line in lines if line["kind"] == "train"]
        assert 0 < rates[-1] < 2e-3 / (sum(steps) - 10 * sum(steps) / 100)  # the curve ends with the budget
        for measure in ("loss", "accuracy", "unigram_loss", "unigram_accuracy"):
            assert row[measure] == final[measure]
        assert (
            main(["score", "--workdir", str(folder / "out" / name), "--pairs", str(folder / "pairs.jsonl"), "--json"]) == 0
        )
        assert 0 < row["pairs"] < 1 and row["pairs"] == json.loads(capsys.readouterr().out.splitlines()[-1])["mean"]
        assert row["memory_bytes"] > 1e7 and row["wall_seconds"] > 0
        assert 0 < row["step_seconds"] < row["wall_seconds"]
        for shown in (f"{row['loss']:.3f}", f"{1e3 * row['step_seconds'] / row['steps']:,.1f}"):
            assert shown in printed and shown in page
    mlm, hybrid = (table["runs"][name] for name in ("mlm", "hybrid"))
    assert mlm["unigram_loss"] == hybrid["unigram_loss"] and mlm["steps"] != hybrid["steps"]
    told = "hybrid: 0.5 of its rows in training were predicted from the left only"
    assert told in printed and told in page and mlm["figures"] == ""
    assert set(hybrid["own"]) == {"causal_bits_per_token", "causal_perplexity"} and not mlm["own"]

    # The same command trains again only what has failed; another budget or other configs are refused.
    logs = [(folder / "out" / f"{name}.log").stat().st_size for name in names]
    assert run(folder, *names, more=more) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == table
    again = [(folder / "out" / f"{name}.log").stat().st_size for name in names]
    assert [old == new for old, new in zip(logs, again, strict=True)] == [True, False, True]
    assert run(folder, *names, budget=("--budget-flops=2e10",)) == 2
    assert "holds a comparison with other budget" in capsys.readouterr().err
    assert run(folder, "hybrid", "mlm") == 2
    assert "holds a comparison with other configs" in capsys.readouterr().err


def test_the_table_and_the_page_say_whose_figures_they_show():
    base = Config(name="x")
    cfgs = {
        "mlm": base,
        "rtd": dataclasses.replace(base, objective="rtd", rtd=RtdConfig(generator_size=0.5)),
        "again": dataclasses.replace(base, objective="rtd", rtd=RtdConfig(generator_size=0.5)),
        "diffusion": dataclasses.replace(base, objective="diffusion"),
        "hybrid": dataclasses.replace(base, objective="hybrid", hybrid=HybridConfig(causal_share=0.125)),
        "causal": dataclasses.replace(base, objective="hybrid", hybrid=HybridConfig(causal_share=1.0)),
        "masked": dataclasses.replace(base, objective="hybrid", hybrid=HybridConfig(causal_share=0.0)),
    }
    names = ("loss", "accuracy", "unigram_loss", "unigram_accuracy", "tokens_per_second", "flops", "memory_bytes")
    row = dict.fromkeys((*names, "wall_seconds"), 1.0) | {"pairs": None, "own": {}, "steps": 800, "step_seconds": 10.0}
    runs = {name: row | {"figures": figures_of(cfg)} for name, cfg in cfgs.items()} | {"broken": {"error": "no disk"}}
    table = {"budget": {"minutes": 2.0}, "runs": runs}
    notes = notes_of(table)
    assert notes[0] == "broken: no disk" and "no sentence below says otherwise" in notes[1]
    assert [note.partition(":")[0] for note in notes[2:]] == ["rtd, again", "diffusion", "hybrid", "causal"]
    for note, said in zip(
        notes[2:],
        (
            "the generator's, a network of 0.5 of the width; the discriminator's figures are among the own measures",
            "saw no 80/10/10 masks in training, which loss and accuracy are under: judge it by its bound",
            "0.125 of its rows in training were predicted from the left only",
            "are of tokens predicted from those before them alone",
        ),
        strict=True,
    ):
        assert said in note
    text, page = format_comparison(table), html.unescape(lead(table))
    assert all(note in text.splitlines() and f">{note}<" in page for note in notes)
    head, first, *_ = text.splitlines()
    assert (
        head.split().index("ms/step") == HEAD.index("ms/step") + 1
    )  # "held-out loss" and "minimal pairs" are two words each
    assert "  12.5  " in first and "<td>12.5</td>" in page and "<th>ms/step</th>" in page


@pytest.mark.parametrize(
    ("variants", "budget", "more", "message"),
    [
        (("mlm",), (), (), "2 to 8 configs, not 1"),
        (("mlm", "mlm-again"), (), (), "two of the configs have the name 'mlm'"),
        (("mlm", "hybrid"), ("--budget-flops=1e9", "--budget-minutes=1"), (), "give one budget"),
        (("mlm", "hybrid"), ("--config.seed=0",), (), "give one budget"),
        (("mlm", "hybrid"), ("--budget-minutes=-1",), (), "--budget-minutes=-1.0 must be positive"),
        (("mlm", "long"), (), (), "ends on rows of 32 and long on rows of 64"),
        (("mlm", "masks"), (), (), "evaluation.mask_rate=0.15 and masks 0.3"),
        (("mlm", "hybrid"), (), ("--blimp", "nothing/*.jsonl"), "no file matches"),
        (("mlm", "hybrid"), (), ("--data", "nowhere"), "no prepared corpus in nowhere"),
    ],
)
def test_mistakes_are_told_before_any_work(folder, capsys, variants, budget, more, message):
    assert run(folder, *variants, out="never", budget=budget, more=more) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "never").exists()


def test_an_unknown_file(folder, capsys):
    assert main(["compare", "--configs", "a.py", "b.py", "--out", str(folder / "never"), "--budget-flops=1e9"]) == 2
    assert "no config file a.py" in capsys.readouterr().err


def test_configs_of_other_corpora_are_refused(folder, capsys):
    assert run(folder, "mlm", "other-vocabulary", out="other") == 2
    assert "tokenizer.vocab_size=400, and the config has 408" in capsys.readouterr().err


CALLER = """
import sys
from mlm_jax import compare
compare._command = lambda verb: [sys.executable, "-c", verb[-1]]
try:
    compare._call(["bench", "--config", "x.py", sys.argv[1]])
except compare.Interrupted as stop:
    sys.exit(f"told: {stop}")
"""
CHILD = "import os, time; print(os.getpid(), file=open('pid', 'w'), flush=True); time.sleep(60)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_another_verb_is_at_work_ends_both(number, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(compare.__file__).parents[1])}
    command = [sys.executable, "-c", CALLER, CHILD]
    caller = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith("\n"):
        assert caller.poll() is None
        time.sleep(0.05)
    caller.send_signal(number)
    _, stderr = caller.communicate(timeout=30)
    assert stderr == f"told: stopped by signal {int(number)}; the same command continues\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


STAGES = (StageConfig(steps=300, seq_len=32), StageConfig(steps=100, learning_rate=1e-3, warmup_steps=20))
COSTS = [{"flops": 2.0, "seconds": 0.5}, {"flops": 6.0, "seconds": 3.0}]


def test_a_budget_is_shared_in_the_stages_proportions():
    cfg = Config(name="x", stages=STAGES)
    assert plan_steps(cfg, COSTS, "flops", 600.0) == [150, 50]
    assert plan_steps(cfg, COSTS, "minutes", 15.0) == [600, 200]
    for budget in range(40, 700, 13):
        steps = plan_steps(cfg, COSTS, "flops", budget)
        assert budget - 6 < 2 * steps[0] + 6 * steps[1] <= budget
    with pytest.raises(UserError, match=r"--budget-flops=20 pays \[5, 1\] steps .*10 in all"):
        plan_steps(cfg, COSTS, "flops", 20.0)


def test_all_that_counts_steps_is_scaled_with_them():
    optimizer = OptimizerConfig(warmup_steps=40, schedule="wsd", decay_steps=100)
    masking = MaskingConfig(schedule="linear", schedule_start=8, schedule_steps=200, final_rate=0.3)
    cfg = Config(name="x", stages=STAGES, optimizer=optimizer, masking=masking)
    assert scaled_fields(cfg, [75, 25]) == {
        "optimizer.warmup_steps": 10,
        "optimizer.decay_steps": 25,
        "masking.schedule_start": 2,
        "masking.schedule_steps": 50,
        "stages[0].steps": 75,
        "stages[1].steps": 25,
        "stages[1].warmup_steps": 5,
    }
