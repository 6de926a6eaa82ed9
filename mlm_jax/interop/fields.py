"""config.json of Hugging Face and `ModelConfig`, field by field, a row of `FAMILIES` for each `model_type`.

A field that is in none of the lists may change what is computed, and is refused by its name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mlm_jax.config import ModelConfig
from mlm_jax.config.conversion import build, nearest
from mlm_jax.errors import UserError

# Theirs: ours, of the same meaning and value.
_FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "embed_dim",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "type_vocab_size": "num_token_types",
    "layer_norm_eps": "norm_eps",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}
# Theirs that are translated below.
_TRANSLATED = {"model_type", "max_position_embeddings", "hidden_act", "pad_token_id"}
# What a field is that a config.json leaves out. Source: transformers' configuration classes of these families.
_DEFAULTS = {
    "vocab_size": 30522,
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
# Theirs: the only values that we compute.
_FIXED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
}
# Theirs that change nothing of the encoder and its pre-training heads: heads for other tasks, names, ids that the tokenizer
# has too, how something is run or returned, the generation of text.
_HARMLESS = {
    *("architectures", "_name_or_path", "transformers_version", "tokenizer_class", "torch_dtype", "dtype", "language"),
    *("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id", "unk_token_id"),
    *("decoder_start_token_id", "prefix", "classifier_dropout", "num_labels", "id2label", "label2id", "problem_type"),
    *("finetuning_task", "task_specific_params", "directionality", "pooler_fc_size", "pooler_num_attention_heads"),
    *("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "summary_type", "summary_use_proj"),
    *("summary_activation", "summary_first_dropout", "summary_last_dropout", "summary_proj_to_labels", "use_cache"),
    *("gradient_checkpointing", "chunk_size_feed_forward", "attn_implementation", "_attn_implementation", "torchscript"),
    *("output_hidden_states", "output_attentions", "output_past", "output_scores", "return_dict", "use_bfloat16"),
    *("return_dict_in_generate", "tf_legacy_loss", "max_length", "min_length", "do_sample", "early_stopping", "num_beams"),
    *("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
    *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
    *("suppress_tokens", "begin_suppress_tokens"),
}
# Their names of an activation: ours. The first for each of ours is written.
_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What is particular to a `model_type`.

    Attributes:
        masked, detection: its classes of a masked language model and of a detector of replaced tokens.
        fields: theirs, in place of or beside `_FIELDS`.
        defaults: theirs, in place of or beside `_DEFAULTS`.
        positions_follow_padding: whether its position table begins with as many unused rows as the padding id plus one.
        head_activation: what its masked head computes whatever `hidden_act` is.
    """

    masked: str
    detection: str = ""
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    positions_follow_padding: bool = False
    head_activation: str = ""


_ROBERTA = Family(
    masked="RobertaForMaskedLM",
    defaults={"vocab_size": 50265, "pad_token_id": 1},
    positions_follow_padding=True,
    head_activation="gelu_erf",
)
FAMILIES = {
    "bert": Family(masked="BertForMaskedLM"),
    "roberta": _ROBERTA,
    "xlm-roberta": dataclasses.replace(_ROBERTA, masked="XLMRobertaForMaskedLM"),
    "electra": Family(
        masked="ElectraForMaskedLM",
        detection="ElectraForPreTraining",
        fields={"embedding_size": "table_dim"},
        defaults={
            "embedding_size": 128,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
        },
        head_activation="gelu_erf",
    ),
}


def read_model(raw: Mapping[str, Any], network: str) -> ModelConfig:
    """The architecture that a config.json describes.

    Args:
        raw: its content.
        network: "masked" or "detection", which head it has.

    Raises:
        UserError: another architecture, a field that is not known, or a value that is not computed here.
    """
    model_type = family_of(raw)
    family = FAMILIES[model_type]
    fields, defaults = _FIELDS | dict(family.fields), _DEFAULTS | dict(family.defaults)
    known = {*fields, *_TRANSLATED, *_FIXED, *_HARMLESS}
    for name, value in raw.items():
        if name not in known:
            raise UserError(
                f"config.json has {name}={value!r}, a field of which is not known whether it changes what {model_type} "
                f"computes{nearest(name, known)}; remove it if it does not"
            )
        if name in _FIXED and value not in _FIXED[name]:
            raise UserError(f"config.json has {name}={value!r}, and only {_FIXED[name][0]!r} is computed here")
    values = {ours: raw.get(theirs, defaults[theirs]) for theirs, ours in fields.items()}
    whole = {name: raw.get(name, defaults[name]) for name in ("max_position_embeddings", "pad_token_id", "hidden_act")}
    offset = 0
    if family.positions_follow_padding:
        if type(whole["pad_token_id"]) is not int or type(whole["max_position_embeddings"]) is not int:
            raise UserError(
                f"config.json has pad_token_id={whole['pad_token_id']!r} and max_position_embeddings="
                f"{whole['max_position_embeddings']!r}: {model_type} counts positions from behind the first, a whole number"
            )
        offset = whole["pad_token_id"] + 1
        values["max_positions"] = whole["max_position_embeddings"] - offset
    else:
        values["max_positions"] = whole["max_position_embeddings"]
    if whole["hidden_act"] not in _ACTIVATIONS:
        raise UserError(
            f"config.json has hidden_act={whole['hidden_act']!r}, and only {', '.join(_ACTIVATIONS)} are computed here"
        )
    activation = _ACTIVATIONS[whole["hidden_act"]]
    _check_head(model_type, activation, network, f"config.json has hidden_act={whole['hidden_act']!r}")
    more = {"activation": activation, "position_offset": offset, "init_truncated": False}
    model: ModelConfig = build(ModelConfig, values | more, "model")
    return model


def family_of(raw: Mapping[str, Any]) -> str:
    """The `model_type` of a config.json.

    Raises:
        UserError: it is none of `FAMILIES`.
    """
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"config.json has model_type={model_type!r}, and only {', '.join(FAMILIES)} can be imported"
            f"{nearest(str(model_type), FAMILIES)}"
        )
    return str(model_type)


def choose_family(model: ModelConfig, network: str, wanted: str | None) -> str:
    """The `model_type` that a network is written as.

    Raises:
        UserError: there is none, or not the one that is wanted, for what this network computes.
    """
    projected = model.embedding_dim != model.embed_dim
    usual = "electra" if projected or network == "detection" else "roberta" if model.position_offset else "bert"
    chosen = wanted or usual
    if chosen not in FAMILIES:
        raise UserError(f"--model-type={chosen} is none of {', '.join(FAMILIES)}{nearest(chosen, FAMILIES)}")
    if network == "detection" and not FAMILIES[chosen].detection:
        raise UserError(f"--model-type={chosen} has no class that detects replaced tokens; leave it out, or use electra")
    if projected and "embedding_size" not in FAMILIES[chosen].fields:
        raise UserError(
            f"--model-type={chosen} has tables of the model's width, and this model's are {model.embedding_dim} wide and "
            f"projected to {model.embed_dim}: use electra"
        )
    _check_head(chosen, model.activation, network, f"model.activation={model.activation!r}")
    return chosen


def _check_head(model_type: str, activation: str, network: str, found: str) -> None:
    head = FAMILIES[model_type].head_activation
    if network == "masked" and head and activation != head:
        others = [name for name, family in FAMILIES.items() if not family.head_activation]
        raise UserError(
            f"{found}, but the masked-language-model head of {model_type} is {head} whatever its layers are, and here both "
            f"are the same; {', '.join(others)} has no such rule"
        )


def write_model(model: ModelConfig, model_type: str, network: str, ids: Mapping[str, int]) -> dict[str, Any]:
    """The config.json of a network.

    Args:
        model: its architecture, with `position_offset` as this family has it.
        ids: the tokenizer's, by role.
    """
    family = FAMILIES[model_type]
    fields = _FIELDS | dict(family.fields)
    values = {theirs: getattr(model, ours) for theirs, ours in fields.items()}
    if "embedding_size" in values:
        values["embedding_size"] = model.embedding_dim
    theirs = next(name for name, ours in _ACTIVATIONS.items() if ours == model.activation)
    special = {"pad_token_id": ids["pad"]}
    if family.positions_follow_padding:
        special |= {"bos_token_id": ids["cls"], "eos_token_id": ids["sep"]}
    return {
        "architectures": [getattr(family, network)],
        "model_type": model_type,
        **values,
        "hidden_act": theirs,
        "max_position_embeddings": model.max_positions + model.position_offset,
        **special,
        "dtype": "float32",
    }
