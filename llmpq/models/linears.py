"""Makes the empty linears of a stage."""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import nn

from llmpq.errors import UserError
from llmpq.quant import INPUTS, PlainLinear, QuantizedLinear, TensorPart, linear_factory

Linear = PlainLinear | QuantizedLinear


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear of transformers that computes nothing else than its product."""
    if not isinstance(module, nn.Linear) or isinstance(module, Linear):
        return False
    return type(module).forward is nn.Linear.forward


class LinearMaker:
    """Makes linears with activations of `dtype`, quickly where many are equal.

    `leads` tells whether this shard adds the biases of linears that are cut by their inputs.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, leads: bool = True) -> None:
        self._dtype, self._device, self._leads = dtype, device, leads
        self._factories: dict[object, Callable[[], Linear]] = {}

    def __call__(
        self,
        precision: str,
        in_features: int,
        out_features: int,
        bias: bool,
        part: TensorPart | None = None,
        of_experts: bool = False,
    ) -> Linear:
        """An empty linear of these sizes; raises `UserError` where this device cannot serve it."""
        key = precision, in_features, out_features, bias, part, of_experts
        if key not in self._factories:
            try:
                self._factories[key] = linear_factory(
                    precision,
                    in_features,
                    out_features,
                    bias=bias,
                    dtype=self._dtype,
                    device=self._device,
                    part=part,
                    of_experts=of_experts,
                )
            except ValueError as error:  # a precision that this device cannot serve
                raise UserError(str(error)) from None
        return self._factories[key]()

    def like(self, linear: nn.Linear, precision: str, part: TensorPart | None = None) -> Linear:
        """An empty linear that replaces one of transformers, or holds a part of it."""
        shape = (linear.out_features, linear.in_features)
        out_features, in_features = part.of_shape(shape) if part else shape
        added_elsewhere = part is not None and part.dim == INPUTS and not self._leads
        has_bias = linear.bias is not None and not added_elsewhere
        return self(precision, in_features, out_features, has_bias, part)
