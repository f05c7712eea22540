"""Gathers the calibration statistics for GPTQ in one streaming pass at 16 bits."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from llmpq.checkpoint.calibration_file import CalibrationFile, CalibrationWriter
from llmpq.evaluation.calibration import CalibrationMeter, block_columns
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

    @contextmanager
    def watch(stage: StageModel) -> Iterator[None]:
        with CalibrationMeter(stage, block) as meter:
            yield
        for key, statistics in meter.statistics().items():
            writer.add(key, statistics)
        keys.update(meter.keys)

    loadable.run(windows, watch, on_layer)
    writer.close(keys, about)
    return CalibrationFile(path)


def most_bytes(spec: ModelSpec, block: int | None = None) -> int:
    """An upper bound of the file's bytes: n times a block's columns for a linear of n inputs."""
    sizes = [op.in_features for op in spec.linears]
    return spec.num_layers * sum(size * block_columns(size, block) for size in sizes)
