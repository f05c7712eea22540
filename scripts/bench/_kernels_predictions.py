"""A profile of a model's layers on one device, and what it predicts of plans that have run.

The profile is `llmpq-profile layers`' own. A plan that ran is priced again with it by `llmpq-plan
--evaluate`, so that prediction and run are of one plan, whatever plan the profile would have made.
"""

from pathlib import Path
from typing import Any

from _kernels_place import Place
from _kernels_serving import Traffic, command, error_percent, priced

from llmpq.artifact import read_json, write_json
from llmpq.cli.profile_layers import layers as profile_command
from llmpq.plan_data import Plan
from llmpq.profile_data import Profile

# On a CPU: one thread, as rehearsals run on, and the lengths of the small model's requests.
TINY_GRID = [
    *("--threads", "1", "--prefill-micro-batches", "4", "--decode-micro-batches", "4"),
    *("--prompt-tokens", "8,48", "--past-tokens", "8,96"),
]


def profile_layers(
    traffic: Traffic, place: Place, device_type: str, budget_s: float, output: Path
) -> None:
    """Measures the layers at every precision and writes the profile."""
    words = ["--model", traffic.model, "--device", place.device.type, "--type", device_type]
    words += [] if place.on_card else TINY_GRID
    command(profile_command, *words, "--budget-s", budget_s, "-o", output, "--fresh", "-q")


def profiles_as(device_type: str, path: Path, folder: Path) -> Path:
    """A folder with the profile as that of another type of device."""
    profile = read_json(path, Profile)
    renamed = profile.device.model_copy(update={"type": device_type})
    where = folder / f"profiles-{device_type}"
    where.mkdir(exist_ok=True)
    write_json(where / "device.json", profile.model_copy(update={"device": renamed}))
    return where


def prediction(row: dict[str, Any], profiles: Path, folder: Path) -> dict[str, Any]:
    """What the profiles predict of the run in a row of `_kernels_serving.serve`."""
    plan = priced(Plan.model_validate(row["plan"]), profiles, folder)
    assert plan.predicted is not None
    return {
        "kind": "prediction",
        "precision": row["precision"],
        "measured_tokens_per_s": row["tokens_per_s"],
        "predicted_tokens_per_s": plan.predicted.tokens_per_s,
        "error_percent": error_percent(plan, row["total_s"]),
    }
