"""A whole model served on one device: tokens a second, beside the plan's and transformers' own.

Weights are random, drawn on the device and rounded there, so that no checkpoint is needed and a
model of 8 billion parameters is ready in seconds. The plan is `llmpq-plan`'s for the card and the
workload, all layers at one precision; the engine is `llmpq-run`'s, without the reading of prompts
and the writing of results. Each precision runs twice: the first run may still meet kernels that
were never used, the second is the one that counts; both are told.

`transformers` stands for what a user has without any of this: `generate` at 16 bits, all requests
that are in flight in one batch.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from _kernels_place import Ceilings, Place
from click import Command
from click.testing import CliRunner

from llmpq.checkpoint.checkpoint import RandomWeights
from llmpq.cli.plan import main as plan_command
from llmpq.device_names import type_of_card, type_of_cpu
from llmpq.model_lookup import config_path, load_model_spec
from llmpq.model_spec import ModelSpec
from llmpq.models.stage_model import load_config
from llmpq.plan_data import Plan, load_plan
from llmpq.prompts.request import Finished, Request
from llmpq.run_report import StageReport
from llmpq.runtime.engine import StageEngine
from llmpq.runtime.transport import LocalHub, LocalTransport

ROOT = Path(__file__).resolve().parents[2]
ANY_CPU = "xeon-8480-512g"  # stands for a CPU that the library does not know
ANY_LOSS = "1000000"  # percent of perplexity: the precision is given, whatever it loses
FIRST_TOKEN = 3  # below are a tokenizer's own
GIB = 1024**3


@dataclass(frozen=True)
class Traffic:
    """A model, and the requests that are to be served, `in_flight` of them at a time."""

    model: str
    prompt_tokens: int
    new_tokens: int
    num_requests: int
    in_flight: int

    def spec(self) -> ModelSpec:
        """The model's sizes."""
        return load_model_spec(self.model)

    def config(self) -> Any:
        """The model as transformers describes it."""
        return load_config(config_path(self.model))

    def requests(self, count: int | None = None) -> list[Request]:
        """Random prompts, always the same; `count` of them where not all are wanted."""
        rng, vocab = random.Random(0), self.spec().vocab_size
        prompts = (
            tuple(rng.randrange(FIRST_TOKEN, vocab) for _ in range(self.prompt_tokens))
            for _ in range(count or self.num_requests)
        )
        return [Request(i, i, prompt, self.new_tokens) for i, prompt in enumerate(prompts)]

    def workload(self) -> dict[str, Any]:
        """workload.yaml of all requests."""
        return {
            "name": f"{self.prompt_tokens}-{self.new_tokens}",
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "num_requests": self.num_requests,
            "batch": self.in_flight,
        }


LLAMA_8B = Traffic(str(ROOT / "configs/models/llama-3.1-8b.json"), 512, 128, 64, 32)
TINY = Traffic(str(ROOT / "llmpq/assets/tiny-tales"), 24, 12, 8, 4)


def traffic_of(place: Place) -> Traffic:
    """What is served: on a card the shape of Llama-3.1-8B, else the small model that ships."""
    return LLAMA_8B if place.on_card else TINY


class CommandFailed(Exception):
    """A command of llmpq did not end with 0; its last words."""


def command(main: Command, *words: object) -> str:
    """Runs a command of llmpq in this process; its standard output, or `CommandFailed`."""
    done = CliRunner().invoke(main, list(map(str, words)))
    if done.exit_code == 0:
        return done.stdout
    crash = "" if isinstance(done.exception, SystemExit) else repr(done.exception)
    raise CommandFailed(" ".join([*done.output.split(), crash])[-600:])


def device_type(place: Place) -> str:
    """The library's type of this device; raises `CommandFailed` where it knows no such card."""
    if not place.on_card:
        return type_of_cpu(_cpu_name()) or ANY_CPU
    memory_gib = torch.cuda.get_device_properties(place.device).total_memory / GIB
    found = type_of_card(place.name, memory_gib)
    if found is None:
        raise CommandFailed(f"{place.name}, {memory_gib:.0f} GiB: not in llmpq's device library")
    return found


def _cpu_name() -> str:
    from llmpq.profiler.host import cpu_name

    return cpu_name()


# ---- plans


def plan_for(
    traffic: Traffic, precision: str, kind: str, folder: Path, profiles: Path | None = None
) -> Plan:
    """`llmpq-plan`'s plan for one device of this type, all layers at one precision."""
    cluster = folder / "cluster.yaml"
    cluster.write_text(yaml.safe_dump(_cluster(kind)))
    workload = folder / "workload.yaml"
    workload.write_text(yaml.safe_dump(traffic.workload()))
    output = folder / f"plan-{precision}.json"
    words = ["--model", traffic.model, "--cluster", cluster, "--workload", workload]
    words += ["--precisions", precision, "--max-quality-loss", ANY_LOSS, "-o", output]
    words += ["--profiles", profiles] if profiles else []
    command(plan_command, *words, "--no-compare", "--no-what-if", "-q")
    return load_plan(output)


def priced(plan: Plan, profiles: Path, folder: Path) -> Plan:
    """The plan with what is predicted of it from other profiles: `llmpq-plan --evaluate`."""
    from llmpq.artifact import write_json

    asked, told = folder / "asked.json", folder / "told.json"
    write_json(asked, plan)
    words = ["--evaluate", asked, "--profiles", profiles, "--max-quality-loss", ANY_LOSS]
    command(plan_command, *words, "-o", told, "-q")
    return load_plan(told)


def error_percent(plan: Plan, total_s: float) -> float:
    """The predicted time's error, as report.json has it: positive where it is too long."""
    assert plan.predicted is not None
    return 100 * (plan.predicted.total_s / total_s - 1)


def _cluster(kind: str) -> dict[str, Any]:
    return {"name": "one", "nodes": [{"name": "here", "devices": [{"type": kind}]}]}


# ---- runs


def serve(traffic: Traffic, plan: Plan, place: Place, ceilings: Ceilings) -> dict[str, Any]:
    """Loads the plan's one stage and serves all requests, twice; a row of what was measured."""
    engine = _engine(traffic, plan, place)
    runs = [_run(engine, traffic.requests()) for _ in range(2)]
    (stage,) = engine.measure()
    memory = stage.peak_memory_bytes
    del engine
    place.free()
    total_s = runs[-1]
    tokens = traffic.num_requests * traffic.new_tokens
    row = {
        "kind": "serving",
        "precision": plan.precisions[0],
        "tokens_per_s": tokens / total_s,
        "first_tokens_per_s": tokens / runs[0],
        "total_s": total_s,
        "load_s": stage.load_s,
        "peak_memory_bytes": memory,
        "prefill_micro_batch": plan.prefill_micro_batch,
        "decode_micro_batch": plan.decode_micro_batch,
    }
    return row | _prefill(traffic, stage, ceilings) | _decode(stage) | _predicted(plan, total_s)


def _engine(traffic: Traffic, plan: Plan, place: Place) -> StageEngine:
    weights = RandomWeights(device=place.device)
    transport = LocalTransport(0, LocalHub(1))
    return StageEngine(plan, traffic.config(), weights, transport, place.dtype, place.device)


def _run(engine: StageEngine, requests: Sequence[Request]) -> float:
    """Seconds that the engine takes for these requests; all their tokens must come."""
    finished: list[Finished] = []
    engine.start_clock()
    lengths = {request.number: (len(request.prompt), request.new_tokens) for request in requests}
    start = time.perf_counter()
    engine.lead(lengths, requests.__getitem__, finished.append)
    total_s = time.perf_counter() - start
    wanted = sum(request.new_tokens for request in requests)
    assert sum(len(one.token_ids) for one in finished) == wanted, "some requests ended early"
    return total_s


def _prefill(traffic: Traffic, stage: StageReport, ceilings: Ceilings) -> dict[str, float]:
    """Prompt tokens a second while prompts are computed, and that as a share of a large product."""
    calls = [row for row in stage.measured if row.phase == "prefill"]
    seconds = sum(row.total_s for row in calls)
    tokens_per_s = sum(row.count * row.micro_batch * row.tokens for row in calls) / seconds
    tflops = tokens_per_s * operations_per_token(traffic) / 1e12
    return {
        "prefill_tokens_per_s": tokens_per_s,
        "prefill_share_of_matmul": tflops / ceilings.matmul_tflops,
    }


def operations_per_token(traffic: Traffic) -> float:
    """Of the layers on one token of a prompt: two for each weight, and attention's lower triangle.

    Attention: a token sees half of the prompt in the mean, with two products of two operations.
    """
    spec = traffic.spec()
    weights = sum(linear.out_features * linear.in_features for linear in spec.linears)
    attention = 2 * spec.num_heads * spec.head_dim * traffic.prompt_tokens
    return float(spec.num_layers * (2 * weights + attention))


def _decode(stage: StageReport) -> dict[str, float]:
    """Milliseconds of a decode step, the median over calls of the most frequent kind."""
    calls = [row for row in stage.measured if row.phase == "decode"]
    usual = max(calls, key=lambda row: row.count)
    return {"decode_step_ms": 1e3 * usual.median_s, "decode_rows": usual.micro_batch}


def _predicted(plan: Plan, total_s: float) -> dict[str, Any]:
    assert plan.predicted is not None
    return {
        "predicted_tokens_per_s": plan.predicted.tokens_per_s,
        "error_percent": error_percent(plan, total_s),
        "plan": plan.model_dump(mode="json"),
    }


@torch.inference_mode()
def generate_with_transformers(traffic: Traffic, place: Place) -> dict[str, Any]:
    """transformers' `generate` at 16 bits on as many of the requests as are in flight."""
    from transformers import AutoModelForCausalLM

    with place.device:
        model = AutoModelForCausalLM.from_config(traffic.config(), dtype=place.dtype).eval()
    prompts = [request.prompt for request in traffic.requests(traffic.in_flight)]
    ids = torch.tensor(prompts, device=place.device)
    _generate_s(model, ids[:, :16], 4, place)  # warms up
    total_s = _generate_s(model, ids, traffic.new_tokens, place)
    tokens_per_s = len(prompts) * traffic.new_tokens / total_s
    return {"kind": "transformers", "tokens_per_s": tokens_per_s, "total_s": total_s}


def _generate_s(model: Any, ids: torch.Tensor, new_tokens: int, place: Place) -> float:
    """Seconds of greedy generation of just so many tokens."""
    place.wait()
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    place.wait()
    return time.perf_counter() - start
