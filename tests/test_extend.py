"""New words in a vocabulary: each is one piece, its row the mean of its pieces', and everything old stays as it was."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest
import tokenizers
from interop_runs import LENGTH, TEXTS, config, our_logits, rows, small_tokenizer, write_random_run
from test_interop_tokenizers import read_sentences

from mlm_jax.cli import main
from mlm_jax.config import RtdConfig, ShardingConfig, TokenizerConfig
from mlm_jax.data.tokenizer import Tokenizer, train_tokenizer
from mlm_jax.errors import UserError
from mlm_jax.extend.run import extend_params, extend_run
from mlm_jax.extend.words import extend_tokenizer, find_words
from mlm_jax.inference import open_run
from mlm_jax.interop.save import export_run
from mlm_jax.interop.tokenizer_files import read_tokenizer, write_tokenizer
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import make_objective
from mlm_jax.sharding import make_mesh
from mlm_jax.workdir import Workdir

WORDS = ["matdog", "hatcat", "Ölhouse"]
NAMES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
KINDS = ["unigram", "bpe", "code", "wordpiece", "bytes", "metaspace unigram"]


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """A small one. The last three are of a tokenizer.json, and hold special tokens behind the vocabulary."""
    if kind in ("unigram", "bpe"):
        return small_tokenizer(kind)
    if kind == "code":
        return train_tokenizer(TokenizerConfig(vocab_size=300, algorithm="code"), TEXTS)
    if kind == "wordpiece":
        made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = (
            tokenizers.normalizers.BertNormalizer(),
            tokenizers.pre_tokenizers.BertPreTokenizer(),
        )
        made.train_from_iterator(
            TEXTS, tokenizers.trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False)
        )
    elif kind == "bytes":
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    else:
        pieces = [("[UNK]", 0.0), *((piece, -4.0) for piece in ("▁", *"abcdefghijklmnopqrstuvwxyzÖ3€", "▁the"))]
        made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0, False))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.add_special_tokens([name for name in NAMES if made.token_to_id(name) is None])
    return Tokenizer("tokenizer.json", made.to_str().encode())


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_is_one_piece_and_other_text_has_its_ids(kind, tmp_path):
    old = tokenizer_of(kind)
    extended = extend_tokenizer(old, WORDS)
    new = extended.tokenizer
    first = old.vocab_size
    assert new.vocab_size == first + 3
    assert [new.piece(index) for index in range(first)] == [old.piece(index) for index in range(first)]
    assert [getattr(new, f"{role}_id") for role in ("pad", "unk", "cls", "sep", "mask")] == [
        getattr(old, f"{role}_id") for role in ("pad", "unk", "cls", "sep", "mask")
    ]
    np.testing.assert_array_equal(new.word_starts(), np.append(old.word_starts(), [True] * 3))
    assert new.byte_lengths()[:first].tolist() == old.byte_lengths().tolist()
    for text in [*TEXTS[:4], "a cat <0x41> 猫 dog’s mat3", "  the  dog ", ""]:
        assert new.encode(text).tolist() == old.encode(text).tolist(), text
        masked = f"{text} [MASK] of [MASK]"
        assert new.encode_with_masks(masked).tolist() == old.encode_with_masks(masked).tolist(), text
    words = new.encode("the matdog sat, a hatcat and Ölhouse").tolist()
    assert [index - first for index in words if index >= first] == [0, 1, 2]
    plain = new.encode("the")
    assert new.encode("the matdog").tolist() == [*plain.tolist(), first]
    for word, pieces in zip(WORDS, extended.pieces, strict=True):
        assert len(pieces) > 1 or pieces.tolist() == [old.unk_id]
        assert old.encode(f"the {word}").tolist() == [*old.encode("the").tolist(), *pieces.tolist()]
    # As `transformers` reads it, and as it comes back from there.
    write_tokenizer(new, tmp_path, max_length=128, num_token_types=2)
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("the matdog sat", "a hatcat and a cat", TEXTS[0]):
        assert fast.encode(text).ids == [new.cls_id, *new.encode(text).tolist(), new.sep_id], text
        assert read_tokenizer(tmp_path).encode(text).tolist() == new.encode(text).tolist()


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_real_text_without_the_words_keeps_its_ids(kind, data_path):
    old = tokenizer_of(kind)
    new = extend_tokenizer(old, WORDS).tokenizer
    for line in read_sentences(data_path)[::20]:
        assert new.encode(line).tolist() == old.encode(line).tolist(), line


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("metaspace unigram", ["matdog", "the"], "'the' is in the tokenizer already, as the piece '▁the' with id 31"),
        ("wordpiece", ["matdog", "MatDog"], "'matdog' and 'MatDog' are the same to this tokenizer"),
        ("wordpiece", ["mat-dog"], "'mat-dog' is no single word to this tokenizer"),
        ("bytes", ["mat dog"], "'mat dog' is no single word"),
        ("unigram", ["mat dog"], "'mat dog' is no single word"),
        ("wordpiece", ["m" * 101], "stays cut into '\\[UNK\\]' by this tokenizer"),
    ],
)
def test_a_word_that_cannot_be_added(kind, words, message):
    with pytest.raises(UserError, match=message):
        extend_tokenizer(tokenizer_of(kind), words)


def test_the_most_frequent_words_of_many_pieces_are_found():
    tokenizer = tokenizer_of("wordpiece")
    texts = ["(Zyxwvut), zyxwvut! the cat"] * 3 + ["qqqqqq"] * 5 + ["the dog"] * 50 + ["vvvvvvv"] * 4 + ["x-y-z 12345"] * 9
    assert find_words(tokenizer, texts, 2) == [("Zyxwvut", 6), ("qqqqqq", 5)]
    with pytest.raises(
        UserError, match="the text has 2 words that occur 5 times and are cut into 3 pieces or more, and --co"
    ):
        find_words(tokenizer, texts, 3)


def test_rows_of_words_by_hand():
    params = {
        "a": {"tokens_VD": np.arange(8, dtype=np.float32).reshape(4, 2), "positions_LD": np.ones((2, 2), np.float32)},
        "b": {"output_bias_V": np.array([3, -1, 2, 9], np.float32)},
    }
    # The fourth row is of no token, and the first word takes it.
    found = extend_params(params, [np.array([0, 1]), np.array([0, 2, 2])], first=3, rows=6)
    np.testing.assert_allclose(found["a"]["tokens_VD"], [[0, 1], [2, 3], [4, 5], [1, 2], [8 / 3, 11 / 3], [2, 3]], rtol=1e-6)
    assert found["b"]["output_bias_V"].tolist() == [3, -1, 2, -1, 2, -1]
    assert found["a"]["positions_LD"] is params["a"]["positions_LD"]


CASES = {
    "decoder of its own": config(tie_embeddings=False),
    "span": config("span"),
    "disentangled tables": dataclasses.replace(config("rtd", table_dim=16), rtd=RtdConfig(embedding_sharing="disentangled")),
}


@pytest.mark.parametrize("name", CASES)
def test_each_table_of_a_run_grows(name):
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        old = make_objective(CASES[name], Compute.resolve(CASES[name].compute), mask_id=4)
        grown = dataclasses.replace(CASES[name], model=dataclasses.replace(CASES[name].model, vocab_size=512))
        new = make_objective(grown, old.compute, mask_id=4)
        shapes, wanted = (jax.eval_shape(each.init, jax.random.key(0)) for each in (old, new))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    found = extend_params(params, [np.array([7, 9, 9])], first=400, rows=512)
    assert jax.tree.map(np.shape, found) == jax.tree.map(lambda leaf: leaf.shape, wanted)
    tables = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found) if path[-1].key.endswith("_VD")]
    assert len(tables) == (1 if name == "span" else 2)
    for table in tables:
        np.testing.assert_allclose(table[400], (table[7] + 2 * table[9]) / 3, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    """A run with random parameters."""
    return write_random_run(tmp_path_factory.mktemp("extend") / "old", config())


def test_a_run_with_words(old_run, tmp_path):
    """It computes the same for old tokens, beside the means for new ones."""
    (tmp_path / "words.txt").write_text("matdog\n\n hatcat \n" + "".join(f"zz{'qv' * n}\n" for n in range(2, 100)))
    result = extend_run(old_run, tmp_path / "new", words=tmp_path / "words.txt")
    with open_run(old_run) as old, open_run(tmp_path / "new") as new:
        first, size = old.tokenizer.vocab_size, new.cfg.model.vocab_size
        assert (new.tokenizer.vocab_size, size, new.step) == (first + 100, 512, 0)
        assert result["tokenizer_ids"] == first + 100 and result["vocab_size"] == size
        pieces = [old.tokenizer.encode(f" {word}") for word in ("matdog", "hatcat")]
        before, after = jax.device_get((old.params, new.params))
        (a, old_bias), (b, new_bias) = (
            (params["encoder"]["embeddings"]["tokens_VD"], params["head"]["output_bias_V"]) for params in (before, after)
        )
        np.testing.assert_array_equal(b[:first], a[:first])
        for row, ids in enumerate(pieces, start=first):
            np.testing.assert_allclose(b[row], a[ids].mean(0), rtol=1e-5, atol=1e-7)
            assert new_bias[row] == old_bias[ids].min()
    tokens, segment_ids = rows(first, {0}, [LENGTH, 9], 0)
    theirs, ours = (our_logits(folder, tokens, segment_ids) for folder in (old_run, tmp_path / "new"))
    np.testing.assert_allclose(ours[..., :first], theirs[..., :first], atol=1e-5)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Eighty lines, in which two words of many pieces are frequent."""
    file = tmp_path_factory.mktemp("source") / "text.txt"
    words = ("dogoldhouse", "mat")
    file.write_text("\n\n".join(f"the catmat ran to the {word} and {i}" for i in range(40) for word in words))
    return f"files:{file}?documents=blank_line"


def test_the_words_of_a_corpus(old_run, source, tmp_path, capsys):
    """By the command line, to a folder with the same ids."""
    arguments = ["extend", "--workdir", str(old_run), "--out", str(tmp_path / "new"), "--corpus", source, "--count", "2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 new words (catmat, dogoldhouse), 322 ids, a vocabulary of 400 rows" in printed
    assert (tmp_path / "new" / "new_words.txt").read_text() == "catmat\ndogoldhouse\n"
    ids = Workdir(tmp_path / "new").read_tokenizer().encode("the catmat ran to the dogoldhouse").tolist()
    assert {320, 321} <= {*ids}
    export_run(tmp_path / "new", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 400
    assert read_tokenizer(tmp_path / "out").encode("the catmat ran to the dogoldhouse").tolist() == ids


@pytest.mark.slow
def test_new_words_are_trained(old_run, source, tmp_path):
    """By the recipe that lies in the workdir."""
    extend_run(old_run, tmp_path / "new", corpus=source, count=2)
    overrides = {
        "data.source": source,
        "data.validation_fraction": "0.1",
        "data.deduplicate": "False",
        "stages[0].steps": "3",
        "stages[0].batch_size": "8",
        "stages[0].seq_len": "16",
        "optimizer.warmup_steps": "0",
    }
    train = ["train", "--config", str(tmp_path / "new" / "recipe.py"), "--workdir", str(tmp_path / "continued")]
    assert main([*train, *(f"--config.{name}={value}" for name, value in overrides.items())]) == 0
    with open_run(tmp_path / "new") as before, open_run(tmp_path / "continued") as after:
        assert after.step == 3
        moved = np.abs(np.subtract(*(run.params["encoder"]["embeddings"]["tokens_VD"] for run in (before, after)))).max(1)
        assert moved[320] > 0 and moved[321] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (None, "--words=.*words.txt: there is no such file"),
        (" \n\n", "--words=.*words.txt holds no words: write one a line"),
        ("matdog\nhatcat\nmatdog\n", "--words=.*words.txt has 'matdog' twice"),
        ("the\n", "'the' is in the tokenizer already"),
    ],
)
def test_words_that_cannot_be_read(words, message, old_run, tmp_path, capsys):
    if words is not None:
        (tmp_path / "words.txt").write_text(words)
    arguments = ["--workdir", str(old_run), "--out", str(tmp_path / "new"), "--words", str(tmp_path / "words.txt")]
    assert main(["extend", *arguments]) == 2
    assert not (tmp_path / "new").exists()
    assert re.search(message, capsys.readouterr().err)
