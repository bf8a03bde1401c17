"""Measurements: quality and TTFT of dense and sparse prefill, matched on model, prompts, length and budget.

`quality` scores variants on the same prompts, `ttft` times them interleaved in one process, `frontier` joins both into
one table. `variants` says what is compared, `prompts` and `decode` what goes in and comes out, `clocks` how it is timed,
`teacher_forced` what the right answers would have cost.
"""
