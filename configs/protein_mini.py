"""Protein sequences, after the smallest ESM-2 (Lin et al. 2023, doi:10.1126/science.ade2574), for two CPU cores.

Command:
    mlm-jax train --config configs/protein_mini.py --workdir runs/protein \
        --config.data.source='files:corpus/*.fasta.gz'
Expected: 7,676,193 parameters, 4,096 tokens a step.
Reference topology: one machine with 2 CPU cores.

Sources: [E] config.json of facebook/esm2_t6_8M_UR50D; [P] from the paper, unchecked: 15% masked 80/10/10, Adam with
b2 0.98 and decay 0.01, a peak of 4e-4 after 2,000 steps that falls to a tenth. ESM-2 was trained for 500,000 updates of 2
million tokens in rows of 1,024; those are 2,000 steps of 4,096 here, so warm-up and rate are ours.
It differs in this: positions are learned and norms come behind each sublayer, where ESM-2 rotates and normalises before;
special tokens and padding are ours; a row holds several proteins that do not see each other.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "protein_mini",
            "data": {"validation_fraction": 0.05},  # so few proteins
            "tokenizer": {"algorithm": "characters", "vocab_size": 33},
            "model": {
                "vocab_size": 33,  # [E]
                "num_layers": 6,  # [E]
                "embed_dim": 320,  # [E]
                "num_heads": 20,  # [E]
                "mlp_dim": 1280,  # [E]
                "max_positions": 512,  # [E]: 1,026
                "activation": "gelu_erf",  # [E]
                "norm_eps": 1e-5,  # [E]
                "dropout": 0.0,  # [E]
                "init_std": 0.05,  # [E]: 0.02, too little for so short a run
            },
            "masking": {"policy": "token", "rate": 0.15, "mask_prob": 0.8, "random_prob": 0.1},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-3,
                "schedule": "linear",  # [P]
                "end_factor": 0.1,  # [P]
                "warmup_steps": 100,
                "b2": 0.98,  # [P]
                "eps": 1e-8,  # [P]
                "weight_decay": 0.01,  # [P]
            },
            "stages": ({"steps": 2000, "seq_len": 256, "batch_size": 16},),
            "train": {"log_every": 50, "checkpoint_every": 500},
            "evaluation": {"every": 500, "max_rows": 512, "probes": ("MKT[MASK]LLLTLVVVTIVCLDLGYT",)},
        }
    ).lock()
