"""One worker's part of `llmpq-run`: input is checked, the stage loaded, the batch run, told."""

import os
import sys
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

from llmpq.cli.common import console
from llmpq.cli.kernel_notes import say_engine, say_kernels
from llmpq.cli.loading import shown_compiling, shown_loading
from llmpq.cli.run_input import Prepared, prepare
from llmpq.cli.run_lead import (
    finish,
    lead,
    needs_no_engine,
    open_results,
    say_first,
    told_outcome,
    with_hashes,
)
from llmpq.cli.run_options import RunOptions
from llmpq.costs.float16 import run_overflow
from llmpq.errors import FailedRequests, InfeasibleError, UserError
from llmpq.plan_data import Plan
from llmpq.seats import Seat, stage_ranks

if TYPE_CHECKING:
    from llmpq.models.sharding import ShardGroup
    from llmpq.runtime.process import Role


def work(
    plan: Plan, options: RunOptions, role: "Role", on_seated: Callable[[int], object] = lambda _: 0
) -> FailedRequests | None:
    """This process's part of the run; the leader's, where requests failed, returns what to say.

    `on_seated` is told which worker of the plan this process is. The first one leads.
    """
    from llmpq.runtime.process import disconnect

    try:
        seats, prepared = _begin(plan, options, role, on_seated)
        return _work(plan, options, role, seats, prepared)
    finally:
        disconnect()


def _begin(
    plan: Plan, options: RunOptions, role: "Role", on_seated: Callable[[int], object]
) -> tuple[list[Seat], Prepared]:
    """The workers' seats, and the input. Bad input is said once on each machine."""
    from llmpq.runtime.cards import find_seats

    worker = None
    try:
        seats, without_cards = find_seats(plan, role, options.device)
        worker, _ = seats[role.rank]
        on_seated(worker)
        if without_cards and worker == 0:
            _warn_of_cpu(plan, options)
        return seats, prepare(plan, options, leads=worker == 0)
    except UserError:
        if role.local_rank == 0 or worker == 0:  # the leader reads what others do not
            raise
        sys.exit(UserError.exit_code)  # the first worker on this machine finds and says the same


def _warn_of_cpu(plan: Plan, options: RunOptions) -> None:
    """A plan for cards on a machine that has none is a trial, and should look like one."""
    types = {device for stage in plan.stages for device in stage.devices}
    cards = sorted(name for name in types if plan.cluster.kind_of(name) == "gpu")
    if cards:
        console(options.quiet).print(
            f"warning: the plan is for {', '.join(cards)} and torch sees no card here: its stages "
            "run on the CPU",
            soft_wrap=True,
        )


def _work(
    plan: Plan, options: RunOptions, role: "Role", seats: list[Seat], prepared: Prepared
) -> FailedRequests | None:
    """What follows once every process knows its seat."""
    import torch

    from llmpq.evaluation.pipeline_loss import follow_text
    from llmpq.reliability.ending import SUPERVISED
    from llmpq.reliability.monitor import restarts
    from llmpq.runtime.process import all_gather, connect

    worker, _ = seats[role.rank]
    results = open_results(plan, options, prepared) if worker == 0 else None
    under_torchrun = role.size > 1 and SUPERVISED not in os.environ
    ends = results is not None and needs_no_engine(results, prepared, options, restarts() > 0)
    if any(int(told) for told in all_gather(torch.tensor(int(ends)), role)):  # the leader told it
        if results is None:
            return None
        with closing(results):
            say_first(plan, options, prepared, results)
        return told_outcome(results, prepared, options, under_torchrun)
    device = _claim_device(plan, options, role, seats)
    transport, group = connect(role, device, stage_ranks(plan, seats))
    try:
        engine = _engine(plan, options, prepared, device, transport, group)
        stage = engine.worker.stage
        if stage.shard.leads:
            say_kernels(plan, transport.rank, device, stage.dtype, worker == 0, options.quiet)
        graphs_note = say_engine(engine, options.quiet)
        if results is not None:
            report, served = lead(engine, plan, options, prepared, results)
            say_engine(engine, options.quiet, graphs_note)
            dtype = stage.dtype
            del engine, stage  # its memory is wanted for the layers of the 16-bit model
            bad = finish(report, served, options, prepared, dtype, device)
            return told_outcome(results, prepared, options, under_torchrun, dtype, bad)
        else:
            engine.start_clock(trace=options.trace is not None)
            engine.follow()
            say_engine(engine, options.quiet, graphs_note)
            engine.measure(with_hashes(options))
            if options.trace is not None:
                engine.trace()
            if options.check_quality:
                follow_text(engine)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise InfeasibleError(
            f"stage {transport.rank} ran out of memory on {device}: {reason}"
        ) from None
    return None


def _claim_device(plan: Plan, options: RunOptions, role: "Role", seats: list[Seat]) -> Any:
    """The device of this process; a rehearsed one on the CPU has a core to itself."""
    import torch

    from llmpq.runtime.process import card_device, choose_device
    from llmpq.runtime.rehearsal import own_core

    rehearsed = bool(plan.cluster.rehearse)
    _, card = seats[role.rank]
    if card is not None:
        return card_device(card)
    others_have_cards = any(taken is not None for _, taken in seats)
    if not rehearsed and (options.device == "auto" or others_have_cards):
        return torch.device("cpu")
    auto_on_cpu = rehearsed and options.device == "auto"
    device = choose_device("cpu" if auto_on_cpu else options.device, role)
    if rehearsed and device.type == "cpu":
        torch.set_num_threads(1)
        own_core(role.rank, role.size)
    return device


def _engine(
    plan: Plan,
    options: RunOptions,
    prepared: Prepared,
    device: Any,
    transport: Any,
    group: "ShardGroup | None",
) -> Any:
    """This process's stage, its weights loaded."""
    from llmpq.quant.humming_jit import keep_kernels_in
    from llmpq.runtime.engine import StageEngine
    from llmpq.runtime.process import choose_dtype
    from llmpq.runtime.sampler import Sampling

    dtype = choose_dtype(options.dtype, device, transport)
    warning = run_overflow(plan.model.model_type, str(dtype).removeprefix("torch."))
    if warning and transport.rank == 0:
        console(options.quiet).print(warning, soft_wrap=True)
    if options.cache_dir is not None and device.type == "cuda":
        keep_kernels_in(options.cache_dir)
    with shown_loading(plan, transport.rank, options, prepared.cache, group) as packed:
        return StageEngine(
            plan,
            prepared.config,
            prepared.weights,
            transport,
            dtype,
            device,
            Sampling(options.temperature, options.top_k, options.top_p, options.seed),
            prepared.eos_ids,
            roundings=prepared.roundings,
            packed=packed,
            group=group,
            graphs=options.graphs,
            batch_invariant=options.batch_invariant,
            on_compiled=shown_compiling(transport.rank, options),
        )
