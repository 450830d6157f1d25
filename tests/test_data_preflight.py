"""What `cllm.train` refuses before a model is loaded, and that it names the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cllm.config import load_config
from cllm.messages import UserError
from cllm.model.tokenizer import Tokenizer
from cllm.train import Training


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was about to be loaded")

    monkeypatch.setattr("cllm.learner.assemble", load)


def refused(config: Path, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        Training(load_config(config, list(overrides)))
    return caught.value


def test_no_supervised_token(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = Tokenizer.segments

    def unsupervised(self: Tokenizer, conversation: Any, **more: Any) -> Any:
        return [
            segment._replace(supervised=False) for segment in segments(self, conversation, **more)
        ]

    monkeypatch.setattr(Tokenizer, "segments", unsupervised)
    error = refused(config)
    assert error.code == "train.unsupervised" and f"{config.parent / 'data.jsonl'}:1, " in str(
        error
    )


def test_an_end_token_that_is_never_trained(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "stop_ids", frozenset({259}))
    assert refused(config).code == "train.no_end"


def test_every_conversation_too_long(config: Path) -> None:
    error = refused(config, "train.row_tokens=8")
    assert error.code == "train.too_long" and "data.jsonl:1, " in str(error)


def test_over_a_fifth_rejected_names_the_rows(config: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"{n}", "output": "" if n % 3 == 0 else "好"} for n in range(12)]
    (tmp_path / "bad.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    error = refused(config, f"data.train={tmp_path / 'bad.jsonl'}")
    assert error.code == "train.rejects"
    for line in (1, 4, 7):
        assert f"bad.jsonl:{line}: empty_assistant: turn 2" in str(error)


def test_leaks_and_duplicates_are_told(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"instruction": "写出数字3", "output": "三个"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(AssertionError, match="about to be loaded"):
        Training(load_config(config, [f"data.eval={tmp_path / 'test.jsonl'}"]))
    assert (
        "0 duplicates dropped; 1 held-out questions are asked in training too"
        in capsys.readouterr().err
    )
