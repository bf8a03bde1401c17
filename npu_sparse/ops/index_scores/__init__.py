from .op import index_scores, select_by_index

__all__ = ["index_scores", "select_by_index"]
