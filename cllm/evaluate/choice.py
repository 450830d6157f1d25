"""Multiple choice as C-Eval and CMMLU ask it: few-shot, the official prompt, the most likely of the
letters A-D after it.

The files are the sets' own: `DIR/dev/*.csv` holds the shots, `DIR/test/*.csv` (`DIR/val` where the
test answers are not published) the questions. Which set it is, and so the wording, follows from the
header of the files.
"""

from __future__ import annotations

import copy
import csv
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from cllm.data.schema import Message
from cllm.evaluate.answers import Rows, before_after, versus
from cllm.messages import UserError
from cllm.metrics import wilson_interval
from cllm.model.device import out_of_memory
from cllm.model.head import output_head
from cllm.model.tokenizer import Tokenizer, load_tokenizer
from cllm.serve.engine import Engine

LETTERS = "ABCD"
MAX_BATCH = 16  # questions computed together; also bounded by the engine's budget
_EXAMS = Path(__file__).parents[1] / "assets" / "exams.json"


class Subject(NamedTuple):
    """One file: `header`, the solved `shots` and the `questions` (without their answers) are parts
    of the official prompt.
    """

    name: str
    header: str
    shots: list[str]
    questions: list[str]
    answers: list[str]


def read_subjects(directory: str | Path, shots: int, limit: int = 0) -> list[Subject]:
    """The subjects of a C-Eval or CMMLU directory, the first `limit` questions of each (0: all).

    Raises UserError for a directory without such files, a missing column, an unanswered question or
    too few shots.
    """
    root = Path(directory)
    exams = json.loads(_EXAMS.read_text(encoding="utf-8"))
    files = {split: sorted((root / split).glob("*.csv")) for split in ("test", "val")}
    split = next(
        (
            split
            for split, paths in files.items()
            if any(row.get("answer") for path in paths[:1] for row in _rows(path)[:1])
        ),
        None,
    )
    if split is None:
        raise UserError("eval.no_exam", path=root)
    subjects = []
    for path in files[split]:
        name = path.stem.removesuffix(f"_{split}")
        dev = next(
            (
                file
                for file in (root / "dev" / f"{name}_dev.csv", root / "dev" / f"{name}.csv")
                if file.is_file()
            ),
            None,
        )
        solved = _checked(dev)[:shots] if dev and shots else []
        if len(solved) < shots:
            raise UserError(
                "eval.no_shots", path=root / "dev", subject=name, count=len(solved), shots=shots
            )
        rows = _checked(path)[: limit or None]
        if not rows:
            continue
        wording = exams["ceval" if "id" in rows[0] else "cmmlu"]
        lines = [
            [
                wording["question"] + row["question"],
                *(f"{x}. {row[x.lower()]}" for x in LETTERS),
                wording["answer"],
            ]
            for row in (*solved, *rows)
        ]
        texts = ["\n".join(parts) for parts in lines]
        examples = [f"{text}{row['answer']}\n\n" for text, row in zip(texts, solved, strict=False)]
        header = wording["header"].format(subject=wording["subjects"].get(name, name))
        subjects.append(
            Subject(name, header, examples, texts[len(solved) :], [row["answer"] for row in rows])
        )
    return subjects


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [
            {str(key).strip().lower(): str(cell or "").strip() for key, cell in row.items()}
            for row in csv.DictReader(file)
        ]


def _checked(path: Path) -> list[dict[str, str]]:
    rows = _rows(path)
    for number, row in enumerate(rows, 1):
        missing = [key for key in ("question", *LETTERS.lower()) if key not in row]
        if missing or row.get("answer") not in tuple(LETTERS):
            raise UserError(
                "eval.exam_row",
                path=path,
                row=number,
                detail=", ".join(missing) or f"answer = {row.get('answer')!r}",
            )
    return rows


def letter_ids(tokenizer: Tokenizer, ending: str) -> list[int]:
    """The first id of A-D as each stands after the prompt's `ending`; a bare "A" may be another
    token in SentencePiece vocabularies.
    """
    before = tokenizer.encode(ending)
    after = [tokenizer.encode(ending + letter) for letter in LETTERS]
    apart = all(ids[: len(before)] == before and len(ids) > len(before) for ids in after)
    return (
        [ids[len(before)] for ids in after]
        if apart
        else [tokenizer.encode(letter)[0] for letter in LETTERS]
    )


def log_likelihoods(engine: Engine, prompts: Sequence[list[int]], letters: Sequence[int]) -> Rows:
    """log p(letter | prompt) in nats for every prompt and letter, under the gate as it is set.

    What all prompts begin with is computed once, and its keys and values are shared. Out of memory
    halves the batch.
    """
    shared = (
        0 if engine.stateful else min(len(commonprefix(list(prompts))), min(map(len, prompts)) - 1)
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = (
        1
        if engine.stateful
        else max(
            1, min(MAX_BATCH, engine.kv_tokens // (len(prompts[order[-1]]) + engine.row_tokens))
        )
    )
    pending = [order[start : start + size] for start in range(0, len(order), size)]
    found: dict[int, list[float]] = {}
    with torch.no_grad(), engine.autocast():
        cache = DynamicCache()
        if shared:
            _hidden(engine, [prompts[0][:shared]], cache)
        while pending:
            batch = pending.pop()
            try:
                several = copy.deepcopy(cache) if shared else None
                if several is not None:
                    several.batch_repeat_interleave(len(batch))
                logits = output_head(engine.model)(
                    _hidden(engine, [prompts[i][shared:] for i in batch], several)
                ).float()
                found |= zip(batch, logits.log_softmax(-1)[:, list(letters)].tolist(), strict=True)
            except Exception as error:
                if len(batch) == 1 or not out_of_memory(error):
                    raise
                pending += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return [found[i] for i in range(len(prompts))]


def _hidden(engine: Engine, rows: list[list[int]], cache: DynamicCache | None) -> Tensor:
    """The hidden state (B, D) of each row's last token. Padding stands at the right, where causal
    attention never looks.
    """
    last = torch.tensor([len(row) - 1 for row in rows], device=engine.device)
    width = max(map(len, rows))
    ids = torch.tensor(
        [row + [engine.pad_id] * (width - len(row)) for row in rows], device=engine.device
    )
    keywords = {engine.cache_argument: cache} if cache is not None else {}
    base: Any = engine.model.base_model
    hidden: Tensor = base(input_ids=ids, use_cache=cache is not None, **keywords).last_hidden_state
    return hidden[torch.arange(len(rows), device=engine.device), last]


def sit(engine: Engine, tokenizer: Tokenizer, subject: Subject) -> tuple[dict[str, Rows], int]:
    """(system -> log-likelihoods of A-D per question, shots used): the longest shots are left out
    until every prompt fits.

    `tokenizer` has the template `text`: prompts are plain text, as the sets' own scripts ask.
    """
    shots = subject.shots[:]
    while True:
        texts = [f"{subject.header}{''.join(shots)}{question}" for question in subject.questions]
        prompts = [tokenizer.encode_chat([Message("user", text)]) for text in texts]
        if not shots or max(map(len, prompts)) <= engine.max_tokens:
            break
        del shots[max(range(len(shots)), key=lambda i: (len(shots[i]), i))]
    kept = [ids[-engine.max_tokens :] for ids in prompts]
    letters = letter_ids(tokenizer, subject.questions[0].rpartition("\n")[2])
    return before_after(engine.model, lambda: log_likelihoods(engine, kept, letters)), len(shots)


def examine(
    engine: Engine,
    tokenizer: Tokenizer,
    subjects: Sequence[Subject],
    progress: Callable[[int, int], None],
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """(system -> accuracies in percent, one sample per question); the prompts are plain text.

    `accuracy` is the micro average with Wilson's interval, `macro` the mean over subjects with a
    bootstrap interval that resamples the questions of every subject; `subjects` holds each one's
    accuracy, interval, questions and shots; `versus_base` as in `versus`.
    """
    tokenizer = load_tokenizer(tokenizer.source, template="text")
    right: defaultdict[str, list[Rows]] = defaultdict(list)
    used: list[int] = []
    samples: list[dict[str, Any]] = []
    for subject in subjects:
        found, shots = sit(engine, tokenizer, subject)
        used.append(shots)
        for system, rows in found.items():
            chosen = [LETTERS[row.index(max(row))] for row in rows]
            right[system].append(
                [
                    [100.0 * (letter == answer), 1.0]
                    for letter, answer in zip(chosen, subject.answers, strict=True)
                ]
            )
        for i, question in enumerate(subject.questions):
            given = {
                system: dict(zip(LETTERS, rows[i], strict=True)) for system, rows in found.items()
            }
            samples.append(
                {
                    "subject": subject.name,
                    "question": question,
                    "answer": subject.answers[i],
                    "log_likelihoods": given,
                }
            )
        progress(len(samples), sum(len(s.questions) for s in subjects))
    results: dict[str, dict[str, Any]] = {}
    everything = {
        system: {"accuracy": [row for part in parts for row in part]}
        for system, parts in right.items()
    }
    for system, parts in right.items():
        by_subject = {
            s.name: _accuracy(part) | {"shots": shots}
            for s, part, shots in zip(subjects, parts, used, strict=True)
        }
        macro = {
            "macro": sum(its["accuracy"] for its in by_subject.values()) / len(parts),
            "macro_interval": _macro_interval(parts),
        }
        gaps = (
            {}
            if system == "base"
            else {"versus_base": versus(everything["base"], everything[system])[1]}
        )
        results[system] = (
            _accuracy(everything[system]["accuracy"]) | macro | {"subjects": by_subject} | gaps
        )
    return results, samples


def _accuracy(rows: Rows) -> dict[str, Any]:
    rate = wilson_interval(sum(right for right, _ in rows) / 100, len(rows))
    return {
        "accuracy": 100 * rate.value,
        "interval": [100 * rate.low, 100 * rate.high],
        "questions": len(rows),
    }


def _macro_interval(parts: Sequence[Rows]) -> list[float]:
    """95 %: drawing n answers of a subject again, of which a share p is right, is a binomial
    draw.
    """
    import numpy as np

    rng = np.random.default_rng(12345)
    drawn = [
        rng.binomial(len(part), _accuracy(part)["accuracy"] / 100, 1000) / len(part)
        for part in parts
    ]
    low, high = np.quantile(100 * np.mean(drawn, axis=0), [0.025, 0.975])
    return [float(low), float(high)]
