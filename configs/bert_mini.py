"""BERT-mini: the second smallest of Turc et al. 2019 (arXiv:1908.08962), for an evening on a laptop.

Command:
    mlm-jax train --config configs/bert_mini.py --workdir runs/bert_mini \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
Without the last line it reads the documentation that comes with Python, over and over.
Expected: 5,462,272 parameters, 2,048 tokens a step, 12.3 million tokens in all: half an hour on two CPU cores. On 53 MB
of Wikipedia: held-out loss 4.203 and accuracy 31.0%, where a unigram model has 6.988 and 3.5%.
The published model, with BERT's vocabulary of 30,522 and a full-length pre-training, scores 65.8 on GLUE's test set
(google-research/bert:README.md).
Reference topology: one machine with 2 CPU cores.

Sources: the shape (4 layers of width 256) is in google-research/bert:README.md. The run is thousands of times shorter
than the published one, so its values are ours, but for what a chosen position shows (create_pretraining_data.py there)
and for eps, decay and clipping (optimization.py).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "bert_mini",
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
            # ours: 30%, so that as many tokens teach twice as much (Wettig et al. 2023, arXiv:2202.08005); evaluated at 15%
            "masking": {"policy": "token", "rate": 0.3, "mask_prob": 0.8, "random_prob": 0.1},
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
            # ours: as BERT does, short rows first, in which position is learned from fewer tokens
            "stages": (
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
