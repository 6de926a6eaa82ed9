"""Answers in a context, in SQuAD's JSON: reading, windows over long contexts, the best spans, predictions and measures."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mlm_jax.config import Config
from mlm_jax.data import text_files
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import UserError
from mlm_jax.finetune import metrics
from mlm_jax.finetune.classification import softmax
from mlm_jax.finetune.records import paths_of
from mlm_jax.finetune.table import Table, counted_items, windows

logger = logging.getLogger(__name__)

_BEST = 20  # candidates whose probabilities add up to 1


@dataclasses.dataclass(frozen=True)
class Question:
    """An example. `answers` are texts and the character that each begins at; None where they are not known."""

    id: str
    question: str
    context: str
    answers: list[tuple[str, int]] | None
    where: str


class Questions:
    """Extractive question answering; see `contract.Kind`."""

    def __init__(self, cfg: Config, tokenizer: Tokenizer):
        self.task, self.tokenizer = cfg.task, tokenizer
        self.max_length = cfg.stages[0].seq_len
        self.has_types = cfg.model.num_token_types > 1

    def read(self, uri: str, *, labelled: bool) -> list[Question]:
        """See `contract.Kind`. A question without an answer is one of SQuAD 2.0."""
        found = [question for path in paths_of(uri) for question in _read_squad(path, labelled=labelled)]
        if not found:
            raise UserError(f"{uri} holds no questions")
        unanswerable = [question for question in found if question.answers == []]
        if unanswerable and not self.task.null_answers:
            raise UserError(
                f"{unanswerable[0].where}: this question has no answer, as {len(unanswerable) - 1} others: set "
                "task.null_answers=True"
            )
        return found

    def group(self, example: Question) -> str:
        """The context, which several questions share."""
        return example.context

    def found_labels(self, examples: Sequence[Question]) -> tuple[str, ...]:
        """There are none."""
        return ()

    def encode(self, examples: Sequence[Question], labels: tuple[str, ...], *, labelled: bool) -> Table:
        """A row for each window over a context, with the question before it.

        An answer that a window does not hold whole is none for that window. Of several answers the first is learned.
        """
        contexts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        names = ("allowed", "token_types") if self.has_types else ("allowed",)
        table = Table([], np.empty(0), {name: [] for name in names})
        between = [self.tokenizer.sep_id] * self.tokenizer.model.separators
        owners: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        table.marks.update(spans=[], counted=[])
        lost = 0
        for owner, example in enumerate(examples):
            if example.context not in contexts:
                contexts = {example.context: self.tokenizer.encode_with_offsets(example.context)}
            ids, spans = contexts[example.context]
            question = self.tokenizer.encode(example.question)[: (self.max_length - 2 - len(between)) // 2]
            answer = _tokens_of(example.answers[0], spans) if labelled and example.answers else None
            lost += bool(labelled and example.answers) and answer is None
            lengths = np.ones(len(ids), np.int64)
            before = 1 + len(question) + len(between)
            cut = windows(lengths, self.max_length - 1 - before, self.task.stride)
            for (first, last), counted in zip(cut, counted_items(lengths, cut), strict=True):
                row = np.concatenate(
                    [[self.tokenizer.cls_id], question, between, ids[first:last], [self.tokenizer.sep_id]]
                ).astype(np.int32)
                in_context = np.zeros(len(row), np.int32)
                in_context[before : before + last - first] = 1
                table.tokens.append(row)
                table.inputs["allowed"].append(np.where(np.arange(len(row)) == 0, 1, in_context).astype(np.int32))
                if self.has_types:
                    table.inputs["token_types"].append((np.arange(len(row)) >= before).astype(np.int32))
                table.marks["spans"].append((before, spans[first:last]))
                table.marks["counted"].append(counted)
                owners.append(owner)
                holds = answer is not None and first <= answer[0] and answer[1] < last
                starts.append(before + answer[0] - first if answer and holds else 0)
                ends.append(before + answer[1] - first if answer and holds else 0)
        if lost:
            logger.warning("%d answers stand for no token, and are learned as none", lost)
        targets = {
            "starts": np.asarray(starts, np.int32),
            "ends": np.asarray(ends, np.int32),
            "weights": np.ones(len(starts), np.float32),
        }
        return dataclasses.replace(table, owners=np.asarray(owners), row_targets=targets if labelled else {})

    def decode(
        self, examples: Sequence[Question], labels: tuple[str, ...], table: Table, outputs: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """The best answer with its characters, its score (a sum of two logits) and its probability among the best.

        With `null_answers` also the score of none, and "" where it is above the best by more than `null_threshold`.
        """
        found: list[list[tuple[float, int, int]]] = [[] for _ in examples]
        nulls = [np.inf] * len(examples)
        for row, owner in enumerate(table.owners):
            before, spans = table.marks["spans"][row]
            logits = outputs[row]
            nulls[owner] = min(nulls[owner], float(logits[0].sum()))
            shown = spans[:, 1] > spans[:, 0]
            inside = np.where(shown[:, None], logits[before : before + len(spans)], -np.inf)
            may_begin = table.marks["counted"][row] & shown
            for score, first, last in best_spans(inside, may_begin, self.task.max_answer_tokens):
                found[owner].append((score, int(spans[first, 0]), int(spans[last, 1])))
        return [self._choose(*each) for each in zip(examples, found, nulls, strict=True)]

    def _choose(self, example: Question, candidates: list[tuple[float, int, int]], null: float) -> dict[str, Any]:
        best = sorted(candidates, key=lambda candidate: -candidate[0])[:_BEST] or [(null, 0, 0)]
        scores = [score for score, _, _ in best] + ([null] if self.task.null_answers else [])
        shares = softmax(np.asarray(scores))
        score, start, end = best[0]
        prediction = {
            "id": example.id,
            "answer": example.context[start:end],
            "start": start,
            "end": end,
            "score": round(score, 6),
            "probability": round(float(shares[0]), 6),
        }
        if self.task.null_answers:
            none = {"answer": "", "start": -1, "end": -1, "probability": round(float(shares[-1]), 6)}
            prediction |= {"null_score": round(null, 6), **(none if null - score > self.task.null_threshold else {})}
        return prediction

    def measure(self, examples: Sequence[Question], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """See `contract.Kind`."""
        wanted = [[text for text, _ in example.answers] for example in examples if example.answers is not None]
        if len(wanted) < len(examples):
            return {}
        return metrics.answers(wanted, [found["answer"] for found in predictions])


def best_spans(logits_L2: np.ndarray, may_begin_L: np.ndarray, longest: int) -> list[tuple[float, int, int]]:
    """The spans of the highest sums of a first token's and a last token's logit: score, first and last token.

    Args:
        may_begin_L: bool, where a span may begin.
        longest: tokens in a span at most.
    """
    length = len(logits_L2)
    ends_LA = np.full((length, min(longest, length)), -np.inf)
    for ahead in range(ends_LA.shape[1]):
        ends_LA[: length - ahead, ahead] = logits_L2[ahead:, 1]
    scores = np.where(may_begin_L[:, None], logits_L2[:, :1] + ends_LA, -np.inf).ravel()
    best = np.argsort(-scores, kind="stable")[:_BEST]
    width = ends_LA.shape[1]
    return [
        (float(scores[place]), int(place) // width, int(place) // width + int(place) % width)
        for place in best
        if scores[place] > -np.inf
    ]


def _tokens_of(answer: tuple[str, int], spans: np.ndarray) -> tuple[int, int] | None:
    """The first and the last token that stand for an answer's characters; None where there is none."""
    text, start = answer
    first = int(np.searchsorted(spans[:, 0], start, side="left"))
    if first > 0 and spans[first - 1, 1] > start:  # the answer begins within a piece
        first -= 1
    last = int(np.searchsorted(spans[:, 0], start + len(text), side="left")) - 1
    return (first, last) if first <= last else None


def _read_squad(path: str, *, labelled: bool) -> Iterator[Question]:
    if text_files.kind(path) != ".json":
        raise UserError(f"{path}: questions are read from SQuAD's JSON, a .json or .json.gz")
    content = "".join(text_files.DOCUMENT_RULES["file"](path))
    place = "the file"
    try:
        for article in json.loads(content)["data"]:
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for asked in paragraph["qas"]:
                    place = f"question {asked.get('id')!r}"
                    yield _question(asked, context, f"{path}, {place}", labelled=labelled)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not JSON: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}, at {place}: not of SQuAD's form ({type(error).__name__}: {error}): data, each with paragraphs, each "
            "with context and qas, each with id, question and answers"
        ) from None


def _question(asked: dict[str, Any], context: str, where: str, *, labelled: bool) -> Question:
    if not context.strip():
        raise UserError(f"{where}: its context is empty")
    if "answers" not in asked:
        if labelled:
            raise UserError(f"{where} has no answers")
        return Question(str(asked["id"]), asked["question"], context, None, where)
    answers = [(answer["text"], answer["answer_start"]) for answer in asked["answers"]]
    answers = [] if asked.get("is_impossible") else answers
    for text, start in answers:
        found = context[start : start + len(text)]
        if not text or found != text:
            raise UserError(
                f"{where}: the answer {text!r} is not at character {start} of its context, where {found!r} stands"
            )
    return Question(str(asked["id"]), asked["question"], context, answers, where)
