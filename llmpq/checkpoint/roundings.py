"""Chooses the rounding of each weight of a checkpoint."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from llmpq.checkpoint.calibration_file import CalibrationFile, sha256_of
from llmpq.errors import UserError
from llmpq.quant.gptq import NEAREST_BITS, ROWS, Gptq
from llmpq.quant.rounding import Rounding, quantize, quantize_mse
from llmpq.quantizer import Method, Quantizer


class Roundings(Protocol):
    """Gives the rounding of a weight by its name in the checkpoint."""

    @property
    def note(self) -> str | None:
        """A note for the user on weights that are rounded otherwise; None where none are."""

    def of(self, name: str) -> Rounding:
        """The rounding of the tensor called `name`."""


class CalibrationSource(Protocol):
    """Gives calibration statistics of weights, as `CalibrationFile` does."""

    def key(self, name: str) -> str:
        """The key that weights with the same input share; raises `UserError` for unknown ones."""

    def statistics(self, name: str) -> Tensor:
        """The second moments fp32 `[blocks, B, B]` of a weight's inputs."""


class Always:
    """The same rounding for every weight."""

    note: str | None = None

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding

    def of(self, name: str) -> Rounding:
        """The one rounding."""
        return self._rounding


class GptqRoundings:
    """GPTQ with the calibration statistics of each weight.

    Statistics are read when a weight is really rounded with them. The prepared factors are kept for
    the following weights with the same input, so that memory holds those of one input. The weights
    in `nearest` are rounded to nearest, as `note` says.
    """

    def __init__(
        self, source: CalibrationSource, nearest: Collection[str] = (), note: str | None = None
    ) -> None:
        self._source, self._nearest, self.note = source, nearest, note
        self._key: str | None = None
        self._prepared: Gptq | None = None

    def of(self, name: str) -> Rounding:
        """The rounding of the tensor called `name`."""
        return quantize if name in self._nearest else _Late(self, name)

    def prepared(self, name: str) -> Gptq:
        """The rounding of a weight, with its statistics read."""
        key = self._source.key(name)
        if self._prepared is None or self._key != key:
            self._prepared = None  # frees the last one before the next is read
            self._prepared, self._key = Gptq(self._source.statistics(name)), key
        return self._prepared


class _Late:
    """Reads the statistics only if a weight is rounded with them: not at 8 bits or more."""

    rows_at_once = ROWS

    def __init__(self, roundings: GptqRoundings, name: str) -> None:
        self._roundings, self._name = roundings, name

    def __call__(
        self, weight: Tensor, bits: int, group: int, centre_up_to: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        rounding: Rounding = quantize
        if bits < NEAREST_BITS:
            rounding = self._roundings.prepared(self._name)
        return rounding(weight, bits, group, centre_up_to)


NEAREST: Roundings = Always(quantize)
# The rounding of each method that takes no calibration statistics.
BY_METHOD: Mapping[Method, Rounding] = {"rtn": quantize, "mse": quantize_mse}


def load_roundings(
    quantizer: Quantizer, override: Path | None = None, base: Path | None = None
) -> Roundings:
    """The roundings of a plan's quantizer.

    The file of calibration statistics is `override`, or else the quantizer's own path, as it is or
    relative to `base`, the file that names it. Raises `UserError` where the file is missing, cannot
    be read, or is not the one that the quantizer was measured with (by SHA-256).
    """
    if quantizer.moments is None:
        if override is not None:
            raise UserError(
                f"{override}: rounding by '{quantizer.method}' takes no calibration statistics"
            )
        return Always(BY_METHOD[quantizer.method])
    path = override or _find(quantizer.moments, base)
    file = CalibrationFile(path)
    if quantizer.sha256 and sha256_of(path) != quantizer.sha256:
        raise UserError(
            f"{path}: not the calibration statistics that quality was measured with (SHA-256 "
            f"{quantizer.sha256[:12]}...); give that file with --moments FILE"
        )
    return GptqRoundings(file, file.nearest, file.note)


def rounding_key(
    quantizer: Quantizer, override: Path | None = None, base: Path | None = None
) -> str:
    """A text that differs between quantizers that may give other codes: method and SHA-256.

    Arguments and errors are those of `load_roundings`.
    """
    if quantizer.moments is None:
        return quantizer.method
    sha256 = quantizer.sha256 or sha256_of(override or _find(quantizer.moments, base))
    return f"{quantizer.method} {sha256}"


def _find(moments: str, base: Path | None) -> Path:
    named = Path(moments)
    paths = [named] if base is None else [named, base.parent / named]
    for path in paths:
        if path.is_file():
            return path
    tried = " and ".join(str(path) for path in dict.fromkeys(paths))
    raise UserError(f"no calibration statistics at {tried}; give the file with --moments FILE")
