"""Reads checkpoints that are quantized already: the tensors of a weight, and what their bits mean.

The format is `quantization_config.quant_method` of config.json, or what older tools wrote instead;
int32 words hold codes from the lowest bit up:

    gptq                qweight [in * bits / 32, out], qzeros [groups, out * bits / 32],
                        scales [groups, out], g_idx [in], the group of each column. A "gptq" file
                        keeps every zero less one, a "gptq_v2" file as it is.
    compressed-tensors  pack-quantized: weight_packed [out, words], weight_scale [out, groups],
                        weight_zero_point, packed along the outputs, weight_g_idx [in].
                        int-quantized: weight, int8 [out, in], weight_scale [out, 1].
                        Codes and zeros are signed; words hold them plus 2^(bits - 1).

Codes of 3 bits cross word boundaries; compressed-tensors did so only from 0.18 on, and put 10 of
them in a word before. Linears without such tensors are read as plain weights. Zeros and codes
become unsigned (`PackedWeight`).

Not covered: other bits than 3, 4 and 8, floats of 8 (`float8`) and 4 bits (`mxfp4`), AWQ, sparse
weights, and scales of activations (activations are quantized a token at a time in any case).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llmpq.artifact import parse_json, show_value
from llmpq.errors import UserError
from llmpq.quant import PackedWeight
from llmpq.quant.packing import unpack_words

BITS = (3, 4, 8)
OLD_GPTQ = "quantize_config.json"  # the settings of AutoGPTQ, beside config.json
SUPPORTED = (
    "supported are gptq (3, 4 or 8 bits), compressed-tensors (pack-quantized or int-quantized, "
    "3, 4 or 8 bits), fp8 with weight_scale_inv, mxfp4 experts, or weights that are not quantized"
)
GPTQ_SETTINGS = (
    ("group_size", int, "an integer"),
    ("desc_act", bool, "true or false"),
    ("sym", bool, "true or false"),
)
ONE_A_CODE = {4: 0x11111111, 8: 0x01010101}  # a word whose codes are all 1
DENSE_SINCE = (0, 18)  # the version of compressed-tensors since which 3 bits cross words


class Tensors(Protocol):
    """Gives the tensors of a checkpoint as they are stored."""

    def __contains__(self, name: str) -> bool: ...

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor; raises `UserError` where it is missing or has another shape."""

    def fault(self, name: str, reason: str) -> UserError:
        """The error that names the tensor, its file and what is wrong with it."""


class QuantizedFormat(Protocol):
    """A format of quantized linears in a checkpoint."""

    method: str
    precisions: frozenset[str]  # precisions that its codes serve unchanged

    def names(self, linear: str) -> list[str]:
        """The names that tensors of a linear may have, beside its bias."""

    def holds(self, linear: str, tensors: Tensors) -> bool:
        """Whether this linear is quantized."""

    def read(self, linear: str, shape: tuple[int, ...], tensors: Tensors) -> PackedWeight:
        """The weight `[out, in]` of a linear."""


def quantized_format(folder: Path) -> QuantizedFormat | None:
    """The format of the quantized checkpoint in this directory; None where it has no codes.

    Raises `UserError` for formats that cannot be read.
    """
    settings, path = settings_of(folder)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method in ("fp8", "mxfp4"):  # no codes; see `float8` and `mxfp4`
        return None
    if method == "gptq":
        return GptqFormat(settings, path)
    if method == "compressed-tensors":
        return CompressedTensorsFormat(settings, path)
    raise UserError(
        f"{path}: weights quantized by {show_value(method)} cannot be read; {SUPPORTED}"
    )


def settings_of(folder: Path) -> tuple[Any, Path]:
    """The quantization settings, and the file that has them: config.json or one beside it."""
    path = folder / "config.json"
    config = parse_json(path) if path.is_file() else None
    if not isinstance(config, dict):
        return None, path
    if config.get("quantization_config") is not None:
        return config["quantization_config"], path
    if isinstance(config.get("compression_config"), dict):  # compressed-tensors to 0.6
        return {"quant_method": "compressed-tensors"} | config["compression_config"], path
    old, modelopt = path.with_name(OLD_GPTQ), path.with_name("hf_quant_config.json")
    settings = parse_json(old) if old.is_file() else None
    if isinstance(settings, dict) and "bits" in settings:  # AutoGPTQ up to 0.4
        return {"quant_method": "gptq"} | settings, old
    settings = parse_json(modelopt) if modelopt.is_file() else None
    inner = settings.get("quantization") if isinstance(settings, dict) else None
    if isinstance(inner, dict) and inner.get("quant_algo"):
        return {"quant_method": f"modelopt {inner['quant_algo']}"}, modelopt
    return None, path


class GptqFormat:
    """The format of GPTQModel, AutoGPTQ and Optimum."""

    method = "gptq"
    parts: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, settings: Mapping[str, Any], path: Path) -> None:
        layout = settings.get("checkpoint_format", "gptq")
        if layout not in ("gptq", "gptq_v2"):
            raise UserError(
                f"{path}: GPTQ weights in the layout {show_value(layout)} cannot be read; "
                f"{SUPPORTED}"
            )
        _check_bits(settings.get("bits"), path)
        _check_sorts(settings, path)
        self.precisions = frozenset({str(settings["bits"])})
        self._less_one = layout == "gptq"

    def names(self, linear: str) -> list[str]:
        """The names that tensors of a linear may have, beside its bias."""
        return [f"{linear}.{part}" for part in self.parts]

    def holds(self, linear: str, tensors: Tensors) -> bool:
        """Whether this linear is quantized."""
        return f"{linear}.qweight" in tensors

    def read(self, linear: str, shape: tuple[int, ...], tensors: Tensors) -> PackedWeight:
        """The weight of a linear; its shape gives the bits, which may differ between linears."""
        outputs, cols = shape
        words = _words(tensors, f"{linear}.qweight")
        fitting = [bits for bits in BITS if tuple(words.shape) == (cols * bits // 32, outputs)]
        if not fitting:
            raise _misshapen(tensors, f"{linear}.qweight", words, shape)
        scales = _scales(tensors, f"{linear}.scales")
        if scales.dim() != 2 or scales.shape[1] != outputs:
            raise _misshapen(tensors, f"{linear}.scales", scales, shape)
        zeros = self._zeros(linear, fitting[0], outputs, len(scales), tensors)
        return PackedWeight(
            fitting[0],
            unpack_words(words.t(), fitting[0], cols),
            scales.t().contiguous(),
            zeros.t().contiguous(),
            _groups(tensors, f"{linear}.g_idx", cols, len(scales)),
        )

    def _zeros(
        self, linear: str, bits: int, outputs: int, num_groups: int, tensors: Tensors
    ) -> Tensor:
        """uint8 `[groups, out]`."""
        name = f"{linear}.qzeros"
        words = _words(tensors, name, (num_groups, outputs * bits // 32))
        if not self._less_one:
            return unpack_words(words, bits, outputs)
        if bits in ONE_A_CODE:  # 1 was subtracted from whole words, with borrows between codes
            return unpack_words(words + ONE_A_CODE[bits], bits, outputs)
        return (unpack_words(words, bits, outputs) + 1) & (2**bits - 1)


@dataclass(frozen=True)
class _QuantizationScheme:
    """A group of compressed-tensors' configuration."""

    targets: tuple[str, ...]
    bits: int
    token_int8: bool  # activations are quantized too

    def rank(self, linear: str) -> int:
        """How closely the targets name this linear; 0 where they do not."""
        return max((_rank(target, linear) for target in self.targets), default=0)


class CompressedTensorsFormat:
    """The format of llm-compressor."""

    method = "compressed-tensors"
    parts: tuple[str, ...] = (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_g_idx",
        "weight_shape",
        "input_scale",  # activations are quantized a token at a time instead
        "input_zero_point",
    )

    def __init__(self, settings: Mapping[str, Any], path: Path) -> None:
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise UserError(f"{path}: quantization_config has no 'config_groups'")
        if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise UserError(f"{path}: sparse weights cannot be read; {SUPPORTED}")
        if (settings.get("transform_config") or {}).get("config_groups"):
            raise UserError(f"{path}: transformed (rotated) weights cannot be read; {SUPPORTED}")
        self._schemes = [_scheme(name, group, path) for name, group in groups.items()]
        self._dense = _version(settings.get("version")) >= DENSE_SINCE
        served = [{str(s.bits)} | ({"8-w8a8"} if s.token_int8 else set()) for s in self._schemes]
        self.precisions: frozenset[str] = frozenset().union(*served)

    def names(self, linear: str) -> list[str]:
        """The names that tensors of a linear may have, beside its bias."""
        return [f"{linear}.{part}" for part in self.parts]

    def holds(self, linear: str, tensors: Tensors) -> bool:
        """Whether this linear is quantized."""
        return any(f"{linear}.{name}" in tensors for name in ("weight_packed", "weight_scale"))

    def read(self, linear: str, shape: tuple[int, ...], tensors: Tensors) -> PackedWeight:
        """The weight of a linear."""
        scheme = max(self._schemes, key=lambda scheme: scheme.rank(linear))
        if not scheme.rank(linear):
            raise tensors.fault(
                f"{linear}.weight_scale", "is there, but no config_group targets this linear"
            )
        packed = f"{linear}.weight_packed" in tensors
        codes = (self._packed_codes if packed else _int8_codes)(linear, scheme.bits, shape, tensors)
        scales = _scales(tensors, f"{linear}.weight_scale")
        if scales.numel() == 1:
            scales = scales.reshape(1, 1).expand(shape[0], 1).contiguous()
        scales = scales[:, None] if scales.dim() == 1 else scales
        if scales.dim() != 2 or scales.shape[0] != shape[0]:
            raise _misshapen(tensors, f"{linear}.weight_scale", scales, shape)
        zeros = self._zeros(linear, scheme.bits, scales, tensors)
        groups = _groups(tensors, f"{linear}.weight_g_idx", shape[1], scales.shape[1])
        return PackedWeight(scheme.bits, codes, scales, zeros, groups)

    def _packed_codes(
        self, linear: str, bits: int, shape: tuple[int, ...], tensors: Tensors
    ) -> Tensor:
        name = f"{linear}.weight_packed"
        words = _words(tensors, name)
        codes = self._unpack(words, bits, shape[1]) if len(words) == shape[0] else None
        if codes is None:
            raise _misshapen(tensors, name, words, shape)
        return codes

    def _zeros(self, linear: str, bits: int, scales: Tensor, tensors: Tensors) -> Tensor:
        """The zeros, uint8 in the shape of `scales`; older files do not pack them."""
        name = f"{linear}.weight_zero_point"
        if name not in tensors:
            return torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
        stored = tensors.tensor(name)
        if stored.numel() == scales.numel():
            return _unsigned(stored.reshape(scales.shape), bits)
        fits = stored.dim() == 2 and stored.shape[1] == scales.shape[1]
        words = stored.to(torch.int32).t()
        zeros = self._unpack(words, bits, len(scales)) if fits else None
        if zeros is None:
            raise _misshapen(tensors, name, stored, tuple(scales.shape))
        return zeros.t().contiguous()

    def _unpack(self, words: Tensor, bits: int, count: int) -> Tensor | None:
        """The codes uint8 `[rows, count]`; None where the number of words does not fit."""
        num_words, per_word = words.shape[1], 32 // bits
        dense, padded = -(-count * bits // 32), -(-count // per_word)
        if num_words == dense and (self._dense or dense != padded):
            return unpack_words(words, bits, count)
        if num_words != padded:
            return None
        shifts = range(0, per_word * bits, bits)
        codes = torch.stack([((words >> s) & (2**bits - 1)).to(torch.uint8) for s in shifts], -1)
        return codes.flatten(1)[:, :count].contiguous()


def _int8_codes(linear: str, bits: int, shape: tuple[int, ...], tensors: Tensors) -> Tensor:
    codes = tensors.tensor(f"{linear}.weight", shape)
    if codes.dtype != torch.int8:
        raise tensors.fault(f"{linear}.weight", f"is {codes.dtype}, but its scales are for int8")
    return _unsigned(codes, bits)


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    """Signed codes as uint8, with 2^(bits - 1) added."""
    return codes.to(torch.int8).contiguous().view(torch.uint8) + 2 ** (bits - 1)


def _groups(tensors: Tensors, name: str, cols: int, num_groups: int) -> Tensor | None:
    """The group of each column, int32 `[in]`; None for runs of equal length."""
    runs = None if cols % num_groups else torch.arange(cols) // (cols // num_groups)
    group_of = tensors.tensor(name, (cols,)) if name in tensors else None
    if group_of is None or (group_of < 0).any():  # -1: the order was never changed
        if runs is None:
            raise tensors.fault(name, f"is needed: {num_groups} groups do not divide {cols} inputs")
        return None
    if int(group_of.max()) >= num_groups:
        raise tensors.fault(name, f"names group {int(group_of.max())} of {num_groups}")
    in_runs = runs is not None and torch.equal(group_of.to(runs.dtype), runs)
    return None if in_runs else group_of.to(torch.int32)


def _words(tensors: Tensors, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    words = tensors.tensor(name, shape)
    if words.dtype != torch.int32 or words.dim() != 2:
        raise tensors.fault(name, f"is {words.dtype} {list(words.shape)}, expected rows of int32")
    return words


def _scales(tensors: Tensors, name: str) -> Tensor:
    scales = tensors.tensor(name)
    if not scales.is_floating_point() or not torch.isfinite(scales).all():
        raise tensors.fault(name, f"is {scales.dtype}, expected finite numbers of a float type")
    return scales


def _misshapen(tensors: Tensors, name: str, found: Tensor, shape: tuple[int, ...]) -> UserError:
    return tensors.fault(
        name, f"has shape {list(found.shape)}, which does not fit {list(shape)} of config.json"
    )


def _scheme(name: str, group: Any, path: Path) -> _QuantizationScheme:
    where = f"{path}: config_groups.{name}"
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or not isinstance(group.get("targets"), list):
        raise UserError(f"{where}: must have 'weights' and 'targets'")
    if weights.get("type", "int") != "int":
        raise UserError(
            f"{where}: weights of type {show_value(weights['type'])} cannot be read; {SUPPORTED}"
        )
    if weights.get("strategy") not in ("group", "channel", "tensor"):
        raise UserError(
            f"{where}: scales by {show_value(weights.get('strategy'))} cannot be read; "
            "supported is one scale per group, channel or tensor"
        )
    _check_bits(weights.get("num_bits"), path)
    activations = group.get("input_activations") is not None
    return _QuantizationScheme(tuple(group["targets"]), weights["num_bits"], activations)


def _check_sorts(settings: Mapping[str, Any], path: Path) -> None:
    """Checks the types of settings that the tensors imply too, but other tools read."""
    for key, sort, what in GPTQ_SETTINGS:
        value = settings.get(key)
        if value is not None and type(value) is not sort:
            raise UserError(f"{path}: '{key}' must be {what}, found {show_value(value)}")


def _check_bits(bits: Any, path: Path) -> None:
    if type(bits) is not int or bits not in BITS:
        raise UserError(f"{path}: weights of {show_value(bits)} bits cannot be read; {SUPPORTED}")


def _rank(target: str, linear: str) -> int:
    if target == linear:
        return 3
    if target.startswith("re:"):
        return 2 if re.match(target.removeprefix("re:"), linear) else 0
    return 1 if target == "Linear" else 0


def _version(text: Any) -> tuple[int, ...]:
    """0.17.1 as (0, 17); a missing version counts as the newest."""
    found = re.match(r"(\d+)\.(\d+)", str(text))
    return tuple(map(int, found.groups())) if found else (99, 0)
