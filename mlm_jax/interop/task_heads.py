"""Heads of fine-tuned tasks as `transformers` has them: their tensors' names, and what config.json says of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mlm_jax.config import Config
from mlm_jax.errors import UserError
from mlm_jax.finetune.tagging import tags_of
from mlm_jax.interop.families import FAMILIES
from mlm_jax.interop.fields import ACTIVATIONS, our_activation
from mlm_jax.interop.tensors import NAMES

_CLASSES = {
    "classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "tagging": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
# The families that are read and written: ours are one dense layer for tokens and answers too, ModernBERT's with a transform.
_FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "modernbert")
# Of a text's head the dense layer, the output, and the activation between them.
_TEXT_HEADS = {
    "bert": ("bert.pooler.dense", "classifier", "tanh"),
    "roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "electra": ("classifier.dense", "classifier.out_proj", "gelu_erf"),
    "distilbert": ("pre_classifier", "classifier", "relu"),
}
# Of ModernBERT's transform, the same before every output: ours, theirs.
_TRANSFORM = {
    "dense_DD": "head.dense.weight",
    "dense_bias_D": "head.dense.bias",
    "norm.scale_D": "head.norm.weight",
    "norm.bias_D": "head.norm.bias",
}
_HEAD_ACTIVATIONS = ACTIVATIONS | {"tanh": "tanh"}  # theirs: ours


@dataclasses.dataclass(frozen=True)
class Head:
    """What config.json says of a fine-tuned network.

    Attributes:
        objective: one of `config.TASKS`.
        labels: by id; empty where it names none.
        fields: of `TaskConfig`, what the head is.
    """

    objective: str
    labels: tuple[str, ...]
    fields: Mapping[str, Any]


def read_head(raw: Mapping[str, Any], model_type: str) -> Head | None:
    """The head of a config.json's class; None of those for pre-training, and where no class is named.

    Raises:
        UserError: a class that is not known, or of which the family computes something else.
    """
    name, prefix = (raw.get("architectures") or [""])[0], _prefix(model_type)
    known = [*FAMILIES[model_type].classes, prefix + "Model", prefix + "ForPreTraining", prefix]
    kinds = [kind for kind, ending in _CLASSES.items() if name == prefix + ending]
    if not name or name in known:
        return None
    if not kinds:
        raise UserError(
            f"config.json has architectures={[name]}, whose head is not known here: of {model_type} those for pre-training "
            f"are, and {', '.join(prefix + ending for ending in dict.fromkeys(_CLASSES.values()))}"
        )
    if model_type not in _FAMILIES:
        raise UserError(
            f"config.json has architectures={[name]}, and heads of tasks are read of {', '.join(_FAMILIES)} only"
        )
    kind = kinds[0]
    reads_text = kind == "classification"
    if model_type == "modernbert":
        fields = _read_transform({**FAMILIES[model_type].defaults, **raw}, reads_text=reads_text)
    else:
        fields = {"activation": _TEXT_HEADS[model_type][2]} if reads_text else {}
    if not reads_text:
        return Head(kind, _labels(raw) if kind == "tagging" else (), fields)
    problem, labels = raw.get("problem_type"), _labels(raw)
    if problem not in (None, "regression", "single_label_classification"):
        raise UserError(f"config.json has problem_type={problem!r}, and here a text has one label or a number")
    is_number = problem == "regression" or (problem is None and len(labels) == 1)
    return Head("regression", (), fields) if is_number else Head(kind, labels, fields)


def _read_transform(whole: Mapping[str, Any], *, reads_text: bool) -> dict[str, Any]:
    """Of `TaskConfig`, what a config.json of ModernBERT says of its head."""
    pooling, bias, dropout = (whole.get(f"classifier_{name}", 0.0) for name in ("pooling", "bias", "dropout"))
    if reads_text and pooling not in ("cls", "mean"):
        raise UserError(f"config.json has classifier_pooling={pooling!r}, and only cls, mean are computed here")
    if type(bias) is not bool:
        raise UserError(f"config.json has classifier_bias={bias!r}, which is neither true nor false")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"config.json has classifier_dropout={dropout!r}, which is no share of 0 to below 1")
    activation = our_activation(whole, "classifier_activation", _HEAD_ACTIVATIONS)
    fields = {"activation": activation, "transform": True, "transform_bias": bias, "dropout": float(dropout)}
    return fields | ({"pooling": pooling} if reads_text else {})


def _labels(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """In the order of their ids, with the names that `transformers` gives where there are none."""
    found = raw.get("id2label") or {str(index): f"LABEL_{index}" for index in range(raw.get("num_labels") or 2)}
    if sorted(found) != sorted(str(index) for index in range(len(found))):
        raise UserError(f"config.json has id2label={found}, whose ids are not 0, 1, …")
    return tuple(str(found[str(index)]) for index in range(len(found)))


def _prefix(model_type: str) -> str:
    """What the names of a family's classes begin with."""
    return FAMILIES[model_type].masked.removesuffix("ForMaskedLM").removesuffix("LMHead")


def task_layout(cfg: Config, model_type: str) -> dict[str, str]:
    """Ours: theirs, of all parameters.

    Raises:
        UserError: this family has no class with such a head.
    """
    if model_type not in _FAMILIES:
        raise UserError(f"the heads of tasks of {model_type} are other functions than ours: pre-trained runs of it only")
    names, task = NAMES[model_type], cfg.task
    tensors = {ours: names.prefix + theirs for ours, theirs in names.encoder.items()}
    reads_text = cfg.objective in ("classification", "regression")
    ours = "head.output." if reads_text else "head."
    output = "qa_outputs" if cfg.objective == "question_answering" else "classifier"
    if model_type == "modernbert":
        if not task.transform:
            raise UserError(
                "every head of modernbert has a norm behind its dense layer, which this run's lacks: fine-tune with "
                "--config.task.transform=True, and --config.task.activation=gelu_erf as the published models have it"
            )
        output = "classifier"
        tensors |= {f"{ours}transform.{name}": theirs for name, theirs in _TRANSFORM.items()}
    elif task.transform:
        raise UserError(
            f"task.transform=True cannot be exported as {model_type}: of transformers' heads only modernbert's are so"
        )
    elif reads_text:
        if task.pooling != "cls":
            raise UserError(f"task.pooling={task.pooling!r} cannot be exported: transformers' classes read the first token")
        dense, output, activation = _TEXT_HEADS[model_type]
        if task.activation != activation:
            raise UserError(
                f"the head for texts of {model_type} computes {activation} where this run's task.activation is "
                f"{task.activation!r}: fine-tune with --config.task.activation={activation}"
            )
        tensors |= {"head.pooler_DD": f"{dense}.weight", "head.pooler_bias_D": f"{dense}.bias"}
    return tensors | {f"{ours}output_DC": f"{output}.weight", f"{ours}output_bias_C": f"{output}.bias"}


def task_fields(cfg: Config, model_type: str) -> dict[str, Any]:
    """The fields of config.json that are the task's: the class, its labels, its head, and how its loss is computed."""
    fields: dict[str, Any] = {"architectures": [_prefix(model_type) + _CLASSES[cfg.objective]]}
    labels = list(cfg.task.labels) if cfg.objective == "classification" else tags_of(cfg.task.labels)
    if cfg.objective in ("classification", "tagging"):
        fields["id2label"] = {str(index): label for index, label in enumerate(labels)}
        fields["label2id"] = {label: index for index, label in enumerate(labels)}
    if cfg.objective == "classification":
        fields["problem_type"] = "single_label_classification"
    if cfg.objective == "regression":
        fields |= {"num_labels": 1, "problem_type": "regression"}
    if model_type == "modernbert":
        theirs = next(name for name, ours in _HEAD_ACTIVATIONS.items() if ours == cfg.task.activation)
        fields |= {"classifier_activation": theirs, "classifier_bias": cfg.task.transform_bias}
        fields |= {"classifier_pooling": cfg.task.pooling, "classifier_dropout": cfg.task.dropout}
    return fields
