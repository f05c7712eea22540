"""Results on standard output, one a line as they end: nothing is kept and nothing resumed."""

import os
import sys
from contextlib import suppress

from llmpq.errors import WorkerError
from llmpq.prompts.request import Finished
from llmpq.prompts.result_lines import Id, Writer


class ResultStream:
    """The same as `Results` for who writes to it."""

    def __init__(self, writer: Writer) -> None:
        self.notes = ["results go to standard output: nothing is kept, so nothing can be resumed"]
        self.finished: set[Id] = set()
        self.failed: set[Id] = set()
        self._writer = writer

    def write(self, finished: Finished, text: str) -> None:
        """One more finished request. Raises `WorkerError` where nobody reads any more."""
        line = self._writer.line(finished, text)
        try:
            sys.stdout.buffer.write(line + b"\n")
            sys.stdout.buffer.flush()
        except OSError as error:
            with suppress(OSError, ValueError):  # what is left over is not written at the very end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise WorkerError(
                f"standard output cannot be written ({error.strerror}); --output - keeps nothing, "
                "so that --resume needs an --output that is a file"
            ) from None
        self.finished.add(finished.request.id)
        if finished.reason == "error":
            self.failed.add(finished.request.id)

    def check_files(self) -> None:
        """There are none."""

    def close(self) -> None:
        """Nothing is open."""
