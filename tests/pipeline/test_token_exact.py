"""The pipeline generates the tokens that transformers itself generates, however it is cut.

In fp32 whatever shares a micro-batch. In bf16 sums depend on that in their last bits, so there
batches are kept together (`refill` off), and the tokens of other cuts are the same.
"""

import pytest
import torch
from families import CPU, FAMILIES, MAX_NEW, WITH_EXPERTS, config_of, generate_locally

from llmpq.families import TESTED
from llmpq.plan_data import Plan
from llmpq.quant import available_precisions
from llmpq.runtime.sampler import Sampling

CUTS = ([4], [1, 4], [1, 2, 3, 4])
MICRO_BATCHES = [
    {"batch": 16, "p": 16, "q": 16},
    {"batch": 16, "p": 5, "q": 1},
    {"batch": 7, "p": 2, "q": 3},  # batches of 7, 7 and 2
    {"batch": 1, "p": 1, "q": 1},
]
EXPERTS_BATCHES = (MICRO_BATCHES[1], MICRO_BATCHES[3])
TOGETHER = {"refill": False}
every_family = pytest.mark.parametrize("family", FAMILIES)


def test_every_family_that_is_called_tested_is_tested_here():
    assert {config_of(family).model_type for family in FAMILIES} == TESTED


@every_family
def test_fp32_tokens_are_those_of_transformers(family_model, family):
    model = family_model(family)
    for ends in CUTS:
        assert model.generate(ends) == model.expected, ends


@every_family
def test_some_requests_meet_the_end_of_text(family_model, family):
    model = family_model(family)
    stopped = [r.id for r in model.requests if model.expected[r.id][-1] in model.eos_ids]
    assert 0 in stopped and len(stopped) < len(model.requests)
    assert len(model.expected[0]) < MAX_NEW


@every_family
def test_bf16_tokens_do_not_depend_on_the_number_of_stages(family_model, family):
    model = family_model(family)
    one, *others = (model.generate(ends, dtype=torch.bfloat16, how=TOGETHER) for ends in CUTS)
    assert set(one) == {r.id for r in model.requests}
    assert others == [one, one]


@every_family
def test_mixed_precisions_give_the_same_tokens_for_one_and_three_stages(family_model, family):
    model = family_model(family)
    mixed = ["16", "8", "4", "3"]
    one, three = (
        model.generate(ends, mixed, dtype=torch.bfloat16, how=TOGETHER) for ends in ([4], [1, 3, 4])
    )
    assert one == three


# Of each layer, with the experts at a precision of their own.
OF_EXPERTS = (["8+experts@4"] * 4, ["16+experts@3", "8", "4+experts@8", "8+experts@4"])


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_precisions_of_experts_give_the_same_tokens_for_any_number_of_stages(family_model, family):
    model = family_model(family)
    for mixed in OF_EXPERTS:
        one, *others = (
            model.generate(ends, mixed, dtype=torch.bfloat16, how=TOGETHER) for ends in CUTS
        )
        assert others == [one, one], mixed


@pytest.mark.parametrize("family", ["opt", "bloom", "llama"])
def test_eight_bit_activations_give_the_same_tokens_for_one_and_three_stages(family_model, family):
    if "8-w8a8" not in available_precisions(CPU, torch.bfloat16):
        pytest.skip("8-w8a8 is not available on this CPU")
    model = family_model(family)
    mixed = ["8-w8a8", "16", "8-w8a8", "4"]
    one, three = (
        model.generate(ends, mixed, dtype=torch.bfloat16, how=TOGETHER) for ends in ([4], [1, 3, 4])
    )
    assert one == three


@pytest.mark.parametrize(
    ("family", "sizes"),
    [(family, sizes) for family in ("opt", "bloom", "llama", "gemma2") for sizes in MICRO_BATCHES]
    + [(family, sizes) for family in ("deepseek_v3", *WITH_EXPERTS) for sizes in EXPERTS_BATCHES],
    ids=str,
)
def test_fp32_tokens_do_not_depend_on_micro_batches(family_model, family, sizes):
    model = family_model(family)
    for ends in ([4], [2, 4]):
        assert model.generate(ends, **sizes) == model.expected, ends


@pytest.mark.parametrize(
    "family", ["opt", "bloom", "llama", "mistral", "gemma2", "deepseek_v3", *WITH_EXPERTS]
)
def test_fp32_tokens_do_not_depend_on_refill_or_chunks(family_model, family):
    model = family_model(family)
    for how in ({"refill": False}, {"chunk": 16}, {"chunk": 16, "refill": False}):
        for ends in ([4], [1, 4]):
            assert model.generate(ends, batch=6, p=3, q=2, how=how) == model.expected, (ends, how)


# Chunks and lanes of a plan that somebody edited: shorter and longer ones than the workload's.
EDITED = [
    {"chunk_tokens": 5},
    {"chunk_tokens": 23, "lanes": [(5, 36), (2, 20), (1, 36)]},
    {"chunk_tokens": 1000, "lanes": [(1, 40), (4, 24), (3, 12)]},
    {"lanes": [(3, 9), (5, 12)]},  # of as many tokens as two of the longest requests
]


@pytest.mark.parametrize("changes", EDITED, ids=str)
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_fp32_tokens_do_not_depend_on_the_plans_chunk_and_lanes(family_model, family, changes):
    model = family_model(family)
    for ends in ([4], [1, 4]):
        data = model.plan(ends).model_dump() | changes
        data["lanes"] = [
            {"rows": rows, "tokens": tokens} for rows, tokens in changes.get("lanes", [])
        ] or None
        plan = Plan.model_validate(data)
        found = generate_locally(plan, model.folder, model.requests, eos_ids=model.eos_ids)
        assert found == model.expected, ends


@pytest.mark.parametrize("family", ["bloom", "llama", "mistral"])
def test_sampled_tokens_do_not_depend_on_stages_or_micro_batches(family_model, family):
    model = family_model(family)
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=7)
    first = model.generate([4], sampling=sampling)
    assert first != model.expected
    assert first != model.generate([4], sampling=Sampling(0.8, 20, 0.9, seed=8))
    for ends, sizes in zip(([1, 4], [1, 2, 3, 4], [3, 4]), MICRO_BATCHES, strict=False):
        assert model.generate(ends, sampling=sampling, **sizes) == first, (ends, sizes)


def test_requests_that_are_drawn_in_ways_of_their_own(family_model):
    """Greedy ones stay so, others get what they get where all are drawn so, however they share."""
    model = family_model("llama")
    ways = [Sampling(), Sampling(0.8, 20, 0.9, 7), Sampling(1.5, seed=3, own_seed=True)]
    samplings = [ways[request.number % 3] for request in model.requests]
    uniform = [model.generate([4], sampling=way) for way in ways]
    expected = {r.id: uniform[r.number % 3][r.id] for r in model.requests}
    assert all(expected[i] == model.expected[i] for i in expected if i % 3 == 0)
    assert any(expected[i] != model.expected[i] for i in expected)
    how = {"samplings": samplings}
    for ends, sizes in zip(([4], [1, 4], [1, 2, 3, 4]), MICRO_BATCHES, strict=False):
        assert model.generate(ends, how=how, **sizes) == expected, (ends, sizes)


def test_tiny_tales_generates_what_transformers_does(tiny_tales):
    for ends in ([8], [3, 8], [1, 3, 6, 8]):
        assert tiny_tales.generate(ends, new=20) == tiny_tales.expected, ends


@pytest.mark.parametrize("name", ["tale-llama-11m", "stories-260k"])
def test_shared_models_generate_what_transformers_does(shared_model, name):
    model = shared_model(name)
    last = model.num_layers
    for ends in ([last], [2, last], [1, 2, 4, last]):
        assert model.generate(ends, new=20) == model.expected, ends


def test_no_requests_end_at_once(family_model):
    model = family_model("llama")
    assert generate_locally(model.plan([1, 4]), model.folder, []) == {}


def test_prompts_longer_than_planned_run_in_smaller_batches(family_model):
    model = family_model("llama")
    assert model.generate([1, 4], batch=8, prompt=6, new=4) == model.expected
