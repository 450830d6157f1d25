"""Vocabularies: text <-> ids. They know nothing of templates, conversations or file formats.

Two engines: SentencePiece for `tokenizer.model` (and GGUF's "llama" vocabularies), Hugging Face
`tokenizers` for everything else. `encode` never yields a special token; added
tokens that are not special are words, as the families' own tokenizers have it.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from array import array
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_CONTROL_LIKE = re.compile(r"<[^<>\s]+>|\[\w+\]")
_HTML = re.compile(  # user-defined pieces of Baichuan2, Yi and Gemma that are text all the same
    r"</?(?:h\d|t(?:able|body|head|foot|[dhr])|caption|blockquote|strong|em|[abipsu]|su[bp]|code"
    r"|html|body|img|span|bbox|[ou]l|li|div|"
    r"iframe|footer|br)/?>|<!DOCTYPE>"
)
# Not "special" in the files, yet written by templates.
MARKUP_TOKEN = re.compile(r"<[|｜][^|｜]*[|｜]>|</?(?:think|tool_call|tool_response)>")

# What is split before the merges, by llama.cpp's names (tokenizer.ggml.pre).
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = _CONTRACTIONS + _WORDS % ""
CL100K = _CONTRACTIONS + _WORDS % "{1,3}"
# as tiktoken: a word that is a token is not merged from parts
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "glm4", "chatglm-bpe")
PATTERNS = {
    **dict.fromkeys(("gpt-2", "gpt2", "default"), (_GPT2,)),
    **dict.fromkeys(("smollm", "codeshell"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (QWEN,)),
    **dict.fromkeys(WHOLE_WORDS, (CL100K,)),
}


Encode: TypeAlias = "Callable[[list[str]], list[array[int]]]"


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    """Matches the longest of the names at a place; None if there are none."""
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _pieces(text: str, names: re.Pattern[str]) -> list[str]:
    """The text cut behind the first letter of every name in it."""
    if "<" not in text and "[" not in text:  # where every such name begins
        return [text]
    places = [0, *(match.start() + 1 for match in names.finditer(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(places)]


def _encode_as_text(
    texts: list[str], names: re.Pattern[str] | None, encode: Encode
) -> list[array[int]]:
    """`encode` of each text, which is cut in such a way that none of `names` in it becomes the
    token of this name.
    """
    if names is None:
        return encode(texts)
    cut = [_pieces(text, names) for text in texts]
    encoded = iter(encode(list(itertools.chain.from_iterable(cut))))
    return [sum(itertools.islice(encoded, len(pieces)), array("i")) for pieces in cut]


# Both engines offer the same. `control`: the tokens that markup becomes; `hidden`: the special ones
# of them, which no text becomes and `decode` leaves out; `size`: one more than the highest id; `id`
# and `name` look a single token up (None, "" where there is none); `begins_with`: whether the
# family puts this bos before every text; `save` writes the vocabulary's own file.
class SentencePiece:
    """A SentencePiece model; `added` names tokens beyond or instead of its pieces; `strip`:
    decoding drops a first space, as Llama's.
    """

    byte_level = False

    def __init__(self, model: bytes, added: Mapping[str, int], *, strip: bool = False) -> None:
        import sentencepiece

        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._proto, self._strip = model, strip
        pieces: int = self.pieces.get_piece_size()
        self._names = [self.pieces.id_to_piece(i) for i in range(pieces)]
        # User-defined pieces (score 0) are matched in any text, so those that look like control
        # tokens have to be kept apart.
        control, defined = {}, {}
        for i, name in enumerate(self._names):
            text = self.pieces.get_score(i) or self.pieces.is_unknown(i) or self.pieces.is_byte(i)
            if self.pieces.is_control(i):
                control[name] = i
            elif not text and _CONTROL_LIKE.fullmatch(name) and not _HTML.fullmatch(name):
                defined[name] = i
        self._cut = _any_of(defined)
        control |= defined
        self._added = {i: name for name, i in added.items()}
        self.control = {name: i for name, i in control.items() if i not in self._added}
        self.control |= added
        self.hidden = frozenset([*control.values(), *added.values()])
        self.size = max([pieces, *(i + 1 for i in self._added)])

    def encode(self, texts: list[str]) -> list[array[int]]:
        return _encode_as_text(
            texts, self._cut, lambda parts: [array("i", ids) for ids in self.pieces.encode(parts)]
        )

    def decode(self, ids: list[int]) -> str:
        shown = [i for i in ids if i not in self.hidden and i < len(self._names)]
        text = str(self.pieces.decode(shown))
        return text.removeprefix(" ") if self._strip else text

    def id(self, name: str) -> int | None:
        if name in self.control:
            return self.control[name]
        id = self.pieces.piece_to_id(name)
        return None if self.pieces.is_unknown(id) and name != self._names[id] else int(id)

    def name(self, id: int) -> str:
        return self._added.get(id) or (self._names[id] if id < len(self._names) else "")

    def begins_with(self, id: int) -> bool:
        return True  # where tokenizer_config.json does not say otherwise

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.model").write_bytes(self._proto)

    def save_json(self, directory: Path) -> None:
        """The same as tokenizer.json: a piece is merged from any two pieces, the best score first,
        as SentencePiece does.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

        pieces = self.pieces
        every = [self.name(i) for i in range(len(self._names))]
        ids = {name: i for i, name in enumerate(every)}
        kinds = (pieces.is_control, pieces.is_unknown, pieces.is_unused, pieces.is_byte)
        plain = [i for i in range(len(every)) if not any(kind(i) for kind in kinds)]
        names = [every[i] for i in sorted(plain, key=pieces.get_score, reverse=True)]
        unknown = self._names[pieces.unk_id()]
        model = Tokenizer(
            models.BPE(
                ids,
                merges_of(names, ids),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback="<0x0A>" in ids,
            )
        )
        prefix = [normalizers.Prepend("▁")] if prefixed(self) else []
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        model.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        model.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        text = [
            i
            for i in plain
            if pieces.get_score(i) == 0 and every[i] not in self.control and len(every[i]) > 1
        ]
        model.add_tokens([AddedToken(every[i], normalized=False) for i in text])
        ordered = sorted(self.control, key=self.control.__getitem__)
        model.add_tokens([AddedToken(name, normalized=False, special=True) for name in ordered])
        model.save(str(directory / "tokenizer.json"))


class Bpe:
    """A `tokenizers.Tokenizer`: byte-level BPE, or whatever a tokenizer.json holds."""

    def __init__(self, model: Any) -> None:
        self.model = model
        model.encode_special_tokens = True  # special names in text stay text
        model.no_padding()
        model.no_truncation()
        added = model.get_added_tokens_decoder()
        self.control = {
            token.content: id
            for id, token in added.items()
            if token.special or MARKUP_TOKEN.fullmatch(token.content)
        }
        self.hidden = frozenset(id for id, token in added.items() if token.special)
        self.byte_level = model.decoder and '"ByteLevel"' in model.decoder.__getstate__().decode()
        self.size = max([model.get_vocab_size(), *(id + 1 for id in added)])

    def encode(self, texts: list[str]) -> list[array[int]]:
        return [
            array("i", encoding.ids)
            for encoding in self.model.encode_batch_fast(texts, add_special_tokens=False)
        ]

    @property
    def patterns(self) -> tuple[str | None, ...]:
        """What splits a text into words, one after another; with None for anything but a pattern
        before byte-level BPE.
        """
        state = (
            json.loads(self.model.pre_tokenizer.__getstate__()) if self.model.pre_tokenizer else {}
        )
        *steps, last = state.get("pretokenizers") or [state]
        patterns: list[str | None] = []
        for step in steps:
            if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
                patterns.append(step["pattern"].get("Regex"))
            else:
                patterns.append(r"\p{N}" if step.get("individual_digits") else None)
        plain = last.get("type") == "ByteLevel" and not last["add_prefix_space"]
        return (*patterns, *([_GPT2] * last["use_regex"] if plain else [None]))

    def begins_with(self, id: int) -> bool:
        return bool(self.model.encode("x").ids[:1] == [id])

    def decode(self, ids: list[int]) -> str:
        return str(self.model.decode(ids, skip_special_tokens=True))

    def id(self, name: str) -> int | None:
        id = self.model.token_to_id(name)
        return None if id is None else int(id)

    def name(self, id: int) -> str:
        return self.model.id_to_token(id) or ""

    def save(self, directory: Path) -> None:
        self.model.save(str(directory / "tokenizer.json"))

    save_json = save


Vocabulary: TypeAlias = SentencePiece | Bpe
TokenIds: TypeAlias = Mapping[str, int]
Added: TypeAlias = Mapping[str, tuple[int, bool]]  # name -> (id, special)


def token_bytes(vocabulary: Vocabulary, id: int) -> bytes:
    """What a token adds to a text, in UTF-8; a control token's name."""
    name = vocabulary.name(id)
    if id in vocabulary.hidden:
        return name.encode()
    letters = _letters() if vocabulary.byte_level else {}
    if all(letter in letters for letter in name):
        return bytes(letters[letter] for letter in name)
    if byte := _BYTE.fullmatch(name):
        return bytes.fromhex(byte[1])
    return name.replace("▁", " ").encode()


@functools.cache
def _letters() -> dict[str, int]:
    """The letter that stands for a byte in byte-level vocabularies -> the byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def prefixed(vocabulary: Vocabulary) -> bool:
    """Whether the vocabulary puts a blank before every text."""
    return vocabulary.name(vocabulary.encode(["x"])[0][0]).startswith("▁")


def merges_of(tokens: Iterable[str], known: TokenIds) -> list[tuple[str, str]]:
    """Every split of a token into two that are `known`, in the order of the tokens."""
    return [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def byte_level(
    ids: TokenIds,
    merges: list[tuple[str, str]],
    patterns: Iterable[str],
    added: Added,
    nfc: bool,
    whole: bool = False,
) -> Bpe:
    """Byte-level BPE from its parts; `whole`: a word that is a token is taken without merging."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    model = Tokenizer(
        models.BPE(
            dict(ids) | {name: id for name, (id, _) in added.items()}, merges, ignore_merges=whole
        )
    )
    if nfc:
        model.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = decoders.ByteLevel()
    ordered = sorted(added.items(), key=lambda item: item[1][0])
    model.add_tokens(
        [AddedToken(name, special=special, normalized=False) for name, (_, special) in ordered]
    )
    return Bpe(model)
