import re
from pathlib import Path

import pytest

from npu_sparse.schedule.ascend import headers

ASCENDC = Path(__file__).resolve().parents[3] / "ops/ascendc"


@pytest.mark.parametrize("name, text", headers.headers().items())
def test_the_checked_in_header_is_what_the_plan_gives(name, text):
    command = "python -m npu_sparse.schedule.ascend.headers ops/ascendc/generated"
    assert (ASCENDC / "generated" / name).read_text() == text, f"run {command}"


def test_nothing_else_is_checked_in():
    assert {path.name for path in (ASCENDC / "generated").iterdir()} == set(headers.headers())


def test_the_kernels_take_their_tiles_and_orders_from_the_headers():
    names = ("score_reduce.h", "score_tiling.h", "softmax_rows.h")
    reduce, tiling, rows = ((ASCENDC / "common" / name).read_text() for name in names)
    assert "QueriesOfLoad(load" in reduce and "HeadOfLoad(load" in reduce and "= MAX_QUERIES_PER_LOAD;" in reduce
    assert "t.keysPerStep = MAX_KEYS_PER_STEP;" in tiling and "ForEachPass(tile);" in rows and "= SOFTMAX_ROWS;" in rows
    for text in (reduce, tiling, rows):  # a second definition would make the generated one idle
        assert not re.search(r"constexpr \w+ (MAX_KEYS_PER_STEP|MAX_QUERIES_PER_LOAD|SCORE_COLUMNS|SOFTMAX_ROWS) =", text)
