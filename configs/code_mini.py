"""Source code: bert_mini with tokens that keep indentation and stay within names, for two CPU cores.

Command:
    mlm-jax train --config configs/code_mini.py --workdir runs/code \
        --config.data.source='files:corpus/**/*.py?format=txt'
A file is a document. `**` crosses folders.
Expected: 5,462,272 parameters, 2,048 tokens a step.
Reference topology: one machine with 2 CPU cores.

Sources: the values are bert_mini's and ours. CodeBERT (Feng et al. 2020, arXiv:2002.08155) is RoBERTa on code with RoBERTa's
own vocabulary, which cuts indentation into single spaces.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "code_mini",
            "tokenizer": {"algorithm": "code", "vocab_size": 8192},
            "model": {
                "vocab_size": 8192,
                "num_layers": 4,
                "embed_dim": 256,
                "num_heads": 4,
                "mlp_dim": 1024,
                "max_positions": 512,
                "activation": "gelu_tanh",
                "init_std": 0.06,
            },
            "masking": {"policy": "token", "rate": 0.3},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-3,
                "schedule": "linear",
                "warmup_steps": 150,
                "b2": 0.98,
                "weight_decay": 0.01,
            },
            "stages": ({"steps": 3000, "seq_len": 128, "batch_size": 16},),
            "train": {"log_every": 50, "checkpoint_every": 500},
            "evaluation": {"every": 500, "max_rows": 1024, "probes": ("for index in [MASK](10):", "import [MASK]")},
        }
    ).lock()
