"""BabyLM's strict-small track: GPT-BERT small on 10 million words, each seen at most ten times (2025 edition).

Command:
    mlm-jax train --config configs/babylm_strict_small.py --workdir runs/babylm \
        --config.data.source='files:babylm/*.train?documents=line'
    mlm-jax score --workdir runs/babylm --pairs 'blimp/*.jsonl'
Expected: 31,468,672 parameters; 16,384 tokens a step; 143 million tokens, which are 9.93 passes over ten million words of
novels and Wikipedia. `prepare` takes no more words than that, and `train` refuses more than ten passes.
Outside figures, BLiMP by masked scoring, of the 2025 baselines [B]: GPT-BERT mixed 71.29, masked-focus 70.36; GPT-2 small
67.29. They were trained on BabyLM's own 10 million words (child-directed speech, dialogue, fiction, simple Wikipedia),
and are compared with a run on another text at the reader's risk. This recipe has not been run at full length.
Reference topology: TPU v5e:2x2, rows of 128, 256 and 512.

Sources: [T] train_10m.py, [C] configs/small.json and [M] model_extra.py of ltgoslo/gpt-bert; [B] the 2025 baselines as
mrothroc/mixlab-babylm-gptbert (configs/gptbert_masked_focus.json, README.md) has reproduced them: masked-focus 70.64.
It differs in this: the encoder is BERT's with norms before the sublayers and gated mlps, where [M] has relative positions
in buckets, gated attention, norms without parameters and weighted sums of all layers below; single tokens are masked, where
[T] masks spans of up to three; there is no cool-down of the last 1.6% and no z-loss of 1e-4.
`--config.hybrid.causal_share=0.5` is the baselines' "mixed".
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "babylm_strict_small",
            "reference_topology": "v5e:2x2",
            "objective": "hybrid",
            "hybrid": {"causal_share": 0.0625},  # [T] [B]
            "data": {"max_words": 10_000_000},
            "tokenizer": {"algorithm": "bpe", "vocab_size": 16384, "sample_megabytes": 60.0},  # [B]
            "model": {  # [C]
                "vocab_size": 16384,
                "num_layers": 12,
                "embed_dim": 384,
                "num_heads": 6,
                "mlp_dim": 1280,
                "gated_mlp": True,
                "pre_norm": True,
                "max_positions": 512,
                "activation": "gelu_tanh",  # [M] of the gate
                "norm_eps": 1e-7,  # [B]
                "dropout": 0.1,
                "attention_dropout": 0.1,
                "init_std": 0.0323,  # [M] √(2 / (5 · 384)), cut off at two deviations
                "init_truncated": True,
            },
            "masking": {"rate": 0.3, "schedule": "linear", "final_rate": 0.15, "mask_prob": 0.8, "random_prob": 0.1},  # [T]
            "optimizer": {
                "name": "lamb",
                "learning_rate": 7e-3,  # [B]
                "schedule": "cosine",
                "warmup_steps": 140,  # [T] 1.6%
                "end_factor": 0.1,
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "clip_norm": 2.0,
                "ema_decay": 0.999,
            },
            "stages": (  # [B] 16,384 tokens a step; [T] the rows longer from 70% and 90% on
                {"steps": 6125, "seq_len": 128, "batch_size": 128},
                {"steps": 1750, "seq_len": 256, "batch_size": 64},
                {"steps": 875, "seq_len": 512, "batch_size": 32},
            ),
            "train": {"log_every": 50, "checkpoint_every": 500, "max_epochs": 10},
            "evaluation": {"every": 1000},
        }
    ).lock()
