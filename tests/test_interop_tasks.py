"""Fine-tuned models of Hugging Face become runs that `predict` reads, with the same probabilities, tags and answers."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from interop_runs import MODERNBERT
from test_finetune_export import TRANSFORM, write_task

from mlm_jax.cli import main
from mlm_jax.config import ShardingConfig
from mlm_jax.errors import UserError
from mlm_jax.finetune.predict import predict
from mlm_jax.inference import read_params
from mlm_jax.interop.load import import_folder
from mlm_jax.interop.save import export_run
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import make_task
from mlm_jax.sharding import make_mesh
from mlm_jax.workdir import Workdir

FAMILIES = {
    "electra": {"table_dim": 16, "num_token_types": 2, "activation": "gelu_erf"},
    "distilbert": {"activation": "relu"},
    "modernbert": MODERNBERT,
}
HEADS = {
    ("electra", "regression"): {"activation": "gelu_erf"},
    ("modernbert", "classification"): TRANSFORM | {"pooling": "mean", "activation": "gelu_tanh", "dropout": 0.25},
    ("modernbert", "regression"): TRANSFORM | {"transform_bias": True},
    ("modernbert", "tagging"): TRANSFORM | {"activation": "tanh"},
    ("modernbert", "question_answering"): TRANSFORM | {"dropout": 0.0},
}


def params_of(path) -> dict:
    """The parameters of a fine-tuned run by their paths."""
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        cfg = Workdir(path).read_config()
        params, _ = read_params(Workdir(path), make_task(cfg, Compute.resolve(cfg.compute)))
        return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize(
    ("family", "objective"),
    [*HEADS, ("distilbert", "question_answering")],
)
def test_a_run_of_ours_there_and_back(family, objective, tmp_path):
    write_task(tmp_path / "run", objective, HEADS.get((family, objective)), **FAMILIES[family])
    export_run(tmp_path / "run", tmp_path / "out", model_type=family)
    result = import_folder(tmp_path / "out", tmp_path / "again")
    assert (result["objective"], result["model_type"], result["recipe"]) == (objective, family, "")
    before, after = (Workdir(tmp_path / path).read_config() for path in ("run", "again"))
    names = ("labels", "activation", "transform", "transform_bias", "pooling", "dropout")
    assert {name: getattr(after.task, name) for name in names} == {name: getattr(before.task, name) for name in names}
    old, new = params_of(tmp_path / "run"), params_of(tmp_path / "again")
    assert old.keys() == new.keys()
    assert all(old[name].tobytes() == new[name].tobytes() for name in old)


def test_tags_in_another_order(tmp_path):
    """Of which one is not there, as B- in models trained on IOB."""
    write_task(tmp_path / "run", "tagging")
    export_run(tmp_path / "run", tmp_path / "out")
    theirs = ["I-Y", "B-X", "O", "B-Y"]  # ours are O, B-X, I-X, B-Y, I-Y
    file, weights = tmp_path / "out" / "config.json", tmp_path / "out" / "model.safetensors"
    config, tensors = json.loads(file.read_text()), safetensors.numpy.load_file(weights)
    places = [4, 1, 0, 3]
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name][places]
    safetensors.numpy.save_file(tensors, weights)
    file.write_text(json.dumps(config | {"id2label": dict(enumerate(theirs))}))
    import_folder(tmp_path / "out", tmp_path / "again")
    labels = Workdir(tmp_path / "again").read_config().task.labels
    assert labels == ("Y", "X")  # so O, B-Y, I-Y, B-X, I-X
    old, new = params_of(tmp_path / "run"), params_of(tmp_path / "again")
    np.testing.assert_array_equal(new["['head']['output_DC']"][:, :4], old["['head']['output_DC']"][:, [0, 3, 4, 1]])
    assert new["['head']['output_bias_C']"][4] == -1e4 and not new["['head']['output_DC']"][:, 4].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": ["BertForMultipleChoice"]},
            "has architectures=\\['BertForMultipleChoice'\\], whose head is not kn",
        ),
        (
            {"architectures": ["RobertaForSequenceClassification"]},
            "whose head is not known here: of bert those for pre-train",
        ),
        (
            {"problem_type": "multi_label_classification"},
            "problem_type='multi_label_classification', and here a text has one",
        ),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label=.* whose ids are not 0, 1"),
        (
            {"id2label": {"0": "a", "1": "b"}},
            "the tensor classifier.weight is \\[3, 32\\], and by config.json it is \\[2, 32\\]",
        ),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "task.labels has \\['a'\\] twice"),
        ({"architectures": ["BertForTokenClassification"]}, "has the tag 'bad' in id2label, and tags here are O, B-"),
        (
            {"architectures": ["BertForMaskedLM"]},
            "the tensor classifier.bias is unexpected in a bert of 2 layers with the head that it has",
        ),
    ],
)
def test_heads_that_cannot_be_imported(fields, message, folder, tmp_path):
    assert_refused(folder, fields, message, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classifier_pooling": "max"}, "has classifier_pooling='max', and only cls, mean are computed here"),
        ({"classifier_activation": "mish"}, "has classifier_activation='mish', and only gelu, .*tanh are computed here"),
        ({"classifier_activation": ["gelu"]}, r"has classifier_activation=\['gelu'\], and only gelu"),
        ({"classifier_bias": "yes"}, "has classifier_bias='yes', which is neither true nor false"),
        ({"classifier_bias": True}, "the tensor head.dense.bias is missing"),
        ({"classifier_dropout": 1.5}, "has classifier_dropout=1.5, which is no share of 0 to below 1"),
        ({"norm_bias": True}, r"the tensor model\.\S+norm.bias is missing"),
        (
            {"architectures": ["ModernBertForMultipleChoice"]},
            "whose head is not known here: of modernbert those for pre-train",
        ),
        ({"architectures": ["ModernBertForQuestionAnswering"]}, r"classifier.weight is \[3, 32\], .* it is \[2, 32\]"),
        ({"architectures": ["ModernBertForMaskedLM"]}, "the tensor decoder.bias is missing"),
    ],
)
def test_heads_of_modernbert_that_cannot_be_imported(fields, message, modern_folder, tmp_path):
    assert_refused(modern_folder, fields, message, tmp_path)


def test_heads_of_neobert_cannot_be_imported(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "neobert", "architectures": ["NeoBERTForSequenceClassification"]})
    )
    with pytest.raises(UserError, match=r"heads of tasks are read of bert, .*, modernbert only"):
        import_folder(tmp_path, tmp_path / "workdir")


def assert_refused(folder, fields, message, base):
    """That the folder with other fields in its config.json cannot be imported, for this reason, and leaves nothing."""
    config = json.loads((folder / "config.json").read_text())
    for file in folder.iterdir():
        (base / "folder").mkdir(exist_ok=True)
        (base / "folder" / file.name).symlink_to(file)
    (base / "folder" / "config.json").unlink()
    (base / "folder" / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UserError, match=message):
        import_folder(base / "folder", base / "workdir")
    assert not (base / "workdir").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported classifier of texts."""
    base = tmp_path_factory.mktemp("classifier")
    write_task(base / "run", "classification")
    export_run(base / "run", base / "out")
    return base / "out"


@pytest.fixture(scope="module")
def modern_folder(tmp_path_factory):
    """The same of ModernBERT."""
    base = tmp_path_factory.mktemp("modern")
    write_task(base / "run", "classification", TRANSFORM, **MODERNBERT)
    export_run(base / "run", base / "out")
    return base / "out"


def test_by_the_command_line(folder, tmp_path, capsys):
    """Columns that the folder cannot know are told on import; what it does know is not."""
    arguments = ["import", "--from", str(folder), "--workdir", str(tmp_path / "run")]
    assert main([*arguments, "--config.task.labels=('a','b','c')"]) == 2
    assert "--config.task.labels cannot be set here: of an imported network these can" in capsys.readouterr().err
    assert main([*arguments, "--config.task.text=review", "--config.stages[0].seq_len=16"]) == 0
    assert f"for labels, tags or answers: mlm-jax predict --workdir {tmp_path}/run" in capsys.readouterr().out
    (tmp_path / "in.tsv").write_text("review\tlabel\nthe cat sat\tgood\na dog\tbad\n")
    assert main(["predict", "--workdir", str(tmp_path / "run"), "--input", str(tmp_path / "in.tsv")]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(each["probabilities"]) for each in found] == [["bad", "good", "so so"]] * 2
    assert main(["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "again")]) == 0
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


PAIRS = (("the cat", "a dog"), ("the mat", "old"))


@pytest.mark.peer
@pytest.mark.parametrize(
    "name",
    ["BERT", "RoBERTa", "DistilBERT", *(pytest.param(n, marks=pytest.mark.slow) for n in ("XLM-R", "ELECTRA generator"))],
)
def test_a_classifier_of_pairs_gives_the_same_probabilities(name, tmp_path):
    """From two texts on: so the pieces, what stands between the texts and their types are the same too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import interop_parity as parity

    labels = dict(enumerate("xyz"))
    model = parity.build(name, tmp_path / "theirs", ending="ForSequenceClassification", num_labels=3, id2label=labels)
    lines = [json.dumps({"text": text, "other": other}) for text, other in PAIRS]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    import_folder(tmp_path / "theirs", tmp_path / "run", overrides=["task.pair=other", "stages[0].seq_len=24"])
    found, _, _ = predict(tmp_path / "run", str(tmp_path / "in.jsonl"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    for each, pair in zip(found, PAIRS, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(*pair, return_tensors="pt")).logits[0]
        np.testing.assert_allclose(list(each["probabilities"].values()), logits.softmax(-1).numpy(), atol=1e-5)
