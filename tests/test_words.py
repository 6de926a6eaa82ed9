"""Words are counted as `wc -w` counts them, and `data.max_words` takes as many documents as fit, whatever their order."""

import dataclasses
import json
import pathlib
import random
import subprocess
from collections.abc import Callable

import pytest

from mlm_jax.config import Config, DataConfig, StageConfig, TokenizerConfig
from mlm_jax.data import encode, limit, units
from mlm_jax.data import prepare as prepare_module
from mlm_jax.data.corpus import Corpus, open_corpus
from mlm_jax.data.loader import Rows
from mlm_jax.data.prepare import prepare
from mlm_jax.data.sources import Source, open_source
from mlm_jax.data.words import count_words
from mlm_jax.errors import UserError

MAX_WORDS = 5_000
HELD_OUT = 0.1


def _texts() -> list[str]:
    """Documents of 1 to 80 words, more than twice `MAX_WORDS`; fifty of them are there twice."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(400)]
    texts = [" ".join(chance.choices(words, k=chance.randint(1, 80))) for _ in range(400)]
    return texts + texts[10:60]


def _config(path: pathlib.Path, texts: list[str], **data: object) -> Config:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"validation_fraction": HELD_OUT, "max_words": MAX_WORDS, **data}
    return Config(
        name="test",
        data=DataConfig(source=f"files:{path}", **settings),  # type: ignore[arg-type]
        tokenizer=TokenizerConfig(vocab_size=420),
        stages=(StageConfig(seq_len=64),),
    )


def _is_held_out(text: str) -> bool:
    return int.from_bytes(units.document_hash(text.encode())[:8]) < HELD_OUT * 2**64


def _segments(corpus: Corpus) -> set[str]:
    """What the training split's rows hold; longer texts are in pieces."""
    rows = Rows(corpus.path, 64, "train")
    batch = rows.read(range(len(rows)))
    return {
        corpus.tokenizer.decode(tokens[ids == segment])
        for tokens, ids in zip(batch["tokens"], batch["segment_ids"], strict=True)
        for segment in range(1, ids.max() + 1)
    }


def _cut_small(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(encode, "UNIT_BYTES", 3_000)
    patch.setattr(prepare_module, "SMALLEST_BUCKET_TOKENS", 4_000)


@pytest.fixture(autouse=True)
def _many_units_and_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    _cut_small(monkeypatch)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one", 1),
        ("  It's a well-known\tfact,\r\n\r\nthat 3.5 - 1 = 2.5 . ", 11),
        ("naïve Füße", 2),
        ("我爱你。", 4),  # the full stop stands apart from the characters
        ("我用 Python3 写程序", 6),
        ("ひらがなとカタカナ", 9),
        ("한국어 문장 입니다", 3),
        ("ภาษาไทย ไม่มี ช่องว่าง", 3),
    ],
)
def test_words_of_a_text(text: str, words: int) -> None:
    assert count_words(text) == words


def test_words_of_english_are_those_of_wc(tmp_path: pathlib.Path) -> None:
    texts = [text for text in open_source("builtin:python_docs").documents() if text.isascii()][:2000]
    file = tmp_path / "texts"
    file.write_text("\n".join(texts))
    counted = subprocess.run(["wc", "-w", file], capture_output=True, check=True, env={"LC_ALL": "C"}).stdout
    assert sum(map(count_words, texts)) == int(counted.split()[0]) > 50_000


def test_the_manifest_counts_the_words_of_each_split(tmp_path: pathlib.Path) -> None:
    texts = _texts()
    manifest = prepare(_config(tmp_path / "texts.jsonl", texts, max_words=0), tmp_path / "corpus", workers=1).manifest
    for split, is_held_out in (("train", False), ("validation", True)):
        own = {text for text in texts if _is_held_out(text) == is_held_out}
        assert manifest["words"][split] == sum(len(text.split()) for text in own) > 0
        assert manifest["documents"][split] == len(own)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Corpus]:
    """A corpus cut down to `MAX_WORDS`, made by two workers; not to be changed."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        _cut_small(patch)
        return folder, prepare(_config(folder / "texts.jsonl", _texts()), folder / "corpus", workers=2)


def test_as_many_documents_are_taken_as_fit(cut: tuple[pathlib.Path, Corpus]) -> None:
    _, corpus = cut
    words, documents = corpus.manifest["words"], corpus.manifest["documents"]
    ranked = sorted(
        set(_texts()), key=lambda text: (hash_ := units.document_hash(text.encode()))[8:] + hash_[:8], reverse=True
    )
    expected: dict[str, list[str]] = {"train": [], "validation": []}
    total = 0
    for text in ranked:
        split = "validation" if _is_held_out(text) else "train"
        total += count_words(text) if split == "train" else 0
        if total > MAX_WORDS:
            break
        expected[split].append(text)
    assert MAX_WORDS - 80 < words["train"] <= MAX_WORDS
    assert words == {split: sum(map(count_words, texts)) for split, texts in expected.items()}
    assert documents["train"] == len(expected["train"]) and documents["validation"] == len(expected["validation"]) > 5
    short = {text for text in expected["train"] if len(corpus.tokenizer.encode(text)) <= 62}
    assert len(short) > 10 and short <= _segments(corpus)


def _content(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("workers", [1, 3])
def test_neither_order_nor_workers_decide_what_is_taken(
    cut: tuple[pathlib.Path, Corpus], tmp_path: pathlib.Path, workers: int
) -> None:
    folder, corpus = cut
    shuffled = random.Random(workers).sample(_texts(), len(_texts()))
    before = (folder / "texts.jsonl").read_text()
    cfg = _config(folder / "texts.jsonl", shuffled)
    made = prepare(cfg, tmp_path / "corpus", workers=workers).path
    (folder / "texts.jsonl").write_text(before)
    assert _content(made) == _content(corpus.path)


def _whole(folder: pathlib.Path) -> Config:
    """The configuration of `cut`."""
    return _config(folder / "texts.jsonl", _texts())


class _KilledError(BaseException):
    pass


def _killed(*_: object, **__: object) -> str:
    raise _KilledError


def _interrupted(cfg: Config, out: pathlib.Path) -> None:
    """Leaves what a run leaves that is killed after it has tokenised everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_plan", _killed)
        with pytest.raises(_KilledError):
            prepare(cfg, out, workers=1)


def test_an_interrupted_run_goes_on_where_the_source_was_cut(
    cut: tuple[pathlib.Path, Corpus], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = _whole(cut[0])
    _interrupted(cfg, tmp_path / "corpus")
    monkeypatch.setattr(limit, "find_limit", _killed)  # it is not looked for again
    assert _content(prepare(cfg, tmp_path / "corpus", workers=1).path) == _content(cut[1].path)


def test_repeated_documents_count_each_time_where_they_stay(tmp_path: pathlib.Path) -> None:
    manifest = prepare(
        _config(tmp_path / "texts.jsonl", _texts(), deduplicate=False), tmp_path / "corpus", workers=1
    ).manifest
    assert MAX_WORDS - 160 < manifest["words"]["train"] <= MAX_WORDS
    assert manifest["documents"]["duplicates"] == 0


@pytest.mark.parametrize("max_words", [0, 10**9])
def test_a_limit_that_is_not_reached_changes_nothing(
    cut: tuple[pathlib.Path, Corpus], tmp_path: pathlib.Path, max_words: int
) -> None:
    manifest = prepare(
        dataclasses.replace(_whole(cut[0]), data=dataclasses.replace(_whole(cut[0]).data, max_words=max_words)),
        tmp_path / "corpus",
        workers=1,
    ).manifest
    assert manifest["documents"]["train"] + manifest["documents"]["validation"] == 400
    assert manifest["words"]["train"] > 2 * MAX_WORDS


def _source(texts: Callable[[], list[str]]) -> Source:
    return Source("test", lambda: iter(texts()), None, "test")


def test_a_limit_that_is_just_met_leaves_nothing_out() -> None:
    texts = ["a b c d", "e f g h i"]
    limits = [limit.find_limit(_source(lambda: texts), most, deduplicate=True, held_out_below=0) for most in (8, 9)]
    assert [len(list(limit.limited(_source(lambda: texts), first_left).documents())) for first_left in limits] == [1, 2]


def test_a_limit_below_the_first_document_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.max_words=3 is less than the first document of test has: raise it"):
        limit.find_limit(_source(lambda: ["a b c d", "e f g h i"]), 3, deduplicate=True, held_out_below=0)


def test_a_corpus_of_another_limit_is_refused_and_one_of_before_there_were_limits_is_read(
    cut: tuple[pathlib.Path, Corpus], tmp_path: pathlib.Path
) -> None:
    cfg = _whole(cut[0])
    none = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, max_words=0))
    with pytest.raises(UserError, match=r"data.max_words=5000, and the config has 0"):
        open_corpus(cut[1].path, none)
    corpus = prepare(none, tmp_path / "corpus", workers=1).path
    manifest = json.loads((corpus / "manifest.json").read_text())
    del manifest["words"], manifest["identity"]["data"]["max_words"]
    (corpus / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    assert open_corpus(corpus, none).manifest["documents"]["train"] > 300
    with pytest.raises(UserError, match=r"data.max_words=0, and the config has 5000"):
        open_corpus(corpus, cfg)


def test_a_corpus_that_another_version_began_is_refused(cut: tuple[pathlib.Path, Corpus], tmp_path: pathlib.Path) -> None:
    _interrupted(_whole(cut[0]), tmp_path / "corpus")
    begun = tmp_path / "corpus" / "building" / "identity.json"
    made = json.loads(begun.read_text())
    del made["format"]
    begun.write_text(json.dumps(made))
    with pytest.raises(UserError, match="begun by another version"):
        prepare(_whole(cut[0]), tmp_path / "corpus", workers=1)


def test_a_source_that_grows_beyond_the_limit_while_it_is_read_is_noticed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = _texts()
    cfg = _config(tmp_path / "texts.jsonl", texts[::2])
    monkeypatch.setattr(encode, "remembering", lambda source, _: source)
    find = limit.find_limit

    def find_and_add(*arguments: object, **options: object) -> str:
        found = find(*arguments, **options)  # type: ignore[arg-type]
        _config(tmp_path / "texts.jsonl", texts)
        return found

    monkeypatch.setattr(limit, "find_limit", find_and_add)
    with pytest.raises(UserError, match="documents have changed"):
        prepare(cfg, tmp_path / "corpus", workers=1)
