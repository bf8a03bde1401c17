"""`python -m npu_sparse.checkpoints NAME...`"""

import sys

from .load import main

sys.exit(main(sys.argv[1:]))
