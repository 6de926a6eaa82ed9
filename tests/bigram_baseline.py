"""What a bigram model knows of a prepared corpus's held-out tokens: a line that a masked model has to be far above.

    python tests/bigram_baseline.py RUN/data [--seq-len 128]

Each held-out token is predicted from the one before it, from the one behind it, and from both (as if they were independent
given the token), by add-one smoothed counts of the training rows. Special tokens count as neighbours and are not predicted.
"""

import argparse
import json
import pathlib

import numpy as np

from mlm_jax.data.corpus import open_corpus
from mlm_jax.data.loader import Rows

MOST_ROWS = 200_000


def read(path: pathlib.Path, seq_len: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids of a split, [rows, seq_len]."""
    rows = Rows(path, seq_len, split)
    batch = rows.read(range(min(len(rows), MOST_ROWS)))
    return batch["tokens"], batch["segment_ids"]


def main() -> None:
    """Prints accuracy and loss in nats, and both as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=pathlib.Path)
    parser.add_argument("--seq-len", type=int, default=128)
    options = parser.parse_args()
    tokenizer = open_corpus(options.corpus).tokenizer
    size, special = tokenizer.vocab_size, tokenizer.special_ids
    if size > 4096:
        parser.error(f"the table of pairs would have {size}² entries; this is for small vocabularies")
    tokens, ids = read(options.corpus, options.seq_len, "train")
    joined = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)
    pairs = tokens[:, :-1][joined] * size + tokens[:, 1:][joined]
    counts = np.bincount(pairs, minlength=size * size).reshape(size, size) + 1.0  # [left, right]
    forward, backward = counts.copy(), counts.T.copy()  # [neighbour, token]; a special token is no answer
    for table in (forward, backward):
        table[:, special] = 1e-9
        np.log(table / table.sum(axis=1, keepdims=True), out=table)
    unigram = np.log(np.bincount(tokens[ids > 0], minlength=size) + 1.0)
    unigram[special] = -30.0
    unigram -= np.log(np.exp(unigram).sum())
    tokens, ids = read(options.corpus, options.seq_len, "validation")
    inside = (ids[:, 1:-1] == ids[:, :-2]) & (ids[:, 1:-1] == ids[:, 2:]) & ~np.isin(tokens[:, 1:-1], special)
    left, own, right = (tokens[:, start : tokens.shape[1] - 2 + start][inside] for start in (0, 1, 2))
    found = {}
    for name in ("unigram", "left", "right", "both"):
        hits = losses = 0.0
        for part in np.array_split(np.arange(len(own)), max(1, len(own) // 20_000)):
            scores = {
                "unigram": lambda part: np.broadcast_to(unigram, (len(part), size)),
                "left": lambda part: forward[left[part]],
                "right": lambda part: backward[right[part]],
                "both": lambda part: forward[left[part]] + backward[right[part]] - unigram,
            }[name](part)
            scores = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
            hits += (scores.argmax(axis=1) == own[part]).sum()
            losses -= scores[np.arange(len(part)), own[part]].sum()
        found[name] = {"accuracy": hits / len(own), "loss": losses / len(own)}
        print(f"{name:8} accuracy {hits / len(own):.4f} loss {losses / len(own):.4f}")
    print(json.dumps({"tokens": len(own), **found}))


if __name__ == "__main__":
    main()
