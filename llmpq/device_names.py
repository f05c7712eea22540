"""Which device type of the library a card or a CPU is, by the name that its driver gives it.

A type's key ("v100-32g", "a100-pcie-80g", "rtx4060ti-16g") is words and a memory size; a card is
of a type where all of those words stand in its name and its memory is about the type's. A MIG slice
has the name of a whole card and is none.
"""

import re
from collections.abc import Mapping

from llmpq.devices import DeviceType, device_library

MEMORY_TOLERANCE = 0.15  # between a card's memory and its type's
# Words that make another product of the same number.
VARIANTS = frozenset({"ti", "super", "laptop", "mobile", "max", "nvl", "xt", "xtx", "ultra"})
MIG = "mig"


def type_of_card(name: str, memory_gib: float) -> str | None:
    """The library's type of a card: the longest name that fits, of about its memory."""
    near = {
        key: device
        for key, device in device_library().items()
        if device.kind == "gpu" and abs(device.memory_gib / memory_gib - 1) <= MEMORY_TOLERANCE
    }
    return None if is_slice(name) else best_name(name, near)


def type_of_cpu(name: str) -> str | None:
    """The library's type of a CPU, by name alone: its memory is the machine's."""
    return best_name(name, {k: d for k, d in device_library().items() if d.kind == "cpu"})


def is_slice(name: str) -> bool:
    """Whether a card is a MIG slice, which has a part of the card's memory and arithmetic."""
    return MIG in words_of(name)


def words_of(name: str) -> list[str]:
    """The words of a card's name: letters with the digits around them."""
    return re.findall(r"[a-z]+[0-9]*[a-z]*|[0-9]+[a-z]*", name.lower())


def stem_of(key: str) -> list[str]:
    """The words of a type's key without the memory at its end."""
    return re.sub(r"-\d+g$", "", key.lower()).split("-")


def fits(key: str, name: str) -> bool:
    """Whether the words of a type's key all stand in a card's name.

    Where the name says that it is another product of that number (Ti, Laptop), the key must too.
    """
    words = words_of(name)
    known = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    stem, others = stem_of(key), VARIANTS & set(words)
    return set(stem) <= known and all(any(part.endswith(v) for part in stem) for v in others)


def same_family(key: str, name: str) -> bool:
    """Whether a card's name is a type's but for how it is built in (SXM, PCIe)."""
    return not is_slice(name) and fits(stem_of(key)[0], name)


def best_name(name: str, library: Mapping[str, DeviceType]) -> str | None:
    """The key with the longest words of those that fit."""
    fitting = [key for key in library if fits(key, name)]
    return max(fitting, key=lambda key: len("".join(stem_of(key))), default=None)
