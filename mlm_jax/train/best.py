"""Which evaluation of a run was the best, and whether to wait for a better one; used by the loop of a fine-tuned task."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from mlm_jax.train.writer import read_metrics


@dataclasses.dataclass
class Best:
    """The best evaluation so far; the first of several that are equal.

    Attributes:
        metric: the measure that counts, higher is better.
        patience: evaluations in a row without a better one after which the run ends; 0 waits for ever.
        value, values, step: the best one's measure, all that it measured, and its step.
    """

    metric: str
    patience: int = 0
    value: float = -math.inf
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    step: int = 0
    worse_since: int = 0

    def add(self, step: int, values: Mapping[str, Any]) -> bool:
        """Takes in an evaluation and says whether it is the best so far; one that is not finite is not."""
        value = values[self.metric]
        if value is None or not value > self.value:
            self.worse_since += 1
            return False
        self.value, self.values, self.step, self.worse_since = value, dict(values), step, 0
        return True

    def recall(self, workdir: str | os.PathLike[str], step: int) -> None:
        """Takes in what a run has evaluated up to a step, from its metrics.jsonl."""
        for record in read_metrics(workdir)[0]:
            if record["kind"] == "eval" and record["step"] <= step:
                self.add(record["step"], {name: value for name, value in record.items() if name not in ("step", "kind")})

    @property
    def is_final(self) -> bool:
        """Whether no better one is waited for."""
        return 0 < self.patience <= self.worse_since
