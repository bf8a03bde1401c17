import pytest


def test_the_former_package_says_what_replaced_it():
    with pytest.raises(ImportError, match="npu_sparse.bench is now npu_sparse.measure .*npu_sparse.runs.stats"):
        from npu_sparse.bench.quality import EvalConfig  # noqa: F401
