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
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.config import Config, load_config
from cllm.data.quality import repeated_questions
from cllm.data.schema import Conversation
from cllm.data.sources import prepare, read_file
from cllm.messages import (
    CommandLine,
    UserError,
    command,
    file_name,
    note,
    print_result,
    propose,
    say,
    strength,
    table,
)

if TYPE_CHECKING:
    from cllm.assembly import Loaded
    from cllm.evaluate.results import Evaluation, Exam

EXAM_SHOTS = 5


def _strengths(text: str) -> list[float]:
    return [strength(part) for part in text.split(",")]


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = CommandLine("eval")
    parser.take("model", nargs="?", metavar="RUN|MODEL")
    parser.take("--data", action="append", default=[], type=file_name, metavar="FILE")
    parser.take("--columns", default="", metavar="user=0,assistant=1")
    parser.take("--base", action="store_true")
    parser.take("--limit", type=int, default=0, metavar="N")
    parser.take("--shots", type=int, metavar="N")
    parser.take("--max-new-tokens", type=int, default=256, metavar="N")
    parser.take("--strengths", type=_strengths, default=(), metavar="0,0.5,1")
    parser.take("--task", choices=["mmlu-csv"])
    parser.take("--votes", action="store_true")
    arguments = parser.parse_args(argv)
    if not arguments.model or not (arguments.data or arguments.votes):
        raise UserError("eval.no_data")
    return arguments


def main(argv: list[str]) -> int:
    """Evaluate a run (base and adapter, one copy of the weights) or a bare model; prints tables,
    then one JSON line.
    """
    arguments = _arguments(argv)
    if arguments.strengths:
        from cllm.assembly import locate

        if arguments.base or locate(arguments.model).adapter is None:
            raise UserError("eval.no_strengths", model=arguments.model)
    results: dict[str, Any]
    if arguments.votes:
        results = {"votes": _votes(Path(arguments.model))}
    else:
        results = {"eval": (_exams if arguments.task else _conversations)(arguments)}
    propose(command("chat", arguments.model))
    print_result({"model": arguments.model, **results}, arguments.json)
    return 0


def _votes(run: Path) -> list[dict[str, Any]]:
    from cllm.evaluate.votes import read_votes, summarise, vote_table

    votes = read_votes(run / "votes.jsonl")
    if not votes:
        raise UserError("eval.no_votes", path=run / "votes.jsonl", command=command("chat", run))
    pairs = summarise(votes)
    print(table(vote_table(pairs)))
    return [asdict(pair) for pair in pairs]


def _written(
    model: str, data: str, results: Evaluation | Exam, rows: int, loaded: Loaded
) -> dict[str, Any]:
    """Write and print the results for one set; returns what the last line says of it."""
    from cllm.evaluate.report import About, summary, write_results
    from cllm.evaluate.results import document
    from cllm.runs import new_run

    run, name = Path(model), Path(data).stem
    is_run = (run / "config.toml").is_file()
    folder = new_run(run / f"eval-{name}" if is_run else Path("runs") / f"eval-{run.stem}-{name}")
    template, device = loaded.tokenizer.template.name, loaded.assembly.device
    write_results(folder, results, About(loaded.base_name, data, template, device))
    print(f"\n{data}\n{summary(results)}\n\n{say('eval.written', path=folder / 'report.html')}")
    return {"results": document(results), "rows": rows, "folder": str(folder)}


# --- Multiple choice
def _exams(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every exam is read before the model is loaded."""
    from cllm.assembly import open_model
    from cllm.evaluate.choice import examine, read_subjects
    from cllm.learn.log import AnswerCount

    shots = EXAM_SHOTS if arguments.shots is None else arguments.shots
    exams = {}
    for data in arguments.data:
        subjects = exams[data] = read_subjects(data, shots, arguments.limit)
        count = sum(len(subject.questions) for subject in subjects)
        note("eval.exam", count=count, subjects=len(subjects))
    loaded = open_model(arguments.model, adapter=not arguments.base)
    summaries = {}
    for data, subjects in exams.items():
        exam = examine(
            loaded.engine(), loaded.tokenizer, subjects, AnswerCount(), arguments.strengths
        )
        summaries[data] = _written(arguments.model, data, exam, len(exam.samples), loaded)
    return summaries


# --- Conversations and texts
def _conversations(arguments: argparse.Namespace) -> dict[str, Any]:
    """Losses and answers of base and adapter on every set, which is read with the run's own [data]
    before the model is loaded.
    """
    from cllm.assembly import open_model
    from cllm.data.encode import encode_set
    from cllm.evaluate.answers import Asking, evaluate, example_nll
    from cllm.learn.log import AnswerCount

    file = Path(arguments.model) / "config.toml"
    config = load_config(file) if file.is_file() else Config()
    kind = config.data.kind
    sets = {data: _read(data, config, arguments) for data in arguments.data}
    train: Sequence[Conversation] = ()
    if file.is_file() and kind == "chat":
        try:
            train = prepare(config.data).train  # for the baselines
        except UserError as error:
            note("eval.no_train", detail=error.args[0])
    loaded = open_model(arguments.model, adapter=not arguments.base)
    engine = loaded.engine()
    precision = loaded.precision
    chunk_bytes = config.memory.chunk_mib * 2**20
    row_tokens = config.train.row_tokens
    summaries = {}
    for data, rows in sets.items():
        limit = engine.max_tokens
        examples, kept, refused = encode_set(
            rows, loaded.tokenizer, kind=kind, max_tokens=limit, truncate="drop"
        )
        if left_out := sum(refused.values()):
            note("eval.left_out", count=left_out, reasons=", ".join(refused), limit=limit)
        if not examples:
            look = command("check", data)
            raise UserError("eval.empty", path=data, rejects=left_out, command=look)
        if seen := len(repeated_questions(train, kept)):
            note("eval.seen", path=data, count=seen, total=len(kept))
        note("eval.start", path=data, count=len(kept))
        losses = partial(example_nll, loaded.model, examples, precision, chunk_bytes, row_tokens)
        results = evaluate(
            engine,
            loaded.tokenizer,
            kept if kind == "chat" else [],
            losses,
            precision,
            chunk_bytes,
            Asking(
                train,
                arguments.shots or 0,
                arguments.max_new_tokens,
                progress=AnswerCount(),
                strengths=arguments.strengths,
            ),
            losses_of_answers=True,
        )
        count = len(results.samples) or len(rows)
        summaries[data] = _written(arguments.model, data, results, count, loaded)
    return summaries


def _read(data: str, config: Config, arguments: argparse.Namespace) -> list[Conversation]:
    """The file's conversations that end with an answer (texts, for a run that was trained on
    texts), read with the columns that are named, else with the run's if the file has them; what is
    rejected is said.
    """
    from cllm.evaluate.answers import with_answers

    pairs = (pair for pair in arguments.columns.split(",") if "=" in pair)
    columns = dict(pair.split("=", 1) for pair in pairs)
    maps = [columns]
    if not columns:
        sources = (source.columns for source in config.data.train)
        maps = [*filter(None, (config.data.columns, *sources)), {}]
    for mapping in maps:
        rows, rejects = read_file(replace(config.data, columns=mapping), data, {})
        if rows:
            break
    if rejects:
        shown = [f"{r.file}:{r.line}: {r.reason}: {r.detail}" for r in rejects[:3]]
        note("eval.rejects", count=len(rejects), path=data, examples="\n  ".join(shown))
    if config.data.kind == "chat":
        rows = with_answers(rows)
    if not rows:
        look = command("check", data)
        raise UserError("eval.empty", path=data, rejects=len(rejects), command=look)
    return rows[: arguments.limit or None]


if __name__ == "__main__":
    from cllm.__main__ import run as run_program

    raise SystemExit(run_program("eval"))
