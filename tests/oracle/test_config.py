import json

import pytest

from npu_sparse import Budget
from npu_sparse.oracle import OracleConfig, sparsity, variants


def test_sparsity_counts_causal_pairs():
    # 5 tokens, k = 2: queries read 1 + 2 + 2 + 2 + 2 = 9 of 1 + 2 + 3 + 4 + 5 = 15 pairs
    assert sparsity(2, 5) == pytest.approx(1 - 9 / 15)


@pytest.mark.parametrize("length", [1, 7, 64])
def test_sparsity_equals_a_count_of_every_pair(length):
    for k in range(1, length + 3):
        read = sum(min(k, t + 1) for t in range(length))
        assert sparsity(k, length) == pytest.approx(1 - read / sum(range(1, length + 1)))


def test_config_survives_json():
    config = OracleConfig("m", budgets=[8, 16], tasks=["vt"], blocks=[1])
    assert OracleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="unknown fields.*colour"):
        OracleConfig.from_dict({"model": "m", "colour": 1})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"budgets": (1024,)}, "budgets must be below the length of 1024 tokens, got 1024"),
        ({"budgets": (2000,)}, "budgets must be below the length"),
        ({"budgets": (0,)}, "budgets must be >= 1, got 0"),
        ({"budgets": (-5,)}, "budgets must be >= 1, got -5"),
        ({"budgets": ()}, "budgets must name at least one value"),
        ({"budgets": (64, 64)}, "budgets must name each value once"),
        ({"blocks": (3,)}, "blocks must be one of 1, 2, 4"),
        ({"heads": ("some",)}, "heads must be one of all, kv, got 'some'"),
        ({"reduces": ("sum",)}, "reduces must be one of max, mean"),
        ({"share_layers": (0,)}, "share_layers must be >= 1, got 0"),
        ({"share_layers": ()}, "share_layers must name at least one value"),
        ({"controls": ("best",)}, "controls must be one of local, random"),
        ({"texts": ()}, "texts must name at least one value"),
        ({"texts": ("",)}, "texts must name files"),
        ({"prompts": 0}, "prompts must be >= 1"),
        ({"layer_prompts": 5}, "layer_prompts must be at most prompts = 4"),
        ({"sink": 64}, "sink must be below every budget, got 64"),
        ({"noise_dtype": "float32"}, "noise_dtype must be one of auto, none, bfloat16, float16"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"impl": "fast"}, "impl must be one of"),
        ({"budget": "k=8|8"}, "budgets must name each value once"),
        ({"budget": "k=8|2000"}, "budgets must be below the length"),
        ({"budget": "k=0:8+64:16"}, "k of a grid must be whole numbers joined by \\|, got '0:8\\+64:16'"),
        ({"budget": "block=3"}, "blocks must be one of 1, 2, 4"),
        ({"budget": "reduce=softmax_max"}, "reduces must be one of max, mean"),
        ({"budget": "exact_last=8"}, "budget: field must be one of k, .*, tail, got 'exact_last'"),
        ({"budget": "colour=8"}, "budget must name fields among"),
        ({"budget": "sink=65"}, "k must hold the keys that are always kept"),
        ({"budget": "anchors=0+1", "share_layers": (2,)}, "share_layers must be 1 where anchors say"),
    ],
)
def test_broken_rules_are_refused_in_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        OracleConfig("m", **changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"), [("budgets", (1.5,)), ("budgets", 64), ("texts", "builtin"), ("prompts", True)]
)
def test_wrong_types_are_refused(name, value):
    with pytest.raises(TypeError, match=name):
        OracleConfig("m", **{name: value})


def test_the_noise_floor_has_another_dtype_by_itself():
    assert OracleConfig("m").floor_dtype == "bfloat16"
    assert OracleConfig("m", dtype="bfloat16").floor_dtype == "float32"
    assert OracleConfig("m", noise_dtype="float16").floor_dtype == "float16"
    assert OracleConfig("m", noise_dtype="none").floor_dtype is None


def test_reduction_only_multiplies_shared_blocks():
    cells = [v.cell for v in variants(OracleConfig("m", budgets=(8,), blocks=(1, 64)), kv_heads=2)]
    assert cells == [
        "oracle-all-b1-k8", "oracle-all-b64-max-k8", "oracle-all-b64-mean-k8",
        "oracle-kv-b1-k8", "oracle-kv-b64-max-k8", "oracle-kv-b64-mean-k8", "local-k8", "random-k8",
    ]  # fmt: skip


def test_one_kv_head_leaves_out_kv_groups():
    left = variants(OracleConfig("m", heads=("all", "kv")), kv_heads=1)
    assert {v.heads for v in left} == {"all"}


def test_cells_have_distinct_names():
    cells = [v.cell for v in variants(OracleConfig("m", blocks=(1, 16, 64), share_layers=(1, 2, 3)), kv_heads=4)]
    assert len(set(cells)) == len(cells)


def test_a_grid_and_what_its_rows_share_are_spelled_as_budgets_are():
    spelled = OracleConfig("m", budget="k=8|16, block=1|64, reduce=max, share_layers=1|2, tail, sink=2")
    apart = OracleConfig("m", budgets=(8, 16), blocks=(1, 64), reduces=("max",), share_layers=(1, 2), budget="tail,sink=2")
    assert spelled == apart and spelled.tail and not OracleConfig("m").tail
    first, *_, last = variants(spelled, kv_heads=1)
    assert spelled.budget_of(first) == Budget(k=8, block=1, tail=True, sink=2)
    shared = next(v for v in variants(spelled, kv_heads=1) if v.block == 64 and v.share_layers == 2)
    assert spelled.budget_of(shared) == Budget(k=8, block=64, share_layers=2, tail=True, sink=2)


@pytest.mark.parametrize("tail", [False, True])
def test_a_config_of_version_0_1_is_read(tail):
    config = OracleConfig("m", budget="tail" if tail else "")
    former = {name: value for name, value in config.to_dict().items() if name != "budget"} | {"tail": tail}
    assert OracleConfig.from_dict(former) == config
