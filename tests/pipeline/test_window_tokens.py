"""Tokens of pipelines whose layers keep a window are those of transformers.

Prompts, chunks and outputs are several times as long as the windows. `tests/unit/test_rings.py`
checks the cache alone.
"""

from functools import cache

import pytest
import torch
from families import TinyModel, build_from, config_of, generate_locally, own_tokens

from llmpq.plan_data import Plan
from llmpq.prompts.request import Request

WINDOW, CHUNK = 5, 16
SLIDING, FULL = "sliding_attention", "full_attention"
# Settings of each family; layers with a window and without take turns where it can have both.
CASES = {
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW},
    "gemma3": {"sliding_window": WINDOW, "layer_types": [SLIDING, SLIDING, FULL, SLIDING]},
    "gpt_oss": {"sliding_window": WINDOW},
    "llama4": {"attention_chunk_size": WINDOW},
    "mixtral": {"sliding_window": WINDOW},
}
PROMPTS, NEW_TOKENS = (41, 1, 33, 5, 6, 26, 12, 17), (21, 13, 24, 7)
LONGEST = {"prompt": max(PROMPTS), "new": max(NEW_TOKENS)}
CUTS = ([4], [1, 4], [1, 2, 3, 4])


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """family -> its tiny model with such windows, and requests that are far longer."""

    def make(family: str) -> TinyModel:
        config = config_of(family)
        for name, value in CASES[family].items():
            setattr(config, name, value)
        model, folder = build_from(config), tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        generator = torch.Generator().manual_seed(2)
        requests = [
            Request(i, i, tuple(torch.randint(3, 97, (n,), generator=generator).tolist()), new)
            for i, n in enumerate(PROMPTS)
            for new in [NEW_TOKENS[i % len(NEW_TOKENS)]]
        ]
        tiny = TinyModel(folder, requests, frozenset())
        tiny.expected = {r.id: own_tokens(model, r, tiny.eos_ids) for r in requests}
        return tiny

    return cache(make)


every_family = pytest.mark.parametrize("family", CASES)


@every_family
def test_windows_of_the_spec_are_those_of_the_settings(windowed, family):
    windows = windowed(family).spec.windows
    assert set(windows) <= {WINDOW, None} and WINDOW in windows
    assert (None in windows) == (family not in ("mistral", "mixtral"))


@every_family
def test_tokens_are_those_of_transformers_for_any_number_of_stages(windowed, family):
    model = windowed(family)
    for ends in CUTS:
        assert model.generate(ends, **LONGEST) == model.expected, ends


@every_family
def test_tokens_do_not_depend_on_micro_batches_refill_or_chunks(windowed, family):
    model = windowed(family)
    for how in ({}, {"refill": False}, {"chunk": CHUNK}, {"chunk": CHUNK, "refill": False}):
        found = model.generate([2, 4], batch=6, p=3, q=2, how=how, **LONGEST)
        assert found == model.expected, how
    assert model.generate([4], batch=1, p=1, q=1, **LONGEST) == model.expected


@every_family
def test_tokens_do_not_depend_on_lanes(windowed, family):
    """Some lanes are so short that their slots keep all tokens; long chunks end in them too."""
    model = windowed(family)
    lanes = [{"rows": 2, "tokens": 66}, {"rows": 3, "tokens": 14}, {"rows": 1, "tokens": 40}]
    data = model.plan([1, 4], batch=6, **LONGEST).model_dump() | {
        "lanes": lanes,
        "chunk_tokens": 23,
    }
    plan = Plan.model_validate(data)
    assert generate_locally(plan, model.folder, model.requests) == model.expected


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_a_plan_that_knows_of_no_windows_runs(windowed, family):
    """As plans of older versions do: they have reserved more."""
    model = windowed(family)
    data = model.plan([2, 4], **LONGEST).model_dump()
    plan = Plan.model_validate(data | {"model": model.spec.without_windows().model_dump()})
    assert generate_locally(plan, model.folder, model.requests) == model.expected
