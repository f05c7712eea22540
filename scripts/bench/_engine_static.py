"""llmpq on one device against static batching of transformers: same model, requests and cores.

16 bits (bf16) on both sides, greedy, every request generates all its tokens. transformers' own
`generate` gets batches sorted by prompt length, by new tokens or by their sum, whatever batch size
is fastest, padding on the left; a batch runs until its longest request has ended, and tokens beyond
a request's own limit do not count. llmpq's sizes are tuned on the same requests too. Loading is
counted on neither side, turning tokens into text on both. Then the best of both in turn.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _common import Check
from _engine_common import Part, Rows, Settings, Sizes, Target, hand_plan, run_plan, say, threads
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.models.stage_model import load_config
from llmpq.prompts.request import Request
from llmpq.prompts.tokenizer import load_tokenizer
from llmpq.runtime.engine import StageEngine
from llmpq.runtime.transport import LocalHub, LocalTransport

FASTER = Target("3: throughput over transformers with its best static batches", "x", ">= 1.3")
MODEL = "tale-llama-11m"
DTYPE = torch.bfloat16
CPU = torch.device("cpu")
PROFILED_REQUESTS = 64
LINEARS = ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul", "mkldnn", "onednn")
ATTENTION = ("attention", "aten::bmm", "aten::baddbmm", "softmax")

Batches = list[list[Request]]
Order = Callable[[Request], tuple[int, ...]]
ORDERS: dict[str, Order] = {
    "prompt": lambda request: (len(request.prompt), request.new_tokens),
    "new tokens": lambda request: (request.new_tokens, len(request.prompt)),
    "sum": lambda request: (len(request.prompt) + request.new_tokens,),
}


@dataclass(frozen=True)
class Scale:
    """How much is run, and what is tried. `most_tokens`: of the longest request."""

    requests: int
    most_tokens: int | None
    rounds: int
    static_sizes: tuple[int, ...]
    orders: tuple[str, ...]
    sizes: tuple[Sizes, ...]


FULL = Scale(
    requests=256,
    most_tokens=None,
    rounds=5,
    static_sizes=(4, 8, 16, 32, 64),
    orders=("prompt", "new tokens", "sum"),
    sizes=tuple(
        Sizes(1, batch, prefill, decode)
        for batch, prefill, decode in (
            *((16, 4, 16), (32, 4, 32), (32, 4, 16), (48, 8, 48)),
            *((64, 8, 64), (64, 8, 32), (96, 8, 48), (128, 8, 64)),
        )
    ),
)
QUICK = Scale(24, 96, 1, (8,), ("new tokens",), (Sizes(1, 8, 4, 8),))


@dataclass(frozen=True)
class Timed:
    """One run: tokens that count, a second."""

    name: str
    tokens_per_s: float


def run(settings: Settings) -> tuple[list[Check], Rows]:
    """Tunes both, then runs both in turn; and where a run's time goes."""
    scale = QUICK if settings.quick else FULL
    requests = settings.requests(MODEL, scale.requests, scale.most_tokens)
    with threads(num_threads(settings)):
        theirs, ours = static_runs(settings, scale, requests), own_runs(settings, scale, requests)
        tried = [best_of(runs) for runs in (theirs, ours)]
        best = [runs[chosen[0].name] for runs, chosen in zip((theirs, ours), tried, strict=True)]
        rounds = in_turn(best, scale.rounds)
        fastest = scale.sizes[list(ours).index(tried[1][0].name)]
        shares = where_time_goes(settings, requests[:PROFILED_REQUESTS], fastest)
    speeds = [statistics.median(timed.tokens_per_s for timed in one) for one in rounds]
    ratio = speeds[1] / speeds[0]
    rows = [timed_row(timed, "tuning") for one in tried for timed in one]
    rows += [timed_row(timed, "round") for one in rounds for timed in one]
    return [FASTER.check(ratio, ratio >= 1.3, scale.rounds)], [*rows, shares]


def num_threads(settings: Settings) -> int:
    """All cores; with --quick one, as threads of a busy machine mostly wait for each other."""
    return 1 if settings.quick else len(os.sched_getaffinity(0))


def best_of(runs: dict[str, Callable[[], Timed]]) -> list[Timed]:
    """Each once, the fastest first."""
    return sorted((one() for one in runs.values()), key=lambda timed: -timed.tokens_per_s)


def in_turn(best: Sequence[Callable[[], Timed]], rounds: int) -> list[list[Timed]]:
    """Both, `rounds` times; who is first changes."""
    found: list[list[Timed]] = [[] for _ in best]
    for number in range(rounds):
        for one in (0, 1) if number % 2 == 0 else (1, 0):
            found[one].append(best[one]())
    return found


def timed_row(timed: Timed, what: str) -> dict[str, Any]:
    """A row."""
    return {"run": timed.name, "what": what, "tokens_per_s": timed.tokens_per_s}


# ---- llmpq


def own_runs(
    settings: Settings, scale: Scale, requests: Sequence[Request]
) -> dict[str, Callable[[], Timed]]:
    """One of each size that is tried."""
    return {name_of(s): partial(own_run, settings, requests, s) for s in scale.sizes}


def name_of(sizes: Sizes) -> str:
    """For people."""
    return f"llmpq, batch {sizes.batch}, micro-batches {sizes.prefill} and {sizes.decode}"


def own_run(settings: Settings, requests: Sequence[Request], sizes: Sizes) -> Timed:
    """One stage through the command line."""
    plan = hand_plan(settings.model(MODEL), requests, sizes)
    flags = ["--dtype", "bfloat16", "--ignore-eos"]
    count = num_threads(settings)
    report = run_plan(settings.folder, plan, requests, *flags, threads=count).report
    assert report["num_new_tokens"] == sum(request.new_tokens for request in requests)
    return told(name_of(sizes), float(report["tokens_per_s"]))


def told(name: str, tokens_per_s: float) -> Timed:
    """Says it, too."""
    say(f"{name}: {tokens_per_s:.1f} tokens/s")
    return Timed(name, tokens_per_s)


# ---- transformers


def static_runs(
    settings: Settings, scale: Scale, requests: Sequence[Request]
) -> dict[str, Callable[[], Timed]]:
    """One of each order and batch size that is tried."""
    model = AutoModelForCausalLM.from_pretrained(settings.model(MODEL), dtype=DTYPE)
    model.generation_config.eos_token_id = None  # all tokens are generated
    tokenizer = load_tokenizer(settings.model(MODEL))
    runs: dict[str, Callable[[], Timed]] = {}
    generate_static(model, tokenizer, [list(requests[:2])])  # the first call is slower
    for order in scale.orders:
        for size in scale.static_sizes:
            name = f"transformers, batches of {size} sorted by {order}"
            batches = static_batches(requests, ORDERS[order], size)
            runs[name] = partial(static_run, name, model, tokenizer, batches)
    return runs


def static_batches(requests: Sequence[Request], order: Order, size: int) -> Batches:
    """Sorted, then cut into batches."""
    ranked = sorted(requests, key=order, reverse=True)
    return [ranked[i : i + size] for i in range(0, len(ranked), size)]


def static_run(name: str, model: Any, tokenizer: Any, batches: Batches) -> Timed:
    """All batches, one after the other."""
    start = time.perf_counter()
    generate_static(model, tokenizer, batches)
    seconds = time.perf_counter() - start
    return told(name, sum(r.new_tokens for batch in batches for r in batch) / seconds)


@torch.inference_mode()
def generate_static(model: Any, tokenizer: Any, batches: Batches) -> list[str]:
    """The texts, in the order of the batches."""
    texts = []
    for batch in batches:
        ids, mask = padded(batch)
        steps = max(request.new_tokens for request in batch)
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, pad_token_id=0
        )
        assert output.shape[1] == ids.shape[1] + steps, "it stopped early"
        made = [
            row[: r.new_tokens] for row, r in zip(output[:, ids.shape[1] :], batch, strict=True)
        ]
        texts += tokenizer.batch_decode(made, skip_special_tokens=True)
    return texts


def padded(batch: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[b, S]`, padded on the left, and their mask."""
    longest = max(len(request.prompt) for request in batch)
    gaps = [longest - len(request.prompt) for request in batch]
    ids = [[0] * gap + list(r.prompt) for gap, r in zip(gaps, batch, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    return torch.tensor(ids), torch.tensor(mask)


# ---- where llmpq's time goes


def where_time_goes(
    settings: Settings, requests: Sequence[Request], sizes: Sizes
) -> dict[str, Any]:
    """Percent of a run's time in linears, attention, other operators, and between operators.

    The total is of a run that was not watched; operators are timed in a second run.
    """
    plan = hand_plan(settings.model(MODEL), requests, sizes)
    folder, transport = settings.model(MODEL), LocalTransport(0, LocalHub(1))
    engine = StageEngine(plan, load_config(folder), Checkpoint(folder), transport, DTYPE, CPU)
    lengths = {number: (len(r.prompt), r.new_tokens) for number, r in enumerate(requests)}
    start = time.perf_counter()
    engine.lead(lengths, requests.__getitem__, lambda _: None)
    seconds = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        engine.lead(lengths, requests.__getitem__, lambda _: None)
    times = {"linears": 0.0, "attention": 0.0, "other operators": 0.0}
    for event in watched.key_averages():
        times[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    shares = {kind: 100 * spent / seconds for kind, spent in times.items()}
    rest = 100 - sum(shares.values())
    return {"what": "percent of llmpq's time", "sizes": name_of(sizes), **shares, "python": rest}


def kind_of(operator: str) -> str:
    """The share that an operator's own time belongs to."""
    if any(name in operator for name in ATTENTION):
        return "attention"
    return "linears" if any(name in operator for name in LINEARS) else "other operators"


PART = Part((FASTER,), run, needs_data=True)
