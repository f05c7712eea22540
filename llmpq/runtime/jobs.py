"""A job as tensors: the header that tells other stages of it, its mask and its positions.

Shapes: b rows of the micro-batch, S tokens computed of each.
"""

from dataclasses import dataclass

import torch

from llmpq.runtime.batching import padded_positions, padding_mask
from llmpq.schedule import Job, Member, Move, Shift

FIXED = 9  # numbers in front of the tables
END = -1  # in place of the kind: no job follows
HEADER_DTYPE = torch.int32


@dataclass(frozen=True)
class Headers:
    """Writes and reads headers: int32, all of one length.

    `rows`: of the largest micro-batch; `shifts`, `moves`: most of a job; `num_stages`: each adds
    how long it has computed so far, in milliseconds, which the last stage sends back.
    """

    rows: int
    shifts: int
    moves: int
    num_stages: int

    @property
    def size(self) -> int:
        """Numbers in a header."""
        return FIXED + 6 * self.rows + 4 * self.shifts + 4 * self.moves + self.num_stages

    def empty(self) -> torch.Tensor:
        """To receive into, or to end with."""
        header = torch.zeros(self.size, dtype=HEADER_DTYPE)
        header[0] = END
        return header

    def write(self, job: Job, busy_ms: list[int]) -> torch.Tensor:
        """The header of a job; `busy_ms` of the stages so far."""
        numbers = [int(job.prefill), job.begin, job.end, job.rows, int(job.chooses)]
        tables = (job.members, job.shifts, job.moves)
        numbers += [len(table) for table in tables] + [len(busy_ms)]
        for table in tables:
            numbers += [number for row in table for number in row]
        header = self.empty()
        header[: len(numbers)] = torch.tensor(numbers, dtype=HEADER_DTYPE)
        if busy_ms:
            header[self.size - self.num_stages :][: len(busy_ms)] = torch.tensor(busy_ms)
        return header

    def read(self, header: torch.Tensor) -> tuple[Job, list[int]] | None:
        """The job and what the stages before have computed; None at the end."""
        numbers = header.tolist()
        if numbers[0] == END:
            return None
        prefill, begin, end, rows, chooses, num_members, num_shifts, num_moves, num_busy = numbers[
            :FIXED
        ]
        at = FIXED
        members = tuple(Member(*numbers[at + 6 * i : at + 6 * i + 6]) for i in range(num_members))
        at += 6 * num_members
        shifts = tuple(Shift(*numbers[at + 4 * i : at + 4 * i + 4]) for i in range(num_shifts))
        at += 4 * num_shifts
        moves = tuple(Move(*numbers[at + 4 * i : at + 4 * i + 4]) for i in range(num_moves))
        job = Job(bool(prefill), members, begin, end, rows, bool(chooses), shifts, moves)
        return job, numbers[self.size - self.num_stages :][:num_busy]


def headers_for(prefill_rows: int, decode_rows: int, num_stages: int) -> Headers:
    """Headers that hold every job of such micro-batches."""
    rows = max(prefill_rows, decode_rows)
    return Headers(rows, shifts=prefill_rows + 1, moves=decode_rows, num_stages=num_stages)


def shape(job: Job) -> tuple[int, int]:
    """Rows and tokens of each that a job computes."""
    return job.rows, job.end - job.begin if job.prefill else 1


def mask(job: Job, first: int, end: int) -> torch.Tensor | None:
    """`[b, seen]` of rows `first` to `end`, 1 for real tokens; None where nothing is padded."""
    seen = job.end if job.prefill else job.end - job.begin
    return padding_mask(_padding(job, first, end), seen)


def positions(job: Job, first: int, end: int) -> torch.Tensor:
    """`[b, S]` positions in each request's own text, 0 for padding."""
    padding = _padding(job, first, end)
    if job.prefill:
        return padded_positions(padding, job.begin, job.end)
    seen = job.end - job.begin
    return padded_positions(padding, seen - 1, seen)


def _padding(job: Job, first: int, end: int) -> torch.Tensor:
    """`[b]` columns that each row does not see; one that takes no part sees its last alone."""
    if job.prefill:
        return torch.tensor([max(0, job.end - m.prompt_tokens) for m in job.members[first:end]])
    padding = [job.end - job.begin - 1] * job.rows
    for member in job.members:
        padding[member.row] = member.start - job.begin
    return torch.tensor(padding[first:end])
