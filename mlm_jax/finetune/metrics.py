"""The measures of fine-tuned tasks. scikit-learn and SciPy compute those that they have (extra `finetune`).

Entities are compared here: seqeval, which does the same, has not been released since 2020.
"""

import collections
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlm_jax.errors import UserError, install


def require_libraries() -> None:
    """Says at once, and not after an hour of training, that a library is missing."""
    _scikit_learn()


def _scikit_learn() -> Any:
    try:
        import sklearn.metrics  # an optional extra
    except ImportError:
        raise UserError(f"measures need scikit-learn: {install('finetune')}") from None
    return sklearn.metrics


def classification(labels: Sequence[str], wanted: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation.

    F1 is that of the second label where there are two (GLUE's "1"), else the unweighted mean over all labels.
    """
    measures = _scikit_learn()
    only = {"average": "binary", "pos_label": labels[1]} if len(labels) == 2 else {"average": "macro"}
    return {
        "accuracy": float(measures.accuracy_score(wanted, found)),
        "f1": float(measures.f1_score(wanted, found, labels=list(labels), zero_division=0.0, **only)),
        "matthews": float(measures.matthews_corrcoef(wanted, found)),
    }


def regression(wanted: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation, 0 where one side does not vary, and the root of the mean squared error."""
    _scikit_learn()  # SciPy comes with it
    from scipy import stats

    rmse = float(np.sqrt(np.mean(np.square(np.subtract(wanted, found)))))
    if len(wanted) < 2 or np.ptp(wanted) == 0 or np.ptp(found) == 0:
        return {"pearson": 0.0, "spearman": 0.0, "rmse": rmse}
    return {
        "pearson": float(stats.pearsonr(wanted, found).statistic),
        "spearman": float(stats.spearmanr(wanted, found).statistic),
        "rmse": rmse,
    }


class Entity(NamedTuple):
    """A stretch of words, the first and the one behind the last, and what they are."""

    label: str
    first: int
    last: int


def entities(wanted: Sequence[Sequence[Entity]], found: Sequence[Sequence[Entity]]) -> dict[str, float]:
    """Micro-averaged F1, precision and recall: an entity counts where its label and both ends are right.

    Source: Tjong Kim Sang and De Meulder, 2003 (CoNLL's evaluation).
    """
    right = sum(len({*gold} & {*ours}) for gold, ours in zip(wanted, found, strict=True))
    precision, recall = (right / max(sum(map(len, side)), 1) for side in (found, wanted))
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"f1": f1, "precision": precision, "recall": recall}


def answers(wanted: Sequence[Sequence[str]], found: Sequence[str]) -> dict[str, float]:
    """SQuAD's exact match and F1 of words, of each question the best over its answers.

    Args:
        wanted: the answers of each question; none where it has no answer, which is right if "" is found.

    Source: Rajpurkar et al., 2016 and 2018 (the data sets' evaluation scripts).
    """
    scores = {
        name: [max(score(gold, ours) for gold in golds or [""]) for golds, ours in zip(wanted, found, strict=True)]
        for name, score in _ANSWER_SCORES.items()
    }
    return {name: float(np.mean(values)) for name, values in scores.items()}


def normalize_answer(text: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation, articles and surplus spaces."""
    text = "".join(char for char in text.lower() if char not in _PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


_PUNCTUATION = frozenset(string.punctuation)


def _word_f1(gold: str, ours: str) -> float:
    wanted, found = normalize_answer(gold).split(), normalize_answer(ours).split()
    if not wanted or not found:
        return float(wanted == found)
    common = sum((collections.Counter(wanted) & collections.Counter(found)).values())
    return 2 * common / (len(wanted) + len(found))


_ANSWER_SCORES: dict[str, Callable[[str, str], float]] = {
    "f1": _word_f1,
    "exact_match": lambda gold, ours: float(normalize_answer(gold) == normalize_answer(ours)),
}
