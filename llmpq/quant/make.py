"""Says which precisions a device offers, and builds the empty layers."""

from collections.abc import Callable
from functools import partial

import torch

from llmpq.expert_kernels import expert_choices
from llmpq.kernel import Layout
from llmpq.kernel_table import choices, serves
from llmpq.precision import PRECISIONS, STANDARD, group_size
from llmpq.quant import bnb
from llmpq.quant.base import GridLinear, PlainLinear, QuantizedLinear
from llmpq.quant.here import has_bitsandbytes, machine_here
from llmpq.quant.humming import HummingLinear
from llmpq.quant.linear import GroupedLinear, RowLinear, TiledLinear, TokenInt8Linear
from llmpq.quant.part import TensorPart, part_group, row_length

# The class for each layout of a weight.
LAYERS: dict[Layout, type[QuantizedLinear]] = {
    "grouped": GroupedLinear,
    "tiled": TiledLinear,
    "rows": RowLinear,
    "token int8": TokenInt8Linear,
    "nf4": bnb.Nf4Linear,
    "8-bnb": bnb.LlmInt8Linear,
    "humming": HummingLinear,
}


def available_precisions(
    device: torch.device, dtype: torch.dtype, optional: bool = False
) -> tuple[str, ...]:
    """The precisions that layers of `dtype` on this device can be built with.

    With `optional`, those too that need another installed library than torch.
    """
    if not dtype.is_floating_point:
        return ()
    machine = machine_here(device, dtype, optional)
    return tuple(p for p in (PRECISIONS if optional else STANDARD) if serves(machine, p))


def why_unavailable(precision: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no layer can be built with `precision`, and what would work; None where one can be."""
    library = PRECISIONS[precision].library if precision in PRECISIONS else None
    offered = available_precisions(device, dtype, optional=library is not None)
    if precision in offered:
        return None
    if library is not None and not has_bitsandbytes():
        return f"precision {precision!r} needs {library}: pip install 'llmpq[bnb]'"
    return (
        f"precision {precision!r} is not available for {dtype} on {torch.device(device).type}: "
        f"use one of {', '.join(offered) or 'none (the dtype must be a float)'}"
    )


def linear_factory(
    precision: str,
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    part: TensorPart | None = None,
    of_experts: bool = False,
) -> Callable[[], PlainLinear | QuantizedLinear]:
    """Returns a function that makes empty linears, which will hold their weights at `precision`.

    The layout is chosen once, so that thousands of equal linears are made quickly. With `part`,
    a linear holds that part of a larger matrix; `in_features` and `out_features` are the part's.
    Weights `of_experts` are stored as the kernels for all experts at once read them, where there
    are some. Raises `ValueError`, with what would work, where this device cannot serve them.
    """
    device = torch.device(device)
    if reason := why_unavailable(precision, device, dtype):
        raise ValueError(reason)
    sizes = in_features, out_features, bias, dtype, device
    if precision == "16":
        return partial(PlainLinear, *sizes, part)
    layer = layer_class(precision, in_features, out_features, dtype, device, part, of_experts)
    if not issubclass(layer, GridLinear):
        return partial(layer, *sizes, part=part)
    return partial(layer, *sizes, PRECISIONS[precision].weight_bits, part)


def layer_class(
    precision: str,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device: torch.device,
    part: TensorPart | None = None,
    of_experts: bool = False,
) -> type[QuantizedLinear]:
    """The class with the layout that the best kernel of this device reads."""
    group = part_group(
        group_size(PRECISIONS[precision].weight_bits, row_length(in_features, part)), part
    )
    machine = machine_here(device, dtype, PRECISIONS[precision].library is not None)
    shape = precision, out_features, in_features, group
    kernels = expert_choices(machine, *shape).single if of_experts else choices(machine, *shape)
    return LAYERS[kernels[0].layout]
