"""Vocabularies for molecules, proteins and source code: what is a token, that text comes back, and that training repeats."""

import gzip
import inspect
import pathlib
import re
import textwrap

import numpy as np
import pytest

from mlm_jax.config import Config, MaskingConfig, ModelConfig, TokenizerConfig, check, load_config
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from mlm_jax.errors import UserError

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "C[C@H](N)C(=O)O", "ClCCBr", "[Na+].[Cl-]", "C1CC%10CC1CC%10", "F/C=C\\F", "N#Cc1ccsc1"]
CODE = [textwrap.dedent(inspect.getsource(function)) for function in (re.compile, textwrap.dedent, inspect.getsource)]
PATTERN = r"\[[^\]]+\]|Br?|Cl?|[NOSPFIbcnosp]|%[0-9]{2}|[0-9]|[()=#.+\\/:~@?>*$-]"


def _pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.piece(int(index)) for index in tokenizer.encode(text)]


@pytest.fixture(scope="module")
def smiles() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(algorithm="regex", pattern=PATTERN, vocab_size=64), SMILES)


@pytest.fixture(scope="module")
def code() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(algorithm="code", vocab_size=600), CODE)


def test_a_molecule_is_cut_into_atoms_bonds_and_rings(smiles: Tokenizer) -> None:
    pieces = ["Cl", "C", "[C@H]", "(", "Br", ")", *"c1ccccc1", "%10"]
    assert _pieces(smiles, "".join(pieces)) == pieces
    for text in SMILES:
        assert smiles.decode(smiles.encode(text)) == text


def test_what_the_pattern_does_not_match_or_the_sample_did_not_hold_is_unknown(smiles: Tokenizer) -> None:
    assert (smiles.encode("C[Zn]C") == smiles.unk_id).tolist() == [False, True, False]
    assert (smiles.encode("C!!C") == smiles.unk_id).tolist() == [False, True, False]
    assert "!!" not in smiles.model.pieces
    few = train_tokenizer(TokenizerConfig(algorithm="regex", pattern=PATTERN, vocab_size=8), SMILES)
    assert few.vocab_size == 8 and few.model.pieces[5:] == ["C", "c", "1"], "the most frequent"


def test_the_recipe_has_this_pattern() -> None:
    assert load_config(str(CONFIGS / "chem_mini.py")).tokenizer.pattern == PATTERN


def test_a_protein_is_cut_into_its_letters_and_each_is_a_word() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(algorithm="characters", vocab_size=33), ["MASVSISC", "GTRXLKEDQNHWYFP"])
    assert _pieces(tokenizer, "MASK") == ["M", "A", "S", "K"]
    assert tokenizer.vocab_size == 5 + len(set("MASVSISCGTRXLKEDQNHWYFP"))
    assert tokenizer.word_starts().all()
    assert tokenizer.byte_lengths().tolist() == [0] * 5 + [1] * (tokenizer.vocab_size - 5)
    ids = tokenizer.encode_with_masks("MA[MASK]VS")
    assert (ids == tokenizer.mask_id).tolist() == [False, False, True, False, False]
    lines = train_tokenizer(TokenizerConfig(algorithm="characters", vocab_size=40), ["a b\nc é"])
    assert lines.decode(lines.encode("é\nb a")) == "é\nb a"
    assert dict(zip(lines.model.pieces, lines.byte_lengths().tolist(), strict=True))["é"] == 2


def test_code_comes_back_to_the_last_space_and_no_token_crosses_a_name(code: Tokenizer) -> None:
    for text in [*CODE, "def f( x ):\n\tif x :\n\t\treturn  {'ä': 1_000}\r\n", "    \n\n  pass", ""]:
        assert code.decode(code.encode(text)) == text
    pieces = _pieces(code, "\n    return_value = other_name(1)")
    assert "".join(pieces).replace("Ġ", " ").replace("Ċ", "\n") == "\n    return_value = other_name(1)"
    assert pieces[0] == "ĊĠĠĠĠ", "a line's end and its indentation are one token"
    for piece in code.model.pieces[5:]:
        text = piece.replace("Ġ", " ").replace("Ċ", "\n")
        assert re.fullmatch(r"\n[ \t]*|\s+| ?\w+| ?[^\w\s]+|.", text, re.DOTALL), text


def test_a_long_text_of_code_has_the_tokens_of_its_whole(code: Tokenizer) -> None:
    text = "\n".join(CODE * 12)
    assert len(text) > 1 << 14
    assert code.encode(text).tolist() == code.model.encode(text)


def test_training_again_and_loading_give_the_same(smiles: Tokenizer, code: Tokenizer, tmp_path: pathlib.Path) -> None:
    again = train_tokenizer(TokenizerConfig(algorithm="code", vocab_size=600), CODE)
    assert again.fingerprint == code.fingerprint
    for name, tokenizer in {"smiles": smiles, "code": code}.items():
        tokenizer.save(tmp_path / name)
        loaded = load_tokenizer(tmp_path / name)
        assert loaded.fingerprint == tokenizer.fingerprint
        np.testing.assert_array_equal(loaded.encode(SMILES[0]), tokenizer.encode(SMILES[0]))
    assert smiles.special_ids.tolist() == code.special_ids.tolist() == [0, 1, 2, 3, 4]


def test_lower_case_is_asked_for() -> None:
    cfg = TokenizerConfig(algorithm="characters", vocab_size=20, lowercase=True)
    assert _pieces(train_tokenizer(cfg, ["AbC"]), "CBA") == ["c", "b", "a"]


@pytest.mark.parametrize(("pattern", "message"), [("(", "is no regular expression"), ("z+", "matches nothing in the text")])
def test_a_pattern_that_cannot_be_used(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(TokenizerConfig(algorithm="regex", pattern=pattern), SMILES)


@pytest.mark.parametrize("tokenizer", [TokenizerConfig(algorithm="regex"), TokenizerConfig(pattern="a")])
def test_a_pattern_goes_with_its_algorithm(tokenizer: TokenizerConfig) -> None:
    with pytest.raises(UserError, match="'regex' needs the pattern of a token, and no other algorithm uses one"):
        check(Config(name="x", tokenizer=tokenizer, masking=MaskingConfig(), model=ModelConfig()))


def test_all_of_moleculenets_molecules_are_known_to_the_pattern(data_path: pathlib.Path) -> None:
    with gzip.open(data_path / "moleculenet" / "smiles.txt.gz", "rt") as lines:
        texts = [line.strip() for line in lines][::10]
    assert all("".join(re.findall(PATTERN, text)) == text for text in texts)
