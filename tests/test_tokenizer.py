"""Facts about tokenizers: reserved ids, masks as users write them, word starts, and models made elsewhere."""

import io
import itertools
import json
import os
import pickle
import pydoc_data.topics
import re
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers

from mlm_jax.config import TokenizerConfig
from mlm_jax.data import tokenizer as tokenizer_module
from mlm_jax.data.sources import open_source
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from mlm_jax.errors import MachineError, UserError

TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())]
ODD_TEXT = (
    "The  quick\tbrown fox\njumps over 1,234.5 dogs.\r\n\n  It isn't\u00a0well-known; naïve café ﬁne Ⅳ ½ 中文字 and "
    "ひらがな, русский текст, emoji 😀 e\u0301 a_b (c)[d] — …\u2028 end \u0301x \ufeff y\u00ad z "
)
KINDS = ("unigram", "bpe", "wordpiece", "roberta")
BERT_NAMES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def _train_wordpiece(special: list[str] = BERT_NAMES) -> tokenizers.Tokenizer:
    built = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    built.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    built.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    built.decoder = tokenizers.decoders.WordPiece()
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    built.train_from_iterator(TEXTS, trainer)
    return built


def _train_byte_bpe(*, add_prefix_space: bool = False, lstrip: bool = True) -> tokenizers.Tokenizer:
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    built.decoder = tokenizers.decoders.ByteLevel()
    mask = tokenizers.AddedToken("<mask>", lstrip=lstrip, special=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", mask],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(TEXTS, trainer)
    return built


def _train_sentencepiece(**options: object) -> bytes:
    """A model as others make them, with SentencePiece's own defaults for what is not named."""
    model = io.BytesIO()
    lines = (line for text in TEXTS[:40] for line in text.split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, minloglevel=2, **{"vocab_size": 700, **options}
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    _train_wordpiece().save(str(folder / "wordpiece.json"))
    _train_byte_bpe().save(str(folder / "roberta.json"))
    return {
        "unigram": train_tokenizer(TokenizerConfig(algorithm="unigram", vocab_size=1500), TEXTS),
        "bpe": train_tokenizer(TokenizerConfig(algorithm="bpe", vocab_size=1500), TEXTS),
        "wordpiece": load_tokenizer(folder / "wordpiece.json"),
        "roberta": load_tokenizer(folder / "roberta.json"),
    }


@pytest.fixture(params=KINDS)
def tokenizer(request, built) -> Tokenizer:
    return built[request.param]


def _pieces(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    return [tokenizer.piece(index) for index in ids]


# --- every kind ---


def test_ids_are_int32_within_the_vocabulary_and_decode_to_the_text(tokenizer):
    text = "the value of an object is never changed (see below)."
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    assert not np.isin(ids, tokenizer.special_ids).any()
    assert re.sub(r" ?([().]) ?", r"\1", tokenizer.decode(ids)) == re.sub(r" ?([().]) ?", r"\1", text)


def test_an_empty_text_has_no_ids(tokenizer):
    for text in ("", " \n"):
        assert tokenizer.encode_with_masks(text).dtype == tokenizer.encode(text).dtype == np.int32
    assert len(tokenizer.encode("")) == len(tokenizer.encode_with_masks("")) == 0


@pytest.mark.parametrize("name", ["[MASK]", "<mask>", "[CLS]", "<s>", "[SEP]", "</s>", "[PAD]", "<pad>"])
def test_no_special_id_comes_out_of_running_text(tokenizer, name):
    ids = tokenizer.encode(f"the {name} object {name}{name}.")
    assert not np.isin(ids, np.setdiff1d(tokenizer.special_ids, [tokenizer.unk_id])).any()
    assert len(ids) > len(tokenizer.encode("the object."))


def test_the_mask_of_a_corpus_is_unknown(tokenizer):
    own = tokenizer.piece(tokenizer.mask_id)
    assert np.count_nonzero(tokenizer.encode(f"the {own} object {own}.") == tokenizer.unk_id) == 2


SENTENCES = (
    "The value of an object",
    "value of it.",
    "a (value) or value; the value, the type",
    "It isn't the value\nof a value",
)


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize("own_name", [False, True])
def test_a_masked_word_leaves_the_rest_as_in_running_text(tokenizer, sentence, own_name):
    mask = tokenizer.piece(tokenizer.mask_id) if own_name else "[MASK]"
    whole = tokenizer.encode(sentence).tolist()
    # The word is one piece wherever it stands, so that one mask takes the place of one id.
    words = {tokenizer.encode(spelling)[-1] for spelling in ("a value", "value", "(value")}
    assert {tokenizer.piece(index).lstrip("▁Ġ") for index in words} == {"value"}
    expected = [tokenizer.mask_id if index in words else index for index in whole]
    masked = re.sub(r"\bvalue\b", mask, sentence)
    assert tokenizer.mask_id in expected
    assert tokenizer.encode_with_masks(masked).tolist() == expected


def test_every_mask_is_one_id(tokenizer):
    for text in (
        "[MASK]",
        "[MASK] [MASK]",
        "[MASK][MASK].",
        "a [MASK]\n[MASK] b",
        "un[MASK]able",
        "[CLS] [MASK] [SEP]",
    ):
        ids = tokenizer.encode_with_masks(text)
        assert np.count_nonzero(ids == tokenizer.mask_id) == text.count("[MASK]")
        assert not np.isin(ids, [tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id]).any()
    assert tokenizer.encode_with_masks("[MASK][MASK]").tolist() == [tokenizer.mask_id] * 2
    assert tokenizer.encode_with_masks("no mask").tolist() == tokenizer.encode("no mask").tolist()


def test_word_starts_count_the_words_of_a_text(tokenizer):
    starts = tokenizer.word_starts()
    assert starts.dtype == bool and starts.shape == (tokenizer.vocab_size,)
    assert starts[tokenizer.special_ids].all()
    text = " unbelievable generalization of preposterous implementations, obviously;"
    ids = tokenizer.encode(text)
    assert len(ids) > 12
    assert np.count_nonzero(starts[ids]) == 5 + len(",") + 1 + len(";")


def test_the_bytes_of_pieces_are_those_of_the_text(tokenizer):
    """A text that begins with no space has one less where pieces carry the space before a word."""
    text = "the value of ein schöner object"
    lengths = tokenizer.byte_lengths()
    carried = len(text.encode()) + (tokenizer.file_name == "tokenizer.model" or "##s" in tokenizer.model.pieces)
    if "##s" in tokenizer.model.pieces:
        carried -= 1  # WordPiece was trained without accents: ö is o
    assert lengths[tokenizer.encode(text)].sum() == carried
    assert (lengths[tokenizer.special_ids] == 0).all() and lengths.dtype == np.int32


def test_a_batch_is_each_text(tokenizer):
    texts = [*TEXTS[:5], "", ODD_TEXT]
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in texts]


def test_a_long_text_has_the_ids_of_the_whole(tokenizer, monkeypatch):
    _check_cutting(tokenizer, monkeypatch)


def test_a_long_text_gets_one_space_before_it(tmp_path, monkeypatch):
    _train_byte_bpe(add_prefix_space=True).save(str(tmp_path / "tokenizer.json"))
    _check_cutting(load_tokenizer(tmp_path), monkeypatch)


def _check_cutting(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not too long: SentencePiece adds up a text's scores in float32, and sums that have lost digits decide otherwise.
    text = "\n\n".join([ODD_TEXT, TEXTS[0][:1500], "中文。\n日本語です。\n\n한국어!\n(x)\ny\n" + ODD_TEXT])
    monkeypatch.setattr(tokenizer_module, "_PART_CHARS", len(text) + 1)
    whole = tokenizer.encode(text)
    for size in (1, 20, 300):
        monkeypatch.setattr(tokenizer_module, "_PART_CHARS", size)
        assert len(list(tokenizer._parts(text))) > len(text) / (10 * size + 100)
        assert "".join(tokenizer._parts(text)) == text
        np.testing.assert_array_equal(tokenizer.encode(text), whole)


@pytest.mark.parametrize("size", [20, 10_000])
def test_offsets_are_of_the_characters_that_a_piece_stands_for(tokenizer, monkeypatch, size):
    monkeypatch.setattr(tokenizer_module, "_PART_CHARS", size)
    text = "The value of  it: na\u00efve \U0001f600 or changed.\n" + ODD_TEXT
    ids, spans = tokenizer.encode_with_offsets(text)
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert spans.dtype == np.int32 and spans.shape == (len(ids), 2)
    assert (np.diff(spans[:, 0]) >= 0).all() and (spans[:, 0] <= spans[:, 1]).all() and spans.max() <= len(text)
    for word in ("The", "value", "changed", "fox"):
        start = text.index(word)
        inside = np.flatnonzero((spans[:, 0] >= start) & (spans[:, 1] <= start + len(word)) & (spans[:, 1] > spans[:, 0]))
        assert "".join(text[slice(*spans[index])] for index in inside) == word
        assert tokenizer.decode(ids[inside]).strip().lower() == word.lower()
    assert not any(text[first].isspace() for first, last in spans if first < last)


def test_the_parts_of_a_character_have_its_place(built):
    for name in ("unigram", "bpe", "roberta"):
        _, spans = built[name].encode_with_offsets("a \U0001f600 b")
        assert (spans[1:-1] == [2, 3]).all() and len(spans) > 4
        assert spans[-1].tolist() == [4, 5]


def test_offsets_do_not_count_the_space_that_is_put_before_a_text(tmp_path):
    _train_byte_bpe(add_prefix_space=True).save(str(tmp_path / "tokenizer.json"))
    _, spans = load_tokenizer(tmp_path).encode_with_offsets("value of")
    assert spans[0, 0] == 0 and spans[-1].tolist()[1] == 8
    assert "".join("value of"[slice(*span)] for span in spans) == "valueof"


def test_a_saved_or_pickled_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    for again in (load_tokenizer(tmp_path / "new" / "folder"), pickle.loads(pickle.dumps(tokenizer))):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.vocab_size == tokenizer.vocab_size
        np.testing.assert_array_equal(again.special_ids, tokenizer.special_ids)
        np.testing.assert_array_equal(again.encode(ODD_TEXT), tokenizer.encode(ODD_TEXT))


def test_fingerprints_tell_models_apart(built):
    assert len({tokenizer.fingerprint for tokenizer in built.values()}) == len(KINDS)


def test_decoding_shows_masks_and_hides_the_frame(tokenizer):
    ids = [tokenizer.cls_id, *tokenizer.encode_with_masks("the [MASK]"), tokenizer.sep_id, tokenizer.pad_id]
    assert re.sub(r"\s", "", tokenizer.decode(np.array(ids))) == "the" + tokenizer.piece(tokenizer.mask_id)


# --- trained ---


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_a_trained_tokenizer_reserves_the_first_ids(built, algorithm):
    tokenizer = built[algorithm]
    assert [tokenizer.piece(index) for index in range(6)] == [*BERT_NAMES, "<0x00>"]
    assert [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert tokenizer.special_ids.tolist() == [0, 1, 2, 3, 4] and tokenizer.special_ids.dtype == np.int32
    assert tokenizer.vocab_size == 1500


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_what_training_never_saw_is_written_in_bytes(built, algorithm):
    tokenizer = built[algorithm]
    ids = tokenizer.encode("日😀")
    assert _pieces(tokenizer, ids)[-7:] == [f"<0x{byte:02X}>" for byte in "日😀".encode()]
    assert tokenizer.decode(ids) == "日😀"
    assert not tokenizer.word_starts()[ids[-7:]].any()


def test_without_byte_fallback_it_is_unknown():
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=500, byte_fallback=False), TEXTS[:40])
    assert tokenizer.encode("日")[-1] == tokenizer.unk_id


def test_lowercase_makes_no_difference_of_case():
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=700, lowercase=True), TEXTS[:40])
    np.testing.assert_array_equal(tokenizer.encode("The VALUE"), tokenizer.encode("the value"))
    assert np.count_nonzero(tokenizer.encode_with_masks("The [MASK]") == tokenizer.mask_id) == 1


def test_word_starts_of_sentencepiece_pieces(built):
    tokenizer = built["unigram"]
    starts = {tokenizer.piece(index): start for index, start in enumerate(tokenizer.word_starts())}
    assert starts["▁the"] and starts["▁"] and starts["."] and starts["("] and starts["▁("] and starts["[CLS]"]
    assert not (starts["ing"] or starts["s"] or starts["<0x41>"])


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_training_does_not_depend_on_the_number_of_cores(algorithm):
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not bind processes to cores")
    code = (
        "import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]);"
        "import pydoc_data.topics;"
        "from mlm_jax.config import TokenizerConfig; from mlm_jax.data.tokenizer import train_tokenizer;"
        "texts = [text for _, text in sorted(pydoc_data.topics.topics.items())][:40];"
        f"print(train_tokenizer(TokenizerConfig(algorithm='{algorithm}', vocab_size=800), texts).fingerprint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = train_tokenizer(TokenizerConfig(algorithm=algorithm, vocab_size=800), TEXTS[:40])
    assert done.stdout.split()[-1] == here.fingerprint


def test_long_lines_and_nul_are_trained_on():
    text = " ".join(TEXTS[:20]).replace("\n", " ")
    assert len(text) > 50_000
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=700), [text.replace("a", "a\0", 5), "x" * 10_000])
    assert _pieces(tokenizer, tokenizer.encode("the statement")) == ["▁the", "▁statement"]


@pytest.mark.parametrize(
    ("algorithm", "vocab_size", "texts", "message"),
    [
        ("unigram", 30_000, TEXTS[:10], r"vocab_size=30000 .*too little text; set tokenizer.vocab_size to \d+ or less"),
        ("bpe", 90_000, TEXTS[:10], r"vocab_size=90000 .*too little text; set tokenizer.vocab_size to \d+ or less"),
        ("unigram", 280, TEXTS, r"vocab_size=280 .*its characters and the special tokens alone need 349"),
        ("unigram", 1000, [], "no text to train on"),
        ("bpe", 1000, ["\n", " "], "no text to train on"),
    ],
)
def test_a_vocabulary_that_does_not_fit_the_sample(algorithm, vocab_size, texts, message):
    with pytest.raises(UserError, match=message) as error:
        train_tokenizer(TokenizerConfig(algorithm=algorithm, vocab_size=vocab_size), texts)
    assert ".cc" not in str(error.value)


# --- SentencePiece models made elsewhere ---

# name: SentencePiece's options; the five ids, in the order pad, unk, cls, sep, mask, of 700 pieces
ELSEWHERE = {
    "xlm-r": ({}, [700, 0, 1, 2, 701]),
    "t5": ({"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}, [0, 2, 700, 1, 701]),
    "albert": (
        {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "control_symbols": ["[CLS]", "[SEP]", "[MASK]"]},
        [0, 1, 2, 3, 4],
    ),
    "xlnet": (
        {"control_symbols": ["<cls>", "<sep>", "<pad>", "<mask>"], "user_defined_symbols": ["<eop>"]},
        [5, 0, 3, 4, 6],
    ),
}


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_model_from_elsewhere_gets_the_roles_that_it_lacks(tmp_path, name, model_type):
    options, expected = ELSEWHERE[name]
    blob = _train_sentencepiece(model_type=model_type, **options)
    (tmp_path / "spiece.model").write_bytes(blob)
    tokenizer = load_tokenizer(tmp_path)
    roles = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]
    assert roles == expected
    assert tokenizer.vocab_size == max(700, max(expected) + 1)
    raw = sentencepiece.SentencePieceProcessor(model_proto=blob)
    text = TEXTS[3] + " [CLS] [PAD] [SEP]"  # the names of added pieces stay text
    assert tokenizer.encode(text).tolist() == raw.encode(text)
    ids = tokenizer.encode_with_masks("the [MASK] of it").tolist()
    assert ids == [*raw.encode("the"), tokenizer.mask_id, *raw.encode("of it")]
    assert tokenizer.piece(tokenizer.mask_id) in tokenizer.decode(ids)
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.fingerprint, again.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)
    assert set(roles) <= set(tokenizer.special_ids.tolist())


def test_a_model_whose_texts_begin_without_a_space_is_not_cut(monkeypatch, tmp_path):
    (tmp_path / "x.model").write_bytes(_train_sentencepiece(add_dummy_prefix=False))
    tokenizer = load_tokenizer(tmp_path)
    whole = tokenizer.encode(TEXTS[0])
    monkeypatch.setattr(tokenizer_module, "_PART_CHARS", 10)
    np.testing.assert_array_equal(tokenizer.encode(TEXTS[0]), whole)


def test_a_model_that_marks_spaces_behind_words_is_refused(tmp_path):
    (tmp_path / "x.model").write_bytes(_train_sentencepiece(treat_whitespace_as_suffix=True))
    with pytest.raises(UserError, match=r"x\.model: .*treat_whitespace_as_suffix"):
        load_tokenizer(tmp_path)


# --- tokenizer.json ---


def test_word_starts_of_wordpiece_and_byte_level(built):
    wordpiece = built["wordpiece"]
    starts = {wordpiece.piece(index): start for index, start in enumerate(wordpiece.word_starts())}
    assert starts["the"] and starts["."] and not starts["##s"] and not starts["##ing"]
    byte_level = built["roberta"]
    starts = {byte_level.piece(index): start for index, start in enumerate(byte_level.word_starts())}
    assert starts["Ġthe"] and starts["Ċ"] and starts["."] and starts["Ġ("] and starts["Ġ"]
    assert not starts["ing"] and not starts["s"] and not starts["Ã"]  # the first byte of é and others


def test_truncation_padding_and_frames_of_the_file_are_off(tmp_path):
    built = _train_wordpiece()
    built.enable_truncation(4)
    built.enable_padding(length=50)
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    built.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("the value of an object is the value")
    assert _pieces(tokenizer, ids) == ["the", "value", "of", "an", "object", "is", "the", "value"]


@pytest.mark.parametrize("lstrip", [False, True])
def test_a_space_before_every_text_is_not_put_behind_masks(tmp_path, lstrip):
    _train_byte_bpe(add_prefix_space=True, lstrip=lstrip).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("the value.", " the value.", "\nthe", TEXTS[0]):
        assert tokenizer.encode(text).tolist() == raw.encode(text).ids
    assert _pieces(tokenizer, tokenizer.encode_with_masks("The [MASK].")) == ["ĠThe", "<mask>", "."]
    assert _pieces(tokenizer, tokenizer.encode_with_masks("[MASK] value")) == ["<mask>", "Ġvalue"]


def test_a_mask_that_is_only_in_the_vocabulary_is_found_in_text(tmp_path):
    built = json.loads(_train_wordpiece().to_str())
    built["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(built))
    tokenizer = load_tokenizer(tmp_path)
    assert _pieces(tokenizer, tokenizer.encode_with_masks("the [MASK].")) == ["the", "[MASK]", "."]
    assert tokenizer.special_ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("role", ["PAD", "UNK", "CLS", "SEP", "MASK"])
def test_a_missing_special_token_is_named(tmp_path, role):
    _train_wordpiece([name for name in BERT_NAMES if role not in name]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=rf"tokenizer\.json: .* no {role.lower()} token \(none of \[{role}\]"):
        load_tokenizer(tmp_path)


def test_a_gap_in_the_ids_is_special(tmp_path):
    built = json.loads(_train_wordpiece().to_str())
    (piece,) = [piece for piece, index in built["model"]["vocab"].items() if index == 700]
    del built["model"]["vocab"][piece]
    (tmp_path / "tokenizer.json").write_text(json.dumps(built))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 1500
    assert tokenizer.special_ids.tolist() == [0, 1, 2, 3, 4, 700]


# --- misuse ---


def _unigram_json() -> bytes:
    model = tokenizers.models.Unigram([("[UNK]", 0.0), ("▁a", -1.0)], 0)
    return tokenizers.Tokenizer(model).to_str().encode()


@pytest.mark.parametrize(
    ("files", "named", "message"),
    [
        ({}, "absent.model", r"there is no tokenizer at .*absent\.model"),
        ({}, "absent", "is no SentencePiece .model, tokenizer.json, or directory"),
        ({"vocab.txt": b"[PAD]"}, "", "has neither where one"),
        ({"a.model": b"", "tokenizer.json": b""}, "", r"has a\.model, tokenizer\.json where one"),
        ({"x.model": b""}, "", r"x\.model: this is not a SentencePiece model"),
        ({"x.model": b"no such thing"}, "", r"x\.model: this is not a SentencePiece model"),
        ({"tokenizer.json": b"{"}, "", r"tokenizer\.json: this is not a tokenizer.json"),
        ({"config.json": b'{"model_type": "bert"}'}, "config.json", r"config\.json: this is not a tokenizer.json"),
        ({"tokenizer.json": b"\xff\xfe"}, "", "this is not a tokenizer.json"),
        ({"tokenizer.json": _unigram_json()}, "", "its model is Unigram, .* pass its own .model file"),
    ],
)
def test_what_is_no_tokenizer(tmp_path, files, named, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / named)


def test_a_place_that_cannot_be_written_is_a_fault_of_the_machine(built, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="could not be written"):
        built["bpe"].save(tmp_path / "file" / "folder")


# --- real text ---


@pytest.mark.parametrize("language", ["zh_wikipedia", "de_wikipedia"])
def test_real_languages_round_trip(data_path, language):
    documents = open_source(f"files:{data_path}/{language}/*.jsonl.gz").documents()
    texts = list(itertools.islice(documents, 300))
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=6000), texts)
    normal = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model.blob).normalize
    for text in texts[:100]:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id not in ids
        assert tokenizer.decode(ids) == normal(text).replace("▁", " ").strip()
    starts = tokenizer.word_starts()
    chinese = [index for index in range(tokenizer.vocab_size) if re.match("[一-龥]", tokenizer.piece(index))]
    assert starts[chinese].all()
    assert (len(chinese) > 1000) == (language == "zh_wikipedia")
