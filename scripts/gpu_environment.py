"""What `scripts/gpu.sh` finds on a machine, and what it lacks: libraries, card, driver, commit.

Versions are those of the installed distributions. The record labels every number of a run.
"""

import os
import platform
import shutil
import subprocess
import time
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "triton", "humming-kernels", "transformers", "safetensors", "pytest")
NEEDED = ("torch", "transformers", "safetensors")
WITHOUT = {  # what happens where an optional library is absent
    "triton": "no kernels in Triton",
    "humming-kernels": "no kernels of humming",
    "pytest": "the step `tests` fails",
}


def environment(device: str) -> dict[str, Any]:
    """The record of this machine."""
    return {
        "device": device,
        "card": _card() if device == "cuda" else None,
        "sees_cuda": _sees_cuda(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "wanted_transformers": _pin("transformers"),
        "nvcc": shutil.which("nvcc"),
        "commit": os.environ.get("COMMIT") or _git("describe", "--always", "--dirty") or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def missing(found: dict[str, Any]) -> list[str]:
    """What keeps every step from running; empty where they can start."""
    faults = [f"missing: {name}" for name in NEEDED if found["libraries"][name] is None]
    if found["device"] == "cuda" and not found["sees_cuda"]:
        faults.append("missing: a card that torch sees (DEVICE=cpu tries out the scripts without)")
    return faults


def describe(found: dict[str, Any]) -> str:
    """For people: one block of lines."""
    card = found["card"] or {}
    lines = [f"llmpq {found['commit']}, {found['date']}"]
    if found["device"] == "cuda":
        lines.append(f"card: {card.get('name', 'nvidia-smi tells none')}; {_of_card(card)}")
    else:
        lines.append("NO CARD IS MEASURED: this tries out the scripts on a CPU")
    lines.append(f"CPU: {found['cpu']}, {found['cores']} cores; Python {found['python']}")
    for name, number in found["libraries"].items():
        absent = f"absent: {WITHOUT.get(name, 'needed')}"
        lines.append(f"  {name}: {number or absent}{_differs(name, found)}")
    lines.append(f"  nvcc: {found['nvcc'] or 'absent (humming then needs NVRTC from its extras)'}")
    return "\n".join(lines)


def _of_card(card: dict[str, str]) -> str:
    known = [f"{key} {card[key]}" for key in ("driver", "memory_mib", "power_w") if key in card]
    return ", ".join(known)


def _differs(name: str, found: dict[str, Any]) -> str:
    wanted = found["wanted_transformers"]
    if name != "transformers" or found["libraries"][name] in (None, wanted):
        return ""
    return f" (this project is tested with {wanted})"


def _card() -> dict[str, str] | None:
    """The first card, as the driver's tool describes it."""
    fields = {
        "name": "name",
        "driver": "driver_version",
        "memory_mib": "memory.total",
        "power_w": "power.limit",
        "max_mhz": "clocks.max.sm",
    }
    query = f"--query-gpu={','.join(fields.values())}"
    told = _run("nvidia-smi", "--id=0", query, "--format=csv,noheader,nounits")
    values = [value.strip() for value in told.split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def _sees_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _pin(name: str) -> str:
    """The version that pyproject.toml pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [word.split("==") for word in project["optional-dependencies"]["run"] if "==" in word]
    return dict(pins)[name]


def _git(*words: str) -> str:
    return _run("git", "-C", str(ROOT), *words).strip()


def _run(*line: str) -> str:
    """Standard output; empty where the program is missing or fails."""
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
