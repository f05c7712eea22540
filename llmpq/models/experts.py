"""Routed experts of a layer, each with llmpq's own linears.

transformers holds all experts of a layer as stacked parameters: `gate_up_proj [E, 2I, H]` and
`down_proj [E, H, I]`, or the same transposed. `pack_experts` replaces such a module by
`PackedExperts`, whose child "7" holds the linears `gate_proj`, `up_proj` and `down_proj` of expert
7, so that each matrix has a name, a precision, a rounding and a packed form like any other linear.

Where kernels of the device multiply for all experts at once, `grouped_experts` runs them. Elsewhere
a layer sorts the pairs of tokens and experts once, asks the device once how many tokens each
expert has, and runs the experts that have some. Their outputs are added by rising expert, so that
a token's sum depends on nothing else in the micro-batch. On the meta device nothing can be asked:
there a few experts get all tokens, which is the most memory that any routing takes.

Shapes: T tokens, k experts for each, E experts, H hidden size, I inner size of an expert.
Not covered: experts with a norm of their own.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from llmpq.errors import UserError
from llmpq.models.family import find, part_of
from llmpq.models.grouped_experts import grouped_experts
from llmpq.quant import PlainLinear, QuantizedLinear

Linear = PlainLinear | QuantizedLinear
# Makes the linear with a name inside the layer, input and output features, and maybe a bias.
MakeLinear = Callable[[str, int, int, bool], Linear]
# The inner values `[T, I]` of an expert, from its gate's outputs (None without a gate) and `up`.
Activation = Callable[..., Tensor]

# transformers' blocks that give every expert all tokens, with scores of 0 where not routed to it.
DENSE_BLOCKS = ("Llama4TextMoe",)


class ExpertSizes(NamedTuple):
    """The sizes of the experts that a module of transformers holds."""

    number: int
    hidden: int
    inner: int
    has_gate: bool
    has_bias: bool


def holds_experts(module: nn.Module) -> bool:
    """Whether this is a module of stacked experts that `pack_experts` can replace."""
    down = module._parameters.get("down_proj")
    up = module._parameters.get("gate_up_proj", module._parameters.get("up_proj"))
    return down is not None and up is not None and down.dim() == up.dim() == 3


def sizes_of(experts: nn.Module) -> ExpertSizes:
    """The sizes of a module for which `holds_experts` is true."""
    has_gate = "gate_up_proj" in experts._parameters
    up = experts.get_parameter("gate_up_proj" if has_gate else "up_proj")
    down = experts.get_parameter("down_proj")
    hidden, inner = down.shape[1:]
    if _is_dense(experts) or getattr(experts, "is_transposed", False):
        inner, hidden = hidden, inner
    assert up.numel() == down.numel() * (1 + has_gate), type(experts).__name__
    return ExpertSizes(len(down), hidden, inner, has_gate, "down_proj_bias" in experts._parameters)


class Expert(nn.Module):
    """One expert: `down(activation(gate(x), up(x)))`."""

    def __init__(
        self, gate_proj: Linear | None, up_proj: Linear, down_proj: Linear, activation: Activation
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """`[T, H]` to `[T, H]`."""
        gate = None if self.gate_proj is None else self.gate_proj(x)
        return self.down_proj(self.activation(gate, self.up_proj(x)))


class PackedExperts(nn.ModuleList):
    """The experts of a layer. With `scales_inputs`, scores multiply inputs instead of outputs."""

    def __init__(self, experts: Iterable[Expert], scales_inputs: bool = False) -> None:
        own = list(experts)
        super().__init__(own)
        self.scales_inputs = scales_inputs
        self._grouped = grouped_experts(self, own[0].activation)

    def waits_for(self, tokens: int) -> bool:
        """Whether it asks the device how many of so many tokens each expert has."""
        return self._grouped is None or not self._grouped.serves(tokens)

    def forward(self, hidden: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        """The weighted sum `[T, H]` of the experts `chosen` `[T, k]` for each of `hidden` `[T, H]`.

        `scores` `[T, k]` are their weights.
        """
        if self._grouped is not None and self._grouped.serves(len(hidden)):
            return self._grouped.run(hidden, chosen, scores, len(self), self.scales_inputs)
        return self.run_one_by_one(hidden, chosen, scores)

    def run_one_by_one(self, hidden: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        """The same, expert after expert."""
        order, counts = self._by_expert(chosen)
        tokens, factors = order // chosen.shape[-1], scores.flatten()[order, None]
        total = torch.zeros_like(hidden)
        for expert, own, factor in zip(
            self, tokens.split(counts), factors.split(counts), strict=True
        ):
            if len(own):
                total.index_add_(0, own, self._run(expert, hidden[own], factor))
        return total

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedExperts":
        """Moves or converts weights, as torch does: they leave what they have in common."""
        if self._grouped is not None:
            self._grouped.forget()
        return super()._apply(fn, recurse)

    def _by_expert(self, chosen: Tensor) -> tuple[Tensor, list[int]]:
        """The flat pairs of `chosen` `[T, k]` by expert and token, and each expert's number."""
        pairs = chosen.flatten()
        order = pairs.argsort(stable=True)
        counts = pairs.new_zeros(len(self)).index_add_(0, pairs, torch.ones_like(pairs))
        if counts.is_meta:  # no expert gets a token twice, so that none has more tokens
            per_token = chosen.shape[-1]
            return order, [len(chosen)] * per_token + [0] * (len(self) - per_token)
        return order, counts.tolist()

    def keep_one_by_one(self) -> None:
        """Runs its experts one by one from now on, so that hooks on their linears see inputs."""
        self._grouped = None

    def _run(self, expert: nn.Module, x: Tensor, factor: Tensor) -> Tensor:
        """The weighted outputs `[n, H]` of one expert; `x` `[n, H]` is overwritten."""
        if self.scales_inputs:
            return expert(x.mul_(factor))
        return expert(x).mul_(factor)


class SparseBlock(nn.Module):
    """Llama 4's feed-forward block: routed experts, whose inputs are scaled, and a shared one.

    transformers' own runs every expert on all tokens, with inputs of zero where it is not chosen.
    """

    def __init__(self, block: Any, experts: PackedExperts) -> None:
        super().__init__()
        self.top_k, self.router, self.shared_expert = block.top_k, block.router, block.shared_expert
        self.experts = experts

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., H]` to `[T, H]`, and the router's logits `[T, E]`."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        scores, logits = self.router(hidden)
        chosen = logits.topk(self.top_k, dim=-1).indices
        routed = self.experts(hidden, chosen, scores.gather(1, chosen))
        return self.shared_expert(hidden).add_(routed), logits


def expert_blocks(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of stacked experts in a layer of transformers, by their names inside."""
    yield from ((n, module) for n, module in layer.named_modules() if holds_experts(module))


def pack_experts(layer: nn.Module, make: MakeLinear) -> None:
    """Replaces the experts of a layer of transformers by linears that `make` makes, if it has any.

    Raises `UserError` for experts that compute what `PackedExperts` does not.
    """
    for path, experts in list(expert_blocks(layer)):
        owner, _, name = path.rpartition(".")
        block = find(layer, owner) if owner else layer
        is_dense = type(block).__name__ in DENSE_BLOCKS
        if is_dense != _is_dense(experts):
            raise UserError(
                f"'{type(experts).__name__}' runs experts in a way that llmpq does not support"
            )
        packed = PackedExperts(_experts(path, experts, make), scales_inputs=is_dense)
        if is_dense:
            above, _, name = owner.rpartition(".")
            holder = find(layer, above) if above else layer
            setattr(holder, name, SparseBlock(block, packed))
        else:
            setattr(block, name, packed)


def routers(layer: nn.Module) -> frozenset[str]:
    """The linears of a layer of transformers that weigh experts, by their names inside.

    These are the linears beside experts with an output for each of them (a router) or one output
    (the gate of a shared expert). They stay at 16 bits, as they decide what is computed.
    """
    found = set[str]()
    for path, experts in expert_blocks(layer):
        block = path.rpartition(".")[0]
        outputs = (1, sizes_of(experts).number)
        found |= {
            name
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
            and module.out_features in outputs
            and name.startswith(f"{block}." if block else "")
            and part_of(name) == "ffn"
        }
    return frozenset(found)


def _is_dense(experts: nn.Module) -> bool:
    """Whether transformers does not let this class choose an implementation (Llama 4)."""
    return not hasattr(experts, "_apply_gate")


def _experts(path: str, like: Any, make: MakeLinear) -> Iterator[Expert]:
    """The experts that replace a module of transformers with the name `path` in its layer."""
    sizes, activation = sizes_of(like), _activation_of(like)
    shapes = {"up_proj": (sizes.hidden, sizes.inner), "down_proj": (sizes.inner, sizes.hidden)}
    shapes |= {"gate_proj": (sizes.hidden, sizes.inner)} if sizes.has_gate else {}
    for index in range(sizes.number):
        linears = {
            name: make(f"{path}.{index}.{name}", *shape, sizes.has_bias)
            for name, shape in shapes.items()
        }
        yield Expert(linears.get("gate_proj"), linears["up_proj"], linears["down_proj"], activation)


def _activation_of(like: Any) -> Activation:
    """How a module of transformers combines the outputs of gate and up."""
    if getattr(like, "has_post_expert_norm", False):
        raise UserError(
            f"'{type(like).__name__}' normalizes what each expert returns, which llmpq does not "
            "support"
        )
    if not sizes_of(like).has_gate:
        return lambda _, up: like.act_fn(up)
    if _is_dense(like) or type(like)._apply_gate is _default_apply_gate:
        return lambda gate, up: like.act_fn(gate) * up
    if like.is_concatenated:
        return lambda gate, up: like._apply_gate(torch.cat((gate, up), dim=-1))
    return lambda gate, up: like._apply_gate(torch.stack((gate, up), dim=-1).flatten(-2))
