"""Streams rows of tables and arrays of requests: CSV, JSON arrays, Parquet.

Columns are matched by name, in upper or lower case; a cell becomes the value of the key of that
name. An empty cell is no value. Cells of CSV are texts: those of keys that take numbers or lists
are parsed as JSON.
"""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from llmpq.errors import UserError, one_line
from llmpq.prompts.own_settings import SETTINGS

PROMPT_COLUMNS = ("prompt", "text", "messages", "prompt_token_ids")
ID_COLUMNS = ("id", "custom_id")
JSON_COLUMNS = (
    *("messages", "prompt_token_ids"),
    *("max_new_tokens", "max_tokens", "max_completion_tokens"),
    *SETTINGS,
)
COLUMNS = (*ID_COLUMNS, "prompt", "text", *JSON_COLUMNS)
DELIMITERS = ",;\t"
MAX_CELL = 1 << 26  # characters
READ_CHARACTERS = 1 << 20  # characters read at once
EXPECTED = "a request must be a string or an object"


class PromptRow(NamedTuple):
    """The keys of a request, or the fault of a row. `number`: its line, or its row in Parquet."""

    number: int
    data: dict[str, object]
    fault: str | None = None


# ---- CSV


def csv_columns(head: str, path: Path) -> str | None:
    """The delimiter of a text whose first line names a column of prompts; None for other texts.

    Raises `UserError` where the file's name says CSV and there is no such column.
    """
    first = head.splitlines()[0] if head else ""
    for delimiter in DELIMITERS:
        if set(PROMPT_COLUMNS) & set(_names(next(csv.reader([first], delimiter=delimiter), []))):
            return delimiter
    if path.suffix.lower() in (".csv", ".tsv"):
        raise UserError(
            f"{path}:1: has no column 'prompt' or 'text'; its first line is {first[:80]!r}"
        )
    return None


def csv_rows(file: TextIO, path: Path, delimiter: str) -> Iterator[PromptRow]:
    """Rows of a table whose first line names its columns."""
    with _long_cells():
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        names: list[str] = []
        end = 0
        try:
            for cells in reader:
                number, end = end + 1, reader.line_num
                if not any(cell.strip() for cell in cells):
                    continue
                if names:
                    yield _csv_row(number, names, cells)
                else:
                    names = _checked_names(_names(cells), path, number)
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not valid CSV: {one_line(error)}") from None
        except UnicodeDecodeError as error:
            where = f"{path}:{reader.line_num + 1}"
            raise UserError(f"{where} or after: not UTF-8 text ({error.reason})") from None


def _csv_row(number: int, names: list[str], cells: list[str]) -> PromptRow:
    if len(cells) != len(names):
        fault = f"has {len(cells)} cells, but the first line names {len(names)} columns"
        return PromptRow(number, {}, fault)
    data: dict[str, object] = {}
    for name, cell in zip(names, cells, strict=True):
        if name in JSON_COLUMNS and cell.strip():
            try:
                data[name] = json.loads(cell)
            except (ValueError, RecursionError):
                return PromptRow(number, {}, f"column '{name}' is not valid JSON: {cell[:60]!r}")
        elif cell.strip() or name == "prompt":
            data[name] = cell
    return PromptRow(number, data)


def _names(cells: list[str]) -> list[str]:
    """Names of columns: known ones as the name of their key, others unchanged."""
    bare = [cell.strip().lstrip("\ufeff") for cell in cells]
    return [cell.lower() if cell.lower() in COLUMNS else cell for cell in bare]


def _checked_names(names: list[str], path: Path, number: int) -> list[str]:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}:{number}: the column '{twice}' occurs twice")
    return names


@contextmanager
def _long_cells() -> Iterator[None]:
    """Raises the csv module's limit of a cell, which is small and holds for the whole process."""
    before = csv.field_size_limit(MAX_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# ---- JSON arrays


def array_rows(
    file: TextIO, path: Path, hook: Callable[[list[tuple[str, Any]]], Any]
) -> Iterator[PromptRow]:
    """The elements of one array of JSON, numbered by the lines on which they begin.

    Memory holds one element, and the characters that are read at a time.
    """
    text = _JsonStream(file, path, json.JSONDecoder(object_pairs_hook=hook))
    text.expect("[")
    if text.peek() == "]":
        text.expect("]")
    else:
        more = True
        while more:
            text.peek()
            number = text.line
            yield _array_row(number, text.value())
            more = text.expect(",", "]") == ","
    if text.peek():
        raise UserError(f"{path}:{text.line}: there is more text after the end of the array")


def _array_row(number: int, value: object) -> PromptRow:
    if isinstance(value, str):
        return PromptRow(number, {"prompt": value})
    if isinstance(value, dict):
        return PromptRow(number, value)
    return PromptRow(number, {}, EXPECTED)


class _JsonStream:
    """A stream of JSON, which is read no further than necessary."""

    def __init__(self, file: TextIO, path: Path, decoder: json.JSONDecoder) -> None:
        self._file, self._path, self._decoder = file, path, decoder
        self._rest, self._at = "", 0
        self.line = 1

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._rest):
                found = self._rest[self._at]
                if found not in " \t\r\n":
                    return found
                self.line += found == "\n"
                self._at += 1
            if not self._more():
                return ""

    def expect(self, *wanted: str) -> str:
        """Consumes one of these characters, and returns it."""
        found = self.peek()
        if found not in wanted or not found:
            what = " or ".join(map(repr, wanted))
            raise self._fault(f"expected {what}, found {found or 'the end of the file'}")
        self._at += 1
        return found

    def value(self) -> Any:
        """Consumes a value of JSON, and returns it."""
        while True:
            try:
                found, end = self._decoder.raw_decode(self._rest, self._at)
            except RecursionError:
                raise self._fault("nested too deeply") from None
            except json.JSONDecodeError as error:
                if len(self._rest) - self._at <= MAX_CELL and self._more():
                    continue
                self.line += self._rest.count("\n", self._at, error.pos)
                raise self._fault(error.msg) from None
            except ValueError as error:
                raise self._fault(str(error)) from None
            if end < len(self._rest) or not self._more():
                self.line += self._rest.count("\n", self._at, end)
                self._at = end
                return found

    def _more(self) -> bool:
        """Reads more characters, twice as many each time that one value needs more."""
        held = len(self._rest) - self._at
        try:
            new = self._file.read(max(READ_CHARACTERS, held))
        except UnicodeDecodeError as error:
            raise self._fault(f"not UTF-8 text ({error.reason})") from None
        self._rest, self._at = self._rest[self._at :] + new, 0
        return bool(new)

    def _fault(self, what: str) -> UserError:
        return UserError(f"{self._path}:{self.line}: not a valid JSON array: {what}")


# ---- Parquet


def parquet_rows(path: Path) -> Iterator[PromptRow]:
    """Rows of a Parquet file; only known columns are read."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(
            f"{path}: is a Parquet file, which needs pyarrow (pip install pyarrow); or save it as "
            "JSON lines: pandas.read_parquet(...).to_json(..., orient='records', lines=True)"
        ) from None
    try:
        file = ParquetFile(path)
        held = file.schema_arrow.names
        columns = [name for name in held if name.lower() in COLUMNS]
        if not set(PROMPT_COLUMNS) & {name.lower() for name in columns}:
            raise UserError(f"{path}: has no column 'prompt' or 'text'; it has {', '.join(held)}")
        rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield PromptRow(number, {k.lower(): v for k, v in row.items() if v is not None})
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({one_line(error)})") from None
