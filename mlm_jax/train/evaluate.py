"""Evaluation: held-out loss, perplexity and accuracy under frozen masks, beside the unigram baseline of the same rows."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mlm_jax.config import Config
from mlm_jax.masking import VocabTables
from mlm_jax.objectives import Keys, Term
from mlm_jax.objectives.mlm import MaskedLM
from mlm_jax.sharding import ROWS

EvalStep = Callable[[Any, dict[str, jax.Array], VocabTables, jax.Array], dict[str, Term]]


def make_eval_step(cfg: Config, objective: MaskedLM) -> EvalStep:
    """The jitted evaluation of one batch: (params, batch, vocab, log_unigram_V) -> sums."""

    @jax.jit
    def eval_step(params: Any, batch: dict[str, jax.Array], vocab: VocabTables, log_unigram_V: jax.Array) -> dict[str, Term]:
        keys = Keys(jax.random.key(cfg.evaluation.seed), None)
        return objective.evaluate(params, batch, keys, vocab, log_unigram_V)

    return eval_step


def evaluate(
    eval_step: EvalStep,
    params: Any,
    rows: dict[str, np.ndarray],
    vocab: VocabTables,
    log_unigram_V: jax.Array,
    batch_size: int,
) -> dict[str, float]:
    """Means over all rows: loss and unigram_loss in nats a masked token, perplexity, the accuracies, and their token count.

    Args:
        rows: `tokens` and `segment_ids`, int32 [rows, L], on the host.
        batch_size: rounded up to what the mesh's rows divide; a last short batch is filled with padding rows.
    """
    totals: dict[str, Term] | None = None
    for batch in _batches(rows, batch_size):
        sums = eval_step(params, batch, vocab, log_unigram_V)
        totals = sums if totals is None else jax.tree.map(jax.numpy.add, totals, sums)
    assert totals is not None, "an evaluation needs rows"
    fetched = jax.device_get(totals)
    means = {name: float(term.sum) / max(float(term.weight), 1.0) for name, term in fetched.items()}
    # exp() of a diverged loss would overflow a float; 700 nats is beyond any vocabulary.
    means["perplexity"] = math.exp(min(means["loss"], 700.0))
    means["tokens"] = int(fetched["loss"].weight)
    return means


def _batches(rows: dict[str, np.ndarray], batch_size: int) -> Iterator[dict[str, jax.Array]]:
    mesh = jax.sharding.get_mesh()
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-batch_size // ways) * ways
    sharding = jax.NamedSharding(mesh, jax.P(ROWS))
    count = len(rows["tokens"])
    for start in range(0, count, batch_size):
        ids = np.arange(start, start + batch_size, dtype=np.int32)
        inside = np.minimum(ids, count - 1)
        batch = {
            "tokens": rows["tokens"][inside],
            "segment_ids": np.where((ids < count)[:, None], rows["segment_ids"][inside], 0),
            "example_ids": ids,
            "epochs": np.zeros(batch_size, np.int32),
        }
        yield {name: jax.device_put(array, sharding) for name, array in batch.items()}
