"""The fields of config.json of ModernBERT and NeoBERT, and their architectures. A part of `families`."""

from collections.abc import Mapping
from typing import Any

from mlm_jax.config import ModelConfig
from mlm_jax.errors import UserError
from mlm_jax.interop.family import FIXED, HARMLESS, Family


def _read_modernbert(raw: Mapping[str, Any], network: str) -> dict[str, Any]:
    """Which layers are local, their window, and the two rotary bases, in the fields of today and of 2024."""
    if network != "task":
        _check_masked_head(raw)
    every, window = raw["global_attn_every_n_layers"], raw["local_attention"]
    kinds = raw["layer_types"]
    if kinds is not None:
        every = next((index for index, kind in enumerate(kinds) if index and kind == "full_attention"), len(kinds))
    else:
        kinds = _layer_types(raw["num_hidden_layers"], every)
    if list(kinds) != _layer_types(raw["num_hidden_layers"], every):
        raise UserError(
            f"config.json has layer_types={kinds}, and here the first layer and then one in every few sees the whole text"
        )
    bases = {}
    for kind, old in (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta")):
        rope = (raw["rope_parameters"] or {}).get(kind) or {}
        if rope.get("rope_type", "default") != "default" or rope.keys() - {"rope_type", "rope_theta"}:
            raise UserError(f"config.json has rope_parameters.{kind}={rope}, and only rope_theta is computed here")
        bases[kind] = float(rope.get("rope_theta", raw[old]))
    is_local = "sliding_attention" in kinds
    return {
        "local_window": window // 2 if is_local else 0,
        "global_every": every if is_local else 3,
        "rope_base": bases["full_attention"],
        "local_rope_base": bases["sliding_attention"],
    }


def _check_masked_head(raw: Mapping[str, Any]) -> None:
    """Whether it computes what ours does, whose fields are the layers'."""
    if raw["classifier_activation"] != raw["hidden_activation"]:
        raise UserError(
            f"config.json has classifier_activation={raw['classifier_activation']!r} and hidden_activation="
            f"{raw['hidden_activation']!r}, and here the head's activation is that of the layers"
        )
    if raw["classifier_bias"]:
        raise UserError(
            f"config.json has classifier_bias={raw['classifier_bias']!r}, and the masked-language-model head is computed "
            "here without"
        )


def _write_modernbert(model: ModelConfig) -> dict[str, Any]:
    every = model.global_every if model.local_window else 1
    bases = {"full_attention": model.rope_base, "sliding_attention": model.local_rope_base}
    return {
        "layer_types": _layer_types(model.num_layers, every),
        "local_attention": 2 * model.local_window or 128,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
        # The same for transformers before 5.
        "global_attn_every_n_layers": every,
        "global_rope_theta": model.rope_base,
        "local_rope_theta": model.local_rope_base,
    }


def _layer_types(count: int, every: int) -> list[str]:
    return ["sliding_attention" if index % every else "full_attention" for index in range(count)]


MODERNBERT = Family(
    masked="ModernBertForMaskedLM",
    detection="",
    fields={
        "vocab_size": "vocab_size",
        "num_hidden_layers": "num_layers",
        "hidden_size": "embed_dim",
        "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_dim",
        "max_position_embeddings": "max_positions",
        "norm_eps": "norm_eps",
        "norm_bias": "norm_bias",
        "attention_dropout": "attention_dropout",
        "initializer_range": "init_std",
        "tie_word_embeddings": "tie_embeddings",
    },
    defaults={
        "vocab_size": 50368,
        "num_hidden_layers": 22,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 1152,
        "max_position_embeddings": 8192,
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "classifier_bias": False,
        "classifier_pooling": "cls",
        "pad_token_id": 50283,
        "local_attention": 128,
        "layer_types": None,
        "rope_parameters": None,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160_000.0,
        "local_rope_theta": 10_000.0,
    },
    fixed=FIXED
    | {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "decoder_bias": (True,),
        "embedding_dropout": (0.0,),
        "mlp_dropout": (0.0,),
        "rope_scaling": (None,),
    },
    harmless=HARMLESS
    | {"initializer_cutoff_factor", "deterministic_flash_attn", "sparse_prediction"}
    | {"sparse_pred_ignore_index", "reference_compile", "repad_logits_with_grad", "layer_norm_eps"},
    architecture={
        "languages": (),
        "positions": "rope",
        "gated_mlp": True,
        "biases": False,
        "pre_norm": True,
        "first_norm": False,
        "embedding_norm": True,
        "norm": "layer",
        "head_transform": True,
        "num_token_types": 0,
        "dropout": 0.0,
        "init_truncated": True,
        "init_scaled": True,
    },
    activation="hidden_activation",
    read=_read_modernbert,
    write=_write_modernbert,
)


def _gated_width(whole: int) -> int:
    """NeoBERT's own rule: two thirds of what its config.json says, up to a multiple of 8."""
    return -(-int(2 * whole / 3) // 8) * 8


def _write_neobert(model: ModelConfig) -> dict[str, Any]:
    whole = model.mlp_dim * 3 // 2
    if _gated_width(whole) != model.mlp_dim:
        raise UserError(f"model.mlp_dim={model.mlp_dim} is no multiple of 8, as every neobert's is")
    # Its code is not in transformers but beside the published weights.
    classes = {"AutoConfig": "NeoBERTConfig", "AutoModel": "NeoBERT", "AutoModelForMaskedLM": "NeoBERTLMHead"}
    return {
        "intermediate_size": whole,
        "dim_head": model.head_dim,
        "auto_map": {auto: f"chandar-lab/NeoBERT--model.{name}" for auto, name in classes.items()},
    }


NEOBERT = Family(
    masked="NeoBERTLMHead",
    detection="",
    fields={
        "vocab_size": "vocab_size",
        "num_hidden_layers": "num_layers",
        "hidden_size": "embed_dim",
        "num_attention_heads": "num_heads",
        "max_length": "max_positions",
        "norm_eps": "norm_eps",
    },
    defaults={
        "vocab_size": 30522,
        "num_hidden_layers": 28,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_length": 1024,
        "norm_eps": 1e-6,
        "pad_token_id": 0,
    },
    fixed=FIXED
    | {
        "hidden_act": ("SwiGLU", "swiglu"),
        "rms_norm": (True,),
        "rope": (True,),
        "ngpt": (False,),
        "dropout": (0, 0.0),
    },
    # It never ties its decoder, whatever `tie_word_embeddings` says.
    harmless=HARMLESS
    | {"auto_map", "dim_head", "kwargs", "trust_remote_code", "flash_attention", "tie_word_embeddings"}
    | {"embedding_init_range", "decoder_init_range", "classifier_init_range"},
    architecture={
        "languages": (),
        "positions": "rope",
        "rope_base": 10_000.0,
        "activation": "silu",
        "gated_mlp": True,
        "biases": False,
        "pre_norm": True,
        "first_norm": True,
        "embedding_norm": False,
        "norm": "rms",
        "head_transform": False,
        "tie_embeddings": False,
        "num_token_types": 0,
        "local_window": 0,
    },
    activation="",
    read=lambda raw, _: {"mlp_dim": _gated_width(raw["intermediate_size"])},
    write=_write_neobert,
)
