"""Every request's tokens against those of transformers on its prompt alone, greedy, in fp32.

Over several cuts, micro-batches and prefill chunks: by real processes through the command line, and
by threads of this process, which allow more of them. Where tokens differ, the gap between the two
best logits at the first difference is told: fp32 sums depend on what shares a micro-batch in their
last bits, so a gap of about that size is a tie.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _common import Check
from _engine_common import Part, Rows, Settings, Sizes, Target, hand_plan, run_plan, say, threads
from transformers import AutoModelForCausalLM

from llmpq.models.stage_model import load_config
from llmpq.prompts.request import Request
from llmpq.prompts.tokenizer import end_tokens
from llmpq.runtime.local import LocalStages

SAME = Target("1: requests whose tokens are not those of transformers alone", "requests", "0")
NUM_REQUESTS = 500
QUICK_REQUESTS, QUICK_TOKENS = 12, 96
TIE = 1e-4  # of logits; fp32 sums of these models are good to about 1e-5
CHUNK = 16  # requests whose reference is asked for at once


@dataclass(frozen=True)
class Way:
    """One way to run the requests. `chunk`: tokens of a prompt at once, if not as planned."""

    sizes: Sizes
    chunk: int | None = None
    refill: bool = True
    is_local: bool = False  # threads of this process

    def told(self) -> dict[str, Any]:
        """For a row."""
        sizes = self.sizes
        return {
            "through": "threads" if self.is_local else "llmpq-run",
            "stages": sizes.stages,
            "batch": sizes.batch,
            "micro_batches": [sizes.prefill, sizes.decode],
            "prefill_chunk": self.chunk,
            "refill": self.refill,
        }


WAYS = (
    Way(Sizes(1, batch=32, prefill=4, decode=16)),
    Way(Sizes(2, batch=24, prefill=3, decode=6), chunk=32),
    Way(Sizes(4, batch=30, prefill=2, decode=5), chunk=16),
    Way(Sizes(1, batch=48, prefill=8, decode=48), chunk=16, is_local=True),
    Way(Sizes(3, batch=7, prefill=2, decode=3), is_local=True),
    Way(Sizes(2, batch=32, prefill=4, decode=8), refill=False, is_local=True),
)
QUICK_WAYS = (
    Way(Sizes(2, batch=7, prefill=2, decode=2), chunk=16),
    Way(Sizes(1, batch=6, prefill=2, decode=3), is_local=True),
    Way(Sizes(4, batch=5, prefill=3, decode=5), chunk=16, is_local=True),
)


@dataclass(frozen=True)
class Subject:
    """A model with its requests and what transformers makes of each alone."""

    name: str
    folder: Path
    requests: list[Request]
    eos_ids: frozenset[int]
    expected: dict[int, list[int]]


def run(settings: Settings) -> tuple[list[Check], Rows]:
    """All ways on all models."""
    names = ("stories-260k",) if settings.quick else ("stories-260k", "tale-llama-11m")
    rows: Rows = []
    with threads(1):  # products are small
        for name in names:
            subject = make_subject(settings, name)
            for way in QUICK_WAYS if settings.quick else WAYS:
                rows.append(compare(subject, way, settings.folder))
    wrong = sum(len(row["different"]) for row in rows)
    ties = sum(different["tie"] for row in rows for different in row["different"])
    why = f"{ties} of them at a tie of fp32 logits" if wrong else ""
    return [SAME.check(wrong, wrong == 0, sum(row["requests"] for row in rows), why)], rows


def make_subject(settings: Settings, name: str) -> Subject:
    """Requests and reference."""
    count, most = (QUICK_REQUESTS, QUICK_TOKENS) if settings.quick else (NUM_REQUESTS, None)
    folder, requests = settings.model(name), settings.requests(name, count, most)
    eos_ids = end_tokens(folder, load_config(folder))
    say(f"{name}: transformers on {count} prompts, each alone")
    return Subject(name, folder, requests, eos_ids, reference(folder, requests, eos_ids))


def compare(subject: Subject, way: Way, folder: Path) -> dict[str, Any]:
    """A row: which requests differ from the reference, and where."""
    tokens = generate(subject, way, folder)
    assert tokens.keys() == subject.expected.keys(), "requests are missing"
    wrong = [r for r in subject.requests if tokens[r.number] != subject.expected[r.number]]
    model = load(subject.folder) if wrong else None
    different = [differing(model, r, subject.expected[r.number], tokens[r.number]) for r in wrong]
    stopped = sum(made[-1] in subject.eos_ids for made in subject.expected.values())
    say(f"{subject.name}, {way.sizes.stages} stages: {len(wrong)} of {len(tokens)} differ")
    sums = {"requests": len(tokens), "ended_by_eos": stopped, "different": different}
    return {"model": subject.name} | way.told() | sums


def generate(subject: Subject, way: Way, folder: Path) -> dict[int, list[int]]:
    """New tokens by request."""
    plan = hand_plan(subject.folder, subject.requests, way.sizes)
    if not way.is_local:
        flags: list[object] = ["--dtype", "float32"]
        flags += ["--prefill-chunk", way.chunk] if way.chunk else []
        flags += [] if way.refill else ["--no-refill"]
        return run_plan(folder, plan, subject.requests, *flags).tokens
    stages = LocalStages(plan, subject.folder, eos_ids=subject.eos_ids)
    finished = stages.generate(subject.requests, refill=way.refill, chunk=way.chunk)
    return {int(one.request.id): list(one.token_ids) for one in finished}


def differing(
    model: Any, request: Request, expected: Sequence[int], tokens: Sequence[int]
) -> dict[str, Any]:
    """Where a request's tokens differ first, and how sure the model is there."""
    position = first_difference(expected, tokens)
    gap = best_gap(model, [*request.prompt, *expected[:position]])
    return {"id": request.id, "position": position, "gap": gap, "tie": gap < TIE}


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """The first place at which two unequal sequences differ, or where the shorter one ends."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((place for place, (x, y) in pairs if x != y), min(len(a), len(b)))


# ---- transformers


def load(folder: Path) -> Any:
    """The model in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.inference_mode()
def best_gap(model: Any, tokens: Sequence[int]) -> float:
    """Between the two best logits of the token after these."""
    best = model(torch.tensor([tokens])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def reference(
    folder: Path, requests: Sequence[Request], eos_ids: frozenset[int]
) -> dict[int, list[int]]:
    """Each request alone; a process a core, of one thread each."""
    ends = sorted(eos_ids)
    # Long ones first, so that the last to end is short.
    order = sorted(requests, key=lambda request: -request.new_tokens)
    tasks = [(folder, order[i : i + CHUNK], ends) for i in range(0, len(order), CHUNK)]
    workers = min(len(tasks), len(os.sched_getaffinity(0)))
    tokens: dict[int, list[int]] = {}
    with get_context("spawn").Pool(workers, initializer=torch.set_num_threads, initargs=(1,)) as p:
        for made in p.imap_unordered(alone, tasks):
            tokens |= made
            say(f"{folder.name}: {len(tokens)} of {len(requests)} prompts")
        p.close()
        p.join()
    return tokens


def alone(task: tuple[Path, list[Request], list[int]]) -> dict[int, list[int]]:
    """transformers' own `generate` on one prompt after the other."""
    folder, requests, ends = task
    model, tokens = load(folder), {}
    for request in requests:
        prompt = torch.tensor([request.prompt])
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.new_tokens,
            do_sample=False,
            eos_token_id=ends or -1,
            pad_token_id=0,
        )
        tokens[request.number] = output[0, len(request.prompt) :].tolist()
    return tokens


PART = Part((SAME,), run, needs_data=True)
