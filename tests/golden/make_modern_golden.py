"""Writes modernbert.npz, distilbert.npz and neobert.npz: small random models and their logits, for test_interop.py.

Needs the extra `peers`: python tests/golden/make_modern_golden.py
"""

import numpy as np
import torch
from make_bert_golden import FOLDER, LENGTH, SHAPE, make_inputs, randomise
from neobert import NeoBert
from torch import nn
from transformers import DistilBertConfig, DistilBertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM


def make_modernbert() -> nn.Module:
    """Four layers, of which the second and third see 4 tokens to either side."""
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    shape = SHAPE | {"num_hidden_layers": 4, "max_position_embeddings": LENGTH, "local_attention": 8}
    return ModernBertForMaskedLM(ModernBertConfig(**shape, **special, global_rope_theta=200.0, local_rope_theta=30.0))


def make_distilbert() -> nn.Module:
    """Of the same size."""
    theirs = {"dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "attn_implementation": "eager"}
    return DistilBertForMaskedLM(DistilBertConfig(vocab_size=72, max_position_embeddings=LENGTH, **theirs))


def make_neobert() -> NeoBert:
    """Of the same size; 60 is what a config.json would say for a width of 40."""
    return NeoBert(72, 24, num_layers=2, num_heads=4, width=40, eps=1e-5).randomise()


def write(name: str, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """One file: weights by their full names, inputs, logits."""
    inputs = make_inputs(0, 1)
    with torch.no_grad():
        found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    logits = found if isinstance(found, torch.Tensor) else found.logits
    arrays = {f"input/{key}": value.numpy().astype(np.int32) for key, value in inputs.items()}
    arrays |= {f"weight/{key}": value.detach().numpy() for key, value in tensors.items()}
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(path, **arrays, **{"gelu_erf/logits": logits.numpy()})
    print(f"{path}: {path.stat().st_size} bytes, {len(arrays) + 1} arrays")


if __name__ == "__main__":
    for name, make in (("modernbert", make_modernbert), ("distilbert", make_distilbert)):
        made = make().eval()
        randomise(made, torch.Generator().manual_seed(0))
        write(name, made, dict(made.named_parameters()))
    neobert = make_neobert()
    write("neobert", neobert, neobert.tensors())
