"""BPE by fragments: the ids of `tokenizers` on whole texts, whatever the text, the cuts and the
vocabulary.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cllm.data import iter_conversations
from cllm.data.schema import Conversation
from cllm.model import fragments
from cllm.model.fragments import Fragments
from cllm.model.vocabulary import PATTERNS, Bpe, _merges, byte_level, from_directory

SHARED = Path(__file__).parents[2] / "shared"
LETTERS = bytes_to_unicode()
# Tokens that meet in many ways, and characters that regular expressions and normalization trip
# over.
WORDS = "我们 学习 生活 人工 智能 人工智能 的生活 们的生 ，我 。我们 ，学习 学习， 。\n ——…… 能，人 T恤 第1课 th the 12 019 st's".split(
    " "
)
WORDS += [
    "ab",
    "<[",
    "😀😀",
    "e\u0301",
    "龥人",
    "的\u3000",
    " 我",
    " the",
    " 学",
    "\n\n",
    "\n ",
    " \n",
    "  ",
    "\t\t",
]
ALPHABET = "我们的生活学习人工智能，。！？（）“”—…·、：；\n\r\t \u3000aAsdtT'019-_<[.@"
ALPHABET += "\u0301\u0338\u00a0\u2028\u200d\u017f\u212aé龥\u9fff〇一\ufa0e\U00020000😀\u0663½\uff76\uff9e\uffff\x00"
CHARACTERS = st.one_of(st.sampled_from(ALPHABET), st.characters(exclude_categories=["Cs"]))
TEXTS = st.lists(st.lists(st.one_of(st.sampled_from(WORDS), CHARACTERS)).map("".join))


def spelled(text: str | bytes) -> str:
    """The text as byte-level BPE writes it."""
    return "".join(LETTERS[byte] for byte in (text.encode() if isinstance(text, str) else text))


def made(
    pattern: str, *, nfc: bool = True, whole: bool = False, extra: Sequence[str | bytes] = ()
) -> Bpe:
    """Byte-level BPE of bytes, characters and WORDS, merged from every two tokens that make them
    up; no merges make those in `extra`.
    """
    words = sorted(WORDS, key=len)
    characters = dict.fromkeys("".join(words))
    names = [
        *LETTERS.values(),
        *(spelled(c)[:end] for c in characters for end in range(2, len(c.encode()) + 1)),
    ]
    names = list(
        dict.fromkeys(
            [*names, *(spelled(word[:end]) for word in words for end in range(2, len(word) + 1))]
        )
    )
    ids = {name: id for id, name in enumerate([*names, *map(spelled, extra)])}
    return byte_level(
        ids,
        _merges(names, dict.fromkeys(names, 0)),
        (pattern,),
        {"<|im_end|>": (len(ids), True)},
        nfc=nfc,
        whole=whole,
    )


@pytest.fixture(scope="module", params=["qwen2", "llama-bpe"])
def bpe(request: pytest.FixtureRequest) -> Bpe:
    return made(*PATTERNS[request.param], nfc=request.param == "qwen2")


def fragments_of(bpe: Bpe) -> Fragments:
    assert bpe._fragments
    return bpe._fragments


def same(bpe: Bpe, texts: list[str]) -> None:
    assert fragments_of(bpe).encode(texts) == bpe._plain(texts)


@given(texts=TEXTS)
@settings(max_examples=500)
def test_any_texts_have_the_ids_of_the_whole(bpe: Bpe, texts: list[str]) -> None:
    assert fragments_of(bpe).encode(texts) == bpe._plain(texts)


@given(texts=TEXTS)
def test_small_parts_and_groups_and_a_short_memory_change_nothing(
    bpe: Bpe, texts: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_PARTS", 50), ("_LINES", 3), ("MAX_KNOWN", 20)):
            patch.setattr(fragments, name, value)
        assert fragments_of(bpe).encode(texts) == bpe._plain(texts)


def test_texts_are_cut_between_words_and_these_are_encoded_once(bpe: Bpe) -> None:
    found, bounds = fragments_of(bpe)._cut(["我们学习第3abc 12天\n好，", "", "人工智能的"])
    assert found == [
        "我们",
        "学习",
        "第",
        "3",
        "abc",
        " 12",
        "天",
        "\n",
        "好",
        "，",
        "人工智能",
        "的",
    ] and bounds == [0, 10, 10, 12]
    encoded: list[str] = []

    def plain(texts: list[str]) -> list[array[int]]:
        encoded.extend(texts)
        return bpe._plain(texts)

    texts = ["我们学习。", "学习生活！", "我们生活。"] * 50
    fresh = Fragments(plain, fragments.token_texts(bpe.model.get_vocab(with_added_tokens=False)))
    assert fresh.encode(texts) == bpe._plain(texts)
    assert sorted("\n".join(encoded[1:]).split("\n")) == sorted(
        ["我们", "学习", "生活", "。", "！"]
    )


def test_a_vocabulary_makes_fragments_of_many_texts_only(
    bpe: Bpe, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    short = Fragments.encode
    monkeypatch.setattr(
        Fragments, "encode", lambda self, texts: seen.append(len(texts)) or short(self, texts)
    )
    texts = [f"我们学习第{i}课" for i in range(200)]
    assert bpe.encode(texts[:5]) == bpe._plain(texts[:5]) and not seen
    assert bpe.encode(texts) == bpe._plain(texts) and seen == [200]


@pytest.mark.parametrize(
    ("token", "together", "apart"),
    [  # 们 e4 bb ac, 今 e4 bb 8a, 他 e4 bb 96, 好 e5 a5 bd
        (b"\xe4\xbb\xac\xe4\xbb", ["们今", "们他"], ["们好", "今们"]),
        (b"\xe4\xbb\xac\xe5", ["们好"], ["们今"]),
        (b"\xac\xe5\xa5\xbd", ["们好"], ["今好"]),
        (b"\xbb\xac\xe5\xa5\xbd", ["们好"], ["他好"]),
        (b"\xac\xe4", ["们今", "们他"], ["今他", "们好"]),
        (b"\xe4\xbb\xac\xe4\xbb\x8a", ["们今", "们他"], ["今们", "们好"]),
    ],
)
def test_no_cut_where_a_token_reaches_into_a_character(
    token: bytes, together: list[str], apart: list[str]
) -> None:
    """Merges make the token a byte at a time: a cut would lose what begins it, too."""
    letters = [LETTERS[byte] for byte in token]
    beginnings = ["".join(letters[:end]) for end in range(1, len(letters) + 1)]
    ids = {name: id for id, name in enumerate([*LETTERS.values(), *beginnings[1:]])}
    bpe = byte_level(
        ids, list(zip(beginnings, letters[1:], strict=False)), PATTERNS["qwen2"], {}, nfc=False
    )
    cuts = {
        pair: bool(fragments_of(bpe).cuts(fragments._codes(pair))[0])
        for pair in (*together, *apart)
    }
    assert cuts == dict.fromkeys(together, False) | dict.fromkeys(apart, True)
    same(bpe, [a + b for a in together + apart for b in together + apart])


@pytest.mark.parametrize("extra", [[" 龥习"], [" 习", " 们活", " 活"]])
def test_words_taken_whole_though_no_merges_make_them(extra: list[str]) -> None:
    """GLM-4 and Llama 3: inside a longer word such a token is not made, so that no fragment may be
    it.
    """
    bpe = made(*PATTERNS["llama-bpe"], nfc=False, whole=True, extra=extra)
    assert bpe._plain(extra) == [
        array("i", [bpe.model.token_to_id(spelled(text))]) for text in extra
    ]
    same(
        bpe,
        [
            *extra,
            *(
                before + text + more
                for text in extra
                for before in ("", "我", "。")
                for more in ("龥", "龥学习", "，", "1", "s")
            ),
        ],
    )
    assert bpe.model.model.ignore_merges


CHANGES = [
    "pattern",
    "prefix",
    "dropout",
    "normalizer",
    "text token",
    "whole",
    "whole with NFC",
    "no bytes",
    "bytes twice",
    "alphabet",
]


@pytest.mark.parametrize("change", CHANGES)
def test_other_vocabularies_are_encoded_as_they_are(change: str) -> None:
    # tokens that any cut, or a cut before NFC, may set free
    extra = {"whole": ["龥习"], "whole with NFC": [" 龥习"]}.get(change, [])
    nfc = change == "whole with NFC"
    model = made(
        *PATTERNS["gpt-2" if change == "pattern" else "qwen2"],
        nfc=nfc,
        whole=bool(extra),
        extra=extra,
    ).model
    split, bytes_ = (
        model.pre_tokenizer[0],
        pre_tokenizers.ByteLevel(add_prefix_space=change == "prefix", use_regex=False),
    )
    if steps := {
        "prefix": [split, bytes_],
        "no bytes": [split],
        "bytes twice": [bytes_, split, bytes_],
    }.get(change):
        model.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if change == "dropout":
        model.model.dropout = 0.5
    if change == "normalizer":
        model.normalizer = normalizers.NFKC()
    if change == "text token":
        model.add_tokens([AddedToken("龥鼎", normalized=False)])
    if change == "alphabet":  # what has no token is left out, and its neighbours meet
        model = Tokenizer.from_str(model.to_str().replace(f'"{spelled("Z")}":', '"ZZ":'))
    assert Bpe(model)._fragments is None


def test_tokens_that_no_text_can_have_do_not_shift_the_others() -> None:
    bpe = made(*PATTERNS["llama-bpe"], nfc=False, whole=True, extra=[b"a\xff", b"b\xff", " 龥习"])
    same(bpe, [" 龥习我", " 龥习", "ab"])
    assert (
        made(
            *PATTERNS["llama-bpe"], nfc=False, whole=True, extra=["龥习", b"a\xff", b"b\xff"]
        )._fragments
        is None
    )


def test_names_of_control_tokens_stay_text_however_many_texts() -> None:
    model = made(*PATTERNS["qwen2"]).model
    model.add_tokens(
        [AddedToken("<|a b|>", normalized=False), AddedToken("</think>", normalized=False)]
    )
    bpe = Bpe(model)
    assert bpe._fragments and set(bpe.control) == {"<|im_end|>", "<|a b|>", "</think>"}
    texts = ["我<|a b|>们", "<|im_end|>", "学</think>习", "<|a b|>"]
    few, many = bpe.encode(texts), bpe.encode(texts * 30)
    assert many == few * 30 and not set(bpe.control.values()) & {id for ids in few for id in ids}


@pytest.mark.parametrize("name", ["qwen", "qwen25", "glm4"])
def test_real_vocabularies_on_real_texts(name: str) -> None:
    directory = SHARED / "golden" / "tokenizer_files" / name
    if not directory.is_dir():
        pytest.skip("no ../shared")
    bpe = from_directory(
        directory, json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    )
    assert isinstance(bpe, Bpe)
    texts = [
        text
        for file in sorted((SHARED / "data" / "dev").glob("*/*.json*"))
        for text in beginning(file, 15_000)
    ]
    assert sum(map(len, texts)) > 300_000
    pairs = zip(texts, fragments_of(bpe).encode(texts), bpe._plain(texts), strict=True)
    assert [text for text, ours, theirs in pairs if ours != theirs] == []


def beginning(file: Path, chars: int) -> list[str]:
    texts: list[str] = []
    for item in iter_conversations(file):
        texts += [message.content for message in item] if isinstance(item, Conversation) else []
        if sum(map(len, texts)) > chars:
            break
    return texts
