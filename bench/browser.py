"""The page in a real browser: every tab used once, in Chinese and at phone width, with nothing
loaded from another host.

    apt-get install chromium fonts-noto-cjk; pip install playwright
    python bench/browser.py runs/demo --question "青石镇在哪里？" [--images docs/images]

Starts `python -m cllm.chat RUN` (or, given an address for RUN, uses the page that is served there),
drives Chromium through it, keeps a screenshot of each tab. Fails on any console error, any request
to another host, and any step that does not do what it should. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, Route, TimeoutError, sync_playwright

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
]
SECONDS = 60  # for anything to appear: a busy machine with one slow core
STOP = "button.stop-button:visible, [data-testid=stop-button]:visible"
SCRIPT = (
    "<img src=data:image/png;base64,AAAA onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    "[x](javascript:document.title='owned')"
)


def open_page(
    browser: Browser, url: str, problems: list[str], *, locale: str, width: int, height: int
) -> Page:
    page = browser.new_context(
        locale=locale, viewport={"width": width, "height": height}
    ).new_page()
    page.on(
        "console",
        lambda message: (
            problems.append(f"console: {message.text}") if message.type == "error" else None
        ),
    )
    page.on("pageerror", lambda error: problems.append(f"page: {error}"))
    page.on(
        "response",
        lambda response: (
            problems.append(f"{response.status}: {response.url}")
            if response.status >= 400
            else None
        ),
    )
    page.on(
        "request",
        lambda request: (
            problems.append(f"foreign: {request.url}") if is_foreign(request.url, url) else None
        ),
    )
    page.set_default_timeout(1000 * SECONDS)
    page.goto(url)
    page.wait_for_selector("textarea")
    return page


def is_foreign(address: str, own: str) -> bool:
    return not address.startswith((own, "data:", "blob:"))


def ask(page: Page, words: str) -> None:
    page.locator("textarea:visible").first.fill(words)
    page.keyboard.press("Enter")


def answer(page: Page, *, number: int = 1, seconds: float = SECONDS) -> str:
    """The last answer, once `number` questions are shown, each with its answer, nothing can be
    stopped any more and the text has stopped changing.
    """
    deadline, before = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        time.sleep(1.0)
        bots = page.locator(".bot.message:visible, .message.bot:visible")
        asked, running = questions(page), page.locator(STOP).count() > 0
        done = number <= asked == bots.count() and not running
        text = bots.last.inner_text() if done else ""
        if text and text == before:
            return text
        before = text
    raise AssertionError(
        f"no finished answer after {seconds} s: {asked} questions of {number}, {bots.count()} "
        f"answers, one can be stopped: {running}, last seen: {before[:80]!r}"
    )


def desktop(page: Page, images: Path, question: str) -> dict[str, Any]:
    """Chat, stop, base, injection, compare, vote, training, monitor."""
    tabs = page.locator("button[role=tab]")
    assert tabs.all_inner_texts() == ["对话", "对比", "训练", "监控"], tabs.all_inner_texts()
    start = time.monotonic()
    ask(page, question)
    page.locator(".bot:visible").first.wait_for()
    first = time.monotonic() - start
    adapter = answer(page)
    page.screenshot(path=images / "chat.png")
    page.get_by_label("base").check()
    ask(page, question)
    base = answer(page)
    ask(page, SCRIPT)
    answer(page)
    assert page.title() == "cllm", "text of a message ran as a script"
    page.get_by_role("tab", name="对比").click()
    ask(page, question)
    buttons = page.get_by_role("button", name=re.compile("更好|一样好|都不好"))
    deadline = time.monotonic() + SECONDS
    while not buttons.first.is_enabled() and time.monotonic() < deadline:
        time.sleep(0.2)
    buttons.first.click()
    page.get_by_text(re.compile(r"刚才 A .* · B ")).wait_for()
    page.screenshot(path=images / "compare.png")
    page.get_by_role("tab", name="训练").click()
    page.locator("svg[viewBox='0 0 440 240']:visible").first.wait_for()
    page.wait_for_timeout(1500)
    page.screenshot(path=images / "training.png")
    page.get_by_role("tab", name="监控").click()
    page.wait_for_timeout(5000)
    sessions = page.get_by_role("row", name="打开的页面").inner_text().split()
    assert sessions == ["打开的页面", "1"], sessions
    page.screenshot(path=images / "monitor.png")
    return {"first_text_seconds": round(first, 2), "adapter": adapter, "base": base}


def changing(page: Page, question: str) -> dict[str, str]:
    """A system prompt, regenerate, edit: one question and one answer stay, and the edited question
    is the one that was answered.
    """
    page.get_by_text("Settings").click()
    page.get_by_label("System prompt", exact=True).fill("Answer in one word.")
    ask(page, question)
    answer(page)
    page.get_by_role("button", name="Retry").last.click()
    again = answer(page)
    page.get_by_role("button", name="Edit").first.click()
    page.locator("textarea.edit-textarea").fill(question + "！")
    page.get_by_role("button", name="Submit").first.click()
    edited = answer(page)
    users = page.locator(".user.message:visible, .message.user:visible").all_inner_texts()
    assert [text.strip() for text in users] == [question + "！"], users
    cost = page.locator(".cost:visible").first.inner_text()
    assert re.fullmatch(
        r"first token [\d.]+ s · \d+ tok/s · [\d,]+ / [\d,]+ tokens", cost.strip()
    ), cost
    return {"again": again, "edited": edited, "cost": cost.strip()}


def on_a_phone(page: Page, images: Path, question: str) -> None:
    """No tab scrolls sideways at 390 pixels, and both answers and the votes fit on one screen."""
    ask(page, question)
    answer(page)
    page.screenshot(path=images / "phone.png")
    for name in ("对话", "对比", "训练", "监控"):
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(3000)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, (
            f"{name} scrolls sideways on a phone"
        )
        if name == "对比":
            votes = page.locator(".vote").last.bounding_box()
            assert votes is not None and votes["y"] + votes["height"] <= 844, votes


def stopping(page: Page, question: str) -> str:
    """Stop an answer while it comes: what came stays, it does not grow, and the page is ready for
    the next question.
    """
    page.get_by_label("base").first.check()
    # the base rambles at random, up to the length limit
    for label, value in {"temperature": "2", "top-p": "1", "top-k": "200"}.items():
        page.get_by_label(label).first.fill(value)
    box, stopped = page.locator("textarea:visible").first, 0
    bots = page.locator(".bot.message:visible, .message.bot:visible")
    for number in range(20):
        asked, answers = questions(page), bots.count()
        ask(page, question)
        try:
            if number:  # the first at once
                bots.nth(answers).wait_for(timeout=10_000)
            page.get_by_test_id("stop-button").click(timeout=3000)
        except TimeoutError:
            answer(page)
            continue
        page.wait_for_timeout(1500)
        # stopped before a word of it, the question is in its box again
        answered = questions(page) > asked
        assert box.input_value() == ("" if answered else question), box.input_value()
        stopped += answered
        if stopped == 2:
            break
    else:
        raise AssertionError("of 20 answers not two could be stopped in their midst")
    text = answer(page)
    page.wait_for_timeout(1500)
    assert answer(page) == text
    page.locator("button.submit-button:visible").wait_for()
    return text


def questions(page: Page) -> int:
    """How many are shown in the chat."""
    return page.locator(".user.message:visible, .message.user:visible").count()


def started(page: Page, question: str) -> None:
    """Ask until an answer is caught while it comes; some are too short."""
    for _ in range(20):
        ask(page, question)
        try:
            page.locator(STOP).first.wait_for(timeout=3000)
            return
        except TimeoutError:
            answer(page)
    raise AssertionError("of 20 answers none was seen while it came")


@contextmanager
def held_back(page: Page) -> Iterator[None]:
    """Meanwhile nothing reaches the server."""
    held: list[Route] = []
    page.route("**/queue/join*", lambda route: held.append(route))
    yield
    for route in held:
        route.continue_()
    page.unroute("**/queue/join*")


def keeping(page: Page, question: str, problems: list[str]) -> dict[str, Any]:
    """Nothing typed is lost: a question that is too long comes back, a long conversation goes on, a
    follow-up waits, a reload keeps the conversation; Retry after the settings were opened differs.
    """
    box, cost = page.locator("textarea:visible").first, page.locator(".cost:visible").first
    ask(page, question)
    answer(page)
    context = int(re.sub(r".*?([\d,]+) [^\d]*$", r"\1", cost.inner_text()).replace(",", ""))
    too_long = "字" * (3 * context)
    ask(page, too_long)
    page.get_by_text(str(context), exact=False).first.wait_for()
    page.wait_for_timeout(3000)
    assert box.input_value() == too_long and questions(page) == 1
    # put back, it leaves what was typed meanwhile
    with held_back(page):
        ask(page, too_long)
        page.wait_for_timeout(1000)
        page.keyboard.press("End")
        page.keyboard.type("又想到")
    page.wait_for_timeout(5000)
    assert re.fullmatch(f"{too_long}\n?又想到", box.input_value()), box.input_value()[-9:]
    # Enter with Shift begins a line, and in an input method ends a word: neither sends, and an
    # answer that comes later takes nothing out of the box
    box.fill("")
    box.type("第一行")
    page.keyboard.press("Shift+Enter")
    box.type("第二行")
    page.get_by_role("button", name=re.compile("重试|Retry")).last.click()
    page.wait_for_timeout(500)
    answer(page)
    assert box.input_value() == "第一行\n第二行", box.input_value()
    rounds = 30
    for number in range(1, rounds):
        ask(page, f"{number}：{question}" * 2)
        answer(page, number=number + 1)
    assert questions(page) == rounds and "略去" in cost.inner_text(), cost.inner_text()
    ask(page, "   ")
    page.wait_for_timeout(2000)
    assert questions(page) == rounds
    page.get_by_role("button", name="新对话").click()
    page.wait_for_timeout(1000)
    ask(page, r"$E=mc^2$ \(a+b\) \[c^2\] $$d$$")
    answer(page)
    assert page.locator(".user .katex, .katex").count() >= 4
    page.get_by_text("设置").click()
    page.get_by_label("base").first.check()
    for label, value in {"温度": "2", "top-p（核采样）": "1", "top-k（候选数）": "200"}.items():
        page.get_by_label(label).first.fill(value)
    assert page.get_by_label("随机种子（空：随机）").input_value() == ""
    said = [answer(page)]
    for _ in range(2):
        page.get_by_role("button", name=re.compile("重试|Retry")).last.click()
        page.wait_for_timeout(500)
        said.append(answer(page))
    assert len({*said}) == 3, said
    # one types on before the server has answered
    asked = questions(page)
    with held_back(page):
        ask(page, question)
        page.wait_for_timeout(1000)
        page.keyboard.type("接着写")
    deadline = time.monotonic() + SECONDS
    while questions(page) == asked and time.monotonic() < deadline:
        page.wait_for_timeout(200)
    page.wait_for_timeout(1000)
    assert box.input_value() == "接着写", box.input_value()
    answer(page)
    started(page, question)
    box.fill("后来的问题")
    page.keyboard.press("Enter")
    answer(page)
    assert box.input_value() == "后来的问题"
    # a new conversation while an answer comes, and a reload while another does: both are kept
    box.fill("")
    started(page, "甲" + question)
    asked = questions(page)
    page.get_by_role("button", name="新对话").click()
    page.wait_for_timeout(3000)
    assert questions(page) == 0 and page.locator(STOP).count() == 0
    started(page, "乙" + question)
    page.wait_for_timeout(1000)
    again = questions(page)
    before = len(problems)
    page.reload()
    box.wait_for()
    # Gradio's own client reports the stream that it closes itself
    problems[before:] = [
        text for text in problems[before:] if not re.search("AbortError|Connection errored", text)
    ]
    kept = page.get_by_label("以前的对话").first
    for place, shown in ((None, again), (2, rounds), (1, asked), (0, again)):
        page.wait_for_timeout(4000)
        if place is not None:  # the last one is shown already
            kept.click()
            page.get_by_role("option").nth(place).click()
            page.wait_for_timeout(2000)
        unanswered = bool(box.input_value())  # it is in its box if no answer was kept
        assert box.input_value() in ("", "甲" + question, "乙" + question), box.input_value()
        assert questions(page) + unanswered == shown, (place, questions(page), box.input_value())
        box.fill("")
    return {"context": context, "rounds": rounds}


def voting(page: Page, count: int) -> dict[str, Any]:
    """Listed questions, votes by the keys 1 to 4, one taken back, and the tally."""
    page.get_by_role("tab", name="对比").click()
    page.get_by_role("button", name="下一个问题").click()
    told, before = page.get_by_text(re.compile("[投共] ?[0-9]+ 票")), ""
    question = page.locator("textarea:visible").first
    for number in range(count):
        page.locator(".vote:visible:enabled").first.wait_for()
        asked = question.input_value()
        page.locator("body").click(position={"x": 3, "y": 3})
        page.keyboard.press(str(number % 4 + 1))
        deadline = time.monotonic() + SECONDS
        while not told.count() or told.inner_text() == before:
            assert time.monotonic() < deadline, f"vote {number + 1} by keyboard was not counted"
            page.wait_for_timeout(200)
        before = told.inner_text()
    tally = before
    # the last question comes back with both answers, while the next one's are on their way
    page.get_by_role("button", name="撤销投票").click()
    page.locator(".vote:visible:enabled").first.wait_for()
    page.wait_for_timeout(3000)
    assert question.input_value() == asked, "undo does not show the question again"
    shown = page.locator(".bot:visible").all_inner_texts()
    assert len(shown) == 2 and all(text.strip() for text in shown), shown
    page.keyboard.press("1")
    deadline = time.monotonic() + SECONDS
    while question.input_value() == asked:
        assert time.monotonic() < deadline, "the vote in its place was not counted"
        page.wait_for_timeout(200)
    return {"tally": tally, "taken_back": True}


def together(page: Page, other: str, images: Path, questions: list[str]) -> dict[str, Any]:
    """Two runs: curves over each other, the other one opened beside the first and asked, a
    follow-up after a vote, a file of questions for all of them; the page in the dark.
    """
    page.emulate_media(color_scheme="dark")
    page.get_by_role("tab", name="训练").click()
    dashed = page.locator("polyline[stroke-dasharray='6 4']:visible")
    page.get_by_label("叠加另一次运行的曲线").click()
    page.get_by_role("option", name=other).click()
    dashed.first.wait_for(state="attached")
    page.wait_for_timeout(3000)
    page.screenshot(path=images / "two-runs.png")
    page.get_by_label("运行", exact=True).click()
    page.get_by_role("option", name=other).click()
    page.get_by_role("button", name="与此运行对话").click()
    page.get_by_text(f"{other} 已打开").wait_for()
    page.get_by_role("tab", name="对话").click()
    page.get_by_label(other, exact=True).first.check()
    ask(page, questions[0])
    told = answer(page)
    page.get_by_role("tab", name="对比").click()
    page.get_by_label("追问").check()
    ask(page, questions[0])
    vote = page.locator(".vote:visible:enabled").first
    vote.click()
    page.get_by_text(re.compile(r"刚才 A .* · B ")).wait_for()
    ask(page, questions[1])
    vote.wait_for()
    users = page.locator(".user.message:visible, .message.user:visible").all_inner_texts()
    assert [text.strip() for text in users] == questions[:2] * 2, users
    page.get_by_text("批量提问").click()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="问题文件").click()
    lines = "\n".join(questions).encode()
    chooser.value.set_files({"name": "q.txt", "mimeType": "text/plain", "buffer": lines})
    page.get_by_text(f"{3 * len(questions)} / {3 * len(questions)} 个回答").wait_for()
    page.wait_for_timeout(1500)
    with page.expect_download() as download:
        page.get_by_role("button", name="下载").last.click()
    rows = [json.loads(line) for line in download.value.path().read_text("utf-8").splitlines()]
    assert [row["messages"][-1]["content"] for row in rows] == questions
    return {"other": told, "batch": len(rows) * 3}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--question", default="你好，你是谁？")
    parser.add_argument(
        "--votes", type=int, default=0, help="votes by keyboard, of the held-out list"
    )
    parser.add_argument("--other", default="", help="another run of the same base beside it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    arguments.images.mkdir(parents=True, exist_ok=True)
    problems, server = list[str](), None
    url = arguments.run
    if not url.startswith("http://"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{probe.getsockname()[1]}/"
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "cllm.chat",
                arguments.run,
                "--port",
                url.strip("/").rpartition(":")[2],
            ]
        )
    try:
        for _ in range(2 * SECONDS):
            try:
                urllib.request.urlopen(url + "health")
                break
            except OSError:
                time.sleep(0.5)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path="/usr/bin/chromium", args=ARGUMENTS
            )
            page = open_page(browser, url, problems, locale="zh-CN", width=1100, height=800)
            result = desktop(page, arguments.images, arguments.question)
            english = open_page(browser, url, problems, locale="en-US", width=1100, height=800)
            result |= changing(english, arguments.question)
            result["stopped"] = stopping(english, arguments.question)
            chinese = open_page(browser, url, problems, locale="zh-CN", width=1440, height=900)
            result |= keeping(chinese, arguments.question, problems)
            if arguments.votes:
                result |= voting(chinese, arguments.votes)
            if arguments.other:
                asked = [arguments.question, "那里有什么？", "几点开门？"]
                fresh = open_page(browser, url, problems, locale="zh-CN", width=1440, height=900)
                result |= together(fresh, arguments.other, arguments.images, asked)
            phone = open_page(browser, url, problems, locale="zh-CN", width=390, height=844)
            on_a_phone(phone, arguments.images, arguments.question)
            browser.close()
    finally:
        if server is not None:
            server.terminate()
            server.wait(20)
    assert not problems, "\n".join(problems)
    for image in arguments.images.glob("*.png"):
        # a third of the size, the same to the eye
        Image.open(image).quantize(64).save(image, optimize=True)
    result |= {
        "problems": problems,
        "command": " ".join(["python", "bench/browser.py", *sys.argv[1:]]),
    }
    if arguments.out:
        arguments.out.write_text(
            json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
