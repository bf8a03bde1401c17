"""Distillation of an indexer from a frozen model's own dense attention."""

from .config import DistillConfig
from .train import run_distill

__all__ = ["DistillConfig", "run_distill"]
