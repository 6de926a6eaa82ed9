"""Labels for words: alignment of words with pieces, windows over long sentences, predictions and measures.

A word's tag is learned and read at its first piece.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlm_jax.config import Config
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import UserError
from mlm_jax.finetune import metrics
from mlm_jax.finetune.classification import label_id, softmax
from mlm_jax.finetune.table import Table, counted_items, windows
from mlm_jax.finetune.tags import Sentence, entities_of, iob2, read_sentences


class Tagging:
    """Token classification; see `contract.Kind`."""

    def __init__(self, cfg: Config, tokenizer: Tokenizer):
        self.task, self.tokenizer = cfg.task, tokenizer
        self.room = cfg.stages[0].seq_len - 2

    def read(self, uri: str, *, labelled: bool) -> list[Sentence]:
        """See `contract.Kind`."""
        examples = list(read_sentences(uri, self.task, labelled=labelled))
        if not examples:
            raise UserError(f"{uri} holds no sentences")
        return examples

    def group(self, example: Sentence) -> str:
        """The text."""
        return example.text

    def found_labels(self, examples: Sequence[Sentence]) -> tuple[str, ...]:
        """The labels of entities, without B- and I-."""
        return tuple(sorted({entity.label for example in examples for entity in example.entities or ()}))

    def encode(self, examples: Sequence[Sentence], labels: tuple[str, ...], *, labelled: bool) -> Table:
        """A row for each window of words; a word in two windows counts in that where more is around it."""
        tags = tags_of(labels)
        tokens, owners, places, targets = [], [], [], []
        for owner, example in enumerate(examples):
            pieces = self._pieces(example)
            lengths = np.asarray([len(word) for word in pieces])
            ids = np.zeros(len(pieces), np.int32)
            if labelled:
                for entity in example.entities or ():
                    label_id(entity.label, labels, example.where)
                ids = np.asarray([tags.index(tag) for tag in iob2(example.entities or (), len(pieces))], np.int32)
            cut = windows(lengths, self.room, self.task.stride)
            for (first, last), counted in zip(cut, counted_items(lengths, cut), strict=True):
                row = [
                    self.tokenizer.cls_id,
                    *(piece for word in pieces[first:last] for piece in word),
                    self.tokenizer.sep_id,
                ]
                begins = 1 + np.cumsum(lengths[first:last]) - lengths[first:last]
                word_at, labels_at = np.full(len(row), -1, np.int32), np.zeros(len(row), np.int32)
                word_at[begins[counted]] = np.arange(first, last)[counted]
                labels_at[begins] = ids[first:last]
                tokens.append(np.asarray(row, np.int32))
                owners.append(owner)
                places.append(word_at)
                targets.append(labels_at)
        weights = [(word_at >= 0).astype(np.float32) for word_at in places]
        return Table(
            tokens, np.asarray(owners), token_targets={"labels": targets, "weights": weights}, marks={"words": places}
        )

    def _pieces(self, example: Sentence) -> list[list[int]]:
        """The pieces of each word, at most as many as a row holds. A word that has none is an unknown token."""
        ids, spans = self.tokenizer.encode_with_offsets(example.text)
        starts = np.asarray([start for start, _ in example.words])
        # By its last character: before it a piece may hold characters that are nothing to the tokenizer.
        last = np.maximum(spans[:, 0], spans[:, 1] - 1)
        pieces: list[list[int]] = [[] for _ in example.words]
        for piece, word in zip(ids.tolist(), np.searchsorted(starts, last, side="right") - 1, strict=True):
            pieces[max(word, 0)].append(piece)
        return [word[: self.room] or [self.tokenizer.unk_id] for word in pieces]

    def decode(
        self, examples: Sequence[Sentence], labels: tuple[str, ...], table: Table, outputs: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """Each word's tag and its probability, and the entities that the tags stand for."""
        tags = tags_of(labels)
        chosen = [["O"] * len(example.words) for example in examples]
        shares = [[0.0] * len(example.words) for example in examples]
        for owner, words, logits in zip(table.owners, table.marks["words"], outputs, strict=True):
            for place in np.flatnonzero(words >= 0):
                probabilities = softmax(logits[place])
                best = int(probabilities.argmax())
                chosen[owner][words[place]] = tags[best]
                shares[owner][words[place]] = round(float(probabilities[best]), 6)
        predictions = []
        for example, found, certain in zip(examples, chosen, shares, strict=True):
            entities = entities_of(found)
            shown = [
                {
                    "label": label,
                    "text": example.text[example.words[first][0] : example.words[last - 1][1]],
                    "words": [first, last],
                    "characters": [example.words[first][0], example.words[last - 1][1]],
                }
                for label, first, last in entities
            ]
            words = [example.word(index) for index in range(len(example.words))]
            predictions.append(
                {
                    "words": words,
                    "tags": iob2(entities, len(words)),
                    "probabilities": certain,
                    "entities": shown,
                }
            )
        return predictions

    def measure(self, examples: Sequence[Sentence], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """See `contract.Kind`."""
        wanted = [example.entities for example in examples if example.entities is not None]
        if len(wanted) < len(examples):
            return {}
        return metrics.entities(wanted, [entities_of(found["tags"]) for found in predictions])


def tags_of(labels: Sequence[str]) -> list[str]:
    """The tags in the order of their ids."""
    return ["O", *(f"{prefix}-{label}" for label in labels for prefix in "BI")]
