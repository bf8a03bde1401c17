"""Measurements: quality and TTFT of dense and sparse prefill, matched on model, prompts, length and budget."""
