"""Continued pre-training of bert_mini on biomedical text, with a share of general text replayed, for two CPU cores.

Command:
    mlm-jax train --config configs/biomed_mini.py --workdir runs/biomed \
        --config.init_from=runs/bert_mini \
        --config.tokenizer.algorithm=pretrained --config.tokenizer.path=runs/bert_mini/tokenizer \
        --config.data.sources[0].uri='files:corpus/abstracts/*.jsonl.gz?field=text'
It looks for its text in corpus/: the domain's in pubmed/, and what runs/bert_mini was trained on in general/. Without the
second line it begins with random parameters and trains a tokenizer of the domain's own, to compare with.
`mlm-jax evaluate` shows both texts' held-out losses; `mlm-jax finetune --config configs/finetune_bc5cdr.py --init
runs/biomed` what a task gains.
Expected: 5,462,272 parameters, 2,048 tokens a step.
Reference topology: one machine with 2 CPU cores.

Sources: that a general model gains on a domain's tasks by going on with its pre-training there is shown by BioBERT (Lee et
al. 2020, arXiv:1901.08746) and by Gururangan et al. 2020 (arXiv:2004.10964); that a learning rate warmed up again, together
with a few percent of replayed text, keeps what was learned before, by Ibrahim et al. 2024 (arXiv:2403.08763). The shape is
bert_mini's; shares, rate and length are ours.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "biomed_mini",
            "data": {
                "sources": (
                    {"name": "biomedical", "uri": "files:corpus/pubmed/*.jsonl.gz?field=text", "weight": 0.9},
                    {"name": "general", "uri": "files:corpus/general/*.jsonl.gz?field=text", "weight": 0.1},  # replayed
                ),
                "alpha": 0.0,  # the weights are shares of the tokens
            },
            "tokenizer": {"algorithm": "unigram", "vocab_size": 8192},
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
            "masking": {"policy": "token", "rate": 0.3, "mask_prob": 0.8, "random_prob": 0.1},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 5e-4,  # ours: half of bert_mini's
                "schedule": "linear",
                "warmup_steps": 150,
                "b2": 0.98,
                "eps": 1e-6,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
            },
            "stages": ({"steps": 3000, "seq_len": 128, "batch_size": 16},),
            "train": {"log_every": 50, "checkpoint_every": 500},
            "evaluation": {"every": 500, "max_rows": 1024, "probes": ("The patient was treated with [MASK].",)},
        }
    ).lock()
