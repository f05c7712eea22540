"""A job as a message: the header that tells other stages of it."""

from dataclasses import dataclass

import torch

from llmpq.job import Job, Member, Move

FIXED = 8  # numbers in front of the tables
MEMBER, MOVE = len(Member._fields), len(Move._fields)
END = -1  # the kind that says that no job follows
HEADER_DTYPE = torch.int32


@dataclass(frozen=True)
class Headers:
    """Writes and reads headers: int32, all of one length.

    `rows` is the size of the largest micro-batch, `moves` the most moves of a job. Each of the
    `num_stages` stages adds how long it has computed so far, in milliseconds, which the last stage
    sends back.
    """

    rows: int
    moves: int
    num_stages: int

    @property
    def size(self) -> int:
        """Numbers in a header."""
        return FIXED + MEMBER * self.rows + MOVE * self.moves + self.num_stages

    def empty(self) -> torch.Tensor:
        """A header to receive into; sent as it is, it says that no job follows."""
        header = torch.zeros(self.size, dtype=HEADER_DTYPE)
        header[0] = END
        return header

    def write(self, job: Job, busy_ms: list[int]) -> torch.Tensor:
        """The header of a job, with the `busy_ms` of the stages so far."""
        numbers = [int(job.prefill), job.begin, job.end, job.rows, int(job.chooses)]
        tables = (job.members, job.moves)
        numbers += [len(table) for table in tables] + [len(busy_ms)]
        for table in tables:
            numbers += [number for row in table for number in row]
        header = self.empty()
        header[: len(numbers)] = torch.tensor(numbers, dtype=HEADER_DTYPE)
        if busy_ms:
            header[self.size - self.num_stages :][: len(busy_ms)] = torch.tensor(busy_ms)
        return header

    def read(self, header: torch.Tensor) -> tuple[Job, list[int]] | None:
        """The job and the milliseconds of the stages before; None at the end."""
        numbers = header.tolist()
        if numbers[0] == END:
            return None
        prefill, begin, end, rows, chooses, num_members, num_moves, num_busy = numbers[:FIXED]
        middle = FIXED + num_members * MEMBER
        members = _rows(numbers[FIXED:middle], MEMBER)
        moves = _rows(numbers[middle : middle + num_moves * MOVE], MOVE)
        job = Job(
            bool(prefill),
            tuple(Member(*row) for row in members),
            begin,
            end,
            rows,
            bool(chooses),
            tuple(Move(*row) for row in moves),
        )
        return job, numbers[self.size - self.num_stages :][:num_busy]


def _rows(numbers: list[int], size: int) -> list[list[int]]:
    """Splits a flat table into its rows."""
    return [numbers[at : at + size] for at in range(0, len(numbers), size)]


def headers_for(prefill_rows: int, decode_rows: int, num_stages: int) -> Headers:
    """Headers that are large enough for every job of such micro-batches."""
    return Headers(max(prefill_rows, decode_rows), moves=decode_rows, num_stages=num_stages)


def shape(job: Job) -> tuple[int, int]:
    """The rows of a job, and the tokens that it computes of each row."""
    return job.rows, job.end - job.begin if job.prefill else 1
