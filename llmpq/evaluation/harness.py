"""Zero-shot and few-shot tasks of lm-eval, answered by the stages of a plan in this process.

`harness_model` makes the model that lm-eval calls, and `run_tasks` runs lm-eval's tasks on it.
lm-eval is an optional library and is imported only when it is used.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from math import nan
from typing import Any

from llmpq.evaluation.scorer import NonFiniteLogits, Scorer

FEWSHOT_SEED = 1234  # lm-eval's own default
BOOTSTRAPS = 1000  # samples for standard errors of metrics that have no formula


def harness_model(
    scorer: Scorer, tokenizer: Any, on_done: Callable[[int, int], None] = lambda *_: None
) -> Any:
    """An `lm_eval.api.model.LM` over `scorer`; `on_done(answered, total)` counts requests."""
    from llmpq.evaluation.lm_eval_model import PipelineModel

    return PipelineModel(scorer, tokenizer, on_done)


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, with its standard error (None where it has none)."""

    task: str
    metric: str
    value: float
    error: float | None
    num_samples: int
    num_fewshot: int


def run_tasks(tasks: Any, model: Any, limit: int | None) -> list[TaskScore]:
    """Every metric of lm-eval's loaded tasks (see `load_tasks`), on `limit` samples of each task.

    Where the model's logits are not finite, each task has one score, which is NaN.
    """
    from lm_eval.evaluator import evaluate

    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the same examples for every model
    more = {"limit": limit, "bootstrap_iters": BOOTSTRAPS, "log_samples": False, "verbosity": None}
    try:
        with redirect_stdout(StringIO()):  # lm-eval prints there, where reports belong
            found = evaluate(model, tasks, **more)
    except NonFiniteLogits:
        return [TaskScore(str(name), "no metric", nan, None, 0, 0) for name in tasks["tasks"]]
    return [score for name in found["results"] for score in _scores(name, found)]


def _scores(name: str, found: Mapping[str, Any]) -> Iterator[TaskScore]:
    """The scores of a task: keys are "metric,filter", standard errors "metric_stderr,filter"."""
    metrics = found["results"][name]
    counts = found["n-samples"].get(name, {})
    for key, value in metrics.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}_stderr,{chosen}")
        yield TaskScore(
            task=name,
            metric=metric if chosen == "none" else f"{metric} ({chosen})",
            value=float(value),
            error=float(error) if isinstance(error, int | float) else None,
            num_samples=int(counts.get("effective", 0)),
            num_fewshot=int(found["n-shot"].get(name) or 0),
        )
