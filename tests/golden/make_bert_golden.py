"""Writes bert.npz and roberta.npz: small random Hugging Face models, their logits and gradients, for test_golden.py.

Needs the extra `peers`: python tests/golden/make_bert_golden.py
"""

import pathlib
from collections.abc import Callable

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

FOLDER = pathlib.Path(__file__).resolve().parent
SHAPE = {
    "vocab_size": 72,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "attn_implementation": "eager",
}
ACTIVATIONS = {"gelu_erf": "gelu", "gelu_tanh": "gelu_new"}  # our name: theirs
ROWS, LENGTH, LENGTHS = 3, 20, (20, 13, 7)  # the last two rows end in padding
# Gradients are kept of one weight of every kind.
LAYER = "encoder.layer.0"
KEPT = (
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight",
    "embeddings.LayerNorm.weight",
    f"{LAYER}.attention.self.query.weight",
    f"{LAYER}.attention.self.value.bias",
    f"{LAYER}.attention.output.dense.weight",
    f"{LAYER}.attention.output.LayerNorm.bias",
    "encoder.layer.1.intermediate.dense.weight",
    "encoder.layer.1.output.dense.weight",
)


def make_bert(activation: str) -> torch.nn.Module:
    """BERT's architecture: two token types, layer norms with 1e-12."""
    return BertForMaskedLM(BertConfig(max_position_embeddings=LENGTH, hidden_act=activation, **SHAPE))


def make_roberta(activation: str) -> torch.nn.Module:
    """RoBERTa's: positions begin after the padding id, one token type, layer norms with 1e-5."""
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return RobertaForMaskedLM(
        RobertaConfig(
            max_position_embeddings=LENGTH + 2,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            hidden_act=activation,
            **special,
            **SHAPE,
        )
    )


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights that leave nothing at the value that it starts from, so that each of them shows in the logits."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_scale = "norm" in name.lower() and name.endswith(".weight")
            weight.copy_(1 + 0.2 * noise if is_scale else 0.3 * noise)


def make_inputs(pad_id: int, num_token_types: int) -> dict[str, torch.Tensor]:
    """Token ids, attention mask, token types, and labels at a few positions of every row."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, SHAPE["vocab_size"], (ROWS, LENGTH))
    mask = np.arange(LENGTH)[None] < np.array(LENGTHS)[:, None]
    tokens = np.where(mask, tokens, pad_id)
    types = np.where(mask & (np.arange(LENGTH) > 4), num_token_types - 1, 0)
    labels = np.where(mask & (rng.random((ROWS, LENGTH)) < 0.4), rng.integers(0, SHAPE["vocab_size"], tokens.shape), -100)
    arrays = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types, "labels": labels}
    return {name: torch.tensor(array.astype(np.int64)) for name, array in arrays.items()}


def write(
    name: str, make: Callable[[str], torch.nn.Module], pad_id: int, num_token_types: int, activations: tuple[str, ...]
) -> None:
    """One file: weights and inputs once, logits, loss and gradients under each activation."""
    inputs = make_inputs(pad_id, num_token_types)
    arrays = {f"input/{key}": value.numpy().astype(np.int32) for key, value in inputs.items()}
    for ours in activations:
        model = make(ACTIVATIONS[ours]).eval()
        randomise(model, torch.Generator().manual_seed(0))
        output = model(**inputs)
        output.loss.backward()
        arrays[f"{ours}/logits"] = output.logits.detach().numpy()
        arrays[f"{ours}/loss"] = output.loss.detach().numpy()
        weights = dict(model.named_parameters())
        for weight, value in weights.items():
            short = weight.removeprefix(f"{name}.")
            arrays[f"weight/{short}"] = value.detach().numpy()
            if short in KEPT or not weight.startswith(name):  # all of the head's
                arrays[f"{ours}/gradient/{short}"] = value.grad.numpy()
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path}: {path.stat().st_size} bytes, {len(arrays)} arrays")


if __name__ == "__main__":
    write("bert", make_bert, 0, 2, ("gelu_erf", "gelu_tanh"))
    # Its head applies the exact GELU whatever the encoder's activation is.
    write("roberta", make_roberta, 1, 1, ("gelu_erf",))
