"""The files profile.json (times of one device type) and sensitivity.json (quality per layer)."""

import math
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from llmpq.artifact import SCHEMA_VERSION, Provenance, Strict, parse_json, read_json, validate
from llmpq.errors import UserError, listed
from llmpq.precision import KNOWN_NAMES, in_order, is_layer_precision
from llmpq.quantizer import Quantizer

# "stage_*": the cost of a stage's call beside its layers (masks, positions, messages).
Phase = Literal["prefill", "decode", "embedding", "head", "stage_prefill", "stage_decode"]
DECODES = ("decode", "stage_decode")
# The kinds of memory whose bytes rows count.
MemoryOf = Literal["layer_weights", "cache", "activations"]
# The kinds of other files that llmpq writes beside profiles.
OTHER_KINDS = ("sensitivity", "plan", "report", "links", "recalibration")


class ProfiledDevice(Strict):
    """The device that was measured.

    `context_bytes` is the framework's memory there before any tensor. `bandwidth_gbs` is that of a
    copy. `reference_ms` is the time of a fixed computation at the speed that times are scaled to,
    where the machine's speed changed while it was measured.
    """

    name: str
    type: str
    memory_bytes: PositiveInt
    num_threads: int | None = None
    compute_capability: str | None = None
    dtype: str | None = None
    context_bytes: NonNegativeInt | None = None
    bandwidth_gbs: PositiveFloat | None = None
    reference_ms: PositiveFloat | None = None


class ProfileRow(Strict):
    """One measurement of a decoder layer ("prefill", "decode"), or of another part of a stage.

    "prefill" computes `micro_batch` prompts of `prompt_tokens`; "decode" one token for each of
    `micro_batch` requests with `past_tokens` in the cache; "embedding" `micro_batch` x
    `prompt_tokens` tokens; "head" the final norm, logits and next tokens of `micro_batch` requests.
    `experts_used`: how many different experts a call of a layer used on average, if it has some.
    """

    model_key: str
    precision: str
    phase: Phase
    micro_batch: PositiveInt
    prompt_tokens: NonNegativeInt = 0
    past_tokens: NonNegativeInt = 0
    time_ms: PositiveFloat
    time_ms_p10: PositiveFloat
    time_ms_p90: PositiveFloat
    num_samples: PositiveInt
    experts_used: PositiveFloat | None = None

    @property
    def tokens(self) -> int:
        """The tokens of a prompt, or (decode) in the cache; 0 for the head."""
        if self.phase in DECODES:
            return self.past_tokens
        return 0 if self.phase == "head" else self.prompt_tokens


class Candidate(NamedTuple):
    """A cell that may be measured. `tokens` are those of a prompt, or (decode) in the cache."""

    precision: str
    phase: Phase
    micro_batch: int
    tokens: int


class MemoryRow(Strict):
    """Bytes that were held, counted while a layer was measured.

    "layer_weights" are those of one layer at `precision`; "cache" is the keys and values of one
    token of one request in one layer; "activations" is the peak of a layer's call on this shape,
    without weights and cache.
    """

    model_key: str
    what: MemoryOf
    precision: str
    phase: Phase | None = None
    micro_batch: NonNegativeInt = 0
    prompt_tokens: NonNegativeInt = 0
    past_tokens: NonNegativeInt = 0
    num_bytes: NonNegativeInt


class ModelPart(Strict):
    """Coefficients of a fitted model's features (`costs.recipes`): of pieces with a `knee`.

    The first of two parts holds for matrix products of up to `up_to_rows` rows.
    """

    coefficients: tuple[float, ...] = Field(min_length=1)
    knee: PositiveFloat | None = None
    up_to_rows: PositiveInt | None = None


class ChosenModel(Strict):
    """Which model of the times predicts unseen rows of this kind best, and how far off it was.

    Spares whoever reads the profile the choice and the fit. `precision` is "" where it does not
    matter. A name that is not known is chosen anew. The fit holds only for the rows and with the
    values that `sha256` is of (`fit_hash`); else it is made anew. `errors`: relative, of each
    point as predicted without it, in ascending order of micro-batch and tokens; `beyond`: an octave
    outside the measured range, None where the rows cannot tell.
    """

    model_key: str
    precision: str
    phase: Phase
    model: str
    mean_error: float = Field(ge=0)
    parts: tuple[ModelPart, ...] = Field((), max_length=2)
    errors: tuple[float, ...] = ()
    beyond: float | None = Field(None, ge=0)
    sha256: str = ""


class Profile(Strict):
    """The contents of profile.json. `notes` are on drift, cut ranges and outliers."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["profile"] = "profile"
    device: ProfiledDevice
    rows: list[ProfileRow] = Field(min_length=1)
    memory: list[MemoryRow] = []
    models: list[ChosenModel] = []
    notes: list[str] = []
    provenance: Provenance = Provenance()


class LayerSensitivity(Strict):
    """The quality cost of this layer alone (or a part of it) at `precision`.

    `sensitivity` is in the indicator's own unit: nats a token for "measured". Plans are made from
    rows of whole layers; rows of parts ("attention", "ffn") are only for readers.
    """

    layer: NonNegativeInt
    precision: str
    sensitivity: float = Field(ge=0)
    part: Literal["layer", "attention", "ffn"] = "layer"

    @field_validator("precision")
    @classmethod
    def _known(cls, name: str) -> str:
        if not is_layer_precision(name):
            raise ValueError(f"unknown precision; known: {KNOWN_NAMES}")
        return name


class MeasuredPlan(Strict):
    """A precision for every layer, measured as a whole.

    `rise` is that of the loss in nats a token, taken to be the divergence from the 16-bit model.
    """

    precisions: list[str]
    sum_sensitivity: float
    rise: float


class QualityFit(Strict):
    """Percent of perplexity from summed sensitivity x: 100 * (exp(scale * x) - 1).

    `upper_scale`, where there is one, is above the ratios of nearly all measured plans; quality
    budgets use it. `plans` holds the measurements of the fit.
    """

    scale: float = Field(ge=0)
    mean_abs_error_percent: float = Field(ge=0)
    num_plans: NonNegativeInt
    upper_scale: float | None = Field(default=None, ge=0)
    plans: list[MeasuredPlan] = []


class CalibrationText(Strict):
    """The text of the measurement: `num_tokens` in windows of `window`."""

    source: str
    num_tokens: NonNegativeInt
    loss: float | None = None
    window: PositiveInt | None = None


class Sensitivity(Strict):
    """The contents of sensitivity.json."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["sensitivity"] = "sensitivity"
    model: str
    num_layers: PositiveInt
    indicator: Literal["variance", "hessian", "measured", "random", "prior"]
    layers: list[LayerSensitivity]
    calibration: CalibrationText
    fit: QualityFit
    quantizer: Quantizer = Quantizer()
    method: Literal["fast", "exact"] | None = None
    seconds: float | None = None
    peak_memory_bytes: NonNegativeInt | None = None
    notes: list[str] = []
    provenance: Provenance = Provenance()

    @field_validator("layers")
    @classmethod
    def _rows_fit(
        cls, layers: list[LayerSensitivity], info: ValidationInfo
    ) -> list[LayerSensitivity]:
        faults = list(_row_faults(layers, info.data.get("num_layers", math.inf)))
        if faults:
            raise ValueError(listed(faults))
        return layers

    def table(self) -> dict[str, list[float]]:
        """Sensitivity by precision and layer; "16" costs nothing, negative noise counts as 0."""
        names = in_order(row.precision for row in self.layers if row.precision != "16")
        table = {p: [float("nan")] * self.num_layers for p in names}
        for row in self.layers:
            if row.part != "layer":
                continue
            if row.precision in table and row.layer < self.num_layers:
                table[row.precision][row.layer] = max(0.0, row.sensitivity)
        complete = {p: values for p, values in table.items() if not any(v != v for v in values)}
        return {"16": [0.0] * self.num_layers} | complete


def fit_hash(rows: Iterable[ProfileRow], found: ChosenModel) -> str:
    """SHA-256 over what a fit sees of rows, whatever their order, and over what it found."""
    seen = sorted(
        (row.micro_batch, row.tokens, row.time_ms, row.time_ms_p10, row.time_ms_p90)
        + ((row.experts_used,) if row.experts_used else ())
        for row in rows
    )
    fit = found.model_dump_json(exclude={"sha256"})
    return sha256(f"{seen}\n{fit}".encode()).hexdigest()


def load_profiles(folder: Path) -> list[Profile]:
    """Every profile of a folder (`*.json`); files of llmpq's other kinds are passed over."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of profiles")
    read = [(path, parse_json(path)) for path in sorted(folder.glob("*.json"))]
    found = [
        validate(data, Profile, path)
        for path, data in read
        if not (isinstance(data, dict) and data.get("kind") in OTHER_KINDS)
    ]
    if not found:
        raise UserError(f"{folder}: holds no profile (*.json); make one with 'llmpq-profile'")
    return found


def load_sensitivity(path: Path) -> Sensitivity:
    """Reads sensitivity.json."""
    return read_json(path, Sensitivity)


def _row_faults(layers: Sequence[LayerSensitivity], num_layers: float) -> Iterator[str]:
    """Faults of rows: a layer that does not exist, or a repeated row."""
    first: dict[tuple[int, str, str], int] = {}
    for index, row in enumerate(layers):
        before = first.setdefault((row.layer, row.precision, row.part), index)
        if row.layer >= num_layers:
            known = f"the model has {num_layers} (0 to {num_layers - 1})"
            yield f"row {index}: no layer {row.layer}, {known}"
        elif before != index:
            yield f"row {index}: layer {row.layer} at precision {row.precision}, as row {before}"
