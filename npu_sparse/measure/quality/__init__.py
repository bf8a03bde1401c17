"""Quality of dense and sparse prefill on the same prompts: `npu-sparse eval`."""

from .config import GAPS, MACRO, TOTAL, EvalConfig
from .page import machine_lines, points
from .run import adopt_records, prepare_prompts, report_eval, run_eval

__all__ = [
    "GAPS", "MACRO", "TOTAL", "EvalConfig", "adopt_records", "machine_lines", "points", "prepare_prompts", "report_eval",
    "run_eval",
]  # fmt: skip
