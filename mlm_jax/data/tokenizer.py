"""Text to token ids and back: one small interface over SentencePiece models and `tokenizers` files.

Used by `prepare` to train and to encode a corpus, and by every verb that reads or shows text.
"""

import hashlib
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import sentencepiece
from etils import epath

from mlm_jax.config import TokenizerConfig
from mlm_jax.data.domain_tokenizers import train_domain_tokenizer
from mlm_jax.data.tokenizer_models import SPECIAL_NAMES, SentencePieceModel, TokenizersModel
from mlm_jax.errors import MachineError, UserError

MASK_TEXT = "[MASK]"  # what a user writes, whatever the tokenizer's own mask token is

# A longer text is cut between words, where that changes no token: the libraries need up to 150 bytes of memory for each
# character of a text, SentencePiece's BPE grows slower with its length, and its unigram scores lose digits.
_PART_CHARS = 1 << 14
_TRAINING_THREADS = 16  # fixed: SentencePiece adds up per thread, so their number decides the last bits of its scores
_TRAINING_LINE_CHARS = 2000  # longer lines are cut, as SentencePiece leaves out what exceeds its limit in bytes
# Scripts written without spaces, by how their characters' Unicode names begin: there a piece is a word of its own.
_UNSPACED_SCRIPTS = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ")


class Tokenizer:
    """Text to ids and back. Pickles as its model file, so worker processes rebuild it in a moment.

    Attributes:
        vocab_size: number of ids, special ones included.
        pad_id, unk_id, cls_id, sep_id, mask_id: the five that every tokenizer has.
        special_ids: sorted int32; these five and every other id that never stands for text.
        fingerprint: hexadecimal hash of the model.
        file_name: what `save` calls the model's file: tokenizer.model or tokenizer.json.
        model: the back end, for what needs to know its kind.
    """

    def __init__(self, file_name: str, blob: bytes):
        """Builds from a model file's content; `load_tokenizer` and `train_tokenizer` are the ways in.

        Raises:
            UserError: the content is no such model, or lacks a special token.
        """
        self.model = SentencePieceModel(blob) if file_name.endswith(".model") else TokenizersModel(blob)
        self.file_name = file_name
        special = self.model.special
        self.vocab_size = len(self.model.pieces)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (special[role] for role in SPECIAL_NAMES)
        self.special_ids = np.array(sorted({*special.values(), *self.model.silent_ids}), np.int32)
        self.fingerprint = hashlib.sha256(self.model.blob).hexdigest()
        self._is_special = np.zeros(self.vocab_size, bool)
        self._is_special[self.special_ids] = True

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.file_name, self.model.blob)

    def encode(self, text: str) -> np.ndarray:
        """Ids of running text, int32 [n], nothing added; what would be a special token in it is the unknown token."""
        ids = [np.array(self.model.encode(part), np.int32) for part in self._parts(text)]
        whole = ids[0] if len(ids) == 1 else np.concatenate(ids)
        whole[self._is_special[whole]] = self.unk_id
        return whole

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """`encode`, and the characters that each piece stands for: int32 [n] and [n, 2], first and behind the last.

        Spaces before a word are left out, and a part of a character has the place of the whole. A piece that stands for
        nothing in the text may be empty.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for part in self._parts(text):
            found, spans = self.model.encode_with_offsets(part)
            ids += found
            for first, last in spans:
                while first < last and part[first].isspace():
                    first += 1
                offsets.append((start + first, start + last))
            start += len(part)
        for index in range(len(offsets) - 2, -1, -1):
            (first, last), following = offsets[index], offsets[index + 1]
            if first == last == following[0]:
                offsets[index] = following
        whole = np.array(ids, np.int32)
        whole[self._is_special[whole]] = self.unk_id
        return whole, np.array(offsets, np.int32).reshape(-1, 2)

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """`encode` of each, on one thread: parallelism is by processes."""
        return [self.encode(text) for text in texts]

    def encode_with_masks(self, text: str) -> np.ndarray:
        """Ids of a text in which each `[MASK]`, or mask token of the model's own, is one `mask_id`; int32 [n].

        The rest has the ids that it has in running text. A word that is masked takes the space before it along, as in
        training, so that space leaves no piece of its own.
        """
        ids = np.array(self.model.encode(text.replace(MASK_TEXT, self.model.pieces[self.mask_id])), np.int32)
        if self.model.lone_space_id is not None:
            before_mask = np.append(ids[1:] == self.mask_id, False)
            ids = ids[~(before_mask & (ids == self.model.lone_space_id))]
        ids[self._is_special[ids] & (ids != self.mask_id)] = self.unk_id
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; masks and unknown tokens are shown, other special ones are left out."""
        hidden = {*self.special_ids.tolist()} - {self.mask_id, self.unk_id}
        return self.model.decode([int(index) for index in ids if int(index) not in hidden])

    def piece(self, id: int) -> str:
        """The vocabulary's entry, with the model's own marks of spaces and continuation."""
        return self.model.pieces[id]

    def word_starts(self) -> np.ndarray:
        """Which pieces begin a word, bool [vocab_size].

        True after a space, for punctuation, in scripts that are written without spaces, and for special tokens.
        """
        starts = self._is_special.copy()
        for index in range(self.vocab_size):
            if not starts[index]:
                text = self.model.text(index)
                starts[index] = self.model.after_space(index) or _is_punctuation(text) or _is_unspaced(text[:1])
        return starts

    def byte_lengths(self) -> np.ndarray:
        """The bytes of text that each id stands for, the space before a word too: int32 [vocab_size]; 0 for special ids."""
        lengths = [self.model.num_bytes(index) for index in range(self.vocab_size)]
        return np.where(self._is_special, 0, lengths).astype(np.int32)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the model file, so that `load_tokenizer(directory)` gives this tokenizer again."""
        folder = epath.Path(directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / self.file_name).write_bytes(self.model.blob)
        except OSError as error:
            raise MachineError(f"the tokenizer could not be written to {directory}: {error}") from error

    def _parts(self, text: str) -> Iterator[str]:
        """Cuts a long text between words."""
        start = 0
        while self.model.cut is not None and len(text) - start > _PART_CHARS:
            place = self.model.cut.search(text, start + _PART_CHARS)
            if place is None:
                break
            yield text[start : place.start()]
            start = place.start()
        yield text[start:] if start else text


def load_tokenizer(directory_or_file: str | os.PathLike[str]) -> Tokenizer:
    """Loads what `Tokenizer.save` wrote, any SentencePiece .model, or a tokenizer.json of a kind that it knows.

    Those are WordPiece, byte-level BPE, what a SentencePiece model becomes there, and our own of characters and patterns.

    A SentencePiece model without a pad, class, separator or mask piece gets one after its last (T5's, XLM-R's).

    Raises:
        UserError: there is no such file, it is of another kind, or a tokenizer.json lacks a special token.
    """
    path = epath.Path(directory_or_file)
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if file.suffix == ".model" or file.name == "tokenizer.json"]
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "neither"
            raise UserError(f"tokenizer {path} has {names} where one .model or tokenizer.json should be; name the file")
        path = found[0]
    if path.suffix not in (".model", ".json"):
        raise UserError(f"tokenizer {path} is no SentencePiece .model, tokenizer.json, or directory with one of them")
    try:
        return Tokenizer("tokenizer" + path.suffix, path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no tokenizer at {path}") from None
    except OSError as error:
        raise MachineError(f"tokenizer {path} cannot be read: {error}") from error
    except UserError as error:
        raise UserError(f"tokenizer {path}: {error}") from error


def train_tokenizer(cfg: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Trains a tokenizer on all of `texts`; the same texts give the same model on any number of cores.

    Args:
        cfg: with any algorithm but pretrained.
        texts: documents, as many as fit into memory; sampling is the caller's.

    Raises:
        UserError: the texts are too few or too varied for the vocabulary's size; the message has SentencePiece's limit.
    """
    if cfg.algorithm in ("characters", "regex", "code"):
        return Tokenizer("tokenizer.json", train_domain_tokenizer(cfg, texts))
    assert cfg.algorithm in ("unigram", "bpe"), cfg.algorithm
    model = io.BytesIO()
    names = {role: alternatives[0] for role, alternatives in SPECIAL_NAMES.items()}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type=cfg.algorithm,
            vocab_size=cfg.vocab_size,
            character_coverage=cfg.character_coverage,
            byte_fallback=cfg.byte_fallback,
            normalization_rule_name="nmt_nfkc_cf" if cfg.lowercase else "nmt_nfkc",
            max_sentence_length=4 * _TRAINING_LINE_CHARS,
            num_threads=_TRAINING_THREADS,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=names["pad"],
            unk_piece=names["unk"],
            bos_piece=names["cls"],
            eos_piece=names["sep"],
            # User-defined, as only such a piece is found in text; `encode` makes it the unknown token in a corpus.
            user_defined_symbols=[names["mask"]],
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = _training_failure(str(error))
        raise UserError(f"tokenizer.vocab_size={cfg.vocab_size} cannot be trained on this sample: {reason}") from error
    return Tokenizer("tokenizer.model", model.getvalue())


def _training_failure(message: str) -> str:
    """SentencePiece's reason in the words of the config."""
    if most := re.search(r"Vocabulary size too high.*<= (\d+)", message, flags=re.DOTALL):
        return f"it has too little text; set tokenizer.vocab_size to {most[1]} or less, or add text"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"its characters and the special tokens alone need {least[1]}; set tokenizer.vocab_size well above that, or "
            "lower tokenizer.character_coverage"
        )
    return re.sub(r"^.*?\] ?", "", message, flags=re.DOTALL).strip() or "there is no text to train on"


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of bounded length, cut at a space where there is one; SentencePiece refuses NUL."""
    for text in texts:
        for line in text.replace("\0", " ").split("\n"):
            while len(line) > _TRAINING_LINE_CHARS:
                space = line.rfind(" ", 1, _TRAINING_LINE_CHARS)
                end = space if space > 0 else _TRAINING_LINE_CHARS
                yield line[:end]
                line = line[end:]
            if line and not line.isspace():
                yield line


def _is_punctuation(text: str) -> bool:
    return bool(text) and all(unicodedata.category(char)[0] in "PS" for char in text)


def _is_unspaced(char: str) -> bool:
    return bool(char) and unicodedata.name(char, "").startswith(_UNSPACED_SCRIPTS)
