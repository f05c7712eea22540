"""Finished requests, kept whatever happens: out.jsonl and, beside it, out.jsonl.journal.

A journal's line is a checksum (crc32 of the rest, eight hexadecimal digits), a space and JSON: a
header that says what ran, then the very lines of the output. Each request is first written to the
journal and then to the output, and both have reached the operating system before it counts as
finished. So a kill loses nothing: at worst a request is in the journal alone, and resuming adds
its line to the output. Before a machine crash, only what was synced to the disk is safe; only the
journal is synced while the run goes on, because the output can be made from it: after every
request ("always"), every second ("interval") or when the system likes ("never").

Resuming takes every whole line of either file, each id once. Where both hold an id and differ, the
journal is right: it has checksums. Torn ends are cut off, repeated ids dropped, whole lines of the
output that are no results moved to out.jsonl.broken. A file is mended at its end or replaced in
one step, so that a crash meanwhile changes nothing. Neither file is ever held in memory.

Not covered: two runs on one output where the file system has no locks.
"""

import json
import os
import reprlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args
from zlib import crc32

from llmpq.errors import UserError, WorkerError
from llmpq.runtime.append_file import AppendFile
from llmpq.runtime.request import Finished, Reason

Id = str | int
Fsync = Literal["always", "interval", "never"]

SYNC_EVERY_S = 1.0
MAX_LINE_BYTES = 1 << 28  # what is longer is no result
CHECKSUM_BYTES = 9  # the space included
LINE_START = b'{"id": '


class Results:
    """The results of a run; writing goes on where an earlier run ended, or starts anew.

    `finished` has the ids that need no more work; `notes` says what was found and mended.
    Starting anew, earlier results are kept under names that end in ".old".

    Raises `UserError` for an output that another run writes to, that is no output of llmpq-run,
    or that holds results of another model; `WorkerError` where the disk fails or is full.
    """

    def __init__(self, output: Path, resume: bool, fsync: Fsync, run: dict[str, object]) -> None:
        self.notes: list[str] = []
        self.finished: set[Id] = set()
        self._path = _real_path(output)
        self._fsync = fsync
        self._output = AppendFile(self._path)
        self._journal: Journal | None = None
        try:
            self._journal = Journal(_beside(self._path, ".journal"), fsync)
            header = _json_bytes({"journal": 1, "run": run})
            (self._take_up if resume else self._start_anew)(self._journal.file, header)
            if fsync != "never":
                self._journal.file.sync()
                self._journal.file.sync_name()
        except BaseException:
            self.close()
            raise

    def write(self, finished: Finished, text: str) -> None:
        """One more finished request, safe from kills when this returns."""
        assert self._journal is not None and finished.request.id not in self.finished
        line = _result_line(finished, text)
        self._journal.record(line)
        self._output.append(line + b"\n")
        self.finished.add(finished.request.id)

    def close(self) -> None:
        """Everything to disk; the files may be written by others again."""
        journal, self._journal = self._journal, None
        try:
            if journal is not None:
                journal.close()
                if self._fsync != "never":
                    self._output.sync()
        finally:
            self._output.close()

    def _start_anew(self, journal: AppendFile, header: bytes) -> None:
        with journal.read() as file:
            _, start = _read_header(file)
        if self._output.size or journal.size > start:
            old = _beside(self._path, ".old")
            self._output.move(old)
            journal.move(_beside(journal.path, ".old"))
            self.notes.append(f"{self._path}: earlier results are kept as {old.name}")
        journal.cut(0)
        journal.append(_frame(header))

    def _take_up(self, journal: AppendFile, header: bytes) -> None:
        with journal.read() as journal_file, self._output.read() as output_file:
            run, start = _read_header(journal_file)
            logged = _scan(journal_file, _unframe, start)
            shown = _scan(output_file, bytes.rstrip)
            _refuse_other_files(self._path, shown, output_file, run is None and not logged.lines)
            if logged.lines or shown.lines:
                self._compare_runs(run, json.loads(header)["run"])
            else:
                run = None  # nothing was done yet, so this is the run that is done
            mending = _Mending(logged, shown, journal_file, output_file)
            self._save_broken(shown, output_file)
            mending.mend_journal(journal, header, keeps_header=run is not None)
            mending.mend_output(self._output)
        self.finished = set(mending.ids)
        self.notes += mending.notes(self._path, journal.path)

    def _compare_runs(self, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
        """Refuses to mix two models' results; notes other differences."""
        if before is None:
            self.notes.append(f"{self._path}: nothing says which settings its results are of")
            return
        if before.get("model") != now.get("model"):
            raise UserError(
                f"{self._path}: its results are of model {_show(before.get('model'))}, not of "
                f"{_show(now.get('model'))}; give another --output"
            )
        differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differing:
            changes = ", ".join(
                f"{_show(name)} was {_show(before.get(name))}, is {_show(now.get(name))}"
                for name in differing
            )
            self.notes.append(f"{self._path}: finished requests had other settings: {changes}")

    def _save_broken(self, shown: "_Found", file: BinaryIO) -> None:
        if not shown.broken:
            return
        target = AppendFile(_beside(self._path, ".broken"))
        try:
            for span in shown.broken:
                target.append(_fetch(file, span) + b"\n")
            target.sync()
        finally:
            target.close()
        self.notes.append(
            f"{self._path}: lines that are no results put into {target.path.name}: "
            f"{len(shown.broken)}"
        )


class Journal:
    """Lines with checksums, synced to the disk by the policy `fsync`."""

    def __init__(self, path: Path, fsync: Fsync) -> None:
        self.file = AppendFile(path)
        self._fsync = fsync
        self._unsynced = False
        self._failure: WorkerError | None = None
        self._ended = threading.Event()
        self._syncing: threading.Thread | None = None

    def record(self, line: bytes) -> None:
        """One more line. Raises `WorkerError` where this, or an earlier sync, failed."""
        if self._failure is not None:
            raise self._failure
        self.file.append(_frame(line))
        self._unsynced = True
        if self._fsync == "always":
            self.file.sync()
        elif self._fsync == "interval" and self._syncing is None:
            self._syncing = threading.Thread(target=self._sync_regularly, daemon=True)
            self._syncing.start()

    def close(self) -> None:
        """Syncs what is not yet synced."""
        self._ended.set()
        try:
            if self._syncing is not None:
                self._syncing.join()
            if self._fsync != "never":
                self.file.sync()
        finally:
            self.file.close()

    def _sync_regularly(self) -> None:
        while not self._ended.wait(SYNC_EVERY_S):
            if not self._unsynced:
                continue
            self._unsynced = False
            try:
                self.file.sync()
            except WorkerError as error:
                self._failure = error  # raised by the next record: nobody listens here
                return


class _Span(NamedTuple):
    """Where a line's JSON lies in a file, in bytes, and its checksum."""

    start: int
    length: int
    checksum: int


@dataclass
class _Found:
    """What a file of results holds."""

    lines: dict[Id, _Span] = field(default_factory=dict)  # the first of each id
    broken: list[_Span] = field(default_factory=list)  # whole lines that are no results
    torn: _Span | None = None  # a last line that was not written to its end
    num_bad: int = 0  # both, and lines of zeros
    first_bad: int = 0  # the line number of the first of these
    num_repeated: int = 0
    end: int = 0  # behind the last good line
    is_in_order: bool = True  # up to `end` there are good lines alone
    lacks_break: bool = False  # the last good line has no line feed


def _scan(file: BinaryIO, payload_of: Callable[[bytes], bytes | None], start: int = 0) -> _Found:
    """Sorts the lines from `start` on into good ones and others."""
    found, is_spoilt, offset = _Found(end=start), False, start
    file.seek(start)
    lines = iter(lambda: file.readline(MAX_LINE_BYTES), b"")
    for number, line in enumerate(lines, 1):
        start, offset = offset, offset + len(line)
        payload = payload_of(line)
        if payload is not None and not payload:
            continue
        name = None if payload is None else _result_id(payload)
        if payload is None or name is None:
            _note_broken(found, number, start, line)
        elif name in found.lines:
            found.num_repeated += 1
        else:
            begin = start + line.index(payload)
            found.lines[name] = _Span(begin, len(payload), crc32(payload))
            found.end, found.is_in_order = offset, not is_spoilt
            found.lacks_break = not line.endswith(b"\n")
            continue
        is_spoilt = True
    return found


def _note_broken(found: _Found, number: int, start: int, line: bytes) -> None:
    found.num_bad += 1
    found.first_bad = found.first_bad or number
    span = _Span(start, len(line.rstrip(b"\0\r\n")), 0)
    if not (line.endswith(b"\n") or len(line) == MAX_LINE_BYTES):
        found.torn = span
    elif span.length:  # zeros are what a crash leaves of a line
        found.broken.append(span)


@dataclass
class _Mending:
    """Makes two files of results agree; reads from handles that stay as they were."""

    logged: _Found
    shown: _Found
    journal_file: BinaryIO
    output_file: BinaryIO

    def __post_init__(self) -> None:
        logged, shown = self.logged.lines, self.shown.lines
        self.restored = [name for name in logged if name not in shown]
        self.unlogged = [name for name in shown if name not in logged]
        self.differing = [
            name for name in shown if name in logged and shown[name][1:] != logged[name][1:]
        ]
        self.ids = [*shown, *self.restored]

    def mend_journal(self, journal: AppendFile, header: bytes, keeps_header: bool) -> None:
        """Adds what only the output has; drops what is broken."""
        if keeps_header and self.logged.is_in_order:
            _mend_end(journal, self.logged, map(_frame, map(self._line, self.unlogged)))
            return
        if keeps_header:
            self.journal_file.seek(0)
            header = _unframe(self.journal_file.readline()) or header
        lines = map(self._line, [*self.logged.lines, *self.unlogged])
        journal.rewrite(map(_frame, _chain(header, lines)))

    def mend_output(self, output: AppendFile) -> None:
        """Adds what only the journal has; drops what is broken, repeated or differs from it."""
        if self.shown.is_in_order and not self.differing:
            _mend_end(output, self.shown, (self._line(name) + b"\n" for name in self.restored))
        else:
            output.rewrite(self._line(name) + b"\n" for name in self.ids)

    def notes(self, output: Path, journal: Path) -> list[str]:
        """What was mended, for the user."""
        counts = {
            f"{journal}: torn or damaged lines dropped": self.logged.num_bad,
            f"{output}: torn or damaged lines dropped": self.shown.num_bad,
            f"{output}: lines that differed from the journal put right": len(self.differing),
            f"{output}: lines with an id that was there before dropped": self.shown.num_repeated,
            f"{output}: finished requests restored from the journal": len(self.restored),
            f"{journal}: finished requests taken over from the output": len(self.unlogged),
        }
        return [f"{what}: {count}" for what, count in counts.items() if count]

    def _line(self, name: Id) -> bytes:
        if name in self.logged.lines:
            return _fetch(self.journal_file, self.logged.lines[name])
        return _fetch(self.output_file, self.shown.lines[name])


def _mend_end(file: AppendFile, found: _Found, missing: Iterable[bytes]) -> None:
    file.cut(found.end)
    if found.lacks_break:
        file.append(b"\n")
    for record in missing:
        file.append(record)


def _chain(first: bytes, others: Iterable[bytes]) -> Iterator[bytes]:
    yield first
    yield from others


def _fetch(file: BinaryIO, span: _Span) -> bytes:
    file.seek(span.start)
    return file.read(span.length)


def _read_header(file: BinaryIO) -> tuple[dict[str, Any] | None, int]:
    """What ran, and where the header ends; None and 0 where there is no whole header."""
    line = file.readline(MAX_LINE_BYTES)
    payload = _unframe(line)
    data = _parse(payload) if payload and line.endswith(b"\n") else None
    if data is None or data.get("journal") != 1 or not isinstance(data.get("run"), dict):
        return None, 0
    return data["run"], len(line)


def _refuse_other_files(path: Path, shown: _Found, file: BinaryIO, has_no_journal: bool) -> None:
    """Raises `UserError` for a file without a single result that no run of ours was writing."""
    if shown.lines or not has_no_journal:
        return
    torn = _fetch(file, shown.torn) if shown.torn else b""
    if shown.broken or torn[: len(LINE_START)] != LINE_START[: len(torn)]:
        raise UserError(
            f"{path}:{shown.first_bad}: not a result of llmpq-run, "
            "so --resume cannot go on from here"
        )


def _frame(payload: bytes) -> bytes:
    return b"%08x %s\n" % (crc32(payload), payload)


def _unframe(line: bytes) -> bytes | None:
    """The JSON of a journal's line; None where its checksum is another one."""
    payload = line.removesuffix(b"\n")[CHECKSUM_BYTES:]
    return payload if line[:CHECKSUM_BYTES] == b"%08x " % crc32(payload) else None


def _result_line(finished: Finished, text: str) -> bytes:
    line: dict[str, object] = {
        "id": finished.request.id,
        "text": text,
        "token_ids": finished.token_ids,
        "num_prompt_tokens": len(finished.request.prompt),
        "num_new_tokens": len(finished.token_ids),
        "finish_reason": finished.reason,
    }
    return _json_bytes(line | ({} if finished.error is None else {"error": finished.error}))


def _result_id(payload: bytes) -> Id | None:
    """The id, where this is a whole result."""
    data = _parse(payload)
    if data is None or data.get("finish_reason") not in get_args(Reason):
        return None
    if not isinstance(data.get("token_ids"), list) or not isinstance(data.get("text"), str):
        return None
    name = data.get("id")
    is_id = isinstance(name, str | int) and not isinstance(name, bool)
    return name if is_id else None


def _parse(payload: bytes) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        data = json.loads(payload.decode())
        return data if isinstance(data, dict) else None
    return None


def _json_bytes(data: dict[str, object]) -> bytes:
    # Half a character (a lone surrogate) becomes \udXXX, which is its JSON escape.
    return json.dumps(data, ensure_ascii=False, default=str).encode(errors="backslashreplace")


def _show(value: object) -> str:
    """Any value in a bounded form that every terminal prints."""
    is_plain = isinstance(value, str) and value.isprintable()
    return str(value) if is_plain else reprlib.repr(value)


def _real_path(output: Path) -> Path:
    """Where the output lies; a link is followed, as it is to stay one when the file is replaced."""
    path = output
    with suppress(OSError):  # opening it will say the same
        if output.is_symlink():
            path = Path(os.path.realpath(output))
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{output}: is no regular file, and results are kept in one")
    return path


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)
