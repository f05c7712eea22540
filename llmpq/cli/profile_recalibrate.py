"""`llmpq-profile recalibrate`: run reports -> corrected profiles, and whether to plan anew.

Reads reports and the profiles that their plans were made with, asks `planner.recalibration` what
they say, writes a full profile of each type, and tells it (`recalibrate_output`). Imports no torch.
"""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmpq.cli.common import Command, FiniteRange, common_options, console, emit
from llmpq.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from llmpq.planner.recalibration import Recalibration, Replanned, Run, TypeResult

PATH = click.Path(path_type=Path)


@click.command(cls=Command, name="recalibrate")
@click.option("--report", "first", multiple=True, required=True, type=PATH, help="Of llmpq-run.")
@click.option("--profiles", type=PATH, help="Folder of the profiles that the plan was made with.")
@click.option("--cluster", type=PATH, help="cluster.yaml, where it is not the plan's any more.")
@click.option("--sensitivity", type=PATH, help="sensitivity.json; without: a built-in prior.")
@click.option(
    "--max-quality-loss",
    type=FiniteRange(min=0),
    help="Percent of perplexity for a new plan; without: what the plan loses.",
)
@click.option("--time-limit", type=FiniteRange(min=0.1), default=20.0, show_default=True)
@click.option("-o", "--output", required=True, type=PATH, help="Folder for corrected profiles.")
@click.argument("more", nargs=-1, type=PATH)
@common_options
def recalibrate(**flags: Any) -> None:
    """Correct profiles by what runs measured, and see if another plan is now better.

    MORE: further reports of the same model (--report A.json B.json ...).
    """
    from llmpq.cli.recalibrate_output import Files, tell_next, tell_past
    from llmpq.planner.recalibration import type_result

    asked = _asked(flags)
    files = Files(flags["output"], flags["cluster"])
    _check_files(flags, asked)
    out = console(flags["quiet"])
    results = [type_result(asked, name) for name in asked.device_types]
    written = _write(files.output, asked, results)
    value = tell_past(asked, results, out, flags["verbose"])
    value["profiles"] = [str(path) for path in written]
    value |= tell_next(asked, _replanned(asked, results, out), files, out)
    _emit(value, flags["json_path"])


def _asked(flags: dict[str, Any]) -> "Recalibration":
    from llmpq.cluster import load_cluster
    from llmpq.planner.recalibration import Recalibration, check_alike
    from llmpq.profile_data import load_profiles

    runs = [_run(path) for path in (*flags["first"], *flags["more"])]
    profiles, output = flags["profiles"], flags["output"]
    if profiles is not None and os.path.realpath(output) == os.path.realpath(profiles):
        raise UserError(f"-o {output}: is the folder of --profiles; corrected ones need their own")
    cluster = load_cluster(flags["cluster"]) if flags["cluster"] else runs[-1].plan.cluster
    check_alike(runs, cluster)
    return Recalibration(
        tuple(runs),
        cluster,
        tuple(load_profiles(profiles)) if profiles else (),
        flags["sensitivity"],
        flags["max_quality_loss"],
        flags["time_limit"],
    )


def _check_files(flags: dict[str, Any], asked: "Recalibration") -> None:
    """No file is written that is read, or written as another one."""
    from llmpq.cli.paths import Named, check_files, profile_files

    names = [*map(_file_name, asked.device_types), "cluster.yaml", "workload.yaml"]
    writes: list[Named] = [("a file of -o", flags["output"] / name) for name in names]
    writes += [("--json", flags["json_path"])]
    reads: list[Named] = [("--report", run.path) for run in asked.runs]
    reads += [("--cluster", flags["cluster"]), ("--sensitivity", asked.sensitivity)]
    check_files([*reads, *profile_files(flags["profiles"], writes)], writes)


def _file_name(device_type: str) -> str:
    """Of a type's profile, whatever the type is called."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', device_type)}.json"


def _run(path: Path) -> "Run":
    """A report that holds what is needed."""
    from llmpq.artifact import parse_json, show_value, validate
    from llmpq.planner.recalibration import Run
    from llmpq.report import Report

    data = parse_json(path)
    kind = data.get("kind", "something else") if isinstance(data, dict) else "something else"
    if kind != "report":
        raise UserError(
            f"{path}: is of the kind {show_value(kind)}, expected a report, as "
            "'llmpq-run --report' writes it"
        )
    report = validate(data, Report, path)
    if report.plan is None or not any(stage.measured for stage in report.stages):
        raise UserError(
            f"{path}: holds no measured stage times; run again with this version: "
            f"llmpq-run ... --report {path}"
        )
    if len(report.stages) != len(report.plan.stages):
        raise UserError(
            f"{path}: has {len(report.stages)} stages, its plan {len(report.plan.stages)}"
        )
    return Run(path, report, report.plan)


def _write(output: Path, asked: "Recalibration", results: "Sequence[TypeResult]") -> list[Path]:
    """A profile for each type, and the cluster and workload that a new plan needs."""
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


def _replanned(
    asked: "Recalibration", results: "Sequence[TypeResult]", out: "Console"
) -> "Replanned":
    from llmpq.cli.progress import progress
    from llmpq.planner.recalibration import replanned

    with progress(out, "planning", 1) as bar:
        return replanned(asked, results, lambda s: bar.update(s.done, s.phase, s.total))


def _emit(value: dict[str, Any], path: Path | None) -> None:
    from llmpq.artifact import SCHEMA_VERSION, Provenance

    head = {"schema_version": SCHEMA_VERSION, "kind": "recalibration"}
    tail = {"provenance": Provenance.here().model_dump()}
    emit(json.dumps(head | value | tail, indent=1), path)
