"""Kernels that a CPU compiles for each number of rows: made before a run, and kept during it."""

import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from llmpq.checkpoint import kernel_setup as kernels
from llmpq.checkpoint.checkpoint import RandomWeights
from llmpq.checkpoint.kernel_setup import planned_rows, prepare_rows
from llmpq.checkpoint.loader import load_stage
from llmpq.cli import profile_layers, run
from llmpq.cli.common import KERNEL_CACHES, bound_kernel_caches
from llmpq.cluster import load_cluster
from llmpq.kernel import KERNELS_KEPT
from llmpq.model_lookup import DEFAULT_MODEL, config_path, load_model_spec
from llmpq.models.stage_model import LayerRange, StageModel, load_config
from llmpq.plan_data import Plan, reserve_of
from llmpq.quant import PlainLinear, QuantizedLinear
from llmpq.schedule import Item, Schedule
from llmpq.workload import Workload, load_workload, planned_lengths

CPU = torch.device("cpu")
MIXED = ("16", "8", "3")


@pytest.fixture(autouse=True)
def alone(one_thread):
    """Products are tiny."""


def a_plan(root: Path, workload: Workload, batch: int, prefill: int, decode: int) -> Plan:
    """Of the shipped model on one device of the shipped rehearsal."""
    spec = load_model_spec(DEFAULT_MODEL)
    stage = {
        "rank": 0,
        "node": "laptop",
        "devices": ["fast"],
        "first_layer": 0,
        "end_layer": spec.num_layers,
        "precisions": ["8"] * spec.num_layers,
    }
    return Plan.model_validate(
        {
            "model": spec.model_dump(),
            "cluster": load_cluster(root / "configs/clusters/rehearsal-3.yaml").model_dump(),
            "workload": workload.model_dump(),
            "method": "uniform",
            "batch": batch,
            "prefill_micro_batch": prefill,
            "decode_micro_batch": decode,
            "stages": [stage],
        }
    )


def jobs_rows(plan: Plan) -> set[int]:
    """Rows of the products in every job of a run of the planned requests."""
    reserve = reserve_of(plan)
    items = (Item(i, *lengths) for i, lengths in enumerate(planned_lengths(plan.workload)))
    rows, chunk = plan.prefill_micro_batch, reserve.chunk_tokens
    schedule = Schedule(reserve.lanes, rows, chunk, len(plan.stages), items)
    found = set()
    while not schedule.is_done:
        while job := schedule.next():
            found.add(job.rows * (job.end - job.begin) if job.prefill else job.rows)
        schedule.returned([False] * len(schedule.oldest.members))
    return found


@pytest.mark.parametrize(("batch", "prefill", "decode"), [(8, 1, 4), (8, 4, 2), (12, 3, 5)])
def test_every_job_of_the_planned_requests_finds_its_kernels(
    repo_root: Path, batch: int, prefill: int, decode: int
) -> None:
    workload = Workload(
        prompt_tokens=(7, 31, 92, 14, 103, 88, 25),
        new_tokens=(9, 4, 17, 6),
        num_requests=40,
    )
    plan = a_plan(repo_root, workload, batch, prefill, decode)
    prepared, chosen = planned_rows(plan)
    assert jobs_rows(plan) <= set(prepared)
    assert chosen == prepared[: len(chosen)] == list(range(1, max(prefill, decode) + 1))


def test_the_kernels_of_the_shipped_example_are_all_kept(repo_root: Path) -> None:
    """One that another drives out is compiled anew at each call, as nothing in a profile is."""
    workload = load_workload(repo_root / "configs/workloads/quickstart.yaml")
    plan = a_plan(repo_root, workload, 8, 2, 4)
    shapes = {(one.out_features, one.in_features) for one in plan.model.linears}
    prepared, chosen = planned_rows(plan)
    assert len(shapes) * len(prepared) + len(chosen) <= KERNELS_KEPT


def calls_of(stage: StageModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[type, int, int]]:
    """The class, outputs and rows of each product from now on."""
    calls: list[tuple[type, int, int]] = []
    for kind in {type(one) for one in stage.model.modules()}:
        if issubclass(kind, PlainLinear | QuantizedLinear):

            def noted(self, x, kind=kind, forward=kind.forward):
                calls.append((kind, self.out_features, len(x)))
                return forward(self, x)

            monkeypatch.setattr(kind, "forward", noted)
    return calls


def test_each_kind_of_linear_multiplies_each_number_of_rows_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load_config(config_path(DEFAULT_MODEL))
    config.num_hidden_layers = 6
    layers = LayerRange(0, 6, 6)
    stage = load_stage(config, RandomWeights(), layers, MIXED * 2, torch.bfloat16, CPU)
    calls = calls_of(stage, monkeypatch)
    prepare_rows(stage, [24, 3], [2])
    kinds = {(type(one), one.out_features, one.in_features) for one in stage.linears().values()}
    assert sorted(n for _, _, n in calls) == sorted([3, 24] * len(kinds) + [2])
    assert (PlainLinear, config.vocab_size, 2) in calls


def test_large_products_are_left_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(config_path(DEFAULT_MODEL))
    config.num_hidden_layers = 1
    stage = load_stage(config, RandomWeights(), LayerRange(0, 1, 1), ["16"], torch.bfloat16, CPU)
    monkeypatch.setattr(kernels, "LARGE_PRODUCT", 8 * 192 * 192)
    calls = calls_of(stage, monkeypatch)
    prepare_rows(stage, [8, 16])
    assert {(outputs, n) for _, outputs, n in calls} == {(96, 8), (96, 16), (192, 8)}


def test_no_more_are_made_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(config_path(DEFAULT_MODEL))
    config.num_hidden_layers = 1
    stage = load_stage(config, RandomWeights(), LayerRange(0, 1, 1), ["16"], torch.bfloat16, CPU)
    shapes = {(one.out_features, one.in_features) for one in stage.linears().values()}
    monkeypatch.setattr(kernels, "KERNELS_KEPT", 3 * len(shapes))
    calls = calls_of(stage, monkeypatch)
    prepare_rows(stage, [5, 4, 9, 2, 1])
    assert {n for _, _, n in calls} == {5, 4, 9}


def test_profiles_keep_as_many_kernels_as_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def ask() -> None:
        raise Asked

    needed = ["--plan", "p", "--prompts", "q", "--output", "r"]
    for module, command, words in (
        (run, run.main, needed),
        (profile_layers, profile_layers.layers, []),
    ):
        monkeypatch.setattr(module, "bound_kernel_caches", ask)
        done = CliRunner().invoke(command, words)
        assert isinstance(done.exception, Asked), done.output


def test_the_users_own_bound_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = KERNEL_CACHES
    monkeypatch.setenv(first, "7")
    monkeypatch.setenv(second, "8")  # so that it is taken back, whatever it is
    monkeypatch.delenv(second)
    bound_kernel_caches()
    assert (os.environ[first], os.environ[second]) == ("7", str(KERNELS_KEPT))
