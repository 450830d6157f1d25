"""The architecture as a test: layers, what a light import may load, no remote code, the line
budget.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from cllm.__main__ import PROGRAMS as PROGRAM_NAMES

PACKAGE = Path(__file__).parents[1] / "cllm"
LAYER_1 = {
    "config",
    "messages",
    "memory",
    "data",
    "data.reader",
    "data.schema",
    "data.quality",
    "data.text",
    "data.encoding",
    "data.json_rows",
    "data.template",
    "data.dialects",
    "model",
    "model.families",
    "metrics",
    "serve",
    "__init__",
    "__main__",
}
LAYER_2 = {
    "data.cache",
    "data.encode",
    "data.packing",
    "model.fragments",
    "model.nf4",
    "model.lora",
    "model.attention",
    "model.offload",
    "learn",
    "learn.loss",
    "learn.optim",
    "learn.dist",
    "learn.ladder",
}
PROGRAMS = {"doctor", "train", "eval", "bench", "chat", "check", "export", "serve.api", "serve.ui"}
HEAVY = {
    "torch",
    "transformers",
    "gradio",
    "fastapi",
    "uvicorn",
    "matplotlib",
    "jieba",
    "numpy",
    "safetensors",
    "sentencepiece",
    "gguf",
}
# docs/architecture.md says why not the planned 6,000
MAX_PACKAGE, MAX_FILE, MAX_FUNCTION = 9350, 400, 60


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__") if name != "__init__" else name] = path
    return found


def layer(name: str) -> int:
    if name in PROGRAMS:
        return 4
    if name in LAYER_1 or name.startswith("metrics."):
        return 1
    return 2 if name in LAYER_2 else 3


def imports(path: Path, *, top_level: bool) -> set[str]:
    """Absolute names imported; with `top_level`, only what runs at import time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                found.update(
                    {child.module or ""} | {f"{child.module}.{alias.name}" for alias in child.names}
                )
            elif top_level and isinstance(
                child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
            ):
                continue
            visit(child)

    visit(tree)
    return found


def inner(path: Path) -> set[str]:
    known = modules()
    return {
        name[5:]
        for name in imports(path, top_level=False)
        if name.startswith("cllm.") and name[5:] in known
    }


@pytest.mark.parametrize("name", modules())
def test_imports_point_upwards_only(name: str) -> None:
    for other in inner(modules()[name]):
        assert layer(other) <= layer(name), (
            f"{name} (layer {layer(name)}) imports {other} (layer {layer(other)})"
        )


@pytest.mark.parametrize(
    "name", [n for n in modules() if n.split(".")[0] in ("data", "model", "learn")]
)
def test_rooms_meet_in_the_programs_only(name: str) -> None:
    room = name.split(".")[0]
    allowed = (
        {"data.encode", "data.packing", "model.attention"}
        if room == "learn"
        else {"data.template", "data.dialects", "data.schema", "data.encode"}
        if name == "model.tokenizer"
        else set()
    )
    others = {
        other
        for other in inner(modules()[name])
        if other.split(".")[0] in {"data", "model", "learn"} - {room} and "." in other
    }
    assert others <= allowed, f"{name} imports {others - allowed}"


def test_the_data_cache_knows_all_code_that_decides_ids() -> None:
    from cllm.data.cache import _CODE

    hashed = {file for pattern in _CODE for file in PACKAGE.glob(pattern)}
    reached, waiting = set(), ["model.tokenizer"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting += [
            other
            for other in inner(modules()[name]) - reached
            if other.startswith(("data.", "model."))
        ]
    # where the vocabulary's bytes come from: hashed as saved
    reading = {"model", "data", "model.gguf", "model.families", "model.shards"}
    assert {modules()[name] for name in reached - reading} <= hashed


def test_evaluation_is_assembly_and_knows_no_program() -> None:
    rooms = [name for name in modules() if name.split(".")[0] == "evaluate"]
    assert len(rooms) == 5 and {layer(name) for name in rooms} == {3}
    assert not {other for name in rooms for other in inner(modules()[name])} & PROGRAMS


@pytest.mark.parametrize("name", [n for n in modules() if layer(n) in (1, 4)])
def test_light_modules_import_nothing_heavy_at_the_top(name: str) -> None:
    top = {n.split(".")[0] for n in imports(modules()[name], top_level=True)}
    assert not top & HEAVY, f"{name} imports {top & HEAVY} when it is imported"


def test_help_answers_quickly_and_without_torch() -> None:
    code = "import sys, cllm.train, cllm.config, cllm.data.schema, cllm.metrics; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize("name", PROGRAM_NAMES)
def test_every_program_runs_as_a_module(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"cllm.{name}", "--help"], capture_output=True, text=True, check=True
    )
    assert f"usage: cllm.{name}" in done.stdout


def test_no_remote_code_no_pickle_no_trainer() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text and "import pickle" not in text, path.name
        assert not {n.split(".")[0] for n in imports(path, top_level=False)} & {
            "peft",
            "accelerate",
            "datasets",
            "trl",
        }, path.name


@pytest.mark.parametrize("name", modules())
def test_what_is_public_is_documented(name: str) -> None:
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    public = [
        n
        for n in tree.body
        if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")
    ]
    undocumented = [node.name for node in public if not ast.get_docstring(node)]
    assert ast.get_docstring(tree) and not undocumented, undocumented


def code_lines(text: str) -> int:
    tree = ast.parse(text)
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                skipped |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    drop = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    kept: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in drop:
            kept |= set(range(token.start[0], token.end[0] + 1))
    return len(kept - skipped)


def test_line_budget() -> None:
    counts = {
        name: code_lines(path.read_text(encoding="utf-8")) for name, path in modules().items()
    }
    assert not {n: c for n, c in counts.items() if c > MAX_FILE}
    assert sum(counts.values()) <= MAX_PACKAGE, f"{sum(counts.values())} lines of code"
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno
                assert length <= MAX_FUNCTION, f"{name}.{node.name} has {length} lines"
