"""Questions about single sentences, whose answers stand in them: QAMR in SQuAD's form (Michael et al. 2018, N18-2089).

Command:
    mlm-jax finetune --config configs/finetune_qamr.py --init RUN --workdir runs/qamr --seeds 3 \
        --config.task.train=squad_format_dev.json.gz
RUN is a pre-trained or an imported workdir. Without task.dev a tenth of the sentences, with all their questions, is left out
of training to choose the best checkpoint by.

The settings are those of BERT for SQuAD (google-research/bert:README.md), with the length that sentences need.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "finetune_qamr",
            "objective": "question_answering",
            "task": {
                "train": "squad_format_dev.json.gz",
                "epochs": 2,
                "warmup": 0.1,
                "dropout": 0.1,
                "stride": 64,
                "max_answer_tokens": 30,
                "metric": "f1",
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 3e-5,
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
