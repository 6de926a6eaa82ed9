"""SentencePiece models as `tokenizers` files: the same ids for the same text, mask tokens in it included.

The `tokenizers` package has the parts, none of which does quite what SentencePiece does. What is added here, and why, is
beside each part; tests/test_interop_tokenizers.py compares the two on sentences of many languages.
"""

import collections
import dataclasses
import re
import struct
import unicodedata
from collections.abc import Iterator, Mapping

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mlm_jax.data.tokenizer_models import SPACE, SentencePieceModel
from mlm_jax.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
# Noncharacters, which no rule knows: the first stands before a mark that is composed with what it follows, the second
# before every other.
_JOINED, _APART = "\ufdd0", "\ufdd1"


@dataclasses.dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: int


@dataclasses.dataclass(frozen=True)
class _Model:
    """What a SentencePiece model file says, as far as it decides ids."""

    pieces: tuple[_Piece, ...]
    kind: int
    byte_fallback: bool
    charsmap: bytes


def fast_tokenizer(model: SentencePieceModel) -> tokenizers.Tokenizer:
    """The same vocabulary, ids and cuts as a `tokenizers` object, which adds nothing to a text.

    Raises:
        UserError: the model does something that has no counterpart.
    """
    parsed = _parse(model.blob)
    mask = model.special["mask"]
    others = [p.text for i, p in enumerate(parsed.pieces) if p.kind == _USER_DEFINED and i != mask]
    if others:
        raise UserError(
            f"the tokenizer has user-defined pieces ({others[0]!r}), which are cut otherwise in a tokenizer.json"
        )
    unk = model.special["unk"]
    if parsed.kind == _UNIGRAM:
        vocab = [(piece.text, piece.score if piece.kind == _NORMAL else 0.0) for piece in parsed.pieces]
        core: models.Model = models.Unigram(vocab, unk, parsed.byte_fallback)
    else:
        core = models.BPE(
            {piece.text: index for index, piece in enumerate(parsed.pieces)},
            _merges(parsed.pieces),
            unk_token=parsed.pieces[unk].text,
            fuse_unk=True,
            byte_fallback=parsed.byte_fallback,
        )
    fast = tokenizers.Tokenizer(core)
    fast.normalizer = _normalizer(model, parsed.charsmap)
    words = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first")
    # The name of a byte's piece, written in a text, is no byte: it is cut where no other piece would join it.
    names = pre_tokenizers.Split(tokenizers.Regex("(?<=<)(?=0x[0-9A-F]{2}>)"), "isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence([names, words]) if parsed.byte_fallback else words
    spaces = decoders.Replace(SPACE, " ")
    fast.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    for index in sorted({*model.special.values()} | {i for i, p in enumerate(parsed.pieces) if p.kind == _CONTROL}):
        # A masked word takes the space before it along.
        token = tokenizers.AddedToken(parsed.pieces[index].text, lstrip=index == mask, normalized=False, special=True)
        fast.add_special_tokens([token])
    return fast


def is_unigram(model: SentencePieceModel) -> bool:
    """Whether a text is cut where the scores of its pieces have the largest sum; else it is BPE.

    Raises:
        UserError: it is neither.
    """
    return _parse(model.blob).kind == _UNIGRAM


def scores(model: SentencePieceModel) -> list[float]:
    """The score of each piece; 0 of those that have none."""
    return [piece.score for piece in _parse(model.blob).pieces]


def surround(cls: str, sep: str, fast: tokenizers.Tokenizer, *, second_type: int) -> processors.PostProcessor:
    """CLS before a text and SEP behind it, and behind a second text, whose tokens have `second_type`."""
    return processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:{second_type} {sep}:{second_type}",
        special_tokens=[(token, fast.token_to_id(token)) for token in (cls, sep)],
    )


def _normalizer(model: SentencePieceModel, charsmap: bytes) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if charsmap:
        # The package applies these rules to a whole grapheme by what its first character has, and so loses a mark behind a
        # character with a rule, and composes none. Here every character meets its rule alone; then marks are composed, but
        # only those that the rules compose: NFC would sort the others, and take in one more.
        # At the very beginning nothing comes before a mark, and the package ends the process if something is put there.
        marks = r"[\p{M}\x{200C}\x{200D}\x{1F3FB}-\x{1F3FF}]"
        steps += [
            normalizers.Replace(tokenizers.Regex(_composed(model)), _JOINED),
            normalizers.Replace(tokenizers.Regex(rf"(?<=[^{_JOINED}])(?={marks})"), _APART),
            normalizers.Precompiled(charsmap),
            normalizers.Replace(_JOINED, ""),
            normalizers.NFC(),
            normalizers.Replace(_APART, ""),
        ]
    # Not `Strip`: a space behind a mask begins the next word. One at the very beginning is the one that is put there.
    steps += [
        normalizers.Replace(tokenizers.Regex(" +"), " "),
        normalizers.Replace(tokenizers.Regex(r" \z"), ""),
    ]
    return normalizers.Sequence(steps)


def _composed(model: SentencePieceModel) -> str:
    """A pattern of the places before marks that the model's rules compose with what they follow."""
    likes = collections.defaultdict[str, list[str]](list)  # characters by the one that they stand for
    for char in map(chr, range(0x20, 0x30000)):
        if len(plain := unicodedata.normalize("NFKC", char)) == 1:
            likes[plain].append(char)
    before = collections.defaultdict[tuple[str, str], set[str]](set)  # by the marks before a place and those behind it
    for char in map(chr, range(0xC0, 0x30000)):
        base, *marks = list(unicodedata.normalize("NFD", char))
        if marks and all(unicodedata.category(mark)[0] == "M" for mark in marks):
            for like in {base, *likes[base]}:
                alone = model.normalize(like) + "".join(model.normalize("." + mark)[2:] for mark in marks)
                if model.normalize(like + "".join(marks)) != alone:
                    for cut in range(len(marks)):
                        before["".join(marks[:cut]), "".join(marks[cut:])].add(like)
    places = [f"(?<=[{re.escape(''.join(sorted(bases)))}]{a})(?={b})" for (a, b), bases in sorted(before.items())]
    return "|".join(places) or "(?!)"


def _merges(pieces: tuple[_Piece, ...]) -> list[tuple[str, str]]:
    """Each pair of pieces that is a piece together, in the order in which SentencePiece joins them: by that one's score."""
    ranks = {piece.text: rank for rank, piece in enumerate(pieces) if piece.kind == _NORMAL}
    found = []
    for text, rank in ranks.items():
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair[0] in ranks and pair[1] in ranks:
                found.append((-pieces[rank].score, ranks[pair[0]], ranks[pair[1]], pair))
    return [pair for *_, pair in sorted(found)]


def _parse(blob: bytes) -> _Model:
    """Source: google/sentencepiece:src/sentencepiece_model.proto, whose numbers these are."""
    pieces, trainer, normalizer = [], dict[int, int | bytes](), dict[int, int | bytes]()
    for number, value in _fields(blob):
        assert isinstance(value, bytes), number
        content = dict(_fields(value))
        if number == 1:
            text, score, kind = content[1], content.get(2, b"\0\0\0\0"), content.get(3, _NORMAL)
            assert isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int)
            pieces.append(_Piece(text.decode(), struct.unpack("<f", score)[0], kind))
        elif number == 2:
            trainer = content
        elif number == 3:
            normalizer = content
    kind, charsmap = trainer.get(3, _UNIGRAM), normalizer.get(2, b"")
    assert isinstance(kind, int) and isinstance(charsmap, bytes)
    if kind not in (_UNIGRAM, _BPE):
        raise UserError("only unigram and BPE models of SentencePiece have a counterpart in a tokenizer.json")
    _require_defaults(normalizer)
    return _Model(tuple(pieces), kind, bool(trainer.get(35, False)), charsmap)


def _require_defaults(normalizer: Mapping[int, int | bytes]) -> None:
    for number, name in ((3, "add_dummy_prefix"), (4, "remove_extra_whitespaces"), (5, "escape_whitespaces")):
        if not normalizer.get(number, True):
            raise UserError(
                f"the tokenizer was trained with {name}=false, which has no counterpart in a tokenizer.json here"
            )


def _fields(blob: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer: numbers as they are, all else as bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = blob[position]
            value |= (byte & 0x7F) << shift
            position, shift = position + 1, shift + 7
            if byte < 0x80:
                return value

    while position < len(blob):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, blob[position : position + size]
        position += size
