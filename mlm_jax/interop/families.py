"""The `model_type`s of Hugging Face that are read and written: the fields of their config.json, their architectures."""

import dataclasses

from mlm_jax.interop.family import FIXED, HARMLESS, Family
from mlm_jax.interop.modern_families import MODERNBERT, NEOBERT

_LIKE_BERT = {
    "languages": (),
    "positions": "learned",
    "gated_mlp": False,
    "biases": True,
    "pre_norm": False,
    "embedding_norm": True,
    "norm": "layer",
    "norm_bias": True,
    "head_transform": True,
    "local_window": 0,
}
_BERT = Family(
    masked="BertForMaskedLM",
    detection="",
    fields={
        "vocab_size": "vocab_size",
        "num_hidden_layers": "num_layers",
        "hidden_size": "embed_dim",
        "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_dim",
        "max_position_embeddings": "max_positions",
        "type_vocab_size": "num_token_types",
        "layer_norm_eps": "norm_eps",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "initializer_range": "init_std",
        "tie_word_embeddings": "tie_embeddings",
    },
    defaults={
        "vocab_size": 30522,
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
        "pad_token_id": 0,
    },
    fixed=FIXED,
    harmless=HARMLESS,
    architecture=_LIKE_BERT,
    activation="hidden_act",
)
_ROBERTA = dataclasses.replace(
    _BERT,
    masked="RobertaForMaskedLM",
    defaults={**_BERT.defaults, "vocab_size": 50265, "pad_token_id": 1},
    positions_follow_padding=True,
    head_activation="gelu_erf",
)
_ELECTRA = dataclasses.replace(
    _BERT,
    masked="ElectraForMaskedLM",
    detection="ElectraForPreTraining",
    fields={**_BERT.fields, "embedding_size": "table_dim"},
    defaults={
        **_BERT.defaults,
        "embedding_size": 128,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
    head_activation="gelu_erf",
)
_DISTILBERT = Family(
    masked="DistilBertForMaskedLM",
    detection="",
    fields={
        "vocab_size": "vocab_size",
        "n_layers": "num_layers",
        "dim": "embed_dim",
        "n_heads": "num_heads",
        "hidden_dim": "mlp_dim",
        "max_position_embeddings": "max_positions",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "initializer_range": "init_std",
        "tie_word_embeddings": "tie_embeddings",
    },
    defaults={
        "vocab_size": 30522,
        "n_layers": 6,
        "dim": 768,
        "n_heads": 12,
        "hidden_dim": 3072,
        "max_position_embeddings": 512,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "activation": "gelu",
        "pad_token_id": 0,
    },
    fixed=FIXED,
    # Sinusoidal positions are where the table begins; it is among the weights.
    harmless=HARMLESS | {"qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds", "tie_weights_"},
    architecture=_LIKE_BERT | {"num_token_types": 0, "norm_eps": 1e-12},
    activation="activation",
)


FAMILIES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": dataclasses.replace(_ROBERTA, masked="XLMRobertaForMaskedLM"),
    "electra": _ELECTRA,
    "distilbert": _DISTILBERT,
    "modernbert": MODERNBERT,
    "neobert": NEOBERT,
}
