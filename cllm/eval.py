"""`python -m cllm.eval RUN|MODEL --data FILE`: what a model answers, scored against the references,
before and after the adapter.

Loss, the perplexity of general Chinese texts (what training made forget), corpus BLEU (sacrebleu's
`zh`), ROUGE-L over characters, the numbers of the LLaMA-Factory and ChatGLM scripts (jieba ROUGE,
character BLEU-4) and exact match, with confidence intervals, beside two baselines that need no
model: copying the question, and the most frequent training answer. `--task mmlu-csv` sits a
multiple-choice exam instead, `--votes` sums up the votes of the chat page.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.config import Config, load_config
from cllm.data.schema import Conversation
from cllm.messages import UserError, note, say, table

if TYPE_CHECKING:
    from cllm.assembly import Loaded
    from cllm.evaluate.report import Results, Samples

EXAM_SHOTS = 5


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cllm.eval", description=say("eval.help"))
    parser.add_argument("model", metavar="RUN|MODEL", help=say("eval.help.model"))
    parser.add_argument(
        "--data", action="append", default=[], metavar="FILE", help=say("eval.help.data")
    )
    parser.add_argument(
        "--columns", default="", metavar="user=0,assistant=1", help=say("eval.help.columns")
    )
    parser.add_argument("--base", action="store_true", help=say("eval.help.base"))
    parser.add_argument("--limit", type=int, default=0, metavar="N", help=say("eval.help.limit"))
    parser.add_argument("--shots", type=int, metavar="N", help=say("eval.help.shots"))
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--task", choices=["mmlu-csv"], help=say("eval.help.task"))
    parser.add_argument("--votes", action="store_true", help=say("eval.help.votes"))
    arguments = parser.parse_args(argv)
    if not (arguments.data or arguments.votes):
        parser.error(say("eval.no_data"))
    return arguments


def main(argv: list[str]) -> int:
    """Evaluate a run (base and adapter, one copy of the weights) or a bare model; prints tables,
    then one JSON line.
    """
    arguments = _arguments(argv)
    run = Path(arguments.model)
    is_run = (run / "config.toml").is_file()
    config = load_config(run / "config.toml") if is_run else Config()
    if arguments.votes:
        print(json.dumps({"model": arguments.model, "votes": _votes(run)}, ensure_ascii=False))
        return 0
    shots = EXAM_SHOTS if arguments.shots is None else arguments.shots
    sets = {
        data: _exam(data, shots, arguments.limit)
        if arguments.task
        else _read(data, config, arguments)
        for data in arguments.data
    }
    train = (
        _training_set(config)
        if is_run and config.data.kind == "chat" and not arguments.task
        else []
    )
    from cllm.assembly import open_model
    from cllm.evaluate.report import report, write_results
    from cllm.runs import new_run

    loaded = open_model(arguments.model, adapter=not arguments.base)

    summary: dict[str, Any] = {}
    for data, rows in sets.items():
        results, samples = (
            _sit(loaded, rows)
            if arguments.task
            else _compare(loaded, data, rows, train, config, arguments)
        )
        folder = new_run(
            run / f"eval-{Path(data).stem}"
            if is_run
            else Path("runs") / f"eval-{run.stem}-{Path(data).stem}"
        )
        write_results(folder, results, samples)
        print(f"\n{data}\n{report(results)}\n\n{say('eval.written', path=folder / 'report.html')}")
        summary[data] = {
            "results": results,
            "rows": len(samples) or len(rows),
            "folder": str(folder),
        }
    print(json.dumps({"model": arguments.model, "eval": summary}, ensure_ascii=False))
    return 0


def _votes(run: Path) -> list[dict[str, Any]]:
    from cllm.evaluate.votes import summarise, vote_table
    from cllm.learn.log import read_metrics

    votes = read_metrics(run / "votes.jsonl")
    if not votes:
        raise UserError("eval.no_votes", path=run / "votes.jsonl")
    summary = summarise(votes)
    print(table(vote_table(summary)))
    return summary


def _exam(data: str, shots: int, limit: int) -> list[Any]:
    from cllm.evaluate.choice import read_subjects

    subjects = read_subjects(data, shots, limit)
    note(
        "eval.exam",
        count=sum(len(subject.questions) for subject in subjects),
        subjects=len(subjects),
    )
    return subjects


def _sit(loaded: Loaded, subjects: list[Any]) -> tuple[Results, Samples]:
    from cllm.evaluate.choice import examine
    from cllm.evaluate.report import Progress

    return examine(loaded.engine(), loaded.tokenizer, subjects, Progress())


def _read(data: str, config: Config, arguments: argparse.Namespace) -> list[Conversation]:
    """The file's conversations that end with an answer (texts, for a run that was trained on
    texts).
    """
    from cllm.data import read_conversations
    from cllm.data.sources import BUILT_IN

    columns = (
        dict(pair.split("=", 1) for pair in arguments.columns.split(",") if "=" in pair)
        or config.data.columns
        or None
    )
    found, rejects = read_conversations(BUILT_IN.get(data, data), columns, config.data.kind)
    text = config.data.kind == "text"
    usable = [
        c for c in found if text or (c.messages[-1].role == "assistant" and len(c.messages) > 1)
    ]
    if not usable:
        raise UserError("eval.empty", path=data, rejects=len(rejects))
    return usable[: arguments.limit or None]


def _training_set(config: Config) -> list[Conversation]:
    """What the run was trained on, for the baselines; nothing, and a note, where those files are
    gone.
    """
    from cllm.data.sources import prepare

    try:
        return list(prepare(config.data).train)
    except UserError as error:
        note("eval.no_train", detail=error.args[0])
        return []


def _compare(
    loaded: Loaded,
    data: str,
    conversations: list[Conversation],
    train: list[Conversation],
    config: Config,
    arguments: argparse.Namespace,
) -> tuple[Results, Samples]:
    """Losses and answers of base and adapter on one file."""
    from cllm.data.encode import encode_set
    from cllm.evaluate.answers import compare, example_nll
    from cllm.evaluate.report import Progress

    engine, tokenizer, model = loaded.engine(), loaded.tokenizer, loaded.model
    how: Any = {"kind": config.data.kind, "max_tokens": engine.max_tokens, "truncate": "drop"}
    examples, kept, refused = encode_set(conversations, tokenizer, **how)
    if left_out := sum(refused.values()):
        note("eval.left_out", count=left_out, reasons=", ".join(refused), limit=engine.max_tokens)
    if not examples:
        raise UserError("eval.empty", path=data, rejects=left_out)
    note("eval.start", path=data, count=len(kept))
    chunk_bytes = config.memory.chunk_mib * 2**20
    held_out = functools.partial(
        example_nll, model, examples, loaded.precision, chunk_bytes, config.train.row_tokens
    )
    asked = kept if config.data.kind == "chat" else []
    results, samples, measured = compare(
        engine,
        tokenizer,
        asked,
        held_out,
        loaded.precision,
        chunk_bytes,
        train=train,
        shots=arguments.shots or 0,
        max_new_tokens=arguments.max_new_tokens,
        progress=Progress(),
    )
    for i, sample in enumerate(samples):
        for system, its in measured.items():
            nats, tokens = its["loss"][i]
            sample["scores"][system]["loss"] = nats / max(1.0, tokens)
    return results, samples


if __name__ == "__main__":
    from cllm.__main__ import run as run_program

    raise SystemExit(run_program("eval"))
