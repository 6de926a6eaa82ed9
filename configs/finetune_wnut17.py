"""Entities that are rare and new, in WNUT 2017's texts from social media (Derczynski et al. 2017, W17-4418).

Command:
    mlm-jax finetune --config configs/finetune_wnut17.py --init RUN --workdir runs/wnut17 --seeds 3 \
        --config.task.train=wnut17train.conll --config.task.dev=emerging.dev.conll
RUN is a pre-trained or an imported workdir; the files are the shared task's, a word and its tag a line.
Expected: on the test set the best systems of 2017 had an entity F1 of 41.9 (the paper's table 4).

The settings are those that Devlin et al. 2019 (section 5.3) tag CoNLL 2003 with.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "finetune_wnut17",
            "objective": "tagging",
            "task": {
                "train": "wnut17train.conll",
                "dev": "emerging.dev.conll",
                "epochs": 3,
                "warmup": 0.1,
                "dropout": 0.1,
                "stride": 64,  # ours: sentences above 126 pieces are divided into windows
                "metric": "f1",
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 5e-5,  # one of the paper's 5e-5, 4e-5, 3e-5 and 2e-5, chosen on dev
                "schedule": "linear",
                "weight_decay": 0.01,  # google-research/bert:optimization.py
                "eps": 1e-6,
                "bias_correction": False,
                "clip_norm": 1.0,
            },
            "stages": ({"seq_len": 128, "batch_size": 32},),
            "train": {"log_every": 50, "checkpoint_every": 1000},
            "evaluation": {"every": 100, "batch_size": 64},
        }
    ).lock()
