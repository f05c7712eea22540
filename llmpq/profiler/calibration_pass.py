"""Gathers the calibration statistics for GPTQ in one streaming pass at 16 bits."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from llmpq.checkpoint.calibration_file import CalibrationFile, CalibrationWriter
from llmpq.evaluation.calibration import CalibrationMeter, block_columns, default_block
from llmpq.model_spec import ModelSpec
from llmpq.models.stage_model import StageModel
from llmpq.profiler.indicators import LoadableModel


def gather_calibration(
    loadable: LoadableModel,
    windows: Tensor,
    path: Path,
    about: Mapping[str, str],
    block: int | None = None,
    on_layer: Callable[[int], None] = lambda _: None,
) -> CalibrationFile:
    """Writes the statistics of every linear's inputs on `[n, W]` windows, a layer at a time.

    `block` is the most columns of a block of H.
    """
    writer, keys = CalibrationWriter(path), dict[str, str]()
    seen, nearest = dict[str, int](), list[str]()

    @contextmanager
    def watch(stage: StageModel) -> Iterator[None]:
        with CalibrationMeter(stage, block) as meter:
            yield
        for key, statistics in meter.statistics().items():
            writer.add(key, statistics)
        keys.update(meter.keys)
        seen.update(meter.seen)
        nearest.extend(meter.rounded_to_nearest())

    loadable.run(windows, watch, on_layer)
    writer.close(keys, about, seen, nearest)
    return CalibrationFile(path)


def most_bytes(spec: ModelSpec, block: int | None = None) -> int:
    """An upper bound of the file's bytes: n times a block's columns for a linear of n inputs."""
    total = 0
    for kind in spec.kind_of_layers:
        for op, _, number, of_expert in spec.kind_specs[kind].held("16"):
            columns = block_columns(op.in_features, default_block(of_expert, block))
            total += number * op.in_features * columns
    return total
