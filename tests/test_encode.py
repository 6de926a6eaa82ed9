"""The sample does not depend on the order of reading, and what is tokenised is kept, found again and checked."""

import pathlib
import random
from collections.abc import Iterator

import pytest

from mlm_jax.config import TokenizerConfig
from mlm_jax.data import encode, pool, shards, sources, units
from mlm_jax.data.loader import Rows
from mlm_jax.data.tokenizer import train_tokenizer
from mlm_jax.errors import MachineError, UserError


def _texts() -> list[str]:
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(400)]
    texts = [" ".join(chance.choices(words, k=chance.randint(1, 60))) for _ in range(600)]
    return texts + texts[10:15]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TokenizerConfig(vocab_size=420), _texts()).save(path)
    return path


def _sampled(texts: list[str], sample_bytes: int, held_out_below: int) -> list[bytes]:
    source = sources.Source("test", lambda: iter(texts), None, "test")
    return encode.sample(source, sample_bytes, held_out_below)[0]


@pytest.mark.parametrize("sample_bytes", [1, 5_000, 40_000, 10**9])
def test_sample_is_the_largest_hashes_in_any_order_of_reading(sample_bytes: int) -> None:
    below = 2**61
    by_hash = sorted((units.document_hash(text.encode()), text.encode()) for text in set(_texts()))
    expected: list[bytes] = []
    for document_hash, text in reversed(by_hash):
        if sum(map(len, expected)) < sample_bytes and int.from_bytes(document_hash[:8]) >= below:
            expected.insert(0, text)
    assert _sampled(_texts(), sample_bytes, below) == expected
    assert _sampled(_texts()[::-1], sample_bytes, below) == expected


@pytest.mark.parametrize("limit, passes", [(10**6, 1), (1_000, 3)])
def test_a_small_source_is_read_once(limit: int, passes: int) -> None:
    opened = 0

    def documents() -> Iterator[str]:
        nonlocal opened
        opened += 1
        yield from _texts()

    remembering = encode.remembering(sources.Source("test", documents, None, "test"), limit)
    next(remembering.documents())  # a pass that is broken off is not taken for the whole
    opened = 0
    assert [list(remembering.documents()) for _ in range(3)] == [_texts()] * 3
    assert opened == passes


@pytest.fixture(autouse=True)
def _many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "UNIT_BYTES", 12_000)


def test_a_source_that_changes_between_runs_is_noticed(tokenizer_path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    texts = _texts()

    def run(texts: list[str], expected: encode.Totals | None = None) -> encode.Totals:
        source = sources.Source("test", lambda: iter(texts), None, "test")
        with pool.started(1) as executor:
            return encode.encode(source, tmp_path, tokenizer_path, executor, 1, expected)[2]

    totals = run(texts)
    assert run(texts, totals) == totals
    with pytest.raises(UserError, match="documents have changed"):  # in a unit that is on disk
        run(["another beginning", *texts[1:]])
    with pytest.raises(UserError, match="documents have changed"):  # by units that are no longer there
        run(texts[:200])
    with pytest.raises(UserError, match="documents have changed"):  # beyond the units on disk
        run([*texts, *texts], totals)


def test_ids_beyond_two_bytes_are_stored_whole(tmp_path: pathlib.Path, tokenizer_path: pathlib.Path) -> None:
    summary = units.encode_unit([b"abc def", b"ghi"], tmp_path / "unit-000000-0", str(tokenizer_path))
    row_format = shards.RowFormat((16,), 4, True, vocab_size=70_000, pad_id=0, cls_id=69_998, sep_id=69_999)
    bucket = shards.Bucket("train", 0, 0, 2**64)
    summary_of_rows = shards.pack_bucket(bucket, row_format, [tmp_path / "unit-000000-0"], tmp_path)
    shards.publish([summary_of_rows], row_format, 16, tmp_path, tmp_path / "seq16")
    tokens = Rows(tmp_path, 16).read([0])["tokens"][0]
    assert tokens[0] == 69_998
    assert (tokens == 69_999).sum() == 2
    assert (tokens != 0).sum() == summary.tokens + 4


def test_a_damaged_unit_is_reported(tmp_path: pathlib.Path, tokenizer_path: pathlib.Path) -> None:
    path = tmp_path / "unit-000000-0"
    units.encode_unit([b"some text", b"and more"], path, str(tokenizer_path))
    assert units.summarise(path).documents == 2
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MachineError, match="damaged"):
        units.summarise(path)
