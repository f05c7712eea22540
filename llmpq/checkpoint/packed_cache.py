"""Keeps packed weights in a folder, so that a second start rounds nothing (GPTQ may take hours).

The key of a weight holds all that its packed form depends on: the SHA-256 of the raw tensor, its
name, the class of the layer with its bits, group, shape and part of the whole matrix (where several
devices share a layer), the rounding, and the version of llmpq.
The SHA-256 is itself remembered while the checkpoint's files have the same paths, sizes and times,
so that a second start does not read the raw tensor either. A checkpoint that was copied or touched
is read and hashed anew, and its packed weights are still found.

Each weight has one file, which is moved to its path when it is complete, so that processes and
machines may share the folder, however they end. A file whose SHA-256 does not match, or that holds
other tensors than the layer has, is made anew; a folder in which other users can write is refused.
Only unfinished files are ever deleted. The folder may be removed at any time.

Beside the loaded packed weights, memory holds those of one linear, read or about to be written.
Not covered: weights that keep the codes of their checkpoint, and those of 16 bits, which need no
computation. In rare ties GPTQ's codes depend on the kind of device that computed them; other
devices use them unchanged.
"""

import hashlib
import json
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from llmpq.errors import UserError, one_line
from llmpq.models.raw_tensors import RawTensor
from llmpq.others_files import OWN, OWN_FILE, refuse_others_files
from llmpq.precision import group_size
from llmpq.quant import QuantizedLinear
from llmpq.quant.base import Shapes
from llmpq.version import __version__
from llmpq.whole_file import create

FORMAT = 2  # the version of the files; files of other versions are not found
UNFINISHED = ".part"  # ends the name of a file that is being written
LEFT_BEHIND_S = 3600  # an unfinished file this old has lost its writer

CacheKey = dict[str, object]


class WeightCache(Protocol):
    """Loads a tensor of the model from the cache or from the checkpoint."""

    def fill(
        self, raw: RawTensor, name: str, read: Callable[[], Tensor], take: Callable[[Tensor], None]
    ) -> None:
        """Does `take(read())` or its equivalent. `name` is the checkpoint's."""


class NoCache:
    """A cache that keeps nothing."""

    def fill(
        self, raw: RawTensor, name: str, read: Callable[[], Tensor], take: Callable[[Tensor], None]
    ) -> None:
        """Does `take(read())`."""
        take(read())


NO_CACHE: WeightCache = NoCache()


class PackedCache:
    """A cache in a folder. `source` identifies the checkpoint's files, `rounding` the rounding.

    `say` is called with later faults of the folder, without which a run goes on. Raises
    `UserError` where the folder cannot be written at the start, or where others can write to it.
    """

    def __init__(
        self, folder: Path, source: str, rounding: str, say: Callable[[str], None]
    ) -> None:
        self.folder, self._source, self._rounding, self._say = folder, source, rounding, say
        self._keeps = True
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=OWN, exist_ok=True)
            refuse_others_files(folder)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(
                f"{folder}: packed weights cannot be kept here ({error.strerror}); give a folder "
                "that can be written with --cache-dir DIR"
            ) from None
        _sweep(folder)

    def fill(
        self, raw: RawTensor, name: str, read: Callable[[], Tensor], take: Callable[[Tensor], None]
    ) -> None:
        """Loads the packed weight if it is in the cache; else does `take(read())` and keeps it."""
        linear = packs(raw)
        if linear is None:
            take(read())
            return
        key = self._key(linear, name)
        digests = self._digest_path(key)
        known = _read_digest(digests)
        if known and self._restore(linear, key | {"sha256": known}):
            return
        tensor = read()
        digest = _digest([tensor])
        key |= {"sha256": digest}
        if digest == known or not self._restore(linear, key):
            take(tensor)
            del tensor  # makes room for the file's contents
            self._keep(linear, key)
        self._write(digests, digest.encode())

    def num_bytes(self, raw: RawTensor, name: str) -> int | None:
        """Bytes of the file of a weight; None where there is none."""
        linear = packs(raw)
        if linear is None:
            return None
        key = self._key(linear, name)
        known = _read_digest(self._digest_path(key))
        path = self._path(key | {"sha256": known})
        return path.stat().st_size if path.is_file() else None

    def _key(self, linear: QuantizedLinear, name: str) -> CacheKey:
        """The key of a weight, without the raw tensor's SHA-256."""
        return {
            "format": FORMAT,
            "llmpq": __version__,
            "tensor": name,
            "layer": type(linear).__name__,
            "bits": linear.bits,
            "group": group_size(linear.bits, linear.row_length),
            "shape": [linear.out_features, linear.in_features],
            "part": str(linear.part),
            "rounding": self._rounding,
        }

    def _path(self, key: CacheKey) -> Path:
        return self.folder / f"{_name_of(key)}.safetensors"

    def _digest_path(self, key: CacheKey) -> Path:
        """The file that remembers the SHA-256 of the raw tensor."""
        return self.folder / f"{_name_of(key | {'source': self._source})}.sha256"

    def _restore(self, linear: QuantizedLinear, key: CacheKey) -> bool:
        """Loads the weight if it is in the cache; returns whether it was."""
        path = self._path(key)
        try:
            state = _read(path, key, linear.packed_shapes())
        except FileNotFoundError:
            return False
        except (SafetensorError, OSError, ValueError) as error:
            self._say(f"{path}: cannot be used, so the weight is packed again ({one_line(error)})")
            return False
        linear.restore(state)
        return True

    def _keep(self, linear: QuantizedLinear, key: CacheKey) -> None:
        state = {name: tensor.cpu() for name, tensor in linear.packed_state().items()}
        self._write(self._path(key), save(state, _about(key, state)))

    def _write(self, path: Path, content: bytes) -> None:
        """Writes a whole file or none; after a failure nothing more is kept."""
        if not self._keeps:
            return
        temporary = self.folder / f"{secrets.token_hex(8)}{UNFINISHED}"
        try:
            with os.fdopen(create(temporary, OWN_FILE), "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except OSError as error:
            self._keeps = False
            self._say(f"{path}: cannot be written ({error.strerror}); packed weights are not kept")
            with suppress(OSError):
                temporary.unlink()


def packs(raw: RawTensor) -> QuantizedLinear | None:
    """The layer that rounds and packs this tensor; None where it is kept unchanged."""
    is_weight = raw.attribute == "weight" and isinstance(raw.module, QuantizedLinear)
    return cast(QuantizedLinear, raw.module) if is_weight else None


def _read_digest(path: Path) -> str | None:
    try:
        is_file = stat.S_ISREG(path.lstat().st_mode)
        return path.read_text(encoding="ascii") if is_file else None
    except (OSError, UnicodeDecodeError):
        return None


def _name_of(value: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: CacheKey, shapes: Shapes) -> dict[str, Tensor]:
    """The packed weight, still in the file's pages. Raises `ValueError` for other contents."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("it is not a regular file")
    with safe_open(str(path), framework="pt", device="cpu") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if {name: (one.dtype, tuple(one.shape)) for name, one in state.items()} != shapes:
            raise ValueError("its tensors are not those of this layer")
        if file.metadata() != _about(key, state):
            raise ValueError("its contents have changed")
    return state


def _about(key: CacheKey, state: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata of a file: the key, and the SHA-256 of the packed weight."""
    names = json.dumps(sorted(state))
    digest = _digest((state[name] for name in sorted(state)), names)
    return {"about": json.dumps(key | {"packed_sha256": digest})}


def _digest(tensors: Iterable[Tensor], names: str = "") -> str:
    """The SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256(names.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sweep(folder: Path) -> None:
    """Removes unfinished files of writers that were killed."""
    for path in folder.glob(f"*{UNFINISHED}"):
        with suppress(OSError):  # another process was quicker
            if time.time() - path.stat().st_mtime > LEFT_BEHIND_S:
                path.unlink()
