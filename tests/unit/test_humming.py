"""Linears for humming-kernels: that their layout stands for the same weights, and their kernels.

No test multiplies on a card (tests/gpu does). Where one needs a kernel, a stand-in reads the very
tensors that humming's transform would be given, bit by bit as humming's schema describes them.
"""

import importlib
import os
import shutil
import tomllib
from contextlib import nullcontext
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from llmpq.precision import group_size
from llmpq.quant import (
    INPUTS,
    OUTPUTS,
    AdoptedLinear,
    PackedWeight,
    TensorPart,
    humming_jit,
    humming_support,
    keep_codes,
)
from llmpq.quant.humming import HummingLinear, grid_inputs, padded_tensors, serve
from llmpq.quant.humming_jit import KernelShape, KernelToCompile
from llmpq.quant.linear import GroupedLinear, RowLinear
from llmpq.quant.rounding import SCALE_DTYPE
from llmpq.workspace import round_up

CPU = torch.device("cpu")
SHAPES = [(64, 128), (256, 704), (130, 100), (320, 256), (72, 328)]
DTYPES = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("one_thread")


def random_weight(out_features: int, in_features: int) -> Tensor:
    generator = torch.Generator().manual_seed(out_features)
    weight = torch.randn(out_features, in_features, generator=generator)
    return (weight + torch.randn(out_features, 1, generator=generator)) * 0.02


def filled(bits: int, weight: Tensor, dtype=torch.bfloat16, bias=None) -> HummingLinear:
    out_features, in_features = weight.shape
    layer = HummingLinear(in_features, out_features, bias is not None, dtype, CPU, bits)
    layer.load_weight("weight", weight)
    if bias is not None:
        layer.load_weight("bias", bias)
    return layer


def usual(bits: int, in_features: int, out_features: int, dtype, part=None):
    """The class that holds such a weight on any other device."""
    kind = RowLinear if bits == 8 else GroupedLinear
    return kind(in_features, out_features, False, dtype, CPU, bits, part)


def read_codes(words: Tensor, bits: int) -> np.ndarray:
    """`[rows, n]` of int32 words: bit `i` of code `j` is bit `j * bits + i` of the row."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(len(words), -1, bits) @ (1 << np.arange(bits))


def read_weight(shape: KernelShape, words: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The padded weight `[N, K]` that tensors in humming's layout stand for."""
    (outputs, inputs), groups = shape.padded, shape.num_groups
    assert words.shape == (outputs, shape.bits * inputs // 32) and words.dtype == torch.int32
    assert zeros.shape == (shape.bits * outputs // 32, groups) and zeros.dtype == torch.int32
    assert scales.shape == (outputs, groups) and scales.dtype == shape.dtype
    codes = torch.from_numpy(read_codes(words, shape.bits)).view(outputs, groups, -1)
    zeros = torch.from_numpy(read_codes(zeros.t(), shape.bits)).t()
    steps = (codes - zeros[..., None]).to(shape.dtype)
    return (steps * scales[..., None]).view(outputs, inputs)


def assert_stands_for_its_weight(layer: HummingLinear) -> None:
    shape = layer.kernel_shape
    weight = read_weight(shape, *padded_tensors(shape, layer.words, layer.scales, layer.zeros))
    own = weight[: layer.out_features, : layer.in_features]
    assert torch.equal(own, layer.dequantized_weight())
    assert torch.isfinite(weight).all()  # what inputs of zero are multiplied by
    assert not weight[layer.out_features :].any()


# The layout


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_holds_the_weight_of_the_usual_class_bit_for_bit(bits, out_features, in_features, dtype):
    weight = random_weight(out_features, in_features)
    layer, other = filled(bits, weight, dtype), usual(bits, in_features, out_features, dtype)
    other.load_weight("weight", weight)
    assert torch.equal(layer.dequantized_weight(), other.dequantized_weight())
    assert_stands_for_its_weight(layer)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("dim", [OUTPUTS, INPUTS])
@pytest.mark.parametrize("cut", [(0, 128), (128, 256), (96, 192), (64, 256)])
def test_a_part_holds_its_part_of_the_weight(bits, dim, cut):
    weight = random_weight(256, 256)
    part = TensorPart(dim, *cut, 256)
    sizes = (256, part.size) if dim == OUTPUTS else (part.size, 256)
    layer = HummingLinear(*sizes, False, torch.bfloat16, CPU, bits, part)
    wanted = layer.part_to_read("weight")
    layer.load_weight("weight", wanted.of(weight) if wanted else weight)
    assert torch.equal(
        layer.dequantized_weight(), part.of(filled(bits, weight).dequantized_weight())
    )
    assert layer.in_features // layer.scales.shape[1] == grid_inputs(bits, sizes[0], part)
    assert_stands_for_its_weight(layer)


def test_many_chunks_match_one(monkeypatch):
    weight = random_weight(320, 256)
    whole = filled(3, weight)
    monkeypatch.setattr("llmpq.workspace.CPU_PART_WEIGHTS", 64 * 256)
    assert torch.equal(filled(3, weight).words, whole.words)


def test_every_usual_scale_is_a_float16():
    """What float16 activations do to bf16 scales: nothing down to 2^-17, little below."""
    scales = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16).double()
    scales = scales[scales < 2**16]
    moved = (scales.to(torch.float16).double() - scales).abs()
    assert not moved[scales >= 2**-17].any()
    assert moved.max() <= 2**-25


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_small_scales_at_float16_are_those_of_the_usual_class(bits):
    weight = random_weight(64, 128) * torch.logspace(-7, 0, 64)[:, None]
    layer, other = filled(bits, weight, torch.float16), usual(bits, 128, 64, torch.float16)
    other.load_weight("weight", weight)
    assert (layer.scales < 2**-17).any()
    assert torch.equal(layer.dequantized_weight(), other.dequantized_weight())
    assert_stands_for_its_weight(layer)


def test_float16_never_multiplies_codes_alone():
    """A sum of codes times inputs may pass 65504, the largest float16, before it is scaled."""
    weight = random_weight(64, 256)
    assert filled(8, weight, torch.float16).kernel_shape.group == 128
    assert filled(8, weight, torch.bfloat16).kernel_shape.group == humming_jit.ROW_GROUP


# Codes of others


def foreign(bits: int, group: int, dtype=torch.float16, shape=(136, 256)) -> PackedWeight:
    generator = torch.Generator().manual_seed(bits)
    groups = shape[1] // group
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (shape[0], groups), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(shape[0], groups, generator=generator) + 0.5) * 0.01
    return PackedWeight(bits, codes, scales.to(dtype), zeros)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_foreign_codes_are_kept_as_they_are(bits, group, dtype):
    weight = foreign(bits, group, dtype)
    layer = HummingLinear(256, 136, False, dtype, CPU, bits)
    assert keep_codes(layer, weight) is layer
    assert torch.equal(layer.dequantized_weight(), weight.dequantized())
    assert_stands_for_its_weight(layer)


def test_a_part_keeps_its_foreign_codes():
    weight, part = foreign(8, 64), TensorPart(INPUTS, 64, 192, 256)
    layer = HummingLinear(128, 136, False, torch.float16, CPU, 8, part)
    assert keep_codes(layer, weight) is layer
    assert torch.equal(layer.dequantized_weight(), weight.dequantized()[:, 64:192])


def test_foreign_grids_that_no_kernel_serves_go_elsewhere():
    layer = HummingLinear(256, 136, False, torch.bfloat16, CPU, 4)
    assert isinstance(keep_codes(layer, foreign(4, 128)), AdoptedLinear)  # scales of float16
    assert isinstance(keep_codes(layer, foreign(4, 16, torch.bfloat16)), AdoptedLinear)
    weight = foreign(4, 128, torch.bfloat16)
    shuffled = PackedWeight(4, weight.codes, weight.scales, weight.zeros, torch.arange(256) % 2)
    assert isinstance(keep_codes(layer, shuffled), AdoptedLinear)
    assert keep_codes(layer, foreign(8, 128, torch.bfloat16)) is None


# As a layer


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_it_multiplies_without_a_kernel_too(bits):
    weight, bias = random_weight(130, 100), torch.randn(130)
    layer = filled(bits, weight, torch.bfloat16, bias)
    x = torch.randn(2, 5, 100).to(torch.bfloat16)
    wanted = x.float() @ layer.dequantized_weight().float().t() + layer.bias.float()
    assert layer(x).shape == (2, 5, 130)
    assert (layer(x).float() - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_its_packed_weight_suits_any_dtype(bits):
    weight = random_weight(130, 100)
    one, other = filled(bits, weight), HummingLinear(100, 130, False, torch.float16, CPU, bits)
    other.restore(one.packed_state())
    assert other.scales.dtype == SCALE_DTYPE
    same = filled(bits, weight, torch.float16)
    assert torch.equal(other.dequantized_weight(), same.dequantized_weight())
    assert other.words is not one.words and other.weight_bytes == one.weight_bytes > 0


def test_bytes_are_those_of_codes_scales_and_zeros():
    layer = filled(3, random_weight(64, 256))
    assert layer.weight_bytes == 64 * (256 * 3 // 8 + 2 * (2 + 1))
    assert HummingLinear(256, 64, False, torch.bfloat16, CPU, 3).weight_bytes == 0


@pytest.fixture
def kernel(monkeypatch):
    """Stands for humming: its layout is the padded one, its kernel multiplies what is in it."""

    def launch(table, x, words, scales, zeros, locks):
        shape, x_padded = table, torch.zeros(len(x), table.padded[1])
        assert x.shape[1] == shape.in_features and x.dtype == shape.dtype and x.is_contiguous()
        x_padded[:, : x.shape[1]] = x
        out = x_padded @ read_weight(shape, words, scales, zeros).float().t()
        return out[:, : shape.out_features].to(shape.dtype)

    monkeypatch.setattr(humming_jit, "launch", launch)
    monkeypatch.setattr(humming_jit, "to_kernel_layout", lambda shape, *tensors: tensors)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 128), (130, 100), (72, 1100)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_changes_nothing(kernel, bits, out_features, in_features, dtype):
    bias = torch.randn(out_features)
    layer = filled(bits, random_weight(out_features, in_features), dtype, bias)
    x = torch.randn(3, 2, in_features).to(dtype)
    weight, before = layer.dequantized_weight(), layer(x)
    layer.hand_over(layer.kernel_shape)
    assert torch.equal(layer.dequantized_weight(), weight)
    after = layer(x)
    assert after.shape == before.shape and after.dtype == dtype and after.is_contiguous()
    assert (after.double() - before.double()).norm() < 1e-2 * before.double().norm()
    assert layer(x[:0]).shape == (0, 2, out_features)


def test_a_served_weight_is_no_longer_portable(kernel):
    weight = random_weight(64, 128)
    layer = filled(4, weight)
    state = layer.packed_state()
    layer.hand_over(layer.kernel_shape)
    with pytest.raises(AssertionError, match="one card"):
        layer.packed_state()
    again = filled(4, weight)
    again.restore(state)
    assert torch.equal(again.dequantized_weight(), layer.dequantized_weight())


def test_a_layer_takes_a_new_weight_after_it_was_served(kernel):
    layer, weight = filled(4, random_weight(64, 128)), random_weight(64, 128) + 1
    layer.hand_over(layer.kernel_shape)
    layer.load_weight("weight", weight)
    assert torch.equal(layer.dequantized_weight(), filled(4, weight).dequantized_weight())
    layer.hand_over(layer.kernel_shape)
    layer.restore(filled(4, weight).packed_state())
    assert torch.equal(layer.dequantized_weight(), filled(4, weight).dequantized_weight())


def test_a_kernel_that_fails_leaves_its_layers_as_they_were(kernel, monkeypatch):
    """The others are handed over, and all give the same answers as before."""
    layers = [filled(bits, random_weight(64, 128)) for bits in (4, 8, 4, 3)]
    x = torch.randn(3, 128).to(torch.bfloat16)
    before = [layer(x) for layer in layers]

    def compile_all(kernels, device, on_done):
        return {kernel: "no room" for kernel in kernels if kernel.shape.bits == 8}

    def launch_table(shape, *how):
        if shape.bits == 3:
            raise RuntimeError("no launcher")
        return shape

    monkeypatch.setattr(humming_jit, "chooser", lambda device: tiles_of_16)
    monkeypatch.setattr(humming_jit, "compile_all", compile_all)
    monkeypatch.setattr(humming_jit, "launch_table", launch_table)
    assert serve(layers, (8, 64), CPU) == {layers[1]: "no room", layers[3]: "no launcher"}
    assert [layer._served is not None for layer in layers] == [True, False, True, False]
    for layer, wanted in zip(layers, before, strict=True):
        assert (layer(x) - wanted).norm() < 1e-2 * wanted.norm()


# What is served


def test_what_to_install(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    assert "NVIDIA card" in humming_support.why_not_here(CPU)
    for cuda, extra in (("12.8", "gpu-cu12"), ("13.0", "gpu-cu13"), (None, "gpu-cu13")):
        assert humming_support.install_command(cuda) == f"pip install 'llmpq[{extra}]'"
    monkeypatch.setattr(metadata, "version", missing)
    assert "not installed: pip install 'llmpq[gpu" in humming_support.why_not_installed()
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.20")
    assert "0.1.19 is needed, not 0.1.20" in humming_support.why_not_installed()
    monkeypatch.setattr(metadata, "version", lambda name: humming_support.VERSION)
    monkeypatch.setattr(humming_support, "find_spec", lambda name: None if name == "cuda" else name)
    assert "needs cuda: pip" in humming_support.why_not_installed()
    monkeypatch.setattr(humming_support, "find_spec", lambda name: name)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert "torch 2.11 or newer" in humming_support.why_not_installed()


def test_the_extras_pin_what_this_was_written_for(repo_root):
    extras = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    for name, cuda in (("gpu", ""), ("gpu-cu12", "[cu12]"), ("gpu-cu13", "[cu13]")):
        wanted = f"humming-kernels{cuda}=={humming_support.VERSION}"
        assert extras["optional-dependencies"][name] == [wanted]
    assert (
        f"humming-kernels=={humming_support.VERSION}\n"
        in (repo_root / "constraints.txt").read_text()
    )


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_group_to_ask_about(bits):
    assert grid_inputs(bits, 1024, None) == group_size(bits, 1024)
    assert grid_inputs(bits, 100, None) == 100
    third = TensorPart(INPUTS, 96, 192, 288)
    assert grid_inputs(bits, 96, third) == 96  # rows of 288 have one scale
    uneven = TensorPart(INPUTS, 96, 192, 256)
    assert grid_inputs(bits, 96, uneven) == (96 if bits == 8 else 32)


# Kernels


def tiles_of_16(shape: KernelShape, rows: int) -> dict:
    """A stand-in for humming's heuristics."""
    tile = round_up(rows, 16)
    return {"block_shape": [tile, 128, 64], "num_sms": rows}


def test_rungs():
    assert humming_jit.row_ladder(1) == (8,)
    assert humming_jit.row_ladder(33) == (8, 12, 16, 24, 32, 48)
    ladder = humming_jit.row_ladder(5000)
    assert ladder[-1] == 6144 and list(ladder) == sorted(set(ladder))
    for low, high in zip(ladder, ladder[1:], strict=False):
        assert (low + 1) / high > 2 / 3 - 1e-9


def test_each_kernel_is_needed_once():
    one = KernelShape(512, 512, 4, 128, torch.bfloat16)
    other = KernelShape(512, 512, 3, 128, torch.bfloat16)
    needed = humming_jit.kernels_needed([one, other, one], (8, 12, 16, 24), tiles_of_16)
    assert [kernel.shape for kernel in needed] == [one, one, other, other]
    assert len(set(needed)) == 4  # num_sms is no part of the code
    assert all("num_sms" not in kernel.tuning for kernel in needed)


def test_kernels_go_where_they_are_told(monkeypatch, tmp_path):
    for name in ("HUMMING_CACHE_DIR", "HUMMING_TMP_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HUMMING_CACHE_DIR", "/elsewhere")
    humming_jit.keep_kernels_in(tmp_path)
    assert os.environ["HUMMING_CACHE_DIR"] == "/elsewhere"  # the user's word counts
    assert Path(os.environ["HUMMING_TMP_DIR"]).is_relative_to(tmp_path)


CARDS = {  # compute capability: multiprocessors, KiB of shared memory, TFLOP/s at 16 bits, GB/s
    (7, 5): (40, 64, 65, 320),
    (8, 0): (108, 163, 312, 2039),
    (9, 0): (132, 227, 989, 3350),
}


def pretended(capability: tuple[int, int]) -> type:
    """What humming asks of a card, for one that is not here."""
    sms, smem, tflops, bandwidth = CARDS[capability]
    facts = {
        "index": 0,
        "is_ppu": False,
        "name": "pretended",
        "sm_version": capability[0] * 10 + capability[1],
        "sm_major": capability[0],
        "sm_minor": capability[1],
        "sm_count": sms,
        "max_smem_size": smem * 1024,
        "max_registers_per_sm": 65536,
        "l2_cache_size": 40 * 2**20,
        "memory_bandwidth_gbps": bandwidth,
        "tensorcore_tops": {"float16": tflops, "bfloat16": tflops},
    }
    return type("Card", (), facts | {"__init__": lambda self, *index: None})


@pytest.fixture(params=CARDS, ids=lambda capability: f"sm{capability[0]}{capability[1]}")
def card(request, monkeypatch, tmp_path):
    """humming on a machine without a card: it compiles, but what it compiled is not loaded."""
    if find_spec("humming") is None or humming_support.why_not_installed():
        pytest.skip(f"no humming-kernels {humming_support.VERSION} here")
    humming_jit.library()
    device, jit = importlib.import_module("humming.device"), importlib.import_module("humming.jit")
    utils, kernel = (
        importlib.import_module(f"humming.{m}") for m in ("utils.jit", "kernel.humming")
    )
    made = pretended(request.param)
    monkeypatch.setattr(
        device, "_get_device_info_extension", lambda: SimpleNamespace(_DeviceInfo=made)
    )
    monkeypatch.setattr(device.DeviceInfo, "_instances", {})
    monkeypatch.setattr(device.current_device, "_value", made())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        importlib.import_module("humming.ops"), "register_kernel", lambda path: (1, path)
    )
    monkeypatch.setattr(jit.KernelRuntime, "_instances", {})
    monkeypatch.setattr(kernel.HummingKernel, "_str2kernel_cache", {})
    monkeypatch.setenv("HUMMING_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HUMMING_TMP_DIR", str(tmp_path / "tmp"))
    folders = [value for name, value in vars(utils).items() if name.startswith("get_humming_")]
    cached = [folder for folder in folders if hasattr(folder, "cache_clear")]
    choose_compiler(monkeypatch)
    for folder in cached:
        folder.cache_clear()
    yield request.param
    for folder in cached:
        folder.cache_clear()


def choose_compiler(monkeypatch) -> None:
    """NVRTC, or else an nvcc: humming finds them by the CUDA of torch, which has none here."""
    found = importlib.import_module("humming.utils.cuda").find_all_cuda_paths()
    if not found:
        pytest.skip("no CUDA compiler here")
    monkeypatch.setattr(torch.version, "cuda", f"{found[0]['major']}.0")
    if humming_support.why_no_compiler.__wrapped__() is not None:
        if "nvcc" not in found[0]["binaries"] or shutil.which("g++") is None:
            pytest.skip("neither NVRTC nor nvcc and g++ here")
        monkeypatch.setenv("HUMMING_COMPILER", "nvcc")


@pytest.mark.slow
def test_kernels_are_compiled(card, tmp_path):
    """Two of a plan's, at decode and at prefill, then an impossible one; the table knows them."""
    dtype = torch.float16 if card < (8, 0) else torch.bfloat16
    layers = [HummingLinear(520, 264, False, dtype, CPU, bits) for bits in (3, 8)]
    for layer in layers:
        layer.load_weight("weight", random_weight(264, 520))
    shapes, device = [layer.kernel_shape for layer in layers], torch.device("cuda", 0)
    choose, seen = humming_jit.chooser(device), []
    needed = [
        *humming_jit.kernels_needed(shapes[:1], (8,), choose),
        *humming_jit.kernels_needed(shapes[1:], (256,), choose),
    ]
    tile = '{"block_shape": [16, 96, 64], "warp_shape": [16, 96, 64]}'
    impossible = KernelToCompile(shapes[0], tile)
    failed = humming_jit.compile_all([*needed, impossible], device, lambda *done: seen.append(done))
    assert list(failed) == [impossible] and "Error" in failed[impossible]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    kernels = list(tmp_path.glob("*/kernel.cubin"))
    assert len(kernels) == 2 and all(path.read_bytes()[:4] == b"\x7fELF" for path in kernels)
    table = humming_jit.launch_table(shapes[0], (8,), choose, device).tolist()
    assert table[:3] == [0, humming_jit.MOST_ROWS, 1]
    assert len(list(tmp_path.glob("*/kernel.cubin"))) == 2  # found, not compiled again
