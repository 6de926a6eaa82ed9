"""ELECTRA-small (Clark et al. 2020, arXiv:2003.10555): replaced-token detection on one GPU.

Command:
    mlm-jax train --config configs/electra_small.py --workdir runs/electra_small \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
BERT's own WordPiece: --config.tokenizer.algorithm=pretrained --config.tokenizer.path=tokenizer.json
Expected: 14,196,219 parameters, of which the discriminator has 13,549,057 with the embeddings (published: 14M [R]);
16,384 tokens a step, 16 billion in all. The published run of these values on OpenWebText has 78.9 on MNLI [R]. The
released ELECTRA-small was trained for 4M steps with a generator as large as the model: rtd.generator_size=1.0 [R].
Reference topology: GPU h200:1x1; on a V100 the published run takes four days [R].

Sources: google-research/electra: [C] configure_pretraining.py, [G] run_pretraining.py, [H] pretrain/pretrain_helpers.py,
[A] model/modeling.py, [O] model/optimization.py, [U] util/training_utils.py, [R] README.md.
It differs in this: masked positions are distinct, where [H] draws them with replacement and averages the ids of two
samples for one place; rows are packed documents of token type 0, where pairs of segments fill them there; the rate decays
from the end of the warm-up, where [O] decays from step 0; no dropout within attention, which fast kernels lack.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "electra_small",
            "reference_topology": "h200:1x1",
            "objective": "rtd",
            "tokenizer": {"algorithm": "unigram", "vocab_size": 30522, "lowercase": True, "sample_megabytes": 100.0},
            "model": {  # the discriminator's
                "vocab_size": 30522,  # [C]
                "num_layers": 12,  # [U]
                "embed_dim": 256,  # [U]
                "table_dim": 128,  # [C]
                "num_heads": 4,  # [U]: one to 64 dimensions
                "mlp_dim": 1024,  # [U]
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
                "generator_size": 0.25,  # [C]: of the width; heads and mlp follow from it [G]
                "generator_layers": 1.0,  # [C]
                "generator_weight": 1.0,  # [C]
                "discriminator_weight": 50.0,  # [C]
                "embedding_sharing": "tied",  # [A]: token, position and type tables and their norm
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 5e-4,  # [C]
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
            "stages": ({"steps": 1_000_000, "seq_len": 128, "batch_size": 128},),  # [C]
            "train": {"log_every": 100, "checkpoint_every": 5_000},
            "evaluation": {"every": 10_000, "probes": ("the capital of france is [MASK].",)},
        }
    ).lock()
