"""The Beam pipelines write the corpus that the local runner writes, byte for byte, and tell the same mistakes."""

import dataclasses
import hashlib
import json
import pathlib
import random
from typing import Any

import pytest

from mlm_jax.config import Config, DataConfig, FiltersConfig, SourceConfig, StageConfig, TokenizerConfig
from mlm_jax.data import encode
from mlm_jax.data import prepare as prepare_module
from mlm_jax.data.prepare import prepare
from mlm_jax.data.sources import Source
from mlm_jax.errors import MachineError, UserError

pytest.importorskip("apache_beam", reason="needs the extra beam")

from mlm_jax.data import beam_runner
from mlm_jax.data.beam_runner import BeamRunner


def _texts() -> list[str]:
    """Documents of which some are repeated, some nearly so, some numbers, some longer than a row."""
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(400)]
    texts = [" ".join(chance.choices(words, k=min(300, int(chance.lognormvariate(3.2, 1.0)) + 2))) for _ in range(400)]
    near = [f"{text} {chance.choice(words)}" for text in texts if len(text.split()) > 60]
    return [*texts, *texts[:20], *near, *("12345 67890 " * count for count in range(10, 30))]


def _config(folder: pathlib.Path, texts: list[str], **data: Any) -> Config:
    folder.mkdir(exist_ok=True)
    for number, start in enumerate(range(0, len(texts), 150)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[start : start + 150])
        (folder / f"{number}.jsonl").write_text(lines)
    return Config(
        name="test",
        data=DataConfig(source=f"files:{folder}/*.jsonl", **{"validation_fraction": 0.1, **data}),
        tokenizer=TokenizerConfig(vocab_size=420, sample_megabytes=0.02),
        stages=(StageConfig(seq_len=32), StageConfig(seq_len=64)),
    )


@pytest.fixture(autouse=True)
def _many_units_and_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "UNIT_BYTES", 12_000)
    monkeypatch.setattr(prepare_module, "SMALLEST_BUCKET_TOKENS", 8_000)


def _content(directory: pathlib.Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"max_words": 4000},
        {"filters": FiltersConfig(min_words=5, min_letters=0.5, near_duplicates=0.8)},
    ],
    ids=["plain", "limited", "filtered"],
)
def test_both_runners_write_the_same_bytes(tmp_path: pathlib.Path, data: dict[str, Any]) -> None:
    if "filters" in data:
        pytest.importorskip("rensa")
    cfg = _config(tmp_path / "texts", _texts(), **data)
    local = prepare(cfg, tmp_path / "local", workers=1)
    beamed = prepare(cfg, tmp_path / "beam", runner=BeamRunner())
    assert beamed.manifest == local.manifest
    assert _content(beamed.path) == _content(local.path)
    shards = [name for name in _content(local.path) if name.startswith("seq32/") and "train.array_record" in name]
    assert len(shards) > (2 if not data.get("max_words") else 0), "one shard only: buckets are not tested"
    if "filters" in data:
        assert {*local.manifest["filters"]["dropped"]} == {"min_words", "min_letters", "near_duplicates"}


def test_a_mixture_has_the_same_bytes(tmp_path: pathlib.Path) -> None:
    texts = _texts()
    cfg = _config(tmp_path / "a", texts[:300])
    _config(tmp_path / "b", texts[250:])
    sources = tuple(SourceConfig(name, f"files:{tmp_path / name}/*.jsonl") for name in ("a", "b"))
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, source=DataConfig().source, sources=sources))
    prepare(cfg, tmp_path / "local", workers=1)
    prepare(cfg, tmp_path / "beam", runner=BeamRunner())
    assert _content(tmp_path / "beam") == _content(tmp_path / "local")


def test_an_interrupted_corpus_is_finished_by_the_other_runner(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = _config(tmp_path / "texts", _texts())
    prepare(cfg, tmp_path / "local", workers=1)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.shards, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(cfg, tmp_path / "beam", runner=BeamRunner())
    with monkeypatch.context() as patch:
        patch.setattr(beam_runner, "_tokenise", killed)  # what is packed is not packed again
        prepare(cfg, tmp_path / "beam", runner=BeamRunner())
    assert _content(tmp_path / "beam") == _content(tmp_path / "local")


def test_a_mistake_is_told_as_locally(tmp_path: pathlib.Path) -> None:
    cfg = _config(tmp_path / "texts", _texts())
    with open(tmp_path / "texts" / "1.jsonl", "a") as file:
        file.write("no JSON\n")
    with pytest.raises(UserError, match=r"1.jsonl, line 151: not JSON: .*char 0\)$"):
        prepare(cfg, tmp_path / "corpus", runner=BeamRunner())


def test_a_source_that_changed_before_all_was_packed_is_noticed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = _config(tmp_path / "texts", _texts())
    tokenizer = prepare(cfg, tmp_path / "local", workers=1).path / "tokenizer"
    pretrained = TokenizerConfig(algorithm="pretrained", path=str(tokenizer), vocab_size=420)
    cfg = dataclasses.replace(cfg, tokenizer=pretrained)

    def full(*arguments: object) -> None:
        raise MachineError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(beam_runner, "_pack", full)
        with pytest.raises(MachineError, match=r"^the disk is full$"):
            prepare(cfg, tmp_path / "beam", runner=BeamRunner())
    _config(tmp_path / "texts", ["another text", *_texts()[1:]])
    with pytest.raises(UserError, match="documents have changed"):
        prepare(cfg, tmp_path / "beam", runner=BeamRunner())


def test_documents_that_get_lost_are_noticed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = _config(tmp_path / "texts", _texts())
    monkeypatch.setattr(beam_runner, "_pack", lambda *arguments: None)
    with pytest.raises(MachineError, match=r"\d+ documents were tokenised and 0 packed"):
        prepare(cfg, tmp_path / "corpus", runner=BeamRunner())


def test_an_unknown_runner_is_refused(tmp_path: pathlib.Path) -> None:
    cfg = _config(tmp_path / "texts", _texts())
    with pytest.raises(UserError, match=r"--beam-options: .*NoSuchRunner"):
        prepare(cfg, tmp_path / "corpus", runner=BeamRunner(("--runner=NoSuchRunner",)))


def test_a_source_of_one_piece_is_sampled_as_locally(tmp_path: pathlib.Path) -> None:
    texts = _texts()
    source = encode.remembering(Source("test", lambda: iter(texts), None, "test"), 10**6)
    assert BeamRunner().sample(source, tmp_path, 5_000, 2**61) == encode.sample(source, 5_000, 2**61)
