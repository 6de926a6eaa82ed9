"""How well runs find translations: of each held-out pair, whether the nearest sentence of the other side is its own.

    python tests/retrieval.py RUN [RUN …] --pairs 'pairs:corpus/tatoeba/deu-eng.tsv.gz' [--fraction 0.3] [--layers 2]

A sentence is the mean of its tokens' hidden states behind a layer (the last, or --layers), centred over its language's
sentences; nearness is the cosine. The pairs are those that a run with `data.validation_fraction` of --fraction holds out.
Source: the retrieval of Tatoeba pairs by an encoder's means, as in XTREME section 3.3 (Hu et al., 2020, arXiv:2003.11080).
"""

import argparse
import dataclasses
import json

import jax
import numpy as np

from mlm_jax.data import pairs, units
from mlm_jax.data.sources import open_source
from mlm_jax.inference import TrainedRun, open_run
from mlm_jax.objectives import make_objective
from mlm_jax.objectives.mlm import MaskedLM

LENGTH, BATCH = 64, 64


def held_out(uri: str, fraction: float) -> tuple[list[str], list[str]]:
    """The two sides of the pairs that preparation holds out; of several translations of a sentence, the first."""
    sides: tuple[list[str], list[str]] = [], []
    for text in open_source(uri).documents():
        if int.from_bytes(units.document_hash(text.encode())[:8]) < fraction * 2**64:
            both = text.split(pairs.MARK)
            if not any(sentence in side for sentence, side in zip(both, sides, strict=True)):
                for sentence, side in zip(both, sides, strict=True):
                    side.append(sentence)
    return sides


def means(run: TrainedRun, sentences: list[str], layers: int) -> np.ndarray:
    """The mean hidden state of each sentence, special tokens left out, centred and of length 1: [sentences, D]."""
    model = dataclasses.replace(run.cfg.model, num_layers=layers)
    built = make_objective(dataclasses.replace(run.cfg, model=model), run.objective.compute)
    assert isinstance(built, MaskedLM), "hidden states are taken from runs of objective 'mlm'"
    params = dict(run.params)
    params["encoder"] = {**params["encoder"], "layers": jax.tree.map(lambda x: x[:layers], params["encoder"]["layers"])}
    encode = jax.jit(lambda params, *arrays: built.network.bind(params).encoder(*arrays))
    found = []
    for start in range(0, len(sentences), BATCH):
        batch = sentences[start : start + BATCH]
        ids = [run.tokenizer.encode(sentence)[: LENGTH - 2] for sentence in batch]
        tokens = np.full((BATCH, LENGTH), run.tokenizer.pad_id, np.int32)
        segment_ids = np.zeros((BATCH, LENGTH), np.int32)
        for row, one in enumerate(ids):
            tokens[row, : len(one) + 2] = [run.tokenizer.cls_id, *one, run.tokenizer.sep_id]
            segment_ids[row, : len(one) + 2] = 1
        hidden = np.asarray(encode(params, tokens, segment_ids), np.float32)
        found += [hidden[row, 1 : len(one) + 1].mean(axis=0) for row, one in enumerate(ids)]
    vectors = np.stack(found)
    vectors -= vectors.mean(axis=0)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main() -> None:
    """Prints a line for each run and file, and all as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--pairs", nargs="+", required=True, metavar="URI")
    parser.add_argument("--fraction", type=float, default=0.3)
    parser.add_argument("--layers", type=int, default=0)
    options = parser.parse_args()
    results = []
    for path in options.runs:
        with open_run(path) as run:
            for uri in options.pairs:
                sides = held_out(uri, options.fraction)
                one, other = (means(run, side, options.layers or run.cfg.model.num_layers) for side in sides)
                nearness = one @ other.T
                own = np.arange(len(one))
                there, back = ((nearness.argmax(axis=axis) == own).mean() for axis in (1, 0))
                print(f"{path}  {uri}: {len(one)} pairs, {there:.1%} there, {back:.1%} back, chance {1 / len(one):.1%}")
                results.append({"run": path, "pairs": uri, "count": len(one), "there": there, "back": back})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
