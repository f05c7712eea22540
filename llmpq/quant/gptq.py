"""GPTQ: rounds a linear's weight with the second moments of its inputs (calibration statistics).

When a row `w` of the weight changes by `d`, the squared error of its output is `d H d^T`, with
`H = X^T X / T` the mean second moment of its inputs. Three steps minimize this error:

1. Grids are chosen from the raw weights by `quantize_mse`, weighted by the diagonal of H.
2. Columns are rounded one after the other, those of the largest moments first; the columns that
   follow compensate the error of each (Frantar et al., arXiv 2210.17323, equations 2 and 3). The
   grids are fixed before, so that this order does not change the order of columns in storage.
3. Sweeps over the groups choose the best scale for the codes, then the best value of each code
   given all others. No step of a sweep increases the error.

A row whose error is smaller with the codes of `quantize` gets those.

All sums that decide on a code are fp64. Their last bits depend on the number of threads and on how
rows are cut into chunks, and in fp32 would sometimes change a code, while the same weight must have
the same codes in every process. Inside, matrices are transposed, `[n, R]` for n inputs and R rows.

Not covered: 8 bits, which are rounded to nearest (a divergence below 0.001 nats a token on three
small models, so that GPTQ can gain nothing).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmpq.quant.rounding import SCALE_DTYPE, SMALLEST_SCALE, quantize, quantize_mse

NEAREST_BITS = 8  # `quantize` makes the codes of this many bits and more
COLUMNS = 128  # columns rounded one by one before the following columns are updated
ROWS = 512  # rows rounded at a time: each column costs some operations, whatever their size
DAMPING = 0.01
SWEEPS = 1  # one sweep reduced the divergence at 3 bits by 7 to 12 %, a second by 1 to 6 % more
DAMPING_TRIES = 5


class Gptq:
    """A `Rounding` for all weights with the same input.

    `moments` fp32 `[blocks, B, B]` are the blocks on the diagonal of H `[in, in]`; B is a multiple
    of the group. `DAMPING` times the mean of H's diagonal is added to the diagonal, and ten times
    more until H can be factored. The factors computed for the first weight serve the others and
    take as much memory again as `moments`; computing them takes twice a block in fp64. Raises
    ValueError where moments do not fit the weight or are not finite.
    """

    rows_at_once = ROWS

    def __init__(self, moments: Tensor, sweeps: int = SWEEPS) -> None:
        if moments.dim() != 3 or moments.shape[1] != moments.shape[2]:
            raise ValueError(
                f"the calibration statistics have shape {list(moments.shape)}, expected "
                "[blocks, B, B]"
            )
        self.moments, self.sweeps = moments, sweeps
        self._blocks: list[_HessianBlock] = []

    def __call__(
        self, weight: Tensor, bits: int, group: int, centre_up_to: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zeros of `[rows, in]`, as `quantize` gives them."""
        if bits >= NEAREST_BITS:
            return quantize(weight, bits, group, centre_up_to)
        self._prepare(weight, group)
        rows, cols = weight.shape
        codes = torch.empty(rows, cols, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(rows, cols // group, dtype=SCALE_DTYPE, device=weight.device)
        zeros = torch.empty_like(scales)
        size = self.moments.shape[1]
        for start in range(0, rows, ROWS):
            part = slice(start, start + ROWS)
            for number, block in enumerate(self._blocks):
                at = slice(number * size, (number + 1) * size)
                groups = slice(at.start // group, at.stop // group)
                found = self._round(block, weight[part, at], bits, group)
                codes[part, at], scales[part, groups], zeros[part, groups] = found
        return codes, scales, zeros

    def _prepare(self, weight: Tensor, group: int) -> None:
        blocks, size, _ = self.moments.shape
        if blocks * size != weight.shape[1]:
            raise ValueError(
                f"the calibration statistics are of {blocks * size} inputs, but the weight has "
                f"{weight.shape[1]}"
            )
        if size % group:
            raise ValueError(
                f"the block size {size} of the calibration statistics is not a multiple of the "
                f"group size {group}"
            )
        if not self._blocks or self._blocks[0].moments.device != weight.device:
            self.moments = self.moments.to(weight.device)
            self._blocks = [_HessianBlock(moments) for moments in self.moments]

    def _round(
        self, block: "_HessianBlock", weight: Tensor, bits: int, group: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zeros of `[R, B]`."""
        grid = quantize_mse(weight, bits, group, importance=block.diagonal)
        rows = _Rows.of(weight, bits, *grid)
        _feed_back(rows, block)
        for _ in range(self.sweeps):
            _sweep(rows, block)
        found = rows.stored()
        nearest = quantize(weight, bits, group)
        better = rows.loss(block) < _Rows.of(weight, bits, *nearest).loss(block)
        pairs = zip(found, nearest, strict=True)
        codes, scales, zeros = (torch.where(better[:, None], *pair) for pair in pairs)
        return codes, scales, zeros


class _HessianBlock:
    """The moments of n inputs with their factors.

    moments   fp32 [n, n]
    damping   added to its diagonal
    diagonal  fp32 [n], damped
    order     int64 [n], the columns by descending moment
    upper     fp32 [n, n] upper triangular in that order, `inverse(H) = upper^T upper`
    """

    def __init__(self, moments: Tensor) -> None:
        if not torch.isfinite(moments).all():
            raise ValueError("the calibration statistics contain NaN or infinite values")
        self.moments = moments
        self.order = torch.argsort(moments.diagonal(), descending=True, stable=True)
        step = DAMPING * float(moments.diagonal().mean())
        step = step or 1.0  # all inputs are zero, so that any codes are right
        for attempt in range(DAMPING_TRIES):
            self.damping = step * 10**attempt
            upper = _inverse_factor(moments, self.order, self.damping)
            if upper is not None:
                break
        else:
            raise ValueError(
                "the calibration statistics cannot be factored: they are not positive definite"
            )
        self.upper = upper
        self.diagonal = moments.diagonal() + self.damping


def _inverse_factor(moments: Tensor, order: Tensor, damping: float) -> Tensor | None:
    """`_HessianBlock.upper`; None where the matrix cannot be factored.

    In reversed order `H = lower lower^T`; `upper` is the inverse of `lower`, reversed again.
    """
    backwards = order.flip(0)
    damped = moments[backwards][:, backwards].double()
    damped.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if failed:
        return None
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False, out=eye)
    return inverse.flip(0, 1).float()


@dataclass
class _Rows:
    """R rows of a weight and their present rounding; all fp64, transposed."""

    weight: Tensor  # [n, R]
    steps: Tensor  # [n, R], codes less their zeros: weights in units of their scale
    scales: Tensor  # [groups, R], each exact in bf16
    zeros: Tensor  # [groups, R]
    top: int  # the highest code

    @classmethod
    def of(cls, weight: Tensor, bits: int, codes: Tensor, scales: Tensor, zeros: Tensor) -> "_Rows":
        """Makes the rows from matrices `[R, ...]` of any type."""
        parts = (part.t().double().contiguous() for part in (weight, codes, scales, zeros))
        weight, steps, scales, zeros = parts
        rows = cls(weight, steps, scales, zeros, 2**bits - 1)
        rows.grouped_steps.sub_(zeros[:, None])
        return rows

    def stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zeros as a `Rounding` returns them."""
        codes = (self.grouped_steps + self.zeros[:, None]).flatten(0, 1)
        grids = (self.scales.t().to(SCALE_DTYPE), self.zeros.t().to(SCALE_DTYPE))
        return codes.t().to(torch.uint8), *grids

    @property
    def group(self) -> int:
        """The number of columns of a group."""
        return len(self.weight) // len(self.scales)

    @property
    def grouped_steps(self) -> Tensor:
        """`steps` as `[groups, group, R]`."""
        return self.steps.unflatten(0, (-1, self.group))

    def off(self) -> Tensor:
        """The rounding error `[n, R]`: the weight less its dequantized codes."""
        return self.weight - (self.grouped_steps * self.scales[:, None]).flatten(0, 1)

    def loss(self, block: _HessianBlock) -> Tensor:
        """The mean squared error of each row's output over tokens, fp32 `[R]`."""
        off = self.off().float()
        return (off * (block.moments @ off)).sum(dim=0)


def _feed_back(rows: _Rows, block: _HessianBlock) -> None:
    """Does step 2; overwrites the steps."""
    left = rows.weight[block.order]  # the columns to be rounded, in the order of the block
    groups = (block.order // rows.group).tolist()
    grids = list(zip(rows.scales, -rows.zeros, rows.top - rows.zeros, strict=True))
    for start in range(0, len(left), COLUMNS):
        stop = min(start + COLUMNS, len(left))
        upper = block.upper[start:stop, start:].double()
        steps, errors = torch.empty_like(left[start:stop]), torch.empty_like(left[start:stop])
        for i, own in enumerate(upper.diagonal().tolist()):
            scale, lowest, highest = grids[groups[start + i]]
            column = left[start + i]
            torch.div(column, scale, out=steps[i]).round_().clamp_(lowest, highest)
            torch.addcmul(column, steps[i], scale, value=-1, out=errors[i]).div_(own)
            left[start + i + 1 : stop].addr_(upper[i, i + 1 : stop - start], errors[i], alpha=-1)
        rows.steps[block.order[start:stop]] = steps
        left[stop:].addmm_(upper[:, stop - start :].t(), errors, alpha=-1)


def _sweep(rows: _Rows, block: _HessianBlock) -> None:
    """Does step 3 once: finds the best scale of every group, then its best codes."""
    off = rows.off()
    for number in range(len(rows.scales)):
        at = slice(number * rows.group, (number + 1) * rows.group)
        moments = block.moments[at].double()
        pull = torch.addmm(off[at], moments, off, beta=block.damping)  # half the gradient
        inner = moments[:, at].clone()
        inner.diagonal().add_(block.damping)
        _refit_scale(rows, number, at, pull, inner)
        _refit_codes(rows, number, at, pull, inner)
        off[at] = rows.weight[at] - rows.steps[at] * rows.scales[number]


def _refit_scale(rows: _Rows, number: int, at: slice, pull: Tensor, inner: Tensor) -> None:
    """Sets the scale to the bf16 nearest to the best one; updates `pull [group, R]`."""
    steps, scale = rows.steps[at], rows.scales[number]
    pushed = inner @ steps
    best = scale + (steps * pull).sum(dim=0) / (steps * pushed).sum(dim=0)
    best = best.to(SCALE_DTYPE).double()
    usable = torch.isfinite(best) & (best >= SMALLEST_SCALE)
    best = torch.where(usable, best, scale)
    pull -= pushed * (best - scale)
    rows.scales[number] = best


def _refit_codes(rows: _Rows, number: int, at: slice, pull: Tensor, inner: Tensor) -> None:
    """Sets each code of a group in turn to the best one; overwrites `pull [group, R]`."""
    steps = rows.steps[at]
    lowest, highest = -rows.zeros[number], rows.top - rows.zeros[number]
    pull /= rows.scales[number]
    for i, own in enumerate(inner.diagonal().tolist()):
        best = torch.add(steps[i], pull[i], alpha=1 / own).round_().clamp_(lowest, highest)
        pull[i + 1 :].addr_(inner[i, i + 1 :], steps[i] - best)
        steps[i] = best
