"""Heads of fine-tuned tasks as `transformers` has them: their tensors' names, and what config.json says of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mlm_jax.config import Config
from mlm_jax.errors import UserError
from mlm_jax.finetune.tagging import tags_of
from mlm_jax.interop.families import FAMILIES
from mlm_jax.interop.tensors import NAMES

_CLASSES = {
    "classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "tagging": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
# The families whose heads for tokens and answers are one dense layer, as ours are.
_FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
# Of a text's head the dense layer, the output, and the activation between them.
_TEXT_HEADS = {
    "bert": ("bert.pooler.dense", "classifier", "tanh"),
    "roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj", "tanh"),
    "electra": ("classifier.dense", "classifier.out_proj", "gelu_erf"),
    "distilbert": ("pre_classifier", "classifier", "relu"),
}


@dataclasses.dataclass(frozen=True)
class Head:
    """What config.json says of a fine-tuned network.

    Attributes:
        objective: one of `config.TASKS`.
        labels: by id; empty where it names none.
        activation: of a text's head.
    """

    objective: str
    labels: tuple[str, ...]
    activation: str = "tanh"


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
    if kind != "classification":
        return Head(kind, _labels(raw) if kind == "tagging" else ())
    problem, labels = raw.get("problem_type"), _labels(raw)
    if problem not in (None, "regression", "single_label_classification"):
        raise UserError(f"config.json has problem_type={problem!r}, and here a text has one label or a number")
    is_number = problem == "regression" or (problem is None and len(labels) == 1)
    activation = _TEXT_HEADS[model_type][2]
    return Head("regression", (), activation) if is_number else Head(kind, labels, activation)


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
    names = NAMES[model_type]
    tensors = {ours: names.prefix + theirs for ours, theirs in names.encoder.items()}
    if cfg.objective in ("classification", "regression"):
        if cfg.task.pooling != "cls":
            raise UserError(
                f"task.pooling={cfg.task.pooling!r} cannot be exported: transformers' classes read the first token"
            )
        dense, output, activation = _TEXT_HEADS[model_type]
        if cfg.task.activation != activation:
            raise UserError(
                f"the head for texts of {model_type} computes {activation} where this run's task.activation is "
                f"{cfg.task.activation!r}: fine-tune with --config.task.activation={activation}"
            )
        tensors |= {"head.pooler_DD": f"{dense}.weight", "head.pooler_bias_D": f"{dense}.bias"}
        ours = "head.output."
    else:
        ours, output = "head.", "classifier" if cfg.objective == "tagging" else "qa_outputs"
    return tensors | {f"{ours}output_DC": f"{output}.weight", f"{ours}output_bias_C": f"{output}.bias"}


def task_fields(cfg: Config, model_type: str) -> dict[str, Any]:
    """The fields of config.json that are the task's: the class, its labels, and how its loss is computed."""
    fields: dict[str, Any] = {"architectures": [_prefix(model_type) + _CLASSES[cfg.objective]]}
    labels = list(cfg.task.labels) if cfg.objective == "classification" else tags_of(cfg.task.labels)
    if cfg.objective in ("classification", "tagging"):
        fields["id2label"] = {str(index): label for index, label in enumerate(labels)}
        fields["label2id"] = {label: index for index, label in enumerate(labels)}
    if cfg.objective == "classification":
        fields["problem_type"] = "single_label_classification"
    if cfg.objective == "regression":
        fields |= {"num_labels": 1, "problem_type": "regression"}
    return fields
