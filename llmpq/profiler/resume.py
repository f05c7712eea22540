"""Keeps the samples so far in a file beside the profile, so that a killed run can continue.

The file is rewritten whole every few seconds, and removed when the profile is written. It is used
only for the same model, device, data type, threads and depth of stacks; other files are ignored.
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
    """The settings that all samples of one profile share."""

    model_key: str
    device: str
    dtype: str
    num_threads: int | None
    depth: int


class SavedCell(Strict):
    """The samples of a cell."""

    key: Candidate
    depth: int
    times_ms: list[float]
    levels_ms: list[float]
    num_visits: int
    call_s: float
    peak_bytes: int | None
    experts_used: list[float] = []


class Partial(Strict):
    """The contents of PROFILE.json.partial."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["partial profile"] = "partial profile"
    identity: Identity
    spent_s: dict[str, float]
    levels_ms: list[float]
    cells: list[SavedCell]


class PartialFile:
    """Writes the samples now and then; reads them where they belong to the same run."""

    def __init__(self, path: Path, identity: Identity, every_s: float = EVERY_S) -> None:
        self._path, self._identity, self._every_s = path, identity, every_s
        self._written_s = time.monotonic()

    def load(self) -> Partial | None:
        """The samples to continue with; None where there are none of the same run."""
        if not self._path.exists():
            return None
        try:
            found = read_json(self._path, Partial)
        except UserError:  # the file is broken or of another version; it only saves time
            return None
        return found if found.identity == self._identity else None

    def save(
        self,
        cells: Iterable[Cell],
        spent_s: dict[str, float],
        levels_ms: list[float],
        now: bool = False,
    ) -> None:
        """Writes the samples if the last write is long ago, or `now`."""
        if not now and time.monotonic() - self._written_s < self._every_s:
            return
        saved = [_saved(cell) for cell in cells if cell.times_ms]
        value = Partial(identity=self._identity, spent_s=spent_s, levels_ms=levels_ms, cells=saved)
        write_json(self._path, value)
        self._written_s = time.monotonic()

    def remove(self) -> None:
        """Removes the file, once the profile is complete."""
        self._path.unlink(missing_ok=True)


def restored(saved: SavedCell) -> Cell:
    """The cell with its samples; its estimate must be computed anew."""
    return Cell(**{name: getattr(saved, name) for name in SavedCell.model_fields})


def _saved(cell: Cell) -> SavedCell:
    values = asdict(cell)
    return SavedCell(**{name: values[name] for name in SavedCell.model_fields})
