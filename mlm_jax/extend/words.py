"""New words for a tokenizer: each becomes one piece behind those that it has, whose ids stay as they are.

A piece is the word as it stands behind a space, and is taken where that word occurs whole. How it comes into a vocabulary
without changing how other words are cut depends on the kind: WordPiece takes the longest piece anyway; a unigram model
prefers it to its parts by a score above their sum; BPE, which would need every step of joining it as a piece too, looks
whole words up before it joins anything (`ignore_merges`), as tokenizer.json can say and a SentencePiece file cannot.
"""

import collections
import dataclasses
import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.data.tokenizer_models import SPACE, SentencePieceModel
from mlm_jax.errors import UserError
from mlm_jax.interop.fast import fast_tokenizer, is_unigram, scores

_FEWEST_PIECES = 3  # a found word is cut into so many, or not known; what two pieces make is learned well enough
_FEWEST_OCCURRENCES = 5  # and occurs so often in the sample: a rarer one's row would hardly be trained
_PUNCTUATION = "".join(char for char in map(chr, range(sys.maxunicode)) if unicodedata.category(char)[0] in "PS")


@dataclasses.dataclass(frozen=True)
class Extended:
    """A tokenizer with new words.

    Attributes:
        tokenizer: has the old ids, and then one for each word.
        pieces: of each word, the ids that the old tokenizer cuts it into.
    """

    tokenizer: Tokenizer
    pieces: tuple[np.ndarray, ...]


def extend_tokenizer(tokenizer: Tokenizer, words: Sequence[str]) -> Extended:
    """Adds words. A SentencePiece BPE model becomes a tokenizer.json, which gives other text the same ids.

    Raises:
        UserError: a word is there already, twice, or none to this tokenizer; the message names it.
    """
    if isinstance(tokenizer.model, SentencePieceModel) and not is_unigram(tokenizer.model):
        tokenizer = Tokenizer("tokenizer.json", fast_tokenizer(tokenizer.model).to_str().encode())
    entry_of, lead = _looked_up_as(tokenizer), _lead(tokenizer)
    known = {piece: index for index, piece in enumerate(tokenizer.model.pieces)}
    entries: dict[str, str] = {}
    for word in words:
        entry = entry_of(word)
        if entry is None:
            raise UserError(f"{word!r} is no single word to this tokenizer, which cuts it before it looks for pieces")
        if entry in known:
            raise UserError(f"{word!r} is in the tokenizer already, as the piece {entry!r} with id {known[entry]}")
        if entry in entries:
            raise UserError(f"{entries[entry]!r} and {word!r} are the same to this tokenizer: give one of them")
        entries[entry] = word
    pieces = tuple(tokenizer.encode(lead + word) for word in words)
    model = tokenizer.model
    if isinstance(model, SentencePieceModel):
        blob = model.with_pieces(zip(entries, _scores(scores(model), pieces), strict=True))
    else:
        blob = _extended_json(json.loads(model.blob), list(entries), pieces, tokenizer.vocab_size)
    extended = Tokenizer(tokenizer.file_name, blob)
    for index, word in enumerate(words, start=tokenizer.vocab_size):
        found = extended.encode(lead + word).tolist()
        if found != [index]:
            shown = " ".join(extended.piece(id) for id in found)
            raise UserError(f"{word!r} stays cut into {shown!r} by this tokenizer: leave it out")
    return Extended(extended, pieces)


def find_words(tokenizer: Tokenizer, texts: Iterable[str], count: int) -> list[tuple[str, int]]:
    """The most frequent words that the tokenizer cuts into three pieces or more, or does not know, and how often they occur.

    Punctuation around a word is no part of it. What the tokenizer takes for the same word, as Word and word where it
    lowers case, is counted together.

    Raises:
        UserError: there are fewer than `count`.
    """
    occurrences: collections.Counter[str] = collections.Counter()
    for text in texts:
        occurrences.update(word.strip(_PUNCTUATION) for word in text.split())
    entry_of, lead = _looked_up_as(tokenizer), _lead(tokenizer)
    totals: collections.Counter[str] = collections.Counter()
    spelled: dict[str, str] = {}  # the most frequent of those that are the same
    for word, number in occurrences.most_common():
        if word and all(unicodedata.category(char)[0] in "LM" for char in word) and (entry := entry_of(word)):
            totals[entry] += number
            spelled.setdefault(entry, word)
    known, found = {*tokenizer.model.pieces}, list[tuple[str, int]]()
    for entry, number in totals.most_common():
        if len(found) == count or number < _FEWEST_OCCURRENCES:
            break
        ids = tokenizer.encode(lead + spelled[entry])
        if entry not in known and (len(ids) >= _FEWEST_PIECES or tokenizer.unk_id in ids):
            found.append((spelled[entry], number))
    if len(found) < count:
        raise UserError(
            f"the text has {len(found)} words that occur {_FEWEST_OCCURRENCES} times and are cut into {_FEWEST_PIECES} "
            f"pieces or more, and --count={count} are asked for: lower it, or give more text"
        )
    return found


def _lead(tokenizer: Tokenizer) -> str:
    """What comes before a word in running text, where a piece carries it."""
    if isinstance(tokenizer.model, SentencePieceModel):
        return " "
    return "" if json.loads(tokenizer.model.blob)["model"]["type"] in ("WordPiece", "WordLevel") else " "


def _looked_up_as(tokenizer: Tokenizer) -> Callable[[str], str | None]:
    """From a word to the piece that would be all of it; None if it is cut before pieces are looked for."""
    model, lead = tokenizer.model, _lead(tokenizer)
    if isinstance(model, SentencePieceModel):

        def marked(word: str) -> str | None:
            text = model.normalize(lead + word)
            return text if len(text) > 1 and text.rfind(SPACE) == 0 else None

        return marked
    fast = tokenizers.Tokenizer.from_str(model.blob.decode())

    def cut(word: str) -> str | None:
        text = lead + word
        parts = fast.pre_tokenizer.pre_tokenize_str(fast.normalizer.normalize_str(text) if fast.normalizer else text)
        return parts[0][0] if len(parts) == 1 else None

    return cut


def _scores(old: Sequence[float], pieces: Iterable[np.ndarray]) -> list[float]:
    """Of each word, that of its rarest piece: above the sum of them all, and no word is more frequent.

    Special and unknown tokens and bytes have none, which is 0; they count as the rarest of all pieces.
    """
    lowest = min(old)
    return [min(old[index] if old[index] < 0 else lowest for index in ids.tolist()) for ids in pieces]


def _extended_json(spec: dict[str, Any], entries: list[str], pieces: Sequence[np.ndarray], size: int) -> bytes:
    """The tokenizer.json with entries whose ids begin at `size`."""
    model = spec["model"]
    # What was added behind the vocabulary must be in it, or it would be numbered anew behind the new words.
    added = sorted((token["id"], token["content"]) for token in spec.get("added_tokens") or [])
    if model["type"] == "Unigram":
        vocabulary = model["vocab"]
        vocabulary += [[content, 0.0] for index, content in added if index >= len(vocabulary)]
        new = _scores([score for _, score in vocabulary], pieces)
        vocabulary += [[entry, score] for entry, score in zip(entries, new, strict=True)]
    else:
        model["vocab"] = {content: index for index, content in added} | model["vocab"]
        model["vocab"] |= {entry: index for index, entry in enumerate(entries, start=size)}
        if model["type"] == "BPE":
            model["ignore_merges"] = True
    return json.dumps(spec, ensure_ascii=False).encode()
