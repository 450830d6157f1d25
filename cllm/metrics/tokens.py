"""Six tokenizers for metrics: sacrebleu 2.6's `zh`, `13a`, `intl` and `none`, plain characters, and
jieba's words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from itertools import filterfalse

# mteval-v13a: ASCII marks but ' , - . (the class there also holds the space, which changes nothing
# before a split)
_MARKS = r"{-~\[-`!-&(-+:-@/"
# The quirk of sacrebleu's `zh`: its entry '\u20000'-'\u2a6d6' for Extension B is read by Python as
# two characters each and so means U+2001-U+2A6D: quotes, dashes, arrows, mathematics, boxes are
# split; real Extension B and emoji are not.
_CHINESE = (
    r"\u2001-\u2a6d\u2e80-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31ef\u3200-\u4db5\u4e00-\u9fbb"
    r"\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef"
)
_PIECES_13A, _PIECES_ZH = (
    re.compile(rf"[^\s{alone}]+|\S") for alone in (_MARKS, _MARKS + _CHINESE)
)
_AROUND_DIGITS = [  # period and comma unless inside a number; a dash after a digit
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
]
# mteval-v14's rules over the first letters of Unicode categories: P punctuation, N number, S symbol
_INTL = [
    (re.compile("[^N]P"), "{0} {1} "),
    (re.compile("P[^N]"), " {0} {1}"),
    (re.compile("S"), " {0} "),
]


def _split(text: str, pieces: re.Pattern[str]) -> list[str]:
    if any(mark in text for mark in ".,-"):
        for pattern, spaced in _AROUND_DIGITS:
            text = pattern.sub(spaced, text)
    return list(pieces.findall(text))


def _13a(text: str) -> list[str]:
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    text = (
        text.replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    )
    # the padding splits ".5" and "6."; `zh` has none and keeps them
    return _split(f" {text} ", _PIECES_13A)


def _intl(text: str) -> list[str]:
    text = text.rstrip()
    for pattern, spaced in _INTL:
        categories = "".join(unicodedata.category(character)[0] for character in text)
        for start, end in reversed([match.span() for match in pattern.finditer(categories)]):
            text = text[:start] + spaced.format(*text[start:end]) + text[end:]
    return text.split()


# jieba takes most of the time, and one reference meets several systems and metrics
@lru_cache(maxsize=2048)
def _jieba_words(text: str) -> tuple[str, ...]:
    import jieba

    if not jieba.dt.initialized:
        # its four lines about loading the dictionary are not for our users
        jieba.setLogLevel("WARNING")
    return tuple(jieba.cut(text))


# name -> text to tokens. `char` and `jieba` keep white space as tokens; `tokens` drops those.
Tokens = tuple[str, ...] | str  # a string is the sequence of its characters
TOKENIZERS: dict[str, Callable[[str], list[str]]] = {
    "zh": lambda text: _split(text.strip(), _PIECES_ZH),
    "13a": _13a,
    "intl": _intl,
    "none": str.split,
    "char": list,
    "jieba": lambda text: list(_jieba_words(text)),
}


# small: several kinds of ROUGE ask for the same pair, but a hoard of tokens is slower than new ones
@lru_cache(maxsize=16)
def tokens(text: str, tokenizer: str, *, blanks: bool = False) -> Tokens:
    """The tokens of `text` without those that are only white space, or with them (`blanks`), as
    nltk counts them.
    """
    if tokenizer == "char":
        return text if blanks else "".join(text.split())
    found = TOKENIZERS[tokenizer](text)
    return tuple(found if blanks or tokenizer != "jieba" else filterfalse(str.isspace, found))


def tokenizer_signature(tokenizer: str) -> str:
    """`tok:NAME`; jieba's version belongs to the name, because its dictionary changes scores."""
    if tokenizer != "jieba":
        return f"tok:{tokenizer}"
    import jieba

    return f"tok:jieba-{jieba.__version__}"


def choice(option: str, value: str, known: tuple[str, ...] = tuple(TOKENIZERS)) -> None:
    """Raise ValueError unless `value` is one of the `known` values of `option`."""
    if value not in known:
        raise ValueError(f"unknown {option} {value!r}; choose one of: {', '.join(known)}")
