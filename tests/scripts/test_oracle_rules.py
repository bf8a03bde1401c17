import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from npu_sparse import Budget, SparsePrefill, selectors
from npu_sparse.runs.store import RunError
from npu_sparse.testing import tiny_model, tokens

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("oracle_rules", ROOT / "scripts" / "oracle_rules.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "oracle_rules", module)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def loglikelihood(model, ids, after, budget=None):
    with SparsePrefill.attach(model, selectors.Oracle(), budget) if budget else torch.no_grad():
        first = model(ids).logits[:, -1:].float()
    return float(torch.log_softmax(first[0], -1)[0, after[0, 0]])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rules_are_what_the_package_does(script, name):
    model, ids, after = tiny_model(name), tokens(1, 70), tokens(1, 1, 1)
    dense = loglikelihood(model, ids, after)
    paper = loglikelihood(model, ids, after, Budget(k=12, block=1))
    tail = loglikelihood(model, ids, after, Budget(k=12, block=1, tail=True))
    script.ROWS = 16
    lab = script.Lab(model)
    rules = script.rules(12)
    assert lab.follow(ids, after)[0] == pytest.approx(dense, abs=1e-4)
    assert lab.follow(ids, after, rules["mean over heads, 12 (the paper)"])[0] == pytest.approx(paper, abs=1e-4)
    assert lab.follow(ids, after, rules["12 + running mean (tail)"])[0] == pytest.approx(tail, abs=1e-4)
    assert abs(paper - dense) > 1e-3 and abs(tail - paper) > 1e-3
    for name, rule in rules.items():
        assert torch.isfinite(torch.tensor(lab.follow(ids, after, rule)[0])), name


def test_a_rule_of_every_key_is_dense_and_parts_are_parts(script):
    model, ids, after = tiny_model("llama"), tokens(1, 70), tokens(1, 3, 1)
    lab = script.Lab(model)
    dense = lab.follow(ids, after)[0]
    for name, rule in script.rules(512).items():
        assert lab.follow(ids, after, rule)[0] == pytest.approx(dense, abs=1e-3), name
    sparse = script.by_mean(4)
    assert lab.follow(ids, after, sparse, layers=set())[0] == dense
    assert lab.follow(ids, after, sparse, rows=lambda t, T: t < 0)[0] == pytest.approx(dense, abs=1e-3)
    one, all_layers = lab.follow(ids, after, sparse, layers={1})[0], lab.follow(ids, after, sparse)[0]
    assert len({round(x, 3) for x in (dense, one, all_layers)}) == 3


def test_records_are_those_of_their_prompt_and_former_ones_are_read(script, tmp_path):
    judged = {"dense": [-1.5, True], "a rule": [-2.0, False]}
    (tmp_path / "cells").mkdir()
    for name, record in (("0000", judged), ("0001", {}), ("0002", {"rules": judged, "prompt": "0003"}), ("0003", {"dense": [1]})):
        (tmp_path / "cells" / f"{name}.json").write_text(json.dumps(record))
    cells = script.records(tmp_path, ["0000", "0001", "0002", "0003", "0004"], list(judged))
    assert [cells.read(name)["rules"] for name in ("0000", "0001")] == [judged, {}]
    assert cells.missing() == ["0004"]
    for name, said in (("0002", "must be the record of prompt '0002', got '0003'"), ("0003", "must have")):
        with pytest.raises(RunError, match=said):
            cells.read(name)
    cells.write("0004", {"rules": judged})
    assert cells.read("0004")["rules"] == judged
