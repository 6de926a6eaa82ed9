"""ModernBERT-base (Warner et al. 2024, arXiv:2412.13663): rows of 1,024, then of 8,192, then a decay, in one run.

Command:
    mlm-jax train --config configs/modernbert_base.py --workdir runs/modernbert_base \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
ModernBERT's own tokenizer: --config.tokenizer.algorithm=pretrained --config.tokenizer.path=tokenizer.json
Expected: 149,655,232 parameters (published: 149M [P]); 786,432 tokens a step, then 1,572,864, 2,359,296, 3,145,728,
3,932,160 and 4,718,592; 2.02 trillion tokens. The published model has 88.4 on GLUE's dev sets (its model card).
Reference topology: TPU v5e:8x8, 12 rows of 1,024 or 1 of 8,192 in a chip's micro-batch.

Sources: [M] AnswerDotAI/ModernBERT, branch pretraining_documentation: yamls/modernbert/modernbert-base-pretrain.yaml,
-context-extension.yaml and -learning-rate-decay.yaml; [T] huggingface/transformers:models/modernbert, which has the
published weights' shape; [P] from the paper, unchecked.
It differs in this: the batch grows in five steps, where theirs grows row by row over the same 50 billion tokens; no
dropout of the attention's output, 0.1 in [M]; rows are packed documents that do not see each other.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "modernbert_base",
            "reference_topology": "v5e:8x8",
            # Theirs is a BPE of 50,280 pieces [P].
            "tokenizer": {"algorithm": "bpe", "vocab_size": 50368, "byte_fallback": True, "sample_megabytes": 100.0},
            "model": {
                "vocab_size": 50368,  # [M]
                "num_layers": 22,  # [M]
                "embed_dim": 768,  # [M]
                "num_heads": 12,  # [M]
                "mlp_dim": 1152,  # [M]
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
                "init_scaled": True,  # full_megatron [M]
            },
            "masking": {
                "policy": "token",
                "rate": 0.3,
                "random_from": "vocab",
                "include_special": True,
            },  # [M], and its code
            "optimizer": {
                "name": "stable_adamw",  # [M]
                "learning_rate": 8e-4,  # [M]
                "schedule": "constant",  # [M]: warm-up, stable, and no decay
                "warmup_steps": 3_815,  # 3 billion tokens [M]
                "end_factor": 0.001,  # [M]
                "b1": 0.9,  # [M]
                "b2": 0.98,  # [M]
                "eps": 1e-6,  # [M]
                "weight_decay": 1e-5,  # [M]
                "decay_at_peak": True,  # decoupled_stableadamw [M]
                "clip_norm": 0.0,  # [M]
            },
            "stages": (
                # [M]: 1.719 trillion tokens, of which the first 50 billion in growing batches.
                {"steps": 12_716, "seq_len": 1024, "batch_size": 768},
                {"steps": 6_358, "seq_len": 1024, "batch_size": 1_536, "accumulation": 2},
                {"steps": 4_239, "seq_len": 1024, "batch_size": 2_304, "accumulation": 3},
                {"steps": 3_179, "seq_len": 1024, "batch_size": 3_072, "accumulation": 4},
                {"steps": 2_543, "seq_len": 1024, "batch_size": 3_840, "accumulation": 5},
                {"steps": 353_707, "seq_len": 1024, "batch_size": 4_608, "accumulation": 6},
                # [M]: 250 billion tokens, then 50 billion.
                {"steps": 52_982, "seq_len": 8192, "batch_size": 576, "accumulation": 9, "learning_rate": 3e-4}
                | {"rope_base": 160_000.0},
                {"steps": 10_596, "seq_len": 8192, "batch_size": 576, "accumulation": 9, "learning_rate": 3e-4}
                | {"schedule": "one_minus_sqrt"},
            ),
            "compute": {"remat": "dots"},
            "train": {"log_every": 100, "checkpoint_every": 4_000},
            "evaluation": {"every": 4_000, "probes": ("The capital of France is [MASK].",)},
        }
    ).lock()
