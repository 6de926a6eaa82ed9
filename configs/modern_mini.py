"""ModernBERT's shape at the size of bert_mini, for an evening on a laptop: local layers, rotated positions, gated mlps.

Command:
    mlm-jax train --config configs/modern_mini.py --workdir runs/modern_mini \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
Without the last line it reads the documentation that comes with Python, over and over.
Expected: 5,335,552 parameters, 2,048 tokens a step, 12.3 million tokens in all.
Reference topology: one machine with 2 CPU cores.

The values are ours; no publication stands behind them. The architecture is that of modernbert_base.py with windows of 16
tokens to either side, so that rows of 128 have local layers too; the mlp has two thirds of bert_mini's width, and so as many
parameters; the rest is bert_mini's, but for StableAdamW and its longer rows behind a larger rotary base.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "modern_mini",
            "tokenizer": {"algorithm": "unigram", "vocab_size": 8192},
            "model": {
                "vocab_size": 8192,
                "num_layers": 4,
                "embed_dim": 256,
                "num_heads": 4,
                "mlp_dim": 688,
                "max_positions": 512,
                "positions": "rope",
                "rope_base": 1_000.0,
                "local_rope_base": 1_000.0,
                "local_window": 16,
                "global_every": 3,
                "activation": "gelu_erf",
                "gated_mlp": True,
                "biases": False,
                "pre_norm": True,
                "first_norm": False,
                "norm_bias": False,
                "norm_eps": 1e-5,
                "init_std": 0.06,  # about 1 / √width, as in bert_mini.py
                "init_scaled": True,
            },
            "masking": {"policy": "token", "rate": 0.3, "mask_prob": 0.8, "random_prob": 0.1},
            "optimizer": {
                "name": "stable_adamw",
                "learning_rate": 1e-3,
                "schedule": "linear",
                "warmup_steps": 300,
                "b2": 0.98,
                "eps": 1e-6,
                "weight_decay": 0.01,
                "clip_norm": 0.0,
            },
            "stages": (
                {"steps": 3600, "seq_len": 32, "batch_size": 64},
                {"steps": 2400, "seq_len": 128, "batch_size": 16, "rope_base": 10_000.0},
            ),
            "train": {"log_every": 50, "checkpoint_every": 400},
            "evaluation": {
                "every": 400,
                "max_rows": 1024,
                "probes": (
                    "The capital of France is [MASK].",
                    "He was born in [MASK] and died in London.",
                    "The film was directed [MASK] a young woman.",
                ),
            },
        }
    ).lock()
