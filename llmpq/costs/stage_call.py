"""What a call of a stage costs beside its layers, where nobody has measured it: a default.

Not covered: what the network takes (`costs.links`).
"""

from dataclasses import dataclass

import numpy as np

from llmpq.costs.fits import ASSUMED, Accuracy
from llmpq.costs.links import Seconds, Tokens
from llmpq.kernel import CPU_STAGE_CALL_S, STAGE_CALL_S
from llmpq.machine import Machine

STAGE_PHASES = ("stage_prefill", "stage_decode")


@dataclass(frozen=True)
class StageCall:
    """What a call of a stage costs beside its layers where nobody has measured it.

    Where few calls were measured, it says that others cost as much.
    """

    call_s: float
    error: float = 1.0  # engines and hosts differ by more than what it is

    def seconds(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """The same for every shape."""
        return self.call_s + 0.0 * np.asarray(tokens, dtype=float)

    def without_attention_s(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """All of it."""
        return self.seconds(micro_batch, tokens)

    def accuracy(self, micro_batch: int, tokens: float) -> Accuracy:
        """No figure of the device says it."""
        return Accuracy(ASSUMED, self.error)


def default_calls(machine: Machine) -> dict[tuple[str, str], StageCall]:
    """The default of both phases on a machine."""
    call = StageCall(STAGE_CALL_S if machine.is_card else CPU_STAGE_CALL_S)
    return {("", phase): call for phase in STAGE_PHASES}
