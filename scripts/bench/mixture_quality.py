#!/usr/bin/env python
"""Precisions of a trained mixture of experts: perplexity and tokens/s against weight bytes.

Every precision for all layers alike, experts apart included, and for the bytes of each uniform one
the plan that takes no more of them with the least sensitivity, as `llmpq-profile sensitivity`
measures it on a text of its own. The model is what scripts/train_mixture.py makes. Perplexity is of
text that neither has seen; tokens/s are of static batches on this CPU, the median of alternating
rounds.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from _common import Benchmark, Check, arguments, finish, machine

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.costs.memory import layer_weight_bytes
from llmpq.evaluation.perplexity import evaluate, load_stages, text_windows
from llmpq.evaluation.scorer import Scorer
from llmpq.machine import host_cpu
from llmpq.model_lookup import load_model_spec
from llmpq.models.stage_model import load_config
from llmpq.planner.partition import Fronts, like_starts
from llmpq.precision import with_fewer_for_experts
from llmpq.profile_data import load_sensitivity
from llmpq.prompts.tokenizer import load_tokenizer

CPU = torch.device("cpu")
UNIFORM = ("16", "8", "4", "3")
OPTIONS = with_fewer_for_experts(UNIFORM)
WINDOW, PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 256, 16, 32, 48


def measured_sensitivity(model: Path, text: Path, folder: Path) -> Mapping[str, Sequence[float]]:
    """By precision and layer, in nats a token."""
    output = folder / "sensitivity.json"
    command = [sys.executable, "-m", "llmpq.cli.main", "profile", "sensitivity"]
    command += ["--model", str(model), "--text", str(text), "--indicator", "measured"]
    command += ["--precisions", ",".join(OPTIONS), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return load_sensitivity(output).table()


def best_within(
    omega: Mapping[str, Sequence[float]], num_bytes: Mapping[str, int], room: int
) -> tuple[str, ...]:
    """The precision of every layer: the least sensitivity in no more than `room` bytes."""
    table = np.array([omega[name] for name in OPTIONS]).T
    sizes = np.array([num_bytes[name] for name in OPTIONS], dtype=float)
    fronts = Fronts(table, sizes, np.ones(len(OPTIONS), dtype=bool), like_starts(table))
    layers = len(table)
    point = fronts.front(0, layers).best(room - layers * float(sizes.min()))
    return tuple(OPTIONS[option] for option in fronts.choice(0, layers, point))


def plans_of(omega: Mapping[str, Sequence[float]], spec: Any) -> dict[str, tuple[str, ...]]:
    """What is compared, by name."""
    num_bytes = {name: layer_weight_bytes(spec, name, host_cpu()) for name in OPTIONS}
    plans = {name: (name,) * spec.num_layers for name in OPTIONS}
    for name in ("8", "4"):
        room = spec.num_layers * num_bytes[name]
        plans[f"planned, bytes of {name}"] = best_within(omega, num_bytes, room)
    return plans


def main() -> None:
    """Measures all and prints."""
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the folder of the mixture")
    parser.add_argument("--calibration", type=Path, required=True, help="a text")
    parser.add_argument("--text", type=Path, required=True, help="the text of the perplexity")
    options = parser.parse_args()
    spec, config = load_model_spec(str(options.model)), load_config(options.model)
    with tempfile.TemporaryDirectory() as folder:
        omega = measured_sensitivity(options.model, options.calibration, Path(folder))
    tokenizer = load_tokenizer(options.model)
    windows = text_windows(options.text, tokenizer, WINDOW, 40 if options.quick else 200)
    prompts = windows[:PROMPTS, :PROMPT_TOKENS].tolist()
    rows, loaded = {}, {}
    for name, precisions in plans_of(omega, spec).items():
        cuts = [(0, spec.num_layers)]
        weights = Checkpoint(options.model)
        loaded[name] = load_stages(config, weights, cuts, precisions, torch.bfloat16, CPU)
        held = sum(layer_weight_bytes(spec, p, host_cpu()) for p in precisions)
        perplexity = evaluate(loaded[name], windows).perplexity
        rows[name] = {"name": name, "layers_mib": held / 2**20, "perplexity": perplexity}
        rows[name]["precisions"] = ", ".join(precisions)
        print(rows[name], file=sys.stderr, flush=True)
    speeds: dict[str, list[float]] = {name: [] for name in loaded}
    for _ in range(2 if options.quick else 5):
        for name, stages in loaded.items():
            scorer, start = Scorer(stages, config.max_position_embeddings), time.monotonic()
            scorer.generate(prompts, NEW_TOKENS)
            speeds[name].append(PROMPTS * NEW_TOKENS / (time.monotonic() - start))
    for name, row in rows.items():
        row["tokens_per_s"] = median(speeds[name])
    checks = []
    for name in ("8", "4"):
        ours, theirs = rows[f"planned, bytes of {name}"], rows[name]
        rise = 100 * (ours["perplexity"] / theirs["perplexity"] - 1)
        speed = ours["tokens_per_s"] / theirs["tokens_per_s"]
        what = f"at the bytes of uniform {name}"
        checks += [
            Check(f"perplexity {what}, relative", rise, "%", "<= 0", rise <= 0, len(windows)),
            Check(f"tokens/s {what}", speed, "x", "stated", None, 5, "no target"),
        ]
    finish(Benchmark("mixture_quality", machine(), checks, list(rows.values())), options.json)


if __name__ == "__main__":
    main()
