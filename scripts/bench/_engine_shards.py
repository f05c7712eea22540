"""Two stages of two devices each against one stage of one device: the same tokens, greedy, in fp32.

At every precision and at a mix of them: the shards of a quantized layer must serve the very weights
that one device serves.
"""

from collections.abc import Sequence
from typing import Any

from _common import Check
from _engine_common import (
    CommandError,
    Outcome,
    Part,
    Rows,
    Settings,
    Sizes,
    Target,
    hand_plan,
    run_plan,
    say,
)
from _engine_tokens import first_difference

from llmpq.model_lookup import load_model_spec
from llmpq.prompts.request import Request

SAME = Target("8: requests that 2 x 2 devices answer otherwise than one device", "requests", "0")
MODEL = "tale-llama-11m"
MIXED = ("16", "8", "4", "3")
NUM_REQUESTS, MOST_TOKENS = 48, 512
QUICK_REQUESTS, QUICK_TOKENS = 8, 48
ALONE = Sizes(stages=1, batch=8, prefill=2, decode=4)
SHARED = Sizes(stages=2, batch=8, prefill=2, decode=4, tensor_parallel=2)


def run(settings: Settings) -> tuple[list[Check], Rows]:
    """Every precision, and the mix."""
    count, most = (QUICK_REQUESTS, QUICK_TOKENS) if settings.quick else (NUM_REQUESTS, MOST_TOKENS)
    requests = settings.requests(MODEL, count, most)
    cases = [MIXED] if settings.quick else [*((precision,) for precision in MIXED), MIXED]
    rows = [compare(settings, requests, case) for case in cases]
    failed = [row["failed"] for row in rows if "failed" in row]
    if failed:
        return [SAME.unknown(failed[0])], rows
    wrong = sum(len(row["different"]) for row in rows)
    return [SAME.check(wrong, wrong == 0, count * len(cases))], rows


def compare(settings: Settings, requests: Sequence[Request], case: Sequence[str]) -> dict[str, Any]:
    """A row: whose tokens differ, and from where on; or why it could not run."""
    layers = load_model_spec(str(settings.model(MODEL))).num_layers
    precisions = [case[layer % len(case)] for layer in range(layers)]
    row: dict[str, Any] = {"precisions": list(case), "requests": len(requests)}
    try:
        shared, alone = (
            generate(settings, requests, sizes, precisions) for sizes in (SHARED, ALONE)
        )
    except CommandError as error:
        say(f"precisions {', '.join(case)}: {error}")
        return row | {"failed": str(error)}
    different = {
        r.number: first_difference(alone.tokens[r.number], shared.tokens[r.number])
        for r in requests
        if alone.tokens[r.number] != shared.tokens[r.number]
    }
    say(f"precisions {', '.join(case)}: {len(different)} of {len(requests)} differ")
    return row | {"different": different}


def generate(
    settings: Settings, requests: Sequence[Request], sizes: Sizes, precisions: Sequence[str]
) -> Outcome:
    """A run through the command line."""
    plan = hand_plan(settings.model(MODEL), requests, sizes, precisions)
    return run_plan(settings.folder, plan, requests, "--dtype", "float32")


PART = Part((SAME,), run, needs_data=True)
