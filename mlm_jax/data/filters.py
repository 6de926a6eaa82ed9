"""Rules that leave single documents out of a corpus: length, shape and language, as `data.filters` sets them.

Pure functions of a text. `data/selection.py` applies them, and counts what each rule dropped.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any

from mlm_jax.config import FiltersConfig
from mlm_jax.config.conversion import nearest
from mlm_jax.data import images, pairs
from mlm_jax.data.words import split_words
from mlm_jax.errors import UserError, install

_BULLETS = ("•", "‣", "▪", "◦", "●", "-", "*", "–")  # Gopher's are bullet points; plain text writes them so
_ELLIPSES = ("…", "...")
_LANGUAGE_CHARS = 2000  # the language of a text shows in its beginning, and the time to tell it grows with its length


class _Shape:
    """What the rules ask of a text, each counted when a rule first asks for it."""

    def __init__(self, text: str):
        self.text = text

    @functools.cached_property
    def words(self) -> list[str]:
        return split_words(self.text)

    @functools.cached_property
    def lines(self) -> list[str]:
        return [stripped for line in self.text.splitlines() if (stripped := line.strip())]

    @functools.cached_property
    def characters(self) -> int:
        return sum(map(len, self.words))

    @property
    def word_length(self) -> float:
        return self.characters / max(1, len(self.words))

    @property
    def lettered_words(self) -> float:
        return sum(any(map(str.isalpha, word)) for word in self.words) / max(1, len(self.words))

    @property
    def letters(self) -> float:
        return sum(map(str.isalpha, self.text)) / max(1, self.characters)

    @property
    def digits(self) -> float:
        return sum(map(str.isdigit, self.text)) / max(1, self.characters)

    @property
    def symbols(self) -> float:
        count = max(self.text.count("#"), sum(map(self.text.count, _ELLIPSES)))
        return count / max(1, len(self.words))

    @property
    def bullet_lines(self) -> float:
        return sum(line.startswith(_BULLETS) for line in self.lines) / max(1, len(self.lines))

    @property
    def ellipsis_lines(self) -> float:
        return sum(line.endswith(_ELLIPSES) for line in self.lines) / max(1, len(self.lines))

    @property
    def repeated_lines(self) -> float:
        return sum(count - 1 for count in collections.Counter(self.lines).values()) / max(1, len(self.lines))


# Of each field that is a lower or an upper limit, what it limits. In this order: a text counts for the first that drops it.
_LIMITED: dict[str, Callable[[_Shape], float]] = {
    "min_words": lambda shape: len(shape.words),
    "max_words": lambda shape: len(shape.words),
    "min_word_length": lambda shape: shape.word_length,
    "max_word_length": lambda shape: shape.word_length,
    "min_lettered_words": lambda shape: shape.lettered_words,
    "min_letters": lambda shape: shape.letters,
    "max_digits": lambda shape: shape.digits,
    "max_symbols": lambda shape: shape.symbols,
    "max_bullet_lines": lambda shape: shape.bullet_lines,
    "max_ellipsis_lines": lambda shape: shape.ellipsis_lines,
    "max_repeated_lines": lambda shape: shape.repeated_lines,
}
NEAR_DUPLICATES = "near_duplicates"
RULES = (*_LIMITED, "languages", NEAR_DUPLICATES)


def dropping_rule(text: str, cfg: FiltersConfig) -> str:
    """The first of `RULES`, near duplicates aside, that leaves a document out; empty where it is kept.

    The two sentences of a pair count as two lines.
    """
    text = images.split(text)[0].replace(pairs.MARK, "\n")
    shape = _Shape(text)
    for rule, measure in _LIMITED.items():
        limit = getattr(cfg, rule)
        if limit and (measure(shape) < limit if rule.startswith("min") else measure(shape) > limit):
            return rule
    if cfg.languages:
        language, probability = _identifier().classify(text[:_LANGUAGE_CHARS])
        if language not in cfg.languages or probability < cfg.min_language_probability:
            return "languages"
    return ""


def check_languages(cfg: FiltersConfig) -> None:
    """Raises a UserError for a language that cannot be told, or where the library that tells is not installed."""
    known = _identifier().labels if cfg.languages else []
    for language in cfg.languages:
        if language not in known:
            raise UserError(
                f"data.filters.languages: {language!r} is none of the codes that can be told ({', '.join(sorted(known))})"
                f"{nearest(language, known)}"
            )


@functools.cache
def _identifier() -> Any:
    """Its model comes with the package; nothing is downloaded."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier  # an optional extra
    except ImportError:
        raise UserError(f"data.filters.languages needs the extra 'filters': {install('filters')}") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
