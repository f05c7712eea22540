"""Compiles the kernels that a loaded stage needs, and converts its weights to their layout.

`prepare_kernels` does so for humming's kernels (`llmpq.quant.humming`). oneDNN, which multiplies
16-bit matrices on a CPU, compiles a kernel for each new number of rows at its first call: 0.5 ms a
shape of matrix on a Xeon of 2023, 2 ms a layer of Llama's shapes, which may be more than the layer
itself takes. `prepare_rows` makes those first calls before the run. Other kernels need no
compilation, or compile quickly at their first call, which the warm-up makes.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from llmpq.job import padded_width
from llmpq.kernel import KERNELS_KEPT
from llmpq.models.family import find
from llmpq.models.stage_model import StageModel
from llmpq.plan_data import Plan, reserve_of
from llmpq.quant import PlainLinear, QuantizedLinear
from llmpq.quant.adopted import AdoptedLinear
from llmpq.quant.humming import HummingLinear, serve
from llmpq.quant.humming_jit import row_ladder
from llmpq.workload import planned_lengths

OnCompiled = Callable[[int, int], None]  # called with kernels compiled, and their total
LARGE_PRODUCT = 2**27  # rows x inputs x outputs, which takes far longer than compiling


def prepare_kernels(
    stage: StageModel,
    most_rows: int,
    batch_invariant: bool = False,
    on_compiled: OnCompiled = lambda *_: None,
) -> list[str]:
    """Prepares the linears of a stage for products of up to `most_rows` rows.

    With `batch_invariant`, a row's result does not depend on the other rows, which may be slower.
    Returns notes on linears that keep slower kernels, each with the reason.
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


def planned_rows(plan: Plan) -> tuple[list[int], list[int]]:
    """The numbers of rows of the products of layers, and of the head, in the jobs of a plan.

    Decode steps come first, then prefills of one, two or more of the planned prompts. The last
    chunks of prompts that are computed in several chunks are left out.
    """
    reserve, most = reserve_of(plan), plan.prefill_micro_batch
    prompts = {prompt for prompt, _ in planned_lengths(plan.workload)}
    widths = {min(reserve.chunk_tokens, padded_width(prompt)) for prompt in prompts}
    prefills = [count * width for count in range(1, most + 1) for width in sorted(widths)]
    chosen = list(range(1, 1 + max(most, reserve.rows)))  # tokens that are chosen at once
    return list(dict.fromkeys(chosen + prefills)), chosen


def prepare_rows(stage: StageModel, rows: Sequence[int], chosen: Sequence[int] = ()) -> None:
    """Multiplies each kind of linear of a stage once by each number of rows; on a CPU only.

    `chosen` holds the numbers of rows of the head's products, on the last stage. Products above
    `LARGE_PRODUCT` are left out, and so are the last numbers where there are more than the CPU
    keeps kernels of. No other shard of the stage takes part.
    """
    if stage.device.type != "cpu":
        return
    layers = list(stage.linears().values())
    kinds = {
        (type(one), one.in_features, one.out_features, getattr(one, "bits", 16)): one
        for one in layers
    }
    most = KERNELS_KEPT // max(1, len({kind[1:3] for kind in kinds}))
    for linear in kinds.values():
        _multiply(linear, rows[:most], stage.dtype)
    head = find(stage.model, stage.family.head)
    if stage.layers.is_last and isinstance(head, PlainLinear):
        _multiply(head, chosen, stage.dtype)


@torch.inference_mode()
def _multiply(
    linear: PlainLinear | QuantizedLinear, rows: Sequence[int], dtype: torch.dtype
) -> None:
    """Calls `forward` directly, without the hooks that sum over shards."""
    for count in rows:
        if count * linear.in_features * linear.out_features <= LARGE_PRODUCT:
            linear.forward(torch.zeros(count, linear.in_features, dtype=dtype))


def _foreign_notes(stage: StageModel, layers: list[AdoptedLinear]) -> list[str]:
    """Notes on weights that keep a checkpoint's own grids, on a card."""
    if not layers or stage.device.type != "cuda":
        return []
    dtypes = {str(layer.scales.dtype).removeprefix("torch.") for layer in layers}
    others = dtypes - {str(stage.dtype).removeprefix("torch.")}
    other = next(iter(others), None)
    advice = f"; their scales are {other}: --dtype {other} may be faster" if other else ""
    return [
        f"{len(layers)} linears keep the checkpoint's quantization grids, which no kernel reads; "
        f"torch unpacks them, which is slow{advice}"
    ]
