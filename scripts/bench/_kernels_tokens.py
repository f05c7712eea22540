"""The tokens that `llmpq-run` gives on one device, for plans by hand of the shipped model.

The command runs in this process, which saves the start of a new one; a plan of several stages
starts its own processes, which share the device.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from _engine_common import Sizes, hand_plan, write_prompts
from _kernels_place import Place
from _kernels_serving import TINY, command

from llmpq.artifact import write_json
from llmpq.cli.run import main as run_command
from llmpq.prompts.request import Request

Tokens = dict[int, list[int]]  # by request

PROMPTS = [(1, 40, 50), (1, 9, 8, 7, 6, 5, 4), (1, 300, 20, 10), (1, 77)]
NEW_TOKENS = 12
MEMORY_MIB = 4096.0  # of each rehearsed device
REQUESTS = [Request(i, i, prompt, NEW_TOKENS) for i, prompt in enumerate(PROMPTS)]
MIXED = ("16", "8", "4", "3") * 2  # a precision a layer
GRAPHS = "captured graphs and single launches"
SEVERAL = "one process and several on the card"
DTYPES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "float16"}


def compare_tokens(place: Place, folder: Path) -> dict[str, bool | None]:
    """Whether other ways to run give the tokens of one process."""
    alone = tokens_of(folder, place, MIXED)
    graphs = tokens_of(folder, place, MIXED, "--no-graphs") == alone
    several = tokens_of(folder, place, MIXED, stages=3) == alone
    return {GRAPHS: graphs, SEVERAL: several}


def tokens_of(
    folder: Path, place: Place, precisions: Sequence[str], *flags: str, stages: int = 1
) -> Tokens:
    """The tokens of every request; `flags` go to `llmpq-run` as they are.

    Below 32 bits tokens may depend on which requests share a micro-batch, so batches stay together,
    and kernels add in a fixed order. The devices are rehearsed at full speed, whatever is here.
    """
    plan, prompts, output = (folder / f"{name}-{stages}" for name in ("plan", "prompts", "out"))
    sizes = Sizes(stages=stages, batch=4, prefill=2, decode=2)
    memory_mib = [MEMORY_MIB] * stages
    write_json(plan, hand_plan(Path(TINY.model), REQUESTS, sizes, precisions, memory_mib))
    write_prompts(prompts, REQUESTS)
    output.unlink(missing_ok=True)
    words = ["--plan", plan, "--prompts", prompts, "--output", output, "--ignore-eos", "-q"]
    words += ["--device", place.device.type, "--dtype", DTYPES[str(place.dtype)], "--no-refill"]
    words.append("--batch-invariant")
    command(run_command, *words, *flags)
    rows = map(json.loads, output.read_text().splitlines())
    return {row["id"]: row["token_ids"] for row in rows}


def tokens_of_transformers(place: Place) -> Tokens:
    """What transformers' own `generate` gives to each request alone, at 16 bits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY.model, dtype=place.dtype)
    model = model.to(place.device).eval()
    expected = {}
    for request in REQUESTS:
        ids = torch.tensor([request.prompt], device=place.device)
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        expected[request.id] = tokens[0, len(request.prompt) :].tolist()
    return expected
