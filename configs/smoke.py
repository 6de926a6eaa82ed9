"""A small encoder on the prose that comes with Python: the whole job in minutes on two CPU cores, nothing downloaded.

Command: bash launch/smoke.sh, or
    mlm-jax train --config configs/smoke.py --workdir runs/smoke
Expected: 958,336 parameters, 4,096 tokens a step; see the README for what it learns.
Reference topology: one machine with 2 CPU cores.

The values are ours, chosen to show learning in a few minutes; no publication stands behind them. The architecture is
BERT's (google-research/bert:modeling.py) at a hundredth of its size, the masking too (create_pretraining_data.py).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "smoke",
            "data": {"source": "builtin:python_docs", "validation_fraction": 0.05},
            "tokenizer": {"algorithm": "unigram", "vocab_size": 4096},
            "model": {
                "vocab_size": 4096,
                "num_layers": 2,
                "embed_dim": 128,
                "num_heads": 4,
                "mlp_dim": 512,
                "max_positions": 128,
                "init_std": 0.08,  # about 1 / √width; with BERT's 0.02 so narrow a model never leaves the unigram loss
                "dropout": 0.0,  # a few epochs of a small model do not overfit
                "attention_dropout": 0.0,
            },
            "masking": {"policy": "token", "rate": 0.15},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 3e-3,
                "schedule": "linear",
                "warmup_steps": 60,
                "b2": 0.98,  # a shorter memory than BERT's, as the run is short
                "weight_decay": 0.01,
            },
            "stages": ({"steps": 600, "seq_len": 128, "batch_size": 32},),
            "train": {"log_every": 20, "checkpoint_every": 200},
            "evaluation": {
                "every": 200,
                "max_rows": 256,
                "probes": (
                    "Return a [MASK] of the object.",
                    "If the argument is [MASK], a TypeError is raised.",
                    "The default value is [MASK].",
                ),
            },
        }
    ).lock()
