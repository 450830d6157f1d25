"""cllm with its own advice beside LLaMA-Factory with the settings of its LoRA example, on the same
base, rows, rank and tokens.

    python tools/fetch_model.py gemma3-270m smollm2
    python tools/convert.py models/gemma-3-270m-q4_k_m.gguf FOLDER/gemma
    python -m venv VENV && VENV/bin/pip install llamafactory==0.9.5
    python bench/quality_vs_llamafactory.py --folder FOLDER --llamafactory VENV/bin/llamafactory-cli
        [--base gemma] [--task classical] [--rows 60] [--tested 40] [--out FILE]

A task's rows are the first ones of at most LONGEST characters. LLaMA-Factory trains as its
examples/train_lora/*_sft.yaml say: rate 1e-4, cosine, warmup 0.1, 3 epochs, 8 samples a step, all
linears, rank 8 with alpha 16. cllm trains as `cllm.check --init` advises, at the same rank; it sets
a tenth of the rows aside, sees the others as many times as makes the tokens equal ("most"), and
ends before that where its held-out loss has turned ("tokens"). Both in float32 on the CPU. Both
adapters answer the same test rows, which neither has seen, greedily and through cllm.eval, which
also measures general perplexity. Each cell (base, task) is kept in the JSON; the others stay as
they are. What LLaMA-Factory has trained in FOLDER is not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
DATA = ROOT.parent / "shared/data/dev/nlg"
EPOCHS, RANK, HELD_OUT, SCORES = 3, 8, 0.1, ("rouge-l-char", "bleu-zh")


class Task(NamedTuple):
    """Where its rows are, and what is asked of a row's first text."""

    train: str
    test: str
    names: tuple[str, str]
    prompt: str
    longest: int


TASKS = {
    "classical": Task(
        "classical_modern_train.tsv",
        "classical_modern_test.tsv",
        ("0", "1"),
        "把这句文言文译成现代汉语：{}",
        70,
    ),
    "title": Task(
        "csl_title_dev.tsv", "csl_title_test.tsv", ("1", "2"), "给这段摘要拟一个标题：{}", 170
    ),
    "advert": Task(
        "advertisegen_dev.jsonl",
        "advertisegen_dev.jsonl",
        ("content", "summary"),
        "按这些特征写一段广告：{}",
        125,
    ),
}
# The format that both sides write; LLaMA-Factory's own one for SmolLM2 has another system prompt.
BASES = {"gemma": ("gemma", ""), "smollm2": ("smollm2", "{}")}
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def rows_of(task: Task, file: str) -> list[dict[str, str]]:
    """Question and answer of every row that is short enough."""
    lines = (DATA / file).read_text(encoding="utf-8").splitlines()
    if file.endswith(".tsv"):
        records: Any = [dict(enumerate(line.split("\t"))) for line in lines]
        first, second = map(int, task.names)
    else:
        records = [json.loads(line) for line in lines]
        first, second = task.names  # type: ignore[assignment]
    pairs = [(record[first].strip(), record[second].strip()) for record in records]
    return [
        {"instruction": task.prompt.format(question), "input": "", "output": answer}
        for question, answer in pairs
        if len(question + answer) <= task.longest
    ]


def run(*command: Any, log: Path, **environment: str) -> float:
    """Seconds that the command took; raises where it failed, with the end of its output."""
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as out:
        names = os.environ | {"PYTHONPATH": str(ROOT), "CLLM_LANG": "en"} | environment
        code = subprocess.run(list(map(str, command)), stdout=out, stderr=out, env=names).returncode
    if code:
        raise SystemExit(f"{command}: {code}\n{log.read_text(encoding='utf-8')[-3000:]}")
    return time.perf_counter() - start


def train_llamafactory(cli: Path, base: str, folder: Path, work: Path, seed: int) -> dict[str, Any]:
    """As its example does."""
    template, system = BASES[base]
    (work / "dataset_info.json").write_text(json.dumps({"task": {"file_name": "train.json"}}))
    settings = {
        "model_name_or_path": str(folder / base),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": RANK,
        "lora_target": "all",
        "dataset": "task",
        "dataset_dir": str(work),
        "template": template,
        "cutoff_len": 2048,
        "output_dir": str(work / "llamafactory"),
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "overwrite_output_dir": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4,
        "num_train_epochs": EPOCHS,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "seed": seed,
        **({"default_system": SYSTEM} if system else {}),
    }
    file = work / "llamafactory.yaml"  # JSON is YAML
    text, ended = json.dumps(settings, indent=1), work / "llamafactory/trainer_state.json"
    if not (ended.is_file() and file.read_text() == text):
        file.write_text(text)
        run(cli, "train", file, log=work / "llamafactory.log", CUDA_VISIBLE_DEVICES="")
    state = json.loads(ended.read_text())
    return {
        "steps": state["global_step"],
        "rate": 1e-4,
        "alpha": 16,
        "seconds": round(state["log_history"][-1]["train_runtime"], 1),
    }


def train_cllm(base: str, folder: Path, work: Path, seed: int) -> dict[str, Any]:
    """As `cllm.check --init` advises of these rows, but rank and epochs are the other's."""
    from cllm.advice import FEW_CONVERSATIONS, sized
    from cllm.config import load_config

    model, advice = f"model.path={folder / base}", work / "cllm.toml"
    advice.unlink(missing_ok=True)
    shutil.rmtree(work / "cllm", ignore_errors=True)
    check = (sys.executable, "-m", "cllm.check", work / "train.json", model, "--json")
    run(*check, "--init", advice, log=work / "check.log")
    account = json.loads((work / "check.log").read_text(encoding="utf-8").splitlines()[-1])
    advised = load_config(advice).train
    tokens, longest = account["total_tokens"], account["tokens"]["max"]
    epochs = EPOCHS / (1 - HELD_OUT)
    # what the advice is for data of which so many epochs are enough
    other = sized(
        replace(advised, epochs=epochs, row_tokens=2048), FEW_CONVERSATIONS, tokens, longest
    )
    seconds = run(
        *(sys.executable, "-m", "cllm.train", advice, f"lora.rank={RANK}"),
        *(f"train.epochs={epochs}", f"train.row_tokens={other.row_tokens}"),
        *("train.tokens_per_step=0", f"train.seed={seed}", f"data.held_out={HELD_OUT}"),
        *("eval.samples=0", "model.precision=fp32", "memory.checkpoint_layers=0"),
        f"run.dir={work / 'cllm'}",
        log=work / "cllm.log",
    )
    from cllm.runs import read_metrics

    rows = read_metrics(work / "cllm/metrics.jsonl")
    steps = max(row["step"] for row in rows)
    config = load_config(work / "cllm/config.toml")
    facts = {"steps": steps, "rate": config.train.rate, "alpha": config.lora.alpha}
    seen = sum(row.get("tokens", 0) for row in rows)
    return facts | {"tokens": seen, "most": tokens * EPOCHS, "seconds": round(seconds, 1)}


def answered(model: Path, test: Path, work: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(scores of base and adapter, samples) by cllm.eval."""
    log = work / f"eval-{model.name}.log"
    command = (sys.executable, "-m", "cllm.eval", model, "--data", test, "--json")
    run(*command, "--max-new-tokens", 128, log=log)
    found = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["eval"][str(test)]
    lines = (Path(found["folder"]) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return found["results"], [json.loads(line) for line in lines]


def cell(base: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One base on one task, both sides."""
    from cllm.evaluate.answers import statistics, versus

    task, work = TASKS[name], options.folder / f"{base}-{name}"
    work.mkdir(exist_ok=True)
    train = rows_of(task, task.train)[: options.rows]
    asked = {row["instruction"] for row in train}
    tested = [row for row in rows_of(task, task.test) if row["instruction"] not in asked]
    tested = tested[-options.tested :]
    for file, rows in (("train.json", train), ("test.json", tested)):
        (work / file).write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    found: dict[str, Any] = {"rows": len(train), "tested": len(tested)}
    found["llamafactory"] = train_llamafactory(
        options.llamafactory, base, options.folder, work, options.seed
    )
    found["cllm"] = train_cllm(base, options.folder, work, options.seed)
    tables = {}
    adapters = {"llamafactory": work / "llamafactory", "cllm": work / "cllm"}
    for side, adapter in adapters.items():
        scores, samples = answered(adapter, work / "test.json", work)
        answers = [sample["adapter"] for sample in samples]
        tables[side] = statistics(answers, [sample["reference"] for sample in samples])
        found[side] |= {metric: scores["adapter"][metric] for metric in (*SCORES, "loss")}
        found[side]["general-ppl"] = scores["adapter"]["general-ppl"]
        found["base"] = {key: scores["base"][key] for key in (*SCORES, "loss", "general-ppl")}
    intervals, gaps = versus(tables["llamafactory"], tables["cllm"])
    found["cllm minus llamafactory"] = {
        metric: {"difference": gap.difference, "low": gap.low, "high": gap.high, "p": gap.p}
        for metric, gap in gaps.items()
        if metric in SCORES
    }
    found["intervals of cllm"] = {metric: intervals[metric] for metric in SCORES}
    return found


def main() -> None:
    """Every asked cell, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="with a checkpoint for each base"
    )
    parser.add_argument("--llamafactory", type=Path, required=True, help="its llamafactory-cli")
    parser.add_argument("--base", action="append", choices=list(BASES))
    parser.add_argument("--task", action="append", choices=list(TASKS))
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--tested", type=int, default=40)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench/results/quality_vs_llamafactory.json"
    )
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    for base in options.base or BASES:
        for task in options.task or TASKS:
            found = cell(base, task, options)
            cells = json.loads(options.out.read_text()) if options.out.is_file() else {}
            cells[f"{base}, {task}, seed {options.seed}"] = found
            options.out.write_text(json.dumps(cells, indent=1, ensure_ascii=False) + "\n")
            print(json.dumps(found, ensure_ascii=False, indent=1), flush=True)


if __name__ == "__main__":
    main()
