"""LLaMA-Factory's own data stage on one file of alpaca rows, run by `bench/data.py --peer PYTHON`;
prints its seconds as JSON.

    PYTHON bench/llamafactory_data.py ROWS.json TOKENIZER_DIR WORKERS ROW_TOKENS

PYTHON is an environment with llamafactory 0.9.5 in it. Timed: `get_dataset` (load_dataset, align,
tokenize, pack), cold, into a cache directory made for this run. Not timed: imports, loading the
tokenizer.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


def main() -> int:
    file, tokenizer_path, workers, row_tokens = (
        Path(sys.argv[1]).resolve(),
        sys.argv[2],
        int(sys.argv[3]),
        int(sys.argv[4]),
    )
    with tempfile.TemporaryDirectory() as work:
        os.environ |= {
            "DISABLE_VERSION_CHECK": "1",
            "HF_HOME": work,
            "HF_DATASETS_CACHE": f"{work}/datasets",
            "TOKENIZERS_PARALLELISM": "false",
        }
        columns = {"prompt": "instruction", "query": "input", "response": "output"}
        info = {"rows": {"file_name": file.name, "columns": columns}}
        (Path(work) / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        (Path(work) / file.name).write_bytes(file.read_bytes())

        import datasets
        import tokenizers
        import transformers
        from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
        from llamafactory.hparams import DataArguments, ModelArguments

        data = DataArguments(
            template="chatml",
            dataset="rows",
            dataset_dir=work,
            cutoff_len=row_tokens,
            packing=True,
            neat_packing=True,
            preprocessing_num_workers=workers if workers > 1 else None,
            val_size=0.05,
        )
        model = ModelArguments(model_name_or_path=tokenizer_path, cache_dir=f"{work}/cache")
        training = transformers.Seq2SeqTrainingArguments(output_dir=f"{work}/out", report_to="none")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_path)
        template = get_template_and_fix_tokenizer(tokenizer, data)
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        made = get_dataset(template, model, data, training, stage="sft", tokenizer=tokenizer)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = (
            after.ru_utime
            + after.ru_stime
            - before.ru_utime
            - before.ru_stime
            + children.ru_utime
            + children.ru_stime
        )
        tokens = sum(
            sum(mask > 0 for mask in row) for row in made["train_dataset"]["attention_mask"]
        )
        versions = {m.__name__: m.__version__ for m in (datasets, transformers, tokenizers)} | {
            "llamafactory": version("llamafactory")
        }
        found = {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu, 2),
            "tokens": tokens,
            "rows": len(made["train_dataset"]),
        }
        print(json.dumps(found | {"workers": workers, "versions": versions}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
