"""Quality against TTFT over a grid of budgets: `npu-sparse frontier`."""

from .config import FrontierConfig
from .run import join, run_frontier

__all__ = ["FrontierConfig", "join", "run_frontier"]
