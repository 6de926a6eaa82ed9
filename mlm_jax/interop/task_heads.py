"""Heads of fine-tuned tasks as `transformers` has them: their tensors' names, and what config.json says of them."""

from typing import Any

from mlm_jax.config import Config
from mlm_jax.errors import UserError
from mlm_jax.finetune.tagging import tags_of
from mlm_jax.interop.tensors import NAMES

_CLASSES = {
    "classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "tagging": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
_PREFIXES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "electra": "Electra"}
# Of a text's head the dense layer and the output, of the families that compute what ours does.
_TEXT_HEADS = {
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj"),
}


def task_layout(cfg: Config, model_type: str) -> dict[str, str]:
    """Ours: theirs, of all parameters.

    Raises:
        UserError: this family has no class with such a head.
    """
    names = NAMES[model_type]
    tensors = {ours: names.prefix + theirs for ours, theirs in names.encoder.items()}
    if cfg.objective in ("classification", "regression"):
        if cfg.task.pooling != "cls":
            raise UserError(
                f"task.pooling={cfg.task.pooling!r} cannot be exported: transformers' classes read the first token"
            )
        if model_type not in _TEXT_HEADS:
            raise UserError(
                f"the head for texts of {model_type} is another function than ours: --model-type={' or '.join(_TEXT_HEADS)}"
            )
        dense, output = _TEXT_HEADS[model_type]
        tensors |= {"head.pooler_DD": f"{dense}.weight", "head.pooler_bias_D": f"{dense}.bias"}
        ours = "head.output."
    else:
        ours, output = "head.", "classifier" if cfg.objective == "tagging" else "qa_outputs"
    return tensors | {f"{ours}output_DC": f"{output}.weight", f"{ours}output_bias_C": f"{output}.bias"}


def task_fields(cfg: Config, model_type: str) -> dict[str, Any]:
    """The fields of config.json that are the task's: the class, its labels, and how its loss is computed."""
    fields: dict[str, Any] = {"architectures": [_PREFIXES[model_type] + _CLASSES[cfg.objective]]}
    labels = list(cfg.task.labels) if cfg.objective == "classification" else tags_of(cfg.task.labels)
    if cfg.objective in ("classification", "tagging"):
        fields["id2label"] = {str(index): label for index, label in enumerate(labels)}
        fields["label2id"] = {label: index for index, label in enumerate(labels)}
    if cfg.objective == "classification":
        fields["problem_type"] = "single_label_classification"
    if cfg.objective == "regression":
        fields |= {"num_labels": 1, "problem_type": "regression"}
    return fields
