"""What can go wrong, as seen by the person who runs a command.

    LlmpqError            catch this to catch everything below
    |- UserError          exit 2: a file, a flag or a value is wrong; nothing was started
    |- InfeasibleError    exit 3: the question was fine, no plan (or run) fits the machines
    |- WorkerError        exit 4: a worker process was lost or failed; finished requests are safe
    |  `- NeighbourLost   the connection to another worker broke; who it was is not known yet
    `- FailedRequests     exit 5: the run finished, but some requests failed (their lines say why;
                          --resume tries them again)

Each holds the whole message, so that a command prints it and exits without a traceback.
Programming mistakes stay `AssertionError`, `TypeError` and the like, with their traceback.
"""

from collections.abc import Sequence

MOST_SAID = 160  # characters of what a library says, as part of a message
MOST_LISTED = 4


def one_line(error: BaseException, with_kind: bool = False) -> str:
    """What a library says of a fault: one line of `MOST_SAID` characters at most.

    Some of them quote whole values of a broken file. `with_kind` puts the error's class first,
    for libraries whose messages are no sentences (a `KeyError` says only the key).
    """
    kind = f"{type(error).__name__}: " if with_kind else ""
    text = " ".join(f"{kind}{error}".split()) or type(error).__name__
    return text if len(text) <= MOST_SAID else f"{text[: MOST_SAID - 3]}..."


def listed(faults: Sequence[str]) -> str:
    """The first of many faults of one kind, and how many more there are."""
    more = [f"and {len(faults) - MOST_LISTED} more"] if len(faults) > MOST_LISTED else []
    return "; ".join([*faults[:MOST_LISTED], *more])


class LlmpqError(Exception):
    """Base of all errors a user is meant to read."""

    exit_code = 1


class UserError(LlmpqError):
    """Bad usage or bad input: says the file, the line, the value and what would work."""

    exit_code = 2


class InfeasibleError(LlmpqError):
    """Nothing fits: says what is short, on which device and by how much."""

    exit_code = 3


class WorkerError(LlmpqError):
    """A worker was lost or failed during a run."""

    exit_code = 4


class NeighbourLost(WorkerError):
    """The connection to another worker broke, as it does when that one has ended."""


class FailedRequests(LlmpqError):
    """The run finished, but some requests failed: says how many, where it is told why, what next.

    Nothing is left to be tidied up: all files are written. Evaluations end so too.
    """

    exit_code = 5
