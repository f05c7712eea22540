"""Timed calls on a CPU come after a rest: as long as a rehearsed stage rests, or as the ends do."""

import pytest
import torch

from llmpq.model_lookup import DEFAULT_MODEL, config_path
from llmpq.models.stage_model import load_config
from llmpq.profile_data import Candidate
from llmpq.profiler import timer
from llmpq.profiler.stacks import END_REST_S, REST_S, Bench, stacked_layers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Bench:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layers = stacked_layers((0,) * 4, 0, 1)
        config = load_config(config_path(DEFAULT_MODEL))
        return Bench(config, ("16",), layers, torch.bfloat16, CPU, 64)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("phase", "tokens", "rest_s"),
    [
        ("prefill", 8, REST_S),
        ("decode", 8, REST_S),
        ("stage_prefill", 8, REST_S),
        ("stage_decode", 8, REST_S),
        ("embedding", 8, END_REST_S),
        ("head", 0, END_REST_S),
    ],
)
def test_a_call_of_a_stage_is_timed_after_the_rest_of_a_stage(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, phase: str, tokens: int, rest_s: float
) -> None:
    rests: list[float] = []
    monkeypatch.setattr(timer.time, "sleep", rests.append)
    with torch.inference_mode():
        probe = bench.open(Candidate("16", phase, 2, tokens))
        probe.warm_up(probe.max_depth)
        assert rests == []
        probe.time_ms(probe.max_depth)
    assert rests == [rest_s]
    bench.reference_ms()
    assert rests == [rest_s, 0.0]  # the machine's speed is told at once
