"""The kernels benchmark's targets for a card, held against rows that a run measured.

Pure: rows in, checks out, no torch. `holds` is None with a reason where rows are missing or where a
CPU stood in for the card. The numbers that are aimed at come from kernels of others measured on the
same card (docs/gpu/README.md).
"""

from collections.abc import Iterable, Sequence
from typing import Any

from _common import Check

LARGE = (28672, 8192)  # out, in: the largest matrix of a layer of Llama-3.3-70B
FEW_ROWS = (1, 8, 16)
MANY_ROWS = 2048
LEAST_SHARE = {"16": 0.75, "8": 0.75, "4": 0.62, "3": 0.52}  # of the bandwidth of a copy
LEAST_RATIO = {"8": 0.85, "4": 0.95, "3": 0.95}  # of the speed of cuBLAS
LEAST_TOKENS_PER_S = {"16": 3500.0, "4": 6000.0}  # by an H100
AT_LEAST_AN_H100 = ("H100", "H200", "B200")
LEAST_OVER_TRANSFORMERS = 8.0
LEAST_PREFILL_SHARE = 0.55  # of a large matrix product
MOST_ERROR_PERCENT = {"from the spec sheet": 30.0, "from a profile": 10.0}

NO_CARD = "no NVIDIA card here"
NOT_MEASURED = "this run has not measured it"
OTHER_CARD = "the target is for an H100"

Rows = Sequence[dict[str, Any]]


def of_kind(rows: Rows, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind."""
    return [row for row in rows if row["kind"] == kind]


def at_least(name: str, value: float | None, unit: str, target: float, why: str = "") -> Check:
    """A check of a value that should be as large as `target`; of None, it cannot be told."""
    holds = None if value is None else value >= target
    return Check(name, value, unit, f">= {target:g}", holds, int(value is not None), why)


def within(name: str, value: float | None, unit: str, target: float, why: str = "") -> Check:
    """A check of a value that should be near zero."""
    holds = None if value is None else abs(value) <= target
    return Check(name, value, unit, f"within {target:g}", holds, int(value is not None), why)


def linear_checks(rows: Rows, why: str = NOT_MEASURED) -> list[Check]:
    """(5) Shares of a copy's bandwidth at few rows, ratios to cuBLAS at many, of one matrix."""
    cells = {
        (row["precision"], row["rows"]): row
        for row in of_kind(rows, "linear")
        if (row["out_features"], row["in_features"]) == LARGE
    }
    what = f"{LARGE[0]} x {LARGE[1]}"
    checks = []
    for precision, target in LEAST_SHARE.items():
        found = [cells[precision, n] for n in FEW_ROWS if (precision, n) in cells]
        value = min(row["share_of_copy"] for row in found) if len(found) == 3 else None
        name = f"5: {what}, {precision} bits, bytes a second at 1 to 16 rows (least)"
        checks.append(at_least(name, value, "of a copy's", target, why))
    for precision, target in LEAST_RATIO.items():
        row = cells.get((precision, MANY_ROWS))
        name = f"5: {what}, {precision} bits, speed at {MANY_ROWS} rows"
        checks.append(at_least(name, row and row["against_plain"], "of cuBLAS", target, why))
    return checks


def serving_checks(rows: Rows, card: str, why: str = NOT_MEASURED) -> list[Check]:
    """(6) Tokens a second of a whole model, over transformers', and prefill's arithmetic."""
    served = {row["precision"]: row for row in of_kind(rows, "serving")}
    theirs = next(iter(of_kind(rows, "transformers")), None)
    fast = any(name in card for name in AT_LEAST_AN_H100)
    checks = []
    for precision, target in LEAST_TOKENS_PER_S.items():
        row = served.get(precision) if fast else None
        reason = why if fast or precision not in served else OTHER_CARD
        name = f"6: Llama-3.1-8B served at {precision} bits"
        checks.append(at_least(name, row and row["tokens_per_s"], "tokens/s", target, reason))
    ours = served.get("16")
    over = ours["tokens_per_s"] / theirs["tokens_per_s"] if ours and theirs else None
    share = ours and ours["prefill_share_of_matmul"]
    return [
        *checks,
        at_least("6: the same at 16 bits", over, "x transformers", LEAST_OVER_TRANSFORMERS, why),
        at_least("6: prefill at 16 bits", share, "of a product's", LEAST_PREFILL_SHARE, why),
    ]


def prediction_checks(serving: Rows, predictions: Rows, why: str = NOT_MEASURED) -> list[Check]:
    """(7) Predicted times against measured ones: the worst precision, from either source."""
    sources = {
        "from the spec sheet": of_kind(serving, "serving"),
        "from a profile": of_kind(predictions, "prediction"),
    }
    checks = []
    for source, rows in sources.items():
        worst = max((row["error_percent"] for row in rows), key=abs, default=None)
        name = f"7: predicted time {source}, worst of {len(rows)} precisions"
        checks.append(within(name, worst, "%", MOST_ERROR_PERCENT[source], why))
    return checks


def token_checks(
    outcomes: dict[str, bool | None], why: str = NOT_MEASURED, number: int = 8
) -> list[Check]:
    """(8) Whether the tokens of two ways to run are the same; None where that was not tried."""
    return [
        Check(
            name=f"{number}: {name} give equal tokens",
            value=None if equal is None else float(equal),
            unit="equal",
            target="1",
            holds=equal,
            samples=int(equal is not None),
            why=why if equal is None else "",
        )
        for name, equal in outcomes.items()
    ]


def failures(checks: Iterable[Check]) -> int:
    """How many checks do not hold."""
    return sum(check.holds is False for check in checks)
