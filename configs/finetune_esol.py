"""Solubility of molecules: ESOL (Delaney 2004) of MoleculeNet (Wu et al. 2018), on top of a run on SMILES.

Command:
    mlm-jax finetune --config configs/finetune_esol.py --init runs/chem --workdir runs/esol --seeds 3 \
        --config.task.train=moleculenet/esol.csv
runs/chem is chem_mini's. `--config.task.random_init=True` gives the same network from random
parameters, to compare with.
Expected: see the README's table of tasks. The file has no dev part: a tenth of its molecules, by hash, becomes one, so that
its root of the mean squared error (rmse, in log mol/l) compares with results on random splits, not on scaffolds.

The values are ours.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "finetune_esol",
            "objective": "regression",
            "task": {
                "train": "moleculenet/esol.csv",
                "dev_fraction": 0.1,
                "text": "smiles",
                "label": "measured log solubility in mols per litre",
                "pooling": "mean",
                "epochs": 12,
                "warmup": 0.1,
                "dropout": 0.0,
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 2e-4,
                "schedule": "linear",
                "weight_decay": 0.01,
                "eps": 1e-6,
                "clip_norm": 1.0,
            },
            "stages": ({"seq_len": 128, "batch_size": 32},),
            "train": {"log_every": 20, "checkpoint_every": 1000},
            "evaluation": {"every": 0, "batch_size": 64},
        }
    ).lock()
