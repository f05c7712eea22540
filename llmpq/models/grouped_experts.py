"""The experts of a layer, multiplied by kernels that serve all of them at once.

`GroupedExperts` gives the linears of all experts places in common tensors before they are loaded:
one for the gates and the linears beside them, one for the outputs. Once all weights lie there,
`run` computes the layer in a number of launches that depends on no routing, and the host does not
wait for the device. Gate and `up` of an expert are one product.

Outputs are weighed in 32 bits and rounded; a token's experts are then added in the order in which
its router chose them, so that its sum depends on nothing else in the micro-batch. Not covered:
experts that differ in shape or precision, and weights in a checkpoint's own grids that the layout
has no room for: `PackedExperts` multiplies these one by one.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from llmpq.expert_kernels import expert_choices
from llmpq.kernel import Kernel
from llmpq.quant import PlainLinear, QuantizedLinear, machine_here
from llmpq.quant.grouped import (
    NOTHING,
    SCALED_INPUTS,
    SCALED_OUTPUTS,
    ExpertStack,
    StackedWeight,
    block_rows_for,
    multiply_experts,
    sort_pairs,
)

INPUTS, OUTPUTS = ("gate_proj", "up_proj"), ("down_proj",)  # names of linears inside an expert


def grouped_experts(
    experts: nn.ModuleList, activation: Callable[..., Tensor]
) -> "GroupedExperts | None":
    """What runs these experts at once; None where no kernel of their device does."""
    inputs, outputs = (_Projection(experts, names) for names in (INPUTS, OUTPUTS))
    served = inputs.kernel is not None and outputs.kernel is not None
    return GroupedExperts(inputs, outputs, activation) if served else None


class _Projection:
    """The linears of all experts with these names inside, which one launch multiplies by."""

    def __init__(self, experts: nn.ModuleList, names: Sequence[str]) -> None:
        self._experts = experts
        self._names = [n for n in names if getattr(experts[0], n) is not None]
        self.each = len(self._names)  # of one expert
        self._stack: ExpertStack | None = None

    def linears(self) -> list[Any]:
        """Those of an expert follow one another. A loader may have put others in their places."""
        return [getattr(expert, name) for expert in self._experts for name in self._names]

    @property
    def kernel(self) -> Kernel | None:
        """The kernel for all of them; None where they differ, or their device has none."""
        like, *others = self.linears()
        if any(_form(one) != _form(like) for one in others):
            return None
        dtype = like.weight.dtype if isinstance(like, PlainLinear) else like.dtype
        precision, layout = str(getattr(like, "bits", 16)), getattr(like, "layout", "plain")
        shape = precision, like.out_features, like.in_features
        kernel = expert_choices(machine_here(like.home, dtype), *shape).grouped
        return kernel if kernel is not None and kernel.layout == layout else None

    def make_places(self) -> None:
        """Gives the empty linears places in common tensors."""
        linears = self.linears()
        self._stack = ExpertStack(len(linears), linears[0].home)
        for index, linear in enumerate(linears):
            linear.place = self._stack.place(index)

    def weight(self) -> StackedWeight | None:
        """The loaded weight of all experts; None where a linear holds its own elsewhere."""
        assert self._stack is not None
        linears = self.linears()
        like, is_packed = linears[0], isinstance(linears[0], QuantizedLinear)
        names = like.weight_buffers if is_packed else ("weight",)
        wanted = (*names, "bias") if like.bias is not None else names
        if any(_form(one) != _form(like) for one in linears):
            return None
        whole: dict[str, Tensor] = {}
        for name in wanted:
            views = [getattr(one, name) for one in linears]
            tensor = self._stack.whole(name, views, len(self._experts))
            if tensor is None:
                return None
            whole[name] = tensor
        grids = whole.get("scales"), whole.get("zeros"), whole.get("bias")
        return StackedWeight(whole[names[0]], *grids, getattr(like, "bits", 16), like.in_features)


class GroupedExperts:
    """Runs the experts of one layer at once, for as many tokens as the kernels take."""

    def __init__(
        self, inputs: _Projection, outputs: _Projection, activation: Callable[..., Tensor]
    ) -> None:
        self._activation, self._has_gate = activation, inputs.each == len(INPUTS)
        self._projections = inputs, outputs
        self._limits = [one.kernel.max_rows for one in self._projections if one.kernel]
        self._weights: list[StackedWeight] | None = None
        for projection in self._projections:
            projection.make_places()

    def serves(self, tokens: int) -> bool:
        """Whether so many tokens are multiplied at once; False where a weight lies elsewhere."""
        if any(limit is not None and tokens > limit for limit in self._limits):
            return False
        if self._weights is None:
            found = [projection.weight() for projection in self._projections]
            self._weights = [weight for weight in found if weight is not None]
        return len(self._weights) == len(self._projections)

    def forget(self) -> None:
        """Looks for the weights anew before the next call, as they may have been moved."""
        self._weights = None

    def run(
        self, hidden: Tensor, chosen: Tensor, scores: Tensor, experts: int, scales_inputs: bool
    ) -> Tensor:
        """The weighted sum `[T, H]` of the experts of each of `hidden` `[T, H]`."""
        assert self._weights is not None and len(self._weights) == len(self._projections)
        inputs, outputs = self._weights
        table = sort_pairs(chosen, experts, block_rows_for(chosen.numel(), experts))
        factors, given = scores.reshape(-1), hidden.contiguous()
        at_first, at_last = (SCALED_INPUTS, NOTHING) if scales_inputs else (NOTHING, SCALED_OUTPUTS)
        inner = self._inner(multiply_experts(given, inputs, table, True, factors, at_first))
        weighed = multiply_experts(inner, outputs, table, False, factors, at_last)
        return weighed.view(*chosen.shape, -1).sum(dim=1)

    def _inner(self, multiplied: Tensor) -> Tensor:
        """The inner values `[pairs, I]` from the outputs of gate and `up`."""
        if not self._has_gate:
            return self._activation(None, multiplied).contiguous()
        return self._activation(*multiplied.chunk(2, dim=1)).contiguous()


def _form(linear: Any) -> object:
    """What linears have in common that one launch multiplies by."""
    sizes = linear.in_features, linear.out_features, getattr(linear, "bits", 16)
    return type(linear), *sizes, *linear.raw_shapes
