"""ViLT-B/32 (Kim et al. 2021, arXiv:2102.03334): texts and the patches of their images in one encoder, on a pod.

Command:
    mlm-jax train --config configs/vilt_base.py --workdir runs/vilt \
        --config.data.source='images:captions/*.jsonl?field=caption&image=file'
Also from TFDS: 'tfds:coco_captions#train?image=image&field=captions/text', each caption of an image as a pair of its own.
BERT's own WordPiece: --config.tokenizer.algorithm=pretrained --config.tokenizer.path=tokenizer.json
Expected: 112,217,660 parameters, 163,840 tokens and 589,824 patches a step, 819 million pairs: the published run is of
200,000 steps [T] on ten million captions.
Reference topology: TPU v5e:4x4 (v5e-16), 64 rows a chip in each of 4 micro-batches.

Sources: dandelin/ViLT: [C] vilt/config.py, [T] TRAIN.md, [U] vilt/modules/vilt_utils.py, [M] vilt/modules/vilt_module.py;
[H] transformers:models/vilt/configuration_vilt.py.
It differs in this: it begins with random parameters, where [M] begins with ViT's, trained on ImageNet; masked text and
exchanged images are of one pass, where [C] has a pass for each; images become squares, where theirs are oblongs of at
most 384 × 640 of which 200 patches are drawn; patches are normed, and have no class token; what alignment of words and
patches adds to the loss there is left out; no dropout within attention, which fast kernels lack.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every field that it leaves out has its default in `mlm_jax/config/sections.py`."""
    return ml_collections.ConfigDict(
        {
            "name": "vilt_base",
            "objective": "image_text",
            "reference_topology": "v5e:4x4",
            "data": {"max_segments": 1, "image_resize": "pad"},
            "tokenizer": {"algorithm": "unigram", "vocab_size": 30522, "lowercase": True, "sample_megabytes": 100.0},
            "model": {
                "vocab_size": 30522,  # [C]
                "num_layers": 12,  # [C]
                "embed_dim": 768,  # [C]
                "num_heads": 12,  # [C]
                "mlp_dim": 3072,  # [C]
                "max_positions": 40,  # [C]
                "image_size": 384,  # [C]
                "patch_size": 32,  # [C]
                "activation": "gelu_erf",  # [H]
                "pre_norm": True,  # [M]
                "norm_eps": 1e-12,  # [H]
                "dropout": 0.1,  # [C]
                "init_std": 0.02,  # [H]
                "init_truncated": False,
            },
            "masking": {"policy": "whole_word", "rate": 0.15},  # [T], [C]
            "image_text": {"match_weight": 1.0, "exchange_rate": 0.5},  # [C]
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-4,  # [C]
                "schedule": "linear",  # [U]
                "warmup_steps": 2_500,  # [C]
                "b1": 0.9,  # [U]
                "b2": 0.98,  # [U]
                "eps": 1e-8,  # [U]
                "weight_decay": 0.01,  # [C]
                "clip_norm": 0.0,  # [U] has none
            },
            "stages": ({"steps": 200_000, "seq_len": 40, "batch_size": 4_096, "accumulation": 4},),  # [T], [C]
            "train": {"log_every": 100, "checkpoint_every": 2_500},
            "evaluation": {"every": 5_000, "max_rows": 512, "probes": ("a photo of a [MASK]",)},
        }
    ).lock()
