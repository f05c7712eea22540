"""llmpq from Python: what the commands do, as functions of values.

    model = llmpq.load_model("tiny-tales")
    cluster = llmpq.load_cluster("cluster.yaml")
    workload = llmpq.load_workload("workload.yaml")
    plan = llmpq.plan(model, cluster, workload)
    texts = llmpq.Engine(plan).generate(["Once upon a time"])

All values are frozen, and a plan is what `llmpq-plan` writes and `llmpq-run` reads. Only `Engine`
and `export_vllm` import torch. Faults of files and values are `llmpq.errors.UserError`; where
nothing fits, `InfeasibleError` says what is short.

Not covered: cards and several processes, which `llmpq-run` drives, profiling, and writing files
other than an export.
"""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from llmpq import cluster as clusters
from llmpq import workload as workloads
from llmpq.cluster import Cluster
from llmpq.errors import FailedRequests, UserError
from llmpq.exported import Exported
from llmpq.model_lookup import DEFAULT_MODEL, check_model, load_model_spec
from llmpq.model_spec import ModelSpec
from llmpq.plan_data import Plan, Predicted
from llmpq.planning_methods import PlanningMethod
from llmpq.workload import Workload

if TYPE_CHECKING:
    from llmpq.planner.inputs import Inputs
    from llmpq.planner.vllm_target import Target
    from llmpq.prompts.request import Request

DtypeName = Literal["float32", "bfloat16", "float16"]


def load_model(model: str | Path = DEFAULT_MODEL) -> ModelSpec:
    """The sizes of a model: its directory, `config.json`, Hugging Face id, or the shipped model.

    Raises `UserError` where llmpq cannot serve such a model, with the reason.
    """
    return load_model_spec(str(model))


def load_cluster(path: str | Path) -> Cluster:
    """Nodes, devices and links of a cluster.yaml; raises `UserError` with every fault of it."""
    return clusters.load_cluster(Path(path))


def load_workload(path: str | Path) -> Workload:
    """Lengths and number of requests of a workload.yaml; raises `UserError` with its faults."""
    return workloads.load_workload(Path(path))


def plan(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    *,
    profiles: str | Path | None = None,
    sensitivity: str | Path | None = None,
    max_quality_loss: float | None = None,
    precisions: Sequence[str] | None = None,
    method: PlanningMethod = "auto",
    target: "Target" = "llmpq",
    gap: float = 0.005,
    time_limit_s: float = 60.0,
) -> Plan:
    """The fastest plan within the quality budget, as `llmpq-plan` finds it.

    `profiles`: a folder of measured times; None: spec sheets. `sensitivity`: a file of measured
    losses of quality; None: a generic estimate, not measured for this model. `max_quality_loss`:
    percent that perplexity may rise; None: 1. `precisions`: those allowed; None: all that have
    times. `target`: what runs the plan, "vllm" after `export_vllm`. `gap`: the search ends when no
    plan can be better by more than this share, or when its part of `time_limit_s` seconds is over.
    Raises `InfeasibleError` where nothing fits, and `UserError` for values that are wrong.
    """
    from llmpq.costs.quality import DEFAULT_MAX_LOSS_PERCENT
    from llmpq.planner.inputs import Wishes, make_problem
    from llmpq.planner.planning import Options, make_plan
    from llmpq.planner.vllm_target import for_vllm

    percent = DEFAULT_MAX_LOSS_PERCENT if max_quality_loss is None else max_quality_loss
    _require(percent >= 0, "max_quality_loss", "a percentage of 0 or more", percent)
    _require(0 <= gap < 1, "gap", "a share from 0 to below 1", gap)
    _require(time_limit_s > 0, "time_limit_s", "a number of seconds above 0", time_limit_s)
    _refuse_one_text(precisions, "precisions")
    inputs = _inputs(model, cluster, workload, profiles, sensitivity)
    problem, offered, _ = make_problem(inputs, Wishes(precisions, percent, target=target))
    options = Options(method=method, gap=gap, time_limit_s=time_limit_s, compare=False)
    found = make_plan(problem, options, offered).plan
    return for_vllm(found)[0] if target == "vllm" else found


def simulate(
    plan: Plan,
    *,
    workload: Workload | None = None,
    profiles: str | Path | None = None,
    sensitivity: str | Path | None = None,
) -> Predicted:
    """What a run of the plan is like, job by job: seconds, tokens/s, quality, memory of stages.

    `workload`: another than the plan's own. `profiles` and `sensitivity` are those of `plan`.
    Raises `UserError` where the plan cannot be priced by them.
    """
    from llmpq.planner.inputs import Wishes, make_problem
    from llmpq.planner.price import misfits, price

    work = workload or plan.workload
    inputs = _inputs(plan.model, plan.cluster, work, profiles, sensitivity)
    problem, _, _ = make_problem(inputs, Wishes(), plan)
    if faults := misfits(problem, plan):
        raise UserError("\n".join(faults))
    predicted = price(problem, plan).predicted
    assert predicted is not None
    return predicted


def export_vllm(
    plan: Plan,
    model_dir: str | Path | None,
    output: str | Path,
    *,
    moments: str | Path | None = None,
) -> Exported:
    """Writes a mixed-precision checkpoint and launch files for stock vLLM, as `llmpq-export` does.

    `model_dir`: the weights; None: those of the model that the plan names. `output`: a folder that
    is new or empty. `moments`: the file of calibration statistics, where it is not at the plan's
    path. Raises `UserError` for what vLLM cannot run, `InfeasibleError` where memory is short.
    """
    from llmpq.export.vllm import export_vllm as export

    return export(plan, str(model_dir or plan.model.name), output, moments=moments)


class Engine:
    """All stages of a plan in this process, loaded once, on the CPU.

    It gives the tokens that `llmpq-run` gives, more slowly: stages are threads of one interpreter.
    Not for use by several threads at a time.
    """

    def __init__(
        self,
        plan: Plan,
        model_dir: str | Path | None = None,
        *,
        dtype: DtypeName = "float32",
        ignore_eos: bool = False,
        moments: str | Path | None = None,
    ) -> None:
        """Loads the weights of `model_dir`; None: of the model that the plan names.

        `dtype`: of activations and of weights at 16 bits. `ignore_eos`: end-of-text tokens end no
        answer. `moments`: the file of calibration statistics, where it is not at the plan's path.
        Raises `UserError` where the model has no tokenizer or is not the plan's.
        """
        if dtype not in get_args(DtypeName):
            raise UserError(f"unknown dtype '{dtype}'; known: {', '.join(get_args(DtypeName))}")
        import torch

        from llmpq.checkpoint.loader import model_folder
        from llmpq.checkpoint.roundings import load_roundings
        from llmpq.models.stage_model import load_config
        from llmpq.prompts.prompt_rules import Rules
        from llmpq.prompts.tokenizer import end_tokens, load_tokenizer
        from llmpq.runtime.limits import limits_of
        from llmpq.runtime.local import LocalStages

        folder = model_folder(str(model_dir or plan.model.name))
        check_model(folder, plan.model, "the plan")
        config, tokenizer = load_config(folder), load_tokenizer(folder)
        if tokenizer is None:
            raise UserError(f"{folder}: has no tokenizer, which is needed for texts")
        self._decode = partial(tokenizer.decode, skip_special_tokens=True)
        self._rules = Rules(tokenizer, limits_of(plan, config), chat=False)
        roundings = load_roundings(plan.quantizer, Path(moments) if moments else None)
        eos_ids = frozenset() if ignore_eos else end_tokens(folder, config)
        self._stages = LocalStages(plan, folder, getattr(torch, dtype), eos_ids, roundings)

    def generate(
        self,
        prompts: Sequence[str],
        new_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """The text that follows each prompt, in their order, without the prompts.

        `new_tokens`: at most so many tokens each; None: the most that the plan's workload has.
        Temperature 0 is greedy; `top_k` 0 and `top_p` 1 cut nothing. Raises `UserError` for a
        prompt that the plan's cache or the model has no room for, and `FailedRequests` where
        activations became NaN or infinite.
        """
        from llmpq.prompts.chat_messages import Refused
        from llmpq.prompts.own_settings import drawn_by
        from llmpq.runtime.sampler import Sampling

        _refuse_one_text(prompts, "prompts")
        asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        try:
            drawn_by(asked)
        except Refused as error:
            raise UserError(str(error)) from None
        requests = [self._request(text, number, new_tokens) for number, text in enumerate(prompts)]
        finished = self._stages.generate(requests, Sampling(temperature, top_k, top_p, seed))
        if failed := [f"prompt {one.request.number}: {one.error}" for one in finished if one.error]:
            raise FailedRequests("\n".join(failed))
        tokens = {one.request.number: list(one.token_ids) for one in finished}
        return [self._decode(tokens[number]) for number in range(len(prompts))]

    def _request(self, text: str, number: int, new_tokens: int | None) -> "Request":
        line: dict[str, object] = {"id": number, "prompt": text}
        if new_tokens is not None:
            line["max_new_tokens"] = new_tokens
        try:
            asked = self._rules.asked(json.dumps(line).encode(), number)
        except ValueError as error:
            raise UserError(f"prompt {number}: {error}") from None
        if asked.refusal is not None:
            raise UserError(f"prompt {number}: {asked.refusal}")
        return asked.request


def _require(is_right: bool, name: str, expected: str, value: float) -> None:
    """Raises `UserError` for a value that is not right, or no finite number."""
    if not (is_right and math.isfinite(value)):
        raise UserError(f"{name} must be {expected}, found {value}")


def _refuse_one_text(values: Sequence[str] | None, name: str) -> None:
    """Raises `UserError` for a single string, which is a sequence of strings too."""
    if isinstance(values, str):
        raise UserError(
            f"{name} must be a list of strings, found a single string; give [{values[:40]!r}]"
        )


def _inputs(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    profiles: str | Path | None,
    sensitivity: str | Path | None,
) -> "Inputs":
    from llmpq.planner.input_files import read_quality
    from llmpq.planner.inputs import inputs_of
    from llmpq.profile_data import load_profiles

    measured = load_profiles(Path(profiles)) if profiles else []
    quality = read_quality(model, Path(sensitivity) if sensitivity else None)
    return inputs_of(model, cluster, workload, measured, quality)
