"""The names of the planning methods that make a plan file, without importing the planner.

`auto` searches and proves how far from the best its plan may be; `ilp` is the same by the plain
integer linear program, `heuristic` moves layers only; the others are baselines.
"""

from typing import Literal

PlanningMethod = Literal["auto", "ilp", "heuristic", "uniform", "pipeedge", "adabits"]
