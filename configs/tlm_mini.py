"""multilingual_mini with translation language modelling: masked pairs of sentences whose translations help to fill them.

Command:
    mlm-jax train --config configs/tlm_mini.py:tlm --workdir runs/tlm
    mlm-jax train --config configs/tlm_mini.py:mlm --workdir runs/mlm \
        --config.tokenizer.algorithm=pretrained --config.tokenizer.path=runs/tlm/tokenizer
The second is the same model on the same sentences without their alignment: each is a document of its own. A third variant,
xlm, is the first with XLM's language embeddings; `mlm-jax fill-mask --language de` tells it the language of a text.
`python tests/retrieval.py runs/tlm runs/mlm --pairs 'pairs:corpus/tatoeba/deu-eng.tsv.gz'` finds translations by both.
It looks for its text in corpus/.
Expected: 7,440,896 parameters (xlm: 7,441,920 parameters), 2,048 tokens a step.
Reference topology: one machine with 2 CPU cores.

Source: TLM, with positions that begin anew in the second sentence, and its alternation with plain masked text, is section
3.3 of XLM (Conneau and Lample 2019, arXiv:1901.07291), as are language embeddings. XLM-R (arXiv:1911.02116) has none.
"""

import ml_collections

PLAIN = (
    {"name": "en", "uri": "files:corpus/en_wikipedia/*.jsonl.gz?field=text", "weight": 2.0},
    {"name": "de", "uri": "files:corpus/de_wikipedia/*.jsonl.gz?field=text", "weight": 2.0},
    {"name": "zh", "uri": "files:corpus/zh_wikipedia/*.jsonl.gz?field=text", "weight": 2.0},
    {"name": "ru", "uri": "files:corpus/ru_novels/*.txt.gz?documents=blank_line", "weight": 2.0},
)
PAIRS = (
    {"name": "de-en", "uri": "pairs:corpus/tatoeba/deu-eng.tsv.gz?columns=1,2", "weight": 2.0},
    {"name": "zh-en", "uri": "pairs:corpus/tatoeba/cmn-eng.tsv.gz?columns=1,2", "weight": 2.0},
    {"name": "ru-en", "uri": "pairs:corpus/tatoeba/rus-eng.tsv.gz?columns=1,2", "weight": 2.0},
)
# ours: a weight for each language and each pair, where XLM takes batches of both in turn
VARIANTS = {
    "tlm": (*PLAIN, *PAIRS),
    "xlm": (
        {**PLAIN[0], "language": "en"},
        {**PLAIN[1], "language": "de"},
        {**PLAIN[2], "language": "zh"},
        {**PLAIN[3], "language": "ru"},
        {**PAIRS[0], "language": "de,en"},
        {**PAIRS[1], "language": "zh,en"},
        {**PAIRS[2], "language": "ru,en"},
    ),
    "mlm": (
        *PLAIN,
        {"name": "de-en.de", "uri": "files:corpus/tatoeba/deu-eng.tsv.gz?field=1", "weight": 1.0},
        {"name": "de-en.en", "uri": "files:corpus/tatoeba/deu-eng.tsv.gz?field=2", "weight": 1.0},
        {"name": "zh-en.zh", "uri": "files:corpus/tatoeba/cmn-eng.tsv.gz?field=1", "weight": 1.0},
        {"name": "zh-en.en", "uri": "files:corpus/tatoeba/cmn-eng.tsv.gz?field=2", "weight": 1.0},
        {"name": "ru-en.ru", "uri": "files:corpus/tatoeba/rus-eng.tsv.gz?field=1", "weight": 1.0},
        {"name": "ru-en.en", "uri": "files:corpus/tatoeba/rus-eng.tsv.gz?field=2", "weight": 1.0},
    ),
}


def get_config(variant: str) -> ml_collections.ConfigDict:
    """The recipe with pairs (tlm), also with languages (xlm), or with the pairs' sentences as documents (mlm)."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is none of {[*VARIANTS]}")
    return ml_collections.ConfigDict(
        {
            "name": f"tlm_mini_{variant}",
            "data": {
                "sources": VARIANTS[variant],
                "validation_fraction": 0.05,
            },
            "tokenizer": {"algorithm": "unigram", "vocab_size": 16384, "sample_alpha": 0.3},
            "model": {
                "vocab_size": 16384,
                "languages": ("en", "de", "zh", "ru") if variant == "xlm" else (),
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
            },
            "masking": {"policy": "token", "rate": 0.3, "mask_prob": 0.8, "random_prob": 0.1},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-3,
                "schedule": "linear",
                "warmup_steps": 150,
                "b2": 0.98,
                "eps": 1e-6,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
            },
            "stages": ({"steps": 3000, "seq_len": 64, "batch_size": 32},),
            "train": {"log_every": 50, "checkpoint_every": 500},
            "evaluation": {"every": 1000, "max_rows": 2048},
        }
    ).lock()
