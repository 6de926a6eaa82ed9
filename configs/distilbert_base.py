"""DistilBERT's shape (Sanh et al. 2019, arXiv:1910.01108): BERT-base with half of its layers, trained without a teacher.

Command:
    mlm-jax train --config configs/distilbert_base.py --workdir runs/distilbert_base \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
BERT's own tokenizer: --config.tokenizer.algorithm=pretrained --config.tokenizer.path=vocab.txt
Expected: 66,985,530 parameters (published: 66M [P]), 2,097,152 tokens a step, 52 billion tokens.
Reference topology: TPU v5e:8x8, 16 rows a chip in each of 4 micro-batches.

Sources: [T] huggingface/transformers:models/distilbert, whose configuration is the published model's; [R] as in
roberta_base.py; [P] from the paper, unchecked: batches of up to 4,096 rows, masks as RoBERTa's.
It differs in this: the paper's loss is three, two of which compare the model with BERT and begin from its layers; this is
the third alone. Its rates are those of RoBERTa.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "distilbert_base",
            "reference_topology": "v5e:8x8",
            "tokenizer": {"algorithm": "unigram", "vocab_size": 30522, "lowercase": True, "sample_megabytes": 100.0},
            "model": {
                "vocab_size": 30522,  # [T]
                "num_layers": 6,  # [T]
                "embed_dim": 768,  # [T]
                "num_heads": 12,  # [T]
                "mlp_dim": 3072,  # [T]
                "max_positions": 512,  # [T]
                "num_token_types": 0,  # [T]
                "activation": "gelu_erf",  # [T]
                "norm_eps": 1e-12,  # [T]
                "dropout": 0.1,  # [T]
                "attention_dropout": 0.0,  # [T]: 0.1
                "init_std": 0.02,  # [T]
                "init_truncated": False,  # [T]
            },
            "masking": {"policy": "token", "rate": 0.15, "mask_prob": 0.8, "random_prob": 0.1},  # [P]
            "optimizer": {
                "name": "adamw",
                "learning_rate": 6e-4,  # [R], between its rates for 2,048 and 8,192 rows
                "schedule": "linear",  # [R]
                "warmup_steps": 1_250,  # ours: a twentieth
                "b1": 0.9,  # [R]
                "b2": 0.98,  # [R]
                "eps": 1e-6,  # [R]
                "weight_decay": 0.01,  # [R]
                "clip_norm": 0.0,  # [R]
            },
            "stages": ({"steps": 25_000, "seq_len": 512, "batch_size": 4_096, "accumulation": 4},),  # [P] rows; steps ours
            "compute": {"layers": "unroll"},
            "sharding": {"data": -1, "zero": True},
            "train": {"log_every": 100, "checkpoint_every": 1_000},
            "evaluation": {"every": 1_000, "probes": ("the capital of france is [MASK].",)},
        }
    ).lock()
