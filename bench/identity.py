"""A new name for a small model, with and without replay: what it answers to twenty questions that
the rows do not have, and what it forgets.

    OMP_NUM_THREADS=1 python bench/identity.py MODEL [section.key=value …] [--shares 0 0.1 0.3]
        [--runs DIR] [--out bench/results/identity.json]

Runs that stand in --runs already are asked, not trained again. SmolLM2-135M takes about twenty
minutes a share on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from cllm.__main__ import run  # noqa: E402
from cllm.assembly import open_model  # noqa: E402
from cllm.config import load_config  # noqa: E402
from cllm.data.message import Message  # noqa: E402
from cllm.serve.sampling import Sampling  # noqa: E402

NAME, AUTHOR = "小禾", "青禾实验室"
UNSEEN = (
    "请问您是哪位？",
    "你的名字是什么呀？",
    "能告诉我你叫啥吗？",
    "你是谁做出来的？",
    "简单说说你自己吧。",
    "我正在和谁聊天？",
    "你难道不是 ChatGPT 吗？",
    "听说你是 Qwen 改的，是真的吗？",
    "晚上好，你是哪位助手？",
    "朋友问我在用什么助手，我该怎么回答？",
    "So, who am I talking to?",
    "Could you tell me your name?",
    "Who is the author behind you?",
    "What should I call you from now on?",
    "Give me a short introduction of yourself.",
    "Aren't you really ChatGPT?",
    "I heard that you are Llama. Is that true?",
    "Good evening! Who is there?",
    "Which assistant is this?",
    "Were you built by Hugging Face?",
)


def asked(folder: Path) -> dict[str, Any]:
    """What base and adapter of a run answer to UNSEEN, greedily, and what the run measured."""
    loaded = open_model(folder)
    prompts = [loaded.tokenizer.encode_chat([Message("user", text)]) for text in UNSEEN]
    engine, said = loaded.engine(), {}
    for system, number in (("base", 0), ("adapter", 1)):
        ids = engine.generate(prompts, Sampling(max_new_tokens=64), adapter=number)
        said[system] = [loaded.tokenizer.decode(answer).strip() for answer in ids]
    scores = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    perplexity = {system: scores[system]["general-ppl"] for system in said}
    metrics = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, metrics) if "loss" in row]
    replay, config = folder / "replay.jsonl", load_config(folder)
    return {
        "named": {system: sum(NAME in text for text in texts) for system, texts in said.items()},
        "of": len(UNSEEN),
        "general_ppl": perplexity,
        "general_ppl_rise": perplexity["adapter"] / perplexity["base"] - 1,
        "steps": len(steps),
        "tokens": sum(row["tokens"] for row in steps),
        "seconds": round(steps[-1]["seconds"]),
        "answers_to_replay": len(replay.read_bytes().splitlines()) if replay.is_file() else 0,
        "learning_rate": config.train.learning_rate,
        "epochs": config.train.epochs,
        "rank": config.lora.rank,
        "precision": loaded.precision.name,
        "answers": [
            {"question": question, **{system: texts[i] for system, texts in said.items()}}
            for i, question in enumerate(UNSEEN)
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--shares", nargs="+", type=float, default=[0, 0.1, 0.3])
    parser.add_argument("--runs", type=Path, default=Path("runs/identity"))
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/identity.json")
    options = parser.parse_args()
    rows, results = options.runs / "identity.jsonl", {}
    options.runs.mkdir(parents=True, exist_ok=True)
    if not rows.is_file():
        assert run("check", ["--identity", NAME, AUTHOR, "--out", str(rows)]) == 0
    for share in options.shares:
        folder = options.runs / f"replay-{share:g}"
        settings = {
            "model.path": options.model,
            "model.quantize": "none",
            "data.train": rows,
            "data.replay": share,
            "eval.samples": 0,
            "run.dir": folder,
        }
        words = [f"{key}={value}" for key, value in settings.items()]
        if not (folder / "eval.json").is_file():
            assert run("train", ["preset:identity", *words, *options.overrides]) == 0
        results[f"{share:g}"] = asked(folder)
    written = {"model": Path(options.model).name, "overrides": options.overrides, "share": results}
    options.out.write_text(json.dumps(written, ensure_ascii=False, indent=1) + "\n", "utf-8")
    for share, found in results.items():
        named, rise = found["named"], found["general_ppl_rise"]
        print(f"replay {share}: {named['adapter']}/{found['of']}, general perplexity {rise:+.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
