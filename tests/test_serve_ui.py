"""The page without a browser: its handlers called as Gradio calls them, and the HTML that it
serves. bench/browser.py has the rest.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from serving import open_tiny, open_two

from cllm.assembly import Loaded
from cllm.data.message import Message
from cllm.data.template import TEMPLATES
from cllm.messages import UserError
from cllm.runs import locked
from cllm.serve import training
from cllm.serve.answer import Answer
from cllm.serve.api import build_app
from cllm.serve.charts import Line, chart
from cllm.serve.compare import VOTES, Duel
from cllm.serve.guard import BODY_BYTES, HEADERS, Guard
from cllm.serve.sampling import Sampling
from cllm.serve.ui import build_page, mount_page

GREEDY = (24, 0.0, 1.0, 50, 0.0, 1.0, 1.0, None)  # the settings in their order


class Page:
    """The mounted page; `call(name, …)` runs an event handler by its name, a generator to its last
    value.
    """

    def __init__(self, loaded: Loaded, questions: Any = ()) -> None:
        self.loaded, self.engine = loaded, loaded.engine()
        self.app = mount_page(build_app(loaded, self.engine), loaded, self.engine, questions)
        self.blocks = build_page(str, loaded, self.engine, questions)

    def handlers(self, name: str) -> list[Any]:
        return [
            function.fn
            for function in self.blocks.fns.values()
            if function.fn is not None and function.name == name
        ]

    def call(self, name: str, *arguments: Any, index: int = 0) -> Any:
        result = self.handlers(name)[index](*arguments)
        if hasattr(result, "__anext__"):
            return asyncio.run(last(result))
        return asyncio.run(result) if hasattr(result, "__await__") else result

    def respond(
        self, request: Any, history: Any, name: str = "demo", system: str = "", seed: Any = None
    ) -> tuple[Any, Any]:
        """The conversation and the line below it, as they are shown at last."""
        seen: dict[str, Any] = {}
        self.call("ask", request, "…", history[:-1], "", [], "b")

        async def watch() -> None:
            generator = self.handlers("respond")[0](
                request, history, name, system, False, *GREEDY[:-1], seed
            )
            async for update in generator:
                seen.update(
                    {type(component).__name__: value for component, value in update.items()}
                )

        asyncio.run(watch())
        return seen.get("Chatbot"), seen.get("Markdown")

    def settled(self, name: str, typed: str, history: Any) -> dict[str, Any]:
        """What is set when an answer has ended, by itself or by the stop button."""
        updates = self.call(name, browser(), typed, history)
        return {type(component).__name__: value for component, value in updates.items()}

    def greedy(self, words: str, *, adapter: int, system: str = "") -> str:
        messages = [Message("system", system)] * bool(system) + [Message("user", words)]
        prompt = self.loaded.tokenizer.encode_chat(messages)
        return self.loaded.tokenizer.decode(
            self.loaded.engine().generate([prompt], Sampling(max_new_tokens=24), adapter)[0]
        )


def browser(language: str = "") -> Any:
    return SimpleNamespace(headers={"accept-language": language}, session_hash="s1")


async def last(values: AsyncIterator[Any]) -> Any:
    return [value async for value in values][-1]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Page(open_two(tmp_path_factory.mktemp("ui")))
    yield made
    made.engine.close()


def test_chat_answers_with_the_chosen_model_and_says_its_cost(page: Page) -> None:
    # as Gradio hands a turn back
    said = [{"role": "user", "content": [{"type": "text", "text": "你好"}]}]
    for name, adapter in (("demo", 1), ("other", 2), ("base", 0)):
        for language, text in (
            ("zh-CN,zh;q=0.9", r"首词元 \d+\.\d\d 秒 · \d+ 词元/秒 · \d+ / 1,024 词元"),
            ("en-US", r"first token .* tok/s .*"),
        ):
            shown, cost = page.respond(browser(language), [dict(said[0])], name, " 你是助手 ")
            assert shown[-1] == {
                "role": "assistant",
                "content": page.greedy("你好", adapter=adapter, system="你是助手"),
            }
            assert re.fullmatch(text, cost)


def test_reasoning_is_folded_and_not_said_again(page: Page) -> None:
    chatbot = next(
        block for block in page.blocks.blocks.values() if type(block).__name__ == "Chatbot"
    )
    shown = chatbot.postprocess(
        [
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "<think>\n数手指\n</think>\n\n二"},
        ]
    )
    turns = [turn.model_dump() for turn in shown.root]
    assert [(turn["role"], bool((turn["metadata"] or {}).get("title"))) for turn in turns] == [
        *[("user", False), ("assistant", True), ("assistant", False)]
    ]
    again = [*turns, {"role": "user", "content": "再来"}]
    plain = [
        {"role": role, "content": words}
        for role, words in (("user", "你好"), ("assistant", "二"), ("user", "再来"))
    ]
    assert page.respond(browser(), again)[0][-1] == page.respond(browser(), plain)[0][-1]


def test_reasoning_that_the_prompt_opens_is_part_of_the_answer(page: Page) -> None:
    for name, opened in (("qwen3.5", "<think>\n"), ("qwen3", "")):
        template = replace(TEMPLATES[name], thinking="keep")
        tokenizer = replace(page.loaded.tokenizer, template=template)
        answer = Answer(
            page.engine, tokenizer, [Message("user", "你好")], Sampling(max_new_tokens=6)
        )
        plain = page.loaded.tokenizer.decode(
            page.engine.generate([answer.prompt], Sampling(max_new_tokens=6))[0]
        )
        assert "".join(answer) == answer.text == opened + plain


def test_a_closed_page_frees_the_row(page: Page) -> None:
    async def leave() -> None:
        page.call("ask", browser(), "你好", [], "", [], "b")
        answer = page.handlers("respond")[0](
            browser(), [{"role": "user", "content": "你好"}], "demo", "", False, 900, *GREEDY[1:]
        )
        await anext(answer)
        await answer.aclose()

    steps = page.engine.steps
    asyncio.run(leave())
    list(page.engine.submit([1, 2, 3], Sampling(max_new_tokens=5)))
    assert page.engine.stats()["running"] == 0 and page.engine.steps - steps < 800


def test_mistakes_become_notices(page: Page) -> None:
    said = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    asked = [*said, {"role": "user", "content": "字" * 2000}]
    shown, told = page.respond(browser(), asked)
    assert shown is None and "1024" in told


def test_a_question_without_an_answer_goes_back_before_what_was_typed_since(page: Page) -> None:
    said = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    # as Gradio hands a turn back
    asked = [*said, {"role": "user", "content": [{"type": "text", "text": "再问"}]}]
    for name in ("settle", "stop"):
        for typed, box in (
            ("", "再问"),
            ("还有", "再问\n还有"),
            ("再问", "再问"),
            ("再问\n还有", "再问\n还有"),
            ("再问！", "再问\n再问！"),
        ):
            back = page.settled(name, typed, asked)
            assert back["Chatbot"] == said
            assert back["Textbox"].value == (box if box != typed else None)  # else it stays
            assert back["Textbox"].submit_btn and not back["Textbox"].stop_btn
        for history in (said, []):
            assert page.settled(name, "还有", history)["Textbox"].value is None  # stays as it is
            assert "Chatbot" not in page.settled(name, "还有", history)


def test_a_conversation_beyond_the_context_goes_on_without_its_oldest_rounds(page: Page) -> None:
    said = [{"role": "user", "content": f"{n}" * 300} for n in (1, 2, 3, 4)]
    answers = [{"role": "assistant", "content": f"{n}" * 20} for n in (1, 2, 3)]
    history = [turn for pair in zip(said, [*answers, {}], strict=True) for turn in pair if turn]
    shown, told = page.respond(browser(), history, system="助手")
    assert shown[:-1] == history and told.startswith("the 2 oldest rounds are left out")
    kept = [Message("system", "助手"), *(Message(t["role"], t["content"]) for t in history[4:])]
    prompt = page.loaded.tokenizer.encode_chat(kept)
    (ids,) = page.engine.generate([prompt], Sampling(max_new_tokens=24))
    assert shown[-1]["content"] == page.loaded.tokenizer.decode(ids)
    assert re.search(rf"{len(prompt) + len(ids)}.* / 1,024 tokens", told)


def test_what_is_typed_while_an_answer_comes_stays_and_blanks_are_not_sent(page: Page) -> None:
    history = [{"role": "user", "content": "你好"}]
    box, shown, name, kept = page.call("ask", browser(), "你好", [], "", None, "c")
    # what was typed meanwhile stays: the browser takes out what was sent
    assert box.value is None and box.stop_btn and not box.submit_btn
    assert shown == history and name
    # a reload while it is answered loses nothing
    assert kept == [{"name": name, "title": "你好", "turns": [["user", "你好"]]}]
    # Gradio would evaluate a script of an event from text: the policy forbids it, and no page opens
    assert not [f.js for f in page.blocks.fns.values() if isinstance(f.js, str)]
    skipped = page.call(
        "ask", browser(), "再问", history, name, kept
    )  # while the first is answered
    page.call("stop", browser(), "", history)
    skipped += page.call("ask", browser(), "  \n", [], "", None, "c")
    assert all(value["__type__"] == "update" for value in skipped)

    def answer() -> Any:
        return page.handlers("respond")[0](browser(), history, "demo", "", False, *GREEDY)

    async def twice() -> list[Any]:
        page.call("ask", browser(), "你好", [], "", None, "c")
        first = answer()
        await anext(first)
        second = [update async for update in answer()]
        second.append(page.call("settle", browser(), "", history))
        await first.aclose()
        return second

    # what was asked is answered once, and what ends meanwhile does not end it
    for nothing in asyncio.run(twice()):
        assert [type(k).__name__ for k in nothing] == ["Chatbot"]


def test_what_is_not_wanted_any_more_ends_and_shows_nothing_more(page: Page) -> None:
    history = [{"role": "user", "content": "你好"}]
    values = ("demo", "", False, 900, *GREEDY[1:])

    async def leave(name: str, *arguments: Any) -> tuple[list[Any], Any]:
        page.call("ask", browser(), "你好", [], "", None, "c")
        answer = page.handlers("respond")[0](browser(), history, *values)
        await anext(answer)
        ending = asyncio.create_task(page.handlers(name)[0](browser(), *arguments))
        await asyncio.sleep(0)
        more = [update async for update in answer]
        return more, await ending

    for name, arguments in (
        ("stop", ("", history)),
        ("drop", ()),
        ("again", (SimpleNamespace(index=0), history, "x", [], "c")),
        ("edited", (SimpleNamespace(index=0, value="改"), history, "x", [], "c")),
    ):
        more, result = asyncio.run(leave(name, *arguments))
        assert more == []
        if name in ("again", "edited"):
            assert result[1][-1]["content"] == {"again": "你好", "edited": "改"}[name]
        asyncio.run(page.handlers("drop")[0](browser()))
        list(page.engine.submit([1, 2, 3], Sampling(max_new_tokens=5)))
        assert page.engine.stats()["running"] == 0
    # later rounds stay in the conversation that is kept
    turns = [["user", "你好"], ["assistant", "答"], ["user", "后来"], ["assistant", "答"]]
    for count, same in ((2, True), (4, False)):
        rounds = [{"role": role, "content": text} for role, text in turns[:count]]
        kept = [{"name": "x", "title": "你好", "turns": turns[:count]}]
        retry = page.handlers("again")[0](
            browser(), SimpleNamespace(index=0), rounds, "x", kept, ""
        )
        assert (asyncio.run(retry)[2] == "x") == same
        asyncio.run(page.handlers("drop")[0](browser()))
    blank = page.handlers("edited")[0](
        browser(), SimpleNamespace(index=0, value=" "), history, "x", [], "c"
    )
    assert all(value["__type__"] == "update" for value in asyncio.run(blank))
    # stopped before it began: nothing is shown, and the question goes back
    page.call("ask", browser(), "你好", [], "", None, "c")
    page.call("stop", browser(), "", history)
    assert page.handlers("respond") and [
        type(k).__name__ for k in page.call("respond", browser(), history, *values)
    ] == ["Chatbot"]
    assert page.settled("settle", "", history)["Textbox"].value == "你好"


def test_a_seed_is_a_number_or_nothing(page: Page) -> None:
    from cllm.serve.widgets import asked_of

    def seed_of(typed: str | None) -> int | None:
        return asked_of(page.loaded, ["", False, *GREEDY[:-1], typed])[2].seed

    assert [seed_of(typed) for typed in ("", None, "  ", " 7 ")] == [None, None, None, 7]
    shown, told = page.respond(browser(), [{"role": "user", "content": "你好"}], seed="x")
    assert "x" in told and shown is None


def test_the_slider_sets_the_strength_of_the_adapter(page: Page) -> None:
    from cllm.serve.widgets import SETTINGS, asked_of

    place = SETTINGS.index("strength")
    (slider,) = (
        block for block in page.blocks.blocks.values() if getattr(block, "label", "") == "strength"
    )
    assert (slider.minimum, slider.maximum, slider.value) == (0, 2, 1)
    said = {}
    for strength in (0, 0.3, 1, 2):
        values = [*GREEDY[:place], strength, *GREEDY[place + 1 :]]
        tokenizer, first, sampling = asked_of(page.loaded, ["", False, *values])
        answer = Answer(page.engine, tokenizer, [*first, Message("user", "你好")], sampling)
        said[strength] = "".join(answer)
    assert said[0] == page.greedy("你好", adapter=0) and said[1] == page.greedy("你好", adapter=1)
    assert len({*said.values()}) > 2, said


def test_conversations_are_kept_reopened_and_downloaded(page: Page) -> None:
    kept: list[Any] = []
    names = ["a", "b", "c"]
    for name, words in zip(names, ("一", "二", "一" * 160_000), strict=True):  # three bytes each
        history = [{"role": "user", "content": words}, {"role": "assistant", "content": "答"}]
        kept, file = page.call("keep", history, name, kept, "d")
        row = json.loads(Path(file.value["path"]).read_text(encoding="utf-8"))
        assert [m["content"] for m in row["messages"]] == [words, "答"]
    assert [item["name"] for item in kept] == names[::-1]  # the newest first
    menu = page.call("_menu", "c", kept)
    assert menu.choices[0] == ("一" * 40, "c") and menu.value == "c"
    assert page.call("_menu", "", kept).value is None
    more, _ = page.call("keep", [*history, *history], "c", kept, "d")
    assert [turn[0] for turn in more[0]["turns"]] == ["assistant", "user", "assistant"]
    assert more[0]["title"] == "一" * 40  # still by its first words
    # what the browser sends along has a limit
    huge = [{"role": "user", "content": "长" * 1_000_000}]
    for said, name, names_left in ((history, "e", ["e"]), (huge, "f", ["f"])):
        more, _ = page.call("keep", said, name, kept, "d")
        assert [item["name"] for item in more] == names_left
        assert len(json.dumps(more, ensure_ascii=False).encode()) <= 500_000 + 200
        assert more[0]["turns"][0][1]
    words, turns, cost, shown = page.call("_reopened", "a", kept, "", "没发")
    assert (words, cost, shown) == ("没发", " ", "a")
    assert [t["content"] for t in turns] == ["一", "答"]
    # a question that was never answered is back in the box
    kept = page.call("ask", browser(), "三", turns, "a", kept, "e")[3]
    asyncio.run(page.handlers("drop")[0](browser()))
    assert kept[0]["turns"] == [["user", "一"], ["assistant", "答"], ["user", "三"]]
    words, turns, *_ = page.call("_reopened", "a", kept, "", "没发")
    assert words == "三\n没发" and [t["content"] for t in turns] == ["一", "答"]
    for skipped in (
        page.call("keep", [], "a", kept, "e"),
        page.call("keep", history, "", kept, "e"),
    ):
        assert all(value["__type__"] == "update" for value in skipped)


def test_two_windows_of_a_browser_keep_each_others_conversations(page: Page) -> None:
    def says(words: str, name: str, kept: Any, browser: str = "one") -> Any:
        history = [{"role": "user", "content": words}, {"role": "assistant", "content": "答"}]
        return page.call("keep", history, name, kept, browser)[0]

    first = says("甲", "a", [])
    second = says("乙", "b", [])  # its own list had been read before
    assert [item["name"] for item in second] == ["b", "a"]
    first = says("甲甲", "a", first)
    assert [(item["name"], item["title"]) for item in first] == [("a", "甲甲"), ("b", "乙")]
    assert [item["name"] for item in says("丙", "c", [], "another")] == ["c"]
    # who has no name yet shares nothing with anybody
    says("丁", "d", [], "")
    assert [item["name"] for item in says("戊", "e", [], "")] == ["e"]
    # a window that reopens a conversation sees it as the other one left it, and what it asks in an
    # old copy becomes a conversation of its own
    assert page.call("_reopened", "a", second, "one", "")[1][0]["content"] == "甲甲"
    old = [{"role": "user", "content": "甲"}]
    named = page.call("ask", browser(), "己", old, "a", [], "one")[2]
    asyncio.run(page.handlers("drop")[0](browser()))
    assert named != "a"
    # a name of the browser's making is no path
    file = page.call("keep", old, "../../evil", [], "")[1]
    assert (
        Path(file.value["path"]).name == f"{hashlib.sha256(b'../../evil').hexdigest()[:16]}.jsonl"
    )


def test_a_page_that_is_loaded_again_shows_its_last_conversation(page: Page) -> None:
    turns = [["user", "甲"], ["assistant", "答"], ["user", "乙"]]
    kept = [{"name": "a", "title": "甲", "turns": turns}]
    fresh, reloaded = (SimpleNamespace(cookies=c) for c in ({}, {"cllm_again": "1"}))
    words, shown, _, name, menu = page.call("_again", reloaded, None, kept, "", "没发")
    assert (words, name, menu.value) == ("乙\n没发", "a", "a") and len(shown) == 2
    for request, known in ((fresh, kept), (reloaded, None)):
        assert all(
            v["__type__"] == "update" for v in page.call("_again", request, None, known, "", "")
        )


def test_listed_questions_are_asked_as_their_rows_say(tmp_path: Path) -> None:
    listed = [
        [Message("system", "短"), Message("user", "甲？")],
        [Message("user", "乙？"), Message("assistant", "乙。"), Message("user", "丙？")],
        [Message("user", "丁？"), Message("tool", "一个工具的结果不能投票")],
    ]
    made = Page(open_two(tmp_path), listed)
    try:
        votes = made.loaded.home / "votes.jsonl"
        words, number, button = made.call("following", -1, "demo ↔ base", "")
        assert (words, number, button.value) == ("甲？", 0, "1 / 2 →")
        pair = "demo ↔ base"
        first = made.call("duel", browser(), "甲？", pair, 0, [], False, "另", False, *GREEDY)[2]
        assert first.said == listed[0]
        second = made.call("duel", browser(), "丙？", pair, 1, [], False, "另", False, *GREEDY)[2]
        assert [m.content for m in second.said] == ["另", "乙？", "乙。", "丙？"]
        typed = made.call("duel", browser(), "别的", pair, 1, [], False, "", False, *GREEDY)[2]
        assert typed.said == [Message("user", "别的")]
        told, last, *rest = made.call("record", browser(), "b", second, 1, "", "某人", "好", 4)
        assert rest[2:4] == ["", 0]  # comment and score are of this vote alone
        row = json.loads(votes.read_text(encoding="utf-8"))
        assert row["history"] == [["乙？", "乙。"]] and row["system"] == "另"
        assert (row["rater"], row["comment"], row["score"]) == ("某人", "好", 4)
        from cllm.data.pairs import prompt_size
        from cllm.data.reader import read_conversations

        (read,), rejects = read_conversations(votes, None, "pairs")
        assert not rejects and [m.content for m in read.messages[: prompt_size(read)]] == [
            *("另", "乙？", "乙。", "丙？")
        ]
        assert made.call("after_vote", True, 0, pair, "")[:2] == ("", 0)  # more to ask about it
        assert made.call("after_vote", False, 0, pair, "")[:2] == ("丙？", 1)
        # this rater has voted on it for this pair, and not yet on the other question
        assert made.call("after_vote", False, 0, pair, " 某人")[:2] == ("甲？", 0)
        assert made.call("after_vote", False, 0, "other ↔ base", "某人")[:2] == ("丙？", 1)
        _, also, *_ = made.call("record", browser(), "a", first, 0, "", "某人", "", 0)
        assert made.call("following", 0, pair, "某人")[:2] == ("丙？", 1)  # all voted on: the next
        made.call("take_back", browser(), also)
        asked, number, button, before, undo, comment, mark, *shown = made.call(
            "take_back", browser(), last
        )
        assert (comment, mark) == ("好", 4)
        assert (asked, number, button.value) == ("丙？", 1, "2 / 2 →")
        assert before == second.said[:-1] and undo.interactive is False
        sides, restored = shown[:2], shown[2]
        assert restored is second and all(button.interactive for button in shown[4:])
        assert [side[-1]["content"] for side in sides] == second.answers
        assert votes.read_text(encoding="utf-8") == ""
        assert os.name != "posix" or votes.stat().st_mode & 0o777 == 0o600
        votes.write_text('null\n5\n{"models": null}\n{"models": ["demo", "base"]}\n', "utf-8")
        for number in range(20):
            told = made.call("record", browser("zh"), "ab"[number % 2], first, 0, "", "", "", 0)[0]
        assert "20 票" in told and "50%" in told and "票后" not in told
    finally:
        made.engine.close()


def test_votes_are_blind_private_and_complete(page: Page) -> None:
    votes = page.loaded.home / "votes.jsonl"
    pairs = {
        "demo ↔ other": ["demo", "other"],
        "demo ↔ base": ["demo", "base"],
        "other ↔ base": ["other", "base"],
    }
    said = dict.fromkeys(pairs, 1)
    for choice, (pair, its) in enumerate([*pairs.items(), ("demo ↔ base", ["demo", "base"])]):
        *shown, kept, _, _, _, _, _ = page.call(
            "duel", browser(), "你好", pair, -1, [], False, "", False, *GREEDY
        )
        texts, names = [side[1]["content"] for side in shown], kept.names
        assert sorted(names) == sorted(its) and texts == [
            page.greedy("你好", adapter=page.loaded.models[name]) for name in names
        ]
        assert (
            page.call("record", browser(), VOTES[choice], kept, -1, " 闲聊 ", "", "", 0)[0]
            == f"that was **A** {names[0]} · **B** {names[1]} · "
            + f"{said[pair]} votes; what they say is told from 20 on"
        )
        row = json.loads(votes.read_text(encoding="utf-8").splitlines()[-1])
        assert (
            row["models"] == names
            and row["answers"] == texts
            and row["vote"] == ("a", "b", "tie", "bad")[choice]
        )
        assert (
            row["category"] == "闲聊"
            and isinstance(row["sampling"]["seed"], int)
            and row["sampling"]["max_new_tokens"] == 24
        )
        said[pair] += 1
        files = {
            name: home / "adapter" / "adapter_model.safetensors"
            for name, home in page.loaded.adapters.items()
            if name in names
        }
        assert row["adapter_sha256"] == {
            name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
        }
        assert [row.get("chosen"), row.get("rejected")] == [
            texts,
            texts[::-1],
            [None, None],
            [None, None],
        ][choice]
    if os.name == "posix":
        assert votes.stat().st_mode & 0o777 == 0o600
    orders = {
        tuple(
            page.call(
                "duel", browser(), "你好", "demo ↔ base", -1, [], False, "", False, 1, *GREEDY[1:]
            )[2].names
        )
        for _ in range(20)
    }
    assert orders == {("demo", "base"), ("base", "demo")}


def test_votes_of_many_at_once_are_whole_lines(page: Page) -> None:
    votes = page.loaded.home / "votes.jsonl"
    before = len(votes.read_text(encoding="utf-8").splitlines()) if votes.exists() else 0
    kept = Duel(
        [Message("user", "问" * 9000)], ["demo", "base"], ["甲" * 9000, "乙" * 9000], Sampling()
    )
    voters = [
        threading.Thread(target=page.call, args=("record", browser(), "a", kept, -1, "", "", "", 0))
        for _ in range(16)
    ]
    for voter in voters:
        voter.start()
    for voter in voters:
        voter.join()
    rows = [json.loads(line) for line in votes.read_text(encoding="utf-8").splitlines()][before:]
    assert len(rows) == 16 and all(
        row["chosen"] == "甲" * 9000 and "category" not in row for row in rows
    )


def test_training_shows_runs_of_the_list_only(page: Page, tmp_path: Path) -> None:
    run = page.loaded.home
    steps = [{"tokens_per_second": 100.0, "tokens": 50, "seconds": i} for i in range(1, 6)]
    rows = [{"step": i, "loss": 2 - i / 10, **steps[i - 1]} for i in range(1, 6)] + [
        {"step": 5, "eval_loss": 1.6}
    ]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    (run / "eval.json").write_text(
        json.dumps(
            {
                "base": {"loss": 2.0, "exact": 0, "n": {"loss": 40, "exact": 40}},
                "adapter": {
                    "loss": 0.5,
                    "exact": 88,
                    "versus_base": {
                        "loss": {"difference": -1.5, "low": -2, "high": -1, "p": 0.01},
                        "exact": {"difference": 88, "low": 80, "high": 96, "p": 0.01},
                    },
                },
                "preference": {"accuracy": 1.0},
            }
        ),
        encoding="utf-8",
    )
    sample = {
        "messages": [{"role": "user", "content": "问"}],
        "reference": "答",
        "base": "？",
        "adapter": "答",
    }
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    (run / "manifest.json").write_text(json.dumps({"steps": 5}), encoding="utf-8")
    other = run.parent / "other"
    (other / "metrics.jsonl").write_text('{"step": 9, "eval_loss": 7.5}\n', encoding="utf-8")
    for asked in (None, "demo", "../../etc", str(tmp_path)):
        names, menu, over, runs, told, *charts, table, verdict, samples = page.call(
            "follow", browser("zh"), [], asked, asked
        )
        loss, speed = (chart["value"] for chart in charts)
        assert (
            {*names} == {"demo", "other"}
            and menu.value == "demo"
            and over.value == ("demo" if asked == "demo" else "")
            and sorted(over.choices) == [("-", ""), ("demo", "demo"), ("other", "other")]
        )
        assert "已完成 · 第 5 / 5 步" in told and "1.600 → 1.600（第 5 步）" in told
        assert "model.path `" in told and "lora.rank `" in told
        assert "demo 训练" in loss and "demo 留出: 1.6 (5)" in loss and "demo 100" in speed
        # no column without a number
        assert table["value"]["headers"] == ["", "损失 ↓", "完全匹配 ↑", "字数"]
        assert table["value"]["data"][:4] == [
            ["参考", "", "", "1.0"],
            ["基座", "2.000", "0.0", "1.0"],
            ["适配器", "0.500", "88.0", "1.0"],
            ["适配器 - 基座", "-1.500", "+88.0", ""],
        ]
        assert (
            "n = 40" in verdict
            and "太少" not in verdict
            and "奈特数" in verdict
            and "- 字数：" in verdict
        )
        assert samples["value"] == {
            "headers": ["问题", "参考", "适配器", "基座"],
            "data": [["问", "答", "答", "？"]],
        }
        assert runs["value"]["headers"][0] == "运行" and len(runs["value"]["data"]) == 2
    _, _, _, _, _, loss, _, _, verdict, _ = page.call("follow", browser(), [], "demo", "other")
    assert "better than base in exact (n = 40)" in verdict
    assert "demo held out: 1.6 (5)" in loss["value"] and "other held out: 7.5 (9)" in loss["value"]
    (run / "eval.json").unlink()
    (run / "manifest.json").write_text(json.dumps({"steps": 8}), encoding="utf-8")
    (run / "snapshots" / "step-5").mkdir(parents=True)
    shown = page.call("follow", browser(), [], "demo", "")[4]
    assert "unfinished" in shown and f"`python -m cllm.train {run} --resume`" in shown
    with locked(run):
        shown = page.call("follow", browser(), [], "demo", "")[4]
        assert "training · step 5 / 8 · eta 2s" in shown  # half a second each
        assert "还需 2s" in page.call("follow", browser("zh"), [], "demo", "")[4]


def test_training_follows_runs_that_start_and_leaves_open_menus_alone(tmp_path: Path) -> None:
    made = Page(open_tiny(tmp_path))

    def follow(listed: list[str], name: str) -> Any:
        names, menu, _, runs, *rest = made.call("follow", browser(), listed, name, "")
        return names, menu, {line[0]: line[3] for line in runs["value"]["data"]}, rest

    def write(name: str, *steps: int) -> None:
        lines = [f'{{"step": {step}, "loss": 1}}\n' for step in steps]
        (root / name / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")

    try:
        root, long = made.loaded.home.parent, "customer-service-qwen3-8b-lora-final"
        names, _, runs, (_, *hidden) = follow([], "demo")
        assert names == ["demo"] and runs == {"demo": "0/?"}
        # neither charts nor tables of nothing
        assert not any(hidden[part]["visible"] for part in (0, 1, 2, 4))
        (root / long).mkdir()
        shutil.copy(root / "demo" / "config.toml", root / long)
        (root / long / "adapter").mkdir()
        write(long, 1)
        names, menu, runs, _ = follow(names, "demo")
        assert names == [long, "demo"] and menu.choices == [(name, name) for name in names]
        # the one written to last is not first: a menu that is open would tick another one
        write("demo", 1, 2)
        names, menu, runs, (_, loss, *_) = follow(names, long)
        assert names == [long, "demo"] and menu == gr.skip()
        assert runs == {long: "1/?", "demo": "2/?"}
        assert "━</span> customer-servi…-8b-lora-final training 1</span>" in loss["value"]
    finally:
        made.engine.close()


def test_tables_fit_a_wide_screen_and_keep_words_whole_on_a_narrow_one(page: Page) -> None:
    outputs = next(fn.outputs for fn in page.blocks.fns.values() if fn.name == "follow")
    tables = [part.column_widths for part in outputs if isinstance(part, gr.Dataframe)]
    assert len(tables) == 3
    for widths in tables:
        pixels = [int(width.removesuffix("px")) for width in widths]  # no share of the screen
        assert min(pixels) >= 100 and sum(pixels) <= 1216


def test_runs_are_described_again_only_once_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(training, "described", lambda run: asked.append(run) or {"run": run})
    for written in (1, 1, 2, 2):
        (tmp_path / "metrics.jsonl").touch()
        os.utime(tmp_path / "metrics.jsonl", (written, written))
        assert training._facts(tmp_path) == {"run": tmp_path}
    assert len(asked) == 2


def test_a_chart_is_to_scale_and_says_its_points() -> None:
    assert chart("t", []) == chart("t", [Line("a", [], "#000")]) == ""
    drawn = chart("<t>", [Line("a", [(0, 4.0), (10, 1.0)], "#000"), Line("", [(5, 2.0)], "#111")])
    assert "&lt;t&gt;" in drawn and "<title>a: 4 (0)</title>" in drawn
    # the legend is text that wraps, whatever its length; the numbers are not small on a phone
    words, svg = drawn.split("<svg")
    assert "flex-wrap:wrap" in words and " a 1</span>" in words and "a 1" not in svg
    assert "cqw" in svg and "container-type" in words
    assert " b 16,761</span>" in chart("t", [Line("b", [(1, 16_761.4)], "#000")])
    points = re.findall(r'points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', drawn)[0]
    left, top, right, low = map(float, points)
    bottom = float(re.search(r'y="([\d.]+)" text-anchor="end">0<', drawn)[1]) - 4
    assert left < right and (bottom - low) / (bottom - top) == pytest.approx(1 / 4, abs=0.01)


def test_another_run_is_opened_while_the_first_answers(tmp_path: Path) -> None:
    from serving import open_tiny, tiny_run

    made = Page(open_tiny(tmp_path))
    try:
        for name in ("late", "foreign"):
            run = tiny_run(tmp_path, name, seed=3)
            (run / "metrics.jsonl").write_text("", encoding="utf-8")
        config = run / "adapter" / "adapter_config.json"
        text = config.read_text(encoding="utf-8")
        config.write_text(re.sub('(base_model_name_or_path": )"[^"]*"', r'\1"distilgpt2"', text))
        alone = made.greedy("你好", adapter=1)
        prompt = made.loaded.tokenizer.encode_chat([Message("user", "你好")])
        running = made.engine.submit(prompt, Sampling(max_new_tokens=24))
        first = next(iter(running))
        told, models, pairs, many = made.call("talk_to", browser(), "late")
        ids = [first, *running]
        assert made.loaded.tokenizer.decode(ids) == alone  # what was being answered goes on
        assert "late is open" in told and [name for name, _ in models.choices] == [
            "demo",
            "late",
            "base",
        ]
        assert len(pairs.choices) == 3 and len(many.choices) == 3
        assert pairs.visible and models.visible  # one pair alone is nothing to choose from
        shown, _ = made.respond(browser(), [{"role": "user", "content": "你好"}], "late")
        assert shown[-1]["content"] == made.greedy("你好", adapter=2) != alone
        made.call("talk_to", browser(), "late")  # once is enough
        assert list(made.loaded.models) == ["demo", "late", "base"]
        told, *_ = made.call("talk_to", browser(), "foreign")
        assert "`python -m cllm.chat " in told and "foreign`" in told
        assert made.call("talk_to", browser(), "../../etc")[0] == " "
    finally:
        made.engine.close()


def test_a_follow_up_goes_on_from_the_better_answer(page: Page) -> None:
    pair = "demo ↔ base"
    first = page.call("duel", browser(), "你好", pair, -1, [], False, "", False, *GREEDY)[2]
    _, _, before, *_ = page.call("record", browser(), "b", first, -1, "", "", "", 0)
    assert [m.content for m in before] == ["你好", first.answers[1]]
    shown_a, _, second, *_ = page.call(
        "duel", browser(), "再问", pair, -1, before, True, "", False, *GREEDY
    )
    assert second.said == [*before, Message("user", "再问")] and len(shown_a) == 4
    unticked = page.call("duel", browser(), "再问", pair, -1, before, False, "", False, *GREEDY)[2]
    assert unticked.said == [Message("user", "再问")]
    page.call("record", browser(), "a", second, -1, "", "", "", 0)
    votes = page.loaded.home / "votes.jsonl"
    row = json.loads(votes.read_text(encoding="utf-8").splitlines()[-1])
    assert row["history"] == [["你好", first.answers[1]]] and row["instruction"] == "再问"


def test_a_file_of_questions_is_answered_by_all_models(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "ask.jsonl"
    rows = [
        {"messages": [{"role": "system", "content": "短"}, {"role": "user", "content": "你好"}]},
        {"instruction": "青石镇在哪里？", "output": "在山里。"},
        {"title": "几点开门？"},
        {"answer": "", "text": ""},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = ["你好", "青石镇在哪里？", "几点开门？"]
    plain = tmp_path / "ask.txt"
    plain.write_bytes("\n".join(asked).encode("gb18030"))
    names = ["demo", "base"]
    _, table, download = page.call("answer", browser(), str(file), names, "助手", False, *GREEDY)
    assert table.value["headers"] == ["question", *names]
    assert [row[0] for row in table.value["data"]] == asked
    systems = ("短", "助手", "助手")
    expected = [
        [page.greedy(words, adapter=page.loaded.models[name], system=system) for name in names]
        for words, system in zip(asked, systems, strict=True)
    ]
    assert [row[1:] for row in table.value["data"]] == expected
    lines = Path(download.value["path"]).read_text(encoding="utf-8").splitlines()
    kept = [json.loads(line) for line in lines]
    assert [[*row["answers"].values()] for row in kept] == expected
    assert table.wrap and len(table.column_widths) == 3
    _, _, again = page.call("answer", browser(), str(file), [], "助手", False, *GREEDY)
    assert again.value["path"] != download.value["path"]  # and of all models, as none is ticked
    first = Path(again.value["path"]).read_text(encoding="utf-8").splitlines()[0]
    assert [*json.loads(first)["answers"]] == ["demo", "other", "base"]
    assert kept[0]["messages"][0] == {"role": "system", "content": "短"}
    from cllm.data.sources import read_questions

    assert [said[-1].content for said in read_questions(plain)] == asked
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        read_questions(tmp_path / "nowhere.txt")
    file.write_text("{}\n", encoding="utf-8")
    told, *_ = page.call("answer", browser(), str(file), names, "", False, *GREEDY)
    assert told.startswith("ask.jsonl asks nothing")


def test_thinking_can_be_switched_where_the_format_has_it(page: Page) -> None:
    from cllm.serve.widgets import asked_of

    assert not page.loaded.tokenizer.template.switches
    template = replace(TEMPLATES["qwen3"], thinking="off")
    tokenizer = replace(page.loaded.tokenizer, template=template)
    loaded = replace(page.loaded, assembly=replace(page.loaded.assembly, tokenizer=tokenizer))
    asked = [Message("user", "你好")]
    prompts = []
    for thinking in (True, False):
        tokenizer, _, _ = asked_of(loaded, ["", thinking, *GREEDY])
        prompts.append(tokenizer.decode(tokenizer.encode_chat(asked)))
    assert "<think>" not in prompts[0] and prompts[1].endswith("<think>\n\n</think>\n\n")


def test_system_prompts_of_the_run_ones_own_and_ours_are_offered(tmp_path: Path) -> None:
    loaded = open_two(tmp_path)
    system = {"role": "system", "content": "你是青石镇的向导"}
    sample = {"messages": [system, {"role": "user", "content": "问"}]}
    (loaded.home / "samples.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    made = Page(loaded)
    try:
        kept = made.call("kept_too", " 说粤语 ", ["旧"])
        assert kept == ["说粤语", "旧"] == made.call("kept_too", "  ", kept)
        menu = made.call("listed", browser("zh"), kept)
        names = [value for _, value in menu.choices]
        assert names[:3] == ["说粤语", "旧", "你是青石镇的向导"] and len(names) == 7
    finally:
        made.engine.close()


def test_monitor_counts(page: Page) -> None:
    page.call("come", browser())
    looks, *_ = page.call("measure", browser(), [])
    page.respond(browser(), [{"role": "user", "content": "你好"}])
    looks, table, drawn = page.call("measure", browser("zh"), looks)
    (_, before), (_, after) = looks
    shown = dict(re.findall(r"\| (\S+) \| (.*?) \|", table))
    assert after > before and float(shown["每秒词元数"]) > 0 and "<polyline" in drawn
    assert [shown[key] for key in ("打开的页面", "正在回答", "排队")] == ["1", "0", "0"]
    page.call("leave", browser())
    table = page.call("measure", browser(), looks)[1]
    assert table.startswith("| Monitor | |") and "| open pages | 0 |" in table


def test_every_event_has_the_inputs_of_its_handler(page: Page) -> None:
    """Gradio fills up with None what is missing."""
    import inspect

    import gradio as gr

    given = (gr.Request, gr.EventData)
    for event in page.blocks.fns.values():
        if event.fn is None:
            continue
        wanted = [
            parameter
            for parameter in inspect.signature(event.fn).parameters.values()
            if not (inspect.isclass(kind := parameter.annotation) and issubclass(kind, given))
        ]
        fixed = [p for p in wanted if p.kind is not p.VAR_POSITIONAL]
        assert len(event.inputs) >= len(fixed), event.name
        assert len(event.inputs) == len(fixed) or len(fixed) < len(wanted), event.name


def test_the_page_is_served_with_its_policy_in_both_languages(page: Page) -> None:
    from starlette.testclient import TestClient

    with TestClient(Guard(page.app), base_url="http://127.0.0.1:7860") as client:
        response = client.get("/")
        assert response.status_code == 200 and all(
            response.headers[name] == value for name, value in HEADERS.items()
        )
        assert "Compare" in response.text and (
            "对比" in response.text or r"\u5bf9\u6bd4" in response.text
        )
        assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?://(?!127)', response.text)
        assert client.get("/gradio_api/file=/etc/passwd").status_code in (403, 404)
        form = {"content-type": "multipart/form-data; boundary=x"}
        for path in ("/gradio_api/upload", "/upload", "/v1/chat/completions"):
            assert client.post(path, content=b"x" * 1000, headers=form).status_code == 415
        for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/predict"):
            json_type = {"content-type": "application/json"}
            assert (
                client.post(path, content=b"x" * (BODY_BYTES + 1), headers=json_type).status_code
                == 413
            )
            assert (
                client.post(
                    path, content=b"{}", headers=json_type | {"origin": "http://evil.example"}
                ).status_code
                == 403
            )
        for method, path in (
            ("TRACE", "/health"),
            ("DELETE", "/v1/models"),
            ("GET", "/v1/chat/completions"),
        ):
            refused = client.request(method, path)
            assert (
                refused.status_code == 405
                and refused.headers["allow"]
                and "error" in refused.json()
            ), path
        assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
        assert "cllm_requests_total" in client.get("/metrics").text
        assert client.get("/health").json() == {"status": "ok"}
        for path in (
            "file=../../etc/passwd",
            "file=%2e%2e/%2e%2e/etc/passwd",
            f"file={page.loaded.home / 'votes.jsonl'}",
            "file=http://evil.example",
        ):
            assert client.get(f"/gradio_api/{path}").status_code in (403, 404), path
