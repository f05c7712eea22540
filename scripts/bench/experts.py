"""How far off predicted decode times of a layer with 64 experts are, on this CPU.

A layer of random weights is timed at many numbers of rows, in rounds, so that a slow moment of the
machine touches no number alone. The cost model is fitted to some of these numbers, as to a
profile, and predicts the others. Beside it: what a model that does not know experts would predict,
and how many experts were used, measured and expected.

    python scripts/bench/experts.py [--quick] [--json OUT.json] [--threads N] [--precisions 16,4]
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Benchmark, Check, arguments, finish, machine
from transformers import AutoConfig

from llmpq.costs.fits import fit
from llmpq.costs.routing import balanced
from llmpq.model_spec import ModelSpec
from llmpq.models.count_model import count_params
from llmpq.models.stage_model import load_config
from llmpq.profile_data import Candidate, ProfileRow
from llmpq.profiler.cells import Cell, Cells, profile_row
from llmpq.profiler.drift import MachineSpeed
from llmpq.profiler.grid import STAGE_PHASE
from llmpq.profiler.stacks import Bench, stacked_layers

CPU = torch.device("cpu")
PAST = 128
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
FITTED = (1, 2, 6, 24, 96, 128)  # the others are predicted
SHOWN = (1, 4, 16, 64)
MOST_ERROR = 0.15
MODEL = {
    "vocab_size": 97,
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "num_local_experts": 64,
    "num_experts_per_tok": 8,
}


def main() -> None:
    """Measures and prints."""
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--precisions", default="16,4", help="of the layer (default: 16,4)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    precisions = tuple(options.precisions.split(","))
    with tempfile.TemporaryDirectory(prefix="llmpq-experts-") as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(AutoConfig.for_model("mixtral", **MODEL).to_dict()))
        spec = count_params(path)
        rows = measure(path, spec, precisions, rounds=4 if options.quick else 15)
    finish(benchmark(spec, rows, precisions), options.json)


def measure(
    path: Path, spec: ModelSpec, precisions: Sequence[str], rounds: int
) -> list[ProfileRow]:
    """A row for each precision and number of requests."""
    layers = stacked_layers(spec.kind_of_layers, 0, 2)
    bench = Bench(load_config(path), tuple(precisions), layers, torch.bfloat16, CPU, max(ROWS))
    cells = Cells(precisions[0])
    for precision in precisions:
        for requests in ROWS:
            key = Candidate(precision, "decode", requests, PAST)
            stage = key._replace(precision=precisions[0], phase=STAGE_PHASE["decode"])
            for one in (stage, key):
                cells.setdefault(one, Cell(one))
    with torch.inference_mode():
        for _ in range(rounds):
            for cell in cells.values():
                _visit(bench, cell)
    level_ms = float(np.median([ms for cell in cells.values() for ms in cell.levels_ms]))
    usual = MachineSpeed(level_ms, scales=True)
    return [
        profile_row(cell, cells.estimate(cell, usual), spec.model_key)
        for cell in cells.values()
        if cell.is_layer
    ]


def _visit(bench: Bench, cell: Cell) -> None:
    """Times a call, beside the fixed computation that tells the machine's speed."""
    probe = bench.open(cell.key)
    cell.depth = probe.max_depth
    probe.warm_up(cell.depth)
    used = probe.experts_used()
    cell.experts_used += [] if used is None else [used]
    cell.times_ms.append(probe.time_ms(cell.depth))
    cell.levels_ms.append(bench.reference_ms())


def benchmark(spec: ModelSpec, rows: Sequence[ProfileRow], precisions: Sequence[str]) -> Benchmark:
    """Predictions against what was measured."""
    found = Benchmark("experts", machine())
    assert spec.experts is not None
    routing = balanced(spec.experts)
    for precision in precisions:
        own = [row for row in rows if row.precision == precision]
        known = [row for row in own if row.micro_batch in FITTED]
        plain = [
            row.model_copy(update={"model_key": "dense", "experts_used": None}) for row in known
        ]
        models = {"formula": fit(known), "without": fit(plain)}
        for row in own:
            predicted = {
                name: 1e3 * float(model.seconds(row.micro_batch, PAST))
                for name, model in models.items()
            }
            found.rows.append(
                {
                    "precision": precision,
                    "requests": row.micro_batch,
                    "is_fitted": row.micro_batch in FITTED,
                    "measured_ms": row.time_ms,
                    "experts_used": row.experts_used,
                    "experts_expected": float(routing.used(row.micro_batch)),
                    **{f"{name}_ms": ms for name, ms in predicted.items()},
                }
            )
    for name in ("formula", "without"):
        found.checks += list(_checks(found.rows, name, precisions))
    return found


def _checks(
    rows: Sequence[dict[str, Any]], name: str, precisions: Sequence[str]
) -> Iterator[Check]:
    """The error at rows that were not measured, and at those that are shown."""
    what = {"formula": "with expected experts", "without": "without (for comparison)"}[name]
    for precision in precisions:
        own = [row for row in rows if row["precision"] == precision]
        groups = {
            "unseen rows": [row for row in own if not row["is_fitted"]],
            "rows " + ", ".join(map(str, SHOWN)): [r for r in own if r["requests"] in SHOWN],
        }
        for which, some in groups.items():
            errors = [abs(row[f"{name}_ms"] / row["measured_ms"] - 1) for row in some]
            holds = max(errors) <= MOST_ERROR if name == "formula" else None
            yield Check(
                f"{precision}: largest error, {which}, {what}",
                100 * max(errors),
                "%",
                f"at most {100 * MOST_ERROR:.0f} %" if name == "formula" else "-",
                holds,
                len(errors),
                "" if name == "formula" else "no target",
            )


if __name__ == "__main__":
    main()
