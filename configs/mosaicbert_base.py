"""MosaicBERT-base (Portes et al. 2023, arXiv:2312.17482): BERT with ALiBi and gated mlps, for a day on one machine.

Command:
    mlm-jax train --config configs/mosaicbert_base.py --workdir runs/mosaicbert_base \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
Expected: 137,400,384 parameters (published: 137M [P]), 524,288 tokens a step, 36.7 billion tokens. The paper reports 79.6 on
GLUE's dev sets after 1.13 hours on 8 A100, a shorter run (its abstract).
Reference topology: TPU v5e:4x4, 64 rows a chip in each of 4 micro-batches.

Sources: [Y] mosaicml/examples:examples/benchmarks/bert/yamls/main/mosaic-bert-base-uncased.yaml, steps computed from its
samples; [B] as in bert_base.py; [P] from the paper, unchecked.
It differs in this: rows are packed documents that do not see each other.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "mosaicbert_base",
            "reference_topology": "v5e:4x4",
            "tokenizer": {"algorithm": "unigram", "vocab_size": 30528, "lowercase": True, "sample_megabytes": 100.0},
            "model": {
                "vocab_size": 30528,  # BERT's, filled up to a multiple of 64 [P]
                "num_layers": 12,  # [Y]
                "embed_dim": 768,  # [Y]
                "num_heads": 12,  # [Y]
                "mlp_dim": 3072,  # [Y]
                "max_positions": 512,  # no table is so long: ALiBi knows no limit
                "positions": "alibi",  # [Y]
                "num_token_types": 2,  # [B]
                "activation": "gelu_erf",  # [P]
                "gated_mlp": True,  # [Y]
                "norm_eps": 1e-12,  # [B]
                "dropout": 0.1,  # [B]
                "attention_dropout": 0.0,  # [Y]
                "init_std": 0.02,  # [B]
                "init_truncated": False,  # [P]
            },
            "masking": {"policy": "token", "rate": 0.3, "mask_prob": 0.8, "random_prob": 0.1},  # [Y]
            "optimizer": {
                "name": "adamw",  # [Y]
                "learning_rate": 5e-4,  # [Y]
                "schedule": "linear",  # [Y]
                "warmup_steps": 4_200,  # 6% [Y]
                "end_factor": 0.02,  # [Y]
                "b1": 0.9,  # [Y]
                "b2": 0.98,  # [Y]
                "eps": 1e-6,  # [Y]
                "weight_decay": 1e-5,  # [Y]
                "decay_at_peak": True,  # DecoupledAdamW [Y]
                "clip_norm": 0.0,
            },
            "stages": ({"steps": 70_000, "seq_len": 128, "batch_size": 4_096, "accumulation": 4},),  # [Y]
            "compute": {"layers": "unroll"},
            "sharding": {"data": -1, "zero": True},
            "train": {"log_every": 100, "checkpoint_every": 3_500},
            "evaluation": {"every": 2_000, "probes": ("the capital of france is [MASK].",)},
        }
    ).lock()
