"""Random rigs for the planner: 1 to 3 nodes of 1 to 4 cards, slow and fast links, seven models.

A rig is drawn again where the 3-bit model would not fit into seven eighths of the cards' memory, or
where the cards could hold it at 16 bits several times over: neither is a question for a planner.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmpq.cluster import Cluster
from llmpq.costs.latency import device_times
from llmpq.costs.quality import prior_quality
from llmpq.devices import device_library
from llmpq.model_spec import load_model_spec
from llmpq.planner.problem import Problem
from llmpq.workload import Workload, request_lengths

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GIB = 2**30
TYPES = (
    "t4-16g",
    "v100-16g",
    "v100-32g",
    "p100-16g",
    "a100-40g",
    "a100-80g",
    "a10-24g",
    "l4-24g",
    "rtx3090-24g",
    "rtx4090-24g",
    "rtx3060-12g",
    "rtx4060ti-16g",
    "a6000-48g",
    "h100-80g",
)
MODELS = (
    "llama-3.1-8b",
    "opt-13b",
    "qwen2.5-14b",
    "opt-30b",
    "qwen2.5-32b",
    "opt-66b",
    "llama-3.3-70b",
)
COUNTS = (64, 200, 1_000, 5_000, 20_000, 200_000)
PRECISIONS = ("16", "8", "4", "3")


@dataclass(frozen=True)
class Rig:
    """A problem with a name that says what is in it."""

    name: str
    problem: Problem


def rigs(count: int, seed: int = 0) -> Iterator[Rig]:
    """The same ones for the same seed."""
    draw = random.Random(seed)
    for number in range(count):
        while (rig := _rig(draw, number)) is None:
            pass
        yield rig


def _rig(draw: random.Random, number: int) -> Rig | None:
    cluster, model = _cluster(draw), draw.choice(MODELS)
    spec = load_model_spec(str(CONFIGS / "models" / f"{model}.json"))
    workload, budget = _workload(draw), draw.choice((0.5, 1.0, 2.0, 3.0))
    devices = cluster.devices()
    room = sum(device.memory_bytes for device in devices)
    weights = sum(op.out_features * op.in_features for op in spec.linears) * spec.num_layers
    if not weights * 3 / 8 * 8 / 7 < room < weights * 2 * 4:
        return None
    quality = prior_quality(spec.num_layers)
    problem = Problem(
        spec=spec,
        cluster=cluster,
        workload=workload,
        lengths=tuple(request_lengths(workload)),
        times={d.type: device_times(cluster, d.type, spec, []) for d in devices},
        quality=quality,
        precisions=PRECISIONS,
        budget=quality.budget(budget),
    )
    cards = "+".join(d.type.split("-")[0] for d in devices)
    return Rig(f"{number}: {cards} {model} {workload.name} {budget} %", problem)


def _cluster(draw: random.Random) -> Cluster:
    types = draw.sample(TYPES, draw.randint(1, 3))
    nodes = []
    for index in range(draw.randint(1, 3)):
        groups: dict[str, int] = {}
        for _ in range(draw.randint(1, 4)):
            name = draw.choice(types)
            groups[name] = groups.get(name, 0) + 1
        devices = [{"type": name, "count": n} for name, n in groups.items()]
        nodes.append({"name": f"node{index}", "devices": devices})
    gigabits = draw.choice((1, 10, 25, 100, 200))
    link = {"bandwidth_gbs": gigabits / 8, "latency_us": 50}
    return Cluster.model_validate({"nodes": nodes, "link": link})


def _workload(draw: random.Random) -> Workload:
    count = draw.choice(COUNTS)
    kind = draw.choice(("fixed", "range", "trace"))
    prompt, new = draw.choice((64, 256, 512, 1024)), draw.choice((16, 64, 128, 400))
    if kind == "fixed":
        lengths: tuple[object, object] = prompt, new
    elif kind == "range":
        lengths = {"min": prompt // 4, "max": 2 * prompt}, {"min": max(1, new // 4), "max": 2 * new}
    else:
        lengths = _skewed(draw, prompt), _skewed(draw, new)
    return Workload.model_validate(
        {
            "name": f"{kind} {prompt}+{new} x {count}",
            "prompt_tokens": lengths[0],
            "new_tokens": lengths[1],
            "num_requests": count,
        }
    )


def _skewed(draw: random.Random, mean: int) -> list[int]:
    """As in traces of chats: most are short and a few are long."""
    return [max(1, min(6 * mean, round(draw.lognormvariate(0, 0.8) * mean))) for _ in range(997)]


def known_types() -> list[str]:
    """Types of the list above that the device library lacks; none, or the list is wrong."""
    return [name for name in TYPES if name not in device_library()]
