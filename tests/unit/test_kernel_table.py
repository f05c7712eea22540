"""One table of kernels: layers call, plans price and profiles measure what it names."""

import csv
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from llmpq import workspace
from llmpq.costs import device_speed, layer_kernels, peak
from llmpq.costs.latency import device_machine, spec_sheet_times
from llmpq.costs.quality import prior_quality
from llmpq.devices import device_library
from llmpq.errors import UserError
from llmpq.kernel import START_S, Kernel, graph_lengths
from llmpq.kernel_table import (
    FEW_ROWS,
    FUSED_UNPACKING,
    INT4_READ,
    MAX_ROWS,
    TABLE,
    by_rows,
    choices,
    held_bytes,
    kernel_for,
    serves,
)
from llmpq.machine import (
    HUMMING,
    INT4_TILES,
    LIBRARIES,
    TRITON,
    VNNI,
    Machine,
    card,
    cpu,
    parse_capability,
    sheet_cpu,
)
from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import LinearShape, ModelSpec
from llmpq.planner.evaluate import evaluate
from llmpq.planner.problem import Assignment, Configuration, Problem, StageDevices
from llmpq.precision import PRECISIONS, STANDARD, group_size
from llmpq.serving import ServedMatrix, needs_library, serving, switch_rows
from llmpq.workload import Workload, request_lengths
from llmpq.workspace import Product

ROOT = Path(__file__).resolve().parents[2]
LLAMA = load_model_spec(str(ROOT / "configs" / "models" / "llama-3.1-8b.json"))
MATRICES = [ServedMatrix(op.out_features, op.in_features) for op in LLAMA.linears]
LARGE = (4096, 14336)
TORCH_UNPACKING = "torch unpacking + cuBLAS"


def names(machine: Machine, precision: str, matrix: tuple[int, int] = LARGE) -> list[str]:
    group = group_size(PRECISIONS[precision].weight_bits, matrix[1])
    return [kernel.name for kernel in choices(machine, precision, *matrix, group)]


# ---- what serves where


@pytest.mark.parametrize("precision", ["8", "4", "3"])
def test_cards_take_the_best_that_is_installed(precision: str) -> None:
    assert names(card("9.0"), precision) == ["humming"]
    assert names(card("7.5"), precision) == ["humming"]
    pair = [FEW_ROWS, FUSED_UNPACKING]
    assert names(card("7.5", [TRITON]), precision) == pair
    assert names(card("7.0"), precision) == pair, "humming begins at 7.5"
    for machine in (card("9.0", []), card("6.0"), card("gfx942")):
        assert names(machine, precision) == [TORCH_UNPACKING]
    assert names(replace(card("7.5"), dtype="bfloat16"), precision) == [TORCH_UNPACKING]
    assert names(replace(card("9.0"), dtype="float32"), precision) == [TORCH_UNPACKING]


def test_cpus_read_packed_weights_while_rows_are_few() -> None:
    new, old = cpu({INT4_TILES, VNNI}), cpu(())
    assert names(new, "4") == [INT4_READ, "unpacking + linear"]
    assert names(old, "4") == names(new, "4", (100, 704)) == ["unpacking + linear"]
    assert names(new, "8") == names(old, "8") == ["int8 rows", "unpacking + linear"]
    assert names(new, "8", (8, 72)) == ["unpacking + linear"], "the kernel reads past such rows"
    assert names(replace(new, dtype="float32"), "8") == ["unpacking + linear"]
    assert serves(new, "8-w8a8") and not serves(old, "8-w8a8") and not serves(card("9.0"), "8-w8a8")


def test_the_kernel_follows_the_number_of_rows() -> None:
    machine, shape = card("7.0"), (*LARGE, 128)
    assert kernel_for(machine, "4", *shape, 1).name == FEW_ROWS
    assert kernel_for(machine, "4", *shape, 16).name == FEW_ROWS
    assert kernel_for(machine, "4", *shape, 17).name == FUSED_UNPACKING
    assert kernel_for(card("8.0", [TRITON]), "4", *shape, 64).name == FEW_ROWS
    assert switch_rows(machine, dict.fromkeys(["16", "4"], MATRICES)) == (16, 17)
    assert switch_rows(card("9.0"), dict.fromkeys(["16", "4"], MATRICES)) == ()
    assert switch_rows(cpu({INT4_TILES}), dict.fromkeys(STANDARD, MATRICES)) == (16, 17, 64, 65)
    assert MAX_ROWS == (16, 64)


def test_what_no_kernel_serves_is_said_with_what_would_work() -> None:
    with pytest.raises(UserError, match="'8-w8a8' has no kernel on a card like this: use 16, 8, 4"):
        kernel_for(card("9.0"), "8-w8a8", 64, 64, 64, 1)
    op = LinearShape(name="x", out_features=64, in_features=64)
    with pytest.raises(UserError, match="no kernel on a CPU"):
        peak.linear_bytes("8-w8a8", op, 1, biased=False, machine=cpu(()))


def test_every_kernel_says_where_its_numbers_come_from() -> None:
    for kernel in TABLE:
        source = kernel.efficiency.source
        assert source.startswith(("estimate: ", "measured on ", "fitted on ")), kernel.name
        if kernel.kind == "cuda" and kernel.layout != "plain":
            is_estimate = source.startswith("estimate")
            assert (kernel.efficiency.measured_on is None) == is_estimate
            assert (kernel.efficiency.error is None) == is_estimate


def test_the_last_kernel_of_a_matrix_takes_any_number_of_rows() -> None:
    for machine in machines():
        for precision in PRECISIONS:
            for matrix in ((64, 64), (100, 172), LARGE):
                group = group_size(PRECISIONS[precision].weight_bits, matrix[1])
                found = choices(machine, precision, *matrix, group)
                assert serves(machine, precision) == bool(found)
                assert not found or found[-1].max_rows is None
                assert len({kernel.layout for kernel in found}) <= 1


def test_machines_of_the_library() -> None:
    assert parse_capability("12.0") == (12, 0) and parse_capability("gfx90a") == (0, 0)
    assert card("8.0").dtype == "bfloat16" and card("7.5").dtype == "float16"
    assert sheet_cpu("amx_bf16").features == {INT4_TILES, VNNI}
    assert not sheet_cpu("avx2").features and not sheet_cpu("avx_vnni").features
    for name, device in device_library().items():
        machine = device_machine(device)
        assert machine.kind == ("cpu" if device.kind == "cpu" else "cuda"), name
    assert {HUMMING, TRITON} == set(LIBRARIES)


def test_hummings_weights_are_whole_tiles() -> None:
    """At float16 a row's scale is repeated for every 128 inputs; zeros are as wide as codes."""
    locks = 4 * 2048
    assert held_bytes(card("9.0"), "8", 4096, 4096) == 4096 * 4096 + 4096 * (2 + 1) + locks
    assert held_bytes(card("7.5"), "8", 4096, 4096) == 4096 * (4096 + 32 * (2 + 1)) + locks
    four = 4096 * (4096 // 2 + 32 * 2 + 32 // 2) + locks
    assert (
        held_bytes(card("9.0"), "4", 4096, 4096) == four < PRECISIONS["4"].weight_bytes(4096, 4096)
    )
    assert held_bytes(card("9.0"), "4", 300, 4000) > 512 * 4096 // 2
    for machine in (card("7.0"), cpu(())):
        assert held_bytes(machine, "8", 64, 72) == PRECISIONS["8"].weight_bytes(64, 72)


# ---- in words


def test_a_run_says_what_serves_and_why_nothing_better_does() -> None:
    found = serving(card("7.0"), dict.fromkeys(["16", "4"], MATRICES))
    assert found["16"].text == "cuBLAS"
    assert found["4"].kernels == (f"{FEW_ROWS} up to 16 rows", FUSED_UNPACKING)
    assert found["4"].reason == "humming needs compute capability 7.5 or above"
    bare = serving(card("7.5", []), dict.fromkeys(["8", "4"], MATRICES))
    assert bare["4"].kernels == bare["8"].kernels == (TORCH_UNPACKING,)
    for library in LIBRARIES:
        assert f"{library} is not installed (pip install 'llmpq[gpu]')" in bare["4"].reason
    assert serving(card("9.0"), dict.fromkeys(["4"], MATRICES))["4"].text == "humming"
    assert not serving(cpu(()), {"8-w8a8": MATRICES})["8-w8a8"].kernels
    assert needs_library(found["4"].kernels) and not needs_library(bare["4"].kernels)


# ---- the layers call what plans price


def machines() -> Iterator[Machine]:
    """Cards of every generation with every set of libraries, and CPUs, in every dtype."""
    sets = [[], [TRITON], [HUMMING], [HUMMING, TRITON]]
    for capability in ("6.0", "7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "gfx942"):
        for libraries in sets:
            for dtype in ("float16", "bfloat16", "float32"):
                yield replace(card(capability, libraries), dtype=dtype)
    for features in ((), (INT4_TILES,), (VNNI,), (INT4_TILES, VNNI)):
        for dtype in ("bfloat16", "float32"):
            yield replace(cpu(features), dtype=dtype)


def one_matrix(out_features: int, in_features: int) -> ModelSpec:
    op = LinearShape(name="x", out_features=out_features, in_features=in_features)
    return LLAMA.model_copy(update={"linears": (op,)})


def test_layers_and_plans_name_the_same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 random machines, precisions, shapes and numbers of rows."""
    torch = pytest.importorskip("torch")
    from llmpq.quant import base, make

    rng, every, seen = random.Random(5), list(machines()), set()
    for _ in range(200):
        machine, precision = rng.choice(every), rng.choice(["16", "8", "8-w8a8", "4", "3"])
        out, cols = rng.choice([64, 96, 256, 1000, 4096]), rng.choice([64, 72, 704, 1376, 4096])
        rows = rng.choice([1, 8, 16, 17, 64, 65, 2048])
        if not serves(machine, precision):
            continue
        for module in (make, base):
            monkeypatch.setattr(module, "machine_here", lambda *_, machine=machine: machine)
        dtype = getattr(torch, machine.dtype)
        place = {"dtype": dtype, "device": torch.device(machine.kind)}
        layer = make.linear_factory(precision, cols, out, bias=False, **place)()
        (kernels,) = layer_kernels.by_kernels(machine, one_matrix(out, cols), precision)
        priced = by_rows(kernels, rows)
        seen.add(priced.name)
        if precision == "16":
            assert isinstance(layer, base.PlainLinear) and priced.layout == "plain"
            continue
        assert layer.layout == priced.layout
        if isinstance(layer, base.GridLinear):
            assert layer.kernel(rows) == priced.name
        check_workspace(machine, precision, out, cols, rows, priced)
    assert len(seen) >= 9, seen


def check_workspace(
    machine: Machine, precision: str, out: int, cols: int, rows: int, kernel: Kernel
) -> None:
    """The memory model counts the same kernel."""
    op = LinearShape(name="x", out_features=out, in_features=cols)
    counted = peak.linear_bytes(precision, op, rows, biased=False, machine=machine)
    group = group_size(PRECISIONS[precision].weight_bits, cols)
    assert counted == kernel.workspace_bytes(Product(out, cols, group, rows))


def test_few_row_kernels_are_called_by_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which function gets which tensors; the functions themselves need a card."""
    torch = pytest.importorskip("torch")
    from llmpq.quant import base, make, quantize

    calls: list[tuple[str, int]] = []

    def few(x, packed, scales, zeros, bits):
        calls.append(("few", bits))
        return torch.zeros(len(x), packed.shape[0], dtype=x.dtype)

    def unpack(packed, scales, zeros, bits, in_features, dtype, *, rows):
        calls.append(("unpack", bits))
        return torch.zeros(rows.stop - rows.start, in_features, dtype=dtype)

    fake = ModuleType("fake")
    fake.multiply_few_rows, fake.dequantize = few, unpack  # type: ignore[attr-defined]
    monkeypatch.setattr(base, "triton_kernels", fake)
    for module in (make, base):
        monkeypatch.setattr(module, "machine_here", lambda *_: card("7.0"))
    place = {"dtype": torch.float16, "device": torch.device("cpu")}
    for precision in ("8", "4", "3"):
        layer = make.linear_factory(precision, 256, 64, bias=True, **place)()
        layer.load_weight("weight", torch.randn(64, 256), quantize)
        layer.load_weight("bias", torch.ones(64))
        for rows in (1, 16, 17):
            assert layer(torch.randn(rows, 256).half()).eq(1).all()
        assert calls == [(kind, int(precision)) for kind in ("few", "few", "unpack")]
        calls.clear()


def test_triton_kernels_cut_the_inputs_as_they_are_counted() -> None:
    triton = pytest.importorskip("llmpq.quant.triton_kernels")
    import torch

    for bits in (8, 4, 3):
        for out, cols in ((64, 1024), (1000, 1376), (4096, 4096), (14336, 4096), (4096, 14336)):
            group = group_size(bits, cols)
            product = Product(out, cols, group, 8)
            for capability, count in (
                ((7, 0), workspace.vector_chunks),
                ((8, 0), workspace.tensor_chunks),
            ):
                machine = card(f"{capability[0]}.0", [TRITON])
                found = choices(machine, str(bits), out, cols, group)[0].name
                suits = triton.supports(bits, cols, cols // group)
                assert (found == FEW_ROWS) == suits, (bits, out, cols)
                if suits:
                    config = triton.config_for(
                        capability, torch.float16, bits, out, cols, cols // group
                    )
                    assert config.chunks == count(product, bits)


# ---- what it makes of the prices


def layer_s(name: str, libraries: list[str] | None, precision: str, phase: str, *sizes) -> float:
    device = device_library()[name]
    times = spec_sheet_times(device, LLAMA, card(device.compute_capability, libraries))
    return float(times.seconds(precision, phase, *sizes))


@pytest.mark.parametrize("size", [1, 8, 16, 32, 64])
def test_a_t4_without_kernels_is_slower_at_4_bits(size: int) -> None:
    """Torch unpacks every weight in thirteen passes for each product."""
    for phase, tokens in (("decode", 512), ("prefill", 128)):
        plain, packed = (layer_s("t4-16g", [], p, phase, size, tokens) for p in ("16", "4"))
        assert packed > plain


def test_a_t4_with_triton_alone_is_slower_at_4_bits_but_for_few_rows() -> None:
    """Without tensor cores the few-row multiply loses to cuBLAS from a dozen rows on."""
    slower = {
        size: layer_s("t4-16g", [TRITON], "4", "decode", size, 512)
        > layer_s("t4-16g", [TRITON], "16", "decode", size, 512)
        for size in (1, 16, 32, 64)
    }
    assert slower == {1: False, 16: True, 32: True, 64: True}
    for tokens in (32, 128, 512):
        plain, packed = (layer_s("t4-16g", [TRITON], p, "prefill", 4, tokens) for p in ("16", "4"))
        assert packed > plain


def test_an_h100_with_humming_decodes_faster_at_4_bits_and_prefills_nearly_as_fast() -> None:
    for size in (1, 8, 16, 32):
        plain, packed = (layer_s("h100-80g", None, p, "decode", size, 512) for p in ("16", "4"))
        assert packed < 0.8 * plain
    for size, tokens in ((1, 2048), (4, 512), (8, 512), (8, 2048)):
        plain, packed = (layer_s("h100-80g", None, p, "prefill", size, tokens) for p in ("16", "4"))
        assert plain < packed < 1.15 * plain


def slow_machine() -> Machine:
    """As llmpq ran on an H100 on 2026-11-27: torch alone, every step eager."""
    return replace(card("9.0", []), graphs=False)


def test_the_price_of_unpacking_with_torch_is_what_a_run_took() -> None:
    """64 requests of 512 + 128 tokens, 32 in flight, LLaMA-3.1-8B on an H100: at 4 bits 262
    tokens/s, decode steps of 112 to 137 ms, 195 ms for a prefill of 8 x 512; at 16 bits 121 ms.
    """
    work = Workload(prompt_tokens=512, new_tokens=128, num_requests=64, batch=32)
    device = device_library()["h100-80g"]
    times = spec_sheet_times(device, LLAMA, slow_machine())
    problem = Problem(
        spec=LLAMA,
        cluster=None,  # type: ignore[arg-type]  # one stage: no links
        workload=work,
        lengths=tuple(request_lengths(work)),
        times={"h100-80g": times},
        quality=prior_quality(LLAMA.num_layers),
        precisions=("16", "4"),
    )
    found = {}
    for precision in ("16", "4"):
        setting = Configuration((StageDevices("n", "h100-80g", 80 * 2**30),), 32, 8, 32)
        found[precision] = evaluate(problem, Assignment(setting, ((precision,) * 32,)))
    four, stage = found["4"], found["4"].stages[0]
    assert four.tokens_per_s == pytest.approx(262, rel=0.15)
    assert 0.112 <= stage.decode_step_s <= 0.137
    assert stage.prefill_s == pytest.approx(0.195, rel=0.1)
    assert found["16"].stages[0].prefill_s == pytest.approx(0.121, rel=0.15)
    assert four.tokens_per_s < 0.5 * found["16"].tokens_per_s


def test_kernels_take_as_long_as_was_measured(shared: Path) -> None:
    """Every linear that was timed on an H100; the table's errors are what is left."""
    path = shared / "gpu" / "llmpq" / "h100_linears.csv"
    if not path.exists():
        pytest.skip(f"no {path.name} in the data folder")
    device, errors = device_library()["h100-80g"], defaultdict(list)
    for row in csv.DictReader(path.open()):
        family, precision = row["kernel"].split("-")
        if precision not in ("16", "8", "4", "3"):
            continue
        machine = card("9.0", [HUMMING] if family == "humming" else [])
        out, cols = int(row["out_features"]), int(row["in_features"])
        group = group_size(PRECISIONS[precision].weight_bits, cols)
        kernel = kernel_for(machine, precision, out, cols, group, int(row["rows"]))
        op = LinearShape(name="x", out_features=out, in_features=cols)
        seconds = layer_kernels.product_s(kernel, [op], device_speed.speed_of(device))
        predicted = float(seconds(np.array(float(row["rows"]))))
        predicted += START_S * kernel.num_launches(out, cols)
        errors[kernel].append(abs(predicted / (float(row["time_us"]) / 1e6) - 1))
    assert len(errors) == 7
    for kernel, found in errors.items():
        stated = kernel.efficiency.error or 0.08  # of a plain product: two shapes, one card
        assert 0.5 * stated < np.mean(found) <= stated, (kernel.name, kernel.precision)


def test_graphs_are_made_for_few_lengths() -> None:
    assert graph_lengths(100) == (100,)
    assert graph_lengths(256) == (256,)
    assert graph_lengths(700) == (256, 384, 512, 700)
    lengths = graph_lengths(100_000)
    assert lengths[-1] == 100_000 and len(lengths) < 20
    assert all(b <= 1.5 * a for a, b in zip(lengths, lengths[1:], strict=False))
