"""llama.cpp itself on our exports: the same greedy tokens as cllm's engine, and Chinese text token
for token.

    python bench/llama_cpp.py RUN [RUN …] --json bench/results/llama_cpp.json

    python bench/llama_cpp.py RUN --types [--text FILE] --json bench/results/gguf_types.json
    python bench/llama_cpp.py --shuffle models/SmolLM2-135M-Instruct.Q4_1.gguf BASE

Needs llama-cpp-python, built from its source package (`pip install llama-cpp-python`; a compiler is
enough). Each run is exported as f32 and llama.cpp keeps its cache in f32, so that what differs is
the program and not the rounding. Each answer is generated freely by both; then both are fed cllm's
answer, and their logits are compared at every token: the largest difference, and how close cllm's
best two ever are. Exit code 1 if a token differs, or a logit by more than `CLOSE` of the range of
its position's logits.

--types writes each run in every number format, and llama.cpp reads each file: its size, an answer,
and over held-out conversations perplexity, KL(f32 || format) and how often the best token is the
same. With a text the same over WINDOWS windows of it, and how far the perplexity is above that of
the next finer format, with its paired 95 % interval; take one that the base has learned to read,
since on others noise may help by chance. Exit code 1 unless fewer bits are further in KL, and from
f16 on higher in the text's perplexity (f16's and f32's are the same to four digits).

--shuffle writes a model with its channels in another order, which computes the same: weights
published in 4 bits would else lie on the very grid that they are to be rounded to.
"""

from __future__ import annotations

import argparse
import json
import math
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
ASKED = 14  # held-out conversations that --types feeds
WINDOWS, WINDOW = 48, 256  # of --text, in tokens
BITS = {"f32": 32, "f16": 16, "q8_0": 8, "q5_1": 5, "q5_0": 5, "q4_1": 4, "q4_0": 4}
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


def shuffled(file: str, out: str) -> None:
    """The model of `file` into the directory `out`: the channels of the residual stream, of every
    MLP and of every value head each in a random order.
    """
    from cllm.model import load_model, load_tokenizer

    model: Any = load_model(file)
    torch.manual_seed(0)
    inner, config = model.model, model.config
    stream = torch.randperm(config.hidden_size)
    with torch.no_grad():
        embedding = inner.embed_tokens.weight
        embedding.copy_(embedding[:, stream])
        if model.lm_head.weight is not embedding:
            model.lm_head.weight.copy_(model.lm_head.weight[:, stream])
        for name, module in inner.named_modules():
            leaf = name.rpartition(".")[2]
            weight = getattr(module, "weight", None)
            if leaf.endswith("norm") and weight.shape == stream.shape:
                weight.copy_(weight[stream])
            elif leaf in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                weight.copy_(weight[:, stream])
            elif leaf in ("o_proj", "down_proj"):
                weight.copy_(weight[stream])
        for layer in inner.layers:
            mlp, attention = layer.mlp, layer.self_attn
            channels = torch.randperm(config.intermediate_size)
            mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[channels])
            mlp.up_proj.weight.copy_(mlp.up_proj.weight[channels])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, channels])
            within = torch.randperm(attention.head_dim)
            values, output = attention.v_proj.weight, attention.o_proj.weight
            values.copy_(values.unflatten(0, (-1, attention.head_dim))[:, within].flatten(0, 1))
            output.copy_(output.unflatten(1, (-1, attention.head_dim))[:, :, within].flatten(1))
    model.bfloat16().save_pretrained(out)
    load_tokenizer(file).save(Path(out))


def read(theirs: Any, fed: list[list[int]], exact: list[Tensor]) -> list[tuple[float, ...]]:
    """(negative log-likelihood, tokens, KL from `exact`, tokens with the same best one) of each of
    `fed`; the first time fills `exact`.
    """
    rows = []
    for index, ids in enumerate(fed):
        theirs.reset()
        theirs.eval(ids)
        scores = torch.tensor(theirs.scores[: len(ids) - 1].copy()).log_softmax(-1)
        if len(exact) == index:
            exact.append(scores)
        p = exact[index]
        nll = -float(scores.gather(1, torch.tensor(ids[1:])[:, None]).double().sum())
        kl = float((p.exp() * (p - scores)).sum(-1).double().sum())
        rows.append((nll, len(ids) - 1, kl, int((p.argmax(-1) == scores.argmax(-1)).sum())))
    return rows


def summed(rows: list[tuple[float, ...]]) -> dict[str, float]:
    """What `read` gave, over all."""
    nll, tokens, kl, agreed = map(sum, zip(*rows, strict=True))
    found = {"perplexity": math.exp(nll / tokens), "mean_kl": kl / tokens}
    return {"tokens": tokens, **found, "top1_agreement": agreed / tokens}


def judge_types(run: str, file: Path, text: Path | None) -> list[dict[str, Any]]:
    """One row a number format, float32 first; each is written to `file` and read by llama.cpp."""
    import llama_cpp

    from cllm.assembly import locate, open_tokenizer
    from cllm.data.message import Message
    from cllm.export import held_out_of
    from cllm.metrics.score import Score
    from cllm.metrics.significance import paired_bootstrap
    from cllm.model.gguf import place, write_gguf
    from cllm.model.merge import open_merge

    located = locate(run)
    assert located.adapter is not None
    merge, tokenizer = open_merge(located.base(), located.adapter), open_tokenizer(located)
    config = merge.checkpoint.config
    keys = tokenizer.to_gguf(config.vocab_size)
    asked = [conversation.messages for conversation in held_out_of(Path(run))[:ASKED]]
    fed = {"": [tokenizer.encode_segments(tokenizer.segments(messages))[0] for messages in asked]}
    if text:
        ids = tokenizer.encode(text.read_text(encoding="utf-8")[: WINDOWS * WINDOW * 8])
        starts = range(0, min(len(ids), WINDOWS * WINDOW) - WINDOW + 1, WINDOW)
        fed["text"] = [ids[at : at + WINDOW] for at in starts]
    prompt = tokenizer.encode_chat([Message("user", QUESTIONS[-1])])
    exact: dict[str, list[Tensor]] = {name: [] for name in fed}
    finer: dict[float, list[tuple[float, ...]]] = {}  # by bits: the worst format's windows
    rows: list[dict[str, Any]] = []
    for kind in (*BITS, "bf16"):
        placed = place(config, merge.layout, kind)
        write_gguf(file, config, placed, merge.tensors(torch.float32), kind, keys)
        theirs = llama_cpp.Llama(
            str(file), n_ctx=512, n_threads=1, logits_all=True, verbose=False, flash_attn=False
        )
        row: dict[str, Any] = {"type": kind, "bytes": file.stat().st_size}
        for name, ids in fed.items():
            found = read(theirs, ids, exact[name])
            row |= {name: summed(found)} if name else summed(found)
            if name and kind in BITS:
                if above := [bits for bits in finer if bits > BITS[kind]]:
                    gap = paired_bootstrap(
                        lambda sums: Score("", math.exp(sums[0] / sums[1]), {}, ""),
                        *([list(part[:2]) for part in side] for side in (finer[min(above)], found)),
                    ).difference
                    row["text"]["above_finer"] = gap._asdict()
                worst = finer.get(BITS[kind])
                if worst is None or summed(found)["perplexity"] > summed(worst)["perplexity"]:
                    finer[BITS[kind]] = found
        theirs.reset()
        answer: list[int] = []
        for token in theirs.generate(prompt, temp=0.0, repeat_penalty=1.0):
            answer.append(token)
            if len(answer) == 16:
                break
        row["answer"] = tokenizer.decode(answer)
        print(json.dumps(row, ensure_ascii=False), file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def ordered(rows: list[dict[str, Any]]) -> bool:
    """Whether formats of fewer bits are further away, and from 16 bits on less sure of a text."""
    bits = [BITS.get(row["type"], 0) for row in rows]
    kl = [(b, row["mean_kl"]) for b, row in zip(bits, rows, strict=True) if b]
    texts = [
        (b, row["text"]["perplexity"])
        for b, row in zip(bits, rows, strict=True)
        if 0 < b <= 16 and "text" in row
    ]
    return all(
        value <= other
        for known in (kl, texts)
        for more, value in known
        for fewer, other in known
        if fewer < more
    )


def types(runs: list[str], text: Path | None, out: Path | None) -> int:
    """--types."""
    import llama_cpp

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.gguf"
        results = {Path(run).name: judge_types(run, file, text) for run in runs}
    right = all(map(ordered, results.values()))
    document = {
        "llama_cpp_python": llama_cpp.__version__,
        "command": f"python bench/llama_cpp.py RUN … --types{' --text FILE' * bool(text)}",
        "text": text.name if text else "",
        "right": right,
        "results": results,
    }
    print(json.dumps(document, ensure_ascii=False))
    if out:
        text = json.dumps(document, indent=1, ensure_ascii=False)
        out.write_text(text + "\n", encoding="utf-8")
    return 0 if right else 1


def main(argv: list[str]) -> int:
    """Judge each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--types", action="store_true")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--shuffle", nargs=2, metavar=("FILE", "OUT"))
    options = parser.parse_args(argv)
    if options.shuffle:
        shuffled(*options.shuffle)
        return 0
    if options.types:
        return types(options.run, options.text, options.json)
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
