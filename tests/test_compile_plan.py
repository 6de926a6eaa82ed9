"""What `compile` says of memory and layouts: sizes of a program that runs here, and which candidates a plan has."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from test_compile import mesh_of
from test_compile import topology_of as torus_of
from tiny_step import CFG

from mlm_jax import cli
from mlm_jax.compile import plan, run
from mlm_jax.compile.chips import CHIPS
from mlm_jax.compile.describe import describe
from mlm_jax.compile.program import DoesNotFit, compile_step, count_parameters, out_of_memory
from mlm_jax.compile.table import format_plan, format_result, format_row
from mlm_jax.compile.topology import Topology
from mlm_jax.config import ModelConfig, OptimizerConfig, ShardingConfig, StageConfig, load_config
from mlm_jax.errors import UserError

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
# What the recipes' sources say, as those with variants have none without a name.
REFERENCES = {
    path.stem: re.findall(r'"reference_topology": "(.+)"', path.read_text()) for path in sorted(CONFIGS.glob("*.py"))
}
BASE = dataclasses.replace(
    CFG,
    sharding=ShardingConfig(data=16),
    model=ModelConfig(vocab_size=30522, num_layers=12, embed_dim=768, num_heads=12, mlp_dim=3072),
    optimizer=OptimizerConfig(),
    stages=(StageConfig(seq_len=128, batch_size=256), StageConfig(seq_len=512, batch_size=256)),
)
PARAMETERS = 109_514_298


def topology_of(generation: str, num_devices: int) -> Topology:
    return Topology(f"{generation}:test", generation, (num_devices,), 1, tuple(range(num_devices)))


@pytest.fixture(scope="module")
def program():
    """The tiny step, compiled for the devices here: its state over two shards of four replicas."""
    cfg = dataclasses.replace(CFG, sharding=ShardingConfig(data=4, fsdp=2))
    return compile_step(cfg, 0, jax.devices())


def test_the_kinds_of_memory_are_what_the_compiler_plans(program):
    planned, kinds = program.compiled.memory_analysis(), program.memory()
    # Adam keeps two moments of each parameter's size and a count, the schedule a count.
    assert kinds["optimizer"] == 2 * kinds["parameters"] + 2 * 4
    assert kinds["ema"] == kinds["parameters"]
    # Matrices are halved; vectors, of which there are few, are not.
    assert 4 * program.num_parameters / 2 < kinds["parameters"] < 4 * program.num_parameters * 0.6
    arguments = kinds["parameters"] + kinds["optimizer"] + kinds["ema"] + kinds["batch and padding"]
    assert arguments == planned.argument_size_in_bytes
    # Of the rows a device has an eighth: 4 of 24 tokens with their segments, and two numbers a row.
    rows = 4 * (2 * 4 * 24 + 2 * 4)
    assert rows < kinds["batch and padding"] < rows + 6 * CFG.model.vocab_size
    assert kinds["activations and temporaries"] == planned.temp_size_in_bytes > 0


def test_what_the_compiler_lets_pass_is_refused_where_it_exceeds_the_memory(program, monkeypatch):
    small = dataclasses.replace(CHIPS["h100"], hbm_bytes=1e5)
    monkeypatch.setitem(CHIPS, "h100", small)
    topology = Topology("h100:1x8", "h100", (), 1, tuple(jax.devices()))
    with pytest.raises(DoesNotFit, match=r"needs 0\.00 GiB and a chip has 0\.00 GiB"):
        describe(CFG, 0, topology, program)


def test_a_program_is_described_with_its_memory_its_time_and_its_collectives(program, monkeypatch):
    """What was compiled for the CPU stands for a program of a TPU: it has the same operations, and none has cycles."""
    cfg = dataclasses.replace(CFG, sharding=ShardingConfig(data=4, fsdp=2))
    torus = torus_of("v5e", (2, 4))
    placed = dataclasses.replace(program, mesh=mesh_of(torus, slice=1, data=4, fsdp=2, tensor=1))
    monkeypatch.setattr("mlm_jax.compile.describe.attention_of", lambda *given: "row")
    found = json.loads(json.dumps(describe(cfg, 0, torus, placed)))
    estimate = found["estimate"]
    milliseconds = {name: group["milliseconds"] for name, group in estimate["groups"].items()}
    assert sum(milliseconds.values()) == pytest.approx(estimate["milliseconds"])
    assert {"mlp", "head", "norm", "optimizer", "embedding", "attention projections", "collectives"} <= set(milliseconds)
    assert estimate["tokens_per_second"] == pytest.approx(32 * 24 / estimate["milliseconds"] * 1e3)
    assert found["memory"]["total"] == sum(program.memory().values()) and not estimate["unknown"]
    # Rows are divided over both axes, parameters over fsdp: gathered for each layer, their gradients summed and scattered.
    kinds = {(each["kind"], each["axes"]) for each in found["collectives"]}
    assert {("all-gather", "fsdp"), ("reduce-scatter", "fsdp"), ("all-reduce", "data")} <= kinds
    assert "tiny, stage 0: 32 rows of 24 tokens" in format_result(found) and "all-gather over fsdp" in format_result(found)
    assert f"| {milliseconds['collectives']:,.1f} |" in format_row(found)


def test_parameters_are_counted_without_compiling(program):
    parameters, attention = count_parameters(CFG, 0, jax.devices())
    assert (parameters, attention) == (program.num_parameters, "xla")


@pytest.mark.parametrize(
    ("message", "needed", "size"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
         "Used 18.04G of 15.75G hbm. Exceeded hbm capacity by 2.29G.", "18.04 GiB and a chip has 15.75 GiB", 18.04 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (1.00T) exceeds "
         "available HBM (95.74G).", "1024.00 GiB and a chip has 95.74 GiB", 2.0**40),
        ("RESOURCE_EXHAUSTED: something new", "RESOURCE_EXHAUSTED: something new", None),
    ],
)  # fmt: skip
def test_the_compilers_lack_of_memory_is_told_with_its_figures_and_what_to_change(message, needed, size):
    error = out_of_memory(message)
    assert isinstance(error, DoesNotFit) and error.needed_bytes == size
    assert needed in str(error) and "accumulation" in str(error) and "compute.remat=dots" in str(error)


def test_candidates_divide_the_devices_and_the_batch():
    found = list(plan.enumerate_candidates(BASE, 1, 16, 1))
    assert len(found) == len(set(found))
    for one in found:
        sharding = one.sharding
        assert sharding.slice * sharding.data * sharding.fsdp * sharding.tensor == 16
        assert 256 % (16 // sharding.tensor * one.accumulation) == 0
        assert not (sharding.zero and sharding.data == 1)
    shapes = {(one.sharding.data, one.sharding.fsdp, one.sharding.tensor, one.sharding.zero) for one in found}
    assert {(16, 1, 1, False), (16, 1, 1, True), (1, 16, 1, False), (2, 8, 1, True), (8, 1, 2, False)} <= shapes
    # 30,522 words are two times an odd number, and heads are twelve: no more than two ways.
    assert max(tensor for _, _, tensor, _ in shapes) == 2
    assert {one.accumulation for one in found if one.sharding.tensor == 1} == {1, 2, 4, 8, 16}
    assert {one.sharding.slice for one in plan.enumerate_candidates(BASE, 1, 32, 2)} == {2}


def test_the_config_itself_is_not_compiled_twice():
    cfg = dataclasses.replace(BASE, sharding=ShardingConfig(data=-1, fsdp=2, zero=True))
    own = plan.own_candidate(cfg, 1, jax.devices())
    assert own == plan.Candidate(ShardingConfig(data=4, fsdp=2, zero=True), 1, "none", "scan")
    topology = topology_of("v5p", 8)
    everything = plan.shortlist(BASE, 1, topology, PARAMETERS, "splash", 10**6)
    rest = plan.shortlist(BASE, 1, topology, PARAMETERS, "splash", 10**6, without=everything[3][0])
    assert rest == everything[:3] + everything[4:]
    wrong = dataclasses.replace(BASE, sharding=ShardingConfig(data=3))
    assert plan.own_candidate(wrong, 1, jax.devices()) is None


def test_a_candidate_is_its_overrides(tmp_path):
    one = next(one for one in plan.enumerate_candidates(BASE, 1, 16, 1) if one.remat == "dots" and one.accumulation == 2)
    applied = one.apply(BASE, 1)
    assert (applied.stages[1].accumulation, applied.stages[0].accumulation) == (2, 1)
    file = tmp_path / "x.py"
    file.write_text(
        "from ml_collections import ConfigDict\nget_config = lambda: ConfigDict(dict(name='x', stages=({}, {})))\n"
    )
    options, overrides = cli._parse(["compile", "--config", str(file), *one.overrides(1)])
    cfg = load_config(options.config, overrides)
    assert (cfg.sharding, cfg.compute.remat, cfg.compute.layers) == (one.sharding, one.remat, one.layers)
    assert cfg.stages[1].accumulation == 2


def test_arithmetic_is_close_to_what_the_compiler_planned():
    """16 rows of 512 a chip, all with ZeRO and our kernel, by libtpu 0.0.42 on 2026-11-29: GiB of BERT-base on v5e:4x4
    unrolled and scanned, of bert_large_lamb on v5e:16x16 and roberta_base on v5e:8x8 unrolled."""
    large, roberta = (load_config(str(CONFIGS / f"{name}.py")) for name in ("bert_large_lamb", "roberta_base"))
    for cfg, stage, parameters, devices, layers, measured in (
        (BASE, 1, PARAMETERS, 16, "unroll", 2.89),
        (BASE, 1, PARAMETERS, 16, "scan", 5.67),
        (large, 1, 335_174_458, 256, "unroll", 8.07),
        (roberta, 0, 124_696_665, 64, "unroll", 3.28),
    ):
        accumulation = cfg.stages[stage].batch_size // devices // 16
        one = plan.Candidate(ShardingConfig(data=devices, zero=True), accumulation, "none", layers)
        needed = plan.needed_bytes(one, cfg, cfg.stages[stage], parameters, devices, "row")
        assert needed / 2**30 == pytest.approx(measured, rel=0.2), (cfg.name, layers)


def test_arithmetic_knows_what_saves_memory():
    def needed(sharding=BASE.sharding, accumulation=1, remat="none", layers="scan", attention="splash"):
        one = plan.Candidate(sharding, accumulation, remat, layers)
        return plan.needed_bytes(one, BASE, BASE.stages[1], PARAMETERS, 16, attention)

    assert needed() > needed(layers="unroll") > needed(remat="dots") > needed(remat="full")
    assert needed() > needed(accumulation=2) > needed(accumulation=4)
    assert needed() - needed(ShardingConfig(data=16, zero=True)) == pytest.approx(12 * PARAMETERS * 15 / 16)
    assert needed() > needed(ShardingConfig(data=1, fsdp=16))
    assert needed(attention="xla") - needed() == pytest.approx(12 * 10 * 12 * 512 * 16 * 512)


def test_the_shortlist_leaves_out_what_cannot_fit_and_begins_with_what_promises_most():
    roomy = plan.shortlist(BASE, 1, topology_of("v5p", 16), PARAMETERS, "splash", 6)
    assert len(roomy) == 6
    first = roomy[0][0]
    assert (first.remat, first.layers, first.accumulation, first.sharding.tensor) == ("none", "unroll", 1, 1)
    tight = dataclasses.replace(BASE, stages=(BASE.stages[0], StageConfig(seq_len=512, batch_size=2048)))
    for candidate, needed in plan.shortlist(tight, 1, topology_of("v5e", 16), PARAMETERS, "splash", 100):
        assert needed < plan.TOLERANCE * CHIPS["v5e"].hbm_bytes
        assert candidate.accumulation > 1 or candidate.remat != "none"
    costs = [plan.guessed_cost(candidate) for candidate, _ in roomy]
    assert costs == sorted(costs)


def test_a_plan_ranks_what_fits_and_skips_what_needs_more_than_what_did_not():
    chosen = plan.shortlist(BASE, 1, topology_of("v5p", 16), PARAMETERS, "splash", 1000)
    needed = {one.apply(BASE, 1): size for one, size in chosen}
    limit = sorted(needed.values())[len(needed) // 2]
    tried = []

    def attempt(cfg):
        tried.append(cfg)
        if needed[cfg] > limit:
            return {"fits": False, "too_large": True, "reason": "it is too large"}
        return {"fits": True, "too_large": False, "milliseconds": 10.0 + cfg.sharding.fsdp}

    found = plan.explore(BASE, 1, chosen, attempt)
    assert tried[0] == BASE and len(found) == len(tried)
    # Whatever fits was tried; of the rest, each needed less than those before it.
    assert {cfg for cfg, size in needed.items() if size <= limit} <= set(tried)
    refused = [needed[cfg] for cfg in tried[1:] if needed[cfg] > limit]
    assert refused and refused == sorted(refused, reverse=True)
    fitting = [one for one in found if one["fits"]]
    assert found[: len(fitting)] == fitting == sorted(fitting, key=lambda one: one["milliseconds"])
    assert "--config.sharding.fsdp=1" in found[0]["overrides"] and found[-1]["reason"] == "it is too large"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "configs/smoke.py"], "smoke names no reference_topology; give --topology: v4:2x2x2"),
        (["--config", "configs/bert_base.py", "--table", "configs/smoke.py"], "not allowed with argument"),
        (["--topology", "v5e:2x2"], "one of the arguments --config --table is required"),
        (["--table", "configs/smoke.py", "--plan"], "leave out --plan"),
        (["--config", "configs/smoke.py", "--topology", "v5e:2x2", "--topology", "v5e:4x4"], "only --table takes"),
        (["--config", "configs/smoke.py", "--plan", "--max-candidates", "0"], "--max-candidates=0 must be positive"),
        (["--config", "configs/smoke.py", "--topology", "v5e-16"], "--topology=v5e-16 is not GENERATION:SHAPE"),
        (["--config", "configs/smoke.py", "--topology", "v9:2x2"], "v9 is none of v4, v5e"),
    ],
)
def test_a_mistake_ends_with_status_2_and_one_message(capsys, arguments, message):
    assert cli.main(["compile", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_its_compiler_a_tpu_topology_names_the_extra(capsys):
    assert cli.main(["compile", "--config", "configs/smoke.py", "--topology", "v5e:2x2"]) == 2
    assert "pip install '.[tpu-compile]'" in capsys.readouterr().err


def result(**changes):
    kinds = {"parameters": 2**30, "activations and temporaries": 2**31}
    estimate = {
        "method": "estimate",
        "milliseconds": 100.0,
        "tokens_per_second": 1.3e6,
        "mfu": 0.25,
        "groups": {"mlp": {"milliseconds": 60.0, "backward": 40.0, "matrix_products": 50.0}},
        "kernel_milliseconds": 7.0,
        "kernel_fill": 0.5,
        "roofline_milliseconds": 1.0,
        "unknown": {"loops counted once": 2},
    }
    return {
        "config": "x", "stage": 1, "batch_size": 256, "seq_len": 512, "accumulation": 2, "topology": "v5e:4x4",
        "device": "TPU v5 lite", "num_devices": 16, "mesh": {"data": 16, "fsdp": 1}, "zero": True, "parameters": 10,
        "dtype": "bfloat16", "layers": "scan", "remat": "none", "attention": "splash", "compile_seconds": 3.0,
        "memory": {"kinds": kinds, "total": 3 * 2**30, "limit": 16 * 2**30},
        "tokens": 131_072, "flops_per_token": 588e6, "estimate": estimate | changes,
        "collectives": [{"kind": "all-reduce", "axes": "data", "count": 12, "bytes": 17e6, "milliseconds": 3.3}],
    }  # fmt: skip


def test_every_time_is_labelled():
    text = format_result(result())
    assert "ESTIMATE by the compiler's cost model, nothing was measured: 100.00 ms a step" in text
    assert "at 50% of the peak" in text and "2 loops counted once: the step is longer than this" in text
    assert "at least 100.00 ms a step" in format_result(result(method="roofline"))
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "data=16 × fsdp=1, ZeRO" in text
    how = "data 16 ZeRO, scan, remat none, splash"
    assert (
        format_row(result()) == f"| x | 256 / 2 × 512 | v5e:4x4 | {how} | 3.00 of 16.00 | 100.0 | 0.0 | 1,300,000 | 25.0% |"
    )
    assert "| one device, scan, remat none, splash |" in format_row(result() | {"mesh": {"data": 1}, "zero": False})
    assert format_row(result(method="roofline")).endswith("| ≥ 100.0 | 0.0 | ≤ 1,300,000 | ≤ 25.0% |")
    assert "does not fit" in format_row({"config": "x", "stage": 0, "topology": "v5e:2x2", "reason": "it does not fit"})
    shown = format_plan(
        {"config": "x", "stage": 1, "topology": "v5e:4x4", "overrides": ["--config.compute.remat=dots"], "best": result(),
         "candidates": [{"fits": True, "milliseconds": 9.0, "mfu": None, "memory": 2**30, "overrides": []},
                        {"fits": False, "reason": "no memory", "overrides": ["--config.compute.remat=full"]}]}
    )  # fmt: skip
    assert shown.endswith("best: --config.compute.remat=dots") and "failed  --config.compute.remat=full: no memory" in shown


def test_a_candidate_that_fails_otherwise_costs_no_others(monkeypatch):
    def fail(error):
        def compile_step(cfg, stage_index, devices):
            raise error

        monkeypatch.setattr(plan, "compile_step", compile_step)
        return plan._attempt(BASE, 1, topology_of("v5e", 16))

    assert fail(out_of_memory("RESOURCE_EXHAUSTED: something"))["too_large"]
    broken = fail(jax.errors.JaxRuntimeError("INTERNAL: a fault\nof many lines"))
    assert (broken["fits"], broken["too_large"], broken["reason"]) == (False, False, "INTERNAL: a fault")
    chosen = plan.shortlist(BASE, 1, topology_of("v5p", 16), PARAMETERS, "splash", 5)
    assert len(plan.explore(BASE, 1, chosen, lambda cfg: broken)) == 6


def test_a_table_has_every_row_that_can_be_and_says_why_others_cannot(monkeypatch, capsys, caplog):
    """As `compile --table configs/*.py` meets them: recipes with variants, of tasks, without a topology."""

    def run_compile(cfg, topology, *, stage_index, rows_per_device):
        if topology == "h200:1x1":
            raise UserError("its compiler is not installed")
        return result() | {"config": cfg.name, "stage": stage_index, "topology": topology}

    monkeypatch.setattr(run, "run_compile", run_compile)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the command sets some of its variables
    names = ("bert_base", "compare_mini", "electra_small", "finetune_cola", "smoke")
    files = [str(CONFIGS / f"{name}.py") for name in names]
    assert cli.main(["compile", "--table", *files]) == 0
    rows = [line.split(" | ")[0].removeprefix("| ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == ["bert_base", "bert_base", "electra_small"]
    assert "compare_mini.py could not be read" in caplog.text and "finetune_cola.py is a recipe of" in caplog.text
    assert cli.main(["compile", "--table", files[0], "--stage", "1", "--topology", "v5e:4x4", "--topology", "v4:2x2x2"]) == 0
    assert [line.split(" | ")[2] for line in capsys.readouterr().out.splitlines()[2:]] == ["v5e:4x4", "v4:2x2x2"]
    for only, message in ((files[1], "it needs a variant"), (files[2], "is not installed"), (files[4], "give --topology")):
        assert cli.main(["compile", "--table", only]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", [name for name, found in REFERENCES.items() if found])
def test_each_recipe_fits_where_it_says(name):
    """Every stage, by XLA's own compiler: minutes each, in a process of its own as jax has one platform in each."""
    if REFERENCES[name][0].startswith("h200") and importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs the extra cuda")
    command = [sys.executable, "-m", "mlm_jax", "compile", "--table", str(CONFIGS / f"{name}.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert rows and all("reason" not in row for row in rows), rows
    assert all(row["memory"]["total"] <= row["memory"]["limit"] for row in rows)
    assert all(0.0 < row["estimate"]["mfu"] < 1.0 and not row["estimate"]["unknown"] for row in rows)


@pytest.mark.slow
@pytest.mark.tpu_compile
def test_a_plan_and_a_refusal_from_the_real_compiler():
    small = ["--config.model.num_layers=1", "--config.model.attention_dropout=0.0", "--topology", "v5e:2x2", "--stage", "1"]
    command = [sys.executable, "-m", "mlm_jax", "compile", "--config", str(CONFIGS / "bert_base.py"), *small, "--json"]
    planned = subprocess.run([*command, "--plan", "--max-candidates", "1"], capture_output=True, text=True, check=False)
    assert planned.returncode == 0, planned.stderr
    found = json.loads(planned.stdout.splitlines()[-1])
    assert len(found["candidates"]) == 2
    times = [one["milliseconds"] for one in found["candidates"]]
    assert times == sorted(times) and found["best"]["estimate"]["milliseconds"] == times[0]
    refused = subprocess.run([*command, "--rows-per-device", "2048"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "GiB and a chip has 15.75 GiB" in refused.stderr and "compute.remat=dots" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra cuda")
@pytest.mark.parametrize(("recipe", "stage"), [("bert_base", 1), ("modernbert_base", 6)])
def test_the_kernels_of_gpus_are_divided_by_rows_and_heads(recipe, stage):
    """Of whole rows, and of a window in blocks: they are opaque to JAX, and the steps did not compile for two GPUs once."""
    small = [
        "--config.model.num_layers=4",
        "--config.sharding.data=4",
        "--config.sharding.tensor=2",
        "--rows-per-device",
        "1",
    ]
    command = [sys.executable, "-m", "mlm_jax", "compile", "--config", str(CONFIGS / f"{recipe}.py"), *small]
    command += ["--topology", "h200:1x8", "--stage", str(stage), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["attention"] == "cudnn" and {one["axes"] for one in result["collectives"]} >= {"data", "tensor"}
