"""Vocabularies for text that is not prose, as tokenizer.json: characters or pieces of a pattern, and source code.

Trained by `data/tokenizer.py` beside its SentencePiece models, from the same sample.
"""

import collections
import itertools
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mlm_jax.config import TokenizerConfig
from mlm_jax.data.tokenizer_models import SPECIAL_NAMES
from mlm_jax.errors import UserError

ANY_CHARACTER = r"(?m:.)"  # Oniguruma's way to say that a line end is one too

# A line end with the indentation behind it; a name or number with the space before it, whole for the merges to work in; a
# run of signs; other spaces. So indentation is few tokens, and no token reaches over the edge of a name.
CODE = r"\r?\n[ \t]*|[ ]?[\p{L}_][\p{L}\p{N}_]*|[ ]?\p{N}+|[ ]?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


def train_domain_tokenizer(cfg: TokenizerConfig, texts: Iterable[str]) -> bytes:
    """The content of a tokenizer.json, the same for the same texts.

    Args:
        cfg: with algorithm characters, regex or code.

    Raises:
        UserError: the pattern is none, or matches nothing.
    """
    specials = [names[0] for names in SPECIAL_NAMES.values()]
    if cfg.algorithm == "code":
        tokenizer = _train_code(cfg, texts, specials)
    else:
        tokenizer = _collect_pieces(cfg, texts, specials)
    tokenizer.add_special_tokens(specials)
    return str(tokenizer.to_str()).encode()


def _collect_pieces(cfg: TokenizerConfig, texts: Iterable[str], specials: list[str]) -> tokenizers.Tokenizer:
    """A vocabulary of what the pattern matches, the most frequent first; what it does not match is the unknown token."""
    pattern = ANY_CHARACTER if cfg.algorithm == "characters" else cfg.pattern
    try:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        matches = pre_tokenizers.Split(tokenizers.Regex(pattern), "removed")
    except Exception as error:  # the package raises bare Exceptions for a pattern that it cannot read
        raise UserError(f"tokenizer.pattern={pattern!r} is no regular expression: {error}") from error
    counts: collections.Counter[str] = collections.Counter()
    unmatched: collections.Counter[str] = collections.Counter()
    for text in texts:
        text = text.lower() if cfg.lowercase else text
        counts.update(piece for piece, _ in split.pre_tokenize_str(text))
        unmatched.update(piece for piece, _ in matches.pre_tokenize_str(text))
    counts -= unmatched
    if not counts:
        raise UserError(f"tokenizer.pattern={pattern!r} matches nothing in the text")
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
    chosen = [piece for piece in ranked if piece not in specials][: cfg.vocab_size - len(specials)]
    vocabulary = {piece: index for index, piece in enumerate(itertools.chain(specials, chosen))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_NAMES["unk"][0]))
    tokenizer.normalizer = normalizers.Lowercase() if cfg.lowercase else None
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _train_code(cfg: TokenizerConfig, texts: Iterable[str], specials: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE within the pieces of `CODE`: any text comes back as it was, to the last space."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=SPECIAL_NAMES["unk"][0]))
    tokenizer.normalizer = normalizers.Lowercase() if cfg.lowercase else None
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(CODE), "isolated"), by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
