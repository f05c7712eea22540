"""Three methods for the same perplexity: stage by stage, through stage processes, layer by layer.

`stage_by_stage` holds all stages in this process and can answer tasks too; `through_processes` is
one worker's part where each stage has its process and hidden states travel by the runtime's own
transport; `layer_by_layer` holds one layer at a time, for models larger than memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.inventory import check_checkpoint
from llmpq.checkpoint.loader import model_folder
from llmpq.checkpoint.roundings import Roundings, load_roundings
from llmpq.errors import UserError
from llmpq.evaluation.harness import TaskScore, harness_model, run_tasks
from llmpq.evaluation.perplexity import Loss, evaluate, load_stages
from llmpq.evaluation.pipeline_loss import PipelineLoss
from llmpq.evaluation.scorer import Scorer
from llmpq.evaluation.streaming import stream
from llmpq.model_lookup import load_model_spec
from llmpq.models.stage_model import load_config
from llmpq.plan_data import Plan
from llmpq.prompts.tokenizer import load_tokenizer
from llmpq.quantizer import Quantizer
from llmpq.runtime.transport import Transport
from llmpq.runtime.weights_hash import gather_hashes, weights_hash

OnProgress = Callable[[int, str], None]  # how much is done, and of what


@dataclass(frozen=True)
class EvalSubject:
    """What is evaluated: a precision for every layer, cut into stages as a plan says."""

    name: str
    cuts: tuple[tuple[int, int], ...]
    precisions: tuple[str, ...]
    quantizer: Quantizer
    plan: Path | None = None

    def roundings(self, moments: Path | None) -> Roundings:
        """How its weights are rounded; `moments`: a file in the place of the plan's own."""
        override = moments if self.quantizer.method == "gptq" else None
        return load_roundings(self.quantizer, override, self.plan)


@dataclass(frozen=True)
class LoadedModel:
    """Where weights come from, and how they are held."""

    config: Any
    weights: Checkpoint
    tokenizer: Any
    max_positions: int
    dtype: Any  # torch.dtype
    device: Any  # torch.device
    moments: Path | None
    hashes: bool  # whether weights are hashed, which reads all of them
    notes: list[str] = field(default_factory=list)  # on what of the checkpoint is not read


def load_model(
    name: str, device: Any, dtype: Any, moments: Path | None, hashes: bool
) -> LoadedModel:
    """Opens the files of a model; its weights are read later."""
    folder = model_folder(name)
    config, weights = load_config(folder), Checkpoint(folder)
    return LoadedModel(
        config=config,
        weights=weights,
        tokenizer=load_tokenizer(folder),
        max_positions=load_model_spec(name).max_positions,
        dtype=dtype,
        device=device,
        moments=moments,
        hashes=hashes,
        notes=check_checkpoint(config, weights),
    )


def plan_subject(path: Path, plan: Plan, num_layers: int) -> EvalSubject:
    """A plan as what is evaluated; raises `UserError` where it is for another number of layers."""
    if plan.model.num_layers != num_layers:
        raise UserError(f"{path}: is for {plan.model.num_layers} layers, not {num_layers}")
    cuts = tuple((stage.first_layer, stage.end_layer) for stage in plan.stages)
    return EvalSubject(str(path), cuts, tuple(plan.precisions), plan.quantizer, path)


def uniform_subject(precision: str, num_layers: int, quantizer: Quantizer) -> EvalSubject:
    """All layers at one precision, in one stage."""
    same = (precision,) * num_layers
    return EvalSubject(f"uniform-{precision}", ((0, num_layers),), same, quantizer)


@dataclass(frozen=True)
class EvalRow:
    """A subject's loss on a text. `divergence`: from the 16-bit model, nats per token."""

    subject: EvalSubject
    text: str
    loss: Loss
    weight_bytes: int | None = None
    weights_sha256: tuple[str, ...] = ()  # one per stage, where asked for
    divergence: float | None = None


@dataclass(frozen=True)
class TaskSet:
    """lm-eval's tasks, loaded, and how many samples of each."""

    tasks: Any
    limit: int | None


Windows = Mapping[str, Any]  # text -> [n, W] token ids


def stage_by_stage(
    model: LoadedModel,
    subjects: Sequence[EvalSubject],
    windows: Windows,
    task: TaskSet | None,
    on_progress: OnProgress,
) -> tuple[list[EvalRow], list[tuple[EvalSubject, TaskScore]]]:
    """All stages in this process, one after the other."""
    rows: list[EvalRow] = []
    scores: list[tuple[EvalSubject, TaskScore]] = []
    count = _ProgressSum(on_progress)
    for subject in subjects:
        stages: list[Any] = []  # frees the last subject's before the next are loaded
        stages = load_stages(
            model.config,
            model.weights,
            subject.cuts,
            subject.precisions,
            model.dtype,
            model.device,
            subject.roundings(model.moments),
        )
        held = sum(stage.weight_bytes() for stage in stages)
        hashes = tuple(map(weights_hash, stages)) if model.hashes else ()
        for text, part in windows.items():
            loss = evaluate(stages, part, count.of(subject.name))
            rows.append(EvalRow(subject, text, loss, held, hashes))
        if task is not None:
            scorer = Scorer(stages, model.max_positions)
            answering = harness_model(scorer, model.tokenizer, count.answers(subject.name))
            found = run_tasks(task.tasks, answering, task.limit)
            scores += [(subject, score) for score in found]
    return rows, scores


def through_processes(
    model: LoadedModel,
    subjects: Sequence[EvalSubject],
    texts: Sequence[str],
    windows: Windows,
    transport: Transport,
    on_progress: OnProgress,
) -> list[EvalRow]:
    """This process's stage of every subject. Only the first stage needs `windows`."""
    rows: list[EvalRow] = []
    count = _ProgressSum(on_progress)
    for subject in subjects:
        stage: Any = None  # frees the last subject's before the next is loaded
        stage = _own_stage(model, subject, transport.rank)
        pipeline = PipelineLoss(stage, transport)
        held = sum(int(one) for one in transport.gather(_number(stage.weight_bytes())))
        hashes = tuple(gather_hashes(stage, transport)) if model.hashes else ()
        for text in texts:
            first = transport.rank == 0
            on_windows = count.of(subject.name)
            loss = (
                pipeline.lead(windows[text], on_windows=on_windows) if first else pipeline.follow()
            )
            rows.append(EvalRow(subject, text, loss, held, hashes))
    return rows


def layer_by_layer(
    model: LoadedModel, subjects: Sequence[EvalSubject], windows: Windows, on_progress: OnProgress
) -> list[EvalRow]:
    """Subjects that are rounded alike share a pass over the layers."""
    found: dict[tuple[str, str], EvalRow] = {}
    count = _ProgressSum(on_progress)
    for group in _rounded_alike(subjects):
        roundings = group[0].roundings(model.moments)
        for text, part in windows.items():
            streamed = stream(
                model.config,
                model.weights,
                [subject.precisions for subject in group],
                part,
                model.dtype,
                model.device,
                roundings,
                on_layer=count.of(text),
            )
            for subject, one in zip(group, streamed, strict=True):
                row = EvalRow(subject, text, one.loss, divergence=one.divergence)
                found[subject.name, text] = row
    return [found[subject.name, text] for subject in subjects for text in windows]


def num_passes(subjects: Sequence[EvalSubject], windows: Windows) -> int:
    """How often `layer_by_layer` goes through the layers."""
    return len(list(_rounded_alike(subjects))) * len(windows)


def _rounded_alike(subjects: Sequence[EvalSubject]) -> Iterator[list[EvalSubject]]:
    kinds: dict[tuple[Quantizer, Path | None], list[EvalSubject]] = {}
    for subject in subjects:
        place = subject.plan.parent if subject.plan and subject.quantizer.moments else None
        kinds.setdefault((subject.quantizer, place), []).append(subject)
    yield from kinds.values()


def _own_stage(model: LoadedModel, subject: EvalSubject, rank: int) -> Any:
    [stage] = load_stages(
        model.config,
        model.weights,
        [subject.cuts[rank]],
        subject.precisions,
        model.dtype,
        model.device,
        subject.roundings(model.moments),
    )
    return stage


def _number(value: int) -> Any:
    import torch

    return torch.tensor(value)


class _ProgressSum:
    """Adds up what several loops have done, each of which counts from 1."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress, self._done = on_progress, 0

    def of(self, what: str) -> Callable[[int], None]:
        """To be called with how much of this loop is done."""
        before = 0

        def note(done: int) -> None:
            nonlocal before
            self._done += done - before
            before = done
            self._on_progress(self._done, what)

        return note

    def answers(self, what: str) -> Callable[[int, int], None]:
        """For answers to a task's requests, which are only said."""
        return lambda done, total: self._on_progress(
            self._done, f"{what}, tasks: {done} of {total}"
        )
