"""Filling masks: the most probable tokens at every [MASK] of a text."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import UserError
from mlm_jax.objectives import Objective, images_of
from mlm_jax.segments import mark_languages
from mlm_jax.sharding import ROWS, place, row_ways

Fill = list[list[dict[str, Any]]]  # per mask, the candidates: {"token": str, "begins_word": bool, "probability": float}


class Filler:
    """Top-k predictions, compiled once per padded shape."""

    def __init__(self, objective: Objective, tokenizer: Tokenizer):
        self._objective, self._tokenizer = objective, tokenizer
        hidden = np.ones(objective.cfg.model.vocab_size, bool)
        hidden[: tokenizer.vocab_size] = False
        hidden[tokenizer.special_ids] = True
        self._is_hidden_V = hidden
        self._begins_word_V = tokenizer.word_starts()

    def __call__(
        self, params: Any, texts: Sequence[str], *, top_k: int, language: str = "", image: np.ndarray | None = None
    ) -> list[Fill]:
        """Candidates for every mask of every text, most probable first; special tokens are never among them.

        Probabilities are those of the model's whole vocabulary. The texts are shown to it as of `language`, where one is
        given.

        Args:
            image: what all the texts are beside, uint8 [pixels, pixels, 3], of an objective that reads images.

        Raises:
            UserError: a text holds no mask or is longer than the model's positions; `top_k` is out of range.
        """
        regular = int((~self._is_hidden_V).sum())
        if not 0 < top_k <= regular:
            raise UserError(f"top_k={top_k} must lie between 1 and {regular}")
        encoded = [self._encode(text) for text in texts]
        mesh = jax.sharding.get_mesh()
        ways = row_ways(mesh)
        count = -(-len(texts) // ways) * ways
        limit = self._objective.cfg.model.max_positions
        length = min(limit, _round_up(max(len(ids) for ids in encoded)))
        masks = [np.flatnonzero(ids == self._tokenizer.mask_id) for ids in encoded]
        num_masks = _round_up(max(len(positions) for positions in masks), 1)
        tokens = np.full((count, length), self._tokenizer.pad_id, np.int32)
        segments = np.zeros((count, length), np.int32)
        positions = np.zeros((count, num_masks), np.int32)
        for row, ids in enumerate(encoded):
            tokens[row, : len(ids)] = ids
            segments[row, : len(ids)] = 1
            positions[row, : len(masks[row])] = masks[row]
        segments = mark_languages(segments, self._objective.cfg.languages(language))
        arrays = place((tokens, segments, positions), jax.P(ROWS))
        seen = {} if image is None else place({"images": np.stack([image] * count)}, jax.P(ROWS))
        hidden_V = place(self._is_hidden_V, jax.P())
        probabilities, ids_BPK = jax.device_get(self._predict(params, hidden_V, *arrays, images_of(seen), top_k=top_k))
        return [
            [
                [
                    {
                        "token": self._tokenizer.decode([int(token)]),
                        "begins_word": bool(self._begins_word_V[token]),
                        "probability": float(probability),
                    }
                    for token, probability in zip(ids_BPK[row, mask], probabilities[row, mask], strict=True)
                ]
                for mask in range(len(masks[row]))
            ]
            for row in range(len(texts))
        ]

    def _encode(self, text: str) -> np.ndarray:
        tokenizer, limit = self._tokenizer, self._objective.cfg.model.max_positions
        ids = np.concatenate([[tokenizer.cls_id], tokenizer.encode_with_masks(text), [tokenizer.sep_id]])
        if tokenizer.mask_id not in ids:
            raise UserError(f"no [MASK] in {text!r}: write [MASK] where a token is to be filled in")
        if len(ids) > limit:
            raise UserError(f"a text of {len(ids)} tokens exceeds the model's {limit} positions; shorten it")
        return ids

    @functools.cached_property
    def _predict(self) -> Any:
        @functools.partial(jax.jit, static_argnames=("top_k",))
        def predict(
            params: Any,
            is_hidden_V: jax.Array,
            tokens_BL: jax.Array,
            segment_ids_BL: jax.Array,
            positions_BP: jax.Array,
            seen: dict[str, jax.Array],
            *,
            top_k: int,
        ) -> tuple[jax.Array, jax.Array]:
            logits_BPV = self._objective.logits(params, tokens_BL, segment_ids_BL, positions_BP, **seen)
            probabilities_BPV = jax.nn.softmax(jax.reshard(logits_BPV, jax.P(ROWS, None, None)), axis=-1)
            best = jax.lax.top_k(jnp.where(is_hidden_V[None, None], -1.0, probabilities_BPV), top_k)
            return jax.reshard(best, jax.P())  # every process reads all of it

        return predict


def shown(candidate: dict[str, Any]) -> str:
    """A candidate for people: a piece that continues a word begins with a hyphen, and one that is a space says so."""
    token = candidate["token"]
    return "space" if not token.strip() else token if candidate.get("begins_word", True) else f"-{token}"


def _round_up(count: int, least: int = 16) -> int:
    """The next power of two, so that few shapes are compiled."""
    return max(least, 1 << (count - 1).bit_length())
