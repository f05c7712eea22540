"""Checkpoints that are quantized already, written by hand from the definition of each format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmpq.checkpoint.checkpoint import Checkpoint, RandomWeights
from llmpq.checkpoint.inventory import check_checkpoint
from llmpq.checkpoint.loader import load_stage
from llmpq.errors import UserError
from llmpq.evaluation.perplexity import evaluate
from llmpq.models.stage_model import LayerRange, StageModel, load_config
from llmpq.quant import (
    AdoptedLinear,
    QuantizedLinear,
    available_precisions,
    kernels,
    linear_factory,
)
from llmpq.quant.base import GridLinear
from llmpq.quant.linear import RowLinear, TiledLinear
from llmpq.quant.packing import pack_words, unpack_words

CPU = torch.device("cpu")
LAYERS = 2
SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
}
GPTQ_ONE = {3: None, 4: 0x11111111, 8: 0x01010101}
needs_int4 = pytest.mark.skipif(not kernels.int4_tiles_work(), reason="no int4 kernel here")
needs_w8a8 = pytest.mark.skipif(not kernels.vnni_works(), reason="no VNNI here")
pytestmark = pytest.mark.usefixtures("one_thread")


# What the formats say, the slow way


def words_of(codes: Tensor, bits: int) -> Tensor:
    """`[rows, n]` to int32 `[rows, words]`: the bits of all codes in a row, lowest first."""
    stream = (codes.numpy()[..., None].astype(np.uint32) >> np.arange(bits)) & 1
    stream = stream.reshape(len(codes), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view("<i4").copy())


def padded_words_of(codes: Tensor, bits: int) -> Tensor:
    """Whole codes alone in a word, what is left of it empty."""
    each = 32 // bits
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % each))
    shifts = torch.arange(each) * bits
    words = (codes.view(len(codes), -1, each) << shifts).sum(-1)
    return words.to(torch.int32)


class Codes:
    """Random codes of a linear `[out, in]`, and the weight that they stand for."""

    def __init__(self, shape, bits, group, dtype, *, centred=False, ordered=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        (outputs, cols), groups = shape, 1 if group == -1 else shape[1] // group

        def draw(*sizes: int) -> Tensor:
            return torch.randint(0, 2**bits, sizes, generator=generator, dtype=torch.uint8)

        self.bits, self.codes = bits, draw(outputs, cols)
        middle = torch.full((outputs, groups), 2 ** (bits - 1), dtype=torch.uint8)
        self.zeros = middle if centred else draw(outputs, groups)
        self.scales = (torch.rand(outputs, groups, generator=generator) + 0.5) * 0.1 / 2**bits
        self.scales = self.scales.to(dtype)
        self.group_of = torch.arange(cols) * groups // cols
        if not ordered:
            self.group_of = self.group_of[torch.randperm(cols, generator=generator)]

    @property
    def weight(self) -> Tensor:
        """In the type of the scales, as all of these formats' own libraries compute it."""
        zeros, scales = self.zeros[:, self.group_of], self.scales[:, self.group_of]
        return (self.codes.int() - zeros.int()).to(scales.dtype) * scales

    def gptq(self, name: str, v2: bool) -> dict[str, Tensor]:
        zeros = words_of(self.zeros.t().contiguous(), self.bits)
        if not v2 and self.bits == 3:
            zeros = words_of(((self.zeros.int() - 1) % 8).t().contiguous(), 3)
        elif not v2:
            zeros = (zeros.long() - GPTQ_ONE[self.bits]).to(torch.int32)
        return {
            f"{name}.qweight": words_of(self.codes, self.bits).t().contiguous(),
            f"{name}.qzeros": zeros,
            f"{name}.scales": self.scales.t().contiguous(),
            f"{name}.g_idx": self.group_of.to(torch.int32),
        }

    def packed(self, name: str, words=words_of, pack_zeros=True) -> dict[str, Tensor]:
        """compressed-tensors, pack-quantized; codes and zeros are signed there."""
        half = 2 ** (self.bits - 1)
        tensors = {
            f"{name}.weight_packed": words(self.codes, self.bits),
            f"{name}.weight_scale": self.scales,
            f"{name}.weight_shape": torch.tensor(self.codes.shape),
        }
        if pack_zeros:
            zeros = words(self.zeros.t().contiguous(), self.bits).t().contiguous()
        else:
            zeros = (self.zeros.int() - half).to(torch.int8)
        if (self.zeros != half).any():
            tensors[f"{name}.weight_zero_point"] = zeros
        if not torch.equal(self.group_of, self.group_of.sort().values):
            tensors[f"{name}.weight_g_idx"] = self.group_of.to(torch.int32)
        return tensors

    def plain_int8(self, name: str) -> dict[str, Tensor]:
        """compressed-tensors, int-quantized."""
        signed = (self.codes.int() - 2 ** (self.bits - 1)).to(torch.int8)
        return {f"{name}.weight": signed, f"{name}.weight_scale": self.scales}


class Written:
    """A checkpoint on disk, and the weights that its linears stand for, by name."""

    def __init__(self, folder: Path, settings: dict[str, Any], write, make=None):
        config = LlamaConfig(**SIZES)
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(config).eval()
        self.codes: dict[str, Codes] = {}
        tensors = {name: t.clone() for name, t in self.model.state_dict().items()}
        for number, (name, module) in enumerate(self.model.model.layers.named_modules()):
            if not isinstance(module, torch.nn.Linear):
                continue
            name = f"model.layers.{name}"
            codes = make(name, tuple(module.weight.shape), number)
            if codes is None:
                continue
            self.codes[name] = codes
            del tensors[f"{name}.weight"]
            tensors |= write(codes, name)
            module.weight.data = codes.weight.float()
        self.folder = folder
        save_file(tensors, folder / "model.safetensors")
        data = config.to_dict() | {"quantization_config": settings}
        (folder / "config.json").write_text(json.dumps(data))

    def stage(self, precision: str, dtype=torch.float32, first=0, end=LAYERS) -> StageModel:
        layers = LayerRange(first, end, LAYERS)
        config, weights = load_config(self.folder), Checkpoint(self.folder)
        assert check_checkpoint(config, weights) == []
        return load_stage(config, weights, layers, [precision] * (end - first), dtype, CPU)


def linears(stage: StageModel) -> dict[str, QuantizedLinear]:
    found = stage.model.named_modules()
    return {n: m for n, m in found if isinstance(m, QuantizedLinear)}


def write_gptq(folder, bits=4, group=64, v2=False, dtype=torch.float16, **kind) -> Written:
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False}
    settings["checkpoint_format"] = "gptq_v2" if v2 else "gptq"
    return Written(
        folder,
        settings,
        lambda codes, name: codes.gptq(name, v2),
        lambda name, shape, seed: Codes(shape, bits, group, dtype, seed=seed, **kind),
    )


def scheme(bits, group=-1, targets=("Linear",), **more) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group"}
    weights = {"num_bits": bits, "type": "int", "group_size": group, **strategy}
    return {"targets": list(targets), "weights": weights, **more}


def packed_settings(*schemes, **more) -> dict[str, Any]:
    groups = {f"group_{i}": s for i, s in enumerate(schemes)}
    return {"quant_method": "compressed-tensors", "config_groups": groups} | more


def write_packed(folder, bits=4, group=64, dtype=torch.bfloat16, version="0.19.0", **kind):
    words = padded_words_of if version < "0.18" else words_of
    pack_zeros = kind.pop("pack_zeros", True)
    return Written(
        folder,
        packed_settings(scheme(bits, group), version=version),
        lambda codes, name: codes.packed(name, words, pack_zeros),
        lambda name, shape, seed: Codes(shape, bits, group, dtype, seed=seed, **kind),
    )


def assert_taken_over(written: Written, precision: str, dtype: torch.dtype) -> StageModel:
    """Every linear stands for its codes, bit for bit, and multiplies by them."""
    stage = written.stage(precision, dtype)
    found = linears(stage)
    assert found.keys() == written.codes.keys()
    for name, layer in found.items():
        assert torch.equal(layer.dequantized_weight(), written.codes[name].weight.to(dtype)), name
        x = torch.randn(3, layer.in_features).to(dtype)
        wanted = x.double() @ layer.dequantized_weight().double().t()
        wanted = wanted if layer.bias is None else wanted + layer.bias.double()
        error = (layer(x).double() - wanted).norm() / wanted.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), name
    return stage


# Reading


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("count", [1, 10, 31, 32, 40, 96, 704])
def test_words_are_unpacked(bits, count):
    codes = torch.randint(0, 2**bits, (5, count), dtype=torch.uint8)
    assert torch.equal(unpack_words(words_of(codes, bits), bits, count), codes)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("count", [1, 31, 32, 100, 704])
def test_words_are_packed(bits, count):
    codes = torch.randint(0, 2**bits, (5, count), dtype=torch.uint8)
    whole = torch.nn.functional.pad(codes, (0, -count % 32))
    assert torch.equal(pack_words(codes, bits), words_of(whole, bits))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [-1, 32, 64])
@pytest.mark.parametrize("v2", [False, True])
def test_gptq_codes_are_taken_over(tmp_path, bits, group, v2):
    written = write_gptq(tmp_path, bits, group, v2, centred=group == 32, ordered=group != 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stage = assert_taken_over(written, str(bits), dtype)
    assert all(isinstance(layer, AdoptedLinear) for layer in linears(stage).values())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [-1, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_codes_are_taken_over(tmp_path, bits, group, dtype):
    written = write_packed(tmp_path, bits, group, dtype, centred=group == 32)
    for own in {dtype, torch.bfloat16, torch.float32}:
        assert_taken_over(written, str(bits), own)


@pytest.mark.parametrize(
    "kind",
    [
        {"version": "0.17.1"},
        {"version": "0.17.1", "bits": 3},
        {"pack_zeros": False},
        {"ordered": False},
        {"ordered": False, "bits": 3, "centred": True},
    ],
)
def test_older_and_other_kinds_of_packing(tmp_path, kind):
    written = write_packed(tmp_path, **kind)
    assert_taken_over(written, str(kind.get("bits", 4)), torch.bfloat16)


def test_three_bits_in_rows_of_a_length_that_does_not_tell_how_they_are_packed():
    """40 codes take 4 words either way; the version tells."""
    codes = torch.randint(0, 8, (6, 40), dtype=torch.uint8)
    for version, words in (("0.17.0", padded_words_of), ("0.19.0", words_of)):
        settings = packed_settings(scheme(3), version=version)
        tensors = {"a.weight_packed": words(codes, 3), "a.weight_scale": torch.ones(6, 1)}
        packing = packing_with(settings)
        assert torch.equal(packing.read("a", (6, 40), Held(tensors)).codes, codes)


class Held:
    """Tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        return self.tensors[name]

    def fault(self, name: str, reason: str) -> UserError:
        return UserError(f"{name} {reason}")


def packing_with(settings):
    from llmpq.checkpoint.prequantized import CompressedTensorsFormat

    return CompressedTensorsFormat(settings, Path("config.json"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("precision", ["8", "8-w8a8"])
def test_int8_by_channel_serves_both_kinds_of_eight_bits(tmp_path, precision, dtype):
    if precision not in available_precisions(CPU, dtype):
        pytest.skip("not available here")
    written = Written(
        tmp_path,
        packed_settings(scheme(8, input_activations={"num_bits": 8, "dynamic": True})),
        lambda codes, name: codes.plain_int8(name),
        lambda name, shape, seed: Codes(shape, 8, -1, torch.bfloat16, centred=True, seed=seed),
    )
    stage = written.stage(precision, dtype)
    for name, layer in linears(stage).items():
        codes = written.codes[name]
        wanted = codes.weight.to(dtype)
        if precision == "8-w8a8" and dtype == torch.float32:  # it multiplies by its scales in fp32
            wanted = (codes.codes.int() - 128).float() * codes.scales.float()
        assert torch.equal(layer.dequantized_weight(), wanted)
    assert Checkpoint(tmp_path).note(["8", "8-w8a8"]) is None


def test_scales_of_a_whole_tensor(tmp_path):
    def write(codes: Codes, name: str) -> dict[str, Tensor]:
        return codes.plain_int8(name) | {f"{name}.weight_scale": codes.scales[0]}

    def make(name: str, shape: tuple[int, int], seed: int) -> Codes:
        codes = Codes(shape, 8, -1, torch.float32, centred=True, seed=seed)
        codes.scales[:] = codes.scales[0].clone()
        return codes

    settings = packed_settings(scheme(8))
    settings["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    assert_taken_over(Written(tmp_path, settings, write, make), "8", torch.float32)


@pytest.mark.parametrize("bits", [3, 4])
@needs_int4
def test_bf16_grids_go_to_the_fast_layers_and_others_do_not(tmp_path, bits):
    (tmp_path / "bf16").mkdir(), (tmp_path / "fp16").mkdir()
    fast = write_packed(tmp_path / "bf16", bits, 64, torch.bfloat16)
    kinds = {type(m) for m in linears(fast.stage(str(bits), torch.bfloat16)).values()}
    assert kinds == {TiledLinear}
    kinds = {type(m) for m in linears(fast.stage(str(bits), torch.float32)).values()}
    assert kinds == {AdoptedLinear}
    exact = write_packed(tmp_path / "fp16", bits, 64, torch.float16)
    kinds = {type(m) for m in linears(exact.stage(str(bits), torch.bfloat16)).values()}
    assert kinds == {AdoptedLinear}


def test_rows_of_eight_bits_in_bf16_go_to_the_fast_layer(tmp_path):
    written = write_packed(tmp_path, 8, -1, torch.bfloat16)
    stage = assert_taken_over(written, "8", torch.bfloat16)
    assert {type(m) for m in linears(stage).values()} == {RowLinear}


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_layers_count_the_bytes_that_they_hold(tmp_path, bits):
    written = write_gptq(tmp_path, bits, 32, ordered=False)
    for layer in linears(written.stage(str(bits))).values():
        groups = layer.in_features // 32
        codes = layer.out_features * layer.in_features * bits // 8
        assert layer.weight_bytes == codes + layer.out_features * groups * 3 + 4 * layer.in_features


# Other precisions than the checkpoint's own


@pytest.mark.parametrize("precision", ["16", "8", "3"])
def test_other_precisions_start_from_the_dequantized_weight(tmp_path, precision):
    written = write_gptq(tmp_path, 4, 32)
    stage = written.stage(precision)
    for name, codes in written.codes.items():
        inside = stage.model.get_submodule(name)
        alone = linear_factory(
            precision, *codes.codes.shape[::-1], bias=False, dtype=torch.float32, device=CPU
        )()
        alone.load_weight("weight", codes.weight)
        assert torch.equal(inside.dequantized_weight(), alone.dequantized_weight())
    note = Checkpoint(tmp_path).note([precision, "4"])
    assert note is not None and "(gptq, 4)" in note and str(tmp_path) in note
    assert Checkpoint(tmp_path).note(["4"]) is None


@pytest.mark.parametrize("precision", ["16", "4"])
def test_the_loss_is_that_of_the_dequantized_model(tmp_path, precision):
    """Through one stage and through two, at the checkpoint's own bits and at 16."""
    written = write_gptq(tmp_path, 4, 32, ordered=False)
    windows = torch.randint(0, SIZES["vocab_size"], (3, 20))
    with torch.inference_mode():
        wanted = float(written.model(windows, labels=windows).loss)
    for cuts in ([(0, 2)], [(0, 1), (1, 2)]):
        stages = [written.stage(precision, torch.float32, *cut) for cut in cuts]
        assert evaluate(stages, windows).mean == pytest.approx(wanted, rel=1e-6)


def test_groups_of_the_configuration_and_ignored_linears(tmp_path):
    """Exact names before patterns before "Linear"; what has no codes is read as it is."""

    def make(name: str, shape: tuple[int, int], seed: int) -> Codes | None:
        bits = 8 if "down_proj" in name else 3 if name.endswith("0.mlp.up_proj") else 4
        ignored = "k_proj" in name
        return None if ignored else Codes(shape, bits, 64, torch.bfloat16, seed=seed)

    settings = packed_settings(
        scheme(4, 64),
        scheme(8, 64, ["re:.*down_proj$", "re:.*up_proj$"]),
        scheme(3, 64, ["model.layers.0.mlp.up_proj"]),
        scheme(4, 64, ["model.layers.1.mlp.up_proj"]),
        ignore=["lm_head", "re:.*k_proj"],
        format="mixed-precision",
    )
    written = Written(tmp_path, settings, lambda codes, name: codes.packed(name), make)
    weights = Checkpoint(tmp_path)
    for name, codes in written.codes.items():
        packed = weights.packed(f"{name}.weight", tuple(codes.codes.shape))
        assert packed is not None and packed.bits == codes.bits
        assert torch.equal(packed.dequantized(), codes.weight)
    assert weights.packed("model.layers.0.self_attn.k_proj.weight", (64, 128)) is None
    found = linears(written.stage("4", torch.float32))
    taken = {name for name, layer in found.items() if isinstance(layer, AdoptedLinear)}
    assert taken == {name for name, codes in written.codes.items() if codes.bits == 4}
    assert len(taken) == 2 * 4 + 1 and all(isinstance(m, QuantizedLinear) for m in found.values())


def test_weights_that_are_not_quantized_have_no_codes(tmp_path):
    assert RandomWeights().packed("a.weight", (2, 2)) is None
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path)
    weights = Checkpoint(tmp_path)
    assert weights.packed("model.layers.0.mlp.up_proj.weight", (192, 128)) is None
    assert weights.note(["3"]) is None


def test_the_configuration_of_the_model_is_a_plain_one(tmp_path):
    config = load_config(write_gptq(tmp_path).folder)
    assert getattr(config, "quantization_config", None) is None


# Against the library that defines the format


@pytest.mark.library("compressed_tensors")
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_compressed_tensors_writes(bits, symmetric):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=bits, group_size=32, strategy="group", symmetric=symmetric)
    their = QuantizationScheme(targets=["Linear"], weights=args)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales = (torch.rand(64, 4) + 0.5).to(torch.bfloat16) * 0.01
    zeros = torch.randint(low, high + 1, (64, 4), dtype=torch.int8) * (not symmetric)
    weight = (torch.randn(64, 128) * 0.02).to(torch.bfloat16)
    state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = compressor.compress(state, their)
    ours = packing_with(packed_settings(scheme(bits, 32)))
    held = Held({f"a.{name}": tensor for name, tensor in packed.items()})
    theirs = compressor.decompress(packed, their)["weight"]
    assert torch.equal(ours.read("a", (64, 128), held).dequantized(), theirs)


# What cannot be read


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["quantization_config"] |= changes
    path.write_text(json.dumps(data))


def bad_group(**changes: Any) -> dict[str, Any]:
    group = scheme(4, 64)
    group["weights"] |= changes
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "'awq' cannot be read; supported are gptq"),
        ({"quant_method": "quanto"}, "'quanto' cannot be read"),
        ({"quant_method": None}, "None cannot be read"),
        ({"bits": 2}, "weights of 2 bits cannot be read"),
        ({"bits": None}, "weights of None bits cannot be read"),
        ({"checkpoint_format": "marlin"}, "in the layout 'marlin' cannot be read"),
        ({"quant_method": "compressed-tensors"}, "no 'config_groups'"),
        (bad_group(type="float"), "group_0: weights of type 'float' cannot be read"),
        (bad_group(num_bits=5), "weights of 5 bits cannot be read"),
        (bad_group(strategy="block"), "scales by 'block' cannot be read"),
        (bad_group() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        (bad_group() | {"transform_config": {"config_groups": {"u": {}}}}, "rotated"),
        (packed_settings(["Linear"]), "group_0: must have 'weights' and 'targets'"),
    ],
)
def test_settings_that_cannot_be_read(tmp_path, changes, message):
    write_gptq(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        Checkpoint(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("qweight", lambda t: t[:-1], "has shape .* does not fit"),
        ("qweight", lambda t: t.float(), "expected rows of int32"),
        ("qzeros", None, "no tensor"),
        ("qzeros", lambda t: t[:, :-1], "has shape .* implies"),
        ("scales", lambda t: t[:, :-1], "has shape .* does not fit"),
        ("scales", lambda t: t * float("nan"), "expected finite numbers"),
        ("scales", lambda t: t.int(), "expected finite numbers"),
        ("g_idx", lambda t: t + 1, "names group 2 of 2"),
        ("g_idx", lambda t: t[:-1], "has shape"),
    ],
)
def test_tensors_that_cannot_be_read(tmp_path, tensor, change, message):
    written = write_gptq(tmp_path)
    weights = Checkpoint(tmp_path)
    tensors = {name: weights.tensor(name) for name in weights.stored}
    name = f"{NAME}.{tensor}"
    changed = {} if change is None else {name: change(tensors[name]).contiguous()}
    kept = {n: t for n, t in tensors.items() if n != name}
    save_file(kept | changed, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        written.stage("4")
    assert name in str(error.value) and str(tmp_path) in str(error.value)


def test_a_linear_that_no_group_targets(tmp_path):
    written = write_packed(tmp_path)
    groups = {"group_0": scheme(4, 64, ["re:.*mlp.*"])}
    rewrite(tmp_path, config_groups=groups)
    with pytest.raises(UserError, match=f"'{NAME}.weight_scale' is there, but no config_group"):
        written.stage("4")


def test_layers_of_other_bits_take_no_codes(tmp_path):
    """Nothing is ever taken for what it is not."""
    written = write_gptq(tmp_path, 8, 32)
    for precision in ("3", "4"):
        found = linears(written.stage(precision, torch.bfloat16)).values()
        assert all(isinstance(m, GridLinear) and m.bits == int(precision) for m in found)


@needs_w8a8
def test_zeros_beside_the_middle_are_no_codes_for_eight_bit_activations(tmp_path):
    written = write_packed(tmp_path, 8, -1)
    codes = written.codes[NAME]
    layer = linears(written.stage("8-w8a8"))[NAME]
    error = layer.dequantized_weight() - codes.weight.float()
    assert 0 < error.norm() < 0.02 * codes.weight.float().norm()
