"""Measurements: quality and TTFT of dense and sparse prefill, matched on model, prompts, length and budget.

`quality` scores variants on the same prompts, `ttft` times them interleaved in one process, `frontier` joins both into
one table. `variants` says what is compared, `stats` how sure the figures are, `timing` how they are clocked.
"""
