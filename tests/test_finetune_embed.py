"""Vectors of texts: the encoder's means and first tokens, whatever stands beside a text; and what a probe finds in them."""

import json
import pathlib

import jax
import numpy as np
import pyarrow.parquet
import pytest
from interop_runs import config, small_tokenizer, write_random_run

from mlm_jax.cli import main
from mlm_jax.config import ShardingConfig
from mlm_jax.finetune.classification import Text
from mlm_jax.finetune.embed import Embedder
from mlm_jax.inference import open_run
from mlm_jax.sharding import ROWS, make_mesh, place

RECIPE = str(pathlib.Path(__file__).resolve().parents[1] / "configs" / "finetune_sst2.py")
TEXTS = ["the cat", "a dog and a cat ran to the house", "the house of the dog is old"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    return write_random_run(tmp_path_factory.mktemp("embed") / "run", config())


def hidden_states(path: pathlib.Path, text: str) -> np.ndarray:
    """Of one text without padding, by the encoder itself."""
    tokenizer = small_tokenizer()
    ids = np.asarray([[tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id]] * jax.device_count(), np.int32)
    with open_run(path) as run:
        model = run.objective.network.bind(run.params)
        tokens, segments = place((ids, np.ones_like(ids)), jax.P(ROWS))
        return np.asarray(jax.jit(model.encoder)(tokens, segments))[0]


def test_a_vector_is_the_mean_or_the_first_of_the_encoders(run):
    examples = [Text(text, None, None, "") for text in TEXTS]
    means, firsts = (Embedder(run, pooling=pooling, batch_size=2)(examples) for pooling in ("mean", "cls"))
    assert means.shape == firsts.shape == (3, 32) and means.dtype == np.float32
    for place_in_list in (0, 1):
        hidden = hidden_states(run, TEXTS[place_in_list])
        np.testing.assert_allclose(means[place_in_list], hidden.mean(0), atol=2e-5)
        np.testing.assert_allclose(firsts[place_in_list], hidden[0], atol=2e-5)


def test_files_of_vectors(run, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n\n")
    outputs = [tmp_path / f"x.{suffix}" for suffix in ("npy", "parquet")]
    for output in outputs:
        command = ["embed", "--workdir", str(run), "--input", str(tmp_path / "texts.txt"), "--output", str(output), "--json"]
        assert main(command) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"step": 0, "texts": 3, "dimensions": 32}
    table = pyarrow.parquet.read_table(outputs[1])
    np.testing.assert_array_equal(np.load(outputs[0]), np.asarray(table["embedding"].to_pylist(), np.float32))


def test_a_probe_finds_what_vectors_say(run, tmp_path, capsys):
    """Whether a text has "cat" in it is in the mean of its tokens, also in that of a random network."""
    rng = np.random.default_rng(0)
    words = ("the", "house", "dog", "cat", "old", "mat")
    for name, count in (("train", 200), ("dev", 300)):
        texts = [" ".join(rng.choice(words, 5)) for _ in range(count)]
        rows = "".join(f"{text}\t{int('cat' in text)}\n" for text in texts)
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n" + rows)
    fields = [f"--config.task.{name}={tmp_path}/{name}.tsv" for name in ("train", "dev")]
    assert main(["probe", "--workdir", str(run), "--config", RECIPE, *fields, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["examples"], found["dev_examples"]) == (200, 300)
    # Of 300 examples an accuracy has a standard error of 0.03.
    assert found["logistic"]["accuracy"] > found["majority"]["accuracy"] + 0.1
    assert found["neighbours"]["accuracy"] > found["majority"]["accuracy"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pooling", "max"], "--pooling=max is none of mean, cls"),
        (["--output", "x.csv"], "--output=x.csv must end in .npy or .parquet"),
        (["--max-length", "25"], "--max-length=25 must lie between 8 and the model's 24 positions"),
        (["--column", "sentence"], "no column 'sentence'; there are 'text'"),
    ],
)
def test_mistakes(run, tmp_path, capsys, more, message):
    (tmp_path / "texts.txt").write_text("a cat\n")
    given = {"--workdir": str(run), "--input": str(tmp_path / "texts.txt"), "--output": str(tmp_path / "x.npy")}
    given |= dict([more])
    assert main(["embed", *(part for pair in given.items() for part in pair)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_mesh_is_left_as_it_was(run):
    with jax.set_mesh(make_mesh(ShardingConfig(data=1), jax.devices()[:1])):
        Embedder(run)
        assert jax.sharding.get_mesh().size == 1
