"""Fine-tuning from end to end on tiny runs: it learns, chooses, stops and resumes; predictions; and what a mistake costs."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from interop_runs import MODERNBERT, small_tokenizer, write_random_run
from interop_runs import config as pretrained_config

from mlm_jax.cli import main
from mlm_jax.config import ModelConfig, ShardingConfig, load_config
from mlm_jax.finetune.job import Finetuning, finetune
from mlm_jax.finetune.predict import predict
from mlm_jax.finetune.prepare import prepare
from mlm_jax.inference import open_run, read_params
from mlm_jax.interop.load import write_run
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import make_objective, make_task
from mlm_jax.sharding import make_mesh
from mlm_jax.train.optimizer import make_optimizer
from mlm_jax.train.state import init_state
from mlm_jax.workdir import Workdir

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORDS = ("the", "house", "dog", "cat", "old", "mat", "and", "ran")
SETTINGS = (
    "task.epochs=0",
    "task.dropout=0.0",
    "task.buckets=(16,)",
    "optimizer.learning_rate=0.01",
    "optimizer.bias_correction=True",
    "stages[0].batch_size=16",
    "stages[0].seq_len=24",
    "stages[0].steps=40",
    "train.log_every=10",
    "train.checkpoint_every=10",
    "train.keep_checkpoints=4",
    "evaluation.every=10",
    "evaluation.batch_size=16",
    "compute.layers=scan",
)


def sentences(count: int, seed: int) -> list[str]:
    """Of four to eight words; whether "cat" is among them can be learned."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(4, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A run at its beginning, and the files of every task."""
    path = tmp_path_factory.mktemp("tasks")
    cfg = pretrained_config(max_positions=64, init_std=0.1)
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        objective = make_objective(cfg, Compute.resolve(cfg.compute))
        write_run(Workdir(path / "run"), cfg, small_tokenizer(), objective, objective.init(jax.random.key(7)))
    for name, count, seed in (("train", 160, 0), ("dev", 48, 1)):
        texts = sentences(count, seed)
        label = ["yes" if "cat" in text.split() else "no" for text in texts]
        rows = [f"{text}\t{answer}\t{text.split().count('cat')}" for text, answer in zip(texts, label, strict=True)]
        (path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel\tcats", *rows]) + "\n")
        tagged = [
            "".join(f"{word}\t{'B-animal' if word in ('cat', 'dog') else 'O'}\n" for word in text.split()) for text in texts
        ]
        (path / f"{name}.conll").write_text("\n".join(tagged))
        paragraphs = [
            {
                "context": text,
                "qas": [
                    {"id": str(index), "question": "cat", "answers": [{"text": "cat", "answer_start": text.index("cat")}]}
                ],
            }
            for index, text in enumerate(texts)
            if "cat" in text
        ]
        (path / f"{name}.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return path


def arguments(folder: pathlib.Path, recipe: str = "finetune_sst2", suffix: str = "tsv", *overrides: str) -> list[str]:
    overrides = ("task.pooling=mean", *overrides) if recipe == "finetune_sst2" else overrides
    fields = [
        *SETTINGS,
        f"task.train={folder}/train.{suffix}",
        f"task.dev={folder}/dev.{suffix}",
        "task.labels=()",
        *overrides,
    ]
    return [
        "--config",
        str(ROOT / "configs" / f"{recipe}.py"),
        "--init",
        str(folder / "run"),
        *(f"--config.{f}" for f in fields),
    ]


def load(folder: pathlib.Path, *overrides: str):
    given = arguments(folder, "finetune_sst2", "tsv", *overrides)
    fields = [argument.removeprefix("--config.") for argument in given if argument.startswith("--config.")]
    return load_config(given[1], [*fields, f"init_from={folder / 'run'}"], for_task=True)


@pytest.fixture(scope="module")
def tuned(folder) -> pathlib.Path:
    """A finished run."""
    assert main(["finetune", *arguments(folder), "--workdir", str(folder / "tuned")]) == 0
    return folder / "tuned"


def evaluations(workdir: pathlib.Path) -> list[dict]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "eval"]


def losses(workdir: pathlib.Path) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_it_learns_and_predict_measures_what_training_measured(folder, tuned, capsys, tmp_path):
    found = evaluations(tuned)
    best = max(found, key=lambda line: line["accuracy"])
    assert best["accuracy"] > 0.8 and losses(tuned)[-1] < losses(tuned)[0]
    cfg = Workdir(tuned).read_config()
    assert cfg.task.labels == ("no", "yes") and cfg.model.embed_dim == 32 and cfg.task.metric == "accuracy"
    out = tmp_path / "found.jsonl"
    assert main(["predict", "--workdir", str(tuned), "--input", f"{folder}/dev.tsv", "--output", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["accuracy"] == pytest.approx(best["accuracy"]) and result["step"] == best["step"]
    predictions = list(map(json.loads, out.read_text().splitlines()))
    rows = [line.split("\t") for line in (folder / "dev.tsv").read_text().splitlines()[1:]]
    right = [found["label"] == row[1] for found, row in zip(predictions, rows, strict=True)]
    assert np.mean(right) == pytest.approx(best["accuracy"])
    assert sum(predictions[0]["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)


def test_texts_without_labels_are_predicted_and_not_measured(folder, tuned, capsys, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"sentence": "the old cat"}\n{"sentence": "the old house and the mat"}\n')
    assert main(["predict", "--workdir", str(tuned), "--input", str(tmp_path / "texts.jsonl")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [sorted(json.loads(line)) for line in lines] == [["label", "probabilities"]] * 2


def test_it_begins_with_the_encoder_or_with_random_parameters(folder):
    for random_init in (False, True):
        prepared = prepare(load(folder, f"task.random_init={random_init}"))
        with jax.set_mesh(make_mesh(ShardingConfig())), open_run(folder / "run") as run:
            job = Finetuning(prepared)
            names = job.objective.loss_names + job.objective.metric_names
            drawn = init_state(job.objective.init(jax.random.key(0)), make_optimizer(prepared.cfg), ema=False, names=names)
            begun = job.begin(drawn)
            equal = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), begun.params["encoder"], run.params["encoder"])
            assert all(jax.tree.leaves(equal)) is not random_init


def test_a_run_that_was_stopped_ends_as_one_left_alone(folder, tuned, tmp_path):
    """It is stopped behind step 20 by taking away all that came later."""
    again = tmp_path / "again"
    shutil.copytree(tuned, again)
    kept = sorted(int(path.name) for path in (again / "checkpoints").iterdir())
    for step in kept:
        if step > 20:
            shutil.rmtree(again / "checkpoints" / str(step))
    assert 20 in kept
    assert main(["finetune", *arguments(folder), "--workdir", str(again)]) == 0
    whole, resumed = (Workdir(path) for path in (tuned, again))
    timings = ("tokens_per_second", "mfu")
    lines = [
        [
            {name: value for name, value in json.loads(line).items() if name not in timings}
            for line in (path.path / "metrics.jsonl").read_text().splitlines()
        ]
        for path in (whole, resumed)
    ]
    assert lines[0] == lines[1]
    with jax.set_mesh(make_mesh(ShardingConfig())):
        cfg = whole.read_config()
        task = make_task(cfg, Compute.resolve(cfg.compute))
        a, b = (read_params(workdir, task) for workdir in (whole, resumed))
    assert a[1] == b[1]
    jax.tree.map(np.testing.assert_array_equal, a[0], b[0])


def test_a_finished_run_is_not_trained_again(folder, tuned, capsys):
    before = (tuned / "metrics.jsonl").read_text()
    assert main(["finetune", *arguments(folder), "--workdir", str(tuned), "--json"]) == 0
    assert (tuned / "metrics.jsonl").read_text() == before
    run = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"][0]
    best = max(evaluations(tuned), key=lambda line: line["accuracy"])
    assert (run["step"], run["accuracy"]) == (best["step"], best["accuracy"])


def test_a_report_says_what_was_fine_tuned(folder, tuned, tmp_path):
    assert main(["report", "--workdir", str(tuned), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert f"Fine-tuning on {folder}/train.tsv" in page and "pre-training" not in page


def test_another_config_is_refused_in_a_workdir(folder, tuned, capsys):
    assert (
        main(
            ["finetune", *arguments(folder, "finetune_sst2", "tsv", "optimizer.learning_rate=1.0"), "--workdir", str(tuned)]
        )
        == 2
    )
    assert "optimizer.learning_rate" in capsys.readouterr().err


def test_a_mesh_changes_no_result(folder, tmp_path):
    """One device and eight, one of them holding rows of padding."""
    first = [
        finetune(load(folder, *fields, "stages[0].steps=10"), tmp_path / name)["runs"][0]
        for name, fields in {
            "rows": ("sharding.data=8",),
            "divided": ("sharding.data=1", "sharding.fsdp=2", "sharding.tensor=4"),
        }.items()
    ]
    assert first[0]["accuracy"] == first[1]["accuracy"]
    np.testing.assert_allclose(losses(tmp_path / "rows"), losses(tmp_path / "divided"), rtol=2e-5)


def test_patience_ends_a_run_and_the_best_checkpoint_is_kept(folder, tmp_path):
    """At a learning rate of 0 nothing becomes better than the first evaluation."""
    cfg = load(folder, "optimizer.learning_rate=1e-30", "task.patience=2", "evaluation.every=1", "train.keep_checkpoints=1")
    result = finetune(cfg, tmp_path / "run")
    assert result["runs"][0]["step"] == 1
    assert [line["step"] for line in evaluations(tmp_path / "run")] == [1, 2, 3]
    assert sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == [1, 3]
    # The same command again does not go on.
    assert finetune(cfg, tmp_path / "run")["runs"][0]["step"] == 1
    assert len(evaluations(tmp_path / "run")) == 3


@pytest.mark.slow
def test_several_seeds_have_a_mean_and_a_deviation(folder, tmp_path, capsys):
    given = arguments(folder, "finetune_sst2", "tsv", "stages[0].steps=2", "evaluation.every=0")
    assert main(["finetune", *given, "--workdir", str(tmp_path), "--seeds", "2", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    values = [run["accuracy"] for run in result["runs"]]
    assert [run["seed"] for run in result["runs"]] == [0, 1]
    assert result["mean"]["accuracy"] == pytest.approx(np.mean(values))
    assert result["deviation"]["accuracy"] == pytest.approx(np.std(values, ddof=1))
    assert any(line.startswith("mean") for line in out) and any(line.startswith("deviation") for line in out)
    assert losses(tmp_path / "seed0") != losses(tmp_path / "seed1")


@pytest.mark.parametrize(
    ("recipe", "suffix", "measure", "least", "overrides"),
    [
        pytest.param("finetune_wnut17", "conll", "f1", 0.9, ("task.stride=8",), marks=pytest.mark.slow),
        ("finetune_qamr", "json", "exact_match", 0.7, ("stages[0].steps=80", "task.stride=8")),
    ],
)
def test_tags_and_answers_are_learned_too(folder, tmp_path, capsys, recipe, suffix, measure, least, overrides):
    given = arguments(folder, recipe, suffix, "evaluation.every=0", *overrides)
    assert main(["finetune", *given, "--workdir", str(tmp_path / "run"), "--json"]) == 0
    run = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"][0]
    assert run[measure] > least
    source, out = folder / f"dev.{suffix}", tmp_path / "found.jsonl"
    assert main(["predict", "--workdir", str(tmp_path / "run"), "--input", str(source), "--output", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[measure] == pytest.approx(run[measure])


@pytest.fixture(scope="module")
def modern_run(tmp_path_factory) -> pathlib.Path:
    return write_random_run(
        tmp_path_factory.mktemp("modern") / "run", pretrained_config(**MODERNBERT | {"max_positions": 64})
    )


@pytest.mark.parametrize(
    ("overrides", "is_taken"),
    [
        (("task.activation=gelu_erf",), True),
        (("task.activation=tanh",), False),
        (("task.activation=gelu_erf", "task.transform_bias=True"), False),
    ],
)
@pytest.mark.parametrize(("recipe", "suffix"), [("finetune_sst2", "tsv"), ("finetune_wnut17", "conll")])
def test_a_transform_begins_as_that_of_masked_tokens(folder, modern_run, recipe, suffix, overrides, is_taken):
    """If it computes the same; what is behind it is drawn."""
    given = arguments(folder, recipe, suffix, "task.stride=8", "task.transform=True", *overrides)
    fields = [argument.removeprefix("--config.") for argument in given if argument.startswith("--config.")]
    cfg = load_config(given[1], [*fields, f"init_from={modern_run}"], for_task=True)
    with jax.set_mesh(make_mesh(ShardingConfig())), open_run(modern_run) as run:
        job = Finetuning(prepare(cfg))
        names = job.objective.loss_names + job.objective.metric_names
        drawn = init_state(job.objective.init(jax.random.key(0)), make_optimizer(job.cfg), ema=False, names=names)
        before, after = ({**state.params["head"]} for state in (drawn, job.begin(drawn)))
        before, after = (head.get("output", head) for head in (before, after))
        source = run.params["head"]
        expected = {"dense_DD": source["transform_DD"], "norm": source["norm"]} if is_taken else before["transform"]
        assert jax.tree.structure(after["transform"]) == jax.tree.structure(expected)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), after["transform"], expected)))
        assert np.array_equal(after["output_DC"], before["output_DC"])


@pytest.mark.parametrize("pooling", ["cls", pytest.param("mean", marks=pytest.mark.slow)])
def test_a_modernbert_is_fine_tuned_and_exported(folder, modern_run, tmp_path, pooling):
    """And, imported again, predicts the same."""
    fields = ("task.transform=True", "task.activation=gelu_erf", f"task.pooling={pooling}", "stages[0].steps=10")
    given = ["--init", str(modern_run), "--workdir", str(tmp_path / "run")]
    assert main(["finetune", *arguments(folder, "finetune_sst2", "tsv", *fields), *given]) == 0
    assert main(["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["architectures"] == ["ModernBertForSequenceClassification"] and raw["classifier_pooling"] == pooling
    options = ["--config.task.text=sentence", "--config.stages[0].seq_len=24", "--config.task.buckets=(16,)"]
    assert main(["import", "--from", str(tmp_path / "out"), "--workdir", str(tmp_path / "again"), *options]) == 0
    found = [predict(tmp_path / name, f"{folder}/dev.tsv")[0] for name in ("run", "again")]
    before, after = ([list(each["probabilities"].values()) for each in each_run] for each_run in found)
    np.testing.assert_allclose(before, after, atol=1e-5)  # batches and the loop over layers differ


@pytest.mark.slow
def test_a_number_is_learned(folder, tmp_path):
    cfg = load(folder, "task.label=cats", "evaluation.every=0", "stages[0].steps=80", "task.pooling=mean", "task.metric=")
    run = finetune(dataclasses.replace(cfg, objective="regression"), tmp_path)["runs"][0]
    assert run["pearson"] > 0.5


def test_layers_nearer_to_the_text_move_less():
    cfg = load_config(str(ROOT / "configs" / "bert_mini.py"), ["optimizer.layer_decay=0.5", "optimizer.warmup_steps=0"])
    plain = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, layer_decay=1.0))
    params = {
        "encoder": {"embeddings": {"tokens_VD": np.ones((3, 2))}, "layers": {"mlp": {"up_DF": np.ones((4, 2, 2))}}},
        "head": {"output_DC": np.ones((2, 2))},
    }
    grads = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)

    def update(cfg):
        optimizer = make_optimizer(cfg)
        return optimizer.update(grads, optimizer.init(grads), grads, finite=True, grad_norm=1.0)[0]

    ratio = jax.tree.map(lambda a, b: np.asarray(a / b), update(cfg), update(plain))
    np.testing.assert_allclose(ratio["head"]["output_DC"], 1.0, rtol=1e-6)
    by_layer = [0.5**4, 0.5**3, 0.5**2, 0.5]
    np.testing.assert_allclose(ratio["encoder"]["layers"]["mlp"]["up_DF"][:, 0, 0], by_layer, rtol=1e-6)
    np.testing.assert_allclose(ratio["encoder"]["embeddings"]["tokens_VD"], 0.5**5, rtol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("task.dev={folder}/none.tsv",), "no file matches"),
        (("task.label=labels",), "no column 'labels'; there are 'sentence', 'label', 'cats'; did you mean 'label'"),
        (("task.labels=('yes', 'maybe')",), "the label 'no' is not among 'yes', 'maybe'"),
        (("task.pair=other",), "no column 'other'"),
        (("task.metric=acuracy",), "task.metric='acuracy' is none of accuracy, f1, matthews; did you mean 'accuracy'"),
        (
            ("task.class_weights=(1.0, 2.0)",),
            r"task.class_weights=\(1.0, 2.0\) must be positive, one for each of task.labels",
        ),
        (("task.buckets=(32, 16)",), r"task.buckets=\(32, 16\) must be lengths of 8 or more"),
        (("task.dropout=1.0",), r"task.dropout=1.0 must be in \[0, 1\)"),
        (("task.epochs=2", "optimizer.warmup_steps=3"), "give task.warmup, a share of the steps"),
        (("stages[0].seq_len=65",), "exceeds the 64 positions of"),
        (("model.num_layers=3",), "the architecture is that of --init"),
        (("task.pooling=max",), "task.pooling='max' is none of cls, mean"),
        (("task.activation=gelu_erf",), "with 'mean' has none: leave it out, or set task.transform"),
        (
            ("task.transform=True", "task.activation=mish"),
            "task.activation='mish' is none of tanh, gelu_erf, gelu_tanh, relu",
        ),
        (("task.transform_bias=True",), "task.transform_bias=True is for the layer that task.transform adds: set both"),
        (("optimizer.layer_decay=0.0",), r"optimizer.layer_decay=0.0 must be in \(0, 1\]"),
    ],
)
def test_a_mistake_has_one_message(folder, tmp_path, capsys, overrides, message):
    given = arguments(folder, "finetune_sst2", "tsv", *(override.format(folder=folder) for override in overrides))
    assert main(["finetune", *given, "--workdir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error) and error.startswith("mlm-jax: ")
    assert not (tmp_path / "run").exists()


def test_runs_that_do_not_fit_a_verb(folder, tuned, tmp_path, capsys):
    sst2, smoke = (str(ROOT / "configs" / f"{name}.py") for name in ("finetune_sst2", "smoke"))
    run = str(folder / "run")
    for command, message in (
        (["finetune", "--config", sst2, "--workdir", str(tmp_path)], "needs --init"),
        (["finetune", "--config", smoke, "--init", run, "--workdir", str(tmp_path)], "which pre-trains: mlm-jax train"),
        (["train", "--config", sst2, "--workdir", str(tmp_path)], "which fine-tunes: mlm-jax finetune"),
        (
            ["train", "--config", smoke, "--workdir", str(tmp_path / "next"), f"--config.init_from={tuned}"],
            "is fine-tuned for classification: begin with a pre-trained run",
        ),
        (["predict", "--workdir", run, "--input", f"{folder}/dev.tsv"], "not fine-tuned: see mlm-jax finetune"),
        (["fill-mask", "--workdir", str(tuned), "a [MASK]"], "predicts no tokens: see mlm-jax predict"),
        (["finetune", *arguments(folder), "--workdir", str(tmp_path), "--seeds", "0"], "--seeds=0 must be positive"),
        (
            ["finetune", *arguments(folder), "--workdir", str(tmp_path), "--seed", "1"],
            "unknown option --seed; did you mean --seeds",
        ),
        (
            ["predict", "--workdir", str(tuned), "--input", f"{folder}/dev.tsv", "--output", "/none/x"],
            "no file can be made there",
        ),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_tokenizer_that_is_not_the_models_is_refused(folder, tmp_path, capsys):
    broken = tmp_path / "run"
    shutil.copytree(folder / "run", broken)
    raw = json.loads((broken / "config.json").read_text())
    raw["model"]["vocab_size"] = 128
    raw["tokenizer"]["vocab_size"] = 128
    (broken / "config.json").write_text(json.dumps(raw))
    given = [str(broken) if argument == str(folder / "run") else argument for argument in arguments(folder)]
    assert main(["finetune", *given, "--workdir", str(tmp_path / "out")]) == 2
    assert "a tokenizer of" in capsys.readouterr().err and small_tokenizer().vocab_size > 128


def test_recipes_of_tasks_load():
    for path in sorted((ROOT / "configs").glob("finetune_*.py")):
        cfg = load_config(str(path), for_task=True)
        assert cfg.model == ModelConfig() and cfg.name == path.stem
        assert cfg.optimizer.bias_correction == (cfg.name == "finetune_esol")  # the others' settings are BERT's
