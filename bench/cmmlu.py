"""Multiple choice as the command does it: accuracy of a real small model and of random weights, and
both against Transformers' forward.

    python bench/cmmlu.py --data ../shared/data/dev/bench/cmmlu --limit 30 --gemma-limit 10 --out
    bench/results/cmmlu.json

Gemma-3-270M (base) has not learned such questions and random weights cannot: both must lie about 25
%. For some questions the whole prompt goes through Transformers' own model in one forward, without
cache, prefix sharing or our attention, and the log-likelihoods of A-D are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GEMMA = "models/gemma-3-270m-q4_k_m.gguf"


def random_model(directory: Path) -> Path:
    """tiny-zh's architecture and vocabulary with random weights and room for five shots."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = ROOT / "cllm" / "assets" / "tiny-zh"
    shutil.copytree(source, directory)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    config = AutoConfig.from_pretrained(source, max_position_embeddings=8192, dtype=torch.float32)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def evaluate(model: str, data: Path, limit: int, folder: Path) -> dict[str, Any]:
    """The command's own results, and where it wrote them."""
    command = [
        sys.executable,
        "-m",
        "cllm.eval",
        model,
        "--task",
        "mmlu-csv",
        "--data",
        str(data),
        "--limit",
        str(limit),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CLLM_LANG": "en"}
    start = time.perf_counter()
    output = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    print(output, file=sys.stderr)
    (found,) = json.loads(output.strip().split("\n")[-1])["eval"].values()
    return {
        **found,
        "seconds": time.perf_counter() - start,
        "folder": str(folder / found["folder"]),
    }


def deviation(
    model: str, data: Path, limit: int, found: dict[str, Any], per_subject: int
) -> dict[str, Any]:
    """Largest difference in log-likelihood to one plain forward of Transformers' model over the
    whole prompt.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from cllm.evaluate.choice import LETTERS, letter_ids, read_subjects
    from cllm.model import load_tokenizer

    path = Path(model)
    where, keywords = (
        (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    )
    reference = AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, attn_implementation="eager", **keywords
    ).eval()
    tokenizer = load_tokenizer(path, template="text")
    lines = (Path(found["folder"]) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = {
        (row["subject"], row["question"]): row["log_likelihoods"]["base"]
        for row in map(json.loads, lines)
    }
    worst, compared = 0.0, 0
    for subject in read_subjects(data, 5, limit):
        letters = letter_ids(tokenizer, subject.questions[0].rpartition("\n")[2])
        for question in subject.questions[:per_subject]:
            ids = tokenizer.encode_chat(
                [{"role": "user", "content": subject.header + "".join(subject.shots) + question}]
            )
            with torch.no_grad():
                row = (
                    reference(input_ids=torch.tensor([ids]), logits_to_keep=1)
                    .logits[0, -1]
                    .float()
                    .log_softmax(-1)[letters]
                    .tolist()
                )
            ours = [samples[subject.name, question][letter] for letter in LETTERS]
            worst, compared = (
                max([worst, *(abs(a - b) for a, b in zip(ours, row, strict=True))]),
                compared + 1,
            )
    return {
        "compared_questions": compared,
        "largest_difference_nats": worst,
        "reference": type(reference).__name__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--limit", type=int, default=30, help="questions per subject for the random model"
    )
    parser.add_argument(
        "--gemma-limit", type=int, default=10, help="questions per subject for Gemma-3-270M"
    )
    parser.add_argument(
        "--check", type=int, default=1, help="questions per subject compared with Transformers"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    data = options.data.resolve()
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {
            "random tiny-zh": (str(random_model(folder / "random")), options.limit),
            "gemma-3-270m (base, q4_k_m)": (str(ROOT / GEMMA), options.gemma_limit),
        }
        for label, (model, limit) in models.items():
            found = evaluate(model, data, limit, folder)
            result = found["results"]["base"]
            low, high = result["interval"]
            rows[label] = {
                "questions": result["questions"],
                "accuracy": result["accuracy"],
                "interval_95": [low, high],
                "macro": result["macro"],
                "macro_interval_95": result["macro_interval"],
                "subjects": {key: its["accuracy"] for key, its in result["subjects"].items()},
                "shots": sorted({its["shots"] for its in result["subjects"].values()}),
                "seconds": round(found["seconds"], 1),
                **deviation(model, data, limit, found, options.check),
            }
            rows[label]["met"] = low <= 25 <= high and rows[label]["largest_difference_nats"] < 1e-3
            print(label, rows[label], file=sys.stderr, flush=True)
    command = f"python bench/cmmlu.py --data DIR --limit {options.limit} --gemma-limit {options.gemma_limit} --out {options.out.as_posix()}"
    document = {
        "command": command,
        "sets": "the six dev subjects of CMMLU, 5 shots, official prompt",
        "models": rows,
    }
    options.out.write_text(
        json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    print(json.dumps(document, ensure_ascii=False))
    return 0 if all(row["met"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
