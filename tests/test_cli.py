"""The command line from end to end on a tiny run: what each verb gives, what a mistake costs, what a stop changes."""

import gc
import itertools
import json
import os
import pathlib
import shutil
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest

from mlm_jax import cli
from mlm_jax.cli import main
from mlm_jax.inference import open_run
from mlm_jax.score import PseudoLikelihood
from mlm_jax.workdir import Workdir

SMOKE = str(pathlib.Path(__file__).resolve().parents[1] / "configs" / "smoke.py")
TINY = (
    "model.num_layers=1",
    "model.embed_dim=32",
    "model.mlp_dim=64",
    "model.vocab_size=512",
    "model.max_positions=48",
    "tokenizer.vocab_size=400",
    "tokenizer.algorithm=bpe",
    "optimizer.warmup_steps=4",
    "stages[0].steps=20",
    "stages[0].seq_len=32",
    "stages[0].batch_size=16",
    "train.log_every=3",
    "train.checkpoint_every=8",
    "evaluation.every=10",
    "evaluation.max_rows=24",
)
TEXT = "The {0} river rises in the {1} hills and flows past {2} towns before it meets the {3} sea."
WORDS = ["northern", "old", "quiet", "stone", "green", "white", "upper", "lower", "seven", "cold"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "rivers.jsonl"
    with file.open("w") as lines:
        for index in range(400):
            words = (WORDS[(index * step + step) % len(WORDS)] for step in (1, 3, 7, 9))
            lines.write(json.dumps({"text": f"{index}. {TEXT.format(*words)}"}) + "\n")
    return f"files:{file}?field=text"


@pytest.fixture(scope="module")
def train(source):
    """Trains in a workdir with the tiny recipe and more overrides, and returns the exit status."""

    def run(workdir: pathlib.Path, *overrides: str, options: tuple[str, ...] = ()) -> int:
        fields = (f"data.source={source}", *TINY, *overrides)
        return main(
            ["train", "--config", SMOKE, "--workdir", str(workdir), *options, *(f"--config.{field}" for field in fields)]
        )

    return run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, train) -> pathlib.Path:
    path = tmp_path_factory.mktemp("run") / "whole"
    assert train(path) == 0
    return path


def metrics(workdir: pathlib.Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "mfu")} for line in lines]


def parameters(workdir: pathlib.Path) -> tuple[list[np.ndarray], int]:
    with open_run(workdir) as run:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(run.params)], run.step


def last_json(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_run_logs_evaluates_and_saves(workdir):
    lines = metrics(workdir)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [3, 6, 9, 12, 15, 18, 20]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [10, 20]
    assert lines[0]["loss"] > lines[-2]["loss"]
    assert len(lines[-1]["probes"]) == 3
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [16, 20]


def test_every_later_verb_needs_the_workdir_alone(workdir, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(workdir, moved, ignore=shutil.ignore_patterns("data"))
    assert main(["evaluate", "--workdir", str(moved), "--json"]) == 0
    found, logged = last_json(capsys), metrics(workdir)[-1]
    assert found["step"] == 20 and found["tokens"] == logged["tokens"]
    assert found["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert main(["fill-mask", "--workdir", str(moved), "--json", "--top-k=3", "The [MASK] river meets the [MASK]."]) == 0
    assert [len(mask) for mask in last_json(capsys)["fills"][0]["masks"]] == [3, 3]
    pairs = tmp_path / "pairs.jsonl"
    both = [(f"The {one} river", f"The {other} river") for one, other in itertools.combinations(WORDS, 2)]
    pairs.write_text("".join(json.dumps({"sentence_good": a, "sentence_bad": b}) + "\n" for a, b in both))
    assert main(["score", "--workdir", str(moved), "--pairs", str(pairs), "--json"]) == 0
    accuracy = last_json(capsys)["accuracy"]
    with open_run(moved) as run:
        first, second = PseudoLikelihood(run)([sentence for pair in both for sentence in pair]).reshape(-1, 2).T
    assert accuracy == {"pairs": (first > second).mean()} and 0 < accuracy["pairs"] < 1
    assert main(["report", "--workdir", str(moved)]) == 0
    assert "<html" in (moved / "report.html").read_text()


@pytest.mark.parametrize(
    ("overrides", "own"),
    [
        pytest.param(
            ("objective=span", "masking.policy=span", "masking.rate=0.25"),
            ["sbo", "sbo_accuracy"],
            id="span",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("masking.policy=pmi", "masking.schedule=linear", "masking.final_rate=0.3"), [], id="pmi", marks=pytest.mark.slow
        ),
    ],
)
def test_another_objective_and_policy_by_the_config_alone(train, tmp_path, capsys, overrides, own):
    if "masking.policy=pmi" in overrides:
        (tmp_path / "list.txt").write_text("meets the\npast seven towns\n")
        overrides = (*overrides, f"masking.ngrams={tmp_path / 'list.txt'}")
    assert train(tmp_path / "run", "stages[0].steps=9", *overrides) == 0
    lines = [line for line in metrics(tmp_path / "run") if line["kind"] == "train"]
    assert all(name in line for line in lines for name in ("accuracy", *own))
    assert lines[-1]["loss"] < lines[0]["loss"]
    # The first line has steps 0 to 2, the last 6 to 8, of a rate that goes from 15% to 30% in nine.
    shares = lines[0]["predicted"], lines[-1]["predicted"]
    assert shares == pytest.approx((0.167, 0.267), abs=0.02) if "pmi" in str(overrides) else shares[0] > 0.25
    capsys.readouterr()
    (tmp_path / "list.txt").unlink(missing_ok=True)
    assert main(["evaluate", "--workdir", str(tmp_path / "run"), "--json"]) == 0
    output = capsys.readouterr().out
    assert all(f"\n{name} " in output for name in own) and json.loads(output.splitlines()[-1]).keys() >= {"loss", *own}
    assert main(["fill-mask", "--workdir", str(tmp_path / "run"), "--json", "--top-k=3", "The [MASK] river."]) == 0
    assert len(last_json(capsys)["fills"][0]["masks"][0]) == 3


@pytest.mark.parametrize(
    ("objective", "losses", "measure"),
    [("diffusion", ("loss",), "bound"), pytest.param("hybrid", ("masked", "causal"), "causal", marks=pytest.mark.slow)],
)
def test_other_objectives_train_are_measured_fill_and_generate(objective, losses, measure, train, tmp_path, capsys):
    path = tmp_path / objective
    assert train(path, f"objective={objective}", "hybrid.causal_share=0.25", "evaluation.every=0") == 0
    lines = [line for line in metrics(path) if line["kind"] == "train"]
    assert all(lines[0][name] > lines[-1][name] > 0 for name in losses)
    capsys.readouterr()
    assert main(["evaluate", "--workdir", str(path), "--json"]) == 0
    found = last_json(capsys)
    bits = found[f"{measure}_bits_per_token"]
    assert 2**bits == pytest.approx(found[f"{measure}_perplexity"]) and 0 < bits < 10
    assert metrics(path)[-1][f"{measure}_bits_per_token"] == pytest.approx(bits, rel=1e-5)
    assert main(["fill-mask", "--workdir", str(path), "--json", "The [MASK] river meets the [MASK]."]) == 0
    assert [len(mask) for mask in last_json(capsys)["fills"][0]["masks"]] == [5, 5]
    command = ["generate", "--workdir", str(path), "--json", "--count=2", "--seed=3"]
    assert main([*command, "--prompt", "The [MASK:3] river", "--steps=2", "--method=ancestral"]) == 0
    first = last_json(capsys)
    assert len(set(first["samples"])) == 2 and all("river" in text and "[MASK]" not in text for text in first["samples"])
    assert (first["caution"] == "") == (objective == "diffusion")
    assert main([*command, "--prompt", "The [MASK:3] river", "--steps=2", "--method=ancestral"]) == 0
    assert last_json(capsys) == first
    status = main([*command, "--prompt", "The old", "--length=6", "--method=causal", "--temperature=0.5"])
    if objective == "hybrid":
        assert status == 0 and all(text.startswith("The old") for text in last_json(capsys)["samples"])
    else:
        assert status == 2
        one_message(capsys, "method causal needs a run with objective='hybrid'")


def test_a_profile_of_the_steps_asked_for(train, tmp_path):
    assert train(tmp_path / "run", "stages[0].steps=8", options=("--profile=3:4",)) == 0
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    steps = {
        dict(event.stats).get("step_num")
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    }
    assert steps == {3, 4}


def test_evaluation_on_another_source(workdir, source, capsys):
    assert main(["evaluate", "--workdir", str(workdir), "--source", source, "--seq-len=24", "--json"]) == 0
    assert last_json(capsys)["seq_len"] == 24


def test_prepare_shows_the_words_and_tokens_of_each_split(workdir, source, capsys):
    overrides = [f"--config.{field}" for field in (f"data.source={source}", *TINY)]
    assert main(["prepare", "--config", SMOKE, "--out", str(workdir / "data"), *overrides]) == 0  # made by the fixture
    lines = capsys.readouterr().out.splitlines()
    texts = [json.loads(line)["text"] for line in pathlib.Path(source[6:].partition("?")[0]).read_text().splitlines()]
    counted = {name: [int(number.replace(",", "")) for number in numbers] for name, *numbers in map(str.split, lines[1:])}
    assert lines[0].split() == ["split", "documents", "words", "tokens"] and counted.keys() == {"train", "validation"}
    assert [a + b for a, b in zip(*counted.values(), strict=True)][:2] == [len(texts), sum(len(t.split()) for t in texts)]


@pytest.mark.slow
def test_no_more_passes_than_are_allowed(workdir, train, tmp_path, capsys):
    found = json.loads((workdir / "data" / "manifest.json").read_text())["rows"]["32"]["train"]["rows"]
    steps, options = 2 * found // 16, ("--data", str(workdir / "data"))
    for change in ("stages[0].steps=1", f"stages[0].steps={steps}"):
        assert train(tmp_path / change[-2:], change, "train.max_epochs=2", "evaluation.every=0", options=options) == 0
    capsys.readouterr()
    assert train(tmp_path / "more", f"stages[0].steps={steps + 1}", "train.max_epochs=2", options=options) == 2
    assert f"times over the {found} training rows" in (message := capsys.readouterr().err)
    assert "train.max_epochs=2" in message and not (tmp_path / "more" / "checkpoints").exists()


def test_a_finished_run_is_left_as_it_is(workdir, train):
    before = (workdir / "metrics.jsonl").read_bytes(), parameters(workdir)[0]
    assert train(workdir) == 0
    assert (workdir / "metrics.jsonl").read_bytes() == before[0]
    for one, other in zip(before[1], parameters(workdir)[0], strict=True):
        np.testing.assert_array_equal(one, other)


def test_sigterm_saves_and_the_same_command_ends_as_if_nothing_had_been(workdir, train, tmp_path, capsys):
    interrupted = tmp_path / "interrupted"

    def interrupt() -> None:
        file = interrupted / "metrics.jsonl"
        while not (file.exists() and file.read_bytes().count(b"\n") >= 2):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    status = train(interrupted)
    thread.join()
    assert status == 128 + signal.SIGTERM
    assert "is saved, the same command continues" in capsys.readouterr().err
    step = parameters(interrupted)[1]
    assert 6 <= step < 20
    assert train(interrupted) == 0
    assert metrics(interrupted) == metrics(workdir)
    for one, other in zip(parameters(workdir)[0], parameters(interrupted)[0], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_stages_of_two_lengths_and_accumulation_make_one_run(train, tmp_path, capsys):
    path = tmp_path / "stages"
    recipe = tmp_path / "two.py"
    recipe.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    stages = ({'steps': 4, 'seq_len': 32, 'batch_size': 16}, "
        "{'steps': 3, 'seq_len': 48, 'batch_size': 16, 'accumulation': 2, 'mask_rate': 0.3})\n"
        "    return ml_collections.ConfigDict({'name': 'two', 'stages': stages})\n"
    )
    source_and_model = [field for field in TINY if not field.startswith("stages")]
    with_data = [f"--config.{field}" for field in source_and_model]
    file = tmp_path / "text.txt"
    file.write_text("\n".join(TEXT.format(*WORDS[i % 7 : i % 7 + 4]) + f" {i}" for i in range(300)))
    uri = f"--config.data.source=files:{file}?documents=line"
    assert main(["train", "--config", str(recipe), "--workdir", str(path), uri, *with_data]) == 0
    stages = [line["stage"] for line in metrics(path) if line["kind"] == "train"]
    assert stages == sorted(stages) and set(stages) == {0, 1}
    assert Workdir(path).read_validation(48)["tokens"].shape[1] == 48


def test_a_run_that_diverges_stops_with_its_last_good_checkpoint(train, tmp_path, capsys):
    overrides = (
        "optimizer.learning_rate=1e30",
        "optimizer.warmup_steps=0",
        "train.max_nonfinite=2",
        "optimizer.clip_norm=0",
    )
    assert train(tmp_path / "run", *overrides) == 1
    message = capsys.readouterr().err
    assert "updates in a row were skipped" in message and "learning_rate" in message
    assert metrics(tmp_path / "run")[-1]["skipped"] > 0


def one_message(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mlm-jax: ")]
    assert len(errors) == 1 and all(part in errors[0] for part in parts), errors


MISTAKES = [
    (["trian"], ["invalid choice: 'trian'"]),
    (["train", "--config", SMOKE], ["--workdir"]),
    (["train", "--config", SMOKE, "--workdir", "w", "--profle=1:2"], ["--profle", "did you mean --profile?"]),
    (["train", "--config", SMOKE, "--workdir", "w", "--profile=3"], ["--profile=3", "FIRST:LAST"]),
    (["train", "--config", "configs/smok.py", "--workdir", "w"], ["no config file configs/smok.py"]),
    (
        ["train", "--config", SMOKE, "--workdir", "w", "--config.optimizer.learning_rat=1"],
        ["'optimizer.learning_rat'", "did you mean 'learning_rate'?"],
    ),
    (
        ["prepare", "--config", SMOKE, "--out", "c", "--beam-options=--runner=X"],
        ["--beam-options=--runner=X", "--runner beam"],
    ),
    (["prepare", "--config", SMOKE, "--out", "c", "--runner=beam", "--workers=2"], ["--workers=2", "direct_num_workers=2"]),
    (["evaluate", "--workdir", "nowhere"], ["nowhere is not a run's workdir"]),
    (["evaluate", "--workdir", "w", "--config.seed=1"], ["takes no --config."]),
    (["fill-mask", "--workdir", "nowhere", "a [MASK]"], ["nowhere is not a run's workdir"]),
    (["generate", "--workdir", "nowhere", "--steps=2"], ["nowhere is not a run's workdir"]),
    (["generate", "--workdir", "nowhere", "--steps=x"], ["--steps", "'x'"]),
    (["score", "--workdir", "w", "--pairs", "none*.jsonl"], ["no file matches 'none*.jsonl'"]),
    (["report", "--workdir", "nowhere"], ["nowhere"]),
]


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES, ids=[" ".join(a[:1] + a[-1:]) for a, _ in MISTAKES])
def test_a_mistake_is_one_message_and_status_2(arguments, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    one_message(capsys, *parts)
    assert not list(tmp_path.iterdir())


SOURCE_MISTAKES = [
    ("nothing*.jsonl", None, ["nothing*.jsonl"]),
    ("empty.txt", b"", ["empty.txt"]),
    ("binary.txt", bytes(range(256)) * 4, ["binary.txt", "UTF-8"]),
    ("field.jsonl", b'{"body": "x"}\n', ["'text'"]),
    ("broken.jsonl", b'{"text": \n', ["broken.jsonl"]),
]


@pytest.mark.parametrize(("name", "content", "parts"), SOURCE_MISTAKES, ids=[name for name, *_ in SOURCE_MISTAKES])
def test_a_source_that_cannot_be_used(name, content, parts, train, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert train(tmp_path / "run", f"data.source=files:{tmp_path / name}") == 2
    one_message(capsys, *parts)


def test_a_batch_that_the_mesh_cannot_divide(train, tmp_path, capsys):
    assert train(tmp_path / "run", "stages[0].batch_size=12") == 2
    one_message(capsys, "12 rows", "multiple of 8")
    assert train(tmp_path / "run", "sharding.data=3") == 2
    one_message(capsys, "does not multiply out to the 8 devices")


def test_a_tokenizer_larger_than_the_model(workdir, train, tmp_path, capsys):
    given = ("tokenizer.algorithm=pretrained", f"tokenizer.path={workdir / 'tokenizer'}", "model.vocab_size=128")
    assert train(tmp_path / "run", *given, "tokenizer.vocab_size=128") == 2
    one_message(capsys, "400 ids", "model.vocab_size=128", "512")


def test_a_workdir_of_another_config_is_left_alone(workdir, train, capsys):
    before = (workdir / "config.json").read_bytes()
    assert train(workdir, "optimizer.learning_rate=0.5") == 2
    one_message(capsys, "another config", "optimizer.learning_rate: 0.003 -> 0.5")
    assert (workdir / "config.json").read_bytes() == before


def test_a_config_may_be_corrected_until_the_run_has_begun(train, tmp_path, capsys):
    """The first mistake is found when the corpus is opened, after the config was written."""
    run = tmp_path / "run"
    assert train(run, "model.vocab_size=99000", "tokenizer.vocab_size=99000") == 2
    one_message(capsys, "tokenizer.vocab_size=99000 cannot be trained on this sample: it has too little text")
    assert train(run) == 0


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/no/directory"])
def test_a_workdir_that_cannot_be_made(place, train, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert train(tmp_path / place) == 2
    one_message(capsys, "no directory can be made there")


def test_an_interrupt_that_a_callback_swallowed_is_repeated(monkeypatch):
    """As JAX's callback of the garbage collector does: an exception there goes to sys.unraisablehook and no further."""
    monkeypatch.setattr(sys, "unraisablehook", cli._interrupt_again)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    pending = [None]

    def interrupted(*_):
        if pending:
            pending.clear()
            signal.raise_signal(signal.SIGINT)

    gc.callbacks.append(interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            [gc.collect(), time.sleep(10)]
        assert not pending
    finally:
        gc.callbacks.remove(interrupted)
        signal.signal(signal.SIGINT, before)


def test_a_bucket_which_has_no_locks_is_told_once(caplog):
    with Workdir("gs://bucket/run").lock():
        pass
    assert caplog.messages == [
        "gs://bucket/run has no lock: a second run that trains there would overwrite this one's files"
    ]


def test_two_runs_do_not_share_a_workdir(workdir, train, capsys):
    with Workdir(workdir).lock():
        assert train(workdir) == 2
    one_message(capsys, "another process is training")


def test_texts_that_cannot_be_filled(workdir, capsys):
    assert main(["fill-mask", "--workdir", str(workdir), "no mask here"]) == 2
    one_message(capsys, "no [MASK] in 'no mask here'")
    assert main(["fill-mask", "--workdir", str(workdir), "[MASK]" * 60]) == 2
    one_message(capsys, "exceeds the model's 48 positions")


def test_pairs_that_are_none(workdir, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"sentence_good": "a"}\n')
    assert main(["score", "--workdir", str(workdir), "--pairs", str(file)]) == 2
    one_message(capsys, "pairs.jsonl:1", "sentence_bad")


def test_a_run_without_a_checkpoint(workdir, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(workdir, bare, ignore=shutil.ignore_patterns("data", "checkpoints"))
    assert main(["evaluate", "--workdir", str(bare)]) == 2
    one_message(capsys, "no checkpoint yet")


def test_a_truncated_checkpoint_is_a_fault_of_the_machine(workdir, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(workdir, damaged, ignore=shutil.ignore_patterns("data"))
    for file in (damaged / "checkpoints" / "20").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            os.truncate(file, file.stat().st_size // 2)
    assert main(["evaluate", "--workdir", str(damaged)]) == 1
    one_message(capsys, "checkpoint 20")
