"""Which precisions a device offers, and the empty layer for each."""

import torch

from llmpq.precision import PRECISIONS, STANDARD, group_size
from llmpq.quant import bnb, kernels
from llmpq.quant.linear import (
    GroupedLinear,
    PlainLinear,
    QuantizedLinear,
    RowLinear,
    TiledLinear,
    TokenInt8Linear,
)
from llmpq.quant.part import TensorPart, part_group, row_length


def available_precisions(
    device: torch.device, dtype: torch.dtype, optional: bool = False
) -> tuple[str, ...]:
    """The precisions that layers of `dtype` on this device can be built with.

    `optional`: those too that need a library beside torch, where it is installed.
    """
    if not dtype.is_floating_point:
        return ()
    device = torch.device(device)
    token_int8 = kernels.token_int8_works(device)
    standard = tuple(p for p in STANDARD if PRECISIONS[p].weight_only or token_int8)
    return standard + (bnb.precisions(device, dtype) if optional else ())


def why_unavailable(precision: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no layer can be built with `precision`, and what would work; None where one can."""
    library = PRECISIONS[precision].library if precision in PRECISIONS else None
    offered = available_precisions(device, dtype, optional=library is not None)
    if precision in offered:
        return None
    if library is not None and not bnb.installed():
        return f"precision {precision!r} needs {library}: pip install 'llmpq[bnb]'"
    return (
        f"precision {precision!r} is not available for {dtype} on {torch.device(device).type}: "
        f"use one of {', '.join(offered) or 'none (the dtype must be a float)'}"
    )


def make_linear(
    precision: str,
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    part: TensorPart | None = None,
) -> PlainLinear | QuantizedLinear:
    """An empty linear layer that will hold its weight at `precision`.

    With `part`, that of a larger matrix; `in_features` and `out_features` are the part's.
    Raises `ValueError` where this device cannot serve it, with what it can.
    """
    device = torch.device(device)
    if reason := why_unavailable(precision, device, dtype):
        raise ValueError(reason)
    if precision == "16":
        return PlainLinear(in_features, out_features, bias, dtype, device, part)
    if precision in bnb.LAYERS:
        return bnb.LAYERS[precision](in_features, out_features, bias, dtype, device, part=part)
    if precision == "8":
        return RowLinear(in_features, out_features, bias, dtype, device, part=part)
    if not PRECISIONS[precision].weight_only:
        return TokenInt8Linear(in_features, out_features, bias, dtype, device, part=part)
    bits = PRECISIONS[precision].weight_bits
    group = part_group(group_size(bits, row_length(in_features, part)), part)
    tiled = (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and kernels.int4_tiles_suit(out_features, group)
    )
    layer = TiledLinear if tiled else GroupedLinear
    return layer(in_features, out_features, bias, dtype, device, bits, part)
