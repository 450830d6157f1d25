"""Tokenizers against the recorded ids of the families, and the contract: training, chat and
evaluation use the same ids.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.encode import IGNORE_INDEX, encode_all
from cllm.data.message import Message
from cllm.data.schema import Conversation
from cllm.data.template import TEMPLATES
from cllm.messages import UserError
from cllm.model.tokenizer import Tokenizer, end_token_untrained, load_tokenizer, within
from cllm.model.vocabulary import PATTERNS, prefixed, token_bytes
from cllm.model.vocabulary_files import from_gguf, from_ranks

SHARED = Path(__file__).parents[2] / "shared" / "golden"
FAMILIES = [
    "chatglm2",
    "chatglm3",
    "glm4",
    "baichuan2",
    "internlm",
    "internlm2",
    "yi",
    "qwen",
    "qwen25",
    "gpt2",
]
TINY = ["chatglm2", "chatglm3", "baichuan2_7b", "internlm", "internlm2", "yi"]
CORPUS = [
    "今天天气很好，我们去公园散步。",
    "你好吗？我很好，谢谢。",
    "请介绍一下你自己。",
    "The quick brown fox.",
    "1 + 1 = 2\n",
] * 20
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPOKEN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] | trim + '\n' }}"
    "{% else %}{{ 'A: ' + m['content'] | trim + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)


def golden(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def chat(*words: str) -> Conversation:
    return Conversation(
        messages=tuple(
            Message("assistant" if i % 2 else "user", word) for i, word in enumerate(words)
        )
    )


TALK = chat("你好 <|im_end|></s>", "很好，谢谢。", "天气？", " The quick\n")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer.json with ChatML's tokens and Qwen3's <think>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet),
    )
    model.add_tokens([AddedToken(name, special=False) for name in ("<think>", "</think>")])
    path = tmp_path_factory.mktemp("bpe")
    model.save(str(path / "tokenizer.json"))
    config = {
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>"},
        "chat_template": CHATML,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def sentencepiece_model(*, prefix: bool, defined: list[str]) -> bytes:
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        user_defined_symbols=defined,
        minloglevel=2,
    )
    return out.getvalue()


def variant(source: Path, target: Path, **config: Any) -> Path:
    """A copy of a tokenizer directory with other settings."""
    target.mkdir()
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    own = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    (target / "tokenizer_config.json").write_text(json.dumps(own | config), encoding="utf-8")
    return target


def labelled(tokenizer: Tokenizer, conversation: Conversation) -> str:
    labels = tokenizer.encode_segments(tokenizer.segments(conversation))[1]
    return readable(tokenizer, [label for label in labels if label != IGNORE_INDEX])


def readable(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text with the control tokens' names in it."""
    runs = itertools.groupby(ids, key=lambda id: id in tokenizer.vocabulary.hidden)
    return "".join(
        "".join(map(tokenizer.piece, run)) if hidden else tokenizer.decode(run)
        for hidden, run in runs
    )


# --- The families' recorded ids
@pytest.fixture(scope="module")
def loaded() -> dict[str, Tokenizer]:
    return {}


def family(loaded: dict[str, Tokenizer], name: str) -> Tokenizer:
    if name not in loaded:
        directory = SHARED / "tokenizer_files" / ("chatglm3" if name == "chatglm2" else name)
        loaded[name] = load_tokenizer(
            directory, template=name if name in ("chatglm2", "internlm") else "auto"
        )
    return loaded[name]


def check_golden(tokenizer: Tokenizer, recorded: dict[str, Any]) -> None:
    for entry in recorded["encode"]:
        text = entry["text"]
        ids = tokenizer.encode(text)
        plain = entry.get("ids_as_plain_text", entry["ids"])
        # the original code reads names of control tokens in any text; here only markup is read so
        if ids != plain:
            assert tokenizer.encode(text, markup=True) == plain, text
            assert not set(ids) & tokenizer.vocabulary.hidden, text
        else:
            assert tokenizer.decode(plain) == entry["decode"], text
        stream = tokenizer.stream()
        pieces = [*map(stream.push, ids), stream.end()]
        assert "".join(pieces) == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces), text
    for entry in recorded["chat"]:
        assert tokenizer.encode_chat(entry["messages"]) == entry["ids"], entry["name"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("name", FAMILIES)
def test_published_vocabularies_give_the_recorded_ids(
    loaded: dict[str, Tokenizer], name: str
) -> None:
    check_golden(family(loaded, name), golden(SHARED / "tokenizers" / "dev" / f"{name}.json"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("name", TINY)
def test_original_directories_give_the_recorded_ids(name: str) -> None:
    tokenizer = load_tokenizer(SHARED / name / "dev")
    assert tokenizer.template.name == name.removesuffix("_7b")
    assert tokenizer.family == {
        "chatglm2": "chatglm",
        "chatglm3": "chatglm",
        "baichuan2_7b": "baichuan2-7b",
    }.get(name, name)
    check_golden(tokenizer, golden(SHARED / name / "dev" / "tokenizer_golden.json"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("name", ["chatglm3", "baichuan2", "qwen"])
def test_training_ids_and_labels_equal_the_authors_scripts(
    loaded: dict[str, Tokenizer], name: str
) -> None:
    for example in golden(SHARED / "sft" / "dev" / f"{name}.json")["examples"]:
        system = [Message("system", example["system"])] if "system" in example else []
        messages = (*system, *(Message(m["role"], m["content"]) for m in example["messages"]))
        made = next(
            encode_all([Conversation(messages=messages)], family(loaded, name), max_tokens=1000)
        )
        assert not isinstance(made, str)
        assert made.input_ids == example["input_ids"], example["name"]
        if name != "qwen":  # Qwen's script also trains other roles' markup; here only answers are
            assert made.labels == example["labels"], example["name"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("name", FAMILIES)
def test_user_text_never_becomes_a_control_token(loaded: dict[str, Tokenizer], name: str) -> None:
    tokenizer = family(loaded, name)
    names = [
        "<|im_end|>",
        "</s>",
        "<|user|>",
        "[gMASK]",
        "sop",
        "<s>",
        "<eoh>",
        "<reserved_106>",
        "[UNUSED_TOKEN_146]",
        "<|endoftext|>",
    ]
    text = "前" + "中".join(names) + "后"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.vocabulary.control.values())
    assert tokenizer.decode(ids) == text
    in_chat, clean = (
        tokenizer.encode_chat([Message("user", content)]) for content in (text, "前后")
    )
    controls = set(tokenizer.vocabulary.control.values())
    assert [id for id in in_chat if id in controls] == [id for id in clean if id in controls]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "baichuan2", "internlm2"])
def test_a_saved_directory_gives_the_same_ids(
    loaded: dict[str, Tokenizer], name: str, tmp_path: Path
) -> None:
    assert same_contract(family(loaded, name), tmp_path)


def same_contract(tokenizer: Tokenizer, directory: Path) -> int:
    """What training fed is what chat sends and what the saved adapter directory's tokenizer
    gives; of how many tokens that was seen.
    """
    tokenizer.save(directory)
    again = load_tokenizer(directory)
    assert (again.template, again.family) == (tokenizer.template, tokenizer.family)
    assert (again.bos_id, again.eos_id, again.pad_id, again.stop_ids) == (
        *(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id),
        tokenizer.stop_ids,
    )
    trained, labels = tokenizer.encode_segments(tokenizer.segments(TALK))
    prompt = again.encode_chat(TALK.messages[:-1])
    assert trained[: len(prompt)] == prompt
    assert labels[len(prompt)] != IGNORE_INDEX
    assert [label for label in labels if label != IGNORE_INDEX][-1] in again.stop_ids
    return len(prompt)


# --- Our own small vocabularies: the same without ../shared
@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"qwen3", "qwen3.5", "text"}))
def test_training_and_chat_agree_for_every_template(bpe: Path, name: str, tmp_path: Path) -> None:
    assert same_contract(load_tokenizer(bpe, template=name), tmp_path)


def test_the_chat_template_chooses_among_ours(bpe: Path, tmp_path: Path) -> None:
    assert load_tokenizer(bpe).template.name == "chatml"
    assert (
        load_tokenizer(variant(bpe, tmp_path / "none", chat_template=None)).template.name
        == "chatml"
    )
    assert (
        load_tokenizer(variant(bpe, tmp_path / "other", chat_template=SPOKEN)).template.name
        == "native"
    )


def test_added_tokens_that_are_not_special_are_the_words_own(bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe, template="qwen3", thinking="keep")
    think = tokenizer.vocabulary.control["<think>"]
    ids = tokenizer.encode_chat(
        [Message("user", "<think>"), Message("assistant", "<think>\n想\n</think>\n\n好")],
        open_turn=False,
    )
    assert ids.count(think) == 2  # as the families' own tokenizers have it
    assert tokenizer.encode("a<think>b")[1:-1] == [think]
    assert tokenizer.vocabulary.control["<|im_end|>"] not in tokenizer.encode("a<|im_end|>b")
    assert tokenizer.decode(ids) == "user\n<think>\nassistant\n<think>\n想\n</think>\n\n好\n"


def test_an_end_token_that_the_vocabulary_lacks_becomes_its_own(bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe, template="alpaca")
    assert tokenizer.template.end == "<|im_end|>"
    assert labelled(tokenizer, chat("问", "答")) == "答<|im_end|>"


def test_with_stop_ends_answers_with_the_end_of_text(bpe: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bpe).with_stop()
    assert labelled(tokenizer, chat("问", "答")) == "答<|endoftext|>"
    same_contract(tokenizer, tmp_path)


def test_an_unknown_template_names_the_known_ones(bpe: Path) -> None:
    with pytest.raises(UserError, match=r"no template 'chatlm'.*chatglm3"):
        load_tokenizer(bpe, template="chatlm")


def test_missing_and_damaged_files_are_named(bpe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ', encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.damaged"):
        load_tokenizer(tmp_path)
    broken = variant(bpe, tmp_path / "saved")
    (broken / "template.json").write_text('{"template": {"name": "x"}}', encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.damaged.*template\.json"):
        load_tokenizer(broken)


# --- The tokenizer's own chat_template
def test_a_foreign_chat_template_is_trained_on_its_answers(bpe: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(variant(bpe, tmp_path / "spoken", chat_template=SPOKEN))
    ids, _ = tokenizer.encode_segments(tokenizer.segments(TALK))
    assert readable(tokenizer, ids).startswith("Q: 你好 <|im_end|></s>\nA: ")
    assert ids.count(tokenizer.eos_id) == 2  # the user's own <|im_end|> is none
    assert labelled(tokenizer, TALK) == "很好，谢谢。<|im_end|>The quick<|im_end|>"
    same_contract(tokenizer, tmp_path / "adapter")
    assert (
        labelled(tokenizer.with_stop(), TALK) == "很好，谢谢。<|endoftext|>The quick<|endoftext|>"
    )


def test_a_chat_template_that_changes_earlier_text_is_refused(bpe: Path, tmp_path: Path) -> None:
    counting = "{{ messages | length }}" + SPOKEN
    tokenizer = load_tokenizer(variant(bpe, tmp_path / "counting", chat_template=counting))
    assert tokenizer.encode_chat([Message("user", "问")])
    with pytest.raises(UserError, match=r"tokenizer\.prefix"):
        tokenizer.segments(chat("问", "答"))


def test_a_chat_template_s_own_refusal_is_passed_on(bpe: Path, tmp_path: Path) -> None:
    strict = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('no system role here') }}{% endif %}" + SPOKEN
    )
    tokenizer = load_tokenizer(variant(bpe, tmp_path / "strict", chat_template=strict))
    with pytest.raises(UserError, match="no system role here"):
        tokenizer.encode_chat([Message("system", "规矩"), Message("user", "问")])


# --- Vocabularies
@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    (path / "tokenizer.model").write_bytes(
        sentencepiece_model(prefix=True, defined=["<reserved_106>", "<table>"])
    )
    (path / "tokenizer_config.json").write_text(
        '{"eos_token": "</s>", "bos_token": "<s>"}', encoding="utf-8"
    )
    return path


def test_sentencepiece_user_defined_names_are_text_and_html_stays_a_piece(llama: Path) -> None:
    tokenizer = load_tokenizer(llama, template="plain")
    assert tokenizer.encode("<table>").count(tokenizer.vocabulary.id("<table>")) == 1
    assert tokenizer.vocabulary.control["<reserved_106>"] not in tokenizer.encode(
        "去<reserved_106>"
    )
    assert tokenizer.encode("<reserved_106>", markup=True) == [
        tokenizer.vocabulary.control["<reserved_106>"]
    ]


def test_a_vocabulary_that_puts_a_space_before_strings_gets_no_second_one(
    llama: Path, tmp_path: Path
) -> None:
    """Llama 2 reads `[/INST] answer` as one string; the answer is encoded apart and must not gain a
    space.
    """
    tokenizer = load_tokenizer(llama, template="llama2")
    ids, _ = tokenizer.encode_segments(tokenizer.segments(chat("你好吗", "我很好")))
    bos, eos = tokenizer.vocabulary.control["<s>"], tokenizer.vocabulary.control["</s>"]
    assert ids == [bos, *tokenizer.encode("[INST] 你好吗 [/INST] 我很好 "), eos]
    same_contract(tokenizer, tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "llama"])
def test_the_bytes_of_tokens_join_to_the_text(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Byte-level, SentencePiece, and a tokenizer.json made from the latter."""
    tokenizer = load_tokenizer(request.getfixturevalue(kind), template="text")
    tokenizer.vocabulary.save_json(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}', encoding="utf-8")
    vocabularies = [tokenizer.vocabulary]
    if kind == "llama":
        vocabularies.append(load_tokenizer(tmp_path, template="text").vocabulary)
    text = '今天 {"a": 1}\n  🀄 é\t<0x41>'
    for vocabulary in vocabularies:
        ids = vocabulary.encode([text])[0]
        joined = b"".join(token_bytes(vocabulary, id) for id in ids).decode()
        assert joined.removeprefix(" " if prefixed(vocabulary) else "") == text


def test_the_vocabulary_s_bos_opens_plain_texts(llama: Path) -> None:
    tokenizer = load_tokenizer(llama, template="text")
    document = Conversation(messages=(Message("assistant", "今天天气很好"),))
    ids, labels = tokenizer.encode_segments(tokenizer.segments(document))
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    assert labels[1:] == ids[1:]


def gguf_metadata(model: str, **own: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in {"model": model, **own}.items()}


def test_gguf_sentencepiece_equals_the_model_it_was_made_from(llama: Path) -> None:
    import sentencepiece

    tokenizer = load_tokenizer(llama, template="plain")
    source = sentencepiece.SentencePieceProcessor(
        model_proto=(llama / "tokenizer.model").read_bytes()
    )
    ids = range(source.get_piece_size())
    names = {
        **dict.fromkeys(ids, 1),
        **{i: 6 for i in ids if source.is_byte(i)},
        **{i: 3 for i in ids if source.is_control(i)},
    }
    names |= {
        source.unk_id(): 2,
        source.piece_to_id("<table>"): 4,
        source.piece_to_id("<reserved_106>"): 4,
    }
    tokens, scores = [source.id_to_piece(i) for i in ids], [source.get_score(i) for i in ids]
    made = from_gguf(
        gguf_metadata(
            "llama",
            tokens=tokens,
            scores=scores,
            token_type=[names[i] for i in ids],
            unknown_token_id=source.unk_id(),
        )
    )
    texts = [*CORPUS[:5], " 空格  多", "生僻字龘", "<table>", "<reserved_106>", ""]
    assert made.encode(texts) == tokenizer.vocabulary.encode(texts)
    assert made.control == tokenizer.vocabulary.control


def test_gguf_byte_level_bpe_equals_tokenizer_json(bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe)
    stored = json.loads((bpe / "tokenizer.json").read_text(encoding="utf-8"))
    size = tokenizer.vocab_size
    kinds = [3 if i in tokenizer.vocabulary.hidden else 1 for i in range(size)]
    merges = [" ".join(pair) for pair in stored["model"]["merges"]]
    names = [tokenizer.vocabulary.name(i) for i in range(size)]
    made = from_gguf(
        gguf_metadata("gpt2", pre="gpt-2", tokens=names, token_type=kinds, merges=merges)
    )
    texts = [*CORPUS[:5], "don't  stop\n\n1234", "😀龘", "<|im_end|>"]
    assert made.encode(texts) == tokenizer.vocabulary.encode(texts)
    with pytest.raises(UserError, match=r"tokenizer\.gguf.*strange"):
        from_gguf(gguf_metadata("gpt2", pre="strange", tokens=[], token_type=[], merges=[]))


def test_rank_files_take_whole_words_and_the_lowest_rank_first() -> None:
    import base64

    # xyz cannot be merged from its parts
    ranks = [bytes([i]) for i in range(256)] + [b"ab", b"bc", b"abc", b"cab", b"xyz"]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks))
    made = from_ranks(lines, PATTERNS["llama3"][0], {"<|end|>": (len(ranks), True)}, nfc=False)
    ids = [found.tolist() for found in made.encode(["abc", "cab", "xyz", "xyzx", "<|end|>"])]
    assert ids[:4] == [[258], [259], [260], [120, 121, 122, 120]]
    assert made.control == {"<|end|>": 261}


# --- Streaming
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streams_join_to_the_whole_text_whatever_the_ids(
    bpe: Path, llama: Path, data: st.DataObject
) -> None:
    tokenizer = load_cached(data.draw(st.sampled_from([bpe, llama])))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = tokenizer.stream()
    pieces = [*map(stream.push, ids), stream.end()]
    assert "".join(pieces) == tokenizer.decode(ids)


_CACHE: dict[Path, Tokenizer] = {}


def load_cached(path: Path) -> Tokenizer:
    return _CACHE.setdefault(path, load_tokenizer(path, template="plain"))


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(blacklist_categories=["Cs"]), max_size=20))
def test_text_comes_back_and_streams_without_broken_characters(bpe: Path, text: str) -> None:
    tokenizer = load_cached(bpe)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    pieces = [*map(stream.push, ids), stream.end()]
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_a_reply_in_chatglm_s_format_loses_the_blank_before_its_words(bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe, template="chatglm3")
    stream = tokenizer.stream(reply=True)
    assert "".join(map(stream.push, tokenizer.encode("\n 你好\n"))) + stream.end() == "你好\n"


# --- Preflight
def test_an_end_token_like_rows_never_trained_is_noticed(bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe)
    torch.manual_seed(0)
    rows = torch.randn(tokenizer.vocab_size + 40, 16)
    rows[tokenizer.vocab_size :] = 0.3 + 0.01 * torch.randn(40, 16)
    end = tokenizer.vocabulary.control["<|im_end|>"]
    assert not end_token_untrained(tokenizer, rows)
    rows[end] = 0.3 + 0.01 * torch.randn(16)
    assert end_token_untrained(tokenizer, rows)
    assert end_token_untrained(tokenizer, torch.randn_like(rows), rows)  # in the head alone
    # nothing to compare with
    assert not end_token_untrained(tokenizer, rows[: tokenizer.vocab_size])
    assert not end_token_untrained(tokenizer.with_stop(), rows)


def with_added(source: Path, target: Path, **names: bool) -> Tokenizer:
    """The tokenizer of `source` with further tokens (name -> special)."""
    shutil.copytree(source, target)
    file = target / "tokenizer.json"
    contents = json.loads(file.read_text(encoding="utf-8"))
    rows = load_tokenizer(source).vocab_size
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    contents["added_tokens"] += [
        {"id": id, "content": name, "special": special, **plain}
        for id, (name, special) in enumerate(names.items(), rows)
    ]
    file.write_bytes(json.dumps(contents).encode("utf-8-sig"))
    return load_tokenizer(target)


def test_ids_without_a_row_are_named_unless_they_never_occur(bpe: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bpe)
    rows = tokenizer.vocab_size
    assert within(tokenizer, rows) is tokenizer is within(tokenizer, rows + 64)  # padded rows
    with pytest.raises(UserError, match=r"\(200\)") as caught:
        within(tokenizer, 200)
    assert caught.value.code == "tokenizer.beyond"
    words = with_added(bpe, tmp_path / "words", 新词=False, unused=True)
    with pytest.raises(UserError, match=rf"none for 1 tokens.*: 新词 \({rows}\)"):
        within(words, rows)
    # as in Llama's vocabularies: a pad token that only ever pads needs no row
    padded = replace(with_added(bpe, tmp_path / "pad", **{"[PAD]": True}), pad_id=rows)
    assert within(padded, rows).pad_id == padded.eos_id
    marked = with_added(bpe, tmp_path / "marked", **{"<|turn|>": True})
    template = replace(marked.template, end="<|turn|>")
    with pytest.raises(UserError, match=r"<\|turn\|>"):
        within(replace(marked, template=template), rows)
