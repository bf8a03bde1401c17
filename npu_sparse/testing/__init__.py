"""Tools for tests of operators and models: inputs, hostile data, exact answers, the accuracy assertion, tiny models."""

from .accuracy import assert_accurate, over_seeds, plain_products, rms_error
from .backends import BACKENDS, INTERPRETED, Backend, open_backend
from .exact import (
    naive_attention_mass,
    naive_index_partition,
    naive_index_scores,
    naive_select_tokens,
    naive_select_two_level,
    naive_sparse_attention,
    naive_sparse_attention_with_tail,
)
from .inputs import (
    DTYPES,
    INT_MAX,
    attention_inputs,
    hostile,
    index_inputs,
    normal,
    padding,
    poisoned,
    ragged_scores,
    random_support,
    whole_index_inputs,
)
from .models import TINY_MODELS, tiny_model, tiny_tokenizer
from .prompts import close, greedy, left_padding, recorder, right_padding, tiny_selector, tokens

__all__ = [
    "BACKENDS",
    "Backend",
    "DTYPES",
    "INTERPRETED",
    "INT_MAX",
    "TINY_MODELS",
    "assert_accurate",
    "attention_inputs",
    "close",
    "greedy",
    "hostile",
    "index_inputs",
    "left_padding",
    "naive_attention_mass",
    "naive_index_partition",
    "naive_index_scores",
    "naive_select_tokens",
    "naive_select_two_level",
    "naive_sparse_attention",
    "naive_sparse_attention_with_tail",
    "normal",
    "open_backend",
    "over_seeds",
    "padding",
    "plain_products",
    "poisoned",
    "ragged_scores",
    "random_support",
    "recorder",
    "right_padding",
    "rms_error",
    "tiny_model",
    "tiny_selector",
    "tiny_tokenizer",
    "tokens",
    "whole_index_inputs",
]
