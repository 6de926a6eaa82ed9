"""A prepared corpus holds every document once, is the same however it is made, and never looks whole before it is."""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mlm_jax.config import Config, DataConfig, ModelConfig, StageConfig, TokenizerConfig, to_dict
from mlm_jax.data import atomic, encode, units
from mlm_jax.data import prepare as prepare_module
from mlm_jax.data.loader import Rows
from mlm_jax.data.prepare import open_corpus, prepare
from mlm_jax.errors import UserError

SMALL_UNIT, SMALL_BUCKET = 12_000, 8_000  # so that a test's corpus has many of both


def _texts(count: int = 600, seed: int = 0) -> list[str]:
    """Documents of made-up words: mostly short, some longer than any row, a few repeated."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(400)]
    lengths = [min(700, int(chance.lognormvariate(3.2, 1.0)) + 1) for _ in range(count)]
    texts = [" ".join(chance.choices(words, k=length)) for length in lengths]
    return texts + texts[10:15]


def _write(path: pathlib.Path, texts: list[str]) -> pathlib.Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _config(path: pathlib.Path, seq_lens: tuple[int, ...] = (32, 64), **data: object) -> Config:
    return Config(
        name="test",
        data=DataConfig(source=f"files:{path}", **{"validation_fraction": 0.1, **data}),  # type: ignore[arg-type]
        tokenizer=TokenizerConfig(vocab_size=420),
        stages=tuple(StageConfig(seq_len=seq_len) for seq_len in seq_lens),
    )


@pytest.fixture(autouse=True)
def _many_units_and_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "UNIT_BYTES", SMALL_UNIT)
    monkeypatch.setattr(prepare_module, "SMALLEST_BUCKET_TOKENS", SMALL_BUCKET)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, pathlib.Path]:
    """A configuration and its corpus, made by two workers; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    cfg = _config(_write(folder / "texts.jsonl", _texts()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "UNIT_BYTES", SMALL_UNIT)
        patch.setattr(prepare_module, "SMALLEST_BUCKET_TOKENS", SMALL_BUCKET)
        prepare(cfg, folder / "corpus", workers=2)
    return cfg, folder / "corpus"


def _content(directory: pathlib.Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def _segments(corpus: pathlib.Path, seq_len: int, split: str) -> list[tuple[int, ...]]:
    rows = Rows(corpus, seq_len, split)
    batch = rows.read(range(len(rows)))
    return [
        tuple(tokens[ids == segment].tolist())
        for tokens, ids in zip(batch["tokens"], batch["segment_ids"], strict=True)
        for segment in range(1, ids.max() + 1)
    ]


# --- what a corpus holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_len", [32, 64])
def test_rows_hold_every_different_document_once_between_cls_and_sep(
    made: tuple[Config, pathlib.Path], seq_len: int
) -> None:
    tokenizer = open_corpus(made[1]).tokenizer
    expected: Counter[tuple[int, ...]] = Counter()
    for text in set(_texts()):
        ids = tokenizer.encode(text).tolist()
        pieces = [ids[start : start + seq_len - 2] for start in range(0, len(ids), seq_len - 2)]
        expected.update((tokenizer.cls_id, *piece, tokenizer.sep_id) for piece in pieces)
    found = Counter(_segments(made[1], seq_len, "train") + _segments(made[1], seq_len, "validation"))
    assert found == expected


def test_the_same_documents_are_held_out_at_every_row_length(made: tuple[Config, pathlib.Path]) -> None:
    corpus = open_corpus(made[1])
    held_out = {t for t in _texts() if int.from_bytes(units.document_hash(t.encode())[:8]) < 0.1 * 2**64}
    rest = set(_texts()) - held_out
    assert 20 < len(held_out) < 120
    for seq_len in (32, 64):
        limit = seq_len - 2
        for split, texts, others in (("validation", held_out, rest), ("train", rest, held_out)):
            segments = set(_segments(made[1], seq_len, split))
            encoded = {text: corpus.tokenizer.encode(text) for text in texts | others}
            wrapped = {
                text: (corpus.tokenizer.cls_id, *ids.tolist(), corpus.tokenizer.sep_id)
                for text, ids in encoded.items()
                if len(ids) <= limit
            }
            assert all(wrapped[text] in segments for text in texts if text in wrapped)
            assert not any(wrapped[text] in segments for text in others if text in wrapped)


def test_manifest_counts_what_is_there(made: tuple[Config, pathlib.Path]) -> None:
    corpus = open_corpus(made[1])
    manifest = corpus.manifest
    documents = manifest["documents"]
    assert manifest["source"]["documents"] == 605
    assert documents["duplicates"] == 5
    assert documents["train"] + documents["validation"] == len(set(_texts())) == 600
    for seq_len in (32, 64):
        for split in ("train", "validation"):
            counts = manifest["rows"][str(seq_len)][split]
            segments = _segments(made[1], seq_len, split)
            assert counts["rows"] == len(Rows(made[1], seq_len, split))
            assert counts["segments"] == len(segments)
            assert counts["tokens_and_specials"] == sum(map(len, segments))
            assert counts["tokens_and_specials"] - 2 * counts["segments"] == manifest["tokens"][split]
            assert counts["fill_rate"] == counts["tokens_and_specials"] / (counts["rows"] * seq_len) > 0.9
    assert len(list((made[1] / "seq32").glob("*-train.array_record-*"))) > 2, "one shard only: buckets are not tested"


def test_unigrams_count_the_text_of_the_training_split(made: tuple[Config, pathlib.Path]) -> None:
    corpus = open_corpus(made[1])
    counts = np.zeros(corpus.tokenizer.vocab_size, np.int64)
    for segment in _segments(made[1], 64, "train"):
        np.add.at(counts, list(segment[1:-1]), 1)
    assert (corpus.unigrams == counts).all()
    assert corpus.unigrams.dtype == np.int64


def test_rows_are_a_tfds_dataset_of_two_bytes_a_token(made: tuple[Config, pathlib.Path]) -> None:
    source = tfds.builder_from_directory(made[1] / "seq64").as_data_source("train")
    batch = Rows(made[1], 64).read(range(len(source)))
    for index in range(0, len(source), 7):
        row = source[index]
        assert row["tokens"].dtype == np.uint16 and row["tokens"].shape == (64,)
        assert (row["tokens"] == batch["tokens"][index]).all()
        lengths = row["segment_lengths"][row["segment_lengths"] > 0]
        assert (np.bincount(batch["segment_ids"][index], minlength=17)[1 : len(lengths) + 1] == lengths).all()
        assert batch["segment_ids"][index].max() == len(lengths)
    assert "tensorflow" not in sys.modules


def test_repeated_documents_stay_when_they_are_wanted(tmp_path: pathlib.Path) -> None:
    cfg = _config(_write(tmp_path / "texts.jsonl", _texts(60)), deduplicate=False)
    manifest = prepare(cfg, tmp_path / "corpus", workers=1).manifest
    assert manifest["documents"]["duplicates"] == 0
    assert manifest["documents"]["train"] + manifest["documents"]["validation"] == 65


# --- the same whatever happens ----------------------------------------------------------------------------------------


def test_workers_and_order_of_documents_do_not_change_a_byte(
    made: tuple[Config, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    cfg, corpus = made
    path = pathlib.Path(cfg.data.source.removeprefix("files:"))
    original = path.read_text()
    path.write_text("".join(reversed(original.splitlines(keepends=True))))
    try:
        prepare(cfg, tmp_path / "corpus", workers=1)
    finally:
        path.write_text(original)
    assert _content(tmp_path / "corpus") == _content(corpus)


_SCRIPT = """
import json, resource, sys
from mlm_jax import config
from mlm_jax.data import encode, prepare
encode.UNIT_BYTES, prepare.SMALLEST_BUCKET_TOKENS = {unit}, {bucket}
if len(sys.argv) > 3:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    prepare.prepare(config.from_dict(json.loads(sys.argv[1])), sys.argv[2], workers=2)
except Exception as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""


def _start(cfg: Config, out: pathlib.Path, *arguments: str) -> subprocess.Popen[str]:
    script = _SCRIPT.format(unit=SMALL_UNIT, bucket=SMALL_BUCKET)
    command = [sys.executable, "-c", script, json.dumps(to_dict(cfg)), str(out), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_killed_at_every_stage_and_started_again_it_ends_with_the_same_bytes(
    made: tuple[Config, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "corpus"
    stages = ["building/totals.json", "tokenizer", "building/unit-*2-*", "building/bucket-*", "seq64", "manifest.ready"]
    reached = []
    for stage in stages:
        process = _start(made[0], out)
        while process.poll() is None and not any(out.glob(stage)):
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            reached.append(stage)
            assert not (out / "manifest.json").exists() or stage == stages[-1]
        process.communicate()
    assert reached[:4] == stages[:4]  # the last two pass in a moment, and the kill may come too late
    prepare(made[0], out, workers=2)
    assert _content(out) == _content(made[1])


def test_a_full_disk_is_one_message_and_nothing_is_lost(made: tuple[Config, pathlib.Path], tmp_path: pathlib.Path) -> None:
    out = tmp_path / "corpus"
    for limit in (1_000, 20_000, 70_000):  # in the first text file, in a unit, in a shard
        process = _start(made[0], out, str(limit))
        _, errors = process.communicate()
        assert process.returncode == 1
        last = errors.strip().splitlines()[-1]
        assert last.startswith("MachineError: ") and "File too large" in last and str(out) in last, errors
        assert not (out / "manifest.json").exists()
        assert not list(out.rglob("*.tmp"))
    prepare(made[0], out, workers=2)
    assert _content(out) == _content(made[1])


def test_a_whole_corpus_is_opened_without_its_source(made: tuple[Config, pathlib.Path], tmp_path: pathlib.Path) -> None:
    shutil.copytree(made[1], tmp_path / "corpus")
    path = pathlib.Path(made[0].data.source.removeprefix("files:"))
    path.rename(tmp_path / "away")
    try:
        corpus = prepare(made[0], tmp_path / "corpus")
    finally:
        (tmp_path / "away").rename(path)
    assert corpus.manifest["source"]["documents"] == 605
    assert _content(tmp_path / "corpus") == _content(made[1])


# --- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, named",
    [
        ({"data": {"max_segments": 8}}, "data.max_segments=16, and the config has 8"),
        ({"data": {"validation_fraction": 0.2}}, "data.validation_fraction=0.1"),
        ({"tokenizer": {"vocab_size": 500}}, "tokenizer.vocab_size=420, and the config has 500"),
        ({"stages": (StageConfig(seq_len=32), StageConfig(seq_len=128))}, r"seq_len=\[32, 64\].* has \[32, 128\]"),
    ],
)
def test_other_settings_in_a_directory_are_named(
    made: tuple[Config, pathlib.Path], change: dict[str, dict[str, object]], named: str
) -> None:
    sections = {
        name: dataclasses.replace(getattr(made[0], name), **value) if isinstance(value, dict) else value
        for name, value in change.items()
    }
    with pytest.raises(UserError, match=named):
        prepare(dataclasses.replace(made[0], **sections), made[1])
    with pytest.raises(UserError, match=named):
        open_corpus(made[1], dataclasses.replace(made[0], **sections))


def test_a_mistake_at_the_beginning_can_be_corrected_in_the_same_directory(tmp_path: pathlib.Path) -> None:
    cfg = _config(_write(tmp_path / "texts.jsonl", _texts(60)))
    with pytest.raises(UserError, match="no file matches"):
        prepare(_config(tmp_path / "text.jsonl"), tmp_path / "corpus", workers=1)
    too_many = dataclasses.replace(cfg, tokenizer=TokenizerConfig(vocab_size=5000))
    with pytest.raises(UserError, match="vocab_size=5000 cannot be trained"):
        prepare(too_many, tmp_path / "corpus", workers=1)
    (tmp_path / "corpus" / "building" / "left by a killed worker.tmp").touch()
    assert prepare(cfg, tmp_path / "corpus", workers=1).manifest["source"]["documents"] == 65
    assert not (tmp_path / "corpus" / "building").exists()


def test_fewer_row_lengths_may_be_used(made: tuple[Config, pathlib.Path]) -> None:
    fewer = dataclasses.replace(made[0], stages=(StageConfig(seq_len=64),))
    assert prepare(fewer, made[1]).path == made[1]


def test_other_settings_in_an_unfinished_directory_are_named(tmp_path: pathlib.Path) -> None:
    cfg = _config(_write(tmp_path / "texts.jsonl", [" ".join(_texts())]))
    for _ in range(2):  # both runs fail alike: the first leaves nothing that hinders the second
        with pytest.raises(UserError, match="too few different documents"):
            prepare(cfg, tmp_path / "corpus", workers=1)
    with pytest.raises(UserError, match=r"data.max_segments=16, and the config has 3"):
        prepare(_config(tmp_path / "texts.jsonl", max_segments=3), tmp_path / "corpus", workers=1)
    with pytest.raises(UserError, match=r"seq_len=\[32, 64\], and the config has \[32\]"):
        prepare(_config(tmp_path / "texts.jsonl", (32,)), tmp_path / "corpus", workers=1)


def test_one_directory_is_prepared_by_one_process(made: tuple[Config, pathlib.Path], tmp_path: pathlib.Path) -> None:
    with atomic.locked(tmp_path), pytest.raises(UserError, match="another process is preparing"):
        prepare(made[0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_directory_of_other_things_is_left_alone(made: tuple[Config, pathlib.Path], tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"'thesis.tex' and no corpus"):
        prepare(made[0], tmp_path)
    with pytest.raises(UserError, match="is a file"):
        prepare(made[0], tmp_path / "thesis.tex")
    with pytest.raises(UserError, match="no prepared corpus"):
        open_corpus(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_documents_are_enough_and_the_smallest_hash_is_held_out(tmp_path: pathlib.Path) -> None:
    texts = [" ".join(_texts()[:50]), " ".join(_texts()[50:])]
    cfg = _config(_write(tmp_path / "texts.jsonl", texts), (16,), validation_fraction=0.001)
    corpus = prepare(cfg, tmp_path / "corpus", workers=1)
    smallest = min(texts, key=lambda text: units.document_hash(text.encode()))
    assert corpus.manifest["documents"]["validation"] == corpus.manifest["documents"]["train"] == 1
    assert corpus.manifest["tokens"]["validation"] == len(corpus.tokenizer.encode(smallest))
    assert len(Rows(tmp_path / "corpus", 16, "validation")) >= 1


def test_no_validation_split_when_none_is_asked_for(tmp_path: pathlib.Path) -> None:
    cfg = _config(_write(tmp_path / "texts.jsonl", _texts(60)), (64,), validation_fraction=0.0)
    corpus = prepare(cfg, tmp_path / "corpus", workers=1)
    assert set(corpus.manifest["tokens"]) == {"train"}
    with pytest.raises(UserError, match="no validation split"):
        Rows(corpus.path, 64, "validation")


def test_a_vocabulary_beyond_the_model_is_refused(made: tuple[Config, pathlib.Path]) -> None:
    small = dataclasses.replace(made[0], model=ModelConfig(vocab_size=256))
    with pytest.raises(UserError, match=r"420 ids and model.vocab_size=256: raise the model's to 512"):
        open_corpus(made[1], small)
