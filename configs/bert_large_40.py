"""BERT-large at a masking rate of 40%, every masked token shown as the mask (Wettig et al. 2023, arXiv:2202.08005).

Command:
    mlm-jax train --config configs/bert_large_40.py --workdir runs/bert_large_40 \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
RoBERTa's own tokenizer: --config.tokenizer.algorithm=pretrained --config.tokenizer.path=tokenizer.json
Expected: 355,413,081 parameters, 524,288 tokens a step, 12 billion tokens. The published model has 84.5 on MNLI, and 84.2
with a rate of 15% (princeton-nlp/DinkyTrain:README.md).
Reference topology: TPU v5p:4x4x4 (v5p-128), 64 rows a chip, a quarter of the tokens of roberta_large.py's.

Sources, in princeton-nlp/DinkyTrain: [E] run_efficient_mlm_recipe.sh, [R] README.md; [M] its architecture roberta_large
in facebookresearch/fairseq:fairseq/models/roberta/model.py; [B] as in roberta_base.py.
Its layer norms are before the sublayers, as theirs: what transformers calls roberta-prelayernorm, which `export` does not
write.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "bert_large_40",
            "reference_topology": "v5p:4x4x4",
            "tokenizer": {"algorithm": "bpe", "vocab_size": 50265, "byte_fallback": True, "sample_megabytes": 100.0},
            "model": {
                "vocab_size": 50265,  # [B]
                "num_layers": 24,  # [M]
                "embed_dim": 1024,  # [M]
                "num_heads": 16,  # [M]
                "mlp_dim": 4096,  # [M]
                "max_positions": 512,  # [E]
                "position_offset": 2,  # [B]
                "num_token_types": 0,  # [M]
                "pre_norm": True,  # [E]
                "activation": "gelu_erf",  # [B]
                "norm_eps": 1e-5,  # [B]
                "dropout": 0.1,  # [E]
                "attention_dropout": 0.1,  # [E]
                "init_std": 0.02,  # [B]
                "init_truncated": False,  # [B]
            },
            "masking": {
                "policy": "token",  # [E]
                "rate": 0.4,  # [E]
                "mask_prob": 1.0,  # [E]
                "random_prob": 0.0,  # [E]
                "include_special": True,  # [B]
            },
            "optimizer": {
                "name": "adamw",  # [E]
                "learning_rate": 2e-3,  # [E]
                "schedule": "linear",  # [E]
                "warmup_steps": 1_380,  # [E]
                "b1": 0.9,  # [E]
                "b2": 0.98,  # [E]
                "eps": 1e-6,  # [E]
                "weight_decay": 0.01,  # [E]
                "decay_norms_and_biases": True,  # [B]
                "clip_norm": 0.0,  # [E]
            },
            "stages": ({"steps": 23_000, "seq_len": 128, "batch_size": 4_096},),  # [E]
            "compute": {"remat": "dots"},
            "sharding": {"data": 1, "fsdp": -1},
            "train": {"log_every": 100, "checkpoint_every": 1_000},
            "evaluation": {"every": 1_000, "probes": ("The capital of France is [MASK].",)},
        }
    ).lock()
