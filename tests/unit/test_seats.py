"""Which process runs which worker: hosts, nodes, ranks out of the plan's order, cards."""

from pathlib import Path

import pytest
from test_placement import T4, V100, found

from llmpq.model_lookup import load_model_spec
from llmpq.plan_data import Plan
from llmpq.seats import Process, Refusal, nodes_of, planned_devices, stage_ranks, take_seats

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
SPEC = load_model_spec(str(CONFIGS / "opt-1.3b.json"))


def make_plan(*stages: tuple[str, str], sharing: int = 1, **cluster: object) -> Plan:
    """One layer a stage and the rest in the last; stages are nodes and types."""
    ends = [*range(1, len(stages)), SPEC.num_layers]
    held: dict[str, list[dict[str, object]]] = {}
    for node, name in stages:
        held.setdefault(node, []).append({"type": name, "count": sharing})
    nodes = [{"name": node, "devices": groups} for node, groups in held.items()]
    return Plan.model_validate(
        {
            "model": SPEC.model_dump(),
            "workload": {"prompt_tokens": 8, "new_tokens": 8, "num_requests": 4},
            "cluster": {"nodes": nodes, **cluster},
            "method": "hand",
            "batch": 4,
            "prefill_micro_batch": 2,
            "decode_micro_batch": 4,
            "stages": [
                {
                    "rank": rank,
                    "node": node,
                    "devices": [name] * sharing,
                    "tensor_parallel": sharing,
                    "first_layer": end - 1 if rank < len(stages) - 1 else rank,
                    "end_layer": end,
                    "precisions": ["16"] * (1 if rank < len(stages) - 1 else end - rank),
                }
                for rank, ((node, name), end) in enumerate(zip(stages, ends, strict=True))
            ],
        }
    )


def launched(*hosts: tuple[str, int], cards=((),)) -> list[Process]:
    """Processes as torchrun numbers them: host by host. `cards`: of each host."""
    views = [tuple(found(*kinds)) for kinds in cards] * (len(hosts) if len(cards) == 1 else 1)
    places = [(group, name) for group, (name, count) in enumerate(hosts) for _ in range(count)]
    return [Process(rank, g, name, views[g]) for rank, (g, name) in enumerate(places)]


def reason(processes, plan, with_cards=True) -> str:
    seats = take_seats(processes, plan, with_cards)
    assert isinstance(seats, Refusal)
    return seats.reason


MIXED = (("a", "t4-16g"), ("b", "t4-16g"), ("a", "v100-32g"))


def test_ranks_of_a_node_need_not_follow_each_other():
    plan = make_plan(*MIXED)
    seats = take_seats(launched(("x", 2), ("y", 1)), plan, with_cards=False)
    assert seats == [(0, None), (2, None), (1, None)]
    assert stage_ranks(plan, seats) == [[0], [2], [1]]


def test_the_leaders_node_comes_first():
    plan = make_plan(("b", "t4-16g"), ("a", "t4-16g"), ("b", "v100-32g"))
    assert [(part.name, part.workers) for part in nodes_of(plan)] == [("b", (0, 2)), ("a", (1,))]


@pytest.mark.parametrize("names", [("b", "a"), ("b.lab.example", "a.lab.example")])
def test_a_host_of_a_nodes_name_is_that_node(names):
    seats = take_seats(launched((names[0], 1), (names[1], 2)), make_plan(*MIXED), False)
    assert seats == [(1, None), (0, None), (2, None)]


def test_hosts_in_any_order_are_told_apart_by_their_cards():
    plan = make_plan(("a", "t4-16g"), ("b", "v100-32g"))
    seats = take_seats(launched(("x", 1), ("y", 1), cards=((V100,), (T4,))), plan, True)
    assert seats == [(1, 0), (0, 0)]


def test_on_one_host_each_stage_takes_the_card_of_its_type():
    plan = make_plan(("a", "t4-16g"), ("a", "t4-16g"), ("a", "v100-32g"), ("a", "t4-16g"))
    seats = take_seats(launched(("x", 4), cards=((V100, T4, T4, T4),)), plan, True)
    assert seats == [(0, 1), (1, 2), (2, 0), (3, 3)]


def test_one_host_runs_a_plan_of_several_nodes():
    seats = take_seats(launched(("x", 3), cards=((V100, T4, T4),)), make_plan(*MIXED), True)
    assert seats == [(0, 1), (1, 2), (2, 0)]


def test_workers_that_share_a_stage_have_a_card_each():
    plan = make_plan(("a", "t4-16g"), ("b", "v100-32g"), sharing=2)
    views = ((V100, V100), (T4, T4))
    seats = take_seats(launched(("b", 2), ("a", 2), cards=views), plan, True)
    assert seats == [(2, 0), (3, 1), (0, 0), (1, 1)]
    assert stage_ranks(plan, seats) == [[2, 3], [0, 1]]


def test_a_launcher_that_shows_each_process_one_card():
    plan = make_plan(("a", "t4-16g"), ("a", "v100-32g"))
    v100, t4 = found(V100, T4)
    views = [(v100,), (t4,)]
    processes = [Process(rank, 0, "x", view) for rank, view in enumerate(views)]
    assert take_seats(processes, plan, True) == [(1, 0), (0, 1)]
    wrong = [Process(0, 0, "x", (v100,)), Process(1, 0, "x", ())]
    text = reason(wrong, plan)
    assert "rank 0 sees cuda:0 Tesla V100" in text and "rank 1 sees no card" in text
    assert "same CUDA_VISIBLE_DEVICES" in text


def test_hidden_cards_are_named_with_the_line_that_shows_them():
    plan = make_plan(("a", "t4-16g"), ("a", "v100-32g"))
    everywhere = tuple(found(T4, T4, V100))
    visible = everywhere[:2]
    processes = [Process(rank, 0, "x", visible, everywhere) for rank in range(2)]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=0,2" in reason(processes, plan)


def test_where_no_card_helps_the_refusal_says_so():
    plan = make_plan(("a", "t4-16g"), ("a", "v100-32g"))
    text = reason(launched(("x", 2), cards=((T4, T4),)), plan)
    assert "node a of the plan on host x" in text
    assert "no CUDA_VISIBLE_DEVICES would help" in text


def test_a_plan_of_several_nodes_started_on_one_that_lacks_the_cards():
    text = reason(launched(("x", 3), cards=((T4, T4),)), make_plan(*MIXED))
    assert "no card is left for stage 2 (v100-32g)" in text
    assert "the plan is for 2 nodes (a, b), and was started on 1" in text and "--dry-run" in text


def test_another_number_of_processes_on_a_host():
    plan = make_plan(("a", "t4-16g"), ("b", "t4-16g"), ("a", "t4-16g"), ("b", "t4-16g"))
    text = reason(launched(("x", 1), ("y", 3)), plan, with_cards=False)
    assert "node a of the plan on host x: 2 workers are planned and 1 processes were" in text
    assert "node b of the plan on host y: 2 workers are planned and 3 processes were" in text
    assert text.count("use --nproc-per-node 2") == 2


def test_cpus_of_the_library_and_of_the_file():
    plan = make_plan(("a", "t4-16g"), ("a", "epyc-7742-256g"))
    assert [device.is_card for device in planned_devices(plan)] == [True, False]
    assert take_seats(launched(("x", 2), cards=((T4,),)), plan, True) == [(0, 0), (1, None)]
