#!/usr/bin/env python
"""Large open models, most of them mixtures of experts, on rigs that people own, by `llmpq-plan`.

Each plan is a process of its own, as a user starts it. What a model consists of is found out once
before and kept in the cache folder, as it is at a user's second plan; that time is stated beside.
A model that no precision makes fit must say so as quickly. One row a plan.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from _common import Benchmark, Check, arguments, finish, machine

ROOT = Path(__file__).resolve().parents[2]
MODELS = (
    "gpt-oss-120b",
    "qwen3-235b-a22b",
    "glm-4.5-air",
    "deepseek-v3",
    "gemma-3-27b",
    "llama-4-scout",
)
Node = dict[str, int]
RIGS: dict[str, tuple[Node, ...]] = {
    "4 RTX 3090, 2 RTX 4090": ({"rtx3090-24g": 4}, {"rtx4090-24g": 2}),
    "8 A100 40 GB": ({"a100-40g": 8},),
    "4 RTX PRO 6000": ({"rtxpro6000-96g": 4},),
    "8 A100 80 GB, 4 A6000": ({"a100-80g": 8}, {"a6000-48g": 4}),
    "8 H100, 8 L40S": ({"h100-80g": 8}, {"l40s-48g": 8}),
}
INSIDE = {"bandwidth_gbs": 24, "latency_us": 15}
BETWEEN = {"bandwidth_gbs": 3, "latency_us": 40}
WORKLOAD = {
    "prompt_tokens": {"min": 64, "max": 2000},
    "new_tokens": {"min": 16, "max": 600},
    "num_requests": 5000,
}
MAX_QUALITY_LOSS = 5.0  # percent
LIMIT_S = 10.0


def cluster(nodes: tuple[Node, ...]) -> dict[str, object]:
    """A cluster file's contents."""
    held = [
        {
            "name": f"n{i}",
            "devices": [{"type": name, "count": count} for name, count in node.items()],
            "link": INSIDE,
        }
        for i, node in enumerate(nodes)
    ]
    return {"nodes": held, "link": BETWEEN}


def run(*words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """One command of llmpq, and its seconds."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "llmpq.cli.main", *words], capture_output=True, text=True
    )
    return done, time.monotonic() - start


def planned(folder: Path, model: str, rig: str) -> dict[str, Any]:
    """One row."""
    plan, path = folder / "plan.json", folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster(RIGS[rig])))
    (folder / "workload.yaml").write_text(yaml.safe_dump(WORKLOAD))
    plan.unlink(missing_ok=True)
    config = str(ROOT / "configs" / "models" / f"{model}.json")
    options = ["--model", config, "--cluster", str(path), "--output", str(plan)]
    options += ["--workload", str(folder / "workload.yaml")]
    done, seconds = run("plan", *options, "--max-quality-loss", str(MAX_QUALITY_LOSS))
    row: dict[str, Any] = {"model": model, "rig": rig, "seconds": seconds}
    if done.returncode == 3:
        return row | {"plan": "nothing fits"}
    if done.returncode:
        raise SystemExit(f"{model} on {rig}: exit code {done.returncode}\n{done.stderr}")
    found = json.loads(plan.read_text())
    used = sorted({name for stage in found["stages"] for name in stage["precisions"]})
    others = [b["tokens_per_s"] for b in found["baselines"] if b["tokens_per_s"]]
    return row | {
        "plan": f"{len(found['stages'])} stages: {', '.join(used)}",
        "tokens_per_s": found["predicted"]["tokens_per_s"],
        "best other": max(others, default=None),
        "gap_percent": 100 * found["predicted"]["gap"],
    }


def main() -> None:
    """Plans all, and says whether each was there in time."""
    options = arguments((__doc__ or "").splitlines()[0]).parse_args()
    models, rigs = (MODELS[:2], list(RIGS)[:2]) if options.quick else (MODELS, list(RIGS))
    rows, first = [], []
    with tempfile.TemporaryDirectory() as name:
        for model in models:
            first.append(planned(Path(name), model, rigs[0])["seconds"])
            for rig in rigs:
                rows.append(planned(Path(name), model, rig) | {"first_s": first[-1]})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    seconds = [float(row["seconds"]) for row in rows]
    gaps = [float(row["gap_percent"]) for row in rows if "gap_percent" in row]
    slowest, stated = max(seconds), "no target; the figure is stated"
    target = f"<= {LIMIT_S:g}"
    checks = [
        Check("m1 planning, slowest", slowest, "s", target, slowest <= LIMIT_S, len(rows)),
        Check("m2 planning, median", median(seconds), "s", "stated", None, len(rows), stated),
        Check("m3 gap, median", median(gaps), "%", "stated", None, len(gaps), stated),
        Check("m4 gap, worst", max(gaps), "%", "stated", None, len(gaps), stated),
    ]
    finish(Benchmark("mixtures", machine(), checks, rows), options.json)


if __name__ == "__main__":
    main()
