"""The reader on our own rows: its speed on 50,000 of them, and whether it survives a million that
were damaged at random.

    python bench/data.py [--rows 50000] [--mutate 1000000] [--out bench/results/data.json]
    python bench/data.py --peer PYTHON --tokenizer DIR [--rows 50000] --out
    bench/results/data_stage.json
    python bench/data.py --before CHECKOUT --files PATH... [--repeat 7]

Speed: MB of UTF-8 JSON Lines and JSON array a second, on one core, best of three, beside
`json.loads` alone on the same lines, and what a row becomes. Threshold: 20 MB/s. Mutation: rows of
every schema with keys dropped, renamed, doubled and nested, values of every type, and bytes of
their lines cut, doubled and overwritten; each batch is read as a file. Thresholds: no exception, a
conversation or a reject for every line, no empty text, no half surrogate, no "None" or "nan" that
the line lacks; and of as many rows with a word of its own in each text, every such word is in the
conversation or its field is counted as not read. A seed decides all of it.

--peer: the whole data stage (reading, normalizing, deduplicating, holding out 5 %, rendering,
tokenizing, packing) beside LLaMA-Factory's, which PYTHON has installed
(bench/llamafactory_data.py), on the same rows with the same tokenizer.json and ChatML, each run in
a process of its own, alternated; imports and loading the tokenizer are not timed on either side.
Thresholds: 5 times the speed cold, and under 1 s when nothing has changed.

--before: for each file under the paths, the CPU time of the reader of this checkout and of another
one, in turn, the best of --repeat; and how many characters of how many rows each has read, since a
reader that reads more of a row does other work.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
THRESHOLD_MB_PER_SECOND = 20.0
BATCH = 20_000
ROW_TOKENS = 2048
WORDS = "我们 今天 学习 怎样 描述 一个 城市 的 历史 和 天气 ， 并且 比较 不同 季节 里".split()
WORDS += "人们 喜欢 的 食物 。 请 写出 三 点 理由 ， 简单 说明 ；".split()
BAD_VALUES: list[Any] = [
    None,
    "",
    " ",
    0,
    -1.5,
    float("nan"),
    True,
    [],
    {},
    [[]],
    "\u200b",
    "\ud83d",
    "None",
    "无",
    {"text": None},
    ["甲", "乙"],
]
INSTRUCTION_CHARS, INPUT_CHARS = (3, 10, 12, 15, 19, 25, 41, 80), (1, 3, 6, 13, 26, 50, 150, 400)
OUTPUT_CHARS = (1, 8, 17, 57, 123, 185, 420, 900)
BLANK = b" \t\r\x00\x1a"


def sentence(rng: random.Random, size: int) -> str:
    return "".join(rng.choices(WORDS, k=size // 2 + 1))[: max(1, size)]


def text(rng: random.Random, deciles: tuple[int, ...]) -> str:
    """Random words of a length drawn from a distribution given by its 0, 10, 25, 50, 75, 90, 99 and
    100 % quantiles, in characters.
    """
    draw, marks = rng.random(), (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
    at = max(i for i, mark in enumerate(marks[:-1]) if draw >= mark)
    size = deciles[at] + (deciles[at + 1] - deciles[at]) * (draw - marks[at]) / (
        marks[at + 1] - marks[at]
    )
    return sentence(rng, round(size))


def rows(count: int) -> list[dict[str, str]]:
    """Instruction rows with the lengths of 8,000 rows of Alpaca in Chinese: 110 characters on
    average, 43 % with an input.
    """
    rng = random.Random(4)
    made = []
    for number in range(count):
        extra = text(rng, INPUT_CHARS) if rng.random() < 0.43 else ""
        made.append(
            {
                "instruction": f"{number}：{text(rng, INSTRUCTION_CHARS)}",
                "input": extra,
                "output": text(rng, OUTPUT_CHARS),
            }
        )
    return made


def json_line(row: object) -> str:
    return json.dumps(row, ensure_ascii=False)


def seeds() -> list[dict[str, Any]]:
    """A row of every schema."""
    q, a = "怎样泡一壶好茶？", "水要热，茶叶不要多。"
    turns = [("human", q), ("gpt", a), ("human", "还有呢？"), ("gpt", "慢慢喝。")]
    return [
        {"instruction": q, "input": "", "output": a},
        {
            "instruction": q,
            "input": "绿茶",
            "output": a,
            "history": [["你好", "你好！"]],
            "system": "答得短些",
        },
        {"prompt": q, "response": a, "history": [["你好", "你好！"]]},
        {"question": q, "std_answer": a, "class": "生活"},
        {"ask": "无", "title": q, "answer": a},
        {"content": q, "summary": a},
        {"conversations": [{"from": who, "value": what} for who, what in turns], "tools": "[]"},
        {
            "messages": [
                {"role": "user", "content": q},
                {"role": "assistant", "content": [{"type": "text", "text": a}]},
            ],
            "label": True,
        },
        {
            "conversation": [
                {"human": q, "assistant": a},
                {"human": "还有呢？", "assistant": "慢慢喝。"},
            ],
            "category": "生活",
        },
        {"conversation": [{"system": "短", "input": q, "output": a}]},
        {
            "chat": {
                f"turn_{n}": {"Human": f"<|Human|>: {q}<eoh>", "MOSS": f"<|MOSS|>: {a}<eom>"}
                for n in (2, 1, 10)
            }
        },
        {"instruction": q, "instances": [{"input": "绿茶", "output": a}]},
        {"paragraph": [{"q": q, "a": a}]},
        {"messages": [{"message": q}, {"message": a}]},
        {"text": f"Human: {q}\nAssistant: {a}"},
        {"conversations": [f"[客户] {q}", f"[律师] {a}"]},
        {"prompt": q, "chosen": a, "rejected": "不知道。"},
        {
            "conversations": [{"from": "human", "value": q}],
            "chosen": {"from": "gpt", "value": a},
            "rejected": {"from": "gpt", "value": ""},
        },
        {"指令": q, "输入": "", "输出": a},
        {"instruction": {"instruction": {"text": q}}, "output": [a, "次好"]},
        {
            "question": q,
            "options": {"A": "用沸水", "B": "用凉水"},
            "answer": "A",
            "context": "茶经",
        },
        {
            "question": q,
            "A": "用沸水",
            "B": "用凉水",
            "answer": "A",
            "cot": "想一想",
            "note": "附注",
        },
        {"messages": [{"role": "user", "content": q}, *answers(a)], "tools": [TOOL]},
        {
            "chat": f'USER: {q}\n\nASSISTANT: <functioncall> {{"name": "boil", "arguments": {{}}}} '
            f"<|endoftext|>\n\nFUNCTION RESPONSE: 沸\n\nASSISTANT: {a} <|endoftext|>"
        },
        {
            "prompt": [{"role": "user", "content": q}],
            "completion": [{"role": "assistant", "content": a}],
        },
        {
            "system_prompt": "短",
            "Question": q,
            "Answer": a,
            "passages": [{"title": "茶", "text": "经"}],
        },
    ]


TOOL = {"type": "function", "function": {"name": "boil", "description": "烧水"}}


def answers(text: str) -> list[dict[str, Any]]:
    """A call with reasoning, its result, and an answer of typed parts that is not trained."""
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "boil", "arguments": '{"degrees": "沸"}'},
    }
    parts = [{"type": "thinking", "thinking": "水开了"}, {"type": "text", "text": text}]
    return [
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "先烧水"},
        {"role": "tool", "tool_call_id": "c1", "content": "水已沸"},
        {"role": "assistant", "content": parts, "loss": False},
    ]


def mutated(rng: random.Random, value: Any, keys: list[str]) -> Any:
    """`value` with one thing changed somewhere in it."""
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        match rng.randrange(6):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {(rng.choice(keys) if k == key else k): v for k, v in value.items()}
            case 2:
                return {**value, rng.choice(keys): rng.choice(BAD_VALUES)}
            case _:
                return {**value, key: mutated(rng, value[key], keys)}
    if isinstance(value, list) and value:
        spot = rng.randrange(len(value))
        changed = [
            [],
            value[spot : spot + 1] * 2,
            [mutated(rng, value[spot], keys)],
            [rng.choice(BAD_VALUES)],
        ][rng.randrange(4)]
        return value[:spot] + changed + value[spot + 1 :]
    return rng.choice(
        [*BAD_VALUES, {"text": value}, [value], [value, value], {rng.choice(keys): value}]
    )


def damaged(rng: random.Random, line: bytes) -> bytes:
    """`line` with some bytes cut, doubled or overwritten; never with a line feed in it."""
    spot, size = rng.randrange(len(line)), rng.randrange(1, 8)
    noise = bytes(rng.randrange(256) for _ in range(size))
    changed = [
        line[:spot],
        line[:spot] + line[spot + size :],
        line[:spot] + noise + line[spot + size :],
        line[: spot + size] + line[spot:],
    ]
    return rng.choice(changed).replace(b"\n", b"\r")


def survive(count: int) -> dict[str, Any]:
    """Read `count` mutated rows in batches and check what comes out."""
    from cllm.data import Conversation, iter_conversations
    from cllm.data.schema import REASONS
    from cllm.data.turns import SCHEMA_KEYS

    rng, start = random.Random(5), time.perf_counter()
    stock, keys = (
        seeds(),
        sorted(
            SCHEMA_KEYS
            | {
                "from",
                "value",
                "role",
                "label",
                "tools",
                "human",
                "q",
                "message",
                "tool_calls",
                "foo",
            }
        ),
    )
    outcome: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.jsonl"
        for first in range(0, count, BATCH):
            lines = []
            for _ in range(min(BATCH, count - first)):
                row = rng.choice(stock)
                for _ in range(rng.randrange(4)):
                    row = mutated(rng, row, keys)
                line = json.dumps(row, ensure_ascii=rng.random() < 0.3).encode(
                    "utf-8", "surrogatepass"
                )
                lines.append(damaged(rng, line) if rng.random() < 0.4 else line)
            path.write_bytes(b"\n".join(lines))
            results = list(iter_conversations(path))
            expected = sum(bool(line.replace(b"\xef\xbb\xbf", b"").strip(BLANK)) for line in lines)
            assert len(results) == expected, (first, len(results), expected)
            for result in results:
                if not isinstance(result, Conversation):
                    assert result.reason in REASONS and result.detail, result
                    outcome[result.reason] += 1
                    continue
                outcome["valid"] += 1
                for message in result:
                    assert message.words.strip(), result
                    message.content.encode()
                    for word in ("None", "nan", "{'"):
                        assert (
                            word not in message.content or word.encode() in lines[result.line - 1]
                        ), (lines[result.line - 1], result)
    return {
        "rows": count,
        "seconds": round(time.perf_counter() - start, 1),
        "outcome": dict(outcome.most_common()),
    }


def told_apart(value: Any, numbers: Iterator[int]) -> Any:
    """`value` with a word of its own behind each text that is not a role, an id or the like."""
    from cllm.data.fields import is_metadata

    if isinstance(value, dict):
        return {
            key: part if is_metadata(key) else told_apart(part, numbers)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return [told_apart(part, numbers) for part in value]
    if not isinstance(value, str) or not value.strip():
        return value
    text, close = (value[:-2], '"}') if value.endswith('"}') else (value, "")  # JSON stays JSON
    return f"{text} 记{next(numbers)}号{close}"


def lose_nothing(count: int) -> dict[str, Any]:
    """Normalize `count` mutated rows and look for every word of them."""
    from cllm.data import Conversation
    from cllm.data.fields import is_metadata
    from cllm.data.schema import Normalizer
    from cllm.data.turns import SPECIAL_KEYS

    rng, start, normalize = random.Random(6), time.perf_counter(), Normalizer()
    numbers, valid, counted = itertools.count(), 0, 0
    stock, keys = seeds(), sorted(SPECIAL_KEYS | {"from", "value", "role", "content", "note", "q"})
    for _ in range(count):
        row = rng.choice(stock)
        for _ in range(rng.randrange(4)):
            row = mutated(rng, row, keys)
        row = told_apart(row, numbers)
        normalize.unread.clear()
        result = normalize(row)
        if not isinstance(result, Conversation):
            continue
        valid, counted = valid + 1, counted + bool(normalize.unread)
        said = json_line([result.messages, result.tools])
        unread = {name.partition(".")[0] for name in normalize.unread}
        row = row[0] if isinstance(row, list) else row
        for key, value in row.items() if isinstance(row, dict) else ():
            if key in unread or is_metadata(key):
                continue
            for word in re.findall("记[0-9]+号", json_line(value)):
                assert word in said, (word, key, row, result, unread)
    return {
        "rows": count,
        "seconds": round(time.perf_counter() - start, 1),
        "valid": valid,
        "with_unread": counted,
    }


def best_of_three(job: Callable[[], object]) -> float:
    """Seconds of CPU: other work on the machine does not count."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        job()
        seconds.append(time.process_time() - start)
    return min(seconds)


def speed(count: int) -> dict[str, Any]:
    from cllm.data import iter_conversations, read_conversations

    made = rows(count)
    found: dict[str, Any] = {"rows": count}
    with tempfile.TemporaryDirectory() as directory:
        lines, array = Path(directory) / "rows.jsonl", Path(directory) / "rows.json"
        lines.write_text("".join(json_line(row) + "\n" for row in made), encoding="utf-8")
        array.write_text(json.dumps(made, ensure_ascii=False, indent=1), encoding="utf-8")
        conversations, rejects = read_conversations(lines)
        assert (len(conversations), len(rejects)) == (count, 0)
        jobs: dict[str, tuple[Path, Callable[[], object]]] = {
            "json_loads": (
                lines,
                lambda: [json.loads(line) for line in lines.open(encoding="utf-8")],
            ),
            "lines_collected": (lines, lambda: read_conversations(lines)),
            "lines_streamed": (lines, lambda: sum(1 for _ in iter_conversations(lines))),
            "array_streamed": (array, lambda: sum(1 for _ in iter_conversations(array))),
        }
        for name, (path, job) in jobs.items():
            found[f"{name}_mb_per_second"] = round(
                path.stat().st_size / 1e6 / best_of_three(job), 1
            )
        found["megabytes"] = round(lines.stat().st_size / 1e6, 1)
    return found


def stage(file: str, tokenizer_path: str, row_tokens: int) -> dict[str, Any]:
    """Our data stage as `cllm.train` runs it, in this process; CLLM_DATA_CACHE says where the cache
    is.
    """
    import transformers.utils.chat_template_utils  # noqa: F401  # imports are timed on neither side

    from cllm.config import DataConfig, Source
    from cllm.data.encode import encode_set
    from cllm.data.packing import PackedRows
    from cllm.data.sources import prepare
    from cllm.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path, template="chatml")
    start, cpu = time.perf_counter(), time.process_time()
    found = prepare(DataConfig(train=(Source(path=file),), held_out=0.05))
    examples, _, _ = encode_set(found.train, tokenizer, kind="chat", max_tokens=row_tokens)
    held_out, _, _ = encode_set(found.held_out, tokenizer, kind="chat", max_tokens=row_tokens)
    packed = PackedRows(examples, row_tokens, seed=1), PackedRows(held_out, row_tokens)
    seconds = {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }
    return seconds | {"tokens": sum(examples.sizes), "rows": len(packed[0])}


def side_by_side(
    lines: list[str], peer: str, tokenizer: str, row_tokens: int, repeat: int
) -> dict[str, Any]:
    """Ours cold, ours warm, the peer with one worker and with two, in turn; the best of `repeat`
    runs of each.
    """

    def run(*command: object) -> dict[str, Any]:
        environment = {
            **os.environ,
            "CLLM_DATA_CACHE": str(cache),
            "PYTHONPATH": str(ROOT) if command[0] == sys.executable else "",
        }
        environment.pop("OMP_NUM_THREADS", None)
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, check=True
        )
        return dict(json.loads(done.stdout.strip().split("\n")[-1]))

    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        file, cache = Path(directory) / "rows.json", Path(directory) / "cache"
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        for _ in range(repeat):
            shutil.rmtree(cache, ignore_errors=True)
            for name in ("cold", "warm"):
                runs.setdefault(name, []).append(
                    run(sys.executable, __file__, "--stage", file, "--tokenizer", tokenizer)
                )
            for workers in (1, 2):
                command = [
                    peer,
                    ROOT / "bench" / "llamafactory_data.py",
                    file,
                    tokenizer,
                    workers,
                    row_tokens,
                ]
                runs.setdefault(f"peer_{workers}", []).append(run(*command))
    best: dict[str, Any] = {
        name: min(found, key=lambda one: one["seconds"]) for name, found in runs.items()
    }
    ratios = {
        f"{key}_{n}": round(best[f"peer_{n}"][key] / best["cold"][key], 2)
        for n in (1, 2)
        for key in ("seconds", "cpu_seconds")
    }
    fast = best["warm"]["seconds"] < 1 and min(ratios["seconds_1"], ratios["seconds_2"]) >= 5
    return {
        "instruction_rows": len(lines),
        "cores": len(os.sched_getaffinity(0)),
        "row_tokens": row_tokens,
        **best,
        "peer_over_ours": ratios,
        "passed": fast,
    }


TIMED = """
import sys, time
from cllm.data import read_conversations
for path in sys.stdin:
    start = time.process_time()
    kept, rejects = read_conversations(path.rstrip("\\n"))
    seconds = time.process_time() - start
    characters = sum(len(message.content) for item in kept for message in item)
    print(seconds, len(kept), len(rejects), characters, flush=True)
"""


def before_and_now(before: Path, paths: list[Path], repeat: int) -> dict[str, Any]:
    """Milliseconds of CPU that each file takes the reader of `before` and ours, in turn."""
    files = [
        file
        for path in paths
        for file in ([path] if path.is_file() else sorted(path.rglob("*.*")))
        if file.suffix in (".json", ".jsonl", ".csv", ".tsv", ".parquet")
    ]
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", TIMED],
            env={**os.environ, "PYTHONPATH": str(root), "CLLM_LANG": "en"},
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for root in (before, ROOT)
    ]
    table, sums = [], [0.0, 0.0]
    for file in files:
        best = [[float("inf")], [float("inf")]]
        for _ in range(repeat):
            for side, reader in enumerate(readers):
                assert reader.stdin and reader.stdout
                print(file.absolute(), file=reader.stdin, flush=True)
                seconds, *read = map(float, reader.stdout.readline().split())
                best[side] = [min(best[side][0], seconds), *read]
        sums = [total + one[0] for total, one in zip(sums, best, strict=True)]
        milliseconds = [round(1000 * one[0], 2) for one in best]
        table.append([file.name, *milliseconds, round(best[1][0] / best[0][0], 2), *best])
        shown = ["/".join(f"{count:.0f}" for count in one[1:]) for one in best]
        print(*table[-1][:4], *shown, sep="\t", file=sys.stderr)
    return {"seconds": sums, "ratio": round(sums[1] / sums[0], 3), "files": table}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--mutate", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--tokenizer", metavar="DIR")
    parser.add_argument(
        "--file",
        type=Path,
        help="with --peer: JSON Lines of instruction, input, output in place of made-up rows",
    )
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--files", type=Path, nargs="+", default=[], metavar="PATH")
    parser.add_argument("--stage", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(stage(options.stage, options.tokenizer, ROW_TOKENS)))
        return 0
    if options.before:
        timed = before_and_now(options.before, options.files, options.repeat)
        print(json.dumps({key: timed[key] for key in ("seconds", "ratio")}))
        if options.out:
            options.out.write_text(json.dumps(timed, indent=1) + "\n", encoding="utf-8")
        return 0
    if options.peer:
        lines = (
            options.file.read_text(encoding="utf-8").rstrip("\n").split("\n")
            if options.file
            else list(map(json_line, rows(options.rows)))
        )
        compared = side_by_side(lines, options.peer, options.tokenizer, ROW_TOKENS, options.repeat)
        compared["command"] = (
            f"python bench/data.py --peer PYTHON --tokenizer DIR --repeat {options.repeat}"
            + " --file FILE" * bool(options.file)
        )
        if options.out:
            options.out.write_text(json.dumps(compared, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(compared))
        return 0 if compared["passed"] else 1
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "speed": speed(options.rows),
    }
    slowest = min(
        value for key, value in found["speed"].items() if key.startswith(("lines", "array"))
    )
    found["threshold_mb_per_second"], found["passed"] = (
        THRESHOLD_MB_PER_SECOND,
        slowest >= THRESHOLD_MB_PER_SECOND,
    )
    if options.mutate:
        found["mutated"] = survive(options.mutate)
        found["lossless"] = lose_nothing(options.mutate)
    text = json.dumps(found, ensure_ascii=False)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
