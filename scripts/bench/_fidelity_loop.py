"""Does a run mend a wrong profile? Plan by it, run, recalibrate, plan again, run both plans.

Three rehearsed devices; the CPU profile is measured now, and one device type gets a profile of its
own that claims `CLAIM` of its true times. The planner overloads that device. After one run,
`llmpq-profile recalibrate` corrects all profiles; the old and the new plan then run in turn. Errors
after are those of the corrected profiles in these later runs, which they have not seen.
"""

import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import Check, shared_data

from llmpq.model_lookup import DEFAULT_MODEL

ROOT = Path(__file__).resolve().parents[2]
CLAIM = 0.6
LIAR = "slow"
SLOWDOWNS = {"fast": 3.0, "medium": 4.5, LIAR: 7.0}  # 0.7 cores in all
MEMORY_MIB = 300  # never short: the balance of layers is what is looked at
MAX_LOSS = "2"
MAX_ERROR_PERCENT = 8.0
NUM_REQUESTS, BATCH = 24, 12
MODEL = "tale-llama-11m"  # of the data folder; where that is absent, the shipped one
GRID = (
    "--precisions 16,8,4 --prefill-micro-batches 1,2,4 --decode-micro-batches 2,4,6,12 "
    "--prompt-tokens 16,48,112 --past-tokens 16,160"
)


def run(quick: bool, device: str) -> tuple[list[Check], list[dict[str, Any]]]:
    """The checks, and rows: one a run."""
    folder = Path(tempfile.mkdtemp(prefix="llmpq-loop-"))
    try:
        return _Loop(folder, device, quick).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Loop:
    """The files of one loop."""

    def __init__(self, folder: Path, device: str, quick: bool) -> None:
        self.folder, self.device = folder, device
        self.rounds, self.budget_s, self.new_tokens = (1, 15, 12) if quick else (3, 60, 24)
        self.model = _model()

    def run(self) -> tuple[list[Check], list[dict[str, Any]]]:
        self.write_inputs()
        self.write_profiles()
        old, new = self.folder / "old.json", self.folder / "new.json"
        self.plan(old, self.folder / "wrong")
        first = self.execute(old, "first")
        before = self.recalibrate(first, "wrong", "fixed")
        self.plan(new, self.folder / "fixed")
        reports = {"old": [first], "new": []}
        for number in range(self.rounds):
            for name, plan in (("new", new), ("old", old)):
                reports[name].append(self.execute(plan, f"{name}{number}"))
        later = {
            name: self.recalibrate(paths[-1], "fixed", f"after-{name}", paths[1:-1])
            for name, paths in reports.items()
        }
        return self.judge(before, later, reports)

    def write_inputs(self) -> None:
        """Cluster, workload and prompts of random tokens."""
        draw = random.Random(1)
        lengths = [draw.randint(24, 96) for _ in range(NUM_REQUESTS)]
        sizes = {"prompt_tokens": lengths, "new_tokens": self.new_tokens}
        self.write("workload.yaml", sizes | {"num_requests": NUM_REQUESTS, "batch": BATCH})
        roles = {n: {"slowdown": s, "memory_mib": MEMORY_MIB} for n, s in SLOWDOWNS.items()}
        link = {"bandwidth_gbs": 1.0, "latency_us": 800}
        node = {"name": "here", "devices": [{"type": name} for name in SLOWDOWNS], "link": link}
        self.write("cluster.yaml", {"nodes": [node], "rehearse": roles})
        prompts = [
            {
                "id": i,
                "prompt_token_ids": [draw.randint(3, 500) for _ in range(n)],
                "max_new_tokens": self.new_tokens,
            }
            for i, n in enumerate(lengths)
        ]
        lines = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
        (self.folder / "prompts.jsonl").write_text(lines)

    def write(self, name: str, value: Any) -> None:
        """JSON, which is YAML too."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value))

    def write_profiles(self) -> None:
        """The true profile, and one that makes the liar faster than it is."""
        path = self.folder / "wrong" / "true.json"
        threads = [] if self.device == "cuda" else ["--threads", "1"]
        where = ["--device", self.device, "--budget-s", self.budget_s, "-o", path]
        llmpq("profile", "layers", "-q", "--model", self.model, *threads, *GRID.split(), *where)
        profile = json.loads(path.read_text())
        profile["device"]["type"] = LIAR
        for row in profile["rows"]:
            for key in ("time_ms", "time_ms_p10", "time_ms_p90"):
                row[key] *= SLOWDOWNS[LIAR] * CLAIM
        self.write(f"wrong/{LIAR}.json", profile)

    def plan(self, path: Path, profiles: Path) -> None:
        files = ["--cluster", self.folder / "cluster.yaml"]
        files += ["--workload", self.folder / "workload.yaml", "--profiles", profiles]
        words = ["--max-quality-loss", MAX_LOSS, "--no-compare", "--no-what-if"]
        llmpq("plan", "-q", "--model", self.model, *files, *words, "-o", path)

    def execute(self, plan: Path, name: str) -> Path:
        report = self.folder / f"report-{name}.json"
        files = ["--plan", plan, "--prompts", self.folder / "prompts.jsonl"]
        files += ["--output", self.folder / f"out-{name}.jsonl", "--report", report]
        llmpq("run", "-q", *files, "--ignore-eos", "--device", self.device)
        return report

    def recalibrate(
        self, report: Path, profiles: str, output: str, more: list[Path] | None = None
    ) -> dict[str, Any]:
        """What the command says of reports, by the profiles of a folder."""
        value = self.folder / f"said-{output}.json"
        words = ["--profiles", self.folder / profiles, "-o", self.folder / output]
        words += ["--max-quality-loss", MAX_LOSS, "--json", value]
        llmpq("profile", "recalibrate", "-q", "--report", report, *(more or []), *words)
        return json.loads(value.read_text())

    def judge(
        self,
        before: dict[str, Any],
        later: dict[str, dict[str, Any]],
        reports: dict[str, list[Path]],
    ) -> tuple[list[Check], list[dict[str, Any]]]:
        """Errors of the liar's stages and of whole runs; the speed of both plans."""
        stage_before, total_before = _errors(before)
        errors = [_errors(said) for said in later.values()]
        stage, total = (max((e[i] for e in errors), key=abs) for i in range(2))
        speeds = {n: [_speed(path) for path in paths[n == "old" :]] for n, paths in reports.items()}
        ratio = statistics.median(speeds["new"]) / statistics.median(speeds["old"])
        runs = 2 * self.rounds
        rows = [
            {"plan": name, "tokens_per_s": values, "predicted_gain_percent": before["gain_percent"]}
            for name, values in speeds.items()
        ]
        rows += [{"when": "before", "stage_percent": stage_before, "total_percent": total_before}]
        rows += [
            {"when": f"after, {name} plan", "stage_percent": e[0], "total_percent": e[1]}
            for name, e in zip(later, errors, strict=True)
        ]
        told = [row for row in before["factors"] if row["device_type"] == LIAR]
        rows += [{"true_factor": 1 / CLAIM} | row for row in told]
        target = f"within {MAX_ERROR_PERCENT:g} %"
        name = f"a profile {100 * (1 - CLAIM):.0f} % too fast, after one run: error of"
        return [
            Check(
                f"{name} that device's stage times",
                stage,
                "%",
                target,
                abs(stage) < MAX_ERROR_PERCENT,
                runs,
                f"before {stage_before:+.0f} %",
            ),
            Check(
                f"{name} the whole run",
                total,
                "%",
                target,
                abs(total) < MAX_ERROR_PERCENT,
                runs,
                f"before {total_before:+.0f} %",
            ),
            Check(
                "the plan by corrected profiles over the one before",
                ratio,
                "x",
                "> 1",
                ratio > 1,
                runs,
            ),
        ], rows


def _errors(said: dict[str, Any]) -> tuple[float, float]:
    """(the liar's stages, all runs) by the profiles that were given: predicted / measured - 1."""
    stages = [s for s in said["stages"] if s["device_type"] == LIAR]
    measured = sum(s["measured_s"] for s in stages)
    predicted = sum(s["measured_s"] * (1 + s["error_before_percent"] / 100) for s in stages)
    total = statistics.fmean(run["error_before_percent"] for run in said["runs"])
    return 100 * (predicted / measured - 1) if measured else 0.0, total


def _speed(report: Path) -> float:
    return json.loads(report.read_text())["tokens_per_s"]


def _model() -> str:
    """A trained model whose layers weigh more than its ends, where there is one."""
    found = (shared_data() or ROOT) / "models" / MODEL
    return str(found) if found.is_dir() else DEFAULT_MODEL


def llmpq(command: str, *words: object) -> None:
    """Runs a command of llmpq; its own words tell what went wrong."""
    line = [sys.executable, "-m", "llmpq.cli.main", command, *map(str, words)]
    subprocess.run(line, cwd=ROOT, check=True)


if __name__ == "__main__":
    checks, rows = run("--quick" in sys.argv, "cpu")
    print(json.dumps([rows, [vars(check) for check in checks]], indent=1))
