"""A file that is there whole or not at all: written beside its place, then moved into it.

A new file's mode follows the umask, as with any program; one that is replaced keeps its mode.
Not covered: that the bytes outlive a crash of the machine (`reliability.append_file` sees to that).
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """What is written here takes the place of `path` at the end; after an error, nothing does.

    Raises `OSError`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = create(temporary)
    try:
        with os.fdopen(handle, "wb") as file:
            with suppress(FileNotFoundError):
                os.fchmod(handle, path.stat().st_mode & 0o777)
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def create(path: Path, mode: int = 0o666) -> int:
    """A handle of a new file; `mode`, less the umask. Raises `OSError`."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
