"""The command that starts a plan, for each node: what `llmpq-plan` and a dry run print.

On one node `llmpq-run` starts its own workers, which meet where no other machine reaches them;
torchrun listens on all interfaces, whatever address it is given. On several nodes that of the first
stage comes first: torchrun meets there, its worker leads, and so the prompts are read and the
results written on that machine. The plan and the model must be on every machine.
"""

import shlex
from collections.abc import Sequence

from llmpq.plan_data import Plan
from llmpq.seats import nodes_of

PORT = 29500  # torchrun's own default


def launch_lines(plan: Plan, files: Sequence[str]) -> list[str]:
    """For people: which command to start where. `files`: the options of llmpq-run."""
    parts = nodes_of(plan)
    if len(parts) == 1:
        return [f"start: {shlex.join(['llmpq-run', *files])}"]
    words = shlex.join(["-m", "llmpq.run", *files])
    host = host_variable(plan)
    lines = [
        f"start one command on each of {len(parts)} nodes; {host}: the name or address of "
        f"{parts[0].name} as the others reach it. Plan and model must be on every node; prompts "
        f"are read and results written on {parts[0].name}, where the first stage is"
    ]
    for number, part in enumerate(parts):
        meet = f"--master-addr ${host} --master-port {PORT}"
        count = f"--nnodes {len(parts)} --node-rank {number} --nproc-per-node {len(part.workers)}"
        lines.append(f"on {part.name}: torchrun {count} {meet} {words}")
    lines.append(
        "workers communicate over the network interface that reaches that address; to use another, "
        "set GLOO_SOCKET_IFNAME=NAME NCCL_SOCKET_IFNAME=NAME before torchrun. Anyone who can reach "
        f"port {PORT} and those of the workers can disturb the run: use trusted networks only"
    )
    return lines


def host_variable(plan: Plan) -> str:
    """The placeholder for the address of the leader's node, a variable of the shell."""
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in plan.stages[0].node)
    return f"{name.upper()}_ADDRESS" if name[0].isalpha() else f"NODE_{name.upper()}_ADDRESS"
