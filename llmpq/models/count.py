"""Counts the live tensors of a decoder on its own modules: the snapshots of its activations.

`count_activations` makes the allocation snapshots of models of a kind (`stage_memory`), whose
layers of all kinds count.

Not covered: models whose layers keep more than keys and values, or whose control flow depends on
values of tensors.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from transformers import AutoConfig

from llmpq.model_spec import Activations, AllocationSnapshot
from llmpq.models.live_tensors import TensorSnapshot
from llmpq.models.stage_memory import (
    MicroBatchShape,
    covers,
    snapshot_table,
    snapshots,
)
from llmpq.models.stage_model import LayerRange

# Settings with lists that are not lists of layers, whatever their length.
ROPES = ("rope_parameters", "rope_scaling", "eos_token_id", "architectures")
NUM_LAYERS = 7  # enough to have every kind of layer of a family


@dataclass(frozen=True)
class Primes:
    """Sizes of a micro-batch that share no factor with any size of a model."""

    requests: int
    tokens: int
    seen: int

    def named(self, phase: str) -> dict[str, int]:
        """The sizes of a phase by name; in prefill, the seen tokens are the new tokens.

        Attention with a sink has one column more than tokens that are seen.
        """
        name, length = ("tokens", self.tokens) if phase == "prefill" else ("seen", self.seen)
        return {"requests": self.requests, name: length, "columns": length + 1}

    def shape(self, phase: str) -> MicroBatchShape:
        """The micro-batch of a phase."""
        if phase == "prefill":
            return MicroBatchShape(self.requests, self.tokens, self.tokens)
        return MicroBatchShape(self.requests, 1, self.seen)


PRIMES = Primes(10007, 20011, 40009)
OTHER_PRIMES = Primes(10009, 20021, 40013)


def count_activations(
    configs: Iterable[Any],
    sizes: Mapping[str, int],
    primes: Primes = PRIMES,
    kinds: Sequence[int | None] | None = None,
) -> Activations:
    """The snapshots of similar models; `sizes` names their own sizes that may be factors.

    Where layers differ, the models are cut to as many layers as `kinds` has, which are of these
    kinds. Stages begin with the model's first layer, and with a later one of each kind.
    """
    of_layers = kinds or [None] * NUM_LAYERS
    total, later = len(of_layers), of_layers[1:-1]
    starts = [0, *sorted(1 + later.index(kind) for kind in set(later))]
    found: dict[str, list[TensorSnapshot]] = defaultdict(list)
    for config in configs:
        whole = with_layers(config, total)
        for phase, start, end in product(PHASES, starts, (total - 1, total)):
            layers = LayerRange(start, end, total)
            where = "_last" if layers.is_last else "_first" if layers.is_first else ""
            found[phase + where] += snapshots(whole, layers, primes.shape(phase), kinds)
    parts: dict[str, tuple[AllocationSnapshot, ...]] = {}
    for phase in PHASES:
        known: tuple[AllocationSnapshot, ...] = ()
        for where in (phase, f"{phase}_first", f"{phase}_last"):
            met = snapshot_table(found[where], {**primes.named(phase), **sizes})
            parts[where] = tuple(m for m in met if not any(covers(n, m) for n in known))
            known += parts[where]
    return Activations(**parts)


PHASES = ("prefill", "decode")


def with_layers(config: Any, total: int) -> Any:
    """The configuration with `total` layers, which repeat those of the model in order."""
    data, own = config.to_dict(), config.num_hidden_layers
    data.pop("model_type")
    data.pop(config.attribute_map.get("num_hidden_layers"), None)
    data |= {name: _spread(value, own, total) for name, value in data.items() if name not in ROPES}
    data["num_hidden_layers"] = total
    return AutoConfig.for_model(config.model_type, **data)


def _spread(value: Any, own: int, total: int) -> Any:
    """A setting with one entry for each of `own` layers, for `total` layers; others unchanged."""
    if isinstance(value, list | tuple) and len(value) == own:
        return [value[i % own] for i in range(total)]
    if not isinstance(value, dict):
        return value
    for key in (str, int):
        if value and set(value) == {key(i) for i in range(own)}:
            return {key(i): value[key(i % own)] for i in range(total)}
    return {name: _spread(each, own, total) for name, each in value.items()}
