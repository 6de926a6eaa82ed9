"""Masked diffusion at BERT-base's size: MDLM small on OpenWebText (Sahoo et al. 2024, arXiv:2406.07524).

Command:
    mlm-jax train --config configs/mdlm_small.py --workdir runs/mdlm_small \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
    mlm-jax generate --workdir runs/mdlm_small --length 200 --steps 200 --method ancestral
Expected: 162,965,376 parameters; 524,288 tokens a step; 524 billion tokens. The paper's model of 110 million parameters
reaches a perplexity bound of 23.00 on LM1B, its autoregressive twin 20.09 ([P]).
Reference topology: TPU v5e:8x8, 8 rows a chip.

Sources: [C] kuleshov-group/mdlm:configs/config.yaml, [M] configs/model/small.yaml, [D] diffusion.py;
[P] from the paper, unchecked.
It differs in this: an encoder with rotated positions and its norms before the sublayers stands for the diffusion
transformer, which has a norm less, no biases in its attention, and time conditioning that is off; documents are packed and
see only themselves, where [C] wraps them; CLS and SEP are never masked; rates are uniform in [0.001, 1) and weigh 1 / rate,
where [D] masks with 0.999 of the rate that it weighs by; and the vocabulary is our own, of GPT-2's size rounded up.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "mdlm_small",
            "reference_topology": "v5e:8x8",
            "objective": "diffusion",
            "tokenizer": {"algorithm": "bpe", "vocab_size": 50304, "sample_megabytes": 100.0},  # ours
            "model": {
                "vocab_size": 50304,
                "num_layers": 12,  # [M]
                "embed_dim": 768,
                "num_heads": 12,
                "mlp_dim": 3072,
                "max_positions": 1024,
                "positions": "rope",
                "rope_base": 10_000.0,
                "pre_norm": True,
                "first_norm": False,
                "activation": "gelu_tanh",
                "norm_eps": 1e-5,
                "dropout": 0.1,
                "attention_dropout": 0.0,
                "tie_embeddings": False,
            },
            "diffusion": {"min_rate": 1e-3},  # [C] sampling_eps
            "optimizer": {  # [C]
                "name": "adamw",
                "learning_rate": 3e-4,
                "schedule": "constant",
                "warmup_steps": 2500,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "ema_decay": 0.9999,
            },
            "stages": ({"steps": 1_000_000, "seq_len": 1024, "batch_size": 512},),  # [C]
            "train": {"log_every": 100, "checkpoint_every": 5000},
            "evaluation": {"every": 10_000, "max_rows": 512},
        }
    ).lock()
