"""Chemicals and diseases in abstracts: BC5CDR (Li et al. 2016), as BioBERT is tuned (Lee et al. 2020, arXiv:1901.08746).

Command:
    mlm-jax finetune --config configs/finetune_bc5cdr.py --init RUN --workdir runs/bc5cdr --seeds 3 \
        --config.task.train=BC5CDR-IOB/train.tsv --config.task.dev=BC5CDR-IOB/devel.tsv
RUN is a pre-trained or an imported workdir; in the files a word and its tag are a line.
Expected: see the README for what a small model reaches; the paper gives figures for diseases and chemicals apart.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "finetune_bc5cdr",
            "objective": "tagging",
            "task": {
                "train": "BC5CDR-IOB/train.tsv",
                "dev": "BC5CDR-IOB/devel.tsv",
                "epochs": 5,  # ours: the paper chooses on dev
                "warmup": 0.1,
                "dropout": 0.1,
                "stride": 64,
                "metric": "f1",
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 5e-5,  # of the paper's 5e-5, 3e-5 and 1e-5
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
