"""The properties of a device that decide which kernels serve it: kind, features, libraries, dtype.

A `Machine` is a plain value: a run describes its own device (`llmpq.quant.here`), and the planner
describes a device that it knows only from the device library (`card`, or a CPU's features). Where
both describe the same device, both find the same kernels in `llmpq.kernel_table`.

Not covered: how fast a device is (`llmpq.devices`) and how much memory it has.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["cuda", "cpu"]
Capability = tuple[int, int]

# Libraries of kernels for cards, and the least compute capability that they serve. `llmpq[gpu]`
# installs both: a card in a cluster is assumed to have them unless the cluster file denies it.
HUMMING, TRITON = "humming", "triton"
LIBRARIES: dict[str, Capability] = {HUMMING: (7, 5), TRITON: (7, 0)}
GPU_EXTRA = "llmpq[gpu]"
BITSANDBYTES = "bitsandbytes"  # plans ask for these precisions by name, on any device
BITSANDBYTES_EXTRA = "llmpq[bnb]"

# Features of a CPU. INT4_TILES means that torch's int4 kernel reads tiles of 64 output rows, as it
# does with AVX-512; VNNI means that products of 8-bit integers are fast.
INT4_TILES, VNNI = "AVX-512 tiles", "VNNI"
AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
AVX512_VNNI = "avx512_vnni"
BFLOAT16_CAPABILITY: Capability = (8, 0)


@dataclass(frozen=True)
class Machine:
    """The properties of one device that matter to kernels.

    `capability` is that of a CUDA device, (0, 0) for other makers than NVIDIA. `features` are those
    of a CPU. `libraries` holds the installed libraries of kernels. `dtype` is that of activations,
    by torch's name. With `graphs`, decode steps run as CUDA graphs; prefills never do.
    """

    kind: Kind
    dtype: str = "bfloat16"
    capability: Capability = (0, 0)
    features: frozenset[str] = frozenset()
    libraries: frozenset[str] = frozenset({BITSANDBYTES})
    graphs: bool = True

    @property
    def is_card(self) -> bool:
        """Whether the device has its own memory, and a CPU launches kernels on it."""
        return self.kind == "cuda"


# A card with torch alone, whose operators unpack every linear below 16 bits.
TORCH_CARD = Machine("cuda", capability=BFLOAT16_CAPABILITY)


def card(capability: str, libraries: Iterable[str] | None = None) -> Machine:
    """A card by its compute capability, such as "7.5".

    `libraries` holds the installed ones; None means those of `llmpq[gpu]` that serve the card.
    """
    found = parse_capability(capability)
    installed = served_libraries(found) if libraries is None else frozenset(libraries)
    dtype = "bfloat16" if found >= BFLOAT16_CAPABILITY else "float16"
    return Machine("cuda", dtype, found, libraries=installed | {BITSANDBYTES})


def cpu(features: Collection[str]) -> Machine:
    """A CPU with these features, of INT4_TILES and VNNI."""
    return Machine("cpu", features=frozenset(features))


def parse_capability(text: str) -> Capability:
    """Parses "7.5" as (7, 5); (0, 0) for other makers than NVIDIA, such as "gfx942"."""
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def served_libraries(capability: Capability) -> frozenset[str]:
    """The libraries of kernels that serve cards of this capability."""
    return frozenset(name for name, least in LIBRARIES.items() if capability >= least)


def host_cpu(cpu_info: Path = Path("/proc/cpuinfo")) -> Machine:
    """This machine's CPU, on which devices are rehearsed."""
    try:
        text = cpu_info.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return cpu(())
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return cpu(features_of(flags))


def features_of(flags: Collection[str]) -> frozenset[str]:
    """The features of a CPU with these flags of /proc/cpuinfo."""
    found = {INT4_TILES} if set(flags) >= AVX512 else set()
    return frozenset(found | ({VNNI} if AVX512_VNNI in flags else set()))


def sheet_cpu(instructions: str) -> Machine:
    """A CPU of the device library, by the newest instructions in its data sheet.

    Every CPU with the newer parts of AVX-512 (VNNI, bf16) or AMX has the older ones too.
    """
    is_new = instructions.startswith(("avx512_", "amx_"))
    return cpu({INT4_TILES, VNNI} if is_new else ())
