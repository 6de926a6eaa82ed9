"""Pseudo-log-likelihood: how probable a masked language model finds a sentence; minimal pairs are compared by it.

Source: Salazar et al., 2020, "Masked Language Model Scoring"; Kauf and Ivanova, 2023, for `word_l2r`.
"""

import functools
import glob
import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.errors import UserError
from mlm_jax.inference import TrainedRun
from mlm_jax.objectives.scoring import score_targets
from mlm_jax.sharding import ROWS

METHODS = ("pll", "word_l2r")
_LENGTH_STEP = 16  # sentences are padded to multiples of this, so that few shapes are compiled


class PseudoLikelihood:
    """Scores sentences with one masked copy per token, batched by length and jitted once per length."""

    def __init__(self, run: TrainedRun, *, method: str = "pll", batch_size: int = 256):
        """Args:
        method: "pll" masks one token at a time; "word_l2r" masks the later tokens of the same word with it, which
            does not favour words of many pieces.
        """
        if method not in METHODS:
            raise UserError(f"unknown scoring method {method!r}: choose from {', '.join(METHODS)}")
        self._run, self._method = run, method
        ways = jax.sharding.get_mesh().size
        self._batch_size = -(-batch_size // ways) * ways
        self._word_starts = run.tokenizer.word_starts()

    def __call__(self, sentences: Sequence[str], on_progress: Callable[[int], None] = lambda rows: None) -> np.ndarray:
        """The sum of log-probabilities (nats) of each sentence's tokens, float64 [sentences].

        Args:
            on_progress: called with the number of masked copies scored since the last call.

        Raises:
            UserError: a sentence is empty or exceeds the model's positions.
        """
        encoded = [self._encode(text) for text in sentences]
        scores = np.zeros(len(sentences))
        by_length: dict[int, list[int]] = {}
        for index, ids in enumerate(encoded):
            by_length.setdefault(-(-len(ids) // _LENGTH_STEP) * _LENGTH_STEP, []).append(index)
        limit = self._run.cfg.model.max_positions
        for length, members in sorted(by_length.items()):
            for batch in self._batches(encoded, members, min(length, limit)):
                owners = batch.pop("owners")
                arrays = {k: jax.device_put(v, jax.P(ROWS)) for k, v in batch.items()}
                found = np.asarray(self._log_probabilities(self._run.params, **arrays), np.float64)
                np.add.at(scores, owners, found[: len(owners)])
                on_progress(len(owners))
        return scores

    def _encode(self, text: str) -> np.ndarray:
        tokenizer, limit = self._run.tokenizer, self._run.cfg.model.max_positions
        ids = np.concatenate([[tokenizer.cls_id], tokenizer.encode(text), [tokenizer.sep_id]])
        if len(ids) == 2:
            raise UserError(f"a sentence to score is empty: {text!r}")
        if len(ids) > limit:
            raise UserError(f"a sentence of {len(ids)} tokens exceeds the model's {limit} positions: {text[:60]!r}…")
        return ids

    def _batches(self, encoded: list[np.ndarray], members: list[int], length: int) -> Iterator[dict[str, np.ndarray]]:
        """Masked copies in batches of one size; rows beyond `owners` are padding."""
        copies = [(index, place) for index in members for place in range(1, len(encoded[index]) - 1)]
        size = self._batch_size
        for start in range(0, len(copies), size):
            chosen = copies[start : start + size]
            batch = {
                "tokens": np.full((size, length), self._run.tokenizer.pad_id, np.int32),
                "segment_ids": np.zeros((size, length), np.int32),
                "positions": np.zeros((size, 1), np.int32),
                "targets": np.zeros((size, 1), np.int32),
                "owners": np.asarray([index for index, _ in chosen]),
            }
            for row, (index, place) in enumerate(chosen):
                ids = encoded[index]
                batch["tokens"][row, : len(ids)] = ids
                batch["tokens"][row, place : self._mask_end(ids, place)] = self._run.tokenizer.mask_id
                batch["segment_ids"][row, : len(ids)] = 1
                batch["positions"][row, 0], batch["targets"][row, 0] = place, ids[place]
            yield batch

    def _mask_end(self, ids: np.ndarray, place: int) -> int:
        end = place + 1
        if self._method == "word_l2r":
            while end < len(ids) - 1 and not self._word_starts[ids[end]]:
                end += 1
        return end

    @functools.cached_property
    def _log_probabilities(self) -> Any:
        @jax.jit
        def log_probabilities(
            params: Any, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, targets: jax.Array
        ) -> jax.Array:
            logits_BPV = self._run.objective.logits(params, tokens, segment_ids, positions)
            return -jnp.squeeze(score_targets(logits_BPV, targets)[0], 1)

        return log_probabilities


def read_pairs(pattern: str) -> dict[str, list[tuple[str, str]]]:
    """Minimal pairs by file name, from JSONL files (plain or .gz) with `sentence_good` and `sentence_bad`.

    Raises:
        UserError: nothing matches, or a line is not such a pair.
    """
    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise UserError(f"no file matches {pattern!r}")
    names = [os.path.basename(file).split(".")[0] for file in files]
    return {name if names.count(name) == 1 else file: list(_pairs_of(file)) for name, file in zip(names, files, strict=True)}


def _pairs_of(file: str) -> Iterator[tuple[str, str]]:
    number = count = 0
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.endswith(".gz") else open(file, encoding="utf-8") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    record = json.loads(line)
                    pair = record["sentence_good"], record["sentence_bad"]
                    if not all(isinstance(sentence, str) for sentence in pair):
                        raise UserError(f"{file}:{number}: sentence_good and sentence_bad must be texts, not {pair}")
                    yield pair
                    count += 1
    except KeyError as error:
        raise UserError(f"{file}:{number}: no field {error}; each line needs sentence_good and sentence_bad") from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}:{number}: not JSONL in UTF-8: {error}") from error
    if not count:
        raise UserError(f"{file} is empty")


def pair_accuracy(scorer: PseudoLikelihood, pairs: Sequence[tuple[str, str]], **options: Any) -> float:
    """The share of pairs whose good sentence scores higher; a tie counts half."""
    scores = scorer([sentence for pair in pairs for sentence in pair], **options).reshape(-1, 2)
    difference = scores[:, 0] - scores[:, 1]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def standard_error(accuracy: float, count: int) -> float:
    """Of an accuracy over `count` independent pairs."""
    return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / count)
