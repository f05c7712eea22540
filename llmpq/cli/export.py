"""`llmpq-export`: writes a plan for another engine, with its weights. Now for stock vLLM."""

from dataclasses import dataclass
from pathlib import Path

import click

from llmpq.cli.common import PlainErrors, console, emit, report_console
from llmpq.cli.options import HELP, CommonOptions, command, option, required
from llmpq.cli.paths import check_files, model_files
from llmpq.errors import UserError
from llmpq.plan_data import load_plan
from llmpq.version import __version__


@dataclass(frozen=True, kw_only=True)
class ExportOptions(CommonOptions):
    """What the command line of `llmpq-export vllm` asks for."""

    plan: Path = required("plan.json, as llmpq-plan writes it.", type=click.Path(path_type=Path))
    output: Path = required(
        "The folder to make.", "-o", "--output", type=click.Path(path_type=Path)
    )
    model: str | None = option("Directory of the model's weights; default: the plan's.")
    moments: Path | None = option(
        "Calibration statistics for gptq; default: the file that the plan names."
    )


class ExportGroup(PlainErrors, click.Group):
    """One command for each engine."""


@click.group(cls=ExportGroup, context_settings=HELP)
@click.version_option(__version__, prog_name="llmpq")
def main() -> None:
    """Export a plan to another engine."""


@command(ExportOptions, "vllm")
def vllm(options: ExportOptions) -> None:
    """Write a plan as a mixed-precision checkpoint with the files that start stock vLLM.

    The weights have the codes that llmpq-run serves. Prints what to run next.
    """
    reads = [("--plan", options.plan), ("--moments", options.moments)]
    plan = load_plan(options.plan)
    model = options.model or plan.model.name
    check_files([*reads, *model_files(model)], [("--json", options.json_path)])
    if options.moments is not None and plan.quantizer.method != "gptq":
        raise UserError(
            f"--moments: the plan rounds weights by {plan.quantizer.method}, which takes none"
        )
    from llmpq.export.vllm import export_vllm
    from llmpq.render.export_view import print_exported
    from llmpq.render.progress import progress

    with progress(console(options.quiet), "tensors", 1) as bar:
        exported = export_vllm(
            plan,
            model,
            options.output,
            moments=options.moments,
            plan_path=options.plan,
            on_tensor=lambda done, total: bar.update(done, "", total),
        )
    emit(exported.model_dump_json(indent=1), options.json_path)
    for note in exported.notes:
        console(options.quiet).print(f"note: {note}", soft_wrap=True)
    print_exported(report_console(options.quiet, options.json_path), exported, str(options.output))


main.add_command(vllm)

if __name__ == "__main__":
    main()
