"""`llmpq-profile layers`: which devices, which shapes, and what is written and shown.

Identical cards are measured once. Without a list of shapes the grid is adaptive: the cost model,
where it has a say, names the shapes where it is least sure. Samples are kept beside the output
while a run lasts, and a run that was killed goes on with them.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmpq.artifact import Provenance, read_json, write_json
from llmpq.cli.common import (
    Command,
    FiniteRange,
    bound_kernel_caches,
    common_options,
    console,
    emit,
)
from llmpq.cli.paths import check_files, model_files
from llmpq.cli.profile_devices import cpu_memory_gib, cpu_name, type_of_card
from llmpq.cli.profile_options import Integers, PrecisionNames
from llmpq.cli.progress import progress
from llmpq.cli.run import DTYPE_NAMES
from llmpq.errors import UserError
from llmpq.model_lookup import DEFAULT_MODEL, load_model_spec
from llmpq.model_spec import ModelSpec
from llmpq.profile_data import Profile, ProfiledDevice, ProfileRow
from llmpq.serving import switch_rows

if TYPE_CHECKING:
    import torch

    from llmpq.profiler.device_probe import Card
    from llmpq.profiler.grid import AdaptiveGrid, Grid
    from llmpq.profiler.layers import LayerMeasurements, LayerProfiler, ProfilingProgress
    from llmpq.profiler.resume import PartialFile

DEFAULT_BUDGET_S = 120.0
MIN_MEASURING = 0.5  # of the budget, however long loading took
LISTS = ("prefill_micro_batches", "decode_micro_batches", "prompt_tokens", "past_tokens")
# What is measured where nothing else is said: on a CPU, on a card.
MICRO_BATCHES = {
    "prefill_micro_batches": (1, 2, 4, 8),
    "decode_micro_batches": (1, 2, 4, 8, 16, 32),
}
LONGEST = {"cpu": 512, "cuda": 2048}
SHORTEST = 8
MAX_TABLE_ROWS = 28
GIB = 1024**3


@dataclass(frozen=True)
class Target:
    """A device to measure, and where its profile goes. `type`, `card`: None where there is none."""

    device: "torch.device"
    dtype: "torch.dtype"
    type: str | None
    output: Path
    card: "Card | None" = None


@click.command(cls=Command)
@click.option("--model", default=DEFAULT_MODEL, help="Directory, config.json or hub id.")
@click.option("--device", default="auto", help="auto, cpu, cuda (each kind once) or cuda:N.")
@click.option("--dtype", type=click.Choice(DTYPE_NAMES), default="auto")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; 1 for rehearsals.")
@click.option("--type", "device_type", help="Name of this device type in cluster files.")
@click.option("--precisions", type=PrecisionNames(), help="Default: all this device can serve.")
@click.option("--grid", type=click.Choice(["auto", "fixed"]), help="Default: auto without lists.")
@click.option("--prefill-micro-batches", type=Integers(), help="auto: from the least to the most.")
@click.option("--decode-micro-batches", type=Integers(), help="Likewise.")
@click.option("--prompt-tokens", type=Integers(), help="Likewise; as the model allows.")
@click.option("--past-tokens", type=Integers(), help="Likewise; as the model allows.")
@click.option("--budget-s", type=FiniteRange(min=1), default=DEFAULT_BUDGET_S)
@click.option("--resume/--fresh", default=True, help="Go on with a killed run's samples.")
@click.option("--extend", is_flag=True, help="Keep the output's other rows of this device.")
@click.option(
    "-o",
    "--output",
    default="profile.json",
    help="A file; or a directory (DIR/), for a file each kind of card.",
)
@common_options
def layers(**flags: Any) -> None:
    """Time layers in both phases at every precision; embedding and head apart."""
    bound_kernel_caches()
    spec = load_model_spec(flags["model"])
    out = console(flags["quiet"])
    targets = _targets(flags, out)
    outputs = [("-o", path) for t in targets for path in (t.output, _partial_path(t.output))]
    check_files(model_files(flags["model"]), [*outputs, ("--json", flags["json_path"])])
    profiles = [_measure(target, spec, flags, out) for target in targets]
    parts = [profile.model_dump_json(indent=1) for profile in profiles]
    emit(parts[0] if len(parts) == 1 else f"[{', '.join(parts)}]", flags["json_path"])


def _measure(target: Target, spec: ModelSpec, flags: dict[str, Any], out: Any) -> Profile:
    """Measures one device and writes its profile."""
    from llmpq.costs.fits import chosen_models
    from llmpq.profiler.device_probe import card_state

    if target.card is not None:
        _make_current(target.card.index)
    start_s, before = time.monotonic(), card_state(target.device)
    described = _describe(target)
    old = _old_profile(target.output, described) if flags["extend"] else None
    profiler, partial, grid = _profiler(target, spec, flags, described, start_s)
    measured = _run(profiler, partial, out)
    notes = list(measured.notes)
    if before:
        notes.append(f"card before: {before}; after: {card_state(target.device)}")
    profile = Profile(
        device=described.model_copy(update={"reference_ms": measured.reference_ms}),
        rows=measured.rows,
        memory=measured.memory,
        notes=notes,
        provenance=Provenance.here(described.name),
    )
    profile = _extended(profile, old) if old else profile
    profile = profile.model_copy(update={"models": chosen_models(profile.rows)})
    write_json(target.output, profile)
    partial.remove()
    out.print(f"{len(measured.rows)} measurements of {spec.model_key} -> {target.output}")
    if not flags["quiet"]:
        _show(measured, grid.precisions, notes, out)
    return profile


def _partial_path(output: Path) -> Path:
    """Where samples are kept while a run lasts."""
    return output.with_name(f"{output.name}.partial")


def _make_current(index: int) -> None:
    """Events and streams without a device's name are those of the current card."""
    import torch

    torch.cuda.set_device(index)


def _profiler(
    target: Target,
    spec: ModelSpec,
    flags: dict[str, Any],
    described: ProfiledDevice,
    start_s: float,
) -> "tuple[LayerProfiler, PartialFile, Grid | AdaptiveGrid]":
    from llmpq.costs.fits import worst
    from llmpq.model_lookup import config_path
    from llmpq.models.stage_model import load_config
    from llmpq.profiler.layers import LayerProfiler
    from llmpq.profiler.resume import Identity, PartialFile
    from llmpq.profiler.stacks import Bench, stack_depth

    grid = _grid(flags, spec, target)
    depth = stack_depth(2 * spec.layer_params)
    config = load_config(config_path(flags["model"]))
    identity = Identity(
        model_key=spec.model_key,
        device=described.name,
        dtype=described.dtype or "",
        num_threads=described.num_threads,
        depth=depth,
    )
    partial = PartialFile(_partial_path(target.output), identity)
    if not flags["resume"]:
        partial.remove()
    place = target.dtype, target.device
    bench = Bench(config, grid.precisions, depth, *place, grid.most_rows)
    left_s = flags["budget_s"] - (time.monotonic() - start_s)
    budget_s = max(MIN_MEASURING * flags["budget_s"], left_s)
    scales = target.device.type == "cpu"
    profiler = LayerProfiler(spec, grid, bench, budget_s, worst, partial, scales=scales)
    return profiler, partial, grid


def _run(profiler: "LayerProfiler", partial: "PartialFile", out: Any) -> "LayerMeasurements":
    if found := partial.load():
        out.print(f"going on with the samples of {len(found.cells)} cells; --fresh starts over")
    with progress(out, "profiling", round(profiler.budget_s)) as shown:

        def on_visit(moment: "ProfilingProgress") -> None:
            shown.update(min(round(moment.spent_s), round(profiler.budget_s)), _words(moment))

        try:
            return profiler.run(on_visit)
        except BaseException:  # a later run goes on from here
            profiler.save()
            raise


def _words(moment: "ProfilingProgress") -> str:
    key = moment.cell
    width = f"+-{100 * moment.half_width:.1f} %"
    what = f"{key.phase} {key.micro_batch} x {key.tokens} at {key.precision} bits {width}"
    return f"s, {moment.num_cells} cells; {what}"


def _targets(flags: dict[str, Any], out: Any) -> list[Target]:
    """A device each kind: the CPU, a named card, or one of each kind of card."""
    import torch

    from llmpq.runtime.process import Role, choose_device, choose_dtype

    if flags["threads"]:
        torch.set_num_threads(flags["threads"])
    name, _, number = flags["device"].partition(":")
    if name not in ("auto", "cpu", "cuda") or (number and not number.isdigit()):
        raise UserError(
            f"--device {flags['device']}: expected auto, cpu, cuda or cuda:0, cuda:1 ..."
        )
    device = choose_device(name, Role(0, 1, 0, 1))
    if device.type == "cpu":
        output = _file(flags["output"], flags["device_type"] or "cpu")
        return [Target(device, choose_dtype(flags["dtype"], device), flags["device_type"], output)]
    return _card_targets(flags, int(number) if number else None, out)


def _card_targets(flags: dict[str, Any], number: int | None, out: Any) -> list[Target]:
    """One of each kind of card, or the one with this number."""
    from llmpq.profiler.device_probe import cards, distinct

    found = cards()
    if number is not None:
        if number >= len(found):
            raise UserError(f"--device cuda:{number}: this machine has {len(found)} cards")
        return [_card_target(flags, found[number])]
    kinds = distinct(found)
    if len(kinds) > 1:
        _check_several(flags, [kind.name for kind in kinds])
    if len(kinds) < len(found):
        names = ", ".join(f"cuda:{kind.index} ({kind.name})" for kind in kinds)
        out.print(f"{len(found)} cards, identical ones measured once: {names}")
    return [_card_target(flags, kind) for kind in kinds]


def _card_target(flags: dict[str, Any], card: "Card") -> Target:
    """In a directory, a profile is named by the card's type; a file is the user's to name."""
    import torch

    from llmpq.runtime.process import choose_dtype

    device = torch.device("cuda", card.index)
    guess = type_of_card(card.name, card.memory_bytes / GIB) or _slug(card.name)
    device_type = flags["device_type"] or (guess if _is_folder(flags["output"]) else None)
    output = _file(flags["output"], device_type or "cuda")
    return Target(device, choose_dtype(flags["dtype"], device), device_type, output, card)


def _check_several(flags: dict[str, Any], names: list[str]) -> None:
    what = f"this machine has {len(names)} kinds of card ({', '.join(names)})"
    if not _is_folder(flags["output"]):
        raise UserError(
            f"-o {flags['output']}: {what}; give a directory, -o DIR/, or --device cuda:N"
        )
    if flags["device_type"]:
        raise UserError(f"--type {flags['device_type']}: {what}; give --device cuda:N with it")


def _is_folder(output: str) -> bool:
    return output.endswith("/") or Path(output).is_dir()


def _file(output: str, device_type: str) -> Path:
    return Path(output) / f"{device_type}.json" if _is_folder(output) else Path(output)


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _grid(flags: dict[str, Any], spec: ModelSpec, target: Target) -> "Grid | AdaptiveGrid":
    """The lists as they are; or ranges, from the least of a list to its greatest."""
    from llmpq.profiler.grid import AdaptiveGrid, Grid, ShapeRange
    from llmpq.quant import machine_here

    max_positions = spec.max_positions
    _check_lengths(flags, max_positions)
    precisions = _precisions(flags, target)
    adaptive = flags["grid"] == "auto" or not (flags["grid"] or any(flags[n] for n in LISTS))
    longest = min(LONGEST[target.device.type], max_positions - 1)
    usual = tuple(n for n in (32, 128, 512) if n < max_positions) or (max(1, max_positions // 2),)
    if adaptive:
        usual = (min(SHORTEST, longest), max(1, longest))
    default = MICRO_BATCHES | {"prompt_tokens": usual, "past_tokens": usual}
    lists = {name: flags[name] or default[name] for name in LISTS}
    if not adaptive:
        return Grid(precisions, **lists)
    ends = {name: (min(values), max(values)) for name, values in lists.items()}
    matrices = [(op.out_features, op.in_features) for op in spec.linears]
    return AdaptiveGrid(
        precisions,
        ShapeRange(ends["prefill_micro_batches"], ends["prompt_tokens"]),
        ShapeRange(ends["decode_micro_batches"], ends["past_tokens"]),
        switch_rows(machine_here(target.device, target.dtype), precisions, matrices),
    )


def _check_lengths(flags: dict[str, Any], max_positions: int) -> None:
    for name in ("prompt_tokens", "past_tokens"):
        longest = max(flags[name] or (0,))
        if longest >= max_positions:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {longest}: the model has {max_positions} positions")


def _precisions(flags: dict[str, Any], target: Target) -> tuple[str, ...]:
    from llmpq.quant import available_precisions, why_unavailable

    place = target.device, target.dtype
    precisions = flags["precisions"] or available_precisions(*place)
    faults = [reason for p in precisions if (reason := why_unavailable(p, *place))]
    if faults:
        raise UserError(f"--precisions: {faults[0]}")
    return tuple(precisions)


def _describe(target: Target) -> ProfiledDevice:
    """The device, with the bandwidth of a copy and the framework's own memory."""
    import torch

    from llmpq.profiler.device_probe import context_bytes, copy_gbs

    device, card = target.device, target.card
    described = ProfiledDevice(
        name=cpu_name(),
        type=target.type or device.type,
        memory_bytes=int(cpu_memory_gib() * GIB),
        dtype=str(target.dtype).removeprefix("torch."),
        context_bytes=context_bytes(device, card.used_before_bytes if card else 0),
        bandwidth_gbs=copy_gbs(device),
    )
    if card is None:
        return described.model_copy(update={"num_threads": torch.get_num_threads()})
    update = {
        "name": card.name,
        "memory_bytes": card.memory_bytes,
        "compute_capability": card.compute_capability,
    }
    return described.model_copy(update=update)


def _old_profile(path: Path, device: ProfiledDevice) -> Profile | None:
    """What the output holds of this device; `UserError` where it is of another."""
    if not path.exists():
        return None
    old = read_json(path, Profile)
    for field in ("name", "type", "dtype", "num_threads"):
        was, now = getattr(old.device, field), getattr(device, field)
        if was != now:
            raise UserError(f"{path}: --extend: its device's {field} is {was}, here it is {now}")
    return old


def _extended(profile: Profile, old: Profile) -> Profile:
    """With the old rows that were not measured anew."""
    keys = {_key(row) for row in profile.rows}
    models = {row.model_key for row in profile.memory}
    rows = [row for row in old.rows if _key(row) not in keys]
    memory = [row for row in old.memory if row.model_key not in models]
    update = {"rows": rows + profile.rows, "memory": memory + profile.memory}
    return profile.model_copy(update=update)


def _key(row: ProfileRow) -> tuple[Any, ...]:
    return (
        row.model_key,
        row.precision,
        row.phase,
        row.micro_batch,
        row.prompt_tokens,
        row.past_tokens,
    )


def _show(
    measured: "LayerMeasurements", precisions: tuple[str, ...], notes: list[str], out: Any
) -> None:
    """Milliseconds a layer, shape by precision, a part of them where there are many; notes."""
    from rich.table import Table

    rows = [row for row in measured.rows if row.phase in ("prefill", "decode")]
    times = {_key(row)[1:]: row.time_ms for row in rows}
    shapes = sorted({_key(row)[2:] for row in rows}, key=lambda s: (s[0] == "decode", *s[1:]))
    full = [s for s in shapes if all((p, *s) in times for p in precisions)] or shapes
    shown = full if len(full) <= MAX_TABLE_ROWS else full[:: -(-len(full) // MAX_TABLE_ROWS)]
    table = Table("ms a layer", *(f"{p} bits" for p in precisions))
    for shape in shown:
        phase, count, prompt, past = shape
        figures = [f"{times[p, *shape]:.3f}" if (p, *shape) in times else "-" for p in precisions]
        length = f"{past} tokens past" if past else f"{prompt} tokens each"
        table.add_row(f"{phase} {count} x {length}", *figures)
    out.print(table)
    if len(shown) < len(shapes):
        out.print(f"{len(shown)} of {len(shapes)} shapes shown")
    for note in notes:
        out.print(f"note: {note}")
