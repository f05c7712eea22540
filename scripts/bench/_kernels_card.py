"""The card's part of the kernels benchmark: everything that its targets ask for, in one process.

Linear layers, a whole model served, the predictions of a profile, and the tokens of different ways
to run. `scripts/gpu.sh` measures the same in steps of limited time.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _common import Check
from _kernels_alone import KERNELS, time_alone
from _kernels_checks import (
    LARGE,
    linear_checks,
    of_kind,
    prediction_checks,
    serving_checks,
    token_checks,
)
from _kernels_linears import subjects, time_linears
from _kernels_place import Deadline, Place, Timer, measure_ceilings
from _kernels_predictions import prediction, profile_layers, profiles_as
from _kernels_serving import (
    device_type,
    generate_with_transformers,
    plan_for,
    serve,
    traffic_of,
)
from _kernels_tables import sheets
from _kernels_tokens import compare_tokens
from rich.console import Console
from rich.table import Table

PRECISIONS = ("16", "4", "8", "3")
QUICK_PRECISIONS = ("16", "4")
PROFILE_S = 60.0


@dataclass
class Found:
    """What was measured. `tokens`: by what was compared, whether the tokens were equal."""

    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[str, bool | None] = field(default_factory=dict)


def measure(place: Place, quick: bool, folder: Path) -> Found:
    """All that the targets ask for; `quick`: the largest matrix, two precisions, no profile."""
    timer = Timer(place)
    ceilings = measure_ceilings(timer)
    found = Found({"card": place.name, **asdict(ceilings)})
    for subject in subjects(place)[: 1 if quick else None]:
        time_linears(subject, timer, ceilings, Deadline(), found.rows.append)
    for duels in KERNELS.values():
        time_alone(duels, LARGE, timer, ceilings, Deadline(), found.rows.append)
    traffic, kind = traffic_of(place), device_type(place)
    for precision in QUICK_PRECISIONS if quick else PRECISIONS:
        plan = plan_for(traffic, precision, kind, folder)
        found.rows.append(serve(traffic, plan, place, ceilings))
    found.rows.append(generate_with_transformers(traffic, place))
    if not quick:
        profile_layers(traffic, place, kind, PROFILE_S, folder / "profile.json")
        profiles = profiles_as(kind, folder / "profile.json", folder)
        served = of_kind(found.rows, "serving")
        found.rows += [prediction(row, profiles, folder) for row in served]
    found.tokens = compare_tokens(place, folder)
    return found


def checks(found: Found) -> list[Check]:
    """A check for each target."""
    return [
        *linear_checks(found.rows),
        *serving_checks(found.rows, found.machine["card"]),
        *prediction_checks(found.rows, found.rows),
        *token_checks(found.tokens),
    ]


def render(found: Found) -> None:
    """The tables."""
    console = Console(highlight=False)
    for sheet in sheets(found.rows):
        table = Table(*sheet.columns, title=sheet.title, caption=sheet.note)
        for line in sheet.body:
            table.add_row(*line)
        console.print(table)
