"""Loads lm-eval's tasks by name, with their data from a folder where that has it.

Any task, group or tag that lm-eval knows can be named. The data of a task TASK is searched in
DIR/TASK, in DIR/NAME with the name of the data set on the hub (and its configuration below that),
and in DIR itself where it has one of these names: files of JSON lines, JSON, CSV or parquet whose
names begin with their part (train, valid or dev, test). Labels in a separate file, such as PIQA's
`valid-labels.lst` beside `valid.jsonl`, become the column `label`. lm-eval fetches other data from
the hub.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmpq.artifact import read_text, write_text
from llmpq.errors import UserError, one_line
from llmpq.evaluation.texts import INSTALL

KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PARTS = {"train": "train", "valid": "validation", "dev": "validation", "test": "test"}
SPLITS = ("training_split", "validation_split", "test_split")


@dataclass(frozen=True)
class TaskData:
    """The settings of an lm-eval task that name its data.

    `splits` maps those of `SPLITS` that the task has to parts of the data set.
    """

    task: str
    data_set: str  # its name on the hub, without the owner
    configuration: str
    splits: Mapping[str, str]
    fewshot_split: str | None

    @classmethod
    def of(cls, task: str, config: Mapping[str, Any]) -> "TaskData":
        """The settings in a task's configuration."""
        return cls(
            task,
            str(config.get("dataset_path") or task).rpartition("/")[2],
            str(config.get("dataset_name") or ""),
            {key: str(config[key]) for key in SPLITS if config.get(key)},
            config.get("fewshot_split"),
        )


def load_tasks(
    names: Sequence[str], folder: Path | None, num_fewshot: int | None, scratch: Path
) -> Any:
    """The tasks as lm-eval's evaluator takes them, their data read.

    `folder` holds the user's data; `scratch` is an empty folder that must exist as long as the
    tasks. Raises `UserError` for an unknown task, for missing data, or where lm-eval is missing.
    """
    manager = _manager()
    _refuse_unknown(names, manager)
    if folder is not None:
        _use_folder(names, manager, folder, scratch)
    try:
        tasks = manager.load(list(names))
    except UserError:
        raise
    except Exception as error:  # readers and the hub's client raise many kinds
        raise UserError(_no_data_message(names, manager, folder, error)) from None
    for task in tasks["tasks"].values():
        if num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return tasks


def _manager() -> Any:
    try:
        from datasets import disable_progress_bars
        from lm_eval.api import task
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(f"--tasks: zero-shot tasks need lm-eval: {INSTALL}") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bars()
    task.tqdm = partial(task.tqdm, disable=True)  # there is no other switch after its import
    return TaskManager()


def _refuse_unknown(names: Sequence[str], manager: Any) -> None:
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        from difflib import get_close_matches

        near = get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"; similar: {', '.join(near)}" if near else ""
        raise UserError(f"--tasks: lm-eval has no task {', '.join(map(repr, unknown))}{hint}")


def _use_folder(names: Sequence[str], manager: Any, folder: Path, scratch: Path) -> None:
    """Replaces tasks that fetch data from the hub by tasks that read the user's files."""
    from lm_eval.tasks import TaskManager

    if not folder.is_dir():
        raise UserError(f"--task-data {folder}: no such folder")
    for name in dict.fromkeys(leaf for n in names for leaf in _leaves(n, manager.task_index)):
        entry = manager.task_index[name]
        data = TaskData.of(name, entry.cfg or {})
        files = _files(folder, data, scratch)
        if files:
            own = {"include": str(entry.yaml_path), "task": name}
            change = own | _overrides(data, files, scratch)
            write_text(scratch / "tasks" / f"{name}.yaml", json.dumps(change))  # JSON is YAML
    if (scratch / "tasks").is_dir():
        ours = TaskManager(include_path=str(scratch / "tasks"), include_defaults=False)
        manager.task_index.update({name: ours.task_index[name] for name in ours.all_subtasks})


def _leaves(name: str, index: Any) -> Iterator[str]:
    """The single tasks that a name stands for: itself, or those of its group or tag."""
    entry = index.get(name)
    if entry is None:
        return
    kind = entry.kind.name
    members = sorted(entry.tags) if kind == "TAG" else []
    if kind == "GROUP":
        listed = (entry.cfg or {}).get("task")
        members = [listed] if isinstance(listed, str) else list(listed or [])
    if kind not in ("TAG", "GROUP"):
        yield name
    for member in members:
        inner = member if isinstance(member, str) else member.get("task") or member.get("group")
        if isinstance(inner, str):
            yield from _leaves(inner, index)


def _files(folder: Path, data: TaskData, scratch: Path) -> dict[str, Path]:
    """The file of each part (train, validation, test) of a task's data; empty without files."""
    for inside in _folders(folder, data):
        files = {
            part: path
            for path in sorted(inside.iterdir())
            for start, part in PARTS.items()
            if path.suffix in KINDS and path.name.startswith(start)
        }
        if files:
            return {part: _labelled(path, scratch / data.task) for part, path in files.items()}
    return {}


def _folders(folder: Path, data: TaskData) -> list[Path]:
    inner, hub = data.configuration, data.data_set
    folders = [folder / data.task, folder / hub / inner, folder / hub]
    if folder.resolve().name in (data.task, hub):
        folders += [folder / inner, folder]
    return [inside for inside in folders if inside.is_dir()]


def _labelled(path: Path, scratch: Path) -> Path:
    """The file itself, or a copy with the labels of the file beside it."""
    labels_path = path.with_name(f"{path.stem}-labels.lst")
    if not labels_path.is_file():
        return path
    labels = read_text(labels_path).split()
    rows = [line for line in read_text(path).splitlines() if line.strip()]
    if len(labels) != len(rows):
        raise UserError(f"{labels_path}: has {len(labels)} labels for {len(rows)} rows of {path}")
    try:
        whole = [
            json.dumps(json.loads(row) | {"label": int(label)})
            for row, label in zip(rows, labels, strict=True)
        ]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: rows or labels are not as expected: {one_line(error)}") from None
    write_text(scratch / path.name, "\n".join(whole) + "\n")
    return scratch / path.name


def _overrides(data: TaskData, files: Mapping[str, Path], scratch: Path) -> dict[str, object]:
    """The settings of a task's configuration with which it reads these files."""
    wanted = data.splits
    splits = {key: part if part in files else None for key, part in wanted.items()}
    if not any(splits.get(key) for key in SPLITS[1:]):
        asked = " or ".join(wanted[key] for key in SPLITS[1:] if key in wanted)
        raise UserError(
            f"--task-data: {next(iter(files.values()))} is there, but task '{data.task}' is scored "
            f"on its {asked} split: add a file {asked}.jsonl"
        )
    more = {} if data.fewshot_split in (None, *files) else {"fewshot_split": None}
    first = next(iter(files.values()))
    return {
        "dataset_path": KINDS[first.suffix],
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {part: str(path.resolve()) for part, path in files.items()},
            "cache_dir": str(scratch / "cache"),
        },
        **splits,
        **more,
    }


def _no_data_message(
    names: Sequence[str], manager: Any, folder: Path | None, error: Exception
) -> str:
    reason = one_line(error)
    leaves = dict.fromkeys(leaf for name in names for leaf in _leaves(name, manager.task_index))
    where = f"{folder} lacks some of the data, and " if folder else ""
    example = next(iter(leaves), names[0])
    return (
        f"--tasks {','.join(names)}: {where}the data could not be read or fetched ({reason}); "
        f"put it into a folder, as DIR/{example}/validation.jsonl (or test.jsonl, .parquet), and "
        "give that as --task-data DIR"
    )
