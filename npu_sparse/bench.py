"""The former place of the measurements."""

raise ImportError(
    "npu_sparse.bench is now npu_sparse.measure (quality, ttft, frontier, variants; timing is clocks, cost is npu_cost, dense "
    "and shapes are ttft.baselines and ttft.shapes), and its stats are npu_sparse.runs.stats"
)
