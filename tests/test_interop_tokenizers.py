"""A SentencePiece tokenizer gives the same ids as a `tokenizers` file: odd strings, random ones, and real sentences."""

import functools
import gzip
import itertools
import json
import pathlib

import numpy as np
import pytest
import sentencepiece

from mlm_jax.config import TokenizerConfig
from mlm_jax.data.tokenizer import Tokenizer, train_tokenizer
from mlm_jax.errors import UserError
from mlm_jax.interop.fast import fast_tokenizer
from mlm_jax.interop.tokenizer_files import read_tokenizer, write_tokenizer

KINDS = [
    {"algorithm": "unigram"},
    {"algorithm": "unigram", "byte_fallback": False, "lowercase": True},
    {"algorithm": "bpe"},
    {"algorithm": "bpe", "byte_fallback": False, "lowercase": True},
]
EACH_KIND = pytest.mark.parametrize("kind", range(len(KINDS)))
TEXTS = [
    "The cat sat on the mat, and É. Müller drank a café au lait for 3 € in the Straße.",
    "Ёлка и чёрный кот — это праздник.",
    "他在图书馆里看书。今天天气很好！",
    "私はカタカナとひらがなが好きです。",
    "Tôi nói tiếng Việt ở đường phố.",
    "مُحَمَّدٌ يَكْتُبُ الرِّسَالَةَ",
    "नमस्ते दुनिया, यह एक परीक्षा है।",
    "İstanbul'da ĞÜŞ ıi",
    "emoji 😀 👩‍👩‍👧 🇩🇪 ☺️ and math ① ½ ² ™",
]
# Spaces, controls, composed and decomposed marks in both orders, marks without a base, marks behind characters with a rule,
# joiners, letters that change when folded, compatibility forms, what pieces are called, and text in no piece at all.
ODD = [
    *(
        "",
        " ",
        "   ",
        "a",
        " a",
        "a ",
        "  a   b  ",
        "a\u00a0b",
        "全角　空白",
        "tab\tnew\nline\r\nend",
        "a\u2003b\u2009c\u200bd",
    ),
    *("\ufeffBOM", "x\u0001y\u0007z", "soft\u00adhyphen", "line\u2028para\u2029", "a\x85b"),
    *("e\u0301 E\u0301 E\u0300\u0301", "q\u0307\u0323 q\u0323\u0307", "a\u0323\u0302 a\u0302\u0323 \u00e2\u0323", "\u0301x"),
    *(
        "tiê\u0301ng ti\u1ebfng tie\u0302\u0301ng",
        "И\u0301ван и\u0306 ё е\u0308",
        "ｅ\u0301 ＡＢＣ １２３",
        "²\u0301 A\u20dd",
    ),
    *("جد\u0651\u064f جد\u064f\u0651 سام\u0651\u064c", "क\u094d\u200dष क\u094d\u200cष", "กำ ทำ น้ำ", "A\u200dB a\u200cb"),
    *(
        "ß ẞ ſ ς Σ ǅ ﬁ ﬂ ﷺ ㎏ ℌ",
        "İ I ı i",
        "1\ufe0f\u20e3 ☺\ufe0f 👍🏽 🏴\U000e0067\U000e0062\U000e007f",
        "한국 \u1112\u1161\u11ab",
    ),
    *("▁x ▁ y", "<0x41> x<0x0A>y <0xZZ>", "<unk> <s>", "\U0001f9ff\U00020000 ꙮ", "aaaaaaaaaaaa", "11111 99,99 %", "…—–„“"),
]
MASKS = [
    "[MASK]",
    "the [MASK] sat",
    "a[MASK]b",
    "[MASK] [MASK]  [MASK]x",
    " [MASK] ",
    "a\u3000[MASK]\u00a0b",
    "e\u0301[MASK]\u0301",
]


@functools.cache
def built(kind: int) -> Tokenizer:
    size = {0: 410, 1: 150, 2: 480, 3: 220}[kind]  # what so little text has
    return train_tokenizer(TokenizerConfig(vocab_size=size, **KINDS[kind]), TEXTS * 20)


@EACH_KIND
def test_odd_strings_have_the_same_ids(kind):
    ours, theirs = built(kind), fast_tokenizer(built(kind).model)
    for text in [*TEXTS, *ODD, "x".join(ODD), " ".join(TEXTS)]:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text).tolist(), ascii(text)
    for text in MASKS:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode_with_masks(text).tolist(), ascii(text)
    assert theirs.get_vocab_size() == ours.vocab_size
    assert all(theirs.id_to_token(index) == ours.piece(index) for index in range(ours.vocab_size))


@EACH_KIND
def test_random_strings_have_the_same_ids(kind):
    """Letters with rules, without, and marks, joiners and spaces in any order."""
    ours, theirs = built(kind), fast_tokenizer(built(kind).model)
    alphabet = [
        *"aAeEéÉ   ［ẞ1²ＡИёαΣạê",
        *map(chr, [0x301, 0x302, 0x323, 0x308, 0x306, 0x651, 0x64F, 0x200D, 0x200C, 0xFE0F, 0x1F3FD]),
    ]
    rng = np.random.default_rng(kind)
    for _ in range(2000):
        text = "".join(rng.choice(alphabet, rng.integers(1, 12)))
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text).tolist(), ascii(text)


@EACH_KIND
def test_the_written_file_is_a_tokenizer_of_ours_again(kind, tmp_path):
    ours = built(kind)
    write_tokenizer(ours, tmp_path, max_length=128, num_token_types=2)
    again = read_tokenizer(tmp_path)
    for text in [*TEXTS, *ODD]:
        assert again.encode(text).tolist() == ours.encode(text).tolist(), ascii(text)
        if ours.unk_id not in ours.encode(text):  # which each shows in its own way
            assert again.decode(ours.encode(text)) == ours.decode(ours.encode(text)), ascii(text)
    for text in MASKS:
        assert again.encode_with_masks(text).tolist() == ours.encode_with_masks(text).tolist(), ascii(text)
    long = " ".join(TEXTS) * 120
    assert len(long) > 1 << 15 and again.encode(long).tolist() == ours.encode(long).tolist()
    np.testing.assert_array_equal(again.word_starts(), ours.word_starts())
    roles = ("pad_id", "unk_id", "cls_id", "sep_id", "mask_id")
    assert [getattr(again, role) for role in roles] == [getattr(ours, role) for role in roles]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 128 and settings["mask_token"]["content"] == "[MASK]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user_defined_symbols": ["[MASK]", "@"]}, "has user-defined pieces"),
        ({"model_type": "char"}, "only unigram and BPE models of SentencePiece"),
        ({"remove_extra_whitespaces": False}, "trained with remove_extra_whitespaces=false"),
        ({"add_dummy_prefix": False}, "trained with add_dummy_prefix=false"),
    ],
)
def test_a_model_without_a_counterpart(options, message, tmp_path):
    defaults = {"vocab_size": 60, "model_type": "bpe", "user_defined_symbols": ["[MASK]"]}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:1] * 20), model_prefix=str(tmp_path / "m"), minloglevel=2, **defaults | options
    )
    tokenizer = Tokenizer("tokenizer.model", (tmp_path / "m.model").read_bytes())
    with pytest.raises(UserError, match=message):
        fast_tokenizer(tokenizer.model)


def test_a_lower_case_vocabulary_of_bert(tmp_path):
    """vocab.txt, cut as BERT cuts it by tokenizer_config.json or by its defaults."""
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "##s", "Cat", "é", "e", ""])
    )
    assert read_tokenizer(tmp_path).encode("Cats é").tolist() == [5, 6, 9]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert read_tokenizer(tmp_path).encode("Cats é").tolist() == [7, 6, 8]


def read_sentences(data: pathlib.Path) -> list[str]:
    """Some twenty thousand in fifteen languages, with names of emoji."""

    def lines(path: pathlib.Path, count: int) -> list[str]:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return list(itertools.islice(file, count))

    found = []
    for language in ("en", "de", "zh"):
        for line in lines(data / f"{language}_wikipedia" / "train.jsonl.gz", 150):
            text = json.loads(line)["text"]
            found += [part for part in text.replace("。", "。\n").replace(". ", ".\n").split("\n") if part.strip()]
    for path in sorted((data / "tatoeba").glob("*.tsv.gz")):
        found += [line.split("\t")[0] for line in lines(path, 600)]
    found += lines(sorted((data / "ru_novels").iterdir())[0], 1000)
    with open(data / "emojitwo_64" / "labels.jsonl", encoding="utf-8") as file:
        found += [" ".join(map(str, json.loads(line).values())) for line in file]
    return found


@EACH_KIND
def test_real_sentences_have_the_same_ids(kind, data_path):
    """But where cuts have equal scores: there SentencePiece's unigram model, adding in float32, takes any of them."""
    sentences = read_sentences(data_path)
    assert len(sentences) > 15_000
    ours = train_tokenizer(TokenizerConfig(vocab_size=8000, character_coverage=0.995, **KINDS[kind]), sentences[::3])
    theirs = fast_tokenizer(ours.model)
    scores = sentencepiece.SentencePieceProcessor(model_proto=ours.model.blob)
    ties = 0
    for text in sentences:
        expected, found = ours.encode(text).tolist(), theirs.encode(text, add_special_tokens=False).ids
        if expected != found:
            ties += 1
            totals = [sum(scores.get_score(index) for index in ids) for ids in (expected, found)]
            assert KINDS[kind]["algorithm"] == "unigram" and sorted(expected) == sorted(found), ascii(text)
            assert totals[0] == pytest.approx(totals[1], abs=1e-6)
    print(f"{KINDS[kind]}: {len(sentences)} sentences, {ties} cut between equals")
    assert ties < len(sentences) / 10_000
