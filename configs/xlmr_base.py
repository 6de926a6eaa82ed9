"""XLM-R base (Conneau et al. 2020, arXiv:1911.02116): RoBERTa on a hundred languages, the small ones seen more often.

Command:
    mlm-jax train --config configs/xlmr_base.py --workdir runs/xlmr_base \
        --config.data.sources="[{'name': 'en', 'uri': 'files:cc100/en.txt.gz?documents=blank_line'}, \
        {'name': 'sw', 'uri': 'files:cc100/sw.txt.gz?documents=blank_line'}]"
with a source for each language. XLM-R's own tokenizer is its SentencePiece file: --config.tokenizer.algorithm=pretrained
--config.tokenizer.path=sentencepiece.bpe.model
Expected: 278,294,418 parameters (the paper: 270M), 4,194,304 tokens a step, 6.3 trillion tokens.
Reference topology: TPU v5p:4x4x4 (v5p-128), 64 rows a chip in each of 2 micro-batches.

Sources: [A] the paper: 1.5 million updates of 8,192 rows, its sizes, and a SentencePiece unigram vocabulary of 250,000;
[H] Hugging Face's config.json of xlm-roberta-base: shape and vocabulary; [R] as in roberta_base.py, as XLM-R is
RoBERTa but for its data: the optimizer's values are not in the paper; [P] from the paper, unchecked: alpha.
It differs in this: rows are packed documents that do not see each other, and a batch holds all languages.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "xlmr_base",
            "reference_topology": "v5p:4x4x4",
            "data": {"alpha": 0.3},  # [P]
            "tokenizer": {
                "algorithm": "unigram",  # [A]
                "vocab_size": 250_002,  # [H]
                "byte_fallback": False,  # [H]: what is not covered is the unknown token
                "sample_megabytes": 1000.0,
                "sample_alpha": 0.3,  # [P]
            },
            "model": {
                "vocab_size": 250_002,  # [H]
                "num_layers": 12,  # [A]
                "embed_dim": 768,  # [A]
                "num_heads": 12,  # [A]
                "mlp_dim": 3072,  # [H]
                "max_positions": 512,  # [H]
                "position_offset": 2,  # [H]
                "num_token_types": 0,  # [R]
                "activation": "gelu_erf",  # [H]
                "norm_eps": 1e-5,  # [H]
                "dropout": 0.1,  # [H]
                "attention_dropout": 0.0,  # [H]: 0.1
                "init_std": 0.02,  # [H]
                "init_truncated": False,  # [R]
            },
            "masking": {  # [R]
                "policy": "token",
                "rate": 0.15,
                "mask_prob": 0.8,
                "random_prob": 0.1,
                "random_from": "regular",
                "include_special": True,
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 0.0006,  # [R], for RoBERTa's batches of 8,192
                "schedule": "linear",  # [R]
                "warmup_steps": 24_000,  # [R], likewise
                "b2": 0.98,  # [R]
                "eps": 1e-6,  # [R]
                "weight_decay": 0.01,  # [R]
                "decay_norms_and_biases": True,  # [R]
                "clip_norm": 0.0,  # [R]
            },
            "stages": ({"steps": 1_500_000, "seq_len": 512, "batch_size": 8_192, "accumulation": 2},),  # [A]
            "compute": {"remat": "dots"},
            "sharding": {"data": 1, "fsdp": -1},
            "train": {"log_every": 100, "checkpoint_every": 1_000},
            "evaluation": {"every": 2_500, "max_rows": 20_000},
        }
    ).lock()
