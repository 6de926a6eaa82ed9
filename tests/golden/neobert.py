"""NeoBERT in torch, for make_modern_golden.py and interop_parity.py."""

import torch
from torch import nn
from torch.nn import functional


class NeoBert(nn.Module):
    """NeoBERT's formulas and names of weights, which are in no release of transformers.

    Source: chandar-lab/NeoBERT:model.py: heads of [query; key; value], rotations of neighbouring dimensions as complex
    numbers, w12 of what is activated and what it is multiplied with.
    """

    def __init__(self, vocab_size: int, dim: int, num_layers: int, num_heads: int, width: int, eps: float):
        super().__init__()
        self.heads, self.eps = num_heads, eps
        shapes = {"model.encoder.weight": (vocab_size, dim), "model.layer_norm.weight": (dim,)}
        shapes |= {"decoder.weight": (vocab_size, dim), "decoder.bias": (vocab_size,)}
        for layer in range(num_layers):
            kernels = {"qkv": (3 * dim, dim), "wo": (dim, dim), "ffn.w12": (2 * width, dim), "ffn.w3": (dim, width)}
            kernels |= {"attention_norm": (dim,), "ffn_norm": (dim,)}
            shapes |= {f"model.transformer_encoder.{layer}.{name}.weight": shape for name, shape in kernels.items()}
        self.num_layers = num_layers
        self.weights = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(torch.zeros(s)) for name, s in shapes.items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by their published names."""
        return {name.replace("/", "."): weight for name, weight in self.weights.items()}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, L, V]."""
        weights = self.tensors()
        batch, length = input_ids.shape
        sees = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = weights["model.encoder.weight"][input_ids]
        dim_head = x.shape[-1] // self.heads
        frequencies = 10000.0 ** (-torch.arange(0, dim_head, 2).float() / dim_head)
        angles = torch.outer(torch.arange(length).float(), frequencies)
        turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return functional.rms_norm(x, x.shape[-1:], weights[f"model.{name}.weight"], self.eps)

        def rotate(x: torch.Tensor) -> torch.Tensor:
            return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns).flatten(3)

        for layer in range(self.num_layers):
            here = f"transformer_encoder.{layer}"
            whole = norm(x, f"{here}.attention_norm") @ weights[f"model.{here}.qkv.weight"].T
            query, key, value = whole.view(batch, length, self.heads, 3 * dim_head).chunk(3, dim=-1)
            heads = (part.transpose(1, 2) for part in (rotate(query), rotate(key), value))
            mixed = functional.scaled_dot_product_attention(*heads, attn_mask=sees[:, None, None].bool())
            x = x + mixed.transpose(1, 2).flatten(2) @ weights[f"model.{here}.wo.weight"].T
            first, second = (norm(x, f"{here}.ffn_norm") @ weights[f"model.{here}.ffn.w12.weight"].T).chunk(2, dim=-1)
            x = x + (functional.silu(first) * second) @ weights[f"model.{here}.ffn.w3.weight"].T
        return norm(x, "layer_norm") @ weights["decoder.weight"].T + weights["decoder.bias"]

    @torch.no_grad()
    def randomise(self, seed: int = 0) -> "NeoBert":
        """Weights that leave nothing at the value that it starts from."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.tensors().items():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
        return self
