"""A plan and its rivals for people, on a rich console. Only renders; decides nothing."""

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmpq.cluster import GIB, MIB
from llmpq.plan import Plan, Predicted, PredictedStage, Stage
from llmpq.planner.baselines import Outcome

BAR_WIDTH = 10
AS_FAST = "as fast"


def print_report(
    console: Console, plan: Plan, quality_source: str, notes: Sequence[str], limits: str
) -> None:
    """The chosen plan: stages, bottlenecks, prediction, sources, notes."""
    predicted = plan.predicted
    assert predicted is not None
    console.print(_title(plan))
    console.print(_stage_table(plan, predicted))
    for line in _summary(plan, predicted, quality_source, limits):
        console.print(line)
    for name, source in _sources(plan, predicted).items():
        console.print(escape(f"times of {name}: {source}"))
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}")


def print_outcomes(console: Console, plan: Plan, outcomes: Sequence[Outcome]) -> None:
    """The baselines beside the plan, and why each loses or cannot run."""
    predicted = plan.predicted
    assert predicted is not None
    table = Table(title="beside other methods", title_justify="left")
    for heading, justify in (("method", "left"), ("tokens/s", "right"), ("quality loss", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("why", overflow="fold")
    table.add_row(f"[bold]{plan.method}[/]", *_figures(predicted), "this plan")
    for outcome in outcomes:
        table.add_row(outcome.method, *_figures(outcome.predicted), escape(why(outcome, predicted)))
    console.print(table)


def why(outcome: Outcome, ours: Predicted) -> str:
    """Why a baseline loses, cannot run, or does not lose."""
    if outcome.predicted is None or outcome.assignment is None:
        return f"cannot run: {outcome.why_not}"
    verdict = _verdict(outcome.predicted, ours)
    if verdict == AS_FAST and len(set(outcome.assignment.precisions)) == 1:
        verdict += ": mixed precision buys nothing here"
    slowest = bottleneck(outcome.predicted, "decode_step_s")
    stage = outcome.assignment.stages[slowest]
    device = outcome.assignment.setting.devices[slowest].type
    where = f"slowest in decode: {device}#{slowest} with {run_lengths(stage)}"
    return "; ".join(part for part in (verdict, outcome.why_not, where) if part)


def _verdict(theirs: Predicted, ours: Predicted) -> str:
    ratio = ours.tokens_per_s / theirs.tokens_per_s
    if ratio > 1.005:
        return f"{ratio:.2f}x slower"
    return f"{1 / ratio:.2f}x faster" if ratio < 0.995 else AS_FAST


def run_lengths(precisions: Sequence[str]) -> str:
    """["16", "16", "8"] as "16x2 8x1"."""
    return " ".join(f"{name}x{len(list(group))}" for name, group in groupby(precisions))


def bottleneck(predicted: Predicted, key: str) -> int:
    """The rank of the slowest stage in a phase."""
    times = [getattr(stage, key) for stage in predicted.stages]
    return times.index(max(times))


def _title(plan: Plan) -> str:
    names = [escape(n) for n in (plan.model.name, plan.cluster.name, plan.workload.name)]
    return f"[bold]{names[0]}[/] on {names[1]}, {names[2]}: {plan.method}"


def _stage_table(plan: Plan, predicted: Predicted) -> Table:
    table = Table()
    for heading in ("rank", "device", "node", "layers", "precisions", "memory"):
        table.add_column(heading, overflow="fold")
    for heading in ("prefill ms", "decode ms"):
        table.add_column(heading, justify="right")
    slowest = bottleneck(predicted, "prefill_s"), bottleneck(predicted, "decode_step_s")
    for stage, times in zip(plan.stages, predicted.stages, strict=True):
        marks = [" *" if stage.rank == rank else "" for rank in slowest]
        table.add_row(
            *_stage_cells(stage),
            _memory_cell(times),
            f"{times.prefill_s * 1e3:.2f}{marks[0]}",
            f"{times.decode_step_s * 1e3:.2f}{marks[1]}",
        )
    return table


def _stage_cells(stage: Stage) -> list[str]:
    layers = f"{stage.first_layer}-{stage.end_layer - 1}"
    device, node = escape(stage.devices[0]), escape(stage.node)
    return [str(stage.rank), device, node, layers, run_lengths(stage.precisions)]


def _memory_cell(stage: PredictedStage) -> str:
    used, cap = stage.peak_memory_bytes, stage.memory_capacity_bytes
    share = used / cap if cap else 2.0
    full = min(BAR_WIDTH, round(share * BAR_WIDTH))
    bar = "#" * full + "." * (BAR_WIDTH - full)
    text = f"{bar} {_of(used, cap)}"
    return f"[red]{text}[/]" if used > cap else text


def _of(used: int, cap: int) -> str:
    unit, size = ("GiB", GIB) if cap >= GIB else ("MiB", MIB)
    return f"{used / size:.2f}/{cap / size:.2f} {unit}"


def _summary(plan: Plan, predicted: Predicted, quality_source: str, limits: str) -> list[str]:
    prefill = bottleneck(predicted, "prefill_s")
    decode = bottleneck(predicted, "decode_step_s")
    return [
        f"slowest stage (*): {_name(plan, prefill)} in prefill, {_name(plan, decode)} in decode; "
        "times are of one micro-batch",
        f"{plan.batch} requests in flight, micro-batches of {plan.prefill_micro_batch} (prefill) "
        f"and {plan.decode_micro_batch} (decode)",
        f"[bold]{predicted.tokens_per_s:.1f} tokens/s[/] predicted: {predicted.total_s:.2f} s "
        f"(prefill {predicted.prefill_s:.2f} s, decode {predicted.decode_s:.2f} s)",
        f"quality loss {predicted.quality_loss_percent:.3f} % of perplexity "
        f"({escape(quality_source)}); {limits}",
        f"objective {predicted.objective:.4g}, {_bound(predicted)}; "
        f"planned in {predicted.planning_s:.1f} s",
    ]


def _bound(predicted: Predicted) -> str:
    if predicted.lower_bound <= 0:
        return "no lower bound"
    gap = f"{100 * predicted.gap:.2f} %"
    return f"no plan searched is below {predicted.lower_bound:.4g} (gap {gap})"


def _name(plan: Plan, rank: int) -> str:
    return f"{escape(plan.stages[rank].devices[0])}#{rank}"


def _sources(plan: Plan, predicted: Predicted) -> dict[str, str]:
    pairs = zip(plan.stages, predicted.stages, strict=True)
    return {stage.devices[0]: times.provenance for stage, times in pairs}


def _figures(predicted: Predicted | None) -> list[str]:
    if predicted is None:
        return ["-", "-"]
    return [f"{predicted.tokens_per_s:.1f}", f"{predicted.quality_loss_percent:.3f} %"]
