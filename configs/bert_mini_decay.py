"""BERT-mini with a masking rate that falls from 30% to 15%, as GPT-BERT's does (Charpentier and Samuel 2024).

Command:
    mlm-jax train --config configs/bert_mini_decay.py --workdir runs/bert_mini_decay \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
Without the last line it reads the documentation that comes with Python, over and over.
Expected: 5,462,272 parameters, 2,048 tokens a step, 12.3 million tokens in all: half an hour on two CPU cores. Every
run is evaluated at 15%, so that its loss is comparable with bert_mini's. The step costs what 30% cost throughout.
Reference topology: one machine with 2 CPU cores.

Sources: [G] pretraining/train_10m.py and dataset.py of GPT-BERT, as copied in github.com/suchirsalhan/gpt-bert; the rest
is bert_mini.py's. GPT-BERT takes stretches of up to 3 tokens, all lengths equally likely; here they are single tokens.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "bert_mini_decay",
            "tokenizer": {"algorithm": "unigram", "vocab_size": 8192},  # ours: a head that a CPU can afford
            "model": {
                "vocab_size": 8192,
                "num_layers": 4,
                "embed_dim": 256,
                "num_heads": 4,
                "mlp_dim": 1024,  # four times the width, as in every BERT
                "max_positions": 512,
                "activation": "gelu_tanh",
                "init_std": 0.06,  # ours: about 1 / √width; at BERT's 0.02 so narrow a model sits at the unigram loss longer
                "dropout": 0.0,  # ours: no text is seen twice
                "attention_dropout": 0.0,
            },
            "masking": {
                "policy": "token",
                "rate": 0.3,  # [G]
                "schedule": "linear",  # [G], over the whole run
                "final_rate": 0.15,  # [G]
                "mask_prob": 0.8,  # [G]
                "random_prob": 0.1,  # [G]
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-3,  # ours
                "schedule": "linear",
                "warmup_steps": 300,  # ours: a twentieth
                "b2": 0.98,  # RoBERTa's
                "eps": 1e-6,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
            },
            "stages": (  # bert_mini.py's
                {"steps": 3600, "seq_len": 32, "batch_size": 64},
                {"steps": 2400, "seq_len": 128, "batch_size": 16},
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
