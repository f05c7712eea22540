"""How far the spec sheet's times are off on a GPU that the fit has not seen.

Fits the coefficients anew from the tables of `scripts/fit_efficiency.py`, each time without one
GPU, and predicts that GPU's layers. Without the tables (`_common.shared_data`) nothing can be told.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from _common import Check, shared_data

from llmpq.devices import device_library

SCRIPTS = Path(__file__).resolve().parents[1]
TARGET = 0.15
PHASES = ("prefill", "decode")


def run(quick: bool, device: str) -> tuple[list[Check], list[dict]]:
    """Leave-one-GPU-out errors. Nothing runs on a device: `quick` and `device` change nothing."""
    fit = _fit_script()
    data = (shared_data() or fit.DEFAULT_DATA.parent) / "gpu"
    if not data.is_dir():
        return [_check(phase, [], f"no tables at {data}") for phase in PHASES], []
    errors = fit.left_out_errors(fit.observations(data), fit.SHIPPED)
    rows = fit.summary(errors)
    for row in rows:
        own = [pair for pair in errors if _is_of(pair[0], row)]
        row["why"] = why(row, own, errors) if row["median"] > TARGET else ""
    return [_check(phase, [r for r in rows if r["phase"] == phase]) for phase in PHASES], rows


def why(
    row: dict[str, Any],
    own: Sequence[tuple[Any, float]],
    errors: Sequence[tuple[Any, float]],
) -> str:
    """What can be computed about a miss: its direction by source, and who was left to fit on."""
    facts = []
    for source in row["sources"]:
        signed = float(np.median([error for one, error in own if one.source == source]))
        others = {o.left_out_with for o, _ in errors if o.source == source} - {row["gpu"]}
        facts.append(f"{source} {100 * signed:+.0f} % (it also timed {', '.join(sorted(others))})")
    library = device_library()
    generation = library[own[0][0].gpu].compute_capability.split(".")[0]
    near = {
        one.left_out_with
        for one, _ in errors
        if library[one.gpu].compute_capability.split(".")[0] == generation
    } - {row["gpu"]}
    met = f"compute capability {generation}.x also: {', '.join(sorted(near))}"
    facts.append(met if near else f"the only GPU of compute capability {generation}.x")
    same_way = np.mean([np.sign(error) == np.sign(row["signed"]) for _, error in own])
    facts.append(f"{100 * same_way:.0f} % of the layers are off the same way")
    return "; ".join(facts)


def _is_of(one: Any, row: dict[str, Any]) -> bool:
    return (one.left_out_with, one.phase) == (row["gpu"], row["phase"])


def _check(phase: str, rows: Sequence[dict[str, Any]], reason: str = "") -> Check:
    value = float(np.median([row["median"] for row in rows])) if rows else None
    return Check(
        name=f"{phase} on a GPU left out of the fit, median error (median of GPUs)",
        value=None if value is None else 100 * value,
        unit="%",
        target=f"<= {100 * TARGET:.0f} %",
        holds=None if value is None else value <= TARGET,
        samples=sum(row["n"] for row in rows),
        why=reason,
    )


def _fit_script() -> ModuleType:
    """`scripts/fit_efficiency.py`, which is no package's module."""
    name = "fit_efficiency"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
