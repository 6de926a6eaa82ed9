"""The words of a text: counted for the manifest of a corpus and `data.max_words`, looked at by `data.filters`."""

import re

_WORD_EACH = re.compile("[\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def split_words(text: str) -> list[str]:
    """What stands between white space, as `wc -w` counts.

    Han characters and kana, which no spaces divide, are a word each, as BERT's tokenizer has it for Chinese. Other scripts
    without spaces (Thai, Lao, Khmer, Burmese) are divided at the spaces that they have, which is into phrases.
    """
    return (text if text.isascii() else _WORD_EACH.sub(r" \g<0> ", text)).split()


def count_words(text: str) -> int:
    """How many words `split_words` finds."""
    return len(split_words(text))
