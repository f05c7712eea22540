"""What is to be generated: how many requests, how long, and the room that a run has for them.

Lengths are a number, a range (`{min, max}`, spread evenly), a column of a trace file or a list.
`lanes` and `chunk_tokens` are what a plan decides where nobody chose otherwise; a run keeps to what
its plan says (`llmpq.plan_data.reserve_of`).
"""

import gzip
import itertools
import math
import random
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from llmpq.artifact import Strict, read_yaml, show_value, text_encoding
from llmpq.errors import UserError, one_line
from llmpq.job import LaneShape, cache_tokens

MAX_LENGTH = 10**9  # tokens of a request; more is another column
MAX_BATCH = 100_000  # requests in flight; more is a mistake
SPARE = 0.1  # of a lane: what its class may have more than its lanes
CLASSES = 5  # of requests by length
LEAST_CHUNK_TOKENS = 64
PLANNED = 2048  # requests that a plan is made for: of more a sample of their lengths
MANY = 10  # times that lists of lengths recur, where a part of another time does not matter
MOST_LISTED = 200_000  # pairs of two lists of lengths that are looked at
WAVES = 4  # of requests in flight that such a sample has at least
DELIMITERS = ",;\t"  # of traces
MAX_TRACE_BYTES = 1 << 30  # all of it is held in memory
Length = Annotated[PositiveInt, Field(le=MAX_LENGTH)]


class MinMax(Strict):
    """Lengths spread evenly from `min` to `max`, both included."""

    min: Length
    max: Length

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
    Annotated[Length, Tag("Number")]
    | Annotated[MinMax, Tag("MinMax")]
    | Annotated[Trace, Tag("Trace")]
    | Annotated[Annotated[tuple[Length, ...], Field(min_length=1)], Tag("List")],
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
    batch: Annotated[PositiveInt, Field(le=MAX_BATCH)] | Literal["auto"] = "auto"


@dataclass(frozen=True)
class Batch:
    """Requests that run together, padded to the longest prompt.

    `requests` are positions in a list of them.
    """

    requests: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Reserve:
    """What a run has room for: the cache's lanes, and tokens of a prompt computed at once.

    `prompt_tokens`: the longest prompt; no more than that is computed at once.
    """

    lanes: tuple[LaneShape, ...]
    chunk_tokens: int
    prompt_tokens: int

    @property
    def tokens(self) -> int:
        """Of the cache, in all."""
        return cache_tokens(self.lanes)

    @property
    def rows(self) -> int:
        """Of the largest decode step."""
        return max(lane.rows for lane in self.lanes)

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(lane.tokens for lane in self.lanes)


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


def planned_lengths(workload: Workload) -> list[tuple[int, int]]:
    """(prompt tokens, new tokens) that a plan is made for: of every request, or of a sample.

    Of more than `PLANNED` requests a fixed sample stands for all: the same whatever their number,
    as long as the lengths are the same, so that ten million requests get the plan of ten thousand.
    The longest prompt and the longest output are in it, and the longest request, or one as long.
    """
    batch = 0 if workload.batch == "auto" else workload.batch
    most = max(PLANNED, WAVES * batch)
    if workload.num_requests <= most:
        return request_lengths(workload)
    lists = [x for x in (workload.prompt_tokens, workload.new_tokens) if isinstance(x, tuple)]
    period = math.lcm(*map(len, lists))  # 1 where there are none
    recurs = workload.num_requests >= MANY * period
    whole = period * max(1, most // period) if recurs else workload.num_requests
    count = min(whole, MOST_LISTED) if lists else most
    found = request_lengths(workload.model_copy(update={"num_requests": count}))
    if any(isinstance(x, MinMax) for x in (workload.prompt_tokens, workload.new_tokens)):
        longest = max(range(count), key=lambda i: sum(found[i]))
        prompts, new = zip(*found, strict=True)
        found[longest] = max(prompts), max(new)  # as of some of so many
    return _evenly(found, most)


def _evenly(lengths: list[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """`most` of them at equal distances in the order of their lengths, and the longest ones."""
    if len(lengths) <= most:
        return lengths
    order = by_length(lengths)
    longest = {
        max(order, key=lambda i: lengths[i][0]),
        max(order, key=lambda i: lengths[i][1]),
        max(order, key=lambda i: sum(lengths[i])),
    }
    chosen = longest.union(evenly_spaced(order, most - len(longest)))
    return [lengths[i] for i in sorted(chosen)]


def by_length(lengths: Sequence[tuple[int, int]]) -> list[int]:
    """The positions of requests in the order of their lengths."""
    return sorted(range(len(lengths)), key=lengths.__getitem__)


def evenly_spaced(order: Sequence[int], count: int) -> list[int]:
    """`count` of them at equal distances; where there are fewer, some more than once."""
    return [order[int((i + 0.5) * len(order) / count)] for i in range(count)]


def lanes(lengths: Sequence[tuple[int, int]], batch: int, rows: int) -> tuple[LaneShape, ...]:
    """The KV cache of `batch` requests in flight, in lanes of at most `rows`.

    Lanes are as long as the requests that are served in them: classes of at most 1, 1/2, 1/4, ...
    of the longest request, each with as many lanes as its share of all new tokens, rounded up: long
    lanes serve short requests too, but where a class lacks a part of a lane, its last requests run
    while all other lanes are empty. Requests of a class without lanes go to longer ones.
    """
    longest = max(prompt + new for prompt, new in lengths)
    sizes = [rows] * (batch // rows) + ([batch % rows] if batch % rows else [])
    shares = [0] * CLASSES
    for prompt, new in lengths:
        shares[min(CLASSES - 1, (longest // (prompt + new)).bit_length() - 1)] += new
    ends = [len(sizes) * part / sum(shares) for part in itertools.accumulate(shares)]
    ends[0] = max(1.0, ends[0])
    classes = [next(k for k, end in enumerate(ends) if i + SPARE <= end) for i in range(len(sizes))]
    tokens = [-(-longest // 2**k) for k in range(CLASSES)]
    return tuple(LaneShape(size, tokens[k]) for size, k in zip(sizes, classes, strict=True))


def lanes_for(
    lengths: Sequence[tuple[int, int]],
    planned: Sequence[LaneShape],
    batch: int,
    rows: int,
    windows: Collection[int | None] = (),
) -> tuple[LaneShape, ...]:
    """The planned lanes, or others of no more tokens where requests are longer than foreseen.

    Nor have layers with one of these `windows` more to keep. Raises `UserError` where one request
    alone needs more.
    """
    longest = max((prompt + new for prompt, new in lengths), default=0)
    if longest <= max(lane.tokens for lane in planned):
        return tuple(planned)
    reserved = {window: cache_tokens(planned, window) for window in (None, *windows)}
    if longest > reserved[None]:
        raise UserError(
            f"a request needs {longest} tokens of KV cache, but the plan reserves {reserved[None]} "
            "in all"
        )
    return lanes_within(reserved, lengths, batch, rows)


def lanes_within(
    reserved: Mapping[int | None, int],
    lengths: Sequence[tuple[int, int]],
    batch: int,
    rows: int,
) -> tuple[LaneShape, ...]:
    """Lanes of as many requests, up to `batch`, as fit into so many tokens; of one at least.

    `reserved` holds the tokens of layers with each window, None for those that keep all.
    """
    for count in range(batch, 1, -1):
        shapes = lanes(lengths, count, min(rows, count))
        if all(cache_tokens(shapes, window) <= tokens for window, tokens in reserved.items()):
            return shapes
    return lanes(lengths, 1, 1)


def chunk_tokens(lengths: Sequence[tuple[int, int]]) -> int:
    """Tokens of a prompt that are computed at once, unless a plan says otherwise.

    All of them, unless a few prompts are far longer than most.
    """
    prompts = [prompt for prompt, _ in lengths]
    usual = 2 * math.ceil(sum(prompts) / len(prompts))
    return min(max(prompts), max(LEAST_CHUNK_TOKENS, usual))


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


def _form_of(path: Path, column: str) -> tuple[str, str]:
    """Encoding and delimiter of a CSV file with this column, as spreadsheets write it or others."""
    with (gzip.open if path.suffix == ".gz" else Path.open)(path, "rb") as file:
        start: bytes = file.read(1 << 16)
    encoding = text_encoding(start)
    first = (start.decode(encoding, errors="ignore").splitlines() or [""])[0]
    found = (one for one in DELIMITERS if column in (n.strip(' "') for n in first.split(one)))
    return encoding, next(found, ",")


def _trace_column(source: Trace, folder: Path) -> list[int]:
    path = Path(source.trace)
    path = path if path.is_absolute() else folder / path
    if not path.is_file():
        raise UserError(f"{path}: no such trace file")
    if path.stat().st_size > MAX_TRACE_BYTES:
        raise UserError(f"{path}: has {path.stat().st_size >> 20} MiB; give a part of the trace")
    import pandas  # only traces need it, and it is slow to import

    try:
        encoding, delimiter = _form_of(path, source.column)
        table = pandas.read_csv(path, encoding=encoding, sep=delimiter)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable CSV file ({one_line(error)})") from None
    if source.column not in table:
        names = ", ".join(map(str, table.columns))[:120]
        raise UserError(f"{path}: no column {show_value(source.column)}; it has {names}")
    column = pandas.to_numeric(table[source.column], errors="coerce").astype(float)
    bad = column.isna() | (column < 0) | (column > MAX_LENGTH) | (column % 1 != 0)
    bad |= table[source.column].dtype == bool
    if bad.any() or column.empty:
        line = int(bad.idxmax()) + 2 if bad.any() else 1
        raise UserError(f"{path}:{line}: column '{source.column}' is not a length in tokens")
    return [max(1, int(value)) for value in column]
