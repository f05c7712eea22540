"""What a stage holds is what the planner's memory model says."""

import pytest
import torch
from families import CPU, FAMILIES, hand_made_plan

from llmpq.costs.memory import run_sizes, stage_memory
from llmpq.models.stage_model import load_config
from llmpq.quant import available_precisions, machine_here
from llmpq.runtime.checkpoint import Checkpoint
from llmpq.runtime.engine import Engine
from llmpq.runtime.transport import LocalHub, LocalTransport
from llmpq.workload import request_lengths

# (batch, p, q, prompt, new)
SHAPES = [(8, 1, 8, 24, 12), (16, 16, 16, 48, 4), (4, 2, 1, 100, 20), (6, 3, 6, 2, 30)]
# Predicted activations are at most this many times the measured: a family's table has what any of
# its variants has alive (masks of sliding windows, GPT-NeoX without parallel residuals).
TIGHTEST = 1.25


def accounts(model, plan):
    """(what the engine accounts for, what the planner predicts) of every stage."""
    config, weights = load_config(model.folder), Checkpoint(model.folder)
    hub, lengths = LocalHub(len(plan.stages)), request_lengths(plan.workload)
    micro_batches = plan.prefill_micro_batch, plan.decode_micro_batch
    sizes = run_sizes(lengths, plan.batch, *micro_batches, len(plan.stages))
    for rank, stage in enumerate(plan.stages):
        transport = LocalTransport(rank, hub)
        engine = Engine(plan, config, weights, transport, torch.bfloat16, CPU, rehearse=False)
        predicted = stage_memory(
            plan.model,
            stage.precisions,
            first=rank == 0,
            last=rank == len(plan.stages) - 1,
            sizes=sizes,
            machine=machine_here(CPU, torch.bfloat16),
        )
        yield engine.account, predicted


def plans(model, shapes=SHAPES):
    """Each shape at a precision of its own: first, middle and last stages, one of all layers."""
    last = model.num_layers
    offered = [p for p in ("16", "8", "4", "3") if p in available_precisions(CPU, torch.bfloat16)]
    for index, (batch, p, q, prompt, new) in enumerate(shapes):
        for shift, ends in enumerate(([1, last - 1, last], [last])):
            precision = offered[(index + shift) % len(offered)]
            sizes = {"batch": batch, "p": p, "q": q, "prompt": prompt, "new": new}
            yield hand_made_plan(model.spec, ends, precision, **sizes)


@pytest.mark.parametrize("name", ["tiny-tales", *FAMILIES])
def test_memory_is_what_the_planner_predicts(name, family_model, tiny_tales, record_property):
    model = tiny_tales if name == "tiny-tales" else family_model(name)
    ratios = []
    for plan in plans(model):
        for held, predicted in accounts(model, plan):
            assert held.weights == predicted.weights
            assert held.cache == predicted.cache
            ratios.append(held.activations / predicted.activations)
    record_property("ratios", (min(ratios), max(ratios)))
    print(f"{name}: measured / predicted activations {min(ratios):.2f} .. {max(ratios):.2f}")
    assert max(ratios) <= 1
    assert min(ratios) >= 1 / TIGHTEST
