"""A model of bert_mini's size on BabyLM's 10 million words, with GPT-BERT's objective, for an hour on two cores.

Command:
    mlm-jax train --config configs/babylm_mini.py --workdir runs/babylm_mini \
        --config.data.source='files:corpus/*.txt?documents=blank_line'
    mlm-jax score --workdir runs/babylm_mini --pairs 'blimp/*.jsonl'
Expected: 5,462,272 parameters, 4,096 tokens a step, 20.5 million tokens in all: 1.4 of the ten passes that the track allows,
in about an hour by bert_mini's speed; not run yet. For outside figures see babylm_strict_small.
Reference topology: one machine with 2 CPU cores.

Shape and optimizer are bert_mini's, hybrid objective and masking are babylm_strict_small's; the values are ours.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "babylm_mini",
            "objective": "hybrid",
            "hybrid": {"causal_share": 0.0625},
            "data": {"max_words": 10_000_000},
            "tokenizer": {"algorithm": "unigram", "vocab_size": 8192, "sample_megabytes": 20.0},
            "model": {
                "vocab_size": 8192,
                "num_layers": 4,
                "embed_dim": 256,
                "num_heads": 4,
                "mlp_dim": 1024,
                "max_positions": 512,
                "init_std": 0.06,  # as bert_mini's
                "dropout": 0.0,
                "attention_dropout": 0.0,
            },
            "masking": {"rate": 0.3, "schedule": "linear", "final_rate": 0.15},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-3,
                "schedule": "linear",
                "warmup_steps": 300,
                "b2": 0.98,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
                "ema_decay": 0.995,
            },
            "stages": (  # sentences are short: rows of 64 first, as bert_mini has rows of 32
                {"steps": 3500, "seq_len": 64, "batch_size": 64},
                {"steps": 1500, "seq_len": 128, "batch_size": 32},
            ),
            "train": {"log_every": 50, "checkpoint_every": 500, "max_epochs": 10},
            "evaluation": {"every": 1000, "max_rows": 1024},
        }
    ).lock()
