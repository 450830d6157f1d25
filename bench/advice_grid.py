"""The settings that `cllm.check --init` advises, beside a grid of rates and epochs around them.

    python tools/fetch_model.py gemma3-270m
    python bench/advice_grid.py --folder DIR [--task classical] [--out FILE]

Gemma 3 270M in float32 on the CPU, two tasks of unlike size: CLASSICAL rows of classical Chinese to
modern, RIDDLES rows of two-part sayings. The rates are the advised one, a quarter of it and four
times as much; the epochs the advised ones and a third of them: six runs a task. Each run is as
advised otherwise, without an early end, and is measured by the lowest held-out loss, which is that
of the adapter it keeps; the held-out rows are the same HELD_OUT ones in every run. Runs that the
JSON has are not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
DATA = ROOT.parent / "shared/data/dev"
CLASSICAL, RIDDLES, HELD_OUT, LONGEST = 24, 160, 60, 50
LIMIT = 1.02


def rows_of(task: str) -> list[dict[str, str]]:
    """The first short rows: those to train on, then the held-out ones."""
    if task == "classical":
        text = (DATA / "nlg/classical_modern_train.tsv").read_text(encoding="utf-8")
        pairs = [line.split("\t") for line in text.splitlines()]
        prompt = "把这句文言文译成现代汉语："
    else:
        rows = json.loads((DATA / "instruct/xiehouyu.json").read_text(encoding="utf-8"))
        pairs = [[row["riddle"], row["answer"]] for row in rows]
        prompt = "接出歇后语的后半句："
    short = [pair for pair in pairs if len("".join(pair)) <= LONGEST]
    return [{"instruction": prompt + question, "output": answer} for question, answer in short]


def run(*command: Any) -> Any:
    """The JSON that a program of ours prints last."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.rstrip("\n").rpartition("\n")[2])


def grid(task: str, folder: Path, model: Path, out: Path) -> dict[str, Any]:
    """The runs of one task that are not in `out` yet."""
    from cllm.config import load_config
    from cllm.runs import read_metrics

    count = CLASSICAL if task == "classical" else RIDDLES
    rows = rows_of(task)
    files = {"train": rows[:count], "held": rows[count : count + HELD_OUT]}
    for name, part in files.items():
        text = json.dumps(part, ensure_ascii=False)
        (folder / f"{task}-{name}.json").write_text(text, encoding="utf-8")
    advice = folder / f"{task}.toml"
    advice.unlink(missing_ok=True)
    program = (sys.executable, "-m")
    data = folder / f"{task}-train.json"
    run(*program, "cllm.check", data, f"model.path={model}", "--init", advice, "--json")
    advised = load_config(advice).train
    for epochs in (advised.epochs, max(1.0, round(advised.epochs / 3))):
        for rate in (advised.rate, advised.rate / 4, advised.rate * 4):
            results = json.loads(out.read_text()) if out.is_file() else {}
            key = f"{task}: rate {rate:.2g}, {epochs:g} epochs"
            if key in results:
                continue
            found = run(
                *(*program, "cllm.train", advice, f"data.eval={folder}/{task}-held.json"),
                *(f"train.learning_rate={rate}", f"train.epochs={epochs}", "eval.patience=0"),
                *(
                    "eval.samples=0",
                    "model.precision=fp32",
                    "memory.checkpoint_layers=0",
                    f"run.dir={folder}/{task}",
                    "--json",
                ),
            )
            losses = [
                row["eval_loss"]
                for row in read_metrics(Path(found["run"]) / "metrics.jsonl")
                if "eval_loss" in row
            ]
            advised_one = (rate, epochs) == (advised.rate, advised.epochs)
            results[key] = {"loss": min(losses), "losses": losses, "steps": found["steps"]}
            results[key] |= {"advised": advised_one, "rows": count}
            out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            print(key, losses, flush=True)
    results = json.loads(out.read_text())
    mine = {key: found for key, found in results.items() if key.startswith(task)}
    best = min(found["loss"] for found in mine.values())
    advised_loss = mine[f"{task}: rate {advised.rate:.2g}, {advised.epochs:g} epochs"]["loss"]
    return {"task": task, "advised": advised_loss, "best": best, "ratio": advised_loss / best}


def main() -> None:
    """Both tasks; exit code 1 where the advice is more than 2 % above the best."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "models/gemma-3-270m-q4_k_m.gguf")
    parser.add_argument("--task", action="append", choices=["classical", "riddles"])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/advice_grid.json")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(exist_ok=True)
    tasks = options.task or ["classical", "riddles"]
    found = [grid(task, folder, options.model, options.out) for task in tasks]
    print(json.dumps(found))
    raise SystemExit(any(result["ratio"] > LIMIT for result in found))


if __name__ == "__main__":
    main()
