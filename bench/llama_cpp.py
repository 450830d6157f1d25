"""llama.cpp itself on our exports: the same greedy tokens as cllm's engine, and Chinese text token
for token.

    python bench/llama_cpp.py RUN [RUN …] --json bench/results/llama_cpp.json

Needs llama-cpp-python, built from its source package (`pip install llama-cpp-python`; a compiler is
enough). Each run is exported as f32 and llama.cpp keeps its cache in f32, so that what differs is
the program and not the rounding. Each answer is generated freely by both; then both are fed cllm's
answer, and their logits are compared at every token: the largest difference, and how close cllm's
best two ever are. Exit code 1 if a token differs, or a logit by more than `CLOSE` of the range of
its position's logits.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# in place of this folder, where this file would hide the package of its name
sys.path[0] = str(Path(__file__).parents[1])

QUESTIONS = (
    "你好，请介绍一下你自己。",
    "姜静琳住在哪里？",
    "What is the capital of France? Answer in one sentence.",
)
TEXTS = (
    "今天天气很好，我们去公园散步。",
    "人工智能（AI）正在改变世界！2024 年，GPT-4 有 1.8 万亿参数？",
    "繁體中文與「引號」、——破折号……",
    "  两个空格\n\n换行\t制表",
    "Hello, world! naïve café 🎉👍🏽",
    "床前明月光，疑是地上霜。",
    "x = [i**2 for i in range(10)]  # 注释",
)
NEW = 64
CLOSE = 1e-5  # of the range of the logits at a position, largest less smallest


def forced(model: Any, theirs: Any, prompt: list[int], answer: list[int]) -> tuple[Tensor, Tensor]:
    """Both programs' logits (len(answer), vocabulary) that choose each token of `answer`, fed the
    prompt and the tokens before it.
    """
    fed, start = [*prompt, *answer[:-1]], len(prompt) - 1
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([fed]), use_cache=False).logits[0, start:].float()
    theirs.reset()
    theirs.eval(fed)
    return ours, torch.tensor(theirs.scores[start : len(fed)].copy())


def compare(
    ours: Tensor, theirs: Tensor, answer: list[int], shown: Callable[[list[int]], str]
) -> dict[str, Any]:
    """How far the logits differ along `answer`, cllm's least gap between the best two, and where
    llama.cpp prefers another token.
    """
    differences, spans = (ours - theirs).abs().amax(-1), ours.amax(-1) - ours.amin(-1)
    best = {name: logits.topk(2) for name, logits in (("cllm", ours), ("llama_cpp", theirs))}
    others = [
        {
            "position": at,
            **{
                name: [
                    (shown([int(i)]), float(v)) for v, i in zip(*(t[at] for t in top), strict=True)
                ]
                for name, top in best.items()
            },
        }
        for at, token in enumerate(answer)
        if int(best["llama_cpp"].indices[at, 0]) != token
    ]
    gaps = best["cllm"].values[:, 0] - best["cllm"].values[:, 1]
    return {
        "max_difference": float(differences.max()),
        "max_difference_of_range": float((differences / spans).max()),
        "least_gap": float(gaps.min()),
        "prefers_another": others,
    }


def judge(run: str, folder: Path) -> dict[str, Any]:
    """One run: exported, opened by llama.cpp, compared."""
    import llama_cpp

    from cllm import export
    from cllm.assembly import open_model
    from cllm.data.message import Message
    from cllm.serve.engine import Engine
    from cllm.serve.sampling import Sampling

    out = folder / Path(run).name
    if export.main([run, "--to", "gguf", str(out), "--type", "f32", "--no-check"]):
        raise SystemExit(1)
    loaded = open_model(run, precision="fp32", device="cpu")
    tokenizer = loaded.tokenizer
    # Beyond the end of the answer too, so that always NEW tokens are compared.
    engine = Engine(
        loaded.model,
        stop_ids=frozenset(),
        pad_id=tokenizer.pad_id,
        autocast=loaded.precision.autocast,
    )
    prompts = [tokenizer.encode_chat([Message("user", question)]) for question in QUESTIONS]
    ours = [
        engine.generate([prompt], Sampling(max_new_tokens=NEW), adapter=True)[0]
        for prompt in prompts
    ]
    base = [
        engine.generate([prompt], Sampling(max_new_tokens=16), adapter=False)[0]
        for prompt in prompts
    ]
    engine.close()
    f32 = {"type_k": 0, "type_v": 0, "flash_attn": False}  # GGML_TYPE_F32; the default cache is f16
    theirs = llama_cpp.Llama(
        str(out / "model.gguf"), n_ctx=512, n_threads=1, logits_all=True, verbose=False, **f32
    )
    rows = []
    for question, prompt, mine, plain in zip(QUESTIONS, prompts, ours, base, strict=True):
        got: list[int] = []
        theirs.reset()
        for token in theirs.generate(prompt, temp=0.0, repeat_penalty=1.0):
            got.append(token)
            if len(got) == NEW:
                break
        rows.append(
            {
                "question": question,
                "tokens": len(mine),
                "equal": got == mine,
                "differs_from_base": mine[:16] != plain[:16],
                "cllm": tokenizer.decode(mine),
                "llama_cpp": tokenizer.decode(got),
                **compare(*forced(loaded.model, theirs, prompt, mine), mine, tokenizer.decode),
            }
        )
    texts = [
        {
            "text": t,
            "equal": theirs.tokenize(t.encode(), add_bos=False, special=False)
            == tokenizer.encode(t),
        }
        for t in TEXTS
    ]
    rendered = [
        "".join(s.text for s in tokenizer.segments([Message("user", q)], open_turn=True))
        for q in QUESTIONS
    ]
    same = [
        theirs.tokenize(r.encode(), add_bos=False, special=True) == p
        for r, p in zip(rendered, prompts, strict=True)
    ]
    ends = sorted(
        i for i in tokenizer.stop_ids if llama_cpp.llama_vocab_is_eog(theirs._model.vocab, i)
    )
    return {
        "run": Path(run).name,
        "base": loaded.base_name,
        "generations": rows,
        "texts": texts,
        "prompts_equal": same,
        "stops": ends == sorted(tokenizer.stop_ids),
    }


def main(argv: list[str]) -> int:
    """Judge each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    import llama_cpp

    with tempfile.TemporaryDirectory() as scratch:
        results = []
        for run in options.run:
            results.append(judge(run, Path(scratch)))
            print(json.dumps(results[-1], ensure_ascii=False), file=sys.stderr, flush=True)
    rows = [row for result in results for row in result["generations"]]
    flags = [
        row["equal"] and not row["prefers_another"] and row["max_difference_of_range"] < CLOSE
        for row in rows
    ]
    flags += [row["equal"] for result in results for row in result["texts"]]
    right = all(
        flags + [flag for result in results for flag in (*result["prompts_equal"], result["stops"])]
    )
    document = {
        "llama_cpp_python": llama_cpp.__version__,
        "command": "python bench/llama_cpp.py RUN …",
        "right": right,
        "close": CLOSE,
        "results": results,
    }
    print(json.dumps(document, ensure_ascii=False))
    if options.json:
        options.json.write_text(
            json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
