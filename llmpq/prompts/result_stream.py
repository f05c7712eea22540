"""Writes results to standard output as requests end; nothing is kept, nothing is resumed."""

import os
import sys
from contextlib import suppress

from llmpq.errors import WorkerError
from llmpq.prompts.request import Finished
from llmpq.prompts.result_lines import Id, ResultWriter


class ResultStream:
    """Has the methods of `Results`, and writes to standard output."""

    def __init__(self, writer: ResultWriter) -> None:
        self.notes = [
            "results go to standard output and are not kept, so that the run cannot be resumed"
        ]
        self.finished: set[Id] = set()
        self.failed: set[Id] = set()
        self._writer = writer

    def write(self, finished: Finished, text: str) -> None:
        """Writes a finished request. Raises `WorkerError` where the reader has gone."""
        line = self._writer.line(finished, text)
        try:
            sys.stdout.buffer.write(line + b"\n")
            sys.stdout.buffer.flush()
        except OSError as error:
            with suppress(OSError, ValueError):  # the interpreter would write the rest at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise WorkerError(
                f"standard output cannot be written ({error.strerror}); --output - keeps nothing, "
                "so that --resume needs an --output that is a file"
            ) from None
        self.finished.add(finished.request.id)
        if finished.reason == "error":
            self.failed.add(finished.request.id)

    def check_files(self) -> None:
        """Does nothing: there are no files."""

    def close(self) -> None:
        """Does nothing: no file is open."""
