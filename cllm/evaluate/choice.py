"""Multiple choice as C-Eval and CMMLU ask it: few-shot, the official prompt, the most likely of the
letters A-D after it.

The files are the sets' own: `DIR/dev/*.csv` holds the shots, `DIR/test/*.csv` (`DIR/val` where the
test answers are not published) the questions. Which set it is, and so the wording, follows from the
header of the files.
"""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from cllm.data.message import Message
from cllm.evaluate.answers import Rows, before_after, versus
from cllm.evaluate.results import Accuracy, Exam, ExamSample, ExamScores, SubjectAccuracy
from cllm.messages import UserError, read_json
from cllm.metrics import FEWEST_PAIRS, wilson_interval
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
    exams = read_json(_EXAMS)
    split = _answered_split(root)
    subjects = []
    for path in sorted((root / split).glob("*.csv")):
        name = path.stem.removesuffix(f"_{split}")
        solved = _solved(root / "dev", name, shots)
        rows = _checked(path)[: limit or None]
        if not rows:
            continue
        wording = exams["ceval" if "id" in rows[0] else "cmmlu"]
        examples = [f"{_asked(row, wording)}{row['answer']}\n\n" for row in solved]
        questions = [_asked(row, wording) for row in rows]
        header = wording["header"].format(subject=wording["subjects"].get(name, name))
        subjects.append(Subject(name, header, examples, questions, [row["answer"] for row in rows]))
    return subjects


def _answered_split(root: Path) -> str:
    """The folder with published answers."""
    for split in ("test", "val"):
        files = sorted((root / split).glob("*.csv"))
        if files and any(row.get("answer") for row in _rows(files[0])[:1]):
            return split
    raise UserError("eval.no_exam", path=root)


def _solved(folder: Path, subject: str, shots: int) -> list[dict[str, str]]:
    """The first `shots` rows of the subject's file in dev/."""
    rows: list[dict[str, str]] = []
    for path in (folder / f"{subject}.csv", folder / f"{subject}_dev.csv"):
        if shots and path.is_file():
            rows = _checked(path)[:shots]
    if len(rows) < shots:
        raise UserError("eval.no_shots", path=folder, subject=subject, count=len(rows), shots=shots)
    return rows


def _asked(row: dict[str, str], wording: dict[str, Any]) -> str:
    """A question with its four choices, up to where the letter belongs."""
    choices = [f"{letter}. {row[letter.lower()]}" for letter in LETTERS]
    return "\n".join([wording["question"] + row["question"], *choices, wording["answer"]])


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
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    longest = len(prompts[order[-1]])
    shared = min(len(commonprefix(list(prompts))), len(prompts[order[0]]) - 1)
    size = min(MAX_BATCH, engine.kv_tokens // (longest + engine.row_tokens)) or 1
    if engine.stateful:
        shared, size = 0, 1
    pending = [order[start : start + size] for start in range(0, len(order), size)]
    measured: dict[int, list[float]] = {}
    with torch.no_grad(), engine.autocast():
        head = output_head(engine.model)
        cache = DynamicCache() if shared else None
        if shared:
            _hidden(engine, [prompts[0][:shared]], cache)
        while pending:
            batch = pending.pop()
            try:
                copied = copy.deepcopy(cache)
                if copied is not None:
                    copied.batch_repeat_interleave(len(batch))
                logits = head(_hidden(engine, [prompts[i][shared:] for i in batch], copied))
                chosen = logits.float().log_softmax(-1)[:, list(letters)]
                measured |= zip(batch, chosen.tolist(), strict=True)
            except Exception as error:
                if len(batch) == 1 or not out_of_memory(error):
                    raise
                half = len(batch) // 2
                pending += [batch[:half], batch[half:]]
    return [measured[i] for i in range(len(prompts))]


def _hidden(engine: Engine, rows: list[list[int]], cache: DynamicCache | None) -> Tensor:
    """The hidden state (B, D) of each row's last token. Padding stands at the right, where causal
    attention never looks.
    """
    last = torch.tensor([len(row) - 1 for row in rows], device=engine.device)
    prompts = [torch.tensor(row, device=engine.device) for row in rows]
    ids = pad_sequence(prompts, batch_first=True, padding_value=engine.pad_id)
    keywords = {engine.cache_argument: cache}
    base: Any = engine.model.base_model
    hidden: Tensor = base(input_ids=ids, use_cache=cache is not None, **keywords).last_hidden_state
    return hidden[torch.arange(len(rows), device=engine.device), last]


@dataclass(frozen=True)
class Sitting:
    """One subject, answered by base and adapter."""

    subject: Subject
    shots: int
    """Shots that fitted."""
    log_likelihoods: dict[str, Rows]
    """System -> log p of A-D in nats, per question."""

    def right(self, system: str) -> Rows:
        """[100 or 0, 1] per question: the most likely letter counts."""
        chosen = (LETTERS[row.index(max(row))] for row in self.log_likelihoods[system])
        pairs = zip(chosen, self.subject.answers, strict=True)
        return [[100.0 * (letter == answer), 1.0] for letter, answer in pairs]

    def samples(self) -> list[ExamSample]:
        samples = []
        for i, question in enumerate(self.subject.questions):
            letters = {
                system: dict(zip(LETTERS, rows[i], strict=True))
                for system, rows in self.log_likelihoods.items()
            }
            answer = self.subject.answers[i]
            samples.append(ExamSample(self.subject.name, question, answer, letters))
        return samples


def sit(
    engine: Engine, tokenizer: Tokenizer, subject: Subject, strengths: Sequence[float]
) -> Sitting:
    """Ask one subject's questions; the longest shots are left out until every prompt fits.

    `tokenizer` has the template `text`: prompts are plain text, as the sets' own scripts ask.
    """
    shots = subject.shots[:]
    while True:
        texts = [f"{subject.header}{''.join(shots)}{question}" for question in subject.questions]
        prompts = [tokenizer.encode_chat([Message("user", text)]) for text in texts]
        if not shots or max(map(len, prompts)) <= engine.max_tokens:
            break
        shots.remove(max(reversed(shots), key=len))
    kept = [ids[-engine.max_tokens :] for ids in prompts]
    letters = letter_ids(tokenizer, subject.questions[0].rpartition("\n")[2])
    measured = before_after(engine.model, lambda: log_likelihoods(engine, kept, letters), strengths)
    return Sitting(subject, len(shots), measured)


def examine(
    engine: Engine,
    tokenizer: Tokenizer,
    subjects: Sequence[Subject],
    progress: Callable[[int, int], None],
    strengths: Sequence[float] = (),
) -> Exam:
    """Sit every subject's exam, base and adapter, this at `strengths` too; the prompts are plain
    text.
    """
    plain = load_tokenizer(tokenizer.source, template="text")
    total = sum(len(subject.questions) for subject in subjects)
    sittings: list[Sitting] = []
    samples: list[ExamSample] = []
    for subject in subjects:
        sittings.append(sit(engine, plain, subject, strengths))
        samples += sittings[-1].samples()
        progress(len(samples), total)
    systems = {system: _scores(sittings, system) for system in sittings[0].log_likelihoods}
    return Exam(systems, samples)


def _scores(sittings: Sequence[Sitting], system: str) -> ExamScores:
    parts = [sitting.right(system) for sitting in sittings]
    everything = [row for part in parts for row in part]
    subjects = {
        sitting.subject.name: SubjectAccuracy(**asdict(_accuracy(part)), shots=sitting.shots)
        for sitting, part in zip(sittings, parts, strict=True)
    }
    base = [row for sitting in sittings for row in sitting.right("base")]
    _, gaps = versus({"accuracy": base}, {"accuracy": everything})
    return ExamScores(
        **asdict(_accuracy(everything)),
        macro=sum(subject.accuracy for subject in subjects.values()) / len(parts),
        macro_interval=_macro_interval(list(subjects.values())),
        subjects=subjects,
        versus_base={} if system == "base" else gaps,
    )


def _accuracy(rows: Rows) -> Accuracy:
    rate = wilson_interval(sum(right for right, _ in rows) / 100, len(rows))
    return Accuracy(100 * rate.value, [100 * rate.low, 100 * rate.high], len(rows))


def _macro_interval(subjects: Sequence[Accuracy]) -> list[float]:
    """95 %, where there are enough questions: drawing n answers of a subject again, of which a
    share p is right, is a binomial draw.
    """
    import numpy as np

    if sum(subject.questions for subject in subjects) < FEWEST_PAIRS:
        return []
    rng = np.random.default_rng(12345)
    draws = [
        rng.binomial(subject.questions, subject.accuracy / 100, 1000) / subject.questions
        for subject in subjects
    ]
    low, high = np.quantile(100 * np.mean(draws, axis=0), [0.025, 0.975])
    return [float(low), float(high)]
