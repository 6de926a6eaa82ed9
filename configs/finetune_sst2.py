"""BERT's settings for SST-2, sentiment of film reviews' phrases (Devlin et al. 2019, section 4.1; Socher et al. 2013).

Command:
    mlm-jax finetune --config configs/finetune_sst2.py --init RUN --workdir runs/sst2 --seeds 3 \
        --config.task.train=SST-2/train.tsv --config.task.dev=SST-2/dev.tsv
RUN is a pre-trained or an imported workdir, the files are GLUE's.
Expected: an accuracy of 93.5% on the test set from BERT-base (table 1 there).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "finetune_sst2",
            "objective": "classification",
            "task": {
                "train": "SST-2/train.tsv",
                "dev": "SST-2/dev.tsv",
                "text": "sentence",
                "label": "label",
                "labels": ("0", "1"),
                "epochs": 3,  # BERT's
                "warmup": 0.1,  # google-research/bert:run_classifier.py
                "dropout": 0.1,
                "metric": "accuracy",
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 2e-5,  # one of the paper's 5e-5, 4e-5, 3e-5 and 2e-5, chosen on dev
                "schedule": "linear",
                "weight_decay": 0.01,  # google-research/bert:optimization.py
                "eps": 1e-6,
                "bias_correction": False,
                "clip_norm": 1.0,
            },
            "stages": ({"seq_len": 128, "batch_size": 32},),
            "train": {"log_every": 50, "checkpoint_every": 1000},
            "evaluation": {"every": 500, "batch_size": 64},
        }
    ).lock()
