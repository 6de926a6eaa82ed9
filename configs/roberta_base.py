"""RoBERTa-base (Liu et al. 2019, arXiv:1907.11692), after the pre-training recipe that fairseq publishes for it.

Command:
    mlm-jax train --config configs/roberta_base.py --workdir runs/roberta_base \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
RoBERTa's own tokenizer: --config.tokenizer.algorithm=pretrained --config.tokenizer.path=tokenizer.json
Expected: 124,696,665 parameters (fairseq: 125M), 1,048,576 tokens a step, 131 billion tokens. The published model,
trained for 500,000 steps of 8,192 rows [P], has 87.6 on MNLI (fairseq:examples/roberta/README.md).
Reference topology: TPU v5e:8x8, 16 rows a chip in each of 2 micro-batches.

Sources: [Y] facebookresearch/fairseq:examples/roberta/config/pretraining/base.yaml, [E] README.pretraining.md above it,
[M] fairseq/models/roberta/model.py, [T] fairseq/tasks/masked_lm.py and data/mask_tokens_dataset.py, [L] fairseq/modules
(layer_norm.py, transformer_sentence_encoder.py); [P] from the paper, unchecked.
It differs in this: rows are packed documents that do not see each other; the 15% are an exact count, where fairseq rounds
at random; no dropout within attention, which fast kernels lack.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "roberta_base",
            "reference_topology": "v5e:8x8",
            # RoBERTa's is a byte-level BPE of 50,265 ids [P]; this one falls back to bytes for what it does not know.
            "tokenizer": {"algorithm": "bpe", "vocab_size": 50265, "byte_fallback": True, "sample_megabytes": 100.0},
            "model": {
                "vocab_size": 50265,  # [P]
                "num_layers": 12,  # [M]
                "embed_dim": 768,  # [M]
                "num_heads": 12,  # [M]
                "mlp_dim": 3072,  # [M]
                "max_positions": 512,  # [Y]
                "position_offset": 2,  # positions begin behind the padding id, 1 [P]
                "num_token_types": 0,  # [M]
                "activation": "gelu_erf",  # "gelu" [M], which torch computes exactly
                "norm_eps": 1e-5,  # [L]
                "dropout": 0.1,  # [Y]
                "attention_dropout": 0.0,  # [Y]: 0.1
                "init_std": 0.02,  # [L]
                "init_truncated": False,  # [L]
            },
            "masking": {
                "policy": "token",  # [T]
                "rate": 0.15,  # [T]
                "mask_prob": 0.8,  # [T]
                "random_prob": 0.1,  # [T]
                "random_from": "regular",  # [T]
                "include_special": True,  # [T]
            },
            "optimizer": {
                "name": "adamw",  # [Y]
                "learning_rate": 5e-4,  # [Y]; [E] gives 1e-4 for batches of 256 and 7e-4 for 8,192
                "schedule": "linear",  # [Y], polynomial of degree 1
                "warmup_steps": 10_000,  # [Y]
                "b1": 0.9,  # [Y]
                "b2": 0.98,  # [Y]
                "eps": 1e-6,  # [Y]
                "weight_decay": 0.01,  # [Y]
                "decay_norms_and_biases": True,  # fairseq:fairseq/optim/__init__.py has one group
                "bias_correction": True,  # fairseq/optim/adam.py
                "clip_norm": 0.0,  # [Y]
            },
            "stages": ({"steps": 125_000, "seq_len": 512, "batch_size": 2_048, "accumulation": 2},),  # [Y], [E]
            "compute": {"layers": "unroll"},
            "sharding": {"data": -1, "zero": True},
            "train": {"log_every": 100, "checkpoint_every": 1_000},
            "evaluation": {"every": 2_500, "probes": ("The capital of France is [MASK].",)},
        }
    ).lock()
