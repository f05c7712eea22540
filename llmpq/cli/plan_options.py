"""The options of `llmpq-plan`: what they are, which go together, and the problem that they pose."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from llmpq.cli.options import CostOptions, FiniteRange, Listed, arguments, option
from llmpq.cli.paths import Named, check_files, model_files, profile_files, trace_files
from llmpq.errors import UserError
from llmpq.planning_methods import PlanningMethod

if TYPE_CHECKING:
    from llmpq.plan_data import Plan
    from llmpq.planner.problem import Problem


@dataclass(frozen=True, kw_only=True)
class PlanOptions(CostOptions):
    """What the command line of `llmpq-plan` asks for."""

    model: str | None = option("Hugging Face id, directory or config.json [default: tiny-tales]")
    workload: Path | None = option("workload.yaml: lengths and number of requests.")
    max_quality_loss: float | None = option(
        "Percent by which perplexity may rise [default: 1.0]", type=FiniteRange(min=0)
    )
    theta: float | None = option(
        "Instead of a budget: seconds that one unit of summed sensitivity is worth.",
        type=FiniteRange(min=0),
    )
    precisions: tuple[str, ...] | None = option(
        "Allowed precisions, as in 16,8,4,3 [default: all that have times]", type=Listed()
    )
    method: Literal[PlanningMethod, "flexgen"] = option(
        "auto: search with a bound on the gap to the optimum; ilp: the plain integer linear "
        "program, for reference; heuristic: local moves only; the others are baselines.",
        default="auto",
    )
    solver: Literal["highs", "gurobi"] = option("Solver of linear programs.", default="highs")
    tensor_parallel: str = option(
        "Stages of several devices of a node, at most N; not yet measured on GPUs.",
        default="off",
        metavar="[off|auto|N]",
    )
    target: Literal["llmpq", "vllm"] = option(
        "What runs the plan: llmpq-run, or stock vLLM after llmpq-export.", default="llmpq"
    )
    frontier: bool = option("Throughput against quality loss, as a table and a PNG.", default=False)
    compare_clusters: bool = option(
        "Plan for each of the cluster files that follow: which one to buy.", default=False
    )
    gap: float = option(
        "Stop when no plan can be better by more than this share.",
        default=0.005,
        type=FiniteRange(0, 1, max_open=True),
    )
    time_limit: float = option(
        "Seconds of planning; the best plan so far is kept.",
        default=60.0,
        type=FiniteRange(min=0, min_open=True),
    )
    compare: bool = option("Show the baselines.", default=True)
    what_if: bool = option("Show what would change the plan.", default=True)
    evaluate: Path | None = option("Predict the run of this plan.json instead of making a plan.")
    trace: Path | None = option("Simulate the plan's run and write it for chrome://tracing.")
    output: Path | None = option("Write the plan here.", "-o", "--output")
    baseline_plans: Path | None = option("Write each baseline's plan into this folder.")
    clusters: tuple[Path, ...] = arguments()

    @property
    def plan_folder(self) -> Path | None:
        """The folder that all plans are written to; None where there are several, or none."""
        folder = self.output.parent if self.output else None
        others = self.baseline_plans
        is_shared = folder is None or others is None or others.resolve() == folder.resolve()
        return folder if is_shared else None


def check_options(options: PlanOptions) -> None:
    """Raises one `UserError` with all that does not go together, then checks the files."""
    faults = _trace_faults(options) if options.trace is not None else []
    if options.theta is not None and options.max_quality_loss is not None:
        faults.append("give --max-quality-loss or --theta, not both")
    faults += _mode_faults(options)
    degree = options.tensor_parallel
    is_number = degree.isascii() and degree.isdecimal() and int(degree) > 0
    if options.target == "vllm" and degree != "off":
        faults.append("--target vllm: stages of several devices are not planned for vLLM yet")
    if degree not in ("off", "auto") and not is_number:
        faults.append(f"--tensor-parallel {degree}: expected off, auto or a number such as 4")
    if options.evaluate is None:
        if options.cluster is None and not options.compare_clusters:
            faults.append("--cluster is missing: give its YAML file")
        if options.workload is None:
            faults.append("--workload is missing: give its YAML file")
    if faults:
        raise UserError("\n".join(faults))
    _check_files(options)


def _trace_faults(options: PlanOptions) -> list[str]:
    modes = {
        "--frontier": options.frontier,
        "--compare-clusters": options.compare_clusters,
        "--method flexgen": options.method == "flexgen" and options.evaluate is None,
    }
    return [f"--trace shows one plan's run; leave out {name}" for name, on in modes.items() if on]


def _mode_faults(options: PlanOptions) -> list[str]:
    modes = {
        "--evaluate": options.evaluate is not None,
        "--frontier": options.frontier,
        "--compare-clusters": options.compare_clusters,
    }
    chosen = [name for name, on in modes.items() if on]
    faults = [f"give only one of {', '.join(chosen)}"] if len(chosen) > 1 else []
    others = options.frontier or options.compare_clusters
    if others and options.method not in ("auto", "flexgen"):
        faults.append(f"{chosen[0]} plans by --method auto; leave out --method {options.method}")
    if options.compare_clusters and options.output is not None:
        faults.append("--compare-clusters writes no plan; leave out -o (--json writes the table)")
    if options.baseline_plans is not None and not options.compare:
        faults.append("--baseline-plans needs the baselines; leave out --no-compare")
    if options.compare_clusters and len(options.clusters) < 2:
        faults.append("--compare-clusters needs two cluster files or more: A.yaml B.yaml")
    if options.clusters and not options.compare_clusters:
        names = " ".join(map(str, options.clusters))
        faults.append(f"unexpected {names}; cluster files follow --compare-clusters or --cluster")
    if options.frontier and options.theta is not None:
        faults.append("--frontier plans for each quality loss; leave out --theta")
    if options.method == "flexgen" and options.output is not None:
        faults.append("--method flexgen has no plan file, as llmpq-run cannot run it; leave out -o")
    return faults


def _check_files(options: PlanOptions) -> None:
    """Raises `UserError` where a file to be written is read, or is another one of these."""
    output, folder = options.output, options.baseline_plans
    picture = output.with_suffix(".frontier.png") if output and options.frontier else None
    writes: list[Named] = [
        ("-o", output),
        ("--json", options.json_path),
        ("--trace", options.trace),
        ("the picture of --frontier", picture),
    ]
    if folder is not None:
        plans = [folder / f"{method}.json" for method in get_args(PlanningMethod)]
        writes += [("a plan of --baseline-plans", path) for path in plans]
    reads: list[Named] = [
        ("--cluster", options.cluster),
        ("--workload", options.workload),
        ("--sensitivity", options.sensitivity),
        ("--evaluate", options.evaluate),
        *(("a cluster file", path) for path in options.clusters),
        *model_files(options.model),
        *trace_files(options.workload),
        *profile_files(options.profiles, writes),
    ]
    check_files(reads, writes)


def pose(
    options: PlanOptions, plan: "Plan | None" = None
) -> "tuple[Problem, list[str], list[str]]":
    """Returns the problem that files and options pose, all precisions on offer, and notes.

    `plan`: one whose run is predicted; it stands for what is not given.
    """
    from llmpq.planner.input_files import InputFiles, read_inputs
    from llmpq.planner.inputs import Wishes, make_problem

    files = InputFiles(
        model=options.model,
        cluster=options.cluster,
        workload=options.workload,
        profiles=options.profiles,
        sensitivity=options.sensitivity,
        plan_folder=options.plan_folder,
    )
    parallel, target = options.tensor_parallel, options.target
    wishes = Wishes(options.precisions, max_loss(options), options.theta, parallel, target)
    return make_problem(read_inputs(files, plan), wishes, plan, str(options.workload or ""))


def max_loss(options: PlanOptions) -> float:
    """Percent by which perplexity may rise."""
    from llmpq.costs.quality import DEFAULT_MAX_LOSS_PERCENT

    asked = options.max_quality_loss
    return DEFAULT_MAX_LOSS_PERCENT if asked is None else asked
