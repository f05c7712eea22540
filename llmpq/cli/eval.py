"""`llmpq-eval`: perplexity and zero-shot tasks of a plan, or of uniform precisions, on the weights
that are served."""

import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from llmpq.cli.common import ARGUMENTS, Command, common_options, console
from llmpq.cli.eval_output import show
from llmpq.cli.paths import check_files, model_files
from llmpq.cli.profile_options import PrecisionNames
from llmpq.cli.progress import progress
from llmpq.cli.run import DTYPE_NAMES
from llmpq.errors import UserError, WorkerError
from llmpq.evaluation.texts import DATASETS, named_text
from llmpq.model_lookup import DEFAULT_MODEL, load_model_spec
from llmpq.model_spec import ASSETS
from llmpq.plan_data import Plan, load_plan, refuse_shared_stages
from llmpq.quantizer import Quantizer

if TYPE_CHECKING:
    from llmpq.cli.eval_ways import Model, Subject, Task
    from llmpq.evaluation.harness import TaskScore
    from llmpq.runtime.process import Role

TASK_OPTIONS = {"task_data": "--task-data", "limit": "--limit", "num_fewshot": "--num-fewshot"}


class Names(click.ParamType):
    """Names with commas between: piqa,arc_easy."""

    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(n.strip() for n in str(value).split(",") if n.strip()))
        if not names:
            self.fail(f"{value!r} names no task", param, ctx)
        return names


@click.command(cls=Command)
@click.argument("plans", nargs=-1, type=click.Path(path_type=Path))
@click.option("--model", help="Model directory; default: the plan's, or the shipped model.")
@click.option("--precisions", type=PrecisionNames(), help="Uniform precisions to evaluate as well.")
@click.option("--quantizer", type=click.Choice(["rtn", "mse", "gptq"]), help="Of --precisions.")
@click.option(
    "--moments",
    type=click.Path(path_type=Path),
    help="Second moments for gptq; default: the file that the plan names.",
)
@click.option(
    "--text", multiple=True, type=click.Path(path_type=Path), help="Default: shipped text."
)
@click.option("--dataset", multiple=True, type=click.Choice(list(DATASETS)), help="A known text.")
@click.option(
    "--data",
    envvar="LLMPQ_DATA",
    type=click.Path(path_type=Path),
    help="Folder with the files of --dataset; default: $LLMPQ_DATA, else the hub.",
)
@click.option(
    "--window",
    type=click.IntRange(min=2),
    help="Tokens a window; default: the model's positions, 2048 at most.",
)
@click.option("--max-windows", type=click.IntRange(min=1), help="Default: the whole text.")
@click.option("--tasks", type=Names(), help="Tasks of lm-eval: piqa,lambada_openai,arc_easy.")
@click.option(
    "--task-data",
    type=click.Path(path_type=Path),
    help="Folder with the tasks' data (TASK/validation.jsonl); default: the hub.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Samples a task.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Default: the task's own, or 0.")
@click.option("--stream", is_flag=True, help="One layer in memory at a time.")
@click.option("--processes", is_flag=True, help="A process for each of the plan's stages.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--dtype", type=click.Choice(DTYPE_NAMES), default="auto")
@common_options
def main(**flags: Any) -> None:
    """Perplexity and tasks of PLANS (plan.json files) and of uniform precisions.

    Stage after stage in this process; with --processes, or under torchrun, through the stages'
    own processes; with --stream layer by layer, for models larger than memory.
    """
    inputs = [(f"--{name}", path) for name in ("text", "moments") for path in _paths(flags[name])]
    inputs += [("a plan", path) for path in flags["plans"]]
    check_files([*inputs, *model_files(flags["model"])], [("--json", flags["json_path"])])
    plans = [(path, _runnable(path)) for path in flags["plans"]]
    _check(flags, plans)
    from llmpq.runtime.process import Role, role_from_environment

    role = role_from_environment()
    if role is not None:
        _work(flags, plans, role)
    elif flags["processes"]:
        _start(flags, plans)
    else:
        _here(flags, plans, Role(0, 1, 0, 1))


def _paths(given: Any) -> tuple[Path, ...]:
    return given if isinstance(given, tuple) else (given,) if given else ()


def _runnable(path: Path) -> Plan:
    plan = load_plan(path)
    refuse_shared_stages(plan, path)
    return plan


def _check(flags: dict[str, Any], plans: list[tuple[Path, Plan]]) -> None:
    """Options that do not go together."""
    ignored = [name for key, name in TASK_OPTIONS.items() if flags[key] is not None]
    if ignored and not flags["tasks"]:
        raise UserError(f"{', '.join(ignored)}: only with --tasks")
    if flags["tasks"] and (flags["stream"] or flags["processes"]):
        way = "--stream" if flags["stream"] else "--processes"
        raise UserError(f"--tasks: needs all stages in this process; leave {way} out")
    if flags["processes"] and flags["precisions"]:
        raise UserError("--processes: is for plans; uniform precisions have a single stage")
    if flags["processes"] and flags["stream"]:
        raise UserError("give only one of --stream and --processes")
    if flags["quantizer"] and plans and not flags["precisions"]:
        raise UserError("--quantizer: is for --precisions; a plan says how its weights are rounded")
    if flags["quantizer"] == "gptq" and flags["moments"] is None:
        raise UserError(
            "--quantizer gptq: needs --moments FILE, which "
            "'llmpq-profile sensitivity --quantizer gptq' writes"
        )
    used = [plan.quantizer.method for _, plan in plans]
    used += [flags["quantizer"] or "gptq"] if flags["precisions"] or not plans else []
    if flags["moments"] and "gptq" not in used:
        raise UserError(f"--moments: nothing here is rounded by gptq, but by {', '.join(used)}")


def _here(flags: dict[str, Any], plans: list[tuple[Path, Plan]], role: "Role") -> None:
    """All in this process."""
    from llmpq.cli.eval_ways import layer_by_layer, num_passes, stage_by_stage

    model, subjects = _load(flags, plans, role)
    _warn(model, subjects, flags["quiet"])
    with ExitStack() as until_the_end:
        task = _tasks(flags, until_the_end)
        windows = _windows(flags, model)
        if flags["stream"]:
            total = num_passes(subjects, windows) * len(subjects[0].precisions)
        else:
            total = sum(map(len, windows.values())) * len(subjects)
        what = "layers" if flags["stream"] else "windows"
        with progress(console(flags["quiet"]), what, total) as shown:
            scores: list[tuple[Subject, TaskScore]] = []
            if flags["stream"]:
                rows = layer_by_layer(model, subjects, windows, shown.update)
            else:
                rows, scores = stage_by_stage(model, subjects, windows, task, shown.update)
    show(rows, scores, flags, "stream" if flags["stream"] else "stages", model)


def _warn(model: "Model", subjects: "list[Subject]", quiet: bool) -> None:
    """Where weights that come quantized are rounded a second time."""
    note = model.weights.note({p for subject in subjects for p in subject.precisions})
    if note is not None:
        console(quiet).print(f"warning: {note}")
    for note in model.notes:
        console(quiet).print(note, soft_wrap=True)


def _start(flags: dict[str, Any], plans: list[tuple[Path, Plan]]) -> None:
    """Checks all input, then starts a process a stage."""
    from llmpq.reliability.ending import AGAIN
    from llmpq.runtime.process import Role, start_workers

    _check_processes(plans)
    model, _ = _load(flags, plans, Role(0, 1, 0, 1))
    _windows(flags, model)
    stages = plans[0][1].stages
    names = [f"{stage.devices[0]} on {stage.node}" for stage in stages]
    arguments = click.get_current_context().meta[ARGUMENTS]
    start_workers(arguments, names, "llmpq.cli.eval", AGAIN)


def _check_processes(plans: list[tuple[Path, Plan]], size: int | None = None) -> None:
    """Every plan must have a stage a process. `size`: how many torchrun started."""
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


def _work(flags: dict[str, Any], plans: list[tuple[Path, Plan]], role: "Role") -> None:
    """One worker among several; the first of a machine says what went wrong."""
    from llmpq.reliability.ending import AGAIN, SUPERVISED
    from llmpq.reliability.monitor import Monitor
    from llmpq.runtime.process import check_meeting_point, disconnect, end_with_parent

    end_with_parent()
    check_meeting_point()
    try:
        with Monitor(role.rank, role.size, f"rank {role.rank}", AGAIN):
            _work_on(flags, plans, role)
    except UserError:
        if role.local_rank == 0:
            raise
        sys.exit(UserError.exit_code)
    except WorkerError:
        if SUPERVISED not in os.environ:
            raise
        sys.exit(WorkerError.exit_code)  # the process that started us says which one was lost
    finally:
        disconnect()


def _work_on(flags: dict[str, Any], plans: list[tuple[Path, Plan]], role: "Role") -> None:
    from llmpq.cli.eval_ways import through_processes
    from llmpq.runtime.process import choose_dtype, connect, share_cores

    if flags["stream"] or flags["precisions"] or flags["tasks"]:
        raise UserError(
            "under torchrun only plans are evaluated, on texts: leave out --stream, --precisions "
            "and --tasks"
        )
    _check_processes(plans, role.size)
    model, subjects = _load(flags, plans, role)
    windows = _windows(flags, model) if role.rank == 0 else {}
    share_cores(role, model.device)
    transport, _ = connect(role, model.device)
    model = replace(model, dtype=choose_dtype(flags["dtype"], model.device, transport))
    quiet = flags["quiet"] or role.rank > 0
    _warn(model, subjects, quiet)
    total = sum(map(len, windows.values())) * len(subjects)
    with progress(console(quiet), "windows", total) as shown:
        texts = [label for label, _ in _texts(flags)]
        rows = through_processes(model, subjects, texts, windows, transport, shown.update)
    if role.rank == 0:
        show(rows, [], flags, "processes", model)


def _load(
    flags: dict[str, Any], plans: list[tuple[Path, Plan]], role: "Role"
) -> "tuple[Model, list[Subject]]":
    """The model, and what of it is evaluated."""
    from llmpq.checkpoint.checkpoint import Checkpoint
    from llmpq.checkpoint.inventory import check_checkpoint
    from llmpq.checkpoint.loader import model_folder
    from llmpq.cli.eval_ways import Model
    from llmpq.models.stage_model import load_config
    from llmpq.prompts.tokenizer import load_tokenizer
    from llmpq.runtime.process import choose_device, choose_dtype

    name = _one_model(flags, [plan for _, plan in plans])
    spec, folder = load_model_spec(name), model_folder(name)
    device = choose_device(flags["device"], role)
    config, weights = load_config(folder), Checkpoint(folder)
    model = Model(
        config=config,
        weights=weights,
        tokenizer=load_tokenizer(folder),
        max_positions=spec.max_positions,
        dtype=choose_dtype(flags["dtype"], device),
        device=device,
        moments=flags["moments"],
        hashes=flags["json_path"] is not None,
        notes=check_checkpoint(config, weights),
    )
    return model, _subjects(flags, plans, spec.num_layers)


def _one_model(flags: dict[str, Any], plans: list[Plan]) -> str:
    names = {plan.model.name for plan in plans}
    if flags["model"]:
        return str(flags["model"])
    if len(names) > 1:
        raise UserError(f"the plans are for different models: {', '.join(sorted(names))}")
    return names.pop() if names else DEFAULT_MODEL


def _subjects(
    flags: dict[str, Any], plans: list[tuple[Path, Plan]], num_layers: int
) -> "list[Subject]":
    from llmpq.cli.eval_ways import Subject

    subjects = []
    for path, plan in plans:
        if plan.model.num_layers != num_layers:
            raise UserError(f"{path}: is for {plan.model.num_layers} layers, not {num_layers}")
        cuts = tuple((stage.first_layer, stage.end_layer) for stage in plan.stages)
        subjects.append(Subject(str(path), cuts, tuple(plan.precisions), plan.quantizer, path))
    quantizer = _uniform_quantizer(flags)
    for precision in flags["precisions"] or (() if plans else ("16",)):
        cuts, same = ((0, num_layers),), (precision,) * num_layers
        subjects.append(Subject(f"uniform-{precision}", cuts, same, quantizer))
    return subjects


def _uniform_quantizer(flags: dict[str, Any]) -> Quantizer:
    """Of uniform precisions: gptq where second moments are given, else to nearest."""
    method = flags["quantizer"] or ("gptq" if flags["moments"] else "rtn")
    moments = str(flags["moments"]) if method == "gptq" else None
    return Quantizer.model_validate({"method": method, "moments": moments})


def _texts(flags: dict[str, Any]) -> list[tuple[str, Path | None]]:
    """(label, file) of every text; data sets have no file."""
    files = [(path.name, path) for path in flags["text"]]
    texts: list[tuple[str, Path | None]] = [*files, *((name, None) for name in flags["dataset"])]
    if not texts and not flags["tasks"]:
        texts = [("evaluation.txt", ASSETS / "evaluation.txt")]
    labels = [label for label, _ in texts]
    doubled = {label for label in labels if labels.count(label) > 1}
    return [(str(path) if label in doubled and path else label, path) for label, path in texts]


def _windows(flags: dict[str, Any], model: "Model") -> dict[str, Any]:
    """label -> `[n, W]` token ids of every text."""
    from llmpq.evaluation.perplexity import text_windows, window_tokens, windows_of

    window, most = window_tokens(flags["window"], model.max_positions), flags["max_windows"]
    windows = {}
    for label, path in _texts(flags):
        if path is not None:
            windows[label] = text_windows(path, model.tokenizer, window, most)
        else:
            text = named_text(label, flags["data"])
            windows[label] = windows_of(text, f"--dataset {label}", model.tokenizer, window, most)
    return windows


def _tasks(flags: dict[str, Any], until_the_end: ExitStack) -> "Task | None":
    if not flags["tasks"]:
        return None
    from llmpq.cli.eval_ways import Task
    from llmpq.evaluation.tasks import load_tasks

    console(flags["quiet"]).print("reading lm-eval's list of tasks")
    scratch = Path(until_the_end.enter_context(TemporaryDirectory(prefix="llmpq-")))
    tasks = load_tasks(flags["tasks"], flags["task_data"], flags["num_fewshot"], scratch)
    return Task(tasks, flags["limit"])


if __name__ == "__main__":
    main()
