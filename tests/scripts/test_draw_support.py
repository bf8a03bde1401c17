import importlib.util
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from npu_sparse import Budget
from npu_sparse.testing import random_support

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("draw_support", ROOT / "scripts" / "draw_support.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "draw_support", module)
    spec.loader.exec_module(module)
    return module


def test_every_pair_that_is_read_is_drawn_and_no_other(script):
    T, budget = 37, Budget(k=12, block=8, sink=2, recent=3)
    support = random_support(1, 1, T, T, k=12, block=8)
    rows = script.kinds(support, T, budget)
    for t, row in enumerate(rows):
        chosen = support.indices[0, 0, t // 8, : support.count[0, 0, t // 8]].tolist()
        assert [s for s, kind in enumerate(row) if kind != "unread"] == [s for s in chosen if s <= t] and len(row) == t + 1
        assert {s for s, kind in enumerate(row) if kind == "sink"} == {s for s in chosen if s < min(2, t + 1)}
    drawn = Counter()
    tree = ElementTree.fromstring(script.svg([[1.0] * T] * 5, rows, budget, "title"))
    boundary = 2 * script.LEFT + script.CELL * T
    for rect in tree.iter("{http://www.w3.org/2000/svg}rect"):
        if float(rect.get("x", 0)) > boundary and rect.get("height") == str(script.CELL):
            drawn[rect.get("fill")] += int(rect.get("width")) // script.CELL
    assert drawn == Counter(script.KINDS[kind][0] for row in rows for kind in row)


def test_the_page_has_what_the_script_draws(script):
    """The figure of docs/concepts.md names what it was made with."""
    title = ElementTree.parse(ROOT / "docs" / "images" / "support.svg").getroot()[0].text
    assert title == f"smollm2-135m, layer 14, its shipped indexer, {script.BUDGET}"
