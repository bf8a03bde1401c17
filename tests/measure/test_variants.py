import pytest

from npu_sparse import Budget
from npu_sparse.measure.variants import budget_of, budget_words, check_names, in_order, variant_named

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
        ("oracle+candidates=8", "options of oracle must be among k, sink, recent, share_layers, exact_last, tail, each once"),
        ("indexer+block=8", "options of indexer must be among k, sink, .*, got 'block=8'"),
        ("indexer+k=8+k=9", "each once, got 'k=9'"),
        ("indexer+k", "k of a variant must be a whole number, such as k=2048, got 'k'"),
        ("indexer+k=1.5", "k of a variant must be a whole number"),
        ("indexer+tail=1", "tail must be alone, or tail=true or tail=false, got 'tail=1'"),
        ("indexer-shared+dense_below=9", "got 'dense_below=9'"),
    ],
)
def test_a_name_that_says_nothing_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        check_names(("dense", name))


def test_a_table_says_what_differs_from_the_default_budget():
    assert budget_words({"k": 9, "block": 1}) == ""
    assert budget_words({"share_layers": 1, "candidates": 0, "key_block": 128}) == ""
    assert budget_words({"reduce": "mean", "share_layers": 2, "candidates": 64, "key_block": 32}) == (
        " All sparse rows: reduce mean, share_layers 2, candidates 64, key_block 32."
    )
