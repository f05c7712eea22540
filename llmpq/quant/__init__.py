"""Linear layers that hold their weight at a given precision, and multiply by it.

`linear_factory` makes layers, which are empty until their raw weights are loaded; they round
(`rounding`) and pack (`packing`) them. The kernel that multiplies (`kernels`) depends on the
device, the dtype and the number of rows, never on timing, so that the same input always gives the
same bits.
"""

from llmpq.quant.adopted import AdoptedLinear, PackedWeight, keep_codes
from llmpq.quant.base import PlainLinear, QuantizedLinear
from llmpq.quant.here import machine_here
from llmpq.quant.make import available_precisions, linear_factory, why_unavailable
from llmpq.quant.part import INPUTS, OUTPUTS, TensorPart
from llmpq.quant.rounding import Rounding, quantize

__all__ = [
    "INPUTS",
    "OUTPUTS",
    "AdoptedLinear",
    "PackedWeight",
    "PlainLinear",
    "QuantizedLinear",
    "Rounding",
    "TensorPart",
    "available_precisions",
    "keep_codes",
    "linear_factory",
    "machine_here",
    "quantize",
    "why_unavailable",
]
