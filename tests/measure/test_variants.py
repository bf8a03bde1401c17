import pytest

from npu_sparse import Budget
from npu_sparse.measure.variants import (
    OPTIONS,
    budget_in,
    budget_of,
    budget_words,
    budgets_of,
    check_names,
    former_fields_as_budget,
    in_order,
    spelled,
    split_names,
    variant_named,
)

COMMON = Budget(k=64, block=16, reduce="mean", candidates=256)


def test_options_change_fields_of_the_common_budget():
    assert budget_of("indexer-shared+candidates=512+key_block=32", COMMON) == COMMON.replace(candidates=512, key_block=32)
    assert budget_of("indexer-shared+reduce=max+block=32", COMMON) == COMMON.replace(reduce="max", block=32)
    assert budget_of("indexer+share_layers=2", COMMON) == COMMON.replace(block=1, share_layers=2)
    assert budget_of("oracle-shared+share_layers=3", COMMON) == COMMON.replace(share_layers=3, candidates=0)
    assert budget_of("indexer+tail", COMMON) == COMMON.replace(block=1, tail=True) == budget_of("indexer+tail=true", COMMON)
    assert budget_of("oracle+tail=false", COMMON.replace(tail=True)).tail is False
    assert budget_of("dense", COMMON) is None


def test_only_an_indexer_has_candidates():
    assert {name: budget_of(name, COMMON).candidates for name in ("oracle", "local", "random", "indexer")} == {
        "oracle": 0, "local": 0, "random": 0, "indexer": 256,
    }  # fmt: skip


def test_a_label_names_the_options():
    variant = variant_named("indexer-shared+candidates=512+key_block=32")
    assert variant.label == "indexer, shared, candidates 512, key_block 32"
    assert (variant.base, variant.shared, dict(variant.options)) == (
        "indexer-shared", True, {"candidates": 512, "key_block": 32}
    )  # fmt: skip


def test_variants_stand_in_one_order_those_with_options_after_their_base():
    names = ["indexer+k=8", "local", "indexer", "oracle+k=9", "oracle+k=8", "dense"]
    assert in_order(names) == ["dense", "oracle+k=9", "oracle+k=8", "indexer", "indexer+k=8", "local"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("indexed", "variants must be among dense, oracle, .*, got 'indexed'"),
        ("dense+k=8", "options of dense must be among none, each once, got 'k=8'"),
        ("oracle+candidates=8", "options of oracle must be among k, sink, .*, exact_last, tail, each once, got 'candid"),
        ("indexer+block=8", "options of indexer must be among k, sink, .*, got 'block=8'"),
        ("indexer+k=8+k=9", "each once, got 'k=9'"),
        ("indexer+k", "k must have a value, such as k=512, got none"),
        ("indexer+k=1.5", "k must be a whole number or 0:512.65536:1024, got '1.5'"),
        ("indexer+tail=1", "tail must stand alone or be true or false, got '1'"),
        ("indexer-shared+dense_below=9", "got 'dense_below=9'"),
    ],
)
def test_a_name_that_says_nothing_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        check_names(("dense", name))


def test_a_table_says_what_differs_from_the_default_budget():
    assert budget_words(Budget(k=9, block=1)) == ""
    assert budget_words(Budget(share_layers=1, candidates=0, key_block=128)) == ""
    assert budget_words(Budget(k=64, reduce="mean", share_layers=2, candidates=64, key_block=32)) == (
        " All sparse rows: reduce mean, share_layers 2, candidates 64, key_block 32."
    )


def test_a_variant_is_spelled_as_its_budget_is():
    assert budget_of("indexer-shared:candidates=512,key_block=32", COMMON) == COMMON.replace(candidates=512, key_block=32)
    assert budget_of("indexer:block=8,k=128", COMMON) == COMMON.replace(block=8, k=128)
    assert budget_of("indexer:k=128", COMMON) == COMMON.replace(block=1, k=128)
    assert variant_named("indexer:block=16").shared and not variant_named("indexer:k=16").shared
    assert in_order(["indexer:k=8", "indexer", "dense"]) == ["dense", "indexer", "indexer:k=8"]


def test_a_list_of_variants_is_split_between_variants_and_not_within_a_budget():
    text = "dense,indexer:block=16,k=2048,tail,indexer-shared+k=8,local"
    assert split_names(text) == ("dense", "indexer:block=16,k=2048,tail", "indexer-shared+k=8", "local")


def test_every_field_of_the_budget_is_an_option_of_some_variant():
    served = {"per_layer", "dense_below"}  # they depend on a model's layers and on a device
    assert set(OPTIONS) == set(Budget.__dataclass_fields__) - served


def test_a_config_of_version_0_1_has_its_budget_in_fields():
    former = {"model": "m", "k": 256, "block": 16, "reduce": "mean", "sink": 0, "tail": True}
    assert former_fields_as_budget(former) == {"model": "m", "budget": "k=256,block=16,reduce=mean,tail"}
    assert budget_in(former) == Budget(k=256, block=16, reduce="mean", tail=True)
    now = {"model": "m", "budget": "k=512,block=64"}
    assert former_fields_as_budget(now) == now and budget_in(now) == Budget()


@pytest.mark.parametrize("budget", [Budget(), Budget(k=8, block=8), Budget(block=1, sink=4), Budget(k={0: 8, 64: 16})])
def test_a_written_budget_names_k_and_block_and_reads_back(budget):
    assert Budget.parse(spelled(budget)) == budget and spelled(budget).startswith("k=") and "block=" in spelled(budget)


def test_anchors_are_joined_by_plus_in_a_variant_too():
    for name in ("indexer:k=16,anchors=0+4+9,tail", "indexer+k=16+anchors=0+4+9+tail"):
        assert budget_of(name, COMMON) == COMMON.replace(block=1, k=16, anchors=(0, 4, 9), tail=True)


def test_where_a_variant_is_sparse_is_spelled_as_in_a_budget():
    assert budget_of("indexer-shared:k=16,dense_below=auto", COMMON) == COMMON.replace(k=16, dense_below="auto")
    assert budget_of("oracle:dense_below=99", COMMON).dense_below == 99
    assert budget_of("oracle:k=16,per_layer=3:8+5:9,tail", COMMON) == COMMON.replace(
        block=1, candidates=0, k=16, per_layer={3: 8, 5: 9}, tail=True
    )


def test_budgets_of_a_script_are_spelled_as_one_is_and_as_they_were():
    expected = [Budget(k=2048), Budget(k=2048, block=16, reduce="mean", tail=True), Budget(k=512, candidates=1024)]
    assert budgets_of("k=2048,block=64;k=2048,block=16,reduce=mean,tail;k=512,candidates=1024") == expected
    assert budgets_of("2048:64,2048:16:reduce=mean:tail,512:64:1024") == expected
    with pytest.raises(ValueError, match="budget must name fields among .*, got 'colour'"):
        budgets_of("2048:64:colour=3")
