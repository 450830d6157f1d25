"""How fast a model answers: `python -m cllm.bench … --generate` runs this with its own arguments.

    bench/generation.py tiny-zh [--random-init] [section.key=value …]

Time to the first token and decoded tokens per second for 1, 4 and 16 random prompts at once; the
last line is [{"model", "rows", "first_token_seconds", "decode_tokens_per_second"}, …].
"""

from __future__ import annotations

import json
import sys
import timeit
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from cllm.bench import BenchModel, bench_model, config_of, parse, random_row
from cllm.serve.sampling import Sampling

DECODE_TOKENS = 32
ROWS = (1, 4, 16)


def generation(model: BenchModel, prompt_tokens: int = 128) -> list[dict[str, Any]]:
    """One result for each number of rows."""
    engine = model.assembly.engine()
    results = []
    for rows in ROWS:
        vocabulary = model.assembly.model.config.get_text_config().vocab_size
        prompts = [
            random_row(prompt_tokens, vocabulary, seed).input_ids.tolist() for seed in range(rows)
        ]
        seconds = []
        for count in (1, 1, DECODE_TOKENS):  # the first warms up
            sampling = Sampling(max_new_tokens=count, stop_ids=frozenset())
            seconds.append(timeit.timeit(partial(engine.generate, prompts, sampling), number=1))
        _, first, whole = seconds
        results.append(
            {
                "model": model.name,
                "rows": rows,
                "first_token_seconds": first,
                "decode_tokens_per_second": rows * (DECODE_TOKENS - 1) / (whole - first),
            }
        )
    return results


def main() -> None:
    arguments = parse(sys.argv[1:])
    results = []
    for name in arguments.models:
        config = config_of(name, arguments.overrides)
        rows = arguments.rows or [config.train.row_tokens]
        results += generation(bench_model(config, arguments, min(rows)))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
