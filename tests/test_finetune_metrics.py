"""Measures of fine-tuned tasks against numbers computed by hand and published ones."""

import math

import pytest

from mlm_jax.finetune import metrics
from mlm_jax.finetune.metrics import Entity
from mlm_jax.finetune.tags import entities_of


def test_classification_of_two_labels():
    # True positives 2, false positives 1, false negatives 2, true negatives 1.
    wanted, found = list("111100"), list("110010")
    scores = metrics.classification(("0", "1"), wanted, found)
    assert scores["accuracy"] == pytest.approx(3 / 6)
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert scores["matthews"] == pytest.approx((2 * 1 - 1 * 2) / math.sqrt(3 * 4 * 2 * 3), abs=1e-12)


def test_classification_of_three_labels_is_the_mean_over_them():
    wanted, found = list("aabbcc"), list("aabcbb")
    assert metrics.classification(("a", "b", "c"), wanted, found)["f1"] == pytest.approx((1 + 2 / 5 + 0) / 3)


def test_a_network_that_says_one_label_only_has_no_correlation():
    scores = metrics.classification(("0", "1"), list("0011"), list("0000"))
    assert (scores["accuracy"], scores["f1"], scores["matthews"]) == (0.5, 0.0, 0.0)


def test_regression():
    scores = metrics.regression([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 40.0])
    assert scores["spearman"] == pytest.approx(1.0)
    # Deviations -1.5, -0.5, 0.5, 1.5 and -10.5, -9.5, -8.5, 28.5.
    assert scores["pearson"] == pytest.approx(59.0 / math.sqrt(5.0 * 1085.0))
    assert scores["rmse"] == pytest.approx(18.0)  # one error of 36 among four
    assert metrics.regression([1.0, 2.0], [3.0, 4.0])["rmse"] == pytest.approx(2.0)
    assert metrics.regression([1.0, 3.0], [3.0, 3.0]) == {
        "pearson": 0.0,
        "spearman": 0.0,
        "rmse": pytest.approx(math.sqrt(2.0)),
    }


def test_entities_as_in_the_example_that_seqeval_documents():
    # chakki-works/seqeval:README.md: there the F1 of these is 0.50.
    wanted = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    found = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    scores = metrics.entities([entities_of(tags) for tags in wanted], [entities_of(tags) for tags in found])
    assert scores == {"f1": 0.5, "precision": 0.5, "recall": 0.5}


def test_an_entity_counts_only_with_its_label_and_both_ends():
    wanted = [[Entity("X", 0, 2), Entity("Y", 3, 4), Entity("X", 5, 6)]]
    found = [[Entity("X", 0, 2), Entity("X", 3, 4)]]
    assert metrics.entities(wanted, found) == {"f1": pytest.approx(0.4), "precision": 0.5, "recall": pytest.approx(1 / 3)}
    assert metrics.entities(wanted, [[]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The  Cat's an A-team.", "cats ateam"), ("a", ""), ("Theatre", "theatre"), ("U.S.", "us")],
)
def test_answers_are_compared_without_case_punctuation_and_articles(text, normal):
    assert metrics.normalize_answer(text) == normal


def test_answers_score_their_best_gold():
    wanted = [["the old cat", "cat"], ["in 1998", "1998"], [], []]
    found = ["The cat!", "1998 or 1999", "", "something"]
    scores = metrics.answers(wanted, found)
    # "cat" is exact; {1998} in {1998, or, 1999} has precision 1/3 and recall 1; no answer is right and wrong.
    assert scores == {"f1": pytest.approx((1 + 0.5 + 1 + 0) / 4), "exact_match": pytest.approx((1 + 0 + 1 + 0) / 4)}
