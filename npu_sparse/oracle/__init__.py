"""The oracle study: how much of dense attention a checkpoint needs, before anything is trained.

```python
from npu_sparse.oracle import OracleConfig, run_oracle

report = run_oracle(OracleConfig("smollm2-135m", length=1024, budgets=(64, 128, 256)), "runs/oracle")
```

`study.py` runs it; `quality.py` measures end to end, `layers.py` layer by layer on the dense trajectory; `page.py` and
`figures.py` show it.
"""

from .config import OracleConfig, Variant, sparsity, variants
from .study import run_oracle

__all__ = ["OracleConfig", "Variant", "run_oracle", "sparsity", "variants"]
