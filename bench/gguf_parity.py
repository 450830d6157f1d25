"""Our GGUF loading against Transformers' own, on real weights: every weight, the logits, CPU
seconds and peak memory.

    python tools/fetch_model.py gemma3-270m smollm2
    python bench/gguf_parity.py

About three minutes on one core; writes bench/results/gguf_parity.json.

Thresholds: weights equal, logits within 1e-4 in float32. The greedy continuations are recorded to
be read.
"""

from __future__ import annotations

import inspect
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
FILES = ("SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf")
TEXT = "春天来了，花园里的花都开了。The quick brown fox"
PROMPTS = ("北京是中国的首都，", "The capital of France is")


def continue_greedily(model: Any, ids: list[int], count: int) -> list[int]:
    """`count` ids by argmax."""
    import torch

    # Transformers 5.24 renames the argument and what is returned: the older name only warns from
    # then on
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache, last, new = None, torch.tensor([ids]), []
    with torch.no_grad():
        for _ in range(count):
            out = model(input_ids=last, use_cache=True, **{name: cache})
            cache, last = out[name], out.logits[:, -1:].argmax(-1)
            new.append(int(last))
    return new


def loaded(path: Path, ours: bool) -> Any:
    """The model in float32."""
    if ours:
        from cllm.model import load_model

        return load_model(path)
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def cost(path: Path, who: str) -> dict[str, float]:
    """CPU seconds and peak resident memory of loading alone, in a fresh process."""
    command = [sys.executable, __file__, who, str(path)]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def main() -> int:
    """Compare each file."""
    import torch

    from cllm.model import load_tokenizer

    results: dict[str, Any] = {}
    for name in FILES:
        path = ROOT / "models" / name
        ours, tokenizer = loaded(path, ours=True), load_tokenizer(path)
        theirs = loaded(path, ours=False)
        reference = theirs.state_dict()
        own = ours.state_dict()
        ids = torch.tensor([tokenizer.encode(TEXT)])
        with torch.no_grad():
            difference = (ours(input_ids=ids).logits - theirs(input_ids=ids).logits).abs().max()
        start = [tokenizer.bos_id or 0] if "gemma" in name else []
        texts = {
            p: tokenizer.decode(continue_greedily(ours, start + tokenizer.encode(p), 40))
            for p in PROMPTS
        }
        results[name] = {
            "weights_equal": own.keys() == reference.keys()
            and all(torch.equal(own[key], reference[key]) for key in own),
            "max_abs_logit_difference": float(difference),
            "greedy": texts,
        }
        del ours, theirs, reference, own
        results[name] |= {who: cost(path, who) for who in ("cllm", "transformers")}
    good = all(
        r["weights_equal"] and r["max_abs_logit_difference"] < 1e-4 for r in results.values()
    )
    report = {
        "command": "python bench/gguf_parity.py",
        "machine": platform.platform(),
        "equal": good,
        "files": results,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (ROOT / "bench" / "results" / "gguf_parity.json").write_text(text, encoding="utf-8")
    print(json.dumps(report, ensure_ascii=False))
    return 0 if good else 1


if __name__ == "__main__":
    if len(sys.argv) == 3:
        import transformers

        transformers.AutoModelForCausalLM  # noqa: B018
        before = time.process_time()
        loaded(Path(sys.argv[2]), ours=sys.argv[1] == "cllm")
        spent = time.process_time() - before
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        # ru_maxrss is the parent's, too
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
        print(json.dumps({"cpu_seconds": round(spent, 1), "peak_resident_bytes": peak}))
        raise SystemExit(0)
    raise SystemExit(main())
