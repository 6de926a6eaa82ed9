"""A list of n-grams: found in running text whatever the tokenizer, and the same for the whole of a run."""

import pytest
from test_tokenizer import _train_byte_bpe, _train_wordpiece

from mlm_jax.config import TokenizerConfig
from mlm_jax.data.ngrams import encode_ngrams, read_ngrams
from mlm_jax.data.tokenizer import Tokenizer, train_tokenizer
from mlm_jax.errors import UserError
from mlm_jax.workdir import Workdir

TEXTS = [f"New York City has {n} bridges, and the city of York has {n + 1}. In new york they say so." for n in range(200)]


@pytest.fixture(scope="module", params=["unigram", "bpe", "wordpiece", "byte_bpe"])
def tokenizer(request) -> Tokenizer:
    if request.param == "wordpiece":
        return Tokenizer("tokenizer.json", _train_wordpiece().to_str().encode())
    if request.param == "byte_bpe":
        return Tokenizer("tokenizer.json", _train_byte_bpe().to_str().encode())
    return train_tokenizer(TokenizerConfig(algorithm=request.param, vocab_size=350), TEXTS)


@pytest.mark.parametrize(("text", "count"), [("New York City", 1), ("They say New York City is New York City.", 2)])
def test_the_ids_of_an_ngram_are_those_that_it_has_in_a_text(tokenizer, text, count):
    found, most = encode_ngrams(["New York City", "York"], tokenizer)
    assert most == 3
    ids = tokenizer.encode(text).tolist()
    places = {
        place
        for ngram in found
        for place in range(len(ids))
        if ids[place : place + len(ngram)] == ngram.tolist() and tokenizer.word_starts()[ids[place]] | (place == 0)
    }
    assert len(places) == count


def test_what_is_no_list_of_ngrams(tokenizer, tmp_path):
    with pytest.raises(UserError, match="cannot be read as text"):
        read_ngrams(tmp_path / "absent.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="cannot be read as text"):
        read_ngrams(tmp_path / "bytes.txt")
    (tmp_path / "list.txt").write_text("\nnew york \n\n  the city\n")
    assert read_ngrams(tmp_path / "list.txt") == ["new york", "the city"]
    with pytest.raises(UserError, match="lists no n-gram of several words"):
        encode_ngrams([], tokenizer)
    with pytest.raises(UserError, match="has 9 words of this tokenizer; at most 8"):
        encode_ngrams(["the city the city the city the city the"], tokenizer)


def test_a_run_keeps_the_list_that_it_began_with(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.read_ngrams() == []
    workdir.keep_ngrams(["new york", "the cité"])
    workdir.keep_ngrams(["new york", "the cité"])
    assert workdir.read_ngrams() == ["new york", "the cité"]
    with pytest.raises(UserError, match=r"lists other n-grams than .*ngrams\.txt"):
        workdir.keep_ngrams(["new york"])
