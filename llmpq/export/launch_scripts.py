"""The files that start vLLM for a plan: run.sh on one machine, ray.sh on several, engine.json.

The functions return texts. Every word of the plan that a shell reads is quoted.
"""

import json
import shlex
from collections import Counter

from llmpq.plan_data import Plan
from llmpq.vllm_settings import VllmSettings
from llmpq.vllm_support import VLLM
from llmpq.workload import planned_lengths

RAY_PORT = 6379  # Ray's own default
WHERE = f"in an environment with vLLM (checked with {VLLM})"
NODE_SHARE = 0.001  # of a node's marker resource, which each worker on it takes

HEADER = """\
#!/usr/bin/env bash
# {what}
# Written by llmpq-export for the plan in plan.json.
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
"""
CARDS = """\
# Cards in the order of the stages, numbered by PCI bus as cluster.yaml lists those of the node.
# Where nvidia-smi shows another order, set CUDA_VISIBLE_DEVICES yourself.
export CUDA_DEVICE_ORDER=PCI_BUS_ID
export CUDA_VISIBLE_DEVICES="${{CUDA_VISIBLE_DEVICES:-{cards}}}"
"""
CORES = """\
# This machine's cores, in equal parts for the workers.
export VLLM_CPU_OMP_THREADS_BIND="${{VLLM_CPU_OMP_THREADS_BIND:-$(PYTHONPATH="$here" python3 -c \\
    'import batch; print(batch.cores_of_workers({workers}))')}}"
"""
RAY = """\
usage() {{
    echo "on {head}: $0 head" >&2
    echo "on each other node: $0 worker NAME ADDRESS_OF_THE_HEAD   (NAME: {others})" >&2
    echo "then on {head}: $0 batch PROMPTS.jsonl OUT.jsonl" >&2
    exit 2
}}
# The plan's GPUs on a node, their number, and the name by which Ray knows the node.
export CUDA_DEVICE_ORDER=PCI_BUS_ID
describe() {{
    case "$1" in
{nodes}        *) usage ;;
    esac
}}
case "${{1:-}}" in
    head)
        describe {head_word}
        export CUDA_VISIBLE_DEVICES="${{CUDA_VISIBLE_DEVICES:-$cards}}"
        exec ray start --head --port {port} --num-gpus "$gpus" --resources "$resources"
        ;;
    worker)
        [[ $# -eq 3 ]] || usage
        describe "$2"
        export CUDA_VISIBLE_DEVICES="${{CUDA_VISIBLE_DEVICES:-$cards}}"
        exec ray start --address "$3:{port}" --num-gpus "$gpus" --resources "$resources"
        ;;
    batch)
        shift
        exec python "$here/batch.py" --ray "$@"
        ;;
    *) usage ;;
esac
"""


def engine_json(plan: Plan, settings: VllmSettings) -> str:
    """What batch.py reads: vLLM's arguments, variables, and Ray's bundles, one a worker."""
    data = {
        "environment": settings.environment(),
        "engine": settings.engine(),
        "on_cpu": settings.on_cpu,
        "new_tokens": max(new for _, new in planned_lengths(plan.workload)),
        "ray_bundles": ray_bundles(plan),
    }
    return json.dumps(data, indent=1) + "\n"


def ray_bundles(plan: Plan) -> list[dict[str, float]]:
    """The bundles of a Ray placement group: each worker's GPU, on the node of its stage."""
    markers = _markers(plan)
    return [
        {"GPU": 1, markers[stage.node]: NODE_SHARE} for stage in plan.stages for _ in stage.devices
    ]


def _markers(plan: Plan) -> dict[str, str]:
    """Ray's marker resource for each node, in the order of the stages."""
    nodes = dict.fromkeys(stage.node for stage in plan.stages)
    return {node: f"llmpq_node_{number}" for number, node in enumerate(nodes)}


def run_script(plan: Plan, settings: VllmSettings) -> str:
    """run.sh: serves the plan on one machine."""
    parts = [HEADER.format(what="Serves this model with vLLM on one machine: run.sh [OPTIONS]")]
    parts.append(_exports(settings))
    if settings.on_cpu:
        parts.append(CORES.format(workers=len(settings.partition) * settings.tensor_parallel))
    else:
        parts.append(CARDS.format(cards=",".join(map(str, card_numbers(plan)))))
    parts.append(f'exec {serve_command(settings)} "$@"\n')
    return "".join(parts)


def ray_script(plan: Plan, settings: VllmSettings) -> str:
    """ray.sh: starts Ray on each node, and a batch from the first stage's node."""
    counts = Counter(stage.node for stage in plan.stages for _ in stage.devices)
    head, *others = counts
    resources = {n: shlex.quote(json.dumps({name: 1})) for n, name in _markers(plan).items()}
    workers = [stage.node for stage in plan.stages for _ in stage.devices]
    cards = {
        node: ",".join(str(n) for n, own in zip(numbers, workers, strict=True) if own == node)
        for numbers in (card_numbers(plan),)
        for node in counts
    }
    nodes = "".join(
        f"        {shlex.quote(node)}) cards={cards[node]} gpus={count} "
        f"resources={resources[node]} ;;\n"
        for node, count in counts.items()
    )
    script = RAY.format(
        head=_in_quotes(head),
        others=_in_quotes(", ".join(others)),
        nodes=nodes,
        port=RAY_PORT,
        head_word=shlex.quote(head),
    )
    what = "Runs this model with vLLM on several machines that Ray connects."
    return HEADER.format(what=what) + _exports(settings) + script


def serve_command(settings: VllmSettings) -> str:
    """`vllm serve` with the options of the plan, for the folder that the script lies in."""
    words = []
    for name, value in settings.engine().items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return f'vllm serve "$here" {shlex.join(words)}'


def card_numbers(plan: Plan) -> list[int]:
    """For each worker, the number of its card on its node: by the order in the cluster file."""
    free = {
        node.name: [
            group.type
            for group in node.devices
            for _ in range(group.count)
            if plan.cluster.kind_of(group.type) == "gpu"
        ]
        for node in plan.cluster.nodes
    }
    numbers: list[int] = []
    for stage in plan.stages:
        for device in stage.devices:
            number = free[stage.node].index(device)
            free[stage.node][number] = ""  # taken
            numbers.append(number)
    return numbers


def next_steps(plan: Plan, folder: str) -> list[str]:
    """What a user runs next, in words and commands."""
    nodes = list(dict.fromkeys(stage.node for stage in plan.stages))
    batch = shlex.join(["python", f"{folder}/batch.py", "prompts.jsonl", "out.jsonl"])
    if len(nodes) == 1:
        serve = shlex.join(["bash", f"{folder}/run.sh"])
        return [f"{WHERE}:", f"a batch: {batch}", f"a server: {serve}"]
    ray = shlex.join(["bash", f"{folder}/ray.sh"])
    workers = [f"on {node}: {ray} worker {shlex.quote(node)} ADDRESS" for node in nodes[1:]]
    copy = f"copy {folder} to the same path on {', '.join(nodes)}, and {WHERE} run"
    batch = f"{ray} batch prompts.jsonl out.jsonl"
    return [copy, f"on {nodes[0]}: {ray} head", *workers, f"then on {nodes[0]}: {batch}"]


def _exports(settings: VllmSettings) -> str:
    return "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in settings.environment().items()
    )


def _in_quotes(text: str) -> str:
    """A text between double quotes of a shell."""
    return "".join(f"\\{c}" if c in '"\\$`' else c for c in text)
