"""Small integer programs, minimised lexicographically by HiGHS and verified in exact integer arithmetic."""

import ctypes
import os
import sys
import time
from dataclasses import dataclass, field

import highspy
import numpy as np

from ...errors import ActionableError

Terms = dict[int, int]  # column -> coefficient


class SolverTimeoutError(ActionableError, RuntimeError):
    """The time limit passed before a solution was found."""


@dataclass
class Model:
    """Integer columns with finite bounds, and rows lower <= terms <= upper.

    `optimal` turns false when time ran out between the first solution and the last minimum.
    """

    lower: list[int] = field(default_factory=list)
    upper: list[int] = field(default_factory=list)
    rows: dict[tuple[tuple[int, int], ...], tuple[int | None, int | None]] = field(default_factory=dict)
    optimal: bool = True

    def column(self, lower: int, upper: int) -> int:
        self.lower.append(lower)
        self.upper.append(upper)
        return len(self.lower) - 1

    def row(self, terms: Terms, lower: int | None = 0, upper: int | None = None) -> None:
        """Adds a row; the same terms twice become one row."""
        key = tuple(sorted((column, value) for column, value in terms.items() if value))
        if key in self.rows:
            old_lower, old_upper = self.rows[key]
            lower = old_lower if lower is None else lower if old_lower is None else max(lower, old_lower)
            upper = old_upper if upper is None else upper if old_upper is None else min(upper, old_upper)
        self.rows[key] = (lower, upper)

    def holds(self, solution: list[int]) -> bool:
        """Whether the solution satisfies every bound and row, in integers."""
        if any(not low <= value <= high for low, value, high in zip(self.lower, solution, self.upper)):
            return False
        for terms, (lower, upper) in self.rows.items():
            value = sum(factor * solution[column] for column, factor in terms)
            if (lower is not None and value < lower) or (upper is not None and value > upper):
                return False
        return True

    def lexmin(self, objectives: list[Terms], time_limit: float = 10.0) -> list[int] | None:
        """Column values that minimise the objectives in lexicographic order; None when the rows cannot hold.

        Raises:
            SolverTimeoutError: no solution within `time_limit` seconds.
        """
        lower, upper = self.rows.get((), (0, 0))  # the row without terms
        if (lower or 0) > 0 or (upper or 0) < 0:
            return None
        started = time.perf_counter()
        solver = self._highs()
        solution = None
        fixed = Model(self.lower, self.upper, dict(self.rows))
        for terms in objectives or [{}]:
            terms = {column: factor for column, factor in terms.items() if factor}
            if solution is None or _value(terms, solution) > self._least(terms):
                left = time_limit - (time.perf_counter() - started)
                candidate, status = _run(solver, terms, len(self.lower), left) if left > 0 else (None, "late")
                if status == "infeasible" and solution is None:
                    return None
                self.optimal &= status == "optimal"
                if candidate is not None and fixed.holds(candidate):
                    solution = candidate
                elif solution is None:
                    raise SolverTimeoutError(f"no solution within {time_limit} s")
            value = _value(terms, solution)
            if terms:
                fixed.row(dict(terms), None, value)
                columns = np.fromiter(terms, dtype=np.int32)
                factors = np.fromiter(terms.values(), dtype=np.float64)
                solver.addRow(-highspy.kHighsInf, float(value), len(columns), columns, factors)
        return solution

    def _least(self, terms: Terms) -> int:
        """A lower bound of the terms from the column bounds."""
        return sum(factor * (self.lower if factor > 0 else self.upper)[column] for column, factor in terms.items())

    def _highs(self) -> highspy.Highs:
        count, inf = len(self.lower), highspy.kHighsInf
        rows = [(terms, bounds) for terms, bounds in self.rows.items() if terms]
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = count, len(rows)
        model.col_cost_ = np.zeros(count)
        model.col_lower_ = np.array(self.lower, dtype=np.float64)
        model.col_upper_ = np.array(self.upper, dtype=np.float64)
        model.row_lower_ = np.array([-inf if low is None else low for _, (low, _) in rows], dtype=np.float64)
        model.row_upper_ = np.array([inf if high is None else high for _, (_, high) in rows], dtype=np.float64)
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.cumsum([0] + [len(terms) for terms, _ in rows])
        model.a_matrix_.index_ = np.array([column for terms, _ in rows for column, _ in terms], dtype=np.int32)
        model.a_matrix_.value_ = np.array([factor for terms, _ in rows for _, factor in terms], dtype=np.float64)
        model.integrality_ = [highspy.HighsVarType.kInteger] * count
        solver = _solver()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("parallel", "off")
        solver.setOptionValue("random_seed", 0)
        solver.setOptionValue("mip_rel_gap", 0.0)
        solver.setOptionValue("mip_abs_gap", 0.0)
        solver.passModel(model)
        return solver


def _solver() -> highspy.Highs:
    """A solver whose banner goes nowhere: its constructor prints before an option can say otherwise."""
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    library.fflush(None)
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        return highspy.Highs()
    finally:
        library.fflush(None)  # C's own buffer, too
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _run(solver: highspy.Highs, terms: Terms, count: int, time_limit: float) -> tuple[list[int] | None, str]:
    """Rounded column values, if any were found, and "optimal", "infeasible" or "late"."""
    cost = np.zeros(count)
    for column, factor in terms.items():
        cost[column] = factor
    solver.changeColsCost(count, np.arange(count, dtype=np.int32), cost)
    solver.setOptionValue("time_limit", solver.getRunTime() + time_limit)
    solver.run()
    status = solver.getModelStatus()
    if status in (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible):
        return None, "infeasible"
    if solver.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None, "late"
    values = [round(value) for value in solver.getSolution().col_value]
    return values, "optimal" if status == highspy.HighsModelStatus.kOptimal else "late"


def _value(terms: Terms, solution: list[int]) -> int:
    return sum(factor * solution[column] for column, factor in terms.items())
