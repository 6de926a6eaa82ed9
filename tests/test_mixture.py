"""Mixtures: exact shares, every source in its own order, one tokenizer, and runs that resume and change shares exactly."""

import dataclasses
import itertools
import json
import pathlib
import random
import shutil

import numpy as np
import pytest

from mlm_jax.cli import main
from mlm_jax.config import Config, DataConfig, SourceConfig, StageConfig, TokenizerConfig, check
from mlm_jax.data import encode
from mlm_jax.data.loader import Rows, batches
from mlm_jax.data.mixture import PERIOD, Mixture, example_shares, training_rows, whole_parts
from mlm_jax.data.prepare import open_corpus, prepare
from mlm_jax.data.sources import open_source
from mlm_jax.errors import UserError

SHARES = [(1.0,), (0.5, 0.5), (0.7, 0.2, 0.1), (1 / 3, 1 / 3, 1 / 3), (0.0, 0.9, 0.1), tuple([0.9] + [0.01] * 10)]
SMOKE = str(pathlib.Path(__file__).resolve().parents[1] / "configs" / "smoke.py")


def _texts(letters: str, count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    words = ["".join(chance.choices(letters, k=chance.randint(3, 6))) for _ in range(80)]
    return [" ".join(chance.choices(words, k=chance.randint(5, 60))) for _ in range(count)]


def _write(path: pathlib.Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"files:{path}"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceConfig, ...]:
    """Three of very different size, each in letters of its own."""
    folder = tmp_path_factory.mktemp("sources")
    made = {"big": ("abcdefg", 400), "middle": ("hijklmn", 120), "small": ("opqrstu", 30)}
    return tuple(
        SourceConfig(name, _write(folder / f"{name}.jsonl", _texts(letters, count, seed)))
        for seed, (name, (letters, count)) in enumerate(made.items())
    )


def _config(sources: tuple[SourceConfig, ...], **data: object) -> Config:
    return Config(
        name="test",
        data=DataConfig(sources=sources, validation_fraction=0.1, **data),  # type: ignore[arg-type]
        tokenizer=TokenizerConfig(vocab_size=400),
        stages=(StageConfig(seq_len=32, batch_size=16, steps=10),),
    )


@pytest.fixture(scope="module")
def corpus(sources: tuple[SourceConfig, ...], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return prepare(_config(sources), tmp_path_factory.mktemp("mixture") / "corpus", workers=1).path


# --- which source comes when ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", SHARES)
def test_counts_keep_to_the_shares_everywhere_and_meet_them_in_a_period(shares: tuple[float, ...]) -> None:
    mixture = Mixture({}, whole_parts(shares))
    examples = np.arange(5_000)
    counts = mixture.counts(examples)
    assert (counts.sum(axis=1) == examples).all()
    assert (np.sort(np.diff(counts, axis=0), axis=1)[:, -1] == 1).all() and (np.diff(counts, axis=0) >= 0).all()
    assert np.abs(counts - examples[:, None] * np.array(shares)).max() < 2
    assert (mixture.counts(PERIOD) == mixture.parts).all()
    far = 10**12 + 12_345
    assert np.abs(mixture.counts(far) - far / PERIOD * mixture.parts).max() < 2
    assert (mixture.counts(far + PERIOD) - mixture.counts(far) == mixture.parts).all()


@pytest.mark.parametrize("shares", [*SHARES, (1 - 1e-9, 1e-9), tuple([1e-8] * 40 + [1 - 4e-7])])
def test_whole_parts_sum_to_the_period_and_leave_no_source_out(shares: tuple[float, ...]) -> None:
    parts = whole_parts(shares)
    assert parts.sum() == PERIOD
    assert ((parts > 0) == (np.array(shares) > 0)).all()
    away = np.abs(parts - np.array(shares) * PERIOD)
    assert (np.delete(away, np.argmax(parts)) <= 1).all(), "the largest gives what the smallest are rounded up by"


def _by_source(mixture: Mixture, ids: np.ndarray) -> np.ndarray:
    return np.array([((ids >= first) & (ids < end)).sum() for first, end in mixture.ranges.values()])


def test_every_source_is_gone_through_in_its_own_epochs(corpus: pathlib.Path, sources: tuple[SourceConfig, ...]) -> None:
    cfg = _config(tuple(dataclasses.replace(source, weight=w) for source, w in zip(sources, (1, 2, 3), strict=True)))
    mixture = training_rows(open_corpus(corpus), cfg, cfg.stages[0])
    assert isinstance(mixture, Mixture)
    run = list(batches(mixture, batch_size=16, start_step=0, num_steps=120, first_position=0, seed=3))
    ids, epochs = (np.concatenate([batch[name] for batch in run]) for name in ("example_ids", "epochs"))
    assert (_by_source(mixture, ids) == mixture.counts(len(ids))).all()
    orders = []
    for name, (first, end) in mixture.ranges.items():
        mine = (ids >= first) & (ids < end)
        size = end - first
        assert size == len(mixture.rows[name])
        whole = mine.sum() // size
        assert whole > 1 if name == "small" else True
        for epoch in range(whole):
            visited = ids[mine & (epochs == epoch)]
            assert (np.sort(visited) == np.arange(first, end)).all(), "an epoch visits each row once"
            orders.append((visited - first).tolist()[:10])
    assert len({tuple(order) for order in orders}) == len(orders)
    for batch in run[:5]:
        name = next(n for n, (f, e) in mixture.ranges.items() if f <= batch["example_ids"][0] < e)
        alone = mixture.rows[name].read([batch["example_ids"][0] - mixture.ranges[name][0]])
        assert (batch["tokens"][0] == alone["tokens"][0]).all()
        assert (batch["segment_ids"][0] == alone["segment_ids"][0]).all()


def test_sources_have_no_fixed_places_in_a_batch(corpus: pathlib.Path, sources: tuple[SourceConfig, ...]) -> None:
    """An objective may treat the first rows of a batch in its own way; every source must be found there."""
    cfg = _config(sources)
    mixture = training_rows(open_corpus(corpus), cfg, cfg.stages[0])
    assert isinstance(mixture, Mixture)
    run = batches(mixture, batch_size=3, start_step=0, num_steps=60, first_position=0, seed=0)
    firsts = np.array([batch["example_ids"][0] for batch in run])
    assert (_by_source(mixture, firsts) > 8).all()


@pytest.mark.parametrize("owners", [[[0, 1, 2, 3, 4, 5, 6, 7]], [[7, 0], [5, 2, 4], [1, 3, 6]]])
def test_resuming_continues_on_any_processes(
    corpus: pathlib.Path, sources: tuple[SourceConfig, ...], owners: list[list[int]]
) -> None:
    cfg = _config(sources, alpha=0.3)
    mixture = training_rows(open_corpus(corpus), cfg, cfg.stages[0])
    arguments = {"batch_size": 8, "first_position": np.array([5, 100, 17]), "seed": 1}
    whole = list(batches(mixture, start_step=0, num_steps=30, **arguments))
    for local in owners:
        again = training_rows(open_corpus(corpus), cfg, cfg.stages[0])
        resumed = batches(again, start_step=11, num_steps=19, local_rows=local, **arguments)
        for one, other in itertools.zip_longest(resumed, whole[11:]):
            for name in one:
                np.testing.assert_array_equal(one[name], other[name][local])


def test_another_stage_goes_on_in_every_source(corpus: pathlib.Path, sources: tuple[SourceConfig, ...]) -> None:
    """At other shares; what the first has not seen of an epoch comes before anything comes again."""
    cfg = _config(sources)
    first = training_rows(open_corpus(corpus), cfg, StageConfig(seq_len=32, weights=(1, 1, 1)))
    second = training_rows(open_corpus(corpus), cfg, StageConfig(seq_len=32, weights=(0, 3, 1)))
    seen = first.counts(8 * 4)
    arguments = {"batch_size": 8, "start_step": 0, "seed": 3}
    run = [*batches(first, num_steps=4, first_position=0, **arguments)]
    run += batches(second, num_steps=40, first_position=seen, **arguments)
    ids, epochs = (np.concatenate([batch[name] for batch in run]) for name in ("example_ids", "epochs"))
    for name, (begin, end) in first.ranges.items():
        mine = (ids >= begin) & (ids < end)
        once = ids[mine][: end - begin]
        assert len(set(once.tolist())) == len(once), name
        assert (epochs[mine] == np.arange(mine.sum()) // (end - begin)).all(), name
    assert _by_source(first, ids)[0] == seen[0]  # type: ignore[arg-type]


def test_shares_by_weight_alpha_and_epochs(corpus: pathlib.Path, sources: tuple[SourceConfig, ...]) -> None:
    opened = open_corpus(corpus)
    counts = [opened.parts[source.name].manifest["rows"]["32"]["train"] for source in sources]
    tokens = np.array([count["tokens_and_specials"] for count in counts])
    rows = np.array([count["rows"] for count in counts])

    def token_shares(cfg: Config) -> np.ndarray:
        shares = example_shares(opened, cfg, cfg.stages[0]) * tokens / rows
        return shares / shares.sum()

    weighted = tuple(dataclasses.replace(source, weight=w) for source, w in zip(sources, (2, 1, 1), strict=True))
    assert token_shares(_config(weighted)) == pytest.approx([0.5, 0.25, 0.25])
    powers = tokens**0.3
    assert token_shares(_config(sources, alpha=0.3)) == pytest.approx(powers / powers.sum())
    # With alpha 1 weights are epochs: every row is visited in proportion to its source's.
    epochs = example_shares(opened, _config(weighted, alpha=1.0), StageConfig(seq_len=32)) / rows
    assert epochs / epochs[1] == pytest.approx([2, 1, 1])
    staged = StageConfig(seq_len=32, weights=(0, 3, 1))
    assert example_shares(opened, _config(weighted), staged)[0] == 0


# --- preparation ------------------------------------------------------------------------------------------------------


def test_a_mixture_is_a_corpus_of_each_source_with_one_tokenizer(
    corpus: pathlib.Path, sources: tuple[SourceConfig, ...]
) -> None:
    opened = open_corpus(corpus, _config(sources))
    assert list(opened.parts) == ["big", "middle", "small"]
    fingerprints = {part.tokenizer.fingerprint for part in opened.parts.values()}
    assert fingerprints == {opened.tokenizer.fingerprint}
    assert (opened.unigrams == sum(part.unigrams for part in opened.parts.values())).all()
    for source in sources:
        part = opened.parts[source.name]
        assert part.manifest["source"]["uri"] == source.uri
        assert opened.manifest["sources"][source.name]["rows"] == part.manifest["rows"]
        assert len(Rows(part.path, 32)) == part.manifest["rows"]["32"]["train"]["rows"]
        held_out = Rows(part.path, 32, "validation").read([0])["tokens"][0]
        text = opened.tokenizer.decode(held_out)
        letters = {"big": "abcdefg", "middle": "hijklmn", "small": "opqrstu"}[source.name]
        assert set(text) <= {*letters, " "} and len(text) > 10


def test_other_weights_use_the_same_corpus_and_other_sources_do_not(
    corpus: pathlib.Path, sources: tuple[SourceConfig, ...]
) -> None:
    heavier = tuple(dataclasses.replace(source, weight=5.0) for source in sources)
    assert prepare(_config(heavier, alpha=0.7), corpus).path == corpus
    with pytest.raises(UserError, match=r"was made with data\.sources"):
        prepare(_config(sources[:2]), corpus)


def test_weights_follow_their_sources_however_they_are_listed(
    corpus: pathlib.Path, sources: tuple[SourceConfig, ...]
) -> None:
    weighted = [dataclasses.replace(source, weight=w) for source, w in zip(sources, (5, 3, 1), strict=True)]
    for order in itertools.permutations(weighted):
        cfg = _config(order)
        opened = open_corpus(corpus, cfg)
        shares = dict(zip(opened.parts, example_shares(opened, cfg, cfg.stages[0]), strict=True))
        assert shares["big"] > shares["middle"] > shares["small"]


def test_an_interrupted_mixture_continues_to_the_same_corpus(
    corpus: pathlib.Path, sources: tuple[SourceConfig, ...], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlm_jax.data import prepare as module

    def interrupted(cfg, *rest):  # type: ignore[no-untyped-def]
        raise KeyboardInterrupt

    whole, out = module._build, tmp_path / "corpus"
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "_build", lambda cfg, *rest: (interrupted if "middle" in cfg.data.source else whole)(cfg, *rest)
        )
        with pytest.raises(KeyboardInterrupt):
            prepare(_config(sources), out, workers=1)
    assert (out / "sources" / "big" / "manifest.json").exists() and not (out / "manifest.json").exists()
    tokenizer = (out / "tokenizer" / "tokenizer.model").stat().st_mtime_ns
    made = prepare(_config(sources), out, workers=1)
    assert made.manifest == open_corpus(corpus).manifest
    assert (out / "tokenizer" / "tokenizer.model").stat().st_mtime_ns == tokenizer


def test_the_tokenizers_sample_is_balanced_by_alpha(sources: tuple[SourceConfig, ...]) -> None:
    opened = [open_source(source.uri) for source in sources]
    texts = [[text.encode() for text in source.documents()] for source in opened]
    sizes = np.array([sum(map(len, part)) for part in texts], float)
    longest = max(len(text) for part in texts for text in part)
    for alpha in (0.0, 0.3, 1.0):
        drawn = encode.balanced([encode.sample(source, 6_000, 0) for source in opened], 6_000, alpha)
        wanted = 6_000 * sizes**alpha / (sizes**alpha).sum()
        for part, found, size in zip(wanted, drawn, sizes, strict=True):
            assert min(part, size) <= sum(map(len, found)) < part + longest
            assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no text in"), ("one document\n", "too few different documents"), ("   \n \n", "no text in")],
)
def test_an_empty_source_is_one_message_with_its_name(
    sources: tuple[SourceConfig, ...], tmp_path: pathlib.Path, content: str, message: str
) -> None:
    (tmp_path / "poor.txt").write_text(content)
    with pytest.raises(UserError, match=rf"poor\.txt.*{message}"):
        prepare(_config((*sources, SourceConfig("poor", f"files:{tmp_path / 'poor.txt'}"))), tmp_path / "c", workers=1)


A, B = SourceConfig("a", "files:a.txt"), SourceConfig("b", "files:b.txt")


@pytest.mark.parametrize(
    ("data", "stage", "message"),
    [
        ({"sources": (dataclasses.replace(A, weight=0.0),)}, {}, "weights of a sum to zero"),
        ({"sources": (A, dataclasses.replace(B, weight=-1.0))}, {}, "b has -1.0, and a weight is at least 0"),
        ({"sources": (A, A)}, {}, "the name 'a' more than once"),
        ({"sources": (dataclasses.replace(A, name="a/b"),)}, {}, "'a/b' names a folder"),
        ({"sources": (A, B), "source": "files:c.txt"}, {}, "are both given"),
        ({"sources": (A, B), "alpha": -0.5}, {}, "data.alpha=-0.5 must be at least 0"),
        ({"sources": (A, B)}, {"weights": (1.0,)}, "one weight for each of data.sources"),
        ({"sources": (A, B)}, {"weights": (0.0, 0.0)}, "stages[0].weights: the weights of a, b sum to zero"),
        ({"sources": (A, B)}, {"weights": (2.0, -1.0)}, "stages[0].weights: b has -1.0"),
        ({}, {"weights": (1.0,)}, "one weight for each of data.sources=[]"),
    ],
)
def test_mistakes_in_a_mixture(data: dict, stage: dict, message: str) -> None:
    with pytest.raises(UserError) as told:
        check(Config(name="x", data=DataConfig(**data), stages=(StageConfig(**stage),)))
    assert message in str(told.value)


# --- runs -------------------------------------------------------------------------------------------------------------

TINY = (
    "model.num_layers=1",
    "model.embed_dim=32",
    "model.mlp_dim=64",
    "model.vocab_size=512",
    "model.max_positions=48",
    "tokenizer.vocab_size=400",
    "data.validation_fraction=0.1",
    "optimizer.warmup_steps=4",
    "train.log_every=4",
    "train.checkpoint_every=8",
    "train.keep_checkpoints=4",
    "evaluation.every=16",
    "evaluation.max_rows=24",
    "evaluation.probes=()",
    "stages=[{'steps': 12, 'seq_len': 32, 'batch_size': 16, 'weights': (6, 3, 1)}, "
    "{'steps': 12, 'seq_len': 32, 'batch_size': 8, 'weights': (0, 1, 1)}]",
)


@pytest.fixture(scope="module")
def train(sources: tuple[SourceConfig, ...]):
    given = [dataclasses.asdict(source) for source in sources]

    def run(workdir: pathlib.Path, *overrides: str) -> int:
        fields = (f"data.sources={given}", *TINY, *overrides)
        return main(["train", "--config", SMOKE, "--workdir", str(workdir), *(f"--config.{field}" for field in fields)])

    return run


@pytest.fixture(scope="module")
def workdir(train, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("run") / "whole"
    assert train(path) == 0
    return path


def _metrics(workdir: pathlib.Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines if line["kind"] == kind]


def test_a_run_logs_its_shares_and_every_source(workdir: pathlib.Path) -> None:
    train = _metrics(workdir, "train")
    assert [line["step"] for line in train] == [4, 8, 12, 16, 20, 24]
    for line in train:
        assert sum(line["shares"].values()) == pytest.approx(1)
        wanted = {"big": 0.6, "middle": 0.3, "small": 0.1} if line["step"] <= 12 else {"big": 0, "middle": 0.5, "small": 0.5}
        # So few examples: their rows are not equally full, and a share is of whole ones.
        assert line["shares"] == pytest.approx(wanted, abs=0.06), line["step"]
    assert train[-1]["epochs"]["big"] == train[2]["epochs"]["big"]
    assert train[-1]["epochs"]["small"] > train[2]["epochs"]["small"] > train[0]["epochs"]["small"]
    final = _metrics(workdir, "eval")[-1]
    assert list(final["sources"]) == ["big", "middle", "small"]
    counts = [values["tokens"] for values in final["sources"].values()]
    assert final["tokens"] == sum(counts)
    for name in ("loss", "accuracy"):
        parts = [values[name] * count for values, count in zip(final["sources"].values(), counts, strict=True)]
        assert final[name] == pytest.approx(sum(parts) / sum(counts), rel=1e-5)


def test_evaluate_needs_the_workdir_alone_and_gives_the_same(
    workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workdir, tmp_path / "moved", ignore=shutil.ignore_patterns("data"))
    assert main(["evaluate", "--workdir", str(tmp_path / "moved"), "--json"]) == 0
    found, logged = json.loads(capsys.readouterr().out.splitlines()[-1]), _metrics(workdir, "eval")[-1]
    for name, values in logged["sources"].items():
        assert found["sources"][name] == pytest.approx(values, rel=1e-5)
    assert main(["report", "--workdir", str(tmp_path / "moved")]) == 0
    page = (tmp_path / "moved" / "report.html").read_text()
    assert "By source" in page and "a mixture of big, middle, small" in page


@pytest.mark.parametrize("step", [8, 16])
def test_a_stopped_run_ends_with_the_measurements_of_one_left_alone(
    train, workdir: pathlib.Path, tmp_path: pathlib.Path, step: int
) -> None:
    """Within the first stage, and in the second, which goes on with the rows that the first has left."""
    path = tmp_path / "again"
    later = [str(saved) for saved in (8, 12, 16, 24) if saved > step]
    shutil.copytree(workdir, path, ignore=shutil.ignore_patterns(*later))
    assert max(int(item.name) for item in (path / "checkpoints").iterdir()) == step
    assert train(path) == 0
    for kind in ("train", "eval"):
        assert _metrics(path, kind) == _metrics(workdir, kind)
