"""A multilingual bert_mini: four languages in one model, mixed as XLM-R mixes its hundred, for two CPU cores.

Command:
    mlm-jax train --config configs/multilingual_mini.py --workdir runs/multilingual
`--config.data.sources[3].uri='files:…'` names another place; `--config.data.alpha=1` takes the languages as they come.
It looks for its text in corpus/.
Expected: 7,440,896 parameters, 2,048 tokens a step.
Reference topology: one machine with 2 CPU cores.

Sources: the exponent 0.3, for batches and for the tokenizer's sample, is in section 3 of XLM-R (Conneau et al. 2020,
arXiv:1911.02116). The shape is modern_mini's without its local layers, as bert_mini's needs shorter rows first to learn
position; the optimizer is bert_mini's; a vocabulary for four scripts is twice as large as theirs.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "multilingual_mini",
            "data": {
                "sources": (
                    {"name": "en", "uri": "files:corpus/en_wikipedia/*.jsonl.gz?field=text"},
                    {"name": "de", "uri": "files:corpus/de_wikipedia/*.jsonl.gz?field=text"},
                    {"name": "zh", "uri": "files:corpus/zh_wikipedia/*.jsonl.gz?field=text"},
                    {"name": "ru", "uri": "files:corpus/ru_novels/*.txt.gz?documents=blank_line"},
                ),
                "alpha": 0.3,  # XLM-R
            },
            "tokenizer": {
                "algorithm": "unigram",
                "vocab_size": 16384,  # ours
                "character_coverage": 0.9995,  # SentencePiece's for scripts of many characters; the rest are bytes
                "byte_fallback": True,
                "sample_alpha": 0.3,  # XLM-R
            },
            "model": {
                "vocab_size": 16384,
                "num_layers": 4,
                "embed_dim": 256,
                "num_heads": 4,
                "mlp_dim": 688,
                "max_positions": 512,
                "positions": "rope",
                "rope_base": 1_000.0,
                "gated_mlp": True,
                "biases": False,
                "pre_norm": True,
                "first_norm": False,
                "norm_bias": False,
                "init_std": 0.06,
                "init_scaled": True,
            },
            "masking": {"policy": "token", "rate": 0.3, "mask_prob": 0.8, "random_prob": 0.1},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-3,
                "schedule": "linear",
                "warmup_steps": 150,
                "b2": 0.98,
                "eps": 1e-6,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
            },
            "stages": ({"steps": 3000, "seq_len": 64, "batch_size": 32},),
            "train": {"log_every": 50, "checkpoint_every": 500},
            "evaluation": {
                "every": 1000,
                "max_rows": 2048,
                "probes": (
                    "The capital of France is [MASK].",
                    "Die Hauptstadt von Frankreich ist [MASK].",
                    "法国的首都是[MASK]。",
                    "Он [MASK] в комнату.",
                ),
            },
        }
    ).lock()
