"""`llmpq-eval`: perplexity and zero-shot tasks of plans, or of uniform precisions.

Both are measured on the weights that are served.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from llmpq.cli.common import command_words, console, emit, one_of_several, report_console
from llmpq.cli.options import Listed, PrecisionNames, TorchOptions, arguments, command, option
from llmpq.cli.paths import check_files, model_files
from llmpq.errors import FailedRequests, UserError
from llmpq.evaluation.texts import DATASETS, named_text
from llmpq.model_lookup import DEFAULT_MODEL, load_model_spec
from llmpq.model_spec import ASSETS
from llmpq.plan_data import Plan, load_plan, refuse_shared_stages
from llmpq.quantizer import Method as QuantizerName
from llmpq.quantizer import Quantizer

if TYPE_CHECKING:
    from llmpq.evaluation.eval_report import Scores
    from llmpq.evaluation.methods import EvalRow, EvalSubject, LoadedModel, TaskSet
    from llmpq.runtime.process import Role

Plans = list[tuple[Path, Plan]]
ONLY_WITH_TASKS = ("task_data", "limit", "num_fewshot")


@dataclass(frozen=True, kw_only=True)
class EvalOptions(TorchOptions):
    """What the command line of `llmpq-eval` asks for."""

    plans: tuple[Path, ...] = arguments()
    model: str | None = option("Model directory; default: the plan's, or the shipped model.")
    precisions: tuple[str, ...] | None = option(
        "Uniform precisions to evaluate as well.", type=PrecisionNames()
    )
    quantizer: QuantizerName | None = option(
        "How weights at --precisions are rounded; default: gptq with --moments, else rtn."
    )
    moments: Path | None = option(
        "Calibration statistics for gptq; default: the file that the plan names."
    )
    text: tuple[Path, ...] = option(
        "Text files; default: a shipped text.",
        multiple=True,
        default=(),
        type=click.Path(path_type=Path),
    )
    dataset: tuple[str, ...] = option(
        "Well-known data sets as texts.",
        multiple=True,
        default=(),
        type=click.Choice(list(DATASETS)),
    )
    data: Path | None = option(
        "Folder with the files of --dataset; default: $LLMPQ_DATA, else the hub.",
        envvar="LLMPQ_DATA",
    )
    window: int | None = option(
        "Tokens per window; default: the model's positions, 2048 at most.",
        type=click.IntRange(min=2),
    )
    max_windows: int | None = option(
        "Windows per text; default: all of them.", type=click.IntRange(min=1)
    )
    tasks: tuple[str, ...] | None = option(
        "Tasks of lm-eval: piqa,lambada_openai,arc_easy.", type=Listed()
    )
    task_data: Path | None = option(
        "Folder with the tasks' data (TASK/validation.jsonl); default: the hub."
    )
    limit: int | None = option("Samples per task.", type=click.IntRange(min=1))
    num_fewshot: int | None = option(
        "Examples in a prompt; default: the task's own, or 0.", type=click.IntRange(min=0)
    )
    stream: bool = option("Hold one layer in memory at a time.", default=False)
    processes: bool = option("Start a process for each of the plan's stages.", default=False)

    @property
    def texts(self) -> list[tuple[str, Path | None]]:
        """(label, file) of every text; data sets have no file."""
        texts = [*((path.name, path) for path in self.text), *((n, None) for n in self.dataset)]
        if not texts and not self.tasks:
            return [("evaluation.txt", ASSETS / "evaluation.txt")]
        labels = [label for label, _ in texts]
        doubled = {label for label in labels if labels.count(label) > 1}
        return [(str(path) if label in doubled and path else label, path) for label, path in texts]


@command(EvalOptions)
def main(options: EvalOptions) -> None:
    """Perplexity and tasks of PLANS (plan.json files) and of uniform precisions.

    Stage by stage in this process; with --processes, or under torchrun, through the stages'
    own processes; with --stream layer by layer, for models larger than memory.
    """
    reads = [("--text", path) for path in options.text] + [("--moments", options.moments)]
    reads += [("a plan", path) for path in options.plans]
    check_files([*reads, *model_files(options.model)], [("--json", options.json_path)])
    plans = [(path, load_plan(path)) for path in options.plans]
    for path, plan in plans:
        refuse_shared_stages(plan, path)
    _check(options, plans)
    from llmpq.reliability.ending import AGAIN
    from llmpq.runtime.process import Role, role_from_environment

    role = role_from_environment()
    if role is not None:
        with one_of_several(role, AGAIN):
            _work(options, plans, role)
    elif options.processes:
        _start(options, plans)
    else:
        _evaluate_here(options, plans, Role(0, 1, 0, 1))


def _check(options: EvalOptions, plans: Plans) -> None:
    """Raises `UserError` where options do not go together."""
    ignored = [name for name in ONLY_WITH_TASKS if getattr(options, name) is not None]
    if ignored and not options.tasks:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
        raise UserError(f"{names}: only with --tasks")
    if options.tasks and (options.stream or options.processes):
        method = "--stream" if options.stream else "--processes"
        raise UserError(f"--tasks: needs all stages in this process; leave {method} out")
    if options.processes and options.precisions:
        raise UserError("--processes: is for plans; uniform precisions have a single stage")
    if options.processes and options.stream:
        raise UserError("give only one of --stream and --processes")
    if options.quantizer and plans and not options.precisions:
        raise UserError("--quantizer: is for --precisions; a plan says how its weights are rounded")
    if options.quantizer == "gptq" and options.moments is None:
        raise UserError(
            "--quantizer gptq: needs --moments FILE, which "
            "'llmpq-profile sensitivity --quantizer gptq' writes"
        )
    used: list[str] = [plan.quantizer.method for _, plan in plans]
    used += [options.quantizer or "gptq"] if options.precisions or not plans else []
    if options.moments and "gptq" not in used:
        raise UserError(f"--moments: nothing here is rounded by gptq, but by {', '.join(used)}")


def _evaluate_here(options: EvalOptions, plans: Plans, role: "Role") -> None:
    """Evaluates everything in this process."""
    from llmpq.evaluation.methods import layer_by_layer, num_passes, stage_by_stage
    from llmpq.render.progress import progress

    model, subjects = _load(options, plans, role)
    _warn(model, subjects, options.quiet)
    with ExitStack() as until_the_end:
        tasks = _tasks(options, until_the_end)
        windows = _windows(options, model)
        if options.stream:
            total = num_passes(subjects, windows) * len(subjects[0].precisions)
        else:
            total = sum(map(len, windows.values())) * len(subjects)
        what = "layers" if options.stream else "windows"
        with progress(console(options.quiet), what, total) as shown:
            if options.stream:
                rows = layer_by_layer(model, subjects, windows, shown.update)
                show_results(rows, [], options, "stream", model.max_positions)
                return
            rows, scores = stage_by_stage(model, subjects, windows, tasks, shown.update)
    show_results(rows, scores, options, "stages", model.max_positions)


def _warn(model: "LoadedModel", subjects: "list[EvalSubject]", quiet: bool) -> None:
    """Warns where weights that come quantized are rounded a second time."""
    note = model.weights.note({p for subject in subjects for p in subject.precisions})
    for line in [*([f"warning: {note}"] if note else []), *model.notes]:
        console(quiet).print(line, soft_wrap=True)


def _start(options: EvalOptions, plans: Plans) -> None:
    """Checks all input, then starts a process per stage."""
    from llmpq.reliability.ending import AGAIN
    from llmpq.runtime.process import Role, start_workers
    from llmpq.seats import worker_names

    _check_processes(plans)
    model, _ = _load(options, plans, Role(0, 1, 0, 1))
    _windows(options, model)
    start_workers(command_words(), worker_names(plans[0][1]), "llmpq.cli.eval", AGAIN)


def _check_processes(plans: Plans, size: int | None = None) -> None:
    """Raises `UserError` unless plans have a stage per process. `size`: torchrun's processes."""
    if not plans:
        raise UserError("stage processes: name a plan; uniform precisions have a single stage")
    first, expected = plans[0][0], size or len(plans[0][1].stages)
    for path, plan in plans:
        stages = len(plan.stages)
        if stages != expected and size:
            raise UserError(
                f"{path}: the plan has {stages} stages but torchrun started {size} processes; "
                f"use --nproc-per-node {stages}"
            )
        if stages != expected:
            raise UserError(
                f"{path}: has {stages} stages, {first} has {expected}; evaluate them one at a time"
            )


def _work(options: EvalOptions, plans: Plans, role: "Role") -> None:
    """Evaluates as one worker among several."""
    from llmpq.evaluation.methods import through_processes
    from llmpq.render.progress import progress
    from llmpq.runtime.process import choose_dtype, connect, share_cores

    if options.stream or options.precisions or options.tasks:
        raise UserError(
            "under torchrun only plans are evaluated, on texts: leave out --stream, --precisions "
            "and --tasks"
        )
    _check_processes(plans, role.size)
    model, subjects = _load(options, plans, role)
    windows = _windows(options, model) if role.rank == 0 else {}
    share_cores(role, model.device)
    transport, _ = connect(role, model.device)
    model = replace(model, dtype=choose_dtype(options.dtype, model.device, transport))
    quiet = options.quiet or role.rank > 0
    _warn(model, subjects, quiet)
    total = sum(map(len, windows.values())) * len(subjects)
    with progress(console(quiet), "windows", total) as shown:
        texts = [label for label, _ in options.texts]
        rows = through_processes(model, subjects, texts, windows, transport, shown.update)
    if role.rank == 0:
        show_results(rows, [], options, "processes", model.max_positions)


def _load(
    options: EvalOptions, plans: Plans, role: "Role"
) -> "tuple[LoadedModel, list[EvalSubject]]":
    """Opens the model, and returns it with all that is evaluated of it."""
    from llmpq.evaluation.methods import load_model, plan_subject, uniform_subject
    from llmpq.runtime.process import choose_device, choose_dtype

    names = {plan.model.name for _, plan in plans}
    if len(names) > 1 and not options.model:
        raise UserError(f"the plans are for different models: {', '.join(sorted(names))}")
    name = options.model or (names.pop() if names else DEFAULT_MODEL)
    num_layers = load_model_spec(name).num_layers
    device = choose_device(options.device, role)
    dtype = choose_dtype(options.dtype, device)
    model = load_model(name, device, dtype, options.moments, options.json_path is not None)
    method = options.quantizer or ("gptq" if options.moments else "rtn")
    moments = str(options.moments) if method == "gptq" else None
    quantizer = Quantizer(method=method, moments=moments)
    uniform = options.precisions or (() if plans else ("16",))
    subjects = [plan_subject(path, plan, num_layers) for path, plan in plans]
    return model, subjects + [uniform_subject(one, num_layers, quantizer) for one in uniform]


def _windows(options: EvalOptions, model: "LoadedModel") -> dict[str, Any]:
    """Returns `[n, W]` token ids of every text, by its label."""
    from llmpq.evaluation.perplexity import text_windows, window_tokens, windows_of

    window, most = window_tokens(options.window, model.max_positions), options.max_windows
    windows = {}
    for label, path in options.texts:
        if path is not None:
            windows[label] = text_windows(path, model.tokenizer, window, most)
        else:
            text = named_text(label, options.data)
            windows[label] = windows_of(text, f"--dataset {label}", model.tokenizer, window, most)
    return windows


def _tasks(options: EvalOptions, until_the_end: ExitStack) -> "TaskSet | None":
    if not options.tasks:
        return None
    from llmpq.evaluation.methods import TaskSet
    from llmpq.evaluation.tasks import load_tasks

    console(options.quiet).print("reading lm-eval's list of tasks")
    scratch = Path(until_the_end.enter_context(TemporaryDirectory(prefix="llmpq-")))
    tasks = load_tasks(options.tasks, options.task_data, options.num_fewshot, scratch)
    return TaskSet(tasks, options.limit)


# ---- the result


def show_results(
    rows: "list[EvalRow]", scores: "Scores", options: EvalOptions, method: str, max_positions: int
) -> None:
    """Writes and prints the result; raises `FailedRequests` where a value is not finite."""
    from llmpq.evaluation.eval_report import WHY, failures, report_data
    from llmpq.evaluation.perplexity import window_tokens
    from llmpq.render.eval_view import print_rows, print_scores

    window = window_tokens(options.window, max_positions)
    emit(json.dumps(report_data(rows, scores, method, window), indent=1), options.json_path)
    out = report_console(options.quiet, options.json_path)
    print_rows(out, rows, options.verbose)
    print_scores(out, scores)
    if failed := failures(rows, scores):
        count = len(rows) + len(scores)
        raise FailedRequests(f"{len(failed)} of {count} failed: {', '.join(failed)}: {WHY}")


if __name__ == "__main__":
    main()
