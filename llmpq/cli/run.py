"""`llmpq-run`: executes a plan on prompts, under torchrun or alone.

Alone, this process starts the workers and waits; when one is lost and `--replan-on-loss` is given,
it plans for those that are left (`planner.replanning`) and starts again with --resume.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmpq.artifact import write_json
from llmpq.cli.common import bound_kernel_caches, command_words, console, emit
from llmpq.cli.options import command
from llmpq.cli.run_options import RunOptions, check_options, read_inputs, replan_path
from llmpq.errors import FailedRequests, InfeasibleError, UserError, WorkerError
from llmpq.plan_data import Plan, diff, load_plan, refuse_shared_stages
from llmpq.seats import nodes_of, worker_names

if TYPE_CHECKING:
    from llmpq.planner.replanning import ReplanInputs
    from llmpq.runtime.process import LostWorkers, Role

END_S = 10.0  # at most, for other workers to end: torchrun kills them when one fails


@command(RunOptions)
def main(options: RunOptions) -> None:
    """Generate for every prompt with the stages of a plan.

    Without torchrun, this command starts one process per device of the plan on this machine; under
    torchrun, each process is one of them:

      torchrun --nproc-per-node 3 -m llmpq.run --plan P.json --prompts IN.jsonl --output OUT.jsonl

    \b
    Exit codes:
      0  done
      2  bad usage or bad input
      3  no plan (or run) fits
      4  a worker was lost or failed, or others changed a file; --resume continues
      5  the run finished, but some requests failed (their lines say why;
         --resume tries them again)
    """
    from llmpq.reliability.ending import RESUME, Ended, end_process, interruptible

    with interruptible(RESUME):
        try:
            _run(options)
        except Ended as error:  # ends at once, as an interpreter takes seconds to shut down
            end_process(str(error), error.exit_code)


def _run(options: RunOptions) -> None:
    bound_kernel_caches()
    check_options(options)
    plan = load_plan(options.plan)
    if options.check_quality:
        refuse_shared_stages(plan, options.plan)
    from llmpq.reliability.ending import SUPERVISED
    from llmpq.runtime.process import role_from_environment

    role = role_from_environment()
    if options.replan_on_loss and role is not None and SUPERVISED not in os.environ:
        raise UserError(
            "--replan-on-loss: needs a run that starts its own workers; under torchrun, "
            "--max-restarts N starts lost workers again"
        )
    if options.dry_run:
        if role is None or role.rank == 0:
            _dry_run(plan, options)
    elif role is None:
        _run_here(plan, options)
    else:
        _guarded(plan, options, role)


def _dry_run(plan: Plan, options: RunOptions) -> None:
    """Checks all input, tells what would be done, and writes it where --json says."""
    from llmpq.cli.run_work import report_to
    from llmpq.dry_run import dry_run
    from llmpq.render.dry_run_view import print_dry_run
    from llmpq.render.plan_report import print_notes

    inputs = read_inputs(plan, options)
    found = dry_run(plan, inputs, options.device, options.dtype, _words_of_run())
    emit(found.model_dump_json(indent=1), options.json_path)
    print_dry_run(report_to(options), plan, found)
    print_notes(console(options.quiet), found.notes)


def _words_of_run() -> list[str]:
    """Returns the command line without --dry-run and its --json."""
    words, kept = command_words(), []
    while words:
        word = words.pop(0)
        if word == "--json":
            words = words[1:]
        elif word != "--dry-run" and not word.startswith("--json="):
            kept.append(word)
    return kept


def _run_here(plan: Plan, options: RunOptions) -> None:
    """Checks all input, then starts the workers (or is the only one)."""
    from llmpq.cli.run_work import work
    from llmpq.reliability.ending import RESUME, ended_by_signals
    from llmpq.runtime.process import Role, start_workers

    if len(worker_names(plan)) == 1:
        _warn_of_crowding(plan, options)
        with ended_by_signals(RESUME):
            failed = work(plan, options, Role(0, 1, 0, 1))
        _raise(failed)
        return
    prompts = read_inputs(plan, options).led_prompts
    _warn_of_crowding(plan, options)
    words = command_words()
    if options.replan_on_loss:
        longest = max(1, *map(sum, prompts.lengths))
        _run_and_replan(options, _replan_inputs(plan, options, longest), words)
    else:
        start_workers(words, worker_names(plan), "llmpq.run")


def _guarded(plan: Plan, options: RunOptions, role: "Role") -> None:
    """Runs as one worker among several; one of them tells what went wrong."""
    from llmpq.cli.run_work import work
    from llmpq.reliability.ending import RESUME, SUPERVISED, end_process, ended_by_signals
    from llmpq.reliability.monitor import Monitor, restarts
    from llmpq.runtime.process import check_meeting_point, end_with_parent

    end_with_parent()
    check_meeting_point()
    names = worker_names(plan)
    if role.size != len(names):
        raise UserError(
            f"{options.plan}: the plan has {len(names)} workers but torchrun started "
            f"{role.size} processes; {_how_many(plan)}"
        )
    speaks = role.local_rank == 0
    if speaks and SUPERVISED not in os.environ:
        _warn_of_crowding(plan, options)
    if restarts():  # failed requests were already tried in this run
        options = replace(options, resume=True, keep_errors=True)
        check_options(options)
    monitor = Monitor(role.rank, role.size, names[role.rank])
    try:
        with ended_by_signals(RESUME, speaks, monitor.look_now), monitor:
            failed = work(plan, options, role, lambda worker: monitor.rename(names[worker]))
    except (InfeasibleError, WorkerError) as error:
        # Threads may still wait inside torch.distributed, which an orderly end would not survive.
        # The process that started this one tells which worker was lost.
        told = isinstance(error, WorkerError) and SUPERVISED in os.environ
        end_process("" if told else str(error), error.exit_code)
    if failed is not None and SUPERVISED not in os.environ:
        monitor.wait_for_others(END_S)
    _raise(failed)


def _how_many(plan: Plan) -> str:
    """Returns how many processes to start on each node."""
    parts = nodes_of(plan)
    if len(parts) == 1:
        return f"use --nproc-per-node {len(parts[0].workers)}"
    counts = [f"--nproc-per-node {len(part.workers)} on {part.name}" for part in parts]
    return f"use {', '.join(counts)} (--dry-run prints the command of each node)"


def _raise(failed: FailedRequests | None) -> None:
    if failed is not None:
        raise failed


def _warn_of_crowding(plan: Plan, options: RunOptions) -> None:
    """Warns where a rehearsal cannot be true to its slowdowns on this machine."""
    from llmpq.runtime.rehearsal import available_cores, cores_needed

    roles = [plan.cluster.rehearse.get(stage.devices[0]) for stage in plan.stages]
    slowdowns = [role.slowdown for role in roles if role is not None]
    needed, cores = cores_needed(slowdowns), available_cores()
    if slowdowns and needed > cores:
        console(options.quiet).print(
            f"warning: this rehearsal needs {needed:.1f} cores and there are {cores}; its times "
            f"will be too long. Raise the slowdowns by {needed / cores:.2f}x or more."
        )


# ---- lost workers


def _replan_inputs(plan: Plan, options: RunOptions, longest: int) -> "ReplanInputs":
    """Reads what new plans are made from, before the first worker starts."""
    from llmpq.planner.input_files import InputFiles
    from llmpq.planner.replanning import absolute_quantizer, load_replan_inputs

    files = InputFiles(
        cluster=options.cluster,
        profiles=options.profiles,
        sensitivity=options.sensitivity,
        plan_folder=options.output.parent,
    )
    quantizer = absolute_quantizer(plan, options.plan, options.moments)
    return load_replan_inputs(plan, files, quantizer, longest, options.max_quality_loss)


def _run_and_replan(options: RunOptions, inputs: "ReplanInputs", words: Sequence[str]) -> None:
    """Runs a plan with workers of this process's own; plans and starts again after each loss."""
    from llmpq.reliability.ending import RESUME
    from llmpq.runtime.cards_here import cards_left, workers_cards
    from llmpq.runtime.process import LostWorkers, start_workers

    before, number = _state(options.output), 0
    plan, more = inputs.plan, list(words)
    cards = workers_cards(plan, options.device)
    while True:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(cards)} if cards and number else {}
        try:
            start_workers(more, worker_names(plan), "llmpq.run", RESUME, visible)
            return
        except LostWorkers as loss:
            number += 1
            new = _plan_after(loss, inputs, plan, replan_path(options, number), options.quiet)
            cards, plan = cards_left(cards, plan, loss.ranks, new), new
        begun = options.resume or _state(options.output) != before
        more = [*words, f"--plan={replan_path(options, number)}", *(["--resume"] if begun else [])]


def _plan_after(
    loss: "LostWorkers", inputs: "ReplanInputs", plan: Plan, path: Path, quiet: bool
) -> Plan:
    """Makes the next plan, writes it to `path` and prints what changes."""
    from llmpq.planner.replanning import plan_without
    from llmpq.reliability.ending import RESUME

    out = console(quiet)
    out.print(f"{loss.what}; planning for the devices that are left", soft_wrap=True)
    try:
        new, notes = plan_without(inputs, plan, loss.ranks)
    except InfeasibleError as error:
        raise InfeasibleError(
            f"{loss.what}; no plan fits the devices that are left\n{error}\n{RESUME}"
        ) from None
    write_json(path, new)
    for line in [*str(diff(plan, new)).splitlines(), *notes]:
        out.print(f"  {line}", soft_wrap=True)
    out.print(f"continuing with {path}", soft_wrap=True)
    return new


def _state(output: Path) -> tuple[int, int, int] | None:
    """Returns a value that changes once this run has begun to write its output."""
    try:
        found = output.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


if __name__ == "__main__":
    main()
