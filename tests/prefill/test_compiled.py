"""A compiled prefill is one graph."""

import pytest
import torch

from npu_sparse import Budget, SparsePrefill, selectors
from npu_sparse.testing import close, left_padding, tiny_model, tiny_selector, tokens

SPARSE = Budget(k=24, block=8, sink=2, recent=4)
pytestmark = pytest.mark.usefixtures("no_gradients")


WITH_CACHE = {"use_cache": True}
PADDED = {"use_cache": False, "attention_mask": left_padding(tokens())}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind, options",
    [
        ("llama", "oracle", PADDED),
        ("llama", "indexer", WITH_CACHE),
        ("gemma3", "indexer", PADDED),
        ("qwen3_5", "indexer", WITH_CACHE),
    ],
)
def test_a_prefill_compiles_to_one_graph(name, kind, options):
    changes = {} if name == "qwen3_5" else {"num_hidden_layers": 2}
    if name == "gemma3":
        changes["layer_types"] = ["sliding_attention", "full_attention"]
    model, ids = tiny_model(name, **changes), tokens()
    with SparsePrefill.attach(model, tiny_selector(kind, model), SPARSE):
        eager = model(ids, **options).logits
        torch.compiler.reset()
        compiled = torch.compile(lambda ids: model(ids, **options).logits, fullgraph=True, backend="aot_eager")
        close(compiled(ids), eager)


def test_a_compiled_prefill_that_may_be_packed_says_what_to_pass():
    model = tiny_model("llama")
    with SparsePrefill.attach(model, selectors.Oracle(), SPARSE):
        torch.compiler.reset()
        compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match="compiled prefill without a cache needs an attention_mask"):
            compiled(tokens())
