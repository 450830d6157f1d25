"""Vocabularies: text <-> ids, from every file format the families publish. It knows nothing of
templates or conversations.

Two engines: SentencePiece for `tokenizer.model` (and GGUF's "llama" vocabularies), Hugging Face
`tokenizers` for `tokenizer.json`, vocab.json + merges.txt, tiktoken rank files and GGUF's "gpt2"
vocabularies. `encode` never yields a control token.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import re
import struct
from array import array
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from cllm.messages import UserError
from cllm.model.fragments import BYTE_LETTERS, Encode, Fragments, is_ideograph, token_texts

CHATGLM_TOKENS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
)
_CONTROL_LIKE = re.compile(r"<[^<>\s]+>|\[\w+\]")
_HTML = re.compile(  # user-defined pieces of Baichuan2, Yi and Gemma that are text all the same
    r"</?(?:h\d|t(?:able|body|head|foot|[dhr])|caption|blockquote|strong|em|[abipsu]|su[bp]|code|html|body|img|span|bbox|[ou]l|li|div|"
    r"iframe|footer|br)/?>|<!DOCTYPE>"
)
# Not "special" in the files, yet written by templates only.
_MARKUP_TOKEN = re.compile(r"<[|｜][^|｜]*[|｜]>|</?(?:think|tool_call|tool_response)>")

_MANY = 64  # texts from which fragments pay for their table

# What is split before the merges, by llama.cpp's names (tokenizer.ggml.pre).
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN = _CONTRACTIONS + _WORDS % ""
_CL100K = _CONTRACTIONS + _WORDS % "{1,3}"
# as tiktoken: a word that is a token is not merged from parts
_WHOLE = ("llama-bpe", "llama3", "llama-v3", "glm4", "chatglm-bpe")
PATTERNS = {
    **dict.fromkeys(("gpt-2", "gpt2", "default"), (_GPT2,)),
    **dict.fromkeys(("smollm", "codeshell"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN,)),
    **dict.fromkeys(_WHOLE, (_CL100K,)),
}


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    return (
        re.compile("|".join(map(re.escape, ordered)))
        if (ordered := sorted(names, key=len, reverse=True))
        else None
    )


def _encode_cut(
    texts: list[str], names: re.Pattern[str] | None, encode: Encode
) -> list[array[int]]:
    """`encode` of each text, after cutting any of `names` in it behind the first letter, so that it
    is not taken for the token.
    """
    suspects = ((index, text) for index, text in enumerate(texts) if "<" in text or "[" in text)
    found = (
        ((index, [m.start() + 1 for m in names.finditer(text)]) for index, text in suspects)
        if names
        else ()
    )
    if not (cuts := {index: places for index, places in found if places}):
        return encode(texts)
    bounds = [(text, [0, *cuts.get(index, ()), len(text)]) for index, text in enumerate(texts)]
    encoded = iter(
        encode(
            [
                text[start:end]
                for text, places in bounds
                for start, end in itertools.pairwise(places)
            ]
        )
    )
    return [sum(itertools.islice(encoded, len(places) - 1), array("i")) for _, places in bounds]


# Both engines offer the same. `control`: the tokens that only markup may become; `hidden`: those of
# them that `decode` leaves out; `size`: one more than the highest id; `id` and `name` look a single
# token up (None, "" where there is none); `begins_with`: whether the family puts this bos before
# every text; `save` writes the vocabulary's own file.
class SentencePiece:
    """A SentencePiece model; `added` names tokens beyond or instead of its pieces; `strip`:
    decoding drops a first space, as Llama's.
    """

    def __init__(self, model: bytes, added: Mapping[str, int], *, strip: bool = False) -> None:
        import sentencepiece

        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._proto, self._strip = model, strip
        pieces: int = self.pieces.get_piece_size()
        self._names = [self.pieces.id_to_piece(i) for i in range(pieces)]
        # User-defined pieces (score 0) are matched in any text, so those that look like control
        # tokens have to be kept apart.
        self._defined = {
            name
            for i, name in enumerate(self._names)
            if self.pieces.get_score(i) == 0
            and _CONTROL_LIKE.fullmatch(name)
            and not (
                _HTML.fullmatch(name)
                or self.pieces.is_control(i)
                or self.pieces.is_unknown(i)
                or self.pieces.is_byte(i)
            )
        }
        self._cut = _any_of(self._defined)
        own = {
            name: i
            for i, name in enumerate(self._names)
            if self.pieces.is_control(i) or name in self._defined
        }
        self._added = {i: name for name, i in added.items()}
        self.control = {name: i for name, i in own.items() if i not in self._added} | dict(added)
        self.hidden = frozenset(self.control.values()) | frozenset(own.values())
        self.size = max([pieces, *(i + 1 for i in self._added)])

    def encode(self, texts: list[str]) -> list[array[int]]:
        return _encode_cut(
            texts, self._cut, lambda parts: [array("i", ids) for ids in self.pieces.encode(parts)]
        )

    def decode(self, ids: list[int]) -> str:
        text = str(
            self.pieces.decode([i for i in ids if i not in self.hidden and i < len(self._names)])
        )
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

        every = [self.name(i) for i in range(len(self._names))]
        ids = {name: i for i, name in enumerate(every)}
        kinds = (
            self.pieces.is_control,
            self.pieces.is_unknown,
            self.pieces.is_unused,
            self.pieces.is_byte,
        )
        plain = [i for i in range(len(every)) if not any(kind(i) for kind in kinds)]
        names = [every[i] for i in sorted(plain, key=lambda i: -self.pieces.get_score(i))]
        unknown = self._names[self.pieces.unk_id()]
        model = Tokenizer(
            models.BPE(
                ids,
                _merges(names, ids),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback="<0x0A>" in ids,
            )
        )
        prefix = [normalizers.Prepend("▁")] if prefixed(self) else []
        model.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        model.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        text = [
            i
            for i in plain
            if self.pieces.get_score(i) == 0 and every[i] not in self.control and len(every[i]) > 1
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
        self._guarded = {
            t.content
            for t in added.values()
            if not t.special and _MARKUP_TOKEN.fullmatch(t.content)
        }
        self._cut = _any_of(self._guarded)
        self.control = {
            t.content: id for id, t in added.items() if t.special or t.content in self._guarded
        }
        self.hidden = frozenset(id for id, token in added.items() if token.special)
        self.size = max([model.get_vocab_size(), *(id + 1 for id in added)])
        if getattr(model.model, "ignore_merges", False):
            # asks the model with this switched off: not when others may be using it
            _ = self._fragments

    def encode(self, texts: list[str]) -> list[array[int]]:
        fragments = self._fragments if len(texts) > _MANY else None
        return _encode_cut(texts, self._cut, fragments.encode if fragments else self._plain)

    def _plain(self, texts: list[str]) -> list[array[int]]:
        return [
            array("i", encoding.ids)
            for encoding in self.model.encode_batch_fast(texts, add_special_tokens=False)
        ]

    @functools.cached_property
    def _fragments(self) -> Fragments | None:
        """None for what is no plain byte-level BPE with words that are known."""
        from tokenizers import models

        model, normalizer, added = (
            self.model.model,
            self.model.normalizer,
            self.model.get_added_tokens_decoder().values(),
        )
        known = (
            isinstance(model, models.BPE)
            and self.patterns in [(_QWEN,), (_CL100K,)]
            and type(normalizer).__name__ in ("NoneType", "NFC")
        )
        # tokens for text are found before any merges
        if not known or not all(t.special or t.content in self._guarded for t in added):
            return None
        odd = (
            model.dropout,
            model.fuse_unk,
            model.byte_fallback,
            model.continuing_subword_prefix,
            model.end_of_word_suffix,
        )
        names = [
            name
            for name in self.model.get_vocab(with_added_tokens=False)
            if "ÿ" not in name and "\n" not in name
        ]
        # A byte that has no token is left out, and its neighbours meet.
        if any(odd) or not {
            chr(letter) for byte, letter in BYTE_LETTERS.items() if byte < 0xFF
        }.issubset(names):
            return None
        texts = token_texts(names)
        model.ignore_merges, whole = False, model.ignore_merges
        near = (
            i
            for i, text in enumerate(texts)
            if whole and text and (is_ideograph(text[0]) or is_ideograph(text[-1]))
        )
        unmerged = [texts[i] for i in near if len(model.tokenize(names[i])) > 1]
        model.ignore_merges = whole
        unsure = unmerged and (normalizer or any(is_ideograph(text[0]) for text in unmerged))
        return None if unsure else Fragments(self._plain, texts, unmerged)

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


Vocabulary: TypeAlias = SentencePiece | Bpe
Ids: TypeAlias = Mapping[str, int]
Added: TypeAlias = Mapping[str, tuple[int, bool]]  # name -> (id, special)


def prefixed(vocabulary: Vocabulary) -> bool:
    """Whether the vocabulary puts a blank before every text."""
    return vocabulary.name(vocabulary.encode(["x"])[0][0]).startswith("▁")


def _merges(tokens: Iterable[str], known: Ids) -> list[tuple[str, str]]:
    """Every split of a token into two that are `known`, in the order of the tokens."""
    return [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def byte_level(
    ids: Ids,
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


def from_ranks(text: bytes, pattern: str, added: Added, *, nfc: bool) -> Bpe:
    """A tiktoken file (lines of base64 token and rank). Tiktoken takes a word that is a token
    whole; else it merges any neighbours whose union is a token, lowest rank first: every split of a
    token into two tokens is a merge.
    """
    pairs = sorted(
        (int(rank), base64.b64decode(token))
        for token, rank in (line.split() for line in text.splitlines() if line)
    )
    vocabulary = {token.decode("latin-1").translate(BYTE_LETTERS): rank for rank, token in pairs}
    return byte_level(
        vocabulary, _merges(vocabulary, vocabulary), (pattern,), added, nfc=nfc, whole=True
    )


def from_gguf(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary inside a GGUF file. Raises UserError for a model or pre-tokenizer other than
    those known here.
    """
    own = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    tokens, kinds = own.get("tokens", []), own.get("token_type", [])
    if own.get("model") == "gpt2" and (pre := own.get("pre", "default")) in PATTERNS:
        added = {
            token: (i, kind == 3)
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (3, 4)
        }
        plain = {token: i for i, token in enumerate(tokens) if token not in added}
        merges = [(a, b) for a, b in (merge.split(" ") for merge in own["merges"])]
        return byte_level(
            plain, merges, PATTERNS[pre], added, nfc="qwen" in pre, whole=pre in _WHOLE
        )
    if own.get("model") == "llama":
        unknown = own.get("unknown_token_id", 0)
        kinds = [2 if i == unknown else 3 if kind == 2 else kind for i, kind in enumerate(kinds)]
        # as SentencePiece writes them
        scores = [
            0.0 if kind == 4 else score for score, kind in zip(own["scores"], kinds, strict=True)
        ]
        return SentencePiece(_proto(tokens, scores, kinds, own.get("add_space_prefix", True)), {})
    raise UserError(
        "tokenizer.gguf",
        model=own.get("model"),
        pre=own.get("pre"),
        known=", ".join(["llama", *PATTERNS]),
    )


def to_gguf(vocabulary: Vocabulary, rows: int) -> dict[str, Any]:
    """tokenizer.ggml's keys, the reverse of `from_gguf`; cut or filled up to the embedding's
    `rows`.

    Raises UserError for a byte-level vocabulary whose pre-tokenizer has no name known here.
    """
    tokens = [vocabulary.name(i) or f"[PAD{i}]" for i in range(rows)]

    def kinds_by(*own: tuple[int, Callable[[int], bool]]) -> list[int]:
        tests: list[tuple[int, Callable[[int], bool]]] = [
            (5, lambda i: not vocabulary.name(i)),
            (3, vocabulary.hidden.__contains__),
            *own,
        ]
        return [next((kind for kind, test in tests if test(i)), 1) for i in range(rows)]

    if isinstance(vocabulary, SentencePiece):
        model, pieces = vocabulary.pieces, vocabulary.pieces.get_piece_size()
        kinds = kinds_by(
            (2, model.is_unknown),
            (5, model.is_unused),
            (6, model.is_byte),
            (4, lambda i: not model.get_score(i)),
        )
        scores = [model.get_score(i) if i < pieces else -1000.0 for i in range(rows)]
        tokens = [
            token.replace("▁", " ") if kind == 4 else token
            for token, kind in zip(tokens, kinds, strict=True)
        ]
        own = {
            "tokens": tokens,
            "token_type": kinds,
            "scores": scores,
            "add_space_prefix": prefixed(vocabulary),
        }
        return {"model": "llama", "pre": "default", **own}
    state, patterns = json.loads(vocabulary.model.to_str()), vocabulary.patterns
    pre = next((name for name, known in PATTERNS.items() if known == patterns), None)
    if pre is None or state["model"].get("byte_fallback"):
        raise UserError(
            "tokenizer.gguf",
            model=state["model"]["type"],
            pre=patterns,
            known=", ".join(["llama", *PATTERNS]),
        )
    kinds = kinds_by((4, vocabulary.model.get_added_tokens_decoder().__contains__))
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]
    ]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}


def _proto(
    tokens: Iterable[str], scores: Iterable[float], kinds: Iterable[int], prefix: bool
) -> bytes:
    """A SentencePiece ModelProto (BPE, byte fallback, no normalization) in protobuf's wire format;
    GGUF uses its type numbers.
    """

    def varint(value: int) -> bytes:
        return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)

    def field(number: int, value: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(value)) + value

    def flag(number: int, value: int) -> bytes:
        return varint(number << 3) + varint(value)

    def piece(token: str, score: float, kind: int) -> bytes:
        # GGUF writes user-defined ones as they read
        name = token.replace(" ", "▁") if kind == 4 else token
        return (
            field(1, name.encode("utf-8"))
            + varint(2 << 3 | 5)
            + struct.pack("<f", score)
            + flag(3, kind)
        )

    pieces = b"".join(
        field(1, piece(*values)) for values in zip(tokens, scores, kinds, strict=True)
    )
    trainer = flag(3, 2) + flag(35, 1)  # model_type = BPE, byte_fallback
    # add_dummy_prefix, keep white space, escape it
    normalizer = field(1, b"identity") + flag(3, prefix) + flag(4, 0) + flag(5, 1)
    return pieces + field(2, trainer) + field(3, normalizer)


def from_directory(path: Path, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary in a model directory; `config` is its tokenizer_config.json. Raises UserError
    if there is none or it is damaged.
    """
    try:
        return _from_directory(path, config)
    except UserError:
        raise
    except Exception as error:  # both engines raise bare exceptions
        raise UserError("tokenizer.damaged", path=path, detail=error) from error


def _from_directory(path: Path, config: Mapping[str, Any]) -> Vocabulary:
    added = {
        token["content"]: (int(id), bool(token.get("special")))
        for id, token in config.get("added_tokens_decoder", {}).items()
    }
    if (extra := path / "added_tokens.json").is_file():  # older than added_tokens_decoder
        listed = json.loads(extra.read_text(encoding="utf-8"))
        added |= {
            name: (id, bool(_MARKUP_TOKEN.fullmatch(name)))
            for name, id in listed.items()
            if name not in added
        }
    if (ranks := path / "qwen.tiktoken").is_file():
        text = ranks.read_bytes()
        first = len(text.split()) // 2
        added = {name: (first + i, True) for i, name in enumerate(QWEN_TOKENS)}
        return from_ranks(text, _QWEN, added, nfc=True)
    kind = config.get("tokenizer_class", "GPT2Tokenizer").removesuffix("Fast")
    converted = (path / "tokenizer.json").is_file()
    # Beside a tokenizer.json, the original file is the sure one where the authors' own or Llama's
    # slow code reads it.
    slow_llama = config.get("tokenizer_class") == "LlamaTokenizer"
    if (path / "tokenizer.model").is_file() and (
        not converted or "auto_map" in config or slow_llama
    ):
        content = (path / "tokenizer.model").read_bytes()
        if re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", content.split(b"\n", 1)[0]):
            return from_ranks(content, _CL100K, added, nfc=False)
        special = {name: id for name, (id, _) in added.items()}
        if kind == "ChatGLMTokenizer":
            pieces = SentencePiece(content, {}).size
            special = {name: pieces + i for i, name in enumerate(CHATGLM_TOKENS)}
        return SentencePiece(content, special, strip=slow_llama)
    if converted:
        from tokenizers import Tokenizer

        return Bpe(Tokenizer.from_file(str(path / "tokenizer.json")))
    if (
        (path / "vocab.json").is_file()
        and (path / "merges.txt").is_file()
        and kind in ("GPT2Tokenizer", "Qwen2Tokenizer")
    ):
        vocabulary = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
        lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [
            (a, b)
            for a, b in (
                line.split(" ") for line in lines if line and not line.startswith("#version")
            )
        ]
        own = (
            {"<|endoftext|>": (vocabulary["<|endoftext|>"], True)}
            if "<|endoftext|>" in vocabulary
            else {}
        )
        qwen = kind == "Qwen2Tokenizer"
        return byte_level(
            vocabulary, merges, PATTERNS["qwen2" if qwen else "gpt2"], {**own, **added}, nfc=qwen
        )
    raise UserError("tokenizer.missing", path=path)
