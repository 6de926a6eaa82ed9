"""Evaluation: held-out loss, perplexity and accuracy under frozen masks, beside the unigram baseline of the same rows."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.config import Config, MaskingConfig
from mlm_jax.masking import VocabTables
from mlm_jax.objectives import Batch, Keys, Objective, Params, Term
from mlm_jax.objectives.mlm import mask_batch
from mlm_jax.objectives.rates import constant_rates
from mlm_jax.objectives.scoring import score_targets
from mlm_jax.sharding import ROWS, place, row_ways

EvalStep = Callable[[Params, Batch, VocabTables, jax.Array], dict[str, Term]]

# What every evaluation measures, whatever the objective.
COMMON = ("loss", "accuracy", "unigram_loss", "unigram_accuracy", "perplexity", "tokens")


def make_eval_step(cfg: Config, objective: Objective) -> EvalStep:
    """The jitted evaluation of one batch: (params, batch, vocab, log_unigram_V) -> sums.

    Loss and accuracy under frozen 80/10/10 masks of single tokens, beside a unigram model's at the same positions, so that
    any two objectives and rates can be compared; and what the objective measures besides.
    """
    frozen = MaskingConfig(rate=cfg.evaluation.mask_rate, static=True)

    @jax.jit
    def eval_step(params: Params, batch: Batch, vocab: VocabTables, log_unigram_V: jax.Array) -> dict[str, Term]:
        key = jax.random.key(cfg.evaluation.seed)
        masked = mask_batch(batch, key, vocab, frozen, constant_rates(frozen))
        logits_BPV = objective.logits(params, masked.inputs_BL, batch["segment_ids"], masked.positions_BP)
        nll_BP, correct_BP = score_targets(logits_BPV, masked.targets_BP)
        weights_BP = masked.weights_BP
        unigram_nll_BP = -log_unigram_V.at[masked.targets_BP].get(out_sharding=jax.typeof(weights_BP).sharding.spec)
        unigram_correct_BP = (masked.targets_BP == jnp.argmax(log_unigram_V)).astype(jnp.float32)
        measured_BP = {
            "loss": nll_BP,
            "accuracy": correct_BP,
            "unigram_loss": unigram_nll_BP,
            "unigram_accuracy": unigram_correct_BP,
        }
        weight = weights_BP.sum()
        sums = {name: Term((values_BP * weights_BP).sum(), weight) for name, values_BP in measured_BP.items()}
        own = objective.evaluate(params, batch, Keys(key, None), vocab)
        assert not own.keys() & set(COMMON), f"an objective's own measures need names other than {COMMON}"
        return sums | own

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

    What the objective measures besides follows under its own names.

    Args:
        rows: `tokens` and `segment_ids`, int32 [rows, L], on the host.
        batch_size: rounded up to what the mesh's rows divide; a last short batch is filled with padding rows.
    """
    totals: dict[str, Term] | None = None
    for batch in _batches(rows, batch_size):
        sums = eval_step(params, batch, vocab, log_unigram_V)
        totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
    assert totals is not None, "an evaluation needs rows"
    fetched = jax.device_get(totals)
    means = {name: float(term.sum) / max(float(term.weight), 1.0) for name, term in fetched.items()}
    # exp() of a diverged loss would overflow a float; 700 nats is beyond any vocabulary.
    means["perplexity"] = math.exp(min(means["loss"], 700.0))
    for name in [name for name in means if name.endswith("bits_per_token")]:
        means[name.replace("bits_per_token", "perplexity")] = 2.0 ** min(means[name], 1000.0)
    means["tokens"] = int(fetched["loss"].weight)
    return means


def _batches(rows: dict[str, np.ndarray], batch_size: int) -> Iterator[dict[str, jax.Array]]:
    mesh = jax.sharding.get_mesh()
    ways = row_ways(mesh)
    batch_size = -(-batch_size // ways) * ways
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
        yield place(batch, jax.P(ROWS))
