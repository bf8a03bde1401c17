import os

import pytest
import torch
from hypothesis import settings

from npu_sparse.testing import BACKENDS, Backend, open_backend

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))

# the same examples on every run and every machine; `--hypothesis-profile=explore` looks for new ones
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=30, database=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("fixed")


@pytest.fixture(params=BACKENDS)
def backend(request) -> Backend:
    """Every back-end in turn; one that cannot run here skips with the sentence that a user would get."""
    try:
        return open_backend(request.param)
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError for a device it was not built for
        pytest.skip(str(error).splitlines()[0])
