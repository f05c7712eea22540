"""Reads single tensors from a Hugging Face model directory, one at a time.

safetensors files (one, or shards with their index) are opened per tensor, so that the pages of
a file do not stay mapped; `pytorch_model.bin` is read with `weights_only=True`. Weights that are
quantised already (`prequantized`) are handed out as codes, or dequantised.
`RandomWeights` has the same interface, for measuring shapes whose weights are not at hand.
"""

import hashlib
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from llmpq.artifact import parse_json
from llmpq.errors import UserError
from llmpq.quant import PackedWeight, TensorPart
from llmpq.runtime.fingerprint import fingerprint
from llmpq.runtime.prequantized import packing_of

SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"


class Weights(Protocol):
    """Gives a named tensor of a given shape."""

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor, in main memory, in whatever data type it is stored."""

    def read_part(self, name: str, shape: tuple[int, ...], part: TensorPart) -> torch.Tensor:
        """A part of a tensor, whose whole shape is `shape`."""

    def packed(self, name: str, shape: tuple[int, ...]) -> PackedWeight | None:
        """The codes of a weight `[out, in]` that is quantised already; None where it is not."""


class Checkpoint:
    """The weights in a model directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"{folder}: no such model directory")
        self._files = self._find_files()
        self._packing = packing_of(folder)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor called `name`, dequantised if need be; `shape` is what config.json implies."""
        packed = self.packed(name, shape)
        return self.tensor(name, shape) if packed is None else packed.dequantized()

    def read_part(self, name: str, shape: tuple[int, ...], part: TensorPart) -> torch.Tensor:
        """A part of a tensor; of a safetensors file no other bytes are read."""
        packed = self.packed(name, shape)
        if packed is not None:
            return part.of(packed.dequantized())
        return self.tensor(name, shape, part)

    def packed(self, name: str, shape: tuple[int, ...]) -> PackedWeight | None:
        """The codes of a weight `[out, in]` that is quantised already; None where it is not."""
        linear = name.removesuffix(".weight")
        if self._packing is None or linear == name or not self._packing.holds(linear, self):
            return None
        return self._packing.read(linear, shape, self)

    def note(self, precisions: Collection[str]) -> str | None:
        """What a plan with these precisions does to weights that are quantised already."""
        if self._packing is None or set(precisions) <= self._packing.precisions:
            return None
        own = ", ".join(sorted(self._packing.precisions))
        return (
            f"{self.folder}: the weights are quantised already ({self._packing.method}, {own}); "
            "layers at other precisions are dequantised, and rounded a second time below 16 bits"
        )

    @property
    def stamp(self) -> str:
        """Another one when any file has changed, by path, size and times; reads none of them."""
        paths = {self.folder / "config.json", *self._files.values()}
        stats = [(path.resolve(), path.stat()) for path in sorted(paths) if path.is_file()]
        seen = [f"{p} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for p, s in stats]
        return hashlib.sha256("\n".join(seen).encode()).hexdigest()

    @property
    def fingerprint(self) -> dict[str, str]:
        """Of the configuration and of each file of weights; reads a few blocks of each."""
        return fingerprint(self.folder / "config.json", self._files.values())

    def stored_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        """Bytes that files hold of the tensor `name`, all parts of a quantised one included.

        Reads headers only. Raises `UserError` where it is missing or its shape is another.
        """
        linear = name.removesuffix(".weight")
        if self._packing is not None and linear != name and self._packing.holds(linear, self):
            bias = {f"{alias}.bias" for alias in _aliases(linear)}
            starts = tuple(f"{alias}." for alias in _aliases(linear))
            parts = [n for n in self._files if n.startswith(starts) and n not in bias]
            return sum(math.prod(self._size(part)) for part in parts)
        stored = self._resolve(name)
        *found, item = self._size(stored)
        self._check(stored, tuple(found), shape)
        return math.prod(found) * item

    def tensor(
        self, name: str, shape: tuple[int, ...] | None = None, part: TensorPart | None = None
    ) -> torch.Tensor:
        """The tensor as it is stored, or a part; raises `UserError` where its shape is another."""
        stored = self._resolve(name)
        if part is not None:  # what is read does not show the shape
            self._check(stored, self._size(stored)[:-1], shape)
        tensor = self._read(self._files[stored], stored, part)
        if part is None:
            self._check(stored, tuple(tensor.shape), shape)
        return tensor

    def _check(self, stored: str, found: tuple[int, ...], wanted: tuple[int, ...] | None) -> None:
        if wanted is not None and found != wanted:
            shapes = f"{list(found)}, but config.json implies {list(wanted)}"
            raise self.fault(stored, f"has shape {shapes}")

    def fault(self, name: str, reason: str) -> UserError:
        """The error that names a tensor, its file and what is wrong with it."""
        stored = next((n for n in _aliases(name) if n in self._files), name)
        return UserError(f"{self._files.get(stored, self.folder)}: tensor '{stored}' {reason}")

    def __contains__(self, name: str) -> bool:
        return any(candidate in self._files for candidate in _aliases(name))

    def _resolve(self, name: str) -> str:
        for candidate in _aliases(name):
            if candidate in self._files:
                return candidate
        raise UserError(f"{self.folder}: the checkpoint has no tensor '{name}'")

    def _read(self, path: Path, name: str, part: TensorPart | None = None) -> torch.Tensor:
        if path.suffix == ".bin":
            tensor = self._bin_tensors[name]
            return tensor if part is None else part.of(tensor)
        with _reading(path), safe_open(str(path), framework="pt", device="cpu") as file:
            if part is None:
                return file.get_tensor(name)
            return file.get_slice(name)[part.index]

    def _size(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor, then the bytes of one value."""
        path = self._files[name]
        if path.suffix == ".bin":
            tensor = self._bin_tensors[name]
            return *tensor.shape, tensor.element_size()
        with _reading(path), safe_open(str(path), framework="pt", device="cpu") as file:
            shape = file.get_slice(name).get_shape()
            some = file.get_slice(name)[:0] if shape else file.get_tensor(name)
            return *shape, some.element_size()

    def _find_files(self) -> dict[str, Path]:
        for stem in (SAFETENSORS, BIN):
            index = self.folder / f"{stem}.index.json"
            if index.is_file():
                return self._indexed(index)
        if (self.folder / SAFETENSORS).is_file():
            return self._names_in(self.folder / SAFETENSORS)
        if (self.folder / BIN).is_file():
            path = self.folder / BIN
            return dict.fromkeys(_load_bin(path), path)
        raise UserError(
            f"{self.folder}: no weights here; expected {SAFETENSORS}, "
            f"{SAFETENSORS}.index.json or {BIN}"
        )

    def _indexed(self, index: Path) -> dict[str, Path]:
        data = parse_json(index)
        names = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
            raise UserError(f"{index}: has no 'weight_map' from tensor names to files")
        files = {name: self.folder / file for name, file in names.items()}
        missing = sorted({str(path) for path in files.values() if not path.is_file()})
        if missing:
            raise UserError("\n".join(f"{path}: missing, but {index} names it" for path in missing))
        return files

    def _names_in(self, path: Path) -> dict[str, Path]:
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                return dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable safetensors file: {error}") from None

    @cached_property
    def _bin_tensors(self) -> dict[str, torch.Tensor]:
        paths = dict.fromkeys(self._files.values())
        return {name: tensor for path in paths for name, tensor in _load_bin(path).items()}


class RandomWeights:
    """Tensors that depend on the seed and their name alone, so that every process agrees.

    They are drawn on `device`, where they also lie: a card draws billions of them in a second. Each
    kind of device draws numbers of its own.
    """

    def __init__(
        self, seed: int = 0, scale: float = 0.02, device: torch.device | str = "cpu"
    ) -> None:
        self.seed, self.scale, self.device = seed, scale, torch.device(device)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Normal weights; vectors (norms) are 1 and biases 0."""
        if len(shape) == 1:
            make = torch.zeros if name.endswith("bias") else torch.ones
            return make(shape, device=self.device)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(digest[:7], "little"))
        drawn = torch.randn(shape, generator=generator, device=self.device)
        return drawn.mul_(self.scale)

    def read_part(self, name: str, shape: tuple[int, ...], part: TensorPart) -> torch.Tensor:
        """A part of the tensor that `read` gives."""
        return part.of(self.read(name, shape))

    def packed(self, name: str, shape: tuple[int, ...]) -> PackedWeight | None:
        """None of them is quantised."""
        return None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(data, dict) or not all(map(torch.is_tensor, data.values())):
            raise TypeError("it does not map names to tensors")
        return data
    except Exception as error:  # unpicklers raise anything; weights_only never runs code
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: not readable as plain weights ({reason}); convert the model to "
            "safetensors, for example with model.save_pretrained(...)"
        ) from None


def _aliases(name: str) -> list[str]:
    """Checkpoints written from the bare decoder lack the name of the whole model's attribute."""
    _, _, rest = name.partition(".")
    return [name, rest] if name.startswith(("model.", "transformer.", "gpt_neox.")) else [name]
