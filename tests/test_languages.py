"""Language embeddings reach the tokens of their language and nothing else; text of no language is as without a table."""

import dataclasses
import json
import pathlib
import random
from typing import Any

import jax
import numpy as np
import pytest

from mlm_jax import segments
from mlm_jax.cli import main
from mlm_jax.config import Config, ModelConfig, ShardingConfig, StageConfig, from_dict
from mlm_jax.config.checks import check
from mlm_jax.errors import UserError
from mlm_jax.fill_mask import Filler
from mlm_jax.inference import open_run, pack_source
from mlm_jax.interop.fields import choose_family
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives.mlm import MaskedLM
from mlm_jax.sharding import make_mesh

PLAIN = ModelConfig(vocab_size=64, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=48, max_positions=16, init_std=0.3)
WITH = dataclasses.replace(PLAIN, languages=("en", "de", "zh"))


def test_ids_have_the_language_of_each_part() -> None:
    ids = np.array([[1, 1, 1 + segments.PART, 2, 2 + segments.PART, 0]], np.int32)
    assert segments.mark_languages(ids, ()) is ids
    for of_parts, wanted in (((3,), [3, 3, 3, 3, 3, 0]), ((1, 2), [1, 1, 2, 1, 2, 0]), ((127,), [127] * 5 + [0])):
        marked = segments.mark_languages(ids, of_parts)
        assert marked.dtype == np.int32 and (marked >= 0).all()
        assert segments.languages(marked).tolist() == [wanted]
        assert (segments.attended(marked) == segments.attended(ids)).all()
        assert (marked % segments.LANGUAGE == ids).all()


@pytest.fixture(scope="module")
def models():
    """Logits of one model with a table of languages and of the same without it, and gradients of the first."""
    mesh = make_mesh(ShardingConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        cfgs = [Config(name="tiny", model=model, stages=(StageConfig(seq_len=16),)) for model in (WITH, PLAIN)]
        with_table, plain = (MaskedLM(cfg, Compute.resolve(cfg.compute)) for cfg in cfgs)
        params = with_table.init(jax.random.key(0))
        shared: dict[str, Any] = jax.tree.map(lambda leaf: leaf, params)
        del shared["encoder"]["embeddings"]["languages_GD"]
        assert jax.tree.structure(shared) == jax.tree.structure(plain.init(jax.random.key(0)))
        logits, plain_logits = jax.jit(with_table.logits), jax.jit(plain.logits)
        gradient = jax.jit(jax.grad(lambda params, *arrays: (with_table.logits(params, *arrays) ** 2).sum()))

        def arrays(ids: list[int]) -> tuple[np.ndarray, ...]:
            tokens = np.array([[2, *range(10, 10 + len(ids) - 2), 3]], np.int32)
            return tokens, np.array([ids], np.int32), np.arange(len(ids), dtype=np.int32)[None]

        yield (
            lambda ids: np.asarray(logits(params, *arrays(ids)))[0],
            lambda ids: np.asarray(plain_logits(shared, *arrays(ids)))[0],
            lambda ids: gradient(params, *arrays(ids)),
        )


def test_text_of_no_language_has_the_logits_of_a_model_without_them(models) -> None:
    with_table, plain, _ = models
    ids = [1] * 4 + [2] * 4
    # Two programs, which XLA fuses in two ways: float32's last bits, at logits of a few units.
    np.testing.assert_allclose(with_table(ids), plain(ids), atol=3e-5)


def test_a_language_changes_its_own_segment(models) -> None:
    with_table = models[0]
    english, german = (segments.LANGUAGE * number for number in (1, 2))
    alone = with_table([1 + english] * 4 + [2 + english] * 4)
    other = with_table([1 + english] * 4 + [2 + german] * 4)
    np.testing.assert_array_equal(alone[:4], other[:4])
    assert np.abs(alone[4:] - other[4:]).max() > 1e-3
    pair = with_table([1 + english] * 4 + [1 + segments.PART + german] * 4)
    turned = with_table([1 + german] * 4 + [1 + segments.PART + english] * 4)
    assert np.abs(pair - turned).max() > 1e-3


def test_a_language_learns_from_its_own_text_only(models) -> None:
    gradient = models[2]([1 + 2 * segments.LANGUAGE] * 4 + [2] * 4)["encoder"]["embeddings"]["languages_GD"]
    norms = np.abs(np.asarray(gradient)).sum(axis=1)
    assert norms[1] > 0 and norms[0] == norms[2] == 0


@pytest.mark.parametrize(
    ("languages", "source", "message"),
    [
        (("en",), {"language": "ge"}, "'ge' is not of model.languages"),
        ((), {"language": "en"}, "is not of model.languages"),
        (("en", "de"), {"language": "en,de"}, "must name 1"),
        (("en", "de"), {"language": "en", "uri": "pairs:x.tsv"}, "must name 2"),
        (("en", "en"), {}, "different names"),
        (tuple(f"l{n}" for n in range(128)), {}, "up to 127"),
    ],
)
def test_a_mistake_in_the_languages(languages: tuple[str, ...], source: dict[str, str], message: str) -> None:
    sources = ({"name": "a", "uri": "files:x.txt", **source},)
    with pytest.raises(UserError, match=message):
        check(from_dict({"name": "test", "model": {"languages": languages}, "data": {"sources": sources}}))


def test_no_format_of_others_has_language_embeddings() -> None:
    with pytest.raises(UserError, match=r"model\.languages"):
        choose_family(dataclasses.replace(WITH, num_token_types=2), "masked", None)


@pytest.mark.slow
def test_a_run_with_languages(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(0)
    english, german = (["".join(chance.choices(letters, k=5)) for _ in range(60)] for letters in ("abcdefgh", "mnopqrst"))
    texts = {name: [" ".join(chance.choices(words, k=6)) for _ in range(200)] for name, words in
             (("en", english), ("de", german))}  # fmt: skip
    (tmp_path / "en.txt").write_text("\n".join(texts["en"]))
    (tmp_path / "pairs.tsv").write_text("\n".join(map("\t".join, zip(texts["en"], texts["de"], strict=True))))
    given = [
        {"name": "en", "uri": f"files:{tmp_path / 'en.txt'}?documents=line", "language": "en"},
        {"name": "en-de", "uri": f"pairs:{tmp_path / 'pairs.tsv'}", "language": "en,de"},
    ]
    fields = {
        "data.sources": given,
        "data.validation_fraction": 0.1,
        "tokenizer.vocab_size": 296,
        "model.languages": ("en", "de"),
        "model.num_layers": 1,
        "model.embed_dim": 32,
        "model.mlp_dim": 64,
        "model.vocab_size": 384,
        "model.max_positions": 32,
        "optimizer.warmup_steps": 4,
        "stages[0].steps": 6,
        "stages[0].seq_len": 32,
        "stages[0].batch_size": 16,
        "evaluation.probes": [],
    }
    smoke = str(pathlib.Path(__file__).resolve().parents[1] / "configs" / "smoke.py")
    overrides = [f"--config.{field}={value}" for field, value in fields.items()]
    workdir = str(tmp_path / "run")
    assert main(["train", "--config", smoke, "--workdir", workdir, *overrides]) == 0
    held_out = np.load(tmp_path / "run" / "validation_seq32_en-de.npz")["segment_ids"]
    assert {*segments.languages(held_out).ravel()} == {0, 1, 2}
    assert {*segments.languages(held_out[held_out % segments.LANGUAGE >= segments.PART])} == {2}

    with open_run(workdir) as run:
        fill, text = Filler(run.objective, run.tokenizer), f"{english[0]} [MASK]"
        fills = [fill(run.params, [text], top_k=3, language=language) for language in ("", "en", "de")]
        assert fills[0] != fills[1] != fills[2] != fills[0]
        packed = pack_source(run, given[1]["uri"], 32, run.cfg.languages("en,de"))["segment_ids"]
    assert {*segments.languages(packed).ravel()} == {0, 1, 2}
    capsys.readouterr()
    assert main(["fill-mask", "--workdir", workdir, "--json", text, "--language", "de", "--top-k", "3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fills"][0]["masks"] == fills[2][0]
    assert main(["fill-mask", "--workdir", workdir, "[MASK]", "--language", "fr"]) == 2
    assert "--language=fr is none of model.languages=('en', 'de')" in capsys.readouterr().err
    assert main(["evaluate", "--workdir", workdir, "--language", "en"]) == 2
    assert "is of a --source" in capsys.readouterr().err
