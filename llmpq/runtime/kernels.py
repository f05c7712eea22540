"""Compiles the kernels that a loaded stage needs, and hands its weights over to them.

Only humming's kernels ask for that (`llmpq.quant.humming`): others are there at once, or compile in
a moment at their first call, which the warm-up makes.
"""

from collections import Counter
from collections.abc import Callable

from llmpq.models.stage_model import StageModel
from llmpq.quant.humming import HummingLinear, serve
from llmpq.quant.humming_jit import row_ladder

OnCompiled = Callable[[int, int], None]  # kernels compiled, of so many


def prepare_kernels(
    stage: StageModel,
    most_rows: int,
    batch_invariant: bool = False,
    on_compiled: OnCompiled = lambda *_: None,
) -> list[str]:
    """Makes the linears of a stage ready for products of up to `most_rows` rows.

    `batch_invariant`: a row's result does not depend on the others, which may be slower. Returns
    notes on linears that stay with slower kernels, each with the reason.
    """
    layers = [module for module in stage.model.modules() if isinstance(module, HummingLinear)]
    if not layers:
        return []
    for layer in layers:
        layer.batch_invariant = batch_invariant
    failed = serve(layers, row_ladder(most_rows), stage.device, on_compiled)
    reasons = Counter(failed.values())
    return [
        f"{count} of {len(layers)} packed linears are multiplied by slower kernels: {reason}"
        for reason, count in reasons.items()
    ]
