"""What `bench` reports adds up, is put down to the right scope, and is measured on the step that training runs."""

import contextlib
import dataclasses
import io
import json
import random
import sys
import types
from typing import Any

import jax
import pytest

from mlm_jax import cli, flops
from mlm_jax.bench import alternate, peer, profile, run_bench
from mlm_jax.bench.table import format_table
from mlm_jax.config import Config, ModelConfig, OptimizerConfig, ShardingConfig, StageConfig
from mlm_jax.errors import UserError

RECIPE = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({
        "name": "bench",
        "data": {"source": "files:%s", "validation_fraction": 0.1},
        "tokenizer": {"vocab_size": 300},
        "model": {"vocab_size": 384, "num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 32,
                  "max_positions": 64, "dropout": 0.1},
        "stages": ({"steps": 10, "seq_len": 32, "batch_size": 32},),
    })
"""
TINY = Config(
    name="tiny",
    model=ModelConfig(vocab_size=128, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32, max_positions=16),
    stages=(StageConfig(steps=10, seq_len=16, batch_size=16, accumulation=2),),
    sharding=ShardingConfig(data=2, fsdp=2, tensor=2),
)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the command line prints for a prepared corpus, a smaller batch than the stage's, and --json."""
    folder = tmp_path_factory.mktemp("bench")
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnop", k=5)) for _ in range(100)]
    texts = [" ".join(chance.choices(words, k=chance.randint(1, 40))) for _ in range(150)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config, corpus = folder / "bench.py", folder / "corpus"
    config.write_text(RECIPE % (folder / "texts.jsonl"))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert cli.main(["prepare", "--config", str(config), "--out", str(corpus), "--workers", "1"]) == 0
        options = ["--batch-size", "16", "--steps", "2", "--rounds", "3", "--data", str(corpus), "--json"]
        assert cli.main(["bench", "--config", str(config), *options]) == 0
    return output.getvalue().splitlines()


@pytest.fixture(scope="module")
def on_text(printed: list[str]) -> dict[str, Any]:
    return json.loads(printed[-1])


@pytest.fixture(scope="module")
def on_random_rows() -> dict[str, Any]:
    wider = dataclasses.replace(TINY, name="wider", model=dataclasses.replace(TINY.model, mlp_dim=64))
    return run_bench(TINY, steps=1, rounds=2, against=[wider])


def test_the_step_has_the_shape_that_was_asked_for(on_text: dict[str, Any]) -> None:
    assert (on_text["batch_size"], on_text["seq_len"], on_text["num_devices"]) == (16, 32, jax.device_count())
    # Token and position tables, one layer, the head, and the norms, counted by hand.
    layer = 4 * (16 * 16 + 16) + 2 * 16 * 32 + 32 + 16 + 4 * 16
    assert on_text["parameters"] == 384 * 16 + 64 * 16 + 2 * 16 + layer + 16 * 16 + 3 * 16 + 384


def test_only_real_tokens_count(on_text: dict[str, Any], on_random_rows: dict[str, Any]) -> None:
    assert on_random_rows["step"]["tokens"] == 16 * 16
    assert 0.5 * 16 * 32 < on_text["step"]["tokens"] < 16 * 32  # packed texts leave some padding


def test_rates_follow_from_the_times(on_random_rows: dict[str, Any]) -> None:
    step = on_random_rows["step"]
    times, rates = step["milliseconds"], step["tokens_per_second"]
    assert rates["max"] == pytest.approx(step["tokens"] / times["min"] * 1e3)
    # Full rows of one segment each: a token sees its whole row, and num_slots(16, 0.15) = 2 of 16 are predicted.
    assert step["flops_per_token"] == pytest.approx(flops.train_flops_per_token(TINY.model, 16, 2 / 16))
    assert step["flops_per_second"] == pytest.approx(step["flops_per_token"] * step["tokens"] / times["median"] * 1e3)
    assert step["mfu"] is None or 0 < step["mfu"] < 1


def test_every_scope_is_found_in_the_trace(on_text: dict[str, Any]) -> None:
    groups = on_text["operations"]["groups"]
    assert set(profile.SCOPES.values()) <= groups.keys() <= {*profile.SCOPES.values(), profile.OTHER}
    for name in ("attention projections", "attention core", "mlp", "head"):
        assert 0 < groups[name]["matrix_products"] <= groups[name]["milliseconds"]
        assert 0 < groups[name]["backward"] < groups[name]["milliseconds"]
    assert groups["optimizer"]["matrix_products"] == groups["optimizer"]["backward"] == 0


@pytest.mark.parametrize("rows", ["on_text", "on_random_rows"])
def test_the_parts_add_up_to_the_step(rows: str, request: pytest.FixtureRequest) -> None:
    traced = request.getfixturevalue(rows)["operations"]
    total = sum(group["milliseconds"] for group in traced["groups"].values())
    assert total == pytest.approx(sum(traced["phases"].values()))
    assert total == pytest.approx(traced["covered"] * traced["milliseconds"])
    assert 0.2 < traced["covered"] <= 1.0  # so small a step leaves the devices idle for much of its time


def test_the_loader_is_measured_only_on_a_corpus(on_text: dict[str, Any], on_random_rows: dict[str, Any]) -> None:
    assert on_random_rows["loader"] is None
    loader = on_text["loader"]
    assert loader["rows"] == 2 * 3 * 16
    fill = loader["tokens_per_second"] / loader["rows_per_second"] / 32
    assert 0.5 < fill < 1.0
    assert loader["tokens_per_core_second"] / loader["rows_per_core_second"] / 32 == pytest.approx(fill)


def test_memory_holds_the_state(on_text: dict[str, Any]) -> None:
    memory = on_text["memory"]
    state = 3 * 4 * on_text["parameters"]  # parameters and two moments, float32, replicated
    assert state < memory["outputs_in_arguments"] < memory["arguments"] < 2 * state
    assert memory["temporaries"] > 0
    assert 2**26 < memory["process_peak"] < 2**37  # bytes: Python with JAX takes 64 MiB at least


def test_the_table_is_printed_before_the_json(printed: list[str]) -> None:
    table = format_table(json.loads(printed[-1])).splitlines()
    assert printed[-1 - len(table) : -1] == table
    assert max(map(len, table)) <= 120
    assert "peer" not in "".join(table)


def test_another_recipe_is_a_share_of_this_one(on_random_rows: dict[str, Any]) -> None:
    (other,) = on_random_rows["against"]
    own, its = on_random_rows["step"]["tokens_per_second"], other["step"]["tokens_per_second"]
    assert other["config"] == "wider" and other["parameters"] > on_random_rows["parameters"]
    assert 0 < other["ratio"]["min"] <= other["ratio"]["median"] <= other["ratio"]["max"]
    assert its["min"] / own["max"] <= other["ratio"]["median"] <= its["max"] / own["min"]
    # Of a token two wider products in the first layer, in the last one of the two in sixteen that are predicted; forward and
    # twice backward.
    more = (1 + 2 / 16) * 2 * 2 * 3 * 16 * 32
    least = on_random_rows["step"]["flops_per_token"]
    assert other["ratio_by_flops"] == pytest.approx(least / (least + more))
    table = format_table(on_random_rows)
    assert "against wider" in table and table.count("time by operation") == 2


def test_contenders_alternate() -> None:
    order: list[tuple[str, int]] = []
    seconds = alternate(
        {"ours": lambda steps: order.append(("ours", steps)), "peer": lambda steps: order.append(("peer", steps))}, 4, 2
    )
    assert order == [("ours", 4), ("peer", 4)] * 3  # the first round is not measured
    assert [len(times) for times in seconds.values()] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage_index": 1}, "--stage=1"),
        ({"steps": 0}, "--steps=0"),
        ({"rounds": 0}, "--rounds=0"),
        ({"peer": "fairseq"}, "--peer=fairseq is none of hf"),
        ({"against": (TINY,)}, "tiny, tiny must have different names"),
        ({"against": (dataclasses.replace(TINY, name="other", sharding=ShardingConfig()),)}, "one mesh is for all"),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_bench(TINY, **arguments)


@pytest.mark.parametrize(
    "change",
    [
        *({"objective": name} for name in ("rtd", "span")),
        *({"model": dataclasses.replace(TINY.model, **fields)} for fields in ({"table_dim": 8}, {"positions": "rope"})),
    ],
)
def test_what_the_peers_are_not_is_not_compared_with_them(change) -> None:
    with pytest.raises(UserError, match="the peers are BERT"):
        run_bench(dataclasses.replace(TINY, **change), peer="hf")


def test_a_missing_peer_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"needs torch.*pip install '.\[peers\]'"):
        run_bench(TINY, peer="hf")


@pytest.mark.parametrize(
    ("path", "group", "phase"),
    [
        ("jit(train_step)/jvp(mlp)/BLD,DF->BLF/dot_general", "mlp", "forward"),
        ("jit(train_step)/transpose(jvp(mlp))/BLD,DF->BLF/dot_general", "mlp", "backward"),
        ("jit(train_step)/jvp(attention)/BLD,DHK->BHLK/dot_general", "attention projections", "forward"),
        ("jit(train_step)/transpose(jvp(attention))/attention_core/exp", "attention core", "backward"),
        ("jit(train_step)/jvp(attention)/dropout/select_n", "dropout", "forward"),
        ("jit(train_step)/while/body/checkpoint/rematted_computation/mlp/tanh", "mlp", "backward"),
        ("jit(train_step)/optimizer/add", "optimizer", "optimizer"),
        ("state.opt_state[1].mu['encoder']['layers']['mlp']['up_DF']", "optimizer", "optimizer"),
        ("jit(train_step)/jvp()/split", "other", "forward"),
        ("jit(train_step)/mlp_of_something_else/add", "other", "other"),
        ("", "other", "other"),
    ],
)
def test_paths_are_put_down_to_their_innermost_scope(path: str, group: str, phase: str) -> None:
    assert profile.classify(path) == (group, phase)


HLO = """
%fused (p.1: f32[4,4], p.2: f32[4,4]) -> f32[4] {
  %p.1 = f32[4,4]{1,0} parameter(0)
  %p.2 = f32[4,4]{1,0} parameter(1)
  %dot.1 = f32[4,4]{1,0} dot(%p.1, %p.2), metadata={op_name="jit(f)/jvp(mlp)/dot_general"}
  ROOT %reduce.1 = f32[4]{0} reduce(%dot.1), to_apply=%sum, metadata={op_name="jit(f)/jvp(norm)/reduce_sum"}
}

%unnamed (p.3: f32[4,4]) -> f32[4,4] {
  %p.3 = f32[4,4]{1,0} parameter(0)
  ROOT %exp.1 = f32[4,4]{1,0} exponential(%p.3), metadata={op_name="jit(f)/jvp(head_loss)/exp"}
}

ENTRY %main (a: f32[4,4]) -> (f32[4], f32[4,4]) {
  %a = f32[4,4]{1,0} parameter(0), metadata={op_name="state.params['x']"}
  %copy.1 = f32[4,4]{0,1:T(8,128)} copy(%a)
  %fusion.1 = f32[4]{0} fusion(%copy.1, %a), kind=kCustom, calls=%fused, metadata={op_name="jit(f)/jvp(norm)/sum"}
  %fusion.2 = f32[4,4]{1,0} fusion(%a), kind=kLoop, calls=%unnamed
  %while.1 = (f32[4,4]{1,0}, /*index=1*/s32[]) while(%tuple.9), condition=%c, body=%b
  %gemm.1 = f32[4,4]{1,0} custom-call(%a, %a), metadata={op_name="jit(f)/jvp(head)/dot_general"}
  %copy.2 = f32[4,4]{1,0} copy(%fusion.2)
  ROOT %tuple.1 = (f32[4]{0}, f32[4,4]{1,0}) tuple(%fusion.1, %copy.2)
}
"""


def test_instructions_get_the_path_that_explains_their_time() -> None:
    found = profile.parse_hlo(HLO)
    assert found["fusion.1"] == profile.Instruction("fusion", "jit(f)/jvp(mlp)/dot_general", True)
    assert found["fusion.2"] == profile.Instruction("fusion", "jit(f)/jvp(head_loss)/exp", False)
    assert found["copy.1"] == profile.Instruction("copy", "jit(f)/jvp(mlp)/dot_general", False)  # what reads it
    assert found["copy.2"].op_name == "jit(f)/jvp(head_loss)/exp"  # what it reads: no path explains its reader
    assert found["while.1"].opcode == "while"
    assert found["gemm.1"].is_matrix_product


def test_time_is_shared_by_what_runs_at_once() -> None:
    operations = [
        profile.Operation(0.0, 4e9, "long"),
        profile.Operation(1e9, 3e9, "short"),
        profile.Operation(2e9, 3e9, "short"),
        profile.Operation(6e9, 7e9, "late"),
    ]
    # 0-1 long; 1-2 half each; 2-3 a third long, two thirds short; 3-4 long; nothing until 6.
    assert profile.shared_seconds(operations) == pytest.approx({"long": 2.5 + 1 / 3, "short": 0.5 + 2 / 3, "late": 1.0})


def test_a_container_is_not_counted_beside_its_content() -> None:
    operations = [
        profile.Operation(0.0, 5e9, "while.1"),
        profile.Operation(0.0, 2e9, "fusion.1"),
        profile.Operation(2e9, 3e9, "renamed"),
    ]
    found = profile.break_down(operations, profile.parse_hlo(HLO), 1, 5.0)
    assert found.groups == pytest.approx({"mlp": 2.0, "other": 1.0})
    assert found.covered == pytest.approx(0.6)


def _trace(**planes: dict[str, list[tuple[str, float, float, dict[str, Any]]]]) -> Any:
    """A trace as `jax.profiler.ProfileData` presents it: planes of lines of events."""
    new = types.SimpleNamespace

    def events(rows: list[tuple[str, float, float, dict[str, Any]]]) -> list[Any]:
        return [new(name=n, start_ns=s, duration_ns=d, stats=list(stats.items())) for n, s, d, stats in rows]

    def lines(rows: dict[str, list[tuple[str, float, float, dict[str, Any]]]]) -> list[Any]:
        return [new(name=name, events=events(content)) for name, content in rows.items()]

    return new(planes=[new(name=name.replace("_", ":"), lines=lines(rows)) for name, rows in planes.items()])


def test_an_operation_lasts_until_the_pool_has_finished_it() -> None:
    trace = _trace(
        host={
            "one": [
                ("dot.1", 10.0, 2.0, {"hlo_op": "dot.1", "_p": 7}),
                ("dot.1", 90.0, 2.0, {"hlo_op": "dot.1", "_p": 8}),
            ],
            "two": [("end: dot.1", 50.0, 1.0, {"_c": 7}), ("a Python call", 0.0, 100.0, {})],
        }
    )
    assert profile.read_operations(trace) == [
        profile.Operation(10.0, 50.0, "dot.1"),
        profile.Operation(90.0, 92.0, "dot.1"),
    ]


def test_the_first_accelerator_stands_for_all() -> None:
    trace = _trace(
        **{
            "/host_CPU": {"python": [("copy.1", 0.0, 1.0, {"hlo_op": "copy.1"})]},
            "/device_TPU:1": {"XLA Ops": [("%fusion.1 = f32[4] fusion(…)", 5.0, 1.0, {})]},
            "/device_TPU:0": {
                "Steps": [("1", 0.0, 9.0, {})],
                "XLA Ops": [("%fusion.1 = f32[4] fusion(…)", 3.0, 1.0, {})],
            },
        }
    )
    assert profile.read_operations(trace) == [profile.Operation(3.0, 4.0, "fusion.1")]


@pytest.mark.peer
@pytest.mark.parametrize("token_types", [0, 2])
def test_the_peer_is_the_same_model(token_types: int) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = dataclasses.replace(TINY.model, num_token_types=token_types)
    result = run_bench(dataclasses.replace(TINY, model=model, sharding=ShardingConfig()), steps=1, rounds=2, peer="hf")
    assert result["peer"]["parameters"] - result["parameters"] == (0 if token_types else 16)
    assert len(result["peer"]["ratios"]) == 2
    ratio = result["peer"]["ratio"]
    assert ratio["min"] <= ratio["median"] <= ratio["max"]
    assert "ours / peer" in format_table(result)


@pytest.mark.peer
def test_the_peer_learns_from_the_rows() -> None:
    """Its steps do the whole job: the loss of the batch that it repeats falls."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from mlm_jax.bench import _random_rows

    cfg = dataclasses.replace(TINY, optimizer=OptimizerConfig(learning_rate=1e-2))
    rows = _random_rows(cfg, cfg.stages[0])
    other = peer.HuggingFacePeer(cfg, cfg.stages[0], rows, dtype="float32", num_threads=1)

    def loss() -> float:
        return sum(float(other._model(**micro).loss.detach()) for micro in other._micro_batches)

    before = loss()
    other.run(10)
    assert loss() < before - 0.5
