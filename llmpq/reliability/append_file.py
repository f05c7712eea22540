"""A file that grows by whole records or not at all, and is replaced whole or not at all.

Every record reaches the operating system before `append` returns, so that it outlives the process
however that ends. Only `sync` makes it outlive a crash of the machine. A write that fails half-way
(a full disk) is undone as far as the disk allows. A file that another program removes, replaces or
changes is noticed: `append` checks its size, `check_name` that the name still means this file.
"""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from llmpq.errors import UserError, WorkerError

# The errors of file systems without locks, as some network file systems are.
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


class AppendFile:
    """An open file, created where it is absent and locked against other runs.

    Raises `UserError` where it cannot be opened or another process holds it, and `WorkerError`
    where it cannot be written later.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = _open_locked(path)
            self._expected = self.size
        except BlockingIOError:
            raise UserError(f"{path}: another run is writing to it") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return os.fstat(self._handle).st_size

    def append(self, record: bytes) -> None:
        """Appends all of `record`, or nothing of it."""
        with _as_worker_error(self.path):
            start = self.size
            if start != self._expected:
                raise self._meddled(f"has {start} bytes and not {self._expected}")
            try:
                _write_all(self._handle, record)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(self._handle, start)
                raise
            self._expected += len(record)

    def check_name(self) -> None:
        """Raises `WorkerError` where another file, or none, has the name now."""
        try:
            is_same = os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        except FileNotFoundError:
            raise self._meddled("is gone") from None
        except OSError as error:
            raise self._meddled(f"cannot be accessed ({error.strerror})") from None
        if not is_same:
            raise self._meddled("is another file")

    def _meddled(self, what: str) -> WorkerError:
        return WorkerError(
            f"{self.path}: {what}: another program removed, replaced or changed it while the run "
            "was writing to it"
        )

    def cut(self, size: int) -> None:
        """Truncates the file to its first `size` bytes."""
        if size < self.size:
            with _as_worker_error(self.path):
                os.ftruncate(self._handle, size)
            self._expected = size

    def rewrite(self, records: Iterable[bytes]) -> None:
        """Replaces all contents in one step, which a crash cannot leave half done."""
        new = new_name(self.path)
        with _as_worker_error(self.path):
            handle = os.open(new, _FLAGS | os.O_TRUNC, stat.S_IMODE(os.fstat(self._handle).st_mode))
            try:
                _lock(handle)
                for record in records:
                    _write_all(handle, record)
                os.fsync(handle)
                os.replace(new, self.path)
            except BaseException:
                os.close(handle)
                new.unlink(missing_ok=True)
                raise
            os.close(self._handle)
            self._handle, self._expected = handle, os.fstat(handle).st_size
        self.sync_name()

    def move(self, target: Path) -> None:
        """Renames the file to `target`, and starts again with an empty file."""
        with _as_worker_error(self.path):
            os.replace(self.path, target)
            handle = _open_locked(self.path)
            os.close(self._handle)
            self._handle, self._expected = handle, os.fstat(handle).st_size
        self.sync_name()

    def read(self) -> BinaryIO:
        """Opens the file as it is now; the handle stays readable when the file is rewritten."""
        with _as_worker_error(self.path):
            return self.path.open("rb")

    def sync(self) -> None:
        """Syncs the contents to the disk."""
        with _as_worker_error(self.path):
            os.fsync(self._handle)

    def sync_name(self) -> None:
        """Syncs the file's name to the disk, where the file system can do that."""
        with _as_worker_error(self.path):
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            except OSError as error:
                if error.errno not in (errno.EINVAL, *UNSUPPORTED):
                    raise
            finally:
                os.close(folder)

    def close(self) -> None:
        """Closes the file and releases its lock."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


def new_name(path: Path) -> Path:
    """The path where a file is written before it replaces another."""
    return path.with_name(f".{path.name}.new")


def _open_locked(path: Path) -> int:
    """A locked handle of the file that has this name after locking, not of a replaced one."""
    while True:
        handle = os.open(path, _FLAGS, 0o666)
        try:
            _lock(handle)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


@contextmanager
def _as_worker_error(path: Path) -> Iterator[None]:
    """Turns an error of the operating system into a `WorkerError` that says what is safe."""
    try:
        yield
    except OSError as error:
        free = ""
        with suppress(OSError):
            free = f"; {shutil.disk_usage(path.parent).free >> 20} MiB free there"
        raise WorkerError(
            f"{path}: cannot be written ({error.strerror}{free}); "
            "finished requests are safe, --resume continues"
        ) from None
