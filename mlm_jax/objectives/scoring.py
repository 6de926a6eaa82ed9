"""Cross-entropy and accuracy of predicted tokens: what objectives, evaluation and `score` have in common."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def score_targets(logits_BPV: jax.Array, targets_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood in nats, and 1.0 where the target has the highest logit: both float32 [B, P].

    The target's logit is picked by comparison, not by index, so that a vocabulary sharded over devices stays sharded.
    """
    with jax.named_scope("head_loss"):
        vocab_11V = jnp.arange(logits_BPV.shape[-1], dtype=jnp.int32)[None, None]
        gold_BP = jnp.where(targets_BP[:, :, None] == vocab_11V, logits_BPV, 0.0).sum(-1)
        top_BP = jax.lax.stop_gradient(logits_BPV.max(-1))
        log_normaliser_BP = top_BP + jnp.log(jnp.exp(logits_BPV - top_BP[:, :, None]).sum(-1))
        return log_normaliser_BP - gold_BP, (gold_BP >= top_BP).astype(jnp.float32)


def score_in_chunks(
    score: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    hidden_BPD: jax.Array,
    targets_BP: jax.Array,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """`score(hidden, targets)`, two arrays [B, P], with the logits of `size` positions of each row at a time; 0: of all.

    The backward pass computes a chunk's logits anew. Rows of hundreds of positions against a vocabulary of tens of thousands
    would otherwise take more memory than everything else in a step.
    """
    rows, count, dim = hidden_BPD.shape
    if size == 0 or count <= size:
        return score(hidden_BPD, targets_BP)
    chunks = -(-count // size)
    padding = chunks * size - count
    hidden_BPD = jnp.pad(hidden_BPD, ((0, 0), (0, padding), (0, 0)))
    targets_BP = jnp.pad(targets_BP, ((0, 0), (0, padding)))
    hidden_CBPD = hidden_BPD.reshape(rows, chunks, size, dim).swapaxes(0, 1)
    targets_CBP = targets_BP.reshape(rows, chunks, size).swapaxes(0, 1)
    found = jax.lax.map(lambda chunk: jax.checkpoint(score, prevent_cse=False)(*chunk), (hidden_CBPD, targets_CBP))
    nll_BP, correct_BP = (x_CBP.swapaxes(0, 1).reshape(rows, chunks * size)[:, :count] for x_CBP in found)
    return nll_BP, correct_BP
