"""The sentences in which the scheduler refuses a request."""

import pytest

pytest.importorskip("islpy")
pytest.importorskip("highspy")

from npu_sparse.schedule import config, scheduler  # noqa: E402
from npu_sparse.schedule.config import ConfigError  # noqa: E402
from npu_sparse.schedule.frontend.c import parse_c  # noqa: E402

MATRICES = "int n, double a[n][n], double b[n][n], double c[n][n]"
PRODUCT = "for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) for (int k = 0; k < n; k++) c[i][j] += a[i][k] * b[k][j];"
TWO = (
    "for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) b[i][j] = a[i][j] + 1;\n"
    "for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) c[i][j] = b[i][j] * 2;"
)
SWEEP = "for (int i = 1; i < n; i++) for (int j = 0; j < n; j++) a[i][j] = a[i-1][j] + 1;"


def scop(body: str, arguments: str = MATRICES):
    return parse_c(f"void f({arguments}) {{\n#pragma scop\n{body}\n#pragma endscop\n}}\n")


def strategy(text: str) -> config.Config:
    return config.parse("scheduling_strategy:\n  " + text.replace("\n", "\n  "), "my.yaml", "mine")




def refusal(settings: config.Config, body: str = SWEEP) -> str:
    with pytest.raises(ConfigError) as caught:
        scheduler.schedule(scop(body), settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_contradictory_constraints_are_named():
    settings = strategy(
        "custom_constraints:\n- scheduling_dimension: 0\n  constraints:\n"
        '  - "S0_it_0 + S0_it_1 <= 2"\n  - "S0_it_0 >= 2"\n  - "S0_it_0 <= 1"'
    )
    message = refusal(settings)
    assert message.startswith("my.yaml:6: ") and "'S0_it_0 >= 2' and 'S0_it_0 <= 1'" in message
    assert "S0_it_1" not in message, "a constraint that takes no part is not named"


def test_constraint_against_a_dependence_names_it_with_a_witness():
    settings = strategy('custom_constraints: [{scheduling_dimension: 0, constraints: ["S0_it_0 <= -1"]}]')
    message = refusal(config.with_options(settings, negative_coefficients=True))
    assert "RAW on a from S0" in message and "S0[1, 0] -> S0[2, 0] (n = 3)" in message


def test_vectorize_on_a_loop_that_carries_a_dependence_names_it():
    message = refusal(strategy("directives: [{type: vectorize, stmts: [0], iterator: 2}]"), PRODUCT)
    assert message.startswith("my.yaml:2: ") and "vectorize" in message and "on c from S0" in message and "->" in message


def test_parallel_on_a_loop_that_carries_a_dependence_names_it():
    message = refusal(strategy("directives: [{type: parallel, stmts: [0], iterator: 0}]"))
    assert "directive parallel" in message and "RAW on a from S0" in message and "S0[1, 0] -> S0[2, 0]" in message


def test_fusion_order_against_a_dependence_names_it():
    message = refusal(strategy("fusion: [{scheduling_dimension: 0, stmts_fusion: [[1], [0]]}]"), TWO)
    assert "stmts_fusion must respect dependences, got S1 before S0" in message and "RAW on b from S0" in message


def test_impossible_fusion_names_the_dependence():
    body = "for (int i = 0; i < n; i++) b[0][i] = a[0][i];\nfor (int i = 0; i < n; i++) c[0][i] = b[0][n - 1 - i];"
    message = refusal(strategy("fusion: [{scheduling_dimension: 0, stmts_fusion: [[0, 1]]}]"), body)
    assert "stmts_fusion must be possible, got no row for S0 and S1 together" in message and "RAW on b from S0" in message


MISTAKES = {
    "statement of a constraint": (
        'custom_constraints: [{scheduling_dimension: 0, constraints: ["S7_it_0 >= 0"]}]',
        "S0 to S0, got",
    ),
    "iterator of a constraint": (
        'custom_constraints: [{scheduling_dimension: 0, constraints: ["S0_it_7 >= 0"]}]',
        "the 2 iterators of S0, got 'S0_it_7'",
    ),
    "statement of a directive": ("directives: [{type: parallel, stmts: [7], iterator: 0}]", "statements 0 to 0, got 7"),
    "iterator of a directive": ("directives: [{type: parallel, stmts: [0], iterator: 7}]", "must be below 2, got 7"),
    "two vector loops": (
        "directives:\n- {type: vectorize, stmts: [0], iterator: 0}\n- {type: vectorize, stmts: [0], iterator: 1}",
        "S0 must have one vectorize iterator, got 0 and 1",
    ),
    "parallel and sequential": (
        "directives:\n- {type: parallel, stmts: [0], iterator: 1}\n- {type: sequential, stmts: [0], iterator: 1}",
        "must have one directive, got parallel and sequential",
    ),
    "statement of a group": ("fusion: [{scheduling_dimension: 0, stmts_fusion: [[0], [7]]}]", "statements 0 to 1, got 7"),
}


@pytest.mark.parametrize("text, rule", MISTAKES.values(), ids=MISTAKES)
def test_request_for_what_the_program_does_not_have_is_refused(text, rule):
    message = refusal(strategy(text), TWO if "stmts_fusion" in text else SWEEP)
    assert message.startswith("my.yaml:") and rule in message
