"""Gemma 3 270M on real Chinese pairs: a short SFT on the chosen answers, DPO, and what held-out
pairs say.

    python tools/fetch_model.py gemma3-270m
    python bench/preference_gemma.py [--data ../shared/data/dev/preference/dpo_zh_demo.json]
        [--tokens 2000] [--folder DIR] [--out bench/results/preference_gemma.json]

Pairs of at most `--tokens` tokens, both answers with their prompts. Both runs hold out the same
third of the questions, by content. Half an hour on two quiet cores with bf16 units. `--folder`
keeps the runs; an SFT that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from cllm.__main__ import run  # noqa: E402
from cllm.config import DataConfig  # noqa: E402
from cllm.data.pairs import dialogue, sides  # noqa: E402
from cllm.data.reader import write_conversations  # noqa: E402
from cllm.data.sources import read_file  # noqa: E402
from cllm.model.source import resolve  # noqa: E402
from cllm.model.tokenizer import load_tokenizer  # noqa: E402

SETTINGS = (
    "model.template=plain model.precision=bf16 lora.rank=8 lora.alpha=16 data.eval= "
    "data.held_out=0.33 train.row_tokens=2048 train.tokens_per_step=4096 train.epochs=1 "
    "eval.every=1000 eval.samples=10 eval.shots=0 eval.max_new_tokens=48 train.warmup=0.1"
).split()
SFT = ["train.learning_rate=2e-4"]
DPO = (
    "train.learning_rate=1e-4 train.tokens_per_step=2048 preference.loss=dpo preference.sft=0.1"
).split()


def trained(folder: Path, model: Path, *options: str) -> dict[str, Any]:
    """eval.json and samples of a new run."""
    common = [f"model.path={model}", f"data.train={folder}/pairs.jsonl", *SETTINGS]
    assert run("train", ["cllm.toml", *common, f"run.dir={folder}/run", *options]) == 0
    return results(max(folder.glob("run*"), key=lambda path: path.stat().st_mtime))


def results(newest: Path) -> dict[str, Any]:
    """What a finished run says of itself."""
    told: dict[str, Any] = json.loads((newest / "eval.json").read_text(encoding="utf-8"))
    lines = (newest / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return {"run": newest, "samples": [json.loads(line) for line in lines], **told}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=ROOT / "models/gemma-3-270m-q4_k_m.gguf")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared/data/dev/preference/dpo_zh_demo.json"
    )
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/preference_gemma.json")
    options = parser.parse_args()
    start = time.perf_counter()
    tokenizer = load_tokenizer(resolve(str(options.model)), template="plain")
    pairs, _ = read_file(DataConfig(), str(options.data), {}, pairs=True)
    sizes = [
        sum(
            len(tokenizer.encode_segments(tokenizer.segments(dialogue(pair, side)))[0])
            for side in sides(pair)
        )
        for pair in pairs
    ]
    kept = [pair for pair, size in zip(pairs, sizes, strict=True) if size <= options.tokens]
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        write_conversations(kept, folder / "pairs.jsonl", "pairs")
        done = (folder / "run" / "eval.json").is_file()
        sft = results(folder / "run") if done else trained(folder, options.model, *SFT)
        dpo = trained(folder, options.model, f"lora.init_from={sft['run']}", *DPO)
    losses = [told["adapter"]["loss"] for told in (sft, dpo)]
    answers = [
        {"question": a["messages"], "sft": a["adapter"], "dpo": b["adapter"]}
        for a, b in zip(sft["samples"], dpo["samples"], strict=True)
    ]
    report = {
        "command": " ".join(["python bench/preference_gemma.py", *sys.argv[1:]]),
        "settings": {"both": SETTINGS, "sft": SFT, "dpo": DPO},
        "pairs": len(kept),
        "held_out_pairs": dpo["preference"],
        "chosen_loss_after_sft": losses[0],
        "chosen_loss_after_dpo": losses[1],
        "loss_ratio": losses[1] / losses[0],
        "seconds": round(time.perf_counter() - start, 1),
    }
    # the questions are other people's: they are for reading, not for keeping
    print(json.dumps({"answers": answers}, ensure_ascii=False, indent=1))
    options.out.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8")
    print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    main()
