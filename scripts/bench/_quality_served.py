"""Are the weights that a run serves those that an evaluation measured?

The same plan is run and evaluated, by processes of their own; every stage's packed weights are
hashed in both. Rounding to nearest, and GPTQ with the moments file of a sensitivity file.
"""

import json
from pathlib import Path
from typing import Any

from _common import Check
from _quality_common import Settings, Subject, hand_plan, llmpq, sensitivity_path

from llmpq.artifact import write_json
from llmpq.profile_data import load_sensitivity
from llmpq.quantizer import Quantizer

NUM_PROMPTS = 4
PROMPT = list(range(3, 11))
WHERE = ("--dtype", "bfloat16", "--device", "cpu")


def run(settings: Settings) -> tuple[list[Check], list[dict[str, Any]]]:
    """A row for each model and quantizer."""
    rows = [
        row(settings, subject, quantizer)
        for subject in settings.subjects()
        for quantizer in quantizers(settings, subject)
    ]
    return [check(one) for one in rows], rows


def quantizers(settings: Settings, subject: Subject) -> list[Quantizer]:
    """Both; one where time is short."""
    return [gptq(settings, subject)] + ([] if settings.quick else [Quantizer()])


def gptq(settings: Settings, subject: Subject) -> Quantizer:
    """With the moments that its sensitivity file names."""
    path = sensitivity_path(settings, subject)
    found = load_sensitivity(path).quantizer
    if found.moments is None:
        path = sensitivity_path(settings, subject, "measured", "--quantizer", "gptq")
        found = load_sensitivity(path).quantizer
    return found.model_copy(update={"moments": str(path.parent / str(found.moments))})


def row(settings: Settings, subject: Subject, quantizer: Quantizer) -> dict[str, Any]:
    """Hashes of all stages, by a run and by an evaluation."""
    plan = settings.folder / f"{subject.name}-{quantizer.method}-served.json"
    write_json(plan, hand_plan(subject, quantizer))
    served, measured = run_hashes(settings, subject, plan), eval_hashes(settings, subject, plan)
    return {
        "model": subject.name,
        "quantizer": quantizer.method,
        "served": served,
        "measured": measured,
    }


def run_hashes(settings: Settings, subject: Subject, plan: Path) -> list[str]:
    """Of the stages of a run."""
    prompts, report = settings.folder / "prompts.jsonl", settings.folder / "report.json"
    lines = [{"id": i, "prompt_token_ids": PROMPT} for i in range(NUM_PROMPTS)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = settings.folder / f"{plan.stem}.jsonl"
    words = ["--plan", plan, "--prompts", prompts, "--output", output, "--report", report]
    llmpq("run", "-q", *words, *WHERE)
    return [stage["weights_sha256"] for stage in json.loads(report.read_text())["stages"]]


def eval_hashes(settings: Settings, subject: Subject, plan: Path) -> list[str]:
    """Of the stages of an evaluation."""
    out = settings.folder / "evaluation.json"
    words = ["--text", subject.evaluation[0], "--window", "64", "--max-windows", "2"]
    llmpq("eval", "-q", plan, *words, *WHERE, "--json", out)
    return list(json.loads(out.read_text())["rows"][0]["weights_sha256"])


def check(row: dict[str, Any]) -> Check:
    """All of them equal, and one for each stage."""
    pairs = list(zip(row["served"], row["measured"], strict=True))
    equal = sum(a == b for a, b in pairs)
    name = f"{row['model']}, {row['quantizer']}: stages whose weights are those measured"
    target = f"{len(pairs)} of {len(pairs)}"
    return Check(name, equal, "stages", target, equal == len(pairs) > 0, len(pairs))
