"""BERT's settings for SQuAD 1.1 and 2.0, answers in a paragraph (Devlin et al. 2019, sections 4.2 and 4.3).

Command:
    mlm-jax finetune --config configs/finetune_squad.py --init RUN --workdir runs/squad \
        --config.task.train=train-v1.1.json --config.task.dev=dev-v1.1.json
RUN is a pre-trained or an imported workdir of at least 384 positions. For SQuAD 2.0 name its files and add
--config.task.null_answers=True.
Expected: on the dev set of 1.1 an exact match of 81.2 and F1 of 88.4 from BERT-base (google-research/bert:README.md).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "finetune_squad",
            "objective": "question_answering",
            "task": {
                "train": "train-v1.1.json",
                "dev": "dev-v1.1.json",
                "epochs": 2,  # with length, stride, batch and rate: google-research/bert:README.md, for BERT-base
                "warmup": 0.1,
                "dropout": 0.1,
                "stride": 128,
                "max_answer_tokens": 30,
                "buckets": (128, 192, 256, 384),  # ours
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
            "stages": ({"seq_len": 384, "batch_size": 12},),
            "train": {"log_every": 50, "checkpoint_every": 1000},
            "evaluation": {"every": 1000, "batch_size": 64},
        }
    ).lock()
