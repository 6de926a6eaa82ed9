"""Molecules as SMILES, after ChemBERTa (Chithrananda et al. 2020, arXiv:2010.09885), for two CPU cores.

Command:
    mlm-jax train --config configs/chem_mini.py --workdir runs/chem \
        --config.data.source='files:corpus/smiles.txt.gz?documents=line'
A .smi file, or a column of a table (`files:esol.csv?field=smiles`), is read likewise.
Expected: 3,427,272 parameters, 4,096 tokens a step. After 1,500 steps of a run of that length, on MoleculeNet's 227,209
molecules, 84.7% of the held-out masked tokens were right, loss 0.477 (unigram 24.4%, 2.443).
Reference topology: one machine with 2 CPU cores.

Sources: [C] the shape is that of DeepChem's ChemBERTa-77M-MLM (config.json); [T] the expression that cuts SMILES into
atoms, bonds, branches and rings matches what that of Schwaller et al. 2019 does (pschwllr/MolecularTransformer:README.md),
which the RXN models use; ChemBERTa itself has 600 pieces of BPE. The run is ours.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "chem_mini",
            "tokenizer": {
                "algorithm": "regex",
                "pattern": r"\[[^\]]+\]|Br?|Cl?|[NOSPFIbcnosp]|%[0-9]{2}|[0-9]|[()=#.+\\/:~@?>*$-]",  # [T]
                "vocab_size": 600,  # [C], and at most so many
            },
            "model": {
                "vocab_size": 600,  # [C]
                "num_layers": 3,  # [C]
                "embed_dim": 384,  # [C]
                "num_heads": 12,  # [C]
                "mlp_dim": 464,  # [C]
                "max_positions": 512,  # [C]: 513
                "activation": "gelu_erf",  # [C]
                "norm_eps": 1e-12,  # [C]
                "dropout": 0.0,  # [C]: 0.144
                "init_std": 0.05,  # [C]: 0.02, too little for so short a run
            },
            "masking": {"policy": "token", "rate": 0.15},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-3,
                "schedule": "linear",
                "warmup_steps": 150,
                "b2": 0.98,
                "weight_decay": 0.01,
            },
            "stages": ({"steps": 3000, "seq_len": 128, "batch_size": 32},),
            "train": {"log_every": 50, "checkpoint_every": 500},
            "evaluation": {"every": 500, "max_rows": 1024, "probes": ("CC(=O)Oc1ccccc1C(=O)[MASK]", "C[C@H]([MASK])C(=O)O")},
        }
    ).lock()
