"""Tables of what `llmpq-profile` found: layers, sensitivity, links, devices, recalibration."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from llmpq.cluster import MIB
from llmpq.cluster_draft import FoundDevice
from llmpq.devices import DeviceType
from llmpq.link_data import Links, link_line
from llmpq.profile_data import LayerSensitivity, ProfileRow, Sensitivity

if TYPE_CHECKING:
    from llmpq.planner.recalibration_report import PastRuns, RunRow, StageRow

MAX_TABLE_ROWS = 28
UNITS = {
    "measured": "divergence from the 16-bit model, nats per token",
    "variance": "added variance of outputs",
    "hessian": "squared error of outputs x top eigenvalue",
    "random": "drawn at random",
}
ENDS = ("embedding", "head", "call")  # parts that are shown where they are told apart


def print_layers(out: Console, rows: Sequence[ProfileRow], precisions: Sequence[str]) -> None:
    """Prints milliseconds per layer, shape by precision; of many shapes, some."""
    rows = [row for row in rows if row.phase in ("prefill", "decode")]
    times = {(row.precision, *_shape(row)): row.time_ms for row in rows}
    shapes = sorted({_shape(row) for row in rows}, key=lambda s: (s[0] == "decode", *s[1:]))
    full = [s for s in shapes if all((p, *s) in times for p in precisions)] or shapes
    shown = full[:: max(1, -(-len(full) // MAX_TABLE_ROWS))]
    table = Table("ms per layer", *(f"{p} bits" for p in precisions))
    for shape in shown:
        phase, count, prompt, past = shape
        figures = [f"{times[p, *shape]:.3f}" if (p, *shape) in times else "-" for p in precisions]
        length = f"{past} tokens past" if past else f"{prompt} tokens each"
        table.add_row(f"{phase} {count} x {length}", *figures)
    out.print(table)
    if len(shown) < len(shapes):
        out.print(f"{len(shown)} of {len(shapes)} shapes shown")


def _shape(row: ProfileRow) -> tuple[str, int, int, int]:
    return row.phase, row.micro_batch, row.prompt_tokens, row.past_tokens


def print_sensitivity(out: Console, found: Sensitivity) -> None:
    """Prints a row per layer, the same for parts of layers, and how sums become percent."""
    lower = {p: values for p, values in found.table().items() if p != "16"}
    text = f"{found.calibration.num_tokens:,} tokens of {found.calibration.source}"
    out.print(f"{found.indicator}, {found.method}, on {text}: {UNITS[found.indicator]}")
    out.print(_layer_table(lower, found.num_layers))
    parts = [row for row in found.layers if row.part != "layer"]
    for part in dict.fromkeys(row.part for row in parts):
        out.print(f"of its {part} alone")
        out.print(_layer_table(_by_precision(parts, part), found.num_layers))
    fit = found.fit
    out.print(
        f"rise of perplexity = exp({fit.scale:.4g} x sum) - 1 on average, and budgets are kept "
        f"with {fit.upper_scale:.4g}; mean error {fit.mean_abs_error_percent:.2f} points over "
        f"{fit.num_plans} plans"
    )
    memory = f"{(found.peak_memory_bytes or 0) / MIB:.0f} MiB"
    out.print(f"quantizer {found.quantizer.method}; {found.seconds:.1f} s, {memory} at the peak")


def _by_precision(rows: Sequence[LayerSensitivity], part: str) -> dict[str, list[float]]:
    chosen = [row for row in rows if row.part == part]
    names = dict.fromkeys(row.precision for row in chosen)
    return {name: [r.sensitivity for r in chosen if r.precision == name] for name in names}


def _layer_table(values: Mapping[str, Sequence[float]], num_layers: int) -> Table:
    table = Table("layer", *(f"{precision} bits" for precision in values))
    for layer in range(num_layers):
        table.add_row(str(layer), *(f"{column[layer]:.3g}" for column in values.values()))
    return table


def print_links(out: Console, found: Links) -> None:
    """Prints the matrix of pairs, and lines for a cluster file."""
    size = 1 + max(pair.source for pair in found.pairs)
    cells = {(pair.source, pair.destination): pair for pair in found.pairs}
    table = Table("us, GB/s: from", *(f"to {rank}" for rank in range(size)))
    for source in range(size):
        line = [cells.get((source, destination)) for destination in range(size)]
        texts = [f"{p.latency_us:.0f}, {p.bandwidth_gbs:.2f}" if p else "-" for p in line]
        table.add_row(f"{source} ({cells[source, (source + 1) % size].source_node})", *texts)
    out.print(table)
    shared = [p.shared_bandwidth_gbs for p in found.pairs if p.shared_bandwidth_gbs]
    out.print(f"all neighbours at once: {min(shared):.2f} GB/s on the slowest hop")
    worst = max(pair.mean_error for pair in found.pairs)
    out.print(f"latency + bytes / bandwidth fits with a mean error of {100 * worst:.0f} % at most")
    for node in found.nodes:
        out.print(f"link: {link_line(node.link)}  # inside {node.node}")
    if found.between_nodes:
        out.print(f"link: {link_line(found.between_nodes)}  # between nodes")


def print_devices(
    out: Console, here: Sequence[FoundDevice], library: Mapping[str, DeviceType]
) -> None:
    """Prints the devices of this machine, and the types that cluster files can name."""
    for device in here:
        _print_device(out, device)
    table = Table("type", "name", "GiB", "GB/s", "fp16 TFLOP/s")
    for name, spec in library.items():
        figures = (spec.memory_gib, spec.bandwidth_gbs, spec.fp16_tflops)
        table.add_row(name, spec.name, *(f"{figure:g}" for figure in figures))
    out.print(table)
    out.print("sources and further figures: --json")


def _print_device(out: Console, device: FoundDevice) -> None:
    facts = [f"{device.memory_gib:.1f} GiB, {device.free_gib:.1f} free"]
    if device.compute_capability:
        facts.append(f"compute capability {device.compute_capability}")
    if device.bandwidth_gbs:
        facts.append(f"{device.bandwidth_gbs:.0f} GB/s copied")
    if device.one_thread_gbs:
        facts[-1] += f" ({device.one_thread_gbs:.0f} with one of {device.num_threads} threads)"
    if device.type:
        facts.append(f"type {device.type}")
    elif device.kind == "cuda":
        facts.append("not in the library")
    out.print(f"here: {device.name}: {', '.join(facts)}", soft_wrap=True)
    if device.kind == "cuda" and not device.type:
        out.print(
            f"  a library entry would begin: {{name: {device.name}, memory_gib: "
            f"{device.memory_gib:.0f}, bandwidth_gbs: {device.bandwidth_gbs or 0:.0f}, "
            f'compute_capability: "{device.compute_capability}", source: measured by a copy}}',
            soft_wrap=True,
        )


def print_past_runs(out: Console, past: "PastRuns", verbose: bool) -> None:
    """Prints factors of each device type, and errors of stages and runs before and after."""
    table = Table("device type", "part", "phase", "measured / predicted", "residual")
    for row in past.factors:
        if row.told_apart or verbose or row.part not in ENDS:
            name = f"layers, {row.part} bits" if row.part.isdigit() else row.part
            value = f"{row.factor:.3f}" + ("" if row.told_apart else " (joint)")
            spread = f"+- {row.spread_percent:.1f} %"
            table.add_row(row.device_type, name, row.phase or "both", value, spread)
    out.print(table)
    table = Table("run", "stage", "phase", "measured s", "error before", "error after")
    several = len(past.runs) > 1
    for stage in past.stages:
        number, name = str(stage.report + 1), f"{stage.rank} ({stage.device_type})"
        cells = [name, stage.phase, f"{stage.measured_s:.3f}", *_errors(stage)]
        table.add_row(number if several else "", *cells)
    for count, run in enumerate(past.runs, 1):
        cells = ["whole run", "", f"{run.measured_total_s:.3f}", *_errors(run)]
        table.add_row(str(count) if several else "", *cells)
    out.print(table)


def _errors(row: "StageRow | RunRow") -> list[str]:
    values = (row.error_before_percent, row.error_after_percent)
    return ["-" if value is None else f"{value:+.1f} %" for value in values]
