from .op import dense_rows

__all__ = ["dense_rows"]
