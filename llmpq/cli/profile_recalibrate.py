"""`llmpq-profile recalibrate`: run reports -> corrected profiles, and whether to plan anew.

Reads reports and the profiles that their plans were made with, asks `planner.recalibration` what
they say, writes a full profile of each type, and reports it. Imports no torch.
"""

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmpq.cli.common import console, emit, report_console
from llmpq.cli.options import CostOptions, FiniteRange, arguments, command, option, required
from llmpq.cli.paths import Named, check_files, profile_files
from llmpq.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from llmpq.planner.recalibration import Recalibration, Replanned, TypeResult


@dataclass(frozen=True, kw_only=True)
class RecalibrateOptions(CostOptions):
    """What the command line asks for."""

    report: tuple[Path, ...] = required("report.json of llmpq-run.", "--report", multiple=True)
    cluster: Path | None = option("cluster.yaml, where it is no longer the plan's.")
    profiles: Path | None = option("Folder of the profiles that the plan was made with.")
    max_quality_loss: float | None = option(
        "Percent by which perplexity may rise in a new plan; default: what the plan loses.",
        type=FiniteRange(min=0),
    )
    time_limit: float = option("Seconds of planning.", default=20.0, type=FiniteRange(min=0.1))
    output: Path = required("Folder for corrected profiles.", "-o", "--output")
    more: tuple[Path, ...] = arguments()


@command(RecalibrateOptions)
def recalibrate(options: RecalibrateOptions) -> None:
    """Correct profiles by what runs measured, and see if another plan is now better.

    MORE: further reports of the same model (--report A.json B.json ...).
    """
    from llmpq.artifact import SCHEMA_VERSION, Provenance
    from llmpq.planner.recalibration import replanned, type_result
    from llmpq.planner.recalibration_report import past_runs
    from llmpq.render.profile_view import print_past_runs
    from llmpq.render.progress import progress

    asked = _read(options)
    _check_files(options, asked)
    results = [type_result(asked, name) for name in asked.device_types]
    written = _write(options.output, asked, results)
    past = past_runs(asked, results)
    out = report_console(options.quiet, options.json_path)
    print_past_runs(out, past, options.verbose)
    for note in past.notes:
        console(options.quiet).print(f"note: {note}")
    with progress(console(options.quiet), "planning", 1) as bar:
        found = replanned(asked, results, lambda s: bar.update(s.done, s.phase, s.total))
    value = {
        "schema_version": SCHEMA_VERSION,
        "kind": "recalibration",
        **asdict(past),
        "profiles": [str(path) for path in written],
        **_tell_next(options, asked, found, out),
        "provenance": Provenance.here().model_dump(),
    }
    emit(json.dumps(value, indent=1), options.json_path)


def _read(options: RecalibrateOptions) -> "Recalibration":
    from llmpq.cluster import load_cluster
    from llmpq.planner.recalibration import Recalibration, check_alike
    from llmpq.planner.recalibration_report import read_run
    from llmpq.profile_data import load_profiles

    runs = [read_run(path) for path in (*options.report, *options.more)]
    profiles, output = options.profiles, options.output
    if profiles is not None and os.path.realpath(output) == os.path.realpath(profiles):
        raise UserError(f"-o {output}: is the folder of --profiles; corrected ones need their own")
    cluster = load_cluster(options.cluster) if options.cluster else runs[-1].plan.cluster
    check_alike(runs, cluster)
    return Recalibration(
        tuple(runs),
        cluster,
        tuple(load_profiles(profiles)) if profiles else (),
        options.sensitivity,
        options.max_quality_loss,
        options.time_limit,
    )


def _check_files(options: RecalibrateOptions, asked: "Recalibration") -> None:
    """Raises `UserError` where a file to be written is read, or is another one of these."""
    names = [*map(_file_name, asked.device_types), "cluster.yaml", "workload.yaml"]
    writes: list[Named] = [("a file of -o", options.output / name) for name in names]
    writes += [("--json", options.json_path)]
    reads: list[Named] = [("--report", run.path) for run in asked.runs]
    reads += [("--cluster", options.cluster), ("--sensitivity", asked.sensitivity)]
    check_files([*reads, *profile_files(options.profiles, writes)], writes)


def _file_name(device_type: str) -> str:
    """Returns the name of a type's profile, whatever the type is called."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', device_type)}.json"


def _write(output: Path, asked: "Recalibration", results: "Sequence[TypeResult]") -> list[Path]:
    """Writes a profile for each type, and the cluster and workload that a new plan needs."""
    import yaml

    from llmpq.artifact import write_json, write_text

    written = []
    for result in results:
        if result.profile is not None:
            path = output / _file_name(result.name)
            write_json(path, result.profile)
            written.append(path)
    for name, value in (("cluster", asked.cluster), ("workload", asked.runs[-1].plan.workload)):
        data = value.model_dump(mode="json", exclude_none=True)
        write_text(output / f"{name}.yaml", yaml.safe_dump(data, sort_keys=False))
    return written


def _tell_next(
    options: RecalibrateOptions, asked: "Recalibration", found: "Replanned", out: "Console"
) -> Mapping[str, object]:
    """Prints whether another plan is now better, and returns the same as JSON."""
    from llmpq.plan_data import diff
    from llmpq.planner.recalibration import tokens_per_s

    speed, best_speed, gain = tokens_per_s(found.now), tokens_per_s(found.best), found.gain_percent
    worth = found.is_worth_it
    changed = diff(found.now, found.best) if worth and found.now and found.best else None
    command_line = _command(options, asked, found.percent) if worth else None
    now = f"{speed:.1f} tokens/s" if speed else "cannot run on this cluster"
    best = f"{best_speed:.1f} tokens/s" if best_speed else "none was found"
    out.print(f"quality: {found.why}")
    out.print(f"plan that ran, at corrected times: {now}")
    out.print(f"best plan now: {best}")
    if gain is not None:
        out.print(
            f"another plan is better by {gain:.1f} %" if worth else "the plan is still the best"
        )
    if changed:
        out.print(str(changed))
    if command_line:
        out.print(f"make it: {command_line}", soft_wrap=True)
    return {
        "plan_tokens_per_s": speed,
        "best_tokens_per_s": best_speed,
        "gain_percent": gain,
        "changes": str(changed).splitlines() if changed else [],
        "command": command_line,
    }


def _command(options: RecalibrateOptions, asked: "Recalibration", percent: float) -> str:
    """Returns the command line that makes the best plan."""
    output = options.output
    words: list[object] = ["llmpq-plan", "--model", asked.runs[-1].plan.model.name]
    words += ["--cluster", options.cluster or output / "cluster.yaml"]
    words += ["--workload", output / "workload.yaml", "--profiles", output]
    if asked.sensitivity:
        words += ["--sensitivity", asked.sensitivity]
    words += ["--max-quality-loss", f"{percent:g}", "-o", "plan.json"]
    return shlex.join(map(str, words))
