"""GPT-BERT small for 10 million words (Charpentier and Samuel 2024, arXiv:2410.24159), with its objective and schedule.

Command:
    mlm-jax train --config configs/gpt_bert_small.py --workdir runs/gpt_bert_small \
        --config.data.source='files:corpus/*.txt?documents=line'
    mlm-jax generate --workdir runs/gpt_bert_small --method causal --prompt 'Once upon a time'
Expected: 28,314,752 parameters; 4,194,304 tokens a step; 33 billion tokens.
Reference topology: TPU v5e:8x8, 32 rows of 128 in a chip's micro-batch.

Sources: [T] train_10m.py, [C] configs/small.json and [M] model_extra.py of ltgoslo/gpt-bert.
It differs in this: the encoder is BERT's with norms before the sublayers and gated mlps, where [M] has relative positions
in buckets, gated attention, norms without parameters and weighted sums of all layers below; single tokens are masked, where
[T] masks spans of up to three and prefers what was masked seldom; the batch is whole from the start, where [T] begins with
a quarter; there is no cool-down of the last 1.6% and no z-loss of 1e-4.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "gpt_bert_small",
            "reference_topology": "v5e:8x8",
            "objective": "hybrid",
            "hybrid": {"causal_share": 0.0625},  # [T] 15 of 16 processes are masked
            "tokenizer": {"algorithm": "bpe", "vocab_size": 8192, "sample_megabytes": 60.0},
            "model": {  # [C]
                "vocab_size": 8192,
                "num_layers": 12,
                "embed_dim": 384,
                "num_heads": 6,
                "mlp_dim": 1280,
                "gated_mlp": True,
                "pre_norm": True,
                "max_positions": 512,
                "activation": "gelu_tanh",  # [M] of the gate
                "norm_eps": 1e-5,
                "dropout": 0.1,
                "attention_dropout": 0.1,
                "init_std": 0.0323,  # [M] √(2 / (5 · 384)), cut off at two deviations
                "init_truncated": True,
            },
            "masking": {"rate": 0.3, "schedule": "linear", "final_rate": 0.15, "mask_prob": 0.8, "random_prob": 0.1},  # [T]
            "optimizer": {  # [T]
                "name": "lamb",
                "learning_rate": 1.41e-2,
                "schedule": "cosine",
                "warmup_steps": 124,  # 1.6%
                "end_factor": 0.1,
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "clip_norm": 2.0,
                "ema_decay": 0.999,
            },
            "stages": (  # [T] 7,812 steps, the rows longer from 70% and 90% on
                {"steps": 5468, "seq_len": 128, "batch_size": 32768, "accumulation": 16},
                {"steps": 1562, "seq_len": 256, "batch_size": 16384, "accumulation": 16},
                {"steps": 782, "seq_len": 512, "batch_size": 8192, "accumulation": 16},
            ),
            "train": {"log_every": 20, "checkpoint_every": 500},
            "evaluation": {"every": 1000},
        }
    ).lock()
