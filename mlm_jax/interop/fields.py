"""config.json of Hugging Face and `ModelConfig`, field by field, as `families` has it for each `model_type`."""

from collections.abc import Mapping
from typing import Any

from mlm_jax.config import ModelConfig
from mlm_jax.config.conversion import build, nearest
from mlm_jax.errors import UserError
from mlm_jax.interop.families import FAMILIES

# Their names of an activation: ours. The first for each of ours is written.
ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Ours that only training reads, and that a family's architecture therefore does not limit.
_ONLY_FOR_TRAINING = ("dropout", "init_truncated", "init_scaled")


def read_model(raw: Mapping[str, Any], network: str) -> ModelConfig:
    """The architecture that a config.json describes.

    Args:
        raw: its content.
        network: "masked", "detection" or "task", which head it has.

    Raises:
        UserError: another architecture, a field that is not known, or a value that is not computed here.
    """
    model_type = family_of(raw)
    family = FAMILIES[model_type]
    for name, value in raw.items():
        if name not in family.known:
            raise UserError(
                f"config.json has {name}={value!r}, a field of which is not known whether it changes what {model_type} "
                f"computes{nearest(name, family.known)}; remove it if it does not"
            )
        if name in family.fixed and value not in family.fixed[name]:
            raise UserError(f"config.json has {name}={value!r}, and only {family.fixed[name][0]!r} is computed here")
    whole = {**family.defaults, **raw}
    values = {"init_truncated": False, **family.architecture}
    values |= {ours: whole[theirs] for theirs, ours in family.fields.items()}
    if family.positions_follow_padding:
        values |= _positions_behind_padding(model_type, whole)
    if family.activation:
        values["activation"] = our_activation(whole, family.activation, ACTIVATIONS)
        found = f"config.json has {family.activation}={whole[family.activation]!r}"
        _check_head(model_type, values["activation"], network, found)
    try:
        values |= family.read(whole, network)
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"config.json is none of a {model_type}: {error}") from error
    model: ModelConfig = build(ModelConfig, values, "model")
    return model


def _positions_behind_padding(model_type: str, whole: Mapping[str, Any]) -> dict[str, int]:
    padding, positions = whole["pad_token_id"], whole["max_position_embeddings"]
    if type(padding) is not int or type(positions) is not int:
        raise UserError(
            f"config.json has pad_token_id={padding!r} and max_position_embeddings={positions!r}: {model_type} counts "
            "positions from behind the first, a whole number"
        )
    return {"position_offset": padding + 1, "max_positions": positions - padding - 1}


def our_activation(whole: Mapping[str, Any], field: str, known: Mapping[str, str]) -> str:
    """Ours of the activation that a field of a config.json names.

    Raises:
        UserError: it is none of those that are known.
    """
    name = whole[field]
    if not isinstance(name, str) or name not in known:
        raise UserError(f"config.json has {field}={name!r}, and only {', '.join(known)} are computed here")
    return known[name]


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
    chosen = wanted or _usual_family(model, projected=projected or network == "detection")
    if chosen not in FAMILIES:
        raise UserError(f"--model-type={chosen} is none of {', '.join(FAMILIES)}{nearest(chosen, FAMILIES)}")
    if network == "detection" and not FAMILIES[chosen].detection:
        raise UserError(f"--model-type={chosen} has no class that detects replaced tokens; leave it out, or use electra")
    differs = differences(model, chosen)
    if differs:
        name, expected = next(iter(differs.items()))
        raise UserError(f"model.{name}={getattr(model, name)!r}, and {chosen} computes with {expected!r}")
    if projected and "embedding_size" not in FAMILIES[chosen].fields:
        raise UserError(
            f"--model-type={chosen} has tables of the model's width, and this model's are {model.embedding_dim} wide and "
            f"projected to {model.embed_dim}: use electra"
        )
    _check_head(chosen, model.activation, network, f"model.activation={model.activation!r}")
    return chosen


def _usual_family(model: ModelConfig, *, projected: bool) -> str:
    if projected:
        return "electra"
    if model.position_offset:
        return "roberta"
    fitting = [name for name in ("modernbert", "neobert") if not differences(model, name)]
    return fitting[0] if fitting else "bert"


def differences(model: ModelConfig, model_type: str) -> dict[str, Any]:
    """The fields of a model that a family computes otherwise, and the values that it computes with."""
    architecture = FAMILIES[model_type].architecture
    limited = {name: value for name, value in architecture.items() if name not in _ONLY_FOR_TRAINING}
    return {name: value for name, value in limited.items() if getattr(model, name) != value}


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
    values = {theirs: getattr(model, ours) for theirs, ours in family.fields.items()}
    if "embedding_size" in values:
        values["embedding_size"] = model.embedding_dim
    if "max_position_embeddings" in values:
        values["max_position_embeddings"] += model.position_offset
    if family.activation:
        theirs = next(name for name, ours in ACTIVATIONS.items() if ours == model.activation)
        values |= {name: theirs for name in (family.activation, "classifier_activation") if name in family.defaults}
    special = {"pad_token_id": ids["pad"]}
    if family.positions_follow_padding or model_type == "modernbert":
        special |= {"bos_token_id": ids["cls"], "eos_token_id": ids["sep"]}
    if model_type == "modernbert":
        special |= {"cls_token_id": ids["cls"], "sep_token_id": ids["sep"]}
    return {
        "architectures": [getattr(family, network)],
        "model_type": model_type,
        **values,
        **family.write(model),
        **special,
        "dtype": "float32",
    }
