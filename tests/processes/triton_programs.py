"""What the tests of Triton kernels share: running them interpreted, and compiling them for cards.

The interpreter has to be chosen before Triton is imported, so interpreted tests run in a process
of their own: they lie in modules that pytest does not collect by itself.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from llmpq.quant.triton_kernels import Config

# Bytes of shared memory a program may ask for, by capability (CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability").
SHARED_MEMORY = {
    (7, 0): 96 << 10,
    (7, 5): 64 << 10,
    (8, 0): 163 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (12, 0): 99 << 10,
}


@dataclass(frozen=True)
class Launch:
    """A program as it would be launched."""

    program: Any
    arguments: Mapping[str, Any]
    config: Config


@dataclass(frozen=True)
class Resources:
    """What a compiled program takes: registers and stack bytes a thread, shared bytes in all.

    A stack is where registers are spilled to: these programs use it for nothing else.
    """

    registers: int
    stack: int
    shared: int


def run_interpreted(module: str) -> None:
    """Runs the tests of a module beside this one with Triton's interpreter."""
    path = Path(__file__).with_name(module)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@contextmanager
def recorded(module: Any) -> Iterator[list[Launch]]:
    """Programs that this module launches are noted, not started; give it meta tensors."""
    launches: list[Launch] = []

    def note(program: Any, grid: Any, arguments: Mapping[str, Any], config: Config) -> None:
        launches.append(Launch(program, arguments, config))

    with mock.patch.object(module, "launch", note):
        yield launches


def compile_for(capability: tuple[int, int], launch: Launch, **options: int) -> Resources:
    """Compiles a program for a card just as Triton's launcher would there, short of loading it."""
    from triton.runtime.driver import driver

    with mock.patch.object(driver, "_active", Card(capability)):
        compiled = launch.program.warmup(
            **launch.arguments,
            **launch.config.constants,
            **(launch.config.options | options),
            grid=(1,),
        )
    return _resources(compiled)


class Card:
    """What Triton asks its driver before it compiles; each capability is a device of its own."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.number = capability[0] * 10 + capability[1]

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


def _resources(compiled: Any) -> Resources:
    """Read from the machine code by the tool that comes with Triton."""
    from triton import knobs

    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "program.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    listing = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", listing).group(1)) for name in ("REG", "STACK", "LOCAL")
    )
    return Resources(registers, stack + local, compiled.metadata.shared)


def check_fits(launches: list[Launch], capability: tuple[int, int]) -> dict[str, Resources]:
    """Compiles every launch, asserts that it neither spills nor asks for too much, and reports."""
    used = {}
    for launch in launches:
        name = launch.config.program
        used[name] = found = compile_for(capability, launch)
        assert found.stack == 0, f"{name} spills registers: {found}, {launch.config}"
        assert found.shared <= SHARED_MEMORY[capability], f"{name}: {found}, {launch.config}"
    return used
