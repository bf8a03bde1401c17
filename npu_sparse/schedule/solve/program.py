"""The integer program of one dimension: legality by Farkas' lemma, progression, constraints, directives, costs."""

from npu_sparse.schedule.config import ConfigError, Constraint, Dimension
from npu_sparse.schedule.solve.costs import contiguity, small_loops
from npu_sparse.schedule.solve.farkas import Dependence
from npu_sparse.schedule.solve.ilp import Model, Terms
from npu_sparse.schedule.solve.problem import Group
from npu_sparse.schedule.solve.rows import Form, Row, difference
from npu_sparse.schedule.solve.spans import null_space


class Program:
    """The integer program of the next dimension of a group of statements."""

    def __init__(self, group: Group, dimension: Dimension):
        self.group, self.dimension = group, dimension
        self.problem, self.names, self.config = group.problem, group.names, group.problem.config
        self.ordered = [d for d in group.active if not d.relaxed]
        self.model = Model()
        self.it: dict[str, list[int]] = {}
        self.par: dict[str, list[int]] = {}
        self.cst: dict[str, int] = {}
        self.size: dict[str, list[int]] = {}  # columns of |T_it|
        self.users: dict[str, int] = {}
        self.temporaries: frozenset[str] = frozenset()
        if dimension.require_parallel and self.config.privatisation:
            self.temporaries = group.temporaries()
        self.columns()
        for d in group.active:
            self.legal(d)
        for name in self.names:
            self.progress(name)
            self.directed(name)
        if dimension.no_skewing:
            for name in self.names:
                self.model.row({column: 1 for column in self.size[name]}, None, 1)
        for constraint in (*self.config.constraints(group.number), *dimension.constraints):
            self.constrain(constraint)

    def columns(self) -> None:
        config, model = self.config, self.model
        bound = config.coefficient_bound
        shift = 64 + 4 * len(self.problem.statements)
        for name in self.names:
            iterators = self.problem.statements[name].iterators
            self.it[name] = [model.column(-bound if config.negative_coefficients else 0, bound) for _ in iterators]
            self.par[name] = [model.column(0, bound if config.parametric_shift else 0) for _ in self.problem.scop.parameters]
            self.cst[name] = model.column(0, shift)
            self.size[name] = self.it[name]
            if config.negative_coefficients:
                self.size[name] = [model.column(0, bound) for _ in iterators]
                for plain, size in zip(self.it[name], self.size[name]):
                    model.row({size: 1, plain: 1})
                    model.row({size: 1, plain: -1})
        self.users = {name: model.column(0, 1000) for name in config.new_variables}

    def terms(self, d: Dependence, row: tuple[int, ...]) -> Terms:
        """row . (coefficients of phi_sink - phi_source), as terms in the columns; row is in the columns of the cone."""
        parameters, lifted = len(self.problem.scop.parameters), len(d.lifted)
        variables = row[1 + parameters + lifted :]
        sums: Terms = {}

        def add(column: int, factor: int) -> None:
            sums[column] = sums.get(column, 0) + factor

        if d.own:
            for column, factor in zip(self.it[d.source], variables):
                add(column, factor)
            return sums
        add(self.cst[d.sink], row[0])
        add(self.cst[d.source], -row[0])
        for p in range(parameters):
            add(self.par[d.sink][p], row[1 + p])
            add(self.par[d.source][p], -row[1 + p])
        depth = len(self.it[d.source])
        for column, factor in zip(self.it[d.source], variables[:depth]):
            add(column, -factor)
        for column, factor in zip(self.it[d.sink], variables[depth:]):
            add(column, factor)
        return sums

    def legal(self, d: Dependence) -> None:
        """phi_sink - phi_source >= 0, or = 0 where the row has to be parallel."""
        if d.relaxed and not self.dimension.require_parallel:
            return
        parallel = self.dimension.require_parallel and (d.flow or d.array not in self.temporaries)
        for row in d.cone.equalities:
            self.model.row(self.terms(d, row), 0, 0)
        for row in d.cone.inequalities:
            self.model.row(self.terms(d, row), 0, 0 if parallel else None)

    def progress(self, name: str) -> None:
        """T_it leaves the span of the directions so far, unless they span everything."""
        width = len(self.it[name])
        basis = null_space([*self.problem.fixed[name], *self.group.directions[name]], width)
        if not basis:
            return
        model = self.model
        if not self.config.negative_coefficients and all(value >= 0 for vector in basis for value in vector):
            model.row({self.it[name][k]: 1 for vector in basis for k in range(width) if vector[k]}, 1)
            return
        # One number in a base large enough is zero only if all components outside of the span are (Pluto+).
        bound = self.config.coefficient_bound
        sizes = [bound * sum(abs(value) for value in vector) for vector in basis]
        terms: Terms = {}
        scale = 1
        for vector, size in zip(basis, sizes):
            for k in range(width):
                if vector[k]:
                    terms[self.it[name][k]] = terms.get(self.it[name][k], 0) + scale * vector[k]
            scale *= size + 1
        sign = model.column(0, 1)
        model.row({**terms, sign: scale}, 1)
        model.row({**terms, sign: scale}, None, scale - 1)

    def directed(self, name: str) -> None:
        """Coefficients that directives fix for the statement."""
        statement, model = self.problem.statements[name], self.model
        for directive in self.config.directives:
            if statement.index not in directive.stmts:
                continue
            k = directive.iterator
            unit = [int(place == k) for place in range(len(statement.iterators))]
            missing = self.group.missing(name)
            if directive.type == "vectorize" and missing > 0:
                if missing == 1:
                    for column, value in zip(self.it[name], unit):
                        model.row({column: 1}, value, value)
                else:
                    model.row({self.it[name][k]: 1}, 0, 0)
            if directive.type == "parallel" and not self.group.directions[name]:
                for column, value in zip(self.it[name], unit):
                    model.row({column: 1}, value, value)
                for d in self.group.active:
                    if name in (d.source, d.sink):
                        for row in (*d.cone.equalities, *d.cone.inequalities):
                            model.row(self.terms(d, row), 0, 0)

    def constrain(self, constraint: Constraint) -> None:
        """The constraint on the columns, once per statement where it speaks of Si."""
        general = any(name.startswith("Si_") for _, name in constraint.terms)
        for chosen in self.names if general else (None,):
            terms: Terms = {}
            known = True
            for factor, name in constraint.terms:
                columns = self.named(name, chosen, constraint)
                known &= columns is not None
                for column in columns or ():
                    terms[column] = terms.get(column, 0) + factor
            if known:
                value = -constraint.constant
                lower = None if constraint.relation == "<=" else value
                upper = None if constraint.relation == ">=" else value
                self.model.row(terms, lower, upper)

    def named(self, name: str, chosen: str | None, constraint: Constraint) -> list[int] | None:
        """Columns that a name stands for; None when it speaks of a statement scheduled elsewhere."""
        if name in self.users:
            return [self.users[name]]
        head, kind, *rest = name.split("_")
        statement = chosen if head == "Si" else f"S{head[1:]}"
        if statement not in self.problem.statements:
            last = len(self.problem.statements) - 1
            raise ConfigError(f"{constraint.where}constraint must name statements S0 to S{last}, got {name!r}")
        if statement not in self.names:
            return None
        if kind == "cst":
            return [self.cst[statement]]
        columns = self.it[statement] if kind == "it" else self.par[statement]
        if rest[0] == "i":
            return list(columns)
        if int(rest[0]) >= len(columns):
            if head == "Si":
                return None
            what = "iterators" if kind == "it" else "parameters"
            raise ConfigError(f"{constraint.where}constraint must name the {len(columns)} {what} of {statement}, got {name!r}")
        return [columns[int(rest[0])]]

    def objectives(self) -> list[Terms]:
        makers = {
            "proximity": self.proximity,
            "feautrier": self.feautrier,
            "contiguity": lambda: [self.weighted(contiguity)],
            "contiguous_last": self.contiguous_last,
            "big_loops_first": lambda: [self.weighted(lambda s: small_loops(s, self.problem.scop))],
        }
        levels: list[Terms] = []
        for cost in self.dimension.cost_functions:
            levels += [{self.users[cost]: 1}] if cost in self.users else makers[cost]()
        # Fixed tie-break: few and small coefficients, earlier iterators first, no parameters, then small shifts.
        depth = max((len(columns) for columns in self.it.values()), default=0)
        simple: Terms = {}
        for name in self.names:
            simple.update({column: 8 * (depth + 1) for column in self.par[name]})
            simple.update({column: depth + 1 + place for place, column in enumerate(self.size[name])})
        shifts = {self.cst[name]: 1 for name in self.names}
        # Of equal rows, the one with positive leading coefficients.
        return [*levels, simple, shifts, *([self.signs()] if self.config.negative_coefficients else [])]

    def signs(self) -> Terms:
        return {column: -1 for name in self.names for column in self.it[name]}

    def proximity(self) -> list[Terms]:
        """phi_sink - phi_source <= u . N + w on every dependence; u first, then w."""
        parameters = len(self.problem.scop.parameters)
        u = [self.model.column(0, 64) for _ in range(parameters + len(self.problem.extents))]
        w = self.model.column(0, 10**7)
        if self.dimension.require_parallel:
            return []
        for d in self.ordered:
            for rows, equality in ((d.cone.equalities, True), (d.cone.inequalities, False)):
                for row in rows:
                    terms = {column: -factor for column, factor in self.terms(d, row).items()}
                    terms[w] = row[0]
                    terms.update({column: row[1 + p] for p, column in enumerate(u)})
                    self.model.row(terms, 0, 0 if equality else None)
        return [{column: 1 for column in u}, {w: 1}]

    def feautrier(self) -> list[Terms]:
        """phi_sink - phi_source >= e with e = 1 for as many dependences as possible."""
        satisfied = {}
        for d in self.ordered:
            e = self.model.column(0, 1)
            satisfied[e] = -1
            for rows, equality in ((d.cone.equalities, True), (d.cone.inequalities, False)):
                for row in rows:
                    self.model.row({**self.terms(d, row), e: -row[0]}, 0, 0 if equality else None)
        return [satisfied]

    def contiguous_last(self) -> list[Terms]:
        """One per statement of the largest depth whose most contiguous iterator would not be its last."""
        deepest = max(len(columns) for columns in self.it.values())
        terms: Terms = {}
        for name in self.names:
            costs = contiguity(self.problem.statements[name])
            if len(costs) == deepest and self.group.missing(name) > 1:
                terms[self.size[name][costs.index(max(costs))]] = 1
        return [terms]

    def weighted(self, costs) -> Terms:
        return {
            column: cost for name in self.names for column, cost in zip(self.size[name], costs(self.problem.statements[name]))
        }

    def feasible(self) -> bool:
        return self.model.lexmin([], self.config.time_limit) is not None

    def solve(self) -> Row | None:
        row = self.row(self.model.lexmin(self.objectives(), self.config.time_limit))
        if not self.model.optimal:
            self.problem.notes.append(
                f"dimension {self.group.number} of {', '.join(self.names)}: not the best row within the time limit"
            )
        return row

    def any_row(self) -> Row | None:
        return self.row(self.model.lexmin([], self.config.time_limit))

    def row(self, solution: list[int] | None) -> Row | None:
        if solution is None:
            return None
        row = Row(
            {
                name: Form(
                    tuple(solution[column] for column in self.it[name]),
                    tuple(solution[column] for column in self.par[name]),
                    solution[self.cst[name]],
                )
                for name in self.names
            }
        )
        assert all(d.cone.contains(difference(d, row, len(d.lifted))) for d in self.ordered)
        return row
