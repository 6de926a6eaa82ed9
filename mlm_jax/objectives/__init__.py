"""Pre-training objectives, one file each, behind the contract of `contract`.

A new one is a class with the members of `Objective`, its line in `OBJECTIVES`, and its name in `config.checks`.
"""

import dataclasses
from collections.abc import Callable

from mlm_jax.config import Config
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives.contract import Batch, Keys, LossSums, Objective, Params, Term, Trainable
from mlm_jax.objectives.diffusion import MaskedDiffusion
from mlm_jax.objectives.hybrid import HybridLM
from mlm_jax.objectives.mlm import MaskedLM
from mlm_jax.objectives.rtd import ReplacedTokenDetection
from mlm_jax.objectives.span import SpanBert

__all__ = ["OBJECTIVES", "Batch", "Keys", "LossSums", "Objective", "Params", "Term", "Trainable", "make_objective"]

# What a recipe's `objective` names: (cfg, compute, stage) -> Objective.
OBJECTIVES: dict[str, Callable[[Config, Compute, int], Objective]] = {
    "mlm": MaskedLM,
    "span": SpanBert,
    "rtd": ReplacedTokenDetection,
    "diffusion": MaskedDiffusion,
    "hybrid": HybridLM,
}


def make_objective(cfg: Config, compute: Compute, stage: int = 0, *, mask_id: int | None = None) -> Objective:
    """The objective that a config names.

    Args:
        stage: the index of the stage that it trains. It decides masking rates and numbers of predictions, which only
            `loss` sees; parameters, logits and evaluation are those of any stage.
        mask_id: what the tokenizer calls [MASK], for the `logits` of an objective that never predicts it.
    """
    objective = OBJECTIVES[cfg.objective](cfg, compute, stage)
    return dataclasses.replace(objective, mask_id=mask_id) if isinstance(objective, MaskedDiffusion) else objective
