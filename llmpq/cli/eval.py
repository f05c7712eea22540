"""`llmpq-eval`: perplexity of a plan, or of uniform precisions, on the weights that are served."""

from pathlib import Path
from typing import Any

import click

from llmpq.artifact import Provenance
from llmpq.cli.common import Command, common_options, console, emit
from llmpq.cli.profile import check_window
from llmpq.cli.profile_options import PrecisionNames
from llmpq.cli.progress import progress
from llmpq.cli.run import DTYPE_NAMES
from llmpq.errors import UserError
from llmpq.model_spec import ASSETS, DEFAULT_MODEL, load_model_spec
from llmpq.plan import Plan, load_plan, refuse_shared_stages


@click.command(cls=Command)
@click.argument("plans", nargs=-1, type=click.Path(path_type=Path))
@click.option("--model", help="Model directory; default: the plan's, or the shipped model.")
@click.option("--precisions", type=PrecisionNames(), help="Uniform precisions to evaluate as well.")
@click.option(
    "--text", multiple=True, type=click.Path(path_type=Path), help="Default: shipped text."
)
@click.option("--window", type=click.IntRange(min=2), help="Tokens a window; default 256 at most.")
@click.option("--max-windows", type=click.IntRange(min=1), help="Default: the whole text.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--dtype", type=click.Choice(DTYPE_NAMES), default="auto")
@common_options
def main(**flags: Any) -> None:
    """Perplexity of PLANS (plan.json files) and of uniform precisions, stage by stage."""
    subjects = _subjects(flags)
    from llmpq.models.stage_model import load_config
    from llmpq.models.tokenizer import load_tokenizer
    from llmpq.runtime.checkpoint import Checkpoint
    from llmpq.runtime.evaluate import evaluate, load_stages, text_windows
    from llmpq.runtime.loader import model_folder
    from llmpq.runtime.process import Role, choose_device, choose_dtype

    device = choose_device(flags["device"], Role(0, 1, 0, 1))
    dtype = choose_dtype(flags["dtype"], device)
    model = _one_model(flags, subjects)
    spec, folder = load_model_spec(model), model_folder(model)
    config, weights = load_config(folder), Checkpoint(folder)
    window = flags["window"] or min(256, spec.max_positions)
    check_window(window, spec.max_positions)
    tokenizer = load_tokenizer(folder)
    texts = flags["text"] or (ASSETS / "evaluation.txt",)
    windows = {t: text_windows(t, tokenizer, window, flags["max_windows"]) for t in texts}
    rows = []
    with progress(console(flags["quiet"]), "perplexity", len(subjects) * len(texts)) as shown:
        for name, cuts, precisions in _layouts(subjects, spec.num_layers):
            stages: list[Any] = []  # frees the last subject's before the next are loaded
            stages = load_stages(config, weights, cuts, precisions, dtype, device)
            for text, part in windows.items():
                loss = evaluate(stages, part)
                rows.append(_row(name, text, precisions, loss, stages))
                shown.update(len(rows))
    _show(rows, window, flags)


def _subjects(flags: dict[str, Any]) -> list[tuple[str, Any]]:
    """(name, plan or precision) of everything to evaluate."""
    plans = [(str(path), _runnable(path)) for path in flags["plans"]]
    default = () if plans else ("16",)
    return plans + [(f"uniform-{p}", p) for p in flags["precisions"] or default]


def _runnable(path: Path) -> Plan:
    plan = load_plan(path)
    refuse_shared_stages(plan, path)
    return plan


def _one_model(flags: dict[str, Any], subjects: list[tuple[str, Any]]) -> str:
    names = {subject.model.name for _, subject in subjects if not isinstance(subject, str)}
    if flags["model"]:
        return str(flags["model"])
    if len(names) > 1:
        raise UserError(f"the plans are for different models: {', '.join(sorted(names))}")
    return names.pop() if names else DEFAULT_MODEL


def _layouts(
    subjects: list[tuple[str, Any]], num_layers: int
) -> list[tuple[str, list[tuple[int, int]], list[str]]]:
    layouts = []
    for name, subject in subjects:
        if isinstance(subject, str):
            layouts.append((name, [(0, num_layers)], [subject] * num_layers))
            continue
        if subject.model.num_layers != num_layers:
            raise UserError(f"{name}: is for {subject.model.num_layers} layers, not {num_layers}")
        cuts = [(stage.first_layer, stage.end_layer) for stage in subject.stages]
        layouts.append((name, cuts, subject.precisions))
    return layouts


def _row(name: str, text: Path, precisions: list[str], loss: Any, stages: Any) -> dict[str, Any]:
    return {
        "name": name,
        "text": text.name,
        "perplexity": loss.perplexity,
        "loss": loss.mean,
        "num_tokens": loss.num_tokens,
        "precisions": precisions,
        "weight_bytes": sum(stage.weight_bytes() for stage in stages),
    }


def _show(rows: list[dict[str, Any]], window: int, flags: dict[str, Any]) -> None:
    import json

    from rich.table import Table

    data = {
        "schema_version": 1,
        "kind": "evaluation",
        "window": window,
        "rows": rows,
        "provenance": Provenance.here().model_dump(),
    }
    emit(json.dumps(data, indent=1), flags["json_path"])
    table = Table("what", "text", "perplexity", "tokens", "weights MiB")
    for row in rows:
        name = f"{row['name']} ({' '.join(row['precisions'])})" if flags["verbose"] else row["name"]
        table.add_row(
            name,
            row["text"],
            f"{row['perplexity']:.4f}",
            str(row["num_tokens"]),
            f"{row['weight_bytes'] / 1024**2:.2f}",
        )
    console(flags["quiet"]).print(table)


if __name__ == "__main__":
    main()
