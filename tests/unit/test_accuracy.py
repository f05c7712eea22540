"""How far off a plan's times may be: means by time, the least certain source, what is beyond."""

from dataclasses import dataclass, replace

import pytest

from llmpq.costs.fits import BEYOND, Accuracy
from llmpq.costs.latency import LayerTimes
from llmpq.costs.links import Seconds, Tokens
from llmpq.planner.accuracy import warnings, with_accuracy
from llmpq.planner.evaluate import evaluate
from llmpq.planner.problem import Assignment, Configuration, Problem, StageDevices
from tests.unit.test_search import cluster_of, problem_on


@dataclass(frozen=True)
class Fixed:
    """The same time and accuracy everywhere."""

    time_s: float
    how: Accuracy

    def seconds(self, micro_batch: int, tokens: Tokens) -> Seconds:
        return self.time_s + 0.0 * tokens

    def accuracy(self, micro_batch: int, tokens: float) -> Accuracy:
        return self.how


def times(layer: Accuracy, call: Accuracy) -> LayerTimes:
    """A layer takes 3 s in both phases, a stage's call 1 s."""
    models = {("16", phase): Fixed(3.0, layer) for phase in ("prefill", "decode")}
    calls = {("", f"stage_{phase}"): Fixed(1.0, call) for phase in ("prefill", "decode")}
    return LayerTimes(models | calls, ("16",), "test")


def two_stages(first: LayerTimes, second: LayerTimes) -> tuple[Problem, Assignment]:
    """One layer on a T4, two on a V100."""
    cluster = cluster_of({"t4-16g": 1, "v100-32g": 1}, mib=4000)
    problem = problem_on(cluster, 3, 256, ("16",))
    problem = replace(problem, times={"t4-16g": first, "v100-32g": second}, _known={})
    places = tuple(StageDevices(d.node, d.type, d.memory_bytes) for d in cluster.devices())
    return problem, Assignment(Configuration(places, 4, 1, 2), (("16",), ("16", "16")))


SURE, ROUGH = Accuracy("measured", 0.02), Accuracy("fitted", 0.1)


def test_a_stage_errs_like_its_parts_by_time_and_the_run_like_its_slowest_stage() -> None:
    problem, assignment = two_stages(times(SURE, ROUGH), times(ROUGH, SURE))
    predicted = with_accuracy(problem, assignment, evaluate(problem, assignment))
    first, second = predicted.stages
    assert first.prefill_error_percent == pytest.approx((3 * 2 + 1 * 10) / 4)
    assert second.decode_error_percent == pytest.approx((6 * 10 + 1 * 2) / 7)
    assert (first.source, second.source) == ("fitted", "fitted")
    assert predicted.error_percent == pytest.approx(second.decode_error_percent)
    assert warnings(problem, assignment) == []


def test_an_error_that_nobody_knows_is_not_made_up() -> None:
    unknown = times(Accuracy("spec sheet", None), SURE)
    problem, assignment = two_stages(times(SURE, SURE), unknown)
    predicted = with_accuracy(problem, assignment, evaluate(problem, assignment))
    assert predicted.stages[0].decode_error_percent == pytest.approx(2)
    assert predicted.stages[1].decode_error_percent is None
    assert predicted.stages[1].source == "spec sheet"
    assert predicted.error_percent is None


def test_what_is_beyond_the_profile_is_named_once_a_device_type() -> None:
    outside = times(Accuracy(BEYOND, 0.5), SURE)
    problem, assignment = two_stages(times(SURE, SURE), outside)
    (line,) = warnings(problem, assignment)
    assert line.startswith("v100-32g: predictions beyond the profiled shapes")
    assert "prefill of 1 x 96 tokens at 16 bits (+-50 %)" in line
    assert "decode of 2 x 103 tokens at 16 bits (+-50 %)" in line
