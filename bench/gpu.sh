#!/usr/bin/env bash
# Everything a GPU can tell, in under eight minutes: the CUDA tests, then memory and speed of the 6-32B shapes with random weights.
#
#     bench/gpu.sh                    (PYTHON=… for another interpreter, SECONDS_LIMIT=… for more or less time)
#
# Needs this checkout, torch >= 2.11 with CUDA, transformers >= 5.17 and pytest; uses bitsandbytes if it imports. Nothing is downloaded.
# Every run is capped at the budget of its line, CUDA context included. Writes bench/results/<device>.json: {"tests", "link", "claims"
# (peak with context against the GiB promised), "streaming" (slow-down, bytes moved, link rate), "runs": [one report of cllm.bench each],
# "seconds"}. Exit code: 0, 1 if a test failed or no run succeeded, 2 without a GPU. A claim that is missed is reported, not hidden.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
limit=${SECONDS_LIMIT:-450}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 CLLM_LANG=en PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
device=$("$python" -c 'import re, torch; print(re.sub(r"[^\w.-]+", "-", torch.cuda.get_device_name()).lower() if torch.cuda.is_available() else "")' 2>/dev/null)
if [ -z "$device" ]; then
  echo "no GPU that torch can use here: nothing was measured" >&2
  exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
SECONDS=0
# The project's pytest options need plugins that a machine with a GPU may lack.
timeout 200 "$python" -m pytest -o addopts= tests/test_cuda.py -q -rs 2>&1 | tee "$work/tests.txt" >&2
tests=${PIPESTATUS[0]}

# Most wanted first: what does not fit the time any more is left out and listed. budget: GiB that the allocator may take, 0 for no cap;
# claim: GiB that the peak is to stay under at each row length.
number=0
small="memory.offload_inputs=true train.optimizer=adamw8bit memory.checkpoint_layers=999 lora.rank=8"
long="$small memory.stream_layers=999 memory.mlp_tile_tokens=4096"
while read -r budget claim rows steps options; do
  number=$((number + 1))
  name=$(printf '%s/%02d' "$work" "$number")
  options=$(eval "echo $options")
  echo "$budget|$claim|$rows|$options" > "$name.what"
  left=$((limit - SECONDS))
  [ "$left" -gt 25 ] || continue
  # shellcheck disable=SC2086
  timeout "$left" "$python" -m cllm.bench $options --random-init --rows "$rows" --steps "$steps" memory.budget_gib="$budget" \
    model.device=cuda > "$name.out" < /dev/null || echo "did not finish: $(cat "$name.what")" >&2
  sed '$d' "$name.out" >&2
done <<'RUNS'
8 6.0,8.0 2048,8192 2 Qwen/Qwen3-8B $small
8 5.2,8.0 2048,8192 2 THUDM/chatglm3-6b $small
8 8.0 4096 1 Qwen/Qwen3-32B $long
8 8.0 16384 1 Qwen/Qwen3-8B $long
8 8.0 8192 1 Qwen/Qwen3-14B $long
4 4.0 2048 2 Qwen/Qwen3-8B $long
8 8.0 4096 3 Qwen/Qwen3-8B $small
8 8.0 4096 3 Qwen/Qwen3-8B $small memory.stream_layers=999
8 6.0,8.0 2048,8192 2 Qwen/Qwen2.5-7B $small
8 6.0,8.0 2048,8192 2 Qwen/Qwen-7B $small
8 6.0,8.0 2048,8192 2 baichuan-inc/Baichuan2-7B-Base $small
8 6.0,8.0 2048,8192 2 01-ai/Yi-6B $small
8 8.0 32768 1 Qwen/Qwen3-8B $long memory.mlp_tile_tokens=1024 model.head=int8
8 8.0 8192 1 Qwen/Qwen3-32B $long
8 8.0 2048 2 Qwen/Qwen3-4B --generate lora.rank=8
0 0 2048 2 Qwen/Qwen3-1.7B model.quantize=none
RUNS
"$python" - "$work" "$tests" "$SECONDS" "bench/results/$device.json" <<'PYTHON'
import json, pathlib, sys, time

import torch

work, tests, seconds, out = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4])
summary = (work / "tests.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]


def link_rate() -> float:
    """Bytes per second of copies from pinned host memory, the best of five."""
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    device, best = torch.empty_like(host, device="cuda"), 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, host.nbytes / (time.perf_counter() - start))
    return best


runs, claims, resident, streamed = [], [], {}, []
for what in sorted(work.glob("*.what")):
    budget, claim, rows, options = what.read_text(encoding="utf-8").strip().split("|")
    text = what.with_suffix(".out").read_text(encoding="utf-8").strip() if what.with_suffix(".out").is_file() else ""
    report = json.loads(text.splitlines()[-1]) if text.endswith("}") else None
    runs.append({"command": f"{options} --rows {rows} memory.budget_gib={budget}", "report": report})
    for gib, result in zip(claim.split(","), report["results"] if report else (), strict=False):
        taken = (result["peak_bytes"] + result["context_bytes"]) / 2**30 if "peak_bytes" in result else None
        claims.append({
            "model": result["model"], "row_tokens": result["row_tokens"], "stream_layers": result["stream_layers"], "under_gib": float(gib),
            "gib": taken, "met": taken is not None and taken < float(gib),
            "estimate_within_5_percent": taken is not None and abs(result["estimate_ratio"] - 1) < 0.05,
        })
        key = (result["model"], result["row_tokens"])
        if taken is not None and result["stream_layers"]:
            streamed.append((key, result))
        elif taken is not None:
            resident[key] = result["step_seconds"]
streaming = [
    {
        "model": key[0], "row_tokens": key[1], "step_seconds": r["step_seconds"],
        "bytes_moved_per_step": r["link_bytes"], "bytes_per_second": r["link_bytes"] / r["step_seconds"],
        "slowdown_against_resident": r["step_seconds"] / resident[key] if key in resident else None,
    }
    for key, r in streamed
]
out.parent.mkdir(parents=True, exist_ok=True)
result = {
    "command": "bench/gpu.sh", "tests": {"exit_code": tests, "summary": summary}, "link": {"host_to_device_bytes_per_second": link_rate()},
    "claims": claims, "streaming": streaming, "seconds": seconds, "runs": runs,
}
out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
done = sum(run["report"] is not None for run in runs)
met = sum(claim["met"] for claim in claims)
print(json.dumps({
    "result": str(out), "tests": tests, "runs_done": done, "runs": len(runs), "claims_met": met, "claims": len(claims), "seconds": seconds,
}))
sys.exit(0 if tests == 0 and done else 1)
PYTHON
