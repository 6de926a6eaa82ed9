"""BERT, whole-word masking, SpanBERT, ELECTRA, masked diffusion and GPT-BERT's objective at one shape, to be compared.

Command:
    mlm-jax compare --configs configs/compare_mini.py:mlm configs/compare_mini.py:span configs/compare_mini.py:rtd \
        --budget-minutes 20 --out runs/compare --config.data.source='files:corpus/*.jsonl.gz?field=text'
    mlm-jax train --config configs/compare_mini.py:span --workdir runs/span
The variants are mlm, whole_word, span, rtd, diffusion and hybrid; each is also a recipe of its own, as in the last line.
Expected: 5,335,552 parameters for mlm, whole_word, diffusion and hybrid, 5,595,064 parameters for span and
5,566,721 parameters for rtd; 2,048 tokens a step. `compare` replaces the number of steps by what its budget pays.
Reference topology: one machine with 2 CPU cores.

The values are ours: optimizer and data are those of bert_mini, with one row length, so that a bound over whole rows and a
masked loss are of the same rows; the shape is modern_mini's without its local layers, which learns position without short
rows first. 30% of tokens are masked where the objective has a rate (Wettig et al. 2023,
arXiv:2202.08005); every run is evaluated at 15%. span, rtd and hybrid have their papers' own settings by default, but the
generator of rtd shows every masked token as [MASK], where ELECTRA leaves 15% as they are.
"""

import ml_collections

VARIANTS = {
    "mlm": {},
    "whole_word": {"masking": {"policy": "whole_word", "rate": 0.3}},
    "span": {"objective": "span", "masking": {"policy": "span", "rate": 0.3}},
    "rtd": {"objective": "rtd", "masking": {"rate": 0.3, "mask_prob": 1.0, "random_prob": 0.0}},
    # It draws its own rates; where more of a row is masked, a random half stands for all, as in diffusion_mini.
    "diffusion": {"objective": "diffusion", "masking": {}, "diffusion": {"scored_share": 0.5}},
    "hybrid": {"objective": "hybrid"},
}


def get_config(variant: str) -> ml_collections.ConfigDict:
    """The recipe of a variant; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {[*VARIANTS]}")
    return ml_collections.ConfigDict(
        {
            "name": f"compare_mini_{variant}",
            "tokenizer": {"algorithm": "unigram", "vocab_size": 8192},
            "model": {
                "vocab_size": 8192,
                "num_layers": 4,
                "embed_dim": 256,
                "num_heads": 4,
                "mlp_dim": 688,
                "max_positions": 512,
                "positions": "rope",
                "rope_base": 1_000.0,
                "gated_mlp": True,
                "biases": False,
                "pre_norm": True,
                "first_norm": False,
                "norm_bias": False,
                "init_std": 0.06,
                "init_scaled": True,
                "dropout": 0.0,
                "attention_dropout": 0.0,
            },
            "masking": {"rate": 0.3},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-3,
                "schedule": "linear",
                "warmup_steps": 240,
                "b2": 0.98,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
            },
            "stages": ({"steps": 4800, "seq_len": 64, "batch_size": 32},),
            "train": {"log_every": 50, "checkpoint_every": 400},
            "evaluation": {"every": 400, "max_rows": 1024},
            **VARIANTS[variant],
        }
    ).lock()
