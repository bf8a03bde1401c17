import json
import math
from dataclasses import fields

import pytest

from npu_sparse.distill import DistillConfig


@pytest.mark.parametrize(
    "changes, error, rule",
    [
        ({"tokens": 0}, ValueError, "tokens must be >= 1, got 0"),
        ({"tokens": 2047}, ValueError, "tokens must hold the longest of lengths, 2048, got 2047"),
        ({"micro_batch": 0}, ValueError, "micro_batch must be >= 1, got 0"),
        ({"rows": -1}, ValueError, "rows must be >= 0, got -1"),
        ({"segment": 0}, ValueError, "segment must be >= 1, got 0"),
        ({"steps": 0}, ValueError, "steps must be >= 1, got 0"),
        ({"steps": 2.5}, TypeError, "steps must be a whole number, got 2.5"),
        ({"steps": True}, TypeError, "steps must be a whole number, got True"),
        ({"warmup": -1}, ValueError, "warmup must be >= 0, got -1"),
        ({"lm_steps": -1}, ValueError, "lm_steps must be >= 0, got -1"),
        ({"sparse_k": 0}, ValueError, "sparse_k must be >= 1, got 0"),
        ({"save_every": 0}, ValueError, "save_every must be >= 1, got 0"),
        ({"validate_every": 0}, ValueError, "validate_every must be >= 1, got 0"),
        ({"validation_prompts": 0}, ValueError, "validation_prompts must be >= 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
        ({"heads": 0}, ValueError, "heads must be >= 1, got 0"),
        ({"heads": 65}, ValueError, "heads must be <= 64, got 65"),
        ({"dim": 96}, ValueError, "dim must be one of 64, 128, 256, got 96"),
        ({"loss": "mse"}, ValueError, "loss must be one of kl, sparse, both, shared, got 'mse'"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, kernel, got 'fast'"),
        ({"impl": "kernel", "loss": "both"}, ValueError, "impl must be auto or reference for loss 'both'"),
        ({"lengths": ()}, ValueError, "lengths must name at least one value, got none"),
        ({"lengths": (1024, 63)}, ValueError, "lengths must be >= 64, got 63"),
        ({"lengths": "1024"}, TypeError, "lengths must be a list, got '1024'"),
        ({"lengths": 1024}, TypeError, "lengths must be a list, got 1024"),
        ({"validation_length": 10}, ValueError, "validation_length must be >= 64, got 10"),
        ({"budgets": ()}, ValueError, "budgets must name at least one value, got none"),
        ({"budgets": (0,)}, ValueError, "budgets must be >= 1, got 0"),
        ({"budgets": (64, 2048)}, ValueError, "budgets must be below validation_length = 2048, got 2048"),
        ({"budget": "k=64|2048"}, ValueError, "budgets must be below validation_length = 2048, got 2048"),
        ({"budget": "k=64,block=1"}, ValueError, "budget must name k only, at which recall is measured per query, got 'block=1'"),
        ({"texts": "builtin"}, TypeError, "texts must be a list, got 'builtin'"),
        ({"texts": ()}, ValueError, "texts must name at least one value, got none"),
        ({"tasks": ("niah_singel_1",)}, ValueError, "task must be a known name, got 'niah_singel_1'"),
        ({"tasks": ("qa_1",)}, ValueError, "tasks must run without a question file, got qa_1"),
        ({"task_fraction": 1.5}, ValueError, "task_fraction must be in"),
        ({"tasks": ()}, ValueError, "and 0 without tasks, got 0.5"),
        ({"validation_fraction": 0.0}, ValueError, "validation_fraction must be between 0 and 1, got 0.0"),
        ({"validation_fraction": 1.0}, ValueError, "validation_fraction must be between 0 and 1, got 1.0"),
        ({"lr": 0.0}, ValueError, "lr and clip must be positive"),
        ({"lr": math.nan}, ValueError, "lr and clip must be positive"),
        ({"clip": -1.0}, ValueError, "lr and clip must be positive"),
        ({"min_lr": 1.0}, ValueError, "min_lr must be in [0, lr = 0.001], got 1.0"),
        ({"min_lr": -1.0}, ValueError, "min_lr must be in [0, lr = 0.001], got -1.0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be >= 0, got -0.1"),
    ],
)
def test_a_bad_field_is_refused_with_one_sentence(changes, error, rule):
    with pytest.raises(error) as caught:
        DistillConfig("tiny", **changes)
    assert rule in str(caught.value) and "\n" not in str(caught.value)


def test_the_defaults_are_valid():
    config = DistillConfig("tiny")
    assert config.tokens >= max(config.lengths)


def test_lists_become_tuples_and_json_gives_the_same_config():
    config = DistillConfig("tiny", texts=["a", "b"], lengths=[64, 128], budgets=[8], tasks=[], task_fraction=0)
    assert config.lengths == (64, 128)
    assert DistillConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_budgets_of_validation_are_spelled_as_a_grid():
    config = DistillConfig("tiny", budget="k=64|128")
    assert config == DistillConfig("tiny", budgets=(64, 128))
    assert "budget" not in config.to_dict()  # as runs were written before


def test_every_field_is_explained():
    attributes = DistillConfig.__doc__.partition("Attributes:")[2]
    for field in fields(DistillConfig):
        assert field.name in attributes, field.name


@pytest.mark.parametrize("steps, warmup", [(10, 3), (10, 0), (1, 0), (1, 5), (4, 4), (2, 1)])
def test_the_learning_rate_rises_over_warmup_and_falls_to_min_lr(steps, warmup):
    config = DistillConfig("tiny", steps=steps, warmup=warmup, lr=1e-2, min_lr=1e-4)
    rates = [config.lr_at(step) for step in range(steps)]
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert all(0 < rate <= config.lr for rate in rates)
    if warmup and warmup <= steps:
        assert rising[-1] == pytest.approx(config.lr)
    if len(falling) > 1:
        assert falling[0] == pytest.approx(config.lr) and falling[-1] == pytest.approx(config.min_lr)
