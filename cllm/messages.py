"""What is said to people: one table, English and Chinese, with stable codes.

The language follows `CLLM_LANG` (`zh` or `en`), else the locale. Log keys and JSON are not here: they are English, for programs.
"""

from __future__ import annotations

import locale
import os
import sys

# code -> (English, Chinese). Both are str.format templates with the same fields (a test compares them).
MESSAGES: dict[str, tuple[str, str]] = {
    # --- edge of the programs
    "error": ("error [{code}]: {text}", "错误 [{code}]：{text}"),
    "fault": (
        "internal fault: {text}. This is a bug in cllm, not in your input; please report it with the traceback above.",
        "内部故障：{text}。这是 cllm 的缺陷，不是您的输入有误；请附上面的堆栈报告。",
    ),
    "usage.program": (
        "no program named '{name}'; choose one of: {programs}",
        "没有名为 '{name}' 的程序；可选：{programs}",
    ),
    # --- config
    # --- data
    # --- model
    "lora.targets": (
        "[lora] targets: {missing} matches no linear layer of this model; it has: {known} (or use targets = \"all-linear\")",
        "[lora] targets：{missing} 在该模型中没有匹配的线性层；可用：{known}（或写 targets = \"all-linear\"）",
    ),
    "adapter.damaged": (
        "{path} is not a readable LoRA adapter ({detail}); point to the `adapter` folder of a run, or copy it again",
        "{path} 不是可读取的 LoRA 适配器（{detail}）；请指向某次运行的 adapter 目录，或重新复制",
    ),
    "adapter.mismatch": (
        "the adapter in {path} does not fit this base model ({count} problems): {problems}. Load it on the base it was trained on",
        "{path} 中的适配器与该基座模型不符（{count} 处）：{problems}。请使用训练它时的基座模型",
    ),
    # --- learn
    # --- serve
    # --- train
    # --- eval
    # --- chat
    # --- check
    # --- bench, memory
    # --- export
}


def language() -> str:
    """`zh` or `en`: `CLLM_LANG` if set, else whether the locale (LC_ALL, LC_MESSAGES, LANG, Windows' setting) is Chinese."""
    chosen = os.environ.get("CLLM_LANG") or next(
        (os.environ[key] for key in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(key)), locale.getlocale()[0] or ""
    )
    return "zh" if chosen.lower().startswith(("zh", "chinese")) else "en"


def say(code: str, /, **values: object) -> str:
    """The message `code` in the user's language with its fields filled in. Raises KeyError for an unknown code."""
    return MESSAGES[code][language() == "zh"].format(**values)


def note(code: str, /, **values: object) -> None:
    """Print the message `code` to stderr, where progress and status go."""
    print(say(code, **values), file=sys.stderr, flush=True)


class UserError(Exception):
    """The user's mistake or circumstance: what, where and how to mend it, in one line. Programs print it and exit with 2."""

    def __init__(self, code: str, /, **values: object) -> None:
        super().__init__(say(code, **values))
        self.code = code

    def __str__(self) -> str:
        return say("error", code=self.code, text=self.args[0])
