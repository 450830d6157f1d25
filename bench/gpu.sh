#!/usr/bin/env bash
# Everything a GPU can tell, in under eight minutes: the CUDA tests, then memory and speed of the 6-8B shapes with random weights.
#
#     bench/gpu.sh                    (PYTHON=… for another interpreter, SECONDS_LIMIT=… for more or less time)
#
# Needs this checkout, torch >= 2.11 with CUDA, transformers >= 5.17 and pytest; uses bitsandbytes if it imports. Nothing is downloaded.
# Writes bench/results/<device>.json: {"tests", "runs": [one report of cllm.bench each], "seconds"}. Exit code: 0, 1 if a test
# failed or no run succeeded, 2 without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
limit=${SECONDS_LIMIT:-450}
export PYTHONPATH=. HF_HUB_OFFLINE=1 CLLM_LANG=en PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
device=$("$python" -c 'import re, torch; print(re.sub(r"[^\w.-]+", "-", torch.cuda.get_device_name()).lower() if torch.cuda.is_available() else "")' 2>/dev/null)
if [ -z "$device" ]; then
  echo "no GPU that torch can use here: nothing was measured" >&2
  exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
SECONDS=0
timeout 200 "$python" -m pytest tests/test_cuda.py -q -rs 2>&1 | tee "$work/tests.txt" >&2
tests=${PIPESTATUS[0]}

# Most wanted first: what does not fit the time any more is left out and listed. budget = the claim to be proven; 0 = no cap.
number=0
while read -r budget rows options; do
  number=$((number + 1))
  name=$(printf '%s/%02d' "$work" "$number")
  echo "$options memory.budget_gib=$budget rows $rows" > "$name.what"
  left=$((limit - SECONDS))
  [ "$left" -gt 30 ] || continue
  # shellcheck disable=SC2086
  timeout "$left" "$python" -m cllm.bench $options --random-init --rows "$rows" --steps 3 memory.budget_gib="$budget" lora.rank=8 \
    model.device=cuda > "$name.out" < /dev/null || echo "did not finish: $(cat "$name.what")" >&2
  sed '$d' "$name.out" >&2
done <<'RUNS'
8 2048,8192 THUDM/chatglm3-6b
8 2048,8192 Qwen/Qwen3-8B
8 2048,8192 Qwen/Qwen2.5-7B
8 2048,8192 Qwen/Qwen-7B
8 2048,8192 baichuan-inc/Baichuan2-7B-Base
8 2048,8192 01-ai/Yi-6B
8 2048 Qwen/Qwen3-4B --generate
0 2048 Qwen/Qwen3-1.7B model.quantize=none
RUNS
"$python" - "$work" "$tests" "$SECONDS" "bench/results/$device.json" <<'PYTHON'
import json, pathlib, sys

work, tests, seconds, out = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4])
summary = (work / "tests.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
runs = []
for what in sorted(work.glob("*.what")):
    text = what.with_suffix(".out").read_text(encoding="utf-8").strip() if what.with_suffix(".out").is_file() else ""
    report = json.loads(text.splitlines()[-1]) if text.endswith("}") else None
    runs.append({"command": what.read_text(encoding="utf-8").strip(), "report": report})
out.parent.mkdir(parents=True, exist_ok=True)
result = {"tests": {"exit_code": tests, "summary": summary}, "seconds": seconds, "runs": runs}
out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
done = sum(run["report"] is not None for run in runs)
print(json.dumps({"result": str(out), "tests": tests, "runs_done": done, "runs": len(runs), "seconds": seconds}))
sys.exit(0 if tests == 0 and done else 1)
PYTHON
