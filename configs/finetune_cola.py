"""BERT's settings for CoLA, whether a sentence is acceptable (Devlin et al. 2019, section 4.1; Warstadt et al. 2019).

Command:
    mlm-jax finetune --config configs/finetune_cola.py --init RUN --workdir runs/cola --seeds 3 \
        --config.task.train=CoLA/train.tsv --config.task.dev=CoLA/dev.tsv
RUN is a pre-trained or an imported workdir; the files are GLUE's, whose columns have no names.
Expected: Matthews' correlation of 52.1 on the test set from BERT-base (table 1 there).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "finetune_cola",
            "objective": "classification",
            "task": {
                "train": "CoLA/train.tsv",
                "dev": "CoLA/dev.tsv",
                "text": "3",
                "label": "1",
                "labels": ("0", "1"),
                "epochs": 3,  # BERT's
                "warmup": 0.1,  # google-research/bert:run_classifier.py
                "dropout": 0.1,
                "metric": "matthews",
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
            "evaluation": {"every": 200, "batch_size": 64},
        }
    ).lock()
