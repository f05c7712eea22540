"""Keeps what a native library prints away from standard output, which programs read.

HiGHS prints a banner when a solver is made, before any option can forbid it (version 1.16). Python
cannot see what C code writes: the file descriptor itself is turned away for that moment.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

STDOUT = 1


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Whatever is written to file descriptor 1 inside is dropped, buffered by C or not."""
    if sys.stdout is not None:
        with suppress(OSError, ValueError):  # a stream that is closed or has no file
            sys.stdout.flush()
    _flush_c()
    try:
        kept = os.dup(STDOUT)
    except OSError:  # closed: nothing can be written there
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, STDOUT)
        yield
    finally:
        _flush_c()
        os.dup2(kept, STDOUT)
        os.close(kept)
        os.close(nowhere)


def _flush_c() -> None:
    """Writes what C's own buffers hold; on systems without such a library there is none."""
    with suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).fflush(None)
