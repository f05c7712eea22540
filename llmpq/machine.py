"""What decides which kernels serve a device: its kind, its abilities, its libraries, its dtype.

A `Machine` is a value that anybody can make: a run describes the device that it has in front of it
(`llmpq.quant`), the planner describes a device that it only knows from a library (`card`, and
`cpu_features` of this machine's or a data sheet's CPU). Where both describe the same device, both
find the same kernels in `llmpq.kernel_table`.

Not covered: how fast a device is (`llmpq.devices`) and how much memory it has.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["cuda", "cpu"]
Capability = tuple[int, int]

# Libraries of kernels for cards, and the least compute capability that they serve. `llmpq[gpu]`
# installs both: a card in a cluster is taken to have them unless the cluster file says otherwise.
HUMMING, TRITON = "humming", "triton"
LIBRARIES: dict[str, Capability] = {HUMMING: (7, 5), TRITON: (7, 0)}
GPU_EXTRA = "llmpq[gpu]"
BITSANDBYTES = "bitsandbytes"  # of the precisions that are asked for by name, on any device
BITSANDBYTES_EXTRA = "llmpq[bnb]"

# Abilities of a CPU. INT4_TILES: torch's int4 kernel reads tiles of 64 output rows, as it does
# with AVX-512. VNNI: products of 8-bit integers are fast.
INT4_TILES, VNNI = "AVX-512 tiles", "VNNI"
AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
AVX512_VNNI = "avx512_vnni"
BFLOAT16_CAPABILITY: Capability = (8, 0)


@dataclass(frozen=True)
class Machine:
    """One device as kernels see it.

    `capability`: of a CUDA device, (0, 0) where it is not NVIDIA's. `features`: of a CPU.
    `libraries`: those of kernels that are installed. `dtype`: of activations, as torch names it.
    `graphs`: decode steps run as CUDA graphs; prefills never do.
    """

    kind: Kind
    dtype: str = "bfloat16"
    capability: Capability = (0, 0)
    features: frozenset[str] = frozenset()
    libraries: frozenset[str] = frozenset({BITSANDBYTES})
    graphs: bool = True

    @property
    def is_card(self) -> bool:
        """A device with memory of its own that a CPU launches kernels on."""
        return self.kind == "cuda"


# A card that has torch alone: every linear below 16 bits is unpacked by torch's own operators.
TORCH_CARD = Machine("cuda", capability=BFLOAT16_CAPABILITY)


def card(capability: str, libraries: Iterable[str] | None = None) -> Machine:
    """A card by its compute capability, such as "7.5".

    `libraries`: those installed; None: `llmpq[gpu]` is, as far as it serves the capability.
    """
    found = parse_capability(capability)
    installed = served_libraries(found) if libraries is None else frozenset(libraries)
    dtype = "bfloat16" if found >= BFLOAT16_CAPABILITY else "float16"
    return Machine("cuda", dtype, found, libraries=installed | {BITSANDBYTES})


def cpu(features: Collection[str]) -> Machine:
    """A CPU with these of INT4_TILES and VNNI."""
    return Machine("cpu", features=frozenset(features))


def parse_capability(text: str) -> Capability:
    """ "7.5" as (7, 5); (0, 0) where a device has none of NVIDIA's, as "gfx942"."""
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def served_libraries(capability: Capability) -> frozenset[str]:
    """The libraries of kernels that serve cards of this capability."""
    return frozenset(name for name, least in LIBRARIES.items() if capability >= least)


def host_cpu(cpu_info: Path = Path("/proc/cpuinfo")) -> Machine:
    """This machine's CPU, which plays the devices that are rehearsed."""
    try:
        text = cpu_info.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return cpu(())
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return cpu(features_of(flags))


def features_of(flags: Collection[str]) -> frozenset[str]:
    """What a CPU with these flags of /proc/cpuinfo can do."""
    found = {INT4_TILES} if set(flags) >= AVX512 else set()
    return frozenset(found | ({VNNI} if AVX512_VNNI in flags else set()))


def sheet_cpu(instructions: str) -> Machine:
    """A CPU of the device library, by the newest instructions that its sheet names.

    Every CPU with AVX-512's newer parts (VNNI, bf16) or AMX has the older ones too.
    """
    is_new = instructions.startswith(("avx512_", "amx_"))
    return cpu({INT4_TILES, VNNI} if is_new else ())
