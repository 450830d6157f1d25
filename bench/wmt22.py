"""The WMT22 en-zh systems of the dev data scored by cllm and by sacrebleu: equal scores, equal
ranking.

python bench/wmt22.py --data ../shared/data/dev/nlg/wmt22_en-zh --out bench/results/wmt22.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import sacrebleu

from cllm import metrics

TOLERANCE = 1e-8


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = {
        path.name: path.read_text(encoding="utf-8").split("\n")[:-1]
        for path in options.data.glob("*.zh")
    }
    systems = sorted(name for name in lines if name.startswith("hyp."))
    references = {"refA": ["refA.zh"], "refB": ["refB.zh"], "refA+refB": ["refA.zh", "refB.zh"]}
    rows: list[dict[str, Any]] = []
    for label, names in references.items():
        streams = [lines[name] for name in names]
        for metric, ours, theirs in [
            ("BLEU zh", metrics.BLEU("zh"), sacrebleu.BLEU(tokenize="zh")),
            ("BLEU char", metrics.BLEU("char"), sacrebleu.BLEU(tokenize="char")),
            ("chrF2", metrics.CHRF(), sacrebleu.CHRF()),
        ]:
            if metric != "BLEU zh" and label != "refA":
                continue
            mine = {
                name: metrics.corpus_score(ours, lines[name], streams).value for name in systems
            }
            oracle = {name: theirs.corpus_score(lines[name], streams).score for name in systems}
            rank = lambda scores: sorted(systems, key=scores.__getitem__, reverse=True)  # noqa: E731
            row = {
                "metric": metric,
                "references": label,
                "ranking": rank(mine),
                "cllm": mine,
                "sacrebleu": oracle,
            }
            row["largest_difference"] = max(abs(mine[name] - oracle[name]) for name in systems)
            row["met"] = row["largest_difference"] <= TOLERANCE and rank(mine) == rank(oracle)
            rows.append(row)
    document = {
        "command": "python bench/wmt22.py --data DIR --out bench/results/wmt22.json",
        "segments": len(lines[systems[0]]),
        "sacrebleu": importlib.metadata.version("sacrebleu"),
        "tolerance": TOLERANCE,
        "results": rows,
    }
    options.out.write_text(
        json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    print(json.dumps(document, ensure_ascii=False))
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
