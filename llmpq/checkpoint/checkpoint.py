"""Reads single tensors from a Hugging Face model directory, one at a time.

`checkpoint_files` finds the files, and `inventory` says whether all their tensors are served.
safetensors files are opened for each tensor, so that the pages of a file do not stay mapped.
Weights that are quantized already (`prequantized`) are returned as codes, or dequantized.
`RandomWeights` has the same interface, for measuring shapes whose weights are not available.
"""

import hashlib
import math
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from llmpq.artifact import parse_json
from llmpq.checkpoint.checkpoint_files import StoredTensor, find_weights, load_bin, reading
from llmpq.checkpoint.fingerprint import fingerprint
from llmpq.checkpoint.float8 import float8_of
from llmpq.checkpoint.prequantized import OLD_GPTQ, quantized_format
from llmpq.errors import UserError
from llmpq.language_part import has_other_parts, names_inside
from llmpq.quant import PackedWeight, TensorPart

ROWS_AT_ONCE = 4096  # rows of two matrices that are compared at a time


class Weights(Protocol):
    """Gives a named tensor of a given shape."""

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor, in main memory, in whatever data type it is stored."""

    def read_part(self, name: str, shape: tuple[int, ...], part: TensorPart) -> torch.Tensor:
        """A part of a tensor, whose whole shape is `shape`."""

    def packed(self, name: str, shape: tuple[int, ...]) -> PackedWeight | None:
        """The codes of a weight `[out, in]` that is quantized already; None where it is not."""

    def stores(self, name: str) -> bool:
        """Whether files hold the tensor, quantized or not."""

    def equal(self, first: str, second: str, shape: tuple[int, ...]) -> bool:
        """Whether two matrices that files hold are the same."""


class Checkpoint:
    """The weights in a model directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"{folder}: no such model directory")
        self._stored = find_weights(folder)
        settings = folder / "config.json"
        self.has_other_parts = settings.is_file() and has_other_parts(parse_json(settings))
        self._packing, self._float8 = quantized_format(folder), float8_of(folder)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor called `name`, dequantized if need be; `shape` is what config.json implies."""
        packed = self.packed(name, shape)
        if packed is not None:
            return packed.dequantized()
        if self._float8 is not None and self.is_float8(name):
            return self._float8.read(name.removesuffix(".weight"), shape, self)
        return self.tensor(name, shape)

    def read_part(self, name: str, shape: tuple[int, ...], part: TensorPart) -> torch.Tensor:
        """A part of a tensor; of a safetensors file no other bytes are read."""
        if self.is_packed(name) or self.is_float8(name):
            return part.of(self.read(name, shape))
        return self.tensor(name, shape, part)

    def packed(self, name: str, shape: tuple[int, ...]) -> PackedWeight | None:
        """The codes of a weight `[out, in]` that is quantized already; None where it is not."""
        if self._packing is None or not self.is_packed(name):
            return None
        return self._packing.read(name.removesuffix(".weight"), shape, self)

    def stores(self, name: str) -> bool:
        """Whether files hold the tensor, quantized or not."""
        return name in self or self.is_packed(name)

    def equal(self, first: str, second: str, shape: tuple[int, ...]) -> bool:
        """Whether two matrices that files hold are the same; reads some rows of each at a time."""
        if any(self.is_packed(name) or self.is_float8(name) for name in (first, second)):
            return False
        for start in range(0, shape[0], ROWS_AT_ONCE):
            part = TensorPart(0, start, min(start + ROWS_AT_ONCE, shape[0]), shape[0])
            if not torch.equal(self.tensor(first, shape, part), self.tensor(second, shape, part)):
                return False
        return True

    def note(self, precisions: Collection[str]) -> str | None:
        """A note on what these precisions do to weights that are quantized already, or None."""
        if self._float8 is not None:
            return (
                f"{self.folder}: the weights are float8; they are converted to 16 bits, and layers "
                "at lower precisions are rounded a second time"
            )
        if self._packing is None or set(precisions) <= self._packing.precisions:
            return None
        own = ", ".join(sorted(self._packing.precisions))
        return (
            f"{self.folder}: the weights are already quantized ({self._packing.method}, {own}); "
            "layers at other precisions are dequantized, and rounded a second time below 16 bits"
        )

    @property
    def stamp(self) -> str:
        """A digest of the files' paths, sizes and times, which changes with any file."""
        settings = (self.folder / name for name in ("config.json", OLD_GPTQ))
        paths = {*settings, *self._paths}
        stats = [(path.resolve(), path.stat()) for path in sorted(paths) if path.is_file()]
        seen = [f"{p} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for p, s in stats]
        return hashlib.sha256("\n".join(seen).encode()).hexdigest()

    @property
    def fingerprint(self) -> dict[str, str]:
        """Digests of the configuration and of each weight file; reads a few blocks of each."""
        return fingerprint(self.folder / "config.json", self._paths)

    @property
    def _paths(self) -> list[Path]:
        return sorted({stored.path for stored in self._stored.values()})

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """All tensors of the files, by the names they have there."""
        return self._stored

    def sources(self, name: str) -> list[str]:
        """The stored names that the tensor `name` is read from; several for a quantized one."""
        held = self._packing if self.is_packed(name) else self._float8
        if held is None or not (self.is_packed(name) or self.is_float8(name)):
            return [alias for alias in self._names(name) if alias in self._stored]
        linears = self._names(name.removesuffix(".weight"))
        parts = [f"{linear}.{part}" for linear in linears for part in held.parts]
        return [part for part in parts if part in self._stored]

    def stored_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        """The bytes of the tensor `name` in files, with all parts of a quantized one.

        Reads headers only. Raises `UserError` where the tensor is missing or has another shape.
        """
        if not self.is_packed(name):
            stored = self._resolve(name)
            self._check(stored, self._stored[stored].shape, shape)
        parts = [self._stored[part] for part in self.sources(name)]
        return sum(math.prod(part.shape) * part.item_bytes for part in parts)

    def tensor(
        self, name: str, shape: tuple[int, ...] | None = None, part: TensorPart | None = None
    ) -> torch.Tensor:
        """The tensor as it is stored, or a part; raises `UserError` where the shape differs."""
        stored = self._resolve(name)
        if part is not None:  # the part does not show the whole shape
            self._check(stored, self._stored[stored].shape, shape)
        tensor = self._read(self._stored[stored].path, stored, part)
        if part is None:
            self._check(stored, tuple(tensor.shape), shape)
        return tensor

    def _check(self, stored: str, found: tuple[int, ...], wanted: tuple[int, ...] | None) -> None:
        if wanted is not None and found != wanted:
            shapes = f"{list(found)}, but config.json implies {list(wanted)}"
            raise self.fault(stored, f"has shape {shapes}")

    def fault(self, name: str, reason: str) -> UserError:
        """The error that names a tensor, its file and what is wrong with it."""
        stored = next((n for n in self._names(name) if n in self._stored), name)
        path = self._stored[stored].path if stored in self._stored else self.folder
        return UserError(f"{path}: tensor '{stored}' {reason}")

    def is_float8(self, name: str) -> bool:
        """Whether the weight is float8 with scales."""
        linear = name.removesuffix(".weight")
        return self._float8 is not None and linear != name and self._float8.holds(linear, self)

    def is_packed(self, name: str) -> bool:
        """Whether the weight is quantized already."""
        linear = name.removesuffix(".weight")
        return self._packing is not None and linear != name and self._packing.holds(linear, self)

    def __contains__(self, name: str) -> bool:
        return any(candidate in self._stored for candidate in self._names(name))

    def _names(self, name: str) -> list[str]:
        """The names that a tensor may have in the files."""
        return _aliases(name) + (names_inside(name) if self.has_other_parts else [])

    def _resolve(self, name: str) -> str:
        for candidate in self._names(name):
            if candidate in self._stored:
                return candidate
        raise UserError(f"{self.folder}: the checkpoint has no tensor '{name}'")

    def _read(self, path: Path, name: str, part: TensorPart | None = None) -> torch.Tensor:
        if path.suffix == ".bin":
            tensor = self._bin_tensors[name]
            return tensor if part is None else part.of(tensor)
        with reading(path), safe_open(str(path), framework="pt", device="cpu") as file:
            if part is None:
                return file.get_tensor(name)
            return file.get_slice(name)[part.index]

    @cached_property
    def _bin_tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor for path in self._paths for name, tensor in load_bin(path).items()}


class RandomWeights:
    """Tensors that depend on their name alone, so that every process agrees.

    They are drawn and kept on `device`: a card draws billions of them in a second. Different kinds
    of devices draw different numbers.
    """

    def __init__(self, scale: float = 0.02, device: torch.device | str = "cpu") -> None:
        self.scale, self.device = scale, torch.device(device)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Draws normal weights; vectors (norms) are 1 and biases 0."""
        if len(shape) == 1:
            make = torch.zeros if name.endswith("bias") else torch.ones
            return make(shape, device=self.device)
        digest = hashlib.sha256(name.encode()).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(digest[:7], "little"))
        drawn = torch.randn(shape, generator=generator, device=self.device)
        return drawn.mul_(self.scale)

    def read_part(self, name: str, shape: tuple[int, ...], part: TensorPart) -> torch.Tensor:
        """A part of the tensor that `read` gives."""
        return part.of(self.read(name, shape))

    def packed(self, name: str, shape: tuple[int, ...]) -> PackedWeight | None:
        """Returns None, as no weight is quantized."""
        return None

    def stores(self, name: str) -> bool:
        """Returns False, as no tensor is in files."""
        return False

    def equal(self, first: str, second: str, shape: tuple[int, ...]) -> bool:
        """Whether both names are the same, as each name has numbers of its own."""
        return first == second


def _aliases(name: str) -> list[str]:
    """Names of a tensor in files: checkpoints of the bare decoder lack the model's prefix."""
    _, _, rest = name.partition(".")
    return [name, rest] if name.startswith(("model.", "transformer.", "gpt_neox.")) else [name]
