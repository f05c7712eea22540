"""Compiles the kernels that a loaded stage needs, and hands its weights over to them.

Only humming's kernels ask for that (`llmpq.quant.humming`): others are there at once, or compile in
a moment at their first call, which the warm-up makes.
"""

from collections import Counter
from collections.abc import Callable

from llmpq.models.stage_model import StageModel
from llmpq.quant.adopted import AdoptedLinear
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
    modules = list(stage.model.modules())
    layers = [module for module in modules if isinstance(module, HummingLinear)]
    notes = _foreign_notes(stage, [m for m in modules if isinstance(m, AdoptedLinear)])
    if not layers:
        return notes
    for layer in layers:
        layer.batch_invariant = batch_invariant
    failed = serve(layers, row_ladder(most_rows), stage.device, on_compiled)
    return notes + [
        f"{count} of {len(layers)} packed linears are unpacked by torch, which is slow: {reason}"
        for reason, count in Counter(failed.values()).items()
    ]


def _foreign_notes(stage: StageModel, layers: list[AdoptedLinear]) -> list[str]:
    """What there is to say of weights that keep a checkpoint's own grids, on a card."""
    if not layers or stage.device.type != "cuda":
        return []
    dtypes = {str(layer.scales.dtype).removeprefix("torch.") for layer in layers}
    others = dtypes - {str(stage.dtype).removeprefix("torch.")}
    advice = f"; scales are {others.pop()}: --dtype with that name may be faster" if others else ""
    return [
        f"{len(layers)} linears keep grids of the checkpoint that no kernel reads; torch unpacks "
        f"them, which is slow{advice}"
    ]
