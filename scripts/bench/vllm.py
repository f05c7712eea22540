"""A plan run by llmpq-run and, exported, by stock vLLM on this machine's CPU: generated tokens/s.

Both have the same weights, requests and threads; rounds alternate, so that other work on the
machine disturbs both. vLLM's start (half a minute) and llmpq-run's loading are left out. It needs
$LLMPQ_VLLM_PYTHON (`make vllm-env` prints it). `python scripts/bench/vllm.py [--quick] [--json
OUT]`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import Benchmark, Check, arguments, finish, machine, shared_data

from llmpq.artifact import write_json
from llmpq.export.vllm import export_vllm
from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import ASSETS
from llmpq.plan_data import Plan

TARGET = "stated, whatever it is"
PROMPT_WORDS, NEW_TOKENS, BATCH = 24, 32, 16
PRECISIONS = ("16", "4", "8-w8a8", "4")


def main() -> None:
    """Compares the two on one plan."""
    options = arguments(str(__doc__).partition("\n")[0]).parse_args()
    benchmark = Benchmark("vllm", machine())
    python = os.environ.get("LLMPQ_VLLM_PYTHON")
    if python is None:
        why = "$LLMPQ_VLLM_PYTHON names no Python with vLLM; 'make vllm-env' makes one"
        benchmark.checks.append(Check("llmpq-run / vLLM", None, "x", TARGET, None, 0, why))
    else:
        with tempfile.TemporaryDirectory(prefix="llmpq-vllm-") as folder:
            compare(python, Path(folder), 1 if options.quick else 3, benchmark)
    finish(benchmark, options.json)


def compare(python: str, folder: Path, rounds: int, benchmark: Benchmark) -> None:
    """Adds a row for each round, and the ratio of the medians."""
    data = shared_data()
    model = data / "models" / "tale-llama-11m" if data else ASSETS / "tiny-tales"
    plan = plan_of(model)
    write_json(folder / "plan.json", plan)
    export_vllm(plan, model, folder / "out")
    write_prompts(folder / "prompts.jsonl", 32 if rounds == 1 else 96)
    own = []
    times = folder / "times.json"
    command = [python, str(Path(__file__).with_name("_vllm_times.py")), str(folder / "out")]
    with subprocess.Popen(
        [*command, str(folder / "prompts.jsonl"), str(times), str(rounds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as vllm:
        assert vllm.stdin and vllm.stdout
        for _ in range(rounds):
            vllm.stdin.write("go\n")
            vllm.stdin.flush()
            while (line := vllm.stdout.readline()) and line.strip() != "done":
                pass
            own.append(run_llmpq(folder, model))
    found = json.loads(times.read_text())
    theirs = [found["tokens"] / seconds for seconds in found["seconds"]]
    for number, (one, other) in enumerate(zip(own, theirs, strict=True)):
        row: dict[str, Any] = {"round": number, "llmpq_tokens_per_s": one}
        benchmark.rows.append(row | {"vllm_tokens_per_s": other, "model": model.name})
        print(f"round {number}: llmpq-run {one:.0f}, vLLM {other:.0f} tokens/s", file=sys.stderr)
    ratio = sorted(own)[rounds // 2] / sorted(theirs)[rounds // 2]
    benchmark.checks.append(Check("llmpq-run / vLLM", ratio, "x", TARGET, True, rounds))


def plan_of(model: Path) -> Plan:
    """One stage on a CPU, at three precisions."""
    spec = load_model_spec(str(model))
    layers = [PRECISIONS[layer % len(PRECISIONS)] for layer in range(spec.num_layers)]
    device = "epyc-9654-768g"
    group = {"type": device, "count": 1, "memory_gib": 8}
    stage = {"rank": 0, "node": "here", "devices": [device], "first_layer": 0}
    work = {"prompt_tokens": 64, "new_tokens": NEW_TOKENS, "num_requests": 96}
    data = {"cluster": {"nodes": [{"name": "here", "devices": [group]}]}, "method": "hand"}
    sizes = {"batch": BATCH, "prefill_micro_batch": 4, "decode_micro_batch": BATCH}
    end = {"end_layer": spec.num_layers, "precisions": layers}
    both = {"model": spec.model_dump(), "workload": work, "stages": [stage | end]}
    return Plan.model_validate(data | sizes | both)


def write_prompts(path: Path, count: int) -> None:
    """Prompts of the shipped text, each another part of it."""
    words = (ASSETS / "evaluation.txt").read_text().split()
    lines = []
    for number in range(count):
        prompt = " ".join(words[5 * number : 5 * number + PROMPT_WORDS])
        lines.append({"id": number, "prompt": prompt, "max_new_tokens": NEW_TOKENS})
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def run_llmpq(folder: Path, model: Path) -> float:
    """Generated tokens/s of llmpq-run."""
    report = folder / "report.json"
    words = [
        "--plan",
        folder / "plan.json",
        "--model",
        model,
        "--prompts",
        folder / "prompts.jsonl",
    ]
    words += ["--output", folder / "out.jsonl", "--report", report, "--dtype", "bfloat16"]
    (folder / "out.jsonl").unlink(missing_ok=True)
    more = ["--ignore-eos", "--device", "cpu", "-q"]
    command = [sys.executable, "-m", "llmpq.run", *map(str, words), *more]
    subprocess.run(command, check=True)
    return float(json.loads(report.read_text())["tokens_per_s"])


if __name__ == "__main__":
    main()
