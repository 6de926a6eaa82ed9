"""Pseudo-log-likelihoods: what a plain loop over a sentence's tokens gives, whatever is scored beside it."""

import gzip
import json

import jax
import numpy as np
import pytest

from mlm_jax.config import Config, ModelConfig, ShardingConfig, TokenizerConfig
from mlm_jax.data.tokenizer import train_tokenizer
from mlm_jax.errors import UserError
from mlm_jax.inference import TrainedRun
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives.mlm import MaskedLM
from mlm_jax.score import PseudoLikelihood, pair_accuracy, read_pairs, standard_error
from mlm_jax.sharding import make_mesh

LIMIT = 40  # no multiple of what lengths are rounded up to
CFG = Config(
    name="tiny",
    model=ModelConfig(vocab_size=384, num_layers=1, embed_dim=32, num_heads=2, mlp_dim=48, max_positions=LIMIT),
)
TEXTS = ["the cat sat on the mat", "a dog and a cat ran to the house", "the house of the dog is old"] * 20
# Words that training saw are few pieces; the others fall into many.
SENTENCES = [
    "the cat sat",
    "the dog is xylophonic",
    "a house",
    "catamaran",
    "the dog of the house is on the old mat and ran",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TokenizerConfig(vocab_size=320, algorithm="bpe"), TEXTS)


@pytest.fixture(scope="module")
def whole_run(tokenizer):
    """A run on one device with random weights; it has no workdir, as scoring reads none."""
    mesh = make_mesh(ShardingConfig(), jax.devices()[:1])
    objective = MaskedLM(CFG, Compute.resolve(CFG.compute))
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(objective.init, jax.random.key(0))
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.4, leaf.shape).astype(np.float32), shapes)
    return TrainedRun(None, CFG, tokenizer, objective, params, 0)


@pytest.fixture
def run(whole_run):
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        yield whole_run


@pytest.fixture(scope="module")
def scorers(whole_run):
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        return {method: PseudoLikelihood(whole_run, method=method, batch_size=8) for method in ("pll", "word_l2r")}


def by_hand(run: TrainedRun, sentence: str, *, whole_words: bool) -> float:
    """One sentence, one token at a time, without padding or batches."""
    tokenizer = run.tokenizer
    ids = np.array([tokenizer.cls_id, *tokenizer.encode(sentence), tokenizer.sep_id], np.int32)
    starts = tokenizer.word_starts()
    copies = []
    for place in range(1, len(ids) - 1):
        masked = ids.copy()
        masked[place] = tokenizer.mask_id
        later = place + 1
        while whole_words and later < len(ids) - 1 and not starts[ids[later]]:
            masked[later] = tokenizer.mask_id
            later += 1
        copies.append(masked)
    # The copies of a sentence are scored together only to compile once.
    places = np.arange(1, len(ids) - 1, dtype=np.int32)[:, None]
    logits = jax.jit(run.objective.logits)(run.params, np.stack(copies), np.ones((len(copies), len(ids)), np.int32), places)
    logits = np.asarray(logits, np.float64)[:, 0]
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(sum(row[token] for row, token in zip(log_probabilities, ids[1:-1], strict=True)))


@pytest.mark.parametrize("method", ["pll", "word_l2r"])
def test_scores_are_those_of_a_plain_loop(run, scorers, method):
    expected = [by_hand(run, sentence, whole_words=method == "word_l2r") for sentence in SENTENCES]
    # Batches of 8 copies hold parts of several sentences here.
    np.testing.assert_allclose(scorers[method](SENTENCES), expected, rtol=1e-5)
    assert max(expected) < -1


def test_the_methods_differ_where_a_word_has_more_than_one_piece_and_nowhere_else(run, scorers):
    starts = run.tokenizer.word_starts()
    whole = [starts[run.tokenizer.encode(sentence)].all() for sentence in SENTENCES]
    assert True in whole and False in whole
    same = np.isclose(scorers["pll"](SENTENCES), scorers["word_l2r"](SENTENCES), rtol=1e-6)
    np.testing.assert_array_equal(same, whole)


def test_a_score_does_not_depend_on_order_or_on_what_is_scored_beside_it(run, scorers):
    scores = scorers["pll"](SENTENCES)
    np.testing.assert_allclose(scorers["pll"](SENTENCES[::-1])[::-1], scores, rtol=1e-6)
    np.testing.assert_allclose([scorers["pll"]([sentence])[0] for sentence in SENTENCES], scores, rtol=1e-6)
    twice = scorers["pll"]([SENTENCES[0], SENTENCES[1], SENTENCES[0]])
    assert twice[0] == pytest.approx(twice[2], rel=1e-6)


def test_devices_and_batch_sizes_change_nothing(whole_run, scorers):
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        expected = scorers["pll"](SENTENCES)
    with jax.set_mesh(make_mesh(ShardingConfig())):
        found = PseudoLikelihood(whole_run, batch_size=3)(SENTENCES)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_progress_counts_every_masked_copy(run, scorers):
    counts: list[int] = []
    scorers["pll"](SENTENCES, counts.append)
    assert sum(counts) == sum(len(run.tokenizer.encode(sentence)) for sentence in SENTENCES)


def test_a_sentence_as_long_as_the_model_allows(run, scorers):
    words = 0
    while len(run.tokenizer.encode("cat" + " cat" * (words + 1))) <= LIMIT - 2:
        words += 1
    sentence = "cat" + " cat" * words
    np.testing.assert_allclose(scorers["pll"]([sentence]), by_hand(run, sentence, whole_words=False), rtol=1e-5)
    with pytest.raises(UserError, match=f"exceeds the model's {LIMIT} positions"):
        scorers["pll"]([sentence + " cat" * 3])


def test_mistakes(run, scorers):
    with pytest.raises(UserError, match="a sentence to score is empty"):
        scorers["pll"](["the cat", " "])
    with pytest.raises(UserError, match="unknown scoring method 'ppl': choose from pll, word_l2r"):
        PseudoLikelihood(run, method="ppl")


def test_pairs_are_counted_and_ties_count_half(run, scorers):
    scorer = scorers["pll"]
    first, second = SENTENCES[:2]
    if scorer([first])[0] < scorer([second])[0]:
        first, second = second, first
    assert pair_accuracy(scorer, [(first, second)]) == 1.0
    assert pair_accuracy(scorer, [(first, second), (second, first)]) == 0.5
    assert pair_accuracy(scorer, [(first, second), (first, second), (second, first), (first, first)]) == 2.5 / 4


def test_standard_errors():
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(0.9, 1000) == pytest.approx(0.00948683)
    assert standard_error(1.0, 10) == 0.0


# Files of pairs.


def line(good: object = "a cat", bad: object = "cat a", **more) -> str:
    return json.dumps({"sentence_good": good, "sentence_bad": bad, **more}) + "\n"


def test_pairs_are_read_by_file_name_plain_or_compressed(tmp_path):
    (tmp_path / "b_x.jsonl").write_text(line(UID="b") + "\n" + line("über", "rebü"), encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(line())
    pairs = read_pairs(f"{tmp_path}/*")
    assert list(pairs) == ["a", "b_x"]
    assert pairs == {"a": [("a cat", "cat a")], "b_x": [("a cat", "cat a"), ("über", "rebü")]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (line() + '{"sentence_good": "a"}\n', r"x\.jsonl:2: no field 'sentence_bad'"),
        (line() + "not json\n", r"x\.jsonl:2: not JSONL"),
        ("[1, 2]\n", r"x\.jsonl:1"),
        ("", r"x\.jsonl is empty"),
        ("\n \n", r"x\.jsonl"),
        (line(bad=None), r"x\.jsonl:1"),
        (line(good=3), r"x\.jsonl:1"),
        (b"\xff\xfe\x00", r"x\.jsonl"),
    ],
)
def test_what_is_no_file_of_pairs(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_pairs(str(path))


def test_a_compressed_file_that_is_cut_off_or_is_none(tmp_path):
    whole = gzip.compress((line() * 500).encode(), mtime=0)
    for name, content in {"cut": whole[: len(whole) // 2], "plain": line().encode(), "flip": whole[:20] + b"\0" * 9}.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_pairs(str(path))


def test_files_of_one_name_are_not_mixed_up(tmp_path):
    """Two suites may have files of one name: neither may replace the other in silence."""
    for folder, good in (("one", "a"), ("two", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text(line(good))
    pairs = read_pairs(f"{tmp_path}/*/x.jsonl")
    assert sorted(good for each in pairs.values() for good, _ in each) == ["a", "b"]


def test_a_pattern_that_matches_nothing(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        read_pairs(f"{tmp_path}/*.jsonl")
