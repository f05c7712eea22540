"""An LP or ILP as a value; HiGHS or Gurobi solves it.

Minimise cost @ x + constant with lower <= rows @ x <= upper and bounds on x, some x whole.
HiGHS is called through its own arrays (highspy), which starts faster than by way of scipy.
Gurobi's bundled licence takes 2,000 variables and rows; what is larger goes to HiGHS, and
`Solver.notes` says so. A solve that ran out of time without a solution is "unknown", never
"infeasible". Not covered: a solve that goes on where an earlier one ended.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import highspy
import numpy as np

from llmpq.errors import UserError
from llmpq.planner.silence import silent_stdout

TOLERANCE = 1e-6  # what a plan may lie beside a limit, at most; solvers are held to less
OVERSTEP = 1e-8  # by which a solver may overstep a row; their own 1e-6 shows in the objective
SMALL = 300  # columns of those whose presolve takes longer than it saves

Status = Literal["optimal", "feasible", "infeasible", "unknown"]


@dataclass(frozen=True)
class LinearProgram:
    """`start`, `index`, `value`: the rows, compressed row by row. `scale`: seconds of one unit."""

    cost: np.ndarray
    constant: float
    start: np.ndarray
    index: np.ndarray
    value: np.ndarray
    row_lower: np.ndarray
    row_upper: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    integral: np.ndarray  # booleans
    scale: float = 1.0


@dataclass(frozen=True)
class Answer:
    """`bound`, `objective`: in units of the program times its scale. `duals`: of the rows."""

    status: Status
    x: np.ndarray | None
    objective: float
    bound: float
    duals: np.ndarray | None = None


@dataclass
class Solver:
    """Which solver is asked, and what there is to tell about it."""

    name: Literal["highs", "gurobi"] = "highs"
    notes: list[str] = field(default_factory=list)
    _linear: Any = field(default_factory=lambda: _started(presolve="off"), repr=False)

    def integers(
        self,
        program: LinearProgram,
        *,
        gap: float = 0.0,
        time_limit: float = math.inf,
    ) -> Answer:
        """Solved with its integers to a relative `gap`; no `x` where the time was too short."""
        if time_limit <= 0:
            return Answer("unknown", None, math.inf, -math.inf)
        if self.name == "gurobi" and (answer := self._gurobi(program, gap, time_limit)):
            return answer
        return _highs_integers(program, gap, time_limit)

    def relaxed(self, program: LinearProgram) -> Answer:
        """Solved as if every x could be a fraction.

        Presolve is dearer than these small LPs themselves; without it HiGHS cannot tell of
        some that they are infeasible.
        """
        answer = _highs_relaxed(self._linear, program)
        if answer.status != "unknown":
            return answer
        return _highs_relaxed(_started(presolve="on"), program)

    def extents(self, program: LinearProgram, sums: Sequence[np.ndarray]) -> np.ndarray | None:
        """[sums, 2]: the least and the most that each sum of columns can be, fractions allowed.

        None where nothing is feasible.
        """
        return _highs_extents(program, sums)

    def _gurobi(self, program: LinearProgram, gap: float, limit: float) -> Answer | None:
        size = max(len(program.cost), len(program.row_lower))
        try:
            return _gurobi_integers(program, gap, limit)
        except _TooLarge:
            self._tell(
                f"an ILP of {size} variables or rows is above what this Gurobi licence takes; "
                "such ones were solved by HiGHS"
            )
            return None

    def _tell(self, note: str) -> None:
        if not any(known.split(" ", 4)[4] == note.split(" ", 4)[4] for known in self.notes):
            self.notes.append(note)


def make_solver(name: Literal["highs", "gurobi"]) -> Solver:
    """Raises `UserError` where Gurobi is asked for and not installed."""
    if name == "gurobi":
        try:
            import gurobipy  # noqa: F401
        except ImportError:
            raise UserError(
                "--solver gurobi needs gurobipy (pip install gurobipy); HiGHS needs nothing"
            ) from None
    return Solver(name)


# ---- HiGHS


def _started(presolve: str = "choose") -> Any:
    """HiGHS with its options and no model."""
    with silent_stdout():
        highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("threads", 1)
    highs.setOptionValue("presolve", presolve)
    for option in ("primal_feasibility_tolerance", "mip_feasibility_tolerance"):
        highs.setOptionValue(option, OVERSTEP)
    return highs


def _pass(highs: Any, program: LinearProgram, integral: bool) -> None:
    """Gives HiGHS a model in place of the one that it has, and of what it knows of that."""
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = len(program.cost), len(program.row_lower)
    model.col_cost_, model.offset_ = program.cost, program.constant
    model.col_lower_, model.col_upper_ = program.lower, program.upper
    model.row_lower_, model.row_upper_ = program.row_lower, program.row_upper
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = program.start
    model.a_matrix_.index_, model.a_matrix_.value_ = program.index, program.value
    if integral:
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        model.integrality_ = [kinds[int(whole)] for whole in program.integral]
    status = highs.passModel(model)
    assert status != highspy.HighsStatus.kError, "a column stands twice in a row, or the like"


def _highs_relaxed(highs: Any, program: LinearProgram) -> Answer:
    _pass(highs, program, integral=False)
    highs.run()
    status = highs.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return Answer("infeasible", None, math.inf, math.inf)
    if status != highspy.HighsModelStatus.kOptimal:
        return Answer("unknown", None, math.inf, -math.inf)
    solution = highs.getSolution()
    value = highs.getInfo().objective_function_value * program.scale
    x, duals = np.array(solution.col_value), np.array(solution.row_dual)
    return Answer("optimal", x, value, value, duals)


def _highs_integers(program: LinearProgram, gap: float, time_limit: float) -> Answer:
    highs = _started(presolve="off" if len(program.cost) <= SMALL else "choose")
    _pass(highs, program, integral=True)
    highs.setOptionValue("mip_rel_gap", gap)
    highs.setOptionValue("mip_abs_gap", 1e-9)
    if time_limit < math.inf:
        highs.setOptionValue("time_limit", time_limit)
    highs.run()
    if highs.getModelStatus() == highspy.HighsModelStatus.kUnknown:
        highs.clearSolver()
        highs.setOptionValue("presolve", "on")
        highs.run()
    status, info = highs.getModelStatus(), highs.getInfo()
    if status == highspy.HighsModelStatus.kInfeasible:
        return Answer("infeasible", None, math.inf, math.inf)
    bound = info.mip_dual_bound * program.scale if math.isfinite(info.mip_dual_bound) else -math.inf
    if info.primal_solution_status != 2:  # 2: feasible
        return Answer("unknown", None, math.inf, bound)
    x = np.array(highs.getSolution().col_value)
    done: Status = "optimal" if status == highspy.HighsModelStatus.kOptimal else "feasible"
    return Answer(done, x, info.objective_function_value * program.scale, bound)


def _highs_extents(program: LinearProgram, sums: Sequence[np.ndarray]) -> np.ndarray | None:
    """One model throughout: each solve starts from the one before."""
    highs = _started(presolve="off")
    _pass(highs, program, integral=False)
    size = len(program.cost)
    found = np.tile([-math.inf, math.inf], (len(sums), 1))
    for row, columns in enumerate(sums):
        for side, sign in enumerate((1.0, -1.0)):
            cost = np.zeros(size)
            cost[columns] = sign
            highs.changeColsCost(size, np.arange(size, dtype=np.int32), cost)
            highs.run()
            status = highs.getModelStatus()
            if status == highspy.HighsModelStatus.kInfeasible:
                return None
            if status == highspy.HighsModelStatus.kOptimal:
                value = highs.getInfo().objective_function_value - program.constant
                found[row, side] = sign * value
    return found


# ---- Gurobi


class _TooLarge(Exception):
    """The licence does not take an ILP of this size."""


def _gurobi_integers(program: LinearProgram, gap: float, time_limit: float) -> Answer:
    import gurobipy as gurobi

    size_limit = gurobi.GRB.Error.SIZE_LIMIT_EXCEEDED
    try:
        with (
            gurobi.Env(params={"OutputFlag": 0, "Threads": 1}) as env,
            gurobi.Model(env=env) as model,
        ):
            _fill_gurobi(model, program)
            model.Params.MIPGap = gap
            model.Params.FeasibilityTol = model.Params.IntFeasTol = OVERSTEP
            if time_limit < math.inf:
                model.Params.TimeLimit = time_limit
            model.optimize()
            return _gurobi_answer(model, program)
    except gurobi.GurobiError as error:
        if error.errno == size_limit:
            raise _TooLarge from None
        raise UserError(f"Gurobi: {error}; leave out --solver gurobi to use HiGHS") from None


def _fill_gurobi(model: Any, program: LinearProgram) -> None:
    kinds = np.where(program.integral, "I", "C")
    x = model.addMVar(len(program.cost), lb=program.lower, ub=program.upper, vtype=kinds.tolist())
    model.setObjective(program.cost @ x + program.constant)
    rows = _dense(program)
    for sides, sign in ((program.row_lower, ">"), (program.row_upper, "<")):
        held = np.isfinite(sides)
        model.addMConstr(rows[held], x, sign, sides[held])


def _dense(program: LinearProgram) -> np.ndarray:
    rows = np.zeros((len(program.row_lower), len(program.cost)))
    which = np.repeat(np.arange(len(rows)), np.diff(program.start))
    np.add.at(rows, (which, program.index), program.value)
    return rows


def _gurobi_answer(model: Any, program: LinearProgram) -> Answer:
    from gurobipy import GRB

    if model.Status in (GRB.INFEASIBLE, GRB.INF_OR_UNBD):
        return Answer("infeasible", None, math.inf, math.inf)
    bound = model.ObjBound * program.scale if math.isfinite(model.ObjBound) else -math.inf
    if model.SolCount == 0:
        return Answer("unknown", None, math.inf, bound)
    done: Status = "optimal" if model.Status == GRB.OPTIMAL else "feasible"
    return Answer(done, np.array(model.getAttr("X")), model.ObjVal * program.scale, bound)
