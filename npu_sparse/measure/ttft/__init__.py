"""Time to first token of dense and sparse prefill: `npu-sparse ttft`."""

from .config import ATTACHED, STAGES, TtftConfig
from .run import run_ttft, time_to_first_token

__all__ = ["ATTACHED", "STAGES", "TtftConfig", "run_ttft", "time_to_first_token"]
