"""Fine-tuned runs as folders of `transformers`: its logits are ours, and its labels."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from interop_runs import MODERNBERT, NEOBERT, config, small_tokenizer
from safetensors.numpy import load_file

from mlm_jax.config import ShardingConfig, TaskConfig
from mlm_jax.errors import UserError
from mlm_jax.interop.load import write_run
from mlm_jax.interop.save import export_run
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import make_task
from mlm_jax.sharding import make_mesh
from mlm_jax.workdir import Workdir

KINDS = {
    "classification": ("SequenceClassification", TaskConfig(train="x", labels=("bad", "good", "so so"))),
    "regression": ("SequenceClassification", TaskConfig(train="x")),
    "tagging": ("TokenClassification", TaskConfig(train="x", labels=("X", "Y"))),
    "question_answering": ("QuestionAnswering", TaskConfig(train="x")),
}
FAMILIES = {
    "bert": {"num_token_types": 2},
    "roberta": {"position_offset": 1, "activation": "gelu_erf"},
    "electra": {"table_dim": 16, "activation": "gelu_erf"},
    "modernbert": MODERNBERT,
}
# Of `TaskConfig`: the head that a class of ModernBERT has.
TRANSFORM = {"transform": True, "activation": "gelu_erf"}
LENGTHS = (5, 24, 11)


def write_task(path, objective, head=None, *, compute=False, **fields):
    """A workdir with random parameters, and, to compare with, rows of some lengths and their logits.

    Args:
        head: fields of `TaskConfig`.
        fields: of the model.
    """
    task = dataclasses.replace(KINDS[objective][1], **(head or {}))
    cfg = dataclasses.replace(config(**fields), objective=objective, task=task)
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 250, (8, 24)).astype(np.int32)
    segment_ids = (np.arange(24) < np.resize(LENGTHS, 8)[:, None]).astype(np.int32)
    batch = {"tokens": np.where(segment_ids > 0, tokens, small_tokenizer().pad_id), "segment_ids": segment_ids}
    if objective == "question_answering":
        batch["allowed"] = np.ones_like(tokens)
    with jax.set_mesh(make_mesh(ShardingConfig(data=1), jax.devices()[:1])):
        task = make_task(cfg, Compute.resolve(cfg.compute))
        shapes = jax.eval_shape(task.init, jax.random.key(0))
        params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
        write_run(Workdir(path), cfg, small_tokenizer(), task, params)
        return (batch, np.asarray(jax.jit(task.outputs)(params, batch))) if compute else None


@pytest.mark.parametrize("objective", KINDS)
def test_a_folder_has_the_classes_tensors_and_labels(tmp_path, objective):
    write_task(tmp_path / "run", objective)
    result = export_run(tmp_path / "run", tmp_path / "folder")
    assert result["class"] == f"BertFor{KINDS[objective][0]}" and result["step"] == 0
    raw = json.loads((tmp_path / "folder" / "config.json").read_text())
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    outputs = {"classification": 3, "regression": 1, "tagging": 5, "question_answering": 2}[objective]
    head = "qa_outputs" if objective == "question_answering" else "classifier"
    assert tensors[f"{head}.weight"].shape == (outputs, 32)
    assert ("bert.pooler.dense.weight" in tensors) is (outputs in (1, 3))
    labels = {"classification": ["bad", "good", "so so"], "tagging": ["O", "B-X", "I-X", "B-Y", "I-Y"]}.get(objective)
    assert list(raw.get("id2label", {}).values()) == (labels or [])
    assert raw.get("num_labels", outputs) == outputs


@pytest.mark.parametrize("objective", KINDS)
def test_a_folder_of_modernbert_has_its_transform(tmp_path, objective):
    head = TRANSFORM | {"activation": "tanh", "transform_bias": True, "pooling": "mean", "dropout": 0.25}
    write_task(tmp_path / "run", objective, head, **MODERNBERT)
    result = export_run(tmp_path / "run", tmp_path / "folder")
    assert result["class"] == f"ModernBertFor{KINDS[objective][0]}"
    raw = json.loads((tmp_path / "folder" / "config.json").read_text())
    expected = {"pooling": "mean", "activation": "tanh", "bias": True, "dropout": 0.25}
    assert {name: raw[f"classifier_{name}"] for name in expected} == expected and raw["hidden_activation"] == "gelu"
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    outputs = {"classification": 3, "regression": 1, "tagging": 5, "question_answering": 2}[objective]
    shapes = {name: array.shape for name, array in tensors.items() if not name.startswith("model.")}
    assert shapes == {
        "head.dense.weight": (32, 32),
        "head.dense.bias": (32,),
        "head.norm.weight": (32,),
        "classifier.weight": (outputs, 32),
        "classifier.bias": (outputs,),
    }


@pytest.mark.peer
@pytest.mark.parametrize("objective", KINDS)
@pytest.mark.parametrize("family", [*FAMILIES, "modernbert, mean"])
def test_transformers_computes_the_same(tmp_path, family, objective):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family, _, pooling = family.partition(", ")
    head = TRANSFORM | {"pooling": pooling or "cls"} if family == "modernbert" else {}
    if family == "electra" and objective in ("classification", "regression"):
        head = {"activation": "gelu_erf"}
    batch, ours = write_task(tmp_path / "run", objective, head, compute=True, **FAMILIES[family])
    assert export_run(tmp_path / "run", tmp_path / "folder")["model_type"] == family
    model = getattr(transformers, f"AutoModelFor{KINDS[objective][0]}").from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        found = model(
            input_ids=torch.from_numpy(batch["tokens"]).long(), attention_mask=torch.from_numpy(batch["segment_ids"])
        )
    if objective == "question_answering":
        theirs = torch.stack([found.start_logits, found.end_logits], -1).numpy()
    else:
        theirs = found.logits.numpy().reshape(8, -1, ours.shape[-1])
    real = batch["segment_ids"][:, : ours.shape[1]] > 0
    np.testing.assert_allclose(theirs[real], ours[real], atol=1e-4)


@pytest.mark.parametrize(
    ("head", "fields", "options", "message"),
    [
        ({"pooling": "mean"}, {}, {}, "task.pooling='mean' cannot be exported"),
        ({}, {}, {"network": "generator"}, "--network=generator is for objective='rtd'"),
        ({}, {}, {"model_type": "neobert"}, "model.positions='learned', and neobert computes with 'rope'"),
        ({}, {}, {"model_type": "electra"}, "texts of electra computes gelu_erf where this run's task.activation is 'tanh'"),
        (
            {},
            MODERNBERT,
            {},
            "this run's lacks: fine-tune with --config.task.transform=True, and --config.task.activation=gelu",
        ),
        ({"pooling": "mean"}, MODERNBERT, {}, "this run's lacks: fine-tune with --config.task.transform=True"),
        (TRANSFORM, {}, {}, "task.transform=True cannot be exported as bert: of transformers' heads only modernbert's"),
        (TRANSFORM, NEOBERT, {}, "the heads of tasks of neobert are other functions than ours"),
    ],
)
def test_what_transformers_has_not_is_refused(tmp_path, head, fields, options, message):
    write_task(tmp_path / "run", "classification", head, **fields)
    with pytest.raises(UserError, match=message):
        export_run(tmp_path / "run", tmp_path / "folder", **options)
    assert not (tmp_path / "folder").exists()
