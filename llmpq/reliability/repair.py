"""What an output and its journal hold after any end of a run, and how they are made to agree.

A journal's line is a checksum (crc32 of the rest, eight hexadecimal digits), a space, the checksum
of the request's prompt, another space, and the very line of the output. (Lines taken over from an
output have no prompt's checksum, nor have those of earlier versions.)

Every whole line of either file counts, each id once: a result before a failure, the first of
several results, the last of several failures. Where both files hold an id and differ, the journal
is right, as it has checksums; but a result in the output is kept where the journal has a failure.
Torn ends are cut off, repeated ids dropped, whole lines that are no results put aside. A file is
mended at its end or replaced in one step, so that a crash meanwhile changes nothing. Neither file
is ever held in memory, only where its lines lie.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zlib import crc32

from llmpq.prompts.result_lines import Form, Id, read_result
from llmpq.reliability.append_file import AppendFile

MAX_LINE_BYTES = 1 << 28  # what is longer is no result
CHECKSUM_BYTES = 9  # the space included


class Payload(NamedTuple):
    """What a journal's line holds: an output's line, and its prompt's checksum where there is one.

    The line of an output is a payload without a checksum.
    """

    line: bytes
    prompt: int | None = None


class LineSpan(NamedTuple):
    """Where an output's line lies in a file, in bytes, and what it says."""

    start: int
    length: int
    checksum: int
    prompt: int | None = None
    failed: bool = False
    form: Form = "llmpq"

    def is_same(self, other: "LineSpan") -> bool:
        """Whether both are the same bytes."""
        return (self.length, self.checksum) == (other.length, other.checksum)


@dataclass
class Found:
    """What a file of results holds."""

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
    """A journal's line."""
    line, prompt = payload
    rest = line if prompt is None else b"%08x %s" % (prompt, line)
    return b"%08x %s\n" % (crc32(rest), rest)


def unframe(record: bytes) -> Payload | None:
    """What a journal's line holds; None where its checksum is another one."""
    rest = record.removesuffix(b"\n")[CHECKSUM_BYTES:]
    if record[:CHECKSUM_BYTES] != b"%08x " % crc32(rest):
        return None
    if rest[:1] == b"{" or not rest:
        return Payload(rest)
    try:
        return Payload(rest[CHECKSUM_BYTES:], int(rest[:8], 16))
    except ValueError:
        return None


def bare(record: bytes) -> Payload:
    """What an output's line holds."""
    return Payload(record.rstrip())


def scan(file: BinaryIO, payload_of: Callable[[bytes], Payload | None], start: int = 0) -> Found:
    """Sorts the lines from `start` on into good ones and others."""
    found, is_spoilt, offset = Found(end=start), False, start
    file.seek(start)
    lines = iter(lambda: file.readline(MAX_LINE_BYTES), b"")
    for number, record in enumerate(lines, 1):
        start, offset = offset, offset + len(record)
        payload = payload_of(record)
        if payload is not None and not payload.line:
            continue
        told = None if payload is None else read_result(payload.line)
        if payload is None or told is None:
            _note_broken(found, number, start, record)
        elif (known := found.lines.get(told.id)) is not None and not known.failed:
            found.num_repeated += 1
        else:
            found.num_replaced += known is not None
            line, place = payload.line, start + record.index(payload.line)
            found.lines[told.id] = LineSpan(
                place, len(line), crc32(line), payload.prompt, told.failed, told.form
            )
            found.is_in_order, found.lacks_break = not is_spoilt, not record.endswith(b"\n")
            found.end = place + len(line) if found.lacks_break else offset
            continue
        is_spoilt = True
    return found


def _note_broken(found: Found, number: int, start: int, record: bytes) -> None:
    found.num_bad += 1
    found.first_bad = found.first_bad or number
    span = LineSpan(start, len(record.rstrip(b"\0\r\n")), 0)
    if not (record.endswith(b"\n") or len(record) == MAX_LINE_BYTES):
        found.torn = span
    elif span.length:  # zeros are what a crash leaves of a line
        found.broken.append(span)


def fetch(file: BinaryIO, span: LineSpan) -> bytes:
    """The bytes of a line."""
    file.seek(span.start)
    return file.read(span.length)


@dataclass
class ResultRepair:
    """Makes two files of results agree; reads from handles that stay as they were.

    `known`: the ids that the prompts have; None: whatever is there. `retries`: failed requests are
    to be done again, so that the output has no line of them; the journal keeps why they failed.
    """

    logged: Found
    shown: Found
    journal_file: BinaryIO
    output_file: BinaryIO
    known: Container[Id] | None = None
    retries: bool = False

    def __post_init__(self) -> None:
        logged, shown = self.logged.lines, self.shown.lines
        every = [*shown, *(name for name in logged if name not in shown)]
        self.strangers = [name for name in every if not self._is_known(name)]
        strangers = set(self.strangers)
        self.ids = [name for name in every if name not in strangers]
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
        """Where the line lies that counts, in the file that `_is_logged` says."""
        return (self.logged if self._is_logged(name) else self.shown).lines[name]

    def line(self, name: Id) -> bytes:
        """The line that counts."""
        file = self.journal_file if self._is_logged(name) else self.output_file
        return fetch(file, self.span(name))

    def mend_journal(self, journal: AppendFile, header: bytes, keeps_header: bool) -> None:
        """Adds what only the output has; drops what is broken or of no prompt."""
        has_strangers = any(name in self.logged.lines for name in self.strangers)
        if keeps_header and self.logged.is_in_order and not has_strangers:
            _mend_end(journal, self.logged, map(self._record, self.unlogged))
            return
        if keeps_header:
            self.journal_file.seek(0)
            first = unframe(self.journal_file.readline())
            header = header if first is None else first.line
        journal.rewrite(_chain(frame(Payload(header)), map(self._record, self.ids)))

    def mend_output(self, output: AppendFile) -> None:
        """Adds what only the journal has; drops what is broken, repeated or differs from it."""
        drops = self.shown.num_replaced or len(self.kept) < len(self.restored) + len(
            self.shown.lines
        )
        if self.shown.is_in_order and not drops and not self.differing:
            _mend_end(output, self.shown, (self.line(name) + b"\n" for name in self.restored))
        else:
            output.rewrite(self.line(name) + b"\n" for name in self.kept)

    def notes(self, output: Path, journal: Path) -> list[str]:
        """What was mended, for the user."""
        repeated = self.shown.num_repeated + self.shown.num_replaced
        counts = {
            f"{journal}: torn or damaged lines dropped": self.logged.num_bad,
            f"{output}: torn or damaged lines dropped": self.shown.num_bad,
            f"{output}: lines that differed from the journal put right": len(self.differing),
            f"{output}: lines with an id that was there before dropped": repeated,
            f"{output}: finished requests restored from the journal": len(self.restored),
            f"{journal}: finished requests taken over from the output": len(self.unlogged),
        }
        return [f"{what}: {count}" for what, count in counts.items() if count]

    def _is_known(self, name: Id) -> bool:
        return self.known is None or name in self.known

    def _is_logged(self, name: Id) -> bool:
        """Whether the journal's line counts."""
        logged, shown = self.logged.lines.get(name), self.shown.lines.get(name)
        return logged is not None and (shown is None or shown.failed or not logged.failed)

    def _record(self, name: Id) -> bytes:
        return frame(Payload(self.line(name), self.span(name).prompt))


def _mend_end(file: AppendFile, found: Found, missing: Iterable[bytes]) -> None:
    file.cut(found.end)
    if found.lacks_break:
        file.append(b"\n")
    for record in missing:
        file.append(record)


def _chain(first: bytes, others: Iterable[bytes]) -> Iterator[bytes]:
    yield first
    yield from others
