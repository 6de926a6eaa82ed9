"""A given list of n-grams as token ids: words that belong together, for the masking policy 'pmi'."""

import os
from collections.abc import Iterable

import numpy as np
from etils import epath

from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import UserError

MAX_WORDS = 8  # in an n-gram; the published lists have 5 at most


def read_ngrams(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        UserError: there is no such file, or it is no text.
    """
    try:
        lines = epath.Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"masking.ngrams={os.fspath(path)!r} cannot be read as text: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def encode_ngrams(ngrams: Iterable[str], tokenizer: Tokenizer) -> tuple[list[np.ndarray], int]:
    """The ids of each n-gram of several words, and the most words that one has.

    A tokenizer that writes spaces into its tokens may write the first word of a text in another way than one inside it;
    then there are both. What the tokenizer makes of upper and lower case, it makes of the list's too.

    Raises:
        UserError: an n-gram is too long, or none has several words.
    """
    starts = tokenizer.word_starts()
    found: dict[bytes, np.ndarray] = {}
    most = 0
    for ngram in ngrams:
        for ids in (tokenizer.encode(ngram), tokenizer.encode(" " + ngram)):
            words = 1 + int(starts[ids[1:]].sum())
            if words > MAX_WORDS:
                raise UserError(f"masking.ngrams: {ngram!r} has {words} words of this tokenizer; at most {MAX_WORDS}")
            if words > 1:
                found[ids.tobytes()] = ids
                most = max(most, words)
    if not found:
        raise UserError("masking.ngrams lists no n-gram of several words")
    return list(found.values()), most
