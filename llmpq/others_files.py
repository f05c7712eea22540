"""Whether other users could have put something into a folder whose contents are trusted.

Kept weights and compiled kernels are used as they are found: who can write there decides what a
run computes, and compiled kernels are code. So the folder and all in it must belong to this user
or to root, and be writable for the owner alone.

Not covered: folders above it, by whose owners it could be replaced, and access control lists.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

from llmpq.errors import UserError

OWN = 0o755  # of folders that are trusted later: a umask of 002 would open them to a group
OWN_FILE = 0o644


def refuse_others_files(folder: Path) -> None:
    """Raises `UserError`, which names the first path that another user can write to.

    `folder` may be a link; links in it are judged by their owner, and not followed. What lies in a
    folder that others cannot enter is theirs in no case. Raises `OSError` where it cannot be read.
    """
    _check(folder, folder.stat(), folder)


def _check(path: Path, status: os.stat_result, folder: Path) -> None:
    _refuse(path, status, folder)
    if stat.S_ISDIR(status.st_mode) and status.st_mode & 0o011:
        for entry in os.scandir(path):
            with suppress(FileNotFoundError):  # another process has just replaced it
                _check(Path(entry.path), entry.stat(follow_symlinks=False), folder)


def _refuse(path: Path, status: os.stat_result, folder: Path) -> None:
    writes = status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode)
    is_foreign = status.st_uid not in (0, os.geteuid())
    if not writes and not is_foreign:
        return
    fix = "" if is_foreign else f"chmod -R go-w {folder} (if you trust what is there), or "
    raise UserError(
        f"{path}: has mode {stat.S_IMODE(status.st_mode):04o} and belongs to {_name(status)}, so "
        "that another user can change what would be loaded from there; "
        f"{fix}give a folder of your own with --cache-dir DIR"
    )


def _name(status: os.stat_result) -> str:
    """The owner's name and number."""
    import pwd

    with suppress(KeyError):
        return f"{pwd.getpwuid(status.st_uid).pw_name} ({status.st_uid})"
    return f"user {status.st_uid}"
