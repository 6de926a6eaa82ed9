"""How many words a text has, for the manifest of a corpus and for `data.max_words`."""

import re

_WORD_EACH = re.compile("[\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def count_words(text: str) -> int:
    """What stands between white space, as `wc -w` counts.

    Han characters and kana, which no spaces divide, are a word each, as BERT's tokenizer has it for Chinese. Other scripts
    without spaces (Thai, Lao, Khmer, Burmese) are counted by the spaces that they have, which is by phrases.
    """
    return len((text if text.isascii() else _WORD_EACH.sub(" x ", text)).split())
