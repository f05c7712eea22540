"""Several hosts, each with a network and a name of its own: the printed commands run as they are.

The leader's node is not the first of the cluster, and a node's stages do not follow each other.
"""

import json
import time

import pytest
from families import TINY_TALES, hand_made_plan
from hosts import Host, hosts, why_not
from jobs import PATIENCE_S

from llmpq.artifact import write_json
from llmpq.launch import launch_lines
from llmpq.model_lookup import load_model_spec
from llmpq.plan_data import Plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NODES = ("b", "a", "c", "b")  # of the stages
SLOW = {"rehearse": {"t4-16g": {"slowdown": 10, "memory_mib": 1000}}}


@pytest.fixture
def machines():
    if why := why_not():
        pytest.skip(why)
    with hosts(sorted(set(NODES))) as found:
        yield {host.name: host for host in found}


def make_plan(job, nodes=NODES, **more) -> Plan:
    """A stage for each of `nodes`."""
    ends = [8 * (rank + 1) // len(nodes) for rank in range(len(nodes))]
    plan = hand_made_plan(load_model_spec(str(TINY_TALES)), ends, new=20).model_dump()
    for stage, node in zip(plan["stages"], nodes, strict=True):
        stage["node"] = node
    group = {"type": "t4-16g", "count": 2}
    plan["cluster"]["nodes"] = [{"name": name, "devices": [group]} for name in sorted(set(nodes))]
    plan["cluster"] |= more
    found = Plan.model_validate(plan)
    write_json(job.folder / "plan.json", found)
    return found


def start(machines: dict[str, Host], job, plan: Plan) -> dict:
    """Every node's command, as it is printed."""
    files = job.command([], job.folder / "plan.json")
    printed = [line for line in launch_lines(plan, files) if line.startswith("on ")]
    commands = dict(line.removeprefix("on ").split(": ", 1) for line in printed)
    lead = machines[plan.stages[0].node]
    return {name: machines[name].start(text, lead, job.folder) for name, text in commands.items()}


def end(processes: dict) -> None:
    for process in processes.values():
        process.terminate()
    for process in processes.values():
        process.wait(PATIENCE_S)


def said(job, name: str) -> str:
    return (job.folder / f"{name}.log").read_text()


def test_tokens_are_those_of_one_process(machines, job, expected):
    processes = start(machines, job, make_plan(job))
    try:
        codes = {name: process.wait(PATIENCE_S) for name, process in processes.items()}
    finally:
        end(processes)
    assert codes == {"a": 0, "b": 0, "c": 0}, {name: said(job, name) for name in codes}
    assert job.results() == expected
    report = json.loads(job.report.read_text())
    assert [stage["node"] for stage in report["plan"]["stages"]] == list(NODES)
    assert "new tokens in" in said(job, "b") and "new tokens in" not in said(job, "a")


def test_a_host_that_is_cut_off_is_noticed(machines, job):
    processes = start(machines, job, make_plan(job, ("b", "c"), **SLOW))
    try:
        limit = time.monotonic() + PATIENCE_S
        while not job.output.exists() or not job.output.read_text():
            assert time.monotonic() < limit, said(job, "b")
            assert processes["b"].poll() is None, said(job, "b")
            time.sleep(0.05)
        machines["c"].cut()
        assert processes["b"].wait(PATIENCE_S) != 0
    finally:
        end(processes)
    # torchrun itself ends with 1; the worker's own code is in its summary.
    assert "(t4-16g on c, host c" in said(job, "b") and "no sign of life" in said(job, "b")
    assert "exitcode  : 4" in said(job, "b")


def test_links_are_measured_between_hosts(machines, job):
    limited = machines["a"].limit("100mbit")
    meet = f"--nnodes 2 --nproc-per-node 1 --master-addr {machines['b'].address}"
    links = "-m llmpq.cli.profile links --budget-s 2 -o links.json"
    processes = {
        name: machines[name].start(
            f"torchrun {meet} --master-port 29500 --node-rank {number} {links}",
            machines["b"],
            job.folder,
        )
        for number, name in enumerate("ba")
    }
    try:
        codes = {name: process.wait(PATIENCE_S) for name, process in processes.items()}
    finally:
        end(processes)
    assert codes == {"a": 0, "b": 0}, {name: said(job, name) for name in codes}
    pairs = json.loads((job.folder / "links.json").read_text())["pairs"]
    assert {(pair["source_node"], pair["destination_node"]) for pair in pairs} == {
        ("b", "a"),
        ("a", "b"),
    }
    if limited:  # what the kernel lets through, and no more
        rate = next(p["bandwidth_gbs"] for p in pairs if p["source_node"] == "a")
        assert rate < 2 * 0.0125
