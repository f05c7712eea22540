"""Finds the files of a model directory that hold its weights, and reads their headers.

The order is transformers' own (`_get_resolved_checkpoint_files`, 5.23): the file that config.json
names as `transformers_weights`, else model.safetensors, the index of its shards, pytorch_model.bin,
the index of its shards. Names come from the files, not from the index, as in transformers. The
error for a directory with other files (an adapter, a GGUF file, a variant, Git LFS pointers) names
them.
Not covered: Flax and TensorFlow files, files inside sub-folders.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open

from llmpq.artifact import FETCH_LFS, is_lfs_pointer, parse_json, show_value
from llmpq.errors import UserError, one_line

SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"
STANDARD = (SAFETENSORS, f"{SAFETENSORS}.index.json", BIN, f"{BIN}.index.json")
MOST_NAME = 255  # bytes of a file name that file systems accept
# Files of folders without standard names, and what helps: the first that is found is named.
OTHERS = (
    ("adapter_config.json", "belongs to a LoRA adapter; merge it into its model and save that"),
    ("adapter_model.*", "is a LoRA adapter; merge it into its base model and save that"),
    ("gptq_model*.safetensors", f"has an old GPTQ name; rename it to {SAFETENSORS}"),
    ("model-*-of-*.safetensors", f"is a shard, but {SAFETENSORS}.index.json is missing"),
    ("pytorch_model-*-of-*.bin", f"is a shard, but {BIN}.index.json is missing"),
    ("model.*.safetensors*", f"is a variant; rename it to {SAFETENSORS} (an index likewise)"),
    ("pytorch_model.*.bin*", f"is a variant; rename it to {BIN} (an index likewise)"),
    ("*.gguf", "is a GGUF file, which cannot be read; fetch the model's safetensors"),
    ("consolidated*", "has its author's own layout; convert it, or fetch the safetensors"),
    ("original/*", "has its author's own layout; convert it, or fetch the safetensors"),
    ("*.safetensors", f"is not a known file name; if it is the model, rename it to {SAFETENSORS}"),
    ("*.h5", "is a TensorFlow checkpoint; save the model as safetensors"),
    ("*.msgpack", "is a Flax checkpoint; save the model as safetensors"),
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, by its header. `dtype` as safetensors spells it: "BF16", "I64"."""

    path: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one value; 1 where several values share a byte."""
        return 1 if self.dtype == "BOOL" else max(1, _bits(self.dtype) // 8)

    @property
    def is_plain_float(self) -> bool:
        """Whether values are floats of 16 bits or more, which need no scales."""
        return self.dtype in ("F16", "BF16", "F32", "F64")


def find_weights(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the directory's weights, by name.

    Raises `UserError` where there are none, or where a file is missing or cannot be read.
    """
    start = weights_file(folder)
    refuse_adapter(folder)
    paths = _shards(start) if start.name.endswith(".index.json") else [start]
    found: dict[str, StoredTensor] = {}
    for path in paths:
        for name, stored in _header(path).items():
            if name in found:
                _refuse_unless_equal(name, found[name].path, path)
            found[name] = stored
    return found


def weights_file(folder: Path) -> Path:
    """The file or index that transformers would read first."""
    path = folder / "config.json"
    config = parse_json(path) if path.is_file() else None
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    if isinstance(named, str):
        if Path(named).name != named or not named.endswith((".safetensors", ".index.json")):
            raise UserError(
                f"{path}: 'transformers_weights' {show_value(named)} is not the name of a "
                "safetensors file beside it"
            )
        if not (folder / named).is_file():
            raise UserError(f"{folder / named}: missing, but {path} names it")
        return folder / named
    for name in STANDARD:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no weights here; {_what_is_there(folder)}")


def unread(folder: Path) -> str | None:
    """A note on a file with a standard name that is not read; None where there is none."""
    start = weights_file(folder)
    beside = [name for name in STANDARD if name != start.name and (folder / name).is_file()]
    if not beside:
        return None
    return f"{start.name} is read, as transformers does; {beside[0]} beside it is not"


def refuse_adapter(folder: Path) -> None:
    """Raises `UserError` for an adapter beside weights, which would be left out."""
    for path in (folder / "adapter_config.json", *folder.glob("adapter_model.*")):
        if path.is_file():
            raise UserError(
                f"{path}: a LoRA adapter beside the weights would be left out; merge it into them "
                "(merge_and_unload) and save the result, or move it away"
            )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns errors of reading a weight file into a `UserError`."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `pytorch_model.bin`; never runs code."""
    _refuse_pointer(path)
    try:
        if not path.stat().st_size:
            raise ValueError("it is empty")
        mapped = is_zipfile(path)  # files of torch before 1.6 are none, and are read whole
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if not isinstance(data, dict) or not all(map(torch.is_tensor, data.values())):
            raise TypeError("it does not map names to tensors")
        return data
    except Exception as error:  # unpicklers raise anything; weights_only never runs code
        reason = one_line(error)
        raise UserError(
            f"{path}: not readable as plain weights ({reason}); convert the model to "
            "safetensors, for example with model.save_pretrained(...)"
        ) from None


def _shards(index: Path) -> list[Path]:
    data = parse_json(index)
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
        raise UserError(f"{index}: has no 'weight_map' from tensor names to files")
    for name in names.values():
        if Path(name).name != name or len(name.encode(errors="replace")) >= MOST_NAME:
            raise UserError(f"{index}: {show_value(name)} is not the name of a file beside it")
    paths = [index.parent / name for name in sorted(set(names.values()))]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}: missing{more}, but {index} names it")
    return paths


def _header(path: Path) -> dict[str, StoredTensor]:
    if path.suffix == ".bin":
        return {n: _stored(path, tensor) for n, tensor in load_bin(path).items()}
    _refuse_pointer(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                n: StoredTensor(path, s.get_dtype(), tuple(s.get_shape()))
                for n, s in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable safetensors file ({path.stat().st_size} bytes): "
            f"{one_line(error)}; was it downloaded completely?"
        ) from None


def _stored(path: Path, tensor: torch.Tensor) -> StoredTensor:
    kinds = {torch.bfloat16: "BF16", torch.bool: "BOOL", torch.uint8: "U8"}
    kind = "F" if tensor.is_floating_point() else "C" if tensor.is_complex() else "I"
    dtype = kinds.get(tensor.dtype, f"{kind}{8 * tensor.element_size()}")
    return StoredTensor(path, dtype, tuple(tensor.shape))


def _refuse_pointer(path: Path) -> None:
    with reading(path), path.open("rb") as file:
        start = file.read(64)
    if is_lfs_pointer(start):
        raise UserError(f"{path}: {FETCH_LFS}")


def _refuse_unless_equal(name: str, first: Path, second: Path) -> None:
    one, other = (_load(path, name) for path in (first, second))
    if one.dtype != other.dtype or not torch.equal(one, other):
        raise UserError(
            f"{second}: tensor '{name}' is also in {first.name}, with other values; remove the "
            "shard that is not of this model"
        )


def _load(path: Path, name: str) -> torch.Tensor:
    if path.suffix == ".bin":
        return load_bin(path)[name]
    with reading(path), safe_open(str(path), framework="pt", device="cpu") as file:
        return file.get_tensor(name)


def _what_is_there(folder: Path) -> str:
    for name in STANDARD:
        if (folder / name).is_symlink():
            return f"{name} is a link to a file that is gone; fetch the model again"
    for pattern, what in OTHERS:
        if found := sorted(path.relative_to(folder) for path in folder.glob(pattern)):
            return f"{found[0]} {what}"
    return f"expected {SAFETENSORS}, {SAFETENSORS}.index.json or {BIN}"


def _bits(dtype: str) -> int:
    digits = dtype.partition("_")[0].lstrip("BFIUC")
    return int(digits) if digits.isdigit() else 8
