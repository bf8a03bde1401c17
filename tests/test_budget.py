import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_sparse import Budget
from npu_sparse.budget import BLOCKS, KEY_BLOCKS, PARTITIONS, REDUCTIONS


@st.composite
def budgets(draw):
    block, sink, recent = draw(st.sampled_from(BLOCKS)), draw(st.integers(0, 8)), draw(st.integers(0, 8))
    ks = st.integers(1 + sink + recent + block, 5000)
    tiers = st.dictionaries(st.integers(1, 9999), ks, max_size=3).flatmap(lambda t: ks.map(lambda k: {0: k, **t}))
    return Budget(
        k=draw(st.one_of(ks, tiers)), block=block, reduce=draw(st.sampled_from(REDUCTIONS)), sink=sink, recent=recent,
        per_layer=draw(st.dictionaries(st.integers(0, 40), ks, max_size=3)), dense_below=draw(st.integers(0, 9999)),
        tail=draw(st.booleans()), exact_last=draw(st.integers(0, 300)),
        share_layers=draw(st.integers(1, 4)), candidates=draw(st.sampled_from([0, 5000, 8192])),
        key_block=draw(st.sampled_from(KEY_BLOCKS)), partition=draw(st.sampled_from(PARTITIONS)),
    )  # fmt: skip


@given(budget=budgets())
def test_a_budget_survives_json(budget):
    assert Budget.from_dict(json.loads(json.dumps(budget.to_dict()))) == budget


@given(budget=budgets(), length=st.integers(0, 20000))
def test_k_is_the_tier_of_the_length(budget, length):
    k = budget.k_for(length)
    if isinstance(budget.k, int):
        assert k == budget.k
    else:
        reached = [start for start in sorted(budget.k) if start <= length]
        assert k == budget.k[reached[-1]]
    for layer, own in budget.per_layer.items():
        assert budget.k_for(length, layer) == own
    assert budget.k_for(length, 41) == k


@given(budget=budgets())
def test_a_copy_without_changes_is_equal(budget):
    assert budget.replace() == budget
    assert budget.replace(dense_below=7).dense_below == 7


def test_check_length_refuses_more_keys_than_the_context_has():
    Budget(k=64).check_length(64)
    with pytest.raises(
        ValueError, match="k must not exceed the context, got k = 64 for 63 tokens: lower k or run dense"
    ):
        Budget(k=64).check_length(63)
    Budget(k={0: 64, 100: 128}).check_length(99)
    with pytest.raises(ValueError, match="got k = 128 for 100 tokens"):
        Budget(k={0: 64, 100: 128}).check_length(100)
    with pytest.raises(ValueError, match="got k = 200 for 100 tokens"):
        Budget(k=64, per_layer={3: 200}).check_length(100)


def test_what_is_always_kept_must_fit_exactly():
    Budget(k=4 + 8 + 15, block=16, sink=4, recent=8)
    with pytest.raises(ValueError, match=r"sink 4 \+ recent 8 .* block of 16 = 27\), got 26"):
        Budget(k=26, block=16, sink=4, recent=8)
    with pytest.raises(ValueError, match="got 26"):
        Budget(k=64, per_layer={2: 26}, block=16, sink=4, recent=8)
    with pytest.raises(ValueError, match="got 26"):
        Budget(k={0: 64, 99: 26}, block=16, sink=4, recent=8)


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"k": 0}, ValueError, "k must be >= 1, got 0"),
        ({"k": 1.5}, TypeError, "k must be an integer, got 1.5"),
        ({"k": True}, TypeError, "k must be an integer, got True"),
        ({"k": {}}, ValueError, "k must name at least one tier"),
        ({"k": {5: 64}}, ValueError, r"k must have a tier that starts at length 0, got \[5\]"),
        ({"k": {0: 0}}, ValueError, "k must be >= 1, got 0"),
        ({"k": {-1: 64}}, ValueError, "from_length must be >= 0, got -1"),
        ({"block": 3}, ValueError, r"block \(b_sel\) must be one of 1, 2, .*, got 3"),
        ({"block": True}, ValueError, r"block .* got True"),
        ({"block": 256}, ValueError, "got 256"),
        ({"reduce": "sum"}, ValueError, "reduce must be one of max, mean, softmax_max, got 'sum'"),
        ({"sink": -1}, ValueError, "sink must be >= 0, got -1"),
        ({"recent": 1.0}, TypeError, "recent must be an integer, got 1.0"),
        ({"dense_below": -5}, ValueError, "dense_below must be >= 0, got -5"),
        ({"per_layer": {-1: 8}}, ValueError, "per_layer: layer must be >= 0, got -1"),
        ({"per_layer": {0: 0}}, ValueError, "per_layer: k must be >= 1, got 0"),
        ({"share_layers": 0}, ValueError, "share_layers must be >= 1, got 0"),
        ({"candidates": -1}, ValueError, "candidates must be >= 0, got -1"),
        ({"k": 64, "candidates": 63}, ValueError, r"candidates must be 0 or hold the k keys .* \(64\), got 63"),
        ({"k": {0: 64, 9: 128}, "candidates": 64}, ValueError, r"candidates .* \(128\), got 64"),
        ({"k": 64, "per_layer": {1: 96}, "candidates": 64}, ValueError, r"candidates .* \(96\), got 64"),
        ({"key_block": 48}, ValueError, "key_block must be one of 16, 32, 64, 128, got 48"),
    ],
)
def test_a_broken_rule_is_named(fields, error, message):
    with pytest.raises(error, match=message):
        Budget(**fields)


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match=r"budget has unknown fields \['kk'\]"):
        Budget.from_dict({"kk": 3})


@given(budget=budgets())
def test_a_budget_survives_its_spelling(budget):
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text, budget",
    [
        ("", Budget()),
        ("k=1024", Budget(k=1024)),
        ("k=1024,block=16,reduce=mean", Budget(k=1024, block=16, reduce="mean")),
        ("k=0:512+65536:1024", Budget(k={0: 512, 65536: 1024})),
        ("k=0:512", Budget(k={0: 512})),
        ("per_layer=3:256+7:640", Budget(per_layer={3: 256, 7: 640})),
        ("sink=4,recent=64,share_layers=2,tail", Budget(sink=4, recent=64, share_layers=2, tail=True)),
        ("dense_below=auto", Budget(dense_below="auto")),
        ("anchors=0+4+9", Budget(anchors=(0, 4, 9))),
        ("anchors=3", Budget(anchors=(3,))),
        ("dense_below=4096,candidates=2048,key_block=32", Budget(dense_below=4096, candidates=2048, key_block=32)),
    ],
)  # fmt: skip
def test_a_text_spells_a_budget_and_the_budget_spells_that_text(text, budget):
    assert Budget.parse(text) == budget
    assert set(str(budget).split(",")) == set(text.split(","))
    written = budget.to_dict()
    assert json.loads(json.dumps(written)) == written and Budget.from_dict(written) == budget


def test_a_spelling_takes_spaces_defaults_and_any_order():
    assert Budget.parse(" block = 16 , k = 0 : 512 + 4096 : 768 ") == Budget(k={0: 512, 4096: 768}, block=16)
    assert Budget.parse("tail=true") == Budget.parse("tail") == Budget(tail=True)
    assert Budget.parse("tail=false,block=64") == Budget()
    assert str(Budget.parse("k=512,reduce=max")) == ""


def test_a_spelling_changes_the_base_it_is_given():
    base = Budget(k=256, block=16, tail=True, per_layer={3: 128})
    assert Budget.parse("", base) == base
    assert Budget.parse("block=1,tail=false", base) == Budget(k=256, block=1, per_layer={3: 128})


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("1024", "budget must name fields among k, block, .*, got '1024'"),
        ("kk=1024", "budget must name fields among k, block, .*, got 'kk'"),
        ("k=1024,,block=2", "budget must be FIELD=VALUE joined by commas, .*, got 'k=1024,,block=2'"),
        ("=1024", "budget must be FIELD=VALUE"),
        ("k=1,k=2", "k must be given once, got 'k=1,k=2'"),
        ("block", "block must have a value, such as block=64, got none"),
        ("reduce=", "reduce must have a value, such as reduce=max, got none"),
        ("per_layer=", "per_layer must have a value, such as per_layer=3:256\\+7:512, got none"),
        ("block=x", "block must be a whole number, got 'x'"),
        ("sink=1.5", "sink must be a whole number, got '1.5'"),
        ("recent=\u0663", "recent must be a whole number"),  # a digit, but no spelling of ours
        ("k=" + "9" * 5000, "k must be a whole number or 0:512"),
        ("k=many", "k must be a whole number or 0:512\\+65536:1024, got 'many'"),
        ("k=0:512+65536", "k must be whole numbers FROM:K, such as 0:512\\+65536:1024, got '0:512\\+65536'"),
        ("k=0:512+0:256", "k must name 0 once, got '0:512\\+0:256'"),
        ("k=4096:512", "k must have a tier that starts at length 0"),
        ("per_layer=256", "per_layer must be whole numbers LAYER:K, such as 3:256\\+7:512, got '256'"),
        ("per_layer=3:0", "per_layer: k must be >= 1, got 0"),
        ("anchors=0,4", "budget must name fields among"),
        ("anchors=", "anchors must have a value, such as anchors=0\\+4\\+9, got none"),
        ("anchors=0+x", "anchors must be whole numbers joined by plus, such as 0\\+4\\+9, got '0\\+x'"),
        ("anchors=4+0", "anchors must be layers in ascending order, none twice, got \\[4, 0\\]"),
        ("anchors=0,share_layers=2", "share_layers must be 1 where anchors say which layers select, got 2"),
        ("tail=yes", "tail must stand alone or be true or false, got 'yes'"),
        ("dense_below=off", "dense_below must be a whole number or \"auto\", got 'off'"),
        ("reduce=sum", "reduce must be one of .*, got 'sum'"),
        ("block=3", "block .* must be one of .*, got 3"),
        ("sink=-1", "sink must be >= 0, got -1"),
    ],
)  # fmt: skip
def test_a_bad_spelling_is_refused_in_one_sentence(text, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}") as refused:
        Budget.parse(text)
    assert "\n" not in str(refused.value)


def test_a_budget_is_spelled_in_text_only():
    with pytest.raises(TypeError, match="budget must be a text such as 'k=1024,block=64', got dict"):
        Budget.parse({"k": 1024})


def test_every_field_says_what_it_does():
    told = Budget.field_help()
    assert list(told) and set(told) == set(Budget.__dataclass_fields__)
    assert told["sink"] == "the first `sink` valid keys are always kept."


def test_a_grid_gives_its_axes_and_the_rest():
    axes = {"k": (256, 512), "block": (1, 64)}
    assert Budget.grid("k=256|512, block=1|64 ,sink=4,tail", ("k", "block")) == (axes, "sink=4,tail")
    assert Budget.grid("reduce=max|mean", ("reduce",)) == ({"reduce": ("max", "mean")}, "")
    assert Budget.grid("tail=true, sink = 4", ()) == ({}, "tail,sink=4")  # one text for one meaning
    assert Budget.grid("k=8", ("block",)) == ({}, "k=8") and Budget.grid(" ", ("k",)) == ({}, "")
    for text, said in (("k=8,k=9", "k must be given once"), ("k=8|", "k must have a value"), ("k=1|0:2", "of a grid must")):
        with pytest.raises(ValueError, match=said):
            Budget.grid(text, ("k",))
    with pytest.raises(TypeError, match="budget must be a text"):
        Budget.grid(Budget(), ("k",))
