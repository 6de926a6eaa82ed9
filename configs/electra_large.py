"""ELECTRA-large (Clark et al. 2020, arXiv:2003.10555): replaced-token detection at a quarter of the tokens masked.

Command:
    mlm-jax train --config configs/electra_large.py --workdir runs/electra_large \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
BERT's own WordPiece: --config.tokenizer.algorithm=pretrained --config.tokenizer.path=tokenizer.json
Expected: 354,655,291 parameters, of which the discriminator has 335,142,913 with the embeddings (published: 335M [R]);
1,048,576 tokens a step, 419 billion in all. The released model, the paper's ELECTRA-1.75M, has 85.2
on GLUE's test set [R].
Reference topology: TPU v5e:8x8, 8 rows a chip in each of 4 micro-batches.

Sources: google-research/electra: [C] configure_pretraining.py, [G] run_pretraining.py, [H] pretrain/pretrain_helpers.py,
[A] model/modeling.py, [O] model/optimization.py, [U] util/training_utils.py, [R] README.md;
[P] from the paper, unchecked.
It differs from the original as electra_small.py does.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "electra_large",
            "objective": "rtd",
            "reference_topology": "v5e:8x8",
            "tokenizer": {"algorithm": "unigram", "vocab_size": 30522, "lowercase": True, "sample_megabytes": 100.0},
            "model": {  # the discriminator's
                "vocab_size": 30522,  # [C]
                "num_layers": 24,  # [U]
                "embed_dim": 1024,  # [U]
                "num_heads": 16,  # [U]: one to 64 dimensions
                "mlp_dim": 4096,  # [U]
                "max_positions": 512,  # [A]
                "num_token_types": 2,  # [A]
                "activation": "gelu_erf",  # [A]
                "norm_eps": 1e-12,  # [A], the default of its layer norm
                "dropout": 0.1,  # [A]
                "attention_dropout": 0.0,  # [A]: 0.1
                "init_std": 0.02,  # [A]
                "init_truncated": True,  # [A]
            },
            "masking": {
                "policy": "token",  # [H]
                "rate": 0.25,  # [C]
                "mask_prob": 0.85,  # [H]: the rest is shown unchanged, nothing as a random token
                "random_prob": 0.0,  # [H]
            },
            "rtd": {
                "generator_size": 0.25,  # [C]: of the width; heads and mlp follow from it [G]
                "generator_layers": 1.0,  # [C]
                "generator_weight": 1.0,  # [C]
                "discriminator_weight": 50.0,  # [C]
                "embedding_sharing": "tied",  # [A]: token, position and type tables and their norm
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 2e-4,  # [C]
                "schedule": "linear",  # [O]
                "warmup_steps": 10_000,  # [C]
                "b1": 0.9,  # [O]
                "b2": 0.999,  # [O]
                "eps": 1e-6,  # [O]
                "weight_decay": 0.01,  # [C]
                "decay_embeddings": True,  # [O]
                "bias_correction": False,  # [O]
                "clip_norm": 1.0,  # [O]
            },
            "stages": (
                {"steps": 400_000, "seq_len": 512, "batch_size": 2048, "accumulation": 4},
            ),  # [C], but for the steps [P]
            "compute": {"remat": "dots"},
            "sharding": {"data": 1, "fsdp": -1},
            "train": {"log_every": 100, "checkpoint_every": 5_000},
            "evaluation": {"every": 10_000, "probes": ("the capital of france is [MASK].",)},
        }
    ).lock()
