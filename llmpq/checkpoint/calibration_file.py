"""The file of calibration statistics: second moments of linears' inputs, with which GPTQ rounds.

The statistics are H = X^T X / T of the inputs X `[T tokens, in]`, as blocks `[blocks, B, B]` along
its diagonal (one block unless asked otherwise). Linears with the same input share one H, under the
name ("key") of the first of them.

The file is safetensors, n^2 bytes for n inputs: `KEY.deviation`, the square root of the diagonal,
fp32 `[blocks, B]`, and `KEY.correlation`, the lower triangle without the diagonal, row by row,
int16 `[blocks, B (B - 1) / 2]` in steps of 1 / 32767. (In fp16 the error of 1,024 inputs with a
common mean was 0.009 of the mean moment, near the damping of GPTQ; with equal steps it is 0.0006.)
Its metadata hold the format's version, the key of each weight (JSON), and the origin of the
statistics; where layers have experts, also the tokens that each key saw and the weights that saw
too few for GPTQ (JSON). `llmpq.evaluation.calibration` measures them.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmpq.artifact import refuse_unless_regular
from llmpq.checkpoint.checkpoint_files import reading
from llmpq.errors import UserError, one_line
from llmpq.whole_file import whole_file

KIND, VERSION = "llmpq-moments", "1"
SEEN, NEAREST = "tokens_of_keys", "rounded_to_nearest"  # in the metadata
STEPS = 32767  # the int16 value of a correlation of 1


class CalibrationWriter:
    """Writes the file one H at a time, so that memory holds no H that was added.

    `close` moves the whole file to its path; without `close`, no file is left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header: dict[str, object] = {}
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 (`close` does)

    def add(self, key: str, moments: Tensor) -> None:
        """Adds the second moments fp32 `[blocks, B, B]` of one key."""
        deviation, correlation = _packed(moments.detach().cpu())
        self._append(f"{key}.deviation", "F32", deviation)
        self._append(f"{key}.correlation", "I16", correlation)

    def close(
        self,
        alias: Mapping[str, str],
        about: Mapping[str, str],
        seen: Mapping[str, int] = MappingProxyType({}),
        nearest: Collection[str] = (),
    ) -> None:
        """Writes the file. `alias` maps weights to keys, `about` describes model and text.

        `seen` counts the tokens of each key; they are kept where they differ. `nearest` names the
        weights that saw too few.
        """
        kind = {"kind": KIND, "schema_version": VERSION, "keys": json.dumps(dict(alias))}
        if nearest or len(set(seen.values())) > 1:
            kind |= {SEEN: json.dumps(dict(seen)), NEAREST: json.dumps(sorted(nearest))}
        header = json.dumps({"__metadata__": {**about, **kind}, **self._header}).encode()
        header += b" " * (-len(header) % 8)
        with _writing(self.path), self._data, whole_file(self.path) as file:
            file.write(len(header).to_bytes(8, "little") + header)
            self._data.seek(0)
            shutil.copyfileobj(self._data, file)

    def _append(self, name: str, dtype: str, tensor: Tensor) -> None:
        start = self._data.tell()
        with _writing(self.path):
            self._data.write(tensor.contiguous().numpy().data)
        offsets = [start, self._data.tell()]
        self._header[name] = {"dtype": dtype, "shape": [*tensor.shape], "data_offsets": offsets}


def write_calibration(
    path: Path, moments: Mapping[str, Tensor], alias: Mapping[str, str], about: Mapping[str, str]
) -> None:
    """Writes all `moments` (fp32 `[blocks, B, B]` by key); see `CalibrationWriter`."""
    writer = CalibrationWriter(path)
    for key, tensor in moments.items():
        writer.add(key, tensor)
    writer.close(alias, about)


class CalibrationFile:
    """The statistics by the checkpoint's name of a weight, each read when it is asked for.

    Raises `UserError` where the file is missing, has another format, or lacks a weight.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            metadata = file.metadata() or {}
            self._tensors = frozenset(file.keys())
        if metadata.get("kind") != KIND or metadata.get("schema_version") != VERSION:
            raise UserError(
                f"{path}: not a file of calibration statistics (kind {KIND}, version {VERSION})"
            )
        self.keys = self._read_keys(metadata.pop("keys", ""))
        self._seen, self.nearest = self._read_experts(metadata)
        self.about = {k: v for k, v in metadata.items() if k not in ("kind", "schema_version")}

    def __contains__(self, name: str) -> bool:
        return name in self.keys

    def key(self, name: str) -> str:
        """The key of a weight, which weights with the same input share."""
        if name not in self.keys:
            raise UserError(
                f"{self.path}: has no calibration statistics for '{name}'; it was made for "
                f"{self.about.get('model', 'another model')}"
            )
        return self.keys[name]

    def share(self, name: str) -> float:
        """The share of the text's tokens that a weight saw: below 1 for routed experts."""
        most = max(self._seen.values(), default=0)
        return self._seen.get(self.keys.get(name, ""), 0) / most if most else 1.0

    @property
    def note(self) -> str | None:
        """A note on weights that saw too few tokens for GPTQ; None where there are none."""
        if not self.nearest:
            return None
        return (
            f"{self.path}: {len(self.nearest)} of the {len(self.nearest | set(self.keys))} weights "
            "saw too few tokens of the calibration text (they belong to experts); they are rounded "
            "to nearest"
        )

    def statistics(self, name: str) -> Tensor:
        """The second moments fp32 `[blocks, B, B]` of the inputs of weight `name`."""
        key = self.key(name)
        with reading(self.path), self._open() as file:
            deviation, correlation = (
                file.get_tensor(f"{key}.{part}") for part in ("deviation", "correlation")
            )
        if deviation.dim() != 2:
            raise UserError(f"{self.path}: '{key}.deviation' is not a matrix")
        if not torch.isfinite(deviation).all():
            raise UserError(
                f"{self.path}: '{key}.deviation' has NaN or infinite numbers: the file is damaged, "
                "or the model that it was made with has such activations"
            )
        blocks, size = deviation.shape
        if tuple(correlation.shape) != (blocks, size * (size - 1) // 2):
            raise UserError(f"{self.path}: '{key}.correlation' does not fit '{key}.deviation'")
        return _unpacked(deviation, correlation)

    def _open(self) -> Any:
        try:
            refuse_unless_regular(self.path)
            return safe_open(str(self.path), framework="pt", device="cpu")
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{self.path}: not a readable safetensors file: {one_line(error)}"
            ) from None

    def _read_keys(self, text: str) -> dict[str, str]:
        try:
            keys = json.loads(text)
        except ValueError:
            keys = None
        if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys.values()):
            raise UserError(f"{self.path}: its 'keys' do not map weights to statistics")
        for key in sorted(set(keys.values())):
            if not {f"{key}.deviation", f"{key}.correlation"} <= self._tensors:
                raise UserError(f"{self.path}: has no tensors for '{key}', which its 'keys' name")
        return keys

    def _read_experts(self, metadata: dict[str, str]) -> tuple[dict[str, int], frozenset[str]]:
        """The tokens of each key and the weights with too few; removed from the metadata."""
        try:
            seen = json.loads(metadata.pop(SEEN, "{}"))
            nearest = json.loads(metadata.pop(NEAREST, "[]"))
        except ValueError:
            seen = nearest = None
        if not isinstance(seen, dict) or not all(type(n) is int for n in seen.values()):
            raise UserError(f"{self.path}: its '{SEEN}' do not map statistics to tokens")
        if not isinstance(nearest, list) or not all(isinstance(name, str) for name in nearest):
            raise UserError(f"{self.path}: its '{NEAREST}' is not a list of weights")
        return seen, frozenset(nearest)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    try:
        refuse_unless_regular(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _packed(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Deviation fp32 `[blocks, B]` and correlation int16 `[blocks, B (B - 1) / 2]`."""
    blocks, size, _ = moments.shape
    deviation = moments.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    scale = torch.where(deviation > 0, STEPS / deviation, 0.0)
    correlation = torch.empty(blocks, size * (size - 1) // 2, dtype=torch.int16)
    for block in range(blocks):
        for row, columns in _triangle(size):
            steps = moments[block, row, :row] * scale[block, :row] * (scale[block, row] / STEPS)
            correlation[block, columns] = steps.round().clamp(-STEPS, STEPS).to(torch.int16)
    return deviation, correlation


def _unpacked(deviation: Tensor, correlation: Tensor) -> Tensor:
    """The second moments that `_packed` was given, up to rounding."""
    blocks, size = deviation.shape
    moments = torch.empty(blocks, size, size)
    for block in range(blocks):
        own = deviation[block]
        for row, columns in _triangle(size):
            values = correlation[block, columns].float() * own[:row] * (own[row] / STEPS)
            moments[block, row, :row] = values
            moments[block, :row, row] = values
        moments[block].diagonal().copy_(own.square())
    return moments


def _triangle(size: int) -> Iterator[tuple[int, slice]]:
    """The rows of a lower triangle without its diagonal, and their positions in a flat array."""
    start = 0
    for row in range(size):
        yield row, slice(start, start + row)
        start += row
