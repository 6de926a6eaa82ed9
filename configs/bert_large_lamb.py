"""BERT-large in two phases of large batches with LAMB (You et al. 2019, arXiv:1904.00962), after NVIDIA's recipe.

Command:
    mlm-jax train --config configs/bert_large_lamb.py --workdir runs/bert_large_lamb \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
Expected: 335,174,458 parameters; 8,388,608 tokens a step, later 16,777,216; 85 billion tokens. The paper reports the
quality of BERT-large after 8,599 steps ([P]; here 8,601).
Reference topology: TPU v5e:16x16, 64 rows of 128 or 16 of 512 in a chip's micro-batch.

Sources: [N] NVIDIA/DeepLearningExamples:PyTorch/LanguageModeling/BERT/scripts/run_pretraining.sh, for 8 GPUs;
[F] NVIDIA/apex:apex/optimizers/fused_lamb.py; [B] as in bert_large.py; [P] from the paper, unchecked.
It differs in this: no next-sentence prediction; no dropout within attention, which fast kernels lack; the rate falls
linearly from the end of the warm-up, as in the paper [P], where NVIDIA's falls with the square root of what is left of
the phase (schedulers.py there).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "bert_large_lamb",
            "reference_topology": "v5e:16x16",
            "tokenizer": {"algorithm": "unigram", "vocab_size": 30522, "lowercase": True, "sample_megabytes": 100.0},
            "model": {  # [B]
                "vocab_size": 30522,
                "num_layers": 24,
                "embed_dim": 1024,
                "num_heads": 16,
                "mlp_dim": 4096,
                "max_positions": 512,
                "num_token_types": 2,
                "activation": "gelu_tanh",
                "norm_eps": 1e-12,
                "dropout": 0.1,
                "attention_dropout": 0.0,  # [B]: 0.1
                "init_std": 0.02,
                "init_truncated": True,
            },
            "masking": {  # [B]
                "policy": "token",
                "rate": 0.15,
                "mask_prob": 0.8,
                "random_prob": 0.1,
                "random_from": "vocab",
            },
            "optimizer": {
                "name": "lamb",  # [N]
                "learning_rate": 6e-3,  # [N]
                "schedule": "linear",  # [P]
                "warmup_steps": 2_001,  # 0.2843 of the first phase [N]
                "b1": 0.9,  # [F]
                "b2": 0.999,  # [F]
                "eps": 1e-6,  # [F]
                "weight_decay": 0.01,  # run_pretraining.py beside [N]
                "bias_correction": True,  # [F]
                "clip_norm": 1.0,  # [F]
            },
            "stages": (  # [N]: 8 × 8192 rows, then 8 × 4096; the second warm-up is 0.128 of its phase
                {"steps": 7_038, "seq_len": 128, "batch_size": 65_536, "accumulation": 4},
                {
                    "steps": 1_563,
                    "seq_len": 512,
                    "batch_size": 32_768,
                    "accumulation": 8,
                    "learning_rate": 4e-3,
                    "warmup_steps": 200,
                },
            ),
            "compute": {"layers": "unroll"},
            "sharding": {"data": -1, "fsdp": 1, "zero": True},
            "train": {"log_every": 10, "checkpoint_every": 200},
            "evaluation": {"every": 200, "probes": ("the capital of france is [MASK].",)},
        }
    ).lock()
