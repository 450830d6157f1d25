"""`python -m cllm.eval RUN|MODEL --data FILE`: what a model answers, scored against the references, before and after the adapter.

Loss, corpus BLEU (sacrebleu's `zh`), ROUGE-L over characters, the numbers of the LLaMA-Factory and ChatGLM scripts (jieba ROUGE, character
BLEU-4) and exact match, beside two baselines that need no model: copying the question, and the most frequent training answer.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.data.schema import Conversation, Message
from cllm.messages import UserError, note, say, table

if TYPE_CHECKING:
    from torch import nn

    from cllm.data.packing import PackedBatch
    from cllm.learn.optim import Precision
    from cllm.model.tokenizer import Tokenizer
    from cllm.serve.engine import Engine

COLUMNS = ("loss", "bleu-zh", "rouge-l-char", "bleu-4", "rouge-l", "exact")


def held_out_loss(model: nn.Module, rows: Sequence[PackedBatch], precision: Precision, chunk_bytes: int) -> float:
    """Mean nats per supervised token over packed rows; logits only at supervised positions, a chunk at a time."""
    import torch

    from cllm.learn.loss import row_nll
    from cllm.learn.optim import out_of_memory
    from cllm.model.offload import device_of

    device = device_of(model)
    was_training = model.training
    model.eval()

    def total(row: PackedBatch) -> float:
        try:
            return row_nll(model, row.to(device), chunk_bytes).double().sum().item()
        except Exception as error:
            if not out_of_memory(error) or len(row.cu_seqlens) == 2:  # a single sequence cannot be split
                raise
        return sum(map(total, row.split(len(row.input_ids) // 2)))

    with torch.no_grad(), precision.autocast():
        summed = sum(map(total, rows))
    model.train(was_training)
    return summed / max(1, sum(row.weight for row in rows))


def question_of(conversation: Conversation) -> list[Message]:
    """Everything before the last answer."""
    return list(conversation.messages[:-1])


def answer_of(conversation: Conversation) -> str:
    """The last answer: the reference."""
    return conversation.messages[-1].content


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    questions: Sequence[list[Message]],
    *,
    adapter: bool,
    max_new_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy answers, in the order of the questions."""
    from cllm.serve.engine import Sampling

    prompts = [tokenizer.encode_chat(question) for question in questions]
    outputs = engine.generate(prompts, Sampling(max_new_tokens=max_new_tokens), adapter=adapter, progress=progress)
    return [tokenizer.decode(ids).strip() for ids in outputs]


@contextmanager
def unless_memory_is_short(engine: Engine) -> Iterator[None]:
    """Answers that do not fit into memory are left out, and it is said: nothing that was learned depends on them."""
    try:
        yield
    except RuntimeError as error:
        if not engine.healthy:  # another failure than a lack of memory
            raise
        note("train.unanswered", detail=error)


def scores(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """All metrics of one system, 0-100; `exact` is the share of answers equal to the reference."""
    from cllm.metrics import corpus_bleu, generation_scores, rouge

    pairs = list(zip(hypotheses, references, strict=True))
    llamafactory = [generation_scores(h, r) for h, r in pairs]
    mean = {key: sum(s[key] for s in llamafactory) / len(pairs) for key in ("rouge-1", "rouge-2", "rouge-l", "bleu-4")}
    rouge_char = sum(rouge(h, [r], tokenize="char")["rougeL"].value for h, r in pairs) / len(pairs)
    return {
        "bleu-zh": corpus_bleu(list(hypotheses), [list(references)]).value, "rouge-l-char": rouge_char, **mean,
        "exact": 100 * sum(h.strip() == r.strip() for h, r in pairs) / len(pairs),
    }  # fmt: skip


def few_shot(train: Sequence[Conversation], conversation: Conversation, shots: int, seed: int) -> list[Message]:
    """The question with `shots` training conversations of the same category before it, as earlier turns."""
    same = [c for c in train if c.category == conversation.category] or list(train)
    chosen = random.Random(f"{seed}/{conversation.messages[0].content}").sample(same, min(shots, len(same)))
    return [message for shot in chosen for message in shot.messages] + question_of(conversation)


def majority(train: Sequence[Conversation], conversations: Sequence[Conversation]) -> list[str]:
    """For each conversation the most frequent training answer of its category."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for conversation in train:
        answers[conversation.category][answer_of(conversation)] += 1
    best = {category: counter.most_common(1)[0][0] for category, counter in answers.items()}
    return [best.get(conversation.category, "") for conversation in conversations]


def compare(
    engine: Engine,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    train: Sequence[Conversation] = (),
    shots: int = 0,
    adapter: bool = True,
    base: bool = True,
    max_new_tokens: int = 256,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Answers of every system on the same questions -> (system -> scores, one sample per conversation).

    Systems: `copy` (the question itself), `majority` (with `train`), `base`, `base N-shot` (with `train` and `shots`), `adapter`.
    Each system's scores hold `by_category` (exact match per category) when there is more than one.
    """
    questions = [question_of(c) for c in conversations]
    references = [answer_of(c) for c in conversations]

    def answers(asked: Sequence[list[Message]], adapter: bool) -> list[str]:
        return generate(engine, tokenizer, asked, adapter=adapter, max_new_tokens=max_new_tokens, progress=progress)

    systems: dict[str, list[str]] = {"copy": [question[-1].content for question in questions]}
    if train:
        systems["majority"] = majority(train, conversations)
    if base:
        systems["base"] = answers(questions, False)
        if train and shots:
            systems[f"base {shots}-shot"] = answers([few_shot(train, c, shots, seed) for c in conversations], False)
    if adapter:
        systems["adapter"] = answers(questions, True)
    results: dict[str, dict[str, Any]] = {}
    categories = [c.category for c in conversations]
    for name, hypotheses in systems.items():
        results[name] = scores(hypotheses, references)
        if len(set(categories)) > 1:
            right: defaultdict[str, list[bool]] = defaultdict(list)
            for category, answer, reference in zip(categories, hypotheses, references, strict=True):
                right[category].append(answer.strip() == reference.strip())
            results[name]["by_category"] = {key: 100 * sum(hits) / len(hits) for key, hits in sorted(right.items())}
    samples: list[dict[str, Any]] = []
    for i, c in enumerate(conversations):
        given = {name: answers[i] for name, answers in systems.items() if name not in ("copy", "majority")}
        question = [m._asdict() for m in questions[i]]
        samples.append({"category": c.category, "messages": question, "reference": references[i], **given})
    return results, samples


def report(results: dict[str, dict[str, Any]]) -> str:
    """The table for people: one line a system, then exact match by category."""

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"

    lines = [["", *COLUMNS]]
    lines += [[name, *(cell(result.get(column)) for column in COLUMNS)] for name, result in results.items()]
    text = table(lines)
    grouped = {name: result["by_category"] for name, result in results.items() if "by_category" in result}
    if grouped:
        categories = list(next(iter(grouped.values())))
        rows = [[say("eval.by_category"), *categories]]
        rows += [[name, *(f"{values[c]:.0f}" for c in categories)] for name, values in grouped.items()]
        text += "\n\n" + table(rows)
    return text


def write_results(folder: Path, results: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """eval.json and samples.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.json").write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    (folder / "samples.jsonl").write_text(lines, encoding="utf-8")


class Progress:
    """`3/40 answers … eta 12s` on stderr, at most every two seconds."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        from cllm.learn.log import duration

        now = time.perf_counter()
        if sys.stderr.isatty() and (now - self._last > 2 or done == total):
            eta = duration((now - self._start) / max(1, done) * (total - done))
            print(f"\r\033[K{say('eval.progress', done=done, total=total, eta=eta)}", end="", file=sys.stderr, flush=True)
            self._last = now
            if done == total:
                print(file=sys.stderr)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cllm.eval", description=say("eval.help"))
    parser.add_argument("model", metavar="RUN|MODEL", help=say("eval.help.model"))
    parser.add_argument("--data", action="append", required=True, metavar="FILE", help=say("eval.help.data"))
    parser.add_argument("--columns", default="", metavar="user=0,assistant=1", help=say("eval.help.columns"))
    parser.add_argument("--base", action="store_true", help=say("eval.help.base"))
    parser.add_argument("--limit", type=int, default=0, metavar="N", help=say("eval.help.limit"))
    parser.add_argument("--shots", type=int, default=0, metavar="N", help=say("eval.help.shots"))
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Evaluate a run (base and adapter, one copy of the weights) or a bare model; prints a table, then one JSON line."""
    arguments = _arguments(argv)
    from cllm.config import load_config
    from cllm.data import read_conversations
    from cllm.data.encode import encode_all
    from cllm.data.packing import PackedRows
    from cllm.learn.snapshot import new_run
    from cllm.model.lora import disable_lora
    from cllm.serve import open_model

    run = Path(arguments.model)
    config = load_config(run / "config.toml") if (run / "config.toml").is_file() else None
    columns = dict(pair.split("=", 1) for pair in arguments.columns.split(",") if "=" in pair) or None
    files: dict[str, list[Conversation]] = {}
    for data in arguments.data:
        conversations, rejects = read_conversations(data, columns or (config.data.columns if config else None) or None)
        usable = [c for c in conversations if c.messages[-1].role == "assistant" and len(c.messages) > 1]
        if not usable:
            raise UserError("eval.empty", path=data, rejects=len(rejects))
        files[data] = usable[: arguments.limit or None]
    train: list[Conversation] = []
    if config:
        from cllm.data.sources import read_data

        train, _, _ = read_data(config.data, accept_rejects=True)
    loaded = open_model(arguments.model)
    has_adapter = loaded.adapter_name is not None and not arguments.base
    engine = loaded.engine()
    summary: dict[str, Any] = {}
    for data, conversations in files.items():
        note("eval.start", path=data, count=len(conversations))
        results, samples = compare(
            engine, loaded.tokenizer, conversations, train=train, shots=arguments.shots, adapter=has_adapter,
            max_new_tokens=arguments.max_new_tokens, progress=Progress(),
        )  # fmt: skip
        row_tokens = config.train.row_tokens if config else 2048
        encoded = encode_all(conversations, loaded.tokenizer, max_tokens=row_tokens)
        rows = PackedRows([e for e in encoded if not isinstance(e, str)], row_tokens)
        batches = rows.take(len(rows)) if rows.examples else []
        chunk = (config.memory.chunk_mib if config else 128) * 2**20
        with disable_lora(loaded.model):
            results["base"]["loss"] = held_out_loss(loaded.model, batches, loaded.precision, chunk)
        if has_adapter:
            results["adapter"]["loss"] = held_out_loss(loaded.model, batches, loaded.precision, chunk)
        folder = new_run((run if config else Path("runs")) / f"eval-{Path(data).stem}")
        write_results(folder, results, samples)
        print(f"\n{data}\n{report(results)}\n\n{say('eval.written', path=folder)}")
        summary[data] = {"results": results, "rows": len(conversations), "folder": str(folder)}
    print(json.dumps({"model": arguments.model, "eval": summary}, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    from cllm.__main__ import run as run_program

    raise SystemExit(run_program("eval"))
