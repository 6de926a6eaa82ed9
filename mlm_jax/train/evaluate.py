"""Evaluation: held-out loss, perplexity and accuracy under frozen masks, beside the unigram baseline of the same rows."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.config import Config
from mlm_jax.masking import VocabTables
from mlm_jax.objectives import Batch, Keys, Objective, Params, Term, images_of
from mlm_jax.objectives.mlm import mask_held_out
from mlm_jax.objectives.scoring import score_targets
from mlm_jax.sharding import ROWS, place, row_ways

EvalStep = Callable[[Params, Batch, VocabTables, jax.Array, jax.Array], dict[str, Term]]

# What every evaluation measures, whatever the objective.
COMMON = (
    "loss",
    "accuracy",
    "unigram_loss",
    "unigram_accuracy",
    "perplexity",
    "tokens",
    "bits_per_byte",
    "sources",
)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What a run is evaluated on, of one source: rows on the host, and the unigram model of that source's training text."""

    rows: dict[str, np.ndarray]
    log_unigram_V: jax.Array


def make_eval_step(cfg: Config, objective: Objective) -> EvalStep:
    """The jitted evaluation of one batch: (params, batch, vocab, log_unigram_V, bytes_V) -> sums.

    Loss and accuracy under frozen 80/10/10 masks of single tokens, beside a unigram model's at the same positions, so that
    any two objectives and rates can be compared; and what the objective measures besides.
    """

    @jax.jit
    def eval_step(
        params: Params, batch: Batch, vocab: VocabTables, log_unigram_V: jax.Array, bytes_V: jax.Array
    ) -> dict[str, Term]:
        key = jax.random.key(cfg.evaluation.seed)
        masked = mask_held_out(batch, key, vocab, cfg)
        seen = images_of(batch)
        logits_BPV = objective.logits(params, masked.inputs_BL, batch["segment_ids"], masked.positions_BP, **seen)
        nll_BP, correct_BP = score_targets(logits_BPV, masked.targets_BP)
        weights_BP = masked.weights_BP
        look_up = functools.partial(_look_up, ids_BP=masked.targets_BP, like_BP=weights_BP)
        unigram_nll_BP = -look_up(log_unigram_V)
        unigram_correct_BP = (masked.targets_BP == jnp.argmax(log_unigram_V)).astype(jnp.float32)
        measured_BP = {
            "loss": nll_BP,
            "accuracy": correct_BP,
            "unigram_loss": unigram_nll_BP,
            "unigram_accuracy": unigram_correct_BP,
        }
        weight = weights_BP.sum()
        sums = {name: Term((values_BP * weights_BP).sum(), weight) for name, values_BP in measured_BP.items()}
        sums["bits_per_byte"] = Term(sums["loss"].sum / math.log(2.0), (look_up(bytes_V) * weights_BP).sum())
        own = objective.evaluate(params, batch, Keys(key, None), vocab)
        assert not own.keys() & set(COMMON), f"an objective's own measures need names other than {COMMON}"
        return sums | own

    return eval_step


def _look_up(table_V: jax.Array, ids_BP: jax.Array, like_BP: jax.Array) -> jax.Array:
    return table_V.at[ids_BP].get(out_sharding=jax.typeof(like_BP).sharding.spec)


def evaluate(
    eval_step: EvalStep, params: Any, held_out: HeldOut, vocab: VocabTables, bytes_V: jax.Array, batch_size: int
) -> dict[str, float]:
    """Means over all rows: loss and unigram_loss in nats a masked token, perplexity, the accuracies, and their token count.

    `bits_per_byte` is the loss of the masked tokens for each byte of text that they stand for, so that runs of different
    tokenizers can be compared. What the objective measures besides follows under its own names.

    Args:
        held_out: with `tokens` and `segment_ids`, int32 [rows, L], and `images` where the objective reads them.
        bytes_V: the bytes that each token stands for.
        batch_size: rounded up to what the mesh's rows divide; a last short batch is filled with padding rows.
    """
    return _means(_sums(eval_step, params, held_out, vocab, bytes_V, batch_size))


def evaluate_sources(
    eval_step: EvalStep,
    params: Any,
    held_out: Mapping[str, HeldOut],
    vocab: VocabTables,
    bytes_V: jax.Array,
    batch_size: int,
) -> dict[str, Any]:
    """`evaluate` over all sources together, and under `sources` of each by its name; of the only one, named "", as it is.

    A source's masks are those that it has alone.
    """
    sums = {name: _sums(eval_step, params, one, vocab, bytes_V, batch_size) for name, one in held_out.items()}
    total = functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), sums.values())
    by_source = {name: _means(one) for name, one in sums.items() if name}
    return _means(total) | ({"sources": by_source} if by_source else {})


def described(values: Mapping[str, Any]) -> Iterator[str]:
    """An evaluation as lines of the log: the whole, and each source of a mixture."""
    own = (f", {name} {value:.4f}" for name, value in values.items() if name not in COMMON)
    yield f"held-out: {_line(values)}{''.join(own)}"
    for name, found in values.get("sources", {}).items():
        yield f"held-out {name}: {_line(found)}, {found['bits_per_byte']:.4f} bits per byte"


def _line(values: Mapping[str, Any]) -> str:
    numbers = (values[name] for name in ("loss", "accuracy", "unigram_loss", "unigram_accuracy"))
    return "loss {:.4f}, accuracy {:.4f} (unigram: {:.4f}, {:.4f})".format(*numbers)


def _sums(
    eval_step: EvalStep, params: Any, held_out: HeldOut, vocab: VocabTables, bytes_V: jax.Array, batch_size: int
) -> dict[str, Term]:
    totals: dict[str, Term] | None = None
    for batch in _batches(held_out.rows, batch_size):
        sums = eval_step(params, batch, vocab, held_out.log_unigram_V, bytes_V)
        totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
    assert totals is not None, "an evaluation needs rows"
    fetched: dict[str, Term] = jax.device_get(totals)
    return fetched


def _means(fetched: dict[str, Term]) -> dict[str, float]:
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
        if "images" in rows:
            batch["images"] = rows["images"][inside]
            batch["other_images"] = rows["images"][(inside + 1) % count]  # rows are in no order
        yield place(batch, jax.P(ROWS))
