"""Labelled examples from every format into rows, and what becomes of a file that is not of its format. No JAX here."""

import csv
import dataclasses
import gzip
import json

import numpy as np
import pytest
from interop_runs import small_tokenizer

from mlm_jax.config import Config, ModelConfig, StageConfig, TaskConfig
from mlm_jax.errors import UserError
from mlm_jax.finetune.classification import Texts
from mlm_jax.finetune.metrics import Entity
from mlm_jax.finetune.prepare import _divide
from mlm_jax.finetune.question_answering import Questions, best_spans
from mlm_jax.finetune.table import PADDING, Schedule, Table, bucket_lengths, counted_items, in_order, windows
from mlm_jax.finetune.tagging import Tagging
from mlm_jax.finetune.tags import entities_of, iob2

TOKENIZER = small_tokenizer()


def config(objective: str = "classification", *, seq_len: int = 32, types: int = 0, **task) -> Config:
    return Config(
        name="tiny",
        objective=objective,
        model=ModelConfig(num_token_types=types),
        task=TaskConfig(train="train", **task),
        stages=(StageConfig(seq_len=seq_len),),
    )


def texts(**task) -> Texts:
    return Texts(config(**task), TOKENIZER)


def pieces(text: str) -> list[int]:
    return TOKENIZER.encode(text).tolist()


ROWS = [("the cat sat", "good"), ('a "dog', "bad"), ("the house", "good")]


def write_tsv(path):
    path.write_text("label\tsentence\n" + "".join(f"{label}\t{text}\n" for text, label in ROWS))
    return {"text": "sentence"}


def write_headless(path):
    path.write_text("".join(f"x\t{label}\t{text}\n" for text, label in ROWS))
    return {"text": "2", "label": "1"}


def write_csv(path):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *ROWS])
    return {}


def write_jsonl(path):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n\n" for text, label in ROWS))
    return {}


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    columns = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return {}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.tsv", write_tsv),
        ("b.tsv", write_headless),
        ("c.csv", write_csv),
        ("d.jsonl", write_jsonl),
        ("e.parquet", write_parquet),
    ],
)
def test_every_table_gives_the_same_examples(tmp_path, name, write):
    path = tmp_path / name
    fields = write(path)
    found = texts(**fields).read(str(path), labelled=True)
    assert [(example.text, example.label) for example in found] == ROWS
    if name != "e.parquet":
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        assert [example.text for example in texts(**fields).read(f"files:{path}.gz", labelled=True)] == [
            text for text, _ in ROWS
        ]


def test_a_folder_of_folders(tmp_path):
    for label, text in (("neg", "bad film"), ("pos", "good film"), ("unsup", "some film")):
        (tmp_path / label).mkdir()
        (tmp_path / label / "0.txt").write_text(text)
    found = texts().read(str(tmp_path), labelled=True)
    assert [(example.text, example.label) for example in found] == [
        ("bad film", "neg"),
        ("good film", "pos"),
        ("some film", "unsup"),
    ]
    assert [example.label for example in texts(labels=("pos", "neg")).read(str(tmp_path), labelled=True)] == ["pos", "neg"]
    with pytest.raises(UserError, match="no folder 'mixed' for that label; there are neg, pos, unsup"):
        texts(labels=("pos", "mixed")).read(str(tmp_path), labelled=True)
    with pytest.raises(UserError, match="has no folders"):
        texts().read(str(tmp_path / "pos"), labelled=True)


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ("", {}, "holds no examples"),
        ("text\tlabel\n", {}, "holds no examples"),
        ("text\tlabels\na\t1\n", {}, r"x.tsv, line 2: no column 'label'; there are 'text', 'labels'; did you mean 'labels'"),
        ("text\tlabel\na\t1\t2\n", {}, "line 2: 3 columns, and the first line has 2"),
        ("text\tlabel\na\t\n", {}, "line 2: the column 'label' is empty"),
        ("text\ttext\na\tb\n", {}, "the column 'text' is there twice"),
        ("text\tlabel\na\t1\n", {"pair": "second"}, "no column 'second'"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, content, fields, message):
    (tmp_path / "x.tsv").write_text(content)
    with pytest.raises(UserError, match=message):
        texts(**fields).read(str(tmp_path / "x.tsv"), labelled=True)


def test_files_that_are_not_there_or_not_known(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        texts().read(str(tmp_path / "none.tsv"), labelled=True)
    (tmp_path / "x.xml").write_text("<a/>")
    with pytest.raises(UserError, match=r"x.xml is none of .tsv, .csv, .jsonl, .parquet, .txt"):
        texts().read(str(tmp_path / "x.xml"), labelled=True)
    (tmp_path / "x.jsonl").write_text('{"text": 3, "label": 1}\n')
    with pytest.raises(UserError, match="line 1: column 'text' holds int, not text"):
        texts().read(str(tmp_path / "x.jsonl"), labelled=True)
    (tmp_path / "y.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"y.jsonl, line 1: list instead of an object"):
        texts().read(str(tmp_path / "y.jsonl"), labelled=True)


def test_labels_found_are_sorted_and_a_strange_one_is_told(tmp_path):
    path = tmp_path / "x.tsv"
    write_tsv(path)
    kind = texts(text="sentence")
    found = kind.read(str(path), labelled=True)
    assert kind.found_labels(found) == ("bad", "good")
    assert kind.encode(found, ("bad", "good"), labelled=True).row_targets["labels"].tolist() == [1, 0, 1]
    with pytest.raises(UserError, match=r"x.tsv, line 3: the label 'bad' is not among 'good', 'band'; did you mean 'band'"):
        kind.encode(found, ("good", "band"), labelled=True)


def test_class_weights_weigh_the_loss_of_their_label(tmp_path):
    path = tmp_path / "x.tsv"
    write_tsv(path)
    kind = texts(text="sentence", labels=("bad", "good"), class_weights=(3.0, 0.5))
    table = kind.encode(kind.read(str(path), labelled=True), ("bad", "good"), labelled=True)
    assert table.row_targets["weights"].tolist() == [0.5, 3.0, 0.5]


def test_a_text_is_cut_at_its_end_and_of_a_pair_the_longer_one(tmp_path):
    path = tmp_path / "x.jsonl"
    long, short = "the house of the dog is old " * 4, "a cat"
    path.write_text(
        "".join(json.dumps({"text": a, "other": b}) + "\n" for a, b in [(long, short), (short, long), (long, long)])
    )
    kind = Texts(config(seq_len=24, types=2, pair="other"), TOKENIZER)
    table = kind.encode(kind.read(str(path), labelled=False), (), labelled=False)
    a, b = pieces(long), pieces(short)
    cls, sep = TOKENIZER.cls_id, TOKENIZER.sep_id
    assert table.tokens[0].tolist() == [cls, *a[: 21 - len(b)], sep, *b, sep]
    assert table.tokens[1].tolist() == [cls, *b, sep, *a[: 21 - len(b)], sep]
    assert table.tokens[2].tolist() == [cls, *a[:11], sep, *a[:10], sep]
    assert table.inputs["token_types"][2].tolist() == [0] * 13 + [1] * 11
    assert set(table.lengths) == {24}


def test_numbers_are_read_for_a_regression(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,label\na,1.5\nb,-2\n")
    kind = Texts(config("regression"), TOKENIZER)
    found = kind.read(str(path), labelled=True)
    assert kind.encode(found, (), labelled=True).row_targets["labels"].tolist() == [1.5, -2.0]
    path.write_text("text,label\na,high\n")
    with pytest.raises(UserError, match="'high' in column 'label' is not a number"):
        kind.read(str(path), labelled=True)


# Tags.


@pytest.mark.parametrize(
    "tags",
    [
        ["O", "B-X", "I-X", "B-X", "O", "B-Y"],  # IOB2
        ["O", "I-X", "I-X", "B-X", "O", "I-Y"],  # IOB: B- only where one follows another of its label
        ["O", "B-X", "E-X", "S-X", "O", "S-Y"],  # IOBES
        ["O", "B-X", "L-X", "U-X", "O", "U-Y"],  # BIOLU
    ],
)
def test_every_scheme_says_the_same(tags):
    assert entities_of(tags) == [Entity("X", 1, 3), Entity("X", 3, 4), Entity("Y", 5, 6)]
    assert iob2(entities_of(tags), 6) == ["O", "B-X", "I-X", "B-X", "O", "B-Y"]


def test_an_entity_of_another_label_begins_without_b():
    assert entities_of(["I-X", "I-Y", "E-Y", "I-Y"]) == [Entity("X", 0, 1), Entity("Y", 1, 3), Entity("Y", 3, 4)]


def test_columns_of_words_and_tags(tmp_path):
    path = tmp_path / "x.conll"
    path.write_text("-DOCSTART- O\n\nthe DT O\ncat NN B-animal\n\n\na DT O\ndog NN B-animal\n")
    kind = Tagging(config("tagging"), TOKENIZER)
    found = kind.read(str(path), labelled=True)
    assert [example.text for example in found] == ["the cat", "a dog"]
    assert [example.entities for example in found] == [[Entity("animal", 1, 2)]] * 2
    assert found[1].where.endswith("line 7")
    assert kind.found_labels(found) == ("animal",)
    bare = tmp_path / "words.txt"
    bare.write_text("the\ncat\n")
    assert kind.read(str(bare), labelled=False)[0].entities is None
    with pytest.raises(UserError, match="the words have no tags"):
        kind.read(str(bare), labelled=True)


def test_records_of_words_or_of_spans(tmp_path):
    path = tmp_path / "x.jsonl"
    records = [
        {"tokens": ["the", "cat"], "tags": ["O", "B-animal"]},
        {
            "text": "the cat's dog.",
            "spans": [{"start": 4, "end": 7, "label": "animal"}, {"start": 10, "end": 13, "label": "animal"}],
        },
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    first, second = Tagging(config("tagging"), TOKENIZER).read(str(path), labelled=True)
    assert first.entities == [Entity("animal", 1, 2)]
    assert [second.word(index) for index in range(len(second.words))] == ["the", "cat", "'", "s", "dog", "."]
    assert second.entities == [Entity("animal", 1, 2), Entity("animal", 4, 5)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.conll", "", "holds no sentences"),
        ("x.conll", "cat\tNOUN\n", "the tag 'NOUN' is none of O, B-"),
        ("x.conll", "the\tO\ncat\n", "line 2: some words of this sentence have a tag and some have none"),
        ("x.jsonl", {"tokens": ["a", "b"], "tags": ["O"]}, "line 1: 2 words and 1 tags"),
        ("x.jsonl", {"tokens": ["a", ""], "tags": ["O", "O"]}, "tokens must be words"),
        ("x.jsonl", {"tokens": ["a"]}, "no column 'tags'"),
        (
            "x.jsonl",
            {"text": "the cats", "spans": [{"start": 4, "end": 7, "label": "a"}]},
            r"does not align with words: …the \[cat\]s…",
        ),
        ("x.jsonl", {"text": "the cats", "spans": [{"start": 4, "end": 7}]}, "a span needs start, end and label"),
        ("x.jsonl", {"words": ["a"]}, "no column 'text'; there are 'words'"),
    ],
)
def test_sentences_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content) + "\n")
    with pytest.raises(UserError, match=message):
        Tagging(config("tagging"), TOKENIZER).read(str(tmp_path / name), labelled=True)


def test_a_label_is_on_the_first_piece_and_no_word_is_lost(tmp_path):
    path = tmp_path / "x.jsonl"
    words = ["Öl", "\u200b\u200b", "houses", "€"]  # the second leaves no piece
    path.write_text(json.dumps({"tokens": words, "tags": ["B-X", "O", "B-Y", "I-Y"]}) + "\n")
    kind = Tagging(config("tagging"), TOKENIZER)
    found = kind.read(str(path), labelled=True)
    table = kind.encode(found, ("X", "Y"), labelled=True)
    (row,), (words_at,) = table.tokens, table.marks["words"]
    assert row[0] == TOKENIZER.cls_id and row[-1] == TOKENIZER.sep_id
    first = [int(np.flatnonzero(words_at == word)[0]) for word in range(4)]
    assert row[first[1]] == TOKENIZER.unk_id
    assert [int(table.token_targets["labels"][0][place]) for place in first] == [1, 0, 3, 4]
    assert table.token_targets["weights"][0].sum() == 4
    assert row[first[2] : first[3]].tolist() == pieces("houses")


def test_every_word_of_a_long_sentence_counts_once_and_is_predicted(tmp_path):
    path = tmp_path / "x.jsonl"
    words = ["the", "house", "dog", "cat", "old"] * 9
    path.write_text(json.dumps({"tokens": words, "tags": ["O"] * len(words)}) + "\n")
    kind = Tagging(config("tagging", seq_len=24, stride=8), TOKENIZER)
    found = kind.read(str(path), labelled=True)
    table = kind.encode(found, ("X",), labelled=True)
    assert len(table.tokens) > 2 and table.lengths.max() <= 24
    counted = np.concatenate([marks[marks >= 0] for marks in table.marks["words"]])
    assert sorted(counted) == list(range(len(words)))
    # Each row says of each token that it is the first word of X; what comes back is that for every word, once.
    outputs = [np.tile(np.float32([0, 5, 0]), (len(row), 1)) for row in table.tokens]
    (prediction,) = kind.decode(found, ("X",), table, outputs)
    assert prediction["tags"] == ["B-X"] * len(words) and len(prediction["entities"]) == len(words)
    assert min(prediction["probabilities"]) > 0.98


# Questions.


def squad(*qas, context="The house of the dog is old.") -> dict:
    return {"data": [{"paragraphs": [{"context": context, "qas": list(qas)}]}]}


def question(answer="the dog", start=13, **more) -> dict:
    return {"id": "q1", "question": "Whose house?", "answers": [{"text": answer, "answer_start": start}]} | more


def read_questions(tmp_path, content, *, labelled=True, **task):
    path = tmp_path / "x.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    kind = Questions(config("question_answering", **task), TOKENIZER)
    return kind, kind.read(str(path), labelled=labelled)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            squad(question(start=12)),
            "question 'q1': the answer 'the dog' is not at character 12 of its context, where ' the do'",
        ),
        (squad(question(answers=[])), "this question has no answer, as 0 others: set task.null_answers=True"),
        (squad({"id": "q1", "question": "?"}), "question 'q1' has no answers"),
        (squad(question(), context=" "), "its context is empty"),
        ({"data": []}, "holds no questions"),
        ({"rows": []}, "not of SQuAD's form"),
        ("{", "not JSON"),
    ],
)
def test_questions_that_cannot_be_read(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path, content)


def test_an_answer_is_where_its_characters_are(tmp_path):
    kind, found = read_questions(tmp_path, squad(question()))
    table = kind.encode(found, (), labelled=True)
    (row,), start, end = table.tokens, table.row_targets["starts"][0], table.row_targets["ends"][0]
    assert TOKENIZER.decode(row[start : end + 1]).strip() == "the dog"
    allowed = table.inputs["allowed"][0]
    before = len(pieces("Whose house?")) + 2
    assert allowed.tolist() == [1] + [0] * (before - 1) + [1] * (len(row) - before - 1) + [0]


def test_windows_of_a_long_context_hold_all_of_it_and_the_answer(tmp_path):
    context = "a cat ran to the house and " * 6 + "the dog is old. " + "a cat ran to the house and " * 6
    start = context.index("the dog")
    kind, found = read_questions(tmp_path, squad(question(start=start), context=context), seq_len=48, stride=12)
    table = kind.encode(found, (), labelled=True)
    assert len(table.tokens) > 3 and table.lengths.max() <= 48
    holding = np.flatnonzero(table.row_targets["starts"])
    assert 1 <= len(holding) < len(table.tokens)
    for row in holding:
        span = table.tokens[row][table.row_targets["starts"][row] : table.row_targets["ends"][row] + 1]
        assert TOKENIZER.decode(span).strip() == "the dog"
    # The network is sure in one window: the answer that comes back has the characters of the context.
    outputs = [np.zeros((len(row), 2), np.float32) for row in table.tokens]
    row = next(
        row
        for row in holding
        if table.marks["counted"][row][table.row_targets["starts"][row] - table.marks["spans"][row][0]]
    )
    outputs[row][table.row_targets["starts"][row], 0] = outputs[row][table.row_targets["ends"][row], 1] = 9.0
    (prediction,) = kind.decode(found, (), table, outputs)
    assert (prediction["answer"], prediction["start"], prediction["score"]) == ("the dog", start, 18.0)
    assert prediction["probability"] > 0.9
    assert kind.measure(found, [prediction]) == {"f1": 1.0, "exact_match": 1.0}


def test_no_answer_is_given_where_it_scores_above_the_best(tmp_path):
    content = squad(question(), question(id="q2", answers=[], is_impossible=True))
    kind, found = read_questions(tmp_path, content, null_answers=True, null_threshold=1.0)
    table = kind.encode(found, (), labelled=True)
    assert table.row_targets["starts"].tolist()[1] == table.row_targets["ends"].tolist()[1] == 0
    outputs = [np.zeros((len(row), 2), np.float32) for row in table.tokens]
    outputs[0][0], outputs[1][0] = 0.4, 0.6  # null scores of 0.8 and 1.2, the best answers' are 0
    answered, empty = kind.decode(found, (), table, outputs)
    assert answered["answer"] and answered["null_score"] == pytest.approx(0.8)
    assert (empty["answer"], empty["start"]) == ("", -1)


def test_best_spans_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    logits, may_begin = rng.normal(size=(30, 2)), rng.random(30) < 0.7
    pairs = [
        (logits[first, 0] + logits[last, 1], first, last)
        for first in range(30)
        for last in range(first, min(first + 6, 30))
        if may_begin[first]
    ]
    found = best_spans(logits, may_begin, 6)
    assert [place[1:] for place in found] == [place[1:] for place in sorted(pairs, reverse=True)[: len(found)]]
    assert len(found) == 20


# Rows into batches.


def test_windows_hold_every_item_and_step_by_the_stride():
    lengths = np.asarray([3, 1, 2, 4, 1, 1, 2, 3, 4, 2])
    found = windows(lengths, 6, 3)
    assert all(lengths[first:last].sum() <= 6 and last > first for first, last in found)
    assert sorted({item for first, last in found for item in range(first, last)}) == list(range(10))
    assert windows(lengths, 100, 3) == [(0, 10)]
    counted = counted_items(lengths, found)
    assert sum(map(np.sum, counted)) == 10


def test_each_row_is_seen_once_an_epoch_in_a_batch_of_its_length():
    lengths = np.random.default_rng(0).integers(4, 40, 103)
    buckets = bucket_lengths((16, 24, 64), int(lengths.max()))
    assert buckets == [16, 24, 39]
    schedule = Schedule(lengths, buckets, 8, seed=3)
    assert schedule.steps_per_epoch == 13
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(epoch * 13, epoch * 13 + 13):
            rows, length = schedule.at(step)
            real = rows[rows != PADDING]
            assert len(rows) == 8 and lengths[real].max() <= length
            seen += real.tolist()
        assert sorted(seen) == list(range(103))
        orders.append(seen)
    assert orders[0] != orders[1]
    # A step's batch is a function of the step alone.
    again = Schedule(lengths, buckets, 8, seed=3)
    assert again.at(17)[0].tolist() == schedule.at(17)[0].tolist()
    assert Schedule(lengths, buckets, 8, seed=4).at(17)[0].tolist() != schedule.at(17)[0].tolist()


def test_predictions_visit_every_row_once():
    lengths = np.asarray([5, 17, 9, 30, 8, 16])
    visited = [(rows.tolist(), length) for rows, length in in_order(lengths, [16, 30], 4)]
    assert visited == [([0, 2, 4, 5], 16), ([1, 3, PADDING, PADDING], 30)]


def test_a_row_of_padding_has_no_weight():
    table = Table(
        [np.arange(1, 4, dtype=np.int32), np.arange(1, 6, dtype=np.int32)],
        np.arange(2),
        token_targets={"labels": [np.ones(3, np.int32), np.ones(5, np.int32)]},
        row_targets={"weights": np.ones(2, np.float32)},
    )
    batch = table.batch(np.asarray([1, PADDING, 0]), 8, 9, targets=True)
    assert batch["tokens"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9], [9] * 8, [1, 2, 3, 9, 9, 9, 9, 9]]
    assert batch["segment_ids"].sum(1).tolist() == [5, 0, 3]
    assert batch["labels"].sum(1).tolist() == [5, 0, 3]
    assert batch["weights"].tolist() == [1, 0, 1]
    assert "weights" not in table.batch(np.asarray([0]), 8, 9, targets=False)


def test_examples_of_one_group_stay_together(tmp_path):
    content = {
        "data": [squad(question(), question(id="q2"), context=f"{n} of the dog.    the dog")["data"][0] for n in range(60)]
    }
    for article in content["data"]:
        for asked in article["paragraphs"][0]["qas"]:
            asked["answers"] = [{"text": "dog", "answer_start": article["paragraphs"][0]["context"].index("dog")}]
    kind, found = read_questions(tmp_path, content)
    train, dev = _divide(kind, found, 0.3)
    assert 10 < len(dev) < 60 and len(train) + len(dev) == 120
    assert not {example.context for example in train} & {example.context for example in dev}
    assert [dataclasses.asdict(example) for example in _divide(kind, found[::-1], 0.3)[1][::-1]] == [
        dataclasses.asdict(example) for example in dev
    ]
