"""The files that a plan is made from, read and checked: all faults of all files in one error.

`read_inputs` reads model, cluster, workload, profiles and sensitivities. A plan that is priced or
replaced stands for what is not given. The calibration statistics that a sensitivity file names are
found from the folder of that file; plans name them as seen from their own folder.

Not covered: what a plan may do with the inputs (`planner.inputs`).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from llmpq.cluster import load_cluster
from llmpq.costs.quality import QualityModel, measured_quality, prior_of
from llmpq.errors import UserError
from llmpq.model_lookup import DEFAULT_MODEL, load_model_spec
from llmpq.model_spec import ModelSpec
from llmpq.plan_data import Plan
from llmpq.planner.inputs import Inputs, inputs_of
from llmpq.profile_data import Profile, load_profiles, load_sensitivity
from llmpq.workload import load_workload, planned_lengths

T = TypeVar("T")


@dataclass(frozen=True)
class InputFiles:
    """Paths of the inputs. None: what the plan says, else the default.

    `plan_folder`: where plans will be written; None: in several folders, or nowhere.
    """

    model: str | None = None
    cluster: Path | None = None
    workload: Path | None = None
    profiles: Path | None = None
    sensitivity: Path | None = None
    plan_folder: Path | None = None


def read_inputs(files: InputFiles, plan: Plan | None = None) -> Inputs:
    """Reads all files; raises one `UserError` with the faults of all of them."""
    faults: list[str] = []

    def attempt(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except UserError as error:
            faults.append(str(error))
            return None

    def given(path: Path | None, load: Callable[[Path], T], other: T | None) -> T | None:
        return attempt(lambda: load(path)) if path is not None else other

    planned_spec = plan.model if plan is not None and files.model is None else None
    spec = planned_spec or attempt(lambda: load_model_spec(files.model or DEFAULT_MODEL))
    cluster = given(files.cluster, load_cluster, plan.cluster if plan else None)
    workload = given(files.workload, load_workload, plan.workload if plan else None)
    none: list[Profile] = []
    profiles = given(files.profiles, load_profiles, none)
    if workload:
        attempt(lambda: planned_lengths(workload))
    path = files.sensitivity
    quality = attempt(lambda: read_quality(spec, path, files.plan_folder)) if spec else None
    if faults:
        raise UserError("\n".join(faults))
    assert spec and cluster and workload and quality and profiles is not None
    return inputs_of(spec, cluster, workload, profiles, quality)


def read_quality(
    spec: ModelSpec, path: Path | None, plan_folder: Path | None = None
) -> QualityModel:
    """Reads a sensitivity file; None: a generic estimate, not measured for this model.

    The calibration statistics' path is made relative to `plan_folder`, or absolute without one.
    """
    if path is None:
        return prior_of(spec)
    quality = measured_quality(load_sensitivity(path), spec, str(path))
    if quality.quantizer.moments is None:
        return quality
    found = path.parent / quality.quantizer.moments
    moments = str(found.resolve()) if plan_folder is None else os.path.relpath(found, plan_folder)
    return replace(quality, quantizer=quality.quantizer.model_copy(update={"moments": moments}))
