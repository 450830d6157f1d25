"""Replay: general rows beside the user's own, against forgetting. And rows for a new name."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_learn_dist import start
from test_train import adapter_bytes, metrics

from cllm import replay
from cllm.__main__ import run
from cllm.config import load_config
from cllm.corpus import read_corpus
from cllm.data.message import Message
from cllm.data.quality import question
from cllm.data.reader import read_conversations
from cllm.data.schema import Conversation
from cllm.data.sources import replayed
from cllm.learn.log import RunLog
from cllm.learn.loss import row_nll
from cllm.messages import UserError
from cllm.train import Training

ROOT = Path(__file__).parents[1]

QUICK = ["preset:quick", "train.steps=4", "eval.samples=0", "eval.every=2"]
"""A run of the built-in model, which ends its answers."""


def asks(text: str, answer: str = "a") -> Conversation:
    return Conversation((Message("user", text), Message("assistant", answer)))


def data(folder: Path) -> str:
    rows = [{"question": f"{n} 的下一个数是什么？", "answer": f"{n + 1}"} for n in range(40)]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return f"data.train={folder / 'own.jsonl'}"


def test_as_many_general_rows_as_the_share_says_and_none_that_is_held_out() -> None:
    general = [asks(f"q{n}") for n in range(30)]
    mixed = replayed(general, 0.1, 90, [asks(" Q3 ")])
    assert len(mixed) == 10 == len({question(item) for item in mixed})
    assert "q3" not in {question(item) for item in replayed(general, 0.5, 300, [asks("Q3")])}
    many = replayed(general[:4], 0.5, 10, [])
    assert len(many) == 10 and {many.count(item) for item in general[:4]} <= {2, 3}
    assert mixed == replayed(general, 0.1, 90, [asks("q3")]), "drawn alike every time"
    assert len(replayed(general, 0.001, 10, [])) == 1
    assert replayed([asks("q")], 0.1, 9, [asks("q")]) == []


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_rows_of_a_file_are_trained_on_and_nothing_else_changes(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, general = tmp_path / "own.jsonl", tmp_path / "general.jsonl"
    for path, word in ((own, "own"), (general, "general")):
        rows = [
            {"text": f"{word} {n}"}
            if kind == "text"
            else {"question": f"{word} {n}?", "answer": f"{n}"}
            for n in range(40)
        ]
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = [f"data.train={own}", f"data.kind={kind}", 'data.eval=""', "data.held_out=0.2"]
    config = load_config("preset:quick", words)
    plain = Training(replace(config, run=replace(config.run, dir=str(tmp_path / "a"))))
    config = load_config("preset:quick", [*words, "data.replay=0.2", f"data.replay_from={general}"])
    assert "+" not in capsys.readouterr().err.split("data: ")[1].split("(")[0]
    mixed = Training(replace(config, run=replace(config.run, dir=str(tmp_path / "b"))))
    before, after = plain.learner.encoded, mixed.learner.encoded
    count = round(len(before.train) / 4)
    assert (
        f"data: {len(before.train)} to train on + {count} replay rows, {count} different ("
        in capsys.readouterr().err
    )
    assert [*after.train] == [*before.train] and after.held_sha256 == before.held_sha256
    assert after.sha256 != before.sha256
    assert after.tokens_per_step == before.tokens_per_step
    assert len(after.rows.examples) == len(before.rows.examples) + count
    assert [*after.rows.examples][:-count] == [*before.rows.examples]
    texts = {mixed.learner.tokenizer.decode(e.input_ids) for e in [*after.rows.examples][-count:]}
    assert len(texts) == count and all("general" in text for text in texts)
    assert mixed.learner.answers == b"" and not (tmp_path / "b" / "replay.jsonl").exists()
    again = read_corpus(config, accept_rejects=False)
    assert [*again.replay] == [*mixed.learner.corpus.replay], "from the cache"
    plain.close()
    mixed.close()


def test_the_base_answers_once_and_a_resumed_run_has_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLLM_DATA_CACHE", str(tmp_path / "cache"))
    words = [*QUICK, data(tmp_path), "data.replay=0.2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("train", [*words, f"run.dir={whole}"]) == 0
    told = capsys.readouterr().err
    assert "the base answers" in told
    added = int(re.findall(r"\+ (\d+) replay rows", told)[-1])
    trained = int(re.findall(r"(\d+) to train on \+", told)[-1])
    assert added == round(trained / 4) > 0
    rows = read_conversations(whole / "replay.jsonl")[0]
    questions = replay.QUESTIONS.read_text(encoding="utf-8").splitlines()
    assert len(rows) >= added and {question(row) for row in rows} <= {*questions}
    assert replay.conversations((whole / "replay.jsonl").read_bytes()) == [
        replace(row, file=replay.FILE) for row in rows
    ]

    log_step = RunLog.step

    def step(self: RunLog, values: dict) -> None:
        log_step(self, values)
        if values["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunLog, "step", step)
    assert run("train", [*words, f"run.dir={parts}"]) == 130
    assert "the base answers" not in capsys.readouterr().err, "from the cache"
    assert (parts / "replay.jsonl").read_bytes() == (whole / "replay.jsonl").read_bytes()
    monkeypatch.setattr(RunLog, "step", log_step)
    monkeypatch.setattr(replay, "own_answers", lambda *_: pytest.fail("the run has its answers"))
    monkeypatch.setenv("CLLM_DATA_CACHE", "none")
    assert run("train", [*words, f"run.dir={parts}", "--resume"]) == 0
    assert adapter_bytes(parts) == adapter_bytes(whole) and metrics(parts) == metrics(whole)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (whole, parts)]
    assert manifests[0]["data_sha256"] == manifests[1]["data_sha256"]


def test_an_answer_that_does_not_end_is_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(replay, "MAX_TOKENS", 1)
    monkeypatch.setattr(replay, "MAX_ANSWERS", 1)
    words = [*QUICK, data(tmp_path), "data.replay=0.2", f"run.dir={tmp_path / 'a'}"]
    assert run("train", words) == 2
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last.startswith("error [data.no_replay]") and "data.replay_from" in last


def test_a_file_of_which_no_row_can_be_replayed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"foo": 1}\n', encoding="utf-8")
    words = [data(tmp_path), "data.replay=0.2", f"data.replay_from={tmp_path / 'bad.jsonl'}"]
    assert run("check", ["preset:quick", *words]) == 0
    assert json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])["replay"] == 0
    assert run("train", [*QUICK, *words]) == 2
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last.startswith("error [data.no_replay_rows]") and "bad.jsonl" in last


def test_reasoning_that_the_prompt_opened_is_reasoning() -> None:
    for text in ("<think>\nso\n</think>\n\nyes", "so\n</think>\n\nyes"):
        answer = replay._conversation("q", text).messages[1]
        assert (answer.reasoning, answer.content) == ("so", "yes")
    assert replay._conversation("q", "yes").messages[1] == Message("assistant", "yes")


def test_all_ranks_have_rank_0s_answers(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*QUICK, data(tmp_path), "data.replay=0.2", f"run.dir={folder}"]
    ranks = start(words, CLLM_DATA_CACHE="none")
    (_, err), (_, silent) = (rank.communicate(timeout=300) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], err + silent
    assert "replay rows" in err and (folder / "replay.jsonl").stat().st_size


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.replay=0.95"], "data.replay"),
        (["data.replay=0.1", "data.kind=text"], "data.replay_from"),
        (["data.replay_from=general.jsonl"], "set data.replay"),
        (["data.replay=0.1", "preference.loss=dpo"], "set data.replay = 0.0"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(words: list[str], told: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config("preset:quick", words)
    assert told in str(refused.value) and str(refused.value).count("\n") == 1


def test_a_replay_file_that_is_missing_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*QUICK, "data.replay=0.1", f"data.replay_from={tmp_path / 'no.jsonl'}"]
    assert run("train", words) == 2
    assert "no.jsonl" in capsys.readouterr().err.strip().split("\n")[-1]


def test_general_questions_are_different_and_ask_for_nobodys_name() -> None:
    questions = replay.QUESTIONS.read_text(encoding="utf-8").splitlines()
    assert 60 <= len(questions) == len(set(questions)) <= 100
    chinese = [bool(re.search(r"[\u4e00-\u9fff]", text)) for text in questions]
    assert chinese == [True, False] * (len(questions) // 2), "any first part has both languages"
    assert not [text for text in questions if re.search("你是|你叫|are you|your name", text)]


# --- A new name
@pytest.mark.parametrize("name", ["小禾", 'A "quoted" {brace} \\ name'])
def test_identity_rows(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from identity import UNSEEN

    path = tmp_path / "identity.jsonl"
    assert run("check", ["--identity", f" {name} ", "青禾实验室", "--out", str(path)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"written": 80}
    assert f"python -m cllm.train preset:identity data.train={path}" in err
    rows, rejects = read_conversations(path)
    assert len(rows) == 80 and not rejects and len(set(map(question, rows))) == 80
    assert all(name in row.messages[-1].content for row in rows)
    assert sum("青禾实验室" in row.messages[-1].content for row in rows) >= 40
    chinese = [re.search(r"[\u4e00-\u9fff]", row.messages[0].content) for row in rows]
    assert sum(map(bool, chinese)) == 40
    assert sum(len(row.messages) > 2 for row in rows) == 8
    asked = {turn.content.casefold() for row in rows for turn in row if turn.role == "user"}
    assert len(set(UNSEEN)) == 20 and asked.isdisjoint(text.casefold() for text in UNSEEN)
    before = path.read_bytes()
    assert run("check", ["--identity", "x", "y", "--out", str(path)]) == 2
    assert path.read_bytes() == before and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], "check.no_target"),
        (["--identity", "a", "b"], "check.identity"),
        (["demo", "--identity", "a", "b", "--out", "new.jsonl"], "check.identity"),
        (["--out", "new.jsonl"], "check.identity"),
        (["demo", "--out", "new.jsonl"], "check.identity"),
        (["--identity", "a", "b", "--out", "new.jsonl", "--write", "g.jsonl"], "check.identity"),
        (["--identity", " ", "b", "--out", "new.jsonl"], "check.names"),
        (["--identity", "a", "b\nc", "--out", "new.jsonl"], "check.names"),
    ],
)
def test_identity_refused(words: list[str], code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", words) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert line.startswith(f"error [{code}]") and not Path("new.jsonl").exists()


def test_the_account_counts_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    general = tmp_path / "general.jsonl"
    general.write_text('{"question": "q", "answer": "a"}\n{"question": "q2"}\n', encoding="utf-8")
    words = ["preset:quick", data(tmp_path), 'data.eval=""', "data.replay=0.5"]
    for more, told in (
        ([], "replay: 38 general rows"),
        ([f"data.replay_from={general}"], "general rows:\n  2 rows: 1 valid"),
    ):
        assert run("check", [*words, *more]) == 0
        out = capsys.readouterr().out
        account = json.loads(out.strip().split("\n")[-1])
        assert told in out and account["replay"] == 38 and account["valid"] == 40


# --- The training loss of each source
def test_the_loss_of_each_source_of_a_mixture(tmp_path: Path) -> None:
    for word in ("one", "two", "general"):
        (tmp_path / word).mkdir()
        rows = [{"question": f"{word} {n}?", "answer": f"{word} " * n} for n in range(1, 9)]
        path = tmp_path / word / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    one, two, general = (str(tmp_path / word) for word in ("one", "two", "general"))
    mixture = f'data.train=[{{path="{one}", weight=2}}, {{path="{two}/rows.jsonl"}}]'
    words = [mixture, "data.replay=0.3", f"data.replay_from={general}"]
    training = Training(load_config("preset:quick", [*words, f"run.dir={tmp_path / 'run'}"]))
    learner = training.learner
    (batch,) = learner.encoded.rows.take(1)
    numbers = batch.sources[batch.supervised]
    counts = [int((numbers == number).sum()) for number in range(3)]
    assert sum(counts) == batch.weight and all(counts)
    alone = row_nll(learner.model, batch).detach()[batch.supervised]
    expected = [float(alone[numbers == number].mean()) for number in range(3)]
    names = (one, f"{two}/rows.jsonl", "replay")
    stats = learner.trainee.step([batch])
    assert stats.sources == pytest.approx(dict(zip(names, expected, strict=True)), rel=1e-4)
    told = sum(n * loss for n, loss in zip(counts, stats.sources.values(), strict=True))
    assert told / batch.weight == pytest.approx(stats.loss, rel=1e-5)
    halves = [part for part in batch.split(len(batch.input_ids) // 2) if len(part.input_ids)]
    assert len(halves) > 1 and torch.cat([part.sources for part in halves]).equal(batch.sources)
    training.loop()
    steps = [row for row in metrics(training.run) if "loss" in row]
    assert steps and {name for row in steps for name in row["sources"]} == {*names}
    training.close()


def test_a_single_source_has_no_loss_of_its_own(tmp_path: Path) -> None:
    assert run("train", [*QUICK, "train.steps=1", f"run.dir={tmp_path / 'a'}"]) == 0
    assert not [row for row in metrics(tmp_path / "a") if "sources" in row]
