"""Repairs the output of a run and its journal after any end of the run, so that they agree.

A line of the journal is a checksum (crc32 of the rest, eight hexadecimal digits), a space, the
checksum of the request's prompt, another space, and the line of the output. (Lines taken over from
an output, and those of earlier versions, have no checksum of the prompt.)

Every whole line of either file counts, each id once: a result before a failure, the first of
several results, the last of several failures. Where both files hold an id and differ, the journal
is right, as it has checksums; but a result in the output is kept where the journal has a failure.
Incomplete last lines are cut off, repeated ids dropped, whole lines that are no results moved to
another file. A file is repaired at its end or replaced in one step, so that a crash meanwhile
changes nothing. Memory holds the positions of lines, never whole files.
"""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zlib import crc32

from llmpq.prompts.result_lines import Form, Id, read_result
from llmpq.reliability.append_file import AppendFile

MAX_LINE_BYTES = 1 << 28  # a longer line is no result
CHECKSUM_BYTES = 9  # the space included


class Payload(NamedTuple):
    """The contents of a journal's line: an output's line, and the checksum of its prompt if any.

    The line of an output is a payload without a checksum.
    """

    line: bytes
    prompt: int | None = None


class LineSpan(NamedTuple):
    """The position of an output's line in a file, in bytes, and what the line says."""

    start: int
    length: int
    checksum: int
    prompt: int | None = None
    failed: bool = False
    form: Form = "llmpq"

    def is_same(self, other: "LineSpan") -> bool:
        """Whether both lines have the same bytes."""
        return (self.length, self.checksum) == (other.length, other.checksum)


@dataclass
class ScannedFile:
    """The lines that were found in a file of results."""

    lines: dict[Id, LineSpan] = field(default_factory=dict)  # one of each id
    broken: list[LineSpan] = field(default_factory=list)  # whole lines that are no results
    torn: LineSpan | None = None  # a last line that was not written to its end
    num_bad: int = 0  # both, and lines of zeros
    first_bad: int = 0  # the line number of the first of these
    num_repeated: int = 0
    num_replaced: int = 0  # failures before a later line of the same id
    end: int = 0  # behind the last good line
    is_in_order: bool = True  # up to `end` there are good lines alone
    lacks_break: bool = False  # the last good line has no line feed


def frame(payload: Payload) -> bytes:
    """The journal's line for a payload."""
    line, prompt = payload
    rest = line if prompt is None else b"%08x %s" % (prompt, line)
    return b"%08x %s\n" % (crc32(rest), rest)


def unframe(record: bytes) -> Payload | None:
    """The payload of a journal's line; None where the checksum does not match."""
    rest = record.removesuffix(b"\n")[CHECKSUM_BYTES:]
    if record[:CHECKSUM_BYTES] != b"%08x " % crc32(rest):
        return None
    if rest[:1] == b"{" or not rest:
        return Payload(rest)
    try:
        return Payload(rest[CHECKSUM_BYTES:], int(rest[:8], 16))
    except ValueError:
        return None


def output_payload(record: bytes) -> Payload:
    """The payload of an output's line."""
    return Payload(record.rstrip())


def scan(
    file: BinaryIO, payload_of: Callable[[bytes], Payload | None], start: int = 0
) -> ScannedFile:
    """Reads the lines from `start` on, and sorts them into results and others."""
    found, is_spoilt, offset = ScannedFile(end=start), False, start
    file.seek(start)
    lines = iter(lambda: file.readline(MAX_LINE_BYTES), b"")
    for number, record in enumerate(lines, 1):
        start, offset = offset, offset + len(record)
        payload = payload_of(record)
        if payload is not None and not payload.line:
            continue
        parsed = None if payload is None else read_result(payload.line)
        if payload is None or parsed is None:
            _note_broken(found, number, start, record)
        elif (known := found.lines.get(parsed.id)) is not None and not known.failed:
            found.num_repeated += 1
        else:
            found.num_replaced += known is not None
            line, position = payload.line, start + record.index(payload.line)
            found.lines[parsed.id] = LineSpan(
                position, len(line), crc32(line), payload.prompt, parsed.failed, parsed.form
            )
            found.is_in_order, found.lacks_break = not is_spoilt, not record.endswith(b"\n")
            found.end = position + len(line) if found.lacks_break else offset
            continue
        is_spoilt = True
    return found


def _note_broken(found: ScannedFile, number: int, start: int, record: bytes) -> None:
    found.num_bad += 1
    found.first_bad = found.first_bad or number
    span = LineSpan(start, len(record.rstrip(b"\0\r\n")), 0)
    if not (record.endswith(b"\n") or len(record) == MAX_LINE_BYTES):
        found.torn = span
    elif span.length:  # zeros are what a crash leaves of a line
        found.broken.append(span)


def fetch(file: BinaryIO, span: LineSpan) -> bytes:
    """Reads the bytes of a line."""
    file.seek(span.start)
    return file.read(span.length)


@dataclass
class ResultRepair:
    """Makes an output and its journal agree; reads from handles whose files do not change.

    `known` holds the ids that the prompts have; None accepts every id. With `retries`, failed
    requests are done again, so that the output has no line of them; the journal keeps why they
    failed.
    """

    logged: ScannedFile
    shown: ScannedFile
    journal_file: BinaryIO
    output_file: BinaryIO
    known: Container[Id] | None = None
    retries: bool = False

    def __post_init__(self) -> None:
        logged, shown = self.logged.lines, self.shown.lines
        every = [*shown, *(name for name in logged if name not in shown)]
        known = self.known
        self.unknown = [] if known is None else [name for name in every if name not in known]
        unknown = set(self.unknown)
        self.ids = [name for name in every if name not in unknown]
        self.failed = {name for name in self.ids if self.span(name).failed}
        self.kept = [n for n in self.ids if not (self.retries and n in self.failed)]
        self.restored = [name for name in self.kept if name not in shown]
        self.unlogged = [name for name in self.ids if not self._is_logged(name)]
        self.differing = [
            name
            for name in self.kept
            if name in shown and name in logged and not shown[name].is_same(self.span(name))
        ]

    def span(self, name: Id) -> LineSpan:
        """The position of the line that counts, in the file that `_is_logged` selects."""
        return (self.logged if self._is_logged(name) else self.shown).lines[name]

    def line(self, name: Id) -> bytes:
        """The line that counts."""
        file = self.journal_file if self._is_logged(name) else self.output_file
        return fetch(file, self.span(name))

    def repair_journal(self, journal: AppendFile, header: bytes, keeps_header: bool) -> None:
        """Adds lines that only the output has; drops broken lines and those of unknown ids."""
        has_unknown = any(name in self.logged.lines for name in self.unknown)
        if keeps_header and self.logged.is_in_order and not has_unknown:
            _repair_end(journal, self.logged, map(self._record, self.unlogged))
            return
        if keeps_header:
            self.journal_file.seek(0)
            first = unframe(self.journal_file.readline())
            header = header if first is None else first.line
        journal.rewrite(chain([frame(Payload(header))], map(self._record, self.ids)))

    def repair_output(self, output: AppendFile) -> None:
        """Adds lines that only the journal has; drops broken, repeated and differing lines."""
        drops = self.shown.num_replaced or len(self.kept) < len(self.restored) + len(
            self.shown.lines
        )
        if self.shown.is_in_order and not drops and not self.differing:
            _repair_end(output, self.shown, (self.line(name) + b"\n" for name in self.restored))
        else:
            output.rewrite(self.line(name) + b"\n" for name in self.kept)

    def notes(self, output: Path, journal: Path) -> list[str]:
        """Says what was repaired, for the user."""
        repeated = self.shown.num_repeated + self.shown.num_replaced
        counts = {
            f"{journal}: torn or damaged lines dropped": self.logged.num_bad,
            f"{output}: torn or damaged lines dropped": self.shown.num_bad,
            f"{output}: lines that differed from the journal corrected": len(self.differing),
            f"{output}: repeated lines of the same id dropped": repeated,
            f"{output}: finished requests restored from the journal": len(self.restored),
            f"{journal}: finished requests taken over from the output": len(self.unlogged),
        }
        return [f"{what}: {count}" for what, count in counts.items() if count]

    def _is_logged(self, name: Id) -> bool:
        """Whether the journal's line counts."""
        logged, shown = self.logged.lines.get(name), self.shown.lines.get(name)
        return logged is not None and (shown is None or shown.failed or not logged.failed)

    def _record(self, name: Id) -> bytes:
        return frame(Payload(self.line(name), self.span(name).prompt))


def _repair_end(file: AppendFile, found: ScannedFile, missing: Iterable[bytes]) -> None:
    file.cut(found.end)
    if found.lacks_break:
        file.append(b"\n")
    for record in missing:
        file.append(record)
