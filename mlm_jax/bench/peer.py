"""What `bench --peer hf` compares with: Hugging Face's BertForMaskedLM trained by torch.optim.AdamW in this process.

Torch and transformers come with the extra `peers`, so they are imported only when the peer is built.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mlm_jax.config import Config, StageConfig
from mlm_jax.errors import UserError, install

PEERS = ("hf",)
ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "gelu_erf": "gelu", "relu": "relu"}
IGNORED = -100  # the label of a position that is not predicted, in torch's cross-entropy


def check_installed(peer: str) -> None:
    """Refuses, before anything is measured, a peer that is unknown, not installed or without this kind of device.

    Raises:
        UserError: naming what is missing.
    """
    if peer not in PEERS:
        raise UserError(f"--peer={peer} is none of {', '.join(PEERS)}")
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--peer={peer} needs {' and '.join(missing)}: {install('peers')}")


class HuggingFacePeer:
    """The same model on the same rows, in PyTorch without compilation, as `transformers` users train it.

    It differs from ours in what belongs to it: logits at all positions, of which cross-entropy ignores 85%; one fixed
    mask; full attention over a packed row; AdamW by torch's fused kernel, which is its Trainer's default.
    """

    def __init__(self, cfg: Config, stage: StageConfig, rows: Mapping[str, np.ndarray], *, dtype: str, num_threads: int):
        """Builds the model and puts the rows on its device.

        Args:
            rows: `tokens` and `segment_ids`, int32 [B, L].
            dtype: our compute dtype; other than float32 it is used through autocast.
            num_threads: those that XLA has.
        """
        import torch
        import transformers

        self._torch = torch
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self._device = _device(torch)
        torch.manual_seed(cfg.seed)
        torch.set_num_threads(num_threads)
        transformers_config = _hugging_face_config(cfg, transformers)
        self._model = transformers.BertForMaskedLM(transformers_config).to(self._device).train()
        self._clip_norm, self._dtype = cfg.optimizer.clip_norm, dtype
        self._optimizer = self._make_optimizer(cfg)
        self._micro_batches = self._place(_mask(cfg, stage, rows), stage.accumulation)
        self.parameters = sum(parameter.numel() for parameter in self._model.parameters())
        # Its embeddings cannot do without a table of token types.
        self.extra_parameters = 0 if cfg.model.num_token_types else cfg.model.embed_dim
        self.name = (
            f"transformers BertForMaskedLM ({transformers_config.hidden_act}, "
            f"{transformers_config._attn_implementation} attention), torch.optim.AdamW (fused)"
        )

    def run(self, steps: int) -> None:
        """Runs so many steps and waits for the last one."""
        torch = self._torch
        for _ in range(steps):
            self._optimizer.zero_grad(set_to_none=True)
            for micro_batch in self._micro_batches:
                with torch.autocast(self._device, torch.bfloat16, enabled=self._dtype == "bfloat16"):
                    loss = self._model(**micro_batch).loss / len(self._micro_batches)
                loss.backward()
            if self._clip_norm > 0:
                torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
            self._optimizer.step()
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _make_optimizer(self, cfg: Config) -> Any:
        """AdamW at the peak learning rate; norms and biases, which are vectors here, do not decay."""
        matrices = [p for p in self._model.parameters() if p.ndim > 1]
        vectors = [p for p in self._model.parameters() if p.ndim == 1]
        settings = cfg.optimizer
        return self._torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(settings.b1, settings.b2),
            eps=settings.eps,
            fused=True,
        )

    def _place(self, masked: Mapping[str, np.ndarray], count: int) -> list[dict[str, Any]]:
        micro_batches = [{name: np.split(array, count)[index] for name, array in masked.items()} for index in range(count)]
        return [
            {name: self._torch.from_numpy(array.astype(np.int64)).to(self._device) for name, array in micro.items()}
            for micro in micro_batches
        ]


def _device(torch: Any) -> str:
    platform = jax.default_backend()
    if platform == "cpu":
        return "cpu"
    if platform == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise UserError(f"--peer=hf runs on a CPU or a CUDA device that torch sees, and JAX is using {platform}")


def _hugging_face_config(cfg: Config, transformers: Any) -> Any:
    model = cfg.model
    return transformers.BertConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.embed_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        intermediate_size=model.mlp_dim,
        hidden_act=ACTIVATIONS[model.activation],
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.attention_dropout,
        max_position_embeddings=model.max_positions + model.position_offset,
        type_vocab_size=model.num_token_types or 1,
        initializer_range=model.init_std,
        layer_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
    )


def _mask(cfg: Config, stage: StageConfig, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows as the peer takes them: a share of the real tokens is predicted, and most of that replaced by one id.

    Which id stands for the mask does not matter to the time; ours shows its own.
    """
    random = np.random.default_rng(cfg.seed)
    tokens, real = rows["tokens"], rows["segment_ids"] > 0
    chosen = real & (random.random(tokens.shape) < cfg.mask_rate(stage))
    shown = chosen & (random.random(tokens.shape) < cfg.masking.mask_prob)
    masked = {"input_ids": np.where(shown, 4, tokens), "labels": np.where(chosen, tokens, IGNORED)}
    if not real.all():  # without padding, attention is faster without a mask
        masked["attention_mask"] = real
    return masked
