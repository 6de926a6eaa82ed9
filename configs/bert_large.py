"""BERT-large, uncased (Devlin et al. 2018, arXiv:1810.04805), with the masked-language-model objective alone.

Command:
    mlm-jax train --config configs/bert_large.py --workdir runs/bert_large \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
BERT's own WordPiece: --config.tokenizer.algorithm=pretrained --config.tokenizer.path=tokenizer.json
Expected: 335,174,458 parameters; 32,768 tokens a step, later 131,072; 43 billion tokens. The published model has 90.9
F1 on SQuAD 1.1's development set (google-research/bert:README.md).
Reference topology: TPU v5e:16x16, a row a chip.

Sources: [O] google-research/bert:optimization.py, [A] modeling.py, [D] create_pretraining_data.py, [R] README.md;
[P] from the paper, unchecked: that it shares BERT-base's values but for its shape.
It differs from the original as bert_base.py does.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "bert_large",
            "reference_topology": "v5e:16x16",
            "tokenizer": {"algorithm": "unigram", "vocab_size": 30522, "lowercase": True, "sample_megabytes": 100.0},
            "model": {
                "vocab_size": 30522,  # of the published vocabulary file [P]
                "num_layers": 24,  # [R]
                "embed_dim": 1024,  # [R]
                "num_heads": 16,  # [R]
                "mlp_dim": 4096,  # [P]
                "max_positions": 512,  # [A]
                "num_token_types": 2,  # [A]
                "activation": "gelu_tanh",  # [A]
                "norm_eps": 1e-12,  # [A], the default of its layer norm
                "dropout": 0.1,  # [A]
                "attention_dropout": 0.0,  # [A]: 0.1
                "init_std": 0.02,  # [A]
                "init_truncated": True,  # [A]
            },
            "masking": {
                "policy": "token",  # [D]
                "rate": 0.15,  # [R]
                "mask_prob": 0.8,  # [D]
                "random_prob": 0.1,  # [D]
                "random_from": "vocab",  # [D]
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-4,  # [R]
                "schedule": "linear",  # [O]
                "warmup_steps": 10_000,  # [P]
                "b1": 0.9,  # [O]
                "b2": 0.999,  # [O]
                "eps": 1e-6,  # [O]
                "weight_decay": 0.01,  # [O]
                "decay_embeddings": True,  # [O]
                "bias_correction": False,  # [O]
                "clip_norm": 1.0,  # [O]
            },
            "stages": (  # 1M steps [R], 90% of them on short rows, 256 rows in a batch [P]
                {"steps": 900_000, "seq_len": 128, "batch_size": 256},
                {"steps": 100_000, "seq_len": 512, "batch_size": 256},
            ),
            "compute": {"layers": "unroll"},
            "sharding": {"data": 1, "fsdp": -1},
            "train": {"log_every": 100, "checkpoint_every": 5_000},
            "evaluation": {"every": 10_000, "probes": ("the capital of france is [MASK].",)},
        }
    ).lock()
