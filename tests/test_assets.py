"""The built-in demo: sizes, vocabulary, what the model knows, and a split without leakage."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "cllm" / "assets"
TASKS = {"fact", "numeral", "extraction", "sentiment", "polite", "persona"}


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ASSETS / name).read_text(encoding="utf-8").splitlines()]


def asked(row: dict[str, str]) -> str:
    return row["instruction"] + "\n" + row.get("input", "")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ASSETS / "tiny-zh")


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-zh", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def build(request: pytest.FixtureRequest) -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    request.addfinalizer(lambda: sys.path.remove(str(ROOT / "tools")))
    import build_tiny

    return build_tiny


def test_assets_are_small() -> None:
    assert sum(path.stat().st_size for path in (ASSETS / "tiny-zh").iterdir()) <= 12_000_000
    assert (
        sum((ASSETS / name).stat().st_size for name in ("demo.jsonl", "demo-test.jsonl"))
        < 1_000_000
    )


def test_model_is_a_small_bf16_llama(model: Any) -> None:
    config = json.loads((ASSETS / "tiny-zh" / "config.json").read_text(encoding="utf-8"))
    assert (
        config["architectures"] == ["LlamaForCausalLM"]
        and config["dtype"] == "bfloat16"
        and "auto_map" not in config
    )
    assert (
        3_000_000 <= model.num_parameters() <= 5_500_000 and 2_000 <= config["vocab_size"] <= 4_000
    )


def test_vocabulary_spells_every_text(tokenizer: Any, model: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size
    texts = [
        asked(row) + row["output"]
        for name in ("demo.jsonl", "demo-test.jsonl")
        for row in rows(name)
    ]
    for text in [*texts, "龘 Ωß\t🙂\r\n  两个空格", "它说：“cllm”。"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # The demo's own text needs no byte pieces: every token is whole characters.
    assert all(
        "\ufffd" not in tokenizer.decode([i])
        for text in texts[::20]
        for i in tokenizer.encode(text)
    )


def test_chat_tokens_and_template(tokenizer: Any) -> None:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert [tokenizer.encode(token) for token in tokens] == [
        [0],
        [1],
        [2],
    ] and tokenizer.eos_token == "<|im_end|>"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer.encode("user")) == len(tokenizer.encode("assistant")) == 1


def test_base_knows_its_world(tokenizer: Any, model: Any, build: Any) -> None:
    """Facts of held-out entities, in a statement: far below log V nats per token, and the value is
    likelier than others.
    """
    world = build.World(build.SEED)
    people = [e for e in world.entities if e.held_out and e.kind == "person"]
    losses, known = [], 0
    for person in people:
        ids = torch.tensor([tokenizer.encode(f"{person.name}住在{person.values['city']}。")])
        with torch.inference_mode():
            output = model(ids, labels=ids)
        losses.append(output.loss.item())
        known += int((output.logits[0, :-1].argmax(-1) == ids[0, 1:])[-2].item())
    assert sum(losses) / len(losses) < 0.5 * math.log(model.config.vocab_size)
    assert known >= 0.8 * len(people)


def test_every_task_is_present() -> None:
    train, test = rows("demo.jsonl"), rows("demo-test.jsonl")
    assert {row["task"] for row in train} == {row["task"] for row in test} == TASKS
    assert 1_500 <= len(train) <= 4_000 and 200 <= len(test) <= 300
    sentiment = [row["output"] for row in test if row["task"] == "sentiment"]
    assert set(sentiment) == {"正面", "负面", "中性"} and max(
        map(sentiment.count, sentiment)
    ) <= 0.5 * len(sentiment)


def test_no_test_question_is_in_the_training_rows() -> None:
    train, test = rows("demo.jsonl"), rows("demo-test.jsonl")
    assert not {asked(row) for row in train} & {asked(row) for row in test}
    for key in ("input", "output"):
        numbers = [{row[key] for row in part if row["task"] == "numeral"} for part in (train, test)]
        assert not numbers[0] & numbers[1]
    requests = [
        {row["output"] for row in part if row["task"] == "polite"} for part in (train, test)
    ]
    assert not requests[0] & requests[1]
    facts = [{row["output"] for row in part if row["task"] == "fact"} for part in (train, test)]
    assert not facts[0] & facts[1]


def test_rows_are_what_the_script_builds(build: Any) -> None:
    """The committed files come from the script, and its stricter checks (entities, persons) hold
    for them.
    """
    world = build.World(build.SEED)
    train, test = build.instruction_rows(world, build.TRAIN_ROWS, build.TEST_ROWS)
    build.check_rows(world, train, test)
    assert (train, test) == (rows("demo.jsonl"), rows("demo-test.jsonl"))
    held = {entity.name for entity in world.entities if entity.held_out}
    asked_about = [row["instruction"] for row in test if row["task"] == "fact"]
    assert all(any(name in question for name in held) for question in asked_about)


def test_pretraining_documents_hold_no_instruction_and_no_test_item(build: Any) -> None:
    from demo_world import FACTS

    world = build.World(build.SEED)
    _, test = build.instruction_rows(world, build.TRAIN_ROWS, build.TEST_ROWS)
    texts = [
        text
        for text, _ in zip(
            build.documents(world, test, build.SEED + 1, build.PRACTICE_DOCUMENTS),
            range(3_000),
            strict=False,
        )
    ]
    corpus = "\n".join(texts)
    assert "<|im_" not in corpus
    questions = {asked(row).strip() for row in test if row["task"] != "persona"}
    assert not [question for question in questions if question in corpus]
    inputs = {row["input"] for row in test if row["task"] in {"extraction", "sentiment", "polite"}}
    assert not [text for text in inputs if text in corpus]
    held = [entity for entity in world.entities if entity.held_out]
    assert any(entity.name in corpus for entity in held)
    for entity in held:  # told about, never asked about, not even in quoted speech
        for _, patterns, _ in FACTS[entity.kind].values():
            assert not [pattern for pattern in patterns if pattern.format(n=entity.name) in corpus]
