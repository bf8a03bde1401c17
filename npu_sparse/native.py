"""The former place of what builds and loads the AscendC kernels."""

raise ImportError("npu_sparse.native is now npu_sparse.ascendc")
