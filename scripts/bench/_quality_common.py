"""What the parts of quality.py share: models and texts, loss and KL divergence, sensitivity files.

A `Mixed` holds a model once at every precision; the layers of a plan are taken from these copies.
All is measured in fp32 on the CPU, so that the rounding of activations does not blur what the
rounding of weights costs. Loss and KL divergence come a window at a time: the difference of two
ways to quantize is then known with its standard error over windows, which share their text.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Check, shared_data
from torch import nn

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.loader import load_stage, model_folder
from llmpq.checkpoint.roundings import NEAREST, Roundings
from llmpq.evaluation.perplexity import text_windows
from llmpq.evaluation.streaming import DamageSum, Streamed
from llmpq.model_lookup import DEFAULT_MODEL, load_model_spec
from llmpq.model_spec import ASSETS, ModelSpec
from llmpq.models.family import find
from llmpq.models.stage_model import LayerRange, StageModel, load_config
from llmpq.plan_data import Plan
from llmpq.profile_data import Sensitivity, load_sensitivity
from llmpq.profiler.indicators import random_rows, sensitivity_cells
from llmpq.prompts.tokenizer import load_tokenizer
from llmpq.quantizer import Quantizer

ROOT = Path(__file__).resolve().parents[2]
PRECISIONS = ("16", "8", "4", "3")
WINDOW = 256
QUICK_WINDOWS = 8
AT_ONCE = 8  # windows whose logits are held at a time
CPU, DTYPE = torch.device("cpu"), torch.float32
Logits = Callable[[torch.Tensor], torch.Tensor]  # [B, S] token ids to [B, S, V]


@dataclass(frozen=True)
class Settings:
    """How to run. `folder`: of files that parts share; `gptqmodel`: a Python that has it.

    `num_windows`: of a text, at most.
    """

    quick: bool
    folder: Path
    num_windows: int
    gptqmodel: str | None = None

    def subjects(self) -> list["Subject"]:
        """The shipped model, and where the data folder is there, two more."""
        return subjects()[:1] if self.quick else subjects()


@dataclass(frozen=True)
class Subject:
    """A model, the text it is calibrated on and those it is evaluated on."""

    name: str
    model: str
    calibration: Path
    evaluation: tuple[Path, ...]

    def __post_init__(self) -> None:
        calibration = self.calibration.read_bytes()
        assert all(text.read_bytes() != calibration for text in self.evaluation)

    @cached_property
    def folder(self) -> Path:
        """Of its files."""
        return model_folder(self.model)

    @cached_property
    def spec(self) -> ModelSpec:
        """Its shape."""
        return load_model_spec(self.model)

    @cached_property
    def config(self) -> Any:
        """As transformers reads it."""
        return load_config(self.folder)

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return self.spec.num_layers

    def windows(self, text: Path, most: int) -> torch.Tensor:
        """`[windows, WINDOW]` token ids of a text."""
        return text_windows(text, load_tokenizer(self.folder), WINDOW, most)

    def stage(
        self, precision: str, roundings: Roundings = NEAREST, files: Path | None = None
    ) -> StageModel:
        """All layers at one precision; `files`: another folder of weights."""
        layers = LayerRange(0, self.num_layers, self.num_layers)
        weights, precisions = Checkpoint(files or self.folder), [precision] * self.num_layers
        return load_stage(self.config, weights, layers, precisions, DTYPE, CPU, roundings=roundings)


def subjects() -> list[Subject]:
    """The models that are here."""
    shipped = Subject(
        DEFAULT_MODEL, DEFAULT_MODEL, ASSETS / "calibration.txt", (ASSETS / "evaluation.txt",)
    )
    data = shared_data()
    if data is None:
        return [shipped]
    text, models = data / "text", data / "models"
    tests = (text / "wikitext2.test.txt", text / "ptb.test.txt")
    tale = "tale-llama-11m", str(models / "tale-llama-11m"), text / "wiki.calibration.txt", tests
    stories = (
        "stories-260k",
        str(models / "stories-260k"),
        text / "tinystories.calibration.txt",
        (text / "tinystories.eval.txt",),
    )
    return [shipped, Subject(*tale), Subject(*stories)]


# ---- loss and KL divergence


@dataclass(frozen=True)
class Measured:
    """Mean loss of every window and its mean KL divergence from 16 bits, in nats a token."""

    loss: np.ndarray
    kl: np.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return float(np.exp(self.loss.mean()))

    def rise(self, base: "Measured") -> float:
        """Of the loss over that of `base`, in nats a token."""
        return float((self.loss - base.loss).mean())

    def rise_percent(self, base: "Measured") -> float:
        """Of the perplexity."""
        return float(100 * np.expm1(self.rise(base)))

    def error_of_rise(self, base: "Measured") -> float:
        """Standard error of `rise` over windows, in nats a token; for few windows a rough one."""
        return standard_error(self.loss - base.loss)

    def figures(self, base: "Measured") -> dict[str, float]:
        """As a row shows them."""
        return {
            "perplexity": self.perplexity,
            "rise_percent": self.rise_percent(base),
            "rise_error_percent": 100 * self.error_of_rise(base),
            "kl_nats": float(self.kl.mean()),
        }


def standard_error(values: np.ndarray) -> float:
    """Of the mean."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("inf")


@torch.inference_mode()
def measure(
    exact: Logits, others: Sequence[Logits], windows: torch.Tensor
) -> tuple[Measured, list[Measured]]:
    """Of the exact model, and of each of the others."""
    found: list[list[Streamed]] = [[] for _ in range(1 + len(others))]
    for part in windows.split(AT_ONCE):
        expected = _log_probabilities(exact, part)
        found[0] += _of_windows(expected, expected, part)
        for streamed, other in zip(found[1:], others, strict=True):
            streamed += _of_windows(_log_probabilities(other, part), expected, part)
    base, *rest = [_measured(streamed) for streamed in found]
    return base, rest


def _log_probabilities(logits: Logits, token_ids: torch.Tensor) -> torch.Tensor:
    """`[B, S - 1, V]`."""
    return logits(token_ids)[:, :-1].float().log_softmax(-1)


def _of_windows(own: torch.Tensor, base: torch.Tensor, token_ids: torch.Tensor) -> list[Streamed]:
    """Loss and divergence of every window."""
    found = []
    for mine, exact, tokens in zip(own, base, token_ids, strict=True):
        total = DamageSum()
        total.add(mine, tokens[1:], exact)
        found.append(total.result())
    return found


def _measured(windows: Sequence[Streamed]) -> Measured:
    losses, divergences = [w.loss.mean for w in windows], [w.divergence for w in windows]
    return Measured(np.array(losses), np.array(divergences, dtype=float))


def logits_of(stage: StageModel) -> Logits:
    """What a whole model says."""

    def logits(token_ids: torch.Tensor) -> torch.Tensor:
        hidden = stage.run(stage.embed(token_ids))
        return stage.head(hidden)

    return logits


class Mixed:
    """A model at every precision; plans are made of the layers of these copies."""

    def __init__(
        self, subject: Subject, roundings: Roundings, precisions: Sequence[str] = PRECISIONS
    ) -> None:
        copies = {p: subject.stage(p, roundings) for p in {"16", *precisions}}
        self._layers = {p: list(_layers(stage)) for p, stage in copies.items()}
        self._stage, self._num_layers = copies["16"], subject.num_layers
        self._logits = logits_of(self._stage)

    def measure(
        self, plans: Sequence[Sequence[str]], windows: torch.Tensor
    ) -> tuple[Measured, list[Measured]]:
        """Of the model at 16 bits, and of every plan; equal plans are measured once."""
        exact = partial(self.logits, ["16"] * self._num_layers)
        different = list(dict.fromkeys(tuple(plan) for plan in plans))
        base, found = measure(exact, [partial(self.logits, plan) for plan in different], windows)
        known = dict(zip(different, found, strict=True))
        return base, [known[tuple(plan)] for plan in plans]

    def logits(self, plan: Sequence[str], token_ids: torch.Tensor) -> torch.Tensor:
        """Of a precision for every layer."""
        layers = _layers(self._stage)
        for index, precision in enumerate(plan):
            layers[index] = self._layers[precision][index]
        return self._logits(token_ids)


def _layers(stage: StageModel) -> nn.ModuleList:
    layers = find(stage.model, f"{stage.family.decoder}.{stage.family.layers}")
    assert isinstance(layers, nn.ModuleList)
    return layers


# ---- llmpq's own commands


def llmpq(*words: object) -> str:
    """Runs a command; what it printed. Raises `CalledProcessError`; its own words tell why."""
    line = [sys.executable, "-m", "llmpq.cli.main", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.PIPE, env=environment)
    return done.stdout.decode()


def sensitivity_path(
    settings: Settings, subject: Subject, indicator: str = "measured", *more: str
) -> Path:
    """A sensitivity file at four precisions, made once."""
    name = "-".join((subject.name, indicator, *more)).replace("--", "")
    path = settings.folder / f"{name}.json"
    if not path.exists():
        words = ["--model", subject.model, "--text", subject.calibration]
        words += ["--indicator", indicator, "--precisions", ",".join(PRECISIONS), *more]
        moments = settings.folder / f"{subject.name}.moments.safetensors"
        where = ["--dtype", "float32", "--device", "cpu", "--moments", moments, "-o", path]
        if settings.quick and "--max-windows" not in more:
            words += ["--max-windows", str(QUICK_WINDOWS // 4)]
        llmpq("profile", "sensitivity", "-q", *words, *where)
    return path


def sensitivity(
    settings: Settings, subject: Subject, indicator: str = "measured", *more: str
) -> Sensitivity:
    """What such a file holds."""
    return load_sensitivity(sensitivity_path(settings, subject, indicator, *more))


def hand_plan(subject: Subject, quantizer: Quantizer) -> Plan:
    """Four stages, unevenly cut, the four precisions in turn."""
    total = subject.num_layers
    cuts = [0, 1, total // 3 + 1, 3 * total // 4, total]
    stages = [
        {
            "rank": rank,
            "node": "box",
            "devices": ["t4-16g"],
            "first_layer": first,
            "end_layer": end,
            "precisions": [PRECISIONS[layer % len(PRECISIONS)] for layer in range(first, end)],
        }
        for rank, (first, end) in enumerate(pairwise(cuts))
    ]
    nodes = [{"name": "box", "devices": [{"type": "t4-16g", "count": len(stages)}]}]
    return Plan.model_validate(
        {
            "model": subject.spec.model_dump(),
            "workload": {"prompt_tokens": 8, "new_tokens": 4, "num_requests": 4},
            "cluster": {"name": "box", "nodes": nodes},
            "method": "hand",
            "batch": 4,
            "prefill_micro_batch": 2,
            "decode_micro_batch": 2,
            "quantizer": quantizer.model_dump(),
            "stages": stages,
        }
    )


def random_table(subject: Subject, seed: int) -> dict[str, list[float]]:
    """Random sensitivities, by precision and layer."""
    rows = random_rows(sensitivity_cells(subject.num_layers, PRECISIONS), seed)
    table: dict[str, list[float]] = {p: [0.0] * subject.num_layers for p in PRECISIONS}
    for row in rows:
        table[row.precision][row.layer] = row.sensitivity
    return table


def stated(name: str, value: float, unit: str, samples: int) -> Check:
    """A figure without a target."""
    return Check(name, value, unit, "stated", None, samples, why="no target; the figure is stated")
