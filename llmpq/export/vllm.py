"""Exports a plan to stock vLLM: checks it, writes the checkpoint and the files that start it.

The folder is complete or absent: everything is written beside its place and moved there at the end.
It holds the checkpoint, `plan.json` (the plan with the precisions that were raised for vLLM),
`export.json` (the precision of every matrix), `engine.json`, `batch.py`, and `run.sh` for one
machine or `ray.sh` for several.
"""

import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from llmpq.artifact import Provenance, write_json, write_text
from llmpq.checkpoint.loader import model_folder
from llmpq.checkpoint.roundings import load_roundings
from llmpq.cluster import MIB
from llmpq.costs.vllm_memory import VllmStageMemory, vllm_memory
from llmpq.errors import InfeasibleError, UserError
from llmpq.export import batch
from llmpq.export.checkpoint_writer import write_checkpoint
from llmpq.export.launch_scripts import engine_json, next_steps, ray_script, run_script
from llmpq.export.served import Served, served_precisions
from llmpq.exported import Exported
from llmpq.model_lookup import check_model
from llmpq.plan_data import Plan
from llmpq.vllm_settings import VllmSettings, vllm_settings


def export_vllm(
    plan: Plan,
    model: str | Path,
    output: str | Path,
    *,
    moments: str | Path | None = None,
    plan_path: Path | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Exported:
    """Writes the plan and the weights of `model` into the new folder `output`, for stock vLLM.

    `moments`: the file of calibration statistics, where it is not at the plan's path, which may be
    relative to the folder of `plan_path`. `on_tensor` is called with the number of tensors that are
    written, and of all.
    Raises `UserError` for what vLLM cannot run, and `InfeasibleError` where memory is short.
    """
    if find_spec("compressed_tensors") is None:
        raise UserError("compressed-tensors writes the checkpoint: pip install 'llmpq[vllm]'")
    target = Path(output)
    _refuse_filled(target)
    folder = model_folder(str(model))
    check_model(folder, plan.model, "the plan")
    served = served_precisions(plan)
    settings, memory = vllm_settings(plan), vllm_memory(plan, served.layers)
    _refuse_short(plan, memory)
    roundings = load_roundings(plan.quantizer, Path(moments) if moments else None, plan_path)
    with _new_folder(target) as written:
        checkpoint = write_checkpoint(folder, served, roundings, written, on_tensor)
        exported = Exported(
            model=plan.model.name,
            precisions=[dict(layer) for layer in served.layers],
            checkpoint_bytes=checkpoint.num_bytes,
            layer_bytes=checkpoint.layer_bytes,
            planned_layer_bytes=sum(stage.layers for stage in memory),
            num_shards=checkpoint.num_shards,
            notes=[*served.notes, *([roundings.note] if roundings.note else [])],
            next_steps=next_steps(plan, str(target)),
            provenance=Provenance.here(),
        )
        write_json(written / "export.json", exported)
        own = _as_served(plan, served, Path(moments) if moments else None, plan_path)
        _write_launch_files(own, settings, written)
    return exported


def _refuse_filled(target: Path) -> None:
    """Raises `UserError` where something is there that would be lost or mixed with the export.

    An empty folder is removed, as the new one takes its place.
    """
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        try:
            target.resolve().rmdir()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{target}: cannot be replaced ({reason}); name a new folder") from None
        return
    if os.path.lexists(target):
        raise UserError(f"{target}: is there already; name a new folder, or remove it")


def _refuse_short(plan: Plan, memory: list[VllmStageMemory]) -> None:
    short = [
        f"stage {rank} ({plan.stages[rank].devices[0]} on {plan.stages[rank].node}) needs "
        f"{one.total / MIB:.0f} MiB in vLLM and has {one.capacity / MIB:.0f} MiB (weights "
        f"{(one.layers + one.ends) / MIB:.0f}, cache {one.cache / MIB:.0f}, activations "
        f"{one.activations / MIB:.0f}, CUDA graphs {one.graphs / MIB:.0f}; the last two are "
        "estimates)"
        for rank, one in enumerate(memory)
        if one.total > one.capacity
    ]
    if short:
        advice = "plan with --target vllm, which plans for vLLM's precisions and memory"
        raise InfeasibleError("\n".join([*short, advice]))


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place at the end; after an error, nothing is left."""
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(target)
    except OSError as error:
        about = error.filename
        is_read = about is not None and str(temporary) not in str(about)
        what = f"{about}: cannot be read" if is_read else f"{target}: cannot be written"
        raise UserError(f"{what} ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _as_served(plan: Plan, served: Served, moments: Path | None, plan_path: Path | None) -> Plan:
    """The plan with the precision of each layer that most of its matrices have in vLLM.

    export.json says what each matrix has. Calibration statistics are named by their whole path.
    Where a precision was raised, predictions are left out: they were of another one.
    """
    stages = []
    for stage in plan.stages:
        own = served.layers[stage.first_layer : stage.end_layer]
        names = [Counter(found.values()).most_common(1)[0][0] for found in own]
        stages.append(stage.model_copy(update={"precisions": names}))
    changed: dict[str, object] = {"stages": stages}
    if stages != list(plan.stages):
        changed["predicted"] = None
    if plan.quantizer.moments is not None:
        beside = plan_path.parent if plan_path else Path()
        found = moments or beside / plan.quantizer.moments
        changed["quantizer"] = plan.quantizer.model_copy(update={"moments": str(found.resolve())})
    return plan.model_copy(update=changed)


def _write_launch_files(plan: Plan, settings: VllmSettings, folder: Path) -> None:
    write_json(folder / "plan.json", plan)
    write_text(folder / "engine.json", engine_json(plan, settings))
    shutil.copyfile(batch.__file__, folder / "batch.py")
    is_one = len({stage.node for stage in plan.stages}) == 1
    name, text = ("run.sh", run_script) if is_one else ("ray.sh", ray_script)
    write_text(folder / name, text(plan, settings))
    (folder / name).chmod(0o755)
