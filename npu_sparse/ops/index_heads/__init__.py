from .op import index_heads

__all__ = ["index_heads"]
