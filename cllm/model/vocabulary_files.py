"""Vocabulary files: every format that the families publish, and GGUF's both ways."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cllm.messages import UserError, read_json
from cllm.model.vocabulary import (
    CL100K,
    PATTERNS,
    QWEN,
    WHOLE_WORDS,
    Added,
    Bpe,
    SentencePiece,
    Vocabulary,
    byte_level,
    merges_of,
    prefixed,
)

CHATGLM_TOKENS = (
    "[MASK] [gMASK] [sMASK] sop eop <|system|> <|user|> <|assistant|> <|observation|>"
).split()
QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
)


def from_ranks(text: bytes, pattern: str, added: Added, *, nfc: bool) -> Bpe:
    """A tiktoken file (lines of base64 token and rank). Tiktoken takes a word that is a token
    whole; else it merges any neighbours whose union is a token, lowest rank first: every split of a
    token into two tokens is a merge.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    pairs = sorted(
        (int(rank), base64.b64decode(token))
        for token, rank in (line.split() for line in text.splitlines() if line)
    )
    vocabulary = {token.decode("latin-1").translate(letters): rank for rank, token in pairs}
    return byte_level(
        vocabulary, merges_of(vocabulary, vocabulary), (pattern,), added, nfc=nfc, whole=True
    )


def from_gguf(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary inside a GGUF file. Raises UserError for a model or pre-tokenizer other than
    those known here.
    """
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    tokens, kinds = ggml.get("tokens", []), ggml.get("token_type", [])
    if ggml.get("model") == "gpt2" and (pre := ggml.get("pre", "default")) in PATTERNS:
        added = {
            token: (i, kind == 3)
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (3, 4)
        }
        plain = {token: i for i, token in enumerate(tokens) if token not in added}
        return byte_level(
            plain,
            _merges(ggml["merges"]),
            PATTERNS[pre],
            added,
            nfc="qwen" in pre,
            whole=pre in WHOLE_WORDS,
        )
    if ggml.get("model") == "llama":
        unknown = ggml.get("unknown_token_id", 0)
        kinds = [2 if i == unknown else 3 if kind == 2 else kind for i, kind in enumerate(kinds)]
        return SentencePiece(
            _proto(tokens, ggml["scores"], kinds, ggml.get("add_space_prefix", True)), {}
        )
    raise _unknown(ggml.get("model"), ggml.get("pre"))


def _unknown(model: object, pre: object) -> UserError:
    known = ", ".join(["llama", *PATTERNS])
    return UserError("tokenizer.gguf", model=model, pre=pre, known=known)


def _merges(lines: Iterable[str]) -> list[tuple[str, str]]:
    """ "a b" -> (a, b). Raises ValueError for a line of another form."""
    return [(a, b) for a, b in (line.split(" ") for line in lines)]


def to_gguf(vocabulary: Vocabulary, rows: int) -> dict[str, Any]:
    """tokenizer.ggml's keys, the reverse of `from_gguf`; cut or filled up to the embedding's
    `rows`.

    Raises UserError for a byte-level vocabulary whose pre-tokenizer has no name known here.
    """
    tokens = [vocabulary.name(i) or f"[PAD{i}]" for i in range(rows)]

    def kinds_by(tests: dict[int, Callable[[int], bool]]) -> list[int]:
        def kind_of(i: int) -> int:
            if not vocabulary.name(i):
                return 5
            if i in vocabulary.hidden:
                return 3
            return next((kind for kind, test in tests.items() if test(i)), 1)

        return [kind_of(i) for i in range(rows)]

    if isinstance(vocabulary, SentencePiece):
        model, pieces = vocabulary.pieces, vocabulary.pieces.get_piece_size()
        kinds = kinds_by(
            {
                2: model.is_unknown,
                5: model.is_unused,
                6: model.is_byte,
                4: lambda i: not model.get_score(i),
            }
        )
        return {
            "model": "llama",
            "pre": "default",
            "tokens": [
                token.replace("▁", " ") if kind == 4 else token
                for token, kind in zip(tokens, kinds, strict=True)
            ],
            "token_type": kinds,
            "scores": [model.get_score(i) if i < pieces else -1000.0 for i in range(rows)],
            "add_space_prefix": prefixed(vocabulary),
        }
    bpe = json.loads(vocabulary.model.to_str())["model"]
    pre = next((name for name, known in PATTERNS.items() if known == vocabulary.patterns), None)
    if pre is None or bpe.get("byte_fallback"):
        raise _unknown(bpe["type"], vocabulary.patterns)
    kinds = kinds_by({4: vocabulary.model.get_added_tokens_decoder().__contains__})
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
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
        if kind == 4:  # GGUF writes user-defined ones as they read, SentencePiece without a score
            token, score = token.replace(" ", "▁"), 0.0
        value = varint(2 << 3 | 5) + struct.pack("<f", score)
        return field(1, token.encode("utf-8")) + value + flag(3, kind)

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
    files = {file.name for file in path.iterdir()}
    added = {
        token["content"]: (int(id), bool(token.get("special")))
        for id, token in config.get("added_tokens_decoder", {}).items()
    }
    if "added_tokens.json" in files:  # older than added_tokens_decoder
        listed = read_json(path / "added_tokens.json")
        for name, id in listed.items():
            added.setdefault(name, (id, name.startswith(("<|", "<｜"))))
    if "qwen.tiktoken" in files:
        text = (path / "qwen.tiktoken").read_bytes()
        first = len(text.split()) // 2
        added = {name: (first + i, True) for i, name in enumerate(QWEN_TOKENS)}
        return from_ranks(text, QWEN, added, nfc=True)
    kind = config.get("tokenizer_class", "GPT2Tokenizer").removesuffix("Fast")
    converted = "tokenizer.json" in files
    # Beside a tokenizer.json, the original file is the sure one where the authors' own or Llama's
    # slow code reads it.
    slow_llama = config.get("tokenizer_class") == "LlamaTokenizer"
    original = not converted or "auto_map" in config or slow_llama
    if "tokenizer.model" in files and original:
        content = (path / "tokenizer.model").read_bytes()
        if re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", content.split(b"\n", 1)[0]):
            return from_ranks(content, CL100K, added, nfc=False)
        special = {name: id for name, (id, _) in added.items()}
        if kind == "ChatGLMTokenizer":
            pieces = SentencePiece(content, {}).size
            special = {name: pieces + i for i, name in enumerate(CHATGLM_TOKENS)}
        return SentencePiece(content, special, strip=slow_llama)
    if converted:
        from tokenizers import Tokenizer

        content = (path / "tokenizer.json").read_bytes()
        return Bpe(Tokenizer.from_buffer(content.removeprefix(b"\xef\xbb\xbf")))
    if {"vocab.json", "merges.txt"} <= files and kind in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        vocabulary = read_json(path / "vocab.json")
        lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = _merges(line for line in lines if line and not line.startswith("#version"))
        if "<|endoftext|>" in vocabulary:
            added.setdefault("<|endoftext|>", (vocabulary["<|endoftext|>"], True))
        qwen = kind == "Qwen2Tokenizer"
        patterns = PATTERNS["qwen2" if qwen else "gpt2"]
        return byte_level(vocabulary, merges, patterns, added, nfc=qwen)
    raise UserError("tokenizer.missing", path=path)
