"""Filters drop what their rule says and count it; near duplicates are those that comparing all documents would find."""

import dataclasses
import itertools
import json
import pathlib
import random
import sys

import numpy as np
import pytest

from mlm_jax.config import Config, DataConfig, FiltersConfig, SourceConfig, StageConfig, TokenizerConfig, from_dict
from mlm_jax.config.checks import check
from mlm_jax.data import encode, filters, near_duplicates, runner, selection, units
from mlm_jax.data import prepare as prepare_module
from mlm_jax.data.loader import Rows
from mlm_jax.data.prepare import open_corpus, prepare
from mlm_jax.data.sources import open_source
from mlm_jax.errors import UserError

PROSE = "The river rises in the hills and flows through three towns before it reaches the sea. "


@pytest.mark.parametrize(
    ("rule", "limit", "kept", "dropped"),
    [
        ("min_words", 4, "one two three four", "one two three"),
        ("max_words", 3, "one two three", "one two three four"),
        ("max_words", 3, "山水人", "山水人家"),
        ("min_word_length", 3.0, "one two three", "a an the of"),
        ("max_word_length", 5.0, "hello world", "hellos world"),
        ("min_lettered_words", 0.75, "one 2 three four", "one 2 3 four"),
        ("min_letters", 0.5, "abc 123", "abc 1234"),
        ("max_digits", 0.5, "abc 123", "abc 1234"),
        ("max_symbols", 0.5, "#one two", "#one #two three"),
        ("max_symbols", 0.5, "one… two", "one… two... three"),
        ("max_bullet_lines", 0.5, "- one\ntwo", "- one\n\n• two\nthree"),
        ("max_ellipsis_lines", 0.5, "one…\ntwo", "one…\ntwo...\nthree"),
        ("max_repeated_lines", 0.34, "one\ntwo\n\none", "one\none\n one "),
    ],
)
def test_a_rule_drops_what_is_beyond_its_limit(rule: str, limit: float, kept: str, dropped: str) -> None:
    cfg = FiltersConfig(**{rule: limit})
    assert filters.dropping_rule(kept, cfg) == ""
    assert filters.dropping_rule(dropped, cfg) == rule
    assert filters.dropping_rule(dropped, FiltersConfig()) == ""


def test_the_first_rule_that_drops_a_text_is_named() -> None:
    assert filters.dropping_rule("1 2", FiltersConfig(min_words=3, min_letters=0.5)) == "min_words"
    assert filters.dropping_rule("1 2 3", FiltersConfig(min_words=3, min_letters=0.5)) == "min_letters"


def test_language_is_told() -> None:
    pytest.importorskip("py3langid")
    german = "Der Fluss entspringt in den Bergen und fließt durch drei Städte, bevor er das Meer erreicht. "
    for languages, wanted in ((("en",), ["", "languages"]), (("de",), ["languages", ""]), (("en", "de"), ["", ""])):
        assert [filters.dropping_rule(text * 3, FiltersConfig(languages=languages)) for text in (PROSE, german)] == wanted
    sure = FiltersConfig(languages=("en",), min_language_probability=0.999999)
    assert filters.dropping_rule("ok", sure) == "languages"
    with pytest.raises(UserError, match="'xx' is none of the codes"):
        filters.check_languages(FiltersConfig(languages=("en", "xx")))


@pytest.mark.parametrize(
    ("package", "settings"), [("py3langid.langid", {"languages": ("en",)}), ("rensa", {"near_duplicates": 0.8})]
)
def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, package: str, settings: dict[str, object]) -> None:
    filters._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"data.filters.{next(iter(settings))} needs the extra 'filters': pip install"):
        selection.inspect([PROSE.encode()], FiltersConfig(**settings))  # type: ignore[arg-type]


def _similar_texts(count: int, seed: int = 0) -> list[str]:
    """Documents in families: each member has a few words of the first one exchanged."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(2000)]
    texts = []
    for _ in range(count):
        first = chance.choices(words, k=150)
        for changes in (0, 1, 2, 6, 12):
            member = list(first)
            for place in chance.sample(range(150), changes):
                member[place] = chance.choice(words)
            texts.append(" ".join(member))
    return texts


def test_near_duplicates_are_those_of_all_pairs() -> None:
    pytest.importorskip("rensa")
    texts = _similar_texts(20)
    cfg = FiltersConfig(near_duplicates=0.7)
    signatures = {units.rank(units.document_hash(t.encode())): near_duplicates.signature(t, cfg) for t in texts}
    found = near_duplicates.near_duplicates(signatures, cfg)
    assert near_duplicates.near_duplicates(dict(sorted(signatures.items())), cfg) == found

    def agree(a: str, b: str) -> float:
        return float((signatures[a] == signatures[b]).mean())

    expected = {min(a, b) for a, b in itertools.combinations(signatures, 2) if agree(a, b) >= 0.7}
    assert found <= expected
    assert 30 < len(expected) < len(texts) and len(found) >= 0.95 * len(expected)

    grams = {
        units.rank(units.document_hash(t.encode())): {tuple(t.split()[i : i + 5]) for i in range(len(t.split()) - 4)}
        for t in texts
    }
    estimates = [
        (len(grams[a] & grams[b]) / len(grams[a] | grams[b]), agree(a, b)) for a, b in itertools.combinations(grams, 2)
    ]
    # A signature's error is at most that of 128 independent draws: a standard deviation of 0.044.
    assert max(abs(true - estimated) for true, estimated in estimates) < 0.22


def test_bands_find_most_pairs_at_the_limit() -> None:
    for similarity, minhashes in itertools.product((0.1, 0.5, 0.8, 0.95), (16, 128, 250)):
        cfg = FiltersConfig(near_duplicates=similarity, minhashes=minhashes)
        bands = near_duplicates.bands(cfg)
        length = bands[0].stop
        assert all(band.stop - band.start == length for band in bands) and bands[-1].stop <= minhashes
        assert length == 1 or 1 - (1 - similarity**length) ** len(bands) >= 0.95


def _texts() -> list[str]:
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(400)]
    texts = [" ".join(chance.choices(words, k=chance.randint(2, 80))) for _ in range(300)]
    return [*texts, *texts[:20], *("12345 67890 " * count for count in range(10, 40))]


def _config(folder: pathlib.Path, texts: list[str], **settings: object) -> Config:
    for number, start in enumerate(range(0, len(texts), 100)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[start : start + 100])
        (folder / f"{number}.jsonl").write_text(lines)
    return Config(
        name="test",
        data=DataConfig(
            source=f"files:{folder}/*.jsonl",
            validation_fraction=0.1,
            filters=FiltersConfig(**settings),  # type: ignore[arg-type]
        ),
        tokenizer=TokenizerConfig(vocab_size=420),
        stages=(StageConfig(seq_len=32),),
    )


def _rows(corpus: pathlib.Path) -> list[bytes]:
    rows = [Rows(corpus, 32, split) for split in ("train", "validation")]
    return [tokens.tobytes() for part in rows for tokens in part.read(range(len(part)))["tokens"]]


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "UNIT_BYTES", 12_000)
    monkeypatch.setattr(prepare_module, "REMEMBERED_BYTES", 0)


def test_a_corpus_is_that_of_the_documents_that_are_kept(tmp_path: pathlib.Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "kept").mkdir()
    cfg = _config(tmp_path / "all", _texts(), min_words=10, min_letters=0.5)
    made = prepare(cfg, tmp_path / "filtered", workers=1)
    kept = [text for text in _texts() if len(text.split()) >= 10 and not text[0].isdigit()]
    short = sum(len(text.split()) < 10 for text in _texts())
    assert made.manifest["filters"] == {"documents": 350, "dropped": {"min_words": short, "min_letters": 30}}
    assert made.manifest["documents"]["duplicates"] > 0
    plain = prepare(_config(tmp_path / "kept", kept), tmp_path / "plain", workers=1)
    assert "filters" not in plain.manifest
    assert made.manifest["content_hash"] == plain.manifest["content_hash"]
    assert made.tokenizer.fingerprint == plain.tokenizer.fingerprint
    assert _rows(made.path) == _rows(plain.path)
    with pytest.raises(UserError, match=r"data.filters.min_words=10, and the config has 11"):
        open_corpus(made.path, _config(tmp_path / "all", _texts(), min_words=11, min_letters=0.5))


def test_near_duplicates_leave_a_source(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("rensa")
    texts = [*(distinct := _similar_texts(20)), *distinct[:5]]
    cfg = _config(tmp_path, texts, near_duplicates=0.7)
    ranks = {text: units.rank(units.document_hash(text.encode())) for text in texts}
    signatures = {rank: near_duplicates.signature(text, cfg.data.filters) for text, rank in ranks.items()}
    left_out = near_duplicates.near_duplicates(signatures, cfg.data.filters)
    source = open_source(cfg.data.source)
    runner.LocalRunner(1).select(source, cfg.data.filters, tmp_path)
    kept = list(selection.selected(source, tmp_path).documents())
    assert kept == [text for text in texts if ranks[text] not in left_out]
    assert selection.read_summary(tmp_path) == {
        "documents": len(texts),
        "dropped": {"near_duplicates": len(texts) - len(kept)},
    }


def test_what_was_decided_outlives_an_interruption(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = _config(tmp_path, _texts(), min_letters=0.5)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode, "sample", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(cfg, tmp_path / "corpus", workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(selection, "inspect", killed)
        patch.setattr(runner.LocalRunner, "select", killed)
        prepare(cfg, tmp_path / "corpus", workers=1)
    assert not (tmp_path / "corpus" / "building").exists()


@pytest.mark.parametrize("change", ["other", "more"])
def test_a_source_that_changed_after_the_filters_is_noticed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    cfg = _config(tmp_path, _texts(), min_letters=0.5)
    select = runner.LocalRunner.select

    def select_and_change(*arguments: object) -> None:
        select(*arguments)  # type: ignore[arg-type]
        changed = ["another text", *_texts()[1:]] if change == "other" else [*_texts(), "one more text"]
        _config(tmp_path, changed)

    monkeypatch.setattr(runner.LocalRunner, "select", select_and_change)
    with pytest.raises(UserError, match="documents have changed"):
        prepare(cfg, tmp_path / "corpus", workers=1)


def test_a_mixture_is_filtered_source_by_source(tmp_path: pathlib.Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _config(tmp_path / name, _texts() if name == "a" else [PROSE * 3 + str(n) for n in range(100)])
    sources = tuple(SourceConfig(name, f"files:{tmp_path / name}/*.jsonl") for name in ("a", "b"))
    cfg = _config(tmp_path, [], min_letters=0.5)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, source=DataConfig().source, sources=sources))
    made = prepare(cfg, tmp_path / "corpus", workers=1)
    counts = {name: part["filters"] for name, part in made.manifest["sources"].items()}
    assert counts == {
        "a": {"documents": 350, "dropped": {"min_letters": 30}},
        "b": {"documents": 100, "dropped": {}},
    }


def test_a_source_that_is_empty_after_the_filters(tmp_path: pathlib.Path) -> None:
    cfg = _config(tmp_path, _texts(), min_words=500)
    with pytest.raises(UserError, match=r"empty after the filters: of 350 document.*min_words 350"):
        prepare(cfg, tmp_path / "corpus", workers=1)
    corrected = prepare(_config(tmp_path, _texts(), min_words=5), tmp_path / "corpus", workers=1)
    assert corrected.manifest["documents"]["train"] > 200


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"filters": {"min_words": -1}}, "data.filters.min_words=-1 must be at least 0"),
        ({"filters": {"max_digits": 1.5}}, r"max_digits=1.5 must be in \[0, 1\]"),
        ({"filters": {"min_words": 10, "max_words": 5}}, "leave no document"),
        ({"filters": {"min_language_probability": 0.5}}, "which names none"),
        ({"filters": {"languages": ("en",)}, "source": "pairs:x.tsv"}, "two languages"),
        ({"filters": {"near_duplicates": 0.8}, "deduplicate": False}, "needs data.deduplicate=True"),
        ({"filters": {"near_duplicates": 0.8, "minhashes": 4}}, "minhashes of 16 or more"),
        ({"filters": {"min_word": 5}}, "did you mean 'min_words'"),
    ],
)
def test_a_mistake_in_the_filters(data: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(from_dict({"name": "test", "data": data}))


def test_codes_name_the_rules(tmp_path: pathlib.Path) -> None:
    found = selection.inspect([b"one two", b"one", PROSE.encode()], FiltersConfig(min_words=2, max_words=5))
    counts = selection.write_part(tmp_path, 0, found.codes, "")
    assert {rule: count for rule, count in counts.items() if count} == {"": 1, "min_words": 1, "max_words": 1}
    np.testing.assert_array_equal(found.codes, [0, 1, 2])
