"""A plan and its rivals for people, on a rich console. Only renders; decides nothing."""

import math
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmpq.cluster import GIB, MIB
from llmpq.machine import GPU_EXTRA
from llmpq.plain import plain
from llmpq.plan_data import Plan, Predicted, PredictedStage, Stage
from llmpq.planner.baselines import Outcome, amount, in_bits
from llmpq.planner.flexgen import OffloadPlan
from llmpq.planner.what_if import Change, WhatIf
from llmpq.precision import bits_text
from llmpq.run_report import SECONDS_PER_HOUR, duration
from llmpq.serving import in_words, needs_library

BAR_WIDTH = 10
AS_FAST = "equally fast"
Row = tuple[str, Plan | str, float | None]  # cluster, its plan or why it has none, price per hour


def print_report(
    console: Console, plan: Plan, quality_source: str, notes: Sequence[str], limits: str
) -> None:
    """The chosen plan: stages, bottlenecks, prediction, sources, notes."""
    predicted = plan.predicted
    assert predicted is not None
    console.print(_title(plan))
    console.print(_stage_table(plan, predicted))
    console.print(_time_table(plan, predicted))
    for line in _summary(plan, predicted, quality_source, limits):
        console.print(line)
    if line := kernel_line(plan):
        console.print(line)
    for name, source in _sources(plan, predicted).items():
        console.print(f"times of {name}: {source}")
    print_notes(console, notes)


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """What a reader should know."""
    for note in notes:
        console.print(noted(note))


def noted(note: str) -> Text:
    """A note as it is shown."""
    return styled(("note:", "yellow"), f" {note}")


def styled(*parts: str | tuple[str, str]) -> Text:
    """Text of which the pairs have a style; control characters are spelled out."""
    pairs = (part if isinstance(part, tuple) else (part, "") for part in parts)
    return Text.assemble(*((plain(text), style) for text, style in pairs))


def print_outcomes(console: Console, plan: Plan, outcomes: Sequence[Outcome]) -> None:
    """The baselines beside the plan, and why each loses or cannot run."""
    predicted = plan.predicted
    assert predicted is not None
    table = empty_table(["method"], ["tokens/s", "quality loss"], "Baselines")
    table.add_column("why", overflow="fold")
    table.add_row(styled((plan.method, "bold")), *_figures(predicted), "this plan")
    for outcome in [o for o in outcomes if o.method != plan.method]:
        figures = _figures(outcome.offload or outcome.predicted)
        table.add_row(outcome.method, *figures, why(outcome, predicted))
    console.print(table)


def print_changes(console: Console, plan: Plan, what_if: WhatIf) -> None:
    """What would make the plan faster, what would not, and how much was not looked at."""
    predicted = plan.predicted
    assert predicted is not None
    table = empty_table(["change"], ["tokens/s", "gain"], "What would change the plan")
    for change in what_if.changes:
        table.add_row(change.text, f"{change.tokens_per_s:.1f}", _gain(change, predicted))
    console.print(table)
    if what_if.num_left_out:
        console.print(f"{what_if.num_left_out} further, less promising changes were not tried")


def _gain(change: Change, predicted: Predicted) -> str:
    """A gain that the plan's own gap may explain is no number to rely on."""
    if change.within_gap and change.at_most_percent < math.inf:
        return f"at most +{change.at_most_percent:.1f} %"
    if change.within_gap:
        return f"no more than the gap ({100 * predicted.gap:.2f} %)"
    return f"+{change.gain:.1f} (+{change.gain_percent:.1f} %)"


def print_comparison(console: Console, rows: Sequence[Row]) -> None:
    """The same model and work on several clusters, the fastest first; prices where any has one.

    A price is of an hour, in whichever currency the cluster files use.
    """
    priced = any(price is not None for _, _, price in rows)
    headings = ["tokens/s", "quality loss", "gap"]
    headings += ["price/h", "cost per 1M output tokens"] if priced else []
    table = empty_table(["cluster"], headings, "The same workload on each cluster")
    table.add_column("", overflow="fold")
    for name, plan, price in sorted(rows, key=lambda row: -_speed(row[1])):
        money = _money_cells(plan, price) if priced else []
        table.add_row(name, *_comparison_cells(plan), *money, _reason(plan))
    console.print(table)


def _speed(plan: Plan | str) -> float:
    return plan.predicted.tokens_per_s if isinstance(plan, Plan) and plan.predicted else 0.0


def _comparison_cells(plan: Plan | str) -> list[str]:
    predicted = plan.predicted if isinstance(plan, Plan) else None
    gap = "-" if predicted is None else f"{100 * predicted.gap:.2f} %"
    return [*_figures(predicted), gap]


def _money_cells(plan: Plan | str, price: float | None) -> list[str]:
    if price is None:
        return ["-", "-"]
    tokens = _speed(plan) * SECONDS_PER_HOUR / price
    return [f"{price:.2f}", f"{tokens:,.0f}" if tokens else "-"]


def _reason(plan: Plan | str) -> str:
    """The first line of why there is no plan."""
    return plan.partition("\n")[0] if isinstance(plan, str) else ""


def why(outcome: Outcome, ours: Predicted) -> str:
    """Why a baseline loses, cannot run, or does not lose."""
    if outcome.offload is not None:
        return f"{_verdict(outcome.offload, ours)}; {_offloading(outcome.offload)}"
    if outcome.predicted is None or outcome.assignment is None:
        return f"cannot run: {outcome.why_not}"
    verdict = _verdict(outcome.predicted, ours) if outcome.within_budget else ""
    if verdict == AS_FAST and len(set(outcome.assignment.precisions)) == 1:
        verdict += ": mixed precision buys nothing here"
    slowest = bottleneck(outcome.predicted, "decode_step_s")
    stage = outcome.assignment.stages[slowest]
    devices = outcome.assignment.configuration.stage_devices[slowest]
    count = f"{devices.tensor_parallel} x " if devices.tensor_parallel > 1 else ""
    where = f"slowest in decode: {count}{devices.type}#{slowest} with {run_lengths(stage)}"
    return "; ".join(part for part in (verdict, outcome.why_not, where) if part)


def print_offload(console: Console, found: OffloadPlan, notes: Sequence[str]) -> None:
    """What one device does that keeps the rest in its host's memory."""
    console.print(styled(("flexgen", "bold"), f": {_offloading(found)}"))
    console.print(
        styled(
            (f"{found.tokens_per_s:.1f} tokens/s", "bold"),
            f" predicted: {duration(found.total_s)} (every request's first token by "
            f"{found.prefill_s:.2f} s)",
        )
    )
    console.print(
        f"quality loss {found.quality_loss_percent:.3f} % of perplexity; "
        f"{amount(found.device_bytes)} on the device, {amount(found.host_bytes)} on its host"
    )
    for note in notes:
        console.print(noted(note))


def _offloading(found: OffloadPlan) -> str:
    held = f"{100 * found.weights_share:.0f} % of weights, {100 * found.cache_share:.0f} % of cache"
    return (
        f"one {found.device_type} of {found.node} at {in_bits(found.precision)} holds {held}; "
        f"{found.batch} requests in flight, micro-batches of {found.micro_batch}"
    )


def _verdict(theirs: Predicted | OffloadPlan, ours: Predicted) -> str:
    ratio = ours.tokens_per_s / theirs.tokens_per_s
    if ratio > 1.005:
        return f"{ratio:.2f}x slower"
    return f"{1 / ratio:.2f}x faster" if ratio < 0.995 else AS_FAST


def run_lengths(precisions: Sequence[str]) -> str:
    """["16", "16", "8"] as "2x16-bit, 1x8-bit": how many layers follow one another."""
    counts = ((len(list(group)), name) for name, group in groupby(precisions))
    return ", ".join(f"{count}x{bits_text(name)}" for count, name in counts)


def bottleneck(predicted: Predicted, key: str) -> int:
    """The rank of the slowest stage in a phase."""
    times = [getattr(stage, key) for stage in predicted.stages]
    return times.index(max(times))


def _title(plan: Plan) -> Text:
    rest = f" on {plan.cluster.name}, workload {plan.workload.name}, method {plan.method}"
    return styled((plan.model.name, "bold"), rest)


def _stage_table(plan: Plan, predicted: Predicted) -> Table:
    """What every stage holds; of a stage of several devices, memory is of each."""
    table = empty_table(["rank", "device", "node", "layers", "precisions", "memory"], ["free"])
    for stage, figures in zip(plan.stages, predicted.stages, strict=True):
        table.add_row(*_stage_cells(stage), _memory_cell(figures), _free(figures))
    return table


def _time_table(plan: Plan, predicted: Predicted) -> Table:
    """Every stage's time for a micro-batch, how far off it may be, its share of the slowest."""
    table = empty_table(["rank", "device"], ["prefill ms", "+-", "", "decode ms", "+-", ""])
    table.add_column("source")
    prefill = _time_cells([s.prefill_s for s in predicted.stages])
    decode = _time_cells([s.decode_step_s for s in predicted.stages])
    for stage, times, (before, bar), (step, step_bar) in zip(
        plan.stages, predicted.stages, prefill, decode, strict=True
    ):
        first = before, _error(times.prefill_error_percent), bar
        then = step, _error(times.decode_error_percent), step_bar
        table.add_row(str(stage.rank), _devices(stage), *first, *then, times.source or "")
    return table


def _error(percent: float | None) -> str:
    return "" if percent is None else f"{percent:.0f} %"


def empty_table(left: Sequence[str], right: Sequence[str], title: str | None = None) -> Table:
    """An empty table; columns of text at the left, of numbers at the right."""
    table = Table(title=title, title_justify="left", min_width=len(title or ""))
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def _time_cells(seconds: Sequence[float]) -> list[tuple[str, str]]:
    """Milliseconds with a mark at the slowest, and a bar, for every stage."""
    slowest = max(seconds)
    at = seconds.index(slowest)
    return [
        (f"{s * 1e3:.2f}{' *' if rank == at else ''}", _bar(s / slowest if slowest else 0.0))
        for rank, s in enumerate(seconds)
    ]


def _bar(share: float) -> str:
    full = min(BAR_WIDTH, round(share * BAR_WIDTH))
    return "#" * full + "." * (BAR_WIDTH - full)


def _stage_cells(stage: Stage) -> list[str]:
    layers = f"{stage.first_layer}-{stage.end_layer - 1}"
    return [
        str(stage.rank),
        _devices(stage),
        stage.node,
        layers,
        run_lengths(stage.precisions),
    ]


def _devices(stage: Stage) -> str:
    """The stage's device, or "4 x a100-40g" where it has several."""
    count = f"{stage.tensor_parallel} x " if stage.tensor_parallel > 1 else ""
    return count + stage.devices[0]


def _memory_cell(stage: PredictedStage) -> Text:
    used, cap = stage.peak_memory_bytes, stage.memory_capacity_bytes
    unit, size = _unit(cap)
    text = f"{_bar(used / cap if cap else 2.0)} {used / size:.2f}/{cap / size:.2f} {unit}"
    return styled((text, "red" if used > cap else ""))


def _free(stage: PredictedStage) -> Text:
    """What is left of a device's memory; below zero: what is short."""
    unit, size = _unit(stage.memory_capacity_bytes)
    left = (stage.memory_capacity_bytes - stage.peak_memory_bytes) / size
    return styled((f"{left:.2f} {unit}", "red" if left < 0 else ""))


def _unit(cap: int) -> tuple[str, int]:
    return ("GiB", GIB) if cap >= GIB else ("MiB", MIB)


def _summary(
    plan: Plan, predicted: Predicted, quality_source: str, limits: str
) -> list[str | Text]:
    prefill = bottleneck(predicted, "prefill_s")
    decode = bottleneck(predicted, "decode_step_s")
    return [
        f"slowest stage (*): {_name(plan, prefill)} in prefill, {_name(plan, decode)} in decode; "
        "times are of one micro-batch",
        f"{plan.batch} requests in flight, micro-batches of {plan.prefill_micro_batch} (prefill) "
        f"and {plan.decode_micro_batch} (decode)",
        styled(
            (f"{predicted.tokens_per_s:.1f} tokens/s", "bold"),
            f"{_requests(predicted)} predicted{_expected_error(predicted)}: "
            f"{expected_time(predicted)}",
        ),
        f"quality loss {predicted.quality_loss_percent:.3f} % of perplexity "
        f"({quality_source}); {limits}",
        f"objective {predicted.objective:.4g}, {_bound(predicted)}; "
        f"planned in {predicted.planning_s:.1f} s",
    ]


def _requests(predicted: Predicted) -> str:
    """Plans of earlier versions do not say."""
    speed = predicted.requests_per_s
    return "" if speed is None else f", {speed:.3g} requests/s"


def expected_time(predicted: Predicted) -> str:
    """How long it takes, when every request has its first token, what part prefills have."""
    if predicted.prefill_share is None:
        return duration(predicted.total_s)
    return (
        f"{duration(predicted.total_s)}; every request has its first token after "
        f"{predicted.prefill_s:.2f} s, prefills are {100 * predicted.prefill_share:.0f} % of the "
        "busiest stage's work"
    )


def kernel_line(plan: Plan) -> str:
    """The kernels that the prediction counts on, and what was taken to be installed for it."""
    found: dict[str, dict[str, list[str]]] = {}
    stages = plan.predicted.stages if plan.predicted else []
    for stage, predicted in zip(plan.stages, stages, strict=False):
        for precision, kernels in predicted.kernels.items():
            types = found.setdefault(precision, {}).setdefault(in_words(kernels), [])
            types += [name for name in stage.devices[:1] if name not in types]
    parts = [_kernel_part(precision, found[precision]) for precision in found]
    assumed = [f"assumed installed: {GPU_EXTRA}"] if _is_assumed(plan) else []
    return f"kernels: {'; '.join(parts + assumed)}" if parts else ""


def _kernel_part(precision: str, kernels: dict[str, list[str]]) -> str:
    """One precision's; device types are named where they differ."""
    several = len(kernels) > 1
    named = (f"{k} ({', '.join(types)})" if several else k for k, types in kernels.items())
    return f"{bits_text(precision)} {', '.join(named)}"


def _is_assumed(plan: Plan) -> bool:
    """Whether a stage counts on a library of kernels of which its cluster file does not speak."""
    stages = plan.predicted.stages if plan.predicted else []
    return any(
        plan.cluster.kernels_of(stage.devices[0]) is None and needs_library(names)
        for stage, predicted in zip(plan.stages, stages, strict=False)
        for names in predicted.kernels.values()
    )


def _expected_error(predicted: Predicted) -> str:
    """As far as the times of layers go; what a schedule or a link adds is not known."""
    percent = predicted.error_percent
    return "" if percent is None else f" (layer times +-{percent:.0f} %)"


def _bound(predicted: Predicted) -> str:
    if predicted.lower_bound <= 0:
        return "no lower bound"
    model = ""
    if predicted.closed_form_s is not None:
        off = round(100 * (predicted.closed_form_s / predicted.total_s - 1), 1) + 0.0  # no "-0.0"
        scale = predicted.closed_form_scale
        scaled = f", scaled by {scale:.2f} to simulated runs of such plans," if scale else ","
        model = f" by the closed form{scaled} which is {off:+.1f} % off the simulation of this plan"
    gap = f"{100 * predicted.gap:.2f} % of optimal"
    return f"within {gap} (lower bound {predicted.lower_bound:.4g}{model})"


def _name(plan: Plan, rank: int) -> str:
    return f"{_devices(plan.stages[rank])}#{rank}"


def _sources(plan: Plan, predicted: Predicted) -> dict[str, str]:
    pairs = zip(plan.stages, predicted.stages, strict=True)
    return {stage.devices[0]: times.provenance for stage, times in pairs}


def _figures(predicted: Predicted | OffloadPlan | None) -> list[str]:
    if predicted is None:
        return ["-", "-"]
    return [f"{predicted.tokens_per_s:.1f}", f"{predicted.quality_loss_percent:.3f} %"]
