"""What the benchmarks share: their JSON, their table of checks, the machine they ran on."""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Libraries look for packages of these names, and benchmarks of these names lie beside this file:
# where this folder is on the path, they would be imported in the packages' place.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
sys.modules.setdefault("vllm", None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Check:
    """One numbered target. `holds` is None, with a reason in `why`, where it cannot be told."""

    name: str
    value: float | None
    unit: str
    target: str
    holds: bool | None
    samples: int
    why: str = ""


@dataclass
class Benchmark:
    """A benchmark's result."""

    name: str
    machine: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


def arguments(description: str) -> argparse.ArgumentParser:
    """`--quick` and `--json`, which every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="end within two minutes")
    parser.add_argument("--json", type=Path, help="where to write the result")
    return parser


def shared_data() -> Path | None:
    """The folder of measured tables and small models: $LLMPQ_SHARED, or a shared/ near."""
    root, named = Path(__file__).resolve().parents[2], os.environ.get("LLMPQ_SHARED")
    roots = [Path(named)] if named else [root / "shared", root.parent / "shared"]
    return next((r / "data" for r in roots if (r / "data").is_dir()), None)


def machine() -> dict[str, Any]:
    """The machine, as far as times depend on it."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    cores = len(os.sched_getaffinity(0))
    return {"cpu": names[0] if names else platform.machine(), "cores": cores}


def finish(benchmark: Benchmark, path: Path | None) -> None:
    """Prints the checks and writes the JSON."""
    out = Console(highlight=False)
    table = Table("check", "value", "target", "holds", "samples")
    for check in benchmark.checks:
        value = "-" if check.value is None else f"{check.value:.3g} {check.unit}"
        holds = {True: "yes", False: "NO", None: f"cannot tell: {check.why}"}[check.holds]
        table.add_row(check.name, value, check.target, holds, str(check.samples))
    out.print(table)
    if path is not None:
        data = {"schema_version": 1, "kind": "benchmark"} | asdict(benchmark)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n")
