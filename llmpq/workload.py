"""What is to be generated: how many requests, how long, and how they fall into batches.

Lengths are a number, a range (`{min, max}`, spread evenly), a column of a trace file or a list.
The runtime sorts requests by prompt length and runs them in batches of `batch`; `batches` is that
same pure function, so that the planner prices the batches which will really run.
"""

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from llmpq.artifact import Strict, read_yaml
from llmpq.errors import UserError


class MinMax(Strict):
    """Lengths spread evenly from `min` to `max`, both included."""

    min: PositiveInt
    max: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> "MinMax":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class Trace(Strict):
    """Lengths from a column of a CSV file (`.csv` or `.csv.gz`), in place of which they are read.

    Plans hold the lengths themselves, so that they run where the file is not.
    """

    trace: str
    column: str


def _kind_of_lengths(value: Any) -> str | None:
    if isinstance(value, Trace) or (isinstance(value, dict) and "trace" in value):
        return "Trace"
    if isinstance(value, MinMax | dict):
        return "MinMax"
    if isinstance(value, list | tuple):
        return "List"
    return "Number" if type(value) in (int, float) else None


Lengths = Annotated[
    Annotated[PositiveInt, Tag("Number")]
    | Annotated[MinMax, Tag("MinMax")]
    | Annotated[Trace, Tag("Trace")]
    | Annotated[Annotated[tuple[PositiveInt, ...], Field(min_length=1)], Tag("List")],
    Discriminator(
        _kind_of_lengths,
        custom_error_type="lengths",
        custom_error_message="expected a number, {min, max}, {trace, column} or a list",
    ),
]


class Workload(Strict):
    """A batch job. `batch` is the number of requests in flight."""

    name: str = "workload"
    prompt_tokens: Lengths
    new_tokens: Lengths
    num_requests: PositiveInt = Field(le=10_000_000)
    batch: PositiveInt | Literal["auto"] = "auto"


@dataclass(frozen=True)
class Batch:
    """Requests that run together, padded to the longest prompt.

    `requests` are positions in the list that was given to `batches`.
    """

    requests: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int


def load_workload(path: Path) -> Workload:
    """Reads workload.yaml; traces are read too, relative ones from beside it."""
    workload = read_yaml(path, Workload)
    count = workload.num_requests
    read = {
        name: tuple(_trace_column(lengths, path.parent)[:count])
        for name in ("prompt_tokens", "new_tokens")
        if isinstance(lengths := getattr(workload, name), Trace)
    }
    return workload.model_copy(update=read)


def request_lengths(workload: Workload) -> list[tuple[int, int]]:
    """(prompt tokens, new tokens) of every request, always the same for the same workload."""
    prompts = _expand(workload.prompt_tokens, workload.num_requests, seed=1)
    new = _expand(workload.new_tokens, workload.num_requests, seed=2)
    return list(zip(prompts, new, strict=True))


def batches(lengths: Sequence[tuple[int, int]], batch: int) -> list[Batch]:
    """Cuts requests into batches of at most `batch`, longest prompts first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i][0], -lengths[i][1], i))
    groups = [tuple(order[i : i + batch]) for i in range(0, len(order), batch)]
    return [_batch(group, lengths) for group in groups]


def fitting(batch: Batch, lengths: Sequence[tuple[int, int]], reserved: int) -> list[Batch]:
    """A batch in halves until each needs at most `reserved` tokens of cache, or is one request."""
    members = batch.requests
    small = len(members) * (batch.prompt_tokens + batch.new_tokens) <= reserved
    if small or len(members) == 1:
        return [batch]
    middle = len(members) // 2
    halves = [_batch(half, lengths) for half in (members[:middle], members[middle:])]
    return [part for half in halves for part in fitting(half, lengths, reserved)]


def prefill_size(planned_size: int, prompt_tokens: int, planned_prompt_tokens: int) -> int:
    """Prompts a prefill micro-batch: fewer where they are longer than the plan foresaw.

    Attention's memory grows with the square of the length, so the size shrinks with it.
    """
    longer = max(1, -(-prompt_tokens // planned_prompt_tokens))
    return max(1, planned_size // longer**2)


def _batch(group: tuple[int, ...], lengths: Sequence[tuple[int, int]]) -> Batch:
    return Batch(
        requests=group,
        prompt_tokens=max(lengths[i][0] for i in group),
        new_tokens=max(lengths[i][1] for i in group),
    )


def _expand(lengths: Lengths, count: int, seed: int) -> list[int]:
    if isinstance(lengths, int):
        return [lengths] * count
    if isinstance(lengths, Trace):
        lengths = tuple(_trace_column(lengths, Path(".")))
    if isinstance(lengths, tuple):
        return [lengths[i % len(lengths)] for i in range(count)]
    span = lengths.max - lengths.min
    values = [lengths.min + round(span * i / max(1, count - 1)) for i in range(count)]
    random.Random(seed).shuffle(values)  # prompts and outputs are independent
    return values


def _trace_column(source: Trace, folder: Path) -> list[int]:
    path = Path(source.trace)
    path = path if path.is_absolute() else folder / path
    if not path.is_file():
        raise UserError(f"{path}: no such trace file")
    import pandas  # only traces need it, and it is slow to import

    try:
        table = pandas.read_csv(path)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable CSV file ({error})") from None
    if source.column not in table:
        raise UserError(f"{path}: no column '{source.column}'; it has {', '.join(table.columns)}")
    column = pandas.to_numeric(table[source.column], errors="coerce")
    bad = column.isna() | (column < 0) | (column == math.inf)
    if bad.any() or column.empty:
        line = int(bad.idxmax()) + 2 if bad.any() else 1
        raise UserError(f"{path}:{line}: column '{source.column}' is not a length in tokens")
    return [max(1, int(value)) for value in column]
