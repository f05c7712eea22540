"""Checks, before a command starts, that it writes none of the files that it reads.

Two paths are one file where they lead to the same place through links and "..", where they are hard
links of one file, and where their names differ in case alone and nothing shows that they are two
files: on a disk that does not tell them apart, the second would replace the first. Pipes and
devices are nobody's input and output at once, so that several outputs may go to /dev/null.
"""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from itertools import combinations
from pathlib import Path

from llmpq.artifact import parse_json, read_yaml
from llmpq.errors import UserError
from llmpq.profile_data import OTHER_KINDS
from llmpq.workload import Trace, Workload

Named = tuple[str, Path | str | None]  # what a user calls a file, and where it is; None: not given
# What of a model's folder a command may read.
MODEL_FILES = (
    *("config.json", "generation_config.json", "quantize_config.json", "*.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template*", "*.safetensors", "*.bin", "*.model"),
)


def check_files(reads: Iterable[Named], writes: Iterable[Named]) -> None:
    """Raises `UserError` where a file is written that is read, or that is written as another one,
    and where one cannot be written at all.

    '-' is standard output, which one of them may have.
    """
    writes = list(writes)
    outputs = [(name, str(path)) for name, path in writes if path is not None]
    faults = [
        f"{name} {path}: the same file is named twice (also as {other}); give each its own"
        for (name, path), (other, second) in combinations(outputs, 2)
        if path == second == "-" or _are_one(path, second)
    ]
    inputs = [(name, str(path)) for name, path in reads if path is not None]
    faults += [
        f"{name} {path}: is also {other}, which would be overwritten; give another path"
        for name, path in outputs
        for other, source in inputs
        if _are_one(path, source)
    ]
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    for _, path in writes:
        if path is not None and str(path) != "-":
            _refuse_unwritable(Path(path))


def _refuse_unwritable(path: Path) -> None:
    """Raises `UserError` where a result could not be written, before any work is done."""
    try:
        folder = next(p for p in path.absolute().parents if os.path.lexists(p))
        is_wrong = path.is_dir() or not folder.is_dir()
        exists = _is_there(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    if is_wrong or not os.access(path if exists else folder, os.W_OK):
        raise UserError(f"{path}: cannot be written")


def _is_there(path: Path) -> bool:
    """Raises `OSError` for a link that leads to itself."""
    try:
        path.stat()
        return True
    except FileNotFoundError:
        return False


def model_files(model: str | Path | None) -> Iterator[Named]:
    """Yields the files that a command reads of MODEL, where that is a folder or a file here."""
    folder = Path(model) if model is not None else None
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        yield "--model", folder
        return
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            if any(fnmatch(path.name, pattern) for pattern in MODEL_FILES):
                yield "a file of the model", path


def trace_files(workload: Path | None) -> Iterator[Named]:
    """Yields the CSV files that a workload takes its lengths from."""
    if workload is None:
        return
    with suppress(UserError):  # the command reads it later, and then says so
        found = read_yaml(workload, Workload)
        for lengths in (found.prompt_tokens, found.new_tokens):
            if isinstance(lengths, Trace):
                yield "a trace of --workload", workload.parent / lengths.trace


def profile_files(folder: Path | None, writes: Iterable[Named]) -> Iterator[Named]:
    """Yields the profiles of a folder that one of these outputs would replace."""
    if folder is None or not folder.is_dir():
        return
    targets = [str(path) for _, path in writes if path is not None]
    for path in sorted(folder.glob("*.json")):
        if any(_are_one(str(path), target) for target in targets):
            with suppress(UserError):
                data = parse_json(path)
                if isinstance(data, dict) and data.get("kind") in OTHER_KINDS:
                    continue
            yield "a profile of --profiles", path


def _are_one(first: str, second: str) -> bool:
    if "-" in (first, second):
        return False
    with suppress(OSError, ValueError):
        if os.path.exists(first) and os.path.exists(second):
            return os.path.samefile(first, second) and os.path.isfile(first)
    return _folded(first) == _folded(second)


def _folded(path: str) -> str:
    """Returns the real path in a form that is equal for all names that a disk may take for one."""
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()
