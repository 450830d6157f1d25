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
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, TimeoutError, sync_playwright

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
]
SECONDS = 300  # for anything to appear: a busy machine with one slow core
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


def answer(page: Page, *, seconds: float = SECONDS) -> str:
    """The last answer, once its cost line has stopped changing."""
    deadline, before = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        time.sleep(1.0)
        bots = page.locator(".bot.message:visible, .message.bot:visible")
        text = bots.last.inner_text() if bots.count() else ""
        if text and text == before:
            return text
        before = text
    raise AssertionError(f"no finished answer after {seconds} s, last seen: {before[:80]!r}")


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
    page.get_by_text(re.compile(r"^A .* · B ")).wait_for()
    page.screenshot(path=images / "compare.png")
    page.get_by_role("tab", name="训练").click()
    page.locator("svg[viewBox='0 0 400 176']:visible").first.wait_for()
    page.wait_for_timeout(1500)
    page.screenshot(path=images / "training.png")
    page.get_by_role("tab", name="监控").click()
    page.wait_for_timeout(5000)
    sessions = page.get_by_label("打开的页面").input_value()
    assert sessions == "1", sessions
    page.screenshot(path=images / "monitor.png")
    return {"first_text_seconds": round(first, 2), "adapter": adapter, "base": base}


def changing(page: Page, question: str) -> dict[str, str]:
    """A system prompt, regenerate, edit: one question and one answer stay, and the edited question
    is the one that was answered.
    """
    page.get_by_text("Settings").click()
    page.get_by_label("system prompt").fill("Answer in one word.")
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
    assert re.fullmatch(r"first token [\d.]+ s · \d+ tok/s · \d+ \+ \d+ tokens", cost.strip()), cost
    return {"again": again, "edited": edited, "cost": cost.strip()}


def on_a_phone(page: Page, images: Path, question: str) -> None:
    """No tab scrolls sideways at 390 pixels."""
    ask(page, question)
    answer(page)
    page.screenshot(path=images / "phone.png")
    for name in ("对话", "对比", "训练", "监控"):
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(3000)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, (
            f"{name} scrolls sideways on a phone"
        )


def stopping(page: Page, question: str) -> str:
    """Stop an answer while it comes: what came stays, it does not grow, and the page is ready for
    the next question.
    """
    page.get_by_label("base").first.check()
    # the base rambles at random, up to the length limit
    for label, value in {"temperature": "2", "top-p": "1", "top-k": "200"}.items():
        page.get_by_label(label).first.fill(value)
    for _ in range(5):
        ask(page, question)
        try:
            page.get_by_test_id("stop-button").click(timeout=3000)
            break
        except TimeoutError:
            answer(page)
    else:
        raise AssertionError("five answers were done before the stop button could be pressed")
    text = answer(page)
    page.wait_for_timeout(1500)
    assert answer(page) == text
    page.locator("button.submit-button:visible").wait_for()
    return text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--question", default="你好，你是谁？")
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
