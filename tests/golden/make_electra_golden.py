"""Writes electra.npz: a small random Hugging Face generator and discriminator, tied, for test_golden_electra.py.

Needs the extra `peers`: python tests/golden/make_electra_golden.py
"""

import numpy as np
import torch
from make_bert_golden import FOLDER, LENGTH, SHAPE, make_inputs, randomise
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

EMBEDDING, GENERATOR = 16, {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2}


def main() -> None:
    """Weights and inputs, then logits, loss and all gradients of each network and of ELECTRA's sum of the two."""
    shape = SHAPE | {"embedding_size": EMBEDDING, "max_position_embeddings": LENGTH, "hidden_act": "gelu"}
    generator = ElectraForMaskedLM(ElectraConfig(**shape | GENERATOR)).eval()
    discriminator = ElectraForPreTraining(ElectraConfig(**shape)).eval()
    random = torch.Generator().manual_seed(0)
    randomise(generator, random)
    discriminator.electra.embeddings = generator.electra.embeddings
    randomise(discriminator, random)
    inputs = make_inputs(0, 2)
    is_replaced = (inputs["labels"] >= 0).long()
    corrupted = torch.where(is_replaced > 0, inputs["labels"], inputs["input_ids"])
    first = generator(**inputs)
    second = discriminator(**inputs | {"input_ids": corrupted, "labels": is_replaced})
    (first.loss + 50 * second.loss).backward()
    arrays = {f"input/{name}": value.numpy().astype(np.int32) for name, value in inputs.items()}
    for name, model, output in (("generator", generator, first), ("discriminator", discriminator, second)):
        arrays[f"{name}/logits"] = output.logits.detach().numpy()
        arrays[f"{name}/loss"] = output.loss.detach().numpy()
        for weight, value in model.named_parameters():
            short = weight.removeprefix("electra.")
            arrays[f"{name}/weight/{short}"] = value.detach().numpy()
            arrays[f"{name}/gradient/{short}"] = value.grad.numpy()
    path = FOLDER / "electra.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path}: {path.stat().st_size} bytes, {len(arrays)} arrays")


if __name__ == "__main__":
    main()
