#!/usr/bin/env python3
"""Whether the planner's behaviour is the same as in another revision: plans and their prices.

    python scripts/compare_plans.py REVISION [--only 05 s07]

Each cluster of configs/planner-benchmark.yaml, and the one of 64 GPUs, is planned by both
revisions with the commands' own defaults, but without the other methods and without suggestions.
Then this revision prices the other one's plan (`llmpq-plan --evaluate`). A price is computed
without a clock, so prices must be equal. A search ends by the clock, so the plans themselves may
differ on a busy machine: then the difference of their predicted times is printed.

Exit code 0 if all prices are equal and no plan became slower by more than the optimality gap that
searches may leave, 1 otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
LARGE = {"cluster": "64-gpus-4-types", "model": "llama-3.3-70b", "workload": "paper-512-100"}
GAP = 0.005
REFUSALS = (2, 3)  # exit codes of bad input and of "no plan fits"
OF_THE_SEARCH = {"planning_s", "lower_bound_s", "gap", "closed_form_scale"}  # of a prediction


@dataclass(frozen=True)
class Case:
    """A cluster, and what it is planned for."""

    cluster: str
    model: str
    workload: str

    def inputs(self) -> list[str]:
        """The options that name the files."""
        files = {
            "--model": CONFIGS / "models" / f"{self.model}.json",
            "--cluster": CONFIGS / "clusters" / f"{self.cluster}.yaml",
            "--workload": CONFIGS / "workloads" / f"{self.workload}.yaml",
        }
        return [str(word) for pair in files.items() for word in pair]


def cases(only: list[str]) -> list[Case]:
    """All of them, or those whose cluster's name begins with one of these words."""
    entries = yaml.safe_load((CONFIGS / "planner-benchmark.yaml").read_text())
    found = [Case(e["cluster"], e["model"], e["workload"]) for e in [*entries, LARGE]]
    return [case for case in found if not only or case.cluster.startswith(tuple(only))]


def run(tree: Path, words: list[str], output: Path) -> dict[str, Any]:
    """The plan that `llmpq-plan` of this tree writes; its message where it writes none."""
    code = "import sys; from llmpq.cli.plan import main; main(sys.argv[1:])"
    line = [sys.executable, "-c", code, *words, "-o", str(output), "-q"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(line, capture_output=True, text=True, cwd=tree, env=environment)
    if done.returncode:
        return {"failure": done.returncode, "message": done.stderr.strip()}
    plan: dict[str, Any] = json.loads(output.read_text())
    return plan


def price(plan: dict[str, Any]) -> dict[str, Any]:
    """What is predicted of a plan, without what only its search knows, and words about sources."""
    told = {k: v for k, v in plan["predicted"].items() if k not in OF_THE_SEARCH}
    told["stages"] = [{k: v for k, v in one.items() if k != "provenance"} for one in told["stages"]]
    return told


def decisions(plan: dict[str, Any]) -> dict[str, Any]:
    """What a plan decides."""
    return {k: v for k, v in plan.items() if k not in ("predicted", "provenance", "notes")}


def compare(case: Case, other: Path, folder: Path) -> tuple[bool, str]:
    """Whether both revisions behave alike on a case, and a line that says so."""
    plan = ["--no-compare", "--no-what-if", *case.inputs()]
    theirs = run(other, plan, folder / "theirs.json")
    ours = run(ROOT, plan, folder / "ours.json")
    if "failure" in theirs or "failure" in ours:
        codes = theirs.get("failure", 0), ours.get("failure", 0)
        refused = codes[0] == codes[1] in REFUSALS
        last = (ours if codes[1] else theirs)["message"].splitlines()[-1:]
        return refused, f"exit codes {codes[0]} and {codes[1]}: {' '.join(last)}"
    evaluate = ["--evaluate", str(folder / "theirs.json")]
    both = [run(tree, evaluate, folder / f"{i}.json") for i, tree in enumerate((other, ROOT))]
    prices = [price(one) for one in both]
    unlike = [key for key in prices[0] | prices[1] if prices[0].get(key) != prices[1].get(key)]
    if unlike:
        return False, f"the same plan is priced differently: {', '.join(unlike)}"
    if decisions(theirs) == decisions(ours):
        return True, "the same plan and price"
    times = [plan["predicted"]["total_s"] for plan in (theirs, ours)]
    change = times[1] / times[0] - 1
    return change <= GAP, f"another plan, {100 * change:+.2f} % of time; the same price"


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("revision")
    parser.add_argument("--only", nargs="+", default=[], metavar="CLUSTER")
    options = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory(prefix="llmpq-compare-") as name:
        folder = Path(name)
        other = folder / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", str(other), options.revision], check=True)
        try:
            for case in cases(options.only):
                same, line = compare(case, other, folder)
                good &= same
                print(f"{'  ' if same else 'X '}{case.cluster:32} {line}", flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
