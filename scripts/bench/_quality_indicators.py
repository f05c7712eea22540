"""The order of layers by each indicator against the exact one, and what each indicator takes.

Exact: one layer at a time at a low precision, the KL divergence over the whole calibration text
that is allowed (`--method exact`). Beside it the same on held-out text, as KL and as the rise of
the loss itself; how well the two halves of that text agree on the latter says what correlation
noise allows at all.
"""

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _common import Check
from _quality_common import (
    CPU,
    DTYPE,
    PRECISIONS,
    WINDOW,
    Measured,
    Mixed,
    Settings,
    Subject,
    random_table,
    sensitivity,
    sensitivity_path,
    stated,
)

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.loader import load_stage
from llmpq.checkpoint.roundings import load_roundings
from llmpq.cluster import MIB
from llmpq.costs.memory import HALF, prefill_bytes
from llmpq.evaluation.perplexity import LOGITS_AT_ONCE, TOKENS_AT_ONCE
from llmpq.models.stage_model import LayerRange
from llmpq.profile_data import Sensitivity, load_sensitivity
from llmpq.profiler.effort import Effort
from llmpq.profiler.indicators import SensitivityCell

INDICATORS = ("measured", "variance", "hessian")  # and "random", which takes nothing
LOW = ("4", "3")
LEAST_CORRELATION = 0.9
MAX_SECONDS = 120.0
TIMED_LAYERS = 12
SEEDS = 10
FLOAT = 4  # bytes

Order = Sequence[float]  # a figure a layer


@dataclass(frozen=True)
class References:
    """What indicators are compared with: a figure a layer, by precision."""

    exact: Mapping[str, Order]
    held_out_kl: Mapping[str, Order]
    held_out_loss: Mapping[str, Order]
    halves: Mapping[str, float]  # correlation of the loss's order on two halves of the text


def run(settings: Settings) -> tuple[list[Check], list[dict[str, Any]]]:
    """The checks and a row for each indicator and precision of each model."""
    checks: list[Check] = []
    rows: list[dict[str, Any]] = []
    for subject in settings.subjects():
        more_checks, more_rows = of_subject(settings, subject)
        checks += more_checks
        rows += more_rows
    return checks, rows


def of_subject(settings: Settings, subject: Subject) -> tuple[list[Check], list[dict[str, Any]]]:
    """All indicators of one model."""
    files = {name: sensitivity(settings, subject, name) for name in INDICATORS}
    most = "--max-windows", str(settings.num_windows // (2 if settings.quick else 1))
    files["exact"] = sensitivity(settings, subject, "measured", "--method", "exact", *most)
    references = references_of(settings, subject, files["exact"])
    rows = [
        row(subject, name, precision, file, references)
        for name, file in files.items()
        for precision in LOW
    ]
    rows += [random_row(subject, precision, references) for precision in LOW]
    checks = [order_check(one) for one in rows if one["indicator"] == "measured"]
    checks += [
        stated(
            f"{subject.name}, {one['bits']} bits: order by {one['indicator']}",
            one["exact"],
            "rho",
            subject.num_layers,
        )
        for one in rows
        if one["indicator"] not in ("measured", "exact")
    ]
    return [*checks, *cost_checks(subject, sensitivity_path(settings, subject))], rows


def references_of(settings: Settings, subject: Subject, exact: Sensitivity) -> References:
    """The exact orders, on the calibration text and on held-out text."""
    path = sensitivity_path(settings, subject)
    mixed = Mixed(subject, load_roundings(load_sensitivity(path).quantizer, None, path), LOW)
    windows = subject.windows(subject.evaluation[0], settings.num_windows)
    layers, total = range(subject.num_layers), subject.num_layers
    plans = [
        [str(p) for p in SensitivityCell(i, low).variant(total)] for low in LOW for i in layers
    ]
    base, measured = mixed.measure(plans, windows)
    groups = {low: measured[i * total : (i + 1) * total] for i, low in enumerate(LOW)}
    return References(
        exact={low: exact.table()[low] for low in LOW},
        held_out_kl={low: [float(m.kl.mean()) for m in group] for low, group in groups.items()},
        held_out_loss={low: [m.rise(base) for m in group] for low, group in groups.items()},
        halves={low: agreement(base, group) for low, group in groups.items()},
    )


def agreement(base: Measured, measured: Sequence[Measured]) -> float:
    """Correlation of the order of the rise of the loss on every other window with the rest."""
    rises = [one.loss - base.loss for one in measured]
    return spearman([r[::2].mean() for r in rises], [r[1::2].mean() for r in rises])


def spearman(a: Order, b: Order) -> float:
    """Rank correlation; ties share the mean rank."""
    ranks = pd.DataFrame({"a": list(a), "b": list(b)}).rank()
    return round(float(ranks["a"].corr(ranks["b"])), 9)


def compared(order: Order, precision: str, references: References) -> dict[str, float]:
    """Correlations of an order with each reference."""
    return {
        "exact": spearman(order, references.exact[precision]),
        "held_out_kl": spearman(order, references.held_out_kl[precision]),
        "held_out_loss": spearman(order, references.held_out_loss[precision]),
        "loss_halves": references.halves[precision],
    }


def row(
    subject: Subject, name: str, precision: str, file: Sensitivity, references: References
) -> dict[str, Any]:
    """An indicator's order at one precision, and what it took."""
    order = file.table()[precision]
    return {
        "model": subject.name,
        "indicator": name,
        "bits": int(precision),
        **compared(order, precision, references),
        "seconds": file.seconds,
        "peak_memory_bytes": file.peak_memory_bytes,
        "tokens": file.calibration.num_tokens,
        "sensitivity": order,
    }


def random_row(subject: Subject, precision: str, references: References) -> dict[str, Any]:
    """The mean of some seeds."""
    orders = [random_table(subject, seed)[precision] for seed in range(SEEDS)]
    found = pd.DataFrame([compared(order, precision, references) for order in orders])
    known = {"model": subject.name, "indicator": "random", "bits": int(precision)}
    return known | {str(key): float(value) for key, value in found.mean().items()}


def order_check(row: dict[str, Any]) -> Check:
    """The fast measurement against the exact one."""
    name = f"{row['model']}, {row['bits']} bits: order by measured (fast)"
    value, least = row["exact"], LEAST_CORRELATION
    return Check(name, value, "rho", f">= {least:g}", value >= least, len(row["sensitivity"]))


# ---- what it takes


def cost_checks(subject: Subject, path: Path) -> list[Check]:
    """Seconds of the fast measurement, and its memory above the loader's."""
    file = load_sensitivity(path)
    assert file.seconds is not None and file.peak_memory_bytes is not None
    above = (file.peak_memory_bytes - loader_bytes(subject, path)) / MIB
    most = (layer_bytes(subject) + activation_bytes(subject)) / MIB
    memory = f"{subject.name}: peak memory of measuring above the loader's"
    return [
        time_check(subject, file.seconds),
        Check(memory, above, "MiB", f"<= a layer and activations: {most:.0f}", above <= most, 1),
    ]


def time_check(subject: Subject, seconds: float) -> Check:
    """There is a target for a model of twelve layers."""
    name = f"{subject.name}: measuring {subject.num_layers} layers at {len(PRECISIONS)} precisions"
    if subject.num_layers != TIMED_LAYERS:
        return stated(name, seconds, "s", 1)
    return Check(name, seconds, "s", f"< {MAX_SECONDS:g}", seconds < MAX_SECONDS, 1)


def loader_bytes(subject: Subject, path: Path) -> int:
    """The peak of a process that loads layer after layer at every precision.

    Each runs two tokens, as libraries take memory of their own when they are first used.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_load_all, subject, path).result()


def _load_all(subject: Subject, path: Path) -> int:
    with Effort(CPU) as effort, torch.inference_mode():
        roundings = load_roundings(load_sensitivity(path).quantizer, None, path)
        weights, total = Checkpoint(subject.folder), subject.num_layers
        hidden = torch.zeros(1, 2, subject.spec.hidden_size)
        for layer, precision in itertools.product(range(total), PRECISIONS):
            place = LayerRange(layer, layer + 1, total)
            stage = load_stage(
                subject.config, weights, place, [precision], DTYPE, CPU, roundings=roundings
            )
            hidden = stage.run(hidden)
        stage.head(hidden).log_softmax(-1)
    return effort.peak_memory_bytes


def layer_bytes(subject: Subject) -> int:
    """Of one layer's weights, not quantized."""
    return subject.spec.layer_params * FLOAT


def activation_bytes(subject: Subject) -> int:
    """The larger of what a layer and what the comparison of distributions hold at a time.

    A chunk of log-probabilities of the model at 16 bits, of a variant, their difference, and two
    tensors made of these.
    """
    spec, windows = subject.spec, TOKENS_AT_ONCE // WINDOW
    layer = prefill_bytes(spec, windows, WINDOW, first=True, last=False, precisions=PRECISIONS)
    tokens = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // spec.vocab_size)
    return max(layer * FLOAT // HALF, 5 * tokens * spec.vocab_size * FLOAT)
