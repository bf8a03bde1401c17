from .op import index_partition, index_scores, select_by_index

__all__ = ["index_partition", "index_scores", "select_by_index"]
