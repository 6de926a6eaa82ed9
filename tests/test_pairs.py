"""Parallel pairs: both sentences in one segment, each with positions of its own, from two columns or two files."""

import gzip
import json
import pathlib

import jax
import numpy as np
import pytest

from mlm_jax import segments
from mlm_jax.cli import main
from mlm_jax.config import Config, DataConfig, ModelConfig, ShardingConfig, StageConfig, TokenizerConfig
from mlm_jax.data import pairs
from mlm_jax.data.loader import Rows
from mlm_jax.data.prepare import open_corpus, prepare
from mlm_jax.data.sources import open_source
from mlm_jax.errors import UserError
from mlm_jax.inference import open_run, pack_source
from mlm_jax.model.embeddings import segment_positions
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives.mlm import MaskedLM
from mlm_jax.sharding import make_mesh

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ZAHLEN = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"]
PAIRS = [
    (" ".join(ZAHLEN[(i // 10**k) % 10] for k in range(3)), " ".join(NUMBERS[(i // 10**k) % 10] for k in range(3)))
    for i in range(500)
]
TSV = "".join(f"{german}\t{english}\n" for german, english in PAIRS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.tsv.gz").write_bytes(gzip.compress(TSV.encode()))
    cfg = Config(
        name="test",
        data=DataConfig(source=f"pairs:{folder / 'pairs.tsv.gz'}", validation_fraction=0.1),
        tokenizer=TokenizerConfig(vocab_size=296),
        stages=(StageConfig(seq_len=32),),
    )
    return prepare(cfg, folder / "corpus", workers=1).path


# --- where pairs come from --------------------------------------------------------------------------------------------


def test_columns_and_aligned_files_give_the_same_pairs(tmp_path: pathlib.Path) -> None:
    wanted = [german + pairs.MARK + english for german, english in PAIRS[:5]]
    (tmp_path / "a.tsv").write_text("".join(f"{english}\t7\t{german}\tx\n" for german, english in PAIRS[:5]))
    (tmp_path / "a.de").write_text("".join(f"{german}\r\n" for german, _ in PAIRS[:5]))
    (tmp_path / "a.en").write_text("\n".join(english for _, english in PAIRS[:5]))
    assert list(open_source(f"pairs:{tmp_path / 'a.tsv'}?columns=3,1").documents()) == wanted
    assert list(open_source(f"pairs:{tmp_path / 'a.de'}?with={tmp_path / 'a.en'}").documents()) == wanted


def test_a_pair_with_an_empty_side_is_left_out(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.tsv").write_text("eins\tone\n\tnobody\n\nniemand\t \nzwei\ttwo\n")
    assert list(open_source(f"pairs:{tmp_path / 'a.tsv'}").documents()) == [f"eins{pairs.MARK}one", f"zwei{pairs.MARK}two"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("pairs:none.tsv", "no file matches none.tsv"),
        ("pairs:short.tsv", "short.tsv, line 2: 1 column(s) between tabs, and columns=1,2 are wanted"),
        ("pairs:a.tsv?columns=1,9", "a.tsv, line 1: 2 column(s)"),
        ("pairs:a.tsv?columns=0,1", "columns=0,1 are not two different numbers from 1 on"),
        ("pairs:a.tsv?columns=2,2", "columns=2,2 are not two different numbers"),
        ("pairs:a.de?with=long.en", "a.de has 2 lines and long.en 3: line n of one must be the translation of line n"),
        ("pairs:long.en?with=a.de", "long.en has 3 lines and a.de 2"),
        ("pairs:a.de?with=*.tsv", "a.de matches 1 file(s), and with=*.tsv 2"),
        ("pairs:a.de?with=long.en&columns=1,2", "leave one of them out"),
        ("pairs:a.tsv?colums=1,2", "did you mean 'columns'?"),
    ],
)
def test_mistakes_in_pairs(uri: str, message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "short.tsv": "eins\tone\nzwei\n",
        "a.tsv": "eins\tone\n",
        "a.de": "eins\nzwei\n",
        "long.en": "one\ntwo\nthree\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as told:
        list(open_source(uri).documents())
    assert message in str(told.value)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_parts_are_counted_within_each_segment() -> None:
    cls, sep, pad = 2, 3, 0
    tokens = np.array([[cls, 9, sep, cls, 9, sep, cls, 9, sep, cls, sep, pad], [cls, 9, 9, sep] + [pad] * 8])
    ids = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0], [1] * 4 + [0] * 8], np.int32)
    marked = pairs.mark_parts(tokens, ids)
    assert (segments.attended(marked) == ids).all()
    assert (marked // segments.PART).tolist() == [[0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0], [0] * 12]
    assert segment_positions(marked).tolist()[0] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 0]
    assert (pairs.mark_parts(tokens[1:], ids[1:]) == ids[1:]).all()


def test_every_row_holds_whole_pairs(corpus: pathlib.Path) -> None:
    tokenizer = open_corpus(corpus).tokenizer
    found = set()
    for split in ("train", "validation"):
        rows = Rows(corpus, 32, split)
        batch = rows.read(range(len(rows)))
        for tokens, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.attended(ids).max() + 1):
                parts = [tokens[ids == segment + part * segments.PART] for part in (0, 1)]
                assert all(part[0] == tokenizer.cls_id and part[-1] == tokenizer.sep_id for part in parts)
                found.add(tuple(tokenizer.decode(part) for part in parts))
            assert ids.max() < 2 * segments.PART
    assert found == set(PAIRS)


def test_what_stands_between_the_parts_is_not_counted_as_text(corpus: pathlib.Path) -> None:
    made = open_corpus(corpus)
    assert (made.unigrams[sorted(made.tokenizer.special_ids)] == 0).all() and made.unigrams.sum() > 1000


@pytest.fixture(scope="module")
def logits():
    """Logits at all positions of a tiny random model."""
    model = ModelConfig(vocab_size=64, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=48, max_positions=16, init_std=0.3)
    cfg = Config(name="tiny", model=model, stages=(StageConfig(seq_len=16),))
    mesh = make_mesh(ShardingConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        built = MaskedLM(cfg, Compute.resolve(cfg.compute))
        params = built.init(jax.random.key(0))

        def run(tokens: list[int], ids: list[int]) -> np.ndarray:
            positions = np.arange(len(tokens), dtype=np.int32)[None]
            arrays = (np.array([tokens], np.int32), np.array([ids], np.int32), positions)
            return np.asarray(jax.jit(built.logits)(params, *arrays))[0]

        yield run


def test_the_sentences_of_a_pair_see_each_other_at_positions_of_their_own(logits) -> None:
    one, other = [2, 10, 11, 3], [2, 12, 13, 14, 3]
    pair = [1] * 4 + [1 + segments.PART] * 5
    joined = logits(one + other, pair)
    assert np.abs(joined[:4] - logits([*one, 2, 12, 20, 14, 3], pair)[:4]).max() > 1e-3, "the first sees the second"
    assert np.abs(joined[4:] - logits([2, 10, 21, 3, *other], pair)[4:]).max() > 1e-3, "the second sees the first"
    # Attention knows of no order but by positions, which begin anew: exchanged sentences are the same pair.
    swapped = logits(other + one, [1] * 5 + [1 + segments.PART] * 4)
    np.testing.assert_allclose(np.concatenate([swapped[5:], swapped[:5]]), joined, atol=1e-5)
    # And a neighbour in the row changes nothing.
    beside = logits(one + other + [2, 30, 3], [*pair, 2, 2, 2])
    np.testing.assert_allclose(beside[:9], joined, atol=1e-5)


@pytest.mark.slow
def test_a_run_on_pairs_and_text_evaluates_both(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.tsv").write_text(TSV)
    (tmp_path / "text.txt").write_text("".join(f"{german} {i}\n" for i, (german, _) in enumerate(PAIRS)))
    given = [
        {"name": "de", "uri": f"files:{tmp_path / 'text.txt'}?documents=line"},
        {"name": "de-en", "uri": f"pairs:{tmp_path / 'pairs.tsv'}"},
    ]
    fields = {
        "data.sources": given,
        "data.validation_fraction": 0.1,
        "tokenizer.vocab_size": 296,
        "model.num_layers": 1,
        "model.embed_dim": 32,
        "model.mlp_dim": 64,
        "model.vocab_size": 384,
        "model.max_positions": 32,
        "optimizer.warmup_steps": 4,
        "stages[0].steps": 10,
        "stages[0].seq_len": 32,
        "stages[0].batch_size": 16,
        "evaluation.probes": [],
    }
    smoke = str(pathlib.Path(__file__).resolve().parents[1] / "configs" / "smoke.py")
    overrides = [f"--config.{field}={value}" for field, value in fields.items()]
    workdir = tmp_path / "run"
    assert main(["train", "--config", smoke, "--workdir", str(workdir), *overrides]) == 0
    assert main(["evaluate", "--workdir", str(workdir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["sources"]) == ["de", "de-en"]
    with open_run(workdir) as run:
        packed = pack_source(run, f"pairs:{tmp_path / 'pairs.tsv'}", 32)
    ids = {name: Rows(workdir / "data" / "sources" / name, 32).read([0, 1, 2])["segment_ids"] for name in ("de", "de-en")}
    assert packed["segment_ids"].max() > segments.PART and ids["de-en"].max() > segments.PART
    assert 0 < ids["de"].max() < segments.PART
