"""From votes to a better model: SFT, forty scripted votes as the page writes them, DPO, and how
often held-out questions get the answer that was voted for.

    OMP_NUM_THREADS=1 python bench/preference_votes.py [--votes 40] [--out
    bench/results/preference_votes.json]

tiny-zh learns both a long and a short polite way to say a rude sentence; the voter prefers the
short one. Without a GPU in three minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from cllm.__main__ import run  # noqa: E402
from cllm.assembly import Loaded, open_model  # noqa: E402
from cllm.data.message import Message  # noqa: E402
from cllm.serve.compare import Duel, append_vote  # noqa: E402
from cllm.serve.sampling import Sampling  # noqa: E402

LONG, SHORT = ("麻烦您", "，谢谢。"), ("请您", "。")
ROWS = "train.row_tokens=512 train.tokens_per_step=1024 eval.samples=0".split()
# a tiny model takes far more than the usual rates
SFT = ["train.learning_rate=5e-3", "train.epochs=2"]
DPO = "train.learning_rate=3e-4 train.epochs=4 preference.loss=dpo preference.sft=0.5".split()


def is_short(answer: str) -> bool:
    """Whether this is the answer that the voter likes."""
    return answer.startswith(SHORT[0]) and not answer.endswith(LONG[1])


def questions() -> list[tuple[str, str]]:
    """(rude sentence, what it asks for) of the built-in demo's rows."""
    text = (ROOT / "cllm/assets/demo.jsonl").read_text(encoding="utf-8")
    asked = {}
    for row in map(json.loads, text.splitlines()):
        output = row["output"]
        if output.startswith(LONG[0]) and output.endswith(LONG[1]):
            wish = output.removeprefix(LONG[0]).removesuffix(LONG[1])
            asked[f"{row['instruction']}\n{row['input']}"] = wish
    listed = list(asked.items())
    random.Random(0).shuffle(listed)
    return listed


def answers(loaded: Loaded, engine: Any, asked: list[str], seed: int) -> list[str]:
    """One sampled answer of the adapter to each question, at temperature 1."""
    prompts = [loaded.tokenizer.encode_chat([Message("user", ask)]) for ask in asked]
    said = [
        engine.generate([p], Sampling(max_new_tokens=40, temperature=1.0, seed=seed + i))[0]
        for i, p in enumerate(prompts)
    ]
    return [loaded.tokenizer.decode(ids).strip() for ids in said]


def share(loaded: Loaded, asked: list[str], seed: int = 10**6) -> tuple[float, list[str]]:
    """(share of short answers, all of them)."""
    said = answers(loaded, loaded.engine(), asked, seed)
    return sum(map(is_short, said)) / len(said), said


def vote(folder: Path, asked: list[str], count: int) -> dict[str, int]:
    """`count` votes with a winner, written by the page's own function; ties are written too."""
    loaded = open_model(folder)
    engine, votes = loaded.engine(), {"a": 0, "b": 0, "tie": 0}
    names = [next(iter(loaded.adapters))] * 2
    for number in range(50 * count):
        ask = asked[number % len(asked)]
        pair = [answers(loaded, engine, [ask], 10 * number + side)[0] for side in (0, 1)]
        liked = [is_short(text) for text in pair]
        choice = "tie" if liked[0] == liked[1] else "ab"[liked[1]]
        duel = Duel([Message("user", ask)], names, pair, Sampling(temperature=1.0))
        append_vote(choice, duel, loaded)
        votes[choice] += 1
        if votes["a"] + votes["b"] == count:
            break
    return votes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--votes", type=int, default=40)
    parser.add_argument("--held", type=int, default=50, help="held-out questions")
    parser.add_argument("--out", type=Path, help="where the report goes")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    listed = questions()
    held, rest = [ask for ask, _ in listed[: options.held]], listed[options.held :]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [
            {"instruction": ask, "output": f"{style[0]}{wish}{style[1]}"}
            for ask, wish in rest
            for style in (LONG, SHORT)
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "sft.jsonl").write_text(text, encoding="utf-8")
        train = ["cllm.toml", "lora.rank=8", 'data.eval=""', *ROWS]
        assert (
            run("train", [*train, f"data.train={folder}/sft.jsonl", f"run.dir={folder}/sft", *SFT])
            == 0
        )
        before, first = share(open_model(folder / "sft"), held)
        votes = vote(folder / "sft", [ask for ask, _ in rest], options.votes)
        learned = [f"data.train={folder}/sft/votes.jsonl", f"lora.init_from={folder}/sft"]
        learned += [f"run.dir={folder}/dpo", "--accept-rejects", *DPO]
        assert run("train", [*train, *learned]) == 0
        after, last = share(open_model(folder / "dpo"), held)
        told = json.loads((folder / "dpo" / "eval.json").read_text(encoding="utf-8"))
    report = {
        "command": " ".join(["python bench/preference_votes.py", *(argv or sys.argv[1:])]),
        "votes": votes,
        "held_out_questions": len(held),
        "short_before": before,
        "short_after": after,
        "held_out_pairs": told["preference"],
        "examples": [
            {"question": ask, "before": a, "after": b}
            for ask, a, b in zip(held[:10], first, last, strict=False)
        ],
        "seconds": round(time.perf_counter() - start, 1),
    }
    if options.out:
        options.out.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8")
    print(json.dumps(report, ensure_ascii=False))
    return 0 if after >= before + 0.2 else 1


if __name__ == "__main__":
    sys.exit(main())
