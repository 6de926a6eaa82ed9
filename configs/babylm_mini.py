"""A model of bert_mini's size on BabyLM's 10 million words, with GPT-BERT's objective, for about an hour on two cores.

Command:
    mlm-jax train --config configs/babylm_mini.py --workdir runs/babylm_mini \
        --config.data.source='files:corpus/*.txt?documents=blank_line'
    mlm-jax score --workdir runs/babylm_mini --pairs 'blimp/*.jsonl'
Expected: 5,335,552 parameters, 4,096 tokens a step, 14.3 million tokens in all: about one of the ten passes that the track
allows. On five million words of Wikipedia and five of novels, after 108 minutes of one core: held-out losses 3.84 and 3.42,
69.2% of seven of BLiMP's sets. For outside figures see babylm_strict_small.
Reference topology: one machine with 2 CPU cores.

The shape is compare_mini's, the optimizer bert_mini's, objective and masking are babylm_strict_small's; the values are ours.
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
                "mlp_dim": 688,
                "max_positions": 512,
                "positions": "rope",
                "rope_base": 1_000.0,
                "gated_mlp": True,
                "biases": False,
                "pre_norm": True,
                "first_norm": False,
                "norm_bias": False,
                "init_std": 0.06,  # as bert_mini's
                "init_scaled": True,
                "dropout": 0.0,
                "attention_dropout": 0.0,
            },
            "masking": {"rate": 0.3, "schedule": "linear", "final_rate": 0.15},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-3,
                "schedule": "linear",
                "warmup_steps": 200,
                "b2": 0.98,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
                "ema_decay": 0.995,
            },
            "stages": (  # sentences are short
                {"steps": 2500, "seq_len": 64, "batch_size": 64},
                {"steps": 1000, "seq_len": 128, "batch_size": 32},
            ),
            "train": {"log_every": 50, "checkpoint_every": 500, "max_epochs": 10},
            "evaluation": {"every": 1000, "max_rows": 1024},
        }
    ).lock()
