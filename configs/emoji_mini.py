"""Emoji and their names, ViLT's way (Kim et al. 2021, arXiv:2102.03334) at a size for two CPU cores.

Command:
    mlm-jax train --config configs/emoji_mini.py --workdir runs/emoji \
        --config.data.source='images:emoji/labels.jsonl?field=name,keywords&tar=emoji/images_png64.tar'
Then: mlm-jax fill-mask --workdir runs/emoji --image rocket.png "[MASK], travel"
Expected: 604,034 parameters, 768 tokens and 2,048 patches a step; held-out loss 3.70 with the right image, 3.90 with none,
4.00 with another's.
Reference topology: one machine with 2 CPU cores.

Sources: shape and optimizer are ours, and so is everything else but the objective: whole words masked, and half of the
texts shown beside another's image. Texts of few words need a higher rate of masks than 15%.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "emoji_mini",
            "objective": "image_text",
            "data": {"validation_fraction": 0.15, "max_segments": 1},
            "tokenizer": {"algorithm": "bpe", "vocab_size": 1024, "byte_fallback": False, "lowercase": True},
            "model": {
                "vocab_size": 1024,
                "num_layers": 2,
                "embed_dim": 128,
                "num_heads": 4,
                "mlp_dim": 512,
                "max_positions": 64,
                "image_size": 64,
                "patch_size": 8,
                "dropout": 0.1,
                "init_std": 0.05,
            },
            "masking": {"policy": "whole_word", "rate": 0.4},
            "image_text": {"match_weight": 1.0, "exchange_rate": 0.5},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 2e-3,
                "schedule": "linear",
                "warmup_steps": 100,
                "b2": 0.98,
                "weight_decay": 0.05,
            },
            "stages": ({"steps": 1200, "seq_len": 24, "batch_size": 32},),
            "train": {"log_every": 50, "checkpoint_every": 600},
            "evaluation": {"every": 300, "max_rows": 512, "mask_rate": 0.3},
        }
    ).lock()
