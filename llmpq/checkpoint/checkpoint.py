"""Reads single tensors from a Hugging Face model directory, one at a time.

`checkpoint_files` finds the files, and `inventory` says whether all their tensors are served.
safetensors files are opened for each tensor, so that the pages of a file do not stay mapped.
Weights that are quantized already (`prequantized`) are returned as codes, or dequantized.
`RandomWeights` has the same interface, for measuring shapes whose weights are not available.
"""

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from llmpq.artifact import parse_json
from llmpq.checkpoint.checkpoint_files import StoredTensor, find_weights, load_bin, reading
from llmpq.checkpoint.fingerprint import fingerprint
from llmpq.checkpoint.float8 import Float8, float8_of
from llmpq.checkpoint.mxfp4 import METHOD as MXFP4
from llmpq.checkpoint.mxfp4 import Mxfp4
from llmpq.checkpoint.prequantized import OLD_GPTQ, quantized_format, settings_of
from llmpq.checkpoint.stored_names import (
    Index,
    Place,
    expert_index,
    expert_shape,
    places,
    stacked_experts,
)
from llmpq.errors import UserError
from llmpq.language_part import has_other_parts, names_inside
from llmpq.precision import layer_precision
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
        self._stacked = stacked_experts(folder)
        self._packing, self._floats = quantized_format(folder), self._small_floats()

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor called `name`, dequantized if need be; `shape` is what config.json implies."""
        packed = self.packed(name, shape)
        if packed is not None:
            return packed.dequantized()
        if self._floats is not None and self.is_small_float(name):
            return self._floats.read(name.removesuffix(".weight"), shape, self)
        return self.tensor(name, shape)

    def read_part(self, name: str, shape: tuple[int, ...], part: TensorPart) -> torch.Tensor:
        """A part of a tensor; of a safetensors file no other bytes are read."""
        if self.is_packed(name) or self.is_small_float(name):
            return part.of(self.read(name, shape))
        return self.tensor(name, shape, part)

    def packed(self, name: str, shape: tuple[int, ...]) -> PackedWeight | None:
        """The codes of a weight `[out, in]` that is quantized already; None where it is not."""
        if self._packing is None or not self.is_packed(name):
            return None
        return self._packing.read(name.removesuffix(".weight"), shape, self)

    def stores(self, name: str) -> bool:
        """Whether files hold the tensor, quantized or not."""
        return name in self or self.is_packed(name) or self.is_small_float(name)

    def equal(self, first: str, second: str, shape: tuple[int, ...]) -> bool:
        """Whether two matrices that files hold are the same; reads some rows of each at a time."""
        if any(self.is_packed(name) or self.is_small_float(name) for name in (first, second)):
            return False
        for start in range(0, shape[0], ROWS_AT_ONCE):
            part = TensorPart(0, start, min(start + ROWS_AT_ONCE, shape[0]), shape[0])
            if not torch.equal(self.tensor(first, shape, part), self.tensor(second, shape, part)):
                return False
        return True

    def note(self, precisions: Collection[str]) -> str | None:
        """A note on what these precisions do to weights that are quantized already, or None."""
        if self._floats is not None:
            return (
                f"{self.folder}: {self._floats.what}; they are converted to 16 bits, and layers at "
                "lower precisions are rounded a second time"
            )
        parts = {part for name in precisions for part in layer_precision(name)}
        if self._packing is None or parts <= self._packing.precisions:
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
        held = self._packing if self.is_packed(name) else self._floats
        names = [name]
        if held is not None and (self.is_packed(name) or self.is_small_float(name)):
            names = held.names(name.removesuffix(".weight"))
        return [place.stored for part in names for place in self._places(part)]

    def place(self, name: str) -> Place | None:
        """Where the files hold a tensor; None where they do not, or not by this name."""
        return next(self._places(name), None)

    def stored_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        """The bytes of the tensor `name` in files, with all parts of a quantized one.

        Reads headers only. Raises `UserError` where the tensor is missing or has another shape.
        """
        if isinstance(self._floats, Mxfp4) and self.is_small_float(name):
            return self._floats.num_bytes(shape)
        if not self.is_packed(name):
            place = self._resolve(name)
            self._check(place, self.shape_of(name), shape)
            if place.expert is not None:
                return math.prod(shape) * self._stored[place.stored].item_bytes
        parts = [self._stored[part] for part in self.sources(name)]
        return sum(math.prod(part.shape) * part.item_bytes for part in parts)

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...] | None = None,
        part: TensorPart | None = None,
        index: Index | None = None,
    ) -> torch.Tensor:
        """The tensor as it is stored, or a part; raises `UserError` where the shape differs.

        `index` selects a part of a tensor that is whole in the files.
        """
        place = self._resolve(name)
        stored = self._stored[place.stored]
        if place.expert is not None:
            return self._of_expert(name, place, shape, part)
        if part is not None:  # the part does not show the whole shape
            self._check(place, stored.shape, shape)
        tensor = self._read(stored.path, place.stored, part.index if part else index)
        if part is None:
            self._check(place, tuple(tensor.shape), shape)
        return tensor

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, by the headers; raises `UserError` where it is missing."""
        place = self._resolve(name)
        shape = self._stored[place.stored].shape
        if place.expert is None:
            return shape
        if len(shape) < 2 or place.expert >= shape[0]:
            raise self.fault(name, f"has shape {list(shape)}, and no expert {place.expert}")
        return expert_shape(place, shape, self._stacked)

    def _of_expert(
        self, name: str, place: Place, shape: tuple[int, ...] | None, part: TensorPart | None
    ) -> torch.Tensor:
        """An expert's part of a stacked tensor."""
        self._check(place, self.shape_of(name), shape)
        stored = self._stored[place.stored]
        index = expert_index(place, stored.shape, self._stacked)
        tensor = self._read(stored.path, place.stored, index)
        tensor = tensor.t() if self._stacked.transposed and tensor.dim() == 2 else tensor
        return (part.of(tensor) if part else tensor).contiguous()

    def _check(self, place: Place, found: tuple[int, ...], wanted: tuple[int, ...] | None) -> None:
        if wanted is not None and found != wanted:
            of_expert = "" if place.expert is None else " for an expert"
            shapes = f"{list(found)}{of_expert}, but config.json implies {list(wanted)}"
            raise self.fault(place.stored, f"has shape {shapes}")

    def fault(self, name: str, reason: str) -> UserError:
        """The error that names a tensor, its file and what is wrong with it."""
        place = self.place(name)
        stored = name if place is None else place.stored
        path = self.folder if place is None else self._stored[stored].path
        return UserError(f"{path}: tensor '{stored}' {reason}")

    def is_small_float(self, name: str) -> bool:
        """Whether the weight is stored in 8 or 4 bits as floats with scales."""
        linear = name.removesuffix(".weight")
        return self._floats is not None and linear != name and self._floats.holds(linear, self)

    def is_packed(self, name: str) -> bool:
        """Whether the weight is quantized already."""
        linear = name.removesuffix(".weight")
        return self._packing is not None and linear != name and self._packing.holds(linear, self)

    def __contains__(self, name: str) -> bool:
        return self.place(name) is not None

    def _small_floats(self) -> Float8 | Mxfp4 | None:
        """The format of small floats that the settings of the checkpoint name."""
        settings, _ = settings_of(self.folder)
        if isinstance(settings, dict) and settings.get("quant_method") == MXFP4:
            return Mxfp4(self._stacked.interleaved)
        return float8_of(self.folder)

    def _names(self, name: str) -> list[str]:
        """The names that a tensor may have in the files."""
        return _aliases(name) + (names_inside(name) if self.has_other_parts else [])

    def _places(self, name: str) -> Iterator[Place]:
        """Where the files hold a tensor; a second place holds the same tensor again."""
        for place in places(name):
            for alias in self._names(place.stored):
                if alias in self._stored:
                    yield place._replace(stored=alias)

    def _resolve(self, name: str) -> Place:
        place = self.place(name)
        if place is None:
            raise UserError(f"{self.folder}: the checkpoint has no tensor '{name}'")
        return place

    def _read(self, path: Path, name: str, index: Index | None = None) -> torch.Tensor:
        if path.suffix == ".bin":
            tensor = self._bin_tensors[name]
            return tensor if index is None else tensor[index]
        with reading(path), safe_open(str(path), framework="pt", device="cpu") as file:
            return file.get_tensor(name) if index is None else file.get_slice(name)[index]

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
