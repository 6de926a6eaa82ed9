"""ELECTRA-base (Clark et al. 2020, arXiv:2003.10555): replaced-token detection with a generator of a third.

Command:
    mlm-jax train --config configs/electra_base.py --workdir runs/electra_base \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
BERT's own WordPiece: --config.tokenizer.algorithm=pretrained --config.tokenizer.path=tokenizer.json
Expected: 119,386,427 parameters, of which the discriminator has 109,483,009 with the embeddings (published: 110M [R]);
131,072 tokens a step, 100 billion in all. The released model, trained longer and on more text,
has 82.7 on GLUE's test set [R].
DeBERTaV3's sharing of embeddings: --config.rtd.embedding_sharing=disentangled
Reference topology: TPU v5e:4x4, 16 rows a chip.

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
            "name": "electra_base",
            "objective": "rtd",
            "reference_topology": "v5e:4x4",
            "tokenizer": {"algorithm": "unigram", "vocab_size": 30522, "lowercase": True, "sample_megabytes": 100.0},
            "model": {  # the discriminator's
                "vocab_size": 30522,  # [C]
                "num_layers": 12,  # [U]
                "embed_dim": 768,  # [U]
                "num_heads": 12,  # [U]: one to 64 dimensions
                "mlp_dim": 3072,  # [U]
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
                "rate": 0.15,  # [C]
                "mask_prob": 0.85,  # [H]: the rest is shown unchanged, nothing as a random token
                "random_prob": 0.0,  # [H]
            },
            "rtd": {
                "generator_size": 1 / 3,  # [C]: of the width; heads and mlp follow from it [G]
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
            "stages": ({"steps": 766_000, "seq_len": 512, "batch_size": 256},),  # [C], but for the steps [P]
            "compute": {"layers": "unroll"},
            "sharding": {"data": -1, "zero": True},
            "train": {"log_every": 100, "checkpoint_every": 5_000},
            "evaluation": {"every": 10_000, "probes": ("the capital of france is [MASK].",)},
        }
    ).lock()
