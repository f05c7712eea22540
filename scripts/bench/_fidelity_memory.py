"""The memory model against real runs: random mixed-precision plans in processes without caps.

Random cuts into 2 to 4 stages, precisions, batches, micro-batches and lengths, of the shipped model
and, where the data folder has it, of a deeper one. Every stage's weights, cache, activations and
message buffers as the workers account for them are compared with `costs.memory`. The greatest
resident memory of a process stands beside it in the rows: interpreter, libraries and what torch's
kernels take for themselves are in no account of tensors.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Check, shared_data

from llmpq.artifact import write_json
from llmpq.costs.memory import StageMemory, run_sizes, stage_memory
from llmpq.model_lookup import DEFAULT_MODEL, load_model_spec
from llmpq.model_spec import ModelSpec
from llmpq.plan_data import Plan
from llmpq.quant import machine_here

ROOT = Path(__file__).resolve().parents[2]
DEEPER_MODEL = (shared_data() or ROOT) / "models" / "tale-llama-11m"
PRECISIONS = ("16", "8", "4", "3")
MAX_TOTAL_PERCENT = 5.0
MAX_PART_PERCENT = 1.0
PARTS = ("weights", "cache", "activation", "buffer")


def run(quick: bool, device: str) -> tuple[list[Check], list[dict[str, Any]]]:
    """The checks and a row for each stage of each plan."""
    rng = np.random.default_rng(7)
    names = [DEFAULT_MODEL] + ([str(DEEPER_MODEL)] if DEEPER_MODEL.is_dir() else [])
    specs = [load_model_spec(name) for name in names]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="llmpq-memory-") as folder:
        for number in range(4 if quick else 20):
            plan = random_plan(specs[number % len(specs)], rng)
            rows += run_plan(plan, number, Path(folder), device, rng)
    return checks(rows, device), rows


def checks(rows: list[dict[str, Any]], device: str) -> list[Check]:
    """Never more than predicted, and near it."""
    over = max(row["measured_bytes"] / row["predicted_bytes"] for row in rows)
    worst = {part: max(abs(row[f"{part}_percent"]) for row in rows) for part in ("total", *PARTS)}
    exact = max(worst["weights"], worst["cache"])
    told = None if device == "cuda" else True  # an allocator's peak has no parts and rounds up
    why = "a card's allocator rounds sizes up and counts no parts"
    return [
        _check("measured peak memory over predicted", over, "x", 1.0, len(rows), told, why),
        _check("total", worst["total"], "%", MAX_TOTAL_PERCENT, len(rows), told, why),
        _check("weights and cache", exact, "%", MAX_PART_PERCENT, len(rows), True, why),
    ]


def _check(
    name: str, value: float, unit: str, most: float, samples: int, told: bool | None, why: str
) -> Check:
    worst = name if unit == "x" else f"worst error of predicted memory: {name}"
    holds = None if told is None else value <= most
    return Check(worst, value, unit, f"<= {most:g} {unit}", holds, samples, why)


def random_plan(spec: ModelSpec, rng: np.random.Generator) -> Plan:
    """A plan that nobody optimised, for 2 to 4 devices of one node."""
    count = int(rng.integers(2, 5))
    cuts = np.sort(rng.choice(np.arange(1, spec.num_layers), count - 1, replace=False)).tolist()
    batch = int(rng.integers(2, 17))
    prompt, new = int(rng.integers(8, 121)), int(rng.integers(4, 17))
    ends = zip([0, *cuts], [*cuts, spec.num_layers], strict=True)
    stages = [
        {
            "rank": rank,
            "node": "box",
            "devices": ["t4-16g"],
            "first_layer": first,
            "end_layer": end,
            "precisions": rng.choice(PRECISIONS, end - first).tolist(),
        }
        for rank, (first, end) in enumerate(ends)
    ]
    nodes = [{"name": "box", "devices": [{"type": "t4-16g", "count": count}]}]
    return Plan.model_validate(
        {
            "model": spec.model_dump(),
            "workload": {"prompt_tokens": prompt, "new_tokens": new, "num_requests": batch},
            "cluster": {"name": "box", "nodes": nodes},
            "method": "hand",
            "batch": batch,
            "prefill_micro_batch": int(rng.integers(1, batch + 1)),
            "decode_micro_batch": int(rng.integers(1, batch + 1)),
            "stages": stages,
        }
    )


def run_plan(
    plan: Plan, number: int, folder: Path, device: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """A row a stage."""
    files = {name: folder / name for name in ("plan.json", "in.jsonl", "out.jsonl", "report.json")}
    write_json(files["plan.json"], plan)
    prompts = _prompts(plan, rng)
    files["in.jsonl"].write_text("".join(json.dumps(p) + "\n" for p in prompts))
    most_rss = _llmpq_run(files, device)
    stages = json.loads(files["report.json"].read_text())["stages"]
    return [_row(plan, number, device, stage, most_rss) for stage in stages]


def _prompts(plan: Plan, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Random tokens, one prompt as long as planned and the others up to that."""
    longest = int(plan.workload.prompt_tokens)  # type: ignore[arg-type]  # a number here
    lengths = [longest, *rng.integers(1, longest + 1, plan.batch - 1).tolist()]
    return [
        {"id": i, "prompt_token_ids": rng.integers(3, plan.model.vocab_size, n).tolist()}
        for i, n in enumerate(lengths)
    ]


def _llmpq_run(files: dict[str, Path], device: str) -> int:
    """Runs the plan's processes; the most bytes that one of them had resident."""
    words = ["--plan", files["plan.json"], "--prompts", files["in.jsonl"]]
    words += ["--output", files["out.jsonl"], "--report", files["report.json"]]
    words += ["--ignore-eos", "--dtype", "bfloat16", "--device", device, "-q"]
    line = [sys.executable, "-m", "llmpq.run", *map(str, words)]
    process = subprocess.Popen(line, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    return usage.ru_maxrss * 1024


def predicted(plan: Plan, rank: int, device: str) -> StageMemory:
    """What the model says of a stage."""
    return stage_memory(
        plan.model,
        plan.stages[rank].precisions,
        first=rank == 0,
        last=rank == len(plan.stages) - 1,
        sizes=run_sizes(plan),
        machine=machine_here(torch.device(device), torch.bfloat16),
    )


def _row(
    plan: Plan, number: int, device: str, stage: dict[str, Any], most_rss: int
) -> dict[str, Any]:
    memory = predicted(plan, stage["rank"], device)
    want = dict(
        zip(PARTS, (memory.weights, memory.cache, memory.activations, memory.buffers), strict=True)
    )
    have = {part: stage[f"{part}_bytes"] for part in PARTS}
    errors = {f"{part}_percent": _percent(want[part], have[part]) for part in PARTS}
    return {
        "plan": number,
        "model": Path(plan.model.name).name,
        "stage": stage["rank"],
        "num_stages": len(plan.stages),
        "precisions": " ".join(plan.stages[stage["rank"]].precisions),
        "predicted_bytes": memory.total,
        "measured_bytes": stage["peak_memory_bytes"],
        "total_percent": _percent(memory.total, stage["peak_memory_bytes"]),
        **errors,
        **{f"{part}_bytes": have[part] for part in PARTS},
        "most_resident_bytes_of_a_process": most_rss,
    }


def _percent(want: int, have: int) -> float:
    """How much more was predicted than measured."""
    return 100 * (want / have - 1) if have else 100.0 * (want > 0)
