"""Cross-entropy and accuracy of predicted tokens: what objectives, evaluation and `score` have in common."""

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
