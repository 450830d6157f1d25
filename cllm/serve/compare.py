"""Two models' answers to one question, blind: typed questions or a list of them, votes by mouse or
by the keys 1 to 4, and what the votes say so far.
"""

# No `from __future__ import annotations`: Gradio must be able to evaluate the annotations of event
# handlers.
import hashlib
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import gradio as gr

from cllm.assembly import Loaded
from cllm.data.message import Message
from cllm.evaluate.votes import read_votes, summarise
from cllm.messages import UserError, to_json
from cllm.model.adapter import WEIGHTS_FILE
from cllm.runs import read_metrics, replace_file
from cllm.serve.answer import Answer, ModelError
from cllm.serve.engine import Engine
from cllm.serve.sampling import Sampling
from cllm.serve.widgets import (
    EACH,
    FIELD,
    LATEX,
    QUIET,
    SETTINGS,
    Turns,
    Wanted,
    asked_of,
    choice,
    texts_for,
)

VOTES = ("a", "b", "tie", "bad")
ENOUGH_VOTES = 20
"""Before so many a tally would only lead the voters."""
KEYS = """<script>
document.addEventListener("keydown", event => {
  const typing = event.target.closest("input, textarea, [contenteditable]");
  const button = document.querySelectorAll(".vote")["1234".indexOf(event.key)];
  if (!typing && button && button.offsetParent && !button.disabled) button.click();
});
</script>"""
_votes = threading.Lock()
Questions = Sequence[Sequence[Message]]


@dataclass(frozen=True)
class Duel:
    """Two answers to one question, A's and B's, not voted on yet."""

    said: Sequence[Message]
    """The question, after what was said before it."""
    names: list[str]
    """Of the models."""
    answers: list[str]
    sampling: Sampling

    @property
    def sides(self) -> list[Turns]:
        """What A's and B's chat show."""
        asked = [{"role": m.role, "content": m.content} for m in self.said if m.role != "system"]
        return [[*asked, {"role": "assistant", "content": text}] for text in self.answers]


class CompareTab:
    """One question to two models as two rows of one batch; who is who is told after the vote.
    `knobs`: the system prompt and the settings; `pair`: which two.
    """

    def __init__(
        self,
        t: Any,
        page: Any,
        loaded: Loaded,
        engine: Engine,
        knobs: list[Any],
        questions: Questions | None,
    ) -> None:
        self.loaded, self.engine = loaded, engine
        if questions is None:
            questions = _held_out(loaded)
        self.questions = questions = [said for said in questions if _is_question(said)]
        self.pair = choice(list(pairs_of(loaded)))
        with gr.Row(equal_height=True):
            asked = t("compare_ask")
            question = gr.Textbox(placeholder=asked, max_lines=6, submit_btn=True, scale=5, **FIELD)
            following = gr.Button(t("next"), size="sm", min_width=96, visible=bool(questions))
        with gr.Row():
            sides = [
                gr.Chatbot(
                    height="40dvh",
                    label=side,
                    buttons=["copy"],
                    feedback_options=None,
                    latex_delimiters=LATEX,
                    min_width=320,
                    elem_classes="side",
                )
                for side in "AB"
            ]
        follow_up = gr.Checkbox(label=t("follow_up"), container=False)
        with gr.Row(elem_classes="votes"):
            buttons = [
                gr.Button(t(f"vote_{vote}"), interactive=False, min_width=80, elem_classes="vote")
                for vote in VOTES
            ]
            undo = gr.Button(t("undo"), interactive=False, min_width=80)
        verdict = gr.Markdown(" ")
        notes = _notes(t, page)
        gr.Markdown(t("votes_kept"), elem_classes="cost")
        duel, last, place, before = gr.State(), gr.State(), gr.State(-1), gr.State([])
        inputs = [question, self.pair, place, before, follow_up, *knobs]
        answers = [*sides, duel, verdict, *buttons]
        asked, at = [question, place, following], [place, self.pair, notes[1]]
        self._wanted = Wanted()
        question.submit(self.duel, inputs, answers, **EACH)
        chosen = following.click(self.following, at, asked, **QUIET)
        chosen.then(self.duel, inputs, answers, **EACH)
        for word, button in zip(VOTES, buttons, strict=True):
            outputs = [verdict, last, before, undo, *notes[2:], *buttons]
            filled = [gr.State(word), duel, place, *notes]
            voted = button.click(self.record, filled, outputs, **QUIET)
            if questions:
                chosen = voted.success(self.after_vote, [follow_up, *at], asked, **QUIET)
                chosen.then(self.duel, inputs, answers, **EACH)
        restored = [*asked, before, undo, *notes[2:], *answers]
        undo.click(self.take_back, last, restored, **QUIET)

    async def duel(
        self,
        request: gr.Request,
        words: str,
        pair: str,
        number: int,
        before: list[Message],
        follow_up: bool,
        *values: Any,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Both answers as they come, and the buttons once they are there. A follow-up goes to both
        after the answer that was better, so that they still answer the same. What is asked while
        others still answer takes their place.
        """
        if not words.strip():
            yield (gr.skip(),) * (4 + len(VOTES))
            return
        names = random.SystemRandom().sample(pairs_of(self.loaded)[pair], 2)
        async with self._wanted.instead(request) as watch:
            yield [], [], None, gr.skip(), *_buttons(False)
            try:
                tokenizer, first, sampling = asked_of(self.loaded, values)
                said = self._said(words, number, before * follow_up, first)
                if sampling.seed is None:
                    sampling = replace(sampling, seed=random.SystemRandom().getrandbits(31))
                models = (self.loaded.models[name] for name in names)
                answers = [
                    Answer(self.engine, tokenizer, said, sampling, model, shorten=True)
                    for model in models
                ]
                async for done in watch(answers):
                    shown = Duel(said, names, [answer.text for answer in answers], sampling)
                    yield *shown.sides, shown, gr.skip(), *_buttons(done)
            except (UserError, ModelError) as error:
                yield [], [], None, str(error.args[0]), *_buttons(False)

    def _said(
        self, words: str, number: int, before: list[Message], system: list[Message]
    ) -> list[Message]:
        """The question after what is said before it: of a listed one what its row says."""
        listed = self.questions[number] if 0 <= number < len(self.questions) else ()
        if not before and listed and listed[-1].content == words:
            said = [*listed]
        else:
            said = [*before, Message("user", words)]
        return said if said[0].role == "system" else system + said

    def record(
        self, request: gr.Request, vote: str, voted: Duel, number: int, *filled: Any
    ) -> tuple[Any, ...]:
        """The vote is kept, and the voter told who was who."""
        line, texts = append_vote(vote, voted, self.loaded, filled), texts_for(request)
        told = texts["ui.told"].format(a=voted.names[0], b=voted.names[1])
        told += _tally(self.loaded, voted.names, texts)
        better = Message("assistant", voted.answers[vote == "b"])
        said = [*voted.said, better]
        last = line, voted, number, *filled[2:]
        return told, last, said, gr.Button(interactive=True), "", 0, *_buttons(False)

    def following(self, number: int, pair: str, rater: str) -> tuple[str, int, Any]:
        """The next question of the list on which this rater has not voted for this pair; where
        there is none, the next one.
        """
        voted = {
            _key(row)
            for row in read_votes(_file(self.loaded))
            if {*row["models"]} == {*pairs_of(self.loaded)[pair]}
            and row.get("rater", "") == (rater or "").strip()
        }
        count = len(self.questions)
        order = [(number + 1 + i) % count for i in range(count)]
        left = (i for i in order if _key(_as_row(self.questions[i])) not in voted)
        number = next(left, order[0])
        return self.questions[number][-1].content, number, self._counted(number)

    def _counted(self, number: int) -> Any:
        return gr.Button(f"{number + 1} / {len(self.questions)} →")

    def after_vote(
        self, follow_up: bool, number: int, pair: str, rater: str
    ) -> tuple[Any, int, Any]:
        """The next question of the list, unless there is more to ask about this one."""
        return ("", number, gr.skip()) if follow_up else self.following(number, pair, rater)

    async def take_back(self, request: gr.Request, last: tuple[Any, ...]) -> tuple[Any, ...]:
        """The last vote was none: its question and answers are there again, to be voted on."""
        await self._wanted.drop(request)
        line, voted, number, *added = last
        _remove_vote(line, self.loaded)
        *before, asked = voted.said
        nothing = gr.Button(interactive=False)
        shown = self._counted(number) if number >= 0 else gr.skip()
        question = asked.content, number, shown, before, nothing
        return *question, *added, *voted.sides, voted, " ", *_buttons(True)


def _notes(t: Any, page: Any) -> list[Any]:
    """What a voter may add: category, name, which the browser keeps, comment and score."""
    with gr.Row():
        notes: list[Any] = [
            gr.Textbox(placeholder=t(name), max_lines=1, **FIELD)
            for name in ("category", "rater", "comment")
        ]
        notes.append(gr.Dropdown([(t("score"), 0), *range(1, 6)], value=0, **FIELD))
    rater = gr.BrowserState("", storage_key="cllm-rater", secret="cllm")
    page.load(lambda name: name, rater, notes[1], **QUIET)
    notes[1].change(lambda name: name, notes[1], rater, **QUIET)
    return notes


def pairs_of(loaded: Loaded) -> dict[str, tuple[str, str]]:
    """What a pair of models is called, and their names."""
    return {f"{a} ↔ {b}": (a, b) for a, b in combinations(loaded.models, 2)}


def listed(loaded: Loaded) -> list[Any]:
    """What the menus of models, of pairs and of the batch list: all that are open."""
    names, pairs = list(loaded.models), list(pairs_of(loaded))
    models = gr.Radio(names, visible=len(names) > 1)
    if loaded.home is None:
        return [models]
    many = gr.CheckboxGroup(names, value=names)
    return [models, gr.Radio(pairs, visible=len(pairs) > 1), many]


def _buttons(ready: bool) -> list[Any]:
    return [gr.Button(interactive=ready) for _ in VOTES]


def _held_out(loaded: Loaded) -> list[list[Message]]:
    """What the run's held-out samples ask, each with what was said before it."""
    rows = read_metrics(loaded.home / "samples.jsonl") if loaded.home else []
    return [[Message(m["role"], m["content"]) for m in row["messages"]] for row in rows]


def _is_question(said: Sequence[Message]) -> bool:
    """Whether a vote can say it: rounds of question and answer, and a question."""
    roles = [message.role for message in said if message.role != "system"]
    return roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def _file(loaded: Loaded) -> Path:
    assert loaded.home is not None
    return loaded.home / "votes.jsonl"


def _as_row(said: Sequence[Message]) -> dict[str, Any]:
    """A question, and what was said before it, as a row of preference data has them."""
    *before, asked = said
    row: dict[str, Any] = {"instruction": asked.content}
    if before and before[0].role == "system":
        row["system"] = before.pop(0).content
    if before:
        row["history"] = [[a.content, b.content] for a, b in pairwise(before)][::2]
    return row


def _key(row: dict[str, Any]) -> str:
    """What makes two questions the same: the system prompt may be the page's."""
    return to_json([row.get("instruction"), row.get("history")])


def append_vote(vote: str, voted: Duel, loaded: Loaded, filled: Sequence[Any] = ()) -> str:
    """One line of preference data, readable by its owner only; chosen and rejected stand in it if
    there is a winner; `filled`: category, rater, comment and score, as far as given. Returns it.
    """
    row: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **_as_row(voted.said),
        "vote": vote,
        "models": voted.names,
        "answers": voted.answers,
        "base": loaded.base_name,
        "adapter_sha256": {
            name: _weights_hash(loaded.adapters[name]) for name in voted.names if name != "base"
        },
        "sampling": {key: getattr(voted.sampling, key) for key in SETTINGS},
    }
    for key, value in zip(("category", "rater", "comment", "score"), filled, strict=False):
        if value and str(value).strip():
            row[key] = int(value) if key == "score" else value.strip()
    if vote in ("a", "b"):
        row["chosen"], row["rejected"] = voted.answers[:: 1 if vote == "a" else -1]
    private = partial(os.open, mode=0o600)
    line = to_json(row) + "\n"
    # lines of several voters do not mix
    with _votes, open(_file(loaded), "a", encoding="utf-8", opener=private) as out:
        out.write(line)
    return line


def _remove_vote(line: str, loaded: Loaded) -> None:
    """The file without the last line that is this one."""
    with _votes:
        before, found, after = _file(loaded).read_text(encoding="utf-8").rpartition(line)
        if found:
            replace_file(_file(loaded), (before + after).encode())


def _tally(loaded: Loaded, names: Sequence[str], texts: dict[str, str]) -> str:
    """What the votes on these two models say so far, or how many are missing until it is told."""
    for pair in summarise(read_votes(_file(loaded))):
        if {*pair.models} == {*names}:
            count = pair.wins + pair.losses + pair.ties + pair.both_bad
            if count < ENOUGH_VOTES:
                return texts["ui.few_votes"].format(count=count, enough=ENOUGH_VOTES)
            shares = {key: f"{getattr(pair, key):.0%}" for key in ("win_rate", "low", "high")}
            return texts["ui.tally"].format(count=count, model=pair.models[0], **shares)
    return ""


def _weights_hash(home: Path) -> str:
    folder = home / "adapter"  # of a run; else the adapter itself
    weights = (folder if folder.is_dir() else home) / WEIGHTS_FILE
    return hashlib.sha256(weights.read_bytes()).hexdigest()
