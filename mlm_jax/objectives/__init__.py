"""Pre-training objectives, one file each, and the tasks of fine-tuning, behind the contract of `contract`.

A new objective is a class with the members of `Objective`, its line in `OBJECTIVES`, and its name in `config.limits`.
"""

import inspect
from collections.abc import Callable

from mlm_jax.config import Config
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives.contract import Batch, Keys, LossSums, Objective, Params, Term, Trainable, images_of
from mlm_jax.objectives.diffusion import MaskedDiffusion
from mlm_jax.objectives.hybrid import HybridLM
from mlm_jax.objectives.image_text import ImageText
from mlm_jax.objectives.mlm import MaskedLM
from mlm_jax.objectives.rtd import ReplacedTokenDetection
from mlm_jax.objectives.span import SpanBert
from mlm_jax.objectives.tasks import Labelling, Regression, SpanExtraction, Task

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Keys",
    "LossSums",
    "Objective",
    "Params",
    "Task",
    "Term",
    "Trainable",
    "images_of",
    "make_objective",
    "make_task",
]

# What a recipe's `objective` names: (cfg, compute, stage) -> Objective. One with a field `mask_id` is given that too.
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "mlm": MaskedLM,
    "span": SpanBert,
    "rtd": ReplacedTokenDetection,
    "diffusion": MaskedDiffusion,
    "hybrid": HybridLM,
    "image_text": ImageText,
}


def make_objective(cfg: Config, compute: Compute, stage: int = 0, *, mask_id: int | None = None) -> Objective:
    """The objective that a config names.

    Args:
        stage: the index of the stage that it trains. It decides masking rates and numbers of predictions, which only
            `loss` sees, and by which base positions are rotated; parameters are those of any stage.
        mask_id: what the tokenizer calls [MASK], for an objective with a field of this name.
    """
    objective = OBJECTIVES[cfg.objective]
    wanted = {"mask_id": mask_id} if "mask_id" in inspect.signature(objective).parameters else {}
    return objective(cfg.at_stage(stage), compute, stage, **wanted)


# What it names where a task is fine-tuned: (cfg, compute) -> Task.
_TASKS: dict[str, Callable[[Config, Compute], Task]] = {
    "classification": Labelling,
    "regression": Regression,
    "tagging": Labelling,
    "question_answering": SpanExtraction,
}


def make_task(cfg: Config, compute: Compute) -> Task:
    """The task that a config names; its labels must be known."""
    return _TASKS[cfg.objective](cfg, compute)
