"""How far off a plan's predicted times may be, and where they lie beyond what was measured.

A stage's time is a sum (layers at each precision, its call, embedding, head); its error is the mean
of theirs, weighted by time, as parts measured on one device tend to err in one direction. A run is
as slow as its slowest stages: its error is theirs, weighted by the time of each phase.
Not covered: errors of links, and stages that slow each other down.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmpq.costs.fits import ASSUMED, BEYOND, SOURCES, Accuracy
from llmpq.costs.latency import LayerTimes
from llmpq.plan_data import Predicted, PredictedStage
from llmpq.planner.layer_options import options_held
from llmpq.planner.problem import Assignment, Problem


@dataclass(frozen=True)
class Part:
    """One term of a stage's time: where it comes from, and its seconds."""

    what: str
    seconds: float
    accuracy: Accuracy


def with_accuracy(problem: Problem, assignment: Assignment, predicted: Predicted) -> Predicted:
    """The same prediction with errors and sources."""
    stages = [
        _stage(problem, assignment, rank, stage) for rank, stage in enumerate(predicted.stages)
    ]
    return predicted.model_copy(
        update={"stages": stages, "error_percent": _total(predicted, stages)}
    )


def warnings(problem: Problem, assignment: Assignment) -> list[str]:
    """A line for each device type whose times are asked beyond what was profiled."""
    beyond: dict[str, dict[str, float | None]] = {}
    for rank, devices in enumerate(assignment.configuration.stage_devices):
        for phase in ("prefill", "decode"):
            for part in _parts(problem, assignment, rank, phase):
                if part.accuracy.source == BEYOND:
                    found = beyond.setdefault(devices.type, {})
                    found[part.what] = _larger(part.accuracy.error, found.get(part.what, 0.0))
    return [
        f"{device}: predictions beyond the profiled shapes: {', '.join(_said(found))}; profile "
        "these shapes for a reliable prediction"
        for device, found in beyond.items()
    ]


def _larger(one: float | None, other: float | None) -> float | None:
    """Of two errors; what is not known is the largest."""
    return None if one is None or other is None else max(one, other)


def _said(found: dict[str, float | None]) -> list[str]:
    return [
        f"{what} ({'error not known' if error is None else f'+-{100 * error:.0f} %'})"
        for what, error in found.items()
    ]


def assumed_calls(problem: Problem, assignment: Assignment) -> list[str]:
    """A note where what a stage's call costs was not measured, with the default and its source."""
    calls = {
        devices.type: call_s
        for devices in assignment.configuration.stage_devices
        if (call_s := problem.times_at(devices).assumed_call_s)
    }
    if not calls:
        return []
    each = ", ".join(f"{1e3 * call_s:.1f} ms on {name}" for name, call_s in calls.items())
    return [
        f"the overhead of a stage's call was not measured; assumed: {each} (measured by "
        "llmpq-profile on an H200's host and on an AMD EPYC); 'llmpq-profile layers' measures it"
    ]


def _stage(
    problem: Problem, assignment: Assignment, rank: int, stage: PredictedStage
) -> PredictedStage:
    prefill, decode = (list(_parts(problem, assignment, rank, p)) for p in ("prefill", "decode"))
    sources = [p.accuracy.source for p in prefill + decode if p.accuracy.source != ASSUMED]
    return stage.model_copy(
        update={
            "source": max(sources, key=SOURCES.index) if sources else None,
            "prefill_error_percent": _percent(prefill),
            "decode_error_percent": _percent(decode),
        }
    )


def _percent(parts: Sequence[Part]) -> float | None:
    """The mean by time; None where that of any part is not known."""
    seconds = sum(part.seconds for part in parts)
    errors = [part.accuracy.error for part in parts]
    if seconds <= 0 or None in errors:
        return None
    products = (p.seconds * e for p, e in zip(parts, errors, strict=True) if e is not None)
    return 100 * sum(products) / seconds


def _total(predicted: Predicted, stages: Sequence[PredictedStage]) -> float | None:
    """By the slowest stage of each phase."""
    prefill = max(stages, key=lambda stage: stage.prefill_s).prefill_error_percent
    decode = max(stages, key=lambda stage: stage.decode_step_s).decode_error_percent
    if prefill is None or decode is None or predicted.total_s <= 0:
        return None
    share = predicted.share_of_prefills
    return share * prefill + (1 - share) * decode


def _parts(problem: Problem, assignment: Assignment, rank: int, phase: str) -> Iterator[Part]:
    """The terms of a stage's time for one micro-batch of usual prompts (decode: past)."""
    configuration = assignment.configuration
    times = problem.times_at(configuration.stage_devices[rank])
    counts = problem.job_counts(configuration.sizes)
    size = (
        configuration.prefill_micro_batch
        if phase == "prefill"
        else configuration.decode_micro_batch
    )
    tokens = counts.mean_prompt if phase == "prefill" else counts.mean_past
    for (kind, precision), count in options_held(problem, assignment, rank).items():
        what = f"{phase} of {size} x {tokens:.0f} tokens at {precision} bits"
        yield from _part(times.of_kind(kind), what, precision, phase, size, tokens, count)
    yield from _part(times, f"calls of {phase}", "", f"stage_{phase}", size, tokens)
    if rank == 0:
        embedded = tokens if phase == "prefill" else 1.0
        yield from _part(times, "embedding", "", "embedding", size, embedded)
    if rank == len(configuration.stage_devices) - 1:
        yield from _part(times, f"head for {size} requests", "", "head", size, 0.0)


def _part(
    times: LayerTimes,
    what: str,
    precision: str,
    phase: str,
    size: int,
    tokens: float,
    count: int = 1,
) -> Iterator[Part]:
    """Nothing where the phase is not priced."""
    accuracy = times.accuracy(precision, phase, size, tokens)
    if accuracy is not None:
        seconds = float(times.seconds(precision, phase, size, tokens))
        yield Part(what, count * seconds, accuracy)
