"""What base and adapter answer and predict on the same conversations: every score as additive
statistics, and what to make of them.

Statistics are kept per answer, so that a corpus score, its interval, the difference between systems
and the score of a length or of a category are sums of the same rows.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from cllm.data.encode import IGNORE_INDEX, Example
from cllm.data.message import Message
from cllm.data.packing import PackedBatch, best_fit, collate
from cllm.data.schema import Conversation
from cllm.evaluate.results import (
    Evaluation,
    Gap,
    Group,
    Sample,
    Strength,
    SystemScores,
    by_strength,
    strength_of,
    system_at,
)
from cllm.learn.loss import row_nll
from cllm.messages import UserError, note
from cllm.metrics import (
    BLEU,
    FEWEST_PAIRS,
    ROUGE,
    Score,
    corpus_statistics,
    generation_scores,
    paired_bootstrap,
    resampled,
)
from cllm.model.attention import packs
from cllm.model.device import Precision, device_of, out_of_memory, release_memory
from cllm.model.lora import lora_layers, lora_strength
from cllm.model.tokenizer import Tokenizer, load_tokenizer
from cllm.serve.engine import Engine
from cllm.serve.sampling import Sampling

LARGEST_EXPONENT = math.log(sys.float_info.max)
KEPT = 0.95
"""Of the adapter's gain: what a recommended strength keeps at least."""
MOST_RISE = 0.5
"""Of the adapter's rise in general perplexity: what a recommended strength costs at most."""
GENERAL = Path(__file__).parents[1] / "assets" / "general.txt"
Measured = TypeVar("Measured")
Rows = list[list[float]]
Statistics = dict[str, Rows]
"""Metric -> one row of additive statistics per answer, sequence or text."""


def _mean(totals: Sequence[float]) -> Score:
    return Score("mean", totals[0] / max(1.0, totals[1]), {}, "")


def _perplexity(totals: Sequence[float]) -> Score:
    nats = _mean(totals).value
    return Score("perplexity", math.exp(nats) if nats < LARGEST_EXPONENT else math.inf, {}, "")


# scored from their own statistics
METRICS: dict[str, BLEU | ROUGE] = {"bleu-zh": BLEU(), "rouge-l-char": ROUGE("rougeL", "char")}
# the others are means
_SCORES = {name: metric.score for name, metric in METRICS.items()} | {"general-ppl": _perplexity}


def statistics(hypotheses: Sequence[str], references: Sequence[str]) -> Statistics:
    """The statistics of sacrebleu's corpus BLEU `zh`, ROUGE-L over characters, LLaMA-Factory's four
    numbers and exact match.
    """
    table = {
        name: corpus_statistics(metric, hypotheses, [references])
        for name, metric in METRICS.items()
    }
    pairs = list(zip(hypotheses, references, strict=True))
    llama_factory = [generation_scores(hypothesis, reference) for hypothesis, reference in pairs]
    for name in llama_factory[0]:
        table[name] = [[scores[name], 1.0] for scores in llama_factory]
    table["exact"] = [[100.0 * (h.strip() == r.strip()), 1.0] for h, r in pairs]
    return table


def value(metric: str, rows: Rows) -> float:
    """The score of the summed statistics: 0-100, nats per token for `loss`, a perplexity for
    `general-ppl`.
    """
    return _SCORES.get(metric, _mean)([sum(column) for column in zip(*rows, strict=True)]).value


def _values(table: Statistics, indices: Sequence[int]) -> dict[str, float]:
    """Every metric's score of the answers `indices`."""
    return {metric: value(metric, [rows[i] for i in indices]) for metric, rows in table.items()}


def versus(other: Statistics, system: Statistics) -> tuple[dict[str, list[float]], dict[str, Gap]]:
    """(metric -> [low, high] of the system, metric -> its gap to the other) by paired bootstrap at
    95 %, for the metrics that both have.
    """
    intervals, gaps = {}, {}
    for metric, rows in system.items():
        if metric in other and len(rows) < FEWEST_PAIRS:
            gaps[metric] = Gap(value(metric, rows) - value(metric, other[metric]))
        elif metric in other:
            compared = paired_bootstrap(_SCORES.get(metric, _mean), other[metric], rows)
            intervals[metric] = [compared.b.low, compared.b.high]
            gaps[metric] = Gap(*compared.difference, compared.p_value)
    return intervals, gaps


def recommend(tables: Mapping[str, Statistics]) -> Strength | None:
    """The smallest of the measured strengths that keeps KEPT of what the adapter gains over the
    base in the loss of the references, and raises general perplexity by no more than MOST_RISE of
    what the adapter does; None where only base and adapter are there. The loss, because of few
    answers one score may keep what another has lost.

    The interval: percentiles over resamples of the conversations, the same for all strengths.
    """
    import numpy as np

    measured = by_strength(tables)
    if not measured.keys() - {0, 1}:
        return None
    rows = [table["loss"] for table in measured.values()]
    enough = len(rows[0]) >= FEWEST_PAIRS
    values = resampled(_mean, rows, resamples=1000 * enough)
    gain = values[:, :1] - values
    one = [*measured].index(1)
    whole = gain[:, [one]]
    rise = np.array([value("general-ppl", table["general-ppl"]) for table in measured.values()])
    rise -= rise[0]
    wanted = (whole > 0) & (gain >= KEPT * whole) & (rise <= MOST_RISE * max(0, rise[one]))
    best, *drawn = [next(itertools.compress(measured, row), None) for row in wanted]
    found = [strength for strength in drawn if strength is not None]
    bounds = np.quantile(found, [0.025, 0.975], method="nearest").tolist() if found else []
    return Strength(best, bounds, len(found) / len(drawn) if enough else None)


# --- Losses
def sequence_nll(
    model: nn.Module, rows: Sequence[PackedBatch], precision: Precision, chunk_bytes: int
) -> Rows:
    """[nats, supervised tokens] of every sequence of the rows, in order; logits only at labels and
    a chunk at a time.

    Where a row does not fit into memory its sequences go one by one; one that does not fit alone
    counts as [0, 0], and that is said.
    """
    device = device_of(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), precision.autocast():
            return [pair for row in rows for pair in _row_sums(model, row.to(device), chunk_bytes)]
    finally:
        model.train(was_training)


def _row_sums(model: nn.Module, row: PackedBatch, chunk_bytes: int) -> Rows:
    lengths = row.cu_seqlens.diff().tolist()
    try:
        nll = row_nll(model, row, chunk_bytes).double().split(lengths)
        labelled = (row.labels != IGNORE_INDEX).split(lengths)
        pairs = zip(nll, labelled, strict=True)
        return [[float(nats.sum()), float(labels.sum())] for nats, labels in pairs]
    except Exception as error:
        if not out_of_memory(error):
            raise
    # here, not in the handler: the traceback holds on to the failed tensors
    release_memory()
    if len(lengths) == 1:
        note("eval.memory", tokens=lengths[0])
        return [[0.0, 0.0]]
    return [pair for alone in row.split(1) for pair in _row_sums(model, alone, chunk_bytes)]


def held_out_loss(
    model: nn.Module, rows: Sequence[PackedBatch], precision: Precision, chunk_bytes: int
) -> float:
    """Mean nats per supervised token over packed rows."""
    return value("loss", sequence_nll(model, rows, precision, chunk_bytes))


def example_nll(
    model: nn.Module,
    examples: Sequence[Example],
    precision: Precision,
    chunk_bytes: int,
    row_tokens: int = 2048,
) -> Rows:
    """`sequence_nll` of examples, in their order; packed (where the model can) into rows of
    `row_tokens`, or as long as the longest one.
    """
    lengths = [len(example.input_ids) for example in examples]
    groups = [[i] for i in range(len(examples))]
    with precision.autocast():
        if packs(model):
            groups = best_fit(lengths, max([row_tokens, *lengths]))
    rows = [collate([examples[i] for i in group]) for group in groups]
    packed = sequence_nll(model, rows, precision, chunk_bytes)
    by_example = dict(zip(itertools.chain(*groups), packed, strict=True))
    return [by_example[i] for i in range(len(examples))]


def before_after(
    model: nn.Module, measure: Callable[[], Measured], strengths: Sequence[float] = ()
) -> dict[str, Measured]:
    """`measure` of the base, and if the model has an adapter of it, at `strengths` too: one copy of
    the weights.
    """
    systems = {}
    for strength in sorted({0, 1, *strengths}) if lora_layers(model) else [0]:
        with lora_strength(model, strength):
            systems[system_at(strength)] = measure()
    return systems


def _general(tokenizer: Tokenizer) -> list[Example]:
    """Our own general Chinese texts, without chat markup: their perplexity rises with what training
    made the model forget.
    """
    plain = load_tokenizer(tokenizer.source, template="text")
    lines = filter(None, GENERAL.read_text(encoding="utf-8").split("\n"))
    texts = [plain.encode_chat([Message("user", line)]) for line in lines]
    return [Example(ids, ids) for ids in texts]


# --- Answers
def draw(count: int, wanted: int, seed: int) -> list[int]:
    """Which of `count` conversations are asked, in their order: `wanted` of them by chance, or all
    if there are no more.
    """
    return sorted(random.Random(seed).sample(range(count), min(wanted, count)))


def question_of(conversation: Conversation) -> Conversation:
    """Everything before the last answer."""
    return replace(conversation, messages=conversation.messages[:-1])


def answer_of(conversation: Conversation) -> str:
    """The last answer: the reference."""
    return conversation.messages[-1].words


def with_answers(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Those that end with an answer to something that is to be learned."""
    return [
        c
        for c in conversations
        if len(c.messages) > 1 and c.messages[-1].role == "assistant" and c.messages[-1].trained
    ]


@contextmanager
def unless_memory_is_short(engine: Engine) -> Iterator[None]:
    """Answers that do not fit into memory are left out, and it is said: nothing that was learned
    depends on them.
    """
    try:
        yield
    except (RuntimeError, UserError) as error:
        if not engine.healthy:  # another failure than a lack of memory
            raise
        note("train.unanswered", detail=error.args[0])


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    questions: Sequence[Conversation],
    *,
    strengths: Sequence[float],
    max_new_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy answers, in the order of the questions, each by the adapter at its strength."""
    prompts = [tokenizer.encode_chat(question) for question in questions]
    plans = [Sampling(max_new_tokens, strength=strength) for strength in strengths]
    outputs = engine.generate(prompts, plans, progress=progress)
    return [tokenizer.decode(ids).strip() for ids in outputs]


def majority(train: Sequence[Conversation], conversations: Sequence[Conversation]) -> list[str]:
    """For each conversation the most frequent training answer of its category."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for conversation in train:
        answers[conversation.category][answer_of(conversation)] += 1
    best = {category: counter.most_common(1)[0][0] for category, counter in answers.items()}
    return [best.get(conversation.category, "") for conversation in conversations]


@dataclass(frozen=True)
class Asking:
    """How questions are put to the systems."""

    train: Sequence[Conversation] = ()
    """What the run learned from, for the baselines."""
    shots: int = 0
    max_new_tokens: int = 256
    seed: int = 0
    """Of the choice of shots."""
    progress: Callable[[int, int], None] | None = None
    """Called with (answers so far, all)."""
    strengths: Sequence[float] = ()
    """Of the adapter, beside 0 and 1, which are the base and the adapter."""

    def few_shot(self, conversation: Conversation, shots: int) -> Conversation:
        """The question with `shots` training conversations of the same category before it, as
        earlier turns.
        """
        same = [c for c in self.train if c.category == conversation.category] or list(self.train)
        draw = random.Random(f"{self.seed}/{conversation.messages[0].content}")
        chosen = draw.sample(same, min(shots, len(same)))
        before = tuple(message for c in chosen for message in c.messages)
        return replace(conversation, messages=before + conversation.messages[:-1])


def answers(
    engine: Engine, tokenizer: Tokenizer, conversations: Sequence[Conversation], asking: Asking
) -> dict[str, list[str]]:
    """What every system answers: `copy` (the question itself), `majority` (with `train`), `base`,
    `base N-shot` (with `train` and `shots`; fewer where the prompt would not fit), and `adapter` if
    there is one. All prompts of all systems go through the engine at once: base and adapter are
    rows of the same batches. So are, after them, the adapter's further strengths, so that base and
    adapter say what they say without these.
    """

    def fitting(conversation: Conversation) -> Conversation:
        for shots in range(asking.shots, 0, -1):
            prompt = asking.few_shot(conversation, shots)
            if len(tokenizer.encode_chat(prompt)) < engine.max_tokens:
                return prompt
        return question_of(conversation)

    questions = [question_of(c) for c in conversations]
    asked = {"base": questions}
    if asking.train and asking.shots:
        asked[f"base {asking.shots}-shot"] = [fitting(c) for c in conversations]
    if lora_layers(engine.model):
        asked["adapter"] = questions
    further = dict.fromkeys(map(system_at, sorted({*asking.strengths} - {0, 1})), questions)
    systems = {"copy": [question.messages[-1].words for question in questions]}
    if asking.train:
        systems["majority"] = majority(asking.train, conversations)
    for group in filter(None, (asked, further)):
        texts = generate(
            engine,
            tokenizer,
            list(itertools.chain(*zip(*group.values(), strict=True))),
            strengths=[strength_of(system) or 0.0 for system in group] * len(questions),
            max_new_tokens=asking.max_new_tokens,
            progress=asking.progress,
        )
        systems |= {system: texts[i :: len(group)] for i, system in enumerate(group)}
    return dict(sorted(systems.items(), key=lambda item: strength_of(item[0]) or 0))


# --- Together
def score(
    conversations: Sequence[Conversation],
    systems: Mapping[str, list[str]],
    measured: Mapping[str, Statistics],
    *,
    losses_of_answers: bool = False,
) -> Evaluation:
    """Every system's scores, and one sample per conversation, from its answers and what was
    measured of it.

    losses_of_answers: the losses in `measured` are those of `conversations`, in their order, and
    belong into the samples.
    """
    references = [answer_of(c) for c in conversations]
    answered = {name: statistics(texts, references) for name, texts in systems.items()}
    lengths = [_bucket(reference) for reference in references]
    categories = [c.category for c in conversations]
    tables = {
        name: {**measured.get(name, {}), **answered.get(name, {})}
        for name in {**systems, **measured}
    }
    scores = {}
    for name, table in tables.items():
        intervals, gaps = versus(tables.get("base", {}), table)
        copying = tables.get("copy", {}) if name == "adapter" else {}
        scores[name] = SystemScores(
            {metric: value(metric, rows) for metric, rows in table.items()},
            intervals,
            {metric: len(rows) for metric, rows in table.items()},
            {} if name == "base" else gaps,
            versus(copying, table)[1],
            _grouped(answered.get(name, {}), lengths),
            _grouped(answered.get(name, {}), categories),
        )
    shown = {name: answered[name] for name in systems if name not in ("copy", "majority")}
    for name, table in shown.items():
        del table["bleu-zh"]  # a corpus score
        if losses_of_answers and name in measured:
            table["loss"] = measured[name]["loss"]
    samples = [
        Sample(
            conversation.category,
            question_of(conversation).messages,
            references[i],
            {name: systems[name][i] for name in shown},
            {name: _values(table, [i]) for name, table in shown.items()},
        )
        for i, conversation in enumerate(conversations)
    ]
    return Evaluation(scores, samples, strength=recommend(tables))


def _grouped(table: Statistics, keys: Sequence[str]) -> dict[str, Group]:
    """The scores of the answers that share a key; numbers in their order, then names. Nothing for a
    system that answered nothing.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for i, key in enumerate(keys if table else ()):
        groups[key].append(i)
    ordered = sorted(groups, key=lambda key: (int(re.sub(r"\D.*", "", key) or 0), key))
    return {key: Group(len(groups[key]), _values(table, groups[key])) for key in ordered}


def _bucket(reference: str) -> str:
    """The length bucket of a reference: 1-4, 5-8, 9-16 … 257-512, 513+ characters."""
    high = 1 << max(2, (len(reference) - 1).bit_length())
    return "1-4" if high == 4 else f"{high // 2 + 1}-{high}" if high <= 512 else "513+"


def evaluate(
    engine: Engine,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    held_out: Callable[[], Rows],
    precision: Precision,
    chunk_bytes: int,
    asking: Asking,
    *,
    losses_of_answers: bool = False,
) -> Evaluation:
    """What base and adapter answer, and their losses: `held_out` measures those, of
    `conversations` in their order if `losses_of_answers`.

    Answers for which memory is short are left out.
    """
    model, general = engine.model, _general(tokenizer)
    measured = before_after(
        model,
        lambda: {
            "loss": held_out(),
            "general-ppl": example_nll(model, general, precision, chunk_bytes),
        },
        asking.strengths,
    )
    systems: dict[str, list[str]] = {}
    if conversations:
        with unless_memory_is_short(engine):
            systems = answers(engine, tokenizer, conversations, asking)
    answered = conversations if systems else []
    return score(answered, systems, measured, losses_of_answers=losses_of_answers)
