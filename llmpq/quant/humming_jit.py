"""Chooses, compiles and calls the kernels of humming-kernels.

humming compiles a kernel for each shape, number of bits and tile with NVRTC on first use, seconds
each, and keeps it on disk. A worker therefore compiles the kernels of its plan while it loads:
`kernels_needed` names them, `compile_all` compiles them to disk, `launch_table` registers those of
one shape. Row counts share kernels by a ladder (`row_ladder`): on an H100 humming's own choice
changes every 8 rows, 33 kernels a shape at 4 bits, of which the ladder up to 4096 rows needs 13.

This is written for one release (`humming_support.VERSION`), whose internals are called: tile
heuristics, the transform into the kernels' layout, and the launch of a registered kernel. humming
is imported inside functions, as its import takes a second and needs triton. Not covered: mixtures
of experts, 8-bit activations (docs/gpu-kernels.md says why).
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmpq.errors import UserError
from llmpq.others_files import refuse_others_files
from llmpq.quant.humming_support import library
from llmpq.workspace import HUMMING_IN, HUMMING_OUT, round_up

ROW_GROUP = 0  # one scale a row
MOST_ROWS = 1 << 30
MOST_COMPILERS = 16  # threads that compile: NVRTC 13.0 took 412 MiB of memory a kernel
LIBRARY_PATH = "LD_LIBRARY_PATH"

Tuning = Mapping[str, Any]  # tile and pipeline of a kernel, and how many multiprocessors to use


@dataclass(frozen=True)
class KernelShape:
    """The sizes and number formats of a linear that a kernel is compiled for.

    `group` inputs share a scale and a zero; `ROW_GROUP` means all. Sizes are multiples of
    `workspace.PADDED`.
    """

    out_features: int
    in_features: int
    bits: int
    group: int
    dtype: torch.dtype  # the type of activations, scales and outputs
    batch_invariant: bool = False

    @property
    def padded(self) -> tuple[int, int]:
        """Outputs and inputs, padded to whole tiles."""
        return round_up(self.out_features, HUMMING_OUT), round_up(self.in_features, HUMMING_IN)

    @property
    def num_groups(self) -> int:
        """The number of scales of a padded row."""
        return 1 if self.group == ROW_GROUP else self.padded[1] // self.group


@dataclass(frozen=True)
class KernelToCompile:
    """One kernel to compile: a shape, and the tuning that its code depends on, as JSON."""

    shape: KernelShape
    tuning: str


TuningChoice = Callable[[KernelShape, int], Tuning]  # the best tuning for a number of rows


def keep_kernels_in(folder: Path) -> None:
    """Makes humming keep its kernels in this folder instead of ~/.humming.

    This sets the variables HUMMING_CACHE_DIR and HUMMING_TMP_DIR, unless the user has set them;
    child processes inherit them. humming reads them when it first compiles. Raises `UserError`
    where other users can write to the folder, or this one cannot.
    """
    own = folder / "humming"
    if "HUMMING_CACHE_DIR" not in os.environ:
        try:
            own.mkdir(0o700, parents=True, exist_ok=True)  # closed to other users
            refuse_others_files(own)
        except OSError as error:
            raise UserError(f"{own}: kernels cannot be kept here ({error.strerror})") from None
    os.environ.setdefault("HUMMING_CACHE_DIR", str(own))
    os.environ.setdefault("HUMMING_TMP_DIR", str(own / "tmp"))


# Which kernels


def row_ladder(most_rows: int) -> tuple[int, ...]:
    """Row counts to choose kernels for: 8, 12, 16, 24, 32, 48, 64, ... until `most_rows` fit.

    Row counts between two rungs use the kernel of the higher one, of whose tile they fill 2/3 or
    more from 9 rows on.
    """
    rungs = [8]
    while rungs[-1] < most_rows:
        is_power = rungs[-1].bit_count() == 1
        rungs.append(rungs[-1] * 3 // 2 if is_power else rungs[-1] * 4 // 3)
    return tuple(rungs)


def kernels_needed(
    shapes: Iterable[KernelShape], rows: Sequence[int], choose: TuningChoice
) -> list[KernelToCompile]:
    """The kernels for these shapes at these row counts (`row_ladder`), each once."""
    return list(
        dict.fromkeys(
            KernelToCompile(shape, _compiled_part(choose(shape, count)))
            for shape in dict.fromkeys(shapes)
            for count in rows
        )
    )


def chooser(device: torch.device) -> TuningChoice:
    """humming's own choice of tiles for this card."""

    def choose(shape: KernelShape, rows: int) -> Tuning:
        lib = library()
        with torch.cuda.device(device):
            return dict(
                lib.tune.get_heuristics_config(
                    _layer_config(shape), shape_m=rows, use_batch_invariant=shape.batch_invariant
                )
            )

    return choose


def compile_all(
    kernels: Sequence[KernelToCompile],
    device: torch.device,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> dict[KernelToCompile, str]:
    """Compiles kernels into humming's folder, as many at a time as there are CPUs.

    At most `MOST_COMPILERS` run at a time. Kernels that exist already take no time, and of two
    processes that need the same kernel one waits. `on_done(done, total)` is called after each.
    Returns the kernels that failed, with the reason.
    """
    failed: dict[KernelToCompile, str] = {}
    # Threads suffice, as NVRTC runs in separate processes.
    workers = min(MOST_COMPILERS, library().utils.cpu.get_available_cpu_count())
    with _compiling(device), ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(_compile, kernel, device): kernel for kernel in kernels}
        try:
            for done, future in enumerate(as_completed(waiting), start=1):
                if error := future.exception():
                    failed[waiting[future]] = f"{type(error).__name__}: {error}"
                on_done(done, len(waiting))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return failed


# Calls


def launch_table(
    shape: KernelShape, rows: Sequence[int], choose: TuningChoice, device: torch.device
) -> Tensor:
    """Registers the kernels of a shape: a table by row counts, int64 `[4 * ranges]` on the CPU.

    A range has four numbers: rows above, rows up to, kernel, multiprocessors. The last range is
    open. Kernels that `compile_all` has not compiled are compiled, which may raise an error.
    """
    ends = [*rows[:-1], MOST_ROWS]
    ranges = [
        (above, end, choose(shape, count))
        for above, end, count in zip([0, *ends], ends, rows, strict=False)
    ]
    with _compiling(device):
        layer = _layer_config(shape).to_str()
        table = library().kernel.humming.HummingKernel.prepare_kernels(
            layer, json.dumps(_compute_config(shape)), json.dumps(ranges), device
        )
    return table


def to_kernel_layout(
    shape: KernelShape, words: Tensor, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight in the kernels' layout, from the result of `humming.padded_tensors`; on a card."""
    tensors = {"weight": words, "weight_scale": scales, "zero_point": zeros}
    with _compiling(words.device):
        made = library().transform.transform_humming_tensors(
            _layer_config(shape), tensors, already_padded=True
        )
    return made["weight"], made["weight_scale"], made["zero_point"]


def launch(
    table: Tensor, x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, locks: Tensor
) -> Tensor:
    """Multiplies `x [M, in]` by the weight in the kernels' layout: `[M, out]`, without waiting."""
    from humming.ops import launch_kernel

    return launch_kernel(
        configs=table,
        inputs=x,
        weight=words,
        weight_scale=scales,
        zero_point=zeros,
        locks=locks,
    )


def _layer_config(shape: KernelShape) -> Any:
    """humming's `LayerConfig` of a shape, for the current device."""
    lib = library()
    (outputs, inputs), value = shape.padded, lib.dtypes.DataType.from_torch_dtype(shape.dtype)
    return lib.config.LayerConfig(
        shape_n=outputs,
        shape_k=inputs,
        pad_shape_n=outputs - shape.out_features,
        pad_shape_k=inputs - shape.in_features,
        a_dtype=value,
        b_dtype=lib.dtypes.DataType.from_str(f"uint{shape.bits}"),
        c_dtype=value,
        bs_dtype=value,
        weight_scale_group_size=shape.group,
        has_zero_point=True,
    )


def _compute_config(shape: KernelShape) -> dict[str, str | bool]:
    return {"gemm_type": "dense", "use_batch_invariant": shape.batch_invariant}


def _compiled_part(tuning: Tuning) -> str:
    """The part of a tuning that a kernel's code depends on, as JSON."""
    return json.dumps({key: tuning[key] for key in sorted(tuning) if key != "num_sms"})


@contextmanager
def _compiling(device: torch.device) -> Iterator[None]:
    """A context for compiling: selects the card, and redirects standard output, for errors.

    It also helps NVRTC of a Python package to find its library libnvrtc-builtins beside itself.
    """
    nvrtc, before = library().utils.nvrtc, os.environ.get(LIBRARY_PATH)
    with suppress(RuntimeError):  # without NVRTC, compiling fails with a message of its own
        beside = str(Path(nvrtc.get_nvrtc_library_path()).parent)
        os.environ[LIBRARY_PATH] = os.pathsep.join(filter(None, (beside, before)))
    try:
        with redirect_stdout(sys.stderr), torch.cuda.device(device):
            yield
    finally:
        if before is None:
            os.environ.pop(LIBRARY_PATH, None)
        else:
            os.environ[LIBRARY_PATH] = before


def _compile(kernel: KernelToCompile, device: torch.device) -> None:
    with torch.cuda.device(device):
        layer = json.loads(_layer_config(kernel.shape).to_str())
        config = layer | _compute_config(kernel.shape) | json.loads(kernel.tuning)
        library().kernel.humming.HummingKernel(**config)
