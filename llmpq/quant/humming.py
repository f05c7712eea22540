"""Linears at 3, 4 and 8 bits that humming-kernels multiplies by, on NVIDIA cards.

A `HummingLinear` has two states. It is loaded, packed and read like the other classes, on any
device, with torch alone: codes in a little-endian stream along each row, a scale and an integer
zero a group. The disk cache keeps this state too. `serve` then compiles the kernels that a list of
layers needs and converts each layer: its buffers are replaced by those of the kernels' layout,
which depends on the card, so that a weight is held once. Where a kernel cannot be compiled, its
layers stay in the first state, and dequantize chunk by chunk.

The kernels multiply by the same weights, bit for bit, as the other classes hold at that dtype:
`(code - zero) * scale`, rounded once; at bfloat16, the scale of a whole row is applied to the
result. At float16 the scale itself is rounded first, as in the other classes: that changes no bf16
scale from 2^-17 to 65280, and smaller ones by 2^-25 at most.

Not covered: which linears are served, and choosing between kernels (`llmpq.kernel_table`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmpq.kernel_table import HUMMING_GROUPS
from llmpq.precision import group_size
from llmpq.quant import humming_jit, kernels
from llmpq.quant.base import CENTRE_UP_TO, GridLinear
from llmpq.quant.humming_jit import ROW_GROUP, KernelShape
from llmpq.quant.packing import CODES_IN_WORDS, pack_words, unpack_words
from llmpq.quant.part import TensorPart, part_group, row_length
from llmpq.quant.rounding import SCALE_DTYPE
from llmpq.workspace import HUMMING_LOCKS, HUMMING_REPEATED, PADDED, round_up

READ_BACK_ROWS = 1024  # rows of the identity that are multiplied at a time


@dataclass(frozen=True)
class _Served:
    """The objects with which a layer launches its kernels."""

    shape: KernelShape
    table: Tensor  # int64 on the CPU: which kernel for how many rows
    locks: Tensor  # int32


def grid_inputs(bits: int, in_features: int, part: TensorPart | None) -> int:
    """The inputs that share a scale in a layer that rounds its weight; `in_features`: a row."""
    row = row_length(in_features, part)
    group = group_size(bits, row)
    return in_features if group == row else part_group(group, part)


class HummingLinear(GridLinear):
    """3, 4 or 8 bits, `(code - zero) * scale` a group or a row; multiplied by humming's kernels.

    With `batch_invariant`, a row's result does not depend on the number of rows. It is off by
    default, because it keeps every output tile on one multiprocessor, which is slow for narrow
    matrices: on an H100, humming then cuts 4096 outputs into 32 tiles at 4 bits and 16 at 3 and 8
    bits, for 132 multiprocessors. (Counted from its heuristics, not timed.) Otherwise it splits the
    sum over the inputs where tiles are few, and adds up to ten parts in the dtype of the result. On
    cards from 9.0 on, and at float16 elsewhere, more than two or three parts are added in the order
    in which they are ready, so that the last bits of a result may differ from run to run.
    """

    weight_buffers = ("words", "scales", "zeros")
    layout = "humming"
    # Before it is served; afterwards they are in the kernels' layout.
    words: Tensor  # int32 [out, bits * ceil(in / 32)]
    scales: Tensor  # bf16 [out, groups]; of adopted codes the layer's dtype
    zeros: Tensor  # uint8 [out, groups]

    batch_invariant = False
    _served: _Served | None = None

    @property
    def centre_up_to(self) -> float:
        """The value of `RowLinear` at 8 bits: quality does not depend on the kernel."""
        return CENTRE_UP_TO if self.bits == 8 else 1.0

    def reserve(self, group: int) -> None:
        """Allocates the weight, with one scale a row where the whole row shares one."""
        inputs = grid_inputs(self.bits, self.in_features, self.part)
        self._make_room(self.in_features // inputs, SCALE_DTYPE)

    def adopt(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Pack and keep codes uint8 `[out, in]` in their own grids, `[out, groups]`."""
        self._make_room(scales.shape[1], scales.dtype)
        for rows in self._chunks():
            self.keep(rows, *(t[rows].to(self.home) for t in (codes, scales, zeros)))

    def adopts(self, scales: Tensor) -> bool:
        """Whether it can keep foreign grids `[out, groups]`, and its kernels serve them."""
        group = self.in_features // scales.shape[1]
        return scales.dtype == self.dtype and group in (self.in_features, *HUMMING_GROUPS)

    def keep(self, rows: slice, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Packs some rows; of grids that are equal for a whole row it keeps one."""
        groups = self.scales.shape[1]
        self.words[rows] = pack_words(codes, self.bits)
        self.scales[rows], self.zeros[rows] = scales[:, :groups], zeros[:, :groups]

    def packed_state(self) -> dict[str, Tensor]:
        """The packed weight before it is served, which does not depend on the card."""
        assert self._served is None, "the weight is in the layout of one card's kernels"
        return super().packed_state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Copies a packed weight instead of rounding it again."""
        super().restore(state)
        self._served = None

    def multiply(self, x: Tensor) -> Tensor:
        """Calls the kernel for this many rows, which a CUDA graph can hold after a first call."""
        if self._served is None:
            return kernels.linear_by_chunks(x, self.out_features, self.torch_rows)
        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        shape, table, locks = self._served.shape, self._served.table, self._served.locks
        missing = shape.in_features - self.in_features
        x = F.pad(x, (0, missing)) if missing else x
        out = humming_jit.launch(table, x, self.words, self.scales, self.zeros, locks)
        return (
            out if out.shape[1] == self.out_features else out[:, : self.out_features].contiguous()
        )

    def dequantized_weight(self) -> Tensor:
        """The weight `[out, in]`; of a served layer its product with the identity matrix."""
        if self._served is None:
            return self.torch_rows(0, self.out_features)
        weight = self._empty(self.out_features, self.in_features, dtype=self.dtype)
        for start in range(0, self.in_features, READ_BACK_ROWS):
            columns = slice(start, min(start + READ_BACK_ROWS, self.in_features))
            x = weight.new_zeros(columns.stop - start, self.in_features)
            x[:, columns].fill_diagonal_(1)
            weight[:, columns] = self.multiply(x).t()
        return weight

    @property
    def kernel_shape(self) -> KernelShape:
        """The shape that its kernels are compiled for, once it holds a weight.

        One scale a row is applied to the result, which is rounded to 16 bits before: float16 may
        overflow there (65504, where the codes alone reach 255), so it gets the same scale for every
        `HUMMING_REPEATED` inputs, which is multiplied into the weight.
        """
        groups = self.scales.shape[1]
        row_group = ROW_GROUP if self.dtype == torch.bfloat16 else HUMMING_REPEATED
        return KernelShape(
            round_up(self.out_features, PADDED),
            round_up(self.in_features, PADDED),
            self.bits,
            row_group if groups == 1 else self.in_features // groups,
            self.dtype,
            self.batch_invariant,
        )

    def hand_over(self, table: Tensor) -> None:
        """Converts the weight, in place, to the layout of the kernels of `table`."""
        shape = self.kernel_shape
        padded = padded_tensors(shape, self.words, self.scales, self.zeros)
        self.words, self.scales, self.zeros = humming_jit.to_kernel_layout(shape, *padded)
        locks = torch.zeros(HUMMING_LOCKS, dtype=torch.int32, device=self.home)
        self._served = _Served(shape, table, locks)

    def _make_room(self, groups: int, scale_dtype: torch.dtype) -> None:
        self._served = None
        num_words = self.bits * -(-self.in_features // CODES_IN_WORDS)
        self.words = self._empty(self.out_features, num_words, dtype=torch.int32)
        self.scales = self._empty(self.out_features, groups, dtype=scale_dtype)
        self.zeros = self._empty(self.out_features, groups, dtype=torch.uint8)

    def torch_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the dequantized weight by torch's operators, before it is served."""
        rows = slice(start, stop)
        codes = unpack_words(self.words[rows], self.bits, self.in_features)
        return kernels.dequantize_bytes(codes, self.scales[rows].to(self.dtype), self.zeros[rows])


def padded_tensors(
    shape: KernelShape, words: Tensor, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's buffers as humming expects them before its own transform.

    Codes int32 `[N, bits * K / 32]`; scales `[N, groups]` in the dtype of the activations; zeros
    int32 `[bits * N / 32, groups]`, the same stream along the outputs. N and K are the padded
    sizes; the padding is zero. Source: humming 0.1.19, `schema/humming.py`.
    """
    outputs, inputs = shape.padded
    rows, groups = outputs - words.shape[0], shape.num_groups
    words = F.pad(words, (0, shape.bits * inputs // 32 - words.shape[1], 0, rows))
    scales, zeros = (_grids(grid, groups, rows) for grid in (scales.to(shape.dtype), zeros))
    zeros = pack_words(zeros.t().contiguous(), shape.bits).t().contiguous()
    return words, scales, zeros


def _grids(grids: Tensor, groups: int, rows: int) -> Tensor:
    """Grids `[out, groups]`, repeated where a row has one, padded to `groups` and `rows` more."""
    if grids.shape[1] == 1:
        grids = grids.expand(-1, groups)
    return F.pad(grids, (0, groups - grids.shape[1], 0, rows)).contiguous()


def serve(
    layers: Iterable[HummingLinear],
    rows: Sequence[int],
    device: torch.device,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> dict[HummingLinear, str]:
    """Compiles the kernels of loaded layers for these row counts, and converts layers one by one.

    `rows` is the `row_ladder` of the most rows of a micro-batch (requests at decode, requests times
    the chunk's tokens at prefill), or exact counts in rising order; more rows use the last kernel.
    Returns the layers that are not converted, with the reason. During the conversion of a layer,
    memory holds its weight twice.
    """
    shape_of = {layer: layer.kernel_shape for layer in layers}
    choose = humming_jit.chooser(device)
    needed = humming_jit.kernels_needed(shape_of.values(), rows, choose)
    failed = humming_jit.compile_all(needed, device, on_done)
    reasons = {kernel.shape: reason for kernel, reason in failed.items()}
    tables: dict[KernelShape, Tensor] = {}
    for shape in dict.fromkeys(shape_of.values()):
        try:
            if shape not in reasons:
                tables[shape] = humming_jit.launch_table(shape, rows, choose, device)
        except (RuntimeError, OSError) as error:  # compiled, but they cannot be registered
            reasons[shape] = str(error)
    for layer, shape in shape_of.items():
        if shape in tables:
            layer.hand_over(tables[shape])
    return {layer: reasons[shape] for layer, shape in shape_of.items() if shape in reasons}
