"""Finished requests, kept whatever happens: out.jsonl and, beside it, out.jsonl.journal.

A journal begins with a header that describes the run; then it has the same lines as the output,
each with checksums (see `repair`). Each request is first written to the journal and then to the
output, and both have reached the operating system before it counts as finished. So a kill loses
nothing: at worst a request is only in the journal, and resuming adds its line to the output. In a
crash of the machine, only what was synced to the disk is safe. Only the journal is synced during
the run, because the output can be made from it: after every request ("always"), every second
("interval") or when the operating system does so ("never").

A resumed run tries failed requests again. The output has no line of them until they have ended
again, so that no id is ever there twice; the journal keeps why they failed until a later line
of the same id replaces that. Results that must not be mixed are refused before anything is changed:
results of another model or other weights, in another form, or of a prompt that has changed.

Not covered: two runs on one output where the file system has no locks.
"""

import glob
import json
import os
import reprlib
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Literal

from llmpq.errors import UserError, WorkerError
from llmpq.prompts.request import Finished
from llmpq.prompts.result_lines import OWN_START, Id, ResultWriter, json_bytes, parse_object
from llmpq.reliability.append_file import AppendFile, new_name
from llmpq.reliability.repair import (
    MAX_LINE_BYTES,
    Payload,
    ResultRepair,
    ScannedFile,
    fetch,
    frame,
    output_payload,
    scan,
    unframe,
)

Fsync = Literal["always", "interval", "never"]

VERSION = 2  # the journal's; version 1 has no checksums of prompts
SYNC_EVERY_S = 1.0
CHECK_EVERY_S = 1.0  # the interval of checks that the files still have their names
MOST_SHOWN = 5  # the requests that a message names
# What all results in one file must have in common, and what to do where they differ.
SAME = {
    "model": "give another --output",
    "weights": "give another --output, or the weights that they were made with",
    "form": "give that --output-format, or another --output",
}


class Results:
    """The results of a run; writing continues where an earlier run ended, or starts anew.

    `finished` holds the ids that need no more work, `failed` those of them that failed; `notes`
    says what was found and repaired. `prompts` maps every id to the checksum of its prompt, against
    which a resumed run checks earlier results; None checks nothing. Failed requests are done again,
    unless `keeps_failed`. When writing starts anew, earlier results are kept under names that end
    in ".old", ".old.2" and so on.

    Raises `UserError` for an output that another run writes to, that is no output of llmpq-run,
    or whose results must not be mixed with this run's; `WorkerError` where the disk fails or is
    full, or where another program changes the files.
    """

    def __init__(
        self,
        output: Path,
        resume: bool,
        fsync: Fsync,
        run: dict[str, object],
        prompts: Mapping[Id, int] | None = None,
        keeps_failed: bool = False,
        writer: ResultWriter = ResultWriter(),
    ) -> None:
        self.notes: list[str] = []
        self.finished: set[Id] = set()
        self.failed: set[Id] = set()
        self._path = _real_path(output)
        self._fsync, self._writer = fsync, writer
        self._prompts, self._keeps_failed = prompts, keeps_failed
        self._next_check_s = 0.0
        self._output = AppendFile(self._path)
        self._journal: Journal | None = None
        try:
            self._journal = Journal(beside(self._path, ".journal"), fsync)
            header = json_bytes({"journal": VERSION, "run": {**run, "form": writer.form}})
            (self._take_up if resume else self._start_anew)(self._journal.file, header)
            if fsync != "never":
                self._journal.file.sync()
                self._journal.file.sync_name()
        except BaseException:
            self.close()
            raise

    def write(self, finished: Finished, text: str) -> None:
        """Writes a finished request, which is safe from kills when this returns."""
        name = finished.request.id
        assert self._journal is not None and name not in self.finished
        if time.monotonic() >= self._next_check_s:
            self.check_files()
        line = self._writer.line(finished, text)
        self._journal.record(Payload(line, finished.request.checksum))
        self._output.append(line + b"\n")
        self.finished.add(name)
        if finished.reason == "error":
            self.failed.add(name)

    def check_files(self) -> None:
        """Raises `WorkerError`, with where results still are, for removed or replaced files.

        `write` calls this once in a while, and a run calls it at its end.
        """
        assert self._journal is not None
        self._next_check_s = time.monotonic() + CHECK_EVERY_S
        faults: list[str] = []
        for file in (self._output, self._journal.file):
            try:
                file.check_name()
            except WorkerError as error:
                faults.append(str(error))
        if len(faults) == 2:
            raise WorkerError("\n".join([*faults, "results of this run are in neither file"]))
        if faults:
            raise WorkerError(f"{faults[0]}; finished requests are safe, --resume restores it")

    def close(self) -> None:
        """Syncs everything to the disk and releases the files."""
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
            old = _free_ending(self._path, journal.path)
            self._output.move(beside(self._path, old))
            journal.move(beside(journal.path, old))
            self.notes.append(f"{self._path}: earlier results are kept as {self._path.name}{old}")
        journal.cut(0)
        journal.append(frame(Payload(header)))

    def _take_up(self, journal: AppendFile, header: bytes) -> None:
        with journal.read() as journal_file, self._output.read() as output_file:
            run, start = _read_header(journal_file)
            logged = scan(journal_file, unframe, start)
            shown = scan(output_file, output_payload)
            _refuse_other_files(self._path, shown, output_file, run is None and not logged.lines)
            repair = ResultRepair(
                logged, shown, journal_file, output_file, self._prompts, not self._keeps_failed
            )
            if repair.kept:
                self._compare_runs(run, json.loads(header)["run"])
                self._compare_forms(repair)
                self._compare_prompts(repair)
            else:
                run = None  # nothing is done yet, so this is the run that is done
            broken = [fetch(output_file, span) for span in shown.broken]
            self._save(".broken", "lines that are not results", broken)
            unknown = [repair.line(name) for name in repair.unknown]
            self._save(".aside", "results whose id no prompt has", unknown)
            repair.repair_journal(journal, header, keeps_header=run is not None)
            repair.repair_output(self._output)
        self.finished = set(repair.kept)
        self.failed = repair.failed & self.finished
        self.notes += repair.notes(self._path, journal.path)
        if again := len(repair.failed) - len(self.failed):
            self.notes.append(f"{self._path}: failed requests that are tried again: {again}")

    def _compare_runs(self, before: Mapping[str, object] | None, now: Mapping[str, object]) -> None:
        """Refuses results of another model, weights or form; notes other differences."""
        if before is None:
            self.notes.append(f"{self._path}: the settings of its results are not recorded")
            return
        for name, advice in SAME.items():
            if name in before and name in now and before[name] != now[name]:
                what = _difference(name, before[name], now[name])
                raise UserError(f"{self._path}: its results are of {what}; {advice}")
        names = [name for name in {**before, **now} if name not in SAME]
        differing = [name for name in names if before.get(name) != now.get(name)]
        if differing:
            changes = ", ".join(
                f"{_show(name)} was {_show(before.get(name))}, is {_show(now.get(name))}"
                for name in differing
            )
            self.notes.append(f"{self._path}: finished requests had other settings: {changes}")

    def _compare_forms(self, repair: ResultRepair) -> None:
        """Refuses results in another form, by their lines, as the header may lack the form."""
        form = self._writer.form
        other = next((n for n in repair.kept if repair.span(n).form != form), None)
        if other is not None:
            what = _difference("form", repair.span(other).form, form)
            raise UserError(f"{self._path}: its results are of {what}; {SAME['form']}")

    def _compare_prompts(self, repair: ResultRepair) -> None:
        """Refuses results of prompts that have changed."""
        if self._prompts is None:
            return
        done = [name for name in repair.kept if name not in repair.failed]
        sums = [(name, repair.span(name).prompt) for name in done]
        changed = [name for name, was in sums if was not in (None, self._prompts[name])]
        if changed:
            names = ", ".join(map(_show, changed[:MOST_SHOWN]))
            more = f" and {len(changed) - MOST_SHOWN} more" if len(changed) > MOST_SHOWN else ""
            raise UserError(
                f"{self._path}: finished requests had other prompts, numbers of new tokens or "
                f"settings of their own than now: {names}{more}; give another --output, or the "
                "prompts, the tokenizer and --too-long as they were"
            )
        if unknown := sum(was is None for _, was in sums):
            self.notes.append(
                f"{self._path}: finished requests whose prompts are not recorded: {unknown}"
            )

    def _save(self, ending: str, what: str, lines: Sequence[bytes]) -> None:
        """Appends lines that do not belong in the output to a file beside it."""
        if not lines:
            return
        target = AppendFile(beside(self._path, ending))
        try:
            for line in lines:
                target.append(line + b"\n")
            target.sync()
        finally:
            target.close()
        self.notes.append(f"{self._path}: {what}, moved to {target.path.name}: {len(lines)}")


class Journal:
    """A file of lines with checksums, synced to the disk by the policy `fsync`."""

    def __init__(self, path: Path, fsync: Fsync) -> None:
        self.file = AppendFile(path)
        self._fsync = fsync
        self._unsynced = False
        self._failure: WorkerError | None = None
        self._ended = threading.Event()
        self._syncing: threading.Thread | None = None

    def record(self, payload: Payload) -> None:
        """Appends a line. Raises `WorkerError` where this, or an earlier sync, failed."""
        if self._failure is not None:
            raise self._failure
        self.file.append(frame(payload))
        self._unsynced = True
        if self._fsync == "always":
            self.file.sync()
        elif self._fsync == "interval" and self._syncing is None:
            self._syncing = threading.Thread(target=self._sync_regularly, daemon=True)
            self._syncing.start()

    def close(self) -> None:
        """Syncs the file and closes it."""
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


def beside(path: Path, ending: str) -> Path:
    """The path with `ending` appended to its name."""
    return path.with_name(path.name + ending)


def files_beside(output: Path) -> list[Path]:
    """All files that `Results` may write beside an output, and those of earlier runs."""
    path = Path(os.path.realpath(output))
    journal = beside(path, ".journal")
    old = _free_ending(path, journal)
    found = [journal, *(beside(path, ending) for ending in (".broken", ".aside", old))]
    found += [beside(journal, old), *(new_name(file) for file in (path, journal))]
    with suppress(OSError):
        found += sorted(path.parent.glob(f"{glob.escape(path.name)}*.old*"))
    return list(dict.fromkeys(found))


def _free_ending(output: Path, journal: Path) -> str:
    """The first of ".old", ".old.2" and so on that neither file has yet."""
    number, ending = 1, ".old"
    while any(os.path.lexists(beside(path, ending)) for path in (output, journal)):
        number += 1
        ending = f".old.{number}"
    return ending


def _read_header(file: BinaryIO) -> tuple[dict[str, object] | None, int]:
    """The run's description, and where the header ends; None and 0 without a whole header."""
    record = file.readline(MAX_LINE_BYTES)
    payload = unframe(record)
    data = parse_object(payload.line) if payload and record.endswith(b"\n") else None
    if data is None or data.get("journal") not in range(1, VERSION + 1):
        return None, 0
    run = data.get("run")
    return (run, len(record)) if isinstance(run, dict) else (None, 0)


def _refuse_other_files(
    path: Path, shown: ScannedFile, file: BinaryIO, has_no_journal: bool
) -> None:
    """Raises `UserError` for a file without results that llmpq-run did not write."""
    if shown.lines or not has_no_journal:
        return
    torn = fetch(file, shown.torn) if shown.torn else b""
    if shown.broken or torn[: len(OWN_START)] != OWN_START[: len(torn)]:
        raise UserError(
            f"{path}:{shown.first_bad}: not a result of llmpq-run, "
            "so --resume cannot continue from here"
        )


def _difference(name: str, before: object, now: object) -> str:
    """Says what differs; for dictionaries, which entries."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(n for n in {*before, *now} if before.get(n) != now.get(n))
        return f"other {name}: {', '.join(map(_show, names[:MOST_SHOWN]))} differ"
    shown = "format" if name == "form" else name
    return f"{shown} {_show(before)}, not of {_show(now)}"


def _show(value: object) -> str:
    """Any value in a short form that every terminal can print."""
    is_plain = isinstance(value, str) and value.isprintable()
    return str(value) if is_plain else reprlib.repr(value)


def _real_path(output: Path) -> Path:
    """The path of the output; links are followed, so that they stay when the file is replaced."""
    path = output
    with suppress(OSError):  # opening it will say the same
        if output.is_symlink():
            path = Path(os.path.realpath(output))
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{output}: is not a regular file, which results need")
    return path
