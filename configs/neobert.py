"""NeoBERT (Le Breton et al. 2025, arXiv:2502.19587): 28 narrow layers, rows of 1,024 and then of 4,096.

Command:
    mlm-jax train --config configs/neobert.py --workdir runs/neobert \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
BERT's tokenizer, as there: --config.tokenizer.algorithm=pretrained --config.tokenizer.path=tokenizer.json
Expected: 245,136,954 parameters, 221,665,536 of them without the decoder (published: 250M [P]); 2,097,152 tokens a step,
both before and after; 2.2 trillion tokens.
Reference topology: TPU v5e:8x8, 8 rows of 1,024 or 2 of 4,096 in a chip's micro-batch.

Sources: [N] chandar-lab/NeoBERT: conf, jobs and src/neobert (model.py, optimizer.py), global batches computed from them;
[P] from the paper, unchecked.
It differs in this: weights begin normal, with the deviation of the uniform ones in [N]; rows are packed documents.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "neobert",
            "reference_topology": "v5e:8x8",
            "tokenizer": {"algorithm": "unigram", "vocab_size": 30522, "lowercase": True, "sample_megabytes": 100.0},
            "model": {
                "vocab_size": 30522,  # [N]
                "num_layers": 28,  # [N]
                "embed_dim": 768,  # [N]
                "num_heads": 12,  # [N]
                "mlp_dim": 2048,  # two thirds of 3,072 [N]
                "max_positions": 4096,  # [N]
                "positions": "rope",  # [N]
                "rope_base": 10_000.0,  # [N]
                "activation": "silu",  # [N]
                "gated_mlp": True,  # [N]
                "biases": False,  # [N]
                "pre_norm": True,  # [N]
                "embedding_norm": False,  # [N]
                "norm": "rms",  # [N]
                "norm_eps": 1e-5,  # [N]
                "head_transform": False,  # [N]
                "tie_embeddings": False,  # [N]
                "init_std": 0.01155,  # 0.02 / √3 [N]
                "init_truncated": False,
            },
            "masking": {"policy": "token", "rate": 0.2, "mask_prob": 1.0, "random_prob": 0.0},  # [N]
            "optimizer": {
                "name": "adamw",  # [N]
                "learning_rate": 1e-4,  # [N]
                "schedule": "cosine",  # [N], over the first 900,000 steps
                "warmup_steps": 2_000,  # [N]
                "end_factor": 0.1,  # [P]
                "b1": 0.9,  # [N]
                "b2": 0.95,  # [N]
                "eps": 1e-8,  # [N]
                "weight_decay": 0.01,  # [N]
                "decay_norms_and_biases": True,  # [N]
                "clip_norm": 1.0,  # [N]
            },
            "stages": (  # [N]
                {"steps": 900_000, "seq_len": 1024, "batch_size": 2_048, "accumulation": 4},
                {"steps": 100_000, "seq_len": 1024, "batch_size": 2_048, "accumulation": 4, "learning_rate": 1e-5}
                | {"schedule": "constant"},
                {"steps": 50_000, "seq_len": 4096, "batch_size": 512, "accumulation": 4},
            ),
            "compute": {"remat": "dots"},
            "train": {"log_every": 100, "checkpoint_every": 5_000},
            "evaluation": {"every": 5_000, "probes": ("the capital of france is [MASK].",)},
        }
    ).lock()
