"""Answers that follow a JSON schema or another grammar: which tokens may come next, by llguidance.

It needs the bytes of every token, so byte-level and SentencePiece vocabularies alike will do.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm.data.message import Call
from cllm.data.tools import Parts, Tools, called
from cllm.messages import UserError, to_json
from cllm.model.tokenizer import Tokenizer
from cllm.model.vocabulary import token_bytes

INSTALL = "pip install llguidance"
# Between the tokens of JSON: on one line or indented. A model that goes on with blanks for ever
# would come to no end.
BLANKS = r"( |\n {0,16}|\n\t{0,8})?"
NO_PARAMETERS = {"properties": {}, "additionalProperties": False}
# Digits and point of a number: as long as JavaScript writes a double, 0.0000012345678901234567.
MAX_NUMBER = 24
# By its first byte what a token does behind digits: 0 leaves them, 1 and 2 go on; 3: it is not in a
# number.
BEHIND_DIGITS = dict.fromkeys(b".eE,]} \t\n", 0) | dict.fromkeys(b"123456789", 1) | {ord("0"): 2}


class Grammar:
    """A compiled grammar: `start` one for every answer. `words`: the vocabulary.

    Nothing ends the digits of a JSON number, and a model may go on with them for ever: after
    `MAX_NUMBER` only what leaves them may come; where the schema needs more, zeros alone may not
    go on.
    """

    def __init__(self, matcher: Any, words: _Words) -> None:
        self._matcher, self._words = matcher, words
        self._number = b""  # digits and point at the end of the answer

    def start(self) -> Grammar:
        """The same at its beginning."""
        return Grammar(self._matcher.deep_copy(), self._words)

    def mask(self, logits: Tensor) -> None:
        """Minus infinity into the logits (V,) of tokens that may not come next; NaN into all of
        them after an error.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        forbidden = np.unpackbits(packed, bitorder="little")[: len(logits)] == 0
        if len(self._number) >= MAX_NUMBER:
            rank = self._words.behind_digits[: len(forbidden)]
            allowed = {*rank[~forbidden].tolist()}
            # in a string anything could follow, or its pattern asks for digits
            if max(allowed, default=3) < 3 and (0 in allowed or {*self._number} == {*b"0."}):
                forbidden |= rank > min(allowed)
        logits[len(forbidden) :] = -torch.inf
        logits[: len(forbidden)].masked_fill_(
            torch.from_numpy(forbidden).to(logits.device), torch.nan if self.error else -torch.inf
        )

    def advance(self, id: int) -> None:
        """The answer goes on with this token."""
        self._matcher.consume_token(id)
        text = self._number + self._words.tokens[id]
        self._number = text[len(text.rstrip(b"0123456789.")) :]

    @property
    def error(self) -> str:
        """Why it cannot go on, in one line, "" if it can."""
        return str(self._matcher.get_error()).partition("\n")[0]


def call_grammar(style: str, tools: Tools, begun: Parts) -> str:
    """Lark of what follows the beginning of a call: the rest of one of these tools' calls, its
    arguments after the tool's schema; "" for a format whose arguments are no JSON.
    """
    start, rules = "".join(text for text, _ in begun), list[str]()
    for tool in tools:
        call = called(style, [], "", (Call(tool["name"], {}),))[0]
        whole = "".join(text for text, _ in call)
        if not whole.startswith(start):  # another one is to be called
            continue
        at = whole.rfind("{}")
        if at < len(start):
            return ""
        # what is markup behind the arguments may be left out at the end of an answer
        closing = next(text for text, markup in reversed(call) if not markup).rpartition("{}")[2]
        schema = {"type": "object", **(tool.get("parameters") or NO_PARAMETERS)}
        schema["x-guidance"] = {"whitespace_pattern": BLANKS}
        # `{` may be one token with the blank before it
        opening = to_json(whole[len(start) : at].rstrip(" "))
        number = len(rules)
        rules.append(
            f'call{number}: {opening} " "? args{number} {to_json(closing)}\n'
            f"args{number}: %json {to_json(schema)}"
        )
    calls = " | ".join(f"call{number}" for number in range(len(rules)))
    return "\n".join([f"start: {calls}", *rules])


class Grammars:
    """Compiles grammars for one tokenizer, and remembers the last of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._compiled = functools.lru_cache(maxsize=64)(self._compile)

    @property
    def available(self) -> bool:
        """Whether the library is installed."""
        return importlib.util.find_spec("llguidance") is not None

    def compile(self, source: Mapping[str, Any] | str) -> Grammar:
        """Of a JSON schema, or of a grammar in llguidance's Lark. Raises UserError without the
        library, and for a grammar that it refuses.
        """
        try:
            return self._compiled(source if isinstance(source, str) else to_json(source))
        except RecursionError as error:
            raise UserError("serve.grammar", detail=error) from error

    def _compile(self, text: str) -> Grammar:
        if text.startswith("{"):
            text = self._library.LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_pattern": BLANKS}
            )
        matcher = self._library.LLMatcher(self._vocabulary, text, log_level=0)
        first = matcher.deep_copy()
        first.compute_bitmask()  # some have no answer at all
        if error := Grammar(first, self._words).error:
            raise UserError("serve.grammar", detail=error)
        return Grammar(matcher, self._words)

    @functools.cached_property
    def _library(self) -> Any:
        try:
            import llguidance
        except ImportError as error:
            raise UserError("serve.no_grammar", command=INSTALL) from error
        return llguidance

    @functools.cached_property
    def _words(self) -> _Words:
        return _Words(self._tokenizer)

    @functools.cached_property
    def _vocabulary(self) -> Any:
        """The tokenizer as the library knows it."""
        wrapper = self._library.TokenizerWrapper(self._words)
        ends = sorted(self._tokenizer.stop_ids)
        return self._library.LLTokenizer(wrapper, eos_token=ends)


class _Words:
    """What the library asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        vocabulary = tokenizer.vocabulary
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [token_bytes(vocabulary, id) for id in range(vocabulary.size)]
        self.special_token_ids = sorted(vocabulary.hidden)
        self.encode = tokenizer.encode
        firsts = [
            piece[0] if piece and id not in vocabulary.hidden else 10
            for id, piece in enumerate(self.tokens)
        ]
        # an end leaves them like a line's; the mask is some bits longer
        self.behind_digits = np.array([BEHIND_DIGITS.get(byte, 3) for byte in firsts] + [3] * 32)

    def __call__(self, text: str) -> list[int]:
        return self.encode(text)
