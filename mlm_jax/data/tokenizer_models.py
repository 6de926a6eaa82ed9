"""The two kinds of tokenizer model, each telling its pieces, its special ids and how it cuts text.

The back ends of `data/tokenizer.py`, where the rules that both follow are.
"""

import json
import re
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import sentencepiece
import tokenizers

from mlm_jax.errors import UserError

# The names that special tokens go by: BERT's, XLNet's (which has <s> and </s> too, unused), RoBERTa's. The first is for
# pieces that are added.
SPECIAL_NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
SPACE = "\u2581"  # SentencePiece's mark of a space
_CONTROL, _USER_DEFINED = 3, 4  # SentencePiece's numbers for the types of pieces


class SentencePieceModel:
    """A SentencePiece model in which each of the five roles has a piece, and text may hold the mask's.

    Attributes:
        blob: the model file that this one is, pieces that had to be added included.
        pieces: the vocabulary by id.
        special: the id of each role in `SPECIAL_NAMES`.
        silent_ids: ids that never stand for text, beside the special ones.
        lone_space_id: what a space becomes that is left alone before a mask; None where that does not happen.
        cut: matches, without width, where a long text can be cut and keeps its ids; None where there is no such place.
        separators: how many SEPs stand between two texts.
    """

    separators = 1

    def __init__(self, blob: bytes):
        model = _load_sentencepiece(blob)
        self.pieces: list[str] = [model.id_to_piece(index) for index in range(model.vocab_size())]
        self.special = {"unk": model.unk_id()}
        for role, names in SPECIAL_NAMES.items():
            if role == "unk":
                continue
            index = next((self.pieces.index(name) for name in names if name in self.pieces), len(self.pieces))
            if index == len(self.pieces):
                self.pieces.append(names[0])
                blob += _length_prefixed(1, _length_prefixed(1, names[0].encode()) + _type_field(_CONTROL))
            self.special[role] = index
        # SentencePiece finds a control piece in no text, and a mask must be found where a user writes it.
        if self.special["mask"] not in _load_sentencepiece(blob).encode(self.pieces[self.special["mask"]]):
            blob = _with_piece_type(blob, self.special["mask"], _USER_DEFINED)
        self.blob = blob
        self._model = model = _load_sentencepiece(blob)
        ids = range(len(self.pieces))
        self.silent_ids = {i for i in ids if model.is_control(i) or model.is_unused(i) or model.is_unknown(i)}
        self.lone_space_id: int | None = model.piece_to_id(SPACE)
        self.cut = self._find_cut()

    def _find_cut(self) -> re.Pattern[str] | None:
        """Every space between words is a place to cut, if the model treats the beginning of a text as one."""
        normalize = self.normalize
        if normalize("a") == "a" + SPACE:
            raise UserError("it marks spaces after words (treat_whitespace_as_suffix), so that no piece begins a word")
        spans_words = any(SPACE in piece.lstrip(SPACE) for piece in self.pieces)
        if spans_words or not normalize("a") == normalize(" a") == SPACE + "a":
            return None
        return re.compile(r"(?<=\S)(?=[ \n]\w)" if normalize("a\na") == normalize("a a") else r"(?<=\S)(?= \w)")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, out_type=int)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids and the characters of the text that each stands for, the space before a word included."""
        found = self._model.encode(text, return_type="offset_mapping")
        return found["ids"], found["offsets"]

    def normalize(self, text: str) -> str:
        """The text as it is cut: spaces are marks, and one comes first."""
        return self._model.normalize(text)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def after_space(self, index: int) -> bool:
        """Whether the piece carries the space before it."""
        return self.pieces[index].startswith(SPACE)

    def text(self, index: int) -> str:
        """The piece without its marks."""
        return self.pieces[index].lstrip(SPACE)

    def with_pieces(self, pieces: Iterable[tuple[str, float]]) -> bytes:
        """The model file with further regular pieces, and their scores, behind those that are there."""
        added = [_length_prefixed(1, _length_prefixed(1, text.encode()) + _score_field(score)) for text, score in pieces]
        return self.blob + b"".join(added)

    def num_bytes(self, index: int) -> int:
        """The bytes of text that the piece stands for."""
        return 1 if self._model.is_byte(index) else _marked_bytes(self.pieces[index])


def _marked_bytes(piece: str) -> int:
    return len(piece.replace(SPACE, " ").encode())


def _load_sentencepiece(blob: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=blob)
    except RuntimeError as error:
        raise UserError(f"this is not a SentencePiece model: {error}") from error


# A model file is a protocol buffer whose repeated field 1 are the pieces: 1 the text, 2 the score, 3 the type. Fields
# are appended here as bytes, as the format allows, because the package's own protobuf module refuses to be imported
# beside an older protobuf than the one it was made with.
# Source: google/sentencepiece:src/sentencepiece_model.proto.


def _varint(value: int) -> bytes:
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def _length_prefixed(field: int, content: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(content)) + content


def _score_field(score: float) -> bytes:
    return bytes([2 << 3 | 5]) + struct.pack("<f", score)


def _type_field(piece_type: int) -> bytes:
    return bytes([3 << 3, piece_type])


def _with_piece_type(blob: bytes, index: int, piece_type: int) -> bytes:
    """The model with another type for one piece: of a field that is there twice, the last counts."""
    position, piece = 0, -1
    while position < len(blob):
        start, key = position, blob[position]
        position, size, shift = position + 1, 0, 0
        while True:
            size |= (blob[position] & 0x7F) << shift
            position, shift = position + 1, shift + 7
            if blob[position - 1] < 0x80:
                break
        piece += key == 1 << 3 | 2
        if piece == index:
            content = blob[position : position + size] + _type_field(piece_type)
            return blob[:start] + _length_prefixed(1, content) + blob[position + size :]
        position += size
    raise AssertionError(f"no piece {index}")


class TokenizersModel:
    """A tokenizer.json whose vocabulary says where words begin.

    It is WordPiece, byte-level BPE, with SentencePiece's marks, or of pieces of a pattern, each of which is a word.

    Attributes: as in `SentencePieceModel`.
    """

    def __init__(self, blob: bytes):
        self.blob = blob
        try:
            spec = json.loads(blob)
            self._is_pieces = _is_pieces(spec)
            self._continuation = None if self._is_pieces else _continuation_mark(spec)
            self._marks_spaces = '"Metaspace"' in json.dumps(spec["pre_tokenizer"])
            self._prefix_space = _switch_off_prefix_space(spec)
            # Line ends may belong to the piece before them, spaces to the one behind.
            only_spaces = self._prefix_space or self._marks_spaces
            self.cut: re.Pattern[str] | None = re.compile(
                r"(?<=\S)(?= \w)" if only_spaces else r"(?<=\S)(?= \w)|(?<=\S\n)(?=\w)"
            )
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except UserError:
            raise
        except Exception as error:  # the package raises bare Exceptions for all that it cannot parse
            raise UserError(f"this is not a tokenizer.json: {type(error).__name__}: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special = _find_roles(self._tokenizer)
        piece_of = {index: piece for piece, index in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        self.pieces = [piece_of.get(index, "") for index in range(max(piece_of) + 1)]
        self.silent_ids = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self.silent_ids |= {index for index in range(len(self.pieces)) if index not in piece_of}
        space = SPACE if self._marks_spaces else _CHAR_OF_BYTE[0x20]
        in_pieces = self._is_pieces or self._continuation is not None
        self.lone_space_id = None if in_pieces else self._tokenizer.token_to_id(space)
        if self._is_pieces:  # what its pattern matches may hold spaces
            self.cut = None
        pair = self._tokenizer.encode("a", "a")
        texts = [place for place, text in enumerate(pair.sequence_ids) if text is not None]
        between = pair.ids[texts[0] + 1 : texts[-1]] if texts else []
        self.separators = max(1, between.count(self.special["sep"]))  # RoBERTa's two

    def encode(self, text: str) -> list[int]:
        if self._prefix_space and not text.startswith(" "):
            text = " " + text
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As in `SentencePieceModel`."""
        added = int(self._prefix_space and not text.startswith(" "))
        found = self._tokenizer.encode(" " * added + text, add_special_tokens=False)
        return found.ids, [(max(start - added, 0), max(end - added, 0)) for start, end in found.offsets]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def after_space(self, index: int) -> bool:
        """Whether the piece carries the space before it, or no mark of continuation of WordPiece's, or is a word alone."""
        if self._is_pieces:
            return True
        if self._continuation is not None:
            return not self.pieces[index].startswith(self._continuation)
        if self._marks_spaces:
            return self.pieces[index].startswith(SPACE)
        return self._bytes(index)[:1].isspace()

    def text(self, index: int) -> str:
        """The piece without its marks; empty for a part of a character."""
        if self._is_pieces:
            return self.pieces[index]
        if self._continuation is not None:
            return self.pieces[index].removeprefix(self._continuation)
        if self._marks_spaces:
            return self.pieces[index].lstrip(SPACE)
        return self._bytes(index).decode("utf-8", errors="ignore").strip()

    def num_bytes(self, index: int) -> int:
        """The bytes of text that the piece stands for; WordPiece's begin with a space where they begin a word."""
        if self._is_pieces:
            return len(self.pieces[index].encode())
        if self._continuation is not None:
            return len(self.text(index).encode()) + self.after_space(index)
        if self._marks_spaces:
            piece = self.pieces[index]
            return 1 if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else _marked_bytes(piece)
        return len(self._bytes(index))

    def _bytes(self, index: int) -> bytes:
        return bytes(_BYTE_OF_CHAR[char] for char in self.pieces[index] if char in _BYTE_OF_CHAR)


def _switch_off_prefix_space(spec: Mapping[str, Any]) -> bool:
    """Turns off byte-level BPE's space before a text, and says whether it was on.

    The package puts one after every special token too. Ours comes before the text alone, so that what follows a mask is
    cut as in running text.
    """
    pre_tokenizer = spec["pre_tokenizer"] or {}
    was_on = False
    for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if part.get("type") == "ByteLevel" and part["add_prefix_space"]:
            part["add_prefix_space"], was_on = False, True
    return was_on


def _is_pieces(spec: Mapping[str, Any]) -> bool:
    """Whether text is cut by a pattern alone, and each piece is a whole entry of the vocabulary."""
    cut = (spec["pre_tokenizer"] or {}).get("type"), (spec.get("decoder") or {}).get("type")
    return bool(spec["model"]["type"] == "WordLevel" and cut == ("Split", "Fuse"))


def _continuation_mark(spec: Mapping[str, Any]) -> str | None:
    """WordPiece's mark of a piece within a word; None for the others, which mark the space before a word."""
    model, cuts = spec["model"], json.dumps(spec["pre_tokenizer"])
    if model["type"] == "WordPiece":
        return str(model["continuing_subword_prefix"])
    whole_words = '"Metaspace"' in cuts and '"split": false' not in cuts
    if (model["type"] == "BPE" and '"ByteLevel"' in cuts) or (model["type"] in ("BPE", "Unigram") and whole_words):
        return None
    raise UserError(
        f"its model is {model['type']}, with words cut in a way not known here: a tokenizer.json may hold WordPiece, "
        "byte-level BPE, or Unigram and BPE behind Metaspace; for SentencePiece pass its own .model file"
    )


def _find_roles(tokenizer: tokenizers.Tokenizer) -> dict[str, int]:
    special: dict[str, int] = {}
    declared = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for role, names in SPECIAL_NAMES.items():
        found = [(index, name) for name in names if (index := tokenizer.token_to_id(name)) is not None]
        if not found:
            raise UserError(f"its vocabulary has no {role} token (none of {', '.join(names)}); add one")
        special[role], name = found[0]
        if name not in declared:  # a plain entry of the vocabulary would be cut like any text
            tokenizer.add_special_tokens([name])
    return special


def _byte_alphabet() -> dict[int, str]:
    """The character that byte-level BPE writes for each byte: printable ones themselves, the others from U+0100 on.

    Source: openai/gpt-2:src/encoder.py.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + rank) for rank, byte in enumerate(others)}


_CHAR_OF_BYTE = _byte_alphabet()
_BYTE_OF_CHAR = {char: byte for byte, char in _CHAR_OF_BYTE.items()}
