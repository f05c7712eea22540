"""What can be told of a card's kernels without a card: that they compute and are chosen rightly.

The Triton kernels run in Triton's interpreter against products in 64 bits; weights in humming's
layout are read back bit by bit; and the kernel that a layer will call is the one that costs count
with. Steps with static buffers, which a card captures in graphs, give the tokens of others.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from _common import Check
from _kernels_checks import token_checks
from _kernels_interpreted import MOST_ERROR
from _kernels_place import Place
from _kernels_tokens import tokens_of, tokens_of_transformers

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
STATIC = "steps with static buffers and others"
CASES = 200
LAYOUT_SHAPES = [(64, 128), (256, 704), (130, 100)]  # out, in
LAYOUT_BITS = (3, 4, 8)


def checks(folder: Path) -> list[Check]:
    """(1) to (4); files lie in `folder`."""
    return [
        _told("1: Triton kernels in the interpreter, error against 64 bits (worst)", interpreted),
        _told("2: weights in humming's layout that are not the layer's", humming_layout),
        *token_checks({STATIC: static_steps(folder)}, number=3),
        _told("4: cases in which a layer and costs name different kernels", different_kernels),
    ]


def _told(name: str, find: Callable[[], tuple[float, float, int]]) -> Check:
    """A value, the most that it may be, and of how many cases; unknown where a library lacks."""
    try:
        value, most, samples = find()
    except ModuleNotFoundError as error:
        return Check(name, None, "", "", None, 0, f"no module {error.name}")
    return Check(name, value, "", f"<= {most:g}", value <= most, samples)


def interpreted() -> tuple[float, float, int]:
    """The worst error of the Triton kernels, in a process of its own whose Triton interprets."""
    for module in ("triton", "llmpq.quant.triton_kernels"):
        import_module(module)  # says what lacks
    done = subprocess.run(
        [sys.executable, str(HERE / "_kernels_interpreted.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    errors = json.loads(done.stdout)
    return max(errors.values()), MOST_ERROR, len(errors)


def humming_layout() -> tuple[float, float, int]:
    """How many weights of how many, as humming reads them, differ from what the layer stands for.

    Its layout before its own transform: codes of `bits` bits, a little-endian stream along each
    row; zero points the same along the outputs; a scale a group (humming 0.1.19, its schema).
    """
    from llmpq.quant.humming import HummingLinear, padded_tensors

    differing = count = 0
    for bits in LAYOUT_BITS:
        for out_features, in_features in LAYOUT_SHAPES:
            layer = HummingLinear(in_features, out_features, False, torch.bfloat16, CPU, bits)
            layer.load_weight("weight", torch.randn(out_features, in_features))
            tensors = padded_tensors(layer.kernel_shape, layer.words, layer.scales, layer.zeros)
            weight = _as_humming_reads(bits, *tensors)[:out_features, :in_features]
            differing += int((weight != layer.dequantized_weight()).sum())
            count += weight.numel()
    return differing, 0, count


def _as_humming_reads(
    bits: int, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    """The padded weight `[N, K]` in the dtype of its scales."""
    outputs, groups = scales.shape
    codes = torch.from_numpy(_stream(words, bits)).view(outputs, groups, -1)
    points = torch.from_numpy(_stream(zeros.t(), bits)).t()
    steps = (codes - points[:, :, None]).to(scales.dtype)
    return (steps * scales[:, :, None]).view(outputs, -1)


def _stream(words: torch.Tensor, bits: int) -> np.ndarray:
    """Codes `[rows, n]` of int32 words: bit `i` of code `j` is bit `j * bits + i` of the row."""
    values = words.contiguous().numpy().view(np.uint8)
    stream = np.unpackbits(values, axis=1, bitorder="little")
    return stream.reshape(len(words), -1, bits) @ (1 << np.arange(bits))


def static_steps(folder: Path) -> bool:
    """Whether steps as a card takes them give the tokens of transformers' `generate`.

    In float32 on the CPU: steps of whole lanes at few widths, the next one started before the
    tokens of the last are back. Nothing is captured.
    """
    place = Place(CPU, torch.float32)
    with (
        patch("llmpq.runtime.steps._rounds_up", lambda device: True),
        patch("llmpq.runtime.engine._steps_ahead", lambda device, stages: 2),
    ):
        tokens = tokens_of(folder, place, ["16"] * 8)
    return tokens == tokens_of_transformers(place)


def different_kernels() -> tuple[float, float, int]:
    """In how many of `CASES` the kernel that a layer calls is not the one that costs count with.

    A layer asks what torch finds on this CPU; costs ask what the system says of it.
    """
    from llmpq.kernel_table import kernel_for
    from llmpq.machine import host_cpu
    from llmpq.precision import group_size
    from llmpq.quant import linear_factory

    differing = 0
    for precision, out_features, in_features, rows, dtype in _cases():
        machine = replace(host_cpu(), dtype=str(dtype).removeprefix("torch."))
        group = group_size(int(precision), in_features)
        priced = kernel_for(machine, precision, out_features, in_features, group, rows).name
        layer = linear_factory(
            precision, in_features, out_features, bias=False, dtype=dtype, device=CPU
        )()
        differing += layer.kernel(rows) != priced
    return differing, 0, CASES


def _cases() -> Iterator[tuple[str, int, int, int, torch.dtype]]:
    """Random precisions, sizes, rows and data types; half of the sizes suit the int4 kernel."""
    rng = random.Random(0)
    for _ in range(CASES):
        step = rng.choice((1, 64))
        sizes = (step * rng.randint(1, 4096 // step) for _ in range(2))
        rows = rng.choice((1, 15, 16, 17, 63, 64, 65, 500))
        dtype = rng.choice((torch.bfloat16, torch.float16, torch.float32))
        yield rng.choice(("8", "4", "3")), *sizes, rows, dtype
