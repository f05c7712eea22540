"""`llmpq-run`: executes a plan on prompts, under torchrun or alone."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmpq.cli.common import (
    ARGUMENTS,
    Command,
    FiniteRange,
    bound_kernel_caches,
    common_options,
    console,
)
from llmpq.cli.replan import ReplanOptions, run_and_replan, survey, worker_names
from llmpq.cli.run_options import DTYPE_NAMES, FORMATS, TOO_LONG, RunOptions
from llmpq.errors import FailedRequests, InfeasibleError, UserError, WorkerError
from llmpq.plan_data import Plan, load_plan, refuse_shared_stages

if TYPE_CHECKING:
    from llmpq.runtime.process import Role

END_S = 10.0  # at most until other workers have ended, which torchrun would end where one failed


@click.command(cls=Command)
@click.option("--plan", required=True, type=click.Path(path_type=Path), help="plan.json")
@click.option(
    "--prompts",
    required=True,
    type=click.Path(path_type=Path),
    help="prompts.jsonl; also OpenAI batch files, CSV, JSON arrays, Parquet, packed or not.",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path, allow_dash=True),
    help="out.jsonl; '-': standard output, which keeps nothing to resume.",
)
@click.option(
    "--output-format",
    type=click.Choice(FORMATS),
    default="auto",
    help="Of OUTPUT; auto: openai (its batch output) where all prompts are OpenAI batch lines.",
)
@click.option("--report", type=click.Path(path_type=Path), help="Where to write report.json.")
@click.option(
    "--trace", type=click.Path(path_type=Path), help="A Chrome trace of what ran, for Perfetto."
)
@click.option("--model", help="The model's directory, where it is not the plan's own.")
@click.option(
    "--moments", type=click.Path(path_type=Path), help="Second moments, where not at the plan's."
)
@click.option(
    "--check-quality", is_flag=True, help="Perplexity of the served weights against 16 bits."
)
@click.option(
    "--check-text", type=click.Path(path_type=Path), help="For that; default: shipped text."
)
@click.option(
    "--check-windows", type=click.IntRange(min=1), help="Of 256 tokens; default: 80 at most."
)
@click.option(
    "--cache-dir", type=click.Path(path_type=Path), help="Packed weights are kept here, and found."
)
@click.option("--dry-run", is_flag=True, help="Say what would be loaded where, and load nothing.")
@click.option(
    "--resume",
    is_flag=True,
    help="Keep finished requests of OUTPUT, do the others; failed ones again.",
)
@click.option(
    "--keep-errors", is_flag=True, help="With --resume: leave failed requests as they are."
)
@click.option(
    "--too-long",
    type=click.Choice(TOO_LONG),
    default="error",
    help="A request that is too long: fails alone (error), loses its prompt's beginning "
    "(truncate), or refuses the run (fail).",
)
@click.option(
    "--fsync",
    type=click.Choice(["always", "interval", "never"]),
    default="interval",
    help="When results are forced to the disk; interval: every second.",
)
@click.option(
    "--chat",
    is_flag=True,
    help="A prompt that is a text is a user's message: use the model's chat template.",
)
@click.option(
    "--refill/--no-refill", default=True, help="Give slots of ended requests to the next at once."
)
@click.option(
    "--prefill-chunk",
    type=click.IntRange(min=16),
    help="Tokens of a prompt computed at once; default: as planned.",
)
@click.option(
    "--graphs/--no-graphs", default=True, help="On a card, run decode steps as CUDA graphs."
)
@click.option(
    "--batch-invariant", is_flag=True, help="No token depends on its micro-batch; may be slower."
)
@click.option("--temperature", type=FiniteRange(min=0), default=0.0, help="0: greedy.")
@click.option("--top-p", type=FiniteRange(0, 1, min_open=True), default=1.0)
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="0: all tokens.")
@click.option("--seed", type=int, default=0)
@click.option("--ignore-eos", is_flag=True, help="Always generate all new tokens.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--dtype", type=click.Choice(DTYPE_NAMES), default="auto")
@click.option("--replan-on-loss", is_flag=True, help="Go on without a worker that is lost.")
@click.option(
    "--cluster", type=click.Path(path_type=Path), help="For that: what is there, if not the plan's."
)
@click.option("--profiles", type=click.Path(path_type=Path), help="For that; else spec sheets.")
@click.option(
    "--sensitivity", type=click.Path(path_type=Path), help="For that; else a built-in prior."
)
@click.option(
    "--max-quality-loss",
    type=FiniteRange(min=0),
    help="For that: percent that perplexity may rise; default: as little as fits.",
)
@common_options
def main(**flags: Any) -> None:
    """Generate for every prompt with the stages of a plan.

    Without torchrun the processes are started here, on this machine; under it each is one stage:

      torchrun --nproc-per-node 3 -m llmpq.run --plan P.json --prompts IN.jsonl --output OUT.jsonl

    \b
    Exit codes:
      0  done
      2  bad usage or bad input
      3  no plan (or run) fits
      4  a worker was lost or failed, or a file changed by others; --resume continues
      5  the run finished, but some requests failed (their lines say why;
         --resume tries them again)
    """
    from llmpq.reliability.ending import RESUME, Ended, end_process, interruptible

    with interruptible(RESUME):
        try:
            _run(flags)
        except Ended as error:  # at once: an interpreter takes seconds to end in order
            end_process(str(error), error.exit_code)


def _run(flags: dict[str, Any]) -> None:
    bound_kernel_caches()
    replanning = ReplanOptions.taken_from(flags)
    options = RunOptions(**flags)
    _check(options, replanning)
    plan = load_plan(options.plan)
    if options.check_quality:
        refuse_shared_stages(plan, options.plan)
    from llmpq.reliability.ending import SUPERVISED
    from llmpq.runtime.process import role_from_environment

    role = role_from_environment()
    if replanning.replan_on_loss and role is not None and SUPERVISED not in os.environ:
        raise UserError(
            "--replan-on-loss: needs a run that starts its own workers; under torchrun, "
            "--max-restarts N starts lost workers again"
        )
    if options.dry_run:
        from llmpq.cli.dry_run import show

        if role is None or role.rank == 0:
            show(plan, options)
    elif role is None:
        _run_here(plan, options, replanning)
    else:
        _guarded(plan, options, role)


def _check(options: RunOptions, replanning: ReplanOptions) -> None:
    """Options that do not go together."""
    if not options.check_quality and (options.check_text or options.check_windows):
        raise UserError("--check-text, --check-windows: only with --check-quality")
    if options.keep_errors and not options.resume:
        raise UserError("--keep-errors: only with --resume; a new run has no errors to keep")
    if options.streams and (options.resume or replanning.replan_on_loss):
        name = "--resume" if options.resume else "--replan-on-loss"
        raise UserError(f"{name}: needs an --output that is a file; '-' keeps no results")


def _run_here(plan: Plan, options: RunOptions, replanning: ReplanOptions) -> None:
    """Checks all input, then starts the workers (or is the only one)."""
    from llmpq.cli.run_input import prepare
    from llmpq.cli.run_work import work
    from llmpq.reliability.ending import RESUME, ended_by_signals
    from llmpq.runtime.process import Role, start_workers

    if len(worker_names(plan)) == 1:
        _warn_of_crowding(plan, options)
        with ended_by_signals(RESUME):
            failed = work(plan, options, Role(0, 1, 0, 1))
        _raise(failed)
        return
    prompts = prepare(plan, options).prompts
    _warn_of_crowding(plan, options)
    words = click.get_current_context().meta[ARGUMENTS]
    if replanning.replan_on_loss:
        _check_replan_files(plan, options, replanning)
        assert prompts is not None
        longest = max(1, *map(sum, prompts.lengths))
        run_and_replan(plan, options, survey(plan, options, replanning, longest), words)
    else:
        start_workers(words, worker_names(plan), "llmpq.run")


def _check_replan_files(plan: Plan, options: RunOptions, replanning: ReplanOptions) -> None:
    """What new plans are made from is not written over."""
    from llmpq.cli.paths import Named, check_files, profile_files
    from llmpq.cli.run_input import output_files

    writes = output_files(plan, options)
    reads: list[Named] = [
        ("--cluster", replanning.cluster),
        ("--sensitivity", replanning.sensitivity),
        *profile_files(replanning.profiles, writes),
    ]
    check_files(reads, writes)


def _guarded(plan: Plan, options: RunOptions, role: "Role") -> None:
    """One worker among several; what went wrong is said once."""
    from llmpq.cli.run_work import work
    from llmpq.reliability.ending import RESUME, SUPERVISED, end_process, ended_by_signals
    from llmpq.reliability.monitor import Monitor, restarts
    from llmpq.runtime.process import check_meeting_point, end_with_parent

    end_with_parent()
    check_meeting_point()
    names = worker_names(plan)
    if role.size != len(names):
        raise UserError(
            f"{options.plan}: the plan has {len(names)} stages but torchrun started "
            f"{role.size} processes; {_how_many(plan)}"
        )
    speaks = role.local_rank == 0
    if speaks and SUPERVISED not in os.environ:
        _warn_of_crowding(plan, options)
    if restarts():  # what has failed was tried in this very run
        options = replace(options, resume=True, keep_errors=True)
        _check(options, ReplanOptions.none())
    monitor = Monitor(role.rank, role.size, names[role.rank])
    try:
        with ended_by_signals(RESUME, speaks, monitor.look_now), monitor:
            failed = work(plan, options, role, lambda worker: monitor.rename(names[worker]))
    except (InfeasibleError, WorkerError) as error:
        # Threads may still wait inside torch.distributed, which an orderly end would not survive.
        # Of a lost worker the process that started us tells.
        told = isinstance(error, WorkerError) and SUPERVISED in os.environ
        end_process("" if told else str(error), error.exit_code)
    if failed is not None and SUPERVISED not in os.environ:
        monitor.wait_for_others(END_S)
    _raise(failed)


def _how_many(plan: Plan) -> str:
    """Processes to start, on each node."""
    from llmpq.seats import nodes_of

    parts = nodes_of(plan)
    if len(parts) == 1:
        return f"use --nproc-per-node {len(parts[0].workers)}"
    counts = [f"--nproc-per-node {len(part.workers)} on {part.name}" for part in parts]
    return f"use {', '.join(counts)} (--dry-run prints the command of each node)"


def _raise(failed: FailedRequests | None) -> None:
    if failed is not None:
        raise failed


def _warn_of_crowding(plan: Plan, options: RunOptions) -> None:
    """Says so where a rehearsal cannot be true to its slowdowns on this machine."""
    from llmpq.runtime.rehearsal import available_cores, cores_needed

    roles = [plan.cluster.rehearse.get(stage.devices[0]) for stage in plan.stages]
    slowdowns = [role.slowdown for role in roles if role is not None]
    needed, cores = cores_needed(slowdowns), available_cores()
    if slowdowns and needed > cores:
        console(options.quiet).print(
            f"warning: this rehearsal needs {needed:.1f} cores and there are {cores}; its times "
            f"will be too long. Raise the slowdowns by {needed / cores:.2f}x or more."
        )


if __name__ == "__main__":
    main()
