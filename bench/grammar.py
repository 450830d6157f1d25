"""Answers under random JSON schemas, and what the mask costs: `python bench/grammar.py [--schemas
200] [--out FILE]`, with `pip install llguidance hypothesis-jsonschema 'hypothesis<6.113'
jsonschema`.

tiny-zh answers at temperature 1, sixteen schemas at a time. Leaves of a schema are drawn by
hypothesis-jsonschema from a schema of schemas and nested by hypothesis; strings, arrays and numbers
have limits, so that answers end (the digits of a number by `MAX_NUMBER` alone). What the library
refuses is counted, and another one is drawn. An answer that ends by itself must be JSON
that jsonschema finds valid; one that `max_tokens` cuts is counted apart. Speed: the same batch
decodes the same number of tokens, free and under a JSON grammar, one after the other, the best of
several. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonschema
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from hypothesis_jsonschema import from_schema

from cllm.assembly import Loaded, open_model
from cllm.data.message import Message
from cllm.messages import UserError
from cllm.serve.engine import Engine
from cllm.serve.grammar import Grammar, Grammars
from cllm.serve.sampling import Sampling

MAX_TOKENS = 490  # tiny-zh has 512 positions
ROWS = 16
NAMES = ["name", "city", "名", "值", "a b", "x", '"', "n\\n"]


def kind(name: str, **fields: Any) -> dict[str, Any]:
    """The schema of schemas of one type, with all of these fields; of no type for ""."""
    properties = fields | ({"type": {"const": name}} if name else {})
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def bounds(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def schemas() -> SearchStrategy[Any]:
    """Leaves by hypothesis-jsonschema, from a schema of schemas; nested by hypothesis."""
    value = {"enum": ["", "是", "no", 0, -7, 1.5, True, None, 'a"b']}
    patterns = {"enum": ["^[a-z]{2,5}$", "^\\d{4}-\\d{2}$", "^(是|否)$"]}
    leaf = {
        "anyOf": [
            {"const": {"type": "boolean"}},
            {"const": {"type": "null"}},
            kind("string", maxLength=bounds(3, 12), minLength=bounds(0, 3)),
            kind("string", pattern=patterns),
            kind("string", format={"enum": ["date", "uuid", "ipv4"]}),
            kind("integer", minimum=bounds(-50, 0), maximum=bounds(1, 5000)),
            kind("number", minimum=bounds(-5, 0), exclusiveMaximum=bounds(1, 9)),
            kind("", enum={"type": "array", "items": value, "minItems": 1, "maxItems": 4}),
            kind("", const=value),
        ]
    }

    def nested(inner: SearchStrategy[Any]) -> SearchStrategy[Any]:
        fields = st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
        return st.one_of(
            st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)}),
            st.fixed_dictionaries(
                {"type": st.just("array"), "items": inner, "maxItems": st.integers(2, 4)},
                optional={"minItems": st.integers(0, 2)},
            ),
            st.fixed_dictionaries(
                {"type": st.just("object"), "properties": fields},
                optional={"required": st.lists(st.sampled_from(NAMES[:4]), unique=True)},
            ).map(lambda schema: schema | {"additionalProperties": False}),
        )

    return st.recursive(from_schema(leaf), nested, max_leaves=8)


def drawn(count: int, grammars: Grammars) -> tuple[list[tuple[Any, Grammar]], dict[str, int]]:
    """`count` different schemas that compile, and how often which refusal was heard."""
    accepted: dict[str, tuple[Any, Grammar]] = {}
    refusals: dict[str, int] = {}

    @settings(
        max_examples=20 * count,
        database=None,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(schemas())
    def draw(schema: Any) -> None:
        text = json.dumps(schema, sort_keys=True)
        if len(accepted) >= count or text in accepted:
            return
        try:
            accepted[text] = schema, grammars.compile(schema)
        except UserError as error:
            reason = error.args[0].partition(": ")[2][:60]
            refusals[reason] = refusals.get(reason, 0) + 1

    draw()
    return list(accepted.values()), refusals


def answers(loaded: Loaded, chosen: list[tuple[Any, Grammar]]) -> list[tuple[str, str]]:
    """(text, why it ended) of an answer to each schema; a free row beside every sixteen."""
    engine = loaded.engine()
    prompt = loaded.tokenizer.encode_chat([Message("user", "用 JSON 回答。")])
    said = []
    for start in range(0, len(chosen), ROWS):
        rows = [
            engine._row(
                prompt,
                Sampling(max_new_tokens=MAX_TOKENS, temperature=1, seed=start + i, grammar=grammar),
                0,
            )
            for i, (_, grammar) in enumerate(chosen[start : start + ROWS])
        ]
        engine.waiting.extend([*rows, engine._row(prompt, Sampling(max_new_tokens=8), 0)])
        while not all(row.finish_reason for row in rows):
            engine.step()
        said += [
            (loaded.tokenizer.decode(row.ids[len(prompt) :]), row.finish_reason) for row in rows
        ]
    return said


def faults(chosen: list[tuple[Any, Grammar]], said: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Answers that ended by themselves and are not what their schema says."""
    wrong = []
    checker = jsonschema.FormatChecker()
    for (schema, _), (text, reason) in zip(chosen, said, strict=True):
        if reason == "length":
            continue
        try:
            assert reason == "stop", reason
            jsonschema.Draft202012Validator(schema, format_checker=checker).validate(
                json.loads(text)
            )
        except Exception as error:
            wrong.append({"schema": schema, "text": text, "error": f"{error}"[:200]})
    return wrong


def milliseconds(engine: Engine, rows: int, tokens: int, grammar: Grammar | None) -> float:
    """CPU time per step of a batch that decodes `tokens` tokens each."""
    prompts = [[5] * 8] * rows
    plan = Sampling(
        max_new_tokens=tokens, temperature=1, seed=0, stop_ids=frozenset(), grammar=grammar
    )
    begin = time.process_time()
    made = engine.generate(prompts, plan, 0)
    spent = time.process_time() - begin
    assert all(len(ids) == tokens for ids in made)
    return 1000 * spent / tokens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    loaded = open_model("tiny-zh", device="cpu")
    grammars = Grammars(loaded.tokenizer)
    chosen, refusals = drawn(arguments.schemas, grammars)
    said = answers(loaded, chosen)
    wrong = faults(chosen, said)
    for fault in wrong:
        print(json.dumps(fault, ensure_ascii=False), file=sys.stderr)
    # never complete, so that both decode the same number of tokens
    endless = grammars.compile(
        {
            "type": "array",
            "minItems": 10_000,
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "number"}},
                "required": ["name", "n"],
                "additionalProperties": False,
            },
        }
    )
    engine = loaded.engine()
    speed = {}
    for rows in (1, ROWS):
        free, masked = [], []
        for _ in range(arguments.rounds):
            free.append(milliseconds(engine, rows, arguments.tokens, None))
            masked.append(milliseconds(engine, rows, arguments.tokens, endless))
        speed[f"{rows} rows"] = {
            "free_ms_per_step": round(min(free), 3),
            "masked_ms_per_step": round(min(masked), 3),
            "slower_percent": round(100 * (min(masked) / min(free) - 1), 1),
        }
    ended = [reason for _, reason in said]
    result = {
        "command": " ".join(["python", "bench/grammar.py", *sys.argv[1:]]),
        "schemas": len(chosen),
        "refused_by_the_library": refusals,
        "ended_by_themselves": ended.count("stop"),
        "cut_by_max_tokens": ended.count("length"),
        "valid": ended.count("stop") - len(wrong),
        "decoding": speed,
    }
    if arguments.out:
        arguments.out.write_text(
            json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
