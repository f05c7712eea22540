"""The commands that start a plan: one for one node, else one for each, the leader's first."""

import shlex

from test_seats import make_plan

from llmpq.launch import host_variable, launch_lines

FILES = ["--plan", "my plan.json", "--output", "out.jsonl"]


def test_one_node_needs_one_command():
    (line,) = launch_lines(make_plan(("a", "t4-16g"), ("a", "v100-32g")), FILES)
    assert line == ("start: llmpq-run --plan 'my plan.json' --output out.jsonl")
    assert shlex.split(line)[-4:] == FILES


def test_a_command_for_each_node_in_the_order_of_the_stages():
    plan = make_plan(("gpu-2", "t4-16g"), ("a", "t4-16g"), ("gpu-2", "t4-16g"))
    lines = launch_lines(plan, FILES)
    meet = "--master-addr $GPU_2_ADDRESS --master-port 29500 -m llmpq.run"
    assert f"on gpu-2: torchrun --nnodes 2 --node-rank 0 --nproc-per-node 2 {meet}" in lines[1]
    assert f"on a: torchrun --nnodes 2 --node-rank 1 --nproc-per-node 1 {meet}" in lines[2]
    assert "results written on gpu-2" in lines[0] and "GPU_2_ADDRESS" in lines[0]
    assert "GLOO_SOCKET_IFNAME" in lines[3]


def test_placeholders_are_names_of_variables():
    assert host_variable(make_plan(("4x-t4.lab", "t4-16g"))) == "NODE_4X_T4_LAB_ADDRESS"
