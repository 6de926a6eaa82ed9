"""SpanBERT-large, cased (Joshi et al. 2020, arXiv:1907.10529): masked spans, predicted also from their ends.

Command:
    mlm-jax train --config configs/spanbert_large.py --workdir runs/spanbert_large \
        --config.data.source='files:corpus/*.jsonl.gz?field=text'
BERT's own cased WordPiece: --config.tokenizer.algorithm=pretrained --config.tokenizer.path=tokenizer.json
Expected: 336,998,976 parameters, 131,072 tokens a step, 315 billion tokens. The published model has 94.6 F1 on SQuAD 1.1
and 88.7 on SQuAD 2.0 (facebookresearch/SpanBERT:README.md).
Reference topology: TPU v5e:16x16, a row a chip, which bert_large.py fits with much to spare.

Sources, in facebookresearch/SpanBERT: [R] pretraining/README.md, [M] pretraining/fairseq/models/pair_bert.py,
[D] pretraining/fairseq/data/masking.py, [T] pretraining/fairseq/trainer.py; [P] from the paper, unchecked.
It differs from the original in four ways. A row's budget is rounded, and counts CLS and SEP; theirs is rounded up, of the
text alone. Random tokens are uniform over the vocabulary; theirs are drawn from the corpus. A loss is divided by the
weights of the whole batch; theirs on each device, with 1 added to the second. Rows hold several documents.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "spanbert_large",
            "objective": "span",
            "reference_topology": "v5e:16x16",
            "tokenizer": {"algorithm": "unigram", "vocab_size": 28996, "sample_megabytes": 100.0},
            "model": {
                "vocab_size": 28996,  # [M]
                "num_layers": 24,  # [M]
                "embed_dim": 1024,  # [M]
                "num_heads": 16,  # [M]
                "mlp_dim": 4096,  # [M]
                "max_positions": 512,  # [M]
                "num_token_types": 2,  # [M]
                "activation": "gelu_erf",  # [M]
                "norm_eps": 1e-12,  # [M]
                "dropout": 0.1,  # [M]
                "attention_dropout": 0.1,  # [M]
                "init_std": 0.02,  # [M]
                "init_truncated": False,  # [M]
            },
            "masking": {
                "policy": "span",  # [R]
                "rate": 0.15,  # [P]
                "max_words": 10,  # [R]
                "span_p": 0.2,  # [R]
                "mask_prob": 0.8,  # [D]
                "random_prob": 0.1,  # [D]
                "random_from": "vocab",
            },
            "span_boundary": {
                "max_targets": 15,  # [R]
                "position_dim": 200,  # [R]
                "loss_weight": 1.0,  # [R]
            },
            "optimizer": {
                "name": "adamw",  # [R]
                "learning_rate": 1e-4,  # [R]
                "schedule": "linear",  # [R]
                "warmup_steps": 10_000,  # [R]
                "b1": 0.9,  # [P]
                "b2": 0.999,  # [P]
                "eps": 1e-8,  # [R]
                "weight_decay": 0.01,  # [R]
                "decay_norms_and_biases": True,  # [T], one group of all parameters
                "clip_norm": 1.0,  # [R]
            },
            "stages": ({"steps": 2_400_000, "seq_len": 512, "batch_size": 256},),  # [R], 32 devices with 4,096 tokens each
            "compute": {"remat": "dots"},  # 16 rows of 512 exceed a chip of 16 GB otherwise
            "sharding": {"data": 1, "fsdp": -1},
            "train": {"log_every": 100, "checkpoint_every": 5_000},
            "evaluation": {"every": 10_000, "probes": ("The capital of France is [MASK].",)},
        }
    ).lock()
