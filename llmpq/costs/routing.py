"""How many routed experts one call of a layer uses, each of which is read once.

A token uses `k` of `E` experts, all different. If routing is balanced and tokens choose by
themselves, one of them passes a given expert over with probability 1 - k / E, so that R tokens
leave E (1 - k / E)**R experts unused (the mean number of empty cells in Feller, An Introduction to
Probability Theory, vol. 1, for draws of k cells at a time) and use

    E (1 - (1 - k / E)**R).

Routing that prefers some experts uses fewer. Then `E` is an effective number of experts: that of a
balanced router which uses as many. Profiles hold how many were used (`fitted`), and the formula
holds for other numbers of tokens.

Not covered: tokens of one text that choose alike, but by a smaller effective number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmpq.model_spec import Experts, experts_in
from llmpq.profile_data import ProfileRow

STEPS = 200  # effective numbers that are tried
TOKENS: dict[str, Callable[[int, int], int]] = {  # that a call of a phase routes
    "prefill": lambda prompts, tokens: prompts * tokens,
    "decode": lambda requests, _: requests,
}


@dataclass(frozen=True)
class Routing:
    """Each token uses `per_token` of `count` experts: of so many, or an effective number."""

    count: float
    per_token: int

    def used(self, rows: Any) -> Any:
        """The expected number of different experts that so many tokens use; numbers or arrays."""
        passed_over = 1.0 - self.per_token / self.count
        return self.count * (1.0 - passed_over ** np.asarray(rows, dtype=float))

    def rows_each(self, rows: Any) -> Any:
        """The tokens of an expert that is used, on average over these."""
        return np.asarray(rows, dtype=float) * self.per_token / np.maximum(self.used(rows), 1e-9)


def balanced(experts: Experts) -> Routing:
    """Every expert is as likely as any other."""
    return Routing(experts.count, min(experts.per_token, experts.count))


def measured_routing(rows: Sequence[ProfileRow]) -> Routing | None:
    """The routing of a layer of which these were measured; None where it has no experts."""
    named = experts_in(rows[0].model_key) if rows else None
    if named is None:
        return None
    known = [row for row in rows if row.experts_used and row.phase in TOKENS]
    tokens = [TOKENS[row.phase](row.micro_batch, row.tokens) for row in known]
    return fitted(Routing(*named), tokens, [row.experts_used or 0.0 for row in known])


def fitted(whole: Routing, rows: Sequence[float], used: Sequence[float]) -> Routing:
    """The effective number of experts of which so many are `used` by so many `rows`.

    It is the one of the least sum of squared relative errors, from those of a token to the `whole`.
    """
    if not rows:
        return whole
    tried = np.geomspace(whole.per_token, whole.count, STEPS)
    found = [Routing(float(count), whole.per_token) for count in tried]
    faults = [((one.used(rows) / np.asarray(used) - 1.0) ** 2).sum() for one in found]
    return found[int(np.argmin(faults))]
