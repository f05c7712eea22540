"""The samples so far, in a file beside the profile, so that a killed run goes on where it was.

The file is rewritten whole every few seconds, and removed once the profile is written. It counts
only for the same model, device, data type, threads and depth of stacks; others are passed over.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from llmpq.artifact import SCHEMA_VERSION, Strict, read_json, write_json
from llmpq.errors import UserError
from llmpq.profile_data import Candidate
from llmpq.profiler.cells import Cell

EVERY_S = 5.0


class Identity(Strict):
    """What samples must have in common to be of one profile."""

    model_key: str
    device: str
    dtype: str
    num_threads: int | None
    depth: int


class SavedCell(Strict):
    """A cell's samples."""

    key: Candidate
    depth: int
    times_ms: list[float]
    levels_ms: list[float]
    num_visits: int
    call_s: float
    peak_bytes: int | None


class Partial(Strict):
    """PROFILE.json.partial."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["partial profile"] = "partial profile"
    identity: Identity
    spent_s: dict[str, float]
    levels_ms: list[float]
    cells: list[SavedCell]


class PartialFile:
    """Writes what there is, now and then; reads it back where it belongs to the same run."""

    def __init__(self, path: Path, identity: Identity, every_s: float = EVERY_S) -> None:
        self._path, self._identity, self._every_s = path, identity, every_s
        self._written_s = time.monotonic()

    def load(self) -> Partial | None:
        """The run to go on with; None where there is none, or another's."""
        if not self._path.exists():
            return None
        try:
            found = read_json(self._path, Partial)
        except UserError:  # of another version, or broken: it only saves time
            return None
        return found if found.identity == self._identity else None

    def save(
        self,
        cells: Iterable[Cell],
        spent_s: dict[str, float],
        levels_ms: list[float],
        now: bool = False,
    ) -> None:
        """Writes if the last time is long ago, or `now`."""
        if not now and time.monotonic() - self._written_s < self._every_s:
            return
        saved = [_saved(cell) for cell in cells if cell.times_ms]
        value = Partial(identity=self._identity, spent_s=spent_s, levels_ms=levels_ms, cells=saved)
        write_json(self._path, value)
        self._written_s = time.monotonic()

    def remove(self) -> None:
        """The profile is complete."""
        self._path.unlink(missing_ok=True)


def restored(saved: SavedCell) -> Cell:
    """The cell as it was; how sure it is must be computed anew."""
    return Cell(**{name: getattr(saved, name) for name in SavedCell.model_fields})


def _saved(cell: Cell) -> SavedCell:
    values = asdict(cell)
    return SavedCell(**{name: values[name] for name in SavedCell.model_fields})
