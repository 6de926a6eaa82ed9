"""RoBERTa-large (Liu et al. 2019, arXiv:1907.11692).

Command:
    mlm-jax train --config configs/roberta_large.py --workdir runs/roberta_large \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
RoBERTa's own tokenizer: --config.tokenizer.algorithm=pretrained --config.tokenizer.path=tokenizer.json
Expected: 355,411,033 parameters (fairseq: 355M), 4,194,304 tokens a step, 2.1 trillion tokens. The published model has
90.2 on MNLI and 94.6 F1 on SQuAD 1.1 (fairseq:examples/roberta/README.md).
Reference topology: TPU v5p:4x4x4 (v5p-128), 64 rows a chip in each of 2 micro-batches.

Sources: [C] the published model's card as copied at ai.azure.com/catalog/models/roberta-large, seen in excerpts;
[M] facebookresearch/fairseq:fairseq/models/roberta/model.py; [B] as in roberta_base.py; [P] from the paper, unchecked.
It differs from the original as roberta_base.py does.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "roberta_large",
            "reference_topology": "v5p:4x4x4",
            "tokenizer": {"algorithm": "bpe", "vocab_size": 50265, "byte_fallback": True, "sample_megabytes": 100.0},
            "model": {
                "vocab_size": 50265,  # [P]
                "num_layers": 24,  # [M]
                "embed_dim": 1024,  # [M]
                "num_heads": 16,  # [M]
                "mlp_dim": 4096,  # [M]
                "max_positions": 512,  # [B]
                "position_offset": 2,  # [B]
                "num_token_types": 0,  # [M]
                "activation": "gelu_erf",  # [B]
                "norm_eps": 1e-5,  # [B]
                "dropout": 0.1,  # [M]
                "attention_dropout": 0.0,  # [M]: 0.1
                "init_std": 0.02,  # [B]
                "init_truncated": False,  # [B]
            },
            "masking": {  # [B]
                "policy": "token",
                "rate": 0.15,
                "mask_prob": 0.8,
                "random_prob": 0.1,
                "random_from": "regular",
                "include_special": True,
            },
            "optimizer": {
                "name": "adamw",  # [C]
                "learning_rate": 4e-4,  # [C]
                "schedule": "linear",  # [C]
                "warmup_steps": 30_000,  # [C]
                "b1": 0.9,  # [C]
                "b2": 0.98,  # [C]
                "eps": 1e-6,  # [C]
                "weight_decay": 0.01,  # [C]
                "decay_norms_and_biases": True,  # fairseq:fairseq/optim/__init__.py has one group
                "bias_correction": True,  # [B]
                "clip_norm": 0.0,  # [P]
            },
            "stages": ({"steps": 500_000, "seq_len": 512, "batch_size": 8_192, "accumulation": 2},),  # [C]
            "compute": {"layers": "unroll"},  # 64 rows take 27 GiB of a chip: on smaller ones more micro-batches
            "sharding": {"data": -1, "fsdp": 1, "zero": True},
            "train": {"log_every": 100, "checkpoint_every": 1_000},
            "evaluation": {"every": 2_500, "probes": ("The capital of France is [MASK].",)},
        }
    ).lock()
