"""What the parts of engine.py share: requests of real lengths and texts, plans by hand, runs.

Lengths are pairs of the ShareGPT trace (a prompt with its own answer), drawn with a seed and, where
the longest is beyond the model's positions, all made shorter by one factor. Prompts are cut from
real texts, at random places, as token ids.
"""

import csv
import gzip
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _common import Check, shared_data

from llmpq.artifact import write_json
from llmpq.model_lookup import load_model_spec
from llmpq.plan_data import Plan
from llmpq.prompts.request import Request
from llmpq.prompts.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {"stories-260k": "tinystories.eval.txt", "tale-llama-11m": "wikitext2.test.txt"}
TRACE = "sharedgpt_lengths.csv.gz"
Lengths = list[tuple[int, int]]  # (prompt tokens, new tokens)
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """What a check wants, before anything is measured."""

    name: str
    unit: str
    wanted: str

    def check(self, value: float | None, holds: bool | None, samples: int, why: str = "") -> Check:
        """As measured."""
        return Check(self.name, value, self.unit, self.wanted, holds, samples, why)

    def unknown(self, why: str) -> Check:
        """Where it cannot be told."""
        return self.check(None, None, 0, why)


@dataclass(frozen=True)
class Settings:
    """How to run. `folder`: for scratch files; `minutes`: of traffic while memory is watched."""

    quick: bool
    folder: Path
    minutes: float
    data: Path | None = field(default_factory=shared_data)

    def model(self, name: str) -> Path:
        """The folder of a model of the shared data."""
        assert self.data is not None
        return self.data / "models" / name

    def requests(self, name: str, count: int, most_tokens: int | None = None) -> list[Request]:
        """For a shared model; the longest has at most `most_tokens`, or the model's positions."""
        assert self.data is not None
        limit = most_tokens or load_model_spec(str(self.model(name))).max_positions
        assert limit is not None
        lengths = scaled(draw(read_lengths(self.data / "traces" / TRACE), count), limit)
        text = (self.data / "text" / TEXTS[name]).read_text(encoding="utf-8")
        tokenizer = load_tokenizer(self.model(name))
        assert tokenizer is not None
        prompts = cut(tokenizer.encode(text), [prompt for prompt, _ in lengths])
        return [
            Request(number, number, prompt, new)
            for number, (prompt, (_, new)) in enumerate(zip(prompts, lengths, strict=True))
        ]


@dataclass(frozen=True)
class Part:
    """One number of engine.py: what it wants, and what measures it."""

    targets: tuple[Target, ...]
    run: Callable[[Settings], tuple[list[Check], Rows]]
    needs_data: bool = False


class CommandError(Exception):
    """A command of llmpq did not end with 0; its own last words."""


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


# ---- requests


def read_lengths(path: Path) -> Lengths:
    """All pairs of a trace with columns input_tokens and output_tokens."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [(int(r["input_tokens"]), int(r["output_tokens"])) for r in csv.DictReader(file)]


def draw(lengths: Lengths, count: int, seed: int = 0) -> Lengths:
    """So many of the pairs."""
    return random.Random(seed).sample(lengths, count)


def scaled(lengths: Lengths, most_tokens: int) -> Lengths:
    """All made shorter by the factor that brings the longest to `most_tokens`, if it is longer."""
    factor = min(1.0, most_tokens / max(prompt + new for prompt, new in lengths))
    return [(max(1, int(prompt * factor)), max(1, int(new * factor))) for prompt, new in lengths]


def cut(tokens: Sequence[int], sizes: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    """Pieces of these sizes from random places of a text."""
    rng = random.Random(seed)
    starts = [rng.randrange(len(tokens) - size) for size in sizes]
    return [tuple(tokens[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def write_prompts(path: Path, requests: Sequence[Request]) -> Path:
    """prompts.jsonl."""
    lines = (
        {"id": r.id, "prompt_token_ids": r.prompt, "max_new_tokens": r.new_tokens} for r in requests
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def workload_of(requests: Sequence[Request]) -> dict[str, Any]:
    """workload.yaml of just these requests."""
    return {
        "name": "sharegpt",
        "prompt_tokens": [len(request.prompt) for request in requests],
        "new_tokens": [request.new_tokens for request in requests],
        "num_requests": len(requests),
    }


# ---- plans


@dataclass(frozen=True)
class Sizes:
    """How a plan is cut. `prefill`, `decode`: requests of a micro-batch."""

    stages: int
    batch: int
    prefill: int
    decode: int
    tensor_parallel: int = 1


def hand_plan(
    model: Path,
    requests: Sequence[Request],
    sizes: Sizes,
    precisions: Sequence[str] = (),
    memory_mib: Sequence[float] = (),
) -> Plan:
    """A plan of equal stages. With `memory_mib` its devices are rehearsed, at full speed."""
    spec = load_model_spec(str(model))
    layers, width = spec.num_layers, sizes.tensor_parallel
    ends = [layers * (rank + 1) // sizes.stages for rank in range(sizes.stages)]
    names = [f"d{rank}" if memory_mib else "a100-40g" for rank in range(sizes.stages)]
    every = list(precisions) or ["16"] * layers
    stages = [
        {
            "rank": rank,
            "node": "here",
            "devices": [names[rank]] * width,
            "tensor_parallel": width,
            "first_layer": first,
            "end_layer": end,
            "precisions": every[first:end],
        }
        for rank, (first, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    return Plan.model_validate(
        {
            "model": spec.model_dump(),
            "workload": workload_of(requests),
            "cluster": {
                "nodes": [
                    {"name": "here", "devices": [{"type": name, "count": width} for name in names]}
                ],
                "rehearse": {
                    name: {"slowdown": 1.0, "memory_mib": mib}
                    for name, mib in zip(names, memory_mib, strict=False)
                },
            },
            "method": "hand",
            "batch": sizes.batch,
            "prefill_micro_batch": sizes.prefill,
            "decode_micro_batch": sizes.decode,
            "stages": stages,
        }
    )


# ---- commands


def command_line(command: str, *words: object) -> list[str]:
    """Of a command, or of a sub-command written `profile layers`."""
    return [sys.executable, "-m", "llmpq.cli.main", *command.split(), "-q", *map(str, words)]


def environment(threads: int) -> dict[str, str]:
    """For commands: so many threads a process, no network."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def llmpq(command: str, *words: object, threads: int = 1) -> None:
    """Runs a command; raises `CommandError` with what it says where it fails."""
    line = command_line(command, *words)
    done = subprocess.run(
        line, cwd=ROOT, env=environment(threads), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CommandError(last_words(done.stderr) or f"exit code {done.returncode}")


def last_words(text: str) -> str:
    """The last paragraph of a message, in one line."""
    return " ".join(text.strip().rpartition("\n\n")[2].split())[-400:]


@dataclass(frozen=True)
class Outcome:
    """A run's new tokens by id, and its report."""

    tokens: dict[int, list[int]]
    report: dict[str, Any]


def run_plan(
    folder: Path, plan: Plan | Path, requests: Sequence[Request], *flags: object, threads: int = 1
) -> Outcome:
    """`llmpq-run` of a plan on these requests; files lie in `folder`."""
    files = run_files(folder, plan, requests)
    llmpq("run", *files, *flags, threads=threads)
    return outcome(folder)


def run_files(folder: Path, plan: Plan | Path, requests: Sequence[Request]) -> list[object]:
    """Writes what a run reads; the options that name its files."""
    path = plan if isinstance(plan, Path) else folder / "plan.json"
    if isinstance(plan, Plan):
        write_json(path, plan)
    prompts = write_prompts(folder / "prompts.jsonl", requests)
    names = ["--output", folder / "out.jsonl", "--report", folder / "report.json"]
    return ["--plan", path, "--prompts", prompts, *names, "--device", "cpu"]


def outcome(folder: Path) -> Outcome:
    """Of the run whose files lie in `folder`."""
    with (folder / "out.jsonl").open() as file:
        results = [json.loads(line) for line in file]
    tokens = {result["id"]: result["token_ids"] for result in results}
    return Outcome(tokens, json.loads((folder / "report.json").read_text()))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Of torch in this process."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)
