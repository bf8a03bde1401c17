import islpy as isl
import pytest

from npu_sparse.schedule import config, openscop
from npu_sparse.schedule.frontend.c import parse_c
from npu_sparse.schedule.scheduler import schedule

TRIANGLE = """
void f(int n, int m, double C[n][n], double A[n][m], double s) {
#pragma scop
  for (int i = 0; i < n; i++) {
    if (i % 3 != 1)
      C[i][0] = s;
    for (int k = m - 1; k >= 0; k--)
      for (int j = 0; j <= i; j += 2)
        C[i][j] += A[i][k] * A[j][k];
  }
#pragma endscop
}
"""


def relations(text: str) -> list[tuple[str, isl.Map, list[str]]]:
    """`(kind, relation, numbers of the first row)` of every relation of an OpenScop text, read by the format's definition."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    parameters = lines[lines.index("<strings>") + 1].split()
    relations_read = []
    for place, kind in enumerate(lines):
        if kind not in ("CONTEXT", "DOMAIN", "SCATTERING", "READ", "WRITE", "MAY_WRITE"):
            continue
        place += 1
        pieces = 1 if len(lines[place].split()) > 1 else int(lines[place])
        place += pieces > 1
        union = None
        for _ in range(pieces):
            rows, columns, out, inputs, local, count = map(int, lines[place].split())
            assert count == len(parameters) and columns == 2 + out + inputs + local + count
            names = [[f"{letter}{n}" for n in range(size)] for letter, size in (("o", out), ("i", inputs), ("l", local))]
            constraints = []
            for line in lines[place + 1 : place + 1 + rows]:
                relation, *values = map(int, line.split())
                assert len(values) == columns - 1
                terms = [f"{v}*{name}" for v, name in zip(values, [*names[0], *names[1], *names[2], *parameters]) if v]
                constraints.append(" + ".join([*terms, str(values[-1])]) + (" >= 0" if relation else " = 0"))
            body = " and ".join(constraints) or "true"
            body = f"exists {', '.join(names[2])} : {body}" if names[2] else body
            piece = isl.Map(f"[{', '.join(parameters)}] -> {{ [{', '.join(names[1])}] -> [{', '.join(names[0])}] : {body} }}")
            union = piece if union is None else union.union(piece)
            first, place = lines[place + 1].split(), place + 1 + rows
        relations_read.append((kind, union, first))
    return relations_read


@pytest.mark.parametrize("strategy", config.shipped())
def test_domains_schedules_and_accesses_can_be_read_back(strategy):
    scop = parse_c(TRIANGLE)
    order = schedule(scop, strategy).union_map()
    relations_read = relations(openscop.export(scop, order))
    domains = [relation.range() for kind, relation, _ in relations_read if kind == "DOMAIN"]
    assert len(domains) == len(scop.statements)
    for statement, domain in zip(scop.statements, domains):
        assert domain.is_equal(statement.domain.reset_tuple_id())
    scatterings = [relation for kind, relation, _ in relations_read if kind == "SCATTERING"]
    for statement, scattering in zip(scop.statements, scatterings):
        wanted = isl.Map.from_union_map(order.intersect_domain(isl.UnionSet.from_set(statement.domain)))
        wanted = wanted.reset_tuple_id(isl.dim_type.in_)
        missing = scattering.dim(isl.dim_type.out) - wanted.dim(isl.dim_type.out)
        wanted = wanted.add_dims(isl.dim_type.out, missing)
        for n in range(missing):
            wanted = wanted.fix_val(isl.dim_type.out, wanted.dim(isl.dim_type.out) - 1 - n, isl.Val(0))
        domain = statement.domain.reset_tuple_id().intersect_params(scop.context)
        assert scattering.intersect_domain(domain).is_equal(wanted.intersect_domain(domain))
    accesses = iter((kind, relation, first) for kind, relation, first in relations_read if kind in ("READ", "WRITE", "MAY_WRITE"))
    for statement in scop.statements:
        for kind, group in (("READ", statement.reads), ("WRITE", statement.writes)):
            for access in group:
                written, relation, first = next(accesses)
                assert written == kind and first[:2] == ["0", "-1"]
                assert int(first[-1]) == 1 + list(scop.arrays).index(access.array)
                relation = relation.project_out(isl.dim_type.out, 0, 1)
                wanted = access.relation.reset_tuple_id(isl.dim_type.in_).reset_tuple_id(isl.dim_type.out)
                domain = statement.domain.reset_tuple_id()
                assert relation.intersect_domain(domain).is_equal(wanted.intersect_domain(domain))
    assert next(accesses, None) is None


def test_text_names_parameters_arrays_and_bodies():
    scop = parse_c(TRIANGLE)
    text = openscop.export(scop, scop.original())
    assert "<strings>\nn m\n</strings>" in text and text.count("<body>") == len(scop.statements)
    assert all(f"\n{n} {name}\n" in text for n, name in enumerate(scop.arrays, 1))
    assert "i k j\n# Statement body expression" in text
