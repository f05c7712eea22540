"""A mixed cluster simulated on one device: llmpq's plan beside plans of other methods.

Three types of device, each a process that computes at the device's speed, then waits until as much
time has passed as if it were `slowdown` times slower, with a cap on its memory. On a card the
processes share it: a process also waits for the others' kernels, so its time is a little long, the
more so the busier they are (at most the sum of 1 / slowdown: 0.66). Model and prompts are random;
on a card the model has the layers of Llama-3.1-8B, twelve of them.

`llmpq-run` itself runs each plan, with processes and files; `endtoend.py` has the plans and runs.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import endtoend
import torch
import yaml
from _engine_common import write_prompts
from _kernels_place import Place
from _kernels_predictions import profiles_as
from _kernels_serving import LLAMA_8B, TINY, Traffic
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from llmpq.cluster import MIB
from llmpq.model_lookup import load_model_spec
from llmpq.models.stage_model import load_config

if TYPE_CHECKING:
    from gpu_steps import Step

METHODS = (endtoend.OURS, "uniform", "pipeedge")
SLOWDOWNS = {"fast": 3, "medium": 5, "slow": 8}
# Of the model's bytes at 16 bits, what each may hold: no device can hold the model alone, and an
# even split does not fit at 16 bits. The small model's cache is large beside its weights.
SHARES = {"cuda": (0.45, 0.35, 0.30), "cpu": (0.50, 0.40, 0.35)}
LINK = {"bandwidth_gbs": 1.0, "latency_us": 800}  # gloo through main memory
MAX_LOSS = "2"  # percent of perplexity, by the built-in prior
NUM_LAYERS = 12
SHARD_BYTES = 4e9


def rehearse(step: "Step") -> None:
    """Plans, and a run of each; a row a method."""
    folder = step.scratch / "cluster"
    folder.mkdir()
    options = prepare(step.place, step.out / "profile.json", folder)
    plans = endtoend.make_plans(options, folder)
    for method in METHODS:
        if method in plans:
            step.attempt(method, partial(_run, step, method, plans[method], options, folder))
        else:
            step.failures.append(f"{method}: no plan fits")


def _run(step: "Step", method: str, plan: Path, options: Any, folder: Path) -> None:
    reports = endtoend.run_in_turn({method: plan}, options, folder, rounds=1)
    (row,) = endtoend.summarise({method: plan}, reports)
    (report,) = reports[method]
    stages = report["plan"]["stages"]
    step.keep(
        {
            "kind": "cluster",
            **row,
            "error_percent": report["error_percent"],
            "layers": [stage["end_layer"] - stage["first_layer"] for stage in stages],
            "devices": [stage["devices"][0] for stage in stages],
            "busy_share": [stage["busy_share"] for stage in report["stages"]],
        }
    )


def prepare(place: Place, profile: Path, folder: Path) -> argparse.Namespace:
    """The files of a rehearsal and the options that name them for `endtoend`."""
    device = place.device.type
    traffic = _traffic(place, folder)
    names = {name: folder / f"{name}.yaml" for name in ("cluster", "workload")}
    names["cluster"].write_text(yaml.safe_dump(_cluster(traffic, SHARES[device])))
    names["workload"].write_text(yaml.safe_dump(traffic.workload()))
    prompts = write_prompts(folder / "prompts.jsonl", traffic.requests())
    profiles = profiles_as(device, profile, folder)
    return argparse.Namespace(
        **names,
        device=device,
        quick=True,
        model=Path(traffic.model),
        prompts=prompts,
        profiles=profiles,
        max_quality_loss=MAX_LOSS,
    )


def _traffic(place: Place, folder: Path) -> Traffic:
    if not place.on_card:
        return Traffic(TINY.model, 24, 12, 12, 6)
    model = folder / "model"
    write_random_model(Path(LLAMA_8B.model), NUM_LAYERS, model, place)
    return Traffic(str(model), 256, 48, 32, 16)


def _cluster(traffic: Traffic, shares: tuple[float, ...]) -> dict[str, Any]:
    """cluster.yaml of the three types, one device of each."""
    spec = load_model_spec(traffic.model)
    ends = spec.embedding_params + spec.head_params
    mib = 2 * (spec.num_layers * spec.layer_params + ends) / MIB
    return {
        "name": "rehearsed",
        "nodes": [
            {"name": "here", "devices": [{"type": name} for name in SLOWDOWNS], "link": LINK}
        ],
        "rehearse": {
            name: {"slowdown": slowdown, "memory_mib": round(share * mib, 2)}
            for (name, slowdown), share in zip(SLOWDOWNS.items(), shares, strict=True)
        },
    }


def write_random_model(config: Path, num_layers: int, folder: Path, place: Place) -> None:
    """A checkpoint of random weights with the shapes of a config.json, cut to some layers."""
    folder.mkdir()
    data = json.loads(config.read_text()) | {"num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(data))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(folder), dtype=place.dtype)
    torch.manual_seed(0)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(index.values())):05d}.safetensors"
        save_file(shard, folder / name)
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, empty in model.state_dict().items():
        drawn = torch.randn(empty.shape, device=place.device).mul_(0.02)
        values = torch.ones(empty.shape) if empty.dim() == 1 else drawn
        shard[name] = values.to("cpu", place.dtype)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
