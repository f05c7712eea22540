"""Reads a file of requests of any form as lines of JSON; its contents tell the form, not its name.

JSON lines are read where they are. Other forms are first turned into JSON lines, in a temporary
file without a name: files packed by gzip, bzip2 or xz; UTF-16 and UTF-32 with a byte-order mark, as
Windows writes them; CSV with a column "prompt" or "text" (commas, semicolons or tabs); JSON arrays;
Parquet, where pyarrow is installed. The error for a form that cannot be read names the form and
what to do. Messages name the line, or the row, of the user's own file.

Rows of tables and arrays without ids are numbered from 1, and a note says so. Byte-order marks are
skipped, also between the parts of files that were joined.

Not covered: what a line means (`prompt_rules`).
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llmpq.artifact import no_repeated_keys, read_text, refuse_unless_regular, text_encoding
from llmpq.errors import UserError, one_line
from llmpq.prompts.prompt_tables import PromptRow, array_rows, csv_columns, csv_rows, parquet_rows

MAX_LINE_BYTES = 1 << 26  # a longer line is no prompt, and would have to fit in memory
HEAD_BYTES = 1 << 16
UTF8 = "utf-8-sig"  # with a mark or without

Unpack = Callable[[Path], Any]  # opens a file and gives its bytes, unpacked

# First bytes of packed files that can be read, and of files that cannot be read.
PACKED: dict[bytes, Unpack] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
UNREADABLE = {
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; decompress it first: zstd -d FILE",
    b"PK\x03\x04": "is a zip archive or a workbook; unpack it, or save the sheet as CSV in UTF-8",
    b"\xd0\xcf\x11\xe0": "is an old Excel workbook; save the sheet as CSV in UTF-8",
    b"ARROW1": "is an Arrow file; save it as JSON lines or Parquet",
    b"%PDF": "is a PDF; requests are JSON lines",
}
PARQUET = b"PAR1"


class Line(NamedTuple):
    """A line of JSON without its break, its number in the user's file, and its byte offset."""

    number: int
    offset: int
    text: bytes


class PromptSource:
    """Reads the lines of a file that holds JSON lines."""

    kind = "JSON lines"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self.faults: list[tuple[int, str]] = []  # of rows that are no requests: line and reason

    def lines(self) -> Iterator[Line]:
        """All lines that are not blank. Raises `UserError` for a file that cannot be read."""
        with reading(self.path), self.path.open("rb") as file:
            yield from _lines(self.path, file)

    def read(self, offset: int) -> bytes:
        """The line at this offset, as the file is now."""
        with reading(self.path), self.path.open("rb") as file:
            return _read_at(file, offset)


class ConvertedSource(PromptSource):
    """Reads the lines of a file of another form, converted to JSON lines."""

    def __init__(self, path: Path, kind: str, lines: Iterator[tuple[int, bytes]]) -> None:
        super().__init__(path)
        self.kind = kind
        self._numbers = array("Q")
        with _writing(path):
            self._file = tempfile.TemporaryFile(prefix="llmpq-")  # noqa: SIM115
            for number, line in lines:
                self._numbers.append(number)
                self._file.write(line + b"\n")
            self._file.flush()

    def lines(self) -> Iterator[Line]:
        """All requests, numbered as in the user's file."""
        self._file.seek(0)
        for number, line in zip(self._numbers, _lines(self.path, self._file), strict=True):
            yield line._replace(number=number)

    def read(self, offset: int) -> bytes:
        """The line at this offset."""
        return _read_at(self._file, offset)


def open_source(path: Path) -> PromptSource:
    """The requests of a file. Raises `UserError` where its form cannot be read."""
    with reading(path):
        refuse_unless_regular(path)
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    for magic, what in UNREADABLE.items():
        if head.startswith(magic):
            raise UserError(f"{path}: {what}")
    if head.startswith(PARQUET):
        return _from_rows(path, "Parquet", lambda: parquet_rows(path))
    unpack = next((unpack for magic, unpack in PACKED.items() if head.startswith(magic)), _plain)
    return _from_text(path, unpack)


def _plain(path: Path) -> BinaryIO:
    return path.open("rb")


def _from_text(path: Path, unpack: Unpack) -> PromptSource:
    """The source of a text file, which may be packed and in another encoding."""
    with reading(path), unpack(path) as file:
        head = file.read(HEAD_BYTES)
    file_text = _TextFile(path, unpack, text_encoding(head))
    start = head.decode(file_text.encoding, errors="ignore").lstrip("\ufeff \t\r\n")
    if start.startswith("["):
        return _from_rows(path, "a JSON array", lambda: _array(file_text))
    delimiter = None if start.startswith("{") else csv_columns(start, path)
    if delimiter is not None:
        return _from_rows(path, "CSV", lambda: _table(file_text, delimiter))
    if unpack is _plain and file_text.encoding == UTF8:
        if start.startswith("{"):
            _refuse_one_object(path, start)
        return PromptSource(path)
    return ConvertedSource(path, "JSON lines", file_text.lines())


def _refuse_one_object(path: Path, start: str) -> None:
    """Raises `UserError` for a file that is one object over several lines, which is no request."""
    first, _, rest = start.partition("\n")
    if not rest.strip() or _is_json(first) or path.stat().st_size > MAX_LINE_BYTES:
        return
    if _is_json(read_text(path)):
        raise UserError(
            f"{path}: is one JSON object over several lines; put each request on a line of its "
            "own, or all of them into an array: [{...}, {...}]"
        )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
        return True
    except (ValueError, RecursionError):
        return False


def _from_rows(path: Path, kind: str, rows: Callable[[], Iterator[PromptRow]]) -> PromptSource:
    """The source of a table or an array, whose rows become lines."""
    faults: list[tuple[int, str]] = []
    notes: list[str] = []
    source = ConvertedSource(path, kind, _numbered(rows(), faults, notes))
    source.faults, source.notes = faults, [f"{path}: read as {kind}", *notes]
    return source


def _numbered(
    rows: Iterator[PromptRow], faults: list[tuple[int, str]], notes: list[str]
) -> Iterator[tuple[int, bytes]]:
    """Rows as lines of JSON; where no row has an id, each gets its number."""
    first = next(rows, None)
    if first is None:
        return
    lacks_ids = first.fault is None and not {"id", "custom_id"} & first.data.keys()
    if lacks_ids:
        notes.append("its rows have no 'id' and are numbered from 1")
    for count, row in enumerate(chain([first], rows), 1):
        fault, data = row.fault, row.data
        if fault is None and lacks_ids:
            if {"id", "custom_id"} & data.keys():
                fault = "has an 'id', which the first row does not have"
            data = {"id": count} | data
        if fault is not None:
            faults.append((row.number, fault))
        else:
            yield row.number, json.dumps(data).encode()


def _lines(path: Path, file: BinaryIO) -> Iterator[Line]:
    """The lines of a file; only line feeds end a line, as texts may hold other breaks."""
    offset = 0
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
        if len(line) == MAX_LINE_BYTES:
            raise UserError(
                f"{path}:{number}: more than {MAX_LINE_BYTES >> 20} MiB without a line "
                "break; prompts.jsonl has one request per line"
            )
        text = _bare(line)
        if text.strip():
            yield Line(number, offset, text)
        offset += len(line)


def _read_at(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return _bare(file.readline(MAX_LINE_BYTES))


def _bare(line: bytes) -> bytes:
    return line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")


@dataclass(frozen=True)
class _TextFile:
    """A text file, how it is unpacked, and its encoding."""

    path: Path
    unpack: Unpack
    encoding: str

    @contextmanager
    def decoded(self, newline: str = "") -> Iterator[io.TextIOWrapper]:
        """Opens the text from its beginning; line breaks are kept."""
        with reading(self.path), self.unpack(self.path) as file:
            yield io.TextIOWrapper(file, encoding=self.encoding, newline=newline)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """The lines in UTF-8, with their numbers."""
        if self.encoding == UTF8:  # unchanged, so that a fault of the encoding is one of its line
            with reading(self.path), self.unpack(self.path) as file:
                for line in _lines(self.path, file):
                    yield line.number, line.text
            return
        with self.decoded(newline="\n") as text:
            for number, one in enumerate(text, 1):
                if one.strip("\ufeff \t\r\n"):
                    yield number, one.strip("\ufeff\r\n").encode(errors="surrogatepass")


def _array(text: _TextFile) -> Iterator[PromptRow]:
    with text.decoded() as file:
        yield from array_rows(file, text.path, no_repeated_keys)


def _table(text: _TextFile, delimiter: str) -> Iterator[PromptRow]:
    with text.decoded() as file:
        yield from csv_rows(file, text.path, delimiter)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns errors of reading a file into a `UserError`."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: compressed, but incomplete ({one_line(error)})") from None
    except UnicodeError as error:
        raise UserError(f"{path}: not valid text ({one_line(error)})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be converted to JSON lines in {tempfile.gettempdir()} "
            f"({error.strerror}); set TMPDIR to use another folder"
        ) from None
