"""ModernBERT-large (Warner et al. 2024, arXiv:2412.13663): modernbert_base.py deeper and wider, after its second half.

Command:
    mlm-jax train --config configs/modernbert_large.py --workdir runs/modernbert_large \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
Expected: 395,881,664 parameters (published: 395M [P]); 458,752 tokens a step, then 1,376,256, 2,293,760, 3,211,264,
4,128,768, 5,046,272 and 5,242,880; 2 trillion tokens. The published model has 90.4 on GLUE's dev sets ([P]).
Reference topology: TPU v5e:8x8, 7 rows of 1,024 or 1 of 8,192 in a chip's micro-batch.

Sources: [M] AnswerDotAI/ModernBERT, branch pretraining_documentation: yamls/modernbert/modernbert-large-*.yaml;
[T] huggingface/transformers:models/modernbert; [P] from the paper, unchecked.
It differs in this: random weights, where theirs begin as the base model's, tiled [M]; the batch grows in five steps;
640 rows of 8,192, where theirs are 616 and then 624, so that 64 chips divide them; a decay of 1e-5 throughout, 1e-6 in [M]
from the second half on; no dropout of the attention's output. After 900 billion tokens at 5e-4, a rate that [M] calls too
high, theirs went on at 5e-5.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "modernbert_large",
            "reference_topology": "v5e:8x8",
            "tokenizer": {"algorithm": "bpe", "vocab_size": 50368, "byte_fallback": True, "sample_megabytes": 100.0},
            "model": {
                "vocab_size": 50368,  # [M]
                "num_layers": 28,  # [M]
                "embed_dim": 1024,  # [M]
                "num_heads": 16,  # [M]
                "mlp_dim": 2624,  # [M]
                "max_positions": 8192,  # [M]
                "positions": "rope",  # [M]
                "rope_base": 10_000.0,  # [M], until the rows are longer
                "local_rope_base": 10_000.0,  # [M]
                "local_window": 64,  # [M]: 128 to both sides together
                "global_every": 3,  # [M]
                "activation": "gelu_erf",  # "gelu" [M], which torch computes exactly
                "gated_mlp": True,  # [M]
                "biases": False,  # [M]
                "pre_norm": True,  # [M]
                "first_norm": False,  # [M]
                "norm_bias": False,  # [M]
                "norm_eps": 1e-5,  # [M]
                "init_std": 0.02,  # [T]
                "init_truncated": True,  # [T]
                "init_scaled": True,  # [T]
            },
            "masking": {
                "policy": "token",
                "rate": 0.3,
                "random_from": "vocab",
                "include_special": True,
            },  # [M], and its code
            "optimizer": {
                "name": "stable_adamw",  # [M]
                "learning_rate": 5e-4,  # [M]
                "schedule": "constant",  # [M]: warm-up, stable, and no decay
                "warmup_steps": 4_360,  # 2 billion tokens [M]
                "end_factor": 0.001,  # [M]
                "b1": 0.9,  # [M]
                "b2": 0.98,  # [M]
                "eps": 1e-6,  # [M]
                "weight_decay": 1e-5,  # [M]
                "decay_at_peak": True,  # decoupled_stableadamw [M]
                "clip_norm": 0.0,  # [M]
            },
            "stages": (
                # [M]: 10 billion tokens in growing batches, 890 billion, and 800 billion at a tenth of the rate [P].
                {"steps": 4_360, "seq_len": 1024, "batch_size": 448},
                {"steps": 1_453, "seq_len": 1024, "batch_size": 1_344, "accumulation": 3},
                {"steps": 872, "seq_len": 1024, "batch_size": 2_240, "accumulation": 5},
                {"steps": 623, "seq_len": 1024, "batch_size": 3_136, "accumulation": 7},
                {"steps": 484, "seq_len": 1024, "batch_size": 4_032, "accumulation": 9},
                {"steps": 176_368, "seq_len": 1024, "batch_size": 4_928, "accumulation": 11},
                {"steps": 158_533, "seq_len": 1024, "batch_size": 4_928, "accumulation": 11, "learning_rate": 5e-5},
                # [M]: 250 billion tokens, then 50 billion.
                {"steps": 47_684, "seq_len": 8192, "batch_size": 640, "accumulation": 10, "learning_rate": 5e-5}
                | {"rope_base": 160_000.0},
                {"steps": 9_537, "seq_len": 8192, "batch_size": 640, "accumulation": 10, "learning_rate": 5e-5}
                | {"schedule": "one_minus_sqrt"},
            ),
            "compute": {"remat": "dots"},
            "train": {"log_every": 100, "checkpoint_every": 4_000},
            "evaluation": {"every": 4_000, "probes": ("The capital of France is [MASK].",)},
        }
    ).lock()
