"""`llmpq-profile layers`: which devices are measured, and what is written and shown.

Identical cards are measured once. A run that was killed goes on with its samples.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from llmpq.artifact import write_json
from llmpq.cli.common import bound_kernel_caches, console, emit, report_console
from llmpq.cli.options import (
    CommonOptions,
    DtypeName,
    FiniteRange,
    Integers,
    PrecisionNames,
    command,
    option,
)
from llmpq.cli.paths import check_files, model_files
from llmpq.cluster import GIB
from llmpq.device_names import type_of_card
from llmpq.errors import UserError
from llmpq.model_lookup import DEFAULT_MODEL, load_model_spec
from llmpq.profile_data import Profile

if TYPE_CHECKING:
    from llmpq.profiler.device_probe import Card
    from llmpq.profiler.layer_profile import LayerRequest, Target
    from llmpq.profiler.layers import ProfilingProgress

LISTS = ("prefill_micro_batches", "decode_micro_batches", "prompt_tokens", "past_tokens")


@dataclass(frozen=True, kw_only=True)
class LayersOptions(CommonOptions):
    """What the command line asks for."""

    model: str = option("Directory, config.json or Hugging Face id.", default=DEFAULT_MODEL)
    dtype: DtypeName = option(
        "Data type of activations, and of weights at 16 bits.", default="auto"
    )
    device: str = option("auto, cpu, cuda (each kind once) or cuda:N.", default="auto")
    threads: int | None = option("CPU threads; 1 for rehearsals.", type=click.IntRange(min=1))
    device_type: str | None = option("Name of this device type in cluster files.", "--type")
    precisions: tuple[str, ...] | None = option(
        "Precisions to measure; default: all that this device can serve.", type=PrecisionNames()
    )
    grid: Literal["auto", "fixed"] | None = option(
        "auto: shapes between the ends of each list, where they help most; default: auto "
        "without lists."
    )
    prefill_micro_batches: tuple[int, ...] | None = option(
        "Requests in a prefill micro-batch.", type=Integers()
    )
    decode_micro_batches: tuple[int, ...] | None = option(
        "Requests in a decode micro-batch.", type=Integers()
    )
    prompt_tokens: tuple[int, ...] | None = option(
        "Prompt lengths; default: as the model allows.", type=Integers()
    )
    past_tokens: tuple[int, ...] | None = option(
        "Tokens in the KV cache; default: as the model allows.", type=Integers()
    )
    budget_s: float = option("Seconds of measuring.", default=120.0, type=FiniteRange(min=1))
    resume: bool = option(
        "Continue with the samples of a killed run.", "--resume/--fresh", default=True
    )
    extend: bool = option("Keep the output's other rows of this device.", default=False)
    output: str = option(
        "A file; or a directory (DIR/), for one file per kind of card.",
        "-o",
        "--output",
        default="profile.json",
    )

    @property
    def to_folder(self) -> bool:
        """The output is a directory."""
        return self.output.endswith("/") or Path(self.output).is_dir()

    def file(self, device_type: str) -> Path:
        """Where the profile of a device type goes."""
        return Path(self.output) / f"{device_type}.json" if self.to_folder else Path(self.output)


@command(LayersOptions)
def layers(options: LayersOptions) -> None:
    """Time layers in both phases at every precision; embedding and head apart."""
    bound_kernel_caches()
    from llmpq.profiler.layer_profile import LayerRequest

    spec = load_model_spec(options.model)
    given = {name: values for name in LISTS if (values := getattr(options, name))}
    request = LayerRequest(
        model=options.model,
        spec=spec,
        lists=given,
        adaptive=options.grid == "auto" or not (options.grid or given),
        precisions=options.precisions,
        budget_s=options.budget_s,
        resume=options.resume,
        extend=options.extend,
    )
    targets = choose_targets(options)
    outputs = [("-o", path) for t in targets for path in (t.output, *t.partial_paths(spec))]
    check_files(model_files(options.model), [*outputs, ("--json", options.json_path)])
    parts = [_measure(t, request, options).model_dump_json(indent=1) for t in targets]
    emit(parts[0] if len(parts) == 1 else f"[{', '.join(parts)}]", options.json_path)


def _measure(target: "Target", request: "LayerRequest", options: LayersOptions) -> Profile:
    """Measures one device and writes its profile."""
    from llmpq.costs.fits import chosen_models, worst
    from llmpq.profiler.layer_profile import profile_device
    from llmpq.render.profile_view import print_layers
    from llmpq.render.progress import progress

    out, budget_s = console(options.quiet), round(request.budget_s)

    def on_resume(count: int) -> None:
        out.print(f"continuing with the samples of {count} cells; --fresh starts over")

    with progress(out, "profiling", budget_s) as shown:

        def on_visit(status: "ProfilingProgress") -> None:
            shown.update(min(round(status.spent_s), budget_s), _words(status))

        done = profile_device(target, request, worst, on_resume, on_visit)
    profile = done.profile.model_copy(update={"models": chosen_models(done.profile.rows)})
    write_json(target.output, profile)
    report = report_console(options.quiet, options.json_path)
    for kind in done.kinds:
        kind.partial.remove()
        count, key = len(kind.measured.rows), kind.spec.model_key
        out.print(f"{count} measurements of {key} -> {target.output}")
        print_layers(report, kind.measured.rows, kind.precisions)
    for note in done.profile.notes:
        out.print(f"note: {note}")
    return profile


def _words(status: "ProfilingProgress") -> str:
    key = status.cell
    width = f"+-{100 * status.half_width:.1f} %"
    what = f"{key.phase} {key.micro_batch} x {key.tokens} at {key.precision} bits {width}"
    return f"s, {status.num_cells} cells; {what}"


def choose_targets(options: LayersOptions) -> "list[Target]":
    """Returns what to measure: the CPU, a named card, or one of each kind of card."""
    import torch

    from llmpq.profiler.device_probe import cards, distinct
    from llmpq.profiler.layer_profile import Target
    from llmpq.runtime.process import Role, choose_device, choose_dtype

    if options.threads:
        torch.set_num_threads(options.threads)
    name, _, number = options.device.partition(":")
    if name not in ("auto", "cpu", "cuda") or (number and not number.isdigit()):
        raise UserError(
            f"--device {options.device}: expected auto, cpu, cuda or cuda:0, cuda:1 ..."
        )
    device = choose_device(name, Role(0, 1, 0, 1))
    if device.type == "cpu":
        output = options.file(options.device_type or "cpu")
        return [Target(device, choose_dtype(options.dtype, device), options.device_type, output)]
    found = cards()
    if number:
        if int(number) >= len(found):
            raise UserError(f"--device cuda:{number}: this machine has {len(found)} cards")
        return [_card_target(options, found[int(number)])]
    kinds = distinct(found)
    if len(kinds) > 1:
        _check_several(options, [kind.name for kind in kinds])
    if len(kinds) < len(found):
        names = ", ".join(f"cuda:{kind.index} ({kind.name})" for kind in kinds)
        line = f"{len(found)} cards, identical ones measured once: {names}"
        console(options.quiet).print(line)
    return [_card_target(options, kind) for kind in kinds]


def _card_target(options: LayersOptions, card: "Card") -> "Target":
    """Returns a card as a target; in a directory, its profile is named by the card's type."""
    import torch

    from llmpq.profiler.layer_profile import Target
    from llmpq.runtime.process import choose_dtype

    device = torch.device("cuda", card.index)
    words = "".join(c if c.isalnum() else " " for c in card.name.lower()).split()
    guess = type_of_card(card.name, card.memory_bytes / GIB) or "-".join(words)
    device_type = options.device_type or (guess if options.to_folder else None)
    output = options.file(device_type or "cuda")
    return Target(device, choose_dtype(options.dtype, device), device_type, output, card)


def _check_several(options: LayersOptions, names: list[str]) -> None:
    what = f"this machine has {len(names)} kinds of card ({', '.join(names)})"
    if not options.to_folder:
        raise UserError(
            f"-o {options.output}: {what}; give a directory, -o DIR/, or --device cuda:N"
        )
    if options.device_type:
        raise UserError(f"--type {options.device_type}: {what}; give --device cuda:N with it")
